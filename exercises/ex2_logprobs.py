"""Exercise 2: what the policy thought of its own tokens. In the repository: policy.py,
`token_logprobs`.

Column t of the logits is what the model says after it has *read* token t: a distribution over token
t + 1. Column t of everything else in this course belongs to token t itself: its mask, its reward,
its log-probability.
"""

import torch


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi(a_t | s_t) in column t where mask is 1, 0 elsewhere.
    [B, T, V], [B, T], [B, T] -> [B, T]

    s_t is all that stands before token t, and a_t is token t. mask[:, 0] is always 0: nothing chose
    the first token.

    >>> logits = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]]).log()  # [1, 3, 2]
    >>> token_logprobs(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[0.0, 1.0, 1.0]])).exp()
    tensor([[1.0000, 0.7500, 0.5000]])
    """
    raise NotImplementedError("token_logprobs in ex2_logprobs.py")
