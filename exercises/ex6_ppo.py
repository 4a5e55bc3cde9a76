"""Exercise 6: improve, but not too far at once. In the repository: policy.py, `ppo_loss`."""

import torch


def ppo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> torch.Tensor:
    """PPO's clipped loss of each token, to be *minimised*. [B, T] each -> [B, T]

        objective = min(ratio A, clip(ratio, 1 - clip, 1 + clip) A),  ratio = pi(a|s) / pi_old(a|s)

    (Schulman et al. 2017, arXiv 1707.06347, eq. 7.) The gradient goes through `logprobs` only.

    >>> ppo_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    raise NotImplementedError("ppo_loss in ex6_ppo.py")
