"""What every task needs: the lock on its answer check, a split for each question, slips, and a walk
along a response for as long as it is right."""

import random
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

_verifier_locked = False


@contextmanager
def no_verifier():
    """Context in which every check of an answer against the truth raises, however it is reached.
    irl.py trains inside it."""
    global _verifier_locked
    before = _verifier_locked
    _verifier_locked = True
    try:
        yield
    finally:
        _verifier_locked = before


def verifier_is_asked(check: str) -> None:
    """To be called first by every function that looks at the truth about a response. RuntimeError
    inside `no_verifier`."""
    if _verifier_locked:
        raise RuntimeError(f"the answer check ({check}) was called in training without a verifier")


class Solution(NamedTuple):
    """An expert's: what data.Example is made of, without its task."""

    question: str
    trace: str
    answer: str
    options: tuple[str, ...] = ()
    marks: tuple[tuple[int, str], ...] = ()


def split_of(question: str) -> str:
    """'train', 'validation' or 'test' (80/10/10), decided by the question's own bytes: disjoint
    whatever the seed."""
    return {8: "validation", 9: "test"}.get(zlib.crc32(question.encode()) % 10, "train")


def wrong_digit(number: int, rng: random.Random) -> int:
    """A slip of the pen: `number` with one digit wrong."""
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([digit for digit in "123456789" if digit != digits[place]])
    return int("".join(digits))


def first_difference(a, b) -> int:
    """Index of the first place where two sequences differ; the shorter one's length if it is how
    the other begins."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def first_wrong(response: str, state, forms: Callable[[object], dict]) -> int | None:
    """Where a response leaves all right ones: the offset of the first character that none of them
    has; its length if it stops too early; None if it is right.
    forms(state) -> {a right piece of text: the state after it}, {} where a right response ends.

    >>> first_wrong("ac", 0, [{"a": 1}, {"b": 2}, {}].__getitem__)
    1
    """
    at = 0
    while pieces := forms(state):
        taken = next((piece for piece in pieces if response.startswith(piece, at)), None)
        if taken is None:
            rest = response[at:]
            return at + max(first_difference(piece, rest[: len(piece)]) for piece in pieces)
        at += len(taken)
        state = pieces[taken]
    return None if at == len(response) else at
