"""How `pytest exercises` runs: blanks or, with --solutions, the solved files.

A blank fails with one friendly line.

A plain `pytest` in the repository's root leaves the exercises out: unsolved, they would all fail.
"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOLUTIONS = HERE / "solutions"


def pytest_addoption(parser):
    parser.addoption(
        "--solutions", action="store_true", help="check exercises/solutions/ instead of the blanks"
    )


def asked_for(config) -> bool:
    """Whether the command line names this folder or a part of it, or pytest was started here."""
    named = [
        Path(config.invocation_params.dir, arg.split("::")[0]).resolve() for arg in config.args
    ]
    return any(path.is_relative_to(HERE) for path in named)


def pytest_configure(config):
    # ex1_masks.py is there twice under one name: the folder that comes first is the one that is
    # tested.
    if asked_for(config):
        sys.path.insert(0, str(HERE))
        if config.option.solutions:
            if not SOLUTIONS.is_dir():
                raise pytest.UsageError(
                    "--solutions: this copy was handed out without exercises/solutions/"
                )
            sys.path.insert(0, str(SOLUTIONS))


def pytest_ignore_collect(collection_path, config):
    # The repository asks for doctests too, but those of a blank cannot pass.
    if not asked_for(config):
        return True
    if collection_path == SOLUTIONS:
        return None if config.option.solutions else True
    if collection_path.suffix == ".py" and not collection_path.name.startswith("test_"):
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A blank is no error to be traced."""
    try:
        return (yield)
    except NotImplementedError as error:
        blank = str(error)
    pytest.fail(f"not solved yet: {blank}", pytrace=False)
