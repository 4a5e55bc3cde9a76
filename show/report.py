"""One page about one run: `python -m show.report runs/demo` writes runs/demo/report.html.

    1. read_run       settings.json, metrics.jsonl, results.json, traces.json; any may be missing
    2. chart          where points and ticks are
    3. write_report   clean numbers and texts in report.html, a Jinja template with all the words

The page loads nothing and runs nothing. Traces are text that a language model wrote: Jinja escapes
whatever comes from here, and a content security policy forbids scripts and the network should
something slip through.
"""

import json
import math
import os.path
import re
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine import settings
from engine.errors import Parser, UserError, exit_status, printable

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
FILES = {"settings.json": dict, "metrics.jsonl": list, "results.json": dict, "traces.json": list}
# Each has one colour on the whole page: the CSS variable of its key.
METHODS = {"base": "Base"} | settings.METHODS
# Ways to choose one of N samples that are drawn: (colour, look). The others only get numbers.
RULES = {
    "oracle": ("ink", "dotted"),
    "reward": ("irl", ""),
    "majority": ("other", "dashed"),
    "sft_logprob": ("sft", ""),
    "sft_fair_logprob": ("sft_fair", ""),
    "logprob": ("base", ""),
    "random": ("soft", "dotted"),
}
# Of a chart, which the page scales to its column. From BOTTOM down is the x axis.
WIDTH = 290
HEIGHT = 178
BOTTOM = 144
MOST_POINTS = 400  # of a line

# 1. Reading and cleaning ------------------------------------------------------------------------


def read_run(run: Path) -> dict:
    """What the files of a run hold: {"settings", "metrics", "results", "traces", "missing": names}.

    Raises UserError if none is there, or one cannot be read.
    """
    missing = [name for name in FILES if not os.path.isfile(run / name)]
    if len(missing) == len(FILES):
        raise UserError(f"{run} is not the folder of a run: none of {', '.join(FILES)} is there")
    parts = {"missing": missing}
    for name, kind in FILES.items():
        content = kind()
        if name not in missing:
            content = read_file(run / name)
        if not isinstance(content, kind):
            expected = "object" if kind is dict else "list"
            raise UserError(f"{run / name}: expected a JSON {expected}")
        parts[name.split(".")[0]] = content
    return parts


