"""How training needs less memory, with the same gradients up to rounding. (Adapters, lora.py, save most. What fits on which
card: experiments/cards.py. Checkpoints of a run are another thing: checkpoint.py.)"""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def weight_type(weights: str, lora_rank: int, device: torch.device) -> torch.dtype:
    """--weights auto is bf16 for a frozen base on CUDA. What trains is float32: a step of 1e-6 vanishes in bf16.

    >>> weight_type("auto", 16, torch.device("cuda")), weight_type("auto", 0, torch.device("cuda"))
    (torch.bfloat16, torch.float32)
    """
    half = weights == "bf16" or (weights == "auto" and lora_rank and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def recompute_layers(model) -> None:
    """Gradient checkpointing: from now on `model` keeps only each layer's input for backward, and runs the layer again there
    (Chen et al. 2016, arXiv 1604.06174): a third more time for a fraction of the memory."""
    # the name since transformers 5.2x, and the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # transformers asks for it; what is inside the layer stays without dropout


def recomputes(model) -> bool:
    """Will the next forward pass be checkpointed? transformers then drops the cache of keys and values."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


def micro_batches(lengths: torch.Tensor, rows: int, tokens: int = 0) -> list[torch.Tensor]:
    """Row numbers, part by part; each row is in one part. `rows` at a time in their order; or, with tokens > 0, rows of
    similar length together, as many as have at most `tokens` tokens once they are padded to the longest (at least one).

    >>> micro_batches(torch.tensor([9, 3, 8, 2, 3]), rows=2)
    [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    >>> micro_batches(torch.tensor([9, 3, 8, 2, 3]), rows=2, tokens=10)
    [tensor([0]), tensor([2]), tensor([1, 4, 3])]
    """
    if not tokens:
        return list(torch.arange(len(lengths), device=lengths.device).split(rows)) if len(lengths) else []
    order = lengths.argsort(descending=True, stable=True)
    sizes, counts = lengths[order].tolist(), []
    while (start := sum(counts)) < len(sizes):  # sizes[start] is the longest of its part
        counts.append(min(max(1, tokens // max(1, sizes[start])), len(sizes) - start))
    return list(order.split(counts))


def half_precision(device: torch.device):
    """bf16 matrix products in the layers on CUDA, float32 elsewhere. What trains and what is added up
    stays float32. Entered anew for each forward pass, because it caches the weights it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
