"""policy.py: sampling equals a forward pass; each loss equals what a hand or a plain loop finds."""

import copy
import math

import pytest
import torch
import transformers
from conftest import all_groups, demonstrations, examples_of, sft_loss, true_gradient
from torch.testing import assert_close

import data
import policy
from engine import loading, memory, sampler
from engine.errors import UserError

MASK = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def prompts(shipped):
    return [example.prompt for example in examples_of(shipped[1], "words", "test", 12)]


@pytest.fixture(scope="module")
def sample(shipped, prompts):
    """policy.sample of these prompts with a seed of its own; by default it ends as it should."""

    def sample_of(*args, end_tokens=(shipped[1].eos_token_id,), seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        inputs = (shipped[0], options.pop("prompts", prompts), end_tokens, *args)
        return policy.sample(*inputs, generator=generator, **options)

    return sample_of


# sampling -------------------------------------------------------------------------------------


def sample_plain(model, prompt, end_tokens, max_new_tokens, temperature, top_p, generator):
    """One response and log pi of its tokens, with a whole forward pass for each."""
    response = []
    logprobs = []
    while len(response) < max_new_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[:, -1]  # [1, V]
        log_pi = (logits / (temperature or 1.0)).log_softmax(-1)
        token = int(policy.choose(log_pi, temperature, top_p, generator))
        response.append(token)
        logprobs.append(float(log_pi[0, token]))
        if token in end_tokens:
            break
    return response, logprobs


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_sample_is_the_plain_loop(shipped, prompts, sample, temperature, top_p):
    end_tokens = data.end_tokens(shipped[1], shipped[0])
    for prompt in prompts[:3]:
        generator = torch.Generator().manual_seed(1)
        options = (temperature, top_p)
        response, logprobs = sample_plain(shipped[0], prompt, end_tokens, 40, *options, generator)
        fast = sample(40, 1, *options, prompts=[prompt], end_tokens=end_tokens, seed=1)
        assert fast.batch.response(0) == response
        assert_close(fast.logprobs[0, len(prompt) :], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("half_precision", [False, True])
def test_sampled_logprobs_equal_a_fresh_forward_pass(shipped, sample, half_precision, monkeypatch):
    """Under bf16 autocast, too: both take float32 logits of the same states.

    The layers are kept out of it: their roundings depend on how many tokens are read at once.
    """
    model = shipped[0]
    if half_precision:
        decoder = model.get_decoder()
        exact = torch.autocast("cpu", enabled=False)(decoder.forward)
        monkeypatch.setattr(decoder, "forward", exact)
        monkeypatch.setattr(memory, "HALF_PRECISION", {"cpu"})
    rollout = sample(64, 3, temperature=0.7)
    fresh = policy.in_chunks(lambda b: policy.token_logprobs(model, b, 0.7), rollout.batch, 5)
    assert_close(rollout.logprobs, fresh, atol=1e-3 if half_precision else 1e-4, rtol=0)
    assert rollout.finished.all()
    assert (rollout.batch.lengths > rollout.batch.prompt_lengths).all()


def test_each_row_continues_its_own_prompt(prompts, sample):
    batch = sample(8, 2, rows=6).batch  # several chunks
    for row in range(2 * len(prompts)):
        prompt = prompts[row // 2]
        assert batch.tokens[row, : len(prompt)].tolist() == prompt
        assert int(batch.prompt_lengths[row]) == len(prompt)


def test_greedy_equals_generate(shipped, prompts, sample):
    model, tokenizer = shipped
    ours = sample(64, temperature=0.0)
    for row, prompt in enumerate(prompts):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=1,
        )
        assert ours.batch.response(row) == theirs[0, len(prompt) :].tolist()


def test_length_limit_leaves_a_row_unfinished(sample):
    rollout = sample(5)
    assert not rollout.finished.any() and (rollout.batch.response_mask.sum(1) == 5).all()


@pytest.mark.parametrize("room, look_every", [(1, 1), (7, 1), (100, 1), (32, 8)])
def test_the_samplers_shortcuts_change_nothing(sample, monkeypatch, room, look_every):
    """Room in the cache of keys and values; how often it looks who has ended."""
    temperature = 1.0 if look_every == 1 else 0.0  # rows that stay longer draw more
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "make_roomy", lambda cache: False)
        plain = sample(64, 4, temperature)
    monkeypatch.setattr(sampler.RoomyLayer, "ROOM", room)
    monkeypatch.setattr(sampler, "LOOK_EVERY", {"cpu": look_every})
    rollout = sample(64, 4, temperature)
    assert torch.equal(rollout.batch.tokens, plain.batch.tokens)
    assert_close(rollout.logprobs, plain.logprobs)


def test_the_cache_is_not_copied_at_every_token(shipped, prompts):
    """One copy per ROOM tokens: the memory the keys lie in stays where it is in between."""
    cache = shipped[0](torch.tensor(prompts[:1]), use_cache=True).past_key_values
    sampler.make_roomy(cache)
    places = set()
    for _ in range(2 * sampler.RoomyLayer.ROOM):
        shipped[0](torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 2


def test_rows_may_end_with_the_first_token(sample):
    """Some rows end at once, before the cache has grown; others go on. Any end token ends a row."""
    batch = sample(1, 4, temperature=4.0, end_tokens=(-1,)).batch
    first = [batch.response(row)[0] for row in range(len(batch))]
    end = max(set(first), key=first.count)
    lengths = sample(8, 4, temperature=4.0, end_tokens=(end,)).batch.response_mask.sum(1)
    at_once = torch.tensor([token == end for token in first])
    assert 0.1 < at_once.float().mean() < 0.9
    assert (lengths[at_once] == 1).all() and (lengths[~at_once] > 1).all()
    rollout = sample(8, 4, temperature=4.0, end_tokens=tuple(set(first)))
    assert rollout.finished.all() and (rollout.batch.response_mask.sum(1) == 1).all()


def test_sampling_follows_the_probabilities_of_the_nucleus():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(5000, 4)
    shares = policy.choose(logprobs, 1.0, 1.0).bincount(minlength=4) / 5000
    assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    # The smallest sufficient set: 0.5 < 0.75 <= 0.5 + 0.3.
    shares = policy.choose(logprobs, 1.0, 0.75).bincount(minlength=4) / 5000
    assert_close(shares, torch.tensor([0.5 / 0.8, 0.3 / 0.8, 0.0, 0.0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2**-24, 2)])
def test_a_token_of_probability_zero_is_never_drawn(monkeypatch, u, token):
    """Not even where the random number is 0, or as near to 1 as float32 allows."""
    logprobs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log()
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u))
    assert policy.choose(logprobs, 1.0, 1.0).tolist() == [token]


