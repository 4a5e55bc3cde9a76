"""Each module runs by itself, as `python <module>.py`, and shows its part."""

import ast
import importlib
import itertools
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWS = {  # module and arguments: what must be seen, as patterns over the whole output
    "data.py": [r"expert +\S+=\d+ \|", r"a pupil .*-> \d+"],
    "negatives.py": [r"expert +\S+=\d+ \|", r"swap .*differs at \d+", r"carried .*differs at \d+"],
    "policy.py": [
        r"<answer>\d+</answer> +log pi = -\d",
        r"largest difference from a fresh forward pass: [\d.]+e-0[5-9]",
    ],
    "reward.py": [
        r"discriminator update 20: .*accuracy 0\.\d",
        r"How many pens\?",
        r"\n +'3' .*\n +'\+' +\S+ +-\d\.\d+ +0\.[0-4]\d*\n",
    ],
    "irl.py": [
        r"iteration 3\n +rollout +length [\d.]+.*\n +discriminator loss .*\n"
        r" +reward +mean .*\n +policy +loss"
    ],
    "rerank.py": [r"best of 16 ", r"majority +0\.\d", r"oracle +0\.\d"],
    "baselines.py": [r"step 15 +loss 0\.\d", r"step +3 +mean 0\.\d+, loss -?\d"],
    "train.py --explain --questions 2 --group 2 --warm-up 1 --device cpu": [
        r"1\. ROLLOUT",
        r"4\. POLICY",
    ],
    "show.report --help": [r"such as runs/demo"],
    "tasks.pretrain --help": [r"--width"],
    "show.trace --help": [r"--trace"],
}


@pytest.mark.parametrize("command", SHOWS, ids=lambda command: command.split()[0])
def test_it_runs_and_shows_its_part(command, capsys, monkeypatch):
    name, *arguments = command.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None)
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    for pattern in SHOWS[command]:
        assert re.search(pattern, printed), f"{pattern!r} is not in\n{printed}"


def test_none_is_forgotten():
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    runs = {path for path in paths if '__name__ == "__main__"' in path.read_text()}
    names = {
        str(path.relative_to(ROOT)) if path.parent == ROOT else f"{path.parent.name}.{path.stem}"
        for path in runs
    }
    assert {command.split()[0] for command in SHOWS} == names


TOP = {
    "irl",
    "reward",
    "policy",
    "logprob",
    "data",
    "negatives",
    "train",
    "rerank",
    "baselines",
    "candidates",
}
ROOMS = ("engine", "show", "tasks")


def test_the_house():
    """Ten modules at the top, the rest in three rooms."""
    assert {path.stem for path in ROOT.glob("*.py")} == TOP
    assert all((ROOT / room / "__init__.py").exists() for room in ROOMS)


def imports_of(path: Path) -> set[str]:
    """The project's own modules that a file imports, in its functions too: "data",
    "engine.lora", .."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside if node.module in ROOMS else {node.module}
    return {name for name in found if name.split(".")[0] in TOP | set(ROOMS)}


def test_no_module_imports_itself_by_a_detour():
    paths = {name: ROOT / f"{name}.py" for name in TOP}
    paths |= {f"{room}.{path.stem}": path for room in ROOMS for path in (ROOT / room).glob("*.py")}
    left = {name: imports_of(path) for name, path in paths.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {left}"


@pytest.mark.parametrize("room, above", [("engine", TOP | {"show"}), ("tasks", TOP | {"show"})])
def test_a_room_imports_nothing_from_above(room, above):
    for path in (ROOT / room).glob("*.py"):
        # A command that makes the shipped bases: it stands on everything.
        if path.stem == "pretrain":
            continue
        needed = {name.split(".")[0] for name in imports_of(path)}
        assert not needed & above, f"{path.name} imports {needed & above}"


@pytest.mark.parametrize("module", sorted(TOP - {"train", "logprob", "candidates"}))
def test_the_table_on_top_names_what_is_there(module):
    """Each equation's row ends with the names of its functions, here or `module.name`, and of
    its tests, maybe cut by '..'."""
    text = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")))
    file = re.search(r"tests/(test_\w+)\.py", text)[1]
    tests = set(
        re.findall(
            r"^def test_(\w+)", (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), re.M
        )
    )
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if f"tests/{file}.py" in line) + 1
    rows = list(itertools.takewhile(str.strip, lines[start:]))
    assert rows
    for row in rows:
        *_, where, checks = re.split(r" {2,}", row.strip())
        for name in where.split(", "):
            owner, _, rest = name.partition(".")
            found = (
                importlib.import_module(owner) if owner in TOP else importlib.import_module(module)
            )
            for part in (rest if owner in TOP else name).split("."):
                assert hasattr(found, part), row
                found = getattr(found, part)
        for check in checks.split(", "):
            cut = check.removesuffix("..").rstrip("_")
            assert cut in tests or cut != check and any(test.startswith(cut) for test in tests), row
