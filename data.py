"""Demonstrations: where they come from, how they become tokens, how an answer is checked, how a trace is broken.

Everything the method needs to know about text is in this file:

    1. bad input          one clear line and exit status 2; Example, the one record type: question, trace, answer
    2. words              word problems made here, with a checker that knows the first wrong *character*, and a
                          *pupil* who writes traces with misconceptions (the corpus of the base that ships with us)
    3. load_examples      words, GSM8K, MedReason, or your own JSON lines; always the same three disjoint splits
    4. prompts, responses question -> prompt tokens; trace and answer -> response tokens, end token included
    5. answers            extracting and comparing them. Used to *evaluate*, and by GRPO. Never by IRL.
    6. perturb            break one thing in an expert's trace: a negative that costs no sampling
    7. Batch              padded token tensors with masks that come from lengths

Run `python data.py` to see one example of each.
"""

import argparse
import datetime
import difflib
import functools
import itertools
import json
import math
import os.path
import random
import re
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from tasks import countdown

# ---------------------------------------------------------------------------------------------------------------
# 1. Bad input, and the one record type
# ---------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input from outside. `exit_status` makes it one line and exit status 2."""


def exit_status(program: Callable[[], object]) -> int:
    """Run a command line's `program`: 0, or 2 after one line that says what was wrong with the input.

    What the terminal's encoding lacks (ASCII, Windows code pages) is printed as an escape instead of raising.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have none, and need none
            stream.reconfigure(errors="backslashreplace")
    try:
        program()
    except UserError as error:
        line = " ".join(str(error).splitlines())  # a file's name or content may hold newlines
        print(f"error: {printable(line)}", file=sys.stderr)
        return 2
    return 0


def printable(text: str) -> str:
    r"""`text` with its control characters in hex, newlines excepted: a trace must not move the cursor, ring, or retitle
    the window of whoever prints it.

    >>> printable("1\n2\x1b[2J")
    '1\n2\\x1b[2J'
    """
    return text.translate(CONTROL)


# Control characters, and those that turn the direction of writing round (the rest of a line could seem another text).
CONTROL = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(10), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def nearest(word: str, choices) -> str:
    """', did you mean X?' or nothing.

    >>> nearest("gsm8", ["words", "gsm8k"])
    " (did you mean 'gsm8k'?)"
    """
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is a UserError, and an unknown flag is told its nearest neighbour."""

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str):
        """argparse's own complaints, in our form."""
        raise UserError(message)

    def parse(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """The arguments (by default the command line's) as a namespace."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise UserError(f"unknown flag {flag}{nearest(flag, self._option_string_actions)}: see --help")
        return known


@dataclass(frozen=True)
class Example:
    """One demonstration. `options` is filled for multiple-choice questions only (perturbations draw from it). `task` names
    the embedded task, if any, whose own checker reads whole traces."""

    question: str
    trace: str
    answer: str
    options: tuple[str, ...] = ()
    task: str = ""


# ---------------------------------------------------------------------------------------------------------------
# 2. words: embedded word problems with an exact checker per step
# ---------------------------------------------------------------------------------------------------------------

NAMES = ("Ava", "Ben", "Cho", "Dan", "Eve", "Gus", "Ida", "Lee")
ITEMS = ("pens", "eggs", "cards", "coins", "nuts", "beads", "shells", "pins")
GAINS = ("finds", "gets", "picks")
LOSSES = ("loses", "sells", "eats")
PACKS = ("bags", "boxes", "packs")


@dataclass(frozen=True)
class Event:
    """One sentence of a problem. kind: 'gain' or 'loss' (one step of arithmetic), 'packs' or 'shares' (two)."""

    kind: str
    text: str
    a: int
    b: int = 0

    @property
    def steps(self) -> int:
        return 2 if self.kind in ("packs", "shares") else 1


@dataclass(frozen=True)
class Problem:
    question: str
    start: int
    events: tuple[Event, ...]


def make_problem(rng: random.Random, steps: int = 3, largest: int = 40) -> Problem:
    """Draw one word problem that takes `steps` steps of arithmetic with numbers up to `largest` in its text.

    >>> problem = make_problem(random.Random(1))
    >>> problem.question
    'Cho has 18 eggs. Cho picks 32. Cho gets 26. Cho loses 16. How many eggs?'
    >>> solve(problem).trace
    '18+32=50\\n50+26=76\\n76-16=60'
    """
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start = have = rng.randint(max(2, largest // 4), largest)
    sentences, events, left = [f"{name} has {start} {item}."], [], steps
    while left:
        kinds = ["gain", "loss"] if left == 1 else ["gain", "loss", "packs", "packs", "shares", "shares"]
        kind = rng.choice(kinds)
        a, b = rng.randint(2, 5), rng.randint(2, max(2, largest // 3))
        if kind in ("gain", "loss"):
            a = rng.randint(2, largest)
        spent = {"loss": a, "shares": a * b}.get(kind, 0)
        if spent >= have:  # nobody gives away more than she has
            continue
        have += {"gain": a, "packs": a * b}.get(kind, 0) - spent
        text = {
            "gain": f"{name} {rng.choice(GAINS)} {a}.",
            "loss": f"{name} {rng.choice(LOSSES)} {a}.",
            "packs": f"{name} buys {a} {rng.choice(PACKS)} of {b}.",
            "shares": f"{name} gives {a} friends {b} each.",
        }[kind]
        events.append(Event(kind, text, a, b))
        sentences.append(text)
        left -= events[-1].steps
    return Problem(" ".join(sentences) + f" How many {item}?", start, tuple(events))


def subtract_by_column(a: int, b: int) -> int:
    """The pupils' bug 'smaller from larger' (Brown & Burton 1978): in each column, the smaller digit from the larger.

    >>> subtract_by_column(50, 9), subtract_by_column(58, 23)
    (59, 35)
    """
    top, bottom = str(max(a, b)), str(min(a, b)).zfill(len(str(max(a, b))))
    return int("".join(str(abs(int(x) - int(y))) for x, y in zip(top, bottom)))


@dataclass(frozen=True)
class Pupil:
    """How often a pupil goes wrong at a step where it can.

    groups: '3 bags of 12' is added instead of multiplied. borrow: a subtraction goes column by column without
    borrowing. slip: one digit of any other result comes out wrong. A pupil who is wrong more often than right is
    *confidently* wrong: greedy decoding and majority vote make it worse, and its own log-probability cannot tell.
    """

    groups: float = 0.6
    borrow: float = 0.3
    slip: float = 0.1


def solve(problem: Problem, pupil: Pupil | None = None, rng: random.Random | None = None) -> Example:
    """Write a trace for `problem`: the expert's, or that of a pupil, whose errors propagate to the answer."""
    lines: list[str] = []

    def step(a: int, op: str, b: int) -> int:
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        if pupil and op == "-" and rng.random() < pupil.borrow:
            result = subtract_by_column(a, b)
        elif pupil and rng.random() < pupil.slip:
            digits = list(str(abs(result)))
            place = rng.randrange(len(digits))
            digits[place] = rng.choice([d for d in "123456789" if d != digits[place]])
            result = int("".join(digits))
        result = abs(result)  # once a pupil has erred, more may be given away than is left; pupils drop the sign
        lines.append(f"{a}{op}{b}={result}")
        return result

    have = problem.start
    for event in problem.events:
        amount = event.a
        if event.steps == 2:
            confused = pupil is not None and rng.random() < pupil.groups
            amount = step(event.a, "+" if confused else "*", event.b)
        have = step(have, "+" if event.kind in ("gain", "packs") else "-", amount)
    return Example(problem.question, "\n".join(lines), str(have))


def split_of(question: str) -> str:
    """'train', 'validation' or 'test' (80/10/10), decided by the question's own bytes: disjoint whatever the seed."""
    bucket = zlib.crc32(question.encode()) % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def words_problems(split: str, count: int, seed: int = 0, steps: int = 3, largest: int = 40) -> list[Problem]:
    """`count` different problems of one split. The same arguments always give the same problems."""
    rng = random.Random(f"words {split} {seed} {steps} {largest}")
    problems: dict[str, Problem] = {}
    for _ in range(1000 * count):
        problem = make_problem(rng, steps, largest)
        if split_of(problem.question) == split:
            problems.setdefault(problem.question, problem)
        if len(problems) == count:
            return list(problems.values())
    raise UserError(
        f"only {len(problems)} different problems with steps={steps}, largest={largest}; {count} were asked for"
    )


def first_error(expert: Example, response: str) -> int | None:
    """Where a response to an embedded problem first goes wrong: a character offset into `response`, None if it is right.

    countdown: tasks/countdown.py. words: the expert's trace holds one equation per line, and a step is right if it is that equation (a sum or a product may
    have its two operands the other way round). The offset is that of the first character that no right step has; a
    response that stops too early is wrong at its end.

    >>> expert = Example("...", "3*12=36\\n14+36=50", "50")
    >>> first_error(expert, "<think>\\n12*3=36\\n36+14=50\\n</think>\\n<answer>50</answer>") is None
    True
    >>> first_error(expert, "<think>\\n3+12=15\\n14+15=29\\n</think>\\n<answer>29</answer>")
    9
    """
    if expert.task == "countdown":
        return countdown.first_error(expert.question, response)
    pieces = [["<think>\n"]]
    for line in expert.trace.split("\n"):
        forms = [line + "\n"]
        match = re.fullmatch(r"(\d+)([+*])(\d+)=(\d+)", line)
        if match:
            a, op, b, result = match.groups()
            forms.append(f"{b}{op}{a}={result}\n")
        pieces.append(forms)
    pieces.append([f"</think>\n<answer>{expert.answer}</answer>"])
    at = 0
    for forms in pieces:
        found = next((form for form in forms if response.startswith(form, at)), None)
        if found is None:
            return at + max(first_difference(form, response[at : at + len(form)]) for form in forms)
        at += len(found)
    return None if at == len(response) else at


def first_difference(a, b) -> int:
    """Index of the first place where two sequences differ (the shorter one's length if it is a prefix).

    >>> first_difference("abc", "abd"), first_difference([1, 2], [1, 2, 3])
    (2, 2)
    """
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------------
# 3. Sources by name
# ---------------------------------------------------------------------------------------------------------------

EMBEDDED = ("words", "countdown")  # made here, with a checker that finds the first error
SOURCES = (*EMBEDDED, "gsm8k", "medreason")
SPLITS = ("train", "validation", "test")


def load_examples(
    source: str, split: str, count: int | None = None, seed: int = 0, steps: int = 3, largest: int = 40
) -> list[Example]:
    """Examples of one split, shuffled by `seed`, at most `count` of them.

    source: 'words' (made here; `steps` and `largest` set the difficulty), 'countdown' (made here, too: tasks/countdown.py),
    'gsm8k' or 'medreason' (from the hub), a file of JSON lines with question, trace, answer, or a folder that holds train.jsonl and test.jsonl. Splits are
    disjoint: a source without a test split of its own is divided by `split_of`, and validation always comes out of
    train.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    if source == "words":
        problems = words_problems(split, count or 1000, seed, steps, largest)
        return [solve(problem) for problem in problems]
    if source == "countdown":
        solutions = countdown.solutions(split, count or 1000, seed)
        return [Example(question, trace, answer, task=source) for question, trace, answer in solutions]
    if source in ("gsm8k", "medreason"):
        examples = from_hub(source, split)
    elif os.path.exists(source):  # unlike Path.exists, False for a name that no file can have
        examples = from_files(Path(source), split)
    else:
        raise UserError(
            f"no data set '{source}'{nearest(source, SOURCES)}: use {', '.join(SOURCES)}, "
            "a file of JSON lines, or a folder with train.jsonl and test.jsonl"
        )
    if not examples:
        raise UserError(f"'{source}' has no {split} examples")
    random.Random(f"order {seed}").shuffle(examples)
    return examples[:count]


def from_files(path: Path, split: str) -> list[Example]:
    """One split of a JSON-lines file, or of a folder with train.jsonl (and, if there is one, test.jsonl)."""
    if path.is_file():
        return [example for example in read_jsonl(path) if split_of(example.question) == split]
    if not (path / "train.jsonl").exists():
        raise UserError(f"no train.jsonl in folder {path}")
    if not (path / "test.jsonl").exists():
        return from_files(path / "train.jsonl", split)
    if split == "test":
        return read_jsonl(path / "test.jsonl")
    return [
        e for e in read_jsonl(path / "train.jsonl") if (split_of(e.question) == "validation") == (split == "validation")
    ]


def read_jsonl(path: Path) -> list[Example]:
    """Every record of a JSON-lines file. Broken lines and missing fields are named by file and line number."""
    examples = []
    for number, line in text_lines(path):
        try:
            examples.append(from_record(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not examples:
        raise UserError(f"{path} is empty: it needs one JSON object per line, with question, trace and answer")
    return examples


def text_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of each line of a UTF-8 file that is not empty. A byte order mark, which Windows likes to
    write, is no part of the first."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        raise UserError(f"cannot read {path}: {error}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def check_text(text: str) -> str:
    r"""`text` as it is; ValueError if it holds half a surrogate pair: legal JSON, but no text that has tokens or bytes.

    >>> check_text("\ud800")
    Traceback (most recent call last):
    ValueError: the text holds '\ud800', half of a surrogate pair, which no UTF-8 can say
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds {text[error.start]!a}, half of a surrogate pair, which no UTF-8 can say") from None
    return text


def field(record: dict, name: str) -> str | None:
    """One field of a record as text, without the space around it: a string or a finite number; None if it is missing."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"field '{name}' must be a string, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field '{name}' is {value}, not a finite number")
    try:
        return check_text(str(value)).strip()
    except ValueError as error:
        raise ValueError(f"field '{name}': {error}") from None


def from_record(record) -> Example:
    """A JSON object as an Example. GSM8K's own form, whose answer holds the trace before '####', is understood too.

    >>> from_record({"question": "1+2?", "answer": "It is 1+2 = <<1+2=3>>3.\\n#### 3"})
    Example(question='1+2?', trace='It is 1+2 = 3.', answer='3', options=(), task='')
    """
    if not isinstance(record, dict):
        raise ValueError('not a JSON object: each line needs {"question": .., "trace": .., "answer": ..}')
    question, trace, answer = (field(record, name) for name in ("question", "trace", "answer"))
    for name, value in (("question", question), ("answer", answer)):
        if not value:
            raise ValueError(f"field '{name}' is missing or empty")
    if trace is None and "####" in answer:
        trace, answer = answer.rsplit("####", 1)
        if not answer.strip():
            raise ValueError("field 'answer' has nothing after its '####'")
    if trace is None:
        raise ValueError("field 'trace' is missing (the reasoning, without the answer)")
    options = record.get("options") or []
    if not isinstance(options, list):
        raise ValueError(f"field 'options' must be a list of strings, not {type(options).__name__}")
    # GSM8K's calculator annotations go; a lone '<<' of the text stays.
    trace = re.sub(r"<<[^<>]{0,200}>>", "", trace).strip()
    options = tuple(field({"options": option}, "options") or "" for option in options)
    return Example(question, trace, answer.strip(), options)


def from_hub(source: str, split: str) -> list[Example]:
    """GSM8K or MedReason through `datasets`."""
    import datasets

    name, config = {"gsm8k": ("openai/gsm8k", "main"), "medreason": ("UCSC-VLAA/MedReason", None)}[source]
    hub_split = "test" if source == "gsm8k" and split == "test" else "train"
    try:
        rows = list(datasets.load_dataset(name, config, split=hub_split))
    except Exception as error:  # datasets raises a dozen kinds: offline, proxy, gated, renamed
        raise UserError(
            f"cannot fetch {name} from the hub ({type(error).__name__}). Without a network, give a folder "
            "that holds train.jsonl and test.jsonl: --data DIR"
        ) from None
    try:
        examples = [from_medreason(row) if source == "medreason" else from_record(row) for row in rows]
    except (ValueError, KeyError) as error:
        raise UserError(f"{name} on the hub is not what it was: {error}") from None
    if hub_split == "test":
        return examples
    if source == "gsm8k":  # it has a test split of its own: train keeps what would be split_of's test share
        return [e for e in examples if (split_of(e.question) == "validation") == (split == "validation")]
    return [e for e in examples if split_of(e.question) == split]


def from_medreason(row: dict) -> Example:
    """A MedReason row: the options join the question, the answer loses its letter and its explanation.

    >>> from_medreason({"question": "Which vitamin?", "options": "Answer Choices:\\nA. B12\\nB. C\\nC. D",
    ...                 "answer": "B. C. Explanation: scurvy.", "reasoning": "Scurvy is lack of C."})
    Example(question='Which vitamin?\\nA. B12\\nB. C\\nC. D', trace='Scurvy is lack of C.', answer='C', options=('B12', 'C', 'D'), task='')
    """
    listed = [line.strip() for line in str(row.get("options") or "").split("\n")]
    options = tuple(line[2:].strip() for line in listed if re.match(r"[A-Z][.)]\s*\S", line))
    listed = "".join(f"\n{chr(65 + i)}. {option}" for i, option in enumerate(options))
    answer = re.split(r"\bExplanation:", str(row["answer"]), maxsplit=1)[0].strip()
    answer = re.sub(r"^[A-Z][.)]\s+", "", answer).strip().rstrip(".")
    return Example(str(row["question"]).strip() + listed, str(row["reasoning"]).strip(), answer, options)


# ---------------------------------------------------------------------------------------------------------------
# 4. Prompts and responses
# ---------------------------------------------------------------------------------------------------------------

INSTRUCTION = (
    "\n\nReason step by step inside <think> </think>, then give only the final answer inside <answer> </answer>."
)


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The prompt's tokens. With a chat template: one user turn, question and instruction. Without: question, newline
    (after the beginning token, for a tokenizer that has one)."""
    if getattr(tokenizer, "chat_template", None):
        text = chat_text(tokenizer, question + INSTRUCTION)
    else:
        text = (tokenizer.bos_token or "") + question + "\n"
    ids = token_ids(tokenizer, text)
    if not ids:
        raise UserError(f"the tokenizer makes no token of the question {question[:100]!r}: there is nothing to answer")
    return ids


def chat_text(tokenizer, message: str, seconds: float = 10.0, reply: str | None = None) -> str:
    """One user turn in the tokenizer's chat template, up to where the answer begins; with a `reply`, that one too, and
    whatever the template puts after it.

    A chat template is a program that comes with the model. transformers runs it in Jinja's sandbox, where it can reach
    neither Python nor files; but it may fail, drop the question, or never end, so it has `seconds` in a thread of its own.
    """
    turns, found = [{"role": "user", "content": message}], {}
    if reply is not None:
        turns.append({"role": "assistant", "content": reply})

    def render():
        try:
            template = at_date(tokenizer.get_chat_template(), getattr(tokenizer, "date", datetime.date.today()))
            how = {"chat_template": template, "add_generation_prompt": reply is None, "tokenize": False}
            found["text"] = tokenizer.apply_chat_template(turns, **how)
        except Exception as error:  # Jinja's own, and whatever Python raises inside a template
            found["error"] = error

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(seconds)
    text = found.get("text")
    if thread.is_alive():
        problem = f"takes more than {seconds:g} seconds for one question"
    elif text is None:
        problem = f"fails: {type(found['error']).__name__}: {found['error']}"
    else:
        problem = "" if message.strip() in text else "leaves the question out"
    if problem:
        raise UserError(f"the tokenizer's chat template {problem}. Mend or remove chat_template in the model's folder")
    return text


def set_date(tokenizer, date: str | None) -> None:
    """The day (ISO; None: today) that `chat_text` tells a template that asks for it: the same in all prompts of a run."""
    try:
        tokenizer.date = datetime.date.fromisoformat(date) if date else datetime.date.today()
    except (TypeError, ValueError):
        raise UserError(f"the date must be written YYYY-MM-DD, not {date!r}") from None


def at_date(template: str, day: datetime.date) -> str:
    """A chat template in which strftime_now, transformers' clock, stands still. (It takes no clock of ours: functions that
    are handed to a template become text.)

    >>> at_date("{{ strftime_now('%d %b %Y') }}", datetime.date(2026, 1, 31))
    "{{ '31 Jan 2026' }}"
    """
    return re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", lambda m: repr(day.strftime(m[2])), template)


def token_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text, with nothing added."""
    try:
        return tokenizer(check_text(text), add_special_tokens=False)["input_ids"]
    except ValueError as error:
        raise UserError(f"cannot tokenise: {error}") from None


def response_text(trace: str, answer: str) -> str:
    """What the policy is to write: the trace between <think> tags, the answer between <answer> tags."""
    return f"<think>\n{trace}\n</think>\n<answer>{answer}</answer>"


def end_tokens(tokenizer, model=None) -> tuple[int, ...]:
    """All tokens that end a response. The first is the one to train: the chat template's end of turn, or without a template
    the tokenizer's end. Then that end, which a base model knows, and those that the model's own generate() stops at.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = [end_of_turn(tokenizer, template), tokenizer.eos_token_id, *listed]
    return tuple(dict.fromkeys(token for token in known if token is not None))


@functools.lru_cache(maxsize=8)  # asked for with every response; a template is no fast program
def end_of_turn(tokenizer, template: str) -> int | None:
    """The special token that the chat template puts right after the assistant's message; None if there is none."""
    reply = "the reply"
    after = chat_text(tokenizer, "the question", reply=reply).rpartition(reply)[2].lstrip() if template else ""
    first = token_ids(tokenizer, after)[:1]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return first[0] if first and first[0] in special else None


def until_end(tokenizer, text: str) -> str:
    """`text` up to the first end token that is written out in it: what follows is no part of the response."""
    for end in end_tokens(tokenizer):
        text = text.split(tokenizer.convert_ids_to_tokens(end), 1)[0]
    return text


def response_ids(tokenizer, text: str) -> list[int]:
    """The response's tokens and the end token. The end token is part of the response: it is trained, scored, paid."""
    return token_ids(tokenizer, text) + [end_tokens(tokenizer)[0]]


def decode(tokenizer, ids) -> str:
    """Response tokens back to text, up to the first end token; special tokens are left out."""
    ends = end_tokens(tokenizer)
    ids = itertools.takewhile(lambda token: token not in ends, map(int, ids))
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_at(tokenizer, ids, offset: int) -> int:
    """Index of the token of `ids` that holds character `offset` of the decoded text (past its end: the end token)."""
    for index in range(len(ids)):
        if len(decode(tokenizer, ids[: index + 1])) > offset:
            return index
    return len(ids) - 1


# ---------------------------------------------------------------------------------------------------------------
# 5. Answers
# ---------------------------------------------------------------------------------------------------------------

NUMBER = r"[-+−]?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,30})(?:\.\d{1,30})?(?:\s?/\s?\d{1,30})?"
ONLY_NUMBER = rf"\s*{NUMBER}\s*(?:[%.]\s*)?"  # a text that states a number and nothing else
# What changes the number after it: a comparator (no arrow), a sign (no hyphen, as in '3-5' or '3 - 5').
COMPARATOR = r"(?<![-=])[<>≤≥]=?(?=\s*[-+−]?[$€£]?\.?\d)"
SIGN = r"(?<!\w)[-+−](?=[$€£]?\.?\d)|(?<!\w)(?<!\w\s)[-+−](?=\s[$€£]?\.?\d)"
ONE_SPELLING = str.maketrans({"−": "-", "≤": "<=", "≥": ">="})


def extract_answer(response: str) -> str | None:
    """The answer a response gives: the last <answer>...</answer>; without one, what follows '####', is \\boxed{}, or
    is the last number. The fallbacks favour a base model that was never told about our tags; None if nothing fits.

    >>> extract_answer("<think>2+3=5</think><answer> 5 </answer>"), extract_answer("so it is $1,200."), extract_answer("hm")
    ('5', '$1,200', None)
    """
    tail = response[-20_000:]  # no answer starts earlier, and no regular expression sees a novel
    start = tail.rfind("<answer>")
    if start >= 0:
        return tail[start + len("<answer>") :].split("</answer>")[0].strip()
    for marker, end in (("####", "\n"), ("\\boxed{", "}")):
        if marker in tail:
            return tail.rsplit(marker, 1)[1].split(end)[0].strip()
    numbers = re.findall(NUMBER, tail)
    return numbers[-1] if numbers else None


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` states, with sign, commas, decimals, fraction, currency, unit or trailing dot. A bound
    states none.

    >>> [str(parse_number(t)) for t in ("-1,234.50", "$3/4.", "12 apples", "two", "= 7 %", "< 5")]
    ['-2469/2', '3/4', '12', 'None', '7', 'None']
    """
    found = re.findall(NUMBER, text[:1000])
    if len(found) != 1 or re.search(COMPARATOR, text[:1000]):
        return None
    plain = re.sub(r"[$€£,\s]", "", found[0]).replace("−", "-")
    top, _, bottom = plain.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except ZeroDivisionError:
        return None


def same_answer(predicted: str | None, truth: str, options: tuple[str, ...] = ()) -> bool:
    """Whether two answers agree: as options where both name one, as numbers when the truth is one, else as text without
    case, punctuation, articles. An empty answer agrees with nothing.

    >>> same_answer("$18.00", "18"), same_answer("The left ventricle.", "left ventricle"), same_answer(None, "4")
    (True, True, False)
    >>> same_answer("(B)", "Aortic valve", ("Mitral valve", "Aortic valve"))
    True
    """
    if predicted is None:
        return False
    chosen, right = option_of(predicted, options), option_of(truth, options)
    if right is not None:
        return chosen == right
    if chosen is not None:
        predicted = options[chosen]
    if re.fullmatch(ONLY_NUMBER, truth[:1000]):
        value = parse_number(truth)
        return value is not None and parse_number(predicted) == value
    return normalise_text(predicted) == normalise_text(truth) != ""


def option_of(answer: str, options: tuple[str, ...]) -> int | None:
    """Which option an answer names: by its text, its number, or its letter. Text comes first: with the options B12, C and D
    an answer "C" is the vitamin, not the third.

    >>> [option_of(answer, ("Mitral valve", "Aortic valve")) for answer in ("b", "B. the aorta", "aortic valve.", "C", "")]
    [1, 1, 1, None, None]
    """
    # First with what may be an option's letter: S. pneumoniae is not K. pneumoniae.
    for form in (plain_words, normalise_text):
        forms = [form(option) for option in options]
        if form(answer) and form(answer) in forms:
            return forms.index(form(answer))
    numbers = [parse_number(option) if re.fullmatch(ONLY_NUMBER, option[:1000]) else None for option in options]
    if any(number is not None for number in numbers) and parse_number(answer) in numbers:
        return numbers.index(parse_number(answer))
    letter = re.match(r"\s*\(?([A-Za-z])(?:[.):]|\s*$)", answer)
    index = ord(letter[1].upper()) - ord("A") if letter else len(options)
    return index if index < len(options) else None


def normalise_text(text: str) -> str:
    """Lower case, no option letter, punctuation or articles, single spaces. Empty only if `text` is.

    >>> [normalise_text(t) for t in ("B. The left  ventricle!", "A", "≤ 5 mg", "−5 dB")]
    ['left ventricle', 'a', '<= 5 mg', '- 5 db']
    """
    return plain_words(re.sub(r"^\s*\(?[A-Za-z][.)]\s+(?=\S)", "", text[:10_000]))


def plain_words(text: str) -> str:
    """`normalise_text` without a look at option letters."""
    text = text[:10_000].lower()
    words = re.findall(rf"{COMPARATOR}|{SIGN}|\w+", text)
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words or text.split()).translate(ONE_SPELLING)


# The only door to the truth about an answer. Evaluation and GRPO go through it; IRL trains inside `no_verifier()`,
# where it is locked, so that a verifier cannot slip into the training path unnoticed.
_verifier_locked = False


class no_verifier:
    """Context in which `is_correct` raises. irl.py trains inside it; tests/test_irl.py shows that the lock holds."""

    def __enter__(self):
        global _verifier_locked
        self.before, _verifier_locked = _verifier_locked, True

    def __exit__(self, *_):
        global _verifier_locked
        _verifier_locked = self.before


def is_correct(example: Example, response: str) -> bool:
    """The verifier: does the response's answer agree with the example's?"""
    if _verifier_locked:
        raise RuntimeError("the answer check was called while training without a verifier")
    if example.task == "countdown":  # many traces are right, and the last number alone says little
        return countdown.is_right(example.question, response)
    return same_answer(extract_answer(response), example.answer, example.options)


# ---------------------------------------------------------------------------------------------------------------
# 6. Perturbations: negatives made from the expert's own traces
# ---------------------------------------------------------------------------------------------------------------

# An operator becomes its inverse. Nothing here knows what mistakes a policy makes; in particular '*' never becomes
# '+', which is how the pupil of `words` goes wrong: the reward has to find that out from samples.
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*", "×": "÷", "÷": "×"}
PERTURBATIONS = ("number", "operator", "answer", "swap")


def other_number(digits: str, rng: random.Random) -> str:
    """A different number with as many digits: near (one digit off by one) or far, with equal chance.

    Compared as text, since Python makes no integer of more than 4,300 digits."""
    if rng.random() < 0.5:
        place = rng.randrange(len(digits))
        near = (int(digits[place]) + rng.choice((1, 9))) % 10
        changed = digits[:place] + str(near) + digits[place + 1 :]
    else:
        changed = "".join(rng.choice("0123456789") for _ in digits)
    same = changed == digits
    leading_zero = len(changed) > 1 and changed[0] == "0" and digits[0] != "0"
    return other_number(digits, rng) if same or leading_zero else changed


def perturb(example: Example, rng: random.Random, kind: str | None = None) -> tuple[Example, int] | None:
    """Break one thing in a trace. Returns the broken example and the first changed character of its response text.

    kind: 'number' (one number of the trace), 'operator' (its inverse), 'answer' (another number, or another option),
    'swap' (two numbers change places); drawn at random if None. A change that would change nothing, or only the order
    of a sum, is not made; None if the example offers nothing to break.

    >>> broken, at = perturb(Example("?", "3*12=36", "36"), random.Random(0), "operator")
    >>> broken.trace, at
    ('3/12=36', 9)
    """
    for one in [kind] if kind else rng.sample(PERTURBATIONS, len(PERTURBATIONS)):
        broken = _perturb(example, rng, one)
        if broken is not None and broken != example:
            before, after = (response_text(e.trace, e.answer) for e in (example, broken))
            return broken, first_difference(before, after)
    return None


def _perturb(example: Example, rng: random.Random, kind: str) -> Example | None:
    trace = example.trace
    numbers = []
    if kind in ("number", "swap"):
        numbers = [match.span() for match in re.finditer("[0-9]+", trace)]
    if kind == "number" and numbers:
        start, end = rng.choice(numbers)
        return replace(example, trace=trace[:start] + other_number(trace[start:end], rng) + trace[end:])
    if kind == "operator":
        places = [m.start() for m in re.finditer(r"(?<=[\d) ])[-+*/×÷](?=[\d( $])", trace)]
        if places:
            at = rng.choice(places)
            return replace(example, trace=trace[:at] + INVERSE[trace[at]] + trace[at + 1 :])
    if kind == "answer":
        others = [o for o in example.options if not same_answer(o, example.answer, example.options)]
        if others:
            other, old = rng.choice(others), example.answer
            if re.fullmatch(r"\(?[A-Za-z][.):]?", old) and old not in example.options:  # a letter stays a letter
                letter = chr(ord("A") + example.options.index(other))
                other = re.sub("[A-Za-z]", letter.lower() if old.islower() else letter, old)
            return replace(example, answer=other)
        match = re.search("[0-9]+", example.answer)
        if match:
            changed = other_number(match.group(), rng)
            return replace(example, answer=example.answer[: match.start()] + changed + example.answer[match.end() :])
    if kind == "swap":
        for _ in range(20):  # most pairs will do; a short trace of equal numbers has none
            if len(numbers) < 2:
                break
            (a, b), (c, d) = sorted(rng.sample(numbers, 2))
            commutes = re.fullmatch(r"\s*[+*×]\s*", trace[b:c])
            if trace[a:b].lstrip("0") != trace[c:d].lstrip("0") and not commutes:
                return replace(example, trace=trace[:a] + trace[c:d] + trace[b:c] + trace[a:b] + trace[d:])
    return None


# ---------------------------------------------------------------------------------------------------------------
# 7. Batches. Index t is the same everywhere: column t of any [B, T] tensor speaks of the token at position t, which
#    was chosen after reading tokens[:, :t]. Column 0 has no past and is never part of a response.
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Prompts with their responses, padded on the right.

    tokens [B, T], prompt_lengths [B], lengths [B] (prompt and response together, end token included).
    """

    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

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


def fit_context(tokenizer, examples: list[Example], context: int, new_tokens: int = 0) -> tuple[list[Example], int]:
    """Drop what does not fit the model's context: (examples that fit, number dropped).

    An example fits if its prompt with its own trace, and its prompt with `new_tokens` sampled ones, are at most
    `context` tokens long. Cutting a trace instead would teach the reward that experts stop in mid-sentence.
    """
    kept = []
    for example in examples:
        prompt = len(prompt_ids(tokenizer, example.question))
        response = len(response_ids(tokenizer, response_text(example.trace, example.answer)))
        if prompt + max(response, new_tokens) <= context:
            kept.append(example)
    if not kept:
        raise UserError(f"none of the {len(examples)} examples fits the model's context of {context} tokens")
    return kept, len(examples) - len(kept)


def main() -> None:
    rng = random.Random(0)
    problem = words_problems("train", 1)[0]
    expert, pupil = solve(problem), solve(problem, Pupil(), rng)
    print("question   ", expert.question)
    print("expert     ", expert.trace.replace("\n", " | "), "->", expert.answer)
    wrong = first_error(expert, response_text(pupil.trace, pupil.answer))
    print("a pupil    ", pupil.trace.replace("\n", " | "), "->", pupil.answer, f"(first wrong character: {wrong})")
    for kind in PERTURBATIONS:
        found = perturb(expert, rng, kind)
        if found:
            print(f"{kind:11s}", found[0].trace.replace("\n", " | "), "->", found[0].answer, f"(differs at {found[1]})")


if __name__ == "__main__":
    main()
