"""Solution of exercise 2. The state before token t is read off column t - 1."""

import torch


def token_logprobs(logits, tokens, mask):
    """Normalise, pick token t from column t - 1, put a 0 in front."""
    logprobs = logits[:, :-1].log_softmax(-1)  # [B, T-1, V], of tokens 1 ..
    chosen = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # [B, T-1]
    return torch.nn.functional.pad(chosen, (1, 0)) * mask
