"""lora.py: the adapter's equation, one base in memory for several models, and ordinary models on
the disk."""

import copy

import pytest
import torch
from conftest import demonstrations, sft_loss
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import data
import policy
import reward
from engine import loading, lora
from engine.errors import UserError


@pytest.fixture
def base(shipped):
    return copy.deepcopy(shipped[0])  # adapt() freezes it


@pytest.fixture
def batch(shipped):
    return demonstrations(shipped[1], data.load_examples("words", "train", 4))


def disturbed(model, seed=1):
    """The model with its adapters (and head) away from their start, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_the_equation():
    layer = lora.LoRALinear(nn.Linear(5, 3), rank=2, alpha=6.0)
    layer.B.data.normal_()
    x = torch.randn(4, 5)
    assert_close(
        layer(x), x @ (layer.base.weight + 6.0 / 2 * layer.B @ layer.A).T + layer.base.bias
    )


def test_at_first_it_is_the_base(base, batch):
    expected = policy.token_logprobs(base, batch)
    model = lora.adapt(base, 4, 8.0)
    assert torch.equal(policy.token_logprobs(model, batch), expected)
    assert not torch.equal(policy.token_logprobs(disturbed(model), batch), expected)
    assert torch.equal(policy.token_logprobs(base, batch), expected)  # the reference has no adapter


def test_every_matrix_of_every_layer_and_nothing_else_is_adapted(base):
    model = lora.adapt(base, 4, 8.0)
    layers = [name for name, module in model.named_modules() if isinstance(module, lora.LoRALinear)]
    assert len(layers) == 7 * base.config.num_hidden_layers  # q k v o, gate up down
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"A", "B"}


def test_only_the_adapters_get_a_gradient(base, batch):
    model = disturbed(lora.adapt(base, 4, 8.0))
    sft_loss(model, batch).backward()
    for parameter in model.parameters():
        has_one = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has_one == parameter.requires_grad
    assert all(parameter.grad is None for parameter in base.parameters())


def test_one_base_in_memory(base):
    """Policy, reward and reference hold the same frozen tensors: one base and two adapters."""
    models = [base, lora.adapt(base, 4, 8.0), lora.adapt(base, 4, 8.0)]
    pointers = []
    for model in models:
        pointers.append({p.data_ptr() for p in model.parameters() if not p.requires_grad})
    # Of the last norm each has a copy, a buffer.
    norm = base.base_model.norm.weight
    assert pointers[0] - {norm.data_ptr()} == pointers[1] == pointers[2]
    # Tied stays tied.
    assert models[1].get_output_embeddings().weight is base.get_input_embeddings().weight
    adapter = sum(p.numel() for p in trained(models[1]))
    together = {p.data_ptr(): p.numel() for model in models for p in model.parameters()}
    assert sum(together.values()) == sum(p.numel() for p in base.parameters()) + 2 * adapter
    matrices = [m for m in base.base_model.modules() if isinstance(m, nn.Linear)]
    assert adapter == sum(4 * (m.in_features + m.out_features) for m in matrices)


def test_two_adapters_are_independent(base, batch):
    first, second = (lora.adapt(base, 4, 8.0) for _ in range(2))
    before = policy.token_logprobs(second, batch).detach()
    optimizer = policy.make_optimizer(first, 1e-2)
    sft_loss(first, batch).backward()
    policy.optimizer_step(optimizer, 0.0)
    assert all(p.grad is None for p in trained(second))
    assert torch.equal(policy.token_logprobs(second, batch), before)
    assert not torch.equal(policy.token_logprobs(first, batch), before)


def test_training_lowers_the_loss(base, batch):
    model = lora.adapt(base, 4, 8.0)
    optimizer = policy.make_optimizer(model, 3e-3)
    losses = []
    for _ in range(20):
        loss = sft_loss(model, batch) / batch.response_mask.sum()
        losses.append(float(loss.detach()))
        loss.backward()
        policy.optimizer_step(optimizer, losses[-1])
    assert losses[-1] < 0.7 * losses[0]


def test_the_update_of_a_weight_has_at_most_the_adapters_rank(base):
    plain = lora.merged(disturbed(lora.adapt(base, 3, 8.0)))
    before_by_name = dict(base.base_model.named_parameters())
    for name, after in plain.base_model.named_parameters():
        before = before_by_name[name]
        changed = not torch.equal(after, before)
        assert changed == (name.endswith("_proj.weight")), name
        if changed:
            values = torch.linalg.svdvals((after - before).double())
            assert values[2] > 1e-3 * values[0] and values[3] < 1e-5 * values[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_an_ordinary_one(batch, tmp_path, dtype):
    """from_pretrained, which knows nothing of adapters, loads the merged weights; the shared base
    is left as it was."""
    base = loading.load_policy(loading.BASE, dtype=dtype)[0]
    before = [p.clone() for p in base.parameters()]
    model = disturbed(lora.adapt(base, 4, 8.0))
    lora.save(model, tmp_path)
    for parameter, value in zip(base.parameters(), before):
        assert torch.equal(parameter, value) and parameter.dtype == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert loaded.dtype == torch.float32
    assert dict(loaded.named_parameters()).keys() == dict(base.named_parameters()).keys()
    exact = policy.token_logprobs(model.float(), batch)  # bf16 weights too, in float32 arithmetic
    assert_close(policy.token_logprobs(loaded, batch), exact, atol=1e-4, rtol=0)


def test_a_bf16_base_has_float32_adapters(base, batch):
    base.to(torch.bfloat16)
    model = disturbed(lora.adapt(base, 4, 8.0))
    assert all(p.dtype == torch.float32 for p in trained(model))
    sft_loss(model, batch).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_shares_the_base_too(batch, tmp_path, dtype):
    base = loading.load_policy(loading.BASE, dtype=dtype)[0]
    head = lora.with_head(base)
    assert not head(batch.tokens).logits.any()
    model = lora.adapt(head, 4, 8.0)
    pointers = {p.data_ptr() for p in base.parameters()}
    assert all(p.requires_grad or p.data_ptr() in pointers for p in model.parameters())
    assert model.score.weight.requires_grad
    assert all(p.dtype == torch.float32 for p in trained(model))
    disturbed(model)
    reward.HeadReward(model).eval().scores(batch).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model))
    lora.save(model, tmp_path)
    close = {"atol": 1e-4, "rtol": 1e-4}
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert_close(loaded(batch.tokens).logits, model.float()(batch.tokens).logits, **close)
    again = reward.load_reward("head", str(tmp_path))
    assert_close(again.scores(batch), reward.HeadReward(model).scores(batch), **close)


def test_a_model_without_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="--lora-rank 0"):
        lora.adapt(model, 2, 4.0)


def test_sampling_agrees_with_scoring(base, shipped):
    model = disturbed(lora.adapt(base, 4, 2.0))
    tokenizer = shipped[1]
    examples = data.tokenize(tokenizer, data.load_examples("words", "test", 4))
    prompts = [example.prompt for example in examples]
    rollout = policy.sample(model, prompts, (tokenizer.eos_token_id,), 32, group=2)
    with torch.no_grad():
        expected = policy.token_logprobs(model, rollout.batch)
    assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)
