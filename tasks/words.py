"""words: embedded word problems with an exact checker per step, and a pupil who gets them wrong.

Ava has 24 pens. Ava buys 3 bags of 12. How many pens?        3*12=36
                                                              24+36=60
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from tasks.answers import extract_answer, same_answer
from tasks.common import Solution, first_wrong, split_of, verifier_is_asked, wrong_digit

NAMES = ("Ava", "Ben", "Cho", "Dan", "Eve", "Gus", "Ida", "Lee")
ITEMS = ("pens", "eggs", "cards", "coins", "nuts", "beads", "shells", "pins")
GAINS = ("finds", "gets", "picks")
LOSSES = ("loses", "sells", "eats")
PACKS = ("bags", "boxes", "packs")
STEPS = {"gain": 1, "loss": 1, "packs": 2, "shares": 2}  # steps of arithmetic of each kind of event
SIGNS = {"gain": "+", "loss": "-", "packs": "+", "shares": "-"}


class Problem(NamedTuple):
    question: str
    start: int
    # kind, and numbers a and b, of each sentence; b counts where there are two steps
    events: list[tuple[str, int, int]]


def make_problem(rng: random.Random, steps: int = 3, largest: int = 40) -> Problem:
    """Draw a problem of `steps` steps of arithmetic with numbers up to `largest` in its text.

    >>> problem = make_problem(random.Random(1))
    >>> problem.question
    'Cho has 18 eggs. Cho picks 32. Cho gets 26. Cho loses 16. How many eggs?'
    >>> solve(problem).trace
    '18+32=50\\n50+26=76\\n76-16=60'
    """
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    start = rng.randint(max(2, largest // 4), largest)
    question = f"{name} has {start} {item}."
    events = []
    have = start
    while steps:
        kinds = ["gain", "loss"]
        if steps > 1:
            kinds += ["packs", "packs", "shares", "shares"]
        kind = rng.choice(kinds)
        a = rng.randint(2, 5)
        b = rng.randint(2, max(2, largest // 3))
        if STEPS[kind] == 1:
            a = rng.randint(2, largest)
        change = {"gain": a, "loss": -a, "packs": a * b, "shares": -a * b}[kind]
        if have + change > 0:  # nobody gives away all she has, or more
            have += change
            steps -= STEPS[kind]
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
    """The pupils' bug 'smaller from larger' (Brown & Burton 1978): in each column, the smaller
    digit from the larger.

    >>> subtract_by_column(50, 9), subtract_by_column(58, 23)
    (59, 35)
    """
    width = len(str(max(a, b)))
    columns = zip(str(a).zfill(width), str(b).zfill(width))
    return int("".join(str(abs(int(x) - int(y))) for x, y in columns))


@dataclass(frozen=True)
class Pupil:
    """How often a pupil goes wrong at a step where it can. Who is wrong more often than right is
    *confidently* wrong: greedy decoding and majority vote make it worse, and its own
    log-probability cannot tell."""

    groups: float = 0.6  # '3 bags of 12' is added instead of multiplied
    borrow: float = 0.3  # a subtraction goes column by column without borrowing
    slip: float = 0.1  # one digit of any other result comes out wrong


EXPERT = Pupil(groups=0.0, borrow=0.0, slip=0.0)


def solve(problem: Problem, pupil: Pupil = EXPERT, rng: random.Random | None = None) -> Solution:
    """Write a trace for `problem`: the expert's, or that of a pupil, whose errors propagate to the
    answer."""
    rng = rng or random.Random(0)
    lines: list[str] = []

    def step(a: int, operator: str, b: int) -> int:
        # After an error more may be given than is left; pupils drop the sign.
        result = abs({"+": a + b, "-": a - b, "*": a * b}[operator])
        if operator == "-" and rng.random() < pupil.borrow:
            result = subtract_by_column(a, b)
        elif rng.random() < pupil.slip:
            result = wrong_digit(result, rng)
        lines.append(f"{a}{operator}{b}={result}")
        return result

    have = problem.start
    for kind, amount, each in problem.events:
        if STEPS[kind] == 2:
            confused = rng.random() < pupil.groups
            amount = step(amount, "+" if confused else "*", each)
        have = step(have, SIGNS[kind], amount)
    return Solution(problem.question, "\n".join(lines), str(have))


def words_problems(
    split: str, count: int, seed: int = 0, steps: int = 3, largest: int = 40
) -> list[Problem]:
    """At most `count` different problems of one split; fewer if there are no more. The same
    arguments always give the same problems."""
    rng = random.Random(f"words {split} {seed} {steps} {largest}")
    problems: dict[str, Problem] = {}
    for _ in range(1000 * count):
        problem = make_problem(rng, steps, largest)
        if split_of(problem.question) == split:
            problems.setdefault(problem.question, problem)
        if len(problems) == count:
            break
    return list(problems.values())


def solutions(split: str, count: int, seed: int = 0, steps=3, largest=40, **unused) -> list:
    """An expert's Solutions of `words_problems`."""
    return [solve(problem) for problem in words_problems(split, count, seed, steps, largest)]


def first_error(expert, response: str) -> int | None:
    """Where a response first goes wrong: a character offset into it, None if it is right. A step is
    right if it is the equation on that line of the expert's trace; a sum or a product may have its
    two operands the other way round.

    >>> expert = Solution("...", "3*12=36\\n14+36=50", "50")
    >>> first_error(expert, "<think>\\n12*3=36\\n36+14=50\\n</think>\\n<answer>50</answer>") is None
    True
    >>> first_error(expert, "<think>\\n3+12=15\\n14+15=29\\n</think>\\n<answer>29</answer>")
    9
    """
    verifier_is_asked("words.first_error")
    pieces = [["<think>\n"]]  # the right forms of each piece of a response
    for line in expert.trace.split("\n"):
        turned = re.sub(r"^(\d+)([+*])(\d+)(=\d+)$", r"\3\2\1\4", line)
        pieces.append([f"{line}\n", f"{turned}\n"])
    pieces += [[f"</think>\n<answer>{expert.answer}</answer>"], []]

    def forms(i: int) -> dict[str, int]:
        return dict.fromkeys(pieces[i], i + 1)

    return first_wrong(response, 0, forms)


def is_right(expert, response: str) -> bool:
    """The verifier: the answer alone."""
    return same_answer(extract_answer(response), expert.answer)
