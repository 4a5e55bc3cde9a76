"""How a run survives: its log, its checkpoints, where it goes on after a stop or a kill, and what
ends it early.

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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from engine import checkpoint, parallel
from engine.errors import UserError
from engine.runs import is_finished
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

    def __init__(self, status: int, reason: str):
        """status: the program's exit status. reason: which signal it was, and how to go on."""
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class Signals:
    """SIGINT and SIGTERM, for as long as this context is open.

    The first one is kept until `check` raises Stopped. Inside `at_once` one process does not wait
    for that. A second signal ends the process.
    """

    def __init__(self):
        self.received = 0
        self.immediate = False
        self.handlers_before = {}
        self.advice = " before anything was done"

    def __enter__(self):
        with suppress(ValueError):  # only the main thread may set handlers
            self.handlers_before = {number: signal.signal(number, self.handle) for number in STOP}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame) -> None:
        """Called between two Python instructions of whatever is going on.

        os.write is always safe there.
        """
        if self.received:
            os._exit(128 + number)
        self.received = number
        if self.immediate:
            self.check()
        os.write(2, b"\nfinishing this step, then saving (a second signal stops at once)\n")

    def asked(self) -> dict[int, bool]:
        """Which of the signals this process has got."""
        return {number: self.received == number for number in STOP}

    def check(self, asked: dict | None = None) -> None:
        """Raise Stopped if any process was asked to stop. All processes come here.

        asked: what all of them were asked, if that is known already.
        """
        if asked is None:
            asked = parallel.total_of(self.asked())
        for number in STOP:
            if asked[number]:  # the shell's convention: status 130 for SIGINT, 143 for SIGTERM
                raise Stopped(128 + number, signal.Signals(number).name + self.advice)

    @contextmanager
    def at_once(self):
        """For what changes nothing that a checkpoint does not hold: loading, evaluation."""
        self.check()
        self.immediate = (
            parallel.world() == 1
        )  # several processes must leave together: at the next check
        yield
        self.immediate = False


@contextmanager
def in_one_line(s: Settings, folder: Path):
    """A full or unwritable disk, or a full memory, as a UserError that says what to do about it."""
    command = parallel.resume_command(folder.name)
    try:
        yield
    except (
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:  # a full memory is, by CUDA or torch, a RuntimeError
        if getattr(error, "errno", None) in DISK:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}): what was saved before stands. When "
                f"that is mended, go on with {command}"
            ) from None
        if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY):
            raise UserError(
                f"out of memory: in training a smaller --micro-batch helps ({s.micro_batch} now), "
                f"or --gradient-checkpointing; in sampling fewer --sample-rows ({s.sample_rows}); "
                f"{command} takes them. A new run may have a smaller --max-new-tokens "
                f"({s.max_new_tokens}) or a --lora-rank"
            ) from None
        raise


