"""irl.py and baselines.py: the loop, stage by stage and as a whole."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import all_groups, all_logprobs, changed, demonstrations, examples_of, true_gradient
from torch.testing import assert_close

import baselines
import data
import irl
import negatives
import policy
import reward
from engine import loading, lora
from tasks import answers, countdown, words


def make_loop(shipped, settings, **changes):
    s = changed(settings, **changes)
    reward_model = reward.load_reward(s.reward, "base")
    discriminator = reward.make_discriminator(
        reward_model, shipped[1], s.logit, s.granularity, s.reward_clip
    )
    experts = examples_of(shipped[1], "words", "train", s.demonstrations)
    extra = []
    if s.extra_questions:
        others = examples_of(shipped[1], "words", "train", s.extra_questions, seed=9)
        extra = [data.question_only(example) for example in others]
    return irl.IRL(s, shipped[1], copy.deepcopy(shipped[0]), discriminator, experts, extra)


def make_trainer(kind, shipped, settings, demonstrations, **changes):
    """SFT or GRPO on so many examples."""
    examples = examples_of(shipped[1], "words", "train", demonstrations)
    return kind(changed(settings, **changes), shipped[1], copy.deepcopy(shipped[0]), examples)


def disturb(*models):
    """Move the weights a little, so that policy, reward and reference differ."""
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)


def plain_logprobs(model, batch, temperature=1.0, softcap=0.0):
    """{(row, t): log pi of every action [V]} of each response token, row by row.

    These functions read a softcap in the model's config. The forward pass of Qwen2, which has no
    cap, does not: so logits are capped here.
    """
    found = {}
    for row in range(len(batch)):
        logits = model(batch.tokens[row : row + 1, : batch.lengths[row]]).logits[0]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        log_pi = (logits / temperature).log_softmax(-1)
        for t in range(int(batch.prompt_lengths[row]), int(batch.lengths[row])):
            found[row, t] = log_pi[t - 1]
    return found


def assert_same_loss(fast, slow, model):
    """Two losses and their gradients for all weights of a model."""
    parameters = list(model.parameters())
    assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(fast, parameters)
    for a, b in zip(gradients, torch.autograd.grad(slow, parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def random_like(batch):
    return torch.randn(batch.tokens.shape) * batch.response_mask


def keep_calls(monkeypatch, owner, name):
    """A list that gets what a function returns, at each call."""
    results = []
    real = getattr(owner, name)

    def kept(*args, **options):
        results.append(real(*args, **options))
        return results[-1]

    monkeypatch.setattr(owner, name, kept)
    return results


# the whole loop -------------------------------------------------------------------------------


def accuracy(loop, questions=64):
    examples = examples_of(loop.tokenizer, "words", "validation", questions)
    prompts = [example.prompt for example in examples]
    generator = torch.Generator().manual_seed(0)
    rollout = policy.sample(
        loop.policy_model, prompts, loop.end_tokens, 64, group=4, generator=generator
    )
    right = 0
    for row in range(len(rollout.batch)):
        text = data.decode(loop.tokenizer, rollout.batch.response(row))
        right += data.is_correct(examples[row // 4], text)
    return right / len(rollout.batch)


def test_a_policy_improves_from_demonstrations_alone(shipped, settings):
    """The whole loop, small: well above its base, without a look at any answer."""
    changes = dict(demonstrations=64, questions=16, group=4, max_steps=25)
    loop = make_loop(shipped, settings, warm_up_lr=3e-4, policy_lr=5e-4, **changes)
    before = accuracy(loop)
    for _ in range(20):
        loop.warm_up()
    for _ in range(25):
        loop.step()
    assert accuracy(loop) > before + 0.15


@pytest.mark.parametrize(
    "changes",
    [
        dict(policy_loss="reinforce", gamma=0.9, extra_questions=8),
        dict(policy_loss="ppo", gamma=0.9, epochs=2, kl_coef=0.1),
        dict(policy_loss="exact", gamma=0.5, replay=0, perturbed=0),
        dict(policy_loss="ppo", granularity="sparse", gamma=1.0, advantage_scale="group"),
        dict(policy_loss="ppo", granularity="interval", gamma=1.0),
        dict(policy_loss="ppo", reward="head", logit="gail"),
    ],
)
def test_every_variant_takes_steps_and_reports_numbers(shipped, settings, changes):
    loop = make_loop(shipped, settings, **changes)
    before = [p.clone() for p in loop.policy_model.parameters()]
    loop.warm_up()
    for _ in range(2):
        metrics = loop.step()
    assert {"rollout", "discriminator", "reward", "policy"} == set(metrics)
    for stage in metrics.values():
        assert torch.tensor(list(stage.values())).isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(before, loop.policy_model.parameters()))


def test_training_raises_if_the_answer_check_is_called(shipped, settings, monkeypatch):
    """However it is reached: from data, or past it from the tasks themselves."""
    loop = make_loop(shipped, settings)
    expert = loop.experts[0]
    problem = data.load_examples("countdown", "train", 1)[0]
    text = "<answer>1</answer>"
    checks = [
        (data.is_correct, expert, text),
        (data.first_error, expert, text),
        (answers.same_answer, "1", expert.answer),
        (words.is_right, expert, text),
        (words.first_error, expert, text),
        (countdown.is_right, problem, text),
        (countdown.first_error, problem, text),
    ]
    honest = loop.rollout

    def cheating(*args):
        for check, *inputs in checks:
            with pytest.raises(RuntimeError, match="without a verifier"):
                check(*inputs)
        data.is_correct(expert, text)

    for method in (loop.warm_up, loop.step):
        monkeypatch.setattr(loop, "rollout", cheating)
        with pytest.raises(RuntimeError, match="without a verifier"):
            method()
        monkeypatch.setattr(loop, "rollout", honest)
        method()
    assert data.is_correct(expert, f"<answer>{expert.answer}</answer>")  # unlocked again outside


def test_broken_copies_of_every_kind_are_made_behind_the_lock():
    """Another option is found without asking whether an answer is right."""
    options = ("Mitral valve", "Aortic valve", "Tricuspid")
    choice = data.Example("Which?", "It is the 2nd of 3 valves: 4-2=2.", "B", options)
    with data.no_verifier():
        for kind in (*negatives.BROKEN, "carried", "both", "all"):
            assert negatives.perturb(choice, random.Random(0), kind) is not None
        broken = [negatives.perturb(choice, random.Random(seed), "answer") for seed in range(20)]
    assert {example.answer for example in broken} == {"A", "C"}


def test_every_update_has_the_rate_that_the_settings_give(shipped, settings, monkeypatch):
    """The policy's rises and falls; the discriminator's is --warm-up-lr, then --reward-lr."""
    rates = []
    real = policy.optimizer_step

    def noted(optimizer, *rest):
        rates.append((optimizer, optimizer.param_groups[0]["lr"]))
        return real(optimizer, *rest)

    monkeypatch.setattr(policy, "optimizer_step", noted)
    loop = make_loop(
        shipped, settings, max_steps=20, policy_lr=1e-3, warm_up_lr=3e-4, reward_lr=2e-5
    )
    loop.warm_up()
    for _ in range(3):
        loop.step()
    of_reward = [rate for optimizer, rate in rates if optimizer is loop.reward_optimizer]
    of_policy = [rate for optimizer, rate in rates if optimizer is loop.policy_optimizer]
    rising = pytest.approx([0.5e-3, 0.95e-3, 0.9e-3])  # of 20 steps the first three
    assert of_reward == [3e-4, 2e-5, 2e-5, 2e-5] and of_policy == rising
    rates.clear()
    loop = make_loop(shipped, settings, warm_up=20, warm_up_lr=1e-3, warm_up_decay=True)
    for _ in range(3):
        loop.warm_up()
    assert [rate for _, rate in rates] == rising
    for kind, changes in (
        (baselines.SFT, dict(sft_steps=20, sft_lr=1e-3)),
        (baselines.GRPO, dict(grpo_steps=20, grpo_lr=1e-3)),
    ):
        rates.clear()
        trainer = make_trainer(kind, shipped, settings, 8, **changes)
        for _ in range(3):
            trainer.step()
        assert [rate for _, rate in rates] == rising


# 1. rollout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["irl", "grpo"])
def test_rollouts_are_drawn_at_the_temperature_and_from_the_nucleus(
    shipped, settings, kind, monkeypatch
):
    """A nucleus of next to nothing holds the likeliest token alone: all samples are greedy."""
    changes = dict(temperature=0.7, top_p=0.01)
    if kind == "irl":
        trainer = make_loop(shipped, settings, **changes)
    else:
        trainer = make_trainer(baselines.GRPO, shipped, settings, 16, **changes)
    rollouts = keep_calls(monkeypatch, policy, "rollout")
    monkeypatch.setattr(policy, "optimizer_step", lambda *_: {"loss": 0.0})
    trainer.step()
    rollout = rollouts[0][0]
    batch = rollout.batch
    prompts = []
    for row in range(0, len(batch), settings.group):
        prompts.append(batch.tokens[row, : batch.prompt_lengths[row]].tolist())
    greedy = policy.sample(
        trainer.policy_model, prompts, trainer.end_tokens, settings.max_new_tokens, temperature=0.0
    )
    for row in range(len(batch)):
        assert batch.response(row) == greedy.batch.response(row // settings.group)
    with torch.no_grad():
        log_pi = policy.token_logprobs(trainer.policy_model, batch, 0.7)
    assert_close(rollout.logprobs, log_pi, atol=1e-4, rtol=1e-4)


def test_extra_questions_are_answered_and_never_compared(shipped, settings):
    loop = make_loop(shipped, settings, extra_questions=8)
    experts = {example.question for example in loop.experts}
    compared, asked = loop.draw()
    # They are half of the step's questions.
    assert [example.question in experts for example in asked] == [True, True, False, False]
    assert compared == asked[:2]
    assert not any(example.response for example in asked[2:])


def test_where_the_reward_stands_still_all_questions_are_alike(shipped, settings):
    loop = make_loop(shipped, settings, extra_questions=32, reward_lr=0.0)
    before = [p.clone() for p in loop.reward_model.parameters()]
    assert "discriminator" not in loop.step()
    assert all(torch.equal(a, b) for a, b in zip(before, loop.reward_model.parameters()))
    experts = {example.question for example in loop.experts}
    drawn = [example.question in experts for _ in range(400) for example in loop.draw()[1]]
    assert abs(sum(drawn) / len(drawn) - 16 / 48) < 0.07  # not half of them


# 2. discriminator -----------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [100, 3])
def test_the_discriminators_loss_equals_the_plain_loop(shipped, settings, micro_batch, monkeypatch):
    """Labels, temperature and weights of the settings, token by token, and the gradient."""
    changes = dict(demonstrations=3, questions=3, rollouts_per_expert=1, perturbed=1, replay=0)
    changes |= dict(temperature=0.8, label_smoothing=0.3, reward_nll=0.6, discriminator_coef=0.4)
    loop = make_loop(shipped, settings, micro_batch=micro_batch, **changes)
    model = loop.reward_model.model
    disturb(model)
    rollout, _ = loop.rollout(loop.experts, 1)
    samples = [[rollout.batch.response(i)] for i in range(3)]
    comparison = reward.compare(loop.tokenizer, loop.experts, samples, 1, loop.rng)
    batch = comparison.batch
    f = plain_logprobs(model, batch)
    log_pi = plain_logprobs(loop.policy_model, batch, 0.8)
    n_negatives = len(batch) - 3
    slow = 0.0
    for row in range(len(batch)):
        is_expert = comparison.kinds[row] == reward.EXPERT
        label = 0.85 if is_expert else 0.15
        first = int(comparison.first[row])
        n_tokens = int(batch.lengths[row]) - first
        for t in range(first, int(batch.lengths[row])):
            token = batch.tokens[row, t]
            weight = 0.5 / n_tokens / (3 if is_expert else n_negatives)
            D = (f[row, t][token] - log_pi[row, t][token].detach()).sigmoid()
            slow = slow - 0.4 * weight * (label * D.log() + (1 - label) * (1 - D).log())
            if is_expert:
                slow = slow - 0.6 * f[row, t][token] / n_tokens / 3
    wanted = torch.autograd.grad(slow, list(model.parameters()))
    monkeypatch.setattr(policy, "optimizer_step", lambda optimizer, loss: {"loss": loss})
    fast = loop.discriminator_step(comparison)["loss"]
    assert fast == pytest.approx(float(slow.detach()), rel=1e-4)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6


def test_half_of_the_negatives_are_old_ones(shipped, settings, monkeypatch):
    changes = dict(demonstrations=2, questions=2, rollouts_per_expert=2, perturbed=0, replay=4)
    loop = make_loop(shipped, settings, **changes)
    comparisons = keep_calls(monkeypatch, reward, "compare")
    written = {example.question: [] for example in loop.experts}
    for step in range(3):
        rollout, _ = loop.rollout(loop.experts, 2)
        loop.update_discriminator(loop.experts, rollout, 2)
        batch = comparisons[-1].batch
        assert [reward.KINDS[kind] for kind in comparisons[-1].kinds] == ["expert"] + [
            "sample"
        ] * 2 + ["expert"] + ["sample"] * 2
        for i, example in enumerate(loop.experts):
            fresh = [rollout.batch.response(2 * i), rollout.batch.response(2 * i + 1)]
            rows = [batch.response(3 * i + 1), batch.response(3 * i + 2)]
            old = written[example.question]
            assert rows == fresh if step == 0 else rows[0] == fresh[0] and rows[1] in old
            old += fresh


def test_broken_copies_alone_are_enough_to_learn_from(shipped, settings, monkeypatch):
    """rollouts_per_expert 0: the discriminator asks the policy for nothing."""
    changes = dict(demonstrations=8, questions=4, rollouts_per_expert=0, perturbed=3)
    loop = make_loop(shipped, settings, reward_lr=1e-3, **changes)
    comparisons = keep_calls(monkeypatch, reward, "compare")
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sample", None)
        assert abs(loop.warm_up()["accuracy"] - 0.5) < 0.01  # AIRL's f is log pi yet
        for _ in range(9):
            metrics = loop.warm_up()
    assert metrics["accuracy"] > 0.55 and metrics["d_expert"] > metrics["d_negative"]
    loop.step()
    assert {reward.KINDS[kind] for kind in comparisons[-1].kinds} == {"expert", "broken"}


def test_without_its_discriminator_a_reward_learns_the_likelihood_alone(
    shipped, settings, monkeypatch
):
    """An update moves the reward as supervised learning would; no negative is sampled or seen."""
    loop = make_loop(shipped, settings, discriminator_coef=0.0)
    comparisons = keep_calls(monkeypatch, reward, "compare")
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sample", None)
        loop.warm_up()
    alone = copy.deepcopy(shipped[0])
    optimizer = policy.make_optimizer(alone, settings.warm_up_lr)
    batch = comparisons[0].batch
    log_p = policy.token_logprobs(alone, batch).sum(1) / batch.response_mask.sum(1)
    (-log_p.mean()).backward()
    policy.optimizer_step(optimizer, 0.0)
    for a, b in zip(loop.reward_model.parameters(), alone.parameters(), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert "discriminator" in loop.step()
    for comparison in comparisons:
        assert (comparison.kinds == reward.EXPERT).all()


# 3. reward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, softcap", [(0.7, 0.0), (1.4, 5.0)])
def test_f_is_the_reward_at_temperature_one(shipped, settings, temperature, softcap):
    """r_t = f - alpha log pi: f capped as its model is, log pi at the policy's temperature."""
    changes = dict(policy_loss="reinforce", gamma=0.0, temperature=temperature)
    loop = make_loop(shipped, settings, **changes)
    reward_model = loop.reward_model.model
    reward_model.config.final_logit_softcapping = softcap or None
    disturb(reward_model)
    rollout, _ = loop.rollout(loop.experts[:1], 2)
    rewards, _, metrics = loop.rewards(rollout)
    log_pi = plain_logprobs(loop.policy_model, rollout.batch, temperature)
    f = plain_logprobs(reward_model, rollout.batch, 1.0, softcap)
    alpha = loop.settings.entropy_coef
    wanted = torch.zeros_like(rewards)
    for row, t in f:
        token = rollout.batch.tokens[row, t]
        wanted[row, t] = (f[row, t] - alpha * log_pi[row, t])[token].detach()
    assert_close(rewards, wanted, atol=1e-3, rtol=0)
    assert metrics["mean"] == pytest.approx(float(wanted.sum()) / len(f), abs=1e-4)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize(
    "granularity, gamma", [("sparse", 1.0), ("interval", 0.9), ("dense", 0.9), ("dense", 0.0)]
)
def test_a_trace_that_was_cut_off_is_worth_less_than_every_finished_one(
    shipped, settings, granularity, gamma, clip
):
    """A policy learnt to go on for ever, and to write what the head likes at the length limit.

    A score above 0 for every step pays for length, and behind a clip all traces may be alike. At
    gamma 0 a token is paid for itself alone: nothing is to be had from going on.
    """
    changes = dict(reward="head", logit="gail", policy_loss="ppo", reward_clip=clip)
    loop = make_loop(shipped, settings, granularity=granularity, gamma=gamma, **changes)
    head = loop.reward_model.model.score
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    rollout, _ = loop.rollout(loop.experts[:2], 4)
    mask = rollout.batch.response_mask
    for bias in (0.0, 1000.0):  # every score is positive
        torch.nn.init.constant_(head.bias, bias)
        rollout.finished = torch.ones(8, dtype=torch.bool)
        plain = loop.rewards(rollout)[0]
        rollout.finished = torch.tensor([True, False] * 4)
        changed = loop.rewards(rollout)[0]
        if gamma == 0:
            assert torch.equal(changed, plain)
            continue
        assert torch.equal(changed[::2], plain[::2])
        # At every token, below every token.
        returns = policy.returns_to_go(changed, mask, gamma)
        of_cut_off = returns[1::2][mask[1::2].bool()]
        assert of_cut_off.max() < returns[::2][mask[::2].bool()].min()
        assert (loop.advantages(rollout.batch, changed)[1::2].sum(1) < 0).all()
    rollout.finished = torch.zeros(8, dtype=torch.bool)
    if gamma:  # nobody is better than another
        assert not loop.advantages(rollout.batch, loop.rewards(rollout)[0]).any()


