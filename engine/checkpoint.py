"""What lets a run be killed at any moment and go on as if nothing had happened.

    1. files         written beside their place, then renamed: there is the old one or the new one, never half of one
    2. state         of models, optimizers, random generators, ... as tensors and plain values
    3. checkpoints   runs/<name>/checkpoints/000012/: tensors.safetensors, state.json, checksums.json; two are kept
    4. signals       Ctrl-C and SIGTERM wait for the end of the step; a second one does not wait
    5. trouble       a full disk or a full memory becomes one line that says what to do

No pickle anywhere: a checkpoint is data, and reading one runs no code. train.Run decides when to save and what comes next;
a trainer (irl.IRL, baselines.SFT, baselines.GRPO) says in `changes` which of its attributes training changes.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import zlib
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---------------------------------------------------------------------------------------------------------------
# 1. Files
# ---------------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    if os.name == "nt" and path.is_dir():  # Windows syncs no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path):
    """A folder to fill that appears as `path` when it is complete, and not at all if anything goes wrong.

    A folder that is there already stands until then; a kill in between leaves '.<name>.new', which the next one removes.
    """
    temporary = path.with_name(f".{path.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
        sync(path.parent)
    except SafetensorError as error:  # of a full disk safetensors says "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path):
    """Have one process at a time write to a folder. The system drops the lock with the process, however it ends. On Windows,
    and on network disks without locks, two at once are not noticed."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}: wait for it, or give another --name") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds what a bad disk or a torn copy does, in a second per gigabyte or two."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


# ---------------------------------------------------------------------------------------------------------------
# 2. State
# ---------------------------------------------------------------------------------------------------------------


def state_of(part):
    """The state of a model, an optimizer, a random generator or anything with a state_dict: dicts, lists, tensors."""
    if isinstance(part, random.Random):
        version, words, gauss = part.getstate()
        return [version, list(words), gauss]
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, torch.optim.Optimizer):
        groups = [{name: group[name] for name in ("lr", "skipped") if name in group} for group in part.param_groups]
        return {"state": {str(i): values for i, values in part.state_dict()["state"].items()}, "groups": groups}
    if isinstance(part, torch.nn.Module):  # what is frozen under adapters is not changed, and loaded as at the start
        frozen = {name for name, p in part.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in part.state_dict().items() if name not in frozen}
    return part.state_dict() if hasattr(part, "state_dict") else part


def restore(part, state) -> None:
    """Put a state back where `state_of` took it from."""
    if isinstance(part, random.Random):
        version, words, gauss = state
        part.setstate((version, tuple(words), gauss))
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, torch.optim.Optimizer):
        values = {int(i): values for i, values in state["state"].items()}
        part.load_state_dict({"state": values, "param_groups": part.state_dict()["param_groups"]})
        for group, saved in zip(part.param_groups, state["groups"]):
            group.update(saved)
    elif isinstance(part, torch.nn.Module):
        part.load_state_dict(part.state_dict() | state)
    else:
        part.load_state_dict(state)


def trainer_state(trainer) -> dict:
    """All that training changes in a trainer, by the names in its `changes`."""
    return {name: state_of(attrgetter(name)(trainer)) for name in trainer.changes}


def load_trainer(trainer, state: dict) -> None:
    """A trainer as it was when `trainer_state` was taken. It must have been made from the same settings."""
    for name in trainer.changes:
        part = attrgetter(name)(trainer)
        if isinstance(part, int):
            setattr(trainer, name, state[name])
        else:
            restore(part, state[name])


