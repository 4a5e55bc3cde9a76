"""One page about one run: results, training curves, and the reward of every token, in a single HTML file.

    1. read_run           settings.json, metrics.jsonl, results.json, traces.json; any of them may be missing
    2. small formatters   numbers, intervals, tables
    3. draw               a matplotlib figure -> inline SVG that follows the page's light or dark colours
    4. sections           results, training, choosing, the reward, localisation, traces
    5. write_report       all of it -> <run>/report.html

The page loads nothing and runs nothing. Traces are text that a language model wrote: all of it is escaped,
and a content security policy forbids scripts and the network should something slip through.

Run `python -m show.report runs/demo`.
"""

import io
import json
import os.path
import re
import sys
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath

from engine.errors import Parser, UserError, exit_status, printable

# key: (name, what it learns from). A method has one colour on the whole page: the CSS variable of its key.
METHODS = {
    "base": ("Base", "nothing: the policy before training"),
    "sft": ("SFT", "expert demonstrations"),
    "sft_fair": ("SFT, averaged and sharpened", "expert demonstrations"),
    "likelihood": ("IRL without its discriminator", "expert demonstrations"),
    "irl": ("IRL", "expert demonstrations"),
    "grpo": ("GRPO", "the true answers, checked"),
}
# key: (name, colour, line, marker) of a way to choose one of N samples; without a colour it only gets numbers
RULES = {
    "oracle": ("oracle", "ink", ":", ""),
    "reward": ("reward", "irl", "-", "o"),
    "weighted_majority": ("majority, weighted by reward", "", "", ""),
    "majority": ("majority", "other", "--", "s"),
    "sft_logprob": ("SFT log-prob", "sft", "-", "^"),
    "sft_fair_logprob": ("averaged SFT log-prob", "sft_fair", "-", "^"),
    "logprob": ("policy log-prob", "base", "-", "v"),
    "random": ("random", "soft", ":", ""),
    "longest": ("longest", "", "", ""),
    "shortest": ("shortest", "", "", ""),
    "reward_mean": ("reward: mean token", "", "", ""),
    "reward_lowest": ("reward: lowest token", "", "", ""),
    "reward_last": ("reward: last token", "", "", ""),
    "reward_discounted": ("reward: discounted sum", "", "", ""),
}
POINTERS = {
    "reward": "reward: lowest token",
    "reward_first": "reward: first below -1",
    "sft_logprob_first": "SFT log-prob: first below -1",
    "sft_fair_logprob_first": "averaged SFT log-prob: first below -1",
    "logprob_first": "policy log-prob: first below -1",
    "reward_drop": "reward: largest drop",
    "sft_logprob": "SFT log-prob: lowest",
    "sft_fair_logprob": "averaged SFT log-prob: lowest",
    "logprob": "policy log-prob: lowest",
    "entropy": "policy entropy: highest",
    "chance": "chance",
    "chance_reward": "chance, where the reward is read",
}
# (title, a share?, lines, caption); a line is (method, metric, its name in the legend)
PANELS = (
    ("Right at T = 1, validation", True,
     (("sft", "validation/t1", "SFT"), ("sft_fair", "validation/t1", "SFT to be averaged"),
      ("likelihood", "validation/t1", "likelihood alone"), ("irl", "validation/t1", "IRL"),
      ("grpo", "validation/t1", "GRPO")),
     "Healthy: rises, then levels off. A fall after a rise: the policy has begun to exploit the reward."),
    ("SFT loss", False, (("sft", "policy/loss", "SFT"), ("sft_fair", "policy/loss", "SFT to be averaged")),
     "Healthy: falls fast, then flattens. Close to zero, it is learning the demonstrations by heart."),
    ("Discriminator, warm-up", True,
     (("warm-up", "discriminator/d_expert", "expert"),
      ("warm-up", "discriminator/d_negative", "negative")),
     "Its probability that a token is the expert's, before the policy moves. Healthy: the lines part."),
    ("Discriminator, during IRL", True,
     (("irl", "discriminator/d_expert", "expert"),
      ("irl", "discriminator/d_negative", "negative")),
     "Healthy: apart, then nearer as the policy improves. At 1 and 0 it is too strong to say much."),
    ("Discriminator accuracy", True, (("irl", "discriminator/accuracy", "IRL"),),
     "Healthy: near one half, as most tokens of a wrong trace are right. Near 1, it goes by something other than errors."),
    ("Learned reward, IRL", False, (("irl", "reward/mean", "IRL"),),
     "Of the policy's own samples. Relearned, so flat is fine. Rising while validation falls is not."),
    ("True reward, GRPO", True, (("grpo", "reward/mean", "GRPO"),),
     "Share of samples that the answer check accepts. Healthy: rises. Only GRPO ever sees this number."),
    ("Entropy of the policy", False,
     (("irl", "rollout/entropy", "IRL"), ("grpo", "rollout/entropy", "GRPO")),
     "Healthy: sinks slowly. At zero all samples of a question are the same: nothing left to compare."),
    ("Length of samples, tokens", False,
     (("irl", "rollout/length", "IRL"), ("grpo", "rollout/length", "GRPO")),
     "Healthy: stays near the experts' length. Steady growth is the usual first sign of a hacked reward."),
    ("Samples that end by themselves", True,
     (("irl", "rollout/finished", "IRL"), ("grpo", "rollout/finished", "GRPO")),
     "Healthy: near 100%. The others ran into the length limit."),
    ("Policy loss, IRL", False, (("irl", "policy/loss", "IRL"),),
     "Has no target and need not fall, as the reward changes under it. Only jumps mean something."),
    ("Gradient norm", False,
     (("irl", "policy/grad_norm", "IRL"), ("grpo", "policy/grad_norm", "GRPO")),
     "Healthy: the same order of magnitude throughout. Spikes ask for a smaller learning rate."),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# 1. Reading
# ------------------------------------------------------------------------------------------------------------


def read_run(run: Path) -> dict:
    """What a run's four files hold, and under "missing" the names of those that are not there."""
    names = {"settings": "settings.json", "metrics": "metrics.jsonl", "results": "results.json",
             "traces": "traces.json"}  # fmt: skip
    parts: dict = {"settings": {}, "metrics": [], "results": {}, "traces": []}
    missing = [name for name in names.values() if not os.path.isfile(run / name)]
    if len(missing) == len(names):
        raise UserError(f"{run} is not the folder of a run: none of {', '.join(missing)} is there")
    for key, name in names.items():
        if name in missing:
            continue
        try:
            text = (run / name).read_text(encoding="utf-8", errors="replace")
            found = parse_lines(text) if key == "metrics" else json.loads(text)
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"cannot read {run / name}: {error}") from None
        if not shallow(found):
            raise UserError(f"{run / name}: its JSON is nested too deeply to show")
        if not isinstance(found, type(parts[key])):
            raise UserError(f"{run / name}: expected a JSON {'object' if parts[key] == {} else 'list'}")
        parts[key] = found
    return parts | {"missing": missing}


