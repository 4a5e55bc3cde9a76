"""One page about one run: results, training curves, and the reward of every token, in a single HTML file.

    1. read_run       settings.json, metrics.jsonl, results.json, traces.json; any of them may be missing
    2. cells          numbers, intervals and tables as HTML
    3. parts          what goes into the $places of report.html: results, training, choosing, the reward, traces
    4. write_report   report.html with its places filled and report.css -> <run>/report.html

The page loads nothing and runs nothing. Traces are text that a language model wrote: all of it is escaped,
and a content security policy forbids scripts and the network should something slip through.

Run `python -m show.report runs/demo`.
"""

import json
import math
import os.path
import re
import sys
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean
from string import Template

from engine.errors import Parser, UserError, exit_status, printable
from engine.settings import METHODS
from show.figures import Line, chart, histogram

FRAME = Path(__file__).with_suffix(".html")  # every word that is the same on all pages
CSS = Path(__file__).with_suffix(".css")
METHODS = {"base": "Base"} | METHODS  # each has one colour on the whole page: the CSS variable of its key
# Ways to choose one of N samples that are drawn: (colour, look). The others only get numbers.
RULES = {"oracle": ("ink", "dotted"), "reward": ("irl", ""), "majority": ("other", "dashed"), "sft_logprob": ("sft", ""),
         "sft_fair_logprob": ("sft_fair", ""), "logprob": ("base", ""), "random": ("soft", "dotted")}  # fmt: skip
# place in report.html: (a share?, methods, metrics); a line for every method and metric that there is
CURVES = {
    "validation": (True, "sft sft_fair likelihood irl grpo", "validation/t1"),
    "sft_loss": (False, "sft sft_fair", "policy/loss"),
    "warm_up": (True, "warm-up", "discriminator/d_expert discriminator/d_negative"),
    "discriminator": (True, "irl", "discriminator/d_expert discriminator/d_negative"),
    "accuracy": (True, "irl", "discriminator/accuracy"),
    "learned_reward": (False, "irl", "reward/mean"),
    "true_reward": (True, "grpo", "reward/mean"),
    "entropy": (False, "irl grpo", "rollout/entropy"),
    "length": (False, "irl grpo", "rollout/length"),
    "finished": (True, "irl grpo", "rollout/finished"),
    "policy_loss": (False, "irl", "policy/loss"),
    "gradient_norm": (False, "irl grpo", "policy/grad_norm"),
}

# 1. Reading ---------------------------------------------------------------------------------------------------


def read_run(run: Path) -> dict:
    """{"settings", "metrics", "results", "traces": what these files hold, "missing": names of those that are not there}."""
    kinds = {"settings.json": dict, "metrics.jsonl": list, "results.json": dict, "traces.json": list}
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
    """`value` as a float if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None


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
    return [(n, tree[str(n)]) for n in sorted(int(key) for key in tree if re.fullmatch("[1-9][0-9]{0,5}", key))]


def series(metrics: list[dict], method: str, key: str, most: int = 400) -> list[tuple[float, float]]:
    """(step, value) of one metric, thinned to about `most`. Of a step logged twice the later counts."""
    logged = [record for record in metrics if record.get("method") == method]
    points = [(finite(record.get("step")), finite(record.get(key))) for record in logged]
    known = sorted(dict(point for point in points if None not in point).items())
    return known[:: max(1, len(known) // most)]


# 2. Cells -----------------------------------------------------------------------------------------------------


def percent(value) -> str:
    """An interval as a table cell: '31.0%' and, smaller, its bounds."""
    if not interval(value):
        return '<span class="soft">–</span>'
    mean, low, high = (100 * share for share in interval(value))
    return f"{mean:.1f}%" + (f" <small>{low:.1f} to {high:.1f}</small>" if low < high else "")


def strip(value, colour: str) -> str:
    """A small drawing of an interval on the line from 0 to 1; nothing, not a zero, of what is not known."""
    if not interval(value):
        return ""
    mean, low, high = (100 * min(max(share, 0.0), 1.0) for share in interval(value))
    return (f'<span class="strip" style="color:var(--{colour})">'
            f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{mean:.1f}%"></b></span>')  # fmt: skip


def signed(value: float) -> str:
    """'+0.41', with a real minus sign below zero."""
    return f"{value:+.2f}".replace("-", "−")


def table(label: str, head: list[str], rows: list[list[str]]) -> str:
    """Rows as a table in a box that scrolls where it is too narrow; nothing without rows. The first cell of a row is text,
    the others are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{escape(first)}</th><td>{"</td><td>".join(rest)}</td></tr>' for first, *rest in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
            f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>") * bool(rows)  # fmt: skip


def tidy(value) -> str:
    """A setting, for a page that people share: of an absolute path only the last name is shown."""
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive):
        return PureWindowsPath(value).name or value  # a Windows path splits at both kinds of slash
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# 3. Parts: {place in report.html: HTML, "" where there is nothing to show} ---------------------------------------


