"""memory.py: what saves memory changes no gradient."""

import copy
import random

import pytest
import torch
from conftest import demonstrations, discriminator_update, examples_of, sft_loss
from torch.testing import assert_close

import data
import policy
import reward
from engine import loading, lora, memory


@pytest.fixture
def batch(shipped):
    return demonstrations(shipped[1], data.load_examples("words", "train", 8))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# Checkpointing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointing_changes_no_gradient(shipped, batch, rank, monkeypatch):
    """Also where another adapter of the same base has run between forward and backward."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        base = copy.deepcopy(shipped[0])
        model = base
        other = None
        if rank:
            model, other = (lora.adapt(base, rank, 8.0) for _ in range(2))
            for parameter in (*lora.trained(model), *lora.trained(other)):
                parameter.data += 0.1 * torch.randn(parameter.shape)
        forwards = []
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))  # noqa: B023
        if checkpointed:
            memory.recompute_layers(model)
        loss = sft_loss(model, batch) / batch.response_mask.sum()
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


# Micro-batches ------------------------------------------------------------------------------------


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
        mean_loss = 0.0
        for rows in parts:
            loss = sft_loss(model, batch[rows]) / batch.response_mask.sum()
            loss.backward()
            mean_loss += float(loss.detach())
        results.append((mean_loss, gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-6)


def test_chunks_put_values_where_they_belong(shipped, batch):
    mask = batch.response_mask
    aligned = torch.arange(batch.tokens.numel()).view(batch.tokens.shape).float() * mask
    for tokens in (0, 1, 100):
        summed = policy.in_chunks(lambda part, a: a + part.tokens, batch, 3, tokens, aligned)
        assert torch.equal(summed * mask, (aligned + batch.tokens) * mask)


@pytest.mark.parametrize("tokens", [1, 400])
def test_a_budget_of_tokens_changes_no_discriminator_gradient(shipped, tokens):
    model, tokenizer = shipped
    experts = examples_of(tokenizer, "words", "train", 5)
    rollouts = []
    for i in range(5):
        texts = ["1+1=2\n" * (1 + i + g) for g in range(2)]
        rollouts.append([data.response_ids(tokenizer, text) for text in texts])
    comparison = reward.compare(tokenizer, experts, rollouts, 1, random.Random(0))
    assert len(memory.micro_batches(comparison.batch.lengths, 8, tokens)) > 1
    weights = []
    for micro_tokens in (0, tokens):
        reward_model = reward.load_reward("likelihood", loading.BASE)
        discriminator = reward.make_discriminator(reward_model, tokenizer)
        optimizer = torch.optim.SGD(reward_model.parameters(), lr=1.0)
        inputs = (discriminator, optimizer, model, comparison)
        discriminator_update(*inputs, reward_nll=0.5, micro_tokens=micro_tokens)
        weights.append(torch.cat([p.detach().flatten() for p in reward_model.parameters()]))
    assert_close(weights[1], weights[0], atol=1e-6, rtol=1e-5)
