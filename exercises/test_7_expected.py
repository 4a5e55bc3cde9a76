"""Exercise 7, checked by a loop, and by trying to beat pi*."""

import math

import torch
from ex7_expected import best_logprobs, expected_reward
from hints import check, fail

EXPERT = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # [N, V]
PI = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
SCORES = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])


def by_loops(alpha, weigh=True) -> list:
    """E[f - alpha log pi], or with equal weights for all tokens, the mean."""
    rows = zip(PI.tolist(), SCORES.tolist())
    return [
        sum((p if weigh else 1 / 3) * (f - alpha * math.log(p)) for p, f in zip(*row))
        for row in rows
    ]


def test_expected_reward():
    log_pi = PI.log().requires_grad_()
    got = expected_reward(log_pi, SCORES, 0.3)
    expected = by_loops(0.3)
    check(
        "expected_reward",
        got,
        expected,
        {
            "every token weighs the same: this is a mean or a sum over the vocabulary, not the "
            "policy's expectation.": by_loops(0.3, weigh=False),
            "every token weighs 1: multiply by the policy's probabilities.": [
                3 * x for x in by_loops(0.3, weigh=False)
            ],
            "the weights are log-probabilities: take exp.": (
                PI.log() * (SCORES - 0.3 * PI.log())
            ).sum(-1),
            "the entropy term is missing: E[f] alone is greatest for a policy that always says "
            "the same.": by_loops(0.0),
            "alpha is not used: this is alpha = 1.": by_loops(1.0),
            "the sign of the entropy term: -alpha log pi is positive, it rewards doubt.": by_loops(
                -0.3
            ),
            "the sign: this is a loss, the expected reward was asked for.": [-x for x in expected],
            "summed over the batch (dim 0), not over the vocabulary (dim -1).": (
                PI * (SCORES - 0.3 * PI.log())
            ).sum(0),
        },
    )
    if not got.requires_grad:
        fail(
            "expected_reward",
            "no gradient reaches the policy: this is an objective, do not detach log pi.",
        )
    got.sum().backward()
    # d/d log pi of pi (f - alpha log pi) = pi (f - alpha log pi - alpha)
    check(
        "the gradient of expected_reward",
        log_pi.grad,
        PI * (SCORES - 0.3 * PI.log() - 0.3),
        {
            "the gradient misses a part: pi stands in the formula twice, as the weight and in "
            "the reward. Detach neither.": PI * (SCORES - 0.3 * PI.log()),
            "the gradient misses the weights: exp(log pi) must not be detached.": -0.3 * PI,
        },
    )


def test_best_policy():
    f = EXPERT.log()
    square = [[0.49 / 0.54, 0.04 / 0.54, 0.01 / 0.54], [0.01 / 0.46, 0.09 / 0.46, 0.36 / 0.46]]
    got = best_logprobs(f, 0.5)
    check(
        "exp of best_logprobs at alpha = 1/2",
        None if got is None else torch.as_tensor(got).exp(),
        square,
        {
            "this is the expert itself, the answer for alpha = 1.": EXPERT,
            "alpha multiplies f: then less of it flattens. Where does the derivative of E[f - "
            "alpha log pi] vanish?": (f * 0.5).softmax(-1),
            "f/alpha is right, but not normalised: subtract the logsumexp.": EXPERT**2,
            "these are probabilities: their logarithms were asked for.": torch.tensor(square).exp(),
            "all on the best token: that is alpha -> 0.": torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]),
        },
    )


def test_no_policy_is_better():
    torch.manual_seed(0)
    for alpha in (0.2, 0.5, 1.0, 2.0):
        best = best_logprobs(SCORES, alpha)
        if best is None:
            fail("best_logprobs", "the function returns None. Is there a `return`?")

        def value(log_pi, alpha=alpha):
            return (log_pi.exp() * (SCORES - alpha * log_pi)).sum(-1)

        check(f"total probability at alpha = {alpha}", best.exp().sum(-1), [1.0, 1.0])
        for _ in range(100):
            other = (best + 0.5 * torch.randn(2, 3)).log_softmax(-1)
            if (value(other) > value(best) + 1e-5).any():
                fail(
                    "best_logprobs",
                    f"at alpha = {alpha} a policy nearby has a greater E[f - alpha log pi].",
                )
