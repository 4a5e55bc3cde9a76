"""The reward at inference: keep the best of n samples, and point at the first wrong token.

Algorithm 1 (arXiv 2510.01857) ends with a reward. In irl.py a policy is trained on it; this file
has its two other uses, and trains nothing. Who wrote the candidates, and what each model says about
their tokens, is in candidates.py.

    equation or rule                   source                  function         tests/test_rerank.py
    mean r of a trace; last, lowest    2510.01857 v2: mean     trace_scores     trace_scores_by_hand
    sum_i c_i C(N-1-i, n-1) / C(N, n)  counted: all subsets    best_of_n        best_of_n_is_..
    votes, alike or weighted by r      2203.11171, 2206.02336  majority_vote    majority_enumerate..
    1 - C(n-c, k) / C(n, k)            2107.03374 eq. 1        pass_at_k        pass_at_k_is_..
    P(a right one scores higher)       Mann, Whitney 1947      auroc            auroc_is_..
    largest r_t - r_{t+1}              2510.01857, its code    predicted_place  predicted_place_by..
    Hit@W, beside exact chance         2510.01857 v2           place_results    place_results_by..

    python rerank.py                                 what can be chosen without a reward; seconds
    python rerank.py --run runs/demo --n 16          what a run's reward makes of samples
    python rerank.py --run runs/demo --candidates mine.jsonl
                                                     ... or of your texts: on each line {"question":
                                                     .., "candidates": [..], "answer": ..,
                                                     "options": [..]}, the last two if there are
                                                     any; without an answer the chosen ones
"""

import argparse
import itertools
import math
import random
import sys
from pathlib import Path

import torch

import data
import policy
import reward
from candidates import (
    Candidates,
    Reading,
    collect,
    from_texts,
    natural_errors,
    per_token_likelihood,
    signals,
    without_cut_off,
)
from engine import loading
from engine.chat import check_text, set_date
from engine.errors import Parser, UserError, exit_status
from engine.runs import read_settings
from engine.settings import DEVICES, check_values
from negatives import perturbed_negatives
from show.tables import show_choices, show_results
from tasks import countdown, records
from tasks.answers import group_answers

# How the scores of a trace's tokens become one score: `trace_scores`
RULES = ("mean", "last", "lowest")
# Models trained on the demonstrations alone, whose log-probability is the baseline to beat:
# signal -> folder of a run
JUDGES = {"sft_logprob": "sft", "sft_fair_logprob": "sft_fair"}
LOGPROBS = ("logprob", *JUDGES)
# Of 1, 1/2 and 1/4 the best on validation questions of words
VOTE_TEMPERATURE = 0.25
# A majority vote is averaged over so many subsets of n candidates, where there are more
VOTE_SUBSETS = 20
# Broken copies of each expert's trace in the synthetic test of localisation
PERTURBED_PER_EXPERT = 4
RANGES = {"n": (1, 10**6), "questions": (1, 10**9), "seed": (0, 2**63 - 1)}

# 1. Choosing. [Q, N]: N candidates for each of Q questions. ---------------------------------------
# Each rule returns [Q]: the chance that its choice is right, where ties and subsets are drawn.


def trace_scores(values: torch.Tensor, read: torch.Tensor, rule: str) -> torch.Tensor:
    """Scores of tokens to one score per trace: [B, T], [B, T] -> [B]. `read` is 1 where one is."""
    # mean, the paper's: r_bar = 1/K sum_k r_k of the K scores that were read.
    # lowest: a trace is as good as its worst step. last: what a score per trace amounts to.
    read = read.bool()
    # Whatever stands elsewhere, NaN too, has no say.
    kept = values.masked_fill(~read, 0.0)
    if rule == "mean":
        scores = kept.sum(1) / read.sum(1).clamp(min=1)
    elif rule == "last":
        last = (read * torch.arange(read.shape[1])).amax(1, keepdim=True)  # [B, 1]
        scores = kept.gather(1, last).squeeze(1)
    else:
        scores = kept.masked_fill(~read, math.inf).amin(1)
    # A trace without a score is never chosen before one that has.
    return scores.masked_fill(~read.any(1), -math.inf)


