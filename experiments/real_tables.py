"""The tables of experiments/real.py: results/real.json, results/real.md and README.md's table.

    FILES    {"runs": {name: {"model", "demonstrations", "seed", "stages"}}}: what models wrote, and
             the scores of every judge

Whether a text is right is asked anew each time (data.is_correct), so that tables follow the check.
"earlier" in real.json is what an experiment of before a57b686 has measured and no answer check
decides; `python -m experiments.real` of that commit makes it again.
"""

import json
import lzma
import re
from collections import Counter
from functools import cache

import numpy
import pandas
import torch

import data
import rerank
from candidates import Candidates
from experiments import store, tables
from tasks import countdown

COLUMNS = ("t1", "greedy")
FILES = {"countdown": "real-countdown.json.xz", "gsm8k": "real-samples.json.xz"}
# of candidates: base with worked examples, the chosen SFT, the SFT of the fewest updates; the
# chosen SFT's for validation questions, and fewer of these
SOURCES = ("base", "sft", "sft_first", "sft_validation", "errors-sft")
# Rows of docs/results.md's table of policies, in its order.
ARMS = {
    "base": "base, 4 solved examples",
    "sft": "SFT",
    "sft_fair": "fair SFT",
    "sft_with_base": "SFT's logits and the base's, added",
    "irl": "IRL",
    "irl_unclipped": "IRL, reward not clipped",
    "irl_copies": "IRL, reward of copies alone stands still",
    "irl_frozen": "IRL, reward stands still after its warm-up",
    "irl_kl": "**IRL**, KL to SFT",
    "irl_kl_long": "**IRL**, KL to SFT, twice the steps",
    "irl_no_kl": "IRL, reward from the base, no KL",
    "irl_kl_copies": "IRL, KL to SFT, reward of copies",
    "irl_kl_likelihood": "IRL, KL to SFT, reward a likelihood",
    "irl_kl_prior": "**IRL**, KL to SFT, base's log-probability added",
    "irl_kl_base": "a policy on the base's log-probability, KL to SFT",
    "irl_kl_prior_long": "**IRL**, base's log-probability added, three times the steps",
    "irl_kl_base_long": "a policy on the base's log-probability, three times the steps",
    "irl_kl_prior_cheap": "**IRL**, base's log-probability added, a third of the KL's price",
    "irl_kl_base_cheap": "a policy on the base's log-probability, a third of the KL's price",
    "irl_best": "SFT on the reward's choice",
    "best_logprob": "SFT on SFT's choice",
    "best_base_logprob": "SFT on the base's choice",
    "best_own_verdict": "SFT on the base's own verdict",
    "random": "SFT on samples at random",
    "best_true": "SFT on right samples",
    "grpo": "GRPO, true answers",
    "grpo_kl": "GRPO, KL to SFT",
    "grpo_long": "GRPO, three times the steps",
}
# README.md's rows: these, then rules for the best of 8.
README_ARMS = (
    "base",
    "sft",
    "sft_fair",
    "irl",
    "irl_kl_prior",
    "irl_kl_base",
    "irl_best",
    "best_logprob",
    "grpo",
    "grpo_kl",
    "grpo_long",
)
RULES = {
    "majority": "majority vote",
    "logprob": "base's log-probability",
    "reward": "**reward**",
    "oracle": "oracle",
}
# Two judges at once: the reward beside the strongest rival, and that rival beside another one.
PAIRS = (
    ("logprob", "reward"),
    ("logprob", "reward_copies"),
    ("logprob", "reward_from_base"),
    ("logprob", "sft_logprob"),
)
# Policies beside a rival that is not fair SFT, problem by problem.
COMPARED = (
    ("irl_kl", "best_logprob"),
    ("irl_best", "best_logprob"),
    ("best_true", "best_logprob"),
    ("irl_kl_prior", "irl_kl_base"),
    ("irl_kl_prior", "grpo"),
    ("irl_kl_prior", "grpo_kl"),
    ("irl_kl_base", "grpo"),
)
# What every rule's best of n is set beside, paired by question.
RIVALS = {
    "beyond_logprob": "logprob",
    "beyond_both_logprobs": "logprob + sft_logprob",
    "beyond_majority_text": "majority_text",
}
# What is no result, or has not its rival beside it, stands in real.md alone.
TRIED = "SFT at a rate of|samples of the chosen SFT|samples of 1,000 questions|SFT of 60 updates"


