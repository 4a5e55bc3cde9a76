"""results/summary.json, results/tables.md and the figures, from the trials that are there (experiments/run.py).

Every number is a mean over seeds with its 95% interval (Student's t), and how many seeds it is over. Nothing is made up
for trials that are missing: their rows are.
"""

import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import rerank
from experiments import choose
from experiments import run as runs

# two-sided 95% points of Student's t for 1, 2, .. degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# methods: their names in summary.json, and in words
NAMES = {"base": "base", "base_sharpened": "base, logits divided by 0.2", "sft": "SFT, best at T = 1",
         "sft_fair": "SFT, averaged and sharpened, best at T = 1",
         "sft_fair_greedy": "SFT, averaged and sharpened, best greedy",
         "likelihood_only": "IRL without its discriminator", "irl": "**IRL, no verifier**",
         "broken_only": "IRL whose discriminator learns from broken copies alone",
         "own_grade": "a policy on the base's own grade, no demonstrations", "grpo": "GRPO, true answers"}  # fmt: skip
RULES = ("random", "longest", "shortest", "majority", *rerank.LOGPROBS, "reward", "reward_lowest", "reward_last",
         "reward_discounted", "weighted_majority", "oracle")  # fmt: skip
FIRST = ("reward", *rerank.LOGPROBS)  # log-probabilities, of which there is a first that is suspicious
# what points at a token: its name in summary.json, and in a run's results.json
SIGNALS = {name: f"{name}_first" for name in FIRST} | {f"{name}_lowest": name for name in FIRST} | {
    name: name for name in ("reward_drop", "entropy", "chance")}  # fmt: skip
# docs/collapses.md: ways to go wrong among the ablations, and the metrics of metrics.jsonl that tell
WRONG = ("linear head, PPO", "linear head, PPO, warm-up 300", "random reward, PPO", "policy rate x 3",
         "discriminator 30 x faster", "warm-up 15")  # fmt: skip
TELLING = ("validation/t1", "reward/mean", "rollout/length", "rollout/entropy")
COLLAPSE = (
    0.1  # a run has collapsed if its validation accuracy ends this far below its best, or its test below the base's
)


def interval(values: list[float]) -> list[float]:
    """[mean, low, high] over seeds: mean +- t s / sqrt(n). One seed has no interval.

    >>> interval([0.8, 0.9])
    [0.85, 0.2147, 1.4853]
    >>> interval([0.8])
    [0.8, None, None]
    """
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return [round(mean, 4), None, None]
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = T95[min(n - 2, len(T95) - 1)] * deviation / math.sqrt(n)
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


def collapsed(found: dict) -> bool:
    """Whether IRL's validation accuracy ended far below its best, or its test accuracy below the base's.

    >>> methods = {"base": {"t1": 0.3}, "irl": {"t1": 0.5}}
    >>> collapsed({"methods": methods, "curve": {"irl validation/t1": [[10, 0.4], [20, 0.8], [30, 0.5]]}})
    True
    >>> collapsed({"methods": methods, "curve": {"irl validation/t1": [[10, 0.4], [20, 0.55], [30, 0.5]]}})
    False
    """
    values = [value for _, value in found["curve"]["irl validation/t1"]]
    fell = values[-1] < max(values) - COLLAPSE
    return fell or found["methods"]["irl"]["t1"] < found["methods"]["base"]["t1"]


def read_all(pattern: str) -> list[dict]:
    """What is in the results' files of this name, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(runs.results_folder().glob(pattern))]


def seeds_of(name: str) -> list[dict]:
    """What a trial found with each seed, from 0 on. The seed is the last part of a file's name, and a number: a trial's
    name may begin another's."""
    return read_all(f"trials/{name}-[0-9].json")


def value_at(result: dict, *path: str) -> float | None:
    """The value at this path, None where there is none; of a [mean, low, high] its mean."""
    for key in path:
        result = result.get(key) if isinstance(result, dict) else None
    return result[0] if isinstance(result, list) else result


def over_seeds(found: list[dict], *path: str) -> list[float] | None:
    """The interval of the value at this path in each of `found`."""
    values = [value for result in found if (value := value_at(result, *path)) is not None]
    return interval(values) if values else None


