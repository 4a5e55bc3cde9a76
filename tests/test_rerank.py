"""rerank.py, equation by equation: numbers worked out by hand, or the same thing counted the
slow way."""

import copy
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import policy
import rerank
import reward
from candidates import (
    Candidates,
    collect,
    from_texts,
    natural_errors,
    reward_ends,
    signals,
    without_cut_off,
)
from data import Batch, Example
from engine import loading
from engine.errors import UserError
from show.tables import show_traces
from show.trace import token_scores
from tasks.answers import same_answer

T = torch.tensor
INF = math.inf

# --------------------------------------------------------------------------------------------------
# 1. One score per trace
# --------------------------------------------------------------------------------------------------

REWARDS = T([[9.0, 1.0, -2.0, 4.0], [9.0, 3.0, 9.0, 9.0]])  # the 9s are read nowhere
ENDS = T([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("mean", [1.0, 3.0]),
        ("last", [4.0, 3.0]),
        ("lowest", [-2.0, 3.0]),
    ],
)
def test_trace_scores_by_hand(rule, expected):
    assert rerank.trace_scores(REWARDS, ENDS, rule).tolist() == expected


@pytest.mark.parametrize("rule", rerank.RULES)
def test_a_trace_without_scores_is_minus_infinity(rule):
    rewards = T([[math.nan, 5.0], [1.0, math.nan]])
    assert rerank.trace_scores(rewards, T([[0.0, 0.0], [1.0, 0.0]]), rule).tolist() == [-INF, 1.0]


# --------------------------------------------------------------------------------------------------
# 1. Choosing
# --------------------------------------------------------------------------------------------------


def best_by_enumeration(correct, scores, n):
    """The mean over all n-subsets, a tie going to each of its items in turn."""
    values = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        tied = [correct[i] for i in subset if scores[i] == top]
        values.append(sum(tied) / len(tied))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "scores",
    [
        [0.3, 0.9, 0.1, 0.5, 0.7, 0.2],
        [0.3, 0.9, 0.9, 0.1, 0.3, 0.3],  # ties
        [0.3, -INF, 0.9, -INF, 0.3, -INF],
        [1.0] * 6,
    ],
)
def test_best_of_n_is_the_mean_over_all_subsets(scores):
    correct = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    for n in range(1, 7):
        found = rerank.best_of_n(T([correct]), T([scores]), n).item()
        assert found == pytest.approx(best_by_enumeration(correct, scores, n), abs=1e-6), n


