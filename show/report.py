"""One page about one run: `python -m show.report runs/demo`. Results, training curves, the reward of every token, in one file.

    1. read_run       settings.json, metrics.jsonl, results.json, traces.json; any of them may be missing, or odd
    2. chart          where points and ticks are
    3. write_report   clean numbers and texts, in report.html: a Jinja template with all words and markup -> <run>/report.html

The page loads nothing and runs nothing. Traces are text that a language model wrote: Jinja escapes whatever comes from here,
and a content security policy forbids scripts and the network should something slip through.
"""

import json
import math
import os.path
import re
import sys
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.errors import Parser, UserError, exit_status, printable
from engine.settings import METHODS

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip
METHODS = {
    "base": "Base"
} | METHODS  # each has one colour on the whole page: the CSS variable of its key
# Ways to choose one of N samples that are drawn: (colour, look). The others only get numbers.
RULES = {"oracle": ("ink", "dotted"), "reward": ("irl", ""), "majority": ("other", "dashed"), "sft_logprob": ("sft", ""),
         "sft_fair_logprob": ("sft_fair", ""), "logprob": ("base", ""), "random": ("soft", "dotted")}  # fmt: skip
LOOKS = {
    "sample": "dashed",
    "broken": "dotted",
}  # of negatives: the policy's samples, broken copies of the experts'
WIDTH, HEIGHT, BOTTOM = (
    290,
    178,
    144,
)  # of a chart; from its bottom down is the x axis. The page scales it to its column.

# 1. Reading and cleaning --------------------------------------------------------------------------------------


def read_run(run: Path) -> dict:
    """{"settings", "metrics", "results", "traces": what these files hold, "missing": names of those that are not there}."""
    kinds = {
        "settings.json": dict,
        "metrics.jsonl": list,
        "results.json": dict,
        "traces.json": list,
    }
    parts = {"missing": [name for name in kinds if not os.path.isfile(run / name)]}
    if len(parts["missing"]) == len(kinds):
        raise UserError(f"{run} is not the folder of a run: none of {', '.join(kinds)} is there")
    for name, kind in kinds.items():
        found = kind()
        if name not in parts["missing"]:
            try:
                text = (run / name).read_text(encoding="utf-8", errors="replace")
                found = parse_lines(text) if name.endswith("l") else json.loads(text)
            except (ValueError, OSError, RecursionError) as error:
                raise UserError(f"cannot read {run / name}: {error}") from None
        if not isinstance(found, kind):
            raise UserError(f"{run / name}: expected a JSON {'object' if kind is dict else 'list'}")
        parts[name.split(".")[0]] = found
    return parts


def parse_lines(text: str) -> list[dict]:
    """The objects in JSON lines. A last line cut in two is left out: the run still goes on, or was stopped."""
    lines, records = text.strip().split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number}: {error}") from None
    return [record for record in records if isinstance(record, dict)]


