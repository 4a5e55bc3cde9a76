"""How training needs less memory, with the same gradients up to rounding.

Adapters (lora.py) save most. What fits on which card: docs/speed.md.
"""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def weight_type(weights: str, lora_rank: int, device: torch.device) -> torch.dtype:
    """The type of the base's weights: --weights auto is bf16 for a frozen base on CUDA.

    >>> weight_type("auto", 16, torch.device("cuda")), weight_type("auto", 0, torch.device("cuda"))
    (torch.bfloat16, torch.float32)
    """
    # What trains is float32: a step of 1e-6 vanishes in bf16.
    if weights == "bf16" or (weights == "auto" and lora_rank and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def recompute_layers(model) -> None:
    """Gradient checkpointing: from now on `model` keeps only each layer's input for backward, and
    runs the layer again there (Chen et al. 2016, arXiv 1604.06174): a third more time."""
    # The name since transformers 5.2x, and the one before.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        # transformers asks for train mode; what is inside the layer stays without dropout.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def recomputes(model) -> bool:
    """Will the next forward pass be checkpointed? transformers then drops the cache of keys and
    values."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def micro_batches(lengths: torch.Tensor, rows: int, tokens: int = 0) -> list[torch.Tensor]:
    """Row numbers, part by part; each row is in one part.

    `rows` at a time in their order; or, with tokens > 0, rows of similar length together, as many
    as have at most `tokens` tokens once they are padded to the longest (but one row at least).

    >>> micro_batches(torch.tensor([9, 3, 8, 2, 3]), rows=2)
    [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    >>> micro_batches(torch.tensor([9, 3, 8, 2, 3]), rows=2, tokens=10)
    [tensor([0]), tensor([2]), tensor([1, 4, 3])]
    """
    left = torch.arange(len(lengths), device=lengths.device)
    if tokens:
        left = lengths.argsort(descending=True, stable=True)
    parts = []
    while len(left):
        if tokens:  # the first that is left is the longest of its part
            rows = max(1, tokens // int(lengths[left[0]]))
        parts.append(left[:rows])
        left = left[rows:]
    return parts


# Whose matrix products in the layers are bf16. experiments/real.py adds "cpu".
HALF_PRECISION = {"cuda"}


def half_precision(device: torch.device):
    """bf16 matrix products in the layers on the devices of HALF_PRECISION, float32 elsewhere.

    What trains and what is added up stays float32. Entered anew for each forward pass, because it
    caches the weights it has cast.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in HALF_PRECISION)
