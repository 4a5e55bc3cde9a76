"""Demonstrations: where they come from, how they become tokens, who may check an answer, how a trace is broken.

Algorithm 1 (arXiv 2510.01857) starts from demonstrations D_E = {(question, trace, answer)}. It takes from here their
tokens, and negatives that cost no sampling. The true answers, which it must not look at, are here too, behind a lock.

    1. demonstrations   Example; load_examples, where D_E comes from: embedded tasks, the hub, your own JSON lines
    2. tokens           question -> prompt; trace and answer -> response, *its end token included*
    3. Batch            padded tokens [B, T], with masks that come from lengths
    4. the verifier     is_correct, and the lock on it, no_verifier
    5. perturb          an expert's trace with one thing broken. Negative is only what follows, from the first changed
                        token on: perturbed_negatives finds its column by comparing tokens

    what the method needs           where                 test, in tests/test_data.py
    D_E                             load_examples         splits_are_disjoint_and_reproducible
    a_t for all t of the response   Batch.response_mask   masks_come_from_lengths_and_hold_the_end_token
    no verifier in training         no_verifier           the_verifier_can_be_locked
    perturbed negatives             perturb               perturbations_change_something_and_are_wrong
    the first wrong token           first_error           first_error_is_exact, token_at_names_the_token_that_..

Tasks and file formats are in tasks/, chat templates in engine/chat.py. Run `python data.py` to see one example of each.
"""

import itertools
import os.path
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.chat import (
    chat_text,
    end_of_turn,
    opening,
    prompt_tokens,
    text_ids,
    without_closed_block,
)
from engine.errors import UserError, nearest
from tasks import countdown, records, words
from tasks.answers import extract_answer, same_answer
from tasks.common import first_difference

# 1. Demonstrations --------------------------------------------------------------------------------------------------

# Tasks whose problems are made here, from a seed. Each module has the same names in it: solutions (an expert's), is_right
# and first_error (exact checks of a whole response). engine/settings.py has the settings and the base of each.
EMBEDDED = {"words": words, "countdown": countdown}
SOURCES = (*EMBEDDED, *records.HUB)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One demonstration. `options` is filled for multiple-choice questions only (perturbations draw from it). `task` is
    the embedded task, if any, whose own checker reads whole responses."""

    question: str
    trace: str
    answer: str
    options: tuple[str, ...] = ()
    task: str = ""


def load_examples(source: str, split: str, count: int | None = None, seed: int = 0,
                  steps: int = 3, largest: int = 40) -> list[Example]:  # fmt: skip
    """Examples of one split, shuffled by `seed`, at most `count` of them (None: all, or 1,000 of what is made here).

    source: 'words' (`steps` and `largest` set how hard it is), 'countdown', 'gsm8k' or 'medreason' (from the hub), a file
    of JSON lines with question, trace, answer, or a folder that holds train.jsonl and test.jsonl. Splits are disjoint: a
    source without a test split of its own is divided by tasks.common.split_of; validation always comes out of train. Of a
    few rows validation, or even train, may be empty; without test examples there is a UserError.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    if source in EMBEDDED:
        found = EMBEDDED[source].solutions(split, count or 1000, seed, steps=steps, largest=largest)
        return [Example(*solution, task=source) for solution in found]
    if source in records.HUB:
        found = records.from_hub(source, split)
    elif os.path.exists(source):  # unlike Path.exists, False for a name that no file can have
        found = records.from_files(Path(source), split)
    else:
        raise UserError(f"no data set '{source}'{nearest(source, SOURCES)}: use {', '.join(SOURCES)}, "
                        "a file of JSON lines, or a folder with train.jsonl and test.jsonl")  # fmt: skip
    if not found and split == "test":
        raise UserError(
            f"'{source}' has no test examples: by their text a tenth of the questions is for test, and here none is. Put some "
            "into a file of their own: --data DIR, a folder with train.jsonl and test.jsonl"
        )
    random.Random(f"order {seed}").shuffle(found)
    return [Example(*solution) for solution in found[:count]]


