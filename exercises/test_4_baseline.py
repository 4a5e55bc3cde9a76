"""Exercise 4, checked by a loop over rows and columns."""

import torch
from ex4_baseline import group_baseline
from hints import check, fail

RETURNS = torch.tensor(
    [
        # three samples of one question
        [1.0, 4.0, 5.0],
        [3.0, 8.0, 0.0],
        [8.0, 0.0, 0.0],
        # three of another one
        [2.0, 6.0, 7.0],
        [4.0, 3.0, 9.0],
        [9.0, 1.0, 0.0],
    ]
)
MASK = torch.tensor([[1.0, 1, 1], [1.0, 1, 0], [1.0, 0, 0], [1.0, 1, 1], [1.0, 1, 1], [1.0, 1, 0]])


def by_loops(rows_of, itself=False, dead=False, alone=0.0) -> torch.Tensor:
    """Mean of the returns at t over rows_of(i), with the row itself or not, with rows that have
    ended or not; for a row alone at t `alone`, by None its own return."""
    baseline = torch.zeros_like(RETURNS)
    for i in range(6):
        for t in range(3):
            others = [j for j in rows_of(i) if (itself or j != i) and (dead or MASK[j, t])]
            values = [float(RETURNS[j, t]) for j in others]
            own = float(RETURNS[i, t]) if alone is None else alone
            baseline[i, t] = (sum(values) / len(values) if values else own) * MASK[i, t]
    return baseline


def same_question(i):
    return range(i // 3 * 3, i // 3 * 3 + 3)


def test_group_baseline():
    expected = by_loops(same_question)
    last_alive = RETURNS.gather(1, MASK.sum(1, keepdim=True).long() - 1)  # [B, 1]
    last = (
        torch.stack([sum(last_alive[j] for j in same_question(i) if j != i) / 2 for i in range(6)])
        * MASK
    )
    per_row = (RETURNS * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True) * MASK
    returns, mask = RETURNS.clone(), MASK.clone()
    got = group_baseline(returns, mask, 3)
    if not (torch.equal(returns, RETURNS) and torch.equal(mask, MASK)):
        fail("group_baseline", "your function has written into its inputs. Make new tensors.")
    check(
        "group_baseline",
        got,
        expected,
        {
            "the row itself is in its own mean. Then its advantage is too small by (n-1)/n: "
            "leave it out.": by_loops(same_question, itself=True),
            "rows that have ended by t count as zeros. Divide by the number of others that are "
            "still writing at t.": by_loops(same_question, dead=True),
            "rows that have ended count as zeros, and the row itself is in its own mean.": by_loops(
                same_question, itself=True, dead=True
            ),
            "a row that is alone at t (row 0, column 2) gets its own return, which depends on "
            "its own token: its advantage is 0 whatever it did, and that gradient is lost. Its "
            "baseline is 0.": by_loops(same_question, alone=None),
            "a row that is alone at t (row 0, column 2): 0/0 is nan. Its baseline is 0.": by_loops(
                same_question, alone=float("nan")
            ),
            "the groups are mixed up: the samples of a question are next to each other, "
            "view(-1, group, T).": by_loops(lambda i: range(i % 2, 6, 2)),
            "the mean is over all questions. Hard questions would look like bad answers: stay "
            "within the group.": by_loops(lambda i: range(6)),
            "the mean is along a trace (dim 1), not over the samples of a question.": per_row,
            "one value per trace, from its last token, for all its tokens. The return at t has "
            "a longer future, so this is a bias that depends on how much of the trace is left. "
            "Compare column by column.": last,
            "these are advantages. Return the baseline itself.": (RETURNS - expected) * MASK,
        },
    )
