"""results/summary.json, results/tables.md, the tables of the pages and the figures.

All from the CSV files that experiments/store.py describes. Every number is a mean over seeds with
its 95% interval (Student's t), and how many seeds it is over. Nothing is made up for trials that
are missing: their rows are.
"""

import json
import math
from dataclasses import dataclass, field
from functools import partial

import matplotlib
import pandas

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import rerank
from experiments import choose, store, trials

# Two-sided 95% points of Student's t for 1, 2, .. degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# A run has collapsed if its validation accuracy ends this far below its best, or its test accuracy
# below the base's.
COLLAPSE = 0.1
RULES = (
    "random",
    "longest",
    "shortest",
    "majority",
    *rerank.LOGPROBS,
    "reward",
    "reward_lowest",
    "reward_last",
    "reward_discounted",
    "weighted_majority",
    "oracle",
)
FIRST = ("reward", *rerank.LOGPROBS)  # log-probabilities, of which there is a first suspicious one
# What points at a token: its name in summary.json, and in scores.csv.
SIGNALS = {name: f"{name}_first" for name in FIRST}
SIGNALS |= {f"{name}_lowest": name for name in FIRST}
SIGNALS |= {name: name for name in ("reward_drop", "entropy", "chance")}
KINDS = ("natural", "single")  # the base's own errors; one planted error
# docs/collapses.md: ways to go wrong among the ablations, and the metrics that tell.
WRONG = (
    "linear head, PPO",
    "linear head, PPO, warm-up 300",
    "random reward, PPO",
    "policy rate x 3",
    "discriminator 30 x faster",
    "warm-up 15",
)
TELLING = ("validation/t1", "reward/mean", "rollout/length", "rollout/entropy")

# Rows: their names in summary.json, and in docs/results.md.
NAMES = {
    "base": "base",
    "base_sharpened": "base, logits divided by 0.2",
    "sft": "SFT, best at T = 1",
    "sft_fair": "SFT, averaged and sharpened, best at T = 1",
    "sft_fair_greedy": "SFT, averaged and sharpened, best greedy",
    "likelihood_only": "IRL without its discriminator",
    "irl": "**IRL, no verifier**",
    "broken_only": "IRL whose discriminator learns from broken copies alone",
    "own_grade": "a policy on the base's own grade, no demonstrations",
    "grpo": "GRPO, true answers",
}
CHOSEN_BY = {
    "random": "a random pick",
    "longest": "the longest",
    "shortest": "the shortest",
    "majority": "majority vote",
    "logprob": "the base's own log-probability",
    "sft_logprob": "the SFT model's log-probability",
    "sft_fair_logprob": "the averaged SFT model's log-probability",
    "reward": "**the learned reward**, mean of f",
    "reward_broken": "the same, learned from broken copies alone",
    "oracle": "an oracle",
}
POINTED_AT = {
    "reward": "**reward**: first token below −1",
    "sft_logprob": "SFT model's log-probability: first below −1",
    "sft_fair_logprob": "averaged SFT model's log-probability: first below −1",
    "logprob": "base's log-probability: first below −1",
    "reward_lowest": "reward: lowest token",
    "reward_drop": "reward: largest drop",
    "sft_logprob_lowest": "SFT model's log-probability: lowest",
    "sft_fair_logprob_lowest": "averaged SFT model's log-probability: lowest",
    "logprob_lowest": "base's log-probability: lowest",
    "entropy": "base's entropy: highest",
    "chance": "chance",
}
# Likewise, in README.md.
README_METHODS = {
    "base": "base",
    "sft": "SFT",
    "sft_fair": "fair SFT",
    "likelihood_only": "IRL's likelihood, no discriminator",
    "irl": "**IRL**",
    "broken_only": "IRL, broken copies alone",
    "own_grade": "a policy on the base's own grade",
    "grpo": "GRPO, true answers",
}
README_CHOICES = {
    "random": "at random",
    "majority": "majority vote",
    "logprob": "base's log-probability",
    "sft_fair_logprob": "fair SFT's log-probability",
    "longest": "the longest",
    "own_grade": "base's own grade",
    "reward": "**learned reward**",
    "reward_dense": "paper's head, dense",
    "reward_sparse": "paper's head, sparse",
    "reward_broken_dense": "dense, broken copies",
    "reward_broken": "sparse, broken copies",
    "oracle": "oracle",
}
NOTHING_YET = "No results of this version are here yet: run `python -m experiments.run`."


