"""What lets a run be killed at any moment and go on as if nothing had happened.

    files         written beside their place, then renamed: the old one or the new one, never a half
    state         of what a trainer (irl.IRL, baselines.SFT, baselines.GRPO) names in `changes`:
                  tensors and plain values
    checkpoints   runs/<name>/checkpoints/000012/: tensors.safetensors, state.json, checksums.json;
                  two are kept. With torchrun each rank has files: its replay, its random numbers,
                  its share of AdamW's states. The models are in rank 0's

engine/keeper.py decides when to save. No pickle anywhere: a checkpoint is data, and reading one
runs no code.
"""

import json
import os
import random
import shutil
import sys
import zlib
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine import parallel
from engine.errors import UserError

TENSOR = "__tensor__"  # in state.json, {TENSOR: name} stands for a tensor of tensors.safetensors

# --- files and folders that are there complete, or not at all -------------------------------------


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file: some full ones refuse no earlier."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path):
    """A folder to fill, which appears as `path` when rank 0 has filled it.

    Until then one that is there already stays. A kill or an error leaves '.<name>.new', which the
    next call removes.
    """
    temporary = path.with_name(f".{path.name}.new")
    if parallel.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    parallel.wait()
    yield temporary
    if parallel.rank() == 0:
        for part in temporary.rglob("*"):
            if part.is_file():
                sync(part)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
    parallel.wait()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def locked(folder: Path):
    """Have one run at a time write to a folder. The lock ends with the process, if not before."""
    try:
        with FileLock(folder / f".lock-{parallel.rank()}", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another process is writing {folder}: wait for it, or give another --name"
        ) from None


# --- the state of a trainer -----------------------------------------------------------------------


def state_of(part):
    """The state of a model, an optimizer, a random generator or anything with a state_dict."""
    if isinstance(part, int):  # how many steps are done
        return part
    if isinstance(part, random.Random):
        return part.getstate()
    if isinstance(part, torch.Generator):
        return part.get_state()
    state = part.state_dict()
    if isinstance(part, torch.nn.Module):
        # All ranks have the same models: the first one writes them. What is frozen, under adapters,
        # is loaded as at the start.
        named = part.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        state = {name: state[name] for name in state if parallel.rank() == 0 and name not in frozen}
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
    else:
        if isinstance(part, torch.optim.Optimizer):  # JSON has made strings of parameters' numbers
            state["state"] = {int(number): state["state"][number] for number in state["state"]}
        part.load_state_dict(state)


def trainer_state(trainer=None) -> dict:
    """All that training changes: by the names in the trainer's `changes`, and torch's own draws."""
    names = trainer.changes if trainer else ()
    parts = {name: state_of(attrgetter(name)(trainer)) for name in names}
    # A model's dropout draws from torch's global generators.
    cuda = torch.cuda.get_rng_state_all()
    return {"trainer": parts, "random": torch.get_rng_state(), "cuda": cuda}


def load_trainer(trainer, saved: dict) -> None:
    """All as it was when `trainer_state` was taken, in a trainer made from the same settings."""
    for name, state in saved["trainer"].items():
        put_state(trainer, name, state)
    torch.set_rng_state(saved["random"])  # last: loading may have drawn from it
    torch.cuda.set_rng_state_all(saved["cuda"])


# --- checkpoints ----------------------------------------------------------------------------------


def checksum(path: Path) -> int:
    """CRC-32 of a file, which is not read as a whole: finds what a bad disk or a torn copy does."""
    return zlib.crc32(np.memmap(path, np.uint8, "r"))


def of_this_rank(path: Path) -> Path:
    """The file of this name that this rank writes: state.json, state-rank1.json, .."""
    return path.with_stem(path.stem + f"-rank{parallel.rank()}" * (parallel.rank() > 0))


def write(state: dict, folder: Path) -> None:
    """A state as JSON, and its tensors as safetensors; those that share memory (tied) once."""
    tensors = {}
    names = {}

    def name_of(tensor: torch.Tensor) -> dict:
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or memory not in names:
            names[memory] = str(len(tensors))
            tensors[names[memory]] = tensor.detach().cpu().contiguous()
        return {TENSOR: names[memory]}

    text = json.dumps(state, default=name_of)  # which calls it for what JSON does not know
    of_this_rank(folder / "state.json").write_text(text, encoding="utf-8")
    save_file(tensors, of_this_rank(folder / "tensors.safetensors"))


def read(path: Path) -> dict:
    """The state in a checkpoint.

    Raises ValueError, OSError, KeyError or SafetensorError if it is damaged, UserError if another
    number of processes has written it.
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
    return sorted(folder.glob("[0-9]*"))


def save(folder: Path, state: dict) -> None:
    """Write the next checkpoint and drop all but two. If it fails, the old ones stay."""
    older = numbered(folder)
    number = 1 + max((int(path.name) for path in older), default=0)
    with new_folder(folder / f"{number:06d}") as new:
        write(state, new)
        parallel.wait()  # all have
        if parallel.rank() == 0:
            sums = {path.name: checksum(path) for path in new.iterdir()}
            (new / "checksums.json").write_text(json.dumps(sums))
    for path in older[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path) -> dict | None:
    """The state of the newest checkpoint that can be read, or None if none was written yet."""
    paths = numbered(folder)
    for path in reversed(paths):
        try:
            return read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            print(f"checkpoint {path} is damaged ({error}): trying an older one", file=sys.stderr)
    if paths:
        raise UserError(
            f"no checkpoint in {folder} can be read: remove {folder.parent} and start again"
        )
    return None
