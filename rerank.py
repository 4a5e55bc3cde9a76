"""The reward at inference: keep the best of N samples, and point at the token where a trace first goes wrong.

    1. trace_scores          token rewards [B, T] -> one score per trace [B]: mean, last, lowest, discounted
    2. choosing              best of n, majority vote, reward-weighted majority, beside random and oracle
    3. how good is a score   pass@k, success@k, AUROC, bootstrap intervals over questions
    4. localisation          the predicted place of the first error, Hit@W, same step, and exact chance
    5. Candidates, signals   N samples per question, and what each model says about every token of them
    6. results               everything above as one JSON-able dict
    7. the command line

The reward used here is f, the reward model's own score. AIRL's r = f - log pi compares with the policy of the
last training step; f asks no policy, so it can judge anybody's samples. No verifier takes part in choosing:
the true answer is read only to say how often the choice was right.

Two things are done exactly rather than sampled. Best-of-n for n < N is the expectation over all subsets of
size n of the N candidates, and chance is counted, not simulated. Majority votes have no such formula and are
averaged over `VOTE_SUBSETS` random subsets.

Run `python rerank.py` to see, in a few seconds, what can be chosen without a reward, or

    python rerank.py --run runs/demo --n 16
    python rerank.py --run runs/demo --candidates mine.jsonl

where each line of mine.jsonl is {"question": "..", "candidates": ["..", ".."], "answer": ".."}. Without
"answer" the chosen candidate of each question is printed.
"""

import argparse
import itertools
import json
import math
import random
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.nn.functional import pad

import data
import policy
import reward
from data import Batch, Example
from engine import loading
from engine.errors import Parser, UserError, exit_status, nearest, printable
from engine.runs import load_run
from show.tables import show_results
from tasks.answers import ONLY_NUMBER, extract_answer, normalise_text, option_of, parse_number

RULES = ("mean", "last", "lowest", "discounted")
# Models trained on the demonstrations alone, whose log-probability is the baseline to beat: signal -> folder of a run
JUDGES = {"sft_logprob": "sft", "sft_fair_logprob": "sft_fair"}
LOGPROBS = ("logprob", *JUDGES)
GAMMA = 0.9  # discount of a trace's later scores; the training's gamma is another matter
VOTE_TEMPERATURE = 0.25  # of 1, 1/2 and 1/4 the best on validation questions of words
VOTE_SUBSETS = 20  # subsets of n candidates that a majority vote is averaged over, where there are more
PERTURBED_PER_EXPERT = 4  # broken copies of each expert trace in the synthetic localisation test

# ------------------------------------------------------------------------------------------------------------
# 1. One score per trace
# ------------------------------------------------------------------------------------------------------------


def check_rule(rule: str) -> None:
    """Raise unless `rule` is one of RULES."""
    if rule not in RULES:
        raise UserError(f"unknown rule '{rule}'{nearest(rule, RULES)}: one of {', '.join(RULES)}")


def trace_scores(rewards: torch.Tensor, ends: torch.Tensor, rule: str, gamma: float = GAMMA) -> torch.Tensor:
    """Token rewards to one score per trace: [B, T], [B, T] -> [B]. `ends` is 1 where a score was read.

    With r_0 .. r_{K-1} the K scores that were read (arXiv 2510.01857 v2 reranks by their mean):

        mean        sum_k r_k / K           last          r_{K-1}
        lowest      min_k r_k               discounted    sum_k gamma^k r_k

    A trace without a score gets -inf: it is never chosen before one that has.

    >>> r, ends = torch.tensor([[9.0, 4.0, 2.0, 6.0]]), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    >>> [trace_scores(r, ends, rule, 0.5).item() for rule in RULES]
    [4.0, 6.0, 2.0, 6.5]
    """
    check_rule(rule)
    read = ends.bool()
    kept = rewards.masked_fill(~read, 0.0)  # whatever stands elsewhere, NaN too, has no say
    if rule == "mean":
        scores = kept.sum(1) / read.sum(1).clamp(min=1)
    elif rule == "last":
        columns = torch.arange(rewards.shape[1], device=rewards.device)
        final = torch.where(read, columns, 0).amax(1, keepdim=True)  # [B, 1]
        scores = kept.gather(1, final).squeeze(1)
    elif rule == "lowest":
        scores = kept.masked_fill(~read, math.inf).amin(1)
    else:
        # Backwards, S = r + gamma S at each score that was read: no gamma^t, so nothing overflows.
        scores = torch.zeros_like(rewards[:, 0])
        for t in range(rewards.shape[1] - 1, -1, -1):
            scores = torch.where(read[:, t], kept[:, t] + gamma * scores, scores)
    return scores.masked_fill(~read.any(1), -math.inf)


# ------------------------------------------------------------------------------------------------------------
# 2. Choosing. [Q, N]: N candidates for each of Q questions. Returned: [Q], the chance that the choice is good
# ------------------------------------------------------------------------------------------------------------