def best_of_n(correct: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """Accuracy of the best of n by score, expected over all n-subsets of N: [Q, N] -> [Q].

    >>> correct, scores = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.9, 0.5]])
    >>> best_of_n(correct, scores, 2)  # of the three pairs, one has a right winner
    tensor([0.3333])
    """
    total = scores.shape[1]
    # Equal scores are broken at random: each item counts with the mean of `correct` over its tie.
    tied = (scores[:, :, None] == scores[:, None, :]).double()  # [Q, N, N]
    fair = (tied * correct[:, None, :]).sum(-1) / tied.sum(-1)  # [Q, N]
    # Sorted by score, the item at rank i is the best of a subset that holds it and n-1 of the
    # N-1-i items below it:  E[correct] = sum_i correct_i C(N-1-i, n-1) / C(N, n)
    order = scores.argsort(dim=1, descending=True)
    chance = [math.comb(total - 1 - i, n - 1) / math.comb(total, n) for i in range(total)]
    return (fair.gather(1, order) * torch.tensor(chance, dtype=torch.double)).sum(1).float()


def answer_keys(answers: list[list[str | None]], options: list[tuple[str, ...]]) -> torch.Tensor:
    """Answers as integers to vote with: [Q, N] long, equal for the same answer, -1 for none.

    >>> answer_keys([["1,200", "$1200.00", None], ["B", "aorta", "B12"]], [(), ("Heart", "Aorta")])
    tensor([[ 0,  0, -1],
            [ 0,  0,  2]])
    """
    # An answer that names one of the question's options, by letter or by text, is that option: "B"
    # and "aorta" vote together.
    rows = [group_answers(row, names) for row, names in zip(answers, options)]
    return torch.tensor(rows, dtype=torch.long)


def majority_vote(
    correct: torch.Tensor,
    keys: torch.Tensor,
    n: int,
    weights: torch.Tensor | None = None,
    draws: int = VOTE_SUBSETS,
    seed: int = 0,
) -> torch.Tensor:
    """Accuracy of the answer that weighs most among n of the N candidates: [Q, N] -> [Q]."""
    # Without weights this is self-consistency (arXiv 2203.11171), with them a weighted vote
    # (2206.02336); 2510.01857 takes the reward as the weight.
    questions, total = keys.shape
    if weights is None:
        weights = torch.full(keys.shape, 1.0 / total)
    # The mean over all subsets of n, or over `draws` random ones, drawn for each question apart.
    if math.comb(total, n) <= draws:
        subsets = [
            torch.tensor(columns).expand(questions, n)
            for columns in itertools.combinations(range(total), n)
        ]
    else:
        generator = torch.Generator().manual_seed(seed)
        subsets = [
            torch.rand(questions, total, generator=generator).argsort(1)[:, :n]
            for _ in range(draws)
        ]
    results = []
    for columns in subsets:  # [Q, n]
        key = keys.gather(1, columns)
        weight = weights.gather(1, columns)
        same = (key[:, :, None] == key[:, None, :]).double()  # [Q, n, n]
        # An answer's weight is the sum over all who give it, weight_i counting for each j alike.
        # No answer wins only where nobody has one.
        votes = (same * weight[:, None, :]).sum(-1).masked_fill(key < 0, -1.0)  # [Q, n]
        # Ties are broken at random, and rounding must not break them.
        wins = votes >= votes.amax(1, keepdim=True) - 1e-9
        # A winning answer counts once, however many candidates gave it.
        share = wins / same.sum(-1)
        right = (share * correct.gather(1, columns)).sum(1)
        results.append((right / share.sum(1)).float())
    return torch.stack(results).mean(0)


def vote_weights(scores: torch.Tensor) -> torch.Tensor:
    """Softmax within the question of its standardised trace scores / temperature: [Q, N]."""
    # Standardised, because a reward has no unit: between right and wrong a mean log-probability
    # differs by a tenth, a sum by tens. A plain softmax would be the plain vote for one, and
    # best-of-n for the other.
    scores = scores.masked_fill(~scores.isfinite(), math.nan)  # without a say
    centred = scores - scores.nanmean(1, keepdim=True)
    z = centred / (centred**2).nanmean(1, keepdim=True).sqrt().clamp(min=1e-9)
    weights = (z.nan_to_num(-math.inf) / VOTE_TEMPERATURE).softmax(1)
    return weights.nan_to_num(1 / scores.shape[1])  # NaN: no candidate has a score


# 2. How good is a score ---------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one.

    >>> pass_at_k(4, 1, 2), pass_at_k(4, 3, 2), pass_at_k(4, 0, 4)
    (0.5, 1.0, 0.0)
    """
    # All k are wrong in C(n-c, k) of C(n, k) subsets: the unbiased estimator of Chen et al. 2021.
    # (1 - (1 - c/n)^k, which draws with repeats, is too low.) So often an oracle finds a correct
    # one among k candidates.
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def auroc(scores: torch.Tensor, correct: torch.Tensor) -> float | None:
    """Chance that a correct trace scores above a wrong one, ties counting 1/2: [M], [M] -> one.

    >>> auroc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))  # 4 pairs, one tie
    0.875
    """
    # Of all pairs of a right and a wrong one. 0.5 is chance; no threshold has to be chosen.
    right = scores[correct > 0][:, None]  # [P, 1]
    wrong = scores[correct == 0]  # [W]
    pairs = right.numel() * wrong.numel()
    won = int((right > wrong).sum()) + int((right == wrong).sum()) / 2
    return won / pairs if pairs else None


def auroc_within(scores: torch.Tensor, correct: torch.Tensor) -> list[float] | None:
    """Mean of the questions' own AUROCs, [Q, N] both, as [mean, low, high]."""
    # Over all candidates pooled, a score that knows hard questions from easy ones looks good.
    # Here it must rank one question's candidates. Only questions with right and wrong ones count.
    areas = [area for area in map(auroc, scores, correct) if area is not None]
    return bootstrap(torch.tensor(areas)) if areas else None