def sources() -> dict[str, list[int]]:
    """Which problems, with how many demonstrations, the main part has results of: {data: sizes}."""
    found = defaultdict(set)
    for path in (runs.results_folder() / "trials").glob("*-main-*-[0-9].json"):
        data, _, size, _ = path.stem.rsplit("-", 3)
        found[data].add(int(size))
    return {data: sorted(sizes) for data, sizes in sorted(found.items(), reverse=True)}  # words first


def main_summary() -> dict:
    """What the main part says: of each kind of problems accuracy by size and method, best of N, AUROC, localisation."""
    summary, every = {}, []
    for data, sizes in sources().items():
        by_size = {size: seeds_of(f"{data}-main-{size}") for size in sizes}
        summary[data] = summary_of(data, by_size)
        every += [found for results in by_size.values() for found in results]
    summary["seeds"] = max((len(seeds_of(f"{data}-main-{n}")) for data, sizes in sources().items() for n in sizes), default=0)
    summary["collapses"], summary["runs"] = sum(map(collapsed, every)), len(every)
    return summary | {
        "names": {
            "base_sharpened": "the base with IRL's temperature, the same for every size",
            "sft": "updates and rate that were best on validation at temperature 1",
            "sft_fair": "updates, rate, share of the base in the weights and temperature that were best at temperature 1",
            "sft_fair_greedy": "the same, best greedy",
            "likelihood_only": "without the discriminator's loss: on words default settings, on countdown runs.LIKELIHOOD",
            "irl": "default settings; on countdown GRPO's steps and rate",
            "broken_only": "the same, but its negatives are broken copies alone: the discriminator sees no trace of the policy",
            "own_grade": "the same with the base's own grade as the reward: no demonstrations, the same for every size",
            "grpo": "steps and rate that were best at temperature 1; one run per seed, the same for every size",
            "rerank reward": "mean of f over the tokens of a trace; longest, shortest: of response tokens",
            "localise": "log-probabilities: the first token below -1; _lowest: the lowest",
        }
    }


def summary_of(data: str, by_size: dict[int, list[dict]]) -> dict:
    """The part of one kind of problems."""
    summary: dict = {"main": {}, "broken beyond irl": {}, "rerank": {}, "auroc": {}, "localise": {}}
    broken = {size: seeds_of(f"{data}-broken-{size}") for size in by_size}
    for size, found in by_size.items():
        where = {method: (found, method) for method in NAMES}
        where["sft_fair_greedy"] = (seeds_of(f"{data}-fair-greedy-{size}"), "sft_fair")
        alone = seeds_of(f"{data}-likelihood-{size}")
        where["likelihood_only"] = (alone, "irl") if alone else (found, "likelihood")
        where["broken_only"] = (broken[size], "irl")
        where["base_sharpened"] = (seeds_of(f"{data}-base-sharpened"), "sft_fair")
        where["own_grade"] = (seeds_of(f"{data}-own-grade"), "irl")
        where["grpo"] = (seeds_of(f"{data}-grpo"), "grpo")  # it learns from no demonstration: one run per seed for all sizes
        summary["main"][str(size)] = {
            method: {key: over_seeds(results, "methods", name, key) for key in ("t1", "greedy")}
            | {"pass@4": over_seeds(results, "methods", name, "pass@k", "4")}
            for method, (results, name) in where.items()
        }
        gains = {key: beyond(broken[size], found, "methods", "irl", key) for key in ("t1", "greedy")}
        summary["broken beyond irl"][str(size)] = gains
    size = max(by_size, key=lambda n: (len(by_size[n]), n == 256))  # 256, if as many seeds are there as of others
    found = by_size[size]
    summary["seeds"], summary["judged with"] = {str(n): len(results) for n, results in by_size.items()}, size
    for n in ("4", "8", "16"):
        summary["rerank"][n] = {rule: over_seeds(found, "rerank", n, rule) for rule in RULES}
        summary["rerank"][n]["reward_broken"] = over_seeds(broken[size], "rerank", n, "reward")
    areas = [rule for rule in RULES if over_seeds(found, "rerank", "auroc", rule)]
    summary["auroc"] = {rule: over_seeds(found, "rerank", "auroc", rule) for rule in areas}
    summary["auroc"]["reward_broken"] = over_seeds(broken[size], "rerank", "auroc", "reward")
    for kind in ("natural", "single"):
        hits = {
            hit: {s: over_seeds(found, "localise", kind, hit, path) for s, path in SIGNALS.items()}
            for hit in ("hit0", "hit1", "step")
        }
        if hits["hit0"]["chance"]:
            summary["localise"][kind] = hits
    if data == "countdown" and (grades := read_all("grades/*.json")):
        summary["own_grade"] = {n: over_seeds(grades, n) for n in ("4", "8", "16", "auroc")}
    cases = [case["base"] for case in read_all(f"inference/{data}-[0-9].json")]
    if cases:
        summary["alarms"] = {
            kind: {s: over_seeds(cases, "alarms", s, kind) for s in FIRST} for kind in ("wrong", "right")
        }
    return summary


