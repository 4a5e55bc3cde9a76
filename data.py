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

import itertools
import json
import math
import os.path
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.chat import chat_text, check_text, end_of_turn, token_ids
from engine.errors import UserError, nearest
from tasks import countdown, words
from tasks.answers import extract_answer, same_answer
from tasks.common import first_difference, split_of

# ---------------------------------------------------------------------------------------------------------------
# 1. Bad input, and the one record type
# ---------------------------------------------------------------------------------------------------------------


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


def first_error(expert: Example, response: str) -> int | None:
    """Where a response to an embedded problem first goes wrong: a character offset into `response`, None if it is right."""
    return EMBEDDED[expert.task].first_error(expert, response)


# ---------------------------------------------------------------------------------------------------------------
# 3. Sources by name
# ---------------------------------------------------------------------------------------------------------------

EMBEDDED = {"words": words, "countdown": countdown}  # made here, with a checker that finds the first error
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
    if source in EMBEDDED:
        how = (steps, largest) if source == "words" else ()
        solutions = EMBEDDED[source].solutions(split, count or 1000, seed, *how)
        return [Example(*solution, task=source) for solution in solutions]
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
    if example.task:
        return EMBEDDED[example.task].is_right(example, response)
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
    problem = words.words_problems("train", 1)[0]
    expert = Example(*words.solve(problem), task="words")
    pupil = words.solve(problem, words.Pupil(), rng)
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