def bootstrap(values: torch.Tensor, draws: int = 1000, seed: int = 0) -> list[float]:
    """[mean, low, high]: the mean over questions with its 95% interval (Efron 1979). [Q] in."""
    # Questions are drawn again, not candidates: those of one question resemble each other, and the
    # interval would be too narrow.
    # The 2.5th and 97.5th percentile of the means of `draws` samples of as many questions.
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    return [float(values.mean()), *values[drawn].mean(1).quantile(ends).tolist()]


# 3. Where a trace first goes wrong. Places are columns of the batch (data.Batch) ------------------


def predicted_place(values: torch.Tensor, read: torch.Tensor, rule: str) -> torch.Tensor:
    """The column that a signal points at: [B, T], [B, T] -> [B]. `read` is 1 where it was read.

    >>> r, read = torch.tensor([[9, 5, 4, -1.2, -3]]), torch.tensor([[0, 1, 1, 1, 1]])
    >>> [predicted_place(r, read, rule).item() for rule in ("lowest", "drop", "first")]
    [4, 3, 3]
    """
    read = read.bool()
    # lowest: the first of equals
    lowest = values.masked_fill(~read, math.inf).argmin(1)
    if rule == "first":
        # the first suspicious one, or else the lowest. For log-probabilities: what follows an
        # error, and does not fit it, can look worse than the error itself.
        low = read & (values < reward.SUSPICIOUS)
        return torch.where(low.any(1), low.long().argmax(1), lowest)
    if rule == "drop":
        # t+1 of the largest r_t - r_{t+1}, the token after the fall (the paper's released code);
        # t and t+1 are neighbours among the values read. A lone value is its own place.
        columns = torch.arange(read.shape[1])
        latest = torch.where(read, columns, -1).cummax(1).values  # [B, T], last one read up to t
        before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)  # .. up to t-1; -1: none
        change = values - values.gather(1, before.clamp(min=0))  # r_{t+1} - r_t, on t+1
        follows = read & (before >= 0)
        falls = change.masked_fill(~follows, math.inf).argmin(1)
        return torch.where(follows.any(1), falls, lowest)
    return lowest


def place_results(
    batch: data.Batch,
    truth: torch.Tensor,
    questions: torch.Tensor,
    readings: dict[str, Reading],
    likelihood: bool = True,
    seed: int = 0,
) -> dict:
    """How often each signal points at the error: Hit@W, within W tokens of it.

    -> {"count": traces, "hit0": {signal and rule: [mean, low, high], ..}, "hit1"}
    """
    # truth [B]: the column of the first error; with -1 a trace is left out. questions [B]: of which
    # question each trace is. likelihood: whether f is a log-probability.
    mask = batch.response_mask
    wrong = truth >= 0
    results: dict = {"count": int(wrong.sum())}
    if not wrong.any():
        return results
    places = {}  # signal and rule -> [B, T]: 1 on the place that is pointed at
    for name, (values, read) in readings.items():
        for rule in ("lowest", "drop", "first"):
            label = name if rule == "lowest" else f"{name}_{rule}"
            place = predicted_place(values, read, rule)
            # One score a trace points nowhere.
            if read.sum(1).max() > 1:
                places[label] = torch.nn.functional.one_hot(place, mask.shape[1])
    # A head's f has no unit, and no bound to fall below.
    if not likelihood:
        places.pop("reward_first", None)
    # Chance draws evenly from all tokens of the trace.
    places["chance"] = mask
    distance = (torch.arange(mask.shape[1]) - truth[:, None]).abs()  # [B, T]
    # Traces of one question are averaged before the bootstrap, which draws questions.
    groups = [wrong & (questions == q) for q in questions[wrong].unique()]  # [B] each
    for within in (0, 1):
        hits = {}
        for label, place in places.items():
            near = (distance <= within) * place
            share = near.sum(1) / place.sum(1).clamp(min=1)  # [B]
            means = torch.stack([share[rows].mean() for rows in groups])  # [questions]
            hits[label] = bootstrap(means, seed=seed)
        results[f"hit{within}"] = hits
    return results


