"""Demonstrations: where they come from, how they become tokens, who may check an answer.

Algorithm 1 (arXiv 2510.01857) starts from demonstrations D_E = {(question, trace, answer)}. It
takes their tokens from here. The true answers, which it must not look at, are here, too, behind a
lock.

    1. demonstrations   Example; load_examples, where D_E comes from
    2. tokens           question -> prompt; trace and answer -> response, *its end token included*
    3. Batch            padded tokens [B, T], with masks that come from lengths
    4. the verifier     is_correct, and the lock on it, no_verifier

    what the method needs           where                 test, in tests/test_data.py
    D_E                             load_examples         splits_are_disjoint_and_reproducible
    a_t for all t of the response   Batch.response_mask   masks_come_from_lengths_and_hold_the_..
    no verifier in training         no_verifier           the_verifier_can_be_locked
    the first wrong token           first_error           first_error_is_exact

Tasks and file formats are in tasks/, chat templates in engine/chat.py. `python data.py` shows one
example: an expert's trace, a pupil's, and where the pupil's first goes wrong.
"""

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

# 1. Demonstrations --------------------------------------------------------------------------------

# Tasks whose problems are made here, from a seed. Each module has the same three functions:
# `solutions`, an expert's; `is_right` and `first_error`, exact checks of a whole response.
EMBEDDED = {"words": words, "countdown": countdown}
SOURCES = (*EMBEDDED, *records.HUB)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One demonstration; what an expert wrote, and its tokens once `tokenize` has made them."""

    question: str
    trace: str  # the reasoning, a step a line
    answer: str
    # of a multiple-choice question: broken copies draw their wrong answer from them
    options: tuple[str, ...] = ()
    # calculations that the data set marks in the trace: (place of the result, "48/2=24")
    marks: tuple[tuple[int, str], ...] = field(default=(), repr=False)
    # the embedded task whose own checker reads whole responses, if any
    task: str = ""
    # Two examples are equal if their texts are, whether they have their tokens or not.
    prompt: list[int] = field(default_factory=list, compare=False, repr=False)
    response: list[int] = field(default_factory=list, compare=False, repr=False)


def load_examples(
    source: str,
    split: str,
    count: int | None = None,
    seed: int = 0,
    steps: int = 3,
    largest: int = 40,
    in_words: bool = False,
) -> list[Example]:
    """Examples of one split, shuffled by `seed`, at most `count` of them (None: all there are).

    source: an embedded task, 'gsm8k' or 'medreason' (from the hub), a file of JSON lines, or a
    folder that holds train.jsonl and test.jsonl.
    steps, largest: how hard the problems of 'words' are.
    in_words: countdown's questions are sentences, which a pretrained model can read.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    if source in EMBEDDED:
        # These are made and have no end: "all" are 1,000.
        problems = {"steps": steps, "largest": largest, "in_words": in_words}
        solutions = EMBEDDED[source].solutions(split, count or 1000, seed, **problems)
        return [Example(*solution, task=source) for solution in solutions]
    if source in records.HUB:
        solutions = records.from_hub(source, split)
    elif os.path.exists(source):  # unlike Path.exists, False for a name that no file can have
        solutions = records.from_files(Path(source), split)
    else:
        raise UserError(
            f"no data set '{source}'{nearest(source, SOURCES)}: use {', '.join(SOURCES)}, "
            "a file of JSON lines, or a folder with train.jsonl and test.jsonl"
        )
    # The split is by the question's bytes (tasks.common.split_of), the same for every seed. Of a
    # few rows validation may be empty; but without a test question nothing can be said at the end.
    if not solutions and split == "test":
        raise UserError(
            f"'{source}' has no test examples: a tenth of the questions is for test, chosen by "
            "their text, and here none is. Put some into a file of their own: --data DIR, a folder "
            "with train.jsonl and test.jsonl"
        )
    # Its own generator: how many examples are loaded changes no other draw of the run.
    random.Random(f"order {seed}").shuffle(solutions)
    return [Example(*solution) for solution in solutions[:count]]


def draw(items: list, count: int, rng: random.Random) -> list:
    """`count` items, without repeats where there are enough; none of none."""
    if len(items) >= count:
        return rng.sample(items, count)
    return rng.choices(items, k=count) if items else []


