"""Low-rank adapters: one frozen base serves as policy, as reward and as reference (LoRA, Hu et al. 2021, arXiv 2106.09685).

    1. LoRALinear          W x + (alpha / r) B A x; W is frozen, A [r, in] and B [out, r] are trained
    2. adapt, trained      a model with an adapter of its own, whose frozen weights *are* the base's tensors
    3. with_head           the paper's reward head on a base, sharing it too
    4. merged, save        W + (alpha / r) B A as an ordinary model, which plain from_pretrained loads

Full fine-tuning of policy and reward holds each of them four times in float32: weights, gradients, AdamW's two moments.
An adapter of rank r trains r (in + out) numbers per matrix instead of in * out, and the base is there once, in bf16:

    base = loading.load_policy("Qwen2.5-0.5B", "cuda", torch.bfloat16)[0]
    policy_model, reward_model = adapt(base, 16, 32), adapt(base, 16, 32)     # the same base, adapters of their own
    reference = share(policy_model)                                           # and this one's adapter as it is now

These are three trees of modules. Nothing is switched on and off between them, so gradient checkpointing, which runs a
model's forward pass once more in the middle of backward, cannot meet the wrong adapter.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForTokenClassification

from engine.errors import UserError


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A x: [.., in] -> [.., out] (equation 3 of the paper).

    B starts at 0, so at first the model is its base. A starts at random (Kaiming), or no gradient would ever reach B.
    A and B are float32 whatever W is: they take steps that bf16 would round away. Their products are in x's type.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        A = torch.empty(rank, base.in_features, dtype=torch.float32)  # on the CPU: the same start on every device
        nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)  # as nn.Linear's: uniform within 1 / sqrt(in)
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * linear(linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The base's layer itself, its weight now W + (alpha / r) B A: not for a layer that is shared."""
        self.base.weight += (self.scale * self.B @ self.A).to(self.base.weight)
        return self.base


ALPHA = 32.0  # an adapter's output counts ALPHA / rank times: customary


def adapt(base: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None) -> nn.Module:
    """A model that computes what `base` computes, plus an adapter on every attention and MLP matrix. All that is frozen
    is `base`'s own tensors, not copies: it freezes `base`. Embeddings and output matrix, often one, have no adapter. A head
    (with_head) keeps its own weights, trained in full, in float32. The last norm's weight is not trained, but a copy, for
    policy.divide_logits. `generator` (a CPU's) draws every A.
    """
    if rank < 1:
        raise UserError(f"an adapter's rank must be at least 1, not {rank}")
    base.base_model.requires_grad_(False)
    if base.get_output_embeddings() is not None:
        base.get_output_embeddings().requires_grad_(False)
    model = share(base)
    norm = getattr(model.base_model, "norm", None)
    if norm is not None:  # a buffer: no parameter, so that it is not taken for the base's; in state_dict as before
        weight = norm.weight.detach().clone()
        del norm.weight
        norm.register_buffer("weight", weight)
    if hasattr(model, "score"):  # float32 whatever the base is, as all that trains
        model.score.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    matrices = [(name, module) for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    if not matrices:
        raise UserError(f"no nn.Linear in a {type(base).__name__}: LoRA has nothing to adapt, train with --lora-rank 0")
    for name, matrix in matrices:
        model.base_model.set_submodule(name, LoRALinear(matrix, rank, alpha, generator))
    return model


def share(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules around the very same frozen parameters; what trains is copied."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)  # its memo, {id: copy}: these are their own copies


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer moves: all parameters, or adapters (and a head)."""
    return [p for p in model.parameters() if p.requires_grad]


def to_average(model: nn.Module) -> list[nn.Parameter]:
    """Those of `trained` whose mean with their start is the mean of the models' weights. Of an adapter it is B alone, which
    starts at 0: with the start's share s that is W + (alpha / r) (1 - s) B A, and a mean of A too would shrink it twice."""
    of_adapters = {id(module.A) for module in model.modules() if isinstance(module, LoRALinear)}
    return [p for p in trained(model) if id(p) not in of_adapters]


def start_of(model: nn.Module) -> list[torch.Tensor]:
    """A copy of what `average` will need, taken before training."""
    return [p.detach().clone() for p in to_average(model)]


@torch.no_grad()
def average(model: nn.Module, start: list[torch.Tensor], share: float) -> None:
    """In place, (1 - share) learnt + share start. What few demonstrations taught a model has cost it skills of its start, and
    the mean of its weights before and after keeps most of both (Wortsman et al. 2021, arXiv 2109.01903)."""
    for parameter, before in zip(to_average(model), start):
        parameter.lerp_(before, share)


def with_head(base: nn.Module, random: bool = False) -> nn.Module:
    """What reward.load_reward("head", ...) would load, around the decoder of `base`: one score per token, at first 0; with
    `random`, what "random" would load, a head that starts anywhere."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):  # shapes without memory, for all that is replaced below
        model = AutoModelForTokenClassification.from_config(config)
    setattr(model, model.base_model_prefix, base.base_model)
    model.score = nn.Linear(model.score.in_features, 1, device=base.device, dtype=base.dtype)
    (nn.init.normal_ if random else nn.init.zeros_)(model.score.weight)
    nn.init.zeros_(model.score.bias)
    return model.eval()  # no dropout


def merged(model: nn.Module) -> nn.Module:
    """A float32 copy of `model` on the CPU, its adapters added into its weights. Rounded to bf16 the sum would lose
    most of what was learnt: an adapter's share of a weight is far below bf16's 1/256."""
    copies = {id(p): nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in model.parameters()}
    plain = copy.deepcopy(model, copies).to("cpu", torch.float32)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoRALinear):
            plain.set_submodule(name, module.merge())
    return plain


def save(model: nn.Module, folder) -> None:
    """save_pretrained; of a model with adapters, the merged weights. Either way plain from_pretrained loads it."""
    adapted = any(isinstance(module, LoRALinear) for module in model.modules())
    (merged(model) if adapted else model).save_pretrained(folder)
