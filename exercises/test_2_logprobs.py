"""Exercise 2, checked by hand and by a loop."""

import math

import torch
from ex2_logprobs import token_logprobs
from hints import check


def test_by_hand():
    # Adding a constant to the logits of a column changes no probability.
    logits = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]]).log()
    logits = logits + torch.tensor([[[3.0], [-1.0], [2.0]]])
    tokens, mask = torch.tensor([[0, 1, 0]]), torch.tensor([[0.0, 1.0, 1.0]])
    of_tokens = logits[:, :-1].log_softmax(1)[0, [0, 1], [1, 0]]
    over_time = torch.nn.functional.pad(of_tokens, (1, 0))[None]
    check(
        "token_logprobs",
        token_logprobs(logits, tokens, mask),
        [[0.0, math.log(0.75), math.log(0.5)]],
        {
            "your values are shifted by one: token t was chosen by column t - 1 of the logits.": [
                [0.0, math.log(0.5), math.log(0.9)]
            ],
            "these are probabilities. Take their logarithm, or log_softmax at once.": [
                [0.0, 0.75, 0.5]
            ],
            "these are logits: normalise them over the vocabulary first (log_softmax).": [
                [0.0, math.log(0.75) + 3, math.log(0.5) - 1]
            ],
            "you normalise over time (dim 1). A distribution is over the "
            "vocabulary: dim -1.": over_time,
            "right values, one column too early: put a 0 in front, not behind.": [
                [0.0, math.log(0.5), 0.0]
            ],
        },
    )


def test_by_a_loop():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 3), torch.tensor([[0, 2, 1, 1, 0], [1, 0, 2, 0, 0]])
    mask = torch.tensor([[0.0, 0, 1, 1, 1], [0.0, 1, 1, 0, 0]])
    everywhere, expected = torch.zeros(2, 5), torch.zeros(2, 5)
    for b in range(2):
        for t in range(1, 5):
            before = logits[b, t - 1].tolist()  # the V logits that chose token t
            everywhere[b, t] = before[tokens[b, t]] - math.log(sum(math.exp(x) for x in before))
            expected[b, t] = everywhere[b, t] * mask[b, t]
    shifted = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) * mask
    check(
        "token_logprobs",
        token_logprobs(logits, tokens, mask),
        expected,
        {
            "the mask is missing: questions and padding must be 0.": everywhere,
            "your values are shifted by one: token t was chosen by column t - 1 "
            "of the logits.": shifted,
            "the sign: log-probabilities are negative, and what you return is a loss.": -expected,
        },
    )
