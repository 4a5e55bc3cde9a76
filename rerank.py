"""The reward at inference: keep the best of n samples, and point at the token where a trace first goes wrong.

Algorithm 1 (arXiv 2510.01857) ends with a reward. Its first use is in the loop: irl.py trains a policy on it. This file is
its second and third; nothing is trained here. The reward is f, the model's own score. AIRL's r = f - log pi compares with
the policy of the last training step; f asks no policy, and can judge anybody's samples. No verifier takes part in choosing:
the true answer is read only to say how often the choice was right. Who wrote the candidates, and what each model says about
their tokens, is in engine/candidates.py.

    equation or rule                       source                      function, and its test: tests/test_rerank.py, test_..
    mean r of a trace; last, lowest, ..    2510.01857 v2: the mean     trace_scores       trace_scores_by_hand
    sum_i c_i C(N-1-i, n-1) / C(N, n)      counted: all n-subsets      best_of_n          best_of_n_is_the_mean_over_all_subsets
    votes, alike or weighted by r          2203.11171, 2206.02336      majority_vote      majority_enumerates_small_cases
    pass@k = 1 - C(n-c, k) / C(n, k)       2107.03374 eq. 1            pass_at_k          pass_at_k_is_the_share_of_subsets
    success@k|N                            2510.01857 v2               success_at_k       success_at_k_ties_by_enumeration
    place of the largest r_t - r_{t+1}     2510.01857, its code        predicted_place    predicted_place_by_hand
    Hit@W, beside exact chance             2510.01857 v2               place_results      place_results_by_hand

    python rerank.py                                            what can be chosen without a reward, in some seconds
    python rerank.py --run runs/demo --n 16                     what a run's reward makes of its base's samples
    python rerank.py --run runs/demo --candidates mine.jsonl    ... or of yours, {"question": .., "candidates": [..], "answer":
                                                                .., "options": [..]} on each line, the last two if there are
                                                                any; the chosen ones where no answer is known
"""

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path

import torch
from torch.nn.functional import one_hot, pad

import data
import policy
import reward
from engine import loading
from engine.candidates import (
    Candidates,
    Reading,
    collect,
    from_texts,
    natural_errors,
    per_token_likelihood,
    signals,
    without_cut_off,
)
from engine.chat import check_text, set_date
from engine.errors import Parser, UserError, exit_status
from engine.runs import read_settings
from engine.settings import DEVICES, check_values
from show.tables import show_choices, show_results
from tasks import countdown, records
from tasks.answers import group_answers

# Models trained on the demonstrations alone, whose log-probability is the baseline to beat: signal -> folder of a run
JUDGES = {"sft_logprob": "sft", "sft_fair_logprob": "sft_fair"}
LOGPROBS = ("logprob", *JUDGES)
RULES = ("mean", "last", "lowest", "discounted")  # of trace_scores
GAMMA = 0.9  # discount of a trace's later scores; the training's gamma is another matter
VOTE_TEMPERATURE = 0.25  # of 1, 1/2 and 1/4 the best on validation questions of words
VOTE_SUBSETS = 20  # subsets of n candidates that a majority vote is averaged over, where there are more
PERTURBED_PER_EXPERT = 4  # broken copies of each expert trace in the synthetic localisation test
RANGES = {"n": (1, 10**6), "questions": (1, 10**9), "rows": (1, 10**9), "temperature": (0, 1000), "seed": (0, 2**63 - 1)}

# 1. Choosing. [Q, N]: N candidates for each of Q questions. Returned: [Q], the chance that the choice is good ---------


