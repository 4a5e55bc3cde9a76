"""Exercise 6, checked by cases and by the gradient."""

import torch
from ex6_ppo import ppo_loss
from hints import check, fail

# ratio:      inside the clip, above it, below it; for a good and for a bad token
RATIO = [1.1, 1.5, 0.5, 1.1, 1.5, 0.5]
A = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
OLD = torch.tensor([[0.3, 0.5, 0.8, 0.6, 0.4, 0.7]]).log()  # [1, 6]


def clipped(r) -> float:
    return min(max(r, 0.8), 1.2)


def test_values():
    logprobs, advantages = OLD + torch.tensor([RATIO]).log(), torch.tensor([A])
    expected = [[-min(r * a, clipped(r) * a) for r, a in zip(RATIO, A)]]
    check(
        "ppo_loss",
        ppo_loss(logprobs, OLD, advantages, 0.2),
        expected,
        {
            "the sign: this is the objective. An optimizer minimises.": [[-x for x in expected[0]]],
            "nothing is clipped.": [[-r * a for r, a in zip(RATIO, A)]],
            "the clip alone, without the minimum: a token that has gone the wrong way (a good "
            "one with ratio 0.5, a bad one with 1.5) gets no gradient and "
            "cannot come back.": [[-clipped(r) * a for r, a in zip(RATIO, A)]],
            "the maximum of the two instead of the minimum: mind the sign, -min(x, y) = "
            "max(-x, -y).": [[-max(r * a, clipped(r) * a) for r, a in zip(RATIO, A)]],
            "min is over the ratios, before A is multiplied: for a bad token (A < 0) that is "
            "the wrong one of the two.": [[-min(r, clipped(r)) * a for r, a in zip(RATIO, A)]],
            "the ratio is upside down: pi / pi_old, so logprobs - old_logprobs.": [
                [-min(a / r, clipped(1 / r) * a) for r, a in zip(RATIO, A)]
            ],
            "the ratio is missing its exp: a difference of log-probabilities is log ratio.": [
                [-min(x * a, clipped(x) * a) for x, a in zip(torch.tensor(RATIO).log().tolist(), A)]
            ],
        },
    )


def test_gradient():
    # The first pass: pi = pi_old, so ratio = 1 everywhere.
    logprobs, old, advantages = (
        OLD.clone().requires_grad_(),
        OLD.clone().requires_grad_(),
        torch.tensor([A]),
    )
    advantages.requires_grad_()
    loss = ppo_loss(logprobs, old, advantages, 0.2)
    if loss is None:
        fail("ppo_loss", "the function returns None. Is there a `return`?")
    if not loss.requires_grad:
        fail("ppo_loss", "no gradient reaches the policy: do not detach `logprobs`.")
    loss.sum().backward()
    if logprobs.grad is None:
        fail("ppo_loss", "no gradient reaches the policy: detach `old_logprobs`, not `logprobs`.")
    for name, tensor in (("old_logprobs", old), ("advantages", advantages)):
        if tensor.grad is not None and bool(tensor.grad.any()):
            fail(
                "ppo_loss",
                f"a gradient flows into `{name}`: detach it. It is data here, not something to "
                "train.",
            )
    check("the gradient of ppo_loss at ratio 1", logprobs.grad, [[-a for a in A]])  # REINFORCE's
    logprobs = (OLD + torch.tensor([RATIO]).log()).requires_grad_()
    ppo_loss(logprobs, OLD, torch.tensor([A]), 0.2).sum().backward()
    # Clipped away: a good token already up by 1.5, a bad one already down to 0.5
    check(
        "the gradient of ppo_loss",
        logprobs.grad,
        [[-1.1 * 2, 0.0, -0.5 * 2, 1.1 * 2, 1.5 * 2, 0.0]],
    )
