"""Exercise 4: better than what? In the repository: policy.py, `group_baseline`.

The policy answers each question `group` times. Rows 0 .. group-1 belong to the first question, the
next `group` rows to the second. The samples of one question are each other's yardstick:
A_t = G_t - b_t.
"""

import torch


def group_baseline(returns: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    """b_t: the mean return at t of the *other* samples of the same question.
    [B, T], [B, T] -> [B, T]

        b[i, t] = mean of returns[j, t] over the rows j != i of i's group with mask[j, t] = 1

    (The leave-one-out baseline of Kool et al. 2019, per token.) Rows that have ended by t do not
    count. For a row that is alone at t, b is 0: any baseline will do that does not depend on the
    row itself (policy.py has a better one). Where mask[i, t] = 0, b is 0.

    >>> returns = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    >>> group_baseline(returns, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 2)
    tensor([[3., 0.],
            [1., 0.]])
    """
    raise NotImplementedError("group_baseline in ex4_baseline.py")
