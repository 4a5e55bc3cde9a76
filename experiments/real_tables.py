"""The tables of the experiments on pretrained models, from what the models wrote and judges said.

    results/real-samples.json.xz    for each model: the test questions with their answers, every text
                                    that was sampled, every score of every judge, human labels
    results/real.json, real.md      what `write` makes of them; and README.md's table

Whether a text is right is asked anew each time (data.is_correct), so that tables follow the check.

One model in real-samples.json.xz:

    about       what its experiment was: demonstrations, questions, device, command
    questions   [{"question", "answer"}]
    stages      {stage: {"samples", "greedy_samples": [texts of each question], "entropy", "steps",
                "seconds", "memory_gb"}}, of what it has
    judges      {judge: {"few_shot", "sft": scores of the samples, {rule: [n]} for each question;
                "pairs": of an expert's solution and of the same with one thing broken;
                "dev", "test": of each step of solutions}}
    solutions   {"dev", "test": {"labels": first wrong steps, "lengths": letters of every step}}
"""

import json
import lzma
from collections.abc import Callable

import torch

import data
import rerank
from candidates import Candidates
from experiments import steps, store, tables

SHOTS = 4  # worked examples before a question
RULES = ("mean", "last", "lowest")
REWARDS = ("reward", "reward_dense", "reward_sparse", "reward_broken", "reward_broken_dense")
# Judges: the name of their stage, and in tables.
JUDGES = {"base": "logprob", "sft": "sft_logprob", "sft_fair": "sft_fair_logprob"}
JUDGES |= {name: name for name in REWARDS}
SOURCES = {"few_shot": "few_shot", "sft": "sft_samples"}  # whose samples are judged: their stages
METHODS = {  # rows of accuracies: their stages
    "zero_shot": "zero_shot",
    "few_shot": "few_shot",
    "sft": "sft_samples",
    "sft_fair": "sft_fair",
    "irl": "irl",
    "grpo": "grpo",
}
# README.md's rows: their names in results/real.json, and there.
README_METHODS = {"zero_shot": "base, asked for tags", "few_shot": f"base, {SHOTS} solved examples"}
README_METHODS |= tables.README_METHODS
README_SIGNALS = {name: tables.README_CHOICES[name] for name in ("logprob", "reward_broken")}
README_SIGNALS |= {"longest": "the longest step", "chance": "chance"}
# What reranking measures beside accuracies, and results/real.md's names of it.
MEASURES = {
    "beyond": "beyond random",
    "auroc": "AUROC",
    "auroc_beyond": "beyond log-probability's",
    "auroc_within": "AUROC within questions",
    "length": "correlation with length",
}
FILE = "real-samples.json.xz"

# ------------------------------------------------------------------------------------------------
# Samples
# ------------------------------------------------------------------------------------------------


def read() -> dict[str, dict]:
    """{model: what is kept of it}: nothing if no experiment was run."""
    path = store.folder() / FILE
    if not path.exists():
        return {}
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def keep(name: str, kept: dict) -> None:
    """Put one model's samples in place of what was kept of it."""
    models = read() | {name: kept}
    text = json.dumps(dict(sorted(models.items())), separators=(",", ":"))
    store.keep(FILE, text)


def kept_of(about: dict, examples: list, solutions: dict, stages: dict[str, dict]) -> dict:
    """One model's part of the file, from what experiments/real.py's stages have found."""
    kept = {"about": about, "questions": [], "stages": {}, "judges": {}, "solutions": {}}
    for example in examples:
        kept["questions"].append({"question": example.question, "answer": example.answer})
    for part, some in solutions.items():
        labels = [solution.label for solution in some]
        lengths = [[len(step) for step in solution.steps] for solution in some]
        kept["solutions"][part] = {"labels": labels, "lengths": lengths}
    for name, found in stages.items():
        kept["stages"][name] = stage_record(found)
    for name in JUDGES:
        found = stages.get(f"judge_{name}", {})
        parts = {part: scores for part, scores in found.items() if isinstance(scores, list)}
        if parts:
            kept["judges"][name] = parts
    return kept


def stage_record(found: dict) -> dict:
    """What tables need of a stage: no tokens, no metrics of single steps."""
    record = {"seconds": found["seconds"], "memory_gb": found["memory_gb"]}
    if "samples" in found:
        names = ("texts", *RULES)
        record["samples"] = [{name: one[name] for name in names} for one in found["samples"]]
        record["greedy_samples"] = [{"texts": one["texts"]} for one in found["greedy_samples"]]
    metrics = found.get("metrics", [{}])
    if "rollout" in metrics[0]:  # a policy's: its -log pi per token at first and at last
        record["steps"] = len(metrics)
        record["entropy"] = [metrics[i]["rollout"]["entropy"] for i in (0, -1)]
    return record