# log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_the_manual_sum(shipped, temperature):
    """And so does their gradient, that of the end token included."""
    model = copy.deepcopy(shipped[0])
    for parameter in model.parameters():  # the base is certain of the end
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = demonstrations(shipped[1], data.load_examples("words", "train", 3))
    by_hand = 0.0
    for row in range(3):
        ids = batch.tokens[row, : batch.lengths[row]]
        log_pi = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        for t in range(int(batch.prompt_lengths[row]), len(ids)):
            by_hand = by_hand + log_pi[t - 1, ids[t]]
        assert ids[-1] == shipped[1].eos_token_id
        assert log_pi[-2, ids[-1]] < -0.01  # so that the end token would be missed
    fast = policy.token_logprobs(model, batch, temperature).sum()
    assert_close(fast, by_hand, atol=1e-4, rtol=1e-5)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(fast, parameters)
    for a, b in zip(gradients, torch.autograd.grad(by_hand, parameters), strict=True):
        assert b.any() and (a - b).norm() <= 1e-4 * b.norm()


def test_padding_changes_nothing(shipped):
    short = data.load_examples("words", "train", 1)
    long = data.load_examples("words", "train", 1, steps=4)
    together = policy.token_logprobs(shipped[0], demonstrations(shipped[1], short + long))
    alone = policy.token_logprobs(shipped[0], demonstrations(shipped[1], short))
    assert_close(together[:1, : alone.shape[1]], alone, atol=1e-5, rtol=0)
    assert not together[0, alone.shape[1] :].any()


