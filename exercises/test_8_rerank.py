"""Exercise 8, checked by drawing every subset."""

from itertools import combinations

import torch
from ex8_rerank import best_of_n, pass_at_k
from hints import check


def test_pass_at_k():
    for n, c, k in ((5, 2, 3), (4, 1, 2), (6, 0, 2), (6, 5, 2), (10, 3, 3), (3, 3, 1)):
        subsets = list(combinations([1] * c + [0] * (n - c), k))
        expected = sum(any(drawn) for drawn in subsets) / len(subsets)
        mistakes = {
            "this is 1 - (1 - c/n)^k, drawing *with* putting back: it is too low.": 1
            - (1 - c / n) ** k,
            "this is pass@1, c/n, whatever k is.": c / n,
            "this is the chance that all are wrong: take 1 minus it.": 1 - expected,
            "this is k c/n, the expected *number* of correct ones.": k * c / n,
            "this is whether any of the n is correct; only k of them are drawn.": float(c > 0),
            "this is the chance that *all* k are correct.": sum(all(drawn) for drawn in subsets)
            / len(subsets),
        }
        telling = {hint: value for hint, value in mistakes.items() if abs(value - expected) > 1e-3}
        check(f"pass_at_k(n={n}, c={c}, k={k})", pass_at_k(n, c, k), expected, telling)


def test_best_of_n():
    torch.manual_seed(0)
    correct = torch.tensor(
        [[1.0, 0, 0, 1, 0], [0.0, 1, 0, 0, 0], [1.0, 1, 0, 1, 0], [0.0, 0, 0, 0, 0]]
    )
    scores = torch.tensor(
        [
            [0.2, 0.9, 0.1, 0.5, -0.3],
            [2.0, 1.0, 0.5, 0.1, 3.0],
            [0.1, 0.2, 0.3, 0.4, 0.5],
            [1.0, 2.0, 3.0, 4.0, 5.0],
        ]
    )

    def over_subsets(n, win):
        chosen = [list(subset) for subset in combinations(range(5), n)]
        return torch.stack(
            [sum(win(c[s], f[s]) for s in chosen) / len(chosen) for c, f in zip(correct, scores)]
        )

    for n in (2, 3):
        expected = over_subsets(n, lambda c, f: c[f.argmax()])
        check(
            f"best_of_n with n={n}",
            best_of_n(correct, scores, n),
            expected,
            {
                "you took the candidate with the *lowest* score: sort in "
                "descending order.": over_subsets(n, lambda c, f: c[f.argmin()]),
                "this is the oracle, pass@n: whether a correct one is among the n. The score has "
                "to find it.": over_subsets(n, lambda c, f: c.max()),
                "this is the mean over all candidates, n = 1: the score "
                "decides nothing.": correct.mean(1),
                "you chose among all N candidates, whatever n is.": correct.gather(
                    1, scores.argmax(1, True)
                ).squeeze(1),
                "you chose among the first n candidates only. Average over all subsets of "
                "n.": correct[:, :n].gather(1, scores[:, :n].argmax(1, True)).squeeze(1),
                "this is success@n, whether one of the n best scores of all "
                "N is correct.": correct.gather(1, scores.argsort(1, True)[:, :n]).max(1).values,
                "`correct` is not sorted along with the scores: gather it by the scores' "
                "order.": torch.stack(
                    [
                        torch.stack([c[i] for i in range(5)]) @ torch.tensor(share(n))
                        for c in correct
                    ]
                ),
            },
        )


def share(n) -> list:
    """How often each place of a sorted list of five wins, over all n-subsets."""
    subsets = list(combinations(range(5), n))
    return [sum(min(s) == i for s in subsets) / len(subsets) for i in range(5)]