def examples_of(kept: dict) -> list[data.Example]:
    """The test questions, with their answers."""
    return [data.Example(one["question"], "", one["answer"]) for one in kept["questions"]]


def accuracy(examples: list[data.Example], samples: list[dict]) -> torch.Tensor:
    """[Q]: of each question the share of its samples that are right."""
    right = [
        [data.is_correct(example, text) for text in one["texts"]]
        for example, one in zip(examples, samples)
    ]
    return torch.tensor(right).float().mean(1)


def own_scores(samples: list[dict]) -> list[dict]:
    """What the model that sampled said of its samples."""
    return [{rule: one[rule] for rule in RULES} for one in samples]


# ------------------------------------------------------------------------------------------------
# Choosing among samples
# ------------------------------------------------------------------------------------------------


def minus(records: list[dict], others: list[dict]) -> list[dict]:
    """Means of the differences: of f and of pi's log-probability, AIRL's logit.

    >>> minus([{"mean": [3.0, 1.0], "last": [0.0, 0.0]}], [{"mean": [1.0, 1.0]}])
    [{'mean': [2.0, 0.0]}]
    """
    differences = []
    for one, other in zip(records, others):
        differences.append({"mean": [a - b for a, b in zip(one["mean"], other["mean"])]})
    return differences


def with_logit(judges: dict[str, dict]) -> dict[str, dict]:
    """What judges said of texts, under the tables' names.

    Where both f and SFT's log pi are there, their logit too, which the discriminator is trained on.
    """
    by_name = {JUDGES[name]: parts for name, parts in judges.items()}
    if {"reward", "sft_logprob"} <= by_name.keys():
        f = by_name["reward"]
        log_pi = by_name["sft_logprob"]
        both = [part for part in (*SOURCES, "pairs") if part in f and part in log_pi]
        by_name["reward_logit"] = {part: minus(f[part], log_pi[part]) for part in both}
    return by_name


def told_apart(judges: dict[str, dict]) -> dict[str, dict[str, list[float]]]:
    """How often a judge's mean is higher for an expert's solution than for another text.

    {judge: {"broken": the same with one thing broken, "sft": SFT's samples for the same question}},
    each [mean, low, high] over questions. Equals count half.
    """

    def means(records: list[dict]) -> torch.Tensor:
        return torch.tensor([one["mean"] for one in records])

    shares = {}
    for name, parts in with_logit(judges).items():
        if "pairs" not in parts:
            continue
        expert, broken = means(parts["pairs"]).split(1, 1)  # [Q, 1] each
        others = {"broken": broken}
        if "sft" in parts:
            others["sft"] = means(parts["sft"])  # [Q, n]
        shares[name] = {
            kind: rerank.bootstrap((1 + (expert - other).sign()).mean(1) / 2)
            for kind, other in others.items()
        }
    return shares


def choices(examples: list[data.Example], sampled: list[dict], scores: dict[str, list]) -> dict:
    """rerank.choice_results of every judge, by its mean over a trace, chosen beforehand."""
    n = len(sampled[0]["texts"])
    texts = [text for one in sampled for text in one["texts"]]
    candidates = Candidates(examples, data.make_batch([], []), texts, n)
    keys = rerank.answer_keys(candidates.answers, [example.options for example in examples])
    length = torch.tensor([[float(len(text)) for text in one["texts"]] for one in sampled])
    by_way = {"longest": length, "shortest": -length}
    for name, records in scores.items():
        by_way[name] = torch.tensor([one["mean"] for one in records])
    voters = {f"weighted_majority_{name}": name for name in REWARDS if name in scores}
    results = rerank.choice_results(candidates.correct, keys, by_way, voters)
    results["length"] = {}
    results["auroc_beyond"] = {}
    for name, values in by_way.items():
        results["length"][name] = correlation(values, length)
        gain = rerank.auroc_beyond(values, by_way["logprob"], candidates.correct)
        results["auroc_beyond"][name] = gain
    return results