def best_of_n(correct: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """Accuracy of the best of n by score, expected over all n-subsets of the N candidates: [Q, N] -> [Q].

    Sort by score. The item at rank i is the best of a subset that holds it and n-1 of the N-1-i items below
    it, so

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
    subsets = math.comb(total, n)
    chance = [math.comb(total - 1 - i, n - 1) / subsets for i in range(total)]
    return (fair.gather(1, order) * torch.tensor(chance, dtype=torch.double)).sum(1).float()


def canonical_answers(answers: list[str | None], options: tuple[str, ...] = ()) -> list[str | None]:
    """One question's answers as keys that are equal where same_answer would call the answers the same. An answer
    that names one of the question's options, by letter or by text, has the option for a key.

    same_answer looks at the truth to decide between numbers and words. There is no truth here, so the
    candidates decide: if one of them answers with nothing but a number, all that state one number are
    compared as numbers. An empty answer is none.

    >>> canonical_answers(["1,200", "1200", "$1200.00", "1200 pens", None])
    ['1200', '1200', '1200', '1200', None]
    >>> canonical_answers(["vitamin B12", "The vitamin B12.", "B6", ""])
    ['vitamin b12', 'vitamin b12', 'b6', None]
    >>> canonical_answers(["B", "aortic valve"], ("Mitral valve", "Aortic valve"))
    ['Aortic valve', 'Aortic valve']
    """
    # What same_answer takes for a number when it is the truth.
    numeric = any(answer is not None and re.fullmatch(ONLY_NUMBER, answer[:1000]) for answer in answers)
    keys: list[str | None] = []
    for answer in answers:
        option = option_of(answer or "", options)
        if option is not None:
            keys.append(options[option])
            continue
        value = parse_number(answer) if numeric and answer else None
        keys.append(str(value) if value is not None else normalise_text(answer or "") or None)
    return keys


def key_numbers(answers: list[list[str | None]], options: list[tuple[str, ...]] | None = None) -> torch.Tensor:
    """Canonical answers as integers to vote with: [Q, N] long, equal where a row's answers are, -1 for none.

    >>> key_numbers([["7", "8", "7.0", None]])
    tensor([[ 0,  1,  0, -1]])
    """
    rows = []
    for row in map(canonical_answers, answers, options or [()] * len(answers)):
        seen: dict[str, int] = {}
        rows.append([-1 if key is None else seen.setdefault(key, len(seen)) for key in row])
    return torch.tensor(rows, dtype=torch.long)


def vote(correct: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The answer whose candidates weigh the most together: three [Q, n] -> [Q].

    Ties are broken at random (expected value). No answer (key -1) wins only where nobody has one.

    >>> keys, even = torch.tensor([[0, 0, 1, -1]]), torch.full((1, 4), 0.25)
    >>> vote(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), keys, even)
    tensor([0.])
    >>> vote(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), keys, torch.tensor([[0.1, 0.1, 0.7, 0.1]]))
    tensor([1.])
    """
    same = (keys[:, :, None] == keys[:, None, :]).double()  # [Q, n, n]
    votes = (same * weights[:, None, :]).sum(-1).masked_fill(keys < 0, -1.0)  # [Q, n]
    wins = votes >= votes.amax(1, keepdim=True) - 1e-9  # rounding must not break a tie
    share = wins / same.sum(-1)  # a winning answer counts once, however many candidates gave it
    return ((share * correct).sum(1) / share.sum(1)).float()


def subsets(questions: int, total: int, n: int, draws: int, generator: torch.Generator):
    """Subsets of n out of `total` candidates, as indices [Q, n].

    Every subset, if there are no more than `draws`; else `draws` random ones, drawn for each question apart.

    >>> [s.tolist() for s in subsets(1, 3, 2, 20, torch.Generator())]
    [[[0, 1]], [[0, 2]], [[1, 2]]]
    """
    if math.comb(total, n) <= draws:
        for chosen in itertools.combinations(range(total), n):
            yield torch.tensor(chosen).expand(questions, n)
    else:
        for _ in range(draws):
            yield torch.rand(questions, total, generator=generator).argsort(1)[:, :n]


def majority_vote(correct: torch.Tensor, keys: torch.Tensor, n: int, weights: torch.Tensor | None = None,
                  draws: int = VOTE_SUBSETS, seed: int = 0) -> torch.Tensor:  # fmt: skip
    """Accuracy of the vote among n of the N candidates, averaged over `subsets`: [Q, N] -> [Q].

    Without weights: self-consistency (Wang et al. 2022, arXiv 2203.11171). With: weighted voting (Li et al.
    2022, arXiv 2206.02336), for which arXiv 2510.01857 takes the reward as the weight.
    """
    weights = torch.full(keys.shape, 1.0 / keys.shape[1]) if weights is None else weights
    generator = torch.Generator().manual_seed(seed)
    results = []
    for chosen in subsets(*keys.shape, n, draws, generator):
        results.append(vote(correct.gather(1, chosen), keys.gather(1, chosen), weights.gather(1, chosen)))
    return torch.stack(results).mean(0)


def vote_weights(scores: torch.Tensor, temperature: float = VOTE_TEMPERATURE) -> torch.Tensor:
    """Softmax within the question of z / temperature, z the standardised trace scores: [Q, N] -> [Q, N].

    Standardised, because a reward has no unit: between right and wrong a mean log-probability differs by a
    tenth, a sum by tens, and a plain softmax would be the plain vote for one and best-of-n for the other.

    >>> vote_weights(torch.tensor([[1.0, 3.0], [5.0, 5.0], [-torch.inf, 0.0]]), 1.0)
    tensor([[0.1192, 0.8808],
            [0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    scored = scores.isfinite()
    mean = scores.masked_fill(~scored, 0.0).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    centred = (scores - mean).masked_fill(~scored, 0.0)
    deviation = ((centred**2).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)).sqrt()
    z = (centred / deviation.clamp(min=1e-9)).masked_fill(~scored, -math.inf)
    return (z / temperature).softmax(1).nan_to_num(1 / scores.shape[1])  # NaN: no candidate has a score


# ------------------------------------------------------------------------------------------------------------
# 3. How good is a score
# ------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The exact, unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1); with k of n it is also the
    oracle that always finds the correct one of k candidates.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2), pass_at_k(4, 0, 4)
    (0.5, 1.0, 0.0)
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"need 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def success_at_k(correct: torch.Tensor, scores: torch.Tensor, k: int) -> torch.Tensor:
    """success@k|N (arXiv 2510.01857): whether any of the k highest scores of N is correct: [Q, N] -> [Q].

    Where equal scores straddle the k-th place, those of them that get in are drawn at random (expected
    value).

    >>> success_at_k(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[3.0, 2.0, 2.0]]), 2)
    tensor([0.5000])
    """
    values = []
    for right, score in zip(correct, scores):  # [N] each
        threshold = score.sort(descending=True).values[k - 1]
        above, tied = score > threshold, score == threshold
        found = bool(right[above].any())
        places = k - int(above.sum())  # left for the tied
        values.append(1.0 if found else pass_at_k(int(tied.sum()), int(right[tied].sum()), places))
    return torch.tensor(values)


def auroc(scores: torch.Tensor, correct: torch.Tensor) -> float:
    """Chance that a correct trace scores above a wrong one, ties counting 1/2: [M], [M] -> one number.

    The rank statistic of Mann & Whitney: (sum of the correct ones' ranks - P(P+1)/2) / (P W), for P correct
    and W wrong traces; equal scores share their mean rank. NaN if all are correct or all are wrong.

    >>> auroc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))  # 4 pairs: 3 in order, one tie
    0.875
    """
    correct = correct.bool()
    right, wrong = int(correct.sum()), int((~correct).sum())
    if right == 0 or wrong == 0:
        return math.nan
    _, group, sizes = scores.unique(return_inverse=True, return_counts=True)  # equal scores, ascending
    ranks = (sizes.cumsum(0) - (sizes - 1) / 2.0).double()[group]  # [M], mean rank of each group, from 1
    return (float(ranks[correct].sum()) - right * (right + 1) / 2) / (right * wrong)


def bootstrap(values: torch.Tensor, draws: int = 1000, seed: int = 0) -> list[float]:
    """[mean, low, high]: the mean over questions with its 95% percentile interval (Efron 1979): [Q] -> three.

    Questions are drawn with replacement, not candidates: samples of one question resemble each other, and an
    interval over all of them would be too narrow.

    >>> bootstrap(torch.ones(5))
    [1.0, 1.0, 1.0]
    """
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return [float(values.mean()), low, high]


# ------------------------------------------------------------------------------------------------------------
# 4. Localisation. Places are columns of the batch, as everywhere (data.Batch).
# ------------------------------------------------------------------------------------------------------------


def suspicious(values: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Which tokens' log-probabilities are too low: [B, T], [B, T] -> [B, T] bool. `ends` is 1 where a value was read."""
    return ends.bool() & (values < reward.SUSPICIOUS)