def test_best_of_n_ends():
    """One candidate is a random one; all N have one winner; there is no n = 0 and no n > N."""
    correct, scores = T([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), T([[0.2, 0.9, 0.1], [0.2, 0.9, 0.1]])
    assert rerank.best_of_n(correct, scores, 1).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert rerank.best_of_n(correct, scores, 3).tolist() == [0.0, 1.0]
    for n in (0, 4):
        with pytest.raises((ValueError, ZeroDivisionError)):
            rerank.best_of_n(correct, scores, n)


def keys(*answers) -> list[int]:
    return rerank.answer_keys([list(answers)], [()])[0].tolist()


def test_keys_of_numbers():
    found = keys("1,200", "1200", "$1200.00", "1200.", "1200 pens", "1201", None, "0", "0.0")
    assert (
        found[:5] == [0] * 5
        and found[5] not in (0, -1)
        and found[6] == -1
        and found[7] == found[8] not in found[:7]
    )


def test_keys_of_words():
    """Nobody answers with a bare number, so the 12 in a name is no number: B12 is not 12 grams."""
    found = keys("Vitamin B12", "the vitamin B12.", "12 grams of salt", " ")
    assert found[0] == found[1] != found[2] and found[3] == -1


@pytest.mark.parametrize(
    "a, b",
    [
        ("1,200", "1200"),
        ("3/4", "0.75"),
        ("-5", "5"),
        ("The heart.", "heart"),
        ("7 pens", "7"),
        ("10%", "10"),
        ("lung", "heart"),
        ("7", "seven"),
        ("+5 dB", "-5 dB"),
        ("< 5", "5"),
        ("< 5", "> 5"),
        ("A", "the"),
        ("A", "a."),
    ],
)
def test_keys_agree_with_same_answer(a, b):
    one, other = keys(a, b)
    assert (one == other) == (same_answer(a, b) or same_answer(b, a))


def test_votes_count_a_letter_and_its_text_as_one():
    options = ("Mitral valve", "Aortic valve")
    found = rerank.answer_keys([["B", "aortic valve", "(b)", "A", None, "lung"]], [options])[
        0
    ].tolist()
    assert (
        found[0] == found[1] == found[2]
        and found[4] == -1
        and len({found[0], found[3], -1, found[5]}) == 4
    )
    example = data.Example("Which?", "", "B", options)
    texts = [data.response_text("", answer) for answer in ("B", "Aortic valve", "A")]
    candidates = Candidates([example], data.make_batch([[1]] * 3, [[1]] * 3), texts, 3)
    assert rerank.answer_keys(candidates.answers, [options]).tolist() == [[0, 0, 2]]
    assert candidates.correct.tolist() == [[1, 1, 0]]


def majority(correct, answers, weights=None):
    """Of all candidates together."""
    weights = None if weights is None else T([weights])
    return rerank.majority_vote(T([correct]), T([keys(*answers)]), len(answers), weights).item()


def test_vote_by_hand():
    assert majority([1.0, 1.0, 0.0], ["7", "7.0", "8"]) == 1.0  # 2 : 1
    assert majority([0.0, 0.0, 1.0], ["8", "8", "7"]) == 0.0
    assert majority([1.0, 0.0], ["7", "8"]) == 0.5  # a tie of two answers
    # two answers tie at three votes each, a third has one: half, not 3 of 6 rows by luck
    assert majority([1.0, 1.0, 0.0, 0.0, 0.0], ["7", "7", "8", "8", "9"]) == 0.5


def test_no_answer_wins_only_alone():
    assert majority([0.0, 0.0, 1.0], [None, None, "7"]) == 1.0
    assert majority([0.0, 0.0], [None, None]) == 0.0


def test_weighted_vote_by_hand():
    """0.6 for one 7 against 0.5 for two 8s; at equal weight (0.5 : 0.5) each answer gets half,
    not each row. An answer's weight is the sum over all who give it: 0.1 + 0.5 is less than 0.35
    + 0.3."""
    assert majority([1.0, 0.0, 0.0], ["7", "8", "8"], [0.6, 0.25, 0.25]) == 1.0
    assert majority([1.0, 0.0, 0.0], ["7", "8", "8"], [0.5, 0.25, 0.25]) == 0.5
    assert majority([1.0, 1.0, 0.0, 0.0], ["7", "7", "8", "8"], [0.1, 0.5, 0.35, 0.3]) == 0.0


def test_majority_enumerates_small_cases():
    """Of the 6 pairs of 7 7 8 9: one is 7 7 (right), four tie between 7 and another (half), 8 9
    is wrong."""
    found, correct = T([keys("7", "7", "8", "9")]), T([[1.0, 1.0, 0.0, 0.0]])
    assert rerank.majority_vote(correct, found, 2).item() == pytest.approx((1 + 4 * 0.5) / 6)
    assert rerank.majority_vote(correct, found, 1).item() == 0.5  # one candidate: a random one
    assert rerank.majority_vote(correct, found, 4).item() == 1.0


def test_majority_sampling_comes_near_the_enumeration_and_is_seeded():
    keys, correct = (
        torch.randint(4, (8, 12), generator=torch.Generator().manual_seed(0)),
        torch.zeros(8, 12),
    )
    correct[keys == 0] = 1.0
    exact = rerank.majority_vote(correct, keys, 5, draws=10**6)  # 792 subsets
    many = rerank.majority_vote(correct, keys, 5, draws=700, seed=1)
    assert (exact - many).abs().max() < 0.06
    assert torch.equal(many, rerank.majority_vote(correct, keys, 5, draws=700, seed=1))
    assert not torch.equal(many, rerank.majority_vote(correct, keys, 5, draws=700, seed=2))


def test_random_subsets_have_no_repeats():
    """Of 16 different answers one is right. Among 8 of them it wins with chance 1/8, if it is
    there: one that was drawn twice would win alone."""
    correct, found = torch.zeros(3, 16), torch.arange(16).expand(3, 16)
    correct[:, 5] = 1.0
    values = torch.stack(
        [rerank.majority_vote(correct, found, 8, draws=1, seed=seed) for seed in range(20)]
    )
    assert set(values.flatten().tolist()) == {0.0, 0.125}
    assert (values[:, 0] != values[:, 1]).any()  # each question has subsets of its own


def test_vote_weights_by_hand():
    """Scores 1 and 3 standardise to -1 and 1: at temperature 1/4 the odds are e^8, in any unit."""
    for unit in (1.0, 100.0):
        first, second = rerank.vote_weights(T([[1.0, 3.0]]) * unit)[0]
        assert (second / first).item() == pytest.approx(math.exp(8), rel=1e-4)
    assert rerank.vote_weights(T([[-INF, -INF], [-INF, 2.0]])).tolist() == [[0.5, 0.5], [0.0, 1.0]]


# --------------------------------------------------------------------------------------------------
# 2. How good is a score
# --------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 1), (6, 1, 6), (6, 3, 4)]:
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert rerank.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets)), (
            n,
            c,
            k,
        )


def test_auroc_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (40,), generator=generator).float()  # many ties
    correct = (torch.rand(40, generator=generator) < 0.4).float()
    right, wrong = scores[correct == 1].tolist(), scores[correct == 0].tolist()
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    assert rerank.auroc(scores, correct) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)