# ------------------------------------------------------------------------------------------------
# What was measured
# ------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """The tables of results/."""

    trials: pandas.DataFrame = field(default_factory=partial(store.read, "trials"))
    scores: pandas.DataFrame = field(default_factory=partial(store.read, "scores"))
    curves: pandas.DataFrame = field(default_factory=partial(store.read, "curves"))
    tuning: pandas.DataFrame = field(default_factory=partial(store.read, "tuning"))

    def of(self, trial: str, method: str = "irl") -> pandas.DataFrame:
        """A row for each seed."""
        rows = self.trials[(self.trials["trial"] == trial) & (self.trials["method"] == method)]
        return rows.set_index("seed").sort_index()

    def scores_of(self, trial: str, samples: str, quantity: str) -> dict[str, list]:
        """{by: its interval over seeds} of a quantity, such as "best of 8"."""
        s = self.scores
        chosen = (s["trial"] == trial) & (s["samples"] == samples) & (s["quantity"] == quantity)
        return s[chosen].groupby("by", sort=False)["value"].agg(interval).to_dict()

    def sizes(self) -> dict[str, list[int]]:
        """Which problems, with how many demonstrations, the main part has: {data: sizes}."""
        names = self.trials["trial"].str.extract(r"^(\w+)-main-(\d+)$").dropna().drop_duplicates()
        sizes = names.astype({1: int}).groupby(0)[1].apply(sorted)
        return sizes.sort_index(ascending=False).to_dict()  # words first


def interval(values) -> list[float | None] | None:
    """[mean, low, high] over seeds: mean +- t s / sqrt(n). One seed has no interval, none has None.

    >>> interval([0.8, 0.9])
    [0.85, 0.2147, 1.4853]
    >>> interval([0.8]), interval([float("nan")])
    ([0.8, None, None], None)
    """
    known = pandas.Series(values, dtype=float).dropna()
    if not len(known):
        return None
    mean = float(sum(known) / len(known))
    if len(known) == 1:
        return [round(mean, 4), None, None]
    t = T95[min(len(known) - 2, len(T95) - 1)]
    half = t * float(known.std()) / math.sqrt(len(known))
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


def beyond(rows: pandas.DataFrame, reference: pandas.DataFrame, column: str) -> list | None:
    """The interval of what each seed has beyond the same seed of the reference.

    Demonstrations and questions are theirs both, so that what seeds differ in drops out.

    >>> ours = pandas.DataFrame({"t1": [0.9, 0.7]}, index=[1, 2])
    >>> theirs = pandas.DataFrame({"t1": [0.5, 0.8]}, index=[2, 1])
    >>> beyond(ours, theirs, "t1")
    [0.15, -0.4853, 0.7853]
    """
    return interval(rows[column] - reference[column])


def collapsed(rows: pandas.DataFrame, curves: pandas.DataFrame) -> pandas.Series:
    """Of IRL's trials, (trial, seed) -> whether its accuracy fell.

    That is, on validation questions far below its best, or on test questions below the base's.

    >>> names = ["trial", "seed", "method", "t1"]
    >>> rows = pandas.DataFrame([["a", 0, "base", 0.3], ["a", 0, "irl", 0.5]], columns=names)
    >>> looks = pandas.DataFrame([["a", 0, "irl", v] for v in (0.4, 0.8, 0.5)],
    ...                          columns=["trial", "seed", "method", "validation/t1"])
    >>> collapsed(rows, looks).tolist(), collapsed(rows, looks[::2]).tolist()
    ([True], [False])
    """
    key = ["trial", "seed"]
    looks = curves[curves["method"] == "irl"].groupby(key)["validation/t1"]
    test = rows.pivot_table(index=key, columns="method", values="t1")
    test = test.reindex(columns=["base", "irl"])
    fell = looks.last() < looks.max() - COLLAPSE
    return fell.reindex(test.index, fill_value=False) | (test["irl"] < test["base"])