def stored(task: str) -> dict:
    """The runs of a task by name; none if there is no file."""
    path = store.folder() / FILES[task]
    if not path.exists():
        return {}
    return json.loads(lzma.decompress(path.read_bytes()))["runs"]


def questions_seen(name: str) -> set[str]:
    """GSM8K's test questions that results of other runs have been looked at."""
    others = [run["stages"] for other, run in stored("gsm8k").items() if other != name]
    stages = [stage for some in others for stage in some.values()]
    records = [one for stage in stages for source in SOURCES for one in stage.get(source, [])]
    return {one["question"] for one in records}


def keep(task: str, name: str, run: dict) -> None:
    """Put one run in place of what was kept of it."""
    runs = stored(task) | {name: run}
    store.keep(FILES[task], json.dumps({"runs": runs}, separators=(",", ":")))


def tie_weights(scores: torch.Tensor) -> torch.Tensor:
    """Weights for a vote whose ties fall to the answer whose candidates' scores sum highest. [Q, n]

    A vote counts 1 and less than 1 / n: these parts together decide no more than a tie. Among
    answers with as many votes, sums of scores are in the order of sums of scaled scores.

    >>> tie_weights(torch.tensor([[0.0, 4.0, 2.0]]))
    tensor([[1.0000, 1.1667, 1.0833]])
    """
    finite = scores.masked_fill(scores == -torch.inf, torch.inf)
    # a trace without a score is worth the lowest
    above = (scores - finite.amin(1, keepdim=True)).clamp(min=0)
    return 1 + above / above.amax(1, keepdim=True).clamp(min=1e-9) / (2 * scores.shape[1])


def in_spreads(scores: torch.Tensor) -> torch.Tensor:
    """Scores [Q, n] from their mean, in units of their spread over all candidates: to be added up.

    >>> in_spreads(torch.tensor([[1.0, 3.0], [5.0, -torch.inf]]))
    tensor([[-1.,  0.],
            [ 1., -1.]])
    """
    known = scores[scores > -torch.inf]
    # A trace without a score is worth the lowest.
    return (scores.clamp(min=known.min()) - known.mean()) / known.std().clamp(min=1e-9)


def tied(keys: torch.Tensor) -> torch.Tensor:
    """Whether several answers have the most votes: keys [Q, n] -> [Q]. -1 is no answer.

    >>> tied(torch.tensor([[0, 0, 2, 2], [0, 0, 2, -1], [-1, -1, -1, 3]]))
    tensor([ True, False, False])
    """
    same = keys[:, :, None] == keys[:, None, :]  # [Q, n, n]
    votes = same.sum(-1).masked_fill(keys < 0, 0)
    leads = (votes > 0) & (votes == votes.amax(1, keepdim=True))
    # An answer counts once, however many candidates gave it.
    leading_answers = (leads / same.sum(-1)).sum(1)
    return leading_answers > 1.5


def examples_of(records: list[dict], task: str) -> list[data.Example]:
    """The questions, with their answers, as the task's own check takes them."""
    task = task * (task in data.EMBEDDED)
    return [data.Example(one["question"], "", one["answer"], task=task) for one in records]