def trace_scores(values: torch.Tensor, read: torch.Tensor, rule: str, gamma: float = GAMMA) -> torch.Tensor:
    """Scores of tokens to one score per trace: [B, T], [B, T] -> [B]. `read` is 1 where a score was read.

    With r_0 .. r_{K-1} the K scores that were read:

        mean        sum_k r_k / K           last          r_{K-1}
        lowest      min_k r_k               discounted    sum_k gamma^k r_k

    A trace without a score gets -inf: it is never chosen before one that has.
    """
    read = read.bool()
    kept = values.masked_fill(~read, 0.0)  # whatever stands elsewhere, NaN too, has no say
    if rule == "mean":
        scores = kept.sum(1) / read.sum(1).clamp(min=1)
    elif rule == "last":
        final = (read * torch.arange(read.shape[1])).amax(1, keepdim=True)  # [B, 1]
        scores = kept.gather(1, final).squeeze(1)
    elif rule == "lowest":
        scores = kept.masked_fill(~read, math.inf).amin(1)
    else:  # backwards, S = r + gamma S at each score that was read: no gamma^t, so nothing overflows
        scores = torch.zeros_like(values[:, 0])
        for t in range(values.shape[1] - 1, -1, -1):
            scores = torch.where(read[:, t], kept[:, t] + gamma * scores, scores)
    return scores.masked_fill(~read.any(1), -math.inf)


def best_of_n(correct: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """Accuracy of the best of n by score, expected over all n-subsets of the N candidates: [Q, N] -> [Q].

    Sort by score. The item at rank i is the best of a subset that holds it and n-1 of the N-1-i items below it, so

        E[correct] = sum_i correct_i C(N-1-i, n-1) / C(N, n)

    Equal scores are broken at random: each item of a tie counts with the mean of `correct` over the tie.

    >>> correct, scores = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.9, 0.5]])
    >>> best_of_n(correct, scores, 2)  # of the three pairs, one has a right winner
    tensor([0.3333])
    """
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"n must be between 1 and {total}, not {n}")
    tied = (scores[:, :, None] == scores[:, None, :]).double()  # [Q, N, N]
    fair = (tied * correct[:, None, :]).sum(-1) / tied.sum(-1)  # [Q, N]
    order = scores.argsort(dim=1, descending=True)
    chance = [math.comb(total - 1 - i, n - 1) / math.comb(total, n) for i in range(total)]
    return (fair.gather(1, order) * torch.tensor(chance, dtype=torch.double)).sum(1).float()


def answer_keys(answers: list[list[str | None]], options: list[tuple[str, ...]]) -> torch.Tensor:
    """Answers as integers to vote with: [Q, N] long, equal where same_answer would call two of a question's answers the
    same, -1 for none. An answer that names one of the question's options, by letter or by text, is that option.

    >>> answer_keys([["1,200", "$1200.00", "1200 pens", None], ["B", "aorta", "B12", ""]], [(), ("Heart", "Aorta")])
    tensor([[ 0,  0,  0, -1],
            [ 0,  0,  2, -1]])
    """
    rows = [group_answers(row, names) for row, names in zip(answers, options)]
    return torch.tensor(rows, dtype=torch.long)


def majority_vote(correct: torch.Tensor, keys: torch.Tensor, n: int, weights: torch.Tensor | None = None,
                  draws: int = VOTE_SUBSETS, seed: int = 0) -> torch.Tensor:  # fmt: skip
    """Accuracy of the answer whose candidates weigh most together, among n of the N: [Q, N] -> [Q]. Averaged over all
    subsets of n, if there are no more than `draws`; else over `draws` random ones, drawn for each question apart.

    Ties are broken at random (expected value). No answer (key -1) wins only where nobody has one. Without weights this is
    self-consistency (arXiv 2203.11171), with them a weighted vote (2206.02336); 2510.01857 takes the reward as the weight.
    """
    questions, total = keys.shape
    weights = torch.full(keys.shape, 1.0 / total) if weights is None else weights
    if math.comb(total, n) <= draws:
        subsets = [torch.tensor(chosen).expand(questions, n) for chosen in itertools.combinations(range(total), n)]
    else:
        generator = torch.Generator().manual_seed(seed)
        subsets = [torch.rand(questions, total, generator=generator).argsort(1)[:, :n] for _ in range(draws)]
    results = []
    for rows in subsets:
        right, key, weight = (of.gather(1, rows) for of in (correct, keys, weights))  # [Q, n] each
        same = (key[:, :, None] == key[:, None, :]).double()  # [Q, n, n]
        votes = (same * weight[:, None, :]).sum(-1).masked_fill(key < 0, -1.0)  # [Q, n]
        wins = votes >= votes.amax(1, keepdim=True) - 1e-9  # rounding must not break a tie
        share = wins / same.sum(-1)  # a winning answer counts once, however many candidates gave it
        results.append(((share * right).sum(1) / share.sum(1)).float())
    return torch.stack(results).mean(0)