def draw(items: list, count: int, rng: random.Random) -> list:
    """`count` items, without repeats where there are enough."""
    return rng.sample(items, count) if len(items) >= count else rng.choices(items, k=count) if items else []


# 2. Prompts and responses -------------------------------------------------------------------------------------------

INSTRUCTION = "\n\nReason step by step inside <think> </think>, then give only the final answer inside <answer> </answer>."


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The prompt's tokens. With a chat template: one user turn, question and instruction, and whatever the template puts
    before the answer. Without: question, newline (after the beginning token, for a tokenizer that has one). Control tokens
    that are written in the question are text."""
    if getattr(tokenizer, "chat_template", None):
        text = question + INSTRUCTION
        prompt = without_closed_block(chat_text(tokenizer, text))
    else:
        text = question
        prompt = (tokenizer.bos_token or "") + question + "\n"
    ids = prompt_tokens(tokenizer, prompt, text.strip())
    if not ids:
        raise UserError(f"the tokenizer makes no token of the question {question[:100]!r}: there is nothing to answer")
    return ids


def response_text(trace: str, answer: str) -> str:
    """What the policy is to write: the trace between <think> tags, the answer between <answer> tags."""
    return f"<think>\n{trace}\n</think>\n<answer>{answer}</answer>"


def response_ids(tokenizer, text: str) -> list[int]:
    """The response's tokens and the end token. The end token is part of the response: it is trained, scored, paid.

    Control tokens that are written in `text` are text. Where the chat template's prompt already opens <think>, the response
    does not open it again; `decode` gives the whole text back.
    """
    return text_ids(tokenizer, text.removeprefix(prompt_opening(tokenizer))) + [end_tokens(tokenizer)[0]]


def prompt_opening(tokenizer) -> str:
    """What the prompt has written of the response: "<think>" and a newline with some chat templates, else nothing."""
    return opening(tokenizer, str(getattr(tokenizer, "chat_template", None) or ""))


def end_tokens(tokenizer, model=None) -> tuple[int, ...]:
    """All tokens that end a response. The first is the one to train: the chat template's end of turn, or without one the
    tokenizer's end. Then that end, which a base model knows, and those that the model's own generate() stops at."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = [end_of_turn(tokenizer, template), tokenizer.eos_token_id, *listed]
    return tuple(dict.fromkeys(token for token in known if token is not None))


def decode(tokenizer, ids) -> str:
    """Response tokens back to text, up to the first end token; special tokens are left out. What the prompt has written of
    the response stands before it."""
    ends = end_tokens(tokenizer)
    ids = itertools.takewhile(lambda token: token not in ends, map(int, ids))
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return prompt_opening(tokenizer) + text


def until_end(tokenizer, text: str) -> str:
    """`text` up to the first end token that is written out in it: what follows is no part of the response. For responses
    that a file brings as text: there an end token's name is taken for the end that somebody's model wrote. (In a
    demonstration it is text: response_ids.)"""
    for end in end_tokens(tokenizer):
        text = text.split(tokenizer.convert_ids_to_tokens(end), 1)[0]
    return text


def token_at(tokenizer, ids, offset: int) -> int:
    """Index of the token of `ids` that holds character `offset` of the decoded text (past its end: the end token)."""
    reaches = (index for index in range(len(ids)) if len(decode(tokenizer, ids[: index + 1])) > offset)
    return next(reaches, len(ids) - 1)


def fit_context(
    tokenizer, examples: list[Example], context: int, new_tokens: int = 0
) -> tuple[list[Example], int]:
    """Drop what does not fit the model's context: (examples that fit, number dropped). An example fits if its prompt with its
    own trace, and its prompt with `new_tokens` sampled ones, are at most `context` tokens long. Cutting a trace instead
    would teach the reward that experts stop in mid-sentence. UserError if the tokenizer cannot write most of them."""
    kept, unwritten = written_and_short(tokenizer, examples, context, new_tokens)
    check_fitting(examples, kept, unwritten, context)
    return kept, len(examples) - len(kept)