def choices(records: list[dict], task: str) -> dict:
    """rerank.choice_results of every signal, and of a majority vote whose ties it decides.

    records: {"question", "answer", "texts": [n], "scores": {signal: [n]}} of each question.
    "gain": what each rule has over the majority vote, paired by question; "beyond_...": what the
    best of n by each signal has over one of RIVALS. "tied": how often the vote is a tie.
    "majority_text": countdown's questions give the answer, so that a vote on answers is chance
    among those that arrive at it; a vote on whole texts is not.
    """
    examples = examples_of(records, task)
    n = len(records[0]["texts"])
    texts = [text for one in records for text in one["texts"]]
    candidates = Candidates(examples, data.make_batch([], []), texts, n)
    keys = rerank.answer_keys(candidates.answers, [() for _ in records])
    length = torch.tensor([[float(len(text)) for text in one["texts"]] for one in records])
    scores = {"longest": length, "shortest": -length}
    for by in records[0]["scores"]:
        scores[by] = torch.tensor([one["scores"][by] for one in records])
    for a, b in PAIRS:
        if {a, b} <= scores.keys():
            scores[f"{a} + {b}"] = in_spreads(scores[a]) + in_spreads(scores[b])
    correct = candidates.correct
    results = rerank.choice_results(correct, keys, scores, {})
    majority = rerank.majority_vote(correct, keys, n)
    best = {by: rerank.best_of_n(correct, values, n) for by, values in scores.items()}
    results["gain"] = {}
    for by, values in scores.items():
        for k in (4, 8):
            votes = rerank.majority_vote(correct, keys, k, tie_weights(values))
            results[str(k)][f"majority_{by}"] = rerank.bootstrap(votes)
        results["gain"][f"majority_{by}"] = rerank.bootstrap(votes - majority)
        results["gain"][by] = rerank.bootstrap(best[by] - majority)
    if task == "countdown":
        rows = [one["texts"] for one in records]
        alike = torch.tensor([[row.index(text) for text in row] for row in rows])  # [Q, n]
        for k in (4, 8):
            votes = rerank.majority_vote(correct, alike, k)
            results[str(k)]["majority_text"] = rerank.bootstrap(votes)
        best["majority_text"] = rerank.majority_vote(correct, alike, n)
    for beyond, rival in RIVALS.items():
        if rival in best:
            results[beyond] = {by: rerank.bootstrap(best[by] - best[rival]) for by in best}
    results["tied"] = tied(keys).double().mean().item()
    return results | {"questions": len(records)}


def right_shares(records: list[dict], texts: dict[str, dict], task: str) -> dict[str, dict]:
    """{arm: {"t1", "greedy": the share of right answers to each question}} of what arms wrote."""
    examples = examples_of(records, task)
    shares: dict = {}
    for arm, columns in texts.items():
        for column, answers in columns.items():
            rows = [[data.is_correct(e, text) for text in row] for e, row in zip(examples, answers)]
            shares.setdefault(arm, {})[column] = torch.tensor(rows).double().mean(1).tolist()
    return shares


def mean_of(parts: list):
    """Of results of the same form, from several seeds, the mean of every number in them."""
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: mean_of([part[name] for part in parts if name in part]) for name in names}
    known = [part for part in parts if part is not None]  # no AUROC where all is right
    return numpy.mean(known, 0).tolist() if known else None


@cache  # it takes a second or two
def countdown_problems(seed: int) -> list[str]:
    """The problems of a seed's test questions, in the order in which they are asked.

    Every seed asks the same problems, in another order and with their numbers in another order.

    >>> countdown_problems(seed=0)[0]
    '4 8 11 > 15'
    """
    examples = data.load_examples("countdown", "test", 1000, seed)
    asked = [countdown.problem_of(example.question) for example in examples]
    return [countdown.question_of(tuple(sorted(numbers)), target) for numbers, target in asked]


def of_problems(shares: dict[str, list], seed: int) -> dict[str, pandas.Series]:
    """{column: the share of right answers to each problem} of what a seed's arm has kept."""
    return {
        column: pandas.Series(values, countdown_problems(seed)[: len(values)])
        for column, values in shares.items()
    }


def are_kept(seeds: list[dict], *arms: str) -> bool:
    """Whether every seed has these arms' shares."""
    return bool(seeds) and all(shares.get(arm) for arm in arms for shares in seeds)


