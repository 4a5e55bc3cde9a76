"""`check`: compare an answer with the right one; if it is wrong, say which mistake gives that."""

import pytest
import torch


def show(value) -> str:
    """Numbers rounded to four places, at most eight rows."""
    value = torch.as_tensor(value)
    if value.is_floating_point():
        value = (value.double() * 1e4).round() / 1e4 + 0.0  # no -0.0
    return str((value[:8] if value.dim() else value).tolist())


def same(a, b) -> bool:
    """Equal up to rounding; nan equals nan."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def fail(name: str, hint: str, *lines: str) -> None:
    """Fail the test without a traceback: the hint is what the student should read."""
    pytest.fail("\n".join([f"{name}: not right yet", f"HINT: {hint}", *lines]), pytrace=False)


def check(name: str, got, expected, wrong: dict | None = None) -> None:
    """Pass if `got` equals `expected`, else fail with a hint.

    wrong: {hint: what the typical mistake returns for this input}. A mistake that is right for this
    input would make the hint a lie, so that is an error in the test itself.
    """
    wrong = wrong or {}
    for hint, value in wrong.items():
        assert not same(value, expected), (
            f"this input does not tell the mistake from the right answer: {hint}"
        )
    if got is None:
        fail(name, "the function returns None. Is there a `return`?")
    expected = torch.as_tensor(expected)
    try:
        got = torch.as_tensor(got).detach()
    except (TypeError, ValueError, RuntimeError):
        fail(name, f"a tensor of shape {list(expected.shape)} is wanted, not {type(got).__name__}")
    lines = (f"  yours    {show(got)}", f"  expected {show(expected)}")
    for hint, value in wrong.items():  # before the shape: a mistake may well change it
        if same(got, value):
            fail(name, hint, *lines)
    if got.shape != expected.shape:
        hint = f"the shape is {list(got.shape)}, but {list(expected.shape)} is wanted."
        if got.dim() < expected.dim():
            hint += " Do not sum or average here: one value per token is wanted."
        fail(name, hint, *lines)
    if expected.is_floating_point() and not got.is_floating_point():
        fail(
            name,
            f"the values are {got.dtype}; turn them into floats, they are to be multiplied with.",
            *lines,
        )
    if got.is_floating_point() and not got.isfinite().all():
        fail(
            name,
            "there is a nan or an inf. Which division, logarithm or exponential made it?",
            *lines,
        )
    if not same(got, expected):
        fail(
            name,
            "no typical mistake. Do the docstring's example by hand, then with your code.",
            *lines,
        )
