"""The report: everything in a run is shown, nothing in it can act, and nothing has to be there."""

import copy
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.errors import UserError
from show import report

HOSTILE = "<script>alert(1)</script>\"'><img src=https://example.com/x.png onerror=alert(2)>"


def around(value: float) -> list[float]:
    return [value, value - 0.05, value + 0.05]


def full_run() -> dict:
    """The four files of a run, as train.py writes them."""
    rng = random.Random(0)
    method = {"t1": 0.31, "t1_interval": [0.28, 0.34], "greedy": 0.4, "greedy_interval": [0.36, 0.44],
              "seconds": 12.3, "pass@k": {"1": 0.31, "2": 0.45, "4": 0.6}}  # fmt: skip
    row = {key: around(0.5) for key in report.RULES}
    places = {key: around(0.4) for key in report.POINTERS}
    hits = {"hit0": places, "hit1": places, "step": places, "count": 312}
    metrics = [{"method": name, "step": step} | {key.split("|")[spelling % len(key.split("|"))]: rng.random()}
               for _, _, lines, _ in report.PANELS for names, key, _ in lines
               for spelling, name in enumerate(names.split("|")) for step in range(50)]  # fmt: skip
    trace = {"question": "What is 2*3?", "answer": "5", "correct": False, "source": "base", "first_wrong": 1,
             "predicted": 2, "tokens": ["2", "+", "3", "\n", "=5", ""],
             "rewards": [0.5, -2.0, 1.0, 0.0, None, 0.1]}  # fmt: skip
    return {
        "settings.json": {"model": "/home/somebody/models/base", "data": "words", "seed": 7, "lr": 1e-4},
        "metrics.jsonl": metrics,
        "results.json": {
            "methods": {name: method for name in report.METHODS},
            "reward": {"auroc": 0.95},
            "rerank": {"1": row, "4": row, "16": row, "auroc": {"reward": 0.871, "logprob": None}},
            "localise": {"natural": hits, "single": hits},
            "distributions": {key: [rng.gauss(0, 1) for _ in range(50)] for key in ("right", "wrong")},
        },
        "traces.json": [trace],
    }  # fmt: skip


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        lines = content if name.endswith("l") else [content]
        (folder / name).write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def page_of(folder: Path, files: dict) -> str:
    return report.write_report(write(folder, files)).read_text(encoding="utf-8")


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


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time, and hold no text of the run."""
    monkeypatch.setattr(report, "draw", lambda name, label, paint, size: "<svg></svg>")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("demo"), full_run())


def test_everything_of_a_full_run_is_shown(page):
    elements = Elements(page)
    sections = [attributes["id"] for tag, attributes in elements.found if tag == "section"]
    assert sections == ["results", "training", "choosing", "reward", "localisation", "traces", "settings"]
    assert "31.0%</td>" not in page and "31.0% <small>28.0 to 34.0</small>" in page
    assert "GRPO alone sees the true answers" in page and "0.871" in page and "In 312 wrong traces" in page
    figures = [attributes for tag, attributes in elements.found if tag == "svg"]
    assert len(figures) == len(report.PANELS) + 3
    assert all(f["role"] == "img" and f["aria-label"] and "width" not in f for f in figures)
    for _, _, _, caption in report.PANELS:
        assert caption in page
    for name in [*report.POINTERS.values(), *(name for name, *_ in report.RULES.values())]:
        assert name in elements.text


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
    assert not any(stand_in in page for stand_in in report.PAINT.values())
    used = set(re.findall(r"var\(--([a-z_]+)\)", "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))))
    assert used == set(report.PAINT)
    light, dark = report.CSS.split("@media (prefers-color-scheme: dark)")[:2]
    for colour in report.COLOURS:
        assert f"--{colour}:" in light and f"--{colour}:" in dark.split("} }")[0]


def test_the_same_run_gives_the_same_page(page, tmp_path):
    folder = tmp_path / re.search("<h1>(.*?)</h1>", page).group(1)
    folder.mkdir()
    assert page_of(folder, full_run()) == page


def test_tokens_are_coloured_by_their_reward(page):
    token = r'<span class="(t[^"]*)" style="--d:([\d.]+)" title="([^"]*)">(.*?)</span>(<br>)?'
    spans = re.findall(token, page)
    assert [(classes, depth) for classes, depth, *_ in spans] == [
        ("t up", "0.25"), ("t down first", "1.00"), ("t up pointed", "0.50"), ("t", "0.00"), ("t", "0.00"),
        ("t up", "0.05"),
    ]  # fmt: skip
    assert spans[1][2] == "token 1: reward −2.00, first wrong token"
    assert spans[2][2] == "token 2: reward +1.00, predicted"
    assert spans[3][3:] == ("⏎", "<br>")  # a newline is seen, and breaks the line
    assert spans[4][2] == "token 4: no reward" and spans[5][3] == "∅"


def test_one_outlier_does_not_bleach_the_page():
    assert report.reward_scale([{"rewards": [1.0, -1.0] * 100 + [-1000.0]}]) == 1.0


def poison(value, key=""):
    """`value` with hostile text in place of every string, and as one more key of every object."""
    if isinstance(value, dict):
        return {k: poison(v, k) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE if isinstance(value, str) and key != "method" else value


def test_hostile_text_stays_text(no_figures, tmp_path):
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
    page = page_of(tmp_path, {"traces.json": [{"question": "?", "tokens": tokens, "rewards": [1.0]}]})
    assert all(shown in page for shown in ("\\x00</span>", "\\x0d</span>", "\\x1b[31m<", "a⏎<br>⏎<br>b"))


@pytest.mark.parametrize("name", list(full_run()))
def test_any_file_alone_or_missing(no_figures, tmp_path, name):
    files = full_run()
    assert "<section" in page_of(tmp_path, {name: files[name]})
    assert "Not in this run" in page_of(tmp_path, {name: files[name]})
    (tmp_path / name).unlink()
    del files[name]
    assert f"Not in this run: {name}." in page_of(tmp_path, files)


def places(tree, at=()):
    """The path of every value in a JSON tree; of lists only the first item's."""
    yield at
    children = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list):
        children = list(enumerate(tree))[:1]
    for key, child in children:
        yield from places(child, (*at, key))


