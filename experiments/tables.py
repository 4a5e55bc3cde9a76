"""The tables of the pages, and a picture, from what experiments/store.py keeps.

Every number is a mean over seeds, in percent, with half of its 95% interval (Student's t). Nothing
is made up for trials that are missing: their rows are.
"""

import matplotlib
import pandas

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import store, trials

# Two-sided 95% points of Student's t for 1, 2, .. degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# What a trial's name says: the task, what was tried, how many demonstrations.
NAME = r"^(words|countdown)-(.+?)(?:-(\d+))?$"
# Rows of the main table, by what was tried and the method. Fair SFT is trained twice.
ROWS = {
    ("main", "base"): "base",
    ("base-sharpened", "sft_fair"): "base_sharpened",
    ("main", "sft"): "sft",
    ("main", "sft_fair"): "sft_fair",
    ("fair-greedy", "sft_fair"): "sft_fair",
    ("main", "likelihood"): "likelihood_only",
    ("likelihood", "likelihood"): "likelihood_only",
    ("main", "irl"): "irl",
    ("broken", "irl"): "broken_only",
    ("own-grade", "irl"): "own_grade",
    ("grpo", "grpo"): "grpo",
}
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
METHODS = README_METHODS | {"base_sharpened": "base, logits divided by 0.2"}
README_CHOICES = {
    "random": "at random",
    "majority": "majority vote",
    "logprob": "base's log-probability",
    "sft_fair_logprob": "fair SFT's log-probability",
    "longest": "the longest",
    "own_grade": "base's own grade",
    "reward": "**learned reward**",
    "reward_broken": "sparse, broken copies",
    "oracle": "oracle",
}
# Of these trials the reward's scores alone are of interest: the others are those of the main part.
REWARDS = {"broken": "reward_broken", "own-grade": "own_grade"}
# What points at a token.
SIGNALS = {
    "reward_first": "**reward**: first token below −1",
    "sft_logprob_first": "SFT's log-probability: first below −1",
    "sft_fair_logprob_first": "fair SFT's log-probability: first below −1",
    "logprob_first": "base's log-probability: first below −1",
    "reward": "reward: lowest token",
    "reward_drop": "reward: largest drop",
    "sft_logprob": "SFT's log-probability: lowest",
    "sft_fair_logprob": "fair SFT's log-probability: lowest",
    "logprob": "base's log-probability: lowest",
    "chance": "chance",
}
# docs/collapses.md: ways to go wrong, what each is compared with, and the metrics that tell.
WRONG = {
    "ablations-linear-head": "ablations-default",
    "ablations-random-reward": "ablations-default",
    "traces-AIRL-logit": "traces-default",
    "traces-a-score-per-step": "traces-default",
}
TELLING = ["validation/t1", "reward/mean", "rollout/length", "rollout/entropy"]


# --- numbers as text, and texts as tables ---


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


def percent(value: list | None) -> str:
    """[0.825, 0.81, 0.84] as '82.5 [81.0, 84.0]'.

    >>> percent([0.825, 0.81, 0.84]), percent([0.825]), percent(None)
    ('82.5 [81.0, 84.0]', '82.5', '–')
    """
    if value is None:
        return "–"
    mean, *ends = (f"{100 * number:.1f}" for number in value)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def cell(values) -> str:
    """What several seeds have: mean ± t s / sqrt(n). One seed has no interval, none has nothing.

    >>> cell([0.8, 0.9]), cell([0.8]), cell([float("nan")])
    ('85.0±63.5', '80.0', '–')
    """
    known = pandas.Series(values, dtype=float).dropna()
    mean = known.mean()
    if len(known) < 2:
        return short([mean, None, None] if len(known) else None)
    half = T95[len(known) - 2] * known.sem()
    return short([mean, mean - half, mean + half])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(corner: str, cells: pandas.DataFrame, names: dict[str, str]) -> str:
    """A frame of texts as a Markdown table: the rows that have a name, in the names' order."""
    cells = cells.reindex([name for name in names if name in cells.index]).fillna("–")
    rows = [[names[row[0]], *row[1:]] for row in cells.itertuples()]
    return table([corner, *cells.columns], rows)


def grid(corner: str, rows: pandas.DataFrame, names: dict, by: list, heads: dict, *values) -> str:
    """A Markdown table of the means over seeds of one or more values.

    rows: they have a name, a seed and these values; names: {name: its text in the table}; by:
    columns that tell the table's columns apart; heads: {what stands there: its text in the table}.
    """
    cells = None
    for value in values:
        texts = rows.pivot_table(index="name", columns=by, values=value, aggfunc=cell)
        cells = texts if cells is None else cells + " / " + texts
    cells = cells[[head for head in heads if head in cells]].dropna(how="all")
    cells.columns = [heads[head] for head in cells]
    return markdown(corner, cells, names)


# --- the tables ---


def main_table(trained: pandas.DataFrame, names: dict[str, str]) -> str:
    """Accuracies of every method, by task and number of demonstrations."""
    rows = trained.copy()
    rows[["task", "tried", "size"]] = rows["trial"].str.extract(NAME)
    rows["name"] = [ROWS.get(key) for key in zip(rows["tried"], rows["method"])]
    # Fair SFT stands in each column as it was best for it.
    rows.loc[rows["tried"] == "fair-greedy", "t1"] = None
    rows.loc[(rows["tried"] == "main") & (rows["name"] == "sft_fair"), "greedy"] = None
    # What takes no demonstrations stands beside both sizes.
    rows["size"] = rows["size"].fillna("64 256").str.split()
    rows = rows.explode("size").dropna(subset="name")
    irl = rows[rows["name"] == "irl"].groupby(["task", "size"])
    counts = irl.agg({"seed": "nunique", "questions": "max"}).sort_index(ascending=False)
    heads = {
        (task, size): f"{task} {size}, {seeds} seeds, {questions:,.0f} questions"
        for (task, size), seeds, questions in counts.itertuples()
    }
    return grid("% right: T=1 / greedy", rows, names, ["task", "size"], heads, "t1", "greedy")


