"""What README.md and docs/ say about the code is there: files, anchors, functions, flags, metrics."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import baselines
import train
from engine.settings import Settings, parse_settings
from experiments import cards, real_tables, store, tables, trials

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_the_readme_is_short_and_links_every_page_once():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 2500
    links = re.findall(r"\]\(([^)\s#]+)", text)
    for page in (*(f"docs/{path.name}" for path in PAGES[1:]), "exercises/README.md"):
        assert links.count(page) == 1, page


def test_functions_named_in_the_text_exist():
    """Modules go by their short names: `logprob.expectation` is in engine/logprob.py."""
    paths = [*ROOT.glob("*.py"), *(path for room in ("engine", "show", "tasks") for path in (ROOT / room).glob("[a-z]*.py"))]
    modules = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    assert len(modules) == len(paths)  # no two of one name
    names = set(re.findall(rf"`({'|'.join(modules)})\.([A-Za-z_]\w*(?:\.\w+)?)(?:\(\))?`", TEXT))
    names = {(module, path) for module, path in names if path not in ("py", "jsonl", "json", "html")}
    assert len(names) >= 20
    for module, path in names:
        found = importlib.import_module(modules[module])
        for part in path.split("."):
            assert hasattr(found, part) or part in getattr(found, "__dataclass_fields__", {}), f"{module}.{path}"
            found = getattr(found, part, None)


def test_commands_named_in_the_text_exist():
    pages = TEXT + (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"python (-m )?([a-z_]+[\w./]*\w)", pages))
    assert len(commands) >= 8
    for module, name in commands - {("-m ", "venv"), ("-m ", "pytest"), ("-m ", "doctest")}:
        assert (ROOT / (name.replace(".", "/") + ".py" if module else name)).exists(), name


def test_flags_named_in_the_text_exist():
    known = {"--" + f.name.replace("_", "-") for f in fields(Settings)} | {"--help", "--resume", "--only", "--quick", "--experts", "--nnodes"}
    flags = set(re.findall(r"`(--[a-z][a-z-]+)[ `]", TEXT))
    assert len(flags) >= 15 and flags - {"--index-url"} <= known, flags - known


def test_nothing_is_called_what_it_is_not():
    """GAIL's discriminator needs a head: a likelihood with logit = f has D <= 1/2. GRPO, not tuned, bounds nothing."""
    for label, flags in trials.ABLATIONS.items():
        assert "GAIL" not in label or "--reward head" in flags, label
    for path in (*PAGES, *ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")):
        assert "upper bound" not in path.read_text(encoding="utf-8"), path


def test_every_metric_is_explained():
    """What the four kinds of steps log, against the table in docs/reading-a-run.md."""
    flags = "--demonstrations 8 --extra-questions 0 --questions 2 --group 2 --warm-up 1 --device cpu"
    run = train.Run(parse_settings(flags.split()))
    loop, s = run.make_loop(), run.s
    lines = [{"discriminator": loop.warm_up()}, loop.step(), {"validation": {"t1": 0.5}}]
    lines += [method(s, run.tokenizer, run.load(), run.experts).step() for method in (baselines.SFT, baselines.GRPO)]
    keys = {(stage, name) for line in lines for stage, metrics in line.items() for name in metrics}
    page = (ROOT / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    table = page.split("## How to read a run")[1].split("When a curve")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert len(keys) >= 12
    for stage, name in keys:  # `stage/name`, or `stage/other`, `name`
        full = any(f"`{stage}/{name}`" in cell for cell in cells)
        assert full or any(f"`{stage}/" in cell and f" `{name}`" in cell for cell in cells), f"{stage}/{name}"


def test_the_memory_table_is_the_programs(capsys):
    cards.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Qwen")]
    assert len(rows) == 4 and "\n".join(rows) in TEXT


def rounded(found):
    """Numbers as far as machines agree on them."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return round(found, 6) if isinstance(found, float) else found


def test_the_real_model_table_is_that_of_the_samples(monkeypatch):
    """results/real.json is what the kept samples say today, real.md and README.md what it says."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    found = json.loads((store.folder() / "real.json").read_text(encoding="utf-8"))
    assert rounded(found) == rounded(real_tables.summary()) and found["gsm8k"]
    assert (store.folder() / "real.md").read_text(encoding="utf-8") == real_tables.markdown(found)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = real_tables.readme_table(found)
    assert text == tables.between_marks(text, "real", table, "real")


def test_results_are_those_of_the_trials(monkeypatch):
    """summary.json is what the kept trials say, and the pages' tables are what both say."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    measured = tables.Measured()
    summary = json.loads((store.folder() / "summary.json").read_text(encoding="utf-8"))
    assert summary == tables.main_summary(measured)
    assert summary["seeds"] >= 5  # of the task that has most: the tables say of which
    for name, parts in tables.pages(measured, summary).items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text == tables.into_page(text, parts), name


def test_results_are_few_files(monkeypatch):
    """At most 20 and 2 MB: what was measured, not how."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    files = [path for path in store.folder().rglob("*") if path.is_file()]
    assert len(files) <= 20 and sum(path.stat().st_size for path in files) < 2_000_000
