"""Exercise 3: what a token leads to. In the repository: policy.py, `returns_to_go`.

A token is responsible for its own reward and for those that come after it, never for earlier ones.
"""

import torch


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ... over response tokens, 0 elsewhere.
    [B, T], [B, T] -> [B, T]

    (Sutton & Barto, eq. 3.8 and 3.9, with r_t the reward for a_t.) `rewards` may hold anything
    where mask is 0. Traces may have thousands of tokens, and 0.9^1000 is 0 in float32.

    >>> returns_to_go(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]), 0.5)
    tensor([[0., 2., 2.]])
    """
    raise NotImplementedError("returns_to_go in ex3_returns.py")
