"""policy.py: sampling equals a forward pass; each loss equals what a hand or a plain loop computes."""

import copy
import math

import pytest
import torch
import transformers
from conftest import all_groups, demonstrations, sft_loss, true_gradient
from torch.testing import assert_close

import data
import policy
from engine import loading, memory, sampler
from engine.errors import UserError

MASK = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def prompts(shipped):
    return [data.prompt_ids(shipped[1], e.question) for e in data.load_examples("words", "test", 12)]


# sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_a_fresh_forward_pass(shipped, prompts, temperature):
    model, tokenizer = shipped
    rollout = policy.sample(model, prompts, (tokenizer.eos_token_id,), 64, group=3, temperature=temperature)
    fresh = policy.in_chunks(lambda b: policy.token_logprobs(model, b, temperature), rollout.batch, 5)
    assert_close(rollout.logprobs, fresh, atol=1e-4, rtol=0)
    assert rollout.finished.all() and (rollout.batch.lengths > rollout.batch.prompt_lengths).all()


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_sample_is_the_plain_loop(shipped, prompts, temperature, top_p):
    model, tokenizer = shipped
    ends = data.end_tokens(tokenizer, model)
    for prompt in prompts[:3]:
        how = (ends, 40)
        response, logprobs = policy.sample_plain(model, prompt, *how, temperature, top_p, torch.Generator().manual_seed(1))
        fast = policy.sample(model, [prompt], *how, 1, temperature, top_p, torch.Generator().manual_seed(1))
        assert fast.batch.response(0) == response
        assert_close(fast.logprobs[0, len(prompt) :], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)


def test_token_logprobs_are_those_of_the_plain_pass(shipped):
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    batch = demonstrations(tokenizer, data.load_examples("words", "train", 4))
    plain, fast = (score(model, batch, 0.7) for score in (policy.token_logprobs_plain, policy.token_logprobs))
    assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(fast.sum(), parameters), torch.autograd.grad(plain.sum(), parameters), strict=True):
        assert b.any() and (a - b).norm() <= 1e-4 * b.norm()


