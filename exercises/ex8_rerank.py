"""Exercise 8: choose one of many. In the repository: rerank.py, `pass_at_k`, `best_of_n`."""

import torch


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without putting back, hold a correct one, if c are correct.

        pass@k = 1 - C(n - c, k) / C(n, k)            (Chen et al. 2021, arXiv 2107.03374, eq. 1)

    C(m, k) is 0 for m < k: with too few wrong ones, a correct one is sure to be drawn. 1 <= k <= n,
    0 <= c <= n.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.5, 1.0)
    """
    raise NotImplementedError("pass_at_k in ex8_rerank.py")


def best_of_n(correct: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """Mean correctness of the highest-scored of n candidates, over all n-subsets of the N.
    [Q, N] x2 -> [Q]

    Using the first n only would be right on average, but noisy. Sort by score instead, best first:
    the candidate at place i (from 0) wins the subsets that hold it and n - 1 of the N - 1 - i
    candidates below it:

        accuracy = sum_i correct_i C(N - 1 - i, n - 1) / C(N, n)

    Scores differ from each other here: no ties.

    >>> correct, scores = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.9, 0.5]])
    >>> best_of_n(correct, scores, 2)  # one pair of three
    tensor([0.3333])
    """
    raise NotImplementedError("best_of_n in ex8_rerank.py")
