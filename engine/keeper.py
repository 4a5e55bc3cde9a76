"""How a run survives: its log, its checkpoints, where it goes on, and what ends it early.

train.Run says what is to be done; a Keeper counts what is done, saves it and finds it again. With
several processes (torchrun) each has a Keeper: they save, stop and go on together, and the first
one logs.
"""

import errno
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from engine import checkpoint, parallel
from engine.errors import UserError
from engine.settings import Settings, flag

STOP = (signal.SIGINT, signal.SIGTERM)
# A checkpoint is due after so many seconds, and after so many times as long as the last one took to
# write: writing them takes 2% of the time at most.
SAVE_SECONDS = 15
SAVE_RATIO = 50
BAD_STEPS = 3  # updates in a row that are not finite, and end the run
# Errors of a full or unwritable disk, and what an error of a full memory says
DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EEXIST,
)
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# The rate that a method's updates go by; IRL's and likelihood's loops have policy_lr and reward_lr.
RATES = {"sft": "sft_lr", "sft_fair": "fair_lr", "grpo": "grpo_lr", "warm-up": "warm_up_lr"}
# Metrics that are shown beside the progress bar
SHOWN = (
    "validation/t1",
    "reward/mean",
    "discriminator/accuracy",
    "rollout/entropy",
    "policy/loss",
)


class Stopped(BaseException):
    """The run was asked to stop. No Exception: nobody on the way may swallow it."""

    def __init__(self, number: int, folder: Path):
        """number: of the signal."""
        self.status = 128 + number  # the shell's convention
        what = "before anything was done"
        if (folder / "settings.json").exists():
            command = parallel.resume_command(folder.name)
            what = f"what was done is saved. Go on with: {command}"
        super().__init__(f"stopped by {signal.Signals(number).name}; {what}")


@contextmanager
def in_one_line(s: Settings, folder: Path):
    """Turns Ctrl-C into Stopped; a full disk or memory into a UserError that says what to do."""
    command = parallel.resume_command(folder.name)
    try:
        yield
    except KeyboardInterrupt:  # outside of a step, where nothing has to be finished first
        raise Stopped(signal.SIGINT, folder) from None
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or getattr(error, "errno", None) in DISK:
            raise UserError(
                f"cannot write to {folder} ({error}): what was saved before stands. When that is "
                f"mended, go on with {command}"
            ) from None
        # A full memory is, by CUDA or torch, a RuntimeError.
        if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY):
            raise UserError(
                f"out of memory: in training a smaller --micro-batch helps ({s.micro_batch} now), "
                f"or --gradient-checkpointing; in sampling fewer --sample-rows ({s.sample_rows}); "
                f"{command} takes them. A new run may have a smaller --max-new-tokens "
                f"({s.max_new_tokens}) or a --lora-rank"
            ) from None
        raise