def vote_weights(scores: torch.Tensor, temperature: float = VOTE_TEMPERATURE) -> torch.Tensor:
    """Softmax within the question of z / temperature, z the standardised trace scores: [Q, N] -> [Q, N]. Standardised, because
    a reward has no unit: between right and wrong a mean log-probability differs by a tenth, a sum by tens, and a plain
    softmax would be the plain vote for one and best-of-n for the other."""
    scores = scores.masked_fill(~scores.isfinite(), math.nan)  # without a say
    centred = scores - scores.nanmean(1, keepdim=True)
    z = centred / (centred**2).nanmean(1, keepdim=True).sqrt().clamp(min=1e-9)
    return (z.nan_to_num(-math.inf) / temperature).softmax(1).nan_to_num(1 / scores.shape[1])  # NaN: no candidate has a score


# 2. How good is a score -----------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) / C(n, k), the unbiased estimator of
    Chen et al. 2021. It is also how often an oracle finds a correct one among k candidates.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2), pass_at_k(4, 0, 4)
    (0.5, 1.0, 0.0)
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"need 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def success_at_k(correct: torch.Tensor, scores: torch.Tensor, k: int) -> torch.Tensor:
    """success@k|N (arXiv 2510.01857): whether any of the k highest scores of N is correct: [Q, N] -> [Q]. Where equal
    scores straddle the k-th place, those of them that get in are drawn at random (expected value)."""
    values = []
    for right, score in zip(correct, scores):  # [N] each
        threshold = score.sort(descending=True).values[k - 1]
        above, tied = score > threshold, score == threshold
        places = k - int(above.sum())  # left for the tied
        values.append(1.0 if right[above].any() else pass_at_k(int(tied.sum()), int(right[tied].sum()), places))
    return torch.tensor(values)


def auroc(scores: torch.Tensor, correct: torch.Tensor) -> float | None:
    """Chance that a correct trace scores above a wrong one, ties counting 1/2 (Mann & Whitney 1947): [M], [M] -> one number,
    None if all are correct or all are wrong.

    >>> auroc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))  # 4 pairs: 3 in order, one tie
    0.875
    """
    right, wrong = scores[correct > 0], scores[correct == 0].sort().values  # [P], [W]
    twice = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)  # [P], wrong ones below + up to it
    return int(twice.sum()) / (2 * len(right) * len(wrong)) if len(right) and len(wrong) else None


def auroc_within(scores: torch.Tensor, correct: torch.Tensor) -> list[float] | None:
    """Mean of the questions' own AUROCs, [Q, N] both, as [mean, low, high]: can the score rank one question's candidates? Over
    the questions that have right ones and wrong ones; None without any."""
    areas = [area for area in map(auroc, scores, correct) if area is not None]
    return bootstrap(torch.tensor(areas)) if areas else None


def auroc_beyond(
    scores: torch.Tensor,
    other: torch.Tensor,
    correct: torch.Tensor,
    draws: int = 1000,
    seed: int = 0,
) -> list[float] | None:
    """By how much the scores' AUROC, all candidates pooled, is above the other scores'.

    [Q, N] each -> [difference, low, high]. Questions are drawn again (`bootstrap` says why), the
    same for both. None where nothing is right, or nothing wrong.
    """
    n_right = (correct > 0).double().sum(1)  # [Q]
    n_wrong = (correct == 0).double().sum(1)
    if not n_right.sum() or not n_wrong.sum():
        return None
    gaps = pairs_won(scores, correct) - pairs_won(other, correct)  # [Q, Q]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(correct), (draws, len(correct)), generator=generator)
    # how often each question was drawn: first all of them once, as they are
    times = torch.nn.functional.one_hot(drawn, len(correct)).sum(1).double()  # [draws, Q]
    times = torch.cat([torch.ones(1, len(correct), dtype=torch.double), times])
    won = ((times @ gaps) * times).sum(1)
    pairs = (times @ n_right) * (times @ n_wrong)
    gap, *again = (won / pairs)[pairs > 0].tolist()
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    return [gap, *torch.tensor(again, dtype=torch.double).quantile(ends).tolist()]