def parse_lines(text: str) -> list[dict]:
    """The objects in JSON lines. A last line cut in two is left out: the run still goes on, or was stopped.

    >>> parse_lines('{"step": 1}\\n{"st')
    [{'step': 1}]
    """
    lines, records = text.strip().split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number}: {error}") from None
    return [record for record in records if isinstance(record, dict)]


def shallow(value, levels: int = 20) -> bool:
    """Whether JSON is nested at most `levels` deep: what comes after walks it by recursion.

    >>> shallow([{"a": [1]}], 3), shallow([{"a": [1]}], 2)
    (True, False)
    """
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    nested = [child for child in children if isinstance(child, (dict, list))]
    return (levels > 0 or not isinstance(value, (dict, list))) and all(shallow(child, levels - 1) for child in nested)


def mapping(value) -> dict:
    """`value` if it is a JSON object, else an empty one: what is missing, null or odd shows nothing."""
    return value if isinstance(value, dict) else {}


def items(value) -> list:
    """The same for a list."""
    return value if isinstance(value, list) else []


def dig(tree, *keys):
    """tree[a][b]..., None where there is no such thing.

    >>> dig({"a": {"b": 1}}, "a", "b"), dig({"a": 3}, "a", "b")
    (1, None)
    """
    for key in keys:
        tree = mapping(tree).get(key)
    return tree


def finite(value) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None


def interval(value) -> tuple[float, float | None, float | None] | None:
    """(mean, low, high) of what results.json holds for a number: [mean, low, high], or the number alone.

    >>> interval([0.5, 0.4, 0.6]), interval(0.5), interval(None)
    ((0.5, 0.4, 0.6), (0.5, None, None), None)
    """
    values = [finite(v) for v in (value if isinstance(value, list) else [value])]
    mean, low, high = (values + [None] * 3)[:3]
    return None if mean is None else (mean, low, high) if None not in (low, high) else (mean, None, None)


def intervals(tree, *keys) -> dict[int, tuple]:
    """{n: interval of tree[n][keys]...} for those keys of `tree` that are whole numbers, in their order.

    >>> intervals({"16": 0.9, "2": [0.5, 0.4, 0.6], "auroc": 1})
    {2: (0.5, 0.4, 0.6), 16: (0.9, None, None)}
    """
    numbers = sorted(int(key) for key in mapping(tree) if re.fullmatch("[1-9][0-9]{0,5}", key))
    found = {n: interval(dig(tree, str(n), *keys)) for n in numbers}
    return {n: value for n, value in found.items() if value}


