"""Demonstrations from elsewhere: JSON lines, a folder of them, GSM8K and MedReason from the hub. Bad ones are one clear line."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from engine.chat import check_text
from engine.errors import UserError
from tasks.common import Solution, split_of

HUB = {"gsm8k": ("openai/gsm8k", "main"), "medreason": ("UCSC-VLAA/MedReason", None)}  # name on the hub, configuration


def from_files(path: Path, split: str) -> list[Solution]:
    """One split of a JSON-lines file, or of a folder with train.jsonl and, if there is one, test.jsonl. What stands in both
    files of a folder is left out of train."""
    train, test = (path, path) if path.is_file() else (path / "train.jsonl", path / "test.jsonl")
    has_test = test != train and test.exists()
    if not train.exists():
        raise UserError(f"no train.jsonl in folder {path}")
    if split == "test" and has_test:
        return read_jsonl(test)
    found = read_jsonl(train)
    if has_test:
        tested = {without_form(solution.question) for solution in read_jsonl(test)}
        kept = [solution for solution in found if without_form(solution.question) not in tested]
        if len(kept) < len(found) and split == "train":
            print(f"{len(found) - len(kept)} questions of {train} stand in {test}, too: left out of train")
        found = kept
    return of_split(found, split, has_test)


def from_hub(source: str, split: str) -> list[Solution]:
    """One split of GSM8K or MedReason, through `datasets`."""
    import datasets

    (name, config), has_test = HUB[source], source == "gsm8k"
    hub_split = "test" if has_test and split == "test" else "train"
    try:
        rows = list(datasets.load_dataset(name, config, split=hub_split))
    except Exception as error:  # datasets raises a dozen kinds: offline, proxy, gated, renamed
        raise UserError(f"cannot fetch {name} from the hub ({type(error).__name__}). Without a network, give a folder "
                        "that holds train.jsonl and test.jsonl: --data DIR") from None  # fmt: skip
    try:
        found = [from_medreason(row) if source == "medreason" else from_record(row) for row in rows]
    except (ValueError, KeyError) as error:
        raise UserError(f"{name} on the hub is not what it was: {error}") from None
    return found if hub_split == "test" else of_split(found, split, has_test)


def of_split(found: list[Solution], split: str, has_test: bool = False) -> list[Solution]:
    """Those of one split. Questions that differ in spaces and case alone go together, where the first of them in the
    alphabet goes. A source that has a test split of its own keeps for train what would be `split_of`'s test share."""
    shares = ("train", "test") if has_test and split == "train" else (split,)
    first: dict[str, str] = {}  # of all questions that are alike
    for solution in found:
        form = without_form(solution.question)
        first[form] = min(solution.question, first.get(form, solution.question))
    return [solution for solution in found if split_of(first[without_form(solution.question)]) in shares]


def without_form(question: str) -> str:
    """The question without its spaces and case.

    >>> without_form("How  many eggs?")
    'howmanyeggs?'
    """
    return "".join(question.split()).casefold()


def read_jsonl(path: Path) -> list[Solution]:
    """Every record of a JSON-lines file."""
    return read_objects(path, text_lines(path), from_record, "question, trace and answer")


def read_objects(path: Path | str, lines: list[tuple[int, str]], read: Callable[[dict], object], fields: str) -> list:
    """read(object) of the JSON object on each (numbered) line of a file. What is wrong with one is said with its place."""
    found = []
    for number, line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"not a JSON object: each line needs one with {fields}")
            found.append(read(record))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not found:
        raise UserError(f"{path} is empty: it needs one JSON object per line, with {fields}")
    return found