def mixed_batch(tokenizer):
    """Rows of three questions in mixed order: some share a prompt, response lengths differ."""
    examples = data.load_examples("words", "train", 3)
    examples += data.load_examples("words", "train", 1, steps=4)
    rows = demonstrations(tokenizer, [examples[i] for i in (0, 3, 1, 0, 2, 0)])
    cut = rows.lengths - torch.tensor([0, 4, 0, 9, 1, 2])
    return data.Batch(rows.tokens, rows.prompt_lengths, cut)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_change_no_state_and_no_gradient(shipped, checkpointing):
    """States equal those of a forward pass on each row alone; so does their gradient.

    Gradient checkpointing allows no cache.
    """
    model = copy.deepcopy(shipped[0])
    batch = mixed_batch(shipped[1])
    alone = []
    for row in range(len(batch)):
        ids = batch.tokens[row : row + 1, : batch.lengths[row]]
        states = model.get_decoder()(ids).last_hidden_state[0]
        alone.append(states[int(batch.prompt_lengths[row]) - 1 :])
    weights = [torch.randn_like(states) for states in alone]
    sum((w * states).sum() for w, states in zip(weights, alone)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    together = sampler.response_hidden(model.train(), batch)
    for row, states in enumerate(alone):
        assert_close(together[row, : len(states)], states, atol=1e-4, rtol=1e-4)
    sum((w * together[row, : len(w)]).sum() for row, w in enumerate(weights)).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    assert (gradients - expected).norm() < 1e-5 * expected.norm()


def test_a_prompt_is_read_once(shipped, monkeypatch):
    batch = mixed_batch(shipped[1])
    shapes = []
    forward = shipped[0].model.forward

    def noted(**inputs):
        shapes.append(inputs["input_ids"].shape)
        return forward(**inputs)

    monkeypatch.setattr(shipped[0].model, "forward", noted)
    sampler.response_hidden(shipped[0], batch)
    longest = (batch.lengths - batch.prompt_lengths).max()
    assert shapes == [(4, batch.prompt_lengths.max()), (6, longest)]  # 4 questions, 6 rows


# returns, baselines, advantages ---------------------------------------------------------------


def test_returns_to_go_by_hand():
    # The nines lie outside the responses.
    rewards = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 5.0, 9.0]])
    expected = torch.tensor(
        [[0.0, 1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3.0], [0.0, 6.5, 5.0, 0.0]]
    )
    assert_close(policy.returns_to_go(rewards, MASK, 0.5), expected)


def test_returns_do_not_overflow_where_division_by_gamma_powers_does():
    returns = policy.returns_to_go(torch.ones(1, 2000), torch.ones(1, 2000), 0.9)
    assert_close(returns[0, 0], torch.tensor(10.0), atol=1e-4, rtol=0)
    assert math.isinf((torch.ones(1) / torch.tensor(0.9) ** 1999).item())


def test_group_baseline_by_hand():
    mask = torch.tensor([[0.0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]])
    returns = torch.tensor([[0.0, 2, 5], [0, 4, 0], [0, 7, 1], [0, 9, 3]])
    # The others'; of a row that is alone at t, the others' last.
    expected = torch.tensor([[0.0, 4, 4], [0, 2, 0], [0, 9, 3], [0, 7, 1]])
    assert_close(policy.group_baseline(returns, mask, 2), expected)


