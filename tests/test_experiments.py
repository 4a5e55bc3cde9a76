"""experiments/: what is kept, what is chosen, and the tables of trials that are made up here."""

import ast
import json
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest

from engine.errors import UserError
from engine.settings import parse_settings
from experiments import run, store, tables, trials

FOLDER = Path(store.__file__).parent


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    monkeypatch.setenv("IRL_RESULTS", str(tmp_path))
    return tmp_path


def test_no_module_imports_in_a_circle():
    """What each imports of the others can be put in an order; run.py is on top."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    imports = {}
    for name in names:
        imports[name] = set()
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "experiments":
                imports[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                package, _, module = node.module.partition(".")
                if package == "experiments":
                    imports[name].add(module)
    order = list(TopologicalSorter(imports).static_order())  # CycleError where there is one
    assert order.index("store") < order.index("tables") < order.index("run")
    assert not any("run" in imported for imported in imports.values())


# --- what is kept ---


def test_rows_of_a_trial_replace_what_it_had(results):
    store.add("trials", "a", 0, [{"method": "irl", "t1": 0.5}, {"method": "base", "t1": 1 / 3}])
    store.add("trials", "a", 1, [{"method": "irl", "t1": 0.75}])
    store.add("trials", "a", 1, [{"method": "irl", "t1": 0.25}])
    kept = store.read("trials")
    assert kept[["seed", "method"]].values.tolist() == [[0, "irl"], [0, "base"], [1, "irl"]]
    assert kept["t1"].tolist() == [0.5, 0.333333333, 0.25]
    before = (results / "trials.csv").read_bytes()
    store.add("trials", "a", 1, [{"method": "irl", "t1": 0.25}])
    assert (results / "trials.csv").read_bytes() == before


def test_a_trial_without_rows_is_kept_where_nothing_is_there_yet(results):
    store.add("curves", "a", 0, [])
    assert store.read("curves").empty
    store.add("curves", "b", 0, [{"method": "irl", "step": 20}])
    store.add("curves", "b", 0, [])
    assert store.read("curves").empty


@pytest.mark.parametrize("table", store.COLUMNS)
def test_every_table_is_read_as_it_was_kept(results, table):
    row = {name: 0.5 for name in store.COLUMNS[table][2:]}
    assert store.read(table).empty
    store.add(table, "a", 3, [row])
    assert store.read(table).to_dict("records") == [{"trial": "a", "seed": 3} | row]


RESULTS = {
    "counts": {"test": 515},
    "methods": {
        "base": {"t1": 0.25, "greedy": 0.5, "pass@k": {"1": 0.25, "2": 0.3, "4": 0.4}},
        "irl": {"t1": 0.75, "greedy": 0.5, "pass@k": {"1": 0.25, "4": 0.8}, "seconds": 60.0},
    },
    "reward": {"auroc": 0.9},
    "rerank": {"4": {"reward": [0.7, 0.6, 0.8]}, "auroc": {"reward": 0.9}},
    "localise": {"natural": {"hit0": {"reward_first": [0.6, 0.5, 0.7]}}, "single": {"count": 0}},
}
METRICS = [
    {"method": "warm-up", "step": 10, "discriminator/accuracy": 0.75},
    {"method": "irl", "step": 10, "policy/loss": 1.0},
    {"method": "irl", "step": 20, "validation/t1": 0.5, "reward/mean": 0.25},
]


def test_a_trial_is_kept_once_and_tried_again_if_it_failed(results, monkeypatch, capsys):
    """train.py is played here: it fails, then ends; a trial that has ended is not run again."""
    monkeypatch.setattr(store, "ROOT", results)
    monkeypatch.setattr(run, "save_own_grade", Path.mkdir)
    (results / "runs").mkdir()
    name = f"{results.name}-countdown-main-64-1"
    folder = results / "runs" / name
    wanted = {("countdown-main-64", 1): "train.py --data countdown"}
    commands = []

    def played(command, **unused):
        commands.append(command[1:])
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text("{}")
        (folder / "results.json").write_text(json.dumps(RESULTS))
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)))
        return SimpleNamespace(returncode=2 if len(commands) == 1 else 0, stderr="error: no\n")

    monkeypatch.setattr(subprocess, "run", played)
    with pytest.raises(UserError, match="1 trials failed"):
        run.run_all(wanted, jobs=1)
    assert "error: no" in capsys.readouterr().out and store.read("trials").empty
    (results / "runs" / "own-grade").rmdir()
    run.run_all(wanted, jobs=1)
    assert not folder.exists()
    kept = store.read("trials")
    assert kept["method"].tolist() == ["base", "irl"]
    assert set(kept["command"]) == {"python train.py --data countdown"}
    assert kept["questions"].tolist() == [515, 515] and kept["samples"].tolist() == [4, 4]
    assert kept["pass@4"].tolist() == [0.4, 0.8] and kept["auroc"].tolist()[1] == 0.9
    assert store.read("curves")[["method", "step"]].values.tolist() == [["irl", 20]]
    assert store.read("scores")["value"].tolist() == [0.7, 0.9, 0.6]
    (results / "runs" / "own-grade").rmdir()
    run.run_all(wanted, jobs=1)
    rest = ["--name", name, "--device", "cpu"]
    assert commands == [
        ["train.py", "--data", "countdown", *rest],
        ["train.py", "--resume", *rest],
    ]


# --- what is run ---


@pytest.mark.parametrize("flags", ["--only nonsense", "--jobs 0", "--seeds 11"])
def test_what_cannot_be_run_is_said(results, monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["run.py", "--tables", *flags.split()])
    with pytest.raises(UserError, match="no trial begins with 'nonsense'|invalid choice"):
        run.main()


def test_the_commands_are_those_that_made_the_results(monkeypatch):
    """Every row that is kept stands beside the command that today's trials have."""
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    kept = store.read("trials")
    known = trials.all_trials(10)
    for name, seed, command in zip(kept["trial"], kept["seed"], kept["command"]):
        assert command == f"python {known[name, seed]}", name
    assert len(kept) > 700


