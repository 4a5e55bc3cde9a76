"""What ends a run before its end: a signal, a full disk, a full memory. Each becomes one line that says what to do."""

import errno
import os
import signal
import threading
from contextlib import contextmanager

import torch

from engine.errors import UserError
from engine.runs import run_folder
from engine.settings import Settings


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception, so that nobody on the way swallows it."""

    def __init__(self, number: int, advice: str = ""):
        super().__init__(signal.Signals(number).name + advice)
        self.status = 128 + number  # the shell's convention: 130 for SIGINT, 143 for SIGTERM


class Signals:
    """SIGINT and SIGTERM. The first is kept until `check`, or raises Stopped on the spot inside `at_once`; the second
    ends the process. A context: outside of it signals do what they did before."""

    def __init__(self):
        self.received, self.immediate, self.before = 0, False, {}
        self.advice = " before anything was done"

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
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

    def check(self) -> None:
        """Stop here if that was asked for."""
        if self.received:
            raise Stopped(self.received, self.advice)

    @contextmanager
    def at_once(self):
        """For what changes nothing that a checkpoint does not hold: loading, evaluation."""
        self.check()
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the computer had no memory left. (On a CPU torch says so in a plain RuntimeError.)

    >>> out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    """
    words = ("out of memory", "can't allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextmanager
def in_one_line(s: Settings):
    """A full or unwritable disk, and a full memory, as UserError with what to do about it."""
    folder, command = run_folder(s.name), f"python train.py --resume --name {s.name}"
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise UserError(f"cannot write to {folder} ({error.strerror}): what was saved before stands. When there is room, go on "
                        f"with {command}") from None  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: in training a smaller --micro-batch helps ({s.micro_batch} now), or --gradient-checkpointing; "
            f"in sampling fewer --sample-rows ({s.sample_rows}); {command} takes them. A new run may have a smaller "
            f"--max-new-tokens ({s.max_new_tokens}) or a --lora-rank"
        ) from None