class Log:
    """metrics.jsonl: a line for each step."""

    def __init__(self, path: Path, size: int = 0):
        """Go on after `size` bytes:

        what a killed run wrote after its last checkpoint will be written again.
        """
        self.file = open(path, "ab", buffering=0)
        if self.size() < size:
            raise UserError(
                f"{path} is shorter than when it was last saved: remove {path.parent} and start "
                "again"
            )
        self.file.truncate(size)

    def write(self, method: str, step: int, metrics: dict) -> None:
        """One line {"method", "step", "stage/metric":

        value, ...}. What is not finite is null: JSON has no NaN.
        """
        line = {"method": method, "step": step}
        for name, value in metrics.items():
            line[name] = value if math.isfinite(value) else None
        text = json.dumps(line).encode() + b"\n"
        if self.file.write(text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def size(self) -> int:
        """Bytes that the disk holds by now."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size


def no_results() -> dict:
    """results.json at the beginning."""
    return {"methods": {}, "reward": {}, "rerank": {}, "localise": {}}


@dataclass
class Progress:
    """How far a run is. A checkpoint holds this and the state of what is being trained."""

    finished: list[str] = field(default_factory=list)  # phases, by name
    steps: dict[str, int] = field(default_factory=dict)  # of each method
    seconds: dict[str, float] = field(default_factory=dict)  # of training, by method
    skipped: dict[str, list[int]] = field(
        default_factory=dict
    )  # updates left out: [in all, steps in a row]
    results: dict = field(default_factory=no_results)
    metrics_size: int = 0  # bytes of metrics.jsonl


class Keeper:
    """One run's progress, on the disk.

    `opened` is its life; a step comes from `steps` and ends with `after`.
    """

    def __init__(self, folder: Path, s: Settings, resume: bool, signals: Signals):
        """Raises UserError for a folder that holds a run, unless that is to go on."""
        self.folder = folder
        self.s = s
        self.resume = resume
        self.signals = signals
        self.processes = parallel.world()
        self.command = parallel.resume_command(folder.name)
        self.advice = f"; what was done is saved. Go on with: {self.command}"
        if resume:
            signals.advice = self.advice
        elif folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            go_on = "" if is_finished(folder) else f"go on with it ({self.command}), "
            raise UserError(
                f"{folder} already holds a run: {go_on}give another --name, or remove that folder"
            )

    @contextmanager
    def opened(self, device: str, date: str, data_sum: int) -> Iterator[None]:
        """The folder, locked for this process, at the newest checkpoint or at the beginning.

        device, data_sum: a checkpoint of another kind of device, or of other data, is refused.
        """
        parallel.wait()  # all have seen that the folder is free
        self.folder.mkdir(parents=True, exist_ok=True)
        self.signals.advice = self.advice
        self.made_with = {"device": device, "data": data_sum}
        self.progress = Progress()
        self.saved = None  # the state of the phase that was cut off
        with checkpoint.locked(self.folder):
            settings = asdict(self.s) | {"date": date}
            if self.resume:
                self.restore(settings)
            self.progress.results["settings"] = settings
            if parallel.rank() == 0:
                checkpoint.write_text(self.folder / "settings.json", json.dumps(settings, indent=1))
                self.log = Log(self.folder / "metrics.jsonl", self.progress.metrics_size)
            self.saved_at = time.monotonic()
            self.save_seconds = 0.0
            yield

    def restore(self, settings: dict) -> None:
        """Go back to the newest checkpoint, if there is one.

        Settings that were turned are told, and kept.
        """
        self.saved, name = checkpoint.load(self.folder / "checkpoints")
        if self.saved is None:
            print(f"{self.folder} has no checkpoint yet: from the beginning")
            return
        before = self.saved["device"]
        if before != self.made_with["device"]:
            raise UserError(
                f"{self.folder} was trained on {before}, whose random numbers "
                f"{self.made_with['device']} cannot go on with: --device {before}"
            )
        if self.saved["data"] != self.made_with["data"]:
            raise UserError(
                f"the examples of {self.s.data} are not those that {self.folder} was started with"
            )
        self.progress = Progress(**self.saved["progress"])
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
        if parallel.world() < self.processes:
            return  # the others have left (parallel.leave): what was saved with them stands
        start = time.monotonic()
        if parallel.rank() == 0:
            self.progress.metrics_size = self.log.size()
        state = (
            self.made_with | {"progress": asdict(self.progress)} | checkpoint.trainer_state(trainer)
        )
        checkpoint.save(self.folder / "checkpoints", state)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def save_is_due(self) -> bool:
        """By the clock: see SAVE_SECONDS."""
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, SAVE_RATIO * self.save_seconds)

    def resumed(self, trainer):
        """The trainer of a phase:

        as it is, or as the checkpoint has it that this run goes on from.
        """
        if self.saved:
            checkpoint.load_trainer(trainer, self.saved)
            self.saved = None
        return trainer

    def finish(self, phase: str) -> None:
        """A phase is over: save, and stop if that was asked for."""
        self.progress.finished.append(phase)
        self.save()
        self.signals.check()

    def steps(self, method: str, count: int) -> Iterator[int]:
        """The numbers of the steps that are left to do, behind a progress bar."""
        before = self.progress.steps.get(method, 0)
        numbers = range(before + 1, count + 1)
        with tqdm(
            numbers,
            f"{method:8s}",
            count,
            initial=before,
            dynamic_ncols=True,
            disable=parallel.rank() > 0,
        ) as self.bar:
            yield from self.bar

    def after(self, method: str, step: int, metrics: dict, trainer) -> None:
        """A step is done: log it, save if it is time, stop if that was asked for or updates come to
        nothing.

        metrics: {stage: {name: value}}.
        """
        values = {
            f"{stage}/{name}": value
            for stage, part in metrics.items()
            for name, value in part.items()
        }
        asked = self.signals.asked()
        asked["save"] = (
            parallel.rank() == 0 and self.save_is_due()
        )  # by the first process's clock alone
        values = parallel.mean(values | asked)  # one sum over processes for both
        asked = {name: values.pop(name) for name in asked}
        if parallel.rank() == 0:
            self.log.write(method, step, values)
            shown = {name.split("/")[1]: f"{values[name]:.3f}" for name in SHOWN if name in values}
            self.bar.set_postfix(shown)
        self.progress.steps[method] = step
        trouble = self.trouble(method, step, values)
        if trouble or any(asked.values()):
            self.save(trainer)
        if trouble:
            raise UserError(trouble)
        self.signals.check(asked)

    def trouble(self, method: str, step: int, values: dict) -> str | None:
        """What to turn, if the updates of BAD_STEPS steps in a row were not finite:

        the rate, or the clip, too.
        """
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
