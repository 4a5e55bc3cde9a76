"""experiments/choose.py and tables.py: what is chosen, and the summary of trials that are made up here."""

import json

import pytest

from engine.errors import UserError
from experiments import choose, tables
from experiments import run as runs


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("IRL_RESULTS", str(tmp_path))
    return tmp_path


def keep_cell(method: str, size: int, steps: int, t1: dict, greedy: dict) -> None:
    cell = choose.Cell("words", "base", method, size, steps, 3e-4)
    found = vars(cell) | {"t1": t1, "greedy": greedy}
    runs.keep(runs.results_folder() / "choose" / f"{cell.name}.json", json.dumps(found))


def test_the_best_on_validation_is_chosen(results):
    with pytest.raises(UserError, match="--only choose"):
        choose.sft_flags("words", 64)
    plain, half = {"1.0": 0.6, "0.2": 0.7}, {"1.0": 0.5, "0.2": 0.8}
    keep_cell("sft", 64, 30, {"0.0": plain, "0.5": half}, {"0.0": 0.7, "0.5": 0.81})
    keep_cell("sft", 64, 120, {"0.0": {"1.0": 0.65, "0.2": 0.7}, "0.5": half | {"0.2": 0.75}}, {"0.0": 0.7, "0.5": 0.9})
    keep_cell("grpo", 256, 400, {"0.0": {"1.0": 0.9}}, {"0.0": 0.9})
    assert choose.sft_flags("words", 64) == "--sft-steps 120 --sft-lr 0.0003"
    assert choose.fair_flags("words", 64).startswith("--fair-steps 30 --fair-lr 0.0003 --fair-average 0.5")
    greedy = "--fair-steps 120 --fair-lr 0.0003 --fair-average 0.5 --fair-temperature 0.2"
    assert choose.fair_flags("words", 64, "greedy") == greedy
    trials = {trial.name: trial.flags for trial in runs.main_trials("words", "base", (64,), 1)}
    assert set(trials) == {"words-base-sharpened-0", "words-main-64-0", "words-fair-greedy-64-0"}
    assert greedy in trials["words-fair-greedy-64-0"] and "--method sft,sft_fair,likelihood,irl " in trials["words-main-64-0"]
    assert "120 at 0.0003 | 65.0 / 70.0 | 75.0 / 90.0 (0.5, 0.2) |" in "".join(tables.choice_tables())


def test_the_summary_has_every_method_by_data_and_size(results):
    found = {"t1": 0.5, "greedy": 0.6, "pass@k": {"4": 0.7}}
    methods = dict.fromkeys(("base", "sft", "sft_fair", "likelihood", "irl", "grpo"), found)
    ways = {rule: [0.4, 0.3, 0.5] for rule in tables.RULES}
    hits = {hit: {path: [0.4, 0.3, 0.5] for path in tables.SIGNALS.values()} for hit in ("hit0", "hit1", "step")}
    trial = {"methods": methods, "curve": {"irl validation/t1": [[1, 0.5]]}}
    trial["rerank"] = {n: ways for n in ("4", "8", "16")} | {"auroc": dict.fromkeys(("longest", "reward"), 0.9)}
    for data, sizes in (("words", (64, 256, 1024)), ("countdown", (64, 256))):
        trial["localise"] = {"natural": hits, "single": hits} if data == "words" else {}
        alone = ["countdown-own-grade", "countdown-broken-64", "countdown-broken-256"] * (data == "countdown")
        once = [f"{data}-grpo", f"{data}-base-sharpened", *alone]
        for name in [f"{data}-{kind}-{size}" for size in sizes for kind in ("main", "fair-greedy")] + once:
            for seed in (0, 1):
                runs.keep(results / "trials" / f"{name}-{seed}.json", json.dumps(trial | {"settings": {"seed": seed}}))
    summary = tables.main_summary()
    assert list(summary)[:2] == ["words", "countdown"] and summary["seeds"] == 2 and summary["collapses"] == 0
    for data, sizes in (("words", ["64", "256", "1024"]), ("countdown", ["64", "256"])):
        main = summary[data]["main"]
        assert list(main) == sizes
        for methods in main.values():
            names = ["base", "base_sharpened", "sft", "sft_fair", "sft_fair_greedy", "likelihood_only", "irl"]
            assert list(methods) == [*names, "broken_only", "own_grade", "grpo"]
            here = [m for name, m in methods.items() if data != "words" or name not in ("broken_only", "own_grade")]
            assert all(m["t1"][0] == 0.5 and m["greedy"][0] == 0.6 and m["pass@4"][0] == 0.7 for m in here)
        assert {"longest", "shortest", "sft_fair_logprob", "reward", "oracle"} <= set(summary[data]["rerank"]["16"])
        assert summary[data]["auroc"]["longest"][0] == 0.9
    assert summary["words"]["localise"]["natural"]["hit0"]["sft_fair_logprob"][0] == 0.4
    assert summary["countdown"]["localise"] == {}
    tables.write()
    assert "### countdown, 64 demonstrations" in (results / "tables.md").read_text()
    assert all(name in tables.full_tables(summary) for name in tables.NAMES.values())
    small = "".join(tables.readme_tables(summary).values())
    assert all(name in small for name in tables.README_METHODS.values())
    columns = " | ".join(f"{task} {size}, 2 seeds" for task in ("words", "countdown") for size in (64, 256))
    assert f"| % right: T=1 / greedy | {columns} |" in small
    assert "| base's own grade |" not in small  # of best of 8: there are no grades here
    assert set(tables.readme_tables({}).values()) == {tables.NOTHING_YET}