def results_parts(results: dict) -> dict[str, str]:
    """How well each method answers."""
    methods, rows = dig(results, "methods"), []
    for key in sorted(methods, key=lambda key: [*METHODS, key].index(key)):
        method, colour = dig(methods, key), key if key in METHODS else "soft"
        t1, greedy = ([method.get(how), *dig(method, f"{how}_interval", kind=list)] for how in ("t1", "greedy"))
        took = "".join(f"{seconds:,.0f} s" for seconds in numbers([method.get("seconds")]))
        rows.append([METHODS.get(key, key), percent(t1), percent(greedy), strip(t1, colour), took])
    return {"results": table("Results", ["method", "right at T = 1", "right, greedy", "T = 1, 0 to 100%", "training time"], rows)}


def training_parts(metrics: list[dict]) -> dict[str, str]:
    """One small figure per metric; long lines pale, under their running mean."""
    parts = {}
    for place, (share, methods, keys) in CURVES.items():
        lines = []
        for method, key in ((method, key) for method in methods.split() for key in keys.split()):
            points, colour = series(metrics, method, key), method if method in METHODS else "irl"
            if len(points) > 40:
                lines.append(Line("", colour, points, "pale"))
                near = len(points) // 20
                windows = [points[max(0, i - near) : i + near + 1] for i in range(len(points))]
                points = [(step, fmean(y for _, y in window)) for (step, _), window in zip(points, windows)]
            name = key.split("/d_")[1] if "/d_" in key else METHODS[method]
            lines += [Line(name, colour, points, "dashed" if name == "negative" else "")] if points else []
        parts[place] = chart(f"{place.replace('_', ' ')} against training step", "step", lines, share)
    return parts


def choosing_parts(results: dict) -> dict[str, str]:
    """pass@k of every method, and how well each rule chooses one of N samples."""

    def against(label: str, xlabel: str, lines: list[tuple]) -> str:
        """Shares against 1, 2, 4, .. lines: (name, colour, look, [(n, value)]). The reward has a band."""
        drawn, ticks = [], {}
        for name, colour, look, values in lines:
            ticks |= {math.log2(n): str(n) for n, value in values if interval(value)}
            known = [(math.log2(n), *interval(value)) for n, value in values if interval(value)]
            if known and name == "reward":
                around = [(x, low) for x, _, low, _ in known] + [(x, high) for x, _, _, high in known[::-1]]
                drawn.append(Line("", colour, around, "band"))
            drawn += [Line(name, colour, [(x, mean) for x, mean, _, _ in known], look)] if known else []
        return chart(label, xlabel, drawn, True, ticks)

    passes = [(name, key, "", by_number(dig(results, "methods", key, "pass@k"))) for key, name in METHODS.items()]
    sizes = [(n, row) for n, row in by_number(dig(results, "rerank")) if isinstance(row, dict)]
    best = [(rule, *look, [(n, row.get(rule)) for n, row in sizes]) for rule, look in RULES.items()]
    rules = dict.fromkeys(rule for _, row in sizes for rule in row)
    rows = [[rule, *(percent(row.get(rule)) for _, row in sizes)] for rule in rules]
    return {
        "pass_at_k": against("pass@k of each method", "k", passes),
        "best_of_n": against("Best of N by each rule", "N", best),
        "rules": table("All rules", ["rule", *(f"N = {n}" for n, _ in sizes)], rows),
    }


def reward_parts(results: dict) -> dict[str, str]:
    """Does the reward know right traces from wrong ones, which it was never told?"""
    groups = {kind: numbers(dig(results, "distributions", kind, kind=list)) for kind in ("right", "wrong")}
    areas = {key: value for key, value in dig(results, "rerank", "auroc").items() if finite(value) is not None}
    rows = [[key, f"{areas[key]:.3f}"] for key in sorted(areas, key=areas.get, reverse=True)]
    return {
        "rewards": histogram("Reward of traces with a right and with a wrong answer", "reward of the trace", groups),
        "auroc": table("AUROC", ["score of a trace", "AUROC"], rows),
    }


def localisation_parts(results: dict) -> dict[str, str]:
    """How often each score points at the first wrong token."""
    parts, heads = {}, {"hit0": "that token", "hit1": "at most 1 off", "step": "same step"}
    for kind in ("natural", "single"):
        found = {head: column for key, head in heads.items() if (column := dig(results, "localise", kind, key))}
        pointers = dict.fromkeys(key for column in found.values() for key in column)
        rows = [[key, *(percent(column.get(key)) for column in found.values())] for key in pointers]
        count = numbers([dig(results, "localise", kind).get("count")])
        parts[kind] = table("First wrong token", ["pointer", *found], rows)
        parts[f"{kind}_count"] = f"{count[0]:,.0f}" if rows and count else ""
    return parts


