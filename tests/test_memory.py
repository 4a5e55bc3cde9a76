"""memory.py: what saves memory changes no gradient, and no step is lost in bf16."""

import copy
from itertools import accumulate

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import data
import policy
import reward
from engine import checkpoint, loading, logprob, lora, memory


@pytest.fixture
def batch(shipped):
    return data.demonstration_batch(shipped[1], data.load_examples("words", "train", 8))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# checkpointing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointing_changes_no_gradient(shipped, batch, rank, monkeypatch):
    """Also where another adapter of the same base has run between forward and backward."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        base = copy.deepcopy(shipped[0])
        model = lora.adapt(base, rank, 8.0) if rank else base
        other = lora.adapt(base, rank, 8.0) if rank else None
        for parameter in (p for m in (model, other) if m is not None for p in m.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape)
        forwards = []
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))  # noqa: B023
        if checkpointed:
            memory.recompute_layers(model)
        loss = policy.sft_loss(model, batch) / batch.response_mask.sum()
        if other is not None:
            policy.token_logprobs(other, batch)
        before = len(forwards)
        loss.backward()
        assert (len(forwards) > before) == checkpointed  # it did run again
        results.append(gradients(model))
    assert results[0].abs().sum() > 0
    assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def test_a_checkpointed_reward_has_no_dropout(batch):
    model = reward.load_reward("head", loading.BASE)
    model.model.score.weight.data.normal_()
    expected = model.scores(batch)
    assert expected.abs().sum() > 0
    memory.recompute_layers(model.model)
    forwards = []
    model.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    scores = model.scores(batch)
    assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    before = len(forwards)
    scores.sum().backward()
    assert len(forwards) > before


# MasterAdamW ---------------------------------------------------------------------------------------------------


def test_in_float32_it_is_adamw():
    """The same gradients, of any size, with a rate that changes."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    optimizers = [memory.MasterAdamW([ours], lr=1e-2, betas=(0.9, 0.99)),
                  torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)]  # fmt: skip
    for step in range(20):
        ours.grad = torch.randn(3, 4) * 10.0 ** (step % 5 - 4)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            policy.set_rate(optimizer, 1e-2, step, 20)
            optimizer.step()
    assert (ours - torch.linspace(-1, 1, 12).view(3, 4)).abs().min() > 1e-3
    assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_bf16_weights_are_adamws_weights_rounded():
    """Steps of 1e-6 on weights near 0.5, where bf16 is 0.002 wide: none is lost, each weight is the rounded master."""
    start = torch.linspace(0.5, 0.9, 10)
    weight, exact = torch.nn.Parameter(start.bfloat16()), torch.nn.Parameter(start.bfloat16().float())
    weight.grad_dtype = torch.float32
    optimizers = [memory.MasterAdamW([weight], lr=1e-6), torch.optim.AdamW([exact], lr=1e-6, weight_decay=0.0)]
    for _ in range(5000):
        gradient = torch.randn(10) + 3.0
        weight.grad, exact.grad = gradient, gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = exact.detach() - start.bfloat16().float()
    assert (moved < -0.004).all()
    assert_close(optimizers[0].state[weight]["master"], exact.detach(), atol=1e-5, rtol=0)
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, optimizers[0].state[weight]["master"].bfloat16())
    lost = torch.nn.Parameter(start.bfloat16())  # what happens without a master
    optimizer = torch.optim.AdamW([lost], lr=1e-6, weight_decay=0.0)
    lost.grad = torch.ones(10).bfloat16()
    optimizer.step()
    assert torch.equal(lost, start.bfloat16())


def test_masters_come_back_from_a_checkpoint_as_they_were(tmp_path):
    """torch's own load_state_dict would round them to bf16, their weights' type."""
    results = []
    for resumed in (False, True):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.linspace(0.5, 0.9, 10).bfloat16())
        weight.grad_dtype = torch.float32
        optimizer = memory.MasterAdamW([weight], lr=1e-4)
        for step in range(10):
            if resumed and step == 5:
                checkpoint.save(tmp_path, {"optimizer": checkpoint.state_of(optimizer)})
                optimizer = memory.MasterAdamW([weight], lr=1.0)
                checkpoint.restore(optimizer, checkpoint.load(tmp_path)[0]["optimizer"])
            weight.grad = torch.randn(10)
            optimizer.step()
        results.append(optimizer.state[weight]["master"])
        assert results[-1].dtype == torch.float32
    assert torch.equal(*results) and not torch.equal(results[0], results[0].bfloat16().float())


