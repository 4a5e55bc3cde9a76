"""countdown: reach a target with the numbers given, one operation a line.

    7 12 4 > 15         12+7=19
                        19-4=15

A trace is right if every line is true, takes numbers that are still there, and the last one left is
the target. That is easy to check and hard to find: which number to take away must be seen before
the first line is written. So a reward that judges finished traces can know more than a policy that
writes them; on `words` it cannot.

The base that ships with this task has read *attempts*, each with its grade behind its end: "right"
or "wrong". It calculates soundly, can judge, and cannot plan: one attempt in ten aims at the
target. That stands for a language model, a better judge than author. Nothing tells it which grade
is to be wished for.
"""

import itertools
import random
import re
from collections.abc import Iterator

from tasks import common
from tasks.common import Solution

NUMBERS = 3
LARGEST = 20  # what a base this small calculates without slips

# Of the base's corpus. Strangers are careless: some of their lines have a wrong result.
AIMED = 0.1  # share of the attempts that aim at the target
STRANGERS = 0.3  # share of the attempts that are by somebody else
SLIPS = 0.3  # share of a stranger's lines

Numbers = tuple[int, ...]


def moves(numbers: Numbers) -> dict[str, Numbers]:
    """Every line that may be written next, with the numbers that are left after it. No result is
    negative.

    >>> moves((3, 6))
    {'3+6=9': (9,), '6+3=9': (9,), '6-3=3': (3,)}
    """
    lines = {}
    for (i, a), (j, b) in itertools.permutations(enumerate(numbers), 2):
        rest = tuple(number for k, number in enumerate(numbers) if k not in (i, j))
        lines[f"{a}+{b}={a + b}"] = (*rest, a + b)
        if a >= b:
            lines[f"{a}-{b}={a - b}"] = (*rest, a - b)
    return lines


def good_moves(numbers: Numbers, target: int) -> dict[str, Numbers]:
    """Those after which the target can still be reached."""
    return {line: rest for line, rest in moves(numbers).items() if reachable(rest, target)}


def reachable(numbers: Numbers, target: int) -> bool:
    """Whether some lines lead from these numbers to the target alone."""
    return numbers == (target,) or bool(good_moves(numbers, target))


def make_problem(rng: random.Random) -> tuple[Numbers, int]:
    """Numbers, and a target that random lines have reached from them."""
    while True:
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(NUMBERS))
        left = numbers
        while len(left) > 1:
            left = rng.choice(list(moves(left).values()))
        if left[0] > 0 and left[0] not in numbers:
            return numbers, left[0]


def question_of(numbers: Numbers, target: int, in_words: bool = False) -> str:
    """The text of a problem: '7 12 4 > 15'; or in words, which a pretrained model reads.

    >>> question_of((7, 12, 4), 15, in_words=True).split(":")[0]
    'Reach 15 with the numbers 7, 12 and 4'
    """
    if not in_words:
        return " ".join(map(str, numbers)) + f" > {target}"
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    rules = "Use each number once. Each line adds or subtracts two of the numbers that are left."
    return f"Reach {target} with the numbers {listed}: {rules}"


def problem_of(question: str) -> tuple[Numbers, int]:
    """question_of, backwards.

    >>> problem_of("7 12 4 > 15"), problem_of(question_of((7, 12, 4), 15, in_words=True))
    (((7, 12, 4), 15), ((7, 12, 4), 15))
    """
    integers = [int(digits) for digits in re.findall(r"\d+", question)]
    if question.startswith("Reach"):  # the target comes first
        return tuple(integers[1:]), integers[0]
    return tuple(integers[:-1]), integers[-1]


def is_question(text: str) -> bool:
    """Whether a text is a problem as `question_of` writes it, of five numbers at most: more take
    seconds to check.

    >>> is_question("7 12 4 > 15"), is_question("Is 7 > 5?")
    (True, False)
    """
    return re.fullmatch(r"\d{1,4}(?: \d{1,4}){1,4} > \d{1,9}", text) is not None


def split_of(numbers: Numbers, target: int) -> str:
    """common.split_of, the same for every order of the numbers."""
    return common.split_of(question_of(tuple(sorted(numbers)), target))


def attempt(
    numbers: Numbers, target: int, rng: random.Random, aims: bool = True, slips: float = 0.0
) -> tuple[str, int, bool]:
    """(trace, last result, whether right). Who aims writes only lines after which the target can be
    reached. A slip is a wrong digit or, by somebody who knows where to end, the target itself."""
    lines = []
    sound = True
    while len(numbers) > 1:
        choices = (aims and good_moves(numbers, target)) or moves(numbers)
        line, numbers = rng.choice(list(choices.items()))
        if rng.random() < slips:
            sound = False
            slip = common.wrong_digit(numbers[-1], rng)
            if rng.random() < 0.5 and numbers[-1] != target:
                slip = target
            line = f"{line.split('=')[0]}={slip}"
            numbers = (*numbers[:-1], slip)
        lines.append(line)
    return "\n".join(lines), numbers[0], sound and numbers == (target,)


def solutions(
    split: str, count: int, seed: int = 0, in_words: bool = False, **unused
) -> list[Solution]:
    """An expert's solutions of at most `count` different problems of one split; fewer if there are
    no more. The same arguments, the same problems; `in_words` changes their text alone."""
    rng = random.Random(f"countdown {split} {seed}")
    problems: dict[str, tuple[Numbers, int]] = {}
    for _ in range(100 * count):
        numbers, target = make_problem(rng)
        # The same numbers in another order are the same problem.
        key = question_of(tuple(sorted(numbers)), target)
        if common.split_of(key) == split:
            problems.setdefault(key, (numbers, target))
        if len(problems) == count:
            break
    rng = random.Random(f"countdown experts {split} {seed}")
    solved = []
    for numbers, target in problems.values():
        trace, _, _ = attempt(numbers, target, rng)
        solved.append(Solution(question_of(numbers, target, in_words), trace, str(target)))
    return solved


def first_error(expert, response: str) -> int | None:
    """Where a response can no longer come right: a character offset into it, None if it is right.
    Of the expert's example only the question counts: at each line all good ones are known.

    Here 7 was not to be taken away:

    >>> first_error(Solution("7 12 4 > 15", "", "15"), "<think>\\n12-7=5\\n5+4=9\\n")
    11
    """
    common.verifier_is_asked("countdown.first_error")
    numbers, target = problem_of(expert.question)

    def forms(left: Numbers | None) -> dict:
        """What may stand where these numbers are left."""
        if left is None:
            return {"<think>\n": numbers}
        if len(left) == 1:
            return {f"</think>\n<answer>{target}</answer>": ()}
        return {f"{line}\n": rest for line, rest in good_moves(left, target).items()}

    return common.first_wrong(response, None, forms)


def is_right(expert, response: str) -> bool:
    """The verifier: every line, the numbers, and where they lead."""
    return first_error(expert, response) is None


def graded_attempts(count: int, seed: int = 0) -> Iterator[tuple[str, str, str, str, bool]]:
    """The base's corpus: (question, trace, last result, grade, whether the writer is a stranger),
    `count` times."""
    rng = random.Random(f"countdown attempts {seed}")
    while count:
        numbers, target = make_problem(rng)
        if split_of(numbers, target) != "train":
            continue
        count -= 1
        stranger = rng.random() < STRANGERS
        aims = rng.random() < AIMED
        trace, last, right = attempt(numbers, target, rng, aims, SLIPS * stranger)
        yield (
            question_of(numbers, target),
            trace,
            str(last),
            "right" if right else "wrong",
            stranger,
        )
