"""experiments/cards.py: what is counted and reckoned is what real models, optimizers and caches hold."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import logprob
import policy
from engine import lora
from experiments import bench, cards


@pytest.fixture
def small_config():
    config = copy.deepcopy(cards.SHAPES["Qwen2.5-0.5B"])
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 160, 96
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    config.num_attention_heads, config.head_dim = 4, 16
    return config


@pytest.mark.parametrize("rank", [0, 4])
def test_the_states_are_those_that_an_iteration_holds(small_config, rank):
    """Counted after a step of real optimizers: every tensor once, and the gradients of one model."""
    base = AutoModelForCausalLM.from_config(small_config).to(cards.type_of_base(rank))
    models = [lora.adapt(base, rank, 8.0) if rank else copy.deepcopy(base) for _ in range(2)]
    held = {}
    for model in models:
        optimizer = policy.make_optimizer(model, 1e-3)
        gradient = 0
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
        for p in lora.trained(model):
            gradient += p.grad.nbytes
        policy.optimizer_step(optimizer, 0.0)
        for values in optimizer.state.values():
            held |= {v.data_ptr(): v for v in values.values() if torch.is_tensor(v) and v.ndim}
    reference = lora.share(models[0]) if rank else base
    held |= {p.data_ptr(): p for model in (*models, base, reference) for p in model.parameters()}
    expected = cards.state_bytes(small_config, rank)
    assert sum(v.nbytes for v in held.values()) + gradient == expected


@pytest.mark.parametrize("rank", [0, 4])
def test_the_cache_is_counted_as_the_sampler_holds_it(small_config, rank):
    model = AutoModelForCausalLM.from_config(small_config).to(cards.type_of_base(rank))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(input_ids=torch.zeros(5, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cards.cache_bytes(small_config, rank, 5 * 7) == held * 4 // 3  # one layer more than three


@pytest.mark.parametrize("rank, recomputed", [(0, False), (0, True), (4, False)])
def test_activations_are_counted_right_from_few_tokens(small_config, rank, recomputed):
    """At 100 tokens: what all three layers keep, beyond what the rest of the model does."""
    kept = [cards.kept_bytes(small_config, layers, rank, recomputed, 100) for layers in (1, 3)]
    one = cards.activation_bytes(small_config, rank, False, 100) // 3 if recomputed else 0
    found = cards.activation_bytes(small_config, rank, recomputed, 100) - one
    assert found == pytest.approx((kept[1] - kept[0]) * 3 / 2, rel=0.01) and found > 0


@pytest.mark.parametrize("rank", [0, 4])
def test_the_output_matrix_takes_what_is_said(rank):
    """The exact policy loss and its backward, with a vocabulary so large that [N, V] alone would be several times more."""
    V, H, N = 40_000, 128, 4000
    dtype = cards.type_of_base(rank)
    matrices = [torch.nn.Parameter(torch.randn(V, H).to(dtype), requires_grad=not rank) for _ in range(2)]
    if not rank:
        matrices[0].grad = torch.zeros(V, H)  # of an earlier micro-batch: counted among the states
    hidden, reward_hidden = torch.randn(2, N, H)
    hidden.requires_grad_()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = logprob.expected_reward_sum(hidden, matrices[0], reward_hidden, matrices[1].detach(), 0.1)
        loss.backward()

    config = copy.copy(cards.SHAPES["Qwen2.5-0.5B"])
    config.vocab_size, config.hidden_size = V, H
    expected = cards.output_bytes(config, rank, N, "cpu")
    assert 0.7 * expected < bench.peak_bytes(step, "cpu") < 1.1 * expected < 4 * N * V