@pytest.mark.parametrize("name", ["results.json", "traces.json", "metrics.jsonl"])
def test_any_part_missing_or_odd(no_figures, name):
    sections = {"metrics.jsonl": [report.training_section], "traces.json": [report.traces_section],
                "results.json": [report.results_section, report.choosing_section, report.reward_section,
                                 report.localisation_section]}  # fmt: skip
    original = full_run()[name]
    original = original[:2] if name == "metrics.jsonl" else original
    for path in places(original):
        if not path or (name == "metrics.jsonl" and len(path) == 1):  # read_run has seen to the outermost
            continue
        for odd in (None, "text", 3, [], {}, [None], True, math.nan, 10**400):
            content = copy.deepcopy(original)
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = odd
            for section in sections[name]:
                section(content)


def test_figures_of_little_data():
    assert "<svg" in report.curves("a", "t", True, [("irl", "IRL", [1.0], [0.0])])
    assert "<svg" in report.against("b", "t", "N", [("irl", "-", "o", "IRL", True, {1: (0.0, None, None)})])
    assert "<svg" in report.histograms([1.0], [])
    assert "<svg" in report.histograms([2.0, 2.0], [2.0])
    assert report.histograms([], []) == report.against("b", "t", "N", []) == ""


def test_paths_of_this_machine_stay_out_of_the_page(page):
    assert "/home/somebody" not in page and "<b>base</b>" in page
    assert report.tidy({"a": ["C:\\Users\\me\\run", "owner/model"]}) == {"a": ["run", "owner/model"]}


def test_command_line_and_errors(tmp_path):
    root = Path(report.__file__).parents[1]
    command = [sys.executable, "-m", "show.report", str(tmp_path)]
    empty = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert empty.returncode == 2 and empty.stderr.startswith("error: ") and empty.stderr.count("\n") == 1
    for name, text in (("results.json", "{"), ("results.json", "[]"), ("metrics.jsonl", '{\n{"step": 1}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            report.write_report(tmp_path)
        (tmp_path / name).unlink()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.write_report(write(tmp_path, full_run()))
