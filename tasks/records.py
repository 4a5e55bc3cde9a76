"""Demonstrations from elsewhere: JSON lines, a folder of them, GSM8K and MedReason from the hub.

Read are question/trace/answer, GSM8K's own form, and TRL's messages and prompt/completion; options
are a list or an object. What is wrong with a line is told in one line, with its place.
"""

import itertools
import json
import math
import re
import string
from collections.abc import Callable
from pathlib import Path

from engine.chat import check_text
from engine.errors import UserError
from tasks.answers import extract_marked, odd_answers
from tasks.common import Solution, split_of

# 1. Where they are --------------------------------------------------------------------------------

# name on the hub, configuration
HUB = {"gsm8k": ("openai/gsm8k", "main"), "medreason": ("UCSC-VLAA/MedReason", None)}


def from_files(path: Path, split: str) -> list[Solution]:
    """One split of a JSON-lines file, or of a folder with train.jsonl and, if there is one,
    test.jsonl. What stands in both files of a folder is left out of train."""
    train = path if path.is_file() else path / "train.jsonl"
    test = path / "test.jsonl"
    if not train.exists():
        raise UserError(f"no train.jsonl in folder {path}")
    if not test.exists():
        return of_split(read_jsonl(train), split)
    if split == "test":
        return read_jsonl(test)
    tested = {without_form(solution.question) for solution in read_jsonl(test)}
    every = read_jsonl(train)
    kept = [solution for solution in every if without_form(solution.question) not in tested]
    if len(kept) < len(every) and split == "train":
        print(
            f"{len(every) - len(kept)} questions of {train} stand in {test}, too: left out of train"
        )
    return of_split(kept, split, has_test=True)


def from_hub(source: str, split: str) -> list[Solution]:
    """One split of GSM8K or MedReason, through `datasets`."""
    import datasets

    name, config = HUB[source]
    has_test = source == "gsm8k"
    hub_split = "test" if has_test and split == "test" else "train"
    try:
        rows = list(datasets.load_dataset(name, config, split=hub_split))
    except Exception as error:  # datasets raises a dozen kinds: offline, proxy, gated, renamed
        raise UserError(
            f"cannot fetch {name} from the hub ({type(error).__name__}). Without a network, give a "
            "folder that holds train.jsonl and test.jsonl: --data DIR"
        ) from None
    solutions = [from_record(row) if has_test else from_medreason(row) for row in rows]
    return solutions if hub_split == "test" else of_split(solutions, split, has_test)


def of_split(solutions: list[Solution], split: str, has_test: bool = False) -> list[Solution]:
    """Those of one split. Questions that differ in spaces and case alone go together, where the
    first of them in the alphabet goes. A source that has a test split of its own keeps for train
    what would be `split_of`'s test share."""
    shares = ("train", "test") if has_test and split == "train" else (split,)
    first: dict[str, str] = {}  # of all questions that are alike
    for question in sorted(solution.question for solution in solutions):
        first.setdefault(without_form(question), question)
    return [one for one in solutions if split_of(first[without_form(one.question)]) in shares]


def without_form(question: str) -> str:
    """The question without its spaces and case.

    >>> without_form("How  many eggs?")
    'howmanyeggs?'
    """
    return "".join(question.split()).casefold()


# 2. Lines of a file -------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[Solution]:
    """Every record of a JSON-lines file. True answers that are not read as the others are, a word
    among numbers, are named: no response would agree with them."""
    lines = text_lines(path)
    solutions = read_objects(path, lines, from_record, "question, trace and answer")
    odd = odd_answers([solution.answer for solution in solutions])
    if odd:
        place = f"{path}:{lines[odd[0]][0]}"
        first = solutions[odd[0]].answer[:60]
        print(
            f"{place}: {len(odd)} of {len(solutions)} answers, as {first!r}, are unlike the others"
        )
    return solutions


def read_objects(
    path: Path | str,
    lines: list[tuple[int, str]],
    read: Callable[[dict], object],
    fields: str,
) -> list:
    """read(object) of the JSON object on each (numbered) line of a file; UserError with the place
    of a line that is wrong."""
    results = []
    for number, line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"not a JSON object: each line needs one with {fields}")
            results.append(read(record))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not results:
        raise UserError(f"{path} is empty: it needs one JSON object per line, with {fields}")
    return results


