"""Low-rank adapters: one frozen base serves as policy, as reward and as reference (LoRA, Hu et al.
2021, arXiv 2106.09685).

    1. LoRALinear          W x + (alpha / r) B A x; W is frozen, A [r, in] and B [out, r] train
    2. adapt, trained      a model with an adapter of its own, whose frozen weights are the base's
    3. average             the mean of what was learnt with its start
    4. with_head           the paper's reward head on a base, sharing it too
    5. merged, save        W + (alpha / r) B A as an ordinary model, for plain from_pretrained

Full fine-tuning of policy and reward holds each of them four times in float32: weights, gradients,
AdamW's two moments. An adapter of rank r trains r (in + out) numbers per matrix instead of
in * out, and the base is there once, in bf16:

    base = loading.load_policy("Qwen2.5-0.5B", "cuda", torch.bfloat16)[0]
    policy_model = adapt(base, 16, 32)
    reward_model = adapt(base, 16, 32)   # the same base, an adapter of its own
    reference = share(policy_model)      # and a copy of the first adapter as it is now

These are three trees of modules. Nothing is switched on and off between them, so gradient
checkpointing, which runs a model's forward pass once more in the middle of backward, cannot meet
the wrong adapter.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForTokenClassification

from engine.errors import UserError


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A x: [.., in] -> [.., out] (equation 3 of the paper)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        # B starts at 0, so at first the model is its base. A starts at random, as nn.Linear does,
        # or no gradient would ever reach B: on the CPU, for the same start on every device.
        # Both are float32 whatever W is: they take steps that bf16 would round away.
        device = base.weight.device
        A = torch.empty(rank, base.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * linear(linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def adapt(base: nn.Module, rank: int, alpha: float, generator=None) -> nn.Module:
    """A model that computes what `base` computes, plus an adapter on every matrix of its layers.

    All that is frozen is `base`'s own tensors, not copies: it freezes `base`. Embeddings and output
    matrix, often one, have no adapter. A head (with_head) is trained in full, in float32.
    `generator` (a CPU's) draws every A.
    """
    base.requires_grad_(False)
    model = share(base)
    # The last norm's weight is not trained, but a copy, for policy.divide_logits. A buffer is no
    # parameter, which would be taken for the base's, and is in state_dict as before.
    norm = getattr(model.base_model, "norm", None)
    if norm is not None:
        weight = norm.weight.detach().clone()
        del norm.weight
        norm.register_buffer("weight", weight)
    if hasattr(model, "score"):
        model.score.float().requires_grad_(True)
    modules = list(model.base_model.named_modules())
    matrices = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    if not matrices:
        raise UserError(
            f"no nn.Linear in a {type(base).__name__}: LoRA has nothing to adapt, train with "
            "--lora-rank 0"
        )
    for name, matrix in matrices:
        model.base_model.set_submodule(name, LoRALinear(matrix, rank, alpha, generator))
    return model


def share(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules around the same frozen parameters; what trains is copied."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)  # its memo, {id: copy}: these are their own copies


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer moves: all parameters, or adapters (and a head)."""
    return [p for p in model.parameters() if p.requires_grad]


def to_average(model: nn.Module) -> list[nn.Parameter]:
    """Those of `trained` whose mean with their start is the mean of the models' weights."""
    # Of an adapter it is B alone, which starts at 0: with the start's share s that is
    # W + (alpha / r) (1 - s) B A. A mean of A, too, would shrink it twice.
    of_adapters = {id(module.A) for module in model.modules() if isinstance(module, LoRALinear)}
    return [p for p in trained(model) if id(p) not in of_adapters]


def start_of(model: nn.Module) -> list[torch.Tensor]:
    """A copy of what `average` will need, taken before training."""
    return [p.detach().clone() for p in to_average(model)]


@torch.no_grad()
def average(model: nn.Module, start: list[torch.Tensor], share: float) -> None:
    """In place, (1 - share) learnt + share start (Wortsman et al. 2021, arXiv 2109.01903)."""
    # What few demonstrations taught a model has cost it skills of its start, and the mean of its
    # weights before and after keeps most of both.
    for parameter, before in zip(to_average(model), start):
        parameter.lerp_(before, share)


def with_head(base: nn.Module, random: bool = False) -> nn.Module:
    """What reward.load_reward("head", ...) would load, around the decoder of `base`: one score per
    token, at first 0; with `random`, what "random" would load, a head that starts anywhere."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):  # shapes without memory, for all that is replaced below
        model = AutoModelForTokenClassification.from_config(config)
    setattr(model, model.base_model_prefix, base.base_model)
    model.score = nn.Linear(model.score.in_features, 1, device=base.device, dtype=base.dtype)
    nn.init.zeros_(model.score.weight)
    nn.init.zeros_(model.score.bias)
    if random:
        nn.init.normal_(model.score.weight)
    return model.eval()  # no dropout


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """A float32 copy of `model` on the CPU, its adapters added into its weights."""
    # Rounded to bf16 the sum would lose most of what was learnt: an adapter's share of a weight is
    # far below bf16's 1/256.
    copies = {}
    for p in model.parameters():
        copies[id(p)] = nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
    plain = copy.deepcopy(model, copies).to("cpu", torch.float32)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoRALinear):
            module.base.weight += module.scale * module.B @ module.A
            plain.set_submodule(name, module.base)
    return plain


def save(model: nn.Module, folder) -> None:
    """The merged weights, which plain from_pretrained loads."""
    merged(model).save_pretrained(folder)