# ------------------------------------------------------------------------------------------------
# results/summary.json
# ------------------------------------------------------------------------------------------------


def main_summary(measured: Measured) -> dict:
    """What the main part says of each kind of problems, and how many of its runs collapsed."""
    summary: dict = {}
    names = []
    for data, sizes in measured.sizes().items():
        summary[data] = summary_of(measured, data, sizes)
        names += [f"{data}-main-{size}" for size in sizes]
    main = measured.trials[measured.trials["trial"].isin(names)]
    seeds = main.groupby("trial")["seed"].nunique()
    summary["seeds"] = int(seeds.max()) if len(seeds) else 0
    summary["collapses"] = int(collapsed(main, measured.curves).sum()) if len(seeds) else 0
    summary["runs"] = int(seeds.sum())
    summary["names"] = {
        "base_sharpened": "the base with IRL's temperature, the same for every size",
        "sft": "updates and rate that were best on validation at temperature 1",
        "sft_fair": "updates, rate, share of the base in the weights and temperature that were best at temperature 1",
        "sft_fair_greedy": "the same, best greedy",
        "likelihood_only": "without the discriminator's loss: on words default settings, on countdown trials.LIKELIHOOD",
        "irl": "default settings; on countdown GRPO's steps and rate",
        "broken_only": "the same, but its negatives are broken copies alone: the discriminator sees no trace of the policy",
        "own_grade": "the same with the base's own grade as the reward: no demonstrations, the same for every size",
        "grpo": "steps and rate that were best at temperature 1; one run per seed, the same for every size",
        "rerank reward": "mean of f over the tokens of a trace; longest, shortest: of response tokens",
        "localise": "log-probabilities: the first token below -1; _lowest: the lowest",
    }
    return summary


def methods_of(data: str, size: int) -> dict[str, tuple[str, str]]:
    """Where a method of the tables is found: {its name there: (trial, method)}."""
    main = f"{data}-main-{size}"
    likelihood = (main, "likelihood")
    if data == "countdown":
        likelihood = (f"{data}-likelihood-{size}", "irl")
    return {
        "base": (main, "base"),
        "base_sharpened": (f"{data}-base-sharpened", "sft_fair"),
        "sft": (main, "sft"),
        "sft_fair": (main, "sft_fair"),
        "sft_fair_greedy": (f"{data}-fair-greedy-{size}", "sft_fair"),
        "likelihood_only": likelihood,
        "irl": (main, "irl"),
        "broken_only": (f"{data}-broken-{size}", "irl"),
        "own_grade": (f"{data}-own-grade", "irl"),
        "grpo": (f"{data}-grpo", "grpo"),  # no demonstration: one run per seed for all sizes
    }


