"""A run's folder: where it is, whether it is finished, its settings, its log, the reward in it."""

import errno
import json
import math
import os
import re
from pathlib import Path

from tqdm import tqdm

import reward
from engine import loading
from engine.chat import set_date
from engine.errors import UserError

# What is read back from <run>/settings.json: a type, or the values that are understood.
SETTINGS = {
    "model": str, "data": str, "reward": ("likelihood", "head", "random"), "logit": ("airl", "gail"),
    "granularity": ("dense", "interval", "sparse"), "interval": int, "words_steps": int, "words_largest": int,
    "max_new_tokens": int, "fair_temperature": float,
}  # fmt: skip
LIMITS = {"interval": (0, 10**6), "words_steps": (1, 100), "words_largest": (8, 10**6), "max_new_tokens": (1, 10**6),
          "fair_temperature": (0.01, 1000)}  # fmt: skip


def read_settings(run: Path) -> dict:
    """The settings that train.py left in the run's folder, checked."""
    if not os.path.isdir(run):
        raise UserError(f"no run folder {run}: make one with train.py")
    path = run / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: a JSON object was expected")
    for key, kind in SETTINGS.items():
        value = settings.get(key)
        if value not in kind if isinstance(kind, tuple) else type(value) is not kind:  # True is no integer
            names = {str: "a string", int: "an integer", float: "a decimal number"}
            expected = names.get(kind) or "one of " + ", ".join(kind)
            found = "missing" if value is None else repr(value)
            raise UserError(f"{path}: '{key}' is {found}, expected {expected}")
    for key, (low, high) in LIMITS.items():
        if not low <= settings[key] <= high:
            raise UserError(f"{path}: '{key}' is {settings[key]}, expected {low} to {high}")
    return settings


def load_run(run: Path, device="cpu") -> tuple[reward.Discriminator, object, dict]:
    """(discriminator, tokenizer, settings) of a finished run of train.py."""
    settings = read_settings(run)
    if not (run / "reward").is_dir():
        raise UserError(f"run folder {run} holds no reward/: was it trained to its end, with --method irl or all?")
    tokenizer = loading.load_tokenizer(str(run / "reward"))
    set_date(tokenizer, settings.get("date"))
    model = reward.load_reward(settings["reward"], str(run / "reward"), device)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(f"the tokenizer in {run} has {len(tokenizer)} tokens, the reward only {vocabulary}")
    ends_step = reward.step_end_tokens(tokenizer, vocabulary).to(device)
    return (
        reward.Discriminator(model, settings["logit"], settings["granularity"], settings["interval"], ends_step),
        tokenizer,
        settings,
    )


def run_folder(name: str) -> Path:
    """Where a run is written."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UserError(
            f"--name '{name}' must be a plain folder name (letters, digits, . _ -): the run goes to runs/<name>"
        )
    return Path("runs") / name


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end: the results are there, the checkpoints are not there any more."""
    return (folder / "results.json").exists() and not (folder / "checkpoints").exists()


class Log:
    """metrics.jsonl and the progress bar."""

    def __init__(self, path: Path, size: int = 0):
        """Go on after `size` bytes: what a killed run wrote after its last checkpoint will be written again."""
        self.file = open(path, "ab", buffering=0)
        if self.size() < size:
            raise UserError(f"{path} is shorter than when it was last saved: remove {path.parent} and start again")
        self.file.truncate(size)

    def write(self, method: str, step: int, metrics: dict, bar: tqdm) -> None:
        """One line {"method", "step", "stage/metric": value, ...}, and the few numbers that matter beside the bar."""
        flat = {f"{stage}/{name}": value for stage, values in metrics.items() for name, value in values.items()}
        known = {name: value if math.isfinite(value) else None for name, value in flat.items()}  # JSON has no NaN
        line = json.dumps({"method": method, "step": step} | known).encode() + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shown = ("validation/t1", "reward/mean", "discriminator/accuracy", "rollout/entropy", "policy/loss")
        bar.set_postfix({name.split("/")[1]: f"{flat[name]:.3f}" for name in shown if name in flat})

    def size(self) -> int:
        """Bytes that the disk holds by now."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size