def written_and_short(
    tokenizer, examples: list[Example], context: int, new_tokens: int
) -> tuple[list[Example], list[Example]]:
    """(examples that fit the context, examples that the tokenizer cannot write)."""
    kept = []
    unwritten = []
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, *end_tokens(tokenizer)}
    for example in examples:
        prompt = prompt_ids(tokenizer, example.question)
        response = response_ids(tokenizer, response_text(example.trace, example.answer))
        if not unknown.isdisjoint(prompt + response):
            unwritten.append(example)
        if len(prompt) + max(len(response), new_tokens) <= context:
            kept.append(example)
    return kept, unwritten


def check_fitting(examples: list[Example], kept: list, unwritten: list, context: int) -> None:
    """UserError if the tokenizer cannot write most of these examples, or none is short enough."""
    if 2 * len(unwritten) > len(examples):
        raise UserError(f"this model's tokenizer has no tokens for {len(unwritten)} of {len(examples)} examples, such as "
                        f"{unwritten[0].question[:60]!r}: these problems need another --model")  # fmt: skip
    if examples and not kept:
        raise UserError(f"none of the {len(examples)} examples fits the model's context of {context} tokens")


def load_fitting(
    tokenizer, context: int, new_tokens: int, source: str, split: str, count: int, *problems
) -> tuple[list[Example], int]:
    """load_examples(source, split, count, *problems) that fit the context, and how many did not. In the place of one that is
    too long comes the next one of the data, while there are any."""
    kept: list[Example] = []
    unwritten: list[Example] = []
    tried: list[Example] = []
    while len(kept) < count:
        # a longer list begins with the shorter one: what is new are the examples after those that were tried
        try:
            loaded = load_examples(source, split, len(tried) + count - len(kept), *problems)
        except UserError:
            if not tried:
                raise
            break  # no more different problems can be made
        fresh = loaded[len(tried) :]
        if not fresh:
            break
        short, strange = written_and_short(tokenizer, fresh, context, new_tokens)
        kept += short
        unwritten += strange
        tried += fresh
    check_fitting(tried, kept, unwritten, context)
    return kept, len(tried) - len(kept)


# 3. Batches ---------------------------------------------------------------------------------------------------------
# Index t is the same everywhere: column t of any [B, T] tensor speaks of the token a_t = tokens[:, t], which was chosen
# after reading s_t = tokens[:, :t]. Column 0 has no past and is never part of a response.


@dataclass
class Batch:
    """Prompts with their responses, padded on the right."""

    tokens: torch.Tensor  # [B, T]
    prompt_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B], prompt and response together, end token included

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, T], 1 on real tokens. From lengths: the padding value may be a real token too."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (positions < self.lengths[:, None]).long()

    @property
    def response_mask(self) -> torch.Tensor:
        """[B, T] float, 1 on response tokens, the end token among them."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return ((positions >= self.prompt_lengths[:, None]) & (positions < self.lengths[:, None])).float()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> "Batch":
        """A slice, a list or a tensor of rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if len(lengths) else 0
        return Batch(self.tokens[rows][:, :longest], self.prompt_lengths[rows], lengths)

    def to(self, device) -> "Batch":
        return Batch(self.tokens.to(device), self.prompt_lengths.to(device), self.lengths.to(device))

    def response(self, row: int) -> list[int]:
        """The response tokens of one row, without padding."""
        return self.tokens[row, int(self.prompt_lengths[row]) : int(self.lengths[row])].tolist()


def make_batch(prompts: list[list[int]], responses: list[list[int]], device="cpu") -> Batch:
    """Token lists to a padded Batch. The padding value is 0 and means nothing: masks come from lengths."""
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses)], dtype=torch.long)
    tokens = torch.zeros(len(prompts), int(lengths.max()) if len(prompts) else 0, dtype=torch.long)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    return Batch(tokens, torch.tensor([len(p) for p in prompts], dtype=torch.long), lengths).to(device)