def summary_of(measured: Measured, data: str, sizes: list[int]) -> dict:
    """The part of one kind of problems."""
    summary: dict = {"main": {}, "broken beyond irl": {}, "rerank": {}, "auroc": {}, "localise": {}}
    seeds = {}
    for size in sizes:
        irl = measured.of(f"{data}-main-{size}")
        broken = measured.of(f"{data}-broken-{size}")
        seeds[size] = len(irl)
        summary["main"][str(size)] = {}
        for name, (trial, method) in methods_of(data, size).items():
            rows = measured.of(trial, method)
            shares = {column: interval(rows[column]) for column in ("t1", "greedy", "pass@4")}
            summary["main"][str(size)][name] = shares
        gains = {column: beyond(broken, irl, column) for column in ("t1", "greedy")}
        summary["broken beyond irl"][str(size)] = gains
    # 256, if as many seeds are there as of others
    size = max(sizes, key=lambda n: (seeds[n], n == 256))
    summary["seeds"] = {str(n): count for n, count in seeds.items()}
    summary["questions"] = int(max(irl["questions"], default=0))  # as many as there are, at most 1,000
    summary["judged with"] = size
    main = partial(measured.scores_of, f"{data}-main-{size}", "base")
    broken = partial(measured.scores_of, f"{data}-broken-{size}", "base")
    for n in ("4", "8", "16"):
        chosen = main(f"best of {n}")
        summary["rerank"][n] = {rule: chosen.get(rule) for rule in RULES}
        summary["rerank"][n]["reward_broken"] = broken(f"best of {n}").get("reward")
    areas = main("auroc")
    summary["auroc"] = {rule: areas[rule] for rule in RULES if rule in areas}
    summary["auroc"]["reward_broken"] = broken("auroc").get("reward")
    for kind in KINDS:
        hits = {hit: main(f"{kind} {hit}") for hit in ("hit0", "hit1", "step")}
        if hits["hit0"]:
            summary["localise"][kind] = {
                hit: {name: places.get(signal) for name, signal in SIGNALS.items()}
                for hit, places in hits.items()
            }
    if data == "countdown":
        own = partial(measured.scores_of, f"{data}-grades", "base")
        grades = {n: own(f"best of {n}").get("own_grade") for n in ("4", "8", "16")}
        grades["auroc"] = own("auroc").get("own_grade")
        if grades["auroc"]:
            summary["own_grade"] = grades
    alarms = {
        kind: measured.scores_of(f"{data}-inference", "base", f"alarms {kind}")
        for kind in ("wrong", "right")
    }
    if any(alarms.values()) or len(measured.scores_of(f"{data}-inference", "base", "auroc")):
        summary["alarms"] = {
            kind: {name: rates.get(name) for name in FIRST} for kind, rates in alarms.items()
        }
    return summary


# ------------------------------------------------------------------------------------------------
# Cells and tables
# ------------------------------------------------------------------------------------------------


def percent(value: list | None, signed: bool = False) -> str:
    """[0.825, 0.81, 0.84] as '82.5 [81.0, 84.0]'; signed, of differences, with their signs.

    >>> percent([0.825, 0.81, 0.84]), percent([-0.02, -0.05, 0.01], signed=True), percent(None)
    ('82.5 [81.0, 84.0]', '-2.0 [-5.0, +1.0]', '–')
    """
    if value is None:
        return "–"
    sign = "+" if signed else ""
    mean, *ends = (f"{100 * v:{sign}.1f}" for v in value if v is not None)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def short(value: list | None) -> str:
    """[0.825, 0.81, 0.84] as '82.5±1.5'.

    >>> short([0.825, 0.81, 0.84]), short([0.825, None, None]), short(None)
    ('82.5±1.5', '82.5', '–')
    """
    if value is None:
        return "–"
    mean, _, high = value
    half = "" if high is None else f"±{100 * (high - mean):.1f}"
    return f"{100 * mean:.1f}{half}"


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
    """results/tables.md's tables of the main part."""
    parts = []
    for size, methods in summary["main"].items():
        rows = []
        for method, shares in methods.items():
            rows.append([NAMES[method], *(percent(value) for value in shares.values())])
        head = ["", "T = 1", "greedy", "pass@4"]
        parts.append(f"### {data}, {size} demonstrations\n\n" + table(head, filled(rows)))
    rows = []
    for rule in (*RULES, "reward_broken"):
        chosen = [percent(summary["rerank"][n].get(rule)) for n in ("4", "8", "16")]
        rows.append([rule, *chosen, percent(summary["auroc"].get(rule))])
    head = ["chosen by", "N = 4", "N = 8", "N = 16", "AUROC"]
    parts.append(f"### {data}, best of N samples of the base\n\n" + table(head, rows))
    places = summary["localise"]
    if places:
        titles = {"natural": ["own errors, exact", "within 1"], "single": ["planted, exact", "within 1"]}
        head = ["pointed at by", *(title for kind in places for title in titles[kind])]
        rows = []
        for name in SIGNALS:
            cells = [percent(places[kind][hit][name]) for kind in places for hit in ("hit0", "hit1")]
            rows.append([name, *cells])
        parts.append(f"### {data}, first wrong token\n\n" + table(head, rows))
    if "alarms" in summary:
        title = f"### {data}, traces of the base with a token below −1"
        parts.append(f"{title}\n\n{alarm_table(summary)}")
    return parts


