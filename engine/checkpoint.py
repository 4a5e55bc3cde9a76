"""What lets a run be killed at any moment and go on as if nothing had happened. engine/keeper.py
decides when to save.

    files         written beside their place, then renamed: the old one or the new one, never a half
    state         of what a trainer (irl.IRL, baselines.SFT, baselines.GRPO) names in `changes`:
                  tensors and plain values
    checkpoints   runs/<name>/checkpoints/000012/: tensors.safetensors, state.json, checksums.json;
                  two are kept. With torchrun each rank has files: its replay, its random numbers,
                  its share of AdamW's states. The models are in rank 0's

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

KEPT = 2  # checkpoints
TENSOR = "__tensor__"  # in state.json, {TENSOR: name} stands for a tensor of tensors.safetensors

# --- files and folders that are there complete, or not at all -------------------------------------


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
    """A folder to fill, which appears as `path` when rank 0 has filled it.

    If anything goes wrong before, it does not appear, and one that is there already stays. A kill
    leaves '.<name>.new', which the next call removes.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        if parallel.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        parallel.wait()
        yield temporary
        if parallel.rank() == 0:
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


def remove(folder: Path) -> None:
    """Remove a folder at once, and what a kill may have left of removing it."""
    doomed = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def locked(folder: Path):
    """Have one run at a time write to a folder. Raises UserError if another one does.

    The lock ends with the process. Windows and some network disks have none.
    """
    if fcntl is None or parallel.rank() > 0:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {folder}: wait for it, or give another --name"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


# --- the state of a trainer -----------------------------------------------------------------------


def state_of(part):
    """The state of a model, an optimizer, a random generator or anything with a state_dict."""
    if isinstance(part, int):  # how many steps are done
        return part
    if isinstance(part, random.Random):
        return part.getstate()
    if isinstance(part, torch.Generator):
        return part.get_state()
    if not isinstance(part, torch.nn.Module):
        return part.state_dict()
    if parallel.rank() > 0:  # all ranks have the same models: the first one writes them
        return {}
    state = part.state_dict()
    for name, parameter in part.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # frozen, under adapters: loaded as at the start
            state.pop(name, None)
    return state


def put_state(trainer, name: str, state) -> None:
    """Put a state, as from `state_of`, back into the part of a trainer that has this name."""
    part = attrgetter(name)(trainer)
    if isinstance(part, int):
        setattr(trainer, name, state)
    elif isinstance(part, random.Random):
        version, numbers, gauss = state
        part.setstate((version, tuple(numbers), gauss))  # JSON has made a list of them
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, torch.nn.Module):
        part.load_state_dict(part.state_dict() | state)
        parallel.send(list(part.state_dict().values()))
    elif isinstance(part, torch.optim.Optimizer):
        # JSON has made strings of the parameters' numbers.
        numbered = {int(number): values for number, values in state["state"].items()}
        part.load_state_dict(state | {"state": numbered})
    else:
        part.load_state_dict(state)


def trainer_state(trainer=None) -> dict:
    """All that training changes:

    in a trainer, if there is one, by the names in `changes`; torch's random numbers.
    """
    parts = None
    if trainer:
        parts = {name: state_of(attrgetter(name)(trainer)) for name in trainer.changes}
    return {"trainer": parts, "random": [generator.get_state() for generator in generators()]}


def load_trainer(trainer, saved: dict) -> None:
    """All as it was when `trainer_state` was taken.

    The trainer must have been made from the same settings.
    """
    if saved["trainer"]:
        for name in trainer.changes:
            put_state(trainer, name, saved["trainer"][name])
    for generator, state in zip(
        generators(), saved["random"]
    ):  # last: loading may have drawn from them
        generator.set_state(state)


def generators() -> list[torch.Generator]:
    """torch's global ones, from which a model's dropout draws."""
    return [torch.default_generator, *torch.cuda.default_generators]


# --- checkpoints ----------------------------------------------------------------------------------


def checksum(path: Path) -> int:
    """CRC-32 of a file:

    finds what a bad disk or a torn copy does, in a second per gigabyte or two.
    """
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def of_this_rank(path: Path) -> Path:
    """The file of this name that this rank writes: state.json, state-rank1.json, .."""
    if parallel.rank() == 0:
        return path
    return path.with_stem(f"{path.stem}-rank{parallel.rank()}")


def write(state: dict, folder: Path) -> None:
    """A state as JSON, and the tensors in it as safetensors;

    those that share their memory (tied weights) once.
    """
    tensors = {}
    names = {}

    def name_of(tensor: torch.Tensor) -> dict:
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or memory not in names:
            names[memory] = str(len(tensors))
            tensors[names[memory]] = tensor.detach().cpu().contiguous()
        return {TENSOR: names[memory]}

    text = json.dumps(state, default=name_of)  # which calls it for what JSON does not know: tensors
    of_this_rank(folder / "state.json").write_text(text, encoding="utf-8")
    save_file(tensors, of_this_rank(folder / "tensors.safetensors"))


def read(path: Path) -> dict:
    """The state in a checkpoint.

    Raises ValueError, OSError, KeyError or SafetensorError if it is damaged, UserError if so many
    processes as there are now have not written it.
    """
    sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
    for name, value in sums.items():
        if checksum(path / name) != value:
            raise ValueError(f"{name} is not what was written")
    processes = sum(name.startswith("state") for name in sums)
    if processes != parallel.world():
        raise UserError(
            f"{path} is of {processes} processes, not {parallel.world()}: use torchrun "
            f"--nproc-per-node={processes}"
        )
    # Cloned: the file is mapped into memory, and its folder will be removed while the run goes on.
    mapped = load_file(of_this_rank(path / "tensors.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}

    def with_tensors(part: dict):
        return tensors[part[TENSOR]] if TENSOR in part else part

    text = of_this_rank(path / "state.json").read_text(encoding="utf-8")
    return json.loads(text, object_hook=with_tensors)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())


def save(folder: Path, state: dict) -> None:
    """Write the next checkpoint and drop all but KEPT.

    If it cannot be written, the old ones stand.
    """
    older = numbered(folder)
    number = int(older[-1].name) + 1 if older else 1
    with new_folder(folder / f"{number:06d}") as new:
        write(state, new)
        parallel.wait()  # all have
        if parallel.rank() == 0:
            sums = {path.name: checksum(path) for path in new.iterdir()}
            (new / "checksums.json").write_text(json.dumps(sums))
    for path in older[: 1 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path) -> tuple[dict | None, str]:
    """(the state of the newest checkpoint that can be read, its name), or (None, '') if none was
    written yet.

    Raises UserError if there are checkpoints, and none can be read.
    """
    paths = numbered(folder)
    for path in reversed(paths):
        try:
            return read(path), path.name
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            print(
                f"checkpoint {path} is damaged ({error}): trying the one before it", file=sys.stderr
            )
    if paths:
        raise UserError(
            f"no checkpoint in {folder} can be read: remove {folder.parent} and start again"
        )
    return None, ""