@pytest.mark.parametrize("group", [2, 3])
def test_the_group_baseline_is_unbiased(group):
    """Over all groups of samples, the mean of sum_t (G_t - b_t) grad log pi_t is grad E[G_0]."""
    theta = torch.tensor([[0.3, -0.2], [0.5, 0.1]], requires_grad=True)
    rewards = torch.tensor([[0.2, -0.5], [2.0, -1.0]])
    surrogate = 0.0
    for probability, mask, r, logprobs in all_groups(theta.log_softmax(-1), rewards, group):
        returns = policy.returns_to_go(r, mask, 1.0)
        advantages = returns - policy.group_baseline(returns, mask, group)
        surrogate = surrogate + probability * (advantages * logprobs).sum() / group
    assert_close(torch.autograd.grad(surrogate, theta)[0], true_gradient(theta, rewards))


def test_normalise_keeps_the_sign_of_every_advantage():
    advantages = torch.tensor([[0.0, 3.0, -1.0, 2.0], [0.0, 1.0, 1.0, 0.0]])
    scaled = policy.normalise(advantages, MASK, float((advantages**2).sum()), 5.0)
    assert_close((scaled**2).sum() / 5, torch.tensor(1.0))
    assert torch.equal(scaled.sign(), advantages.sign())


def test_normalise_by_group_makes_groups_alike():
    """With GRPO's group mean it is GRPO's scale: the mean square over a group's tokens is 1."""
    rewards = 0.1 * torch.tensor([1.0, 0, 0, 0, 0.02, 0, 0.02, 0])[:, None]
    mask = torch.ones(8, 1)
    centred = rewards - policy.group_baseline(rewards, mask, 4)
    scaled = policy.normalise_by_group(centred, mask, 4)
    assert_close((scaled.view(2, 4) ** 2).mean(1), torch.ones(2))
    assert_close(scaled[:, 0], policy.grpo_advantages(rewards[:, 0], 4))
    # Equal rewards differ by rounding: no unit.
    rounding = torch.tensor([[0.0], [1e-8], [0.0], [0.0]])
    assert policy.normalise_by_group(rounding, mask[:4], 4).abs().max() < 1e-3
    # Another group's rows are nothing to it.
    advantages = torch.rand(8, 3)
    ragged = torch.tensor([[1.0, 1, 1], [1, 0, 0]] * 4)
    scaled = policy.normalise_by_group(advantages, ragged, 4)
    part = policy.normalise_by_group(advantages[4:], ragged[4:], 4)
    assert_close(scaled[4:], part)
    assert_close((part**2).sum() / ragged[4:].sum(), torch.tensor(1.0))


def test_grpo_advantages_by_hand():
    outcomes = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    std = math.sqrt(0.25 * 0.75)
    expected = torch.tensor([0.75 / std] + [-0.25 / std] * 3 + [0.0] * 4)
    assert_close(policy.grpo_advantages(outcomes, 4), expected)


# losses ---------------------------------------------------------------------------------------


def test_reinforce_gradient_is_minus_the_advantage():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy.reinforce_loss(logprobs, torch.tensor([3.0, -0.5])).sum().backward()
    assert_close(logprobs.grad, torch.tensor([-3.0, 0.5]))


@pytest.mark.parametrize(
    "ratio, advantage, loss, has_gradient",
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 1.0, -1.2, False),
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),
        (0.5, -1.0, 0.8, False),
    ],
)
def test_ppo_clips_where_the_ratio_has_gone_far_enough(ratio, advantage, loss, has_gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    value = policy.ppo_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert_close(value.detach(), torch.tensor([loss]))
    value.sum().backward()
    assert (logprobs.grad.abs().item() > 0) == has_gradient


def test_k3_by_hand_and_unbiased():
    by_hand = torch.tensor([math.exp(-0.5) + 0.5 - 1])
    assert_close(policy.kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5])), by_hand)
    p = torch.tensor([0.2, 0.8])
    q = torch.tensor([0.5, 0.5])
    expectation = (p * policy.kl_k3(p.log(), q.log())).sum()
    assert_close(expectation, (p * (p / q).log()).sum())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5])
