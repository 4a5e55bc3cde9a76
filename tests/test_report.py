"""The report: everything in a run is shown, nothing in it can act, and nothing has to be there."""

import ast
import copy
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest

from engine.errors import UserError
from show import report
from show.report import LINES, METHODS, chart, histogram, limits, ticks

FRAME = Path(report.__file__).with_suffix(".html").read_text(encoding="utf-8")
CSS = Path(report.__file__).with_suffix(".css").read_text(encoding="utf-8").strip()
# The ways to choose that are drawn
RULES = [name for name in LINES if name not in METHODS]
METRICS = (
    "validation/t1",
    "policy/loss",
    "policy/grad_norm",
    "discriminator/d_expert",
    "discriminator/d_sample",
    "discriminator/d_broken",
    "discriminator/accuracy",
    "reward/mean",
    "rollout/entropy",
    "rollout/length",
    "rollout/finished",
)
HOSTILE = "<script>alert(1)</script>\"'><img src=https://example.com/x.png onerror=alert(2)>"


def around(value: float) -> list[float]:
    return [value, value - 0.05, value + 0.05]


def full_run() -> dict:
    """The four files of a run, as train.py writes them."""
    rng = random.Random(0)
    method = {
        "t1": 0.31,
        "t1_interval": [0.28, 0.34],
        "greedy": 0.4,
        "greedy_interval": [0.36, 0.44],
        "seconds": 12.3,
        "pass@k": {"1": 0.31, "2": 0.45, "4": 0.6},
    }
    row = {
        key: around(0.5)
        for key in (*RULES, "weighted_majority", "reward_last", "longest", "a_new_rule")
    }
    places = {key: around(0.4) for key in ("reward", "reward_first", "sft_logprob_first", "chance")}
    hits = {"hit0": places, "hit1": places, "count": 312}
    metrics = [
        {"method": method, "step": step, key: rng.random()}
        for method in (*report.METHODS, "warm-up")
        for key in METRICS
        for step in range(50)
    ]
    trace = {
        "question": "What is 2*3?",
        "answer": "5",
        "correct": False,
        "source": "base",
        "first_wrong": 1,
        "predicted": 2,
        "tokens": ["2", "+", "3", "\n", "=5", ""],
        "rewards": [0.5, -2.0, 1.0, 0.0, None, 0.1],
    }
    return {
        "settings.json": {
            "model": "/home/somebody/models/base",
            "data": "words",
            "seed": 7,
            "lr": 1e-4,
        },
        "metrics.jsonl": metrics,
        "results.json": {
            "methods": {name: method for name in report.METHODS},
            "reward": {"auroc": 0.95},
            "rerank": {
                "1": row,
                "4": row,
                "16": row,
                "auroc": {"reward": 0.871, "logprob": None},
                "auroc_within": {"reward": around(0.7)},
            },
            "localise": {"natural": hits, "single": hits},
            "distributions": {
                key: [rng.gauss(0, 1) for _ in range(50)] for key in ("right", "wrong")
            },
        },
        "traces.json": [trace],
    }


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        lines = content if name.endswith("l") else [content]
        (folder / name).write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def page_of(folder: Path, files: dict) -> str:
    return report.write_report(write(folder, files)).read_text(encoding="utf-8")


def page_with(**found) -> str:
    """The page of a run in which this was found, and nothing else."""
    return report.page_of(
        "run", {"settings": {}, "metrics": [], "results": {}, "traces": [], "missing": []} | found
    )


def names() -> dict:
    """What report.html calls the names in results.json."""
    return ast.literal_eval(re.search(r"{% set names = (\{.*?\}) %}", FRAME, re.DOTALL).group(1))