# 4. policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gamma, temperature, softcap", [(0.0, 1.4, 5.0), (0.9, 0.7, 0.0), (0.9, 0.7, 5.0)]
)
def test_exact_loss_equals_the_plain_loop(shipped, settings, gamma, temperature, softcap):
    """-sum_a pi(a|s_t) (f(s_t,a) - alpha log pi(a|s_t)) - A_t log pi(a_t|s_t), and its gradient.

    A_t is of what follows. pi is the policy at its temperature, f at temperature 1, both capped.
    """
    changes = dict(policy_loss="exact", gamma=gamma, temperature=temperature)
    loop = make_loop(shipped, settings, **changes)
    for model in (loop.policy_model, loop.reward_model.model):
        model.config.final_logit_softcapping = softcap or None
        disturb(model)
    batch = demonstrations(loop.tokenizer, loop.experts[:2])
    advantages = random_like(batch)
    states = loop.reward_model.states(batch).detach()
    fast = loop.policy_loss(batch, torch.zeros(batch.tokens.shape), advantages, states)
    log_pi = plain_logprobs(loop.policy_model, batch, temperature, softcap)
    f = plain_logprobs(loop.reward_model.model, batch, 1.0, softcap)
    slow = 0.0
    for row, t in log_pi:
        pi = log_pi[row, t].exp()
        u = f[row, t].detach() - loop.settings.entropy_coef * log_pi[row, t]
        slow = slow - (pi * u).sum()
        if gamma:
            slow = slow - advantages[row, t] * log_pi[row, t][batch.tokens[row, t]]
    assert_same_loss(fast, slow, loop.policy_model)