def pairs_won(scores: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Of question q's right and r's wrong candidates, the pairs where the right one scores higher.

    [Q, N] each -> [Q, Q]; equals count half. All of them over all pairs are the AUROC.

    >>> pairs_won(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), torch.tensor([[0, 1], [0, 1]]))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]], dtype=torch.float64)
    """
    wrong = (correct == 0).double()
    rows = []
    for row, right in zip(scores, correct > 0):
        higher = (1 + (row[right, None, None] - scores).sign().double()) / 2  # [right, Q, N]
        rows.append((higher * wrong).sum((0, 2)))
    return torch.stack(rows)


def bootstrap(values: torch.Tensor, draws: int = 1000, seed: int = 0) -> list[float]:
    """[mean, low, high]: the mean over questions with its 95% percentile interval (Efron 1979): [Q] -> three. Not candidates
    are drawn again: those of one question resemble each other, and the interval would be too narrow."""
    values, generator = values.double(), torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return [float(values.mean()), low, high]


# 3. Where a trace first goes wrong. Places are columns of the batch, as everywhere (data.Batch) -----------------------


def predicted_place(values: torch.Tensor, read: torch.Tensor, rule: str) -> torch.Tensor:
    """The column that a signal points at: [B, T], [B, T] -> [B]. `read` is 1 where a value was read.

    lowest, highest: there, at the first of equals.
    drop: at t+1 of the largest r_t - r_{t+1}, the token after the fall (the paper's released code); t and t+1 are
    neighbours among the values read. A lone value is its own place.
    first: the first below reward.SUSPICIOUS, or else the lowest. For log-probabilities: what follows an error, and does not
    fit it, can look worse than the error itself.

    >>> r, read = torch.tensor([[9.0, 5.0, 4.0, -1.2, -3.0]]), torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    >>> [predicted_place(r, read, rule).item() for rule in ("lowest", "highest", "drop", "first")]
    [4, 1, 3, 3]
    """
    read = read.bool()
    if rule == "first":
        low = read & (values < reward.SUSPICIOUS)
        return torch.where(low.any(1), low.long().argmax(1), predicted_place(values, read, "lowest"))
    if rule == "drop":
        latest = torch.where(read, torch.arange(read.shape[1]), -1).cummax(1).values  # [B, T], the last one read up to t
        before = pad(latest[:, :-1], (1, 0), value=-1)  # ... and up to t-1; -1: none
        change = values - values.gather(1, before.clamp(min=0))  # -(r_t - r_{t+1}), on t+1
        follows = read & (before >= 0)
        return predicted_place(change, torch.where(follows.any(1, keepdim=True), follows, read), "lowest")
    return (values if rule == "lowest" else -values).masked_fill(~read, math.inf).argmin(1)


def alarm_rates(values: torch.Tensor, read: torch.Tensor, correct: torch.Tensor) -> dict:
    """What a log-probability says of a trace by itself, with no other to compare it with: {"right": share of these with a token
    below reward.SUSPICIOUS (None if there are none), "wrong": of those}. [B, T], [B, T], [B] bool."""
    alarm = (read.bool() & (values < reward.SUSPICIOUS)).any(1).float()
    groups = {"right": alarm[correct], "wrong": alarm[~correct]}
    return {name: float(found.mean()) if len(found) else None for name, found in groups.items()}


def place_results(batch: data.Batch, truth: torch.Tensor, questions: torch.Tensor, readings: dict[str, Reading],
                  ends_step: torch.Tensor, likelihood: bool = True, seed: int = 0) -> dict:  # fmt: skip
    """How often each signal points at the error: {"count": traces, "hit0": {signal: [mean, low, high], ..}, "hit1", "step"}.

    truth [B]: the column of the first error; -1, and a trace is left out. questions [B]: traces of one are averaged before
    the bootstrap. Hit@W: within W tokens of the truth. step: in the same step; tokens in ends_step [V] end one. likelihood:
    whether rule `first` is for the reward, too. chance draws evenly from all tokens of the trace, chance_reward from those
    where the reward is read.
    """
    wrong, mask = truth >= 0, batch.response_mask
    if not wrong.any():
        return {"count": 0}
    readings = {name: reading for name, reading in readings.items() if reading[1].sum(1).max() > 1}  # one a trace points nowhere
    rules = {"reward": ("lowest", "drop", "first") if likelihood else ("lowest", "drop"), "entropy": ("highest",)}
    places = {}  # signal -> [B, T]: 1 on the place it points at, or on all that chance draws from
    for name in (name for name in ("reward", *LOGPROBS, "entropy") if name in readings):
        for rule in rules.get(name, ("lowest", "first")):
            place = predicted_place(*readings[name], rule)
            places[name if rule in ("lowest", "highest") else f"{name}_{rule}"] = one_hot(place, mask.shape[1])
    places["chance"] = mask
    if "reward" in readings:
        places["chance_reward"] = readings["reward"][1]

    truth = truth.clamp(min=0)[:, None]  # [B, 1]
    distance = (torch.arange(mask.shape[1]) - truth).abs()
    ending = ends_step[batch.tokens] * mask
    step = ending.cumsum(1) - ending  # [B, T], steps that ended before t
    counting = {"hit0": distance == 0, "hit1": distance <= 1, "step": step == step.gather(1, truth)}

    groups = [wrong & (questions == q) for q in questions[wrong].unique()]  # [B] each
    results: dict = {"count": int(wrong.sum())}
    for hit, counts in counting.items():
        shares = {name: (counts * place).sum(1) / place.sum(1).clamp(min=1) for name, place in places.items()}  # [B] each
        means = {name: torch.stack([share[rows].mean() for rows in groups]) for name, share in shares.items()}
        results[hit] = {name: bootstrap(values, seed=seed) for name, values in means.items()}
    return results


# 4. Results -----------------------------------------------------------------------------------------------------------


def choice_results(correct: torch.Tensor, keys: torch.Tensor, scores: dict[str, torch.Tensor], voters: dict[str, str],
                   seed: int = 0) -> dict:  # fmt: skip
    """Accuracy of every way to choose among n = 1, 2, 4, .. N candidates: {"4": {"random": [mean, low, high], ..}, ..}.
    scores: [Q, N] each. voters: weighted vote -> the score that weighs. A way is of use if it lies above random, an even draw;
    none lies above the oracle, right if any of the n is. Then, of the best of N, "beyond": what a way gains over random. Both
    are right or wrong on the same questions, hard ones and easy ones: the interval of the difference per question is narrower
    than two intervals side by side. Then "pass@k"; "auroc" (all candidates pooled), which a score that knows hard questions
    from easy ones can earn as well; "auroc_within" (`auroc_within`), which it cannot."""
    total, right = correct.shape[1], correct.sum(1).int().tolist()  # c of pass@k, per question
    results: dict = {}
    for n in [2**i for i in range(total.bit_length()) if 2**i < total] + [total]:
        row = {"random": correct.mean(1), "majority": majority_vote(correct, keys, n, seed=seed)}
        row |= {name: best_of_n(correct, values, n) for name, values in scores.items()}
        for name, weighs in voters.items():
            row[name] = majority_vote(correct, keys, n, vote_weights(scores[weighs]), seed=seed)
        row["oracle"] = torch.tensor([pass_at_k(total, c, n) for c in right])
        results[str(n)] = {name: bootstrap(values, seed=seed) for name, values in row.items()}
    beyond = {name: bootstrap(values - row["random"], seed=seed) for name, values in row.items() if name != "random"}
    results |= {"beyond": beyond, "pass@k": {n: row["oracle"] for n, row in results.items()}}
    areas = {name: auroc(values.flatten(), correct.flatten()) for name, values in scores.items()}
    return results | {"auroc": areas, "auroc_within": {name: auroc_within(values, correct) for name, values in scores.items()}}


def rerank_results(candidates: Candidates, readings: dict[str, Reading], rule: str = "mean", seed: int = 0) -> dict:
    """`choice_results` by length, which asks no model, by mean log-probability, and by the reward: its `rule`, then every
    rule; by the former "success@k" too. A candidate that was cut off has no reward, unless this is a score per token
    (candidates.without_cut_off)."""
    if "reward" in readings:
        readings = readings | {"reward": without_cut_off(readings["reward"], candidates)}
    mask, correct = candidates.batch.response_mask, candidates.correct
    ways = [(name, name, "mean") for name in LOGPROBS] + [("reward", "reward", rule)]
    ways += [(f"reward_{each}", "reward", each) for each in RULES]
    scores = {"longest": mask.sum(1), "shortest": -mask.sum(1)}
    scores |= {way: trace_scores(*readings[name], by) for way, name, by in ways if name in readings}
    scores = {way: values.view(-1, candidates.n) for way, values in scores.items()}
    keys = answer_keys(candidates.answers, [example.options for example in candidates.examples])
    results = choice_results(correct, keys, scores, {"weighted_majority": "reward"} if "reward" in scores else {}, seed)
    if "reward" in scores:
        success = lambda n: bootstrap(success_at_k(correct, scores["reward"], int(n)), seed=seed)
        results["success@k"] = {n: success(n) for n in results["pass@k"]}
    return results


def assess(candidates: Candidates, discriminator, policy_model, judges: dict, tokenizer, rule="mean", seed=0) -> dict:
    """What a reward is worth at inference: {"rerank", "distributions": the scores of right and of wrong traces, "alarms",
    for an embedded task "localise": {"natural", "single"}}; without a discriminator the first alone.

    natural: the wrong ones among the candidates. single: experts' traces with one thing broken, the synthetic test of arXiv
    2510.01857 v2. It is another task: the rest of the trace stays as it was, and a later line that no longer fits can look
    worse than the error. A natural error is carried on, and is what the policy believes.
    """
    batch, examples, right = candidates.batch, candidates.examples, candidates.correct.flatten() > 0
    readings = signals(batch, discriminator, policy_model, judges)
    results = {"rerank": rerank_results(candidates, readings, rule, seed)}
    if discriminator is None:
        return results
    scores = trace_scores(*without_cut_off(readings["reward"], candidates), rule)
    scored = scores.isfinite()  # a trace that was cut off may have no score
    results["distributions"] = {"right": scores[right & scored].tolist(), "wrong": scores[~right & scored].tolist()}
    likelihood = per_token_likelihood(discriminator)
    names = (*LOGPROBS, "reward") if likelihood else LOGPROBS
    results["alarms"] = {name: alarm_rates(*readings[name], right) for name in names if name in readings}
    if examples[0].task and examples[0].trace:  # candidates from a file have no expert's trace beside them
        how = (discriminator.step_end_tokens.cpu(), likelihood, seed)
        truth = natural_errors(candidates, tokenizer, data.end_tokens(tokenizer, policy_model))
        natural = place_results(batch, truth, torch.arange(len(batch)) // candidates.n, readings, *how)
        rng, single = random.Random(f"broken {seed}"), {"count": 0}
        broken = reward.compare(tokenizer, data.tokenize(tokenizer, examples), [[] for _ in examples], PERTURBED_PER_EXPERT, rng)
        if len(broken.negative):
            said = signals(broken.negative, discriminator, policy_model, judges)
            single = place_results(broken.negative, broken.negative_from, broken.pair, said, *how)
        results["localise"] = {"natural": natural, "single": single}
    return results


# 5. The command line -----------------------------------------------------------------------------------------------------


def read_candidates(path: str, n: int | None = None) -> tuple[list[data.Example], list[str], int]:
    """JSON lines with question, candidates and, if known, answer and options -> (examples, texts, n).

    All lines hold as many candidates as the first one, and an answer if it does; of more than `n`, the first n are used.
    A problem of countdown goes to its own checker, which reads the lines of a response too. (That of words asks for the
    answer alone, as for any other question.) UserError with the line that is wrong.
    """
    rows: list[tuple[data.Example, list[str]]] = []

    def read(record: dict) -> None:
        question = records.field(record, "question", needed=True)
        answer = records.field(record, "answer") or ""
        options = read_options(record.get("options"))
        texts = record.get("candidates")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("field 'candidates' is missing: a list of one or more response texts")
        task = "countdown" if countdown.is_question(question) else ""
        rows.append((data.Example(question, "", answer, options, task=task), [check_text(text) for text in texts]))
        if len(texts) != len(rows[0][1]):
            raise ValueError(f"{len(texts)} candidates, but the lines before have {len(rows[0][1])}")
        if bool(answer) != bool(rows[0][0].answer):
            raise ValueError("field 'answer' must be in every line or in none")
        if len(texts) < (n or 1):
            raise ValueError(f"{len(texts)} candidates are fewer than --n {n}")

    records.read_objects(path, records.text_lines(path), read, "question and candidates")
    examples = [example for example, _ in rows]
    texts = [text for _, texts in rows for text in texts[:n]]
    return examples, texts, n or len(rows[0][1])


def read_options(value: object) -> tuple[str, ...]:
    """The options of a question: a list of texts, or an object with one for each letter. ValueError for anything else.

    >>> read_options(["Heart", "Aorta"]), read_options({"B": "Aorta", "A": "Heart"}), read_options(None)
    (('Heart', 'Aorta'), ('Heart', 'Aorta'), ())
    """
    if isinstance(value, dict):
        letters = [chr(ord("A") + place) for place in range(len(value))]
        if sorted(value) != letters:
            raise ValueError('field \'options\' must have the letters from A on, as in {"A": "..", "B": ".."}')
        value = [value[letter] for letter in letters]
    if not isinstance(value or [], list):
        raise ValueError('field \'options\' must be a list of texts, or {"A": "..", "B": ".."}')
    return tuple(records.field({"options": option}, "options", needed=True) for option in value or [])


def load_judges(run: Path, tokenizer, temperature: float, device) -> dict:
    """The JUDGES that this run has trained: signal -> model. Fair SFT's logits are divided by its setting fair_temperature,
    which would distort the log-probability of a whole trace: as IRL's f is the averaged reward before its logits are divided
    by alpha, the judge is the averaged model before they are."""
    judges = {}
    for signal, name in JUDGES.items():
        if (run / name).is_dir():
            judges[signal] = loading.load_causal(str(run / name), device)
            loading.check_same_tokenizer(tokenizer, str(run / name))
            if name == "sft_fair":
                policy.divide_logits(judges[signal], 1 / temperature)
    return judges


def load_run(run: Path, device="cpu") -> tuple[reward.Discriminator, object, dict]:
    """(discriminator, tokenizer, settings) of a finished run of train.py. Raises UserError."""
    settings = read_settings(run)
    folder = run / "reward"
    if not folder.is_dir():
        raise UserError(f"run folder {run} holds no reward/: was it trained to its end, with --method irl or all?")
    tokenizer = loading.load_tokenizer(str(folder))
    set_date(tokenizer, settings.get("date"))
    model = reward.load_reward(settings["reward"], str(folder), device)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(f"the tokenizer in {run} has {len(tokenizer)} tokens, the reward only {vocabulary}")
    discriminator = reward.make_discriminator(model, tokenizer, settings["logit"], settings["granularity"])
    return discriminator, tokenizer, settings


def models_of_run(run: Path, policy_name: str, device):
    """(policy model, tokenizer, discriminator, judges, settings) of a run's folder."""
    discriminator, tokenizer, settings = load_run(run, device)
    name = {"base": settings["model"], "run": str(run / "policy")}.get(policy_name, policy_name)
    policy_model, _ = loading.load_policy(name, device)
    loading.check_same_tokenizer(tokenizer, name)
    return policy_model, tokenizer, discriminator, load_judges(run, tokenizer, settings["fair_temperature"], device), settings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked before anything is loaded. Raises UserError for bad input."""
    parser = Parser(__doc__)
    parser.add_argument("--run", help="folder of a run of train.py; without it, a demonstration")
    parser.add_argument("--n", type=int, help="candidates per question (default 16, or all of the file's)")
    parser.add_argument("--questions", type=int, default=100, help="test questions")
    parser.add_argument("--candidates", metavar="FILE", help="JSON lines with question, candidates, answer, options")
    parser.add_argument("--rule", default="mean", choices=RULES, help="the reward's trace score")
    parser.add_argument("--policy", default="base", help="who samples: base (the run's), run, or a folder")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy")
    parser.add_argument("--rows", type=int, default=512, help="responses sampled at a time (memory)")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--seed", type=int, default=0, help="of the questions, the samples and the intervals")
    args = parser.parse(argv)
    check_values(vars(args), RANGES)
    if not args.run and (args.candidates or args.policy != "base"):
        raise UserError(f"--{'candidates' if args.candidates else 'policy'} needs a trained reward: give --run too")
    return args


def main(argv: list[str] | None = None) -> None:
    """Load, read or sample the candidates, judge them, print."""
    args = parse(argv)
    loading.quiet()
    given = read_candidates(args.candidates, args.n) if args.candidates else None  # before what takes long
    device = loading.pick_device(args.device)
    if args.run:
        policy_model, tokenizer, discriminator, judges, settings = models_of_run(Path(args.run), args.policy, device)
        models = [policy_model, discriminator.reward_model.model, *judges.values()]
    else:
        policy_model, tokenizer = loading.load_policy(loading.BASE, device)
        models, discriminator, judges = [policy_model], None, {}
        settings = {"model": "base", "data": "words", "max_new_tokens": 64}
    context = min(map(loading.context_length, models))
    if given:
        candidates = from_texts(tokenizer, *given, context)
        tokens = int(candidates.batch.response_mask.sum())
        print(f"{args.candidates} is text, whoever wrote it: {tokens} tokens of the run's own tokenizer are judged")
    else:
        new_tokens = settings["max_new_tokens"]
        in_words = settings["model"] not in loading.SHIPPED
        examples = data.load_examples(settings["data"], "test", args.questions, args.seed, in_words=in_words)
        examples, dropped = data.fit_context(tokenizer, examples, context, new_tokens)
        if dropped:
            print(f"{dropped} questions are too long for the models' context of {context} tokens: skipped")
        sampling = (new_tokens, args.temperature, torch.Generator(device).manual_seed(args.seed), args.rows)
        candidates = collect(policy_model, tokenizer, examples, args.n or 16, *sampling)
    if not candidates.examples[0].answer:
        reading = signals(candidates.batch, discriminator, policy_model)["reward"]
        scores = trace_scores(*without_cut_off(reading, candidates), args.rule)
        return print(show_choices(candidates, scores.view(-1, candidates.n)))
    results = assess(candidates, discriminator, policy_model, judges, tokenizer, args.rule, args.seed)
    n, shown = candidates.n, show_results(results)
    if args.run:
        print(f"{len(candidates.examples)} questions, {n} candidates each; mean and 95% interval over questions; "
              f"a trace's reward is its {args.rule}\n\n{shown}")  # fmt: skip
    else:
        print(f"The shipped base, {n} samples for each of {len(candidates.examples)} test questions of words\n\n{shown}\n\n"
              "The base is confidently wrong: neither its votes nor its log-probability come near the oracle.\n"
              "A reward closes part of the gap: make one with train.py, then rerank.py --run RUN")  # fmt: skip
    if args.out:
        try:
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.out}: {error}") from None


if __name__ == "__main__":
    sys.exit(exit_status(main))
