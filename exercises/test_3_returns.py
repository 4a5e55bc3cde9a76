"""Exercise 3, checked by hand and by the definition's double sum."""

import torch
from ex3_returns import returns_to_go
from hints import check, fail


def test_by_hand():
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    # 1 + 2/2 + 4/4 = 3, 2 + 4/2 = 4, 4
    check(
        "returns_to_go",
        returns_to_go(rewards, mask, 0.5),
        [[0.0, 3.0, 4.0, 4.0, 0.0]],
        {
            "you sum from the start: that is what came before a token. Go from the last token "
            "to the first.": [[0.0, 1.0, 2.5, 5.25, 0.0]],
            "gamma is not used: these are undiscounted sums.": [[0.0, 7.0, 6.0, 4.0, 0.0]],
            "the token's own reward r_t is missing: the sum begins with k = 0.": [
                [0.0, 2.0, 2.0, 0.0, 0.0]
            ],
            "r_t is discounted too: gamma^0 = 1 belongs to it, gamma^1 to r_{t+1}.": [
                [0.0, 1.5, 2.0, 2.0, 0.0]
            ],
            "the discount counts from the trace's start, not from t: later tokens get less "
            "than they should.": [[0.0, 3.0, 2.0, 1.0, 0.0]],
            "the discount counts from column 0, not from t: divide it out, or better, loop "
            "from the end.": [[0.0, 1.5, 1.0, 0.5, 0.0]],
            "a value behind the trace has leaked in: put it to 0 before you sum.": [
                [0.0, 3.875, 5.75, 7.5, 0.0]
            ],
            "rewards outside the response count: put them to 0 before you sum.": [
                [10.9375, 3.875, 5.75, 7.5, 7.0]
            ],
            "the returns run on before the response: 0 where mask is 0.": [
                [1.5, 3.0, 4.0, 4.0, 0.0]
            ],
            "that is the whole trace's return at every token. A token answers for what comes "
            "from it on only.": [[0.0, 3.0, 3.0, 3.0, 0.0]],
            "these are the rewards, with nothing of the future in them.": [
                [0.0, 1.0, 2.0, 4.0, 0.0]
            ],
        },
    )


def test_by_the_definition():
    torch.manual_seed(0)
    rewards = torch.randn(3, 6)
    mask = torch.tensor([[0.0, 1, 1, 1, 0, 0], [0.0, 0, 1, 1, 1, 1], [0.0, 1, 0, 0, 0, 0]])
    before, expected = rewards.clone(), torch.zeros(3, 6)
    for b in range(3):
        for t in range(6):
            for k in range(6 - t):
                expected[b, t] += 0.9**k * rewards[b, t + k] * mask[b, t + k] * mask[b, t]
    check("returns_to_go", returns_to_go(rewards, mask, 0.9), expected)
    if not torch.equal(rewards, before):
        fail(
            "returns_to_go",
            "your function has written into `rewards`: later stages still need them.",
        )


def test_long_traces():
    got = returns_to_go(torch.ones(1, 2000), torch.ones(1, 2000), 0.9)
    if got is not None and not torch.as_tensor(got).isfinite().all():
        fail(
            "returns_to_go",
            "nan or inf for a trace of 2000 tokens. Do you divide by gamma^t? In float32 that is 0 "
            "at t = 1000, and before that its inverse overflows. The loop from the end needs no "
            "power.",
        )
    # sum_{k < m} 0.9^k = (1 - 0.9^m) / 0.1 with m = 2000 - t tokens left
    check("returns_to_go", got, [[(1 - 0.9 ** (2000 - t)) / 0.1 for t in range(2000)]])