def cat_batches(*batches: Batch) -> Batch:
    """Rows of several batches one below the other, padded to the longest."""
    width = max(batch.tokens.shape[1] for batch in batches)
    tokens = torch.cat([torch.nn.functional.pad(b.tokens, (0, width - b.tokens.shape[1])) for b in batches])
    return Batch(tokens, torch.cat([b.prompt_lengths for b in batches]), torch.cat([b.lengths for b in batches]))


def demonstration_batch(tokenizer, examples: list[Example], device="cpu") -> Batch:
    """Expert demonstrations as a Batch: prompt, <think> trace </think> <answer> answer </answer>, end token."""
    prompts = [prompt_ids(tokenizer, e.question) for e in examples]
    responses = [response_ids(tokenizer, response_text(e.trace, e.answer)) for e in examples]
    return make_batch(prompts, responses, device)


# 4. The verifier ----------------------------------------------------------------------------------------------------
# The only door to the truth about an answer. Evaluation and GRPO go through it; IRL trains inside `no_verifier()`, where
# it is locked, so that a verifier cannot slip into the training path unnoticed.

_verifier_locked = False


@contextmanager
def no_verifier():
    """Context in which `is_correct` raises. irl.py trains inside it; tests/test_irl.py shows that the lock holds."""
    global _verifier_locked
    before, _verifier_locked = _verifier_locked, True
    try:
        yield
    finally:
        _verifier_locked = before


def is_correct(example: Example, response: str) -> bool:
    """The verifier: does the response's answer agree with the example's? An embedded task may ask for more."""
    if _verifier_locked:
        raise RuntimeError("the answer check was called while training without a verifier")
    if example.task:
        return EMBEDDED[example.task].is_right(example, response)
    return same_answer(extract_answer(response), example.answer, example.options)


def first_error(expert: Example, response: str) -> int | None:
    """Where a response to an embedded problem first goes wrong: a character offset into it, None if it is right. Only
    tests of what a reward has learnt ask for it; the lock holds here, too."""
    if _verifier_locked:
        raise RuntimeError("the place of an error was asked for while training without a verifier")
    return EMBEDDED[expert.task].first_error(expert, response)


# 5. Perturbations ---------------------------------------------------------------------------------------------------
# Negatives made from the expert's own traces. Nothing here knows what mistakes a policy makes; in particular '*' never
# becomes '+', which is how the pupil of `words` goes wrong: the reward has to find that out from samples.

INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*", "×": "÷", "÷": "×"}


def perturb(example: Example, rng: random.Random, kind: str | None = None) -> Example | None:
    """The example with one thing broken; None if it offers nothing to break.

    kind: 'number' (one number of the trace), 'operator' (its inverse), 'answer' (another number, or another option),
    'swap' (two numbers change places); drawn at random if None. A change that would change nothing, or only the order
    of a sum or product, is not made.

    >>> perturb(Example("?", "3*12=36", "36"), random.Random(0), "operator").trace
    '3/12=36'
    """
    for one in [kind] if kind else rng.sample(list(PERTURBATIONS), len(PERTURBATIONS)):
        broken = PERTURBATIONS[one](example, rng)
        if broken is not None and broken != example:
            return broken
    return None


def break_number(example: Example, rng: random.Random) -> Example | None:
    """Another number in the place of one of the trace's."""
    trace, spans = example.trace, [match.span() for match in re.finditer("[0-9]+", example.trace)]
    if not spans:
        return None
    start, end = rng.choice(spans)
    return replace(example, trace=trace[:start] + other_number(trace[start:end], rng) + trace[end:])


def break_operator(example: Example, rng: random.Random) -> Example | None:
    """An operator of the trace becomes its inverse."""
    trace = example.trace
    places = [match.start() for match in re.finditer(r"(?<=[\d) ])[-+*/×÷](?=[\d( $])", trace)]
    if not places:
        return None
    at = rng.choice(places)
    return replace(example, trace=trace[:at] + INVERSE[trace[at]] + trace[at + 1 :])