def read_file(path: Path):
    """What a JSON file, or one of JSON lines, holds. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return parse_lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def parse_lines(text: str) -> list[dict]:
    """The objects in JSON lines.

    A last line cut in two is left out: the run goes on, or was stopped.
    """
    lines = text.strip().split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number}: {error}") from None
    return [record for record in records if isinstance(record, dict)]


def dig(tree, *keys, kind: type = dict):
    """tree[a][b]..

    if it is of this kind, else an empty one: what is missing or odd shows nothing.
    """
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, kind) else kind()


def finite(value) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e30 else None


def numbers(values: list) -> list[float]:
    """Those of the values that are finite numbers."""
    return [value for value in values if finite(value) is not None]


def interval(value) -> list[float]:
    """[mean, low, high] of what results.json holds for a number, [mean] * 3 if that is all;

    or [].
    """
    values = value if isinstance(value, list) else [value]
    known = numbers(values[:3])
    if len(known) == 3:
        return known
    return numbers(values[:1]) * 3


def by_number(tree: dict) -> list[tuple[int, object]]:
    """(n, tree[n]) for those keys of `tree` that are whole numbers, in their order."""
    keys = [int(key) for key in tree if re.fullmatch("[1-9][0-9]{0,5}", key)]
    return [(n, tree[str(n)]) for n in sorted(keys)]


def series(metrics: list[dict], method: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of one metric, thinned to MOST_POINTS.

    Of a step logged twice the later counts.
    """
    values = {}
    for line in metrics:
        if line.get("method") == method:
            step = finite(line.get("step"))
            value = finite(line.get(key))
            if step is not None and value is not None:
                values[step] = value
    known = sorted(values.items())
    return known[:: max(1, len(known) // MOST_POINTS)]


def tidy(value) -> str:
    """A setting, for a page that people share: of an absolute path only the last name is shown."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive:
        return PureWindowsPath(value).name or value  # it splits at both kinds of slash
    return value


# 2. Charts --------------------------------------------------------------------------------------


def chart(xlabel: str, lines: list[tuple], share: bool = False, powers: bool = False) -> dict:
    """Lines in one frame, every point and tick at its place, for report.html; {} without points.

    lines: (name, colour, look, points). Without a name a line is not in the legend; colour: a CSS
    variable without its dashes; look: a CSS class, "", dashed, dotted, pale, area or band.
    share: y is a share of 1, shown in percent from 0 up. powers: x is a logarithm to base 2.
    """
    lines = [line for line in lines if line[-1]]
    if not lines:
        return {}
    xs, ys = zip(*(point for *_, points in lines for point in points))
    left, right = limits(xs)
    low, high = limits(ys, share)
    x_ticks = x_labels(xs, left, right, powers)
    y_ticks = {y: f"{100 * y:.0f}%" if share else f"{y:g}" for y in ticks(low, high)}
    edge = 10 + 6 * max(len(text) for text in y_ticks.values())  # room for the labels of y

    def across(x: float) -> float:
        return round(edge + (x - left) / (right - left) * (WIDTH - 5 - edge), 1)

    def down(y: float) -> float:
        return round(BOTTOM - (y - low) / (high - low) * (BOTTOM - 5), 1)

    drawn = []
    for *line, points in lines:
        drawn.append((*line, [(across(x), down(y)) for x, y in points]))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "bottom": BOTTOM,
        "edge": edge,
        "xlabel": xlabel,
        "x_ticks": [(across(x), text) for x, text in x_ticks.items()],
        "y_ticks": [(down(y), text) for y, text in y_ticks.items()],
        "lines": drawn,
    }


def x_labels(xs: list[float], left: float, right: float, powers: bool) -> dict[float, str]:
    """{x:

    text} of the ticks below a chart: of steps only whole ones, of powers of 2 those that are there.
    """
    if powers:
        return {x: f"{2**x:.0f}" for x in xs}
    whole = all(x == int(x) for x in xs)
    return {x: f"{x:g}" for x in ticks(left, right) if not whole or x == int(x)}


def limits(values: list[float], share: bool = False) -> tuple[float, float]:
    """(low, high) of an axis for these values, never equal; for shares from 0 to a round number."""
    low = min(values)
    high = max(values)
    if share and low >= 0 and high <= 1:
        return 0.0, next(top for top in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if high <= top)
    size = max(abs(low), abs(high))
    if size <= 1e-30:
        size = 1.0
    margin = size / 2
    if high - low > 1e-6 * size:
        margin = 0.04 * (high - low)
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """The round numbers from low to high, about five: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((unit * n for n in (1, 2, 5) if unit * n >= 0.999 * rough), 10 * unit)
    first = math.ceil(low / step - 1e-6)
    last = math.floor(high / step + 1e-6)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def histogram(xlabel: str, groups: dict[str, list[float]], bars: int = 30) -> dict:
    """A chart of groups over each other, each as shares of its group.

    groups: {name and colour: values}.
    """
    pooled = sorted(value for values in groups.values() for value in values)
    outside = len(pooled) // 200  # half a percent on either side goes into the outermost bars
    low, high = limits(pooled[outside : len(pooled) - outside] or [0.0])
    lines = []
    for name, values in groups.items():
        bins = Counter()
        for value in values:
            place = min(max((value - low) / (high - low), 0.0), 0.999)
            bins[int(place * bars)] += 1
        corners = []  # of the bars: at each of their edges the height before it and after it
        if values:
            for i in range(bars + 1):
                x = low + (high - low) * i / bars
                corners += [(x, bins[i - 1] / len(values)), (x, bins[i] / len(values))]
        look = "area dashed" if lines else "area"
        lines.append((f"{name} answer ({len(values)})", name, look, corners))
    return chart(xlabel, lines, share=True)


def doubling(xlabel: str, shares: list[tuple]) -> dict:
    """A chart of shares against 1, 2, 4, ..: (name, colour, look, [(n, interval)]) each.

    The reward has a band.
    """
    lines = []
    for name, colour, look, values in shares:
        known = [(math.log2(n), *interval(value)) for n, value in values if interval(value)]
        if name == "reward":
            lower = [(x, low) for x, _, low, _ in known]
            upper = [(x, high) for x, _, _, high in known]
            lines.append(("", colour, "band", lower + upper[::-1]))
        lines.append((name, colour, look, [(x, mean) for x, mean, _, _ in known]))
    return chart(xlabel, lines, share=True, powers=True)


# 3. The page ------------------------------------------------------------------------------------


def method_rows(results: dict) -> list[tuple]:
    """How well each method answers: (name, colour, right at T = 1, right greedy, seconds)."""
    methods = dig(results, "methods")
    known = [key for key in METHODS if key in methods]
    rows = []
    for key in known + [key for key in methods if key not in METHODS]:
        method = dig(methods, key)
        shares = []
        for share in ("t1", "greedy"):
            bounds = dig(method, f"{share}_interval", kind=list)
            shares.append(interval([method.get(share), *bounds]))
        colour = key if key in METHODS else "soft"
        rows.append((METHODS.get(key, key), colour, *shares, finite(method.get("seconds"))))
    return rows


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean of a line, over a tenth of it."""
    near = len(points) // 20
    means = []
    for i, (step, _) in enumerate(points):
        means.append((step, fmean(y for _, y in points[max(0, i - near) : i + near + 1])))
    return means


def curve(metrics: list[dict], methods: str, keys: str, share: bool = False) -> dict:
    """Some methods' metrics against the step. Long lines are pale, under their running mean."""
    lines = []
    for method in methods.split():
        for key in keys.split():
            points = series(metrics, method, key)
            colour = method if method in METHODS else "irl"
            name = key.split("/d_")[1] if "/d_" in key else METHODS[method]
            if len(points) > 40:
                lines.append(("", colour, "pale", points))
                points = smoothed(points)
            lines.append((name, colour, "dashed" if name == "negative" else "", points))
    return chart("step", lines, share)


def choices(results: dict) -> dict:
    """pass@k of every method, and how well each rule chooses one of N samples."""
    passes = []
    for key, name in METHODS.items():
        passes.append((name, key, "", by_number(dig(results, "methods", key, "pass@k"))))
    sizes = {n: row for n, row in by_number(dig(results, "rerank")) if isinstance(row, dict)}
    best = []
    for rule, (colour, look) in RULES.items():
        best.append((rule, colour, look, [(n, row.get(rule)) for n, row in sizes.items()]))
    return {
        "pass_at_k": doubling("k", passes),
        "best_of_n": doubling("N", best),
        "rules": table({f"N = {n}": row for n, row in sizes.items()}),
    }


def table(columns: dict[str, dict]) -> dict:
    """{head: {name: interval}} as {"head", "rows": (name, intervals)}; {} without rows."""
    columns = {head: column for head, column in columns.items() if column}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, [interval(c.get(name)) for c in columns.values()]) for name in names]
    return {"head": list(columns), "rows": rows} if rows else {}


