"""words: embedded word problems with an exact checker per step, and a pupil who gets them wrong.

    Ava has 24 pens. Ava buys 3 bags of 12. How many pens?        3*12=36
                                                                  24+36=60
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import UserError
from tasks.answers import extract_answer, same_answer
from tasks.common import Solution, first_wrong, split_of, verifier_is_asked, wrong_digit

NAMES = ("Ava", "Ben", "Cho", "Dan", "Eve", "Gus", "Ida", "Lee")
ITEMS = ("pens", "eggs", "cards", "coins", "nuts", "beads", "shells", "pins")
GAINS, LOSSES, PACKS = ("finds", "gets", "picks"), ("loses", "sells", "eats"), ("bags", "boxes", "packs")
STEPS = {"gain": 1, "loss": 1, "packs": 2, "shares": 2}  # kind of event -> steps of arithmetic that it takes


class Problem(NamedTuple):
    question: str
    start: int
    events: list[tuple[str, int, int]]  # the kind of each sentence and its numbers a and b; b counts where there are two steps


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
    question, events, left = f"{name} has {start} {item}.", [], steps
    while left:
        kind = rng.choice(["gain", "loss"] if left == 1 else ["gain", "loss", "packs", "packs", "shares", "shares"])
        a, b = rng.randint(2, 5), rng.randint(2, max(2, largest // 3))
        a = a if STEPS[kind] == 2 else rng.randint(2, largest)
        change = {"gain": a, "loss": -a, "packs": a * b, "shares": -a * b}[kind]
        if have + change > 0:  # nobody gives away all she has, or more
            have, left = have + change, left - STEPS[kind]
            events.append((kind, a, b))
            sentences = {
                "gain": f" {name} {rng.choice(GAINS)} {a}.",
                "loss": f" {name} {rng.choice(LOSSES)} {a}.",
                "packs": f" {name} buys {a} {rng.choice(PACKS)} of {b}.",
                "shares": f" {name} gives {a} friends {b} each.",
            }
            question += sentences[kind]
    return Problem(question + f" How many {item}?", start, events)


def subtract_by_column(a: int, b: int) -> int:
    """The pupils' bug 'smaller from larger' (Brown & Burton 1978): in each column, the smaller digit from the larger.

    >>> subtract_by_column(50, 9), subtract_by_column(58, 23)
    (59, 35)
    """
    top, bottom = str(max(a, b)), str(min(a, b)).zfill(len(str(max(a, b))))
    return int("".join(str(abs(int(x) - int(y))) for x, y in zip(top, bottom)))


@dataclass(frozen=True)
class Pupil:
    """How often a pupil goes wrong at a step where it can. Who is wrong more often than right is *confidently* wrong:
    greedy decoding and majority vote make it worse, and its own log-probability cannot tell."""

    groups: float = 0.6  # '3 bags of 12' is added instead of multiplied
    borrow: float = 0.3  # a subtraction goes column by column without borrowing
    slip: float = 0.1  # one digit of any other result comes out wrong


def solve(problem: Problem, pupil: Pupil | None = None, rng: random.Random | None = None) -> Solution:
    """Write a trace for `problem`: the expert's, or that of a pupil, whose errors propagate to the answer."""
    lines: list[str] = []

    def step(a: int, op: str, b: int) -> int:
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        if pupil and op == "-" and rng.random() < pupil.borrow:
            result = subtract_by_column(a, b)
        elif pupil and rng.random() < pupil.slip:
            result = wrong_digit(abs(result), rng)
        lines.append(f"{a}{op}{b}={abs(result)}")  # after an error more may be given than is left; pupils drop the sign
        return abs(result)

    have = problem.start
    for kind, amount, each in problem.events:
        if STEPS[kind] == 2:
            confused = pupil is not None and rng.random() < pupil.groups
            amount = step(amount, "+" if confused else "*", each)
        have = step(have, "+" if kind in ("gain", "packs") else "-", amount)
    return Solution(problem.question, "\n".join(lines), str(have))


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
    raise UserError(f"only {len(problems)} different problems with steps={steps}, largest={largest}; {count} were asked for")


def solutions(
    split: str, count: int, seed: int = 0, steps: int = 3, largest: int = 40, **unused
) -> list[Solution]:
    """An expert's solutions of `words_problems`."""
    return [solve(problem) for problem in words_problems(split, count, seed, steps, largest)]


def first_error(expert, response: str) -> int | None:
    """Where a response first goes wrong: a character offset into it, None if it is right. A step is right if it is the
    equation on that line of the expert's trace; a sum or a product may have its two operands the other way round.

    >>> expert = Solution("...", "3*12=36\\n14+36=50", "50")
    >>> first_error(expert, "<think>\\n12*3=36\\n36+14=50\\n</think>\\n<answer>50</answer>") is None
    True
    >>> first_error(expert, "<think>\\n3+12=15\\n14+15=29\\n</think>\\n<answer>29</answer>")
    9
    """
    verifier_is_asked("words.first_error")
    turned = lambda line: re.sub(r"^(\d+)([+*])(\d+)(=\d+)$", r"\3\2\1\4", line)
    steps = [[line + "\n", turned(line) + "\n"] for line in expert.trace.split("\n")]
    pieces = [["<think>\n"], *steps, [f"</think>\n<answer>{expert.answer}</answer>"]]
    return first_wrong(response, 0, lambda i: dict.fromkeys(pieces[i], i + 1) if i < len(pieces) else {})


def is_right(expert, response: str) -> bool:
    """The verifier: the answer alone."""
    return same_answer(extract_answer(response), expert.answer)
