"""One page about one run: `python -m show.report runs/demo` writes runs/demo/report.html.

    1. read_run       settings.json, metrics.jsonl, results.json, traces.json; any may be missing
    2. chart          where points and ticks are
    3. write_report   numbers and texts in report.html, a Jinja template with all words and markup

The page loads nothing and runs nothing. Traces are text that a language model wrote: Jinja escapes
whatever comes from here, and a content security policy forbids scripts and the network should
something slip through.
"""

import json
import math
import sys
from collections import Counter
from functools import cache, partial
from itertools import product
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas
from jinja2 import ChainableUndefined, Environment, FileSystemLoader, TemplateError

from engine import settings
from engine.errors import Parser, UserError, exit_status, printable

FILES = {"settings.json": dict, "metrics.jsonl": list, "results.json": dict, "traces.json": list}
# Each method has one colour on the whole page: the CSS variable of its key.
METHODS = {"base": "Base"} | settings.METHODS
# Lines that are drawn: (colour, look). Other ways to choose only get numbers.
LINES = {method: (method, "") for method in METHODS} | {
    "oracle": ("ink", "dotted"),
    "reward": ("irl", ""),
    "majority": ("other", "dashed"),
    "sft_logprob": ("sft", ""),
    "sft_fair_logprob": ("sft_fair", ""),
    "logprob": ("base", ""),
    "random": ("soft", "dotted"),
}
# Of negatives: the policy's samples, broken copies of the experts' traces
LOOKS = {"sample": "dashed", "broken": "dotted"}
# Of a chart, which the page scales to its column. From BOTTOM down is the x axis.
WIDTH = 290
HEIGHT = 178
BOTTOM = 144

# 1. Reading ---------------------------------------------------------------------------------------


def read_run(run: Path) -> dict:
    """What the files of a run hold: {"settings", "metrics", "results", "traces", "missing": names}.

    UserError if none is there, or one cannot be read.
    """
    parts: dict = {"missing": []}
    for name, kind in FILES.items():
        content = kind()
        try:
            text = (run / name).read_text(encoding="utf-8", errors="replace")
            content = parse_lines(text) if name.endswith("l") else parse(text)
        except (FileNotFoundError, NotADirectoryError):
            parts["missing"].append(name)
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"cannot read {run / name}: {error}") from None
        if not isinstance(content, kind):
            raise UserError(f"cannot read {run / name}: a JSON {kind.__name__} was expected")
        parts[name.split(".")[0]] = content
    if len(parts["missing"]) == len(FILES):
        raise UserError(f"{run} is not the folder of a run: none of {', '.join(FILES)} is there")
    return parts


def parse(text: str):
    """JSON. NaN and infinities, which are no JSON, become null."""
    return json.loads(text, parse_constant={}.get)


def parse_lines(text: str) -> list[dict]:
    """The objects in JSON lines."""
    lines = text.strip().split("\n")
    # A last line cut in two is left out: the run goes on, or was stopped.
    if not lines[-1].endswith("}"):
        lines.pop()
    return [parse(line) for line in lines]


def interval(value) -> list[float]:
    """[mean, low, high] of what results.json holds for a number, or [] if that is none."""
    values = value if isinstance(value, list) else [value] * 3
    if len(values) == 3 and all(isinstance(number, (int, float)) for number in values):
        return values
    return []


