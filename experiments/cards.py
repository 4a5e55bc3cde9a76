"""What fits on which card: GB of weights, gradients, optimizer, activations, output matrix, sampling.

    python -m experiments.cards    the table of docs/speed.md

Arithmetic, and counts of what autograd keeps on the CPU under the autocast that runs on CUDA.
`python -m experiments.bench` measures the same on a card. `rank` is --lora-rank: 0 trains all weights,
in float32; else the base is frozen, in bf16 (--weights auto).
"""

import copy

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import logprob
from engine import lora
from engine.memory import recompute_layers, weight_type

VOCABULARY = 151_936


def shape(width: int, inner: int, layers: int, heads: int) -> Qwen2Config:
    """A member of the Qwen2.5 family."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


SHAPES = {"Qwen2.5-0.5B": shape(896, 4864, 24, 14), "Qwen2.5-1.5B": shape(1536, 8960, 28, 12)}
ROWS = 2  # of a micro-batch, each of PROMPT + RESPONSE tokens
PROMPT = 150
RESPONSE = 400


def type_of_base(rank: int) -> torch.dtype:
    """float32 where all weights train, else bf16: what --weights auto is on CUDA."""
    return weight_type("auto", rank, torch.device("cuda"))


def empty_model(config, layers: int, dtype: torch.dtype):
    """A model of some layers and eight tokens. Its weights are whatever the memory held."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    small.layer_types = ["full_attention"] * layers
    small.vocab_size = 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    return model.to(dtype).to_empty(device="cpu")


def parameters(config, rank: int) -> tuple[int, int]:
    """(weights of the model, weights of one adapter), counted on a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = 0
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            adapter += rank * (module.in_features + module.out_features)
    return sum(p.numel() for p in model.parameters()), adapter


def state_bytes(config, rank: int = 0) -> int:
    """Weights, AdamW's two moments and gradients of policy and reward, and the frozen reference.

    Policy and reward never hold their gradients at the same time: each is cleared after its step.
    """
    full, adapter = parameters(config, rank)
    trained = (
        2 * (4 + 8) + 4 + 4
    )  # twice weight and moments, once a gradient, the reference's weight
    if rank:
        return type_of_base(rank).itemsize * full + trained * adapter
    return trained * full


def activation_bytes(config, rank: int, recomputed: bool, tokens: int) -> int:
    """What autograd keeps of the layers for backward, for `tokens` tokens with padding, under the
    autocast that runs on CUDA (with its bf16 copies of float32 weights).

    One layer's share is what two layers keep minus what one does; it is counted for 16 and 32 tokens,
    and grows in a straight line. With gradient checkpointing one layer at a time is kept whole.
    """

    def of_one_layer(count: int) -> int:
        one, two = (kept_bytes(config, layers, rank, recomputed, count) for layers in (1, 2))
        return two - one

    few = of_one_layer(16)
    per_token = (of_one_layer(32) - few) // 16
    kept = config.num_hidden_layers * (few + per_token * (tokens - 16))
    if recomputed:
        kept += activation_bytes(config, rank, False, tokens) // config.num_hidden_layers
    return kept


def kept_bytes(config, layers: int, rank: int, recomputed: bool, tokens: int) -> int:
    """What autograd keeps of a forward pass of so many layers, parameters not counted."""
    model = empty_model(config, layers, type_of_base(rank)).train()
    if rank:
        model = lora.adapt(model, rank, 32.0)
    if recomputed:
        recompute_layers(model)
    constant = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in constant)


def output_bytes(config, rank: int, tokens: int, device: str = "cuda") -> int:
    """What logprob.expected_reward_sum and its backward take for `tokens` response tokens, in float32:
    a block of the policy's logits and one of the reward's, six of a strip, the gradient of the output
    matrix if it trains or its float32 copy if it is bf16, and hidden states."""
    V = config.vocab_size
    block = min(logprob.BLOCK, tokens * V)
    strip = min(logprob.STRIP[device], tokens * V)
    matrix = V * config.hidden_size
    hidden = 3 * tokens * config.hidden_size  # the policy's with their gradient, the reward's
    return 4 * (2 * block + 6 * strip + matrix + hidden)


def cache_bytes(config, rank: int, tokens: int) -> int:
    """Keys and values of `tokens` tokens, prompts included, as policy.sample holds them: counted on the
    CPU. One layer more, for the layer that is being made longer is there twice."""
    decoder = empty_model(config, 1, type_of_base(rank)).get_decoder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    layer = output.past_key_values.layers[0]
    return (layer.keys.nbytes + layer.values.nbytes) * (config.num_hidden_layers + 1) * tokens


def sampling_bytes(config, rank: int, rows: int, tokens: int) -> int:
    """policy.sample of `rows` rows of at most `tokens` tokens at once: the cache, and logits,
    log-probabilities, probabilities and their running sum, [rows, V] each, in float32; of a bf16
    output matrix, a float32 copy."""
    numbers = 4 * rows * config.vocab_size
    if rank:
        numbers += config.vocab_size * config.hidden_size
    return cache_bytes(config, rank, rows * tokens) + 4 * numbers


def main() -> None:
    tokens = ROWS * (PROMPT + RESPONSE)
    print(
        f"GB. A micro-batch is {ROWS} rows of {PROMPT} + {RESPONSE} tokens; 512 rows are sampled.\n"
    )
    print(
        "| | states | layers | layers, `--gradient-checkpointing` | output matrix | sampling "
        "| together | with checkpointing and `--sample-rows 64` |"
    )
    print("| --- |" + " ---: |" * 7)
    for name, config in SHAPES.items():
        for label, rank in (("all weights", 0), ("--lora-rank 16", 16)):
            state = state_bytes(config, rank)
            output = output_bytes(config, rank, ROWS * RESPONSE)
            layers = activation_bytes(config, rank, False, tokens)
            recomputed = activation_bytes(config, rank, True, tokens)
            many = sampling_bytes(config, rank, 512, PROMPT + RESPONSE)
            few = sampling_bytes(config, rank, 64, PROMPT + RESPONSE)
            together = state + max(layers + output, many)  # training and sampling take turns
            smallest = state + max(recomputed + output, few)
            cells = (state, layers, recomputed, output, many, together, smallest)
            numbers = " | ".join(f"{cell / 1e9:.1f}" for cell in cells)
            print(f"| {name}, {label} | {numbers} |")


if __name__ == "__main__":
    main()
