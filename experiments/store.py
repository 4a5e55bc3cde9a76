"""results/: what experiments have measured, as tables that any program reads.

    trials.csv    a row for each trial and method: shares right, how many questions, and the command that makes them
    scores.csv    a row for each number of reranking and of pointing at the first wrong token
    curves.csv    a row for each look at a training (these two compressed: curves.csv.gz)
    tuning.csv    how SFT and GRPO were tuned: a row for each training, share of the base and temperature

A trial is its name and its seed. Whatever is added replaces what the trial had before, a table at once, so that a kill
leaves it either with all of a trial's rows or with none.

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
        # of the reward that this method has learnt: AUROC, and the mean and deviation of f on the base's samples
        "auroc",
        "f right",
        "f right deviation",
        "f wrong",
        "f wrong deviation",
        "command",
        "error",  # the last lines of a trial that failed
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
    "tuning": [
        "trial",
        "seed",
        "data",
        "method",
        "demonstrations",
        "steps",
        "rate",
        "share",  # of the base in the weights
        "temperature",
        "t1",
        "greedy",
    ],
}
_one_at_a_time = Lock()  # trials end in threads


def folder() -> Path:
    """results/, or what IRL_RESULTS names."""
    return ROOT / environ.get("IRL_RESULTS", "results")


def keep(name: str, text: str) -> None:
    """A file of results, replaced at once; compressed if its name ends in .gz or .xz."""
    data = text.encode("utf-8")
    if name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)  # no time of day: the same text gives the same file
    elif name.endswith(".xz"):
        data = lzma.compress(data)
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    checkpoint.sync(temporary)
    temporary.replace(path)


def file_of(table: str) -> str:
    """Its name: the long tables are compressed."""
    return f"{table}.csv.gz" if table in ("scores", "curves") else f"{table}.csv"


def read(table: str) -> pandas.DataFrame:
    """A table, without rows if nothing is there yet."""
    path = folder() / file_of(table)
    if not path.exists():
        return pandas.DataFrame(columns=COLUMNS[table])
    return pandas.read_csv(path)


def add(table: str, trial: str, seed: int, rows: list[dict]) -> None:
    """Keep the rows of one trial in place of those that it had. A column that a row lacks stays empty."""
    with _one_at_a_time:
        before = read(table)
        others = before[(before["trial"] != trial) | (before["seed"] != seed)]
        named = [{"trial": trial, "seed": seed} | row for row in rows]
        new = pandas.DataFrame(named, columns=COLUMNS[table])
        both = pandas.concat([part for part in (others, new) if len(part)])
        # nine digits: means over seeds come out as they did when they were kept whole
        keep(file_of(table), both.to_csv(index=False, float_format="%.9g"))


def finished(trial: str, seed: int) -> bool:
    """Whether a trial's rows are there and say more than why it failed."""
    trials = read("trials")
    rows = trials[(trials["trial"] == trial) & (trials["seed"] == seed)]
    return len(rows) > 0 and bool(rows["error"].isna().all())