def alarm_table(summary: dict) -> str:
    """Of the base's wrong and right traces, the share in which a signal finds a token suspicious."""
    rows = []
    for name in FIRST:
        rows.append([CHOSEN_BY[name], *(percent(summary["alarms"][kind][name]) for kind in ("wrong", "right"))])
    return table(["a token below −1 is found, %", "in wrong traces of the base", "in right ones"], rows)


def changed_table(
    measured: Measured, part: str, short_form: bool = False, only: str = ""
) -> str:
    """One row per change: accuracies, what they have beyond the defaults', AUROC, collapses.

    `short_form` leaves out the flags, and the intervals of what is not compared; `only` shows the
    changes whose label begins so.
    """
    default = measured.of("words-main-256" if part == "variants" else f"{part}-default")
    fell = collapsed(measured.trials, measured.curves)
    rows = []
    for label, change in trials.CHANGES[part].items():
        name = f"{part}-{trials.plain(label)}"
        changed = measured.of(name)
        if not len(changed) or not label.startswith(only):
            continue
        row = [label]
        if not short_form:
            row.append(f"`{change}`")
        for column in ("t1", "greedy"):
            more = "–"
            if label != "default" and changed.index.isin(default.index).all():
                more = percent(beyond(changed, default, column), signed=True)
            row += [plain_cell(changed[column], short_form), more]
        row.append(plain_cell(changed["auroc"], short_form))
        rows.append([*row, str(len(changed)), str(fell[name].sum())])
    if not rows:
        return ""
    head = ["T = 1", "beyond the default", "greedy", "beyond the default", "AUROC", "seeds", "collapsed"]
    return table(["", *head] if short_form else ["", "flags", *head], rows)


def plain_cell(values: pandas.Series, short_form: bool) -> str:
    """A mean over seeds, with its interval unless the form is short."""
    value = interval(values)
    if value and short_form:
        value = value[:1]
    return percent(value)


def choice_tables(measured: Measured) -> list[str]:
    """SFT and GRPO on validation questions: how they were chosen.

    Of all shares of the base and temperatures only the best are shown; tuning.csv has them all.
    """
    parts = []
    for (data, method, size), looks in measured.tuning.groupby(["data", "method", "demonstrations"]):
        rows = []
        for (steps, rate), look in looks.groupby(["steps", "rate"]):
            row = [f"{steps} at {rate:g}"]
            for by, tricks in (("t1", False), ("t1", True), ("greedy", True)):
                one = choose.best(look, by, tricks)
                shown = f" ({one['share']}, {one['temperature']})" if tricks else ""
                row.append(f"{100 * one['t1']:.1f} / {100 * one['greedy']:.1f}{shown}")
            rows.append(row)
        head = ["T = 1 / greedy", "plain", "best at T = 1 (share of the base, temperature)", "best greedy (the same)"]
        title = f"### {data}: how {method.upper()} was chosen, {size} demonstrations"
        if method == "grpo":  # it has no demonstrations, and none of the tricks
            title = f"### {data}: how GRPO was chosen"
            head = head[:2]
            rows = [row[:2] for row in rows]
        parts.append(f"{title}, validation questions\n\n" + table(head, rows))
    chosen = irl_choices(measured)
    if chosen:
        title = "### countdown: how IRL was chosen, 64 demonstrations, validation questions"
        parts.append(f"{title}\n\n{chosen}")
    return parts


def early_stops(looks: pandas.DataFrame) -> list[float]:
    """A training's validation accuracy at its end; where its mean reward is highest; at its best.

    At the highest mean reward it could be stopped without an answer.

    >>> looks = {"validation/t1": [0.5, 0.7, 0.6], "reward/mean": [0.1, 0.0, -0.1]}
    >>> early_stops(pandas.DataFrame(looks))
    [0.6, 0.5, 0.7]
    """
    accuracy = looks["validation/t1"]
    stops = (accuracy.iloc[-1], accuracy[looks["reward/mean"].idxmax()], accuracy.max())
    return [float(stop) for stop in stops]


