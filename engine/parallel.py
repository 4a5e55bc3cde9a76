"""Many GPUs of one machine: torchrun --nproc-per-node=N train.py ...

Every process ("rank") holds whole models and answers its own share of the questions: it keeps their demonstrations and
their replay, and samples with its own random numbers. The ranks meet in four places:

    total, total_of    what a loss is divided by is counted over all ranks: their losses sum to one process's on all rows
    sum_gradients      once per optimizer step
    make_optimizer     each rank keeps AdamW's states for 1/N of the weights
    rows, mean         evaluation, and the metrics that are logged

DistributedDataParallel and FSDP2 hang communication on a module's forward and backward, of which all ranks must then make
the same number. Here a rank samples until its own longest response has ended, and losses go around the model's forward
(policy.hidden_states). Nothing is saved before the end. Without torchrun every function returns what it was given.
"""

import os
import sys

import torch
import torch.distributed as dist

from engine.errors import UserError


def start(device: str) -> None:
    """Join the other processes, where torchrun has started any (it sets WORLD_SIZE, RANK and LOCAL_RANK)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    on_gpu, local = device in ("auto", "cuda") and torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if on_gpu and local >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node is more than the {torch.cuda.device_count()} GPUs that are here")
    if on_gpu:
        torch.cuda.set_device(local)  # "cuda" is this one from now on
    dist.init_process_group("nccl" if on_gpu else "gloo")


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
    """Which one this is: 0 alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all ranks are here."""
    if world() > 1:
        dist.barrier()


def share(items: list) -> list:
    """This rank's items: every N-th."""
    return items[rank() :: world()]


def share_of(count: int, flag: str) -> int:
    """count / N; it must come out even, so that every question weighs the same."""
    if count % world():
        raise UserError(f"{flag} {count} cannot be shared among {world()} processes: give a multiple of {world()}")
    return count // world()


def seed(number: int) -> int:
    """A seed of this rank's own; on rank 0 the number itself."""
    return number + 1_000_003 * rank()


def rows(function, items: list) -> torch.Tensor:
    """function(items), a tensor with a row per item, where each rank works on its share. All get all rows, in order."""
    if world() == 1:
        return function(items)
    parts = [None] * world()
    dist.all_gather_object(parts, function(share(items)).cpu())
    result = parts[0].new_zeros(len(items), *parts[0].shape[1:])
    for r, part in enumerate(parts):
        result[r :: world()] = part
    return result


def total_of(values: dict) -> dict:
    """The sum over ranks of each number in a dictionary that has the same keys on all of them."""
    if world() == 1:
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    numbers = torch.tensor(list(map(float, values.values())), dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return dict(zip(values, numbers.tolist()))


def total(value: float) -> float:
    """The sum over ranks of one number."""
    return total_of({"": value})[""]


def mean(metrics: dict[str, dict]) -> dict[str, dict]:
    """Metrics per stage, averaged over ranks. Each rank has as many rows: a mean of means."""
    if world() == 1:
        return metrics
    return {stage: {k: v / world() for k, v in total_of(values).items()} for stage, values in metrics.items()}


def sum_gradients(parameters: list) -> None:
    """Every gradient becomes its sum over ranks; one that a rank does not have counts as 0."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]:
        work.wait()


def make_optimizer(kind: type, parameters: list, **options) -> torch.optim.Optimizer:
    """kind(parameters, **options); with several ranks each keeps the states of a share of the parameters (ZeRO stage 1,
    Rajbhandari et al. 2019, arXiv 1910.02054). All ranks start from rank 0's parameters."""
    if world() == 1:
        return kind(parameters, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here, because it takes a second

    for parameter in parameters:
        dist.broadcast(parameter.data, 0)
    return ZeroRedundancyOptimizer(parameters, optimizer_class=kind, **options)
