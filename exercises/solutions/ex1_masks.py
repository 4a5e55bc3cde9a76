"""Solution of exercise 1. Positions against lengths: no token id is ever looked at."""

import torch


def response_mask(tokens, prompt_lengths, lengths):
    """1.0 where prompt_length <= t < length."""
    t = torch.arange(tokens.shape[1])  # [T], against [B, 1]
    return ((t >= prompt_lengths[:, None]) & (t < lengths[:, None])).float()


def labels(tokens, mask):
    """A new tensor: masked_fill, not masked_fill_."""
    return tokens.masked_fill(mask == 0, -100)