# 2. Prompts and responses -------------------------------------------------------------------------
# A demonstration as the policy meets it. With a chat template the prompt is
#
#     <|im_start|>user ... question, INSTRUCTION ... <|im_end|><|im_start|>assistant
#
# and without one the question and a newline. The response is the same in both:
#
#     <think>                      the tags are text, unless the model has tokens for them
#     3*12=36
#     24+36=60
#     </think>
#     <answer>60</answer><end>     the end token is an action like any other: trained, scored, paid

INSTRUCTION = (
    "\n\nReason step by step inside <think> </think>, then give only the final answer inside "
    "<answer> </answer>."
)


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The prompt's tokens, up to where the answer begins."""
    if getattr(tokenizer, "chat_template", None):
        text = question + INSTRUCTION
        prompt = without_closed_block(chat_text(tokenizer, text))
    else:
        text = question
        prompt = (tokenizer.bos_token or "") + question + "\n"
    # `text` comes from outside: a control token that is written in it stays text. A question that
    # could close its own turn would speak for the assistant.
    return prompt_tokens(tokenizer, prompt, text.strip())


# The same tags for every data set: rewards, negatives and the answer check all know where the trace
# ends and the answer begins.
def response_text(trace: str, answer: str) -> str:
    """What the policy is to write: the trace between <think> tags, the answer between its own."""
    return f"<think>\n{trace}\n</think>\n<answer>{answer}</answer>"


def response_ids(tokenizer, text: str) -> list[int]:
    """The response's tokens and the end token. Control tokens that are written in `text` are text:
    a trace with <|im_end|> in it must not teach an end in mid-response."""
    text = text.removeprefix(prompt_opening(tokenizer))
    return text_ids(tokenizer, text) + [end_tokens(tokenizer)[0]]


def prompt_opening(tokenizer) -> str:
    """What the prompt has already written of the response: "<think>" and a newline with some chat
    templates, else nothing."""
    # It is not written again, and `decode` puts it back.
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
    """What a policy may see of an example: trace and answer are taken away."""
    return replace(example, trace="", answer="", response=[])


def end_tokens(tokenizer, model=None) -> tuple[int, ...]:
    """All tokens that end a response; the first is the one to train."""
    # The chat template's end of turn; the tokenizer's own end, which a base model knows; and those
    # that the model's generate() stops at.
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = [end_of_turn(tokenizer, template), tokenizer.eos_token_id]
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known += listed if isinstance(listed, (list, tuple)) else [listed]
    # in this order, each once
    return tuple(dict.fromkeys(token for token in known if token is not None))


def decode(tokenizer, ids) -> str:
    """Response tokens back to text, up to the first end token; special tokens are left out."""
    ends = end_tokens(tokenizer)
    ids = [int(token) for token in ids]
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return prompt_opening(tokenizer) + text


def until_end(tokenizer, text: str) -> str:
    """`text` up to the first end token that is written out in it. For responses that a file brings
    as text: there it is the end that somebody's model wrote. (In a demonstration it is text.)"""
    for end in end_tokens(tokenizer):
        text = text.partition(tokenizer.convert_ids_to_tokens(end))[0]
    return text


def token_at(tokenizer, ids, offset: int) -> int:
    """Index of the token of `ids` that holds character `offset` of the decoded text; past its end
    that of the end token."""
    # Tokens may share a character (bytes of one letter): decode the beginnings, not token by token.
    lengths = (len(decode(tokenizer, ids[: index + 1])) for index in range(len(ids)))
    return next((index for index, length in enumerate(lengths) if length > offset), len(ids) - 1)


def fit_context(
    tokenizer,
    examples: list[Example],
    context: int,
    new_tokens: int = 0,
    count: int | None = None,
) -> tuple[list[Example], int]:
    """(the first `count` examples that fit a model's context, tokenised; how many before them do
    not). One fits if its prompt with its own trace, and with `new_tokens` sampled ones, has at most
    `context` tokens."""
    kept = []
    dropped = 0
    unwritten = []
    # Some tokenizers have one token for the beginning, the end and all that they do not know.
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, *end_tokens(tokenizer)}
    for example in examples:
        if len(kept) == count:
            break
        (example,) = tokenize(tokenizer, [example])
        if not unknown.isdisjoint(example.prompt + example.response):
            unwritten.append(example)
        # Cutting a trace short instead would teach the reward that experts stop in mid-sentence.
        if len(example.prompt) + max(len(example.response), new_tokens) <= context:
            kept.append(example)
        else:
            dropped += 1
    if 2 * len(unwritten) > len(kept) + dropped:
        raise UserError(
            f"this model's tokenizer has no tokens for {len(unwritten)} of {len(kept) + dropped} "
            f"examples, such as {unwritten[0].question[:60]!r}: these problems need another --model"
        )
    if dropped and not kept:
        raise UserError(
            f"none of the {dropped} examples fits the model's context of {context} tokens"
        )
    return kept, dropped