def test_sampling_and_training_agree_in_half_precision(shipped, prompts, monkeypatch):
    """Under bf16 autocast too, both take float32 logits of the same states. The layers are kept out of it: their roundings
    depend on how many tokens are read at once."""
    model, tokenizer = shipped
    decoder = model.get_decoder()
    exact = torch.autocast("cpu", enabled=False)(decoder.forward)
    monkeypatch.setattr(decoder, "forward", exact)
    monkeypatch.setattr(memory, "half_precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    rollout = policy.sample(model, prompts, (tokenizer.eos_token_id,), 64, 2, temperature=1.5)
    trained = policy.in_chunks(lambda b: policy.token_logprobs(model, b, 1.5), rollout.batch)
    assert_close(rollout.logprobs, trained, atol=1e-3, rtol=0)


def test_each_row_continues_its_own_prompt(shipped, prompts):
    model, tokenizer = shipped
    rollout = policy.sample(model, prompts, (tokenizer.eos_token_id,), 8, group=2, rows=6)  # several chunks
    for row in range(2 * len(prompts)):
        prompt = prompts[row // 2]
        assert rollout.batch.tokens[row, : len(prompt)].tolist() == prompt
        assert int(rollout.batch.prompt_lengths[row]) == len(prompt)


def test_greedy_equals_generate(shipped, prompts):
    model, tokenizer = shipped
    ours = policy.sample(model, prompts, (tokenizer.eos_token_id,), 64, temperature=0.0)
    for row, prompt in enumerate(prompts):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id,
                                attention_mask=torch.ones(1, len(prompt), dtype=torch.long), pad_token_id=1)  # fmt: skip
        assert ours.batch.response(row) == theirs[0, len(prompt) :].tolist()


def test_the_same_seed_gives_the_same_samples(shipped, prompts):
    model, tokenizer = shipped
    a, b = (
        policy.sample(model, prompts, (tokenizer.eos_token_id,), 16, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(a.batch.tokens, b.batch.tokens)


def test_length_limit_leaves_a_row_unfinished(shipped, prompts):
    model, tokenizer = shipped
    rollout = policy.sample(model, prompts, (tokenizer.eos_token_id,), 5)
    assert not rollout.finished.any() and (rollout.batch.response_mask.sum(1) == 5).all()


def test_room_in_the_cache_changes_nothing(shipped, prompts, monkeypatch):
    """Keys and values are those of transformers' own layers, however little room there is and whichever rows leave."""
    model, tokenizer = shipped
    rollouts = []
    for room in (None, 1, 7, 100):
        monkeypatch.setattr(sampler.RoomyLayer, "ROOM", room)
        if room is None:
            monkeypatch.setattr(sampler, "make_roomy", lambda cache: False)
        generator = torch.Generator().manual_seed(0)
        rollouts.append(policy.sample(model, prompts, (tokenizer.eos_token_id,), 64, 4, generator=generator))
        monkeypatch.undo()
    for rollout in rollouts[1:]:
        assert torch.equal(rollout.batch.tokens, rollouts[0].batch.tokens)
        assert_close(rollout.logprobs, rollouts[0].logprobs)


def test_the_cache_is_not_copied_at_every_token(shipped, prompts):
    """One copy per ROOM tokens: the memory the keys lie in stays where it is in between."""
    cache = shipped[0](torch.tensor(prompts[:1]), use_cache=True).past_key_values
    sampler.make_roomy(cache)
    places = []
    for _ in range(2 * sampler.RoomyLayer.ROOM):
        shipped[0](torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places)) == 2


def test_rows_may_end_with_the_first_token(shipped, prompts):
    """Some rows end at once, before the cache has grown; the others go on."""
    sample = lambda end, length: policy.sample(shipped[0], prompts, end, length, 4, temperature=4.0,
                                               generator=torch.Generator().manual_seed(0))  # fmt: skip
    first = [sample((-1,), 1).batch.response(row)[0] for row in range(4 * len(prompts))]
    end = max(set(first), key=first.count)
    rollout = sample((end,), 8)
    at_once = torch.tensor([token == end for token in first])
    assert 0.1 < at_once.float().mean() < 0.9
    lengths = rollout.batch.response_mask.sum(1)
    assert (lengths[at_once] == 1).all() and (lengths[~at_once] > 1).all()


def test_any_of_the_end_tokens_ends_a_row(shipped, prompts):
    sample = lambda ends, length: policy.sample(shipped[0], prompts, ends, length, 4, temperature=4.0,
                                                generator=torch.Generator().manual_seed(0))  # fmt: skip
    ends = tuple({sample((-1,), 1).batch.response(row)[0] for row in range(4 * len(prompts))})
    rollout = sample(ends, 8)
    assert len(ends) > 1 and rollout.finished.all() and (rollout.batch.response_mask.sum(1) == 1).all()


@pytest.mark.parametrize("every", [1, 8])
def test_how_often_we_look_who_has_ended_changes_no_greedy_trace(shipped, prompts, monkeypatch, every):
    model, tokenizer = shipped
    expected = policy.sample(model, prompts, (tokenizer.eos_token_id,), 64, temperature=0.0)
    monkeypatch.setattr(sampler, "LOOK_EVERY", {"cpu": every})
    found = policy.sample(model, prompts, (tokenizer.eos_token_id,), 64, temperature=0.0)
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert_close(found.logprobs, expected.logprobs)


def test_top_p_keeps_the_smallest_sufficient_set():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    drawn = policy.choose(logprobs, 1.0, 0.75).bincount(minlength=4) / 2000
    assert drawn[2:].sum() == 0 and abs(drawn[0] - 0.5 / 0.8) < 0.05  # 0.5 < 0.75 <= 0.5 + 0.3


def test_sampling_follows_the_probabilities():
    drawn = policy.choose(torch.tensor([[0.7, 0.2, 0.1]]).log().expand(5000, 3), 1.0, 1.0).bincount(minlength=3) / 5000
    assert_close(drawn, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn(monkeypatch):
    """Not even where the random number is 0, or as near to 1 as float32 allows."""
    logprobs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log()
    for u, expected in ((0.0, 1), (1 - 2**-24, 2)):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: torch.full(shape, u))
        assert policy.choose(logprobs, 1.0, 1.0).tolist() == [expected]


# log-probabilities ---------------------------------------------------------------------------------------------


def test_token_logprobs_equal_the_manual_sum(shipped):
    model, tokenizer = shipped
    batch = demonstrations(tokenizer, data.load_examples("words", "train", 3))
    logprobs = policy.token_logprobs(model, batch)
    for row in range(3):
        ids, start = batch.tokens[row, : batch.lengths[row]], int(batch.prompt_lengths[row])
        logits = model(ids[None]).logits[0]
        by_hand = sum(logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids)))
        assert_close(logprobs[row].sum(), by_hand, atol=1e-4, rtol=1e-5)
        assert ids[-1] == tokenizer.eos_token_id and batch.response_mask[row, len(ids) - 1] == 1  # the end token counts