def text_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of each line of a UTF-8 file that is not empty. A byte order mark, as Windows writes, is no text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        raise UserError(f"cannot read {path}: {error}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def field(record: dict, name: str, needed: bool = False) -> str | None:
    """One field of a record as text, without the space around it: a string or a finite number; None if it is missing."""
    value = record.get(name)
    number = type(value) is int or type(value) is float and math.isfinite(value)  # a bool is none
    if not (value is None or isinstance(value, str) or number):
        raise ValueError(f"field '{name}' must be a string or a finite number, not {str(value)[:40]}")
    try:
        text = None if value is None else check_text(str(value)).strip()
    except ValueError as error:
        raise ValueError(f"field '{name}': {error}") from None
    if needed and not text:
        raise ValueError(f"field '{name}' is missing or empty")
    return text


def from_record(record: dict) -> Solution:
    """A JSON object as a Solution. GSM8K's own form, whose answer holds the trace before '####', is understood too.

    >>> from_record({"question": "1+2?", "answer": "It is 1+2 = <<1+2=3>>3.\\n#### 3"})
    Solution(question='1+2?', trace='It is 1+2 = 3.', answer='3', options=(), marks=((12, '1+2=3'),))
    """
    record = with_listed_options(from_chat(record))
    question, answer = field(record, "question", needed=True), field(record, "answer", needed=True)
    trace, options = field(record, "trace"), record.get("options") or []
    if trace is None and "####" in answer:
        trace, answer = answer.rsplit("####", 1)
        if not answer.strip():
            raise ValueError("field 'answer' has nothing after its '####'")
    if trace is None:
        raise ValueError("field 'trace' is missing (the reasoning, without the answer)")
    if not isinstance(options, list):
        raise ValueError(f"field 'options' must be a list of strings, not {type(options).__name__}")
    trace, marks = without_marks(without_tags(trace))  # tags first: marks know their places
    answer = answer.strip()
    if answer.startswith("<answer>"):
        answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
        if not answer:
            raise ValueError("field 'answer' has nothing between its tags")
    options = tuple(field({"options": one}, "options") or "" for one in options)
    return Solution(question, trace, answer, options, marks)


def without_tags(trace: str) -> str:
    """A trace without the tags that data.response_text puts around it: R1 and its pupils write them themselves. An answer in
    tags at its end goes, too; what stands between is kept.

    >>> without_tags("<think>\\n3+2=5\\n</think>\\nSo five.\\n<answer>5</answer>")
    '3+2=5\\nSo five.'
    """
    before, opened, inside = trace.rpartition("<answer>")
    if opened and inside.rstrip().endswith("</answer>"):
        trace = before
    trace = trace.strip().removeprefix("<think>")
    thought, _, after = trace.partition("</think>")  # a prompt may have opened it: then there is no <think>
    return "\n".join(part.strip() for part in (thought, after) if part.strip())


# What makes demonstrations of TRL's completions, where the answer stands behind the last "="
CONVERT = (
    "python -c \"import json; [print(json.dumps({'question': r['prompt'], 'trace': r['completion'], 'answer': "
    "r['completion'].split('=')[-1].strip()})) for r in map(json.loads, open('IN.jsonl'))]\" > OUT.jsonl"
)


def from_chat(record: dict) -> dict:
    """A record in one of TRL's formats with our fields: `messages` of one user and one assistant turn, or `prompt` and
    `completion`, each a text or such messages. A system message is left out, since prompts have an instruction of their
    own. The answer is a field `answer`, or what the completion has in <answer> tags, behind its last '####', or in its last
    \\boxed{}. Other records stay as they are.

    >>> from_chat({"prompt": "3+2?", "completion": "3+2=5 #### 5"})
    {'question': '3+2?', 'trace': '3+2=5 ', 'answer': '5'}
    """
    if "question" in record or not ("messages" in record or {"prompt", "completion"} <= record.keys()):
        return record
    if "messages" in record:
        turns = turns_of(record["messages"], "messages")
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise ValueError("field 'messages' must hold one user turn and one assistant turn: give the last turns alone")
        prompt, completion = (content for _, content in turns)
    else:
        prompt = one_turn(record["prompt"], "prompt", "user")
        completion = one_turn(record["completion"], "completion", "assistant")
    answer = field(record, "answer")
    trace, named = split_completion(completion)
    if not answer and not named:
        raise ValueError(
            "the completion names no answer (<answer>5</answer>, #### 5 or \\boxed{5}): add a field 'answer'; "
            f"where it stands behind the last '=', with: {CONVERT}"
        )
    rest = {name: record[name] for name in ("options",) if name in record}
    return {"question": prompt, "trace": trace, "answer": answer or named} | rest


def turns_of(messages, name: str) -> list[tuple[str, str]]:
    """(role, content) of each message of a chat, without the system's."""
    if not isinstance(messages, list):
        raise ValueError(f"field '{name}' must be a list of messages, each with role and content")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"field '{name}': each message needs a role and a content, which is text")
        if message.get("role") != "system":
            turns.append((str(message.get("role")), message["content"]))
    return turns


