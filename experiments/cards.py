"""What fits on which card: GB of weights, gradients, optimizer, activations, output matrix and sampling.

    python -m experiments.cards    the table of docs/speed.md

Arithmetic, and counts of what autograd keeps on the CPU under the autocast that runs on CUDA: nothing was measured on a
GPU. `rank` is --lora-rank: 0 trains all weights, in float32; else the base is frozen, in bf16 (--weights auto).
"""

import copy

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from engine import logprob, lora
from engine.memory import recompute_layers, weight_type

VOCABULARY = 151_936
SHAPES = {
    "Qwen2.5-0.5B": Qwen2Config(vocab_size=VOCABULARY, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-1.5B": Qwen2Config(vocab_size=VOCABULARY, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
}  # fmt: skip


def type_of_base(rank: int) -> torch.dtype:
    """float32 where all weights train, else bf16: what --weights auto is on CUDA."""
    return weight_type("auto", rank, torch.device("cuda"))


def empty_model(config, layers: int, dtype: torch.dtype):
    """A model of some layers of that shape and eight tokens. Its weights are whatever the memory held: nobody looks."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.layer_types, small.vocab_size = layers, ["full_attention"] * layers, 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    return model.to(dtype).to_empty(device="cpu")


def parameters(config, rank: int) -> tuple[int, int]:
    """(weights of the model, weights of one adapter), counted on a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(p.numel() for p in model.parameters()), sum(rank * (m.in_features + m.out_features) for m in matrices)


def state_bytes(config, rank: int = 0) -> int:
    """Weights, AdamW's two moments and gradients of policy and reward, and the frozen reference.

    Policy and reward never hold their gradients at the same time: each is cleared after its step.
    """
    full, adapter = parameters(config, rank)
    trained = 2 * (4 + 8) + 4 + 4  # twice weight and moments, once a gradient, the reference's weight
    return type_of_base(rank).itemsize * full + trained * adapter if rank else trained * full


def activation_bytes(config, rank: int, recomputed: bool, tokens: int) -> int:
    """What autograd keeps for backward of the layers, for `tokens` tokens with padding, under the autocast that runs on
    CUDA (its bf16 copies of float32 weights are kept, too). Counted on the CPU: as what two layers keep minus what one
    does, and for 16 and 32 tokens, with which it grows in a straight line. With gradient checkpointing, one layer at a
    time is kept whole."""
    few, more = ([kept_bytes(config, layers, rank, recomputed, n) for layers in (1, 2)] for n in (16, 32))
    few, more = few[1] - few[0], more[1] - more[0]  # of one layer
    kept = config.num_hidden_layers * (few + (more - few) * (tokens - 16) // 16)
    return kept + (activation_bytes(config, rank, False, tokens) // config.num_hidden_layers if recomputed else 0)


def kept_bytes(config, layers: int, rank: int, recomputed: bool, tokens: int) -> int:
    """What autograd keeps of a forward pass of a model with that many layers, its parameters not counted."""
    model = empty_model(config, layers, type_of_base(rank)).train()
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


def output_bytes(config, rank: int, tokens: int) -> int:
    """What logprob.expected_reward_sum and its backward take for `tokens` response tokens: two blocks of logits, the policy's
    and the reward's, what autograd keeps of a strip of them, and the output matrix's gradient, if it trains. All float32."""
    block = 2 * min(logprob.ROWS, tokens) + 8 * min(logprob.STRIP, tokens)  # rows of [N, V]
    piece = 0 if not rank else logprob.COLUMNS * config.hidden_size  # of a bf16 matrix, made float32
    gradient = 0 if rank else config.vocab_size * config.hidden_size
    hidden = 3 * tokens * config.hidden_size  # the policy's with their gradient, the reward's
    return 4 * (block * config.vocab_size + piece + gradient + hidden)


def cache_bytes(config, rank: int, tokens: int) -> int:
    """Keys and values of `tokens` tokens, prompts included, as policy.sample holds them: counted on the CPU under the
    autocast that runs on CUDA. One layer more, for the layer that is being made longer is there twice."""
    decoder = empty_model(config, 1, type_of_base(rank)).get_decoder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer = decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values.layers[0]
    return (layer.keys.nbytes + layer.values.nbytes) * (config.num_hidden_layers + 1) * tokens


def sampling_bytes(config, rank: int, rows: int, tokens: int) -> int:
    """policy.sample of `rows` rows of at most `tokens` tokens at once: the cache, and logits, log-probabilities,
    probabilities and their running sum, [rows, V] each, in float32; of a bf16 output matrix, a float32 copy."""
    copy_of_matrix = 4 * config.vocab_size * config.hidden_size if rank else 0
    return cache_bytes(config, rank, rows * tokens) + 4 * 4 * rows * config.vocab_size + copy_of_matrix


def main() -> None:
    rows, sampled, prompt, response = 2, 512, 150, 400
    print(f"GB of policy, reward and reference with AdamW; of a micro-batch of {rows} rows of {prompt} + {response} tokens;")
    print(f"and of --sample-rows {sampled} of that length. Training and sampling take turns: the larger of them counts.")
    print("Arithmetic and counts, not measured on a GPU; CUDA and its allocator take 1 to 2 GB more.\n")
    print("| | states | layers | layers, --gradient-checkpointing | output matrix | sampling | together "
          "| with checkpointing and 64 rows sampled at once |")  # fmt: skip
    print("| --- |" + " ---: |" * 7)
    for name, config in SHAPES.items():
        for label, rank in (("all weights", 0), ("--lora-rank 16", 16)):
            state, output = state_bytes(config, rank), output_bytes(config, rank, rows * response)
            layers, recomputed = (activation_bytes(config, rank, c, rows * (prompt + response)) for c in (False, True))
            many, few = (sampling_bytes(config, rank, count, prompt + response) for count in (sampled, 64))
            cells = (state, layers, recomputed, output, many, state + max(layers + output, many),
                     state + max(recomputed + output, few))  # fmt: skip
            print(f"| {name}, {label} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