def break_answer(example: Example, rng: random.Random) -> Example | None:
    """Another option, written as the right one is, or another number."""
    old = example.answer
    others = [option for option in example.options if not same_answer(option, old, example.options)]
    if others:
        other = rng.choice(others)
        if re.fullmatch(r"\(?[A-Za-z][.):]?", old) and old not in example.options:  # a letter stays a letter
            letter = chr(ord("A") + example.options.index(other))
            other = re.sub("[A-Za-z]", letter.lower() if old.islower() else letter, old)
        return replace(example, answer=other)
    match = re.search("[0-9]+", old)
    if not match:
        return None
    return replace(example, answer=old[: match.start()] + other_number(match.group(), rng) + old[match.end() :])


def swap_numbers(example: Example, rng: random.Random) -> Example | None:
    """Two different numbers of the trace change places."""
    trace, spans = example.trace, [match.span() for match in re.finditer("[0-9]+", example.trace)]
    for _ in range(20 * (len(spans) > 1)):  # most pairs will do; a short trace of equal numbers has none
        (a, b), (c, d) = sorted(rng.sample(spans, 2))
        commutes = re.fullmatch(r"([\s\d]*\+)+\s*|([\s\d]*[*×])+\s*", trace[b:c])  # all of a sum, or of a product
        if trace[a:b].lstrip("0") != trace[c:d].lstrip("0") and not commutes:
            return replace(example, trace=trace[:a] + trace[c:d] + trace[b:c] + trace[a:b] + trace[d:])
    return None


def other_number(digits: str, rng: random.Random) -> str:
    """A different number with as many digits: near (one digit off by one) or far, with equal chance. Compared as text, since
    Python makes no integer of more than 4,300 digits."""
    if rng.random() < 0.5:
        place = rng.randrange(len(digits))
        near = (int(digits[place]) + rng.choice((1, 9))) % 10
        changed = digits[:place] + str(near) + digits[place + 1 :]
    else:
        changed = "".join(rng.choice("0123456789") for _ in digits)
    leading_zero = len(changed) > 1 and changed[0] == "0" and digits[0] != "0"
    return other_number(digits, rng) if changed == digits or leading_zero else changed


PERTURBATIONS = {"number": break_number, "operator": break_operator, "answer": break_answer, "swap": swap_numbers}


def perturbed_negatives(tokenizer, example: Example, count: int, rng: random.Random) -> list[tuple[list[int], int]]:
    """At most `count` broken copies of an expert's trace: (response tokens, index of the first changed token). A copy
    whose tokens equal the expert's is dropped: a no-op is no negative."""
    made = [example, *(perturb(example, rng) for _ in range(count))]
    expert, *broken = [response_ids(tokenizer, response_text(e.trace, e.answer)) for e in made if e is not None]
    return [(ids, first_difference(ids, expert)) for ids in broken if ids != expert]


def main() -> None:
    rng = random.Random(0)
    problem = words.words_problems("train", 1)[0]
    expert = Example(*words.solve(problem), task="words")
    pupil = words.solve(problem, words.Pupil(), rng)
    print("question   ", expert.question)
    print("expert     ", expert.trace.replace("\n", " | "), "->", expert.answer)
    wrong = first_error(expert, response_text(pupil.trace, pupil.answer))
    print("a pupil    ", pupil.trace.replace("\n", " | "), "->", pupil.answer, f"(first wrong character: {wrong})")
    for kind in PERTURBATIONS:
        if broken := perturb(expert, rng, kind):
            at = first_difference(*(response_text(e.trace, e.answer) for e in (expert, broken)))
            print(f"{kind:11s}", broken.trace.replace("\n", " | "), "->", broken.answer, f"(differs at {at})")


if __name__ == "__main__":
    main()
