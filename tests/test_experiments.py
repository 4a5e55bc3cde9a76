"""experiments/: what is kept, what is chosen, and the tables of trials that are made up here."""

import ast
import json
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import UserError
from experiments import choose, inference, run, store, tables, trials

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


def test_rows_of_a_trial_replace_what_it_had(results):
    store.add("trials", "a", 0, [{"method": "irl", "t1": 0.5}, {"method": "base", "t1": 1 / 3}])
    store.add("trials", "a", 1, [{"command": "python train.py", "error": "error: no, not so"}])
    assert store.finished("a", 0) and not store.finished("a", 1) and not store.finished("b", 0)
    store.add("trials", "a", 1, [{"method": "irl", "t1": 0.25}])
    found = store.read("trials")
    assert found[["seed", "method"]].values.tolist() == [[0, "irl"], [0, "base"], [1, "irl"]]
    assert found["t1"].tolist() == [0.5, 0.333333333, 0.25] and store.finished("a", 1)
    before = (results / "trials.csv").read_bytes()
    store.add("trials", "a", 1, [{"method": "irl", "t1": 0.25}])
    assert (results / "trials.csv").read_bytes() == before


@pytest.mark.parametrize("table", store.COLUMNS)
def test_every_table_is_read_as_it_was_kept(results, table):
    row = {name: 0.5 for name in store.COLUMNS[table][2:]}
    assert store.read(table).empty
    store.add(table, "a", 3, [row])
    assert store.read(table).to_dict("records") == [{"trial": "a", "seed": 3} | row]


RESULTS = {
    "settings": {
        "data": "countdown",
        "test_split": "test",
        "eval_questions": 1000,
        "eval_samples": 4,
        "seed": 0,
    },
    "methods": {
        "base": {"t1": 0.25, "greedy": 0.5, "pass@k": {"1": 0.25}},
        "irl": {"t1": 0.75, "greedy": 0.5, "pass@k": {"1": 0.25, "4": 0.8}, "seconds": 60.0},
    },
    "reward": {"auroc": 0.9},
    "distributions": {"right": [1.0, 2.0], "wrong": []},
    "rerank": {"4": {"reward": [0.7, 0.6, 0.8]}, "auroc": {"reward": 0.9}},
}
METRICS = [
    {"method": "warm-up", "step": 9, "discriminator/accuracy": 0.5},
    {"method": "warm-up", "step": 10, "discriminator/accuracy": 0.75},
    {"method": "sft", "step": 10, "validation/t1": 0.5},
    {"method": "irl", "step": 10, "policy/loss": 1.0},
    {"method": "irl", "step": 20, "validation/t1": 0.5, "reward/mean": 0.25},
]


def test_a_trial_is_kept_once_and_tried_again_if_it_failed(results, monkeypatch):
    """train.py is played here: it fails, is killed, then ends; a trial that has ended is not run."""
    monkeypatch.setattr(store, "ROOT", results)
    trial = trials.Trial("countdown-main-64", 0, "--data countdown")
    folder = results / "runs" / "x-countdown-main-64-0"
    commands = []
    codes = [2, -9, 0]

    def played(command, **unused):
        commands.append(command[2:])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text("{}")
        (folder / "results.json").write_text(json.dumps(RESULTS))
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)))
        return SimpleNamespace(returncode=codes[len(commands) - 1], stderr="error: no\n")

    monkeypatch.setattr(subprocess, "run", played)
    assert not run.run_trial(trial, quick=False)
    failed = store.read("trials").iloc[0]
    assert failed["error"] == "error: no" and failed["command"] == "python train.py --data countdown"
    tables.write()
    assert "Failed: countdown-main-64-0" in (results / "tables.md").read_text()
    assert not run.run_trial(trial, quick=False)  # killed: what it said before stands
    assert store.read("trials")["error"].tolist() == ["error: no"]
    assert run.run_trial(trial, quick=False) and not folder.exists()
    kept = store.read("trials")
    assert kept["method"].tolist() == ["base", "irl"] and kept["error"].isna().all()
    # 1,000 were asked for; there are 515
    assert kept["questions"].tolist() == [515, 515] and kept["pass@4"].tolist()[1] == 0.8
    assert kept[["auroc", "f right", "f right deviation"]].values.tolist()[1] == [0.9, 1.5, 0.5]
    assert store.read("curves")[["method", "step"]].values.tolist() == [["warm-up", 10], ["irl", 20]]
    assert store.read("scores")["value"].tolist() == [0.7, 0.9]
    assert run.run_trial(trial, quick=False) and len(commands) == 3
    name = ["--name", "x-countdown-main-64-0"]
    assert commands[0] == ["--data", "countdown", "--device", "cpu", *name]
    assert commands[1] == commands[2] == ["--resume", *name]