def mixed_batch(tokenizer):
    """Rows of three questions in mixed order: some share a prompt, their responses differ in length."""
    examples = data.load_examples("words", "train", 3) + data.load_examples("words", "train", 1, steps=4)
    rows = demonstrations(tokenizer, [examples[i] for i in (0, 3, 1, 0, 2, 0)])
    cut = rows.lengths - torch.tensor([0, 4, 0, 9, 1, 2])
    return data.Batch(rows.tokens, rows.prompt_lengths, cut)


def test_shared_prompts_change_no_state_and_no_gradient(shipped):
    """Every state equals that of a forward pass on its row alone, and so does the gradient, with and without
    gradient checkpointing, which allows no cache."""
    model, batch = copy.deepcopy(shipped[0]), mixed_batch(shipped[1])
    alone, gradients = [], []
    for row in range(len(batch)):
        end, start = int(batch.lengths[row]), int(batch.prompt_lengths[row])
        alone.append(model.get_decoder()(batch.tokens[row : row + 1, :end]).last_hidden_state[0, start - 1 :])
    weights = [torch.randn_like(states) for states in alone]
    sum((w * states).sum() for w, states in zip(weights, alone)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        states = sampler.response_hidden(model.train(), batch)
        for row, s in enumerate(alone):
            assert_close(states[row, : len(s)], s, atol=1e-4, rtol=1e-4)
        sum((w * states[row, : len(w)]).sum() for row, w in enumerate(weights)).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.model.parameters()])
        assert (gradients - expected).norm() < 1e-5 * expected.norm()


def test_a_prompt_is_read_once(shipped, monkeypatch):
    model, batch, read = shipped[0], mixed_batch(shipped[1]), []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kw: read.append(kw["input_ids"].shape) or forward(**kw))
    sampler.response_hidden(model, batch)
    longest = (batch.lengths - batch.prompt_lengths).max()
    assert read == [(4, batch.prompt_lengths.max()), (6, longest)]  # 4 questions, 6 rows


def test_padding_changes_nothing(shipped):
    model, tokenizer = shipped
    examples = data.load_examples("words", "train", 1) + data.load_examples("words", "train", 1, steps=4)
    together = policy.token_logprobs(model, demonstrations(tokenizer, examples))
    alone = policy.token_logprobs(model, demonstrations(tokenizer, examples[:1]))
    assert_close(together[:1, : alone.shape[1]], alone, atol=1e-5, rtol=0)
    assert together[0, alone.shape[1] :].abs().sum() == 0


def test_the_end_token_is_trained_and_the_prompt_is_not(shipped):
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    for parameter in model.parameters():  # the base is certain of the end
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = demonstrations(tokenizer, data.load_examples("words", "train", 1))
    tokens, first = batch.tokens[0], int(batch.prompt_lengths[0])
    assert tokens[-1] == tokenizer.eos_token_id
    logprobs = model(batch.tokens).logits[0].log_softmax(-1)  # [T, V]
    by_token = torch.stack([-logprobs[t - 1, tokens[t]] for t in range(first, len(tokens))])
    assert_close(sft_loss(model, batch), by_token.sum(), atol=1e-4, rtol=1e-5)
    assert by_token[-1] > 0.01  # so that the end token would be missed


