"""What training takes, and how to need less of it. (Adapters, which save most, are in lora.py.)

    1. recompute_layers keep each layer's input only, and compute the rest again in backward
    2. MasterAdamW      bf16 weights that take float32 steps
    3. micro_batches    rows of one length together, as many as a budget of tokens allows
    4. what fits        the arithmetic: weights, gradients, optimizer, activations, output matrix, sampling

None of the first three changes a gradient beyond rounding; tests/test_memory.py compares. (Checkpoints of a run, from
which it is resumed, are another thing: checkpoint.py. What the literature calls gradient checkpointing is 1.)

Run `python -m engine.memory` for the table of what fits on which card.
"""

import copy
import math

import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import logprob, lora

# ---------------------------------------------------------------------------------------------------------------
# 1. Activations
# ---------------------------------------------------------------------------------------------------------------


def recompute_layers(model) -> None:
    """Gradient checkpointing. From now on `model` keeps only each layer's input for backward, and runs the
    layer again there (Chen et al. 2016, arXiv 1604.06174): a third more time for a fraction of the memory.

    transformers checkpoints layers in training mode alone. That is set on the layer itself, not on what is inside it,
    so that the reward, which stays in evaluation mode, has no dropout here either.
    """
    # the name since transformers 5.2x, and the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def recomputes(model) -> bool:
    """Will the next forward pass be checkpointed? transformers then drops the cache of keys and values."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------
# 2. Weights in bf16
# ---------------------------------------------------------------------------------------------------------------


def weight_type(weights: str, lora_rank: int, device: torch.device) -> torch.dtype:
    """--weights auto is bf16 for a frozen base on CUDA, float32 for all that trains.

    >>> weight_type("auto", 16, torch.device("cuda")), weight_type("auto", 0, torch.device("cuda"))
    (torch.bfloat16, torch.float32)
    """
    if weights == "auto":
        weights = "bf16" if lora_rank and device.type == "cuda" else "float32"
    return {"bf16": torch.bfloat16, "float32": torch.float32}[weights]


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) without weight decay, for weights of any float type.

    bf16 keeps 8 binary digits: 0.02 - 1e-6 is 0.02 again, and a step of 1e-6 is lost. So the step is taken by a float32
    copy, the master, and the weight is the master rounded. Let gradients add up in float32, too: policy.make_optimizer.
    """

    def __init__(self, parameters, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
            for weight in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[weight], weight.grad.float()
                if not state:
                    state |= dict(step=0, master=weight.float().clone(), mean=torch.zeros_like(gradient),
                                  square=torch.zeros_like(gradient))  # fmt: skip
                state["step"] += 1
                state["mean"].lerp_(gradient, 1 - beta1)  # m = beta1 m + (1 - beta1) g
                state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                size = lr / (1 - beta1 ** state["step"])  # both moments start at 0 and are too small at first
                spread = (state["square"].sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(eps)
                state["master"].addcdiv_(state["mean"], spread, value=-size)
                weight.copy_(state["master"])

    @torch.no_grad()
    def read_again(self) -> None:
        """The masters become what the weights are now."""
        for weight, state in self.state.items():
            state["master"].copy_(weight)

    def load_state_dict(self, state_dict: dict) -> None:
        """What a checkpoint kept. torch casts all states to their weights' type: masters in bf16 would be none."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for i, values in state_dict["state"].items():
            kept = {name: v.to(weights[i].device, copy=True) if torch.is_tensor(v) else v for name, v in values.items()}
            self.state[weights[i]] = kept


def read_again(optimizer: torch.optim.Optimizer) -> None:
    """After weights have been changed from outside: masters, where there are any, follow them."""
    optimizer = getattr(optimizer, "optim", optimizer)  # with several processes, this one's part of it
    if isinstance(optimizer, MasterAdamW):
        optimizer.read_again()


# ---------------------------------------------------------------------------------------------------------------
# 3. Micro-batches
# ---------------------------------------------------------------------------------------------------------------


def micro_batches(lengths: torch.Tensor, rows: int, tokens: int = 0) -> list[torch.Tensor]:
    """Row numbers, part by part; each row is in one part. `rows` at a time in their order; or, with tokens > 0, rows of
    similar length together, as many as have at most `tokens` tokens once they are padded to the longest.

    A single row that is longer than `tokens` is a part of its own.

    >>> micro_batches(torch.tensor([9, 3, 8, 2, 3]), rows=2)
    [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    >>> micro_batches(torch.tensor([9, 3, 8, 2, 3]), rows=2, tokens=10)
    [tensor([0]), tensor([2]), tensor([1, 4, 3])]
    """
    if not tokens:
        return list(torch.arange(len(lengths), device=lengths.device).split(rows)) if len(lengths) else []
    order = lengths.argsort(descending=True, stable=True)
    parts, sizes = [], lengths[order].tolist()
    start = 0
    while start < len(sizes):  # sizes[start] is the longest of its part
        count = max(1, tokens // max(1, sizes[start]))
        parts.append(order[start : start + count])
        start += count
    return parts


# ---------------------------------------------------------------------------------------------------------------
# 4. What fits on which card
# ---------------------------------------------------------------------------------------------------------------

VOCABULARY = 151_936
SHAPES = {
    "Qwen2.5-0.5B": Qwen2Config(vocab_size=VOCABULARY, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-1.5B": Qwen2Config(vocab_size=VOCABULARY, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
}  # fmt: skip


def parameters(config, rank: int) -> tuple[int, int]:
    """(weights of the model, weights of one adapter), counted on a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(p.numel() for p in model.parameters()), sum(rank * (m.in_features + m.out_features) for m in matrices)


def state_bytes(config, rank: int = 0, weights: str = "float32", reference: bool = True) -> int:
    """Weights, AdamW's two moments, float32 gradients and masters of policy and reward, and the frozen reference.

    Policy and reward never hold their gradients at the same time: each is cleared after its step.
    """
    full, adapter = parameters(config, rank)
    kept = {"float32": 4, "bf16": 2}[weights]
    if rank:  # one base; two adapters of weight 4, moments 8; the gradient 4 of one of them; the reference's 4
        return kept * full + (2 * (4 + 8) + 4 + 4 * reference) * adapter
    master = 0 if weights == "float32" else 4
    return (2 * (kept + master + 8) + 4 + kept * reference) * full


def activation_bytes(config, rank: int, weights: str, recomputed: bool, tokens: int) -> int:
    """What autograd keeps for backward of the layers, for `tokens` tokens with padding, under the autocast that runs on
    CUDA (its bf16 copies of float32 weights are kept, too). Counted on the CPU: as what two layers keep minus what one
    does, and for 16 and 32 tokens, with which it grows in a straight line. With gradient checkpointing, one layer at a
    time is kept whole."""
    few, more = ([kept_bytes(config, layers, rank, weights, recomputed, n) for layers in (1, 2)] for n in (16, 32))
    few, more = few[1] - few[0], more[1] - more[0]  # of one layer
    kept = config.num_hidden_layers * (few + (more - few) * (tokens - 16) // 16)
    return kept + (activation_bytes(config, rank, weights, False, tokens) // config.num_hidden_layers if recomputed else 0)


def kept_bytes(config, layers: int, rank: int, weights: str, recomputed: bool, tokens: int) -> int:
    """What autograd keeps of a forward pass of a model with that many layers, its parameters not counted."""
    model = empty_model(config, layers, weight_type(weights, rank, torch.device("cpu"))).train()
    model = lora.adapt(model, rank, 32.0) if rank else model
    if recomputed:
        recompute_layers(model)
    constant, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in constant)


def empty_model(config, layers: int, dtype: torch.dtype):
    """A model of some layers of that shape and eight tokens. Its weights are whatever the memory held: nobody looks."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.layer_types, small.vocab_size = layers, ["full_attention"] * layers, 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    return model.to(dtype).to_empty(device="cpu")


def output_bytes(config, rank: int, weights: str, tokens: int) -> int:
    """What logprob.expected_reward_sum and its backward take for `tokens` response tokens, under CUDA's autocast: in bf16
    they go tile by tile, not by rows, and [N, V] is never held. What counts is the output matrix [V, H] itself. Of
    float32 matrices, the policy's and the reward's, there are bf16 copies (2 bytes each) until the policy's has its
    gradient (bf16). When these and the tiles are gone, the gradient becomes float32 to be added. A frozen matrix has none.
    """
    matrix = config.vocab_size * config.hidden_size
    rows, columns = logprob.tile_size(None, torch.device("cuda"))
    tiles = 6 * 4 * min(rows, tokens) * columns  # x, the reward's, exp, their products: float32
    copies, gradient = 2 * 2 * (weights == "float32"), 0 if rank else 2
    most = max((copies + gradient) * matrix + tiles, 3 * gradient * matrix)
    return most + 16 * tokens * config.hidden_size  # hidden states and their gradients


def cache_bytes(config, weights: str, tokens: int) -> int:
    """Keys and values of `tokens` tokens, prompts included, as policy.sample holds them: counted on the CPU under the
    autocast that runs on CUDA. One layer more, for the layer that is being made longer is there twice."""
    decoder = empty_model(config, 1, weight_type(weights, 0, torch.device("cpu"))).get_decoder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer = decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers[0]
    return (layer.keys.nbytes + layer.values.nbytes) * (config.num_hidden_layers + 1) * tokens


def sampling_bytes(config, weights: str, rows: int, tokens: int) -> int:
    """policy.sample of `rows` rows of at most `tokens` tokens at once: the cache, and logits, log-probabilities,
    probabilities and their running sum, [rows, V] each, in float32."""
    return cache_bytes(config, weights, rows * tokens) + 4 * 4 * rows * config.vocab_size


def main() -> None:
    rows, sampled, prompt, response = 2, 512, 150, 400
    print(f"GB of policy, reward and reference with AdamW; of a micro-batch of {rows} rows of {prompt} + {response} tokens;")
    print(f"and of --sample-rows {sampled} of that length. Training and sampling take turns: the larger of them counts.")
    print("Arithmetic and counts, not measured on a GPU; CUDA and its allocator take 1 to 2 GB more.\n")
    print("| | states | layers | layers, --gradient-checkpointing | output matrix | sampling | together "
          "| with checkpointing and 64 rows sampled at once |")  # fmt: skip
    print("| --- |" + " ---: |" * 7)
    for name, config in SHAPES.items():
        for label, rank, weights in (
            ("float32", 0, "float32"),
            ("--weights bf16", 0, "bf16"),
            ("--lora-rank 16", 16, "bf16"),
        ):
            state, output = state_bytes(config, rank, weights), output_bytes(config, rank, weights, rows * response)
            layers, recomputed = (
                activation_bytes(config, rank, weights, c, rows * (prompt + response)) for c in (False, True)
            )
            many, few = (sampling_bytes(config, weights, count, prompt + response) for count in (sampled, 64))
            cells = (state, layers, recomputed, output, many, state + max(layers + output, many),
                     state + max(recomputed + output, few))  # fmt: skip
            print(f"| {name}, {label} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
