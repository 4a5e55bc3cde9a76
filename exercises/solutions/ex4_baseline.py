"""Solution of exercise 4. The others' sum is the group's sum without one's own; the same for how many they are."""

import torch


def group_baseline(returns, mask, group):
    """[B, T] seen as [questions, group, T]."""
    grouped, alive = (returns * mask).view(-1, group, returns.shape[1]), mask.view(-1, group, returns.shape[1])
    others = grouped.sum(1, keepdim=True) - grouped
    how_many = alive.sum(1, keepdim=True) - alive
    baseline = torch.where(how_many > 0, others / how_many.clamp(min=1), grouped)
    return baseline.view_as(returns) * mask