def joined(seeds: list[dict], arm: str, column: str) -> pandas.Series:
    """An arm's share of right answers to each problem, the mean over seeds."""
    of_seeds = pandas.concat([shares[arm][column] for shares in seeds])
    return of_seeds.groupby(level=0, sort=False).mean()


def interval(values: pandas.Series) -> list[float]:
    """[mean, low, high] over problems."""
    return rerank.bootstrap(torch.tensor(values.to_numpy()))


def beyond(seeds: list[dict], arm: str, rival: str) -> dict[str, list[float]]:
    """{"t1", "greedy": [mean, low, high]} of what an arm has over a rival, paired by problem.

    seeds: {arm: {column: the share of right answers to each problem, a Series}}; both arms are in
    each of them.
    """
    return {
        column: interval(joined(seeds, arm, column) - joined(seeds, rival, column))
        for column in COLUMNS
    }


def over_problems(seeds: list[dict], arm: str) -> dict:
    """{"t1", "greedy": [mean, low, high]} of an arm over the test problems, each the mean of its
    seeds, and "beyond_sft_fair", the same of what it has over fair SFT, paired by problem.

    seeds: as in `beyond`. Where a seed's were not kept, {}.

    >>> one, none = pandas.Series([1.0, 1.0], ["a", "b"]), pandas.Series([0.0, 0.0], ["a", "b"])
    >>> seed = {"irl": {"t1": one, "greedy": none}, "sft_fair": {"t1": none, "greedy": none}}
    >>> over_problems([seed], "irl")["beyond_sft_fair"]
    {'t1': [1.0, 1.0, 1.0], 'greedy': [0.0, 0.0, 0.0]}
    """
    over: dict = {}
    if are_kept(seeds, arm):
        over = {column: interval(joined(seeds, arm, column)) for column in COLUMNS}
    if are_kept(seeds, arm, "sft_fair") and arm not in ("sft", "sft_fair"):
        over["beyond_sft_fair"] = beyond(seeds, arm, "sft_fair")
    return over


def side_by_side(shares: dict[int, dict]) -> dict[str, dict]:
    """{what is compared: {"t1", "greedy": [mean, low, high], "seeds": how many}}, by problem.

    shares: {seed: {arm: ..}}, as in `beyond`. Each pair of COMPARED on the seeds that have both;
    and, where there are several seeds, each arm by each of them, and what it has over fair SFT.
    """
    compared = {}
    for arm, rival in COMPARED:
        seeds = [of_seed for of_seed in shares.values() if are_kept([of_seed], arm, rival)]
        if seeds:
            compared[f"{arm}, beyond {rival}"] = beyond(seeds, arm, rival) | {"seeds": len(seeds)}
    if len(shares) == 1:
        return compared
    for seed, of_seed in shares.items():
        for arm in of_seed:
            alone = over_problems([of_seed], arm)
            gain = alone.pop("beyond_sft_fair", None)
            if alone:
                compared[f"{arm}, seed {seed}"] = alone | {"seeds": 1}
            if gain:
                compared[f"{arm}, beyond sft_fair, seed {seed}"] = gain | {"seeds": 1}
    return compared


def by_need(seeds: list[dict]) -> dict[str, dict]:
    """{arm: {what a problem needs: the share of right answers at T = 1, [mean, low, high]}}, and
    "<what it needs>, beyond fair SFT": what the arm has over fair SFT, paired by problem.

    seeds: as in `beyond`. An arm is averaged over the seeds that have it and fair SFT.
    """
    shares: dict = {}
    for arm in dict.fromkeys(arm for of_seed in seeds for arm in of_seed):
        having = [of_seed for of_seed in seeds if are_kept([of_seed], arm, "sft_fair")]
        if not having:
            continue
        right = joined(having, arm, "t1")
        gain = right - joined(having, "sft_fair", "t1")
        problems = [countdown.problem_of(question) for question in right.index]
        sums = numpy.array([sum(numbers) == target for numbers, target in problems])
        shares[arm] = {}
        for need, some in {"sums alone": sums, "a difference": ~sums}.items():
            if some.any():
                shares[arm][need] = interval(right[some])
                shares[arm][f"{need}, beyond fair SFT"] = interval(gain[some])
    return shares