def dig(tree, *keys, kind: type = dict):
    """tree[a][b].. if it is of this kind, else an empty one: what is missing, null or odd shows nothing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, kind) else kind()


def finite(value) -> float | None:
    """`value` if it is a finite number, else None."""
    return (
        value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
        else None
    )


def numbers(values: list) -> list[float]:
    """Those of the values that are finite numbers."""
    return [number for number in map(finite, values) if number is not None]


def interval(value) -> list[float]:
    """[mean, low, high] of what results.json holds for a number; [mean] * 3 if it holds no more than that; or []."""
    values = value if isinstance(value, list) else [value]
    found = numbers(values[:3])
    return found if len(found) == 3 else numbers(values[:1]) * 3


def by_number(tree: dict) -> list[tuple[int, object]]:
    """(n, tree[n]) for those keys of `tree` that are whole numbers, in their order."""
    return [
        (n, tree[str(n)])
        for n in sorted(int(key) for key in tree if re.fullmatch("[1-9][0-9]{0,5}", key))
    ]


def series(
    metrics: list[dict], method: str, key: str, most: int = 400
) -> list[tuple[float, float]]:
    """(step, value) of one metric, thinned to about `most`. Of a step logged twice the later counts."""
    points = [
        (finite(line.get("step")), finite(line.get(key)))
        for line in metrics
        if line.get("method") == method
    ]
    known = sorted(dict(point for point in points if None not in point).items())
    return known[:: max(1, len(known) // most)]


def tidy(value) -> str:
    """A setting, for a page that people share: of an absolute path only the last name is shown."""
    if isinstance(value, str) and (
        PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive
    ):
        return PureWindowsPath(value).name or value  # a Windows path splits at both kinds of slash
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# 2. Charts ----------------------------------------------------------------------------------------------------


def chart(xlabel: str, lines: list[tuple], share: bool = False, powers: bool = False) -> dict:
    """Lines in one frame, every point and tick at its place in it, for the macro in report.html; {} without points.

    lines: (name, colour, look, points). Without a name it is not in the legend; colour: a CSS variable without its dashes;
    look: a CSS class, "", dashed, dotted, pale, area or band. share: y is a share of 1, shown in percent from 0 up.
    powers: x is a logarithm to base 2, and has its tick.
    """
    lines = [line for line in lines if line[-1]]
    if not lines:
        return {}
    xs, ys = zip(*(point for *_, points in lines for point in points))
    (left, right), (low, high) = limits(xs), limits(ys, share)
    whole = all(x == int(x) for x in xs)
    x_ticks = {x: f"{x:g}" for x in ticks(left, right) if not whole or x == int(x)}
    x_ticks = {x: f"{2**x:.0f}" for x in xs} if powers else x_ticks
    y_ticks = {y: f"{100 * y:.0f}%" if share else f"{y:g}" for y in ticks(low, high)}
    edge = 10 + 6 * max(map(len, y_ticks.values()))
    across = lambda x: round(edge + (x - left) / (right - left) * (WIDTH - 5 - edge), 1)
    down = lambda y: round(BOTTOM - (y - low) / (high - low) * (BOTTOM - 5), 1)
    return dict(width=WIDTH, height=HEIGHT, bottom=BOTTOM, edge=edge, xlabel=xlabel,
                x_ticks=[(across(x), text) for x, text in x_ticks.items()],
                y_ticks=[(down(y), text) for y, text in y_ticks.items()],
                lines=[(*line, [(across(x), down(y)) for x, y in points]) for *line, points in lines])  # fmt: skip


def limits(values: list[float], share: bool = False) -> tuple[float, float]:
    """(low, high) of an axis for these values, never equal; for shares from 0 to a round number."""
    low, high = min(values), max(values)
    if share and low >= 0 and high <= 1:
        return 0.0, next(top for top in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if high <= top)
    size = max(abs(low), abs(high))
    size = size if size > 1e-30 else 1.0
    margin = 0.04 * (high - low) if high - low > 1e-6 * size else size / 2
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """The round numbers from low to high, about five: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(
        (unit * factor for factor in (1, 2, 5) if unit * factor >= 0.999 * rough), 10 * unit
    )
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def histogram(xlabel: str, groups: dict[str, list[float]], bars: int = 30) -> dict:
    """A chart of groups over each other, each as shares of its group. groups: {name and colour: values}."""
    pooled, lines = sorted(value for values in groups.values() for value in values), []
    edge = len(pooled) // 200  # half a percent on either side goes into the outermost bins
    low, high = limits(pooled[edge : len(pooled) - edge] or [0.0])
    for name, values in groups.items():
        bins = Counter(
            int(min(max((value - low) / (high - low), 0.0), 0.999) * bars) for value in values
        )
        heights = [bins[i] / len(values) for i in range(-1, bars + 1) if values]
        corners = [
            (low + (high - low) * i / bars, y) for i in range(bars + 1) for y in heights[i : i + 2]
        ]
        lines.append(
            (f"{name} answer ({len(values)})", name, "area dashed" if lines else "area", corners)
        )
    return chart(xlabel, lines, share=True)


# 3. The page --------------------------------------------------------------------------------------------------


def method_rows(results: dict) -> list[tuple]:
    """How well each method answers: (name, colour, right at T = 1, right greedy, seconds)."""
    methods, rows = dig(results, "methods"), []
    for key in sorted(methods, key=lambda key: [*METHODS, key].index(key)):
        method, colour = dig(methods, key), key if key in METHODS else "soft"
        t1, greedy = (
            interval([method.get(how), *dig(method, f"{how}_interval", kind=list)])
            for how in ("t1", "greedy")
        )
        rows.append((METHODS.get(key, key), colour, t1, greedy, finite(method.get("seconds"))))
    return rows


def curve(metrics: list[dict], methods: str, keys: str, share: bool = False) -> dict:
    """Some methods' metrics against the step, where they are known; long lines pale, under their running mean."""
    lines = []
    for method, key in product(methods.split(), keys.split()):
        points, colour = series(metrics, method, key), method if method in METHODS else "irl"
        name = key.split("/d_")[1] if "/d_" in key else METHODS[method]
        if len(points) > 40:
            lines.append(("", colour, "pale", points))
            near = len(points) // 20
            points = [
                (step, fmean(y for _, y in points[max(0, i - near) : i + near + 1]))
                for i, (step, _) in enumerate(points)
            ]
        lines.append((name, colour, LOOKS.get(name, ""), points))
    return chart("step", lines, share)