def rewards(results: dict) -> dict:
    """Does the reward know right traces from wrong ones? And where these go wrong?"""
    groups = {}
    for kind in ("right", "wrong"):
        groups[kind] = numbers(dig(results, "distributions", kind, kind=list))
    areas = dig(results, "rerank", "auroc")
    known = [(key, area) for key, area in areas.items() if finite(area) is not None]
    known.sort(key=itemgetter(1), reverse=True)
    parts = {"distributions": histogram("reward of the trace", groups), "auroc": known}
    for kind in ("natural", "single"):
        places = dig(results, "localise", kind)
        parts[kind] = table({key: dig(places, key) for key in ("hit0", "hit1", "step")})
        count = finite(places.get("count"))
        parts[f"{kind}_count"] = "" if count is None else f"{count:,.0f}"
    return parts


def trace_cards(traces: list) -> dict:
    """{"cards": one for each trace, "scale": the reward that gets full colour}.

    A card: the question, where the trace comes from, its tokens as (text, reward).
    """
    cards = []
    for trace in traces:
        if not isinstance(trace, dict):
            continue
        card = {"correct": trace.get("correct")}
        for key in ("question", "source", "answer"):
            value = trace.get(key)
            card[key] = None if value is None else str(value)
        for key in ("first_wrong", "predicted"):
            card[key] = finite(trace.get(key))
        tokens = dig(trace, "tokens", kind=list)
        rewards = dig(trace, "rewards", kind=list) + [None] * len(tokens)
        card["tokens"] = []
        for token, reward in zip(tokens, rewards):
            card["tokens"].append((printable(str(token)), finite(reward)))
        cards.append(card)
    all_rewards = [reward for card in cards for _, reward in card["tokens"]]
    return {"cards": cards, "scale": full_colour(all_rewards)}


def full_colour(rewards: list) -> float:
    """The reward that gets full colour:

    the 98th percentile of |reward|. An outlier must not bleach the page.
    """
    sizes = sorted(abs(reward) for reward in numbers(rewards))
    if not sizes:
        return 1.0
    return sizes[round(0.98 * (len(sizes) - 1))] or 1.0


def page_of(name: str, parts: dict) -> str:
    """report.html with what `read_run` has read of the run of this name."""
    results = parts["results"]
    settings = parts["settings"] or dig(results, "settings")

    def curve_of_run(methods: str, keys: str, share: bool = False) -> dict:
        return curve(parts["metrics"], methods, keys, share)

    return TEMPLATES.get_template("report.html").render(
        choices(results) | rewards(results) | trace_cards(parts["traces"]),
        name=name,
        missing=parts["missing"],
        settings={key: tidy(value) for key, value in settings.items()},
        methods=method_rows(results),
        curve=curve_of_run,
    )


def write_report(run: Path) -> Path:
    """Write <run>/report.html from what is in the folder `run`, and return its path.

    Raises UserError.
    """
    path = Path(run) / "report.html"
    try:
        parts = read_run(path.parent)  # first: of a name that no file can have, it says so
        page = page_of(path.parent.resolve().name, parts)
        path.write_bytes(page.encode("utf-8", "replace"))  # a trace may hold half a surrogate pair
    except RecursionError:
        raise UserError(f"{run}: its JSON is nested too deeply to show") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return path


def main() -> None:
    parser = Parser("Write <run>/report.html: one page about one run.")
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/demo")
    print(write_report(parser.parse().run))


if __name__ == "__main__":
    sys.exit(exit_status(main))