# 4. Results ---------------------------------------------------------------------------------------


def choice_results(
    correct: torch.Tensor,
    keys: torch.Tensor,
    scores: dict[str, torch.Tensor],
    voters: dict[str, str],
    seed: int = 0,
) -> dict:
    """Accuracy of every way to choose among n = 1, 2, 4, .. N candidates.

    -> {"4": {"random": [mean, low, high], ..}, .., "beyond", "auroc", "auroc_within"}
    """
    # scores: name -> [Q, N]. voters: name of a weighted vote -> the score that weighs in it.
    total = correct.shape[1]
    n_right = correct.sum(1).int().tolist()
    results: dict = {}
    for n in [2**i for i in range(total.bit_length()) if 2**i < total] + [total]:
        # A way is of use if it lies above random, an even draw. None lies above the oracle, which
        # is right if any of the n is: pass@n.
        row = {"random": correct.mean(1), "majority": majority_vote(correct, keys, n, seed=seed)}
        for name, values in scores.items():
            row[name] = best_of_n(correct, values, n)
        for name, score in voters.items():
            weights = vote_weights(scores[score])
            row[name] = majority_vote(correct, keys, n, weights, seed=seed)
        row["oracle"] = torch.tensor([pass_at_k(total, c, n) for c in n_right])
        results[str(n)] = {name: bootstrap(values, seed=seed) for name, values in row.items()}
    # What a way gains over random with all N. Both are right or wrong on the same questions, hard
    # ones and easy ones: the interval of the difference per question is narrower than two
    # intervals side by side.
    chance = row.pop("random")
    results["beyond"] = {name: bootstrap(right - chance, seed=seed) for name, right in row.items()}
    pooled = correct.flatten()
    results["auroc"] = {name: auroc(values.flatten(), pooled) for name, values in scores.items()}
    within = {name: auroc_within(values, correct) for name, values in scores.items()}
    results["auroc_within"] = within
    return results


def rerank_results(candidates: Candidates, readings: dict[str, Reading], seed: int = 0) -> dict:
    """`choice_results` by length, by mean log-probabilities, and by the reward: its mean is
    "reward", and the other RULES stand beside it."""
    # Length asks no model. A score that is no better than "the longest" has learnt nothing else.
    length = candidates.batch.response_mask.sum(1)
    scores = {"longest": length, "shortest": -length}
    for name in LOGPROBS:
        if name in readings:
            scores[name] = trace_scores(*readings[name], "mean")
    voters = {}
    if "reward" in readings:
        # One that was cut off by the length limit ranks below all that have ended.
        reading = without_cut_off(readings["reward"], candidates)
        for rule in RULES:
            label = "reward" if rule == "mean" else f"reward_{rule}"
            scores[label] = trace_scores(*reading, rule)
        voters["weighted_majority"] = "reward"
    scores = {name: values.view(-1, candidates.n) for name, values in scores.items()}
    # Answers are compared with each other, never with the true one.
    keys = answer_keys(candidates.answers, [example.options for example in candidates.examples])
    return choice_results(candidates.correct, keys, scores, voters, seed)


