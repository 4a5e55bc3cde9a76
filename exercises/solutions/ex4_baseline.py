"""Solution of exercise 4.

The others' sum is the group's sum without one's own; the same for how many they are, with 0/1
instead of 0/0 for a row alone.
"""

import torch  # noqa: F401 - wrong answers, which the test of the hints makes of this one, use it


def group_baseline(returns, mask, group):
    """[B, T] seen as [questions, group, T]."""
    shape = (-1, group, returns.shape[1])
    grouped = (returns * mask).view(shape)
    alive = mask.view(shape)
    others = grouped.sum(1, keepdim=True) - grouped
    how_many = alive.sum(1, keepdim=True) - alive
    return (others / how_many.clamp(min=1)).view_as(returns) * mask
