"""How a run survives: its log, its checkpoints, where it goes on after a stop or a kill, and what ends it early.

train.Run says what is done; a Keeper counts it, saves it and finds it again. With several processes (torchrun) each has one:
they save, stop and go on together, and the first one logs.
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
from engine.runs import is_finished, run_folder
from engine.settings import Settings, flag

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR, errno.EEXIST)
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
STOP = (signal.SIGINT, signal.SIGTERM)
RATES = {"sft": "sft_lr", "sft_fair": "fair_lr", "grpo": "grpo_lr", "warm-up": "warm_up_lr"}  # others have two


class Stopped(BaseException):
    """The run was asked to stop: (exit status, by what and how to go on). Nobody on the way may swallow it as an Exception."""


class Signals:
    """SIGINT and SIGTERM. The first is kept until `check`, or with one process raises Stopped on the spot inside `at_once`;
    the second ends the process. A context: outside of it signals do what they did before."""

    def __init__(self):
        self.received, self.immediate, self.before, self.advice = 0, False, {}, " before anything was done"

    def __enter__(self):
        with suppress(ValueError):  # only the main thread may set handlers
            self.before = {number: signal.signal(number, self.handle) for number in STOP}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame) -> None:
        """Called between two Python instructions of whatever is going on; prints by os.write, which is always safe."""
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
        """Stop here if any process was asked to: all come here, with what all were `asked` if they know it already."""
        asked = asked or parallel.total_of(self.asked())
        for number in filter(asked.get, STOP):  # the shell's convention: 130 for SIGINT, 143 for SIGTERM
            raise Stopped(128 + number, f"{signal.Signals(number).name}{self.advice}")

    @contextmanager
    def at_once(self):
        """For what changes nothing that a checkpoint does not hold: loading, evaluation. Several processes leave after it."""
        self.check()
        self.immediate = parallel.world() == 1
        yield
        self.immediate = False


@contextmanager
def in_one_line(s: Settings):
    """A full or unwritable disk, and a full memory, as UserError with what to do about it."""
    command = parallel.resume_command(s.name)
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:  # a full memory is, by CUDA or torch, a RuntimeError
        if getattr(error, "errno", None) in DISK:
            raise UserError(f"cannot write to {run_folder(s.name)} ({error.strerror}): what was saved before stands. When that "
                            f"is mended, go on with {command}") from None  # fmt: skip
        if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY):
            raise UserError(f"out of memory: in training a smaller --micro-batch helps ({s.micro_batch} now), or "
                            f"--gradient-checkpointing; in sampling fewer --sample-rows ({s.sample_rows}); {command} takes "
                            f"them. A new run may have a smaller --max-new-tokens ({s.max_new_tokens}) or a --lora-rank"
                            ) from None  # fmt: skip
        raise


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
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        line = json.dumps({"method": method, "step": step} | known).encode() + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shown = ("validation/t1", "reward/mean", "discriminator/accuracy", "rollout/entropy", "policy/loss")
        bar.set_postfix({name.split("/")[1]: f"{metrics[name]:.3f}" for name in shown if name in metrics})

    def size(self) -> int:
        """Bytes that the disk holds by now."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size


@dataclass
class Progress:
    """How far a run is. A checkpoint holds this and the state of what is being trained."""

    finished: list[str] = field(default_factory=list)  # phases, by name
    steps: dict[str, int] = field(default_factory=dict)  # of each method
    seconds: dict[str, float] = field(default_factory=dict)  # of training, by method
    skipped: dict[str, list[int]] = field(default_factory=dict)  # updates left out: [in all, steps in a row]
    results: dict = field(default_factory=lambda: {"methods": {}, "reward": {}, "rerank": {}, "localise": {}})
    metrics_size: int = 0  # bytes of metrics.jsonl


