"""Solution of exercise 8. math.comb(m, k) is 0 for m < k, as the definition asks."""

import math

import torch


def pass_at_k(n, c, k):
    """1 - the chance that all k are wrong."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def best_of_n(correct, scores, n):
    """Each place's chance of being the best of a subset, times whether it is correct."""
    total = scores.shape[1]
    in_order = correct.gather(1, scores.argsort(dim=1, descending=True))  # [Q, N], best first
    chance = [math.comb(total - 1 - i, n - 1) / math.comb(total, n) for i in range(total)]
    return (in_order * torch.tensor(chance)).sum(1)
