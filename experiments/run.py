"""Every number of the results: runs the trials of experiments/trials.py and keeps their rows.

    python -m experiments.run                      all of them: days on two cores
    python -m experiments.run --only words-main    those whose names begin so
    python -m experiments.run --quick              the whole path in minutes with tiny counts, into
                                                   results-quick/; its numbers mean nothing
    python -m experiments.run --tables             only the tables and the picture, from what is
                                                   there

A trial is an ordinary run of train.py: its command stands beside its numbers in results/trials.csv.
Trials are run `--jobs` at a time, one thread each. Started again, this goes on: a trial whose rows
are there is not run again, one that was cut off goes on, one that failed is tried again.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from os import environ
from pathlib import Path

import torch

import reward
from engine import checkpoint, loading
from engine.errors import Parser, UserError, exit_status
from experiments import store, tables, trials

# Flags that come after a command's own, for --quick.
QUICK = (
    "--max-steps 4 --grpo-steps 4 --sft-steps 4 --fair-steps 4 --warm-up 4 --extra-questions 20 "
    "--questions 4 --group 4 --eval-questions 20"
)


def run_trial(name: str, seed: int, command: str) -> bool:
    """Run it, or go on with it, and keep what it measured. Returns whether it failed."""
    # the folder of results is in the name: a quick run is not taken for a real one
    folder = store.ROOT / "runs" / f"{store.folder().name}-{name}-{seed}"
    arguments = command.split()
    if (folder / "settings.json").exists():
        arguments = ["train.py", "--resume"]
    ended = subprocess.run(
        [sys.executable, *arguments, "--name", folder.name, "--device", "cpu"],
        cwd=store.ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        print(f"FAILED    {name} {seed}: {ended.stderr[-1000:]}", flush=True)
        return True
    results = json.loads((folder / "results.json").read_text())
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    looks = [line for line in map(json.loads, metrics) if "validation/t1" in line]
    store.add("curves", name, seed, looks)
    # whose choices among samples, and places of errors, the tables show
    if any(part in name for part in ("-main-", "-broken-", "-own-grade")):
        store.add("scores", name, seed, score_rows(results))
    # last, as with these rows the trial counts as finished
    store.add("trials", name, seed, method_rows(results, f"python {command}"))
    shutil.rmtree(folder)
    print(f"finished  {name} {seed}", flush=True)
    return False


def method_rows(results: dict, command: str) -> list[dict]:
    """The rows of trials.csv that a run's results.json has: one for each method."""
    rows = []
    for method, measured in results["methods"].items():
        row = {"method": method, "command": command, "questions": results["counts"]["test"]}
        row |= {name: measured.get(name) for name in ("t1", "greedy", "seconds")}
        row["samples"] = max(map(int, measured["pass@k"]))  # k goes up to as many as there are
        row["pass@4"] = measured["pass@k"].get("4")
        if method == "irl":
            row["auroc"] = results["reward"].get("auroc")
        rows.append(row)
    return rows


def score_rows(results: dict) -> list[dict]:
    """The rows of scores.csv that results.json has: means, without their intervals.

    >>> results = {"rerank": {"4": {"reward": [0.7, 0.6, 0.8]}, "auroc": {"reward": 0.9}}}
    >>> for row in score_rows(results):
    ...     print(row)
    {'samples': 'base', 'quantity': 'best of 4', 'by': 'reward', 'value': 0.7}
    {'samples': 'base', 'quantity': 'auroc', 'by': 'reward', 'value': 0.9}
    """
    choices = results["rerank"]
    quantities = {f"best of {n}": choices[n] for n in choices if n.isdigit()}
    quantities["auroc"] = {by: [area] for by, area in choices["auroc"].items()}
    for kind, hits in results.get("localise", {}).items():
        quantities[f"{kind} hit0"] = hits.get("hit0", {})
    rows = []
    for quantity, values in quantities.items():
        about = {"samples": "base", "quantity": quantity}
        rows += [about | {"by": by, "value": value[0]} for by, value in values.items()]
    return rows


def save_own_grade(folder: Path) -> None:
    """The grade that countdown's base itself gives a trace, as a reward that has learnt nothing.

    That is log p("right") - log p("wrong") behind its end: a head w = W["right"] - W["wrong"], rows
    of the base's output matrix. It takes no demonstrations, but somebody who knows what to ask for:
    the control that tells how much of the learnt reward was in the base.
    """
    base, tokenizer = loading.load_policy("countdown-base")
    head = reward.load_reward("head", "countdown-base").model
    right, wrong = tokenizer.convert_tokens_to_ids(["right", "wrong"])
    with torch.no_grad():
        weight = base.get_output_embeddings().weight
        head.score.weight.copy_(weight[right] - weight[wrong])
    head.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_all(wanted: dict[tuple[str, int], str], jobs: int) -> None:
    """Run what has no rows yet, `jobs` at a time."""
    store.folder().mkdir(parents=True, exist_ok=True)
    with checkpoint.locked(store.folder()), ThreadPoolExecutor(jobs) as pool:
        there = store.read("trials")
        known = set(zip(there["trial"], there["seed"]))
        left = [(*key, command) for key, command in wanted.items() if key not in known]
        print(f"{len(left)} of {len(wanted)} trials are left to run", flush=True)
        loading.quiet()
        save_own_grade(store.ROOT / "runs" / "own-grade")
        failed = sum(pool.map(run_trial, *zip(*left)))
    if failed:
        raise UserError(f"{failed} trials failed, as said above: mend what is wrong, start again")


def main() -> None:
    """What the command line asks for."""
    parser = Parser(__doc__)
    few = range(1, 11)
    parser.add_argument("--only", default="", help="the trials whose names begin so")
    parser.add_argument("--seeds", type=int, default=5, choices=few, help="at most (default 5)")
    parser.add_argument("--jobs", type=int, default=2, choices=few, help="at a time (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny counts, to results-quick/")
    parser.add_argument("--tables", action="store_true", help="run nothing: only the tables")
    args = parser.parse()
    every = trials.all_trials(args.seeds)
    wanted = {key: every[key] for key in every if key[0].startswith(args.only)}
    if not wanted:
        raise UserError(
            f"no trial begins with '{args.only}': experiments/trials.py has their names"
        )
    if args.quick:
        environ["IRL_RESULTS"] = "results-quick"
        # of those that differ in numbers alone, the first
        first = {key[0].rstrip("0123456789.-"): key for key in reversed(wanted)}
        wanted = {key: f"{every[key]} {QUICK}" for key in reversed(first.values())}
    if not args.tables:
        run_all(wanted, args.jobs)
    tables.write()


if __name__ == "__main__":
    sys.exit(exit_status(main))
