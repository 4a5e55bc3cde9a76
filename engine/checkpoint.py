"""What lets a run be killed at any moment and go on as if nothing had happened; engine/keeper.py decides when to save.

    files         written beside their place, then renamed: there is the old one or the new one, never half of one
    state         of what a trainer (irl.IRL, baselines.SFT, baselines.GRPO) names in `changes`: tensors and plain values
    checkpoints   runs/<name>/checkpoints/000012/: tensors.safetensors, state.json, checksums.json; two are kept

No pickle anywhere: a checkpoint is data, and reading one runs no code.
"""

import errno
import json
import os
import random
import re
import shutil
import sys
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
        for part in (*temporary.rglob("*"), temporary):
            sync(part)
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


def state_of(part):
    """The state of a model, an optimizer, a random generator or anything with a state_dict: dicts, lists, tensors."""
    if isinstance(part, int):  # how many steps are done
        return part
    if isinstance(part, random.Random):
        return part.getstate()
    if isinstance(part, torch.Generator):
        return part.get_state()
    state = part.state_dict()
    if isinstance(part, torch.nn.Module):  # what is frozen under adapters is not changed, and loaded as at the start
        frozen = {name for name, p in part.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in state.items() if name not in frozen}
    return state


def restore(part, state) -> None:
    """Put a state back where `state_of` took it from."""
    if isinstance(part, random.Random):
        version, words, gauss = state
        part.setstate((version, tuple(words), gauss))
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        if isinstance(part, torch.optim.Optimizer):  # JSON has made strings of its parameters' numbers
            state = state | {"state": {int(number): values for number, values in state["state"].items()}}
        if isinstance(part, torch.nn.Module):
            state = part.state_dict() | state
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


def generators() -> list[torch.Generator]:
    """torch's global ones, from which a model's dropout draws."""
    return [torch.default_generator, *torch.cuda.default_generators]


TENSOR = "__tensor__"  # in state.json, {TENSOR: name} stands for a tensor of tensors.safetensors


def write(state: dict, folder: Path) -> None:
    """state.json, and tensors.safetensors for the tensors in it; those that share their memory (tied weights) once."""
    tensors, names = {}, {}

    def keep(tensor: torch.Tensor) -> dict:
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or same not in names:
            names[same] = str(len(tensors))
            tensors[names[same]] = tensor.detach().cpu().contiguous()
        return {TENSOR: names[same]}

    (folder / "state.json").write_text(json.dumps(state, default=keep), encoding="utf-8")
    save_file(tensors, folder / "tensors.safetensors")


def read(path: Path) -> dict:
    """The state in one checkpoint. ValueError, OSError, KeyError or SafetensorError if it is damaged."""
    for name, value in json.loads((path / "checksums.json").read_text(encoding="utf-8")).items():
        if checksum(path / name) != value:
            raise ValueError(f"{name} is not what was written")
    # cloned: the file is mapped into memory, and its folder will be removed while the run goes on
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "tensors.safetensors").items()}
    found = lambda part: tensors[part[TENSOR]] if TENSOR in part else part
    return json.loads((path / "state.json").read_text(encoding="utf-8"), object_hook=found)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def save(folder: Path, state: dict) -> None:
    """Write the next checkpoint and drop all but the last two. If it cannot be written, the old ones stand."""
    found = numbered(folder)
    with new_folder(folder / f"{int(found[-1].name) + 1 if found else 1:06d}") as new:
        write(state, new)
        sums = {path.name: checksum(path) for path in new.iterdir()}
        (new / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    for old in found[:-1]:
        shutil.rmtree(old, ignore_errors=True)


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
