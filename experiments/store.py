"""results/: what experiments have measured, as tables that any program reads.

    trials.csv      a row for each trial and method: shares right, and the command that makes them
    scores.csv.gz   a row for each number of reranking and of pointing at the first wrong token
    curves.csv.gz   a row for each look at a training

A trial is its name and its seed (experiments/trials.py). Whatever is added replaces what the trial
had before, a table at once: a kill leaves it either with all of a trial's rows or with none.

    from experiments import store
    trials = store.read("trials")                       # a pandas.DataFrame
    trials[trials["trial"] == "words-main-256"].groupby("method")["t1"].mean()
"""

import gzip
import lzma
from os import environ
from pathlib import Path
from threading import Lock

import pandas

from engine import checkpoint

ROOT = Path(__file__).parents[1]
FILES = {"trials": "trials.csv", "scores": "scores.csv.gz", "curves": "curves.csv.gz"}
COLUMNS = {
    "trials": [
        "trial",
        "seed",
        "method",
        "questions",
        "samples",
        "t1",
        "greedy",
        "pass@4",
        "seconds",
        "auroc",  # of the reward that this method has learnt, on the base's samples
        "command",
    ],
    "scores": ["trial", "seed", "samples", "quantity", "by", "value"],
    "curves": [
        "trial",
        "seed",
        "method",
        "step",
        "validation/t1",
        "rollout/entropy",
        "rollout/length",
        "rollout/finished",
        "reward/mean",
        "discriminator/accuracy",
        "discriminator/d_expert",
        "discriminator/d_negative",
    ],
}
_one_at_a_time = Lock()  # trials end in threads


def folder() -> Path:
    """results/, or what IRL_RESULTS names."""
    return ROOT / environ.get("IRL_RESULTS", "results")


def keep(name: str, text: str) -> None:
    """A file of results, replaced at once; compressed if its name ends in .gz or .xz."""
    content = text.encode("utf-8")
    if name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no time of day: the same text, the same file
    elif name.endswith(".xz"):
        content = lzma.compress(content)
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(path, content)


def read(table: str) -> pandas.DataFrame:
    """A table, without rows if nothing is there yet."""
    path = folder() / FILES[table]
    if not path.exists():
        return pandas.DataFrame(columns=COLUMNS[table])
    return pandas.read_csv(path)


def add(table: str, trial: str, seed: int, rows: list[dict]) -> None:
    """Keep these rows of a trial in place of those that it had; what a row lacks stays empty."""
    new = pandas.DataFrame(rows, columns=COLUMNS[table]).assign(trial=trial, seed=seed)
    with _one_at_a_time:
        before = read(table)
        others = before[(before["trial"] != trial) | (before["seed"] != seed)]
        # Of two tables without rows pandas makes none.
        parts = [part for part in (others, new) if len(part)] or [new]
        both = pandas.concat(parts)
        # nine digits: means over seeds come out as they did when they were kept whole
        keep(FILES[table], both.to_csv(index=False, float_format="%.9g"))