class Elements(HTMLParser):
    """What a browser would make of the page: (tag, attributes) of every element, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("demo"), full_run())


def test_everything_of_a_full_run_is_shown(page):
    elements = Elements(page)
    sections = [attributes["id"] for tag, attributes in elements.found if tag == "section"]
    assert sections == [
        "results",
        "training",
        "choosing",
        "reward",
        "localisation",
        "traces",
        "settings",
    ]
    assert "31.0%</td>" not in page and "31.0% <small>28.0 to 34.0</small>" in page
    assert (
        "GRPO alone sees the true answers" in page
        and "87.1%" in page
        and "In 312 wrong traces" in page
    )
    figures = [attributes for tag, attributes in elements.found if tag == "svg"]
    assert len(figures) == FRAME.count("curve(") + 3 == 15
    assert all(f["role"] == "img" and f["aria-label"] and "width" not in f for f in figures)
    captions = re.findall("<figcaption>([^<]*)</figcaption>", page)
    assert len(captions) == len(figures) + 3 and all(captions)
    for name in ("oracle", "weighted_majority", "reward_last", "sft_logprob_first"):
        assert names()[name] in elements.text
    assert "a_new_rule" in elements.text and not any(
        key in elements.text for key in names() if "_" in key
    )
    assert all(name in elements.text for name in report.METHODS.values())
    legends = set(re.findall("</i>([^<]*)</span>", page))
    assert legends == {
        *report.METHODS.values(),
        "expert",
        "sample",
        "broken",
        *(names()[rule] for rule in RULES),
        "right answer (50)",
        "wrong answer (50)",
    }
    assert (
        CSS in page
        and not re.search("{[{%#]|[%#}]}", page.replace(CSS, ""))
        and page.startswith("<!doctype html>")
    )


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert "http://" not in page and "https://" not in page and "@import" not in page
    for tag, attributes in Elements(page).found:
        assert tag not in ("script", "link", "iframe", "img", "object", "base")
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "src"
            assert not name.endswith("href") or value.startswith("#")
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_figures_follow_the_theme(page):
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    used = set(re.findall(r"var\(--([a-z_]+)\)", figures))
    assert (
        used >= {*report.METHODS, "ink", "soft", "other", "right", "wrong"} and "#" not in figures
    )
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")[:2]
    for colour in used:
        assert f"--{colour}:" in light and f"--{colour}:" in dark.split("} }")[0]


def test_the_same_run_gives_the_same_page(page, tmp_path):
    folder = tmp_path / re.search("<h1>(.*?)</h1>", page).group(1)
    folder.mkdir()
    assert page_of(folder, full_run()) == page


def test_tokens_are_coloured_by_their_reward(page):
    token = r'<span class="(t[^"]*)" style="--d:([\d.]+)" title="([^"]*)">(.*?)</span>(\n)?'
    spans = re.findall(token, page)
    assert [(classes, depth) for classes, depth, *_ in spans] == [
        ("t up", "0.25"),
        ("t down first", "1.00"),
        ("t up pointed", "0.50"),
        ("t", "0.00"),
        ("t", "0.00"),
        ("t up", "0.05"),
    ]
    assert spans[1][2] == "token 1: reward −2.00, first wrong token"
    assert spans[2][2] == "token 2: reward +1.00, predicted"
    assert spans[3][3:] == (
        "⏎",
        "\n",
    )  # a newline is seen, and breaks the line (.trace is pre-wrap)
    assert spans[4][2] == "token 4: no reward" and spans[5][3] == "∅"


def test_one_outlier_does_not_bleach_the_page():
    assert report.full_colour([1.0, -1.0] * 100 + [-1000.0]) == 1.0
    assert report.full_colour([-2.0, 1.0, None]) == 2.0 and report.full_colour([]) == 1.0


def poison(value, key=""):
    """`value` with hostile text in place of every string, and as one more key of every object."""
    if isinstance(value, dict):
        return {k: poison(v, k) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE if isinstance(value, str) and key != "method" else value


def test_hostile_text_stays_text(tmp_path):
    folder = tmp_path / "R&D"
    folder.mkdir()
    files = full_run()
    page = page_of(folder, {name: poison(content) for name, content in files.items()})
    assert "<script" not in page and "<img" not in page and "<h1>R&amp;D</h1>" in page
    elements = Elements(page)
    attributes = {name for _, attributes in elements.found for name in attributes}
    assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
    assert elements.text.count("alert(1)") > 10  # shown, not dropped


def test_control_characters_and_half_characters_are_harmless(tmp_path):
    tokens = ["\x00", "\r", "\x1b[31m", "\ud800", "a\n\nb"]
    page = page_of(
        tmp_path, {"traces.json": [{"question": "?", "tokens": tokens, "rewards": [1.0]}]}
    )
    assert all(
        shown in page for shown in ("\\x00</span>", "\\x0d</span>", "\\x1b[31m<", "a⏎\n⏎\nb")
    )


@pytest.mark.parametrize("name", list(full_run()))
def test_any_file_alone_or_missing(tmp_path, name):
    files = full_run()
    assert "<section" in page_of(tmp_path, {name: files[name]})
    assert "Not in this run" in page_of(tmp_path, {name: files[name]})
    (tmp_path / name).unlink()
    del files[name]
    assert f"Not in this run: {name}." in page_of(tmp_path, files)


def test_what_is_read():
    assert report.parse_lines('{"step": 1}\n{"st') == [{"step": 1}]
    assert report.parse_lines('{"loss": NaN}') == [{"loss": None}]
    for value in ([0.5, 0.4, 0.6], 0.5):
        assert report.interval(value)[0] == 0.5
    for value in ([0.5, None, 0.6], [0.5], None, "0.5", []):
        assert report.interval(value) == []
    # of a step that was logged twice the later line counts
    logged = [(2, 0.1), (1, 0.5), (2, 0.3), (3, None)]
    metrics = [{"method": "irl", "step": step, "reward/mean": value} for step, value in logged]
    ((*_, points),) = report.curve(pandas.DataFrame(metrics), "irl", "reward/mean")["lines"]
    assert len(points) == 2 and points[0][1] < points[1][1]  # down is down


def test_an_unknown_share_is_not_drawn_as_zero(tmp_path):
    page = page_of(
        tmp_path, {"results.json": {"methods": {"sft": {"t1": 0.0}, "irl": {"t1": None}}}}
    )
    assert page.count('<span class="strip"') == 1 and "–</span>" in page


def test_what_would_stay_empty_is_left_out():
    def parts(page: str) -> dict[str, int]:
        found = [
            attributes.get("id") if tag == "section" else tag
            for tag, attributes in Elements(page).found
        ]
        assert re.findall('href="#(.*?)"', page) == [
            part for part in found if f'id="{part}"' in page
        ]
        return {
            part: found.count(part)
            for part in found
            if part in ("figure", "details", "table") or f'id="{part}"' in page
        }

    assert parts(page_with()) == {}
    one = {"method": "sft", "step": 1, "policy/loss": 0.5}
    assert parts(page_with(metrics=[one])) == {"training": 1, "figure": 1}
    assert parts(page_with(results={"methods": {"sft": {"t1": 0.5}}})) == {"results": 1, "table": 1}
    assert parts(page_with(results={"rerank": {"4": {"new": 0.5}}})) == {
        "choosing": 1,
        "details": 1,
        "table": 1,
    }
    assert parts(page_with(results={"rerank": {"4": {}, "auroc": {"reward": None}}})) == {}
    assert parts(page_with(results={"localise": {"single": {"count": 9}}})) == {}
    assert parts(page_with(traces=[{"tokens": ["a"]}] * 12)) == {"traces": 1}
    assert parts(page_with(traces=[{"tokens": ["a"]}] * 13)) == {"traces": 1, "details": 1}


@pytest.mark.parametrize("odd", [None, "text", 3, [], {}, [None]])
def test_any_part_missing_or_odd(odd, tmp_path):
    """A page, or one line that says whose fault it is."""
    original = full_run()
    for name in ("results.json", "traces.json", "metrics.jsonl"):
        top = original[name] if name == "results.json" else original[name][0]
        for key in top:
            files = copy.deepcopy(original) | {"metrics.jsonl": original["metrics.jsonl"][:2]}
            (files[name] if name == "results.json" else files[name][0])[key] = odd
            try:
                assert "</html>" in page_of(tmp_path, files)
            except UserError as error:
                assert "train.py" in str(error)


def test_figures_of_little_data():
    for key in ("validation/t1", "rollout/length"):
        assert page_with(metrics=[{"method": "irl", "step": 1, key: 0.0}]).count("<circle") == 1
    assert page_with(results={"methods": {"irl": {"pass@k": {"2": 0.5}}}}).count("<circle") == 1
    for right, wrong, count in ([1.0], [], 1), ([2.0, 2.0], [2.0], 2), ([], [], 0):
        page = page_with(results={"distributions": {"right": right, "wrong": wrong}})
        assert page.count("<g ") == count and page.count("<svg") == bool(count)
    assert (
        histogram("r", {"right": [], "wrong": []})
        == chart("N", [])
        == chart("N", [("a", "irl", "", [])])
        == {}
    )


def test_axes():
    assert [limits([0.0, 1.0]), limits([2.0, 2.0])] == [(-0.04, 1.04), (1.998, 2.002)]
    assert limits([0, 0])[0] < 0 < limits([0, 0])[1]
    assert ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 42) == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_a_figure_shows_its_numbers_where_they_are():
    """The places of points follow the axes' own numbers: the curve is at a tick's height where
    it has its value."""
    drawn = {"sft": ((0, 0.25), (10, 0.5)), "irl": ((0, 0.0), (10, 1.0))}
    points = [(method, *point) for method, line in drawn.items() for point in line]
    figure = page_with(
        metrics=[{"method": method, "step": x, "validation/t1": y} for method, x, y in points]
    )
    circles = [
        (float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', figure)
    ]
    heights = {
        text: float(y)
        for y, text in re.findall(r'H290"/>\s<text [^>]* y="([\d.]+)">(\d+)%</text>', figure)
    }
    across = {
        text: float(x)
        for x, text in re.findall(r'V144"/>\s<text [^>]*x="([\d.]+)"[^>]*>(\d+)</text>', figure)
    }
    assert list(heights) == ["0", "20", "40", "60", "80", "100"] and {"0", "10"} <= set(across)
    full = heights["0"] - heights["100"]
    drawn = [(heights["0"] - 3.5 - y) / full for _, y in circles]
    assert drawn == pytest.approx([0.25, 0.5, 0.0, 1.0], abs=1e-3)
    assert [x for x, _ in circles] == pytest.approx([across["0"], across["10"]] * 2)
    assert ">SFT</span>" in figure and ">IRL</span>" in figure  # the legend


def test_a_histogram_shows_shares_of_each_group():
    page = page_with(results={"distributions": {"right": [1.0] * 9, "wrong": [0.0]}})
    lines = re.findall(r'<path class="line area[^"]*" d="M([^"]+)"', page)
    tops = [min(float(point.split()[1]) for point in line.split("L")) for line in lines]
    assert len(tops) == 2 and tops[0] == tops[1]  # all of the nine, all of the one


def test_paths_of_this_machine_stay_out_of_the_page(page):
    assert "/home/somebody" not in page and "<b>base</b>" in page
    assert [report.tidy(value) for value in ("C:\\Users\\me\\run", "owner/model", 3)] == [
        "run",
        "owner/model",
        "3",
    ]


def test_command_line_and_errors(tmp_path):
    root = Path(report.__file__).parents[1]
    command = [sys.executable, "-m", "show.report", str(tmp_path)]
    empty = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (
        empty.returncode == 2
        and empty.stderr.startswith("error: ")
        and empty.stderr.count("\n") == 1
    )
    for name, text in (
        ("results.json", "{"),
        ("results.json", "[]"),
        ("metrics.jsonl", '{\n{"step": 1}'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            report.write_report(tmp_path)
        (tmp_path / name).unlink()