def test_gradients_of_bf16_weights_add_up_in_float32():
    model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    policy.make_optimizer(model, 1.0)
    for part in (1.0, *[0.001] * 100):  # in bf16, 1 + 0.001 is 1
        (model.weight * part).sum().backward()
    assert_close(model.weight.grad, torch.tensor([[1.1]]), atol=1e-3, rtol=0)


def test_a_model_in_bf16_learns(shipped, batch):
    model, _ = loading.load_policy(loading.BASE, dtype=torch.bfloat16)
    optimizer = policy.make_optimizer(model, 3e-4)
    assert isinstance(optimizer, memory.MasterAdamW)
    losses = []
    for _ in range(20):
        losses.append(policy.accumulate(lambda rows: policy.sft_loss(model, batch[rows]),
                                        memory.micro_batches(batch.lengths, 4), float(batch.response_mask.sum())))  # fmt: skip
        policy.optimizer_step(optimizer, losses[-1])
    assert losses[-1] < 0.7 * losses[0]
    assert isinstance(policy.make_optimizer(shipped[0], 1e-3), torch.optim.AdamW)


# micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 60, 200, 10**6])
def test_each_row_is_in_one_part_and_parts_keep_the_budget(tokens):
    lengths = torch.randint(1, 70, (50,), generator=torch.Generator().manual_seed(1))
    parts = memory.micro_batches(lengths, 8, tokens)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(50))
    for part in parts:
        padded = len(part) * int(lengths[part].max())
        assert len(part) == 1 or (padded <= tokens if tokens else len(part) <= 8)
    if tokens == 200:  # and no part but the last had room for one row more
        assert all((len(part) + 1) * int(lengths[part].max()) > 200 for part in parts[:-1])
    assert memory.micro_batches(lengths[:0], 8, tokens) == []


def test_a_budget_of_tokens_pads_less():
    lengths = torch.tensor([400, 30, 390, 20, 50, 410, 40, 60])
    padded = lambda parts: sum(len(p) * int(lengths[p].max()) for p in parts)
    assert padded(memory.micro_batches(lengths, 2)) == 2 * (400 + 390 + 410 + 60)
    assert padded(memory.micro_batches(lengths, 2, 820)) == 2 * 410 + 2 * 390 + 4 * 50


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
def test_a_budget_of_tokens_changes_no_gradient(shipped, batch, tokens):
    results = []
    for parts in ([torch.arange(8)], memory.micro_batches(batch.lengths, 8, tokens)):
        model = copy.deepcopy(shipped[0]).double()
        loss_of_rows = lambda rows, model=model: policy.sft_loss(model, batch[rows])
        loss = policy.accumulate(loss_of_rows, parts, float(batch.response_mask.sum()))
        results.append((loss, gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-6)


def test_chunks_put_values_where_they_belong(shipped, batch):
    aligned = torch.arange(batch.tokens.numel()).view(batch.tokens.shape).float() * batch.response_mask
    for tokens in (0, 1, 100):
        found = policy.in_chunks(lambda part, a: a + part.tokens, batch, 3, aligned, tokens=tokens)
        assert torch.equal(found * batch.response_mask, (aligned + batch.tokens) * batch.response_mask)


@pytest.mark.parametrize("loss", ["bce", "bt"])
@pytest.mark.parametrize("tokens", [1, 400])
def test_a_budget_of_tokens_changes_no_discriminator_gradient(shipped, loss, tokens):
    import random

    model, tokenizer = shipped
    experts = data.load_examples("words", "train", 5)
    rollouts = [[data.response_ids(tokenizer, "1+1=2\n" * (1 + i + g)) for g in range(2)] for i in range(5)]
    comparison = reward.compare(tokenizer, experts, rollouts, 1, random.Random(0))
    parts = reward.expert_parts(comparison, 8, tokens)
    assert len(parts) > 1 and torch.equal(torch.cat(parts).sort().values, torch.arange(5))
    results = []
    for micro_tokens in (0, tokens):
        reward_model = reward.load_reward("likelihood", loading.BASE)
        ends = reward.step_end_tokens(tokenizer, len(tokenizer))
        discriminator = reward.Discriminator(reward_model, "airl", "dense", 0, ends)
        optimizer = torch.optim.SGD(reward_model.parameters(), lr=1.0)
        metrics = reward.update(discriminator, optimizer, model, comparison, loss, 0.1, 0.5, micro_batch=1000,
                                micro_tokens=micro_tokens)  # fmt: skip
        results.append((metrics, torch.cat([p.detach().flatten() for p in reward_model.parameters()])))
    assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-5)
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)