def assess(
    candidates: Candidates, discriminator, policy_model, judges: dict, tokenizer, seed: int = 0
) -> dict:
    """What a reward is worth at inference: {"rerank", "distributions", "localise"}."""
    # No verifier takes part in choosing. The true answer is read only to say how often the choice
    # was right.
    batch = candidates.batch
    examples = candidates.examples
    # The base's log-probability and those of the SFT models are what a reward has to beat: they
    # come from the same demonstrations, or from none.
    readings = signals(batch, discriminator, policy_model, judges)
    results = {"rerank": rerank_results(candidates, readings, seed)}
    if discriminator is None:
        return results
    scores = trace_scores(*without_cut_off(readings["reward"], candidates), "mean")
    right = candidates.correct.flatten() > 0
    scored = scores.isfinite()  # a trace that was cut off may have no score
    results["distributions"] = {
        "right": scores[right & scored].tolist(),
        "wrong": scores[~right & scored].tolist(),
    }
    # Candidates from a file have no expert's trace beside them.
    if examples[0].task and examples[0].trace:
        likelihood = per_token_likelihood(discriminator)
        # natural: the wrong ones among the candidates. Their errors are carried on.
        truth = natural_errors(candidates, tokenizer, data.end_tokens(tokenizer, policy_model))
        questions = torch.arange(len(batch)) // candidates.n
        natural = place_results(batch, truth, questions, readings, likelihood, seed)
        # single: experts' traces with one thing broken, the synthetic test of 2510.01857 v2. The
        # rest of the trace stays as it was, so a later line can look worse than the error.
        rng = random.Random(f"broken {seed}")
        rows = []
        for question, expert in enumerate(data.tokenize(tokenizer, examples)):
            copies = perturbed_negatives(tokenizer, expert, PERTURBED_PER_EXPERT, rng)
            for response, first in copies:
                rows.append((expert.prompt, response, len(expert.prompt) + first, question))
        prompts, responses, truth, questions = zip(*rows)
        batch = data.make_batch(prompts, responses)
        readings = signals(batch, discriminator, policy_model, judges)
        places = (torch.tensor(truth), torch.tensor(questions))
        single = place_results(batch, *places, readings, likelihood, seed)
        results["localise"] = {"natural": natural, "single": single}
    return results


# 5. The command line ------------------------------------------------------------------------------


def read_candidates(path: str, n: int | None = None) -> tuple[list[data.Example], list[str], int]:
    """JSON lines with question, candidates, maybe answer and options: (examples, texts, n)."""
    # Of each line the first n candidates, or all. UserError names the line that is wrong.
    examples: list[data.Example] = []
    rows: list[list[str]] = []

    def read(record: dict) -> None:
        question = records.field(record, "question", needed=True)
        answer = records.field(record, "answer") or ""
        texts = record.get("candidates")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("field 'candidates' is missing: a list of one or more response texts")
        # countdown's checker reads the lines of a response, too; elsewhere the answer decides.
        task = "countdown" if countdown.is_question(question) else ""
        options, answer = records.read_options(record, answer)
        examples.append(data.Example(question, "", answer, options, task=task))
        rows.append([check_text(text) for text in texts[:n]])
        # One table is made of all lines.
        if len(rows[-1]) != (n or len(rows[0]) or 1):
            raise ValueError(f"{len(texts)} candidates: too few for --n, or not as many as above")
        if bool(answer) != bool(examples[0].answer):
            raise ValueError("field 'answer' must be in every line or in none")

    records.read_objects(path, records.text_lines(path), read, "question and candidates")
    return examples, [text for row in rows for text in row], len(rows[0])


def load_run(run: Path, device="cpu") -> tuple[reward.Discriminator, object, dict]:
    """(discriminator, tokenizer, settings) of a finished run of train.py."""
    # Its folder holds all that scoring a text needs: model, tokenizer, and how f was trained.
    settings = read_settings(run)
    folder = run / "reward"
    if not folder.is_dir():
        raise UserError(
            f"run folder {run} holds no reward/: was it trained to its end, with --method irl?"
        )
    tokenizer = loading.load_tokenizer(str(folder))
    set_date(tokenizer, settings.get("date"))
    model = reward.load_reward(settings["reward"], str(folder), device)
    # Token ids are places in the model's table: one that lies outside would be read from nowhere.
    vocabulary = model.model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer in {run} has {len(tokenizer)} tokens, the reward only {vocabulary}"
        )
    discriminator = reward.make_discriminator(
        model, tokenizer, settings["logit"], settings["granularity"]
    )
    return discriminator, tokenizer, settings