@pytest.mark.parametrize("loss", ["ppo", "reinforce", "grpo"])
def test_the_policy_loss_equals_the_plain_loop(shipped, settings, loss):
    """Token by token, at a temperature, against samples of an older policy, and its gradient.

    -min(ratio A, clip(ratio) A), or -A log pi; plus beta (e^d - d - 1), d = log pi_ref - log pi.
    """
    changes = dict(gamma=0.9, kl_coef=0.3, temperature=0.7, ppo_clip=0.1)
    if loss == "grpo":
        loop = make_trainer(baselines.GRPO, shipped, settings, 2, **changes)
        experts = loop.examples
    else:
        loop = make_loop(shipped, settings, policy_loss=loss, **changes)
        experts = loop.experts[:2]
    disturb(loop.policy_model)  # it has moved on from its reference
    batch = demonstrations(loop.tokenizer, experts)
    advantages = random_like(batch)
    old = policy.token_logprobs(loop.policy_model, batch, 0.7).detach() + 0.3 * random_like(batch)
    if loss == "grpo":
        fast = loop.loss(batch, old, advantages)
    else:
        fast = loop.policy_loss(batch, old, advantages, None)
    reference = plain_logprobs(loop.reference, batch, 0.7)
    slow = 0.0
    n_clipped = 0
    for (row, t), log_pi in plain_logprobs(loop.policy_model, batch, 0.7).items():
        token = batch.tokens[row, t]
        A = advantages[row, t]
        ratio = (log_pi[token] - old[row, t]).exp()
        held = min(max(ratio, torch.tensor(0.9)), torch.tensor(1.1))
        if loss == "reinforce":
            slow = slow - A * log_pi[token]
        else:
            slow = slow - min(ratio * A, held * A)
            n_clipped += int(held * A < ratio * A)
        d = reference[row, t][token].detach() - log_pi[token]
        slow = slow + 0.3 * (d.exp() - d - 1)
    assert n_clipped or loss == "reinforce"
    assert_same_loss(fast, slow, loop.policy_model)


