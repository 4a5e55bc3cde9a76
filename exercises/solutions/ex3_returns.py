"""Solution of exercise 3. G_t = r_t + gamma G_{t+1}, from the end: no power of gamma is needed."""

import torch


def returns_to_go(rewards, mask, gamma):
    """The mask stops what stands behind the trace before it can leak in."""
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = (rewards[:, t] + gamma * running) * mask[:, t]
        returns[:, t] = running
    return returns