def load_judges(run: Path, tokenizer, temperature: float, device) -> dict:
    """The JUDGES that this run has trained: signal -> model."""
    # temperature: by which fair SFT's logits were divided for good (its setting fair_temperature).
    judges = {}
    for signal, name in JUDGES.items():
        if (run / name).is_dir():
            judge = loading.load_causal(str(run / name), device)
            loading.check_same_tokenizer(tokenizer, str(run / name))
            # Divided logits distort the log-probability of a whole trace. IRL's f is the averaged
            # reward before its logits are divided by alpha; this judge is the like of it.
            if name == "sft_fair":
                policy.divide_logits(judge, 1 / temperature)
            judges[signal] = judge
    return judges


def models_of_run(run: Path, policy_name: str, device):
    """(policy model, tokenizer, discriminator, judges, settings) of a run's folder."""
    discriminator, tokenizer, settings = load_run(run, device)
    # Who writes the candidates: the run's base, its trained policy, or any model of that family.
    name = {"base": settings["model"], "run": str(run / "policy")}.get(policy_name, policy_name)
    policy_model, _ = loading.load_policy(name, device)
    # The token ids that one model has written are what the others score.
    loading.check_same_tokenizer(tokenizer, name)
    judges = load_judges(run, tokenizer, settings["fair_temperature"], device)
    return policy_model, tokenizer, discriminator, judges, settings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked before anything is loaded. Raises UserError for bad input."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", help="folder of a run of train.py; without it, a demonstration")
    add("--n", type=int, help="candidates per question (default 16, or all of the file's)")
    add("--questions", type=int, default=100, help="test questions")
    add(
        "--candidates", metavar="FILE", help="JSON lines with question, candidates, answer, options"
    )
    add("--policy", default="base", help="who samples: base (the run's), run, or a folder")
    add("--device", default="auto", choices=DEVICES)
    add("--seed", type=int, default=0, help="of the questions, the samples and the intervals")
    # Whatever is wrong is said now, not after minutes of loading and sampling.
    args = parser.parse(argv)
    check_values(vars(args), RANGES)
    if not args.run and (args.candidates or args.policy != "base"):
        raise UserError("--candidates and --policy need a trained reward: give --run too")
    return args


def main(argv: list[str] | None = None) -> None:
    """Load, read or sample the candidates, judge them, print."""
    args = parse(argv)
    loading.quiet()
    if args.candidates:  # before what takes long
        texts = read_candidates(args.candidates, args.n)
    device = loading.pick_device(args.device)
    if args.run:
        models = models_of_run(Path(args.run), args.policy, device)
        policy_model, tokenizer, discriminator, judges, settings = models
        readers = [policy_model, discriminator.reward_model.model, *judges.values()]
    else:
        # What can be chosen without a reward, on the shipped base's samples.
        policy_model, tokenizer = loading.load_policy(loading.BASE, device)
        discriminator = None
        judges = {}
        settings = {"model": "base", "data": "words", "max_new_tokens": 64}
        readers = [policy_model]
    # As far as the shortest-sighted of the models can read.
    context = min(loading.context_length(model) for model in readers)
    if args.candidates:
        # Whoever wrote the texts: they are the run's own tokenizer's tokens from here on.
        candidates = from_texts(tokenizer, *texts, context)
    else:
        new_tokens = settings["max_new_tokens"]
        examples, _ = data.load_fitting(
            tokenizer,
            context,
            new_tokens,
            settings["data"],
            "test",
            args.questions,
            args.seed,
            in_words=settings["model"] not in loading.SHIPPED,
        )
        # At temperature 1, the policy itself: a sharper one leaves the rules less to choose from.
        generator = torch.Generator(device).manual_seed(args.seed)
        n = args.n or 16
        candidates = collect(policy_model, tokenizer, examples, n, new_tokens, 1.0, generator)
    if not candidates.examples[0].answer:
        # Nobody knows what is right: the texts with the highest reward are all there is to say.
        reading = signals(candidates.batch, discriminator, policy_model)["reward"]
        scores = trace_scores(*without_cut_off(reading, candidates), "mean")
        print(show_choices(candidates, scores.view(-1, candidates.n)))
        return
    results = assess(candidates, discriminator, policy_model, judges, tokenizer, args.seed)
    print(
        f"{len(candidates.examples)} questions, {candidates.n} candidates each; mean and 95% "
        f"interval over questions\n\n{show_results(results)}"
    )
    if not args.run:
        print(
            "\nThe shipped base on words is confidently wrong: neither its votes nor its "
            "log-probability come near the\noracle. A reward closes part of the gap: make one with "
            "train.py, then rerank.py --run RUN"
        )


if __name__ == "__main__":
    sys.exit(exit_status(main))