@pytest.mark.parametrize("loss", ["exact", "reinforce", "ppo"])
def test_micro_batch_size_changes_no_policy_gradient(shipped, settings, loss):
    results = []
    for micro_batch in (100, 5):
        loop = make_loop(shipped, settings, policy_loss=loss, gamma=0.9, micro_batch=micro_batch)
        loop.policy_optimizer = torch.optim.SGD(loop.policy_model.parameters(), lr=1.0)
        rollout, _ = loop.rollout(loop.experts[:3], 4)
        rewards = (rollout.batch.tokens * 0.1).sin() * rollout.batch.response_mask
        states = loop.reward_model.states(rollout.batch).detach()
        loop.update_policy(rollout, rewards, states)
        results.append(torch.cat([p.detach().flatten() for p in loop.policy_model.parameters()]))
    assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("loss, group", [("exact", 2), ("exact", 3), ("reinforce", 3)])
def test_sums_over_actions_and_what_follows_make_the_true_gradient(loss, group, gamma, monkeypatch):
    """Two steps: the mean gradient over all groups of samples is that of E[r_0 + gamma r_1].

    Of the exact loss, and of REINFORCE. Ending early is judged against going on.
    """
    theta = torch.tensor([[0.0, 0.0], [0.2, -0.3]], requires_grad=True)
    rewards = torch.tensor([[0.1, -0.4], [2.0, 0.6]])
    log_pi = theta.log_softmax(-1)
    expected = (log_pi.exp() * rewards).sum(-1)  # [2], E_{a~pi} r(s_t, a)
    s = SimpleNamespace(policy_loss=loss, gamma=gamma, group=group, advantage_scale="batch")
    # A scale by the batch is a bias.
    monkeypatch.setattr(policy, "normalise", lambda advantages, *_: advantages)
    surrogate = 0.0
    for probability, mask, r, logprobs in all_groups(log_pi, rewards, group):
        ones = torch.ones(group, dtype=torch.long)
        # columns: a prompt token, t = 0, t = 1
        batch = data.Batch(torch.zeros(group, 3, dtype=torch.long), ones, ones + mask.sum(1).long())
        r = torch.nn.functional.pad(r, (1, 0))
        advantages = irl.IRL.advantages(SimpleNamespace(settings=s), batch, r)[:, 1:]
        gained = (advantages * logprobs).sum()
        if loss == "exact":
            gained = gained + (expected * mask).sum()
        surrogate = surrogate + probability * gained / group
    gradient = torch.autograd.grad(surrogate, theta)[0]
    assert_close(gradient, true_gradient(theta, rewards, gamma))