# returns, baselines, advantages --------------------------------------------------------------------------------


def test_returns_to_go_by_hand():
    rewards = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 5.0, 9.0]])  # the nines lie outside the responses
    expected = torch.tensor([[0.0, 1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3.0], [0.0, 4 + 0.5 * 5, 5.0, 0.0]])
    assert_close(policy.returns_to_go(rewards, MASK, 0.5), expected)


def test_returns_do_not_overflow_where_division_by_gamma_powers_does():
    returns = policy.returns_to_go(torch.ones(1, 2000), torch.ones(1, 2000), 0.9)
    assert_close(returns[0, 0], torch.tensor(10.0), atol=1e-4, rtol=0)
    assert math.isinf((torch.ones(1) / torch.tensor(0.9) ** 1999).item())


def test_group_baseline_by_hand():
    mask = torch.tensor([[0.0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]])
    returns = torch.tensor([[0.0, 2, 5], [0, 4, 0], [0, 7, 1], [0, 9, 3]])
    expected = torch.tensor([[0.0, 4, 4], [0, 2, 0], [0, 9, 3], [0, 7, 1]])  # the others'; alone at t: their last
    assert_close(policy.group_baseline(returns, mask, 2), expected)


@pytest.mark.parametrize("group", [2, 3])
def test_the_group_baseline_is_unbiased(group):
    """The mean over all groups of samples of sum_t (G_t - b_t) grad log pi_t is the gradient of E[G_0]."""
    theta = torch.tensor([[0.3, -0.2], [0.5, 0.1]], requires_grad=True)
    rewards, surrogate = torch.tensor([[0.2, -0.5], [2.0, -1.0]]), 0.0
    for probability, mask, r, logprobs in all_groups(theta.log_softmax(-1), rewards, group):
        returns = policy.returns_to_go(r, mask, 1.0)
        advantages = returns - policy.group_baseline(returns, mask, group)
        surrogate = surrogate + probability * (advantages * logprobs).sum() / group
    assert_close(torch.autograd.grad(surrogate, theta)[0], true_gradient(theta, rewards))


def test_normalise_keeps_the_sign_of_every_advantage():
    advantages = torch.tensor([[0.0, 3.0, -1.0, 2.0], [0.0, 1.0, 1.0, 0.0]])
    squares = float((advantages**2 * MASK).sum())
    scaled = policy.normalise(advantages, MASK, squares, float(MASK.sum()))
    assert_close((scaled**2).sum() / MASK.sum(), torch.tensor(1.0))
    assert torch.equal(scaled.sign(), advantages.sign())


def test_normalise_by_group_makes_groups_alike():
    """And with GRPO's group mean it is GRPO's scale: the mean square over a group's tokens is 1, whatever its rewards' size."""
    rewards = torch.tensor([[1.0], [0.0], [0.0], [0.0], [0.02], [0.0], [0.02], [0.0]]) * 0.1
    mask = torch.ones(8, 1)
    scaled = policy.normalise_by_group(rewards - policy.group_baseline(rewards, mask, 4), mask, 4)
    assert_close((scaled.view(2, 4) ** 2).mean(1), torch.ones(2))
    assert_close(scaled[:, 0], policy.grpo_advantages(rewards[:, 0], 4))
    alike = torch.full((4, 1), 0.1) + torch.tensor([[0.0], [1e-8], [0.0], [0.0]])
    assert policy.normalise_by_group(alike - policy.group_baseline(alike, mask[:4], 4), mask[:4], 4).abs().max() < 1e-3
    ragged = torch.rand(8, 3), torch.tensor([[1.0, 1, 1], [1, 0, 0]] * 4)
    for first in (0, 4):  # another group's rows are nothing to it
        part = policy.normalise_by_group(ragged[0][first : first + 4], ragged[1][first : first + 4], 4)
        assert_close(policy.normalise_by_group(*ragged, 4)[first : first + 4], part)
        assert_close((part**2).sum() / ragged[1][:4].sum(), torch.tensor(1.0))