def irl_choices(measured: Measured) -> str:
    """What countdown's reward needs: each choice undone, on validation questions.

    f: mean and standard deviation of the head that the policy practised on at last; then what
    stopping early would have brought (early_stops).
    """
    rows = []
    for label, change in trials.CHOICES.items():
        name = f"chosen-{trials.plain(label)}"
        seeds = measured.of(name)
        if not len(seeds):
            continue
        row = [label, f"`{change}`" if change else ""]
        row += [percent(interval(seeds[column])) for column in ("t1", "greedy")]
        mean = seeds.mean(numeric_only=True)
        row += [f"{mean[f]:.2f} ± {mean[f'{f} deviation']:.2f}" for f in ("f right", "f wrong")]
        c = measured.curves
        looks = c[(c["trial"] == name) & (c["method"] == "irl")]
        stops = pandas.DataFrame([early_stops(one) for _, one in looks.groupby("seed")])
        row.append(" / ".join(f"{100 * stop:.0f}" for stop in stops.mean()))
        rows.append([*row, str(len(seeds))])
    head = [
        f"`{trials.LONG}` and",
        "flags",
        "T = 1",
        "greedy",
        "f of the base's right traces",
        "of its wrong ones",
        "T = 1 of 100: end / highest mean reward / best",
        "seeds",
    ]
    return table(head, rows) if rows else ""


def inference_tables(measured: Measured, data: str) -> list[str]:
    """Reranking on others' samples and on harder problems."""
    trial = f"{data}-inference"
    rows_of = measured.scores[measured.scores["trial"] == trial]
    parts = []
    for samples, group in rows_of.groupby("samples", sort=False):
        ns = sorted(int(q.split()[-1]) for q in group["quantity"].unique() if q.startswith("best"))
        chosen = [measured.scores_of(trial, samples, f"best of {n}") for n in ns]
        rows = [[rule, *(percent(found.get(rule)) for found in chosen)] for rule in RULES]
        head = ["chosen by", *(f"N = {n}" for n in ns)]
        text = f"### {data}, samples of: {samples}\n\n{table(head, rows)}"
        areas = measured.scores_of(trial, samples, "auroc")
        text += f"\n\nAUROC {percent(areas.get('reward'))}"
        hits = measured.scores_of(trial, samples, "natural hit0")
        places = [f"{name} {percent(hits[SIGNALS[name]])}" for name in FIRST if SIGNALS[name] in hits]
        if places:
            text += f"; first wrong token found by {', '.join(places)}"
        parts.append(text)
    return parts


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def save(figure, name: str) -> None:
    """The same results give the same file: no date in it, and names that do not change."""
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "results"}):
        figure.savefig(store.folder() / name, metadata={"Date": None})
    plt.close(figure)