def one_turn(value, name: str, role: str) -> str:
    """The text of a prompt or a completion, which may be a text or a list of one message."""
    if not isinstance(value, list):
        return field({name: value}, name, needed=True)
    turns = turns_of(value, name)
    if [by for by, _ in turns] != [role]:
        raise ValueError(f"field '{name}' must be a text or one message of the {role}")
    return turns[0][1]


def split_completion(text: str) -> tuple[str, str]:
    """(trace, answer) of a whole response; the answer is "" if none is marked.

    >>> split_completion("<think>3+2=5</think>\\n#### 5")
    ('<think>3+2=5</think>\\n', '5')
    """
    before, opened, inside = text.rpartition("<answer>")
    if opened:
        return before, inside.partition("</answer>")[0].strip()
    before, mark, after = text.rpartition("####")
    if mark:
        return before, after.strip()
    before, mark, after = text.rpartition("\\boxed{")
    depth = 1
    for place, letter in enumerate(after if mark else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:  # the brace that closes the box
            boxed, rest = after[:place], after[place + 1 :]
            if rest.strip(" .$\n"):  # amid a sentence: its words stay as they are
                return before + boxed + rest, boxed.strip()
            return before.rstrip(" $"), boxed.strip()
    return text, ""


def with_listed_options(record: dict) -> dict:
    """A record whose options are {"A": "7", "B": "5"} with a list of them. Where the keys are not A, B, C in order, an answer
    that names one becomes that option's text.

    >>> with_listed_options({"options": {"1": "7", "2": "5"}, "answer": "2"})
    {'options': ['7', '5'], 'answer': '5'}
    """
    options = record.get("options")
    if not isinstance(options, dict):
        return record
    letters = [chr(ord("A") + i) for i in range(len(options))]
    named = str(record.get("answer")).strip()
    changed = {"options": list(options.values())}
    if list(options) != letters and named in options:
        changed["answer"] = options[named]
    return record | changed


def without_marks(trace: str) -> tuple[str, tuple[tuple[int, str], ...]]:
    """(the trace without GSM8K's <<48/2=24>>, what stood in them and where). A lone '<<' stays.

    >>> without_marks("It is 1+2 = <<1+2=3>>3.")
    ('It is 1+2 = 3.', ((12, '1+2=3'),))
    """
    pieces = re.split(r"<<([^<>]{0,200})>>", trace.strip())  # text, mark, text, mark, .., text
    pieces[0] = pieces[0].lstrip()
    marks = []
    place = 0
    for text, mark in zip(pieces[::2], pieces[1::2]):
        place += len(text)
        marks.append((place, mark))
    return "".join(pieces[::2]).strip(), tuple(marks)


def from_medreason(row: dict) -> Solution:
    """A MedReason row: the options join the question, the answer loses its letter and its explanation.

    >>> tuple(from_medreason({"question": "Which vitamin?", "options": "Answer Choices:\\nA. B12\\nB. C\\nC. D",
    ...                       "answer": "B. C. Explanation: scurvy.", "reasoning": "Scurvy is lack of C."}))[:4]
    ('Which vitamin?\\nA. B12\\nB. C\\nC. D', 'Scurvy is lack of C.', 'C', ('B12', 'C', 'D'))
    """
    listed = [line.strip() for line in str(row.get("options") or "").split("\n")]
    options = tuple(line[2:].strip() for line in listed if re.match(r"[A-Z][.)]\s*\S", line))
    listed = "".join(f"\n{chr(65 + i)}. {option}" for i, option in enumerate(options))
    answer = re.split(r"\bExplanation:", str(row["answer"]), maxsplit=1)[0].strip()
    answer = re.sub(r"^[A-Z][.)]\s+", "", answer).strip().rstrip(".")
    return Solution(str(row["question"]).strip() + listed, str(row["reasoning"]).strip(), answer, options)