def look_name(look: dict, seed: int) -> str:
    """What was looked at on validation questions: a run, and how its policy was asked.

    >>> look_name({"run": "sft-60-0.001", "share": 0.25, "temperature": 0.2}, seed=1)
    'sft-60-0.001, share of the base 0.25, T = 0.2, seed 1'
    """
    asked = f"share of the base {look['share']:g}, T = {look['temperature']:g}"
    return f"{look['run']}, {asked}, seed {seed}"


def arms_of(one: dict) -> dict[str, dict]:
    """Of what was measured with so many demonstrations the policies."""
    return {name: arm for name, arm in one.items() if isinstance(arm, dict) and "t1" in arm}


def results_of(task: str) -> dict:
    """{model: {demonstrations: {arm: {"t1", "greedy", "seeds"}, "rerank": {source: choices}}}}.

    Means over seeds. An arm's interval is over the test problems, each the mean of its seeds, where
    they were kept; any other one is the mean of the seeds' intervals, each over questions.
    "beyond_sft_fair": what an arm has over fair SFT, paired by problem. "room": what GRPO has at
    T = 1, in points. "compared": policies beside others (`side_by_side`). "by_need": `by_need`.
    "hours": of all its stages; of one that was cut off, since it last went on. "validation":
    each seed's looks.
    """
    by_size: dict = {}
    seconds: Counter = Counter()  # of all stages and seeds
    for run in stored(task).values():
        one: dict = {"rerank": {}, "auroc": {}}
        shares = {}
        for stage in run["stages"].values():
            for arm, columns in stage.get("arms", {}).items():
                one[arm] = {column: columns[column] for column in COLUMNS}
                shares[arm] = of_problems(columns.get("shares", {}), run["seed"])
            for one_look in stage.get("looks", []):
                one.setdefault("validation", {})[look_name(one_look, run["seed"])] = {
                    column: one_look[column] for column in COLUMNS
                }
            kept = ("told", "temperature", "places", "errors")
            one |= {name: stage[name] for name in kept if name in stage}
            if "written" in stage:
                written = right_shares(stage["base"], stage["written"], task)
                for arm, columns in written.items():
                    shares[arm] = of_problems(columns, run["seed"])
                    one[arm] = {
                        column: rerank.bootstrap(torch.tensor(values))
                        for column, values in columns.items()
                    }
            for source in SOURCES:
                if source in stage:
                    one["rerank"][source] = choices(stage[source], task)
                    one["auroc"][source] = one["rerank"][source].pop("auroc")
            for name, signals in stage.get("processbench", {}).items():
                # Chance and the longest step go by no rule.
                for key, of_signal in (("processbench", "f1"), ("processbench_rules", "by_rule")):
                    one.setdefault(key, {})[name] = {
                        by: r[of_signal] for by, r in signals.items() if of_signal in r
                    }
        size = (run["model"], str(run["demonstrations"]))
        by_size.setdefault(size, {})[run["seed"]] = (one, shares)
        seconds[size] += sum(stage.get("seconds", 0) for stage in run["stages"].values())
    results: dict = {}
    for (model, size), seeds in by_size.items():
        arms_by_seed = {seed: shares for seed, (_, shares) in seeds.items()}
        one = mean_of([of_seed for of_seed, _ in seeds.values()])
        for name, arm in arms_of(one).items():
            arm["seeds"] = sum(name in of_seed for of_seed, _ in seeds.values())
            having = [shares for shares in arms_by_seed.values() if name in shares]
            arm |= over_problems(having, name)
        one["compared"] = side_by_side(arms_by_seed)
        one["by_need"] = by_need(list(arms_by_seed.values()))
        if {"grpo", "sft_fair"} <= one.keys():
            gain = one["grpo"]["t1"][0] - one["sft_fair"]["t1"][0]
            if "beyond_sft_fair" in one["grpo"]:  # of the seeds that have both
                gain = one["grpo"]["beyond_sft_fair"]["t1"][0]
            one["room"] = round(100 * gain, 1)
        one["hours"] = round(seconds[model, size] / 3600, 1)
        results.setdefault(model, {})[size] = one
    return results


