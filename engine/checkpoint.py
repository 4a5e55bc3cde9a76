"""What lets a run be killed at any moment and go on as if nothing had happened; engine/keeper.py decides when to save.

    files         written beside their place, then renamed: there is the old one or the new one, never half of one
    state         of what a trainer (irl.IRL, baselines.SFT, baselines.GRPO) names in `changes`: tensors and plain values
    checkpoints   runs/<name>/checkpoints/000012/: tensors.safetensors, state.json, checksums.json; two are kept. With torchrun
                  -rank1 files too: its replay, random numbers, share of AdamW's states; the models are in rank 0's

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

from engine import parallel
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
    """A folder to fill that appears as `path` when rank 0 has filled it, and not at all if anything goes wrong: one that is
    there already stands until then. A kill in between leaves '.<name>.new', which the next one removes."""
    temporary, first = path.with_name(f".{path.name}.new"), parallel.rank() == 0
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        parallel.wait()
        yield temporary
        if first:
            for part in (*temporary.rglob("*"), temporary):
                sync(part)
            if path.exists():
                shutil.rmtree(path)
            os.rename(temporary, path)
            sync(path.parent)
        parallel.wait()
    except SafetensorError as error:  # of a full disk safetensors says "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


@contextmanager
def locked(folder: Path):
    """Have one run at a time write to a folder. The lock ends with the process; Windows and some network disks have none."""
    if fcntl is None or parallel.rank() > 0:
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
    if not isinstance(part, torch.nn.Module):
        return part.state_dict()
    # what is frozen under adapters is not changed, and loaded as at the start; all ranks have the same, the first writes it
    frozen = {name for name, p in part.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in part.state_dict().items() if name not in frozen and parallel.rank() == 0}


def trainer_state(trainer=None) -> dict:
    """All that training changes: in a trainer, if there is one, by the names in its `changes`; torch's random numbers."""
    parts = trainer and {name: state_of(attrgetter(name)(trainer)) for name in trainer.changes}
    return {"trainer": parts, "random": [generator.get_state() for generator in generators()]}


def load_trainer(trainer, saved: dict) -> None:
    """All as it was when `trainer_state` was taken. The trainer must have been made from the same settings."""
    for name in trainer.changes if saved["trainer"] else ():
        part, state = attrgetter(name)(trainer), saved["trainer"][name]
        if isinstance(part, int):
            setattr(trainer, name, state)
        elif isinstance(part, random.Random):
            part.setstate((state[0], tuple(state[1]), state[2]))
        elif isinstance(part, torch.Generator):
            part.set_state(state)
        elif isinstance(part, torch.nn.Module):
            part.load_state_dict(part.state_dict() | state)
            parallel.send(list(part.state_dict().values()))
        else:
            if isinstance(part, torch.optim.Optimizer):  # JSON has made strings of its parameters' numbers
                state = state | {"state": {int(number): values for number, values in state["state"].items()}}
            part.load_state_dict(state)
    for generator, state in zip(generators(), saved["random"]):  # last: loading may have drawn from them
        generator.set_state(state)


def generators() -> list[torch.Generator]:
    """torch's global ones, from which a model's dropout draws."""
    return [torch.default_generator, *torch.cuda.default_generators]


TENSOR = "__tensor__"  # in state.json, {TENSOR: name} stands for a tensor of tensors.safetensors


def own(path: Path) -> Path:
    """A file of this rank's."""
    return path.with_stem(f"{path.stem}-rank{parallel.rank()}") if parallel.rank() else path


def write(state: dict, folder: Path) -> None:
    """A state as JSON, and the tensors in it as safetensors; those that share their memory (tied weights) once."""
    tensors, names = {}, {}

    def keep(tensor: torch.Tensor) -> dict:
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or same not in names:
            names[same] = str(len(tensors))
            tensors[names[same]] = tensor.detach().cpu().contiguous()
        return {TENSOR: names[same]}

    own(folder / "state.json").write_text(json.dumps(state, default=keep), encoding="utf-8")
    save_file(tensors, own(folder / "tensors.safetensors"))


def read(path: Path) -> dict:
    """The state in a checkpoint. ValueError, OSError, KeyError, SafetensorError: it is damaged. UserError: not for so many."""
    sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
    for name, value in sums.items():
        if checksum(path / name) != value:
            raise ValueError(f"{name} is not what was written")
    wrote = sum(name.startswith("state") for name in sums)
    if wrote != parallel.world():
        raise UserError(f"{path} is of {wrote} processes, not {parallel.world()}: use torchrun --nproc-per-node={wrote}")
    # cloned: the file is mapped into memory, and its folder will be removed while the run goes on
    tensors = {name: tensor.clone() for name, tensor in load_file(own(path / "tensors.safetensors")).items()}
    found = lambda part: tensors[part[TENSOR]] if TENSOR in part else part
    return json.loads(own(path / "state.json").read_text(encoding="utf-8"), object_hook=found)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def save(folder: Path, state: dict) -> None:
    """Write the next checkpoint and drop all but the last two. If it cannot be written, the old ones stand."""
    found = numbered(folder)
    with new_folder(folder / f"{int(found[-1].name) + 1 if found else 1:06d}") as new:
        write(state, new)
        parallel.wait()  # all have
        if parallel.rank() == 0:
            (new / "checksums.json").write_text(json.dumps({path.name: checksum(path) for path in new.iterdir()}))
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
    if folder.exists():
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