def test_what_follows_is_compared_with_what_follows_the_others():
    """A_t = F_t - the mean F of the others still writing, F_t = gamma G_{t+1}; a plain loop."""
    s = SimpleNamespace(policy_loss="exact", gamma=0.5, group=3)
    lengths = [4, 3, 4]  # response tokens; the prompt is column 0
    batch = data.make_batch([[1]] * 3, [[1] * length for length in lengths])
    rewards = random_like(batch)
    following = torch.zeros(3, 5)
    for row, length in enumerate(lengths):
        later = 0.0
        for t in range(length, 0, -1):
            following[row, t] = 0.5 * later
            later = float(rewards[row, t]) + 0.5 * later
    advantages = irl.IRL.advantages(SimpleNamespace(settings=s), batch, rewards)
    for row, length in enumerate(lengths):
        for t in range(1, length + 1):
            others = [following[i, t] for i in range(3) if i != row and t <= lengths[i]]
            assert_close(advantages[row, t], following[row, t] - sum(others) / len(others))
    assert advantages.abs().max() > 0.1


def test_the_end_token_is_paid(shipped, settings, monkeypatch):
    """The reward of the longest trace's end token reaches its advantage and the gradient."""
    monkeypatch.setattr(policy, "normalise", lambda advantages, *_: advantages)  # it rescales all
    loop = make_loop(shipped, settings, policy_loss="reinforce", gamma=0.0)
    rollout, _ = loop.rollout(loop.experts[:1], 4)
    batch = rollout.batch
    lengths = batch.lengths.sort(descending=True)
    row = int(lengths.indices[0])
    end = int(lengths.values[0]) - 1
    assert lengths.values[1] <= end and rollout.finished[row]  # alone there
    rewards = 0.1 * rollout.logprobs
    before = loop.advantages(batch, rewards)
    rewards[row, end] += 5.0
    after = loop.advantages(batch, rewards)
    assert (after - before).nonzero().tolist() == [[row, end]]
    fast = loop.policy_loss(batch, rollout.logprobs, after - before, None)
    slow = -5.0 * policy.token_logprobs(loop.policy_model, batch)[row, end]
    assert_same_loss(fast, slow, loop.policy_model)