def test_grpo_advantages_by_hand():
    outcomes = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    std = math.sqrt(0.25 * 0.75)
    assert_close(policy.grpo_advantages(outcomes, 4), torch.tensor([0.75 / std] + [-0.25 / std] * 3 + [0.0] * 4))


# losses --------------------------------------------------------------------------------------------------------


def test_reinforce_gradient_is_minus_the_advantage():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy.reinforce_loss(logprobs, torch.tensor([3.0, -0.5])).sum().backward()
    assert_close(logprobs.grad, torch.tensor([-3.0, 0.5]))


@pytest.mark.parametrize(
    "ratio, advantage, loss, has_gradient",
    [
        (1.0, 2.0, -2.0, True), (1.5, 1.0, -1.2, False), (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True), (0.5, -1.0, 0.8, False),
    ],
)  # fmt: skip
def test_ppo_clips_where_the_ratio_has_gone_far_enough(ratio, advantage, loss, has_gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    value = policy.ppo_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert_close(value.detach(), torch.tensor([loss]))
    value.sum().backward()
    assert (logprobs.grad.abs().item() > 0) == has_gradient


def test_k3_by_hand_and_unbiased():
    assert_close(policy.kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5])), torch.tensor([math.exp(-0.5) + 0.5 - 1]))
    p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    expectation = (p * policy.kl_k3(p.log(), q.log())).sum()
    assert_close(expectation, (p * (p / q).log()).sum())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
def test_k3_near_zero_is_half_the_square(size):
    """exp(d) - d - 1 = d^2 / 2 + d^3 / 6 + ..; in float32 the 1 drowns it, and it is negative for some d."""
    d = size * torch.randn(1000)
    k3 = policy.kl_k3(torch.zeros(1000), d)
    exact = torch.expm1(d.double()) - d.double()
    assert (k3 >= 0).all()
    assert k3.double().mean().item() == pytest.approx(exact.mean().item(), rel=1e-3)
    plain = d.exp() - d - 1
    assert size == 1e-2 or (plain < 0).any()  # what it is not


def test_as_a_loss_k3_has_the_gradient_of_the_forward_kl():
    """On samples of pi its mean gradient is that of KL(pi_ref || pi), not of KL(pi || pi_ref). Three actions."""
    theta, q = torch.tensor([0.3, -0.2, 0.5], requires_grad=True), torch.tensor([0.2, 0.5, 0.3])
    log_pi = theta.log_softmax(-1)
    (of_k3,) = torch.autograd.grad((log_pi.exp().detach() * policy.kl_k3(log_pi, q.log())).sum(), theta, retain_graph=True)
    (forward,) = torch.autograd.grad((q * (q.log() - log_pi)).sum(), theta, retain_graph=True)
    (reverse,) = torch.autograd.grad((log_pi.exp() * (log_pi - q.log())).sum(), theta)
    assert_close(of_k3, forward)
    assert not torch.allclose(of_k3, reverse, atol=1e-2)


# updates -------------------------------------------------------------------------------------------------------