def tidy(value) -> str:
    """A setting, for a page that people share: of an absolute path only the last name is shown."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive:
        return PureWindowsPath(value).name or value  # it splits at both kinds of slash
    return value


# 2. Charts ----------------------------------------------------------------------------------------


def chart(xlabel: str, lines: list[tuple], share: bool = False, powers: bool = False) -> dict:
    """Lines in one frame, every point and tick at its place, for report.html; {} without points.

    lines: (name, colour, look, points). Without a name a line is not in the legend; colour: a CSS
    variable without its dashes; look: a CSS class, "", dashed, dotted, pale, area or band.
    share: y is a share of 1, shown in percent. powers: x is a logarithm to base 2.
    """
    lines = [line for line in lines if line[-1]]
    if not lines:
        return {}
    xs, ys = zip(*(point for *_, points in lines for point in points))
    left, right = limits(xs)
    low, high = limits(ys)
    if share and min(ys) >= 0:
        low = 0.0
        high = max(ys) or 1.0
    # Between whole numbers, such as steps, there is nothing to name.
    whole = all(x == int(x) for x in xs)
    x_ticks = {x: f"{x:g}" for x in ticks(left, right) if not whole or x == int(x)}
    if powers:
        x_ticks = {x: f"{2**x:.0f}" for x in xs}
    y_ticks = {y: f"{100 * y:.3g}%" if share else f"{y:g}" for y in ticks(low, high)}
    edge = 10 + 6 * max(len(text) for text in y_ticks.values())  # room for the labels of y

    def across(x: float) -> float:
        return round(edge + (x - left) / (right - left) * (WIDTH - 5 - edge), 1)

    def down(y: float) -> float:
        return round(BOTTOM - (y - low) / (high - low) * (BOTTOM - 5), 1)

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "bottom": BOTTOM,
        "edge": edge,
        "xlabel": xlabel,
        "x_ticks": [(across(x), text) for x, text in x_ticks.items()],
        "y_ticks": [(down(y), text) for y, text in y_ticks.items()],
        "lines": [(*line, [(across(x), down(y)) for x, y in points]) for *line, points in lines],
    }


def limits(values: list[float]) -> tuple[float, float]:
    """(low, high) of an axis for these values, never equal."""
    low = min(values)
    high = max(values)
    size = max(abs(low), abs(high), 1e-30)
    margin = max(0.04 * (high - low), 1e-3 * size)
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """The round numbers from low to high, about five: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((unit * n for n in (1, 2, 5) if unit * n >= 0.999 * rough), 10 * unit)
    places = range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
    return [float(f"{place * step:.12g}") for place in places]


def histogram(xlabel: str, groups: dict[str, list[float]], bars: int = 30) -> dict:
    """A chart of groups over each other, each as shares of its group: {name and colour: values}."""
    pooled = sorted(value for values in groups.values() for value in values)
    outside = len(pooled) // 200  # half a percent on either side goes into the outermost bars
    low, high = limits(pooled[outside : len(pooled) - outside] or [0.0])
    lines = []
    for name, values in groups.items():
        places = [int((value - low) / (high - low) * bars) for value in values]
        counts = Counter(min(max(place, 0), bars - 1) for place in places)
        points = []
        for i in range(bars + 1):  # up or down at each border of two bars
            for bar in (i - 1, i):
                points.append((low + (high - low) * i / bars, counts[bar] / max(len(values), 1)))
        label = f"{name} answer ({len(values)})"
        lines.append((label, name, "area dashed" if lines else "area", points if values else []))
    return chart(xlabel, lines, share=True)