def traces_parts(traces: list, shown: int = 12) -> dict[str, str]:
    """Traces with every token coloured by its reward; all beyond `shown` wait behind a click."""
    traces = [trace for trace in traces if isinstance(trace, dict)]
    scale = full_colour([reward for trace in traces for reward in dig(trace, "rewards", kind=list)])
    cards = [trace_card(trace, scale) for trace in traces]
    lowest, highest = (signed(value) * bool(cards) for value in (-scale, scale))
    return {"traces": "".join(cards[:shown]), "more_traces": "".join(cards[shown:]), "lowest": lowest, "highest": highest}


def full_colour(rewards: list) -> float:
    """The reward that gets full colour: the 98th percentile of |reward|. An outlier must not bleach the page."""
    sizes = sorted(map(abs, numbers(rewards)))
    return (sizes[round(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0


def trace_card(trace: dict, scale: float) -> str:
    """One trace: the question, where it comes from, its tokens."""
    tokens, rewards = dig(trace, "tokens", kind=list), dig(trace, "rewards", kind=list)
    marks = {"first wrong token": trace.get("first_wrong"), "predicted": trace.get("predicted")}
    spans = [token_span(index, str(token), finite(reward), scale, [mark for mark, at in marks.items() if at == index])
             for index, (token, reward) in enumerate(zip(tokens, [*rewards, *[None] * len(tokens)]))]  # fmt: skip
    tags = [f'<span class="tag">{escape(str(trace["source"]))}</span>'] if trace.get("source") else []
    if (right := trace.get("correct")) is not None:
        tags.append(f'<span class="tag {"good" if right else "bad"}">{"✓ right" if right else "✗ wrong"}</span>')
    facts = [f"answer {escape(str(trace['answer']))}"] if trace.get("answer") is not None else []
    facts += [f"{mark} {at:.0f}" for mark, at in marks.items() if finite(at) is not None]
    return (f'<article><p class="question">{escape(str(trace.get("question", "")))}</p>'
            f'<p class="facts">{"".join(tags)}<span>{" · ".join(facts)}</span></p>'
            f'<div class="trace">{"".join(spans)}</div></article>\n')  # fmt: skip


def token_span(index: int, token: str, reward: float | None, scale: float, marks: list[str]) -> str:
    """One token: its reward as the background, and in words in the tooltip. Newlines are a sign and a break."""
    depth = max(-1.0, min((reward or 0.0) / scale, 1.0))
    classes = "t" + " up" * (depth > 0) + " down" * (depth < 0)
    classes += " first" * ("first wrong token" in marks) + " pointed" * ("predicted" in marks)
    said = ", ".join([f"token {index}: " + ("no reward" if reward is None else f"reward {signed(reward)}"), *marks])
    shown = escape(printable(token)).replace("\n", "⏎<br>") or "∅"
    after = "<br>" * shown.endswith("<br>")  # outside the span: an outlined token stays in one piece
    return f'<span class="{classes}" style="--d:{abs(depth):.2f}" title="{said}">{shown.removesuffix("<br>")}</span>{after}'


# 4. The page --------------------------------------------------------------------------------------------------


def page_of(name: str, found: dict) -> str:
    """report.html with its places filled by what `read_run` has found. What would stay empty is taken out."""
    results, settings = found["results"], found["settings"] or dig(found["results"], "settings")
    parts = results_parts(results) | training_parts(found["metrics"]) | choosing_parts(results) | reward_parts(results)
    parts |= localisation_parts(results) | traces_parts(found["traces"])
    rows = [[key, f"<code>{escape(tidy(value))}</code>"] for key, value in settings.items()]
    parts["settings"] = table("Settings", ["name", "value"], rows)
    frame = FRAME.read_text(encoding="utf-8")
    for element in ("figure", "details", "section"):
        frame = pruned(frame, element, parts)
    return Template(frame).substitute(
        parts, name=escape(name), style=CSS.read_text(encoding="utf-8"),
        meta="".join(f"<span>{key} <b>{escape(tidy(settings[key]))}</b></span>"
                     for key in ("model", "data", "seed") if settings.get(key) is not None),
        missing=f"Not in this run: {', '.join(found['missing'])}." if found["missing"] else "",
        links="".join(f'<a href="#{to}">{title}</a>' for to, title in re.findall(r'id="(\w+)"><h2>([^<]*)', frame)),
    )  # fmt: skip


def pruned(frame: str, element: str, parts: dict[str, str]) -> str:
    """The frame without those elements of a kind whose places are all to be filled with nothing."""
    kept, *pieces = frame.split(f"<{element}")
    for piece in pieces:
        inside, end, after = piece.partition(f"</{element}>\n")
        filled = any(parts[place] for place in re.findall(r"\$(\w+)", inside))
        kept += f"<{element}{inside}{end}{after}" if filled else after
    return kept


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