def summary() -> dict:
    """results/real.json."""
    path = store.folder() / "real.json"
    results: dict = {"earlier": {}}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    results |= {"countdown": results_of("countdown"), "gsm8k": results_of("gsm8k")}
    results |= {"gsm8k_votes": {}, "processbench": {}}
    for model, sizes in results["gsm8k"].items():
        for size in sorted(sizes, key=int):  # where two have it, the one of more demonstrations
            one = sizes[size]
            # The first 100 questions, sampled at temperature 1, had been looked at before the rule
            # of ties was fixed: they do not count here.
            if one.get("temperature") == 0.7:
                votes = one["rerank"].get("base", {})
                results["gsm8k_votes"][model] = votes | {"temperature": 0.7}
            if "processbench" in one:
                results["processbench"][model] = one["processbench"]
    return results


# --- tables ---------------------------------------------------------------------------------------


def grid(rows: list[tuple]) -> str:
    """A Markdown table of (row, column, value), in the order in which they come, None or not.

    A value is [mean, low, high], an AUROC, a count or text. Without rows "".
    """

    def shown(value) -> str:
        if isinstance(value, list):
            return tables.percent(value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    order = dict.fromkeys(column for _, column, _ in rows)
    frame = pandas.DataFrame(rows, columns=["", "column", "value"]).dropna()
    if frame.empty:
        return ""
    frame["value"] = frame["value"].map(shown)
    cells = frame.pivot_table("value", "", "column", "first", sort=False).fillna("–")
    cells = cells[[column for column in order if column in cells]]
    return tables.table(["", *cells.columns], [[name, *row] for name, row in cells.T.items()])


def experiments(results: dict) -> list[tuple[str, dict]]:
    """(its name, its results) of every task, model and size."""
    names = {"countdown": "Countdown", "gsm8k": "GSM8K"}
    return [
        (f"{names[task]}, {model}, {size} demonstrations", one)
        for task in names
        for model, sizes in results[task].items()
        for size, one in sorted(sizes.items(), key=lambda pair: int(pair[0]))
    ]


def markdown(results: dict) -> str:
    """results/real.md: every number of real.json but those of earlier experiments."""
    parts = [
        "# Pretrained models\n\nWritten by `python -m experiments.real`. % with 95% intervals."
    ]
    for name, one in experiments(results):
        arms = arms_of(one)
        rows = [(arm, column, arms[arm][column]) for arm in arms for column in COLUMNS]
        rows += [
            (arm, f"{column}, beyond fair SFT", beyond)
            for arm in arms
            for column, beyond in arms[arm].get("beyond_sft_fair", {}).items()
        ]
        parts += [f"## {name}", grid(rows + [(arm, "seeds", arms[arm]["seeds"]) for arm in arms])]
        parts.append(f"Its stages took at least {one['hours']} hours.")
        rows = [
            (pair, column, value)
            for pair, columns in one["compared"].items()
            for column, value in columns.items()
        ]
        parts.append(grid(rows))
        rows = [
            (arm, f"t1, needs {need}", share)
            for arm, needs in one["by_need"].items()
            for need, share in needs.items()
        ]
        parts.append(grid(rows))
        rows = [
            (look, f"{column}, validation", value)
            for look, columns in one.get("validation", {}).items()
            for column, value in columns.items()
        ]
        parts.append(grid(rows))
        rows = [
            (f"reward_{run}", f"told from {kind} copies", share)
            for run, row in one.get("told", {}).items()
            for kind, share in row.items()
        ]
        parts.append(grid(rows))
        for source, ranking in one["rerank"].items():
            columns = ranking | {"auroc": one["auroc"][source]}
            shown = ("2", "4", "8", "gain", *RIVALS, "auroc", "auroc_within")
            rows = [(rule, k, value) for k in shown for rule, value in columns.get(k, {}).items()]
            ties = f"{100 * ranking['tied']:.1f} % of the votes on 8 answers are tied"
            parts += [f"{name}: candidates of {source}; {ties}", grid(rows)]
        columns = {"hit0": "first wrong token", "hit1": "it or its neighbour"}
        rows = [
            (by, columns[width], share)
            for width in columns
            for by, share in one.get("places", {}).get(width, {}).items()
        ]
        parts.append(grid(rows))
        rows = [
            (arm, f"{kind} (validation)", share)
            for arm, kinds in one.get("errors", {}).items()
            for kind, share in kinds.items()
        ]
        parts.append(grid(rows))
        for run, signals in one.get("processbench", {}).items():
            rows = [(by, f"F1 on ProcessBench, {run}", f1) for by, f1 in signals.items()]
            rows += [
                (by, f"by {rule}", f1)
                for by, rules in one["processbench_rules"][run].items()
                for rule, f1 in rules.items()
            ]
            parts.append(grid(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def readme_table(results: dict) -> str:
    """README.md's: arms at T = 1 / greedy, then the best of 8 of SFT's samples."""
    shown = [(name, one) for name, one in experiments(results) if not re.search(TRIED, name)]
    rows = []
    for arm in README_ARMS:
        for name, one in shown:
            cells = [tables.short(one[arm][column]) for column in COLUMNS if arm in one]
            rows.append((ARMS[arm], name, " / ".join(cells) or None))
    for rule, label in RULES.items():
        for name, one in shown:
            ranking = one["rerank"].get("sft", {}).get("8", {})
            # Countdown's reward comes from copies alone where no other has been trained.
            best = ranking.get(rule) or ranking.get(f"{rule}_copies")
            rows.append((f"best of 8 of SFT's: {label}", name, best and tables.short(best)))
    return grid(rows)


def policies_table(results: dict) -> str:
    """docs/results.md's: countdown's policies, each with its number of demonstrations."""
    columns = {"T = 1": "t1", "greedy": "greedy"}
    kind = "wrong, at the target"
    rows = []
    for model, sizes in results["countdown"].items():
        if re.search(TRIED, model):
            continue
        for size, one in sizes.items():
            errors = one.get("errors", {})
            for arm in [name for name in ARMS if name in one]:
                row = f"{ARMS[arm]} ({size})"
                beyond = one[arm].get("beyond_sft_fair", {})
                for title, column in columns.items():
                    rows.append((row, title, one[arm][column]))
                for title, column in columns.items():
                    rows.append((row, f"{title}, beyond fair SFT", beyond.get(column)))
                rows.append((row, f"{kind} (validation)", errors.get(arm, {}).get(kind)))
                rows.append((row, "seeds", one[arm]["seeds"]))
    return grid(rows)


def pages(results: dict) -> dict[str, tuple[str, str]]:
    """{page: (its part, the table that stands there)}."""
    return {
        "README.md": ("real", readme_table(results)),
        "docs/results.md": ("policies", policies_table(results)),
    }


def write() -> None:
    """results/real.json and results/real.md, and the tables of README.md and docs/results.md."""
    results = summary()
    store.keep("real.json", json.dumps(results, indent=1) + "\n")
    store.keep("real.md", markdown(results))
    if store.folder() == store.ROOT / "results":
        for page, (part, table) in pages(results).items():
            text = (store.ROOT / page).read_text(encoding="utf-8")
            store.keep(f"../{page}", tables.between_marks(text, part, table, "real"))
    print(f"tables: {store.folder() / 'real.md'}")