def correlation(scores: torch.Tensor, length: torch.Tensor) -> float:
    """Pearson's, within questions: [Q, n] both.

    A judge near -1 has learnt that experts are brief, not what is right.

    >>> correlation(torch.tensor([[1.0, 2.0], [11.0, 10.0]]), torch.tensor([[5.0, 7.0], [9.0, 7.0]]))
    1.0
    """
    a = scores - scores.mean(1, keepdim=True)
    b = length - length.mean(1, keepdim=True)
    return round(float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)), 3)


# ------------------------------------------------------------------------------------------------
# The first wrong step
# ------------------------------------------------------------------------------------------------


def localise(kept: dict) -> dict[str, dict]:
    """{"processbench": [F1, low, high], "points": share of wrong solutions}, each by name.

    Of what asks no model, then of judges.
    """
    solutions = kept["solutions"]
    labels = {part: torch.tensor(solutions[part]["labels"]) for part in ("dev", "test")}
    hits = steps.guess_hits(solutions["test"]["lengths"], solutions["test"]["labels"])
    f1 = steps.guesses(hits)
    points = {name: float(values.double().mean()) for name, values in hits.items()}
    for judge, parts in kept["judges"].items():
        dev = steps.by_rule(parts["dev"])
        test = steps.by_rule(parts["test"])
        one = steps.localise(dev, labels["dev"], test, labels["test"])
        f1[JUDGES[judge]] = one["f1"]
        points[JUDGES[judge]] = one["points"]
    return {"processbench": f1, "points": points}


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def summary() -> dict:
    """results/real.json: {"models": {name: its numbers}}."""
    return {"models": {name: summary_of(kept) for name, kept in read().items()}}


def summary_of(kept: dict) -> dict:
    """One model's: "gsm8k", "rerank", "told", "processbench", .. as far as it went.

    "paired": what IRL and GRPO have beyond SFT, from which they start, paired by question.

    "rerank_sft" and so on: of SFT's samples.
    """
    stages = kept["stages"]
    examples = examples_of(kept)
    one: dict = {"gsm8k": {}, "paired": {}}
    right = {}
    for method, stage in METHODS.items():
        if stage in stages:
            right[method] = {
                "t1": accuracy(examples, stages[stage]["samples"]),
                "greedy": accuracy(examples, stages[stage]["greedy_samples"]),
            }
    for method, shares in right.items():
        one["gsm8k"][method] = {key: rerank.bootstrap(values) for key, values in shares.items()}
        if method in ("irl", "grpo"):  # question by question
            one["paired"][method] = {
                key: rerank.bootstrap(values - right["sft"][key])
                for key, values in shares.items()
            }
    by_name = with_logit(kept["judges"])
    for source, suffix in (("few_shot", ""), ("sft", "_sft")):
        if not kept["judges"]:
            continue
        samples = stages[SOURCES[source]]["samples"]
        scores = {"logprob": own_scores(samples)}
        scores |= {name: parts[source] for name, parts in by_name.items() if source in parts}
        ranking = choices(examples, samples, scores)
        shown = {n: row for n, row in ranking.items() if n.isdigit() and n != "1"}
        one[f"rerank{suffix}"] = shown
        one |= {f"{measure}{suffix}": ranking[measure] for measure in MEASURES}
    one["trained"] = {
        stage: {"steps": stages[stage]["steps"], "entropy": stages[stage]["entropy"]}
        for stage in ("irl", "grpo")
        if stage in stages
    }
    if kept["judges"]:
        one["told"] = told_apart(kept["judges"])
    if kept["solutions"] and kept["judges"]:
        one |= localise(kept)
    for measure in ("memory_gb", "seconds"):
        one[measure] = {stage: kept["stages"][stage][measure] for stage in stages}
    return one | kept["about"]


def share(value: list[float]) -> str:
    """[mean, low, high] in %."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in value))


def area(value: float | list[float] | None) -> str:
    """An AUROC, or [AUROC, low, high]."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    return f"{value:.3f}"


def markdown(found: dict) -> str:
    """results/real.md: the summary as tables."""
    parts = []
    for name, one in found["models"].items():
        parts += [f"## {name}", *model_tables(one)]
    return "\n\n".join(parts) + "\n"


