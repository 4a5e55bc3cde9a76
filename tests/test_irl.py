"""irl.py and baselines.py: the loop, stage by stage and as a whole."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import examples_of, all_groups, all_logprobs, demonstrations, discriminator_update, sft_loss, true_gradient
from torch.testing import assert_close

import baselines
import data
import irl
import logprob
import negatives
import policy
import reward
from engine import loading, lora
from engine.settings import Settings
from tasks import answers, countdown, words

COUNTDOWN = data.load_examples("countdown", "train", 1)[0]


def make_loop(shipped, settings, **changes):
    fixed = {name: changes.pop(name) for name in list(changes) if name not in Settings.__dataclass_fields__}
    s = replace(settings, **changes)
    s.__class__ = type("Changed", (Settings,), fixed)  # with other constants
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    discriminator = reward.Discriminator(reward.load_reward(s.reward, "base"), s.logit, s.granularity, 0,
                                         reward.find_step_end_tokens(tokenizer, len(tokenizer)), s.reward_clip)  # fmt: skip
    experts = examples_of(tokenizer, "words", "train", s.demonstrations)
    extra = []
    if s.extra_questions:
        others = examples_of(tokenizer, "words", "train", s.extra_questions, seed=9)
        extra = [data.question_only(example) for example in others]
    return irl.IRL(s, tokenizer, model, discriminator, experts, extra)


def accuracy(loop, questions=64):
    examples = data.load_examples("words", "validation", questions)
    prompts = [data.prompt_ids(loop.tokenizer, e.question) for e in examples]
    batch = policy.sample(loop.policy_model, prompts, (loop.tokenizer.eos_token_id,), 64, group=4,
                          generator=torch.Generator().manual_seed(0)).batch  # fmt: skip
    return sum(
        data.is_correct(examples[i // 4], data.decode(loop.tokenizer, batch.response(i))) for i in range(len(batch))
    ) / len(batch)


def test_broken_copies_alone_are_enough_to_learn_from(shipped, settings, monkeypatch):
    """rollouts_per_expert 0: the discriminator asks the policy for nothing, before it acts and beside it."""
    loop = make_loop(shipped, settings, demonstrations=8, questions=4, rollouts_per_expert=0, perturbed=3, reward_lr=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sample", None)
        assert abs(loop.warm_up()["accuracy"] - 0.5) < 0.01  # AIRL's f is log pi yet
        for _ in range(9):
            told = loop.warm_up()
    assert told["accuracy"] > 0.55 and told["d_expert"] > told["d_negative"]
    seen, compare = [], reward.compare
    monkeypatch.setattr(reward, "compare", lambda *args: seen.append(compare(*args)) or seen[-1])
    loop.step()
    negative, start = seen[0].negative, seen[0].negative_from
    assert len(negative) and (start > negative.prompt_lengths).all()  # copies of an expert's first tokens, all of them


def test_a_policy_improves_from_demonstrations_alone(shipped, settings):
    """The whole loop, small: well above its base, in seconds, without a look at any answer."""
    loop = make_loop(
        shipped, settings, demonstrations=64, questions=16, group=4, max_steps=25, warm_up_lr=3e-4, policy_lr=5e-4
    )
    before = accuracy(loop)
    for _ in range(20):
        loop.warm_up()
    for _ in range(25):
        loop.step()
    assert accuracy(loop) > before + 0.15


def test_without_its_discriminator_a_reward_learns_the_likelihood_alone(shipped, settings, monkeypatch):
    """discriminator_coef 0: no negative is sampled in the warm-up or seen later, and an update moves the reward as
    supervised learning on the same demonstrations would."""
    loop = make_loop(shipped, settings, method="likelihood")
    seen = []
    real = loop.discriminator_step
    monkeypatch.setattr(loop, "discriminator_step", lambda c: seen.append(c) or real(c))
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sample", lambda *a, **b: pytest.fail("sampled"))
        loop.warm_up()
    alone = copy.deepcopy(shipped[0])
    optimizer = policy.make_optimizer(alone, settings.warm_up_lr)
    batch, mask = seen[0].expert, seen[0].expert.response_mask
    likelihood = policy.token_logprobs(alone, batch)
    (-(likelihood.sum(1) / mask.sum(1)).mean()).backward()
    policy.optimizer_step(optimizer, 0.0)
    for a, b in zip(loop.discriminator.reward_model.parameters(), alone.parameters(), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert "discriminator" in loop.step() and [len(comparison.negative) for comparison in seen] == [0, 0]


def test_training_raises_if_the_answer_check_is_called(shipped, settings, monkeypatch):
    loop = make_loop(shipped, settings)
    honest = loop.rewards

    def cheating(rollout):
        data.is_correct(loop.experts[0], "<answer>1</answer>")
        return honest(rollout)

    loop.step()
    monkeypatch.setattr(loop, "rewards", cheating)
    with pytest.raises(RuntimeError, match="without a verifier"):
        loop.step()
    assert data.is_correct(loop.experts[0], f"<answer>{loop.experts[0].answer}</answer>")  # unlocked again outside


@pytest.mark.parametrize("check", [
    lambda e: data.is_correct(e, "<answer>1</answer>"), lambda e: data.first_error(e, "<answer>1</answer>"),
    lambda e: answers.same_answer("1", e.answer), lambda e: words.is_right(e, "<answer>1</answer>"),
    lambda e: words.first_error(e, "<answer>1</answer>"), lambda e: countdown.is_right(COUNTDOWN, "<answer>1</answer>"),
    lambda e: countdown.first_error(COUNTDOWN, "<answer>1</answer>"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["step", "warm_up"])
def test_the_lock_holds_however_a_check_is_reached(shipped, settings, check, where, monkeypatch):
    """From data, or past it from the tasks themselves."""
    loop = make_loop(shipped, settings)
    check(loop.experts[0])
    honest = loop.rollout

    def cheating(questions, group):
        check(loop.experts[0])
        return honest(questions, group)

    monkeypatch.setattr(loop, "rollout", cheating)
    with pytest.raises(RuntimeError, match="without a verifier"):
        getattr(loop, where)()


def test_broken_copies_of_every_kind_are_made_behind_the_lock():
    """Another option is found without asking whether an answer is right."""
    choice = data.Example("Which?", "It is the 2nd of 3 valves: 4-2=2.", "B", ("Mitral valve", "Aortic valve", "Tricuspid"))
    with data.no_verifier():
        for kind in (*negatives.BROKEN, "carried", "both"):
            assert negatives.perturb(choice, random.Random(0), kind) is not None
        broken = [negatives.perturb(choice, random.Random(seed), "answer").answer for seed in range(20)]
    assert set(broken) == {"A", "C"}


@pytest.mark.parametrize("changes", [
    dict(), dict(policy_loss="reinforce", gamma=0.9), dict(policy_loss="ppo", gamma=0.9, epochs=2, kl_coef=0.1),
    dict(policy_loss="exact", gamma=0.5), dict(policy_loss="ppo", gamma=0.5),
    dict(policy_loss="ppo", granularity="sparse", gamma=1.0),
    dict(policy_loss="ppo", granularity="interval", gamma=1.0), dict(policy_loss="ppo", reward="head", logit="gail"),
    dict(extra_questions=8), dict(replay=0, perturbed=0),
])  # fmt: skip
def test_every_variant_takes_steps_and_reports_numbers(shipped, settings, changes):
    loop = make_loop(shipped, settings, **changes)
    before = {name: p.clone() for name, p in loop.policy_model.named_parameters()}
    loop.warm_up()
    for _ in range(2):
        metrics = loop.step()
    assert {"rollout", "discriminator", "reward", "policy"} <= set(metrics)
    for stage in metrics.values():
        assert all(torch.isfinite(torch.tensor(value)) for value in stage.values())
    assert any(not torch.equal(p, before[name]) for name, p in loop.policy_model.named_parameters())


def test_a_frozen_reward_does_not_move(shipped, settings):
    loop = make_loop(shipped, settings, reward_lr=0.0)
    before = [p.clone() for p in loop.discriminator.reward_model.parameters()]
    loop.step()
    assert all(torch.equal(p, b) for p, b in zip(loop.discriminator.reward_model.parameters(), before))


def test_extra_questions_are_answered_and_never_compared(shipped, settings, monkeypatch):
    loop = make_loop(shipped, settings, extra_questions=8)
    asked, compared = [], []
    roll, update = loop.rollout, loop.update_discriminator
    monkeypatch.setattr(loop, "rollout", lambda questions, group: asked.extend(q.question for q in questions) or roll(questions, group))
    monkeypatch.setattr(
        loop, "update_discriminator", lambda examples, *a: compared.extend(examples) or update(examples, *a)
    )
    loop.step()
    experts = {e.question for e in loop.experts}
    assert [q in experts for q in asked] == [True, True, False, False]  # half of the step's questions
    assert [e.question for e in compared] == asked[:2]


def test_where_the_reward_stands_still_all_questions_are_alike(shipped, settings, monkeypatch):
    loop = make_loop(shipped, settings, extra_questions=32, reward_lr=0.0)
    before = [p.clone() for p in loop.discriminator.reward_model.parameters()]
    monkeypatch.setattr(loop, "update_discriminator", lambda *a: pytest.fail("it moved"))
    asked, roll = [], loop.rollout
    monkeypatch.setattr(loop, "rollout", lambda questions, group: asked.extend(q.question for q in questions) or roll(questions, group))
    assert "discriminator" not in loop.step() and len(asked) == loop.settings.questions
    assert all(torch.equal(a, b) for a, b in zip(before, loop.discriminator.reward_model.parameters()))
    experts = {e.question for e in loop.experts}
    share = len(experts) / (len(experts) + len(loop.extra))
    drawn = [q.question in experts for _ in range(400) for q in loop.draw()[1]]
    assert abs(sum(drawn) / len(drawn) - share) < 0.07  # not half of them


@pytest.mark.parametrize("loss, gamma", [("exact", 0.0), ("exact", 0.9), ("reinforce", 0.9), ("ppo", 0.9)])
def test_micro_batch_size_changes_no_policy_gradient(shipped, settings, loss, gamma):
    results = []
    for micro_batch in (100, 5, 1):
        loop = make_loop(shipped, settings, policy_loss=loss, gamma=gamma, micro_batch=micro_batch)
        loop.policy_optimizer = torch.optim.SGD(loop.policy_model.parameters(), lr=1.0)
        rollout, _ = loop.rollout(loop.experts[:3], 4)
        rewards = (
            torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(1))
            * rollout.batch.response_mask
        )
        loop.update_policy(rollout, rewards, loop.discriminator.reward_model.states(rollout.batch).detach())
        results.append(torch.cat([p.detach().flatten() for p in loop.policy_model.parameters()]))
    assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    assert_close(results[2], results[0], atol=1e-5, rtol=1e-4)


def with_softcap(model, softcap: float):
    """Tell a model that its logits are capped. These functions read that; the forward pass of Qwen2, which has no cap, does
    not: who compares caps its logits himself (`capped`)."""
    model.config.final_logit_softcapping = softcap or None


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@pytest.mark.parametrize("gamma, temperature, softcap", [(0.0, 1.0, 0.0), (0.9, 0.7, 0.0), (0.0, 1.4, 5.0), (0.9, 0.7, 5.0)])
def test_exact_loss_equals_the_plain_loop(shipped, settings, gamma, temperature, softcap):
    """-(sum_a pi(a|s_t) (f(s_t,a) - alpha log pi(a|s_t))) - A_t log pi(a_t|s_t), A_t of what follows, summed token by
    token, and its gradient. pi is the policy at its temperature, f at temperature 1, both capped."""
    loop = make_loop(shipped, settings, policy_loss="exact", gamma=gamma, temperature=temperature)
    reward_model = loop.discriminator.reward_model.model
    for model in (loop.policy_model, reward_model):
        with_softcap(model, softcap)
        for parameter in model.parameters():  # f and log pi differ
            parameter.data += 0.02 * torch.randn_like(parameter)
    batch = demonstrations(loop.tokenizer, loop.experts[:2])
    advantages = torch.randn(batch.tokens.shape) * batch.response_mask
    states = loop.discriminator.reward_model.states(batch).detach()
    old = torch.zeros(batch.tokens.shape)
    fast = loop.policy_loss(batch, old, advantages, states)
    parameters, slow = list(loop.policy_model.parameters()), 0.0
    for row in range(2):
        ids = batch.tokens[row : row + 1, : batch.lengths[row]]
        log_pi = (capped(loop.policy_model(ids).logits[0], softcap) / temperature).log_softmax(-1)
        f = capped(reward_model(ids).logits[0], softcap).log_softmax(-1).detach()
        for t in range(int(batch.prompt_lengths[row]), ids.shape[1]):
            expectation = sum(
                log_pi[t - 1, a].exp() * (f[t - 1, a] - loop.settings.entropy_coef * log_pi[t - 1, a])
                for a in range(f.shape[1])
            )
            slow = slow - expectation - (advantages[row, t] * log_pi[t - 1, ids[0, t]] if gamma else 0)
    assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    for a, b in zip(torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.7, 0.0), (1.4, 5.0)])
def test_f_is_the_reward_at_temperature_one(shipped, settings, temperature, softcap):
    """A likelihood's f is log p_phi, capped as its model is, whatever temperature the policy samples at; r_t = f - alpha log
    pi has the policy's own log pi at that temperature."""
    loop = make_loop(shipped, settings, policy_loss="reinforce", gamma=0.0, temperature=temperature)
    reward_model = loop.discriminator.reward_model.model
    with_softcap(reward_model, softcap)
    for parameter in reward_model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    rollout, _ = loop.rollout(loop.experts[:2], 4)
    batch = rollout.batch
    rewards = loop.rewards(rollout)[0]
    for row in (0, 5):
        ids = batch.tokens[row : row + 1, : batch.lengths[row]]
        with torch.no_grad():
            log_pi = (loop.policy_model(ids).logits[0] / temperature).log_softmax(-1)
            f = capped(reward_model(ids).logits[0], softcap).log_softmax(-1)
        for t in range(int(batch.prompt_lengths[row]), ids.shape[1]):
            wanted = f[t - 1, ids[0, t]] - loop.settings.entropy_coef * log_pi[t - 1, ids[0, t]]
            assert rewards[row, t].item() == pytest.approx(wanted.item(), abs=1e-3)