class Keeper:
    """One run's progress, on the disk.

    `opened` is its life; a step comes from `steps` and ends with `after`.
    """

    def __init__(self, folder: Path, s: Settings, resume: bool):
        """Raises UserError for a folder that holds a run, unless that is to go on."""
        self.folder = folder
        self.s = s
        self.resume = resume
        self.command = parallel.resume_command(folder.name)
        self.metrics = folder / "metrics.jsonl"
        self.signal = 0  # the one that was received
        self.saved = None  # the state of the phase that was cut off
        # How far the run is. A checkpoint holds this and the state of what is being trained.
        self.progress = SimpleNamespace(
            finished=[],  # phases, by name
            steps={},  # of each method
            seconds={},  # of training, by method
            skipped={},  # updates left out, by method and stage: [in all, steps in a row]
            results={"methods": {}, "reward": {}, "rerank": {}, "localise": {}},
            lines=0,  # of metrics.jsonl
        )
        if not resume and folder.exists():
            if any(not file.name.startswith(".") for file in folder.iterdir()):
                raise UserError(
                    f"{folder} already holds a run: go on with it ({self.command}), give another "
                    "--name, or remove that folder"
                )

    @contextmanager
    def opened(self, date: str, made_with: dict) -> Iterator[None]:
        """The folder, locked for this process, at the newest checkpoint or at the beginning.

        made_with: a checkpoint that was made with another device or other data is refused.
        """
        parallel.wait()  # all have seen that the folder is free
        self.folder.mkdir(parents=True, exist_ok=True)
        parallel.check_same_folder(self.folder)
        self.made_with = made_with
        lock = FileLock(self.folder / ".lock", timeout=0)  # ends with the process, if not before
        try:
            if parallel.rank() == 0:
                lock.acquire()
            self.begin(asdict(self.s) | {"date": date})
            yield
        except Timeout:
            raise UserError(
                f"another process is writing {self.folder}: wait for it, or give another --name"
            ) from None
        finally:
            lock.release()

    def begin(self, settings: dict) -> None:
        """Go back to the newest checkpoint if there is one, and write the settings."""
        if self.resume:
            self.restore(settings)
        self.progress.results["settings"] = settings
        if parallel.rank() == 0:
            checkpoint.write_text(self.folder / "settings.json", json.dumps(settings, indent=1))
            # What a killed run wrote after its last checkpoint will be written again.
            lines = []
            if self.metrics.exists():
                lines = self.metrics.read_text().splitlines(keepends=True)
            checkpoint.write_text(self.metrics, "".join(lines[: self.progress.lines]))
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0

    def restore(self, settings: dict) -> None:
        """Go back to the newest checkpoint. Settings that were turned are told, and kept."""
        self.saved, name = checkpoint.load(self.folder / "checkpoints")
        if self.saved is None:
            print(f"{self.folder} has no checkpoint yet: from the beginning")
            return
        for what, now in self.made_with.items():
            if self.saved[what] != now:
                raise UserError(
                    f"{self.folder} was started with other {what} ({self.saved[what]}, not {now}): "
                    "it cannot go on with these"
                )
        self.progress = SimpleNamespace(**self.saved["progress"])
        results = self.progress.results
        changed = {}
        for key, old in results["settings"].items():
            if settings[key] != old:
                changed[key] = [old, settings[key]]
                print(f"{flag(key)} is now {settings[key]}, was {old}")
        if changed:
            change = {"after_steps": dict(self.progress.steps), "settings": changed}
            results.setdefault("changed", []).append(change)
        steps = ", ".join(f"{method} {step}" for method, step in self.progress.steps.items())
        print(f"{self.folder} goes on from checkpoint {name} (steps done: {steps or 'none'})")

    def save(self, trainer=None) -> None:
        """Write a checkpoint: in the middle of training with all that changes in `trainer`."""
        start = time.monotonic()
        if parallel.rank() == 0:
            checkpoint.sync(self.metrics)
        state = {"progress": vars(self.progress)} | checkpoint.trainer_state(trainer)
        checkpoint.save(self.folder / "checkpoints", self.made_with | state)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def save_is_due(self) -> bool:
        """By the clock: see SAVE_SECONDS."""
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, SAVE_RATIO * self.save_seconds)

    def resumed(self, trainer):
        """The trainer of a phase, at the state of the checkpoint if this run goes on from one."""
        if self.saved:
            checkpoint.load_trainer(trainer, self.saved)
            self.saved = None
        return trainer

    def finish(self, phase: str) -> None:
        """A phase is over: save."""
        self.progress.finished.append(phase)
        self.save()

    def steps(self, method: str, count: int) -> Iterator[int]:
        """The numbers of the steps that are left to do, behind a progress bar."""
        before = self.progress.steps.get(method, 0)
        numbers = range(before + 1, count + 1)
        hidden = parallel.rank() > 0
        with tqdm(
            numbers, f"{method:8s}", count, initial=before, dynamic_ncols=True, disable=hidden
        ) as self.bar:
            yield from self.bar

    @contextmanager
    def signals_wait(self):
        """SIGINT and SIGTERM wait until the step is done and saved. A second one ends the process."""

        def handle(number: int, _frame) -> None:
            if self.signal:
                os._exit(128 + number)
            self.signal = number
            # Unlike print, os.write is safe between any two instructions.
            os.write(2, b"\nfinishing this step, then saving (a second signal stops at once)\n")

        before = {number: signal.signal(number, handle) for number in STOP}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after(self, method: str, step: int, metrics: dict, trainer) -> None:
        """A step is done: log it, save if it is time, stop if asked to or if updates fail.

        metrics: {stage: {name: value}}.
        """
        values = {}
        for stage, part in metrics.items():
            values |= {f"{stage}/{name}": value for name, value in part.items()}
        asked = {number: self.signal == number for number in STOP}
        asked["save"] = parallel.rank() == 0 and self.save_is_due()  # by the first one's clock
        values = parallel.mean(values | asked)  # one sum over processes for both
        asked = {name: values.pop(name) for name in asked}
        self.progress.steps[method] = step
        self.log(method, step, values)
        trouble = self.trouble(method, step, values)
        if trouble or any(asked.values()):
            self.save(trainer)
        if trouble:
            raise UserError(trouble)
        for number in STOP:
            if asked[number]:
                raise Stopped(number, self.folder)

    def log(self, method: str, step: int, values: dict) -> None:
        """A line of metrics.jsonl, by the first process. What is not finite is null in JSON."""
        self.progress.lines += 1
        if parallel.rank() > 0:
            return
        line = {"method": method, "step": step}
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else None
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name.split("/")[1]: f"{values[name]:.3f}" for name in SHOWN if name in values}
        self.bar.set_postfix(shown)

    def trouble(self, method: str, step: int, values: dict) -> str | None:
        """What to turn, if the updates of BAD_STEPS steps in a row were not finite."""
        for stage in ("discriminator", "policy"):
            key = f"{method} {stage}"
            skipped = values.get(f"{stage}/skipped", 0)
            before, in_a_row = self.progress.skipped.get(key, (0, 0))
            in_a_row = in_a_row + 1 if skipped > before else 0
            self.progress.skipped[key] = [skipped, in_a_row % BAD_STEPS]
            if in_a_row == BAD_STEPS:
                of_loop = "policy_lr" if stage == "policy" else "reward_lr"
                rate = RATES.get(method.split()[-1], of_loop)
                advice = f"{flag(rate)} {getattr(self.s, rate) / 2:g}"
                if rate == "policy_lr" and self.s.policy_loss != "exact":
                    advice += " --reward-clip 10"
                return (
                    f"{method}: the {stage}'s loss or gradient was not finite in three steps in a "
                    f"row (step {step}: loss {values[stage + '/loss']:.3g}, norm of the gradient "
                    f"{values[stage + '/grad_norm']:.3g}). What is saved is as it was after the "
                    f"last good update. Go on with something turned, for instance: {self.command} "
                    f"{advice}"
                )
        return None