def text_lines(path: Path | str) -> list[tuple[int, str]]:
    """(line number, line) of each line of a UTF-8 file that is not empty. A byte order mark, as
    Windows writes, is no text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a zero byte in its name
        raise UserError(f"cannot read {path}: {error}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


# 3. One record ------------------------------------------------------------------------------------

# What makes demonstrations of TRL's completions, where the answer stands behind the last "="
CONVERT = (
    'python -c "import json; [print(json.dumps({'
    "'question': r['prompt'], 'trace': r['completion'], "
    "'answer': r['completion'].split('=')[-1].strip()})) "
    "for r in map(json.loads, open('IN.jsonl'))]\" > OUT.jsonl"
)


def field(record: dict, name: str, needed: bool = False) -> str:
    """One field of a record as text, without the space around it: a string or a finite number; ""
    if it is missing."""
    value = "" if record.get(name) is None else record[name]
    # a bool is an int, too, and no answer
    is_number = type(value) is int or type(value) is float and math.isfinite(value)
    if not (isinstance(value, str) or is_number):
        raise ValueError(
            f"field '{name}' must be a string or a finite number, not {str(value)[:40]}"
        )
    text = check_text(str(value)).strip()
    if needed and not text:
        raise ValueError(f"field '{name}' is missing or empty")
    return text


def from_record(record: dict) -> Solution:
    """A JSON object as a Solution: question, trace and answer; or the question with a response that
    marks its answer, as in GSM8K ("answer": trace #### 5) and in TRL's messages or completion.

    >>> from_record({"question": "1+2?", "answer": "It is 1+2 = <<1+2=3>>3.\\n#### 3"})[1:3]
    ('It is 1+2 = 3.', '3')
    >>> from_record({"prompt": "1+2?", "completion": "1+2 is \\\\boxed{3}."})[:3]
    ('1+2?', '1+2 is', '3')
    """
    if "question" not in record and "messages" in record:
        question, trace = contents_of(record["messages"], ["user", "assistant"])
        record = record | {"question": question, "trace": trace}
    elif "question" not in record and "prompt" in record:
        (question,) = contents_of(record["prompt"], ["user"])
        (trace,) = contents_of(record.get("completion"), ["assistant"])
        record = record | {"question": question, "trace": trace}
    question = field(record, "question", needed=True)
    trace = field(record, "trace")
    answer = field(record, "answer")
    if not answer or record.get("trace") is None:
        trace, answer = split_response(trace or answer)
    answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
    if not answer:
        raise ValueError(
            "field 'trace' or 'answer' is missing, and nothing marks an answer "
            "(<answer>5</answer>, #### 5 or \\boxed{5}). Where it "
            f"stands behind the last '=', convert with: {CONVERT}"
        )
    options, answer = read_options(record, answer)
    trace, marks = without_marks(without_tags(trace))  # tags first: marks know their places
    return Solution(question, trace, answer, options, marks)


def read_options(record: dict, answer: str) -> tuple[tuple[str, ...], str]:
    """(the options of a question, its answer): a list of texts, or an object that names them.

    >>> read_options({"options": {"B": "Aorta", "A": "Heart"}}, "B")
    (('Heart', 'Aorta'), 'B')
    >>> read_options({"options": {"1": "Heart", "2": "Aorta"}}, "2")
    (('Heart', 'Aorta'), 'Aorta')
    """
    options = record.get("options") or []
    if isinstance(options, dict):
        names = sorted(options)
        if not "".join(names).isupper():
            # not called by letters, as responses call them: the text is the answer
            answer = str(options.get(answer, answer))
            if answer not in ["", *map(str, options.values())]:
                raise ValueError(f"field 'options' names no {answer[:40]!r}, which is the answer")
        elif names != list(string.ascii_uppercase[: len(names)]):
            raise ValueError(f"field 'options' has the letters {', '.join(names)}: A, B, .. needed")
        options = [options[name] for name in names]
    if not isinstance(options, list):
        raise ValueError('field \'options\' must be a list of texts, or {"A": "..", "B": ".."}')
    return tuple(field({"options": text}, "options", needed=True) for text in options), answer


def contents_of(chat: str | list, roles: list[str]) -> list[str]:
    """The texts of a chat's messages, which must be by these roles; a text is one message. A system
    message is left out, since prompts have an instruction of their own."""
    if isinstance(chat, str):
        chat = [{"role": roles[0], "content": chat}]
    try:
        turns = [(turn["role"], turn["content"]) for turn in chat if turn["role"] != "system"]
    except (TypeError, KeyError):
        turns = []
    if [role for role, _ in turns] != roles or not all(isinstance(text, str) for _, text in turns):
        raise ValueError(
            f"a chat must be a list of messages with a role and a content, one of the "
            f"{' and one of the '.join(roles)}"
        )
    return [text for _, text in turns]


def split_response(text: str) -> tuple[str, str]:
    """(trace, answer) of a whole response: what stands before the answer that it marks, and that;
    the answer is "" if none is marked.

    >>> split_response("<think>3+2=5</think>\\n#### 5")
    ('<think>3+2=5</think>\\n', '5')
    """
    answer = extract_marked(text) or ""
    for marker in ("<answer>", "####", "\\boxed{"):
        before, marked, after = text.rpartition(marker)
        if marked and answer in after:
            return before.rstrip(" $"), answer
    return text, answer


def without_tags(trace: str) -> str:
    """A trace without the tags that data.response_text puts around it: R1 and its pupils write them
    themselves. An answer in tags at its end goes, too; what stands between is kept.

    >>> without_tags("<think>\\n3+2=5\\n</think>\\nSo five.\\n<answer>5</answer>")
    '3+2=5\\nSo five.'
    """
    before, _, inside = trace.rpartition("<answer>")
    if inside.rstrip().endswith("</answer>"):
        trace = before
    # a prompt may have opened it: then there is no <think>
    thought, _, after = trace.strip().removeprefix("<think>").partition("</think>")
    return "\n".join(part.strip() for part in (thought, after) if part.strip())


def without_marks(trace: str) -> tuple[str, tuple[tuple[int, str], ...]]:
    """(the trace without GSM8K's <<48/2=24>>, what stood in them and where). A lone '<<' stays.

    >>> without_marks("It is 1+2 = <<1+2=3>>3.")
    ('It is 1+2 = 3.', ((12, '1+2=3'),))
    """
    pieces = re.split(r"<<([^<>]{0,200})>>", trace.strip())  # text, mark, text, mark, .., text
    pieces[0] = pieces[0].lstrip()
    places = itertools.accumulate(len(text) for text in pieces[::2])
    return "".join(pieces[::2]).strip(), tuple(zip(places, pieces[1::2]))


def from_medreason(row: dict) -> Solution:
    """A MedReason row: the options join the question, the answer loses its letter and its
    explanation.

    >>> row = {"question": "Which vitamin?", "options": "Answer Choices:\\nA. B12\\nB. C\\nC. D",
    ...        "answer": "B. C. Explanation: scurvy.", "reasoning": "Scurvy is lack of C."}
    >>> from_medreason(row)[:4]
    ('Which vitamin?\\nA. B12\\nB. C\\nC. D', 'Scurvy is lack of C.', 'C', ('B12', 'C', 'D'))
    """
    lines = [line.strip() for line in str(row.get("options") or "").split("\n")]
    options = tuple(line[2:].strip() for line in lines if re.match(r"[A-Z][.)]\s*\S", line))
    listed = [f"\n{chr(ord('A') + place)}. {option}" for place, option in enumerate(options)]
    answer = str(row["answer"]).partition("Explanation:")[0].strip()
    answer = re.sub(r"^[A-Z][.)]\s+", "", answer).strip().rstrip(".")
    return Solution(
        str(row["question"]).strip() + "".join(listed),
        str(row["reasoning"]).strip(),
        answer,
        options,
    )