@pytest.mark.parametrize("method", ["sft", "grpo", "exact", "exact, gamma and KL", "reinforce", "ppo, KL"])
def test_the_loss_by_rows_has_the_same_gradient(shipped, settings, method, monkeypatch):
    """A large vocabulary's losses are summed a few rows at a time: the same loss, the same gradient of every weight."""
    changes = dict(policy_loss=method.split(",")[0], gamma=0.9 * ("gamma" in method), kl_coef=0.3 * ("KL" in method))
    loop = make_loop(shipped, settings, **changes if method not in ("sft", "grpo") else {})
    for parameter in (*loop.policy_model.parameters(), *loop.discriminator.reward_model.parameters()):
        parameter.data += 0.02 * torch.randn_like(parameter)  # policy, reward and reference differ
    parameters = list(loop.policy_model.parameters())
    batch = demonstrations(loop.tokenizer, loop.experts[:4])
    states = loop.discriminator.reward_model.states(batch).detach()
    old, advantages = (x * batch.response_mask for x in torch.randn(2, *batch.tokens.shape))
    old = policy.token_logprobs(loop.policy_model, batch).detach() + 0.3 * old  # some ratios are clipped

    def loss():
        if method == "sft":
            return sft_loss(loop.policy_model, batch)
        if method == "grpo":
            trainer = baselines.GRPO(loop.settings, loop.tokenizer, loop.policy_model, loop.experts)
            return trainer.loss(batch, old, advantages)
        return loop.policy_loss(batch, old, advantages, states)

    plain = loss()
    vocabulary = len(logprob.output_layer(loop.policy_model)[0])
    monkeypatch.setattr(logprob, "BLOCK", 5 * vocabulary)  # five rows at a time
    rows = loss()
    assert_close(rows, plain, atol=1e-4, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(rows, parameters), torch.autograd.grad(plain, parameters), strict=True):
        assert b.any() and (a - b).norm() <= 1e-4 * b.norm()