def test_micro_batch_size_changes_no_gradient(shipped):
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    batch = demonstrations(tokenizer, data.load_examples("words", "train", 7))
    gradients, losses = [], []
    for micro_batch in (7, 3, 1):
        model.zero_grad()
        mean_loss = 0.0
        for rows in memory.micro_batches(batch.lengths, micro_batch):
            loss = sft_loss(model, batch[rows]) / batch.response_mask.sum()
            loss.backward()
            mean_loss += float(loss.detach())
        losses.append(mean_loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(torch.tensor(losses[1:]), torch.tensor([losses[0]] * 2), atol=1e-5, rtol=1e-5)
    assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    assert_close(gradients[2], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [10.0, 0.5])
def test_the_gradient_is_clipped_to_a_norm_of_one(size):
    """A long gradient keeps its direction, a short one is left alone. What is logged is the norm before."""
    parameters = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    gradient = torch.randn(5)
    gradient *= size / gradient.norm()
    parameters[0].grad, parameters[1].grad = gradient[:2].clone(), gradient[2:].clone()
    metrics = policy.optimizer_step(torch.optim.SGD(parameters, lr=1.0), 0.0)
    assert metrics["grad_norm"] == pytest.approx(size, rel=1e-5)
    moved = torch.cat([p.detach() for p in parameters])
    assert_close(moved, -gradient / max(1.0, size), atol=1e-5, rtol=1e-4)


# loading -------------------------------------------------------------------------------------------------------


def test_names():
    assert loading.resolve_model("Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert loading.resolve_model("Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert loading.resolve_model("Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert loading.resolve_model("someone/model") == "someone/model"
    with pytest.raises(UserError, match="did you mean 'Qwen2.5-0.5B'"):
        loading.resolve_model("Qwen2.5-0.5")


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, shipped):
    with pytest.raises(UserError, match="config.json is missing"):
        loading.load_policy(str(tmp_path))
    with pytest.raises(UserError, match="give a folder: --model DIR"):
        loading.load_policy("Qwen2.5-0.5B")  # offline
    shipped[0].save_pretrained(tmp_path / "a")
    shipped[1].save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    torch.save(shipped[0].state_dict(), tmp_path / "a" / "pytorch_model.bin")  # pickle is not an alternative
    weights.unlink()
    with pytest.raises(UserError, match="holds no model.safetensors"):
        loading.load_policy(str(tmp_path / "a"))


def test_a_tokenizer_without_end_token_is_refused(shipped, tmp_path):
    shipped[0].save_pretrained(tmp_path)
    tokenizer = loading.PreTrainedTokenizerFast.from_pretrained(loading.BASE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end token"):
        loading.load_policy(str(tmp_path))


def test_an_unknown_output_layer_is_refused(shipped):
    model = copy.deepcopy(shipped[0])
    loading.check_output_layer(model, "base")
    model.lm_head.bias = torch.nn.Parameter(torch.full((66,), 5.0))
    with pytest.raises(UserError, match="output layer of 'biased'"):
        loading.check_output_layer(model, "biased")


# --- loading and dividing --------------------------------------------------------------------------------------------

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip


def test_a_scale_behind_the_output_matrix_is_seen():
    """Granite divides its logits; on its padding token, whose embedding is 0, nothing shows it."""
    config = transformers.GraniteConfig(**TINY, logits_scaling=4.0)
    with pytest.raises(UserError, match="without bias or scale"):
        loading.check_output_layer(transformers.GraniteForCausalLM(config).eval(), "granite")


def test_logits_that_are_all_zero_are_refused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    loading.check_output_layer(model, "llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(UserError, match="empty or damaged"):
        loading.check_output_layer(model, "llama")
    with pytest.raises(UserError, match="cannot be divided"):
        policy.divide_logits(model, 0.2)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Gemma2"])
def test_divided_logits_are_divided_or_refused(kind):
    options = {} if kind == "Llama" else {"head_dim": 8}
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**TINY, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(tokens).logits
        if kind == "Gemma2":  # its logits are capped
            with pytest.raises(UserError, match="cannot be divided"):
                policy.divide_logits(model, 0.2)
            assert torch.equal(model(tokens).logits, before)  # as it was
        else:
            policy.divide_logits(model, 0.2)
            assert_close(model(tokens).logits, before * 5, rtol=1e-4, atol=1e-3)


def test_ordinary_tokens_are_many_and_not_special(shipped):
    tokens = loading.ordinary_tokens(shipped[0]).flatten().tolist()
    assert len(set(tokens)) == 16 and min(tokens) < 10 and max(tokens) > 50
    assert not set(tokens) & {shipped[1].pad_token_id, shipped[1].eos_token_id}
