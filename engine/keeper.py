"""How a run survives: its log, its checkpoints, where it goes on, and what ends it early.

train.Run says what is to be done; a Keeper counts what is done, saves it and finds it again. With
several processes (torchrun) each has a Keeper: they save, stop and go on together, and the first
one logs.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError
from tqdm import tqdm

from engine import checkpoint, parallel
from engine.errors import UserError
from engine.settings import Settings

# A checkpoint is due after so many seconds, and after so many times as long as the last one took to
# write: writing them takes 2% of the time at most.
SAVE_SECONDS = 15
SAVE_RATIO = 50
# What an error of a full memory says, which is, by CUDA or torch, a RuntimeError
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# Metrics that are shown beside the progress bar
SHOWN = (
    "validation/t1",
    "reward/mean",
    "discriminator/accuracy",
    "rollout/entropy",
    "policy/loss",
)


@contextmanager
def in_one_line(s: Settings, folder: Path):
    """A stop, a full or unwritable disk, a full memory: one line each, which says how to go on."""
    command = parallel.resume_command(folder.name)
    try:
        yield
    except KeyboardInterrupt as stop:  # Ctrl-C, or what `Keeper.after` raises
        number = stop.args[0] if stop.args else signal.SIGINT
        if parallel.rank() == 0:
            name = signal.Signals(number).name
            print(
                f"\nstopped by {name}: what was saved stands. Go on with: {command}",
                file=sys.stderr,
            )
        sys.exit(128 + number)  # the shell's convention
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{error}: what was saved in {folder} stands. When that is mended, go on with {command}"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in MEMORY):
            raise
        raise UserError(
            f"out of memory: in training a smaller --micro-batch helps ({s.micro_batch} now), "
            f"or --gradient-checkpointing; in sampling fewer --sample-rows ({s.sample_rows}); "
            f"{command} takes them. A new run may have a smaller --max-new-tokens "
            f"({s.max_new_tokens}) or a --lora-rank"
        ) from None


class Keeper:
    """One run's progress, on the disk. `opened` is its life; each step ends with `after`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.signal = 0  # the one that was received
        self.save_seconds = 0.0
        self.saved = None  # the checkpoint of the phase that was cut off
        # How far the run is. A checkpoint holds this and the state of what is being trained.
        self.progress = SimpleNamespace(
            finished=[],  # phases, by name
            steps={},  # of each method
            seconds={},  # of training, by method
            skipped={},  # updates that were left out, by method: [in all, steps in a row]
            results={"methods": {}, "reward": {}, "rerank": {}, "localise": {}},
        )

    @contextmanager
    def opened(self, settings: dict, made_with: dict, resume: bool):
        """The folder, locked for this process, at the newest checkpoint or at the beginning.

        settings: for settings.json. made_with: a checkpoint that was made with another device or
        other data is refused.
        """
        parallel.wait()  # all have seen that the folder is free
        self.folder.mkdir(parents=True, exist_ok=True)
        parallel.check_same_folder(self.folder)
        self.made_with = made_with
        with checkpoint.locked(self.folder):
            if resume:
                self.restore(settings)
            self.progress.results["settings"] = settings
            if parallel.rank() == 0:
                checkpoint.write_text(self.folder / "settings.json", json.dumps(settings, indent=1))
                # A line for each step. What a killed run wrote after its last checkpoint will be
                # written again.
                self.metrics.touch()
                lines = self.metrics.read_text().splitlines(keepends=True)
                saved_lines = lines[: sum(self.progress.steps.values())]
                checkpoint.write_text(self.metrics, "".join(saved_lines))
            self.saved_at = time.monotonic()
            yield

    def restore(self, settings: dict) -> None:
        """Go back to the newest checkpoint. Settings that were turned are told, and kept."""
        self.saved = checkpoint.load(self.folder / "checkpoints")
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
        before = results["settings"]
        turned = {
            key: [before[key], settings[key]] for key in before if settings[key] != before[key]
        }
        if turned:
            change = {"after_steps": dict(self.progress.steps), "settings": turned}
            results.setdefault("changed", []).append(change)
        print(f"{self.folder} goes on (steps done: {self.progress.steps}, turned: {turned})")

    def resumed(self, trainer):
        """The trainer of a phase, as the checkpoint has it if this run goes on from one."""
        if self.saved:
            checkpoint.load_trainer(trainer, self.saved)
            self.saved = None
        return trainer

    def save(self, trainer=None) -> None:
        """Write a checkpoint: in the middle of training with all that changes in `trainer`."""
        start = time.monotonic()
        checkpoint.sync(self.metrics)  # no line may be lost that the checkpoint counts as written
        state = {"progress": vars(self.progress)} | checkpoint.trainer_state(trainer)
        checkpoint.save(self.folder / "checkpoints", self.made_with | state)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def save_is_due(self) -> bool:
        """By the clock: see SAVE_SECONDS."""
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, SAVE_RATIO * self.save_seconds)

    @contextmanager
    def steps(self, method: str, count: int):
        """The numbers of the steps that are left to do, behind a progress bar.

        SIGINT and SIGTERM wait until a step is done and saved. A second one ends the process.
        """

        def handle(number: int, _frame) -> None:
            if self.signal:
                os._exit(128 + number)
            self.signal = number
            # Unlike print, os.write is safe between any two instructions.
            os.write(2, b"\nfinishing this step, then saving (a second signal stops at once)\n")

        stops = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, handle) for number in stops}
        before = self.progress.steps.get(method, 0)
        self.bar = tqdm(
            range(before + 1, count + 1),
            f"{method:8s}",
            count,
            initial=before,
            dynamic_ncols=True,
            disable=parallel.rank() > 0,
        )
        try:
            yield self.bar
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def after(self, method: str, step: int, metrics: dict, trainer) -> None:
        """A step is done: log it, save if it is time, stop if asked to or if updates fail.

        metrics: {stage: {name: value}}.
        """
        values = parallel.mean(
            {
                f"{stage}/{name}": value
                for stage, part in metrics.items()
                for name, value in part.items()
            }
        )
        # All processes save and stop at the same step: by the first one's clock, or when any of
        # them is asked to.
        due = parallel.gather(self.save_is_due())[0]
        stop = max(parallel.gather(self.signal))
        self.progress.steps[method] = step
        if parallel.rank() == 0:
            self.log({"method": method, "step": step}, values)
        failed = self.count_skipped(method, values) == 3
        if failed or stop or due:
            self.save(trainer)
        if failed:
            raise UserError(
                f"{method}: a loss or gradient was not finite in three steps in a row, up to step "
                f"{step}. What is saved is as it was after the last good update. Go on with a "
                "lower rate (or, if it is rewards that explode, a --reward-clip) beside "
                f"{parallel.resume_command(self.folder.name)}"
            )
        if stop:
            raise KeyboardInterrupt(stop)

    def count_skipped(self, method: str, values: dict) -> int:
        """In how many steps in a row until now an update was left out."""
        skipped = sum(value for name, value in values.items() if name.endswith("/skipped"))
        before, in_a_row = self.progress.skipped.get(method, (0, 0))
        in_a_row = in_a_row + 1 if skipped > before else 0
        self.progress.skipped[method] = [skipped, in_a_row % 3]
        return in_a_row

    def log(self, line: dict, values: dict) -> None:
        """A line of metrics.jsonl, and some values beside the progress bar."""
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else None  # JSON has no NaN
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name.split("/")[1]: f"{values[name]:.3f}" for name in SHOWN if name in values}
        self.bar.set_postfix(shown)