def test_the_expected_reward_is_the_mean_over_actions(shipped, settings):
    """E_{a~pi}[r(s,a) - E r(s,.)] = 0 at every state, summed over all actions."""
    loop = make_loop(shipped, settings, policy_loss="reinforce", group=2)
    for parameter in loop.discriminator.reward_model.parameters():  # some reward that is not the policy's own
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = demonstrations(loop.tokenizer, loop.experts[:2])
    states = loop.discriminator.reward_model.states(batch).detach()  # [B, T, H]
    log_pi = all_logprobs(loop.policy_model, batch)  # [N, V]
    rewards = all_logprobs(loop.discriminator.reward_model.model, batch) - loop.settings.entropy_coef * log_pi
    hidden = policy.hidden_states(loop.policy_model, batch)
    weight, _ = logprob.output_layer(loop.policy_model)
    reward_weight, _ = logprob.output_layer(loop.reward_model.model)
    reward_hidden = states[batch.response_mask.bool()]
    alpha = loop.settings.entropy_coef
    expected = logprob.expected_reward(hidden, weight, reward_hidden, reward_weight, alpha)
    assert_close((log_pi.exp() * (rewards - expected[:, None])).sum(-1), torch.zeros(len(expected)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("loss, group", [("exact", 2), ("exact", 3), ("reinforce", 2), ("reinforce", 3)])
def test_sums_over_actions_and_what_follows_make_the_true_gradient(loss, group, gamma, monkeypatch):
    """Two steps: the mean over all groups of samples of the exact loss's gradient, and of REINFORCE's, is that of
    E[r_0 + gamma r_1]. Ending early is judged against going on."""
    theta = torch.tensor([[0.0, 0.0], [0.2, -0.3]], requires_grad=True)
    rewards, surrogate = torch.tensor([[0.1, -0.4], [2.0, 0.6]]), 0.0
    log_pi = theta.log_softmax(-1)
    expected = (log_pi.exp() * rewards).sum(-1)  # [2], E_{a~pi} r(s_t, a)
    loop = SimpleNamespace(settings=SimpleNamespace(policy_loss=loss, gamma=gamma, group=group, advantage_scale="batch"))
    monkeypatch.setattr(policy, "normalise", lambda advantages, *_: advantages)  # a scale by the batch is a bias
    for probability, mask, r, logprobs in all_groups(log_pi, rewards, group):
        tokens, ones = torch.zeros(group, 3, dtype=torch.long), torch.ones(group, dtype=torch.long)
        batch = data.Batch(tokens, ones, ones + mask.sum(1).long())  # columns: a prompt token, t = 0, t = 1
        r = torch.nn.functional.pad(r, (1, 0))
        advantages = irl.IRL.advantages(loop, batch, r)[:, 1:]
        gained = (advantages * logprobs).sum() + (loss == "exact") * (expected * mask).sum()
        surrogate = surrogate + probability * gained / group
    assert_close(torch.autograd.grad(surrogate, theta)[0], true_gradient(theta, rewards, gamma))


def test_what_follows_is_compared_with_what_follows_the_others():
    """Of the exact loss: A_t = F_t - the mean F of the others that are still writing, F_t = gamma G_{t+1}; by a plain loop."""
    settings = SimpleNamespace(policy_loss="exact", gamma=0.5, group=3, advantage_scale="batch")
    lengths = [4, 3, 4]  # response tokens; the prompt is column 0
    batch = data.make_batch([[1]] * 3, [[1] * length for length in lengths])
    rewards = torch.randn(3, 5) * batch.response_mask
    following = torch.zeros(3, 5)
    for row, length in enumerate(lengths):
        later = 0.0
        for t in range(length, 0, -1):
            following[row, t] = 0.5 * later
            later = float(rewards[row, t]) + 0.5 * later
    found = irl.IRL.advantages(SimpleNamespace(settings=settings), batch, rewards)
    for row, length in enumerate(lengths):
        for t in range(1, length + 1):
            others = [following[i, t] for i in range(3) if i != row and t <= lengths[i]]
            assert found[row, t].item() == pytest.approx(float(following[row, t] - sum(others) / len(others)), abs=1e-5)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("granularity, gamma", [("sparse", 1.0), ("interval", 1.0), ("interval", 0.9), ("dense", 0.9)])
def test_a_trace_that_was_cut_off_is_worth_less_than_every_finished_one(shipped, settings, granularity, gamma, clip):
    """A policy learnt to go on for ever, and to write what the head likes at the length limit: a score above 0 for every step
    pays for length, and behind a clip all finished traces may be alike."""
    loop = make_loop(shipped, settings, reward="head", logit="gail", granularity=granularity, policy_loss="ppo", gamma=gamma,
                     reward_clip=clip)  # fmt: skip
    head = loop.discriminator.reward_model.model.score
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    rollout, _ = loop.rollout(loop.experts[:2], 4)
    mask = rollout.batch.response_mask
    for bias in (0.0, 1000.0):  # every score is positive
        torch.nn.init.constant_(head.bias, bias)
        rollout.finished = torch.ones(8, dtype=torch.bool)
        plain = loop.rewards(rollout)[0]
        rollout.finished = torch.tensor([True, False] * 4)
        changed = loop.rewards(rollout)[0]
        assert torch.equal(changed[::2], plain[::2])
        returns = policy.returns_to_go(changed, mask, gamma)
        worth = [returns[row][mask[row].bool()] for row in range(8)]
        assert max(map(max, worth[1::2])) < min(map(min, worth[::2]))  # at every token, below every token
        advantages = loop.advantages(rollout.batch, changed)
        assert (advantages[1::2].sum(1) < 0).all()
    rollout.finished = torch.zeros(8, dtype=torch.bool)
    alike = loop.rewards(rollout)[0]  # nobody is better than another
    assert not loop.advantages(rollout.batch, alike).any()


def test_without_later_rewards_a_trace_that_was_cut_off_keeps_its_own(shipped, settings):
    """At gamma 0 a token is paid for itself alone, and nothing is to be had from going on."""
    loop = make_loop(shipped, settings, policy_loss="reinforce", gamma=0.0)
    rollout, _ = loop.rollout(loop.experts[:2], 4)
    plain = loop.rewards(rollout)[0]
    rollout.finished = torch.tensor([True, False] * 4)
    assert torch.equal(loop.rewards(rollout)[0], plain)


def test_the_end_token_is_paid(shipped, settings, monkeypatch):
    """The reward of the longest trace's end token reaches its advantage, no other, and the gradient."""
    monkeypatch.setattr(policy, "normalise", lambda advantages, *_: advantages)  # it would rescale all of them
    loop = make_loop(shipped, settings, policy_loss="reinforce", gamma=0.0)
    rollout, _ = loop.rollout(loop.experts[:1], 4)
    batch, states = rollout.batch, loop.discriminator.reward_model.states(rollout.batch).detach()
    lengths = batch.lengths.sort(descending=True)
    row, end = int(lengths.indices[0]), int(lengths.values[0]) - 1
    assert lengths.values[1] <= end and rollout.finished[row]  # alone there
    rewards = 0.1 * rollout.logprobs
    paid = rewards.clone()
    paid[row, end] += 5.0
    before, after = (loop.advantages(batch, r) for r in (rewards, paid))
    assert (after - before).nonzero().tolist() == [[row, end]] and (after - before)[row, end] == pytest.approx(5.0)
    parameters = list(loop.policy_model.parameters())
    gradients = [torch.autograd.grad(loop.policy_loss(batch, rollout.logprobs, a, states), parameters) for a in (before, after)]
    wanted = torch.autograd.grad(-5.0 * policy.token_logprobs(loop.policy_model, batch)[row, end], parameters)
    for one, other, change in zip(*gradients, wanted, strict=True):
        assert_close(other - one, change, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("loss", ["ppo", "reinforce"])
def test_the_policy_loss_equals_the_plain_loop(shipped, settings, loss):
    """Token by token, at a temperature: -min(ratio A, clip(ratio) A) against samples of an older policy, or -A log pi, and
    beta (e^d - d - 1), d = log pi_ref - log pi, and its gradient."""
    loop = make_loop(shipped, settings, policy_loss=loss, gamma=0.9, kl_coef=0.3, temperature=0.7, ppo_clip=0.2)
    for parameter in loop.policy_model.parameters():  # it has moved on from its reference
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = demonstrations(loop.tokenizer, loop.experts[:2])
    advantages, noise = (x * batch.response_mask for x in torch.randn(2, *batch.tokens.shape))
    old = (policy.token_logprobs(loop.policy_model, batch, 0.7).detach() + 0.3 * noise) * batch.response_mask
    fast, slow, clipped = loop.policy_loss(batch, old, advantages, None), 0.0, 0
    for row in range(2):
        ids = batch.tokens[row : row + 1, : batch.lengths[row]]
        log_pi, log_ref = ((m(ids).logits[0] / 0.7).log_softmax(-1) for m in (loop.policy_model, loop.reference))
        for t in range(int(batch.prompt_lengths[row]), ids.shape[1]):
            new, reference, a = log_pi[t - 1, ids[0, t]], log_ref[t - 1, ids[0, t]].detach(), advantages[row, t]
            ratio = (new - old[row, t]).exp()
            d = reference - new
            if loss == "ppo":
                held = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
                slow, clipped = slow - min(ratio * a, held * a), clipped + int(held * a < ratio * a)
            else:
                slow, clipped = slow - a * new, 1
            slow = slow + 0.3 * (d.exp() - d - 1)
    assert clipped
    assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    parameters = list(loop.policy_model.parameters())
    for a, b in zip(torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_half_of_the_negatives_are_old_ones(shipped, settings, monkeypatch):
    loop = make_loop(
        shipped, settings, demonstrations=2, questions=2, rollouts_per_expert=2, perturbed=0, replay=4
    )
    seen = []
    real = loop.discriminator_step
    monkeypatch.setattr(loop, "discriminator_step", lambda c: seen.append(c) or real(c))
    written = {e.question: [] for e in loop.experts}
    for step in range(3):
        rollout, _ = loop.rollout(loop.experts, 2)
        metrics = loop.update_discriminator(loop.experts, rollout, 2)
        comparison = seen[-1]
        assert len(comparison.negative) == 4
        for i, example in enumerate(loop.experts):
            fresh = [rollout.batch.response(2 * i), rollout.batch.response(2 * i + 1)]
            rows = [comparison.negative.response(j) for j in (2 * i, 2 * i + 1)]
            if step == 0:
                assert rows == fresh
            else:
                assert rows[0] == fresh[0] and rows[1] in written[example.question]
            written[example.question] += fresh
    assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("micro_batch", [100, 3])
def test_the_discriminators_loss_equals_the_plain_loop(shipped, settings, micro_batch, monkeypatch):
    """Labels, temperature and weights are those of the settings, token by token, and the gradient is that of the sum."""
    loop = make_loop(shipped, settings, demonstrations=3, questions=3, rollouts_per_expert=1, perturbed=1, replay=0,
                     temperature=0.8, label_smoothing=0.3, reward_nll=0.6, discriminator_coef=0.4,
                     micro_batch=micro_batch)  # fmt: skip
    model = loop.reward_model.model
    for parameter in model.parameters():  # f is not log pi
        parameter.data += 0.02 * torch.randn_like(parameter)
    rollout, _ = loop.rollout(loop.experts, 1)
    samples = [[rollout.batch.response(i)] for i in range(3)]
    comparison = reward.compare(loop.tokenizer, loop.experts, samples, 1, loop.rng)
    sides = ((comparison.expert, 0.85, [0] * 3), (comparison.negative, 0.15, comparison.negative_from.tolist()))
    slow = 0.0
    for batch, target, first in sides:
        for row in range(len(batch)):
            ids = batch.tokens[row : row + 1, : batch.lengths[row]]
            f = model(ids).logits[0].log_softmax(-1)
            log_pi = (loop.policy_model(ids).logits[0] / 0.8).log_softmax(-1).detach()
            start = max(first[row], int(batch.prompt_lengths[row]))
            for t in range(start, ids.shape[1]):
                weight = 0.5 / (ids.shape[1] - start) / len(batch)
                D = (f[t - 1, ids[0, t]] - log_pi[t - 1, ids[0, t]]).sigmoid()
                slow = slow - 0.4 * weight * (target * D.log() + (1 - target) * (1 - D).log())
                if batch is comparison.expert:
                    slow = slow - 0.6 * 2 * weight * f[t - 1, ids[0, t]]
    wanted = torch.autograd.grad(slow, list(model.parameters()))
    gradients = []

    def keep_gradients(optimizer, loss):
        gradients.extend(p.grad.clone() for p in model.parameters())
        return {"loss": loss}

    monkeypatch.setattr(policy, "optimizer_step", keep_gradients)
    fast = loop.discriminator_step(comparison)["loss"]
    assert fast == pytest.approx(float(slow.detach()), rel=1e-4)
    for one, other in zip(gradients, wanted, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_accuracy_is_of_both_sides_and_a_tie_is_half(shipped, settings, monkeypatch):
    loop = make_loop(shipped, settings, demonstrations=4, perturbed=0, rollouts_per_expert=1)
    rollout, _ = loop.rollout(loop.experts, 1)
    rollouts = [[rollout.batch.response(i)] for i in range(4)]
    for logit, expected in ((0.0, 0.5), (3.0, 0.5), (-3.0, 0.5), (None, 1.0), ("turned", 0.0)):
        comparison = reward.compare(loop.tokenizer, loop.experts, rollouts, 0, loop.rng)

        def logits(self, both, scores, log_pi, logit=logit):
            sides = torch.tensor([1.0] * (len(both) // 2) + [-1.0] * (len(both) // 2))[:, None]
            constant = 3 * sides if logit is None else -3 * sides if logit == "turned" else logit
            return (0 * scores + constant) * both.response_mask

        monkeypatch.setattr(reward.Discriminator, "logits", logits)
        found = discriminator_update(loop.discriminator, loop.reward_optimizer, loop.policy_model, comparison)
        assert found["accuracy"] == pytest.approx(expected), logit


@pytest.mark.parametrize("granularity", ["dense", "sparse"])
def test_the_lowest_reward_is_one_that_was_read(shipped, settings, granularity, monkeypatch):
    """Neither prompt, padding nor a token between two scores, where r_t is 0, is the lowest."""
    loop = make_loop(shipped, settings, granularity=granularity, policy_loss="ppo")
    rollout, _ = loop.rollout(loop.experts[:2], 4)
    mask = rollout.batch.response_mask
    monkeypatch.setattr(loop.discriminator.reward_model, "scores", lambda batch, hidden: (
        2 + torch.arange(batch.tokens.shape[1])) * batch.response_mask)  # fmt: skip
    rollout.logprobs.zero_()
    _, _, metrics = loop.rewards(rollout)
    whole = ((2 + torch.arange(mask.shape[1])) * mask).sum(1)
    lowest = 2 + rollout.batch.prompt_lengths if granularity == "dense" else whole
    assert metrics["lowest"] == pytest.approx(float(lowest.float().mean()), rel=1e-5)


def test_sft_fits_its_demonstrations(shipped, settings):
    s = replace(settings, sft_steps=15, sft_lr=1e-3)
    trainer = baselines.SFT(s, shipped[1], copy.deepcopy(shipped[0]), examples_of(shipped[1], "words", "train", 16))
    history = [trainer.step()["policy"]["loss"] for _ in range(15)]
    assert history[-1] < 0.5 * history[0]


def test_grpo_needs_the_verifier(shipped, settings):
    trainer = baselines.GRPO(
        settings,
        shipped[1],
        copy.deepcopy(shipped[0]),
        examples_of(shipped[1], "words", "train", 8),
    )
    assert 0 <= trainer.step()["reward"]["mean"] <= 1
    with data.no_verifier(), pytest.raises(RuntimeError):
        trainer.step()


def test_grpo_leaves_out_only_what_teaches_nothing(shipped, settings, monkeypatch):
    """The gradient is that of all rows, those of groups that were all right or all wrong included."""
    s = replace(settings, questions=4, group=4)
    examples = examples_of(shipped[1], "words", "train", 4)
    trainer = baselines.GRPO(s, shipped[1], copy.deepcopy(shipped[0]), examples)
    right = iter([1, 0, 0, 1] + [1] * 4 + [0] * 4 + [0, 0, 0, 1])
    monkeypatch.setattr(data, "is_correct", lambda example, text: next(right))
    seen, rollouts, sample, loss = [], [], policy.sample, trainer.loss
    monkeypatch.setattr(policy, "sample", lambda *args: rollouts.append(sample(*args)) or rollouts[0])
    monkeypatch.setattr(trainer, "loss", lambda batch, *rest: seen.append(len(batch)) or loss(batch, *rest))
    found = trainer.step()["policy"]

    model, batch, mask = copy.deepcopy(shipped[0]), rollouts[0].batch, rollouts[0].batch.response_mask
    outcomes = torch.tensor([1.0, 0, 0, 1] + [1] * 4 + [0] * 4 + [0, 0, 0, 1])
    advantages = policy.grpo_advantages(outcomes, 4)[:, None]
    all_rows = policy.ppo_loss(policy.token_logprobs(model, batch), rollouts[0].logprobs, advantages, s.ppo_clip) * mask
    (all_rows.sum() / mask.sum()).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert sum(seen) == 8 and found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert found["loss"] == pytest.approx(float(all_rows.detach().sum() / mask.sum()), abs=1e-6)


def test_a_grpo_step_without_any_advantage_moves_nothing(shipped, settings, monkeypatch):
    trainer = baselines.GRPO(settings, shipped[1], copy.deepcopy(shipped[0]), examples_of(shipped[1], "words", "train", 8))
    monkeypatch.setattr(data, "is_correct", lambda example, text: True)
    assert trainer.step()["policy"] == {"loss": 0.0, "grad_norm": 0.0, "skipped": 0}
    for parameter, start in zip(trainer.policy_model.parameters(), shipped[0].parameters()):
        assert torch.equal(parameter, start)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_grpos_loss_equals_the_plain_loop(shipped, settings, temperature):
    """-min(ratio A, clip(ratio) A) of the policy at its temperature, token by token, and its gradient."""
    s = replace(settings, temperature=temperature, ppo_clip=0.1)
    trainer = baselines.GRPO(s, shipped[1], copy.deepcopy(shipped[0]), examples_of(shipped[1], "words", "train", 2))
    batch = demonstrations(shipped[1], trainer.examples)
    advantages, noise = (x * batch.response_mask for x in torch.randn(2, *batch.tokens.shape))
    old = policy.token_logprobs(trainer.policy_model, batch, temperature).detach() + 0.3 * noise
    fast, slow = trainer.loss(batch, old, advantages), 0.0
    for row in range(2):
        ids = batch.tokens[row : row + 1, : batch.lengths[row]]
        log_pi = (trainer.policy_model(ids).logits[0] / temperature).log_softmax(-1)
        for t in range(int(batch.prompt_lengths[row]), ids.shape[1]):
            ratio, a = (log_pi[t - 1, ids[0, t]] - old[row, t]).exp(), advantages[row, t]
            slow = slow - min(ratio * a, min(max(ratio, torch.tensor(0.9)), torch.tensor(1.1)) * a)
    assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    parameters = list(trainer.policy_model.parameters())
    for a, b in zip(torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_grpo_grades_each_sample_on_its_own_question(shipped, settings, monkeypatch):
    """Four questions with four answers. One sample of each is right; the next question's answer is wrong here."""
    s = replace(settings, questions=4, group=4)
    examples = [data.Example(f"1+{i}?", f"1+{i}={i + 1}", str(i + 1)) for i in range(1, 5)]
    examples = data.tokenize(shipped[1], examples)
    trainer = baselines.GRPO(s, shipped[1], copy.deepcopy(shipped[0]), examples)
    answers = {shipped[1].decode(data.prompt_ids(shipped[1], e.question)): int(e.answer) for e in examples}
    seen, loss = [], trainer.loss

    def sample(model, prompts, *how):
        rows, responses = [], []
        for prompt in prompts:
            right = answers[shipped[1].decode(prompt)]
            for written in (right, right % 5 + 1, right % 5 + 2, 0):
                rows.append(prompt)
                responses.append(data.response_ids(shipped[1], data.response_text("", str(written))))
        batch = data.make_batch(rows, responses)
        return policy.Rollout(batch, -batch.response_mask, torch.ones(len(rows), dtype=torch.bool))

    monkeypatch.setattr(policy, "sample", sample)
    monkeypatch.setattr(trainer, "loss", lambda batch, old, a: seen.append(a) or loss(batch, old, a))
    assert trainer.step()["reward"]["mean"] == 0.25
    advantages = torch.cat([a.sum(1) for a in seen]).view(4, 4)
    assert (advantages[:, 0] > 0).all() and (advantages[:, 1:] < 0).all()


@pytest.mark.parametrize("kind", ["irl", "grpo"])
def test_rollouts_are_drawn_at_the_temperature_and_from_the_nucleus(shipped, settings, kind, monkeypatch):
    """A nucleus of next to nothing holds the likeliest token alone: all samples of a question are the greedy one. And log pi is
    that of the temperature."""
    s = dict(temperature=0.7, top_p=0.01)
    if kind == "irl":
        trainer = make_loop(shipped, settings, **s)
    else:
        examples = examples_of(shipped[1], "words", "train", 16)
        trainer = baselines.GRPO(replace(settings, **s), shipped[1], copy.deepcopy(shipped[0]), examples)
    rollouts, plain = [], policy.rollout
    monkeypatch.setattr(policy, "rollout", lambda *args: rollouts.append(plain(*args)) or rollouts[-1])
    monkeypatch.setattr(policy, "optimizer_step", lambda *_: {"loss": 0.0, "grad_norm": 0.0, "skipped": 0})
    trainer.step()
    rollout = rollouts[0][0]
    batch = rollout.batch
    prompts = [batch.tokens[row, : batch.prompt_lengths[row]].tolist() for row in range(len(batch))]
    greedy = policy.sample(
        trainer.policy_model, prompts[:: settings.group], trainer.end_tokens, settings.max_new_tokens, temperature=0.0
    ).batch
    for row in range(len(batch)):
        assert batch.response(row) == greedy.response(row // settings.group)
    with torch.no_grad():
        assert_close(rollout.logprobs, policy.token_logprobs(trainer.policy_model, rollout.batch, 0.7), atol=1e-4, rtol=1e-4)


def test_every_update_has_the_rate_that_the_settings_give(shipped, settings, monkeypatch):
    """The policy's rises and falls, the discriminator's is --warm-up-lr, then --reward-lr; each as it is when it steps."""
    rates, real = [], policy.optimizer_step
    monkeypatch.setattr(policy, "optimizer_step", lambda optimizer, *rest: (
        rates.append((optimizer, optimizer.param_groups[0]["lr"])) or real(optimizer, *rest)))  # fmt: skip
    rising = [0.5, 0.95, 0.9]  # of 20 steps the first three: policy.set_rate
    loop = make_loop(shipped, settings, max_steps=20, policy_lr=1e-3, warm_up_lr=3e-4, reward_lr=2e-5)
    loop.warm_up()
    for _ in range(3):
        loop.step()
    assert [rate for optimizer, rate in rates if optimizer is loop.reward_optimizer] == [3e-4, 2e-5, 2e-5, 2e-5]
    assert [rate for optimizer, rate in rates if optimizer is loop.policy_optimizer] == pytest.approx([1e-3 * r for r in rising])
    for kind, steps, lr in ((baselines.SFT, "sft_steps", "sft_lr"), (baselines.GRPO, "grpo_steps", "grpo_lr")):
        rates.clear()
        s = replace(settings, **{steps: 20, lr: 1e-3})
        trainer = kind(s, shipped[1], copy.deepcopy(shipped[0]), examples_of(shipped[1], "words", "train", 8))
        for _ in range(3):
            trainer.step()
        assert [rate for _, rate in rates] == pytest.approx([1e-3 * r for r in rising])


def test_rates_rise_and_fall():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for done in range(20):
        policy.set_rate(optimizer, 1.0, done, 20)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.5 and max(rates) == rates[1] == 0.95 and rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_starts_at_the_averaged_reward(shipped, settings, temperature):
    loop = make_loop(shipped, settings, start="reward", reward_average=0.25, entropy_coef=0.4, temperature=temperature)
    parameters = list(loop.discriminator.reward_model.parameters())
    before = [p.detach().clone() for p in parameters]
    loop.warm_up()
    learnt = [p.detach().clone() for p in parameters]
    loop.end_warm_up()
    assert any(not torch.equal(a, b) for a, b in zip(before, learnt))
    for b, a, f in zip(before, learnt, parameters, strict=True):
        assert_close(f.detach(), 0.25 * b + 0.75 * a)
    batch = demonstrations(loop.tokenizer, loop.experts[:2])
    f, pi = (all_logprobs(m, batch) for m in (loop.discriminator.reward_model.model, loop.policy_model))
    pi = (pi / temperature).log_softmax(-1)  # as it samples
    assert_close(pi, (f / 0.4).log_softmax(-1), atol=2e-4, rtol=1e-4)  # no policy has a higher E[f - alpha log pi]
    assert loop.step()["policy"]["skipped"] == 0  # and it can be trained


def product(layer: lora.LoRALinear) -> torch.Tensor:
    """What an adapter adds to its matrix."""
    return (layer.scale * layer.B @ layer.A).detach().clone()


def test_the_policy_starts_at_the_averaged_adapter(shipped, settings):
    """With share s of the start, each matrix is W + (1 - s) times what the adapter had learnt; the policy's likewise."""
    base, _ = loading.load_policy("base")
    models = [lora.adapt(base, 4, 8.0) for _ in range(2)]  # their A differ
    discriminator = reward.Discriminator(
        reward.LikelihoodReward(models[1]), "airl", "dense", 0, reward.find_step_end_tokens(shipped[1], len(shipped[1]))
    )
    settings = replace(settings, start="reward", reward_average=0.25, warm_up_lr=1e-2)
    loop = irl.IRL(settings, shipped[1], models[0], discriminator, examples_of(shipped[1], "words", "train", 16))
    layers = [[m for m in model.modules() if isinstance(m, lora.LoRALinear)] for model in models]
    for _ in range(3):  # B = 0 at first: A moves from the second update on
        loop.warm_up()
    learnt, frozen = [product(layer) for layer in layers[1]], [p.clone() for p in base.parameters()]
    loop.end_warm_up()
    for before, of_reward, of_policy in zip(learnt, layers[1], layers[0], strict=True):
        assert before.abs().max() > 0
        assert_close(product(of_reward), 0.75 * before, atol=1e-5 * float(before.abs().max()), rtol=1e-5)
        assert torch.equal(product(of_policy), product(of_reward))
    batch = demonstrations(shipped[1], loop.experts[:2])
    with torch.no_grad():  # and at the optimum of r_t = f - alpha log pi, while the base's norm is left alone
        of_policy, of_reward = (model(batch.tokens).logits for model in models)
    assert_close(of_policy, of_reward / settings.entropy_coef, atol=1e-3, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(frozen, base.parameters(), strict=True))
    assert loop.step()["policy"]["skipped"] == 0


@pytest.mark.parametrize("start, rank", [("reward", 0), ("reward", 2), ("base", 0), ("base", 2)])
def test_the_reference_is_the_policy_at_its_first_step(shipped, settings, start, rank):
    """After the warm-up pi_ref = pi, so the KL is 0; then the policy moves and the reference does not."""
    base, s = loading.load_policy("base")[0], replace(settings, start=start, kl_coef=0.5, warm_up_lr=1e-2, policy_lr=1e-3)
    models = [lora.adapt(base, rank, 8.0) if rank else copy.deepcopy(base) for _ in range(2)]
    ends_step = reward.find_step_end_tokens(shipped[1], len(shipped[1]))
    discriminator = reward.Discriminator(reward.LikelihoodReward(models[1]), "airl", "dense", 0, ends_step)
    loop = irl.IRL(s, shipped[1], models[0], discriminator, examples_of(shipped[1], "words", "train", 16))
    for _ in range(3):
        loop.warm_up()
    loop.end_warm_up()
    batch = demonstrations(shipped[1], loop.experts[:4])

    def logprobs():
        with torch.no_grad():
            return [all_logprobs(model, batch) for model in (loop.policy_model, loop.reference)]

    (pi, reference), start_at = logprobs(), all_logprobs(base, batch).detach()
    assert torch.equal(pi, reference) and torch.allclose(pi, start_at, atol=1e-3) == (start == "base")
    for _ in range(2):
        loop.step()
    pi, after = logprobs()
    assert torch.equal(after, reference) and not torch.allclose(pi, reference, atol=1e-3)
    held = {id(p) for g in loop.policy_optimizer.param_groups for p in g["params"]}
    assert not held & {id(p) for p in lora.trained(loop.reference)}


def test_the_first_token_is_that_of_the_demonstrations(shipped):
    experts = examples_of(shipped[1], "words", "train", 5)
    batch = demonstrations(shipped[1], experts)
    first = policy.token_logprobs(shipped[0], batch)[torch.arange(5), batch.prompt_lengths].mean()
    assert irl.first_logprob(shipped[0], experts) == pytest.approx(float(first.detach()), abs=1e-5)


def test_a_start_at_the_base_leaves_the_policy(shipped, settings):
    loop = make_loop(shipped, settings, start="base", reward_average=0.5)
    loop.warm_up()
    loop.end_warm_up()
    for a, b in zip(loop.policy_model.parameters(), shipped[0].parameters()):
        assert torch.equal(a, b)