def series(metrics: list[dict], method: str, key: str, most: int = 400) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric, thinned to about `most`. Of a step logged twice the later counts.

    >>> series([{"method": "irl", "step": 1, "reward/mean": 0.5}], "irl", "reward/mean")
    ([1.0], [0.5])
    """
    points = {}
    for record in metrics:
        step, value = finite(record.get("step")), finite(record.get(key))
        if record.get("method") == method and step is not None and value is not None:
            points[step] = value
    ordered = sorted(points.items())[:: max(1, len(points) // most)]
    return [step for step, _ in ordered], [value for _, value in ordered]


# ------------------------------------------------------------------------------------------------------------
# 2. Formatting
# ------------------------------------------------------------------------------------------------------------


def percent(value) -> str:
    """An interval as a table cell: '31.0%' and, smaller, its bounds."""
    found = interval(value)
    if found is None:
        return '<span class="soft">–</span>'
    mean, low, high = found
    bounds = "" if low is None else f" <small>{100 * low:.1f} to {100 * high:.1f}</small>"
    return f"{100 * mean:.1f}%{bounds}"


def signed(value: float) -> str:
    """'+0.41', with a real minus sign below zero."""
    return f"{value:+.2f}".replace("-", "−")


def table(head: list[str], rows: list[list[str]], label: str) -> str:
    """Rows of HTML cells as a table in a box that scrolls where it is too narrow; nothing without rows."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
            f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def tidy(value):
    """Settings for a page that people share: of an absolute path only the last name is shown."""
    if isinstance(value, dict):
        return {key: tidy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [tidy(item) for item in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive):
        return PureWindowsPath(value).name or value  # a Windows path splits at both kinds of slash
    return value


def pairs(tree: dict, label: str) -> str:
    """A JSON object as a table of names and values."""
    rows = []
    for key, value in tidy(tree).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append([escape(str(key)), f"<code>{escape(text)}</code>"])
    return table(["name", "value"], rows, label)


def section(anchor: str, title: str, intro: str, *parts: str) -> str:
    """A titled part of the page; nothing if none of its parts has anything to show."""
    head = f'<section id="{anchor}"><h2>{title}</h2><p class="intro">{intro}</p>'
    return f"{head}{''.join(parts)}</section>" if any(parts) else ""


def card(picture: str, title: str, caption: str) -> str:
    """A picture or a table with its title and its caption; nothing without the picture."""
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{caption}</figcaption></figure>" if picture else ""


def grid(kind: str, cards: list[str]) -> str:
    """Cards side by side, as many as fit. kind: 'small' or 'large'."""
    return f'<div class="grid {kind}">{"".join(cards)}</div>' if any(cards) else ""


def fold(summary: str, body: str) -> str:
    """What waits behind a click; nothing without a body."""
    return f"<details><summary>{summary}</summary>{body}</details>" if body else ""


# ------------------------------------------------------------------------------------------------------------
# 3. Figures. Matplotlib knows no CSS variables: it draws in colours that stand for them, renamed in the SVG.
# ------------------------------------------------------------------------------------------------------------

COLOURS = ("ink", "soft", "line", "base", "sft", "sft_fair", "likelihood", "irl", "grpo", "other", "right", "wrong")
PAINT = {name: f"#0a0b{index:02x}" for index, name in enumerate(COLOURS)}
STYLE = {
    "font.size": 10, "text.color": PAINT["ink"], "axes.labelcolor": PAINT["soft"],
    "axes.edgecolor": PAINT["line"], "xtick.color": PAINT["line"], "ytick.color": PAINT["line"],
    "xtick.labelcolor": PAINT["soft"], "ytick.labelcolor": PAINT["soft"], "axes.grid": True,
    "grid.color": PAINT["line"], "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.frameon": False, "legend.fontsize": 9.5,
    "text.usetex": False, "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # ids do not depend on the day
}  # fmt: skip
SMALL, LARGE = (3.7, 2.4), (4.4, 3.1)  # inches


def draw(name: str, label: str, paint, size: tuple[float, float]) -> str:
    """What paint(axes) draws, as inline SVG. `name` is unique in the page, `label` is for screen readers."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report's figures need matplotlib: pip install matplotlib") from None
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        paint(axes)
        lines = len(axes.get_legend_handles_labels()[0])
        if lines > 1:
            columns = lines if lines <= 4 else 3
            figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.0)
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return inline(text.getvalue(), name, label)


def inline(svg: str, name: str, label: str) -> str:
    """An SVG file made fit for an HTML page: no prologue, no links, ids of its own, the page's colours."""
    box = re.search(r'viewBox="[^"]*"', svg).group()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style[^<]*</style>", "", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body.replace("xlink:href", "href"))
    for colour, stand_in in PAINT.items():
        body = body.replace(stand_in, f"var(--{colour})")
    return f'<svg {box} role="img" aria-label="{escape(label)}">{body}'


def as_share(axes, highest: float) -> None:
    """A vertical axis in percent, from 0 to a round number that is not far above `highest`."""
    from matplotlib.ticker import PercentFormatter

    steps = {0.1: 5, 0.2: 4, 0.4: 4, 0.6: 3, 0.8: 4, 1.0: 4}  # so that the top one has its number
    top = next((top for top in steps if top >= highest), None)
    if top is not None:
        axes.set_ylim(-0.02 * top, 1.03 * top)
        axes.set_yticks([top * step / steps[top] for step in range(steps[top] + 1)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def curves(name: str, title: str, share: bool, lines: list[tuple]) -> str:
    """Metrics against steps, long ones under their running mean. lines: (colour, legend, steps, values)."""

    def paint(axes):
        for colour, legend, steps, values in lines:
            style = "--" if legend == "negative" else "-"
            if len(values) > 40:
                axes.plot(steps, values, color=PAINT[colour], alpha=0.25, linewidth=1)
                near = len(values) // 20
                windows = [values[max(0, i - near) : i + near + 1] for i in range(len(values))]
                values = [sum(window) / len(window) for window in windows]
            marker = "o" if len(values) <= 20 else ""
            axes.plot(steps, values, style, color=PAINT[colour], label=legend, marker=marker)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.locator_params(axis="y", nbins=5)
        if share:
            as_share(axes, max(max(values) for *_, values in lines))

    return draw(name, f"{title} against training step", paint, SMALL)


def against(name: str, label: str, xlabel: str, lines: list[tuple]) -> str:
    """Shares against 1, 2, 4, ... lines: (colour, style, marker, legend, with a band?, {x: interval})."""
    ticks = sorted({x for *_, points in lines for x in points})

    def paint(axes):
        for colour, style, marker, legend, band, points in lines:
            means = [mean for mean, _, _ in points.values()]
            axes.plot(list(points), means, style, color=PAINT[colour], marker=marker, label=legend)
            bounded = {x: point for x, point in points.items() if point[1] is not None}
            if band and bounded:
                _, low, high = zip(*bounded.values())
                axes.fill_between(list(bounded), low, high, color=PAINT[colour], alpha=0.16, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(xlabel)
        as_share(axes, max(mean for *_, points in lines for mean, _, _ in points.values()))

    return draw(name, label, paint, LARGE) if ticks else ""


def histograms(right: list[float], wrong: list[float]) -> str:
    """The rewards of right and of wrong traces over each other, both with area one."""
    pooled = sorted(right + wrong)
    if not pooled:
        return ""
    edge = len(pooled) // 200  # half a percent on either side goes into the outermost bins
    low, high = pooled[edge], pooled[-1 - edge]
    if high - low < 1e-6 * max(abs(low), abs(high), 1.0):  # too near each other to make bins of
        margin = 0.5 * max(abs(low), abs(high), 1.0)
        low, high = low - margin, high + margin
    look = {"bins": 30, "range": (low, high), "density": True, "histtype": "stepfilled"}

    def paint(axes):
        for values, name, line in ((right, "right", "-"), (wrong, "wrong", "--")):
            if values:
                inside = [min(max(value, low), high) for value in values]
                axes.hist(inside, color=PAINT[name], alpha=0.25, **look)
                axes.hist(inside, edgecolor=PAINT[name], facecolor="none", linewidth=1.6, linestyle=line,
                          label=f"{name} answer ({len(values)})", **look)  # fmt: skip
        axes.set_xlabel("reward of the trace")
        axes.set_ylabel("share of traces")
        axes.set_yticks([])

    return draw("histogram", "Reward of traces with a right and with a wrong answer", paint, LARGE)


# ------------------------------------------------------------------------------------------------------------
# 4. Sections
# ------------------------------------------------------------------------------------------------------------


def results_section(results: dict) -> str:
    """How well each method answers, as a table."""
    methods = mapping(results.get("methods"))
    rows = []
    for key in [k for k in METHODS if k in methods] + [k for k in methods if k not in METHODS]:
        name, learns_from = METHODS.get(key, (key, "–"))
        colour = key if key in METHODS else "soft"
        t1, greedy = ([dig(methods, key, of), *items(dig(methods, key, of + "_interval"))]
                      for of in ("t1", "greedy"))  # fmt: skip
        seconds = finite(dig(methods, key, "seconds"))
        dot = f'<span class="dot" style="background:var(--{colour})"></span>'
        took = '<span class="soft">–</span>' if seconds is None else f"{seconds:,.0f} s"
        label = dot + escape(name) + " *" * (key == "grpo")
        rows.append([label, percent(t1), percent(greedy), strip(t1, colour), escape(learns_from), took])
    head = ["method", "right at T = 1", "right, greedy", "T = 1, 0 to 100%", "learns from", "training time"]
    note = ('<p class="note">* GRPO alone sees the true answers of the training questions. '
            "That makes it no competitor.</p>") * ("grpo" in methods)  # fmt: skip
    intro = "Share of test questions answered right, with 95% bootstrap intervals over questions."
    return section("results", "Results", intro, table(head, rows, "Results"), note)


def strip(value: list, colour: str) -> str:
    """A small drawing of an interval on the line from 0 to 1."""
    found = interval(value)
    if found is None:
        return ""
    mean, low, high = (100 * min(max(found[0] if v is None else v, 0.0), 1.0) for v in found)
    return (
        f'<span class="strip" style="color:var(--{colour})">'
        f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{mean:.1f}%"></b></span>'
    )


def training_section(metrics: list[dict]) -> str:
    """One small figure per metric that was logged."""
    cards = []
    for index, (title, share, lines, caption) in enumerate(PANELS):
        found = [(method if method in METHODS else "irl", legend, *series(metrics, method, key))
                 for method, key, legend in lines]  # fmt: skip
        found = [line for line in found if line[2]]
        if found:
            cards.append(card(curves(f"curve{index}", title, share, found), title, caption))
    intro = "Each figure says what a healthy run looks like. Pale: as logged; strong: running mean."
    return section("training", "Training", intro, grid("small", cards))


def choosing_section(results: dict) -> str:
    """pass@k of every method, and how well each rule chooses one of N samples."""
    passes = [(key, "-", "o", name, False, points) for key, (name, _) in METHODS.items()
              if (points := intervals(dig(results, "methods", key, "pass@k")))]  # fmt: skip
    rerank = mapping(results.get("rerank"))
    known = {key: points for key in RULES if (points := intervals(rerank, key))}
    rules = [(colour, line, marker, name, key == "reward", known[key])
             for key, (name, colour, line, marker) in RULES.items() if colour and key in known]  # fmt: skip
    sizes = sorted({n for points in known.values() for n in points})
    rows = [[RULES[key][0]] + [percent(dig(rerank, str(n), key)) for n in sizes] for key in known]
    head = ["rule"] + [f"N = {n}" for n in sizes]
    intro = "What a policy can do in k tries, and which rule picks the right one of N samples."
    cards = [
        card(against("passk", "pass@k of each method", "k", passes), "pass@k",
             "Chance that at least one of k samples is right. A method that only sharpens the base gains on "
             "the left and loses on the right."),
        card(against("bestof", "Best of N by each rule", "N", rules), "Best of N",
             "Keep one of N samples of the same policy. The oracle finds a right one if there is any. The "
             "band is the 95% interval of the reward."),
    ]  # fmt: skip
    every = fold("All rules in numbers", table(head, rows, "All rules"))
    return section("choosing", "More than one sample", intro, grid("large", cards), every)


def reward_section(results: dict) -> str:
    """Does the reward know right traces from wrong ones, which it was never told?"""
    right, wrong = ([v for v in map(finite, items(dig(results, "distributions", key))) if v is not None]
                    for key in ("right", "wrong"))  # fmt: skip
    found = {key: interval(value) for key, value in mapping(dig(results, "rerank", "auroc")).items()}
    aurocs = {key: value[0] for key, value in found.items() if value}
    auroc = aurocs.get("reward", finite(dig(results, "reward", "auroc")))
    said = ""
    if auroc is not None:
        said = f"AUROC <strong>{auroc:.3f}</strong>: how often right beats wrong; 0.5 is chance."
    rows = [[escape(RULES.get(key, [key])[0]), f"{aurocs[key]:.3f}"]
            for key in sorted(aurocs, key=aurocs.get, reverse=True)]  # fmt: skip
    cards = [
        card(histograms(right, wrong), "Reward of traces",
             f"Healthy: two hills, that of the right answers further right. {said}"),
        card(table(["score of a trace", "AUROC"], rows, "AUROC"), "AUROC of each score",
             "For telling traces with a right answer from those with a wrong one."),
    ]  # fmt: skip
    intro = "The reward never saw whether an answer was right. Does it know?"
    more = fold("The reward in numbers", pairs(mapping(results.get("reward")), "The reward in numbers"))
    shown = grid("large", cards) or (said and f"<p>{said}</p>")
    return section("reward", "Right against wrong", intro, shown, more)


def localisation_section(results: dict) -> str:
    """How often each score points at the first wrong token."""
    columns = {"hit0": "that token", "hit1": "at most 1 off", "step": "same step"}
    kinds = {"natural": ("The policy's own errors", "wrong traces that the policy wrote"),
             "single": ("One planted error", "expert traces with one thing broken")}  # fmt: skip
    cards = []
    for kind, (title, what) in kinds.items():
        tree = mapping(dig(results, "localise", kind))
        present = [column for column in columns if mapping(tree.get(column))]
        rows = [[name] + [percent(tree[column].get(key)) for column in present]
                for key, name in POINTERS.items() if any(key in tree[c] for c in present)]  # fmt: skip
        count = finite(tree.get("count"))
        caption = what if count is None else f"{count:,.0f} {what}"
        head = ["pointer"] + [columns[column] for column in present]
        cards.append(card(table(head, rows, title), title, f"In {caption}."))
    intro = "How often a score points at the first wrong token. To be useful, the reward must beat the rest."
    return section("localisation", "Finding the first wrong token", intro, grid("large", cards))


def reward_scale(traces: list[dict]) -> float:
    """The reward that gets full colour: the 98th percentile of |reward|. An outlier must not bleach the page.

    >>> reward_scale([{"rewards": [-2.0, 1.0]}]), reward_scale([])
    (2.0, 1.0)
    """
    rewards = [finite(reward) for trace in traces for reward in items(trace.get("rewards"))]
    sizes = sorted(abs(reward) for reward in rewards if reward is not None)
    return (sizes[round(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0


def visible(text: str) -> str:
    r"""A token as HTML that shows what it is: newlines as a sign and a break, control characters in hex.

    >>> visible("<b>\n"), visible("\r"), visible("")
    ('&lt;b&gt;⏎<br>', '\\x0d', '∅')
    """
    return escape(printable(str(text))).replace("\n", "⏎<br>") or "∅"


def token_span(index: int, token: str, reward: float | None, scale: float, first: bool,
               predicted: bool) -> str:  # fmt: skip
    """One token: its reward as the background, and in words in the tooltip."""
    depth = max(-1.0, min((reward or 0.0) / scale, 1.0))
    classes = "t" + " up" * (depth > 0) + " down" * (depth < 0) + " first" * first + " pointed" * predicted
    said = f"token {index}: " + ("no reward" if reward is None else f"reward {signed(reward)}")
    said += ", first wrong token" * first + ", predicted" * predicted
    inside = visible(token)
    after = "<br>" * inside.endswith("<br>")  # outside the span: an outlined token stays in one piece
    inside = inside.removesuffix("<br>")
    return f'<span class="{classes}" style="--d:{abs(depth):.2f}" title="{said}">{inside}</span>{after}'


def trace_card(trace: dict, scale: float) -> str:
    """One trace: the question, where it comes from, its tokens."""
    tokens, rewards = items(trace.get("tokens")), [finite(reward) for reward in items(trace.get("rewards"))]
    rewards += [None] * (len(tokens) - len(rewards))
    places = {"first wrong token": trace.get("first_wrong"), "predicted": trace.get("predicted")}
    spans = [token_span(index, token, reward, scale, *(index == place for place in places.values()))
             for index, (token, reward) in enumerate(zip(tokens, rewards))]  # fmt: skip
    tags = [f'<span class="tag">{escape(str(trace["source"]))}</span>'] if trace.get("source") else []
    if trace.get("correct") is not None:
        tags.append('<span class="tag good">✓ right</span>' if trace["correct"] else
                    '<span class="tag bad">✗ wrong</span>')  # fmt: skip
    facts = [f"answer {escape(str(trace['answer']))}"] if trace.get("answer") is not None else []
    facts += [f"{name} {place:.0f}" for name, place in places.items() if finite(place) is not None]
    return (f'<article><p class="question">{escape(str(trace.get("question", "")))}</p>'
            f'<p class="facts">{"".join(tags)}<span>{" · ".join(facts)}</span></p>'
            f'<div class="trace">{"".join(spans)}</div></article>')  # fmt: skip


def traces_section(traces: list, shown: int = 12) -> str:
    """Traces with every token coloured by its reward; all beyond `shown` wait behind a click."""
    traces = [trace for trace in traces if isinstance(trace, dict)]
    scale = reward_scale(traces)
    cards = [trace_card(trace, scale) for trace in traces]
    legend = (
        f'<div class="legend"><span>{signed(-scale)}<span class="ramp"></span>{signed(scale)}</span>'
        '<span><span class="t first">token</span>&ensp;first wrong token</span>'
        '<span><span class="t pointed">token</span>&ensp;where the reward points</span>'
        "<span>⏎ newline</span><span>∅ token without text</span></div>"
    )
    intro = ("The background of each token is its reward: blue is more like the expert, orange more like the "
             "policy. Point at a token for the number.")  # fmt: skip
    rest = fold(f"{len(cards) - shown} more", grid("large", cards[shown:]))
    return section("traces", "The reward, token by token", intro,
                   *([legend, grid("large", cards[:shown]), rest] if cards else []))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# 5. The page
# ------------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --page:#f5f6f8; --card:#fff; --ink:#1b2230; --soft:#5b6676; --line:#dfe3e9;
  --base:#77808e; --sft:#c06f00; --sft_fair:#8a5a2b; --likelihood:#6b4fc0; --irl:#1f62c7; --grpo:#0f8566; --other:#b03a80; --right:#1f62c7;
  --wrong:#b85500; --up:58 134 226; --down:244 136 22; --full:.8; }
@media (prefers-color-scheme: dark) { :root { --page:#0f1319; --card:#171c25; --ink:#e5e9f0; --soft:#9ba6b6;
  --line:#2d3541; --base:#98a2b2; --sft:#f0a33f; --sft_fair:#d0a57a; --likelihood:#ac97f0; --irl:#6ea9ff; --grpo:#3dc79e; --other:#f08cc2;
  --right:#6ea9ff; --wrong:#f59a4a; --up:46 112 220; --down:206 100 0; --full:.72; } }
* { box-sizing:border-box; }
body { margin:0 auto; padding:40px 24px 64px; max-width:1140px; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap:anywhere; }
h1 { margin:0; font-size:2rem; line-height:1.2; } h2 { margin:0; font-size:1.35rem; line-height:1.3; }
h3 { margin:0 0 6px; font-size:1rem; } a, summary { color:var(--irl); }
header p { margin:10px 0; max-width:85ch; }
nav { display:flex; flex-wrap:wrap; gap:4px 18px; margin-top:16px; }
section { margin-top:52px; scroll-margin-top:16px; }
.intro { margin:4px 0 16px; color:var(--soft); max-width:85ch; }
.meta { display:flex; flex-wrap:wrap; gap:4px 22px; color:var(--soft); } .meta b { color:var(--ink); }
.note, figcaption, .facts, .legend, small, .soft { color:var(--soft); }
.note { font-size:.9rem; margin:10px 0 0; }
.grid { display:grid; gap:16px; }
.small { grid-template-columns:repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.large { grid-template-columns:repeat(auto-fill, minmax(min(100%, 420px), 1fr)); align-items:start; }
figure, article { margin:0; padding:16px; min-width:0; background:var(--card); border:1px solid var(--line);
  border-radius:10px; }
figcaption { margin-top:8px; font-size:.875rem; line-height:1.45; }
svg { display:block; width:100%; height:auto; stroke-linejoin:round; }
svg text { font-family:inherit !important; }
.scroll { overflow-x:auto; border:1px solid var(--line); border-radius:10px; background:var(--card); }
figure .scroll { border:0; border-radius:0; } details > .scroll, details > .grid { margin-top:10px; }
table { border-collapse:collapse; width:100%; font-size:.94rem; font-variant-numeric:tabular-nums; }
th, td { padding:9px 14px; text-align:left; white-space:nowrap; overflow-wrap:normal; }
thead th { font-size:.82rem; font-weight:600; color:var(--soft); border-bottom:1px solid var(--line); }
tbody tr + tr > * { border-top:1px solid var(--line); } tbody th { font-weight:600; }
small { font-size:.8rem; } code { font:.88rem ui-monospace, Menlo, Consolas, monospace; }
figure th, figure td { padding:6px 12px 6px 0; } figure th { white-space:normal; min-width:66px; }
figure small { display:block; line-height:1.2; }
details { margin-top:16px; } summary { cursor:pointer; width:fit-content; }
.dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:9px; }
.strip { display:block; position:relative; width:150px; height:14px;
  background:linear-gradient(var(--line), var(--line)) center / 100% 1px no-repeat; }
.strip i, .strip b { position:absolute; background:currentColor; }
.strip i { top:4px; height:6px; opacity:.35; }
.strip b { top:0; width:3px; height:14px; margin-left:-1px; border-radius:1px; }
.question { margin:0; font-weight:600; white-space:pre-wrap; }
.facts, .legend { display:flex; flex-wrap:wrap; align-items:center; gap:4px 10px; font-size:.875rem; }
.facts { margin:6px 0 10px; } .legend { margin-bottom:16px; gap:8px 22px; }
.tag { padding:0 9px; border:1px solid currentColor; border-radius:99px; }
.good { color:var(--right); } .bad { color:var(--wrong); }
.ramp { display:inline-block; vertical-align:-2px; width:130px; height:14px; margin:0 8px;
  border:1px solid var(--line); border-radius:3px; background:linear-gradient(90deg,
  rgb(var(--down) / var(--full)), rgb(var(--down) / 0) 50%, rgb(var(--up) / 0) 50%,
  rgb(var(--up) / var(--full))); }
.trace, .legend .t { font:15px/1.8 ui-monospace, Menlo, Consolas, monospace; color:var(--ink); }
.trace { white-space:pre-wrap; } .legend .t { line-height:1.4; margin-left:3px; }
.t { padding:2px 0; border-radius:2px; unicode-bidi:isolate; box-shadow:0 0 0 .5px var(--card);
  -webkit-box-decoration-break:clone; box-decoration-break:clone; }
.up { background:rgb(var(--up) / calc(var(--d) * var(--full))); }
.down { background:rgb(var(--down) / calc(var(--d) * var(--full))); }
.first { outline:2px solid var(--ink); outline-offset:1px; border-radius:1px; margin:0 3px; }
.pointed { text-decoration:underline 3px; text-underline-offset:5px; }
@media (max-width:600px) { body { padding:24px 16px 48px; } section { margin-top:40px; }
  th, td { padding:8px 10px; } small { display:block; line-height:1.3; }
  figure table { font-size:.85rem; } figure th, figure td { padding-right:8px; }
  figure small { font-size:.7rem; } }
@media print { body { max-width:none; } figure, article { break-inside:avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def header(name: str, settings: dict, missing: list[str], links: list[tuple[str, str]]) -> str:
    """What was run, what the page is about, and where on it things are."""
    known = [(key, settings[key]) for key in ("model", "data", "seed") if settings.get(key) is not None]
    meta = "".join(f"<span>{key} <b>{escape(str(tidy(value)))}</b></span>" for key, value in known)
    absent = f'<p class="note">Not in this run: {escape(", ".join(missing))}.</p>' if missing else ""
    nav = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in links)
    return (
        f'<header><h1>{escape(name)}</h1><p class="meta">{meta}</p>'
        "<p>A reward for every token was learned from expert demonstrations alone, by telling expert "
        "solutions from the policy's own. This page shows how well the policies answer, whether training was "
        "healthy, and two more uses of the reward: choosing among samples, and pointing at the first wrong "
        "token.</p>"
        f"{absent}<nav>{nav}</nav></header>"
    )


def write_report(run: Path) -> Path:
    """Write <run>/report.html from what is in the folder `run`, and return its path."""
    run = Path(run)
    parts = read_run(run)
    results, name = parts["results"], run.resolve().name
    settings = parts["settings"] or mapping(results.get("settings"))
    sections = [
        results_section(results),
        training_section(parts["metrics"]),
        choosing_section(results),
        reward_section(results),
        localisation_section(results),
        traces_section(parts["traces"]),
        section("settings", "Settings", "What this run was started with.",
                fold("Show all", pairs(settings, "Settings"))),
    ]  # fmt: skip
    body = "\n".join(filter(None, sections))
    links = re.findall(r'<section id="(\w+)"><h2>([^<]*)</h2>', body)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} · report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{header(name, settings, parts['missing'], links)}\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path = run / "report.html"
    try:
        path.write_bytes(page.encode("utf-8", "replace"))  # a trace may hold half a surrogate pair
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return path


def picture(trace: dict, scale: float, cell: float = 9.6, height: float = 26.0) -> str:
    """One trace as an SVG file of its own, in the colours of the page, for places where HTML is not at home.

    Lines are those of the trace. The first wrong token is outlined, the predicted one underlined.
    """
    question = printable(str(trace.get("question", ""))).replace("\n", " ")
    shapes, x, y, widest = [], 16.0, 2.4 * height, 9.6 * len(question)
    shapes.append(f'<text x="16" y="{height}" fill="#5b6676">{escape(question)}</text>')
    for index, (token, value) in enumerate(zip(items(trace.get("tokens")), items(trace.get("rewards")))):
        shown = printable(str(token)).replace("\n", "⏎") or "∅"
        width, depth = cell * len(shown), max(-1.0, min((finite(value) or 0.0) / scale, 1.0))
        fill = f'"rgb({"58 134 226" if depth > 0 else "244 136 22"})" fill-opacity="{0.8 * abs(depth):.2f}"'
        edge = ' stroke="#1b2230" stroke-width="2"' * (index == trace.get("first_wrong"))
        shapes.append(f'<rect x="{x:.1f}" y="{y - 18:.1f}" width="{width:.1f}" height="24" rx="2" fill={fill}{edge}/>')
        line = ' text-decoration="underline"' * (index == trace.get("predicted"))
        shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" textLength="{width:.1f}"{line}>{escape(shown)}</text>')
        x, widest = x + width + 1, max(widest, x + width)
        if "\n" in str(token):
            x, y = 16.0, y + 1.2 * height
    size = f'viewBox="0 0 {widest + 16:.0f} {y + 18:.0f}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} width="{widest + 16:.0f}" '
            'font-family="monospace" font-size="16" fill="#1b2230" xml:space="preserve">'
            f'<rect width="100%" height="100%" rx="8" fill="#fff"/>{"".join(shapes)}</svg>\n')  # fmt: skip


def main() -> None:
    parser = Parser("Write <run>/report.html: one page about one run.")
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/demo")
    parser.add_argument("--picture", type=Path, help="also draw the run's first wrong trace to this SVG file")
    args = parser.parse()
    print(write_report(args.run))
    if args.picture:
        traces = read_run(args.run)["traces"]
        wrong = [trace for trace in traces if dig(trace, "first_wrong") is not None]
        if not wrong:
            raise UserError(f"{args.run} holds no wrong trace to draw")
        scale = reward_scale([trace for trace in traces if isinstance(trace, dict)])
        try:  # "replace": a trace may hold half a surrogate pair
            args.picture.write_text(picture(wrong[0], scale), encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot write {args.picture}: {error}") from None
        print(args.picture)


if __name__ == "__main__":
    sys.exit(exit_status(main))