def score_table(corner: str, names: dict[str, str], quantities: dict[str, str]) -> str:
    """Numbers of scores.csv with 256 demonstrations. quantities: {quantity: its text}."""
    rows = store.read("scores")
    rows[["task", "tried", "size"]] = rows["trial"].str.extract(NAME)
    rows = rows[rows["size"] != "64"]
    rows["name"] = rows["by"].where(rows["tried"] == "main", rows["tried"].map(REWARDS))
    rows = rows[(rows["tried"] == "main") | (rows["by"] == "reward")]
    heads = {
        (task, quantity): task + text
        for task in trials.MAIN
        for quantity, text in quantities.items()
    }
    return grid(corner, rows, names, ["task", "quantity"], heads, "value")


def changed_table(trained: pandas.DataFrame, part: str) -> str:
    """One row per change: what it has, and what that is beyond the same seed of the default."""
    rows = trained[trained["trial"].str.startswith(part) & (trained["method"] == "irl")]
    rows = rows.rename(columns={"t1": "T = 1", "auroc": "AUROC"}).set_index(["trial", "seed"])
    accuracy = rows[["T = 1", "greedy"]]
    default = accuracy.reindex([f"{part}-default"], level="trial").droplevel("trial")
    beyond = accuracy.sub(default, level="seed").add_suffix(", beyond the default")
    cells = accuracy.join(beyond).join(rows["AUROC"]).groupby("trial").agg(cell)
    cells["seeds"] = rows.groupby("trial").size().astype(str)
    names = {}
    for label, flags in trials.CHANGES[part].items():
        names[f"{part}-{label}"] = f"{label.replace('-', ' ')} `{flags}`".replace(" ``", "")
    return markdown("", cells, names)


def chosen(trained: pandas.DataFrame) -> pandas.DataFrame:
    """What was best on validation questions, by task and size (or GRPO) and by what counted."""
    rows = trained[trained["trial"].str.startswith("tune") & (trained["method"] != "base")]
    of = rows["trial"].str.extract(r"^tune-(\w+-\w+)")[0]
    rows = rows.assign(of=of, flags=rows["command"].str.extract("(--(?:fair|grpo)-steps .*)")[0])
    plain = rows[rows["flags"].str.contains(f"{trials.PLAIN}|grpo")]
    fair = rows[~rows["of"].str.contains("grpo")]
    best = {}
    for title, tried, first, then in (
        ("plain", plain, "t1", "greedy"),
        ("best at T = 1", fair, "t1", "greedy"),
        ("best greedy", fair, "greedy", "t1"),
    ):
        ordered = tried.sort_values([first, then], ascending=False)
        best[title] = ordered.groupby("of").first()[["flags", "t1", "greedy"]]
    return pandas.concat(best).swaplevel().sort_index()


def draw_collapses() -> None:
    """A row per way to go wrong (docs/collapses.md), four metrics beside the default's."""
    curves = store.read("curves")
    figure, axes = plt.subplots(len(WRONG), len(TELLING), figsize=(12, 1.9 * len(WRONG)))
    for row, (wrong, default) in zip(axes, WRONG.items()):
        for part, metric in zip(row, TELLING):
            for trial in (default, wrong):
                looks = curves[(curves["trial"] == trial) & (curves["method"] == "irl")]
                part.plot(looks.groupby("step")[metric].mean(), label=trial)
            part.set_title(metric, fontsize=9)
        row[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    # the same results give the same file: no date in it, and names that do not change
    with plt.rc_context({"svg.hashsalt": "results"}):
        figure.savefig(store.folder() / "collapses.svg", metadata={"Date": None})


# --- pages ---


def pages() -> dict[str, dict[str, str]]:
    """The tables, by page and by the part of the page."""
    trained = store.read("trials")
    best = chosen(trained)
    best[["t1", "greedy"]] = (100 * best[["t1", "greedy"]]).round(1)
    results = {
        "methods": main_table(trained, METHODS),
        "choices": score_table(
            "of the base's samples, chosen by",
            README_CHOICES,
            {f"best of {n}": f", N = {n}" for n in (4, 8, 16)} | {"auroc": ", AUROC"},
        ),
        "places": score_table(
            "exact first wrong token, found by",
            SIGNALS,
            {"natural hit0": ": the base's own errors", "single hit0": ": one planted error"},
        ),
        "tuning": markdown(
            "on validation questions", best.map(str), {key: ", ".join(key) for key in best.index}
        ),
    }
    for part in trials.CHANGES:
        results[part] = changed_table(trained, part)
    return {
        "README.md": {"results": main_table(trained, README_METHODS)},
        "docs/results.md": results,
    }


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


def write() -> None:
    """Print the tables; those of results/ go into the pages, too, with the picture."""
    for name, parts in pages().items():
        path = store.ROOT / name
        page = path.read_text(encoding="utf-8")
        for part, new in parts.items():
            print(f"{new}\n")
            page = between_marks(page, part, new)
        if store.folder() == store.ROOT / "results":
            path.write_text(page, encoding="utf-8")
    draw_collapses()