# 0. warm-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_starts_at_the_averaged_reward(shipped, settings, temperature):
    changes = dict(start="reward", reward_average=0.25, entropy_coef=0.4, temperature=temperature)
    loop = make_loop(shipped, settings, **changes)
    parameters = list(loop.reward_model.parameters())
    before = [p.detach().clone() for p in parameters]
    loop.warm_up()
    learnt = [p.detach().clone() for p in parameters]
    loop.end_warm_up()
    assert any(not torch.equal(a, b) for a, b in zip(before, learnt))
    for b, a, f in zip(before, learnt, parameters, strict=True):
        assert_close(f.detach(), 0.25 * b + 0.75 * a)
    batch = demonstrations(loop.tokenizer, loop.experts[:2])
    f = all_logprobs(loop.reward_model.model, batch)
    pi = all_logprobs(loop.policy_model, batch)
    pi = (pi / temperature).log_softmax(-1)  # as it samples
    # No policy has a higher E[f - alpha log pi].
    assert_close(pi, (f / 0.4).log_softmax(-1), atol=2e-4, rtol=1e-4)
    assert loop.step()["policy"]["skipped"] == 0  # and it can be trained


def product(layer: lora.LoRALinear) -> torch.Tensor:
    """What an adapter adds to its matrix."""
    return (layer.scale * layer.B @ layer.A).detach().clone()