def keep_cell(method: str, size: int, steps: int, looks: list[tuple]) -> None:
    """A training of tuning.csv: (share, temperature, t1, greedy) of each look."""
    cell = choose.Cell("words", "base", method, size, steps, 3e-4)
    names = ("share", "temperature", "t1", "greedy")
    about = {name: value for name, value in vars(cell).items() if name != "model"}
    store.add("tuning", cell.name, choose.SEED, [about | dict(zip(names, look)) for look in looks])


def test_the_best_on_validation_is_chosen(results):
    with pytest.raises(UserError, match="--only choose"):
        choose.sft_flags("words", 64)
    half = [(0.5, 1.0, 0.5, 0.81), (0.5, 0.2, 0.8, 0.81)]
    keep_cell("sft", 64, 30, [(0.0, 1.0, 0.6, 0.7), (0.0, 0.2, 0.7, 0.7), *half])
    half = [(0.5, 1.0, 0.5, 0.9), (0.5, 0.2, 0.75, 0.9)]
    keep_cell("sft", 64, 120, [(0.0, 1.0, 0.65, 0.7), (0.0, 0.2, 0.7, 0.7), *half])
    keep_cell("grpo", 256, 400, [(0.0, 1.0, 0.9, 0.9)])
    assert choose.sft_flags("words", 64) == "--sft-steps 120 --sft-lr 0.0003"
    fair = "--fair-steps 30 --fair-lr 0.0003 --fair-average 0.5 --fair-temperature 0.2"
    assert choose.fair_flags("words", 64) == fair
    greedy = "--fair-steps 120 --fair-lr 0.0003 --fair-average 0.5 --fair-temperature 0.2"
    assert choose.fair_flags("words", 64, "greedy") == greedy
    assert choose.grpo_flags("words") == "--grpo-steps 400 --grpo-lr 0.0003"
    flags = {trial.name: trial.flags for trial in trials.main_trials("words", "base", (64,), 1)}
    assert set(flags) == {"words-base-sharpened", "words-main-64", "words-fair-greedy-64"}
    assert greedy in flags["words-fair-greedy-64"]
    assert "--method sft,sft_fair,likelihood,irl " in flags["words-main-64"]
    shown = "".join(tables.choice_tables(tables.Measured()))
    assert "120 at 0.0003 | 65.0 / 70.0 | 75.0 / 90.0 (0.5, 0.2) |" in shown


def test_the_commands_are_those_that_made_the_results(monkeypatch):
    """Trials that are made today have the flags that stand beside their numbers.

    (Variants and ablations were run before SFT was tuned with more updates: only one starts there.)
    """
    parts = ["choose", "main", "grpo", "own_grade", "traces"]
    monkeypatch.delenv("IRL_RESULTS", raising=False)
    kept = store.read("trials")
    commands = dict(zip(zip(kept["trial"], kept["seed"]), kept["command"]))
    made = trials.all_trials(parts, "words", "base", trials.SIZES, 5)
    made += trials.all_trials(parts, "countdown", "countdown-base", (64, 256), 5)
    same = 0
    for trial in made:
        if (trial.name, trial.seed) in commands:
            command = commands[trial.name, trial.seed].removeprefix("python train.py ")
            # in which order methods are named changes nothing
            given, today = (set(flags.replace(",", " ").split()) for flags in (command, trial.flags))
            assert today == given, trial.name
            same += 1
    assert same > 140