def test_train_takes_every_command():
    few = {
        name.rstrip("-.0123456789"): command for (name, _), command in trials.all_trials(1).items()
    }
    assert len(few) > 30
    for name, command in few.items():
        settings = parse_settings(command.split()[1:])
        tested = settings.test_split == "test"
        assert tested == (not name.startswith(("chosen", "tune"))), name


def test_what_was_best_on_validation_questions_is_used(monkeypatch):
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    best = tables.chosen(store.read("trials"))["flags"]
    for key in trials.SFT:
        assert best[key, "best at T = 1"] == trials.FAIR[key]
        assert best[key, "best greedy"] == trials.FAIR_GREEDY[key]
        plain = trials.SFT[key].replace("sft", "fair")
        assert best[key, "plain"] == f"{plain} {trials.PLAIN}"
    for task in trials.MAIN:
        assert best[f"{task}-grpo", "plain"] == trials.GRPO


# --- tables ---


def trained(*rows: tuple) -> pandas.DataFrame:
    """Rows of trials.csv from (trial, seed, method, t1, greedy)."""
    frame = pandas.DataFrame(rows, columns=["trial", "seed", "method", "t1", "greedy"])
    return frame.assign(questions=1000, auroc=0.5)


def test_fair_sft_stands_in_each_column_as_it_was_best_for_it():
    rows = trained(
        ("words-main-64", 0, "sft_fair", 0.9, 0.8),
        ("words-main-64", 1, "sft_fair", 0.9, 0.8),
        ("words-fair-greedy-64", 0, "sft_fair", 0.7, 0.95),
        ("words-main-64", 0, "irl", 0.5, 0.6),
        ("words-main-256", 0, "irl", 0.6, 0.7),
        ("words-grpo", 0, "grpo", 0.3, 0.4),
        ("words-fair-greedy-64", 0, "base", 0.1, 0.1),
    )
    assert tables.main_table(rows, tables.METHODS).splitlines() == [
        "| % right: T=1 / greedy | words 64, 1 seeds, 1,000 questions "
        "| words 256, 1 seeds, 1,000 questions |",
        "| --- | --- | --- |",
        "| fair SFT | 90.0±0.0 / 95.0 | – |",
        "| **IRL** | 50.0 / 60.0 | 60.0 / 70.0 |",
        "| GRPO, true answers | 30.0 / 40.0 | 30.0 / 40.0 |",
    ]


def test_a_change_is_compared_with_the_same_seed():
    rows = trained(
        ("ablations-default", 0, "irl", 0.1, 0.5),
        ("ablations-default", 1, "irl", 0.9, 0.5),
        ("ablations-REINFORCE", 1, "irl", 0.8, 0.5),
        ("ablations-REINFORCE", 0, "irl", 0.0, 0.5),
        ("ablations-REINFORCE", 0, "base", 0.7, 0.7),
    )
    last = tables.changed_table(rows, "ablations").splitlines()[-1]
    cells = "40.0±508.2 | 50.0±0.0 | -10.0±0.0 | 0.0±0.0 | 50.0±0.0 | 2"
    assert last == f"| REINFORCE `--policy-loss reinforce` | {cells} |"


def test_choices_are_those_of_256_demonstrations(results):
    for trial, by, value in (
        ("words-main-256", "reward", 0.9),
        ("words-main-64", "reward", 0.1),
        ("words-main-256", "random", 0.2),
        ("countdown-broken-256", "reward", 0.7),
        ("countdown-broken-256", "random", 0.3),
        ("countdown-own-grade", "reward", 0.6),
    ):
        row = {"samples": "base", "quantity": "best of 8", "by": by, "value": value}
        there = store.read("scores")
        before = there[there["trial"] == trial].to_dict("records")
        store.add("scores", trial, 0, [*before, row])
    shown = tables.score_table("by", tables.README_CHOICES, {"best of 8": ""})
    assert shown.splitlines()[2:] == [
        "| at random | 20.0 | – |",
        "| base's own grade | – | 60.0 |",
        "| **learned reward** | 90.0 | – |",
        "| sparse, broken copies | – | 70.0 |",
    ]


def test_tables_without_results_are_empty(results):
    for parts in tables.pages().values():
        for part in parts.values():
            assert len(part.splitlines()) == 2
