"""What README.md and docs/ say about the code is there: files, functions, flags, tables."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import baselines
import train
from engine.settings import Settings, parse_settings
from experiments import real_tables, store, tables, trials

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
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    assert len(words) <= 2000
    links = re.findall(r"\]\(([^)\s#]+)", text)
    for page in (*(f"docs/{path.name}" for path in PAGES[1:]), "exercises/README.md"):
        assert links.count(page) == 1, page


def test_functions_named_in_the_text_exist():
    """Modules go by their short names: `logprob.expectation` is in engine/logprob.py."""
    paths = list(ROOT.glob("*.py"))
    for room in ("engine", "show", "tasks"):
        paths += (ROOT / room).glob("[a-z]*.py")
    modules = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    assert len(modules) == len(paths)  # no two of one name
    pattern = rf"`({'|'.join(modules)})\.([A-Za-z_]\w*(?:\.\w+)?)(?:\(\))?`"
    files = ("py", "jsonl", "json", "html")
    names = {name for name in re.findall(pattern, TEXT) if name[1] not in files}
    assert len(names) >= 20
    for module, path in names:
        thing = importlib.import_module(modules[module])
        for part in path.split("."):
            assert part in {*dir(thing), *getattr(thing, "__dataclass_fields__", {})}, path
            thing = getattr(thing, part, None)


def test_commands_named_in_the_text_exist():
    pages = TEXT + (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"python (-m )?([a-z_]+[\w./]*\w)", pages))
    assert len(commands) >= 8
    for module, name in commands - {("-m ", "venv"), ("-m ", "pytest"), ("-m ", "doctest")}:
        path = name
        if module:
            path = name.replace(".", "/") + ".py"
        assert (ROOT / path).exists(), name


def test_flags_named_in_the_text_exist():
    known = {"--" + f.name.replace("_", "-") for f in fields(Settings)}
    known |= {"--help", "--resume", "--name", "--device", "--date", "--explain"}
    known |= {"--only", "--quick", "--tables", "--experts", "--nnodes", "--svg"}
    flags = set(re.findall(r"`(--[a-z][a-z-]+)[ `]", TEXT))
    assert len(flags) >= 15 and flags - {"--index-url"} <= known, flags - known


def test_nothing_is_called_what_it_is_not():
    """GAIL's discriminator needs a head: a likelihood with logit = f has D <= 1/2."""
    for label, flags in trials.CHANGES["ablations"].items():
        assert "GAIL" not in label or "--reward head" in flags, label
    # GRPO, not tuned, bounds nothing
    for path in (*PAGES, *ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")):
        assert "upper bound" not in path.read_text(encoding="utf-8"), path


def test_every_metric_is_explained():
    """What the four kinds of steps log, against the table in docs/reading-a-run.md."""
    flags = "--demonstrations 8 --extra-questions 0 --questions 2 --group 2 --warm-up 1"
    run = train.Run(parse_settings(flags.split()), device="cpu")
    loop = run.make_loop()
    lines = [{"discriminator": loop.warm_up()}, loop.step(), {"validation": {"t1": 0.5}}]
    for method in (baselines.SFT, baselines.GRPO):
        lines.append(method(run.s, run.tokenizer, run.load(), run.experts).step())
    keys = {(stage, name) for line in lines for stage, metrics in line.items() for name in metrics}
    page = (ROOT / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    table = page.split("## How to read a run")[1].split("When a curve")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert len(keys) >= 12
    for stage, name in keys:  # `stage/name`, or `stage/other`, `name`
        full = any(f"`{stage}/{name}`" in cell for cell in cells)
        short = any(f"`{stage}/" in cell and f" `{name}`" in cell for cell in cells)
        assert full or short, f"{stage}/{name}"


def rounded(found):
    """Numbers as far as machines agree on them."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return round(found, 6) if isinstance(found, float) else found


def test_the_real_model_table_is_that_of_the_samples(monkeypatch):
    """results/real.json is what the kept samples say today, the pages are what it says."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    found = json.loads((store.folder() / "real.json").read_text(encoding="utf-8"))
    assert rounded(found) == rounded(real_tables.summary()) and found["gsm8k"]
    assert (store.folder() / "real.md").read_text(encoding="utf-8") == real_tables.markdown(found)
    for page, (part, table) in real_tables.pages(found).items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text == tables.between_marks(text, part, table, "real")


def test_the_pages_hold_the_tables_of_the_results(monkeypatch):
    """What `python -m experiments.run --tables` prints stands in the pages."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    for name, parts in tables.pages().items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for part, new in parts.items():
            assert len(new.splitlines()) > 2
            assert text == tables.between_marks(text, part, new), f"{name}, {part}"


def test_results_are_few_files(monkeypatch):
    """At most 20 and 2 MB: what was measured, not how."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    files = [path for path in store.folder().rglob("*") if path.is_file()]
    assert len(files) <= 20 and sum(path.stat().st_size for path in files) < 2_000_000