def choices(results: dict) -> dict:
    """pass@k of every method, and how well each rule chooses one of N samples."""
    sizes = {n: row for n, row in by_number(dig(results, "rerank")) if isinstance(row, dict)}
    passes = [
        (name, key, "", by_number(dig(results, "methods", key, "pass@k")))
        for key, name in METHODS.items()
    ]
    best = [
        (rule, *look, [(n, row.get(rule)) for n, row in sizes.items()])
        for rule, look in RULES.items()
    ]
    rules = table({f"N = {n}": row for n, row in sizes.items()})
    return {"pass_at_k": doubling("k", passes), "best_of_n": doubling("N", best), "rules": rules}


def doubling(xlabel: str, shares: list[tuple]) -> dict:
    """A chart of shares against 1, 2, 4, ..: (name, colour, look, [(n, interval)]) each. The reward has a band."""
    lines = []
    for name, colour, look, values in shares:
        known = [(math.log2(n), *interval(value)) for n, value in values if interval(value)]
        if name == "reward":
            around = [(x, low) for x, _, low, _ in known] + [
                (x, high) for x, _, _, high in known[::-1]
            ]
            lines.append(("", colour, "band", around))
        lines.append((name, colour, look, [(x, mean) for x, mean, _, _ in known]))
    return chart(xlabel, lines, share=True, powers=True)


def table(columns: dict[str, dict]) -> dict:
    """{head: {name: interval}} as the head and the rows (name, intervals) of a table; {} without rows."""
    columns = {head: column for head, column in columns.items() if column}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, [interval(column.get(name)) for column in columns.values()]) for name in names]
    return {"head": list(columns), "rows": rows} if rows else {}


def rewards(results: dict) -> dict:
    """Does the reward know right traces from wrong ones, which it was never told? And where these go wrong?"""
    groups = {
        kind: numbers(dig(results, "distributions", kind, kind=list)) for kind in ("right", "wrong")
    }
    areas = [
        (key, finite(area))
        for key, area in dig(results, "rerank", "auroc").items()
        if finite(area) is not None
    ]
    parts = {
        "distributions": histogram("reward of the trace", groups),
        "auroc": sorted(areas, key=lambda row: -row[1]),
    }
    for kind in ("natural", "single"):
        found = dig(results, "localise", kind)
        parts[kind] = table({key: dig(found, key) for key in ("hit0", "hit1", "step")})
        parts[f"{kind}_count"] = "".join(f"{count:,.0f}" for count in numbers([found.get("count")]))
    return parts


def trace_cards(traces: list) -> dict:
    """The question of each trace, where it comes from, its tokens (text, reward); and the reward that gets full colour."""
    cards = []
    for trace in (trace for trace in traces if isinstance(trace, dict)):
        tokens, rewards = (dig(trace, key, kind=list) for key in ("tokens", "rewards"))
        pairs = zip(tokens, [*map(finite, rewards), *[None] * len(tokens)])
        card = {
            "correct": trace.get("correct"),
            "tokens": [(printable(str(token)), reward) for token, reward in pairs],
        }
        card |= {
            key: None if trace.get(key) is None else str(trace[key])
            for key in ("question", "source", "answer")
        }
        cards.append(card | {key: finite(trace.get(key)) for key in ("first_wrong", "predicted")})
    return {
        "cards": cards,
        "scale": full_colour([reward for card in cards for _, reward in card["tokens"]]),
    }


def full_colour(rewards: list) -> float:
    """The reward that gets full colour: the 98th percentile of |reward|. An outlier must not bleach the page."""
    sizes = sorted(map(abs, numbers(rewards))) or [0.0]
    return sizes[round(0.98 * (len(sizes) - 1))] or 1.0


def page_of(name: str, found: dict) -> str:
    """report.html with what `read_run` has found in the run of this name."""
    results = found["results"]
    settings = {
        key: tidy(value) for key, value in (found["settings"] or dig(results, "settings")).items()
    }
    known = choices(results) | rewards(results) | trace_cards(found["traces"])
    return TEMPLATES.get_template("report.html").render(known, name=name, missing=found["missing"], settings=settings,
        methods=method_rows(results), curve=partial(curve, found["metrics"]))  # fmt: skip


def write_report(run: Path) -> Path:
    """Write <run>/report.html from what is in the folder `run`, and return its path."""
    path = Path(run) / "report.html"
    try:
        found = read_run(path.parent)  # first: of a name that no file can have, it says so
        page = page_of(path.parent.resolve().name, found)
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