def test_the_summary_has_every_method_by_data_and_size(results):
    shares = {"t1": 0.5, "greedy": 0.6, "pass@4": 0.7, "questions": 100}
    methods = ("base", "sft", "sft_fair", "likelihood", "irl", "grpo")
    kept = []
    scores = []
    for data, sizes in (("words", (64, 256, 1024)), ("countdown", (64, 256))):
        names = [f"{data}-{kind}-{size}" for size in sizes for kind in ("main", "fair-greedy")]
        names += [f"{data}-grpo", f"{data}-base-sharpened"]
        if data == "countdown":
            names += [f"countdown-{kind}-{size}" for size in sizes for kind in ("broken", "likelihood")]
            names.append("countdown-own-grade")
        ways = {rule: [0.4, 0.3, 0.5] for rule in tables.RULES}
        hits = {signal: [0.4, 0.3, 0.5] for signal in tables.SIGNALS.values()}
        assessed = {"rerank": {n: ways for n in ("4", "8", "16")}}
        assessed["rerank"]["auroc"] = {"longest": 0.9, "reward": 0.9}
        if data == "words":
            places = dict.fromkeys(("hit0", "hit1", "step"), hits)
            assessed["localise"] = {"natural": places, "single": places}
        for name in names:
            for seed in (0, 1):
                about = {"trial": name, "seed": seed}
                kept += [about | {"method": method} | shares for method in methods]
                if "-main-" in name:
                    scores += [about | row for row in inference.score_rows(assessed, "base")]
    for table, rows in (("trials", kept), ("scores", scores)):
        text = tables.pandas.DataFrame(rows, columns=store.COLUMNS[table]).to_csv(index=False)
        store.keep(store.file_of(table), text)
    summary = tables.main_summary(tables.Measured())
    assert list(summary)[:2] == ["words", "countdown"]
    assert summary["seeds"] == 2 and summary["collapses"] == 0 and summary["runs"] == 10
    for data, sizes in (("words", ["64", "256", "1024"]), ("countdown", ["64", "256"])):
        main = summary[data]["main"]
        assert list(main) == sizes
        for methods in main.values():
            assert list(methods) == list(tables.NAMES)
            for name, shares in methods.items():
                if data != "words" or name not in ("broken_only", "own_grade"):
                    means = [value[0] for value in shares.values()]
                    assert means == [0.5, 0.6, 0.7], name
        rules = {"longest", "shortest", "sft_fair_logprob", "reward", "oracle"}
        assert rules <= set(summary[data]["rerank"]["16"])
        assert summary[data]["auroc"]["longest"][0] == 0.9
    assert summary["words"]["localise"]["natural"]["hit0"]["sft_fair_logprob"][0] == 0.4
    assert summary["countdown"]["localise"] == {}
    tables.write()
    assert "### countdown, 64 demonstrations" in (results / "tables.md").read_text()
    assert all(name in tables.full_tables(summary) for name in tables.NAMES.values())
    small = "".join(tables.readme_tables(summary).values())
    assert all(name in small for name in tables.README_METHODS.values())
    columns = [f"{task} {size}, 2 seeds, 100 questions" for task in ("words", "countdown") for size in (64, 256)]
    assert f"| % right: T=1 / greedy | {' | '.join(columns)} |" in small
    assert "| base's own grade |" not in small  # of best of 8: there are no grades here
    assert set(tables.readme_tables({}).values()) == {tables.NOTHING_YET}
