"""Exercise 5, checked by hand and against the definitions in double precision."""

import math

import torch
from ex5_discriminator import bce_loss, discriminator_logits, trace_weights
from hints import check, fail


def test_logits():
    f, pi = [[0.3, -1.0, 2.0]], [[0.6, 0.25, 0.9]]
    d = [math.exp(s) / (math.exp(s) + p) for s, p in zip(f[0], pi[0])]
    log_pi = torch.tensor(pi).log()
    scores = torch.tensor(f)
    check(
        "discriminator_logits",
        discriminator_logits(scores, log_pi),
        [[math.log(x) - math.log(1 - x) for x in d]],
        {
            "this is GAIL's logit: log pi is missing. Then the best f is a log-ratio that is "
            "stale once pi has moved.": f,
            "this is D, a probability. The logit is log D - log(1 - D).": [d],
            "the sign of log pi: D falls as pi grows, because the policy would have written "
            "that token anyway.": scores + log_pi,
            "the sign: this is the logit of 'policy', 1 - D.": log_pi - scores,
            "pi itself is subtracted instead of its logarithm.": scores - torch.tensor(pi),
            "this is log D alone: subtract log(1 - D).": [[math.log(x) for x in d]],
        },
    )


def test_bce():
    logits = [[0.4, -1.2, 2.5]]
    d = [1 / (1 + math.exp(-x)) for x in logits[0]]

    def loss(y):
        return [[-(y * math.log(p) + (1 - y) * math.log(1 - p)) for p in d]]

    for is_expert, y in ((True, 0.9), (False, 0.1)):
        check(
            f"bce_loss for {'the expert' if is_expert else 'the policy'}",
            bce_loss(torch.tensor(logits), is_expert, 0.2),
            loss(y),
            {
                "the labels are swapped: the expert's tokens are 1, the policy's 0.": loss(1 - y),
                "no label smoothing. Without it the logit, which is the reward, grows without end "
                "where D can be sure.": loss(round(y)),
                "too much smoothing: half of it goes to each class, y = 1 - smoothing/2 or "
                "smoothing/2.": loss(0.8 if is_expert else 0.2),
                "the sign: a loss is -log of a probability, so it is positive.": [
                    [-x for x in loss(y)[0]]
                ],
                "only the expert's half is smoothed, or the factor (1 - y) is missing: both terms "
                "are needed.": [[-y * math.log(p) for p in d]],
                "sigmoid is taken twice: D is already a probability, and "
                "binary_cross_entropy_with_logits takes logits.": [
                    [
                        -(y * math.log(q) + (1 - y) * math.log(1 - q))
                        for q in (1 / (1 + math.exp(-p)) for p in d)
                    ]
                ],
                "one number came back. Do not reduce: trace_weights decides what a "
                "token weighs.": sum(loss(y)[0]) / 3,
            },
        )


def test_bce_of_large_logits():
    got = bce_loss(torch.tensor([200.0, -200.0]), True, 0.1)
    if got is not None and not torch.as_tensor(got).isfinite().all():
        fail(
            "bce_loss",
            "nan or inf at a logit of 200: log(1 - sigmoid(200)) is log 0 in float32. log(1 - D) "
            "is logsigmoid(-logit); or use binary_cross_entropy_with_logits.",
        )
    # 0.05 * 200 for D ~ 1, and 0.95 * 200 for D ~ 0
    check(
        "bce_loss at logits of 200 and -200",
        got,
        [10.0, 190.0],
        {
            "the logarithm was held back by a clamp or an epsilon: no gradient is left there. "
            "Use logsigmoid.": [0.05 * -math.log(1e-8), 0.95 * -math.log(1e-8)],
            "binary_cross_entropy holds its logarithms above -100, without a gradient. Give "
            "logits to binary_cross_entropy_with_logits.": [0.05 * 100, 0.95 * 100],
        },
    )


def test_weights():
    mask = torch.tensor([[0.0, 1, 1, 1, 1], [0.0, 1, 0, 0, 0], [0.0, 0, 1, 1, 0]])
    expected = [[0, 1 / 12, 1 / 12, 1 / 12, 1 / 12], [0, 1 / 3, 0, 0, 0], [0, 0, 1 / 6, 1 / 6, 0]]
    check(
        "trace_weights",
        trace_weights(mask),
        torch.tensor(expected),
        {
            "every token weighs the same, so long traces decide. Mean over the trace first, "
            "then over the traces.": mask / mask.sum(),
            "each trace's weights add up to 1, but all of them together should: divide by the "
            "number of traces too.": mask / mask.sum(1, keepdim=True),
            "you divide by the width T, padding included: the loss would change with the "
            "padding.": mask / mask.numel(),
            "you divide by the number of traces only: sums over tokens, so long "
            "traces decide.": mask / 3,
        },
    )
    empty = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    check(
        "trace_weights with an empty trace",
        trace_weights(empty),
        torch.tensor([[0, 0.25, 0.25], [0, 0, 0]]),
        {
            "0/0 is nan for a trace without a counted token: clamp the number of tokens to at "
            "least 1.": empty / empty.sum(1, keepdim=True) / 2,
        },
    )