def random_state() -> dict:
    """torch's global generators. (A model's dropout draws from them.)"""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """torch's global generators as they were."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------------------------------------------------------
# 3. Checkpoints
# ---------------------------------------------------------------------------------------------------------------

TENSOR = "__tensor__"  # in state.json, {TENSOR: name} stands for a tensor of tensors.safetensors


def split(tree, tensors: dict, path: str = "state", seen: dict | None = None):
    """A tree of dicts and lists as JSON takes it; its tensors go to `tensors`. Tensors that share their memory (tied
    weights) are kept once.

    >>> tensors = {}
    >>> split({"a": [torch.ones(1), 2]}, tensors), list(tensors)
    ({'a': [{'__tensor__': 'state.a.0'}, 2]}, ['state.a.0'])
    """
    seen = {} if seen is None else seen
    if isinstance(tree, torch.Tensor):
        same = (tree.device, tree.data_ptr(), tree.dtype, tuple(tree.shape), tree.stride())
        if tree.numel() == 0 or same not in seen:
            seen[same] = path
            tensors[path] = tree.detach().cpu().contiguous()
        return {TENSOR: seen[same]}
    if isinstance(tree, dict):
        return {key: split(value, tensors, f"{path}.{key}", seen) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [split(value, tensors, f"{path}.{i}", seen) for i, value in enumerate(tree)]
    return tree


def join(tree, tensors: dict):
    """The tree that `split` took apart."""
    if isinstance(tree, dict):
        return tensors[tree[TENSOR]] if TENSOR in tree else {key: join(value, tensors) for key, value in tree.items()}
    return [join(value, tensors) for value in tree] if isinstance(tree, list) else tree


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def save(folder: Path, state: dict) -> Path:
    """Write the next checkpoint and drop all but the last two. If it cannot be written, the old ones stand."""
    found, tensors = numbered(folder), {}
    path = folder / f"{int(found[-1].name) + 1 if found else 1:06d}"
    tree = split(state, tensors)
    with new_folder(path) as new:
        save_file(tensors, new / "tensors.safetensors")
        (new / "state.json").write_text(json.dumps(tree), encoding="utf-8")
        sums = {name: checksum(new / name) for name in ("tensors.safetensors", "state.json")}
        (new / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    for old in found[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def read(path: Path) -> dict:
    """The state in one checkpoint. ValueError, OSError, KeyError or SafetensorError if it is damaged."""
    for name, value in json.loads((path / "checksums.json").read_text(encoding="utf-8")).items():
        if checksum(path / name) != value:
            raise ValueError(f"{name} is not what was written")
    # cloned: the file is mapped into memory, and its folder will be removed while the run goes on
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "tensors.safetensors").items()}
    return join(json.loads((path / "state.json").read_text(encoding="utf-8")), tensors)


def load(folder: Path) -> tuple[dict | None, str]:
    """(the state of the newest checkpoint that can be read, its name), or (None, '') if none was written yet."""
    found = numbered(folder)
    for path in reversed(found):
        try:
            return read(path), path.name
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            print(f"checkpoint {path} is damaged ({error}): trying the one before it", file=sys.stderr)
    if found:
        raise UserError(f"no checkpoint in {folder} can be read: remove {folder.parent} and start again")
    return None, ""


def remove(folder: Path) -> None:
    """Remove all checkpoints at once, and what a kill may have left of removing them."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------
# 4. Signals
# ---------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception, so that nobody on the way swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number  # the shell's convention: 130 for SIGINT, 143 for SIGTERM


class Signals:
    """SIGINT and SIGTERM. The first is kept until `check`, or raises Stopped on the spot inside `at_once`; the second
    ends the process. A context: outside of it signals do what they did before."""

    def __init__(self):
        self.received, self.immediate, self.before = 0, False, {}

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
            raise Stopped(number)
        os.write(2, b"\nfinishing this step, then saving (a second signal stops at once)\n")

    def check(self) -> None:
        """Stop here if that was asked for."""
        if self.received:
            raise Stopped(self.received)

    @contextmanager
    def at_once(self):
        """For what changes nothing that a checkpoint does not hold: loading, evaluation."""
        self.check()
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False


# ---------------------------------------------------------------------------------------------------------------
# 5. Trouble
# ---------------------------------------------------------------------------------------------------------------

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
def in_one_line(folder: Path, disk: str, memory: str):
    """A full or unwritable disk, and a full memory, as UserError with what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise UserError(f"cannot write to {folder} ({error.strerror}): {disk}") from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory: {memory}") from None