def adapted_loop(shipped, settings, rank, **changes):
    """A loop whose policy and reward are adapters on one base: (loop, base)."""
    base, _ = loading.load_policy("base")
    models = []
    for _ in range(2):  # their A differ
        models.append(lora.adapt(base, rank, 8.0) if rank else copy.deepcopy(base))
    discriminator = reward.make_discriminator(reward.LikelihoodReward(models[1]), shipped[1])
    experts = examples_of(shipped[1], "words", "train", 16)
    s = changed(settings, warm_up_lr=1e-2, **changes)
    return irl.IRL(s, shipped[1], models[0], discriminator, experts), base


def test_the_policy_starts_at_the_averaged_adapter(shipped, settings):
    """Each matrix is W + (1 - share) times what the adapter had learnt; the policy's likewise."""
    loop, base = adapted_loop(shipped, settings, 4, start="reward", reward_average=0.25)
    models = (loop.policy_model, loop.reward_model.model)
    of_policy, of_reward = (
        [m for m in model.modules() if isinstance(m, lora.LoRALinear)] for model in models
    )
    for _ in range(3):  # B = 0 at first: A moves from the second update on
        loop.warm_up()
    learnt = [product(layer) for layer in of_reward]
    frozen = [p.clone() for p in base.parameters()]
    loop.end_warm_up()
    for before, b, a in zip(learnt, of_reward, of_policy, strict=True):
        size = float(before.abs().max())
        assert size > 0
        assert_close(product(b), 0.75 * before, atol=1e-5 * size, rtol=1e-5)
        assert torch.equal(product(a), product(b))
    batch = demonstrations(shipped[1], loop.experts[:2])
    with torch.no_grad():
        policy_logits, reward_logits = (model(batch.tokens).logits for model in models)
    # It is at the optimum of f - alpha log pi, while the base's own norm is left alone.
    sharpened = reward_logits / settings.entropy_coef
    assert_close(policy_logits, sharpened, atol=1e-3, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(frozen, base.parameters(), strict=True))
    assert loop.step()["policy"]["skipped"] == 0


@pytest.mark.parametrize("start, rank", [("reward", 0), ("reward", 2), ("base", 0)])
def test_the_reference_is_the_policy_at_its_first_step(shipped, settings, start, rank):
    """After the warm-up pi_ref = pi; then the policy moves and the reference does not."""
    changes = dict(start=start, kl_coef=0.5, policy_lr=1e-3)
    loop, base = adapted_loop(shipped, settings, rank, **changes)
    for _ in range(3):
        loop.warm_up()
    loop.end_warm_up()
    batch = demonstrations(shipped[1], loop.experts[:4])
    pi = all_logprobs(loop.policy_model, batch)
    reference = all_logprobs(loop.reference, batch)
    assert torch.equal(pi, reference)
    assert torch.allclose(pi, all_logprobs(base, batch), atol=1e-3) == (start == "base")
    for _ in range(2):
        loop.step()
    assert torch.equal(all_logprobs(loop.reference, batch), reference)
    assert not torch.allclose(all_logprobs(loop.policy_model, batch), reference, atol=1e-3)
    held = {id(p) for group in loop.policy_optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in lora.trained(loop.reference)}


# SFT and GRPO ---------------------------------------------------------------------------------