def model_tables(one: dict) -> list[str]:
    """The tables of one model."""
    hours = sum(one["seconds"].values()) / 3600
    about = f"{one['demonstrations']} demonstrations, {one['questions']} test questions"
    parts = [f"{about}, {one['device']}, {hours:.1f} hours. `{one['command']}`"]
    rows = [[method, share(r["t1"]), share(r["greedy"])] for method, r in one["gsm8k"].items()]
    parts.append(tables.table(["", "T=1", "greedy"], rows))
    for method, r in one["trained"].items():
        first, last = r["entropy"]
        entropy = f"-log pi of a sampled token {first:.2f} to {last:.2f}"
        parts.append(f"{method}: {r['steps']} steps from SFT; {entropy}")
    parts += beyond_lines(one)
    for suffix, whose in (("", "few-shot"), ("_sft", "SFT's")):
        if f"rerank{suffix}" in one:
            parts.append(choice_table(one, suffix, whose))
    if "told" in one:
        parts.append(told_table(one["told"]))
    if "processbench" in one:
        points = one["points"]
        rows = [
            [name, share(f1), f"{100 * points[name]:.1f}"]
            for name, f1 in one["processbench"].items()
        ]
        lowest = "% of wrong solutions, the lowest step always named"
        parts.append(tables.table(["first wrong step, ProcessBench", "F1", lowest], rows))
    return parts


def beyond_lines(one: dict) -> list[str]:
    """What IRL and GRPO have beyond SFT, a line each."""
    lines = []
    names = {"irl": "IRL", "grpo": "GRPO"}
    for method, gains in one["paired"].items():
        t1, greedy = (tables.percent(gains[key], signed=True) for key in ("t1", "greedy"))
        lines.append(f"*{names[method]} beyond SFT, question by question: T=1 {t1}, greedy {greedy}.*")
    return lines


def choice_table(one: dict, suffix: str, whose: str) -> str:
    """Best of n by every way, and what tells right from wrong samples."""
    ranking = one[f"rerank{suffix}"]
    beyond, areas, over, within, alike = (one[f"{measure}{suffix}"] for measure in MEASURES)
    rows = []
    for way in next(iter(ranking.values())):
        cells = [share(row[way]) for row in ranking.values()]
        cells.append(share(beyond[way]) if way in beyond else "-")
        cells += [area(column.get(way)) for column in (areas, over, within, alike)]
        rows.append([way, *cells])
    head = [f"best of n, {whose} samples", *ranking, *MEASURES.values()]
    return tables.table(head, rows)


def told_table(told: dict) -> str:
    """What judges tell apart."""
    kinds = {
        "broken": "an expert's solution above it with one thing broken",
        "sft": "above SFT's samples",
    }
    rows = []
    for judge, shares in told.items():
        rows.append([judge, *(share(shares[kind]) if kind in shares else "-" for kind in kinds)])
    return tables.table(["% of comparisons", *kinds.values()], rows)


def readme_table(found: dict) -> str:
    """README.md's table, a column per model that is through IRL and reranking.

    Accuracies, best of 8 of the few-shot base's samples, F1 on ProcessBench.
    """
    models = {
        name: one
        for name, one in found["models"].items()
        if "rerank" in one and "irl" in one["gsm8k"]
    }

    def accuracies(one: dict, method: str) -> str:
        shares = one["gsm8k"].get(method, {})
        return " / ".join(tables.short(shares.get(key)) for key in ("t1", "greedy"))

    def best(one: dict, way: str) -> str:
        return tables.short(one["rerank"].get("8", {}).get(way))

    def first_error(one: dict, signal: str) -> str:
        f1 = one.get("processbench", {}).get(signal)
        return tables.short(f1)

    rows = []
    groups: tuple[tuple[str, dict, Callable], ...] = (
        ("", README_METHODS, accuracies),
        ("best of 8: ", tables.README_CHOICES, best),
        ("first error, F1: ", README_SIGNALS, first_error),
    )
    for title, names, cell in groups:
        for name, label in names.items():
            rows.append([title + label, *(cell(one, name) for one in models.values())])
    head = ["GSM8K, % right: T=1 / greedy"]
    for name, one in models.items():
        about = f"{one['demonstrations']} demonstrations, {one['questions']} questions"
        head.append(f"{name}, {about}")
    lines = [line for one in models.values() for line in beyond_lines(one)]
    return "\n\n".join([tables.table(head, tables.filled(rows)), *lines])


def write() -> None:
    """results/real.json and results/real.md, and README.md's table."""
    found = summary()
    if not found["models"]:
        return
    store.keep("real.json", json.dumps(found, indent=1) + "\n")
    store.keep("real.md", markdown(found))
    if store.folder() == store.ROOT / "results":
        text = (store.ROOT / "README.md").read_text(encoding="utf-8")
        table = readme_table(found)
        store.keep("../README.md", tables.between_marks(text, "real", table, "real"))
    print(f"tables: {store.folder() / 'real.md'}")
