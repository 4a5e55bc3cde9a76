"""Exercise 9, checked by what comes out, at two values of alpha."""

import pytest
import torch
from ex9_bug import EXPERT, train
from hints import fail, show


def power(exponent: float) -> torch.Tensor:
    """expert^exponent, normalised: [Q, V]."""
    return (EXPERT.log() * exponent).softmax(-1)


def check_training(alpha: float) -> None:
    """f, the policy and the reported reward against what theory says."""
    policy, f, reward = train(alpha)
    lines = (f"  policy    {show(policy)}", f"  should be {show(power(1 / alpha))}")
    if policy.max(-1).values.min() > 0.97:
        fail(
            "train",
            "the policy always says the same: the entropy term has gone from the reward. It "
            "belongs there; what is wrong with how it is used?",
            *lines,
        )
    if not torch.allclose(f.exp(), EXPERT, atol=0.05):
        fail(
            "f",
            "the reward model is no longer the expert's log-probability. Stage 2 was right as it "
            "came.",
            f"  exp f     {show(f.exp())}",
        )

    def near(probabilities) -> bool:
        return torch.allclose(policy, probabilities, atol=0.05)

    if near(power(1 / (2 * alpha))) and not near(power(1 / alpha)):
        pytest.fail(
            "\n".join(
                [
                    "not solved yet: f is right, but the policy is too flat.",
                    f"HINT: this is expert^{1 / (2 * alpha):g}, the optimum for *twice* the alpha "
                    "that was asked for. So log pi enters the policy's step a second time. "
                    "Through which tensors does the gradient of stage 4 flow?",
                    *lines,
                ]
            ),
            pytrace=False,
        )
    if near(torch.full_like(EXPERT, 1 / 3)):
        fail(
            "train",
            "the policy is uniform: the wrong one of the two is detached. Nothing is left of A * "
            "grad log pi but the entropy.",
            *lines,
        )
    if not near(power(1 / alpha)):
        fail(
            "train",
            "the policy is neither what it was nor what it should be. Change as little as "
            "possible.",
            *lines,
        )
    # E[f - alpha log pi] at pi*, the mean over the questions
    best = float(alpha * (EXPERT.log() / alpha).logsumexp(-1).mean())
    if abs(reward - best) > 0.1:
        fail(
            "train",
            f"the policy is right, but the reward that is reported is {reward:.2f} and should be "
            f"{best:.2f}: you have bent the reward (another alpha?) until it cancels the bug. Find "
            "the bug itself.",
        )


def test_the_policy_becomes_the_expert():
    check_training(alpha=1.0)


def test_a_smaller_alpha_sharpens():
    check_training(alpha=0.5)