def test_auroc_ends():
    assert rerank.auroc(T([1.0, 2.0]), T([0, 1])) == 1.0
    assert rerank.auroc(T([2.0, 1.0]), T([0, 1])) == 0.0
    assert rerank.auroc(T([5.0, 5.0, 5.0]), T([0, 1, 0])) == 0.5
    assert rerank.auroc(T([-INF, 1.0]), T([0, 1])) == 1.0
    assert rerank.auroc(T([1.0, 2.0]), T([1, 1])) is rerank.auroc(T([1.0, 2.0]), T([0, 0])) is None


def test_bootstrap():
    """The interval of a mean of 400 coin tosses is near 1.96 standard errors either side, and is
    seeded."""
    values = T([0.0, 1.0] * 200)
    mean, low, high = rerank.bootstrap(values, draws=4000)
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.006)
    one, again, other = (rerank.bootstrap(values, seed=seed) for seed in (3, 3, 4))
    assert one == again != other


# --------------------------------------------------------------------------------------------------
# 3. Where a trace first goes wrong
# --------------------------------------------------------------------------------------------------


def test_predicted_place_by_hand():
    values = T([[9.0, 5.0, 1.0, 3.0, 0.5], [9.0, 2.0, 2.0, 3.0, 0.0]])
    ends = T([[0.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0]])
    assert rerank.predicted_place(values, ends, "lowest").tolist() == [
        4,
        1,
    ]  # row 1: the first of equals
    assert rerank.predicted_place(values, ends, "drop").tolist() == [2, 2]  # falls: 4 at 2; 0 at 2