def percent(value: list | None, signed: bool = False) -> str:
    """[0.825, 0.81, 0.84] as '82.5 [81.0, 84.0]'; signed, of differences, as '+82.5 [+81.0, +84.0]'."""
    if value is None:
        return "–"
    mean, *ends = (f"{100 * v:{'+' if signed else ''}.1f}" for v in value if v is not None)
    return mean + (f" [{', '.join(ends)}]" if ends else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(rows: list[list[str]]) -> list[list[str]]:
    """The rows that say anything beside their names.

    >>> filled([["a", "– / –", "–"], ["b", "–", "82.5"]])
    [['b', '–', '82.5']]
    """
    return [row for row in rows if set("".join(row[1:])) - set("– /")]


def main_tables(data: str, summary: dict) -> list[str]:
    parts = []
    for size, methods in summary["main"].items():
        rows = [[NAMES[m], *(percent(v.get(k)) for k in ("t1", "greedy", "pass@4"))] for m, v in methods.items()]
        head = ["", "T = 1", "greedy", "pass@4"]
        parts.append(f"### {data}, {size} demonstrations\n\n" + table(head, filled(rows)))
    every = (*RULES, "reward_broken")
    rows = [[rule, *(percent(summary["rerank"][n].get(rule)) for n in ("4", "8", "16"))] for rule in every]
    rows = [[*row, percent(summary["auroc"].get(row[0]))] for row in rows]
    head = ["chosen by", "N = 4", "N = 8", "N = 16", "AUROC"]
    parts.append(f"### {data}, best of N samples of the base\n\n" + table(head, rows))
    found = summary["localise"]
    if found:
        rows = [
            [s, *(percent(found[kind][hit].get(s)) for kind in found for hit in ("hit0", "hit1"))] for s in SIGNALS
        ]
        titles = {"natural": ["own errors, exact", "within 1"], "single": ["planted, exact", "within 1"]}
        head = ["pointed at by", *(title for kind in found for title in titles[kind])]
        parts.append(f"### {data}, first wrong token\n\n" + table(head, rows))
    if "alarms" in summary:
        parts.append(f"### {data}, traces of the base with a token below −1\n\n" + alarm_table(summary))
    return parts


def alarm_table(summary: dict) -> str:
    """Of the base's wrong and right traces, the share in which a signal finds a token suspicious."""
    rows = [[CHOSEN_BY[s], *(percent(summary["alarms"][kind][s]) for kind in ("wrong", "right"))] for s in FIRST]
    return table(["a token below −1 is found, %", "in wrong traces of the base", "in right ones"], rows)


def beyond(found: list[dict], reference: list[dict], *path: str) -> list[float] | None:
    """The interval of what each seed has beyond the same seed of the reference: demonstrations and questions are theirs
    both, so that what seeds differ in drops out.

    >>> beyond([{"a": 0.9}, {"a": 0.7}], [{"a": 0.8}, {"a": 0.5}], "a")
    [0.15, -0.4853, 0.7853]
    """
    differences = [value_at(a, *path) - value_at(b, *path) for a, b in zip(found, reference)]
    return interval(differences) if differences else None


def changed_table(part: str, changes: dict[str, str], short: bool = False) -> str:
    """One row per change: accuracies, what they have beyond the defaults', AUROC, over how many seeds, and how many of them
    collapsed. `short` leaves out the flags, and the intervals of what is not compared."""
    default = {"variants": "words-main-256", "ablations": "ablations-default", "traces": "traces-default"}[part]
    default = {found["settings"]["seed"]: found for found in seeds_of(default)}
    show = lambda value: percent(value[:1] if short else value)
    rows = []
    for label, change in changes.items():
        found = seeds_of(f"{part}-{runs.plain(label)}")
        if found:
            row = [label, *[f"`{change}`"] * (not short)]
            for key in ("t1", "greedy"):
                path = ("methods", "irl", key)
                same = [default[seed] for one in found if (seed := one["settings"]["seed"]) in default]
                more = "–" if label == "default" or len(same) < len(found) else percent(beyond(found, same, *path), signed=True)
                row += [show(over_seeds(found, *path)), more]
            row.append(show(over_seeds(found, "reward", "auroc")))
            rows.append([*row, str(len(found)), str(sum(map(collapsed, found)))])
    head = ["", *["flags"] * (not short), "T = 1", "beyond the default", "greedy", "beyond the default", "AUROC", "seeds"]
    return table([*head, "collapsed"], rows) if rows else ""


def choice_tables() -> list[str]:
    """SFT and GRPO on validation questions: how they were chosen. Of all shares of the base and temperatures the best is
    shown beside neither; results/choose has them all."""
    groups = defaultdict(list)
    for one in read_all("choose/*.json"):
        groups[one["data"], one["method"], one["size"]].append(one)
    parts = []
    for (data, method, size), found in sorted(groups.items()):
        rows = []
        for one in sorted(found, key=lambda one: (one["steps"], one["lr"])):
            row = [f"{one['steps']} at {one['lr']:g}"]
            for by, tricks in (("t1", False), ("t1", True), ("greedy", True)):
                _, share, t = choose.best([one], by, tricks)
                accuracies = f"{100 * one['t1'][share][t]:.1f} / {100 * one['greedy'][share]:.1f}"
                row.append(accuracies + f" ({share}, {t})" * tricks)
            rows.append(row if method == "sft" else row[:2])
        head = ["T = 1 / greedy", "plain", "best at T = 1 (share of the base, temperature)", "best greedy (the same)"]
        title = f"### {data}: how {method.upper()} was chosen" + f", {size} demonstrations" * (method == "sft")
        parts.append(f"{title}, validation questions\n\n" + table(head if method == "sft" else head[:2], rows))
    rows = irl_choices()
    title = "### countdown: how IRL was chosen, 64 demonstrations, validation questions"
    return parts + ([f"{title}\n\n{rows}"] if rows else [])


def early_stops(curve: dict[str, list]) -> list[float]:
    """A training's validation accuracy at its end; at the step with the highest mean reward, where it could be stopped
    without an answer; and at its best.

    >>> early_stops({"irl validation/t1": [[1, 0.5], [2, 0.7], [3, 0.6]], "irl reward/mean": [[1, 0.1], [2, 0.0], [3, -0.1]]})
    [0.6, 0.5, 0.7]
    """
    accuracy, rewards = dict(curve["irl validation/t1"]), dict(curve["irl reward/mean"])
    return [accuracy[max(accuracy)], accuracy[max(rewards, key=rewards.get)], max(accuracy.values())]


def irl_choices() -> str:
    """What countdown's reward needs: each choice undone, on validation questions. f: mean and standard deviation of the head
    that the policy practised on at last; then what stopping early would have brought (early_stops)."""
    rows = []
    for label, change in runs.LONG_CHOICES.items():
        found = read_all(f"trials/chosen-{runs.plain(label)}-1[0-9][0-9].json")
        values = [percent(over_seeds(found, "methods", "irl", key)) for key in ("t1", "greedy")]
        spreads = [[one["scores"][kind] for one in found] for kind in ("right", "wrong")]
        f = [" ± ".join(f"{sum(column) / len(found):.2f}" for column in zip(*spread)) for spread in spreads]
        stops = zip(*(early_stops(one["curve"]) for one in found))
        stopped = " / ".join(f"{100 * sum(column) / len(found):.0f}" for column in stops)
        rows += [[label, f"`{change}`" if change else "", *values, *f, stopped, str(len(found))]] if found else []
    head = [f"`{runs.LONG}` and", "flags", "T = 1", "greedy", "f of the base's right traces", "of its wrong ones",
            "T = 1 of 100: end / highest mean reward / best", "seeds"]  # fmt: skip
    return table(head, rows) if rows else ""


def inference_tables(data: str) -> list[str]:
    """Reranking on others' samples and on harder problems."""
    found = read_all(f"inference/{data}-[0-9].json")
    parts = []
    for label in found[0] if found else ():
        cases = [f[label] for f in found]
        ns = [n for n in cases[0]["rerank"] if n.isdigit()]
        rows = [[rule, *(percent(over_seeds(cases, "rerank", n, rule)) for n in ns)] for rule in RULES]
        text = f"### {data}, samples of: {label}\n\n" + table(["chosen by", *(f"N = {n}" for n in ns)], rows)
        places = {s: over_seeds(cases, "localise", "natural", "hit0", SIGNALS[s]) for s in FIRST}
        text += f"\n\nAUROC {percent(over_seeds(cases, 'rerank', 'auroc', 'reward'))}"
        text += "; first wrong token found by " * any(places.values())
        parts.append(text + ", ".join(f"{s} {percent(value)}" for s, value in places.items() if value))
    return parts


def save(figure, path: Path) -> None:
    """The same results give the same file: no date in it, and names that do not change."""
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "results"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_collapses(path: Path) -> None:
    """A row per way to go wrong (docs/collapses.md), four metrics of training beside the default's."""
    wrong = [label for label in WRONG if seeds_of(f"ablations-{runs.plain(label)}")]
    if not wrong:
        return
    figure, grid = plt.subplots(len(wrong), len(TELLING), figsize=(12, 1.9 * len(wrong)), squeeze=False)
    for row, label in zip(grid, wrong):
        for axes, metric in zip(row, TELLING):
            for name, color in (("default", "0.45"), (label, "tab:orange")):
                draw_seeds(axes, [f["curve"] for f in seeds_of(f"ablations-{runs.plain(name)}")], metric, color, name)
            axes.set_title(metric, fontsize=9)
            axes.tick_params(labelsize=8)
        row[0].set_ylim(0, 1)
        row[0].legend(fontsize=8, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("policy step", fontsize=9)
    save(figure, path)


def draw_seeds(axes, curves: list[dict], metric: str, color: str, label: str) -> None:
    """A metric of IRL's steps: thin lines for single seeds, a thick one for their mean."""
    series = [curve[f"irl {metric}"] for curve in curves if curve.get(f"irl {metric}")]
    for points in series:
        axes.plot(*zip(*points), color=color, linewidth=0.6, alpha=0.6)
    if series:
        steps = [step for step, _ in series[0]]
        means = [sum(values) / len(values) for values in zip(*([v for _, v in points] for points in series))]
        axes.plot(steps[: len(means)], means, color=color, linewidth=2, label=label)


def draw_best_of_n(path: Path) -> None:
    """Best of N on the base's samples, N = 1 .. 64."""
    found = [seed["base"] for seed in read_all("inference/words-[0-9].json")]
    if not found:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for rule in ("oracle", "reward", "sft_fair_logprob", "sft_logprob", "weighted_majority", "majority", "random", "logprob"):
        ns = [n for n in found[0]["rerank"] if n.isdigit()]
        values = [over_seeds(found, "rerank", n, rule) for n in ns]
        axes.plot([int(n) for n in ns], [v[0] for v in values], marker="o", markersize=3, label=rule)
        if values[0][1] is not None:
            axes.fill_between([int(n) for n in ns], [v[1] for v in values], [v[2] for v in values], alpha=0.15)
    axes.set(xscale="log", xticks=[int(n) for n in ns], xticklabels=ns, xlabel="N", ylabel="share right", ylim=(0, 1))
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


# docs/results.md's rows: their names in summary.json, and there
CHOSEN_BY = {"random": "a random pick", "longest": "the longest", "shortest": "the shortest", "majority": "majority vote",
                "logprob": "the base's own log-probability", "sft_logprob": "the SFT model's log-probability",
                "sft_fair_logprob": "the averaged SFT model's log-probability", "reward": "**the learned reward**, mean of f",
                "reward_broken": "the same, learned from broken copies alone", "oracle": "an oracle"}  # fmt: skip
POINTED_AT = {"reward": "**reward**: first token below −1",
                  "sft_logprob": "SFT model's log-probability: first below −1",
                  "sft_fair_logprob": "averaged SFT model's log-probability: first below −1",
                  "logprob": "base's log-probability: first below −1", "reward_lowest": "reward: lowest token",
                  "reward_drop": "reward: largest drop", "sft_logprob_lowest": "SFT model's log-probability: lowest",
                  "sft_fair_logprob_lowest": "averaged SFT model's log-probability: lowest",
                  "logprob_lowest": "base's log-probability: lowest", "entropy": "base's entropy: highest",
                  "chance": "chance"}  # fmt: skip


# README.md's rows: their names in summary.json, and there
README_METHODS = {"base": "base", "sft": "SFT", "sft_fair": "fair SFT",
                  "likelihood_only": "IRL's likelihood, no discriminator", "irl": "**IRL**",
                  "broken_only": "IRL, broken copies alone",
                  "own_grade": "a policy on the base's own grade", "grpo": "GRPO, true answers"}  # fmt: skip
README_CHOICES = {"random": "at random", "majority": "majority vote", "logprob": "base's log-probability",
                  "sft_fair_logprob": "fair SFT's log-probability", "longest": "the longest",
                  "own_grade": "base's own grade", "reward": "**learned reward**", "reward_dense": "paper's head, dense",
                  "reward_sparse": "paper's head, sparse", "reward_broken_dense": "dense, broken copies",
                  "reward_broken": "sparse, broken copies", "oracle": "oracle"}  # fmt: skip
NOTHING_YET = "No results of this version are here yet: run `python -m experiments.run`."


def short(value: list | None) -> str:
    """[0.825, 0.81, 0.84] as '82.5±1.5'.

    >>> short([0.825, 0.81, 0.84]), short([0.825, None, None]), short(None)
    ('82.5±1.5', '82.5', '–')
    """
    if value is None:
        return "–"
    mean, _, high = value
    return f"{100 * mean:.1f}" + (f"±{100 * (high - mean):.1f}" if high is not None else "")


def readme_tables(summary: dict) -> dict[str, str]:
    """README.md's two small tables by their marks: accuracies, best of 8. Every number is in summary.json; what is missing is
    left out."""
    tasks = [task for task in ("words", "countdown") if task in summary]
    columns = [(task, size) for task in tasks for size in ("64", "256") if size in summary[task]["main"]]
    if not columns:
        return dict.fromkeys(("results", "inference"), NOTHING_YET)

    def accuracy(task: str, size: str, method: str, key: str) -> str:  # fair SFT as it was best for the column
        other = "sft_fair_greedy" if (method, key) == ("sft_fair", "greedy") else method
        return short(summary[task]["main"][size].get(other, {}).get(key))

    def best(task: str, rule: str) -> str:
        value = (summary[task].get("own_grade") or {}) if rule == "own_grade" else None
        return short(value.get("8") if value is not None else summary[task]["rerank"]["8"].get(rule))

    def seeds(task: str, size: str) -> str:
        return f"{(n := summary[task]['seeds'][size])} seed{'s' * (n != 1)}"

    parts = {}
    for part, names, head, cells in (
        ("results", README_METHODS, ["% right: T=1 / greedy", *(f"{task} {size}, {seeds(task, size)}" for task, size in columns)],
         lambda row: [" / ".join(accuracy(*column, row, key) for key in ("t1", "greedy")) for column in columns]),
        ("inference", README_CHOICES,
         ["best of 8 of the base, chosen by", *(f"{task} {summary[task]['judged with']}" for task in tasks)],
         lambda row: [best(task, row) for task in tasks]),
    ):  # fmt: skip
        rows = filled([[name, *cells(row)] for row, name in names.items()])
        parts[part] = table(head, rows) if rows else NOTHING_YET
    return parts


def full_tables(summary: dict) -> str:
    """The results as docs/results.md has them: every number of theirs is in summary.json."""
    parts = []
    for task in ("words", "countdown"):
        if task not in summary:
            continue
        main, ranking, found = (summary[task][part] for part in ("main", "rerank", "localise"))
        head = [task] + [f"{size} ({summary[task]['seeds'][size]} seeds): {key}" for size in main for key in ("T = 1", "greedy")]
        keys = ("t1", "greedy")
        rows = [[name, *(percent(main[n][method][key]) for n in main for key in keys)] for method, name in NAMES.items()]
        parts.append(table(head, filled(rows)))
        ns, kinds = ("4", "8", "16"), [kind for kind in ("natural", "single") if kind in found]
        rows = filled([[name, *(percent(ranking[n].get(rule)) for n in ns)] for rule, name in CHOSEN_BY.items()])
        if summary[task].get("own_grade"):
            rows.append(["the base's own grade", *(percent(summary[task]["own_grade"].get(n)) for n in ns)])
        parts.append(table([f"{task}: best of N samples of the base, chosen by", *(f"N = {n}" for n in ns)], rows))
        if kinds:
            titles = {"natural": "the base's own errors", "single": "one planted error"}
            rows = [[name, *(percent(found[kind]["hit0"][s]) for kind in kinds)] for s, name in POINTED_AT.items()]
            head = [f"{task}: exact first wrong token found, %", *(titles[kind] for kind in kinds)]
            parts.append(table(head, filled(rows)))  # a head that reads whole traces points nowhere
        if summary[task].get("alarms", {}).get("wrong", {}).get("reward"):
            parts.append(alarm_table(summary[task]))
        gains = {n: gain for n, gain in summary[task]["broken beyond irl"].items() if gain["t1"]}
        if gains:
            said = [f"{n} demonstrations {percent(g['t1'], True)} / {percent(g['greedy'], True)}" for n, g in gains.items()]
            parts.append(f"*{task}: from broken copies alone, beyond IRL with the same seed, T = 1 / greedy: {'; '.join(said)}.*")
        if value := summary[task]["auroc"].get("reward"):
            broken = summary[task]["auroc"].get("reward_broken")
            also = f"; from broken copies alone {percent(broken)}" if broken else ""
            parts.append(f"*{task}: AUROC of the reward, right against wrong traces: {percent(value)} in %{also}.*")
    if not parts:
        return NOTHING_YET
    runs_of_irl = f"collapses: {summary['collapses']} in {summary['runs']} runs of IRL in these tables"
    return "\n\n".join([*parts, f"*% right, or found: means over seeds with 95% intervals (Student's t); {runs_of_irl}.*"])


def between_marks(text: str, part: str, new: str, by: str = "run") -> str:
    """`text` with what stands between the two marks of a part replaced; `by` which of the experiments.

    >>> text = between_marks("a <!-- x: by python -m experiments.run --> old <!-- end of x --> b", "x", "new")
    >>> "old" in text, text.startswith("a <!--"), text.endswith("--> b"), text.count("new")
    (False, True, True, 1)
    """
    mark = f"<!-- {part}: by python -m experiments.{by} -->"
    head, rest = text.split(mark)
    tail = rest.split(f"<!-- end of {part} -->")[1]
    return f"{head}{mark}\n\n{new}\n\n<!-- end of {part} -->{tail}"


def into_readme(text: str, summary: dict) -> str:
    """README.md with the tables of what is there."""
    for part, new in readme_tables(summary).items():
        text = between_marks(text, part, new)
    return text


def into_results(text: str, summary: dict) -> str:
    """docs/results.md with the tables of what is there."""
    text = between_marks(text, "full", full_tables(summary))
    text = between_marks(text, "chosen", irl_choices() or NOTHING_YET)
    for part, changes in (("variants", runs.VARIANTS), ("ablations", runs.ABLATIONS), ("traces", runs.TRACES)):
        text = between_marks(text, part, changed_table(part, changes, short=True) or NOTHING_YET)
    return text


# What holds tables between marks, and who writes them there
PAGES = {"README.md": into_readme, "docs/results.md": into_results}


def write() -> None:
    """summary.json, tables.md, two figures; and the tables in README.md and docs/results.md."""
    folder = runs.results_folder()
    folder.mkdir(exist_ok=True)
    summary = main_summary()
    runs.keep(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    failed = sorted(path.stem for path in (folder / "failed").glob("*.txt"))
    parts = ["# Results\n\nWritten by `python -m experiments.run`. % right, mean over seeds with its 95% interval."]
    for data in sources():
        parts += main_tables(data, summary[data]) + inference_tables(data)
    for part, changes in (("variants", runs.VARIANTS), ("ablations", runs.ABLATIONS), ("traces", runs.TRACES)):
        rows = changed_table(part, changes)
        title = f"{part.capitalize()}, " + ("64 demonstrations of countdown" if part == "traces" else "256 demonstrations")
        parts += [f"### {title}\n\n{rows}"] if rows else []
    parts += choice_tables()
    parts += ["Failed: " + ", ".join(failed)] if failed else []
    runs.keep(folder / "tables.md", "\n\n".join(parts) + "\n")
    for name, into in PAGES.items() if folder == runs.ROOT / "results" and sources() else ():
        page = runs.ROOT / name
        runs.keep(page, into(page.read_text(encoding="utf-8"), summary))
    draw_collapses(folder / "collapses.svg")
    draw_best_of_n(folder / "best-of-n.svg")
    print(f"{folder / 'summary.json'}, {folder / 'tables.md'}")