def predicted_place(values: torch.Tensor, ends: torch.Tensor, rule: str) -> torch.Tensor:
    """The column that a signal points at: [B, T], [B, T] -> [B]. `ends` is 1 where a value was read.

    lowest, highest: there, at the first of equals.
    drop: at t+1 of the largest r_t - r_{t+1}, the token after the fall (the released code of arXiv 2510.01857); t and
    t+1 are neighbours among the values read. A lone value is its own place.
    first: the first `suspicious` value, or else the lowest. For log-probabilities: what follows an error, and does
    not fit it, can look worse than the error itself.

    >>> r, ends = torch.tensor([[9.0, 5.0, 4.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    >>> [predicted_place(r, ends, rule).item() for rule in ("lowest", "highest", "drop")]
    [4, 1, 3]
    >>> predicted_place(torch.tensor([[-0.1, -1.2, -0.3, -3.0]]), torch.ones(1, 4), "first").item()
    1
    """
    read = ends.bool()
    if rule == "first":
        low = suspicious(values, ends)
        return torch.where(low.any(1), low.long().argmax(1), predicted_place(values, ends, "lowest"))
    if rule == "drop":
        columns = torch.arange(values.shape[1], device=values.device)
        latest = torch.where(read, columns, -1).cummax(1).values  # [B, T], the last score read up to t
        before = pad(latest[:, :-1], (1, 0), value=-1)  # ... and up to t-1; -1: none
        change = values - values.gather(1, before.clamp(min=0))  # -(r_t - r_{t+1}), on t+1
        follows = read & (before >= 0)
        return predicted_place(change, torch.where(follows.any(1, keepdim=True), follows, read), "lowest")
    kept = (values if rule == "lowest" else -values).masked_fill(~read, math.inf)
    return kept.argmin(1)


def points_at_first(discriminator) -> bool:
    """Whether a reward is a log-probability per token, of which rule `first` knows which are suspicious."""
    return discriminator.reward_model.scores_all_actions and discriminator.granularity == "dense"


def alarm_rates(values: torch.Tensor, ends: torch.Tensor, correct: torch.Tensor) -> dict:
    """What a log-probability says of a trace by itself, with no others to compare it with: the share of right and of wrong
    traces in which a token is suspicious. [B, T], [B, T], [B] -> {"right": share or None if there are none, "wrong": ..}

    >>> alarm_rates(torch.tensor([[-2.0, 0.0], [-0.1, -0.2]]), torch.ones(2, 2), torch.tensor([0.0, 1.0]))
    {'right': 0.0, 'wrong': 1.0}
    """
    alarm = suspicious(values, ends).any(1).float()
    groups = {"right": alarm[correct > 0], "wrong": alarm[correct == 0]}
    return {name: float(found.mean()) if len(found) else None for name, found in groups.items()}


