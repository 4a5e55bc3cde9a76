"""Every number of the README's results, from a command for each kind of problems.

    python -m experiments.run                     everything of words: hours on two cores
    python -m experiments.run --data countdown --model countdown-base --sizes 64,256
                                                  everything of countdown
    python -m experiments.run --only main         one part: choose, main, variants, ablations, ..
    python -m experiments.run --quick             the whole path in minutes with tiny counts;
                                                  its numbers mean nothing
    python -m experiments.run --tables            only the tables and figures, from what is there

A trial is an ordinary `train.py` run, so it can be repeated by hand: its command stands beside its
numbers in results/trials.csv. Trials are run `--jobs` at a time, one thread each, in
runs/x-<name>-<seed>. Started again, it goes on: a trial whose rows are there is not run again. A
trial that fails gets a row with its last lines, is named by the tables, and is tried again.

    choose      how SFT, GRPO and countdown's reward are tuned, on validation questions
    inference   reranking up to N = 64, localisation, and transfer, with the main part's models
    main, grpo, own_grade, variants, ablations, traces: experiments/trials.py
"""

import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from os import environ

import data
import train
from engine import checkpoint
from engine.errors import Parser, UserError, exit_status
from experiments import choose, inference, store, tables, trials
from experiments.trials import Trial

PARTS = ("choose", "main", "grpo", "own_grade", "variants", "ablations", "traces", "inference")
ONLY_FOR = {  # parts that one kind of problems has
    "variants": "words",
    "ablations": "words",
    "traces": "countdown",
    "own_grade": "countdown",
}
QUICK = (
    "--max-steps 4 --grpo-steps 4 --sft-steps 4 --fair-steps 4 --warm-up 4 --extra-questions 20 "
    "--questions 4 --group 4 --eval-questions 20"
)


def run_trial(trial: Trial, quick: bool) -> bool:
    """Run it, or go on with it, and keep what it measured. Returns whether it came to its end."""
    if store.finished(trial.name, trial.seed):
        return True
    flags = f"{trial.flags} {QUICK}" if quick else trial.flags
    folder = store.ROOT / "runs" / trial.run_name
    arguments = [*flags.split(), "--device", "cpu"]
    if (folder / "settings.json").exists():
        arguments = ["--resume"]
    ended = subprocess.run(
        [sys.executable, "train.py", *arguments, "--name", trial.run_name],
        cwd=store.ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    command = "python train.py " + flags
    if ended.returncode:
        if 0 < ended.returncode < 128:  # it said what was wrong; a kill is no result
            failure = {"command": command, "error": ended.stderr[-2000:].strip()}
            store.add("trials", trial.name, trial.seed, [failure])
        return False
    results = json.loads((folder / "results.json").read_text())
    store.add("curves", trial.name, trial.seed, curve_rows((folder / "metrics.jsonl").read_text()))
    if "-main-" in trial.name or "-broken-" in trial.name:  # where tables show the choices
        scores = list(inference.score_rows(results, "base"))
        store.add("scores", trial.name, trial.seed, scores)
    # last, as with these rows the trial counts as finished
    rows = [row | {"command": command} for row in method_rows(results)]
    store.add("trials", trial.name, trial.seed, rows)
    if "-main-256" not in trial.name:  # whose models the part `inference` uses
        shutil.rmtree(folder)
    return True


def method_rows(results: dict) -> list[dict]:
    """The rows of trials.csv that a run's results.json has."""
    s = results["settings"]
    # as many as there are: countdown has fewer than a thousand
    test = data.load_examples(s["data"], s["test_split"], s["eval_questions"], s["seed"])
    rows = []
    for method, measured in results["methods"].items():
        row = {"method": method, "questions": len(test), "samples": train.EVAL_SAMPLES}
        row |= {name: measured.get(name) for name in ("t1", "greedy", "seconds")}
        row["pass@4"] = measured["pass@k"].get("4")
        if method == "irl":
            row["auroc"] = results["reward"].get("auroc")
            for kind, values in results.get("distributions", {}).items():
                if values:
                    row[f"f {kind}"] = statistics.mean(values)
                    row[f"f {kind} deviation"] = statistics.pstdev(values)
        rows.append(row)
    return rows


def curve_rows(metrics: str) -> list[dict]:
    """The rows of curves.csv: every look at the validation questions, every tenth warm-up update.

    metrics: the lines of metrics.jsonl.
    """
    rows = []
    for line in map(json.loads, metrics.splitlines()):
        warms_up = line["method"] == "warm-up" and line["step"] % 10 == 0
        trains_alone = line["method"].startswith("sft")  # nothing shows its curve
        if warms_up or ("validation/t1" in line and not trains_alone):
            rows.append({name: line[name] for name in store.COLUMNS["curves"] if name in line})
    return rows


def run_all(wanted: list[Trial], jobs: int, quick: bool) -> int:
    """All of them, `jobs` at a time. Returns how many failed."""

    def one(number: int, trial: Trial) -> bool:
        good = run_trial(trial, quick)
        failed = "" if good else "  FAILED"
        line = f"{number:4d} of {len(wanted)}  {trial.name}-{trial.seed}{failed}"
        print(line, flush=True)
        return good

    with ThreadPoolExecutor(jobs) as pool:
        ended = pool.map(one, range(1, len(wanted) + 1), wanted)
        return len(wanted) - sum(ended)


def main() -> None:
    """What the command line asks for."""
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--data", default="words", help="whose problems (default words)")
    parser.add_argument("--model", default="base", help="the base (default base)")
    sizes = ",".join(map(str, trials.SIZES))
    parser.add_argument("--sizes", default=sizes, help="demonstrations (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny counts, to results-quick/")
    parser.add_argument("--tables", action="store_true", help="run nothing: only the tables")
    args = parser.parse()
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    if not all(size.isdigit() and int(size) for size in args.sizes.split(",")):
        raise UserError(f"--sizes must be numbers with commas between, not {args.sizes}")
    if args.quick:
        environ["IRL_RESULTS"] = "results-quick"
    store.folder().mkdir(parents=True, exist_ok=True)
    failed = 0
    if not args.tables:
        with checkpoint.locked(store.folder()):
            failed = run_parts(args)
    tables.write()
    if failed:
        raise UserError(f"{failed} trials failed: {store.folder() / 'trials.csv'} says why")


def run_parts(args) -> int:
    """The parts that were asked for. Returns how many trials failed."""
    parts = [part for part in PARTS if ONLY_FOR.get(part, args.data) == args.data]
    if args.only:
        parts = [args.only]
    sizes = tuple(map(int, args.sizes.split(",")))
    if "choose" in parts:
        choose.run(args.data, args.model, sizes, args.jobs, args.quick)
    if "own_grade" in parts:
        inference.save_own_grade(store.ROOT / "runs" / "own-grade")
    wanted = trials.all_trials(parts, args.data, args.model, sizes, args.seeds)
    failed = run_all(wanted, args.jobs, args.quick)
    if "inference" in parts:
        inference.run(args.data, args.seeds, args.quick)
    return failed


if __name__ == "__main__":
    sys.exit(exit_status(main))
