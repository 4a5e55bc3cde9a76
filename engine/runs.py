"""A run's folder as it is read: where it is, whether it is finished, its settings, the reward in it."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import reward
from engine import loading
from engine.chat import set_date
from engine.errors import UserError
from engine.settings import MAY_BE, Settings, check, check_values, flag

# What rerank.py and others read in a finished run's settings.json
READ = ("model", "data", "reward", "logit", "granularity", "interval", "words_steps", "words_largest", "max_new_tokens",
        "fair_temperature")  # fmt: skip
# What may change when a run goes on: where and how it computes, and what is turned when a loss is not finite
MAY_CHANGE = ("device", "micro_batch", "micro_tokens", "gradient_checkpointing", "sample_rows", "checkpoint_every",
              "warm_up_lr", "reward_lr", "policy_lr", "grpo_lr", "sft_lr", "fair_lr", "reward_clip")  # fmt: skip


def run_folder(name: str) -> Path:
    """Where a run is written."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UserError(f"--name '{name}' must be a plain folder name (letters, digits, . _ -): the run goes to runs/<name>")
    return Path("runs") / name


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end: the results are there, the checkpoints are not there any more."""
    return (folder / "results.json").exists() and not (folder / "checkpoints").exists()


def read_settings(run: Path) -> dict:
    """The settings that train.py left in a run's folder, checked; those in READ are there."""
    if not os.path.isdir(run):
        raise UserError(f"no run folder {run}: make one with train.py")
    path = run / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: a JSON object was expected")
    names = {str: "a string", int: "an integer", float: "a decimal number", bool: "true or false"}
    for f in fields(Settings):
        value = settings.get(f.name)
        if (f.name in settings or f.name in READ) and type(value) is not f.type:  # True is no integer
            raise UserError(f"{path}: '{f.name}' is {'missing' if value is None else repr(value)}, expected {names[f.type]}")
    check_values(settings, MAY_BE, lambda name: f"{path}: '{name}'")
    return settings


def saved_settings(given: dict) -> Settings:
    """The settings of the run that is to go on. Flags beside --resume may repeat them; only MAY_CHANGE may differ."""
    path = run_folder(given.get("name", Settings.name)) / "settings.json"
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}. Without --resume a run is started")
    saved = read_settings(path.parent)
    if other := {f.name for f in fields(Settings)} ^ set(saved):
        raise UserError(f"{path} is of another version of train.py (they differ in {', '.join(sorted(other))}): "
                        "it cannot go on. Give another --name, or remove that folder")  # fmt: skip
    for name, value in given.items():
        if name not in (*MAY_CHANGE, "name") and saved[name] != value:
            raise UserError(f"{flag(name)} {value} contradicts {path}, which says {saved[name]}: leave it out to go on with "
                            "that run, or start another one under a new --name")  # fmt: skip
    settings = Settings(**saved | given)
    check(settings)
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
    kind = (settings[name] for name in ("logit", "granularity"))
    return reward.make_discriminator(model, tokenizer, *kind), tokenizer, settings