def load_fitting(
    tokenizer, context: int, new_tokens: int, source: str, split: str, count: int, *problems, **more
) -> tuple[list[Example], int]:
    """load_examples(source, split, count, ..) that fit the context, tokenised, and how many did
    not. In the place of one that is too long comes the next of the data, while there are any."""
    # Problems that are made have no end, and are about as long as each other: no others are tried.
    available = count if source in EMBEDDED else None
    examples = load_examples(source, split, available, *problems, **more)
    return fit_context(tokenizer, examples, context, new_tokens, count)


# 3. Batches ---------------------------------------------------------------------------------------
# Index t is the same everywhere: column t of any [B, T] tensor speaks of the token
# a_t = tokens[:, t], which was chosen after reading s_t = tokens[:, :t]. Column 0 has no past and
# is never part of a response.


@dataclass
class Batch:
    """Prompts with their responses, padded on the right."""

    tokens: torch.Tensor  # [B, T]
    prompt_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B], prompt and response together, end token included

    # Masks come from lengths, never from token ids: the padding value may be a real token, too, and
    # where it is the end token, a mask by id would never train an end.

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, T], 1 on real tokens."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (positions < self.lengths[:, None]).long()

    @property
    def response_mask(self) -> torch.Tensor:
        """[B, T] float, 1 on response tokens, the end token among them."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.attention_mask * (positions >= self.prompt_lengths[:, None]).float()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> "Batch":
        """A slice, a list or a tensor of rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if len(lengths) else 0
        return Batch(self.tokens[rows][:, :longest], self.prompt_lengths[rows], lengths)

    def to(self, device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.tokens.to(device), self.prompt_lengths.to(device), self.lengths.to(device)
        )

    def response(self, row: int) -> list[int]:
        """The response tokens of one row, without padding."""
        return self.tokens[row, int(self.prompt_lengths[row]) : int(self.lengths[row])].tolist()


def make_batch(prompts: list[list[int]], responses: list[list[int]], device="cpu") -> Batch:
    """Token lists to a padded Batch; the padding value, 0, means nothing."""
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    tokens = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    return Batch(tokens, prompt_lengths, lengths).to(device)


def demonstration_batch(examples: list[Example], device="cpu") -> Batch:
    """Tokenised demonstrations as a batch: prompt, <think> trace </think>, answer, end token."""
    prompts = [example.prompt for example in examples]
    responses = [example.response for example in examples]
    return make_batch(prompts, responses, device)


# 4. The verifier ----------------------------------------------------------------------------------
# The door to the truth about an answer. Evaluation and GRPO go through it; IRL trains inside
# `no_verifier()`, where it is locked, so that a verifier cannot slip into the training path
# unnoticed. The lock is on the checks themselves (in tasks/): whoever goes past this door meets it.


def is_correct(example: Example, response: str) -> bool:
    """The verifier: does the response's answer agree with the example's? An embedded task may ask
    for more."""
    # Countdown's reads every line: the right target after two false ones is wrong.
    if example.task:
        return EMBEDDED[example.task].is_right(example, response)
    return same_answer(extract_answer(response), example.answer, example.options)


def first_error(expert: Example, response: str) -> int | None:
    """Where a response to an embedded problem first goes wrong: a character offset into it, None if
    it is right."""
    # No training asks for it, only tests of what a reward has learnt; the lock holds here, too.
    return EMBEDDED[expert.task].first_error(expert, response)


def main() -> None:
    """One example: an expert's trace, a pupil's, and where the pupil's first goes wrong."""
    problem = words.words_problems("train", 1)[0]
    expert = words.solve(problem)
    pupil = words.solve(problem, words.Pupil(), random.Random(1))
    print("question   ", problem.question)
    print("expert     ", expert.trace.replace("\n", " | "), "->", expert.answer)
    wrong = words.first_error(expert, response_text(pupil.trace, pupil.answer))
    print("a pupil    ", pupil.trace.replace("\n", " | "), "->", pupil.answer, end=" ")
    print(f"(first wrong character: {wrong})")


if __name__ == "__main__":
    main()
