"""Solution of exercise 6.

The minimum is taken with A inside, so that for A < 0 it is the larger ratio that counts.
"""

import torch


def ppo_loss(logprobs, old_logprobs, advantages, clip):
    """The sign last: an objective is maximised, a loss minimised."""
    ratio = (logprobs - old_logprobs.detach()).exp()
    advantages = advantages.detach()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
