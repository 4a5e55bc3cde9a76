"""A run's folder as it is read: where it is, and its settings."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

from engine.errors import UserError
from engine.settings import MAY_BE, Settings, check, check_values, flag

# What rerank.py and others read in a finished run's settings.json
READ = ("model", "data", "reward", "logit", "granularity", "max_new_tokens", "fair_temperature")
# What may change when a run goes on: memory, and what is turned when a loss is not finite
MAY_CHANGE = (
    "micro_batch",
    "micro_tokens",
    "gradient_checkpointing",
    "sample_rows",
    "warm_up_lr",
    "reward_lr",
    "policy_lr",
    "grpo_lr",
    "sft_lr",
    "fair_lr",
    "reward_clip",
)
TYPES = {f.name: f.type for f in fields(Settings)} | {"date": str}  # of what is in settings.json


def run_folder(name: str) -> Path:
    """Where a run is written. Raises UserError for a name that is more than a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"--name '{name}' must be a plain folder name (letters, digits, . _ -): the run goes "
            "to runs/<name>"
        )
    return Path("runs") / name


def read_settings(run: Path) -> dict:
    """The settings that train.py left in a run's folder, checked. Those in READ are there."""
    if not os.path.isdir(run):  # unlike Path.is_dir, False for a name that no file can have
        raise UserError(f"no run folder {run}: make one with train.py")
    path = run / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: a JSON object was expected")
    for name, kind in TYPES.items():
        value = settings.get(name)
        # Not isinstance, which takes True for an integer.
        if (name in settings or name in READ) and type(value) is not kind:
            raise UserError(f"{path}: '{name}' is {value!r}, expected {kind.__name__}")

    def shown(name: str) -> str:
        return f"{path}: '{name}'"

    check_values(settings, MAY_BE, shown)
    return settings


def saved_settings(folder: Path, given: dict) -> tuple[Settings, str]:
    """The settings of the run that is to go on, and the date of its start.

    Flags beside --resume may repeat them; only MAY_CHANGE may differ. Raises UserError.
    """
    saved = read_settings(folder)
    unlike = sorted(TYPES.keys() ^ saved.keys())
    if unlike:
        raise UserError(
            f"{folder} is of another version of train.py (they differ in {', '.join(unlike)}): it "
            "cannot go on. Give another --name, or remove that folder"
        )
    for name, value in given.items():
        if name not in MAY_CHANGE and saved[name] != value:
            raise UserError(
                f"{flag(name)} {value} contradicts {folder}, which has {saved[name]}: leave it out "
                "to go on with that run, or start another one under a new --name"
            )
    date = saved.pop("date")
    settings = Settings(**saved | given)
    check(settings, given)
    return settings, date
