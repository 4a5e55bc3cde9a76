"""Many GPUs: torchrun --nproc-per-node=N train.py ... On several machines, in a folder they share.

Every process ("rank") holds whole models and answers its own share of the questions: it keeps their
demonstrations and their replay, and samples with its own random numbers. The ranks meet in five
places:

    total, total_of    what a loss is divided by is counted over all ranks: their losses sum to the
                       loss of one process on all rows
    lowest             below which a trace that was cut off is paid: the same on all ranks
    sum_gradients      once per optimizer step
    make_optimizer     each rank keeps AdamW's states for 1/N of the weights, and steps these
    rows, mean         evaluation, and the metrics that are logged; what else all have to agree on
                       at a step's end comes with them

DistributedDataParallel and FSDP2 hang communication on a module's forward and backward, of which
all ranks must then make the same number. Here a rank samples until its own longest response has
ended, and losses go around the model's forward.

Without torchrun every function returns what it was given.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.errors import UserError


def start(device: str) -> None:
    """Join the other processes if torchrun, which sets these variables, has started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node is more than the {torch.cuda.device_count()} GPUs that are here"
            )
        torch.cuda.set_device(local_rank)  # "cuda" is this one from now on
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if rank() > 0:  # one prints; errors, which may be one's alone, go to stderr
        sys.stdout = open(os.devnull, "w")


def leave() -> None:
    """No more is to be shared: rank 0 goes on alone, the others end here."""
    first = rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        sys.exit(0)


def world() -> int:
    """N, how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is: 0 alone logs and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def resume_command(name: str) -> str:
    """What a run goes on with."""
    if world() == 1:
        return f"python train.py --resume --name {name}"
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])  # torchrun's
    program = f"torchrun --nproc-per-node={per_node} --nnodes={world() // per_node}"
    return f"{program} train.py --resume --name {name}"


def check_same_folder(folder: Path) -> None:
    """Refuse processes on several machines that do not see the same files. UserError on every rank.

    A checkpoint is written by all of them, and its models by rank 0 alone.
    """
    mark = folder / ".seen-by-all"
    if rank() == 0:
        mark.touch()
    wait()
    blind = gather(mark.exists()).count(False)
    if rank() == 0:
        mark.unlink()
    if blind:
        raise UserError(
            f"{blind} of {world()} processes do not see {folder} of the first one: on several "
            "machines start torchrun in a folder that all of them share (a network disk)"
        )


def gather(value) -> list:
    """What every rank has handed in here: all wait for each other, and all get the same list."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until all ranks are here."""
    gather(None)


def share(items: list) -> list:
    """This rank's items: every N-th."""
    return items[rank() :: world()]


def even(items: list, name: str) -> list:
    """The items, without those at the end that cannot be shared evenly.

    Each rank draws from its own share as often as the others: of 3 demonstrations on 2 ranks the
    one that is alone would weigh as much as the other two.
    """
    left_over = len(items) % world()
    if left_over:
        print(
            f"{left_over} of {len(items)} {name} left out: {world()} processes share them evenly, "
            "so that all weigh the same"
        )
    return items[: len(items) - left_over]


def share_of(count: int, flag: str) -> int:
    """count / N. It must come out even, so that every question weighs the same."""
    if count % world():
        raise UserError(
            f"{flag} {count} cannot be shared among {world()} processes: give a multiple of "
            f"{world()}"
        )
    return count // world()


def seed(number: int) -> int:
    """A seed of this rank's own; on rank 0 the number itself."""
    return number + 1_000_003 * rank()


def rows(function, items: list) -> torch.Tensor:
    """function(items), a tensor with a row per item; each rank works on its share.

    All get all rows, in order.
    """
    parts = gather(function(share(items)).cpu())
    return torch.stack([parts[i % world()][i // world()] for i in range(len(items))])


def total(value: float) -> float:
    """The sum over ranks of one number."""
    first, *others = gather(value)
    return sum(others, first)


def total_of(values: dict) -> dict:
    """The sum over ranks of each number in a dictionary with the same keys on all of them."""
    first, *others = gather(values)
    return {name: sum((other[name] for other in others), first[name]) for name in first}


def lowest(value: float) -> float:
    """The smallest of one number over ranks."""
    return min(gather(value))


def mean(metrics: dict) -> dict:
    """Metrics, averaged over ranks. Each rank has as many rows: a mean of means."""
    if world() == 1:
        return metrics
    return {name: value / world() for name, value in total_of(metrics).items()}


def sum_gradients(parameters: list) -> None:
    """Every gradient becomes its sum over ranks; one that a rank does not have counts as 0."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def send(tensors: list, ranks: int = 1) -> None:
    """Every tensor becomes rank 0's; with `ranks`, the i-th tensor becomes rank i % ranks's."""
    if world() > 1:
        for i, tensor in enumerate(tensors):
            dist.broadcast(tensor, i % ranks)


def make_optimizer(kind: type, parameters: list, **options) -> torch.optim.Optimizer:
    """kind(parameters, **options). With several ranks each steps a share of the parameters.

    It keeps the states of these alone, and sends the new weights to the others (ZeRO stage 1,
    Rajbhandari et al. 2019, arXiv 1910.02054). All start from rank 0's weights.
    """
    optimizer = kind(parameters, **options)
    send([parameter.data for parameter in parameters])
    by_size = sorted(parameters, key=torch.numel)  # so that shares weigh alike

    def keep_share(*_) -> None:
        # Without a gradient a parameter is not stepped, and has no states.
        for parameter in set(by_size) - set(share(by_size)):
            parameter.grad = None

    def send_stepped(*_) -> None:
        send([parameter.data for parameter in by_size], world())

    optimizer.register_step_pre_hook(keep_share)
    optimizer.register_step_post_hook(send_stepped)
    return optimizer