def near(mask: torch.Tensor, truth: torch.Tensor, within: int) -> torch.Tensor:
    """Which places count as Hit@W: those within W tokens of the true one. [B, T], [B] -> [B, T] bool.

    >>> near(torch.ones(1, 4), torch.tensor([0]), 1)
    tensor([[ True,  True, False, False]])
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    return ((columns - truth[:, None]).abs() <= within) & mask.bool()


def same_step(batch: Batch, truth: torch.Tensor, ends_step: torch.Tensor) -> torch.Tensor:
    """Which places share the step of the true one: [B, T] bool. A token with a newline ends its step."""
    mask = batch.response_mask
    ending = ends_step[batch.tokens] * mask
    step = ending.cumsum(1) - ending  # [B, T], steps that ended before t
    return (step == step.gather(1, truth[:, None])) & mask.bool()


def hit(counts: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """1 where the predicted place is one that counts: [B, T] bool, [B] -> [B].

    >>> hit(torch.tensor([[True, False]]), torch.tensor([1]))
    tensor([0.])
    """
    return counts.gather(1, predicted[:, None]).squeeze(1).float()


def chance(counts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Exact chance that a place drawn evenly from `places` counts: [B, T], [B, T] -> [B].

    >>> chance(torch.tensor([[True, True, False, False]]), torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
    tensor([0.3333])
    """
    return (counts * places).sum(1) / places.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------