def test_drop_skips_what_was_not_read():
    """Scores 5, 4, 1 in columns 1, 3, 5: the fall of 3 ends in column 5. A lone score is its own
    place."""
    values = T([[0.0, 5.0, -9.0, 4.0, -9.0, 1.0], [0.0, 0.0, 0.0, -1.0, 0.0, 0.0]])
    ends = T([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    assert rerank.predicted_place(values, ends, "drop").tolist() == [5, 3]


# Prompt 7 7, response 1 9 2 9 3 in columns 2..6, then padding.
BATCH = Batch(T([[7, 7, 1, 9, 2, 9, 3, 9]]), T([2]), T([7]))


def place_results(batch, truth, values: dict, questions=None, **options) -> dict:
    """Of values that were read on every response token."""
    readings = {name: (value, batch.response_mask) for name, value in values.items()}
    if questions is None:
        questions = torch.zeros_like(truth)
    return rerank.place_results(batch, truth, questions, readings, **options)


def hits_of(results: dict) -> dict[str, list[float]]:
    return {name: [results[hit][name][0] for hit in ("hit0", "hit1")] for name in results["hit0"]}


def test_hits_and_exact_chance():
    """Within 1 of column 2 are 2 of the response's 5 tokens (column 1 is prompt), of column 4
    are 3."""

    def of(truth: int, place: int, name: str) -> list[float]:
        values = {"logprob": -torch.nn.functional.one_hot(T([place]), 8).float()}
        return hits_of(place_results(BATCH, T([truth]), values))[name]

    for truth, expected in [(2, [1 / 5, 2 / 5]), (4, [1 / 5, 3 / 5]), (6, [1 / 5, 2 / 5])]:
        assert of(truth, 2, "chance") == pytest.approx(expected)
    hits = {2: [0, 0], 3: [0, 1], 4: [1, 1], 5: [0, 1], 6: [0, 0]}
    assert {place: of(4, place, "logprob") for place in hits} == hits


def test_a_score_per_trace_points_nowhere():
    values = torch.zeros(BATCH.tokens.shape)
    last = torch.zeros_like(BATCH.response_mask)
    last[0, 6] = 1
    readings = {"reward": (values, last), "logprob": (values, BATCH.response_mask)}
    results = rerank.place_results(BATCH, T([6]), T([0]), readings)
    assert set(results["hit0"]) == {"logprob", "logprob_drop", "logprob_first", "chance"}


def test_place_results_by_hand():
    """Column 4 is the truth. The reward is lowest there, its largest drop is at 3; the
    log-probability is lowest at 5."""
    values = {
        "reward": T([[0.0, 0.0, 2.0, 0.0, -1.0, 0.0, 0.0, -9.0]]),
        "logprob": T([[-9.0, 0.0, -1.0, -1.0, -1.0, -2.0, -1.0, 0.0]]),
    }
    results = place_results(BATCH, T([4]), values)
    hits = hits_of(results)
    assert results["count"] == 1
    assert hits["reward"] == [1, 1]
    assert hits["reward_drop"] == [0, 1]
    assert hits["reward_first"] == [1, 1]  # -1 is not below -1, so it is the lowest
    assert hits["logprob"] == [0, 1]
    assert hits["chance"] == pytest.approx([1 / 5, 3 / 5])
    values["logprob"][0, 3] = -1.5
    hits = hits_of(place_results(BATCH, T([4]), values, likelihood=False))
    assert hits["logprob_first"] == [0, 1]  # at 3, before the lowest at 5
    assert "reward_first" not in hits  # a head's f is no log-probability


def test_questions_not_traces_are_bootstrapped():
    """Three traces of question 0 are hits, one of question 1 is none: 1/2 over questions, not
    3/4."""
    batch = BATCH[[0, 0, 0, 0]]
    values = {"logprob": torch.zeros(4, 7)}
    values["logprob"][:, 4] = -1.0
    questions = T([0, 0, 0, 1])
    for truth, count in ([4, 4, 4, 2], 4), ([4, -1, -1, 2], 2):  # -1: a trace without an error
        results = place_results(batch, T(truth), values, questions)
        assert results["hit0"]["logprob"][0] == 0.5 and results["count"] == count
    assert place_results(batch, T([-1] * 4), values) == {"count": 0}


# --------------------------------------------------------------------------------------------------
# 4. Candidates and results on the shipped base
# --------------------------------------------------------------------------------------------------


def make_discriminator(model, tokenizer, granularity="dense"):
    return reward.make_discriminator(
        reward.LikelihoodReward(model), tokenizer, granularity=granularity
    )


def written(tokenizer, traces: list[tuple[str, str]], expert=("3*12=36\n14+36=50", "50")):
    """Candidates for one question, from (trace, answer) pairs."""
    example = Example(
        "Ava has 14 pens. Ava buys 3 bags of 12. How many pens?", *expert, task="words"
    )
    texts = [data.response_text(*pair) for pair in traces]
    return from_texts(tokenizer, [example], texts, len(texts))


RIGHT, WRONG, LATE = (
    ("12*3=36\n36+14=50", "50"),
    ("3+12=15\n14+15=29", "29"),
    ("3*12=36\n14+36=40", "40"),
)


def test_candidates_know_what_is_right(shipped):
    candidates = written(shipped[1], [RIGHT, WRONG, LATE, RIGHT])
    assert candidates.correct.tolist() == [[1, 0, 0, 1]]
    assert candidates.answers == [["50", "29", "40", "50"]]
    assert rerank.answer_keys(candidates.answers, [()]).tolist() == [[0, 1, 2, 0]]
    examples = [Example("1+1?", "", "2"), Example("1+2?", "", "3")]  # two rows each
    candidates = from_texts(shipped[1], examples, ["3", "2", "3", "2"], 2)
    assert candidates.correct.tolist() == [[0, 1], [1, 0]]


def test_collect_keeps_n_rows_a_question(shipped):
    examples = data.load_examples("words", "test", 2)
    generator = torch.Generator().manual_seed(0)
    candidates = collect(*shipped, examples, 3, 64, 1.0, generator)
    assert len(candidates.batch) == len(candidates.texts) == 6 and candidates.correct.shape == (
        2,
        3,
    )
    for row in range(6):
        prompt = data.prompt_ids(shipped[1], examples[row // 3].question)
        assert candidates.batch.tokens[row, : len(prompt)].tolist() == prompt
        assert data.decode(shipped[1], candidates.batch.response(row)) == candidates.texts[row]


def test_signals_are_those_of_a_plain_forward_pass(shipped):
    """Row by row, without padding: log softmax of the logits one column earlier; f of a step is
    their sum."""
    model, tokenizer = shipped
    candidates = written(tokenizer, [RIGHT, WRONG, ("3*12=36", "36")])
    discriminator = make_discriminator(model, tokenizer, "interval")
    readings = signals(candidates.batch, discriminator, model, {"sft_logprob": model})
    found, ends = {name: values for name, (values, _) in readings.items()}, readings["reward"][1]
    assert torch.equal(ends, reward_ends(candidates.batch, discriminator))
    assert torch.equal(readings["logprob"][1], candidates.batch.response_mask)
    for row in range(3):
        length, first = (
            int(candidates.batch.lengths[row]),
            int(candidates.batch.prompt_lengths[row]),
        )
        tokens = candidates.batch.tokens[row, :length]
        with torch.no_grad():
            logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)  # [T-1, V]
        chosen = torch.cat([T([0.0]), logprobs[torch.arange(length - 1), tokens[1:]]])
        chosen[:first] = 0.0
        torch.testing.assert_close(found["logprob"][row, :length], chosen, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["sft_logprob"], found["logprob"])
        # <think>\n is a step, each line is one, </think>\n is one, and the rest is the last
        assert ends[row].sum() == candidates.texts[row].count("\n") + 1
        assert found["reward"][row].sum().item() == pytest.approx(chosen.sum().item(), abs=1e-3)
        assert (found["reward"][row][ends[row] == 0] == 0).all()
    short = int(candidates.batch.lengths.argmin())  # is padded, and padding says nothing
    padding = found["logprob"][short, int(candidates.batch.lengths[short]) :]
    assert len(padding) > 0 and (padding == 0).all()


def test_a_head_is_read_at_segment_ends_not_summed(shipped):
    model, tokenizer = shipped
    head = reward.load_reward("head", loading.BASE)
    torch.nn.init.normal_(head.model.score.weight)
    candidates = written(tokenizer, [RIGHT, WRONG])
    discriminator = make_discriminator(model, tokenizer, "interval")
    discriminator.reward_model = head
    found = signals(candidates.batch, discriminator, model)
    with torch.no_grad():
        expected = head.scores(candidates.batch) * reward_ends(candidates.batch, discriminator)
    torch.testing.assert_close(found["reward"][0], expected)
    assert found["reward"][0].abs().max() > 0 and "sft_logprob" not in found


def test_natural_errors_point_at_the_first_wrong_token(shipped):
    """WRONG errs at its '+', the second token after <think>\\n; LATE at the 4 of 40. A right
    answer has none, whatever stands before it."""
    tokenizer = shipped[1]
    candidates = written(tokenizer, [RIGHT, WRONG, LATE, ("3+12=15\n14+36=50", "50")])
    places = natural_errors(candidates, tokenizer, data.end_tokens(tokenizer))
    prompt = int(candidates.batch.prompt_lengths[0])
    assert places[0] == places[3] == -1 and places[1] == prompt + 2
    tokens = [tokenizer.decode([t]) for t in candidates.batch.tokens[2, prompt : places[2] + 1]]
    assert tokens[-2:] == ["=", "4"] and "".join(tokens[:-1]).endswith("14+36=")


def test_a_cut_trace_without_an_error_has_no_place(shipped):
    tokenizer = shipped[1]
    example = written(tokenizer, [RIGHT]).examples[0]
    ids = data.response_ids(tokenizer, "<think>\n3*12=36\n")
    for response, has_error in [
        (ids, True),
        (ids[:-1], False),
    ]:  # with it, it has stopped too early
        batch = data.make_batch([[1]], [response])
        candidates = Candidates([example], batch, ["<think>\n3*12=36\n"], 1)
        assert (
            natural_errors(candidates, tokenizer, data.end_tokens(tokenizer)) >= 0
        ).tolist() == [has_error]


def test_rerank_results_by_hand(shipped):
    """4 candidates, 2 right. The reward puts the right ones on top, the log-probability at the
    bottom."""
    candidates = written(shipped[1], [RIGHT, WRONG, WRONG, RIGHT])
    mask = candidates.batch.response_mask
    order = T([[4.0], [1.0], [2.0], [3.0]])
    found = rerank.rerank_results(
        candidates, {"reward": (mask * order, mask), "logprob": (mask * -order, mask)}
    )
    mean = {n: {name: value[0] for name, value in found[n].items()} for n in ("1", "2", "4")}
    names = {
        "random",
        "longest",
        "shortest",
        "majority",
        "logprob",
        "reward",
        "weighted_majority",
        "oracle",
    }
    assert set(mean["4"]) == names | {"reward_last", "reward_lowest"}
    assert set(mean["1"].values()) == {0.5}
    assert mean["2"]["reward"] == mean["2"]["oracle"] == pytest.approx(5 / 6)
    assert mean["2"]["logprob"] == pytest.approx(1 / 6)
    assert (
        mean["4"]["majority"] == 0.5
        and mean["4"]["weighted_majority"] == mean["4"]["reward"] == 1.0
    )
    assert {
        name: gain[0]
        for name, gain in found["beyond"].items()
        if name in ("majority", "reward", "logprob")
    } == {"majority": 0.0, "reward": 0.5, "logprob": -0.5}
    assert found["auroc"]["reward"] == 1.0 and found["auroc"]["logprob"] == 0.0
    json.dumps(found, allow_nan=False)


def test_longest_and_shortest_count_response_tokens(shipped):
    """The right trace is longer than the wrong one; two equally long ones are drawn from."""
    candidates = written(shipped[1], [RIGHT, ("3*12=36", "36")])
    assert candidates.batch.response_mask[0].sum() > candidates.batch.response_mask[1].sum()
    found = rerank.rerank_results(candidates, {})
    assert (found["2"]["longest"][0], found["2"]["shortest"][0], found["1"]["longest"][0]) == (
        1.0,
        0.0,
        0.5,
    )
    assert found["auroc"] == {"longest": 1.0, "shortest": 0.0}
    even = written(shipped[1], [RIGHT, ("3*12=36\n14+36=50", "51")])
    assert rerank.rerank_results(even, {})["2"]["longest"][0] == 0.5


def test_a_judge_is_the_averaged_model_before_its_logits_are_divided(run, shipped):
    """Fair SFT's saved policy, here the base at temperature 0.2, judges as the base."""
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    policy.divide_logits(model, 0.2)
    model.save_pretrained(run / "sft_fair")
    tokenizer.save_pretrained(run / "sft_fair")
    policy_model, _, discriminator, judges, _ = rerank.models_of_run(run, "base", "cpu")
    assert set(judges) == {"sft_fair_logprob"}
    found = signals(written(tokenizer, [RIGHT, WRONG]).batch, discriminator, policy_model, judges)
    torch.testing.assert_close(
        found["sft_fair_logprob"][0], found["logprob"][0], atol=1e-4, rtol=1e-4
    )


def test_auroc_within_does_not_see_which_question_is_easy():
    """A score that knows hard questions from easy ones and nothing else; one that only ranks
    each question's candidates."""
    correct = T([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    easy, ranks = T([[2.0] * 4, [1.0] * 4, [0.0] * 4]), correct + T([[0.0], [5.0], [9.0]])
    assert (
        rerank.auroc(easy.flatten(), correct.flatten())
        > 0.8
        > 0.5
        > rerank.auroc(ranks.flatten(), correct.flatten())
    )
    assert rerank.auroc_within(easy, correct) == [0.5, 0.5, 0.5] and rerank.auroc_within(
        ranks, correct
    ) == [1.0, 1.0, 1.0]
    assert (
        rerank.auroc_within(-ranks[:2], correct[:2])[0] == 0.0
        and rerank.auroc_within(easy[2:], correct[2:]) is None
    )


# --------------------------------------------------------------------------------------------------
# Traces that were cut off
# --------------------------------------------------------------------------------------------------


def head_that_likes_the_cut_one(shipped, granularity: str):
    """A finished right candidate, and one that was cut off, whose last token the head likes
    best: (candidates, readings)."""
    base, tokenizer = shipped
    example = data.load_examples("words", "test", 1)[0]
    right = data.response_ids(tokenizer, data.response_text(example.trace, example.answer))
    responses = [right, right[:5]]
    prompt = data.prompt_ids(tokenizer, example.question)
    texts = [data.decode(tokenizer, ids) for ids in responses]
    candidates = Candidates(
        [example], data.make_batch([prompt] * 2, responses), texts, 2, finished=T([True, False])
    )
    head = reward.load_reward("head", loading.BASE)
    hidden = head.states(candidates.batch).detach()
    last = candidates.batch.lengths - 1
    head.model.score.weight.data = (hidden[1, last[1]] - hidden[0, last[0]])[None]
    discriminator = reward.make_discriminator(head, tokenizer, "gail", granularity)
    return candidates, signals(candidates.batch, discriminator, base), discriminator


@pytest.mark.parametrize("granularity", ["sparse", "interval"])
def test_a_candidate_that_was_cut_off_ranks_below_every_finished_one(shipped, granularity):
    """A score per trace, or per step, is learnt at its end, and this one has none."""
    candidates, readings, discriminator = head_that_likes_the_cut_one(shipped, granularity)
    scores = rerank.trace_scores(*readings["reward"], "last")
    assert scores[1] > scores[0]
    results = rerank.rerank_results(candidates, readings)
    for way in (
        "reward",
        "weighted_majority",
        *(name for name in results["2"] if name.startswith("reward_")),
    ):
        assert results["2"][way][0] == 1.0, way
    assert results["auroc"]["reward"] == 1.0
    assessed = rerank.assess(candidates, discriminator, shipped[0], {}, shipped[1])
    assert [len(assessed["distributions"][kind]) for kind in ("right", "wrong")] == [1, 0]
    json.loads(json.dumps(assessed, allow_nan=False))
    without = rerank.rerank_results(replace(candidates, finished=None), readings)
    assert without["2"]["reward_last"][0] == 0.0  # what would be chosen if nobody knew


def test_a_score_per_token_of_a_candidate_that_was_cut_off_stays(shipped):
    candidates, readings, _ = head_that_likes_the_cut_one(shipped, "dense")
    assert without_cut_off(readings["reward"], candidates) is readings["reward"]


def test_where_all_were_cut_off_each_is_as_good_as_the_other(shipped):
    candidates, readings, _ = head_that_likes_the_cut_one(shipped, "sparse")
    nobody = replace(candidates, finished=T([False, False]))
    assert rerank.rerank_results(nobody, readings)["2"]["reward"][0] == 0.5


@pytest.mark.parametrize(
    "text, ended",
    [
        ("<think>\n1+1=2\n</think>\n<answer>2</answer>", True),
        ("<think>\n1+1=2\n</think>\n<answer>2", False),
        ("<think>\n1+1=", False),
        ("1+1=2, so 2", True),
        ("", True),
        ("<answer>1</answer> no: <answer>2", False),
        ("<think>\n1+1=<|end|>", True),
    ],
)
def test_a_text_that_leaves_a_tag_open_gets_no_end_token(shipped, text, ended):
    """Nobody wrote one: neither a score per trace nor a likelihood may read it."""
    tokenizer = shipped[1]
    text = text.replace("<|end|>", tokenizer.eos_token)
    candidates = from_texts(tokenizer, [Example("1+1?", "", "2")], [text], 1)
    assert candidates.finished.tolist() == [ended]
    response = candidates.batch.response(0)
    assert (response[-1:] == [tokenizer.eos_token_id]) == ended
    assert tokenizer.eos_token_id not in response[:-1]


def test_a_gain_over_random_is_paired_by_question():
    """Of the easy questions' samples 3 of 4 are right, of the hard ones' 1. The score lifts 3/4
    to 1 and 1/4 to 1/2: by 1/4 everywhere, so that the gain has no spread, though both
    accuracies have."""
    correct = T([[1.0, 1.0, 0.0, 1.0]] * 5 + [[0.0, 0.0, 0.0, 1.0]] * 5)
    score = T([[1.0, 1.0, 0.0, 1.0]] * 5 + [[0.0, 0.0, 1.0, 1.0]] * 5)
    found = rerank.choice_results(
        correct, torch.zeros(10, 4, dtype=torch.long), {"score": score}, {}
    )
    assert found["4"]["random"][2] > found["4"]["score"][1]  # side by side the intervals overlap
    assert found["beyond"]["score"] == [0.25, 0.25, 0.25] and "random" not in found["beyond"]


def test_assess_finds_a_known_reward(shipped):
    """With the base as reward and as policy, reward and logprob are the same number under two
    names."""
    model, tokenizer = shipped
    examples = data.load_examples("words", "test", 4)
    candidates = collect(model, tokenizer, examples, 4, 64, 1.0, torch.Generator().manual_seed(0))
    discriminator = make_discriminator(model, tokenizer)
    judges = dict.fromkeys(rerank.JUDGES, model)
    found = rerank.assess(candidates, discriminator, model, judges, tokenizer)
    best = found["rerank"]["4"]
    assert best["reward"] == best["logprob"] == best["sft_logprob"] == best["sft_fair_logprob"]
    for kind in ("natural", "single"):
        assert (
            found["localise"][kind]["hit0"]["reward"] == found["localise"][kind]["hit0"]["logprob"]
        )
        assert found["localise"][kind]["hit0"]["chance"][0] < 0.1
    assert len(found["distributions"]["right"]) == candidates.correct.sum()
    assert sum(map(len, found["distributions"].values())) == 16
    json.dumps(found, allow_nan=False)
    traces = show_traces(candidates, discriminator, model, tokenizer)
    assert all(
        abs(r) < 1e-4 for trace in traces for r in trace["rewards"]
    )  # f = log pi: D is 1/2 everywhere
    assert all((trace["first_wrong"] is None) == trace["correct"] for trace in traces)
    assert all("".join(trace["tokens"]).startswith("<think>\n") for trace in traces)
    for trace in traces:  # the first token whose f is below -1, if there is one
        text = "".join(trace["tokens"][:-1])  # without the end token, which is no text
        f = [
            f
            for _, f in token_scores(discriminator.reward_model, tokenizer, trace["question"], text)
        ]
        assert trace["predicted"] == next((i for i, value in enumerate(f) if value < -1), None)
    assert {trace["predicted"] is None for trace in traces} == {True, False}


# --------------------------------------------------------------------------------------------------
# 5. The command line
# --------------------------------------------------------------------------------------------------

SETTINGS = {
    "model": loading.BASE,
    "data": "words",
    "reward": "likelihood",
    "logit": "airl",
    "granularity": "dense",
    "max_new_tokens": 64,
    "fair_temperature": 0.2,
}


@pytest.fixture
def run(tmp_path):
    """A run folder whose policy and reward are both the base."""
    folder = tmp_path / "run"
    for name in ("policy", "reward"):
        shutil.copytree(loading.BASE, folder / name)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


def lines(path: Path, *records) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


GOOD = {
    "question": "Ava has 14 pens. Ava buys 3 bags of 12. How many pens?",
    "candidates": [data.response_text(*RIGHT), data.response_text(*WRONG)],
    "answer": 50,
}


def test_run_on_samples(run, capsys):
    rerank.main(["--run", str(run), "--n", "3", "--questions", "4"])
    shown = capsys.readouterr().out
    assert "4 questions, 3 candidates each" in shown
    for word in ("oracle", "reward_lowest", "AUROC", "Hit@1", "chance"):
        assert word in shown


def test_run_on_candidates(run, tmp_path, capsys):
    rerank.main(["--run", str(run), "--candidates", lines(tmp_path / "c.jsonl", GOOD, GOOD)])
    shown = capsys.readouterr().out
    assert "2 questions, 2 candidates each" in shown and "Hit@0" not in shown


def test_candidates_without_answers_print_the_choice(run, tmp_path, capsys):
    """The base is reward and is confidently wrong: it prefers the sum to the product."""
    record = {k: v for k, v in GOOD.items() if k != "answer"}
    rerank.main(["--run", str(run), "--candidates", lines(tmp_path / "c.jsonl", record)])
    shown = capsys.readouterr().out
    assert "candidate 2 of 2" in shown and "3+12=15" in shown and "oracle" not in shown


def test_samples_of_a_model_with_another_tokenizer_are_judged_as_text(run, tmp_path, capsys):
    """Text is in between: tokenised anew, and said so. Its tokens as they are would be others
    here, and are refused."""
    symbols = ["<end>", *"0123456789+*-=\n "]
    chars = Tokenizer(models.WordLevel({c: i for i, c in enumerate(symbols)}, unk_token=" "))
    chars.pre_tokenizer, chars.decoder = (
        pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
        decoders.Fuse(),
    )
    other = loading.PreTrainedTokenizerFast(tokenizer_object=chars, eos_token="<end>")
    size = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(symbols), **size))
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    model, other = loading.load_policy(str(tmp_path / "other"))
    example = Example(GOOD["question"], "", "50")
    written = collect(model, other, [example], 2, 12, 1.0, torch.Generator().manual_seed(0))
    record = GOOD | {"candidates": written.texts}
    rerank.main(["--run", str(run), "--candidates", lines(tmp_path / "c.jsonl", record)])
    assert "1 questions, 2 candidates each" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="tokenizer .* differs .* judged as text: rerank.py --candidates FILE"
    ):
        rerank.main(["--run", str(run), "--policy", str(tmp_path / "other")])


NO_ANSWER = {"question": "?", "candidates": ["1", "2"]}


@pytest.mark.parametrize(
    "records, says",
    [
        (["{broken"], "c.jsonl:1: "),
        ([GOOD, "[1]"], "c.jsonl:2: not a JSON object"),
        ([GOOD, {"candidates": ["x", "y"], "answer": "1"}], "c.jsonl:2: field 'question'"),
        ([{"question": "?", "answer": "1"}], "c.jsonl:1: field 'candidates'"),
        ([{"question": "?", "candidates": ["a", 1]}], "c.jsonl:1: field 'candidates'"),
        (
            [GOOD, {"question": "?", "candidates": ["a"], "answer": "1"}],
            "c.jsonl:2: 1 candidates: too few",
        ),
        ([GOOD, NO_ANSWER], "c.jsonl:2: field 'answer' must be"),
        (['{"question": "\\ud800", "candidates": ["a"]}'], "c.jsonl:1: "),
        (["[" * 100_000], "c.jsonl:1: "),
        ([""], "is empty"),
        (
            [{"question": "?", "candidates": ["1 " * 500]}],
            "candidate 1 of question 1 is .* tokens long",
        ),
    ],
)
def test_bad_candidates_are_named_by_line(run, tmp_path, records, says):
    with pytest.raises(UserError, match=says):
        rerank.main(["--run", str(run), "--candidates", lines(tmp_path / "c.jsonl", *records)])


def test_more_candidates_asked_for_than_there_are(run, tmp_path):
    with pytest.raises(UserError, match="c.jsonl:1: 2 candidates: too few"):
        rerank.main(
            ["--run", str(run), "--n", "3", "--candidates", lines(tmp_path / "c.jsonl", GOOD)]
        )


def test_fewer_candidates_asked_for_are_the_first(tmp_path):
    examples, texts, n = rerank.read_candidates(lines(tmp_path / "c.jsonl", GOOD, GOOD), 1)
    assert ([example.answer for example in examples], texts, n) == (
        ["50", "50"],
        GOOD["candidates"][:1] * 2,
        1,
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--n", "0"], "--n must be from 1"),
        (["--questions", "-1"], "--questions must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--run", "no/such/run"], "no run folder"),
        (["--candidates", "x.jsonl"], "--candidates and --policy need"),
        (["--policy", "run"], "--candidates and --policy need"),
    ],
)
def test_bad_flags(flags, says):
    with pytest.raises(UserError, match=says):
        rerank.main(flags)


def settings_are(text: str):
    return lambda run: (run / "settings.json").write_text(text)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda run: (run / "settings.json").unlink(), "cannot read .*settings.json"),
        (settings_are("{"), "cannot read .*settings.json"),
        (settings_are("[]"), "holds no settings"),
        (
            settings_are(json.dumps(SETTINGS | {"reward": "x"})),
            "'reward' must be one of .*, not 'x'",
        ),
        (settings_are(json.dumps(SETTINGS | {"model": None})), "'model' is None, expected str"),
        (lambda run: shutil.rmtree(run / "reward"), "holds no reward/"),
        (lambda run: (run / "reward" / "tokenizer.json").write_text("{"), "cannot load model"),
    ],
)
def test_broken_run_folders(run, change, says):
    change(run)
    with pytest.raises(UserError, match=says):
        rerank.main(["--run", str(run)])


def test_another_tokenizer_is_refused(run):
    path = run / "reward" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the tokenizer of .* differs"):
        rerank.main(["--run", str(run)])


def test_bad_input_is_one_line_and_exit_status_2():
    command = [sys.executable, rerank.__file__, "--n", "0"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == "error: --n must be from 1 to 1,000,000, not 0\n"
