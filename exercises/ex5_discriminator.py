"""Exercise 5: expert or policy? In the repository: reward.py, `discriminator_logits`, `bce_loss`,
`trace_weights`.

The reward model gives each token a score f(s, a). The discriminator D(s, a) is the probability that
the token is the expert's, and its logit is the reward that the policy gets.
"""

import torch


def discriminator_logits(scores: torch.Tensor, policy_logprobs: torch.Tensor) -> torch.Tensor:
    """The logit of AIRL's D, that is log D - log(1 - D), from f and log pi.
    [B, T], [B, T] -> [B, T]

        D(s,a) = exp f(s,a) / (exp f(s,a) + pi(a|s))           (Fu, Luo & Levine, arXiv 1710.11248)

    Simplify on paper first: the result is short.

    >>> f, log_pi = torch.tensor([0.2]).log(), torch.tensor([0.6]).log()
    >>> discriminator_logits(f, log_pi).sigmoid()  # 0.2 / (0.2 + 0.6)
    tensor([0.2500])
    """
    raise NotImplementedError("discriminator_logits in ex5_discriminator.py")


def bce_loss(logits: torch.Tensor, is_expert: bool, smoothing: float) -> torch.Tensor:
    """Binary cross-entropy of each token, not reduced. [B, T] -> [B, T]

        loss = -(y log D + (1 - y) log(1 - D)),  D = sigmoid(logit)
        y = 1 - smoothing/2 for the expert's tokens, smoothing/2 for the policy's

    Logits of 200 occur, and 1 - sigmoid(200.0) is 0 in float32: its logarithm must not be taken.

    >>> bce_loss(torch.tensor([0.0]), True, 0.1)  # log 2, whatever the label
    tensor([0.6931])
    """
    raise NotImplementedError("bce_loss in ex5_discriminator.py")


def trace_weights(mask: torch.Tensor) -> torch.Tensor:
    """Weights w for which (w * loss).sum() is the mean over a trace's tokens, then over traces.
    [B, T] -> [B, T]

    So a long trace counts as much as a short one. A trace without any counted token has weights 0.

    >>> trace_weights(torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    tensor([[0.0000, 0.2500, 0.2500],
            [0.0000, 0.5000, 0.0000]])
    """
    raise NotImplementedError("trace_weights in ex5_discriminator.py")