def test_k3_near_zero_is_half_the_square(size):
    """In float32 the 1 drowns exp(d) - d - 1, and it is negative for some d."""
    d = size * torch.randn(1000)
    k3 = policy.kl_k3(torch.zeros(1000), d)
    exact = torch.expm1(d.double()) - d.double()
    assert (k3 >= 0).all()
    assert_close(k3.double().mean(), exact.mean(), rtol=1e-3, atol=0)
    assert size == 1e-2 or (d.exp() - d - 1 < 0).any()  # what it is not


def test_as_a_loss_k3_has_the_gradient_of_the_forward_kl():
    """On samples of pi its mean gradient is that of KL(pi_ref || pi), not of KL(pi || pi_ref)."""
    theta = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3])
    log_pi = theta.log_softmax(-1)
    on_samples = (log_pi.exp().detach() * policy.kl_k3(log_pi, q.log())).sum()
    forward = (q * (q.log() - log_pi)).sum()
    reverse = (log_pi.exp() * (log_pi - q.log())).sum()
    of_k3, of_forward, of_reverse = (
        torch.autograd.grad(loss, theta, retain_graph=True)[0]
        for loss in (on_samples, forward, reverse)
    )
    assert_close(of_k3, of_forward)
    assert not torch.allclose(of_k3, of_reverse, atol=1e-2)


# updates --------------------------------------------------------------------------------------


def test_micro_batch_size_changes_no_gradient(shipped):
    model = copy.deepcopy(shipped[0])
    batch = demonstrations(shipped[1], data.load_examples("words", "train", 7))
    gradients = []
    for micro_batch in (7, 3, 1):
        model.zero_grad()
        for rows in memory.micro_batches(batch.lengths, micro_batch):
            (sft_loss(model, batch[rows]) / batch.response_mask.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    assert_close(gradients[2], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [10.0, 0.5])
def test_the_gradient_is_clipped_to_a_norm_of_one(size):
    """A long gradient keeps its direction, a short one is left alone. The norm before is logged."""
    parameters = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    gradient = torch.randn(5)
    gradient *= size / gradient.norm()
    parameters[0].grad = gradient[:2].clone()
    parameters[1].grad = gradient[2:].clone()
    metrics = policy.optimizer_step(torch.optim.SGD(parameters, lr=1.0), 0.0)
    assert metrics["grad_norm"] == pytest.approx(size, rel=1e-5)
    moved = torch.cat([p.detach() for p in parameters])
    assert_close(moved, -gradient / max(1.0, size), atol=1e-5, rtol=1e-4)


def test_rates_rise_and_fall():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for steps_done in range(20):
        policy.set_rate(optimizer, 1.0, steps_done, 20)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:3] == [0.5, 0.95, 0.9] and max(rates) == 0.95
    assert rates[-1] == pytest.approx(0.05)


# loading --------------------------------------------------------------------------------------


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
    folder = tmp_path / "a"
    shipped[0].save_pretrained(folder)
    shipped[1].save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(shipped[0].state_dict(), folder / "pytorch_model.bin")  # pickle is no alternative
    with pytest.raises(UserError, match="holds no model.safetensors"):
        loading.load_policy(str(folder))


def test_a_tokenizer_without_end_token_is_refused(shipped, tmp_path):
    shipped[0].save_pretrained(tmp_path)
    tokenizer = loading.PreTrainedTokenizerFast.from_pretrained(loading.BASE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end token"):
        loading.load_policy(str(tmp_path))


TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}


def test_an_output_layer_with_a_bias_or_a_scale_is_refused(shipped):
    """Granite divides its logits; its padding token, whose embedding is 0, does not show it."""
    loading.check_output_layer(shipped[0], "base")
    biased = copy.deepcopy(shipped[0])
    biased.lm_head.bias = torch.nn.Parameter(torch.full((66,), 5.0))
    with pytest.raises(UserError, match="output layer of 'biased'"):
        loading.check_output_layer(biased, "biased")
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
    before = model(tokens).logits.detach()
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
