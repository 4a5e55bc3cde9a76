"""Exercise 1, checked by hand-written rows."""

import torch
from ex1_masks import labels, response_mask
from hints import check, fail

# Row 0 ends with the end token 0, and is padded with 0. Row 1 was cut off by the length limit: it
# has no end token. Row 2's question contains token 0.
TOKENS = torch.tensor([[5, 6, 7, 8, 0, 0, 0], [5, 6, 6, 7, 8, 7, 8], [0, 5, 7, 7, 0, 0, 0]])
PROMPT_LENGTHS, LENGTHS = torch.tensor([2, 1, 2]), torch.tensor([5, 7, 5])
MASK = torch.tensor([[0.0, 0, 1, 1, 1, 0, 0], [0.0, 1, 1, 1, 1, 1, 1], [0.0, 0, 1, 1, 1, 0, 0]])


def between(first, last) -> torch.Tensor:
    """1 where first <= t < last, by loops."""
    return torch.tensor(
        [[float(a <= t < b) for t in range(7)] for a, b in zip(first.tolist(), last.tolist())]
    )


def test_response_mask():
    no_question, not_zero = between(PROMPT_LENGTHS, 0 * LENGTHS + 7), (TOKENS != 0).float()
    check(
        "response_mask",
        response_mask(TOKENS, PROMPT_LENGTHS, LENGTHS),
        MASK,
        {
            "you find padding by its value. The end token has the same value here, so it never "
            "trains, and the policy never learns to stop. Use lengths.": no_question * not_zero,
            "you find padding by its value, and the question counts as well. Use "
            "prompt_lengths and lengths.": not_zero,
            "the question counts as well: start at prompt_lengths.": between(
                0 * PROMPT_LENGTHS, LENGTHS
            ),
            "padding counts as well: stop at lengths.": no_question,
            "the last token of every trace is missing: lengths counts it, so the last column "
            "is lengths - 1.": between(PROMPT_LENGTHS, LENGTHS - 1),
            "one column too many at the end: column `lengths` is the first of "
            "the padding.": between(PROMPT_LENGTHS, LENGTHS + 1),
            "the first response token is missing: it stands in column "
            "prompt_lengths itself.": between(PROMPT_LENGTHS + 1, LENGTHS),
            "one column too early: the mask is that of token t + 1. Shifting is exercise 2; "
            "here column t is token t.": between(PROMPT_LENGTHS - 1, LENGTHS - 1),
            "the mask is inside out: 1 is for the response.": 1 - MASK,
        },
    )


def test_labels():
    tokens = TOKENS.clone()
    got = labels(tokens, MASK)
    if not torch.equal(tokens, TOKENS):
        fail(
            "labels",
            "your function has written into `tokens`, or into a view of it: the model would read "
            "-100. Make a new tensor (clone, masked_fill or where).",
        )
    expected = [
        [x if m else -100 for x, m in zip(row, mask)]
        for row, mask in zip(TOKENS.tolist(), MASK.tolist())
    ]
    expected = torch.tensor(expected)
    check(
        "labels",
        got,
        expected,
        {
            "the end token is left out, because you compared with its value. "
            "Use the mask.": expected.masked_fill(TOKENS == 0, -100),
            "outside the response you have 0, which is a real token: cross_entropy would train "
            "on it. Use -100.": TOKENS * MASK.long(),
            "the mask is used the wrong way round: -100 goes where mask is 0.": TOKENS.masked_fill(
                MASK > 0, -100
            ),
            "the labels are shifted. Transformers' models shift labels themselves; column t is "
            "token t here.": torch.nn.functional.pad(expected[:, 1:], (0, 1), value=-100),
        },
    )
    if got.dtype != torch.long:
        fail(
            "labels",
            f"labels are token ids: they must stay whole numbers (torch.long), not {got.dtype}.",
        )