def curve(metrics: pandas.DataFrame, methods: str, keys: str, share: bool = False) -> dict:
    """Some methods' metrics against the step, where they are known."""
    lines = []
    for method, key in product(methods.split(), keys.split()):
        if key in metrics:
            rows = metrics[metrics["method"] == method]
            # Of a step that was logged twice, before and after a kill, the later line counts.
            values = rows.groupby("step")[key].last().dropna().astype(float)
            values = values.iloc[:: max(1, len(values) // 400)]
            colour = method if method in METHODS else "irl"
            name = key.split("/d_")[1] if "/d_" in key else METHODS[method]
            # A long line is pale, under its running mean.
            if len(values) > 40:
                lines.append(("", colour, "pale", list(values.items())))
                window = len(values) // 20 * 2 + 1
                values = values.rolling(window, center=True, min_periods=1).mean()
            lines.append((name, colour, LOOKS.get(name, ""), list(values.items())))
    return chart("step", lines, share)


def doubling(xlabel: str, ways: dict[str, dict[str, object]]) -> dict:
    """A chart of shares against 1, 2, 4, ..: {way: {n: interval}}. The reward has a band."""
    lines = []
    for name, (colour, look) in LINES.items():
        values = [(n, interval(value)) for n, value in ways.get(name, {}).items()]
        known = sorted((math.log2(int(n)), ends) for n, ends in values if ends)
        if name == "reward":
            above = [(x, high) for x, (_, _, high) in known[::-1]]
            lines.append(("", colour, "band", [(x, low) for x, (_, low, _) in known] + above))
        lines.append((METHODS.get(name, name), colour, look, [(x, ends[0]) for x, ends in known]))
    return chart(xlabel, lines, share=True, powers=True)


# 3. The page --------------------------------------------------------------------------------------


def table(columns: dict[str, dict]) -> dict:
    """{head: {name: interval}} as the head and the rows of a table; {} without rows."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, [interval(column.get(name)) for column in columns.values()]) for name in names]
    rows = [row for row in rows if any(row[1])]
    return {"head": list(columns), "rows": rows} if rows else {}


def hits_of(results: dict, kind: str) -> dict[str, dict]:
    """The columns of a table of first errors: how often each pointer is right."""
    hits = results.get("localise", {}).get(kind, {})
    return {"that token": hits.get("hit0", {}), "at most 1 off": hits.get("hit1", {})}


def full_colour(rewards: list) -> float:
    """The reward that gets full colour: the 98th percentile of |reward|."""
    # not the largest: an outlier must not bleach the page
    sizes = sorted(abs(reward) for reward in rewards if reward is not None) or [0.0]
    return sizes[round(0.98 * (len(sizes) - 1))] or 1.0


def visible(value):
    """What is written on the page: control characters of a text are shown in hex."""
    return printable(value) if isinstance(value, str) else value


@cache  # compiled once
def template():
    """report.html."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # what is missing shows nothing
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html")


def page_of(name: str, parts: dict) -> str:
    """report.html with what `read_run` has found in the run of this name."""
    results = parts["results"]
    methods = {key: row for key, row in results.get("methods", {}).items() if isinstance(row, dict)}
    ranking = results.get("rerank", {})
    sizes = {n: row for n, row in ranking.items() if n.isdecimal()}
    of_rule = {rule: {n: row.get(rule) for n, row in sizes.items()} for rule in LINES}
    scores = results.get("distributions", {})
    groups = {kind: scores.get(kind, []) for kind in ("right", "wrong")}
    rewards = [reward for trace in parts["traces"] for reward in trace.get("rewards", [])]
    return template().render(
        name=name,
        missing=parts["missing"],
        settings={key: tidy(value) for key, value in parts["settings"].items()},
        results=results,
        methods=sorted(methods.items(), key=lambda row: [*METHODS, row[0]].index(row[0])),
        method_names=METHODS,
        curve=partial(curve, pandas.DataFrame(parts["metrics"])),
        pass_at_k=doubling("k", {key: row.get("pass@k", {}) for key, row in methods.items()}),
        best_of_n=doubling("N", of_rule),
        rules=table({f"N = {n}": row for n, row in sizes.items()}),
        auroc=table({"all": ranking.get("auroc", {}), "within": ranking.get("auroc_within", {})}),
        distributions=histogram("reward of the trace", groups),
        natural=table(hits_of(results, "natural")),
        single=table(hits_of(results, "single")),
        traces=parts["traces"],
        scale=full_colour(rewards),
        interval=interval,
    )


def write_report(run: Path) -> Path:
    """Write <run>/report.html from what is in the folder `run`, and return its path."""
    parts = read_run(Path(run))
    path = Path(run) / "report.html"
    try:
        page = page_of(path.parent.resolve().name, parts)
        path.write_bytes(page.encode("utf-8", "replace"))  # a trace may hold half a surrogate pair
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        TemplateError,
    ) as error:
        raise UserError(f"the files in {run} are not what train.py writes: {error}") from None
    return path


def main() -> None:
    parser = Parser("Write <run>/report.html: one page about one run.")
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/demo")
    print(write_report(parser.parse().run))


if __name__ == "__main__":
    sys.exit(exit_status(main))