def draw_collapses(measured: Measured) -> None:
    """A row per way to go wrong (docs/collapses.md), four metrics beside the default's."""
    curves = measured.curves[measured.curves["method"] == "irl"]
    names = {label: f"ablations-{trials.plain(label)}" for label in ("default", *WRONG)}
    wrong = [label for label in WRONG if names[label] in set(curves["trial"])]
    if not wrong:
        return
    size = (12, 1.9 * len(wrong))
    figure, grid = plt.subplots(len(wrong), len(TELLING), figsize=size, squeeze=False)
    for row, label in zip(grid, wrong):
        for axes, metric in zip(row, TELLING):
            for name, color in (("default", "0.45"), (label, "tab:orange")):
                looks = curves[curves["trial"] == names[name]]
                seeds = looks.pivot(index="step", columns="seed", values=metric)
                axes.plot(seeds, color=color, linewidth=0.6, alpha=0.6)
                axes.plot(seeds.mean(axis=1), color=color, linewidth=2, label=name)
            axes.set_title(metric, fontsize=9)
            axes.tick_params(labelsize=8)
        row[0].set_ylim(0, 1)
        row[0].legend(fontsize=8, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("policy step", fontsize=9)
    save(figure, "collapses.svg")


def draw_best_of_n(measured: Measured) -> None:
    """Best of N on the base's samples, N = 1 .. 64."""
    ns = [1, 2, 4, 8, 16, 32, 64]
    chosen = {n: measured.scores_of("words-inference", "base", f"best of {n}") for n in ns}
    ns = [n for n in ns if chosen[n]]
    if not ns:
        return
    rules = ["oracle", "reward", "sft_fair_logprob", "sft_logprob", "weighted_majority"]
    figure, axes = plt.subplots(figsize=(7, 4))
    for rule in (*rules, "majority", "random", "logprob"):
        means, lows, highs = zip(*(chosen[n][rule] for n in ns))
        axes.plot(ns, means, marker="o", markersize=3, label=rule)
        if lows[0] is not None:
            axes.fill_between(ns, lows, highs, alpha=0.15)
    axes.set(xscale="log", xticks=ns, xticklabels=ns, xlabel="N", ylabel="share right", ylim=(0, 1))
    axes.legend(fontsize=8, frameon=False)
    save(figure, "best-of-n.svg")


# ------------------------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------------------------


def readme_tables(summary: dict) -> dict[str, str]:
    """README.md's two small tables by their marks: accuracies, best of 8.

    Every number is in summary.json; what is missing is left out.
    """
    tasks = [task for task in ("words", "countdown") if task in summary]
    columns = [(task, n) for task in tasks for n in ("64", "256") if n in summary[task]["main"]]
    if not columns:
        return dict.fromkeys(("results", "inference"), NOTHING_YET)
    head = ["% right: T=1 / greedy"]
    for task, size in columns:
        n = summary[task]["seeds"][size]
        about = f"{n} seed{'s' if n > 1 else ''}, {summary[task]['questions']:,} questions"
        head.append(f"{task} {size}, {about}")
    rows = []
    for method, name in README_METHODS.items():
        row = [name]
        for task, size in columns:
            methods = summary[task]["main"][size]
            # fair SFT as it was best for the column
            greedy = "sft_fair_greedy" if method == "sft_fair" else method
            row.append(f"{short(methods[method]['t1'])} / {short(methods[greedy]['greedy'])}")
        rows.append(row)
    results = table(head, filled(rows))

    head = ["best of 8 of the base, chosen by"]
    head += [f"{task} {summary[task]['judged with']}" for task in tasks]
    rows = []
    for rule, name in README_CHOICES.items():
        row = [name]
        for task in tasks:
            grades = summary[task].get("own_grade", {})
            row.append(short(grades.get("8") if rule == "own_grade" else summary[task]["rerank"]["8"].get(rule)))
        rows.append(row)
    return {"results": results, "inference": table(head, filled(rows))}


def full_tables(summary: dict) -> str:
    """The results as docs/results.md has them: every number of theirs is in summary.json."""
    parts = []
    for task in ("words", "countdown"):
        if task in summary:
            parts += task_tables(task, summary[task])
    if not parts:
        return NOTHING_YET
    runs = f"collapses: {summary['collapses']} in {summary['runs']} runs of IRL in these tables"
    parts.append(f"*% right, or found: means over seeds with 95% intervals (Student's t); {runs}.*")
    return "\n\n".join(parts)


def task_tables(task: str, summary: dict) -> list[str]:
    """docs/results.md's tables of one kind of problems."""
    main = summary["main"]
    keys = {"t1": "T = 1", "greedy": "greedy"}
    head = [f"{task}, {summary['questions']:,} test questions"]
    for size in main:
        head += [f"{size} ({summary['seeds'][size]} seeds): {title}" for title in keys.values()]
    rows = []
    for method, name in NAMES.items():
        rows.append([name, *(percent(main[size][method][key]) for size in main for key in keys)])
    parts = [table(head, filled(rows))]

    ns = ("4", "8", "16")
    rows = []
    for rule, name in CHOSEN_BY.items():
        rows.append([name, *(percent(summary["rerank"][n].get(rule)) for n in ns)])
    rows = filled(rows)
    if "own_grade" in summary:
        rows.append(["the base's own grade", *(percent(summary["own_grade"].get(n)) for n in ns)])
    head = [f"{task}: best of N samples of the base, chosen by", *(f"N = {n}" for n in ns)]
    parts.append(table(head, rows))

    places = summary["localise"]
    if places:
        titles = {"natural": "the base's own errors", "single": "one planted error"}
        head = [f"{task}: exact first wrong token found, %", *(titles[kind] for kind in places)]
        rows = []
        for signal, name in POINTED_AT.items():
            rows.append([name, *(percent(places[kind]["hit0"][signal]) for kind in places)])
        parts.append(table(head, filled(rows)))  # a head that reads whole traces points nowhere
    if summary.get("alarms", {}).get("wrong", {}).get("reward"):
        parts.append(alarm_table(summary))
    gains = []
    for size, gain in summary["broken beyond irl"].items():
        if gain["t1"]:
            t1, greedy = (percent(gain[key], signed=True) for key in keys)
            gains.append(f"{size} demonstrations {t1} / {greedy}")
    if gains:
        title = f"{task}: from broken copies alone, beyond IRL with the same seed, T = 1 / greedy"
        parts.append(f"*{title}: {'; '.join(gains)}.*")
    area = summary["auroc"].get("reward")
    if area:
        line = f"{task}: AUROC of the reward, right against wrong traces: {percent(area)} in %"
        if summary["auroc"]["reward_broken"]:
            line += f"; from broken copies alone {percent(summary['auroc']['reward_broken'])}"
        parts.append(f"*{line}.*")
    return parts


def between_marks(text: str, part: str, new: str, by: str = "run") -> str:
    """`text` with what stands between the two marks of a part replaced; `by` which experiment.

    >>> text = "a <!-- x: by python -m experiments.run --> old <!-- end of x --> b"
    >>> text = between_marks(text, "x", "new")
    >>> "old" in text, text.startswith("a <!--"), text.endswith("--> b"), text.count("new")
    (False, True, True, 1)
    """
    mark = f"<!-- {part}: by python -m experiments.{by} -->"
    end = f"<!-- end of {part} -->"
    head, rest = text.split(mark)
    _, tail = rest.split(end)
    return f"{head}{mark}\n\n{new}\n\n{end}{tail}"


def pages(measured: Measured, summary: dict) -> dict[str, dict[str, str]]:
    """What stands between marks, by page and by part."""
    results = {"full": full_tables(summary), "chosen": irl_choices(measured)}
    for part in trials.CHANGES:
        results[part] = changed_table(measured, part, short_form=True)
    heads = changed_table(measured, "ablations", short_form=True, only="linear head")
    return {
        "README.md": readme_tables(summary),
        "docs/results.md": results,
        "docs/collapses.md": {"heads": heads},
    }


def into_page(text: str, parts: dict[str, str]) -> str:
    """A page's text with its parts in their places."""
    for part, new in parts.items():
        text = between_marks(text, part, new or NOTHING_YET)
    return text


def write() -> None:
    """summary.json, tables.md, two figures; and the tables in README.md and docs/results.md."""
    measured = Measured()
    summary = main_summary(measured)
    store.keep("summary.json", json.dumps(summary, indent=1) + "\n")
    parts = ["# Results\n\nWritten by `python -m experiments.run`. % right, mean over seeds with its 95% interval."]
    for data in measured.sizes():
        parts += main_tables(data, summary[data]) + inference_tables(measured, data)
    for part in trials.CHANGES:
        rows = changed_table(measured, part)
        size = "64 demonstrations of countdown" if part == "traces" else "256 demonstrations"
        if rows:
            parts.append(f"### {part.capitalize()}, {size}\n\n{rows}")
    parts += choice_tables(measured)
    failed = measured.trials.dropna(subset="error")
    if len(failed):
        names = (failed["trial"] + "-" + failed["seed"].astype(str)).unique()
        parts.append("Failed: " + ", ".join(sorted(names)))
    store.keep("tables.md", "\n\n".join(parts) + "\n")
    if store.folder() == store.ROOT / "results" and measured.sizes():
        for name, between in pages(measured, summary).items():
            text = (store.ROOT / name).read_text(encoding="utf-8")
            store.keep(f"../{name}", into_page(text, between))
    draw_collapses(measured)
    draw_best_of_n(measured)
    print(f"{store.folder() / 'summary.json'}, {store.folder() / 'tables.md'}")