class Keeper:
    """One run's progress, on the disk. `opened` is its life; a step is in `steps` and ends with `after`."""

    def __init__(self, s: Settings, resume: bool, signals: Signals):
        """Refuse a folder that holds a run, unless that is to go on."""
        self.s, self.resume, self.signals, self.folder = s, resume, signals, run_folder(s.name)
        self.processes, self.command = parallel.world(), parallel.resume_command(s.name)
        there = self.folder.exists() and any(not file.name.startswith(".") for file in self.folder.iterdir())
        if there and not resume and not s.explain:
            how = "" if is_finished(self.folder) else f"go on with it ({self.command}), "
            raise UserError(f"{self.folder} already holds a run: {how}give another --name, or remove that folder")
        self.advice = f"; what was done is saved. Go on with: {self.command}"
        signals.advice = self.advice if resume else signals.advice

    @contextmanager
    def opened(self, device: str, data_sum: int) -> Iterator[None]:
        """The folder, locked for this process, at the newest checkpoint or at the beginning."""
        parallel.wait()  # all have seen that the folder is free
        self.folder.mkdir(parents=True, exist_ok=True)
        parallel.check_same_folder(self.folder)
        self.signals.advice = self.advice
        self.progress, self.saved, self.about = Progress(), None, {"device": device, "data": data_sum}
        with checkpoint.locked(self.folder):
            if self.resume:
                self.restore()
            self.progress.results["settings"] = asdict(self.s)
            if parallel.rank() == 0:
                checkpoint.write_text(self.folder / "settings.json", json.dumps(asdict(self.s), indent=1))
                self.log = Log(self.folder / "metrics.jsonl", self.progress.metrics_size)
            self.saved_at, self.save_seconds = time.monotonic(), 0.0
            yield

    def restore(self) -> None:
        """Go back to the newest checkpoint, if there is one. Settings that were turned are told, and kept in results.json."""
        self.saved, name = checkpoint.load(self.folder / "checkpoints")
        if self.saved is None:
            return print(f"{self.folder} has no checkpoint yet: from the beginning")
        before, device = self.saved["device"], self.about["device"]
        if before != device:
            raise UserError(f"{self.folder} was trained on {before}, whose random numbers {device} cannot go on with: "
                            f"--device {before}")  # fmt: skip
        if self.saved["data"] != self.about["data"]:
            raise UserError(f"the examples of {self.s.data} are not those that {self.folder} was started with")
        self.progress = Progress(**self.saved["progress"])
        results, now = self.progress.results, asdict(self.s)
        changed = {name: [old, now[name]] for name, old in results["settings"].items() if now[name] != old}
        if changed:
            results.setdefault("changed", []).append({"after_steps": dict(self.progress.steps), "settings": changed})
            print("; ".join(f"{flag(name)} is now {new}, was {old}" for name, (old, new) in changed.items()))
        steps = ", ".join(f"{method} {step}" for method, step in self.progress.steps.items())
        print(f"{self.folder} goes on from checkpoint {name} (steps done: {steps or 'none'})")

    def save(self, trainer=None) -> None:
        """Write a checkpoint: in the middle of training with all that changes in `trainer`."""
        if parallel.world() < self.processes:  # the others have left (parallel.leave): what was saved with them stands
            return
        start = time.monotonic()
        if parallel.rank() == 0:
            self.progress.metrics_size = self.log.size()
        state = self.about | {"progress": asdict(self.progress)} | checkpoint.trainer_state(trainer)
        checkpoint.save(self.folder / "checkpoints", state)
        self.saved_at, self.save_seconds = time.monotonic(), time.monotonic() - start

    def save_is_due(self, step: int) -> bool:
        """Every so many steps; or by the clock, fifty times as long after a checkpoint as it took to write."""
        every, pause = self.s.checkpoint_every, max(15, 50 * self.save_seconds)
        return step % every == 0 if every else time.monotonic() - self.saved_at > pause

    def resumed(self, trainer):
        """The trainer of a phase: as it is, or as the checkpoint has it that this run goes on from."""
        saved, self.saved = self.saved, None
        if saved:
            checkpoint.load_trainer(trainer, saved)
        return trainer

    def finish(self, phase: str) -> None:
        """A phase is over: save, stop if that was asked for."""
        self.progress.finished.append(phase)
        self.save()
        self.signals.check()

    def steps(self, method: str, count: int) -> Iterator[int]:
        """The numbers of the steps that are left to do, behind a progress bar."""
        done = self.progress.steps.get(method, 0)
        with tqdm(range(done + 1, count + 1), f"{method:8s}", count, initial=done, dynamic_ncols=True,
                  disable=parallel.rank() > 0) as self.bar:  # fmt: skip
            yield from self.bar

    def after(self, method: str, step: int, metrics: dict, trainer) -> None:
        """A step is done: log it, save if it is time, and stop if that was asked for or updates come to nothing."""
        metrics = {f"{stage}/{name}": value for stage, values in metrics.items() for name, value in values.items()}
        asked = self.signals.asked() | {"save": parallel.rank() == 0 and self.save_is_due(step)}  # by its clock alone
        metrics = parallel.mean(metrics | asked)  # one sum over ranks for both
        asked = {name: metrics.pop(name) for name in asked}
        if parallel.rank() == 0:
            self.log.write(method, step, metrics, self.bar)
        self.progress.steps[method] = step
        trouble = self.trouble(method, step, metrics)
        if trouble or any(asked.values()):
            self.save(trainer)
        if trouble:
            raise UserError(trouble)
        self.signals.check(asked)

    def trouble(self, method: str, step: int, metrics: dict) -> str | None:
        """None, or what to turn where updates of three steps in a row were not finite: the rate, of sampled rewards the clip."""
        for stage in ("discriminator", "policy"):
            key, skipped = f"{method} {stage}", metrics.get(f"{stage}/skipped", 0)
            before, in_a_row = self.progress.skipped.get(key, (0, 0))
            in_a_row = in_a_row + 1 if skipped > before else 0
            self.progress.skipped[key] = [skipped, in_a_row % 3]
            if in_a_row == 3:
                rate = RATES.get(method.split()[-1], "policy_lr" if stage == "policy" else "reward_lr")
                clip = " --reward-clip 10" if rate == "policy_lr" and self.s.policy_loss in ("reinforce", "ppo") else ""
                return (f"{method}: the {stage}'s loss or gradient was not finite in three steps in a row (step {step}: loss "
                        f"{metrics[stage + '/loss']:.3g}, norm of the gradient {metrics[stage + '/grad_norm']:.3g}). What is "
                        f"saved is as it was after the last good update. Go on with something turned, for instance: "
                        f"{self.command} {flag(rate)} {getattr(self.s, rate) / 2:g}{clip}")  # fmt: skip