# 5. Candidates, and what each model says about their tokens
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Candidates:
    """n responses to each question: consecutive rows of batch, which stays on the CPU, and of texts. Of those that were
    sampled here, log pi of each token, [B, T], and whether each ended by itself, [B]."""

    examples: list[Example]
    batch: Batch
    texts: list[str]
    n: int
    logprobs: torch.Tensor | None = None
    finished: torch.Tensor | None = None

    @cached_property
    def answers(self) -> list[list[str | None]]:
        """The answer of each response: Q lists of n."""
        found = [extract_answer(text) for text in self.texts]
        return [found[i : i + self.n] for i in range(0, len(found), self.n)]

    @cached_property
    def keys(self) -> torch.Tensor:
        """[Q, n], equal where two answers of a question are the same; -1 for no answer."""
        return key_numbers(self.answers, [example.options for example in self.examples])

    @cached_property
    def correct(self) -> torch.Tensor:
        """[Q, n] float, 1 where the answer is right. The verifier: for evaluation only."""
        right = [data.is_correct(self.examples[i // self.n], text) for i, text in enumerate(self.texts)]
        return torch.tensor(right, dtype=torch.float).view(-1, self.n)


def collect(model, tokenizer, examples: list[Example], n: int, max_new_tokens: int, temperature: float = 1.0,
            generator: torch.Generator | None = None, rows: int = 512, prompts=None) -> Candidates:  # fmt: skip
    """Sample n candidates for each example's question, at most `rows` at a time. prompts: other tokens to ask it with than
    data.prompt_ids."""
    prompts = prompts or [data.prompt_ids(tokenizer, example.question) for example in examples]
    rollout = policy.sample(model, prompts, data.end_tokens(tokenizer, model), max_new_tokens, group=n,
                            temperature=temperature, generator=generator, rows=rows)  # fmt: skip
    batch = rollout.batch.to("cpu")
    texts = [data.decode(tokenizer, batch.response(row)) for row in range(len(batch))]
    return Candidates(examples, batch, texts, n, rollout.logprobs.cpu(), rollout.finished.cpu())


def from_texts(tokenizer, examples: list[Example], texts: list[str], n: int) -> Candidates:
    """Candidates that somebody else wrote, as text, each up to its first end token."""
    texts = [data.until_end(tokenizer, text) for text in texts]
    prompts = [data.prompt_ids(tokenizer, example.question) for example in examples for _ in range(n)]
    responses = [data.response_ids(tokenizer, text) for text in texts]
    return Candidates(examples, data.make_batch(prompts, responses), texts, n)


def read_candidates(path: str, n: int | None = None) -> tuple[list[Example], list[str], int, bool]:
    """JSON lines with question, candidates and, if known, answer -> (examples, texts, n, answers known?).

    All lines hold as many candidates as the first one; of more than `n`, the first n are used.
    """
    examples, texts, width, known = [], [], None, False
    for number, line in data.text_lines(path):
        try:
            example, candidates = candidates_record(json.loads(line))
            if width is None:
                width, known = len(candidates), bool(example.answer)
            if len(candidates) != width:
                raise ValueError(f"{len(candidates)} candidates, but the lines before have {width}")
            if bool(example.answer) != known:
                raise ValueError("field 'answer' must be in every line or in none")
            if len(candidates) < (n or 1):
                raise ValueError(f"{len(candidates)} candidates are fewer than --n {n}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
        examples.append(example)
        texts += candidates[: n or width]
    if not examples:
        raise UserError(f"{path} is empty: it needs one JSON object per line, with question and candidates")
    return examples, texts, n or width, known


def candidates_record(record) -> tuple[Example, list[str]]:
    """A JSON object as an Example without a trace, and its candidates.

    >>> candidates_record({"question": "1+2?", "candidates": ["3", "4"], "answer": 3})
    (Example(question='1+2?', trace='', answer='3', options=(), task=''), ['3', '4'])
    """
    if not isinstance(record, dict):
        raise ValueError('not a JSON object: each line needs {"question": .., "candidates": [..]}')
    question, candidates, answer = (record.get(field) for field in ("question", "candidates", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("field 'question' is missing or empty")
    if not isinstance(candidates, list) or not candidates or not all(isinstance(c, str) for c in candidates):
        raise ValueError("field 'candidates' is missing: a list of one or more response texts")
    example = Example(question.strip(), "", "" if answer is None else str(answer).strip())
    for text in (example.question, example.answer, *candidates):
        text.encode()  # half a surrogate pair is legal JSON but no text: a ValueError here, not a crash later
    return example, candidates


@torch.no_grad()
def signals(candidates: Candidates, discriminator: reward.Discriminator | None, policy_model,
            judges: dict | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """What each model says about every response token: name -> [B, T], on the CPU.

    reward       f, where the discriminator reads it (`reward_ends`). A likelihood's f is summed over its
                 segment, as in training. Without a discriminator there is no reward
    logprob      log pi(a_t|s_t) of the policy that wrote the candidates
    entropy      of that policy's choice of token t
    sft_logprob, sft_fair_logprob
                 as logprob, by `judges`: models trained on the demonstrations alone (JUDGES)
    """
    batch = candidates.batch

    def run(model, function) -> torch.Tensor:
        model.eval()
        return policy.in_chunks(lambda part: function(part.to(model.device)).cpu(), batch)

    def f(part: Batch) -> torch.Tensor:  # [B', T]
        scores = discriminator.reward_model.scores(part)
        segments, _, ends = discriminator.segments(part, scores, torch.zeros_like(scores))  # f asks no policy
        return segments * ends

    values = {"logprob": run(policy_model, lambda part: policy.token_logprobs(policy_model, part))}
    values["entropy"] = run(policy_model, lambda part: policy.token_entropies(policy_model, part))
    if discriminator is not None:
        values["reward"] = run(discriminator.reward_model.model, f)
    for name, judge in (judges or {}).items():
        values[name] = run(judge, lambda part: policy.token_logprobs(judge, part))
    for name, value in values.items():
        if not value.isfinite().all():
            raise UserError(f"the {name} of some token is not a finite number: the weights have diverged")
    return values


def reward_ends(batch: Batch, discriminator: reward.Discriminator) -> torch.Tensor:
    """[B, T], 1 where the reward is read."""
    ends_step = discriminator.ends_step.to(batch.tokens.device)
    return reward.segment_ends(batch, discriminator.granularity, discriminator.interval, ends_step)


# ------------------------------------------------------------------------------------------------------------
# 6. Results
# ------------------------------------------------------------------------------------------------------------


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, .. and n itself.

    >>> powers_of_two(12)
    [1, 2, 4, 8, 12]
    """
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def score_table(candidates: Candidates, signals: dict[str, torch.Tensor], ends: torch.Tensor | None, rules,
                default_rule: str, gamma: float) -> dict[str, torch.Tensor]:  # fmt: skip
    """Trace scores by name, each [Q, N]: the length, which asks no model, the mean log-probability, and the reward by
    every rule."""
    mask = candidates.batch.response_mask
    scores = {"longest": mask.sum(1), "shortest": -mask.sum(1)}
    for name in LOGPROBS:
        if name in signals:
            scores[name] = trace_scores(signals[name], mask, "mean")
    if "reward" in signals:
        scores["reward"] = trace_scores(signals["reward"], ends, default_rule, gamma)
        for rule in rules:
            scores[f"reward_{rule}"] = trace_scores(signals["reward"], ends, rule, gamma)
    return {name: values.view(-1, candidates.n) for name, values in scores.items()}


def rerank_results(
    candidates: Candidates, signals: dict[str, torch.Tensor], ends: torch.Tensor | None, ns: list[int],
    rules=RULES, default_rule: str = "mean", gamma: float = GAMMA, seed: int = 0,
) -> dict:  # fmt: skip
    """Accuracy of every way to choose among n candidates, {"4": {"random": [mean, low, high], ..}, ..}, then
    "pass@k", "success@k" (by the reward's default rule) and "auroc" (all candidates of all questions pooled).

    random: an even draw. oracle: right if any of the n is. Every other way lies below the oracle, and is
    of use if it lies above the draw.
    """
    scores = score_table(candidates, signals, ends, rules, default_rule, gamma)
    voters = {"weighted_majority": "reward"} if "reward" in scores else {}
    results = choice_results(candidates.correct, candidates.keys, scores, ns, voters, seed)
    if "reward" in scores:
        success = lambda k: bootstrap(success_at_k(candidates.correct, scores["reward"], k), seed=seed)
        results["success@k"] = {str(k): success(k) for k in ns}
    return results


def choice_results(correct: torch.Tensor, keys: torch.Tensor, scores: dict[str, torch.Tensor], ns: list[int],
                   voters: dict[str, str], seed: int = 0) -> dict:  # fmt: skip
    """`rerank_results` of trace scores, each [Q, N], whoever gave them. voters: weighted vote -> the score that weighs."""
    total, right = correct.shape[1], correct.sum(1).int().tolist()  # c of pass@k, per question

    def interval(values: torch.Tensor) -> list[float]:
        return bootstrap(values, seed=seed)

    found = {n: interval(torch.tensor([pass_at_k(total, c, n) for c in right])) for n in ns}
    results: dict = {}
    for n in ns:
        row = {"random": interval(correct.mean(1))}
        row["majority"] = interval(majority_vote(correct, keys, n, seed=seed))
        row |= {name: interval(best_of_n(correct, values, n)) for name, values in scores.items()}
        for name, weighs in voters.items():
            row[name] = interval(majority_vote(correct, keys, n, vote_weights(scores[weighs]), seed=seed))
        results[str(n)] = row | {"oracle": found[n]}
    results["pass@k"] = {str(n): found[n] for n in ns}
    areas = {name: auroc(values.flatten(), correct.flatten()) for name, values in scores.items()}
    results["auroc"] = {name: None if math.isnan(area) else area for name, area in areas.items()}
    return results


def natural_errors(candidates: Candidates, tokenizer, ends: tuple[int, ...]) -> torch.Tensor:
    """Column of the first wrong token of each candidate for an embedded problem: [B], -1 where there is none.

    Only traces with a wrong answer count. A trace that the length limit cut off before any error has none.
    """
    places = []
    for row, text in enumerate(candidates.texts):
        question, sample = divmod(row, candidates.n)
        wrong = not candidates.correct[question, sample]
        offset = data.first_error(candidates.examples[question], text) if wrong else None
        ids = candidates.batch.response(row)
        if offset is None or (offset >= len(text) and ids[-1] not in ends):
            places.append(-1)
        else:
            places.append(int(candidates.batch.prompt_lengths[row]) + data.token_at(tokenizer, ids, offset))
    return torch.tensor(places, dtype=torch.long)


def perturbed_experts(tokenizer, examples: list[Example], rng: random.Random):
    """Expert traces with one thing broken: (Candidates, first changed column [B], question [B])."""
    chosen, responses, places, questions = [], [], [], []
    for i, example in enumerate(examples):
        prompt_length = len(data.prompt_ids(tokenizer, example.question))
        for ids, first_changed in reward.perturbed_negatives(tokenizer, example, PERTURBED_PER_EXPERT, rng):
            chosen.append(example)
            responses.append(ids)
            places.append(prompt_length + first_changed)
            questions.append(i)
    prompts = [data.prompt_ids(tokenizer, example.question) for example in chosen]
    texts = [data.decode(tokenizer, ids) for ids in responses]
    candidates = Candidates(chosen, data.make_batch(prompts, responses), texts, 1)
    return candidates, torch.tensor(places, dtype=torch.long), torch.tensor(questions, dtype=torch.long)


def place_results(
    batch: Batch, truth: torch.Tensor, questions: torch.Tensor, signals: dict[str, torch.Tensor],
    ends: torch.Tensor, ends_step: torch.Tensor, seed: int = 0, likelihood: bool = True,
) -> dict:  # fmt: skip
    """{"hit0": {signal: [mean, low, high], ..}, "hit1": .., "step": .., "count": B} for B traces.

    truth [B]: the column of the first error. questions [B]: traces of one are averaged before the bootstrap.

    Signals: reward and LOGPROBS (lowest), the same with _first (of log-probabilities: a reward that is
    none, a linear head's, has no such), reward_drop, entropy (highest). chance draws
    from all tokens of the trace; chance_reward from those where the reward is read, the same if it is dense.
    """
    if len(truth) == 0:
        return {"count": 0}
    mask = batch.response_mask
    predicted = {}
    if "reward" in signals:
        predicted["reward"] = predicted_place(signals["reward"], ends, "lowest")
        predicted["reward_drop"] = predicted_place(signals["reward"], ends, "drop")
        if likelihood:
            predicted["reward_first"] = predicted_place(signals["reward"], ends, "first")
    for name in LOGPROBS:
        if name in signals:
            predicted[name] = predicted_place(signals[name], mask, "lowest")
            predicted[f"{name}_first"] = predicted_place(signals[name], mask, "first")
    if "entropy" in signals:
        predicted["entropy"] = predicted_place(signals["entropy"], mask, "highest")

    def interval(values: torch.Tensor) -> list[float]:
        return bootstrap(torch.stack([values[questions == q].mean() for q in questions.unique()]), seed=seed)

    results: dict = {"count": len(truth)}
    in_step = same_step(batch, truth, ends_step)
    for name, counts in (("hit0", near(mask, truth, 0)), ("hit1", near(mask, truth, 1)), ("step", in_step)):
        results[name] = {signal: interval(hit(counts, place)) for signal, place in predicted.items()}
        results[name]["chance"] = interval(chance(counts, mask))
        if "reward" in signals:
            results[name]["chance_reward"] = interval(chance(counts, ends))
    return results


def localise_results(candidates: Candidates, values: dict[str, torch.Tensor], tokenizer, discriminator,
                     policy_model, judges=None, seed: int = 0) -> dict:  # fmt: skip
    """{"natural": .., "single": ..}, each from `place_results`.

    natural: the wrong ones among the candidates, which answer embedded problems; `values` are their `signals`.
    single: experts' traces with a single thing broken, the synthetic test of arXiv 2510.01857 v2. It is
    another task: the rest of the trace stays as it was, and a later line that no longer fits can look worse
    than the error. A natural error is carried on, and is what the policy believes.
    """
    ends_step = discriminator.ends_step.cpu()
    truth = natural_errors(candidates, tokenizer, data.end_tokens(tokenizer, policy_model))
    rows = (truth >= 0).nonzero().squeeze(-1)  # [W], the traces with an error to find
    batch = candidates.batch[rows]
    kept = {name: value[rows, : batch.tokens.shape[1]] for name, value in values.items()}
    ends = reward_ends(batch, discriminator)
    likelihood = points_at_first(discriminator)
    natural = place_results(batch, truth[rows], rows // candidates.n, kept, ends, ends_step, seed, likelihood)

    rng = random.Random(f"broken {seed}")
    broken, truth, questions = perturbed_experts(tokenizer, candidates.examples, rng)
    single: dict = {"count": 0}
    if len(truth):
        kept = signals(broken, discriminator, policy_model, judges)
        ends = reward_ends(broken.batch, discriminator)
        single = place_results(broken.batch, truth, questions, kept, ends, ends_step, seed, likelihood)
    return {"natural": natural, "single": single}


def assess(candidates: Candidates, discriminator, policy_model, judges: dict, tokenizer, settings) -> dict:
    """What a reward is worth at inference: {"rerank": .., "distributions": .., "alarms": .., for an embedded task "localise": ..}.

    settings: anything with rule, seed and data. distributions: the scores of right and of wrong traces.
    """
    values = signals(candidates, discriminator, policy_model, judges)
    ends = reward_ends(candidates.batch, discriminator)
    ns = powers_of_two(candidates.n)
    ranking = rerank_results(candidates, values, ends, ns, RULES, settings.rule, seed=settings.seed)
    scores, right = trace_scores(values["reward"], ends, settings.rule), candidates.correct.flatten() > 0
    results = {"rerank": ranking}
    results["distributions"] = {"right": scores[right].tolist(), "wrong": scores[~right].tolist()}
    readings = {name: (values[name], candidates.batch.response_mask) for name in LOGPROBS if name in values}
    if points_at_first(discriminator):
        readings["reward"] = values["reward"], ends
    results["alarms"] = {name: alarm_rates(*reading, candidates.correct.flatten()) for name, reading in readings.items()}
    if settings.data in data.EMBEDDED:
        results["localise"] = localise_results(
            candidates, values, tokenizer, discriminator, policy_model, judges, settings.seed
        )
    return results


@torch.no_grad()
def show_traces(candidates: Candidates, discriminator, policy_model, tokenizer, settings, count=24) -> list:
    """Some traces with the logit of D for each token (positive: the expert's), for report.py.

    Of each question one right and one wrong trace, where there are. The predicted place is that of the first suspicious
    token, if any, for a likelihood per token; for other rewards that of the lowest f.
    """
    rows: list[int] = []
    for question, right in enumerate(candidates.correct):
        for kind in (1.0, 0.0):
            rows += [question * candidates.n + i for i in (right == kind).nonzero().flatten().tolist()[:1]]
    rows = rows[:count]
    texts = [candidates.texts[row] for row in rows]
    examples = [candidates.examples[row // candidates.n] for row in rows]
    shown = Candidates(examples, candidates.batch[rows], texts, 1)
    values, ends = signals(shown, discriminator, policy_model), reward_ends(shown.batch, discriminator)
    likelihood = points_at_first(discriminator)
    places = predicted_place(values["reward"], ends, "first" if likelihood else "lowest")
    pointed = suspicious(values["reward"], ends).any(1) | (not likelihood)
    batch = shown.batch.to(policy_model.device)
    with torch.no_grad():
        scores = discriminator.reward_model.scores(batch)
    logits = discriminator.logits(batch, scores, values["logprob"].to(scores.device)).cpu()
    wrong = torch.full((len(rows),), -1)
    if settings.data in data.EMBEDDED:
        wrong = natural_errors(shown, tokenizer, data.end_tokens(tokenizer, policy_model))
    traces = []
    for i, example in enumerate(shown.examples):
        first, last = int(shown.batch.prompt_lengths[i]), int(shown.batch.lengths[i])
        scored = zip(logits[i, first:last].tolist(), ends[i, first:last].tolist())
        traces.append({
            "question": example.question, "source": "policy", "correct": bool(shown.correct[i, 0]),
            "answer": shown.answers[i][0], "tokens": [tokenizer.decode([t]) for t in shown.batch.response(i)],
            "rewards": [value if read else None for value, read in scored],
            "predicted": int(places[i]) - first if pointed[i] else None,
            "first_wrong": int(wrong[i]) - first if wrong[i] >= 0 else None,
        })  # fmt: skip
    return traces


# ------------------------------------------------------------------------------------------------------------
# 7. The command line
# ------------------------------------------------------------------------------------------------------------


def load_judges(run: Path, tokenizer, temperature: float, device, dtype=torch.float32) -> dict:
    """The JUDGES that this run has trained: signal -> model. temperature: its settings' fair_temperature.

    Fair SFT's policy has its logits divided by that, which would distort the log-probability of a trace as a whole. As
    IRL's f is the averaged reward before its logits are divided by alpha, the judge is the averaged model before it.
    """
    judges = {}
    for signal, name in JUDGES.items():
        if (run / name).is_dir():
            judges[signal] = loading.load_policy(str(run / name), device, dtype)[0]
            loading.check_same_tokenizer(tokenizer, str(run / name))
            if name == "sft_fair":
                policy.divide_logits(judges[signal], 1 / temperature)
    return judges


def models_of_run(run: Path, policy_name: str, device):
    """(policy model, tokenizer, discriminator, judges, settings) of a run's folder."""
    discriminator, tokenizer, settings = load_run(run, device)
    named = {"base": settings["model"], "run": str(run / "policy")}
    name = named.get(policy_name, policy_name)
    policy_model, _ = loading.load_policy(name, device)
    loading.check_same_tokenizer(tokenizer, name)
    judges = load_judges(run, tokenizer, settings["fair_temperature"], device)
    return policy_model, tokenizer, discriminator, judges, settings


def show_choices(candidates: Candidates, scores: torch.Tensor) -> str:
    """The candidate with the highest score of each question, for questions whose answer nobody knows."""
    parts = []
    for i, (example, row) in enumerate(zip(candidates.examples, scores)):
        best = int(row.argmax())
        answer = candidates.answers[i][best]
        found = f"candidate {best + 1} of {candidates.n}, score {row[best]:.3f}, answer {answer}"
        parts.append(f"{example.question}\n{found}:\n{candidates.texts[i * candidates.n + best].strip()}")
    return printable("\n\n".join(parts))


def check_context(candidates: Candidates, context: int) -> None:
    """Raise if a candidate with its question is longer than the models can read."""
    length, row = (int(value) for value in candidates.batch.lengths.max(0))
    if length > context:
        question, sample = divmod(row, candidates.n)
        raise UserError(
            f"candidate {sample + 1} of question {question + 1} is {length} tokens long with its "
            f"question, but the models read at most {context}"
        )


def demo(args) -> None:
    """What can be chosen without a reward: the shipped base on `words`, beside what an oracle would reach."""
    n, device = args.n or 16, loading.pick_device(args.device)
    model, tokenizer = loading.load_policy(loading.BASE, device)
    examples = data.load_examples("words", "test", args.questions or 40, args.seed)
    sampling = (64, args.temperature, torch.Generator(device).manual_seed(args.seed), args.rows)
    candidates = collect(model, tokenizer, examples, n, *sampling)
    values = signals(candidates, None, model)
    results = rerank_results(candidates, values, None, powers_of_two(n), seed=args.seed)
    print(f"The shipped base, {n} samples for each of {len(examples)} test questions of words\n")
    print(show_results({"rerank": results}))
    print("\nThe base is confidently wrong: neither its votes nor its log-probability come near the oracle."
          "\nA reward closes part of the gap: make one with train.py, then rerank.py --run RUN")  # fmt: skip


def rerank_run(args) -> None:
    """Score sampled or given candidates with a run's reward, and print what it is worth."""
    run = Path(args.run)
    given = read_candidates(args.candidates, args.n) if args.candidates else None
    device = loading.pick_device(args.device)
    policy_model, tokenizer, discriminator, judges, settings = models_of_run(run, args.policy, device)
    models = (policy_model, discriminator.reward_model.model, *judges.values())
    context = min(loading.context_length(model) for model in models)
    known = True
    if given:
        examples, texts, n, known = given
        candidates = from_texts(tokenizer, examples, texts, n)
        tokens = int(candidates.batch.response_mask.sum())
        print(f"{args.candidates} is text, whoever wrote it: {tokens} tokens of the run's own tokenizer are judged")
        check_context(candidates, context)
    else:
        n, new_tokens = args.n or 16, settings["max_new_tokens"]
        words = (settings["words_steps"], settings["words_largest"])
        examples = data.load_examples(settings["data"], "test", args.questions or 100, args.seed, *words)
        examples, dropped = data.fit_context(tokenizer, examples, context, new_tokens)
        if dropped:
            print(f"{dropped} questions are too long for the models' context of {context} tokens: skipped")
        sampling = (new_tokens, args.temperature, torch.Generator(device).manual_seed(args.seed), args.rows)
        candidates = collect(policy_model, tokenizer, examples, n, *sampling)
    if not known:
        ends = reward_ends(candidates.batch, discriminator)
        scores = trace_scores(signals(candidates, discriminator, policy_model)["reward"], ends, args.rule)
        print(show_choices(candidates, scores.view(-1, n)))
        return
    # Given candidates come without an expert's trace: there is nothing to find first errors with.
    settings = argparse.Namespace(rule=args.rule, seed=args.seed, data="" if given else settings["data"])
    results = assess(candidates, discriminator, policy_model, judges, tokenizer, settings)
    print(f"{len(examples)} questions, {n} candidates each; mean and 95% interval over questions; "
          f"a trace's reward is its {args.rule}\n")  # fmt: skip
    print(show_results(results))
    if args.out:
        try:
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.out}: {error}") from None


def check_arguments(args) -> None:
    """One clear line for each value that makes no sense, before anything is loaded."""
    check_rule(args.rule)
    for name in ("n", "questions", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature must be 0 (greedy) or a positive number, not {args.temperature}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be between 0 and 2^63 - 1, not {args.seed}")
    if args.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"no device '{args.device}': auto, cpu, cuda or mps")
    for name in ("candidates", "policy", "out"):
        if args.run is None and getattr(args, name) not in (None, "base"):
            raise UserError(f"--{name} needs a trained reward: give --run too")


def main(argv: list[str] | None = None) -> None:
    """Parse, check, run. Raises UserError for bad input."""
    parser = Parser(__doc__)
    parser.add_argument("--run", help="folder of a run of train.py; without it, a demonstration")
    parser.add_argument("--n", type=int, help="candidates per question (default 16, or all of the file's)")
    parser.add_argument("--questions", type=int, help="test questions (default 100; 40 in the demonstration)")
    parser.add_argument("--candidates", metavar="FILE", help="JSON lines with question, candidates, answer")
    parser.add_argument("--rule", default="mean", help="the reward's trace score: " + ", ".join(RULES))
    parser.add_argument("--policy", default="base", help="who samples: base (the run's), run, or a folder")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy")
    parser.add_argument("--rows", type=int, default=512, help="responses sampled at a time (memory)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--seed", type=int, default=0, help="of the questions, the samples and the intervals")
    args = parser.parse(argv)
    check_arguments(args)
    loading.quiet()
    if args.run is None:
        demo(args)
    else:
        rerank_run(args)


if __name__ == "__main__":
    sys.exit(exit_status(main))