def test_sft_fits_its_demonstrations(shipped, settings):
    trainer = make_trainer(baselines.SFT, shipped, settings, 16, sft_steps=15, sft_lr=1e-3)
    history = [trainer.step()["policy"]["loss"] for _ in range(15)]
    assert history[-1] < 0.5 * history[0]


def test_grpo_needs_the_verifier(shipped, settings):
    trainer = make_trainer(baselines.GRPO, shipped, settings, 8)
    with data.no_verifier(), pytest.raises(RuntimeError):
        trainer.step()


def test_grpo_leaves_out_only_what_teaches_nothing(shipped, settings, monkeypatch):
    """The gradient is that of all rows, also of groups that were all right or all wrong."""
    trainer = make_trainer(baselines.GRPO, shipped, settings, 4, questions=4, group=4)
    right = [1.0, 0, 0, 1] + [1] * 4 + [0] * 4 + [0, 0, 0, 1]
    verdicts = iter(right)
    monkeypatch.setattr(data, "is_correct", lambda example, text: next(verdicts))
    rollouts = keep_calls(monkeypatch, policy, "sample")
    losses = keep_calls(monkeypatch, policy, "ppo_loss")
    metrics = trainer.step()["policy"]
    assert sum(len(loss) for loss in losses) == 8

    model = copy.deepcopy(shipped[0])
    batch = rollouts[0].batch
    mask = batch.response_mask
    advantages = policy.grpo_advantages(torch.tensor(right), 4)[:, None]
    log_pi = policy.token_logprobs(model, batch)
    all_rows = policy.ppo_loss(log_pi, rollouts[0].logprobs, advantages, settings.ppo_clip) * mask
    loss = all_rows.sum() / mask.sum()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)


def test_a_grpo_step_without_any_advantage_moves_nothing(shipped, settings, monkeypatch):
    trainer = make_trainer(baselines.GRPO, shipped, settings, 8)
    monkeypatch.setattr(data, "is_correct", lambda example, text: True)
    assert trainer.step()["policy"] == {"loss": 0.0, "grad_norm": 0.0, "skipped": 0}
    for parameter, start in zip(trainer.policy_model.parameters(), shipped[0].parameters()):
        assert torch.equal(parameter, start)


def test_grpo_pays_for_its_kl_on_every_row(shipped, settings, monkeypatch):
    """All answers are right, so that the loss is the KL alone: kl_coef times k3, a mean."""
    s = replace(settings, kl_coef=0.5)
    trainer = make_trainer(baselines.GRPO, shipped, s, 4, questions=4, group=4)
    with torch.no_grad():
        for parameter in trainer.policy_model.parameters():
            parameter.mul_(1.01)
    moved = copy.deepcopy(trainer.policy_model)
    monkeypatch.setattr(data, "is_correct", lambda example, text: True)
    rollouts = keep_calls(monkeypatch, policy, "sample")
    metrics = trainer.step()["policy"]

    batch = rollouts[0].batch
    d = policy.token_logprobs(shipped[0], batch).detach() - policy.token_logprobs(moved, batch)
    mask = batch.response_mask
    loss = 0.5 * ((d.exp() - d - 1) * mask).sum() / mask.sum()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in moved.parameters()]).norm()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4) and loss > 0
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_grpo_grades_each_sample_on_its_own_question(shipped, settings, monkeypatch):
    """Four questions with four answers. One sample of each is right."""
    examples = [data.Example(f"1+{i}?", f"1+{i}={i + 1}", str(i + 1)) for i in range(1, 5)]
    examples = data.tokenize(shipped[1], examples)
    s = replace(settings, questions=4, group=4)
    trainer = baselines.GRPO(s, shipped[1], copy.deepcopy(shipped[0]), examples)
    right = {tuple(example.prompt): int(example.answer) for example in examples}

    def sample(model, prompts, *settings):
        rows = []
        responses = []
        for prompt in prompts:
            answer = right[tuple(prompt)]
            for written in (answer, answer % 5 + 1, answer % 5 + 2, 0):
                rows.append(prompt)
                text = data.response_text("", str(written))
                responses.append(data.response_ids(shipped[1], text))
        batch = data.make_batch(rows, responses)
        return policy.Rollout(batch, -batch.response_mask, torch.ones(len(rows)).bool())

    monkeypatch.setattr(policy, "sample", sample)
    advantages = keep_calls(monkeypatch, policy, "grpo_advantages")
    assert trainer.step()["reward"]["mean"] == 0.25
    grouped = advantages[0].view(4, 4)
    assert (grouped[:, 0] > 0).all() and (grouped[:, 1:] < 0).all()