# what fits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_config():
    config = copy.deepcopy(memory.SHAPES["Qwen2.5-0.5B"])
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 160, 96
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    config.num_attention_heads, config.head_dim = 4, 16
    return config


@pytest.mark.parametrize("rank, weights", [(0, "float32"), (0, "bf16"), (4, "bf16")])
def test_the_states_are_those_that_an_iteration_holds(small_config, rank, weights):
    """Counted after a step of real optimizers: every tensor once, and the gradients of one model."""
    base = AutoModelForCausalLM.from_config(small_config).to(memory.weight_type(weights, rank, torch.device("cpu")))
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
    expected = memory.state_bytes(small_config, rank, weights)
    assert sum(v.nbytes for v in held.values()) + gradient == expected


@pytest.mark.parametrize("weights", ["float32", "bf16"])
def test_the_cache_is_counted_as_the_sampler_holds_it(small_config, weights):
    model = AutoModelForCausalLM.from_config(small_config).to(memory.weight_type(weights, 0, torch.device("cpu")))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(input_ids=torch.zeros(5, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.cache_bytes(small_config, weights, 5 * 7) == held * 4 // 3  # one layer more than three


@pytest.mark.parametrize("rank, weights, recomputed", [(0, "float32", False), (0, "float32", True), (4, "bf16", False)])
def test_activations_are_counted_right_from_few_tokens(small_config, rank, weights, recomputed):
    """At 100 tokens: what all three layers keep, beyond what the rest of the model does."""
    kept = [memory.kept_bytes(small_config, layers, rank, weights, recomputed, 100) for layers in (1, 3)]
    one = memory.activation_bytes(small_config, rank, weights, False, 100) // 3 if recomputed else 0
    found = memory.activation_bytes(small_config, rank, weights, recomputed, 100) - one
    assert found == pytest.approx((kept[1] - kept[0]) * 3 / 2, rel=0.01) and found > 0


def peak_bytes(function) -> int:
    """The most that the CPU's tensors held at once while function() ran, beyond what they held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("rank, weights", [(0, "float32"), (0, "bf16"), (4, "bf16")])
def test_the_output_matrix_takes_what_is_said(rank, weights, monkeypatch):
    """The exact policy loss and its backward, with a vocabulary so large that [N, V] alone would be several times more."""
    V, H, N = 40_000, 128, 2000
    monkeypatch.setattr(logprob, "tile_size", lambda *_: (512, 1024))
    dtype = memory.weight_type(weights, 0, torch.device("cpu"))
    matrices = [torch.nn.Parameter(torch.randn(V, H).to(dtype), requires_grad=not rank) for _ in range(2)]
    if not rank:
        matrices[0].grad_dtype = torch.float32
        matrices[0].grad = torch.zeros(V, H)  # of an earlier micro-batch: counted among the states
    hidden, reward_hidden = torch.randn(2, N, H)
    hidden.requires_grad_()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = logprob.expected_reward_sum(hidden, matrices[0], reward_hidden, matrices[1].detach(), 0.1)
        loss.backward()

    config = copy.copy(memory.SHAPES["Qwen2.5-0.5B"])
    config.vocab_size, config.hidden_size = V, H
    expected = memory.output_bytes(config, rank, weights, N)
    assert 0.7 * expected < peak_bytes(step) < 1.1 * expected < 4 * N * V
