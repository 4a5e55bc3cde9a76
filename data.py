"""Demonstrations: where they come from, how they become tokens, who may check an answer.

Algorithm 1 (arXiv 2510.01857) starts from demonstrations D_E = {(question, trace, answer)}. It takes from here their
tokens. The true answers, which it must not look at, are here too, behind a lock.

    1. demonstrations   Example; load_examples, where D_E comes from: embedded tasks, the hub, your own JSON lines
    2. tokens           question -> prompt; trace and answer -> response, *its end token included*
    3. Batch            padded tokens [B, T], with masks that come from lengths
    4. the verifier     is_correct, and the lock on it, no_verifier

    what the method needs           where                 test, in tests/test_data.py
    D_E                             load_examples         splits_are_disjoint_and_reproducible
    a_t for all t of the response   Batch.response_mask   masks_come_from_lengths_and_hold_the_end_token
    no verifier in training         no_verifier           the_verifier_can_be_locked
    the first wrong token           first_error           first_error_is_exact, token_at_names_the_token_that_..

Tasks and file formats are in tasks/, chat templates in engine/chat.py. Run `python data.py` to see one example of each.
"""

import itertools
import os.path
import random
from dataclasses import dataclass, field, replace
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
from tasks.common import no_verifier  # noqa: F401 (data.no_verifier is the lock's name)

# 1. Demonstrations --------------------------------------------------------------------------------------------------

# Tasks whose problems are made here, from a seed. Each module has the same names in it: solutions (an expert's), is_right
# and first_error (exact checks of a whole response). engine/settings.py has the settings and the base of each.
EMBEDDED = {"words": words, "countdown": countdown}
SOURCES = (*EMBEDDED, *records.HUB)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One demonstration. `options` is filled for multiple-choice questions only (perturbations draw from it). `task` is
    the embedded task, if any, whose own checker reads whole responses. `marks` are calculations that the data set marks in
    the trace, for negatives that carry an error on: (place of the result, "48/2=24")."""

    question: str
    trace: str
    answer: str
    options: tuple[str, ...] = ()
    marks: tuple[tuple[int, str], ...] = field(default=(), repr=False)
    task: str = ""
    # Its tokens, from `tokenize`. Not compared: two examples are equal if their texts are.
    prompt: list[int] = field(default_factory=list, compare=False, repr=False)
    response: list[int] = field(default_factory=list, compare=False, repr=False)


def load_examples(source: str, split: str, count: int | None = None, seed: int = 0,
                  steps: int = 3, largest: int = 40, in_words: bool = False) -> list[Example]:  # fmt: skip
    """Examples of one split, shuffled by `seed`, at most `count` of them (None: all, or 1,000 of what is made here).
    in_words: countdown's questions are sentences, which a pretrained model can read.

    source: 'words' (`steps` and `largest` set how hard it is), 'countdown', 'gsm8k' or 'medreason' (from the hub), a file
    of JSON lines with question, trace, answer, or a folder that holds train.jsonl and test.jsonl. Splits are disjoint: a
    source without a test split of its own is divided by tasks.common.split_of; validation always comes out of train. Of a
    few rows validation, or even train, may be empty; without test examples there is a UserError.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    if source in EMBEDDED:
        found = EMBEDDED[source].solutions(split, count or 1000, seed, steps=steps, largest=largest, in_words=in_words)
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


def tokenize(tokenizer, examples: list[Example]) -> list[Example]:
    """The same examples with their tokens, made once: every later step takes them from here."""
    tokenised = []
    for example in examples:
        prompt = prompt_ids(tokenizer, example.question)
        response = response_ids(tokenizer, response_text(example.trace, example.answer))
        tokenised.append(replace(example, prompt=prompt, response=response))
    return tokenised


def question_only(example: Example) -> Example:
    """What a policy may see of an example: its question. Trace and answer are taken away."""
    return replace(example, trace="", answer="", response=[])


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
    tokenizer, context: int, new_tokens: int, source: str, split: str, count: int, *problems, in_words: bool = False
) -> tuple[list[Example], int]:
    """load_examples(source, split, count, *problems) that fit the context, and how many did not. In the place of one that is
    too long comes the next one of the data, while there are any."""
    kept: list[Example] = []
    unwritten: list[Example] = []
    tried: list[Example] = []
    wanted = count
    while len(kept) < count:
        # a longer list begins with the shorter one: what is new are the examples after those that were tried
        try:
            loaded = load_examples(source, split, len(tried) + wanted, *problems, in_words=in_words)
        except UserError:
            if not tried:
                raise
            break  # no more different problems can be made
        fresh = loaded[len(tried) :]
        short, strange = written_and_short(tokenizer, fresh, context, new_tokens)
        kept += short
        unwritten += strange
        tried += fresh
        if not short:  # the data is at its end; or it is made and never ends, and none of so many fits
            break
        wanted = max(count - len(kept), 50)
    check_fitting(tried, kept, unwritten, context)
    dropped = len(tried) - len(kept)
    return kept[:count], dropped


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


def demonstration_batch(examples: list[Example], device="cpu") -> Batch:
    """Tokenised demonstrations as a Batch: prompt, <think> trace </think>, answer, end token."""
    prompts = [example.prompt for example in examples]
    responses = [example.response for example in examples]
    return make_batch(prompts, responses, device)


# 4. The verifier ----------------------------------------------------------------------------------------------------
# The door to the truth about an answer. Evaluation and GRPO go through it; IRL trains inside `no_verifier()`, where it is
# locked, so that a verifier cannot slip into the training path unnoticed. The lock is on the checks themselves (in tasks/):
# whoever goes past this door meets it, too.


def is_correct(example: Example, response: str) -> bool:
    """The verifier: does the response's answer agree with the example's? An embedded task may ask for more."""
    if example.task:
        return EMBEDDED[example.task].is_right(example, response)
    return same_answer(extract_answer(response), example.answer, example.options)


def first_error(expert: Example, response: str) -> int | None:
    """Where a response to an embedded problem first goes wrong: a character offset into it, None if it is right. Only
    tests of what a reward has learnt ask for it; the lock holds here, too."""
    return EMBEDDED[expert.task].first_error(expert, response)


def main() -> None:
    rng = random.Random(0)
    problem = words.words_problems("train", 1)[0]
    expert = Example(*words.solve(problem), task="words")
    pupil = words.solve(problem, words.Pupil(), rng)
    print("question   ", expert.question)
    print("expert     ", expert.trace.replace("\n", " | "), "->", expert.answer)
    wrong = first_error(expert, response_text(pupil.trace, pupil.answer))
    print("a pupil    ", pupil.trace.replace("\n", " | "), "->", pupil.answer, f"(first wrong character: {wrong})")


if __name__ == "__main__":
    main()
