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

import torch
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

    If anything goes wrong before, it does not appear, and one that is there already stays. A kill
    leaves '.<name>.new', which the next call removes.
    """
    temporary = path.with_name(f".{path.name}.new")
    first = parallel.rank() == 0
    try:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        parallel.wait()
        yield temporary
        if first:
            for part in temporary.rglob("*"):
                if part.is_file():
                    sync(part)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(temporary, path)
        parallel.wait()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


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
    # What is frozen, under adapters, is loaded as at the start.
    named = part.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in part.state_dict().items() if name not in frozen}


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
            moments = {int(number): values for number, values in state["state"].items()}
            state = state | {"state": moments}
        part.load_state_dict(state)


def trainer_state(trainer=None) -> dict:
    """All that training changes: by the names in the trainer's `changes`, and torch's own draws."""
    parts = None
    if trainer:
        parts = {name: state_of(attrgetter(name)(trainer)) for name in trainer.changes}
    # A model's dropout draws from torch's global generators.
    return {
        "trainer": parts,
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def load_trainer(trainer, saved: dict) -> None:
    """All as it was when `trainer_state` was taken, in a trainer made from the same settings."""
    if saved["trainer"]:
        for name in trainer.changes:
            put_state(trainer, name, saved["trainer"][name])
    torch.set_rng_state(saved["random"])  # last: loading may have drawn from it
    torch.cuda.set_rng_state_all(saved["cuda"])


# --- checkpoints ----------------------------------------------------------------------------------


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds what a bad disk or a torn copy does."""
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
    """Write the next checkpoint and drop all but two. If it cannot be written, the old ones stay."""
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


def load(folder: Path) -> tuple[dict | None, str]:
    """(the state of the newest checkpoint that can be read, its name), or (None, "").

    That is if none was written yet. Raises UserError if there are some, and none can be read.
    """
    for path in reversed(numbered(folder)):
        try:
            return read(path), path.name
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            print(
                f"checkpoint {path} is damaged ({error}): trying the one before it", file=sys.stderr
            )
    if numbered(folder):
        raise UserError(
            f"no checkpoint in {folder} can be read: remove {folder.parent} and start again"
        )
    return None, ""
