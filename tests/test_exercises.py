"""The exercises can be solved, fail kindly as handed out, and their planted bug is really there."""

from exercises.check_solutions import check_solutions


def test_exercises():
    check_solutions()  # raises AssertionError with what is wrong
