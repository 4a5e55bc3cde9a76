"""reward.py: the discriminator's equations, granularity, negatives, and that a known reward is recovered."""

import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import all_logprobs, discriminator_update, examples_of
from torch.testing import assert_close

import data
import policy
import reward
from engine.errors import UserError
from show import trace


def make_discriminator(shipped, kind="likelihood", logit="airl", granularity="dense", interval=0, clip=0.0):
    model, tokenizer = shipped
    return reward.Discriminator(reward.load_reward(kind, "base"), logit, granularity, interval,
                                reward.find_step_end_tokens(tokenizer, len(tokenizer)), clip)  # fmt: skip


@pytest.fixture(scope="module")
def comparison(shipped):
    """Four experts, each with two samples of the base and two perturbed copies."""
    model, tokenizer = shipped
    examples = examples_of(tokenizer, "words", "train", 4)
    prompts = [data.prompt_ids(tokenizer, e.question) for e in examples]
    batch = policy.sample(
        model, prompts, (tokenizer.eos_token_id,), 64, group=2, generator=torch.Generator().manual_seed(0)
    ).batch
    rollouts = [[batch.response(2 * i), batch.response(2 * i + 1)] for i in range(4)]
    return reward.compare(tokenizer, examples, rollouts, 2, random.Random(0))


def test_the_discriminators_weight(shipped, comparison, monkeypatch):
    """The gradient is nll's plus the weight times the discriminator's: with 0, none comes from negatives."""
    other = replace(comparison, negative=data.Batch(comparison.negative.tokens.flip(0).clamp(min=1), *[
        getattr(comparison.negative, name) for name in ("prompt_lengths", "lengths")]))  # fmt: skip

    def gradient(nll, weight, compared=comparison):
        monkeypatch.setattr(policy, "optimizer_step", lambda *_: {})  # so that the gradients stay
        discriminator = make_discriminator(shipped)
        discriminator_update(discriminator, None, shipped[0], compared, reward_nll=nll, discriminator_coef=weight)
        return torch.cat([p.grad.flatten() for p in discriminator.reward_model.parameters()])

    nll, loss = gradient(1.0, 0.0), gradient(0.0, 1.0)
    assert_close(gradient(1.0, 0.5), nll + 0.5 * loss, atol=1e-5, rtol=1e-4)
    assert_close(gradient(1.0, 0.0, other), nll, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(gradient(0.0, 1.0, other), loss)


# equations -----------------------------------------------------------------------------------------------------


def test_airl_discriminator_by_hand():
    """D = exp f / (exp f + pi), and the reward log D - log(1 - D) is the logit."""
    f, pi = torch.tensor([0.3, -1.2]), torch.tensor([0.6, 0.1])
    d = f.exp() / (f.exp() + pi)
    logit = reward.discriminator_logits(f, pi.log(), "airl")
    assert_close(logit.sigmoid(), d)
    assert_close(logit, d.log() - (1 - d).log())
    assert torch.equal(reward.discriminator_logits(f, pi.log(), "gail"), f)


def test_bce_by_hand():
    logit, d = torch.tensor([0.7]), 1 / (1 + math.exp(-0.7))
    expert, policys = torch.tensor([1.0]), torch.tensor([0.0])
    assert_close(reward.bce_loss(logit, expert, 0.0), torch.tensor([-math.log(d)]))
    assert_close(reward.bce_loss(logit, policys, 0.0), torch.tensor([-math.log(1 - d)]))
    smoothed = torch.tensor([-0.95 * math.log(d) - 0.05 * math.log(1 - d)])
    assert_close(reward.bce_loss(logit, expert, 0.1), smoothed)


def test_trace_weights_mean_over_tokens_then_traces():
    weights = reward.trace_weights(torch.tensor([[0.0, 1, 1, 1], [0, 0, 1, 0]]))
    assert_close(weights, torch.tensor([[0, 1 / 6, 1 / 6, 1 / 6], [0, 0, 1 / 2, 0]]))


def test_comparison_loss_by_hand():
    """Two experts, three negatives (two for the first), one counted token each."""
    logits = torch.tensor([[1.0], [-0.5], [0.2], [-1.0], [0.4]])
    kinds = torch.tensor([0, 0, 1, 3, 2])
    weights = reward.comparison_weights(torch.ones(5, 1), kinds, 2, 3)
    assert_close(weights.flatten(), torch.tensor([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]))
    sig = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = 0.5 * (-math.log(sig(1)) - math.log(sig(-0.5))) / 2
    expected += 0.5 * sum(-math.log(1 - sig(x)) for x in (0.2, -1.0, 0.4)) / 3
    assert_close(reward.discriminator_loss(logits, kinds, weights, 0.0), torch.tensor(expected))


# granularity ---------------------------------------------------------------------------------------------------


def test_segment_ends():
    batch = data.make_batch([[5], [5, 5]], [[1, 9, 1, 1], [9, 2]])  # token 9 ends a step
    ends_step = torch.zeros(10, dtype=torch.bool)
    ends_step[9] = True
    ends = lambda granularity, interval=0: reward.segment_ends(batch, granularity, interval, ends_step).tolist()  # noqa: E731
    assert ends("dense") == batch.response_mask.tolist()
    assert ends("sparse") == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]
    assert ends("interval") == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0]]
    assert ends("interval", 3) == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]


def test_segment_sums_equal_the_plain_loop():
    values, mask = torch.randn(5, 12), torch.ones(5, 12)
    mask[:, :2], mask[2, 9:] = 0, 0
    ends = (torch.rand(5, 12) < 0.4).float() * mask
    expected = torch.zeros(5, 12)
    for b in range(5):
        running = 0.0
        for t in range(12):
            running += float(values[b, t] * mask[b, t])
            if ends[b, t]:
                expected[b, t], running = running, 0.0
    assert_close(reward.segment_sums(values, mask, ends), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["dense", "interval", "sparse"])
def test_a_likelihood_reward_starts_undecided(shipped, comparison, granularity):
    """f starts as the policy's own log-probability: logit 0 and D = 1/2 for every token, step and trace."""
    discriminator = make_discriminator(shipped, granularity=granularity)
    with torch.no_grad():
        scores = discriminator.reward_model.scores(comparison.negative)
        logits = discriminator.logits(
            comparison.negative, scores, policy.token_logprobs(shipped[0], comparison.negative)
        )
    assert scores.abs().max() > 1 and logits.abs().max() < 1e-4


# reward models -------------------------------------------------------------------------------------------------


def test_head_starts_at_zero_and_reads_its_own_token(shipped):
    model = reward.load_reward("head", "base")
    batch = data.make_batch([[5, 6]], [[7, 8, 9]])
    assert model.scores(batch).abs().sum() == 0
    torch.nn.init.normal_(model.model.score.weight)
    changed = data.make_batch([[5, 6]], [[7, 8, 10]])
    different = (model.scores(batch) != model.scores(changed))[0].tolist()
    assert different == [False, False, False, False, True]


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_padding_and_neighbours_change_no_score(shipped, comparison, kind):
    model = reward.load_reward(kind, "base")
    if kind == "head":
        torch.nn.init.normal_(model.model.score.weight)
    together = model.scores(comparison.negative)
    for row in (0, 3):
        alone = model.scores(comparison.negative[row : row + 1])
        assert_close(together[row : row + 1, : alone.shape[1]], alone, atol=1e-4, rtol=1e-4)


def test_a_likelihood_is_a_log_probability(shipped, comparison):
    model, batch = reward.load_reward("likelihood", "base"), comparison.negative
    chosen = all_logprobs(model.model, batch).gather(-1, batch.tokens[batch.response_mask.bool()][:, None]).squeeze(-1)
    assert_close(policy.spread(chosen, batch.response_mask), model.scores(batch), atol=1e-4, rtol=1e-4)


def test_a_head_reads_the_hidden_state(shipped, comparison):
    model, batch = reward.load_reward("head", "base"), comparison.negative
    torch.nn.init.normal_(model.model.score.weight)
    logits = model.model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits.squeeze(-1)
    assert_close(model.scores(batch), logits * batch.response_mask, atol=1e-4, rtol=1e-4)


def test_rewards_are_clipped_and_sharpened(shipped, comparison):
    batch = comparison.negative
    log_pi = policy.in_chunks(lambda b: policy.token_logprobs(shipped[0], b), batch)
    discriminator = make_discriminator(shipped)
    scores = discriminator.reward_model.scores(batch).detach()  # f = log pi at the start
    assert_close(discriminator.token_rewards(batch, scores, log_pi, 0.3), 0.7 * log_pi, atol=1e-4, rtol=1e-3)
    discriminator.clip = 0.1
    assert discriminator.token_rewards(batch, scores, log_pi, 0.3).abs().max() <= 0.1 + 1e-6


def test_reward_models_survive_saving(shipped, comparison, tmp_path):
    for kind in ("likelihood", "head"):
        model = reward.load_reward(kind, "base")
        torch.nn.init.normal_(next(iter(model.parameters())), std=0.1)
        if kind == "head":
            torch.nn.init.normal_(model.model.score.weight)
        model.model.save_pretrained(tmp_path / kind)
        again = reward.load_reward(kind, str(tmp_path / kind))
        assert_close(again.scores(comparison.expert), model.scores(comparison.expert))


def test_a_trace_that_was_cut_off_lies_below_the_finished_ones_of_all_processes():
    """W = lowest - margin, of the finished rows alone, at each token; the lowest may be another process's."""
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 5.0, 7.0], [0.0, -9.0, -9.0], [0.0, 4.0, 0.0]])
    mask = torch.tensor([[0.0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]])
    finished = torch.tensor([True, True, False, True])  # the one with the lowest rewards was cut off
    assert reward.lowest_finished(rewards, mask, finished, 0.5) == 2.0  # row 0: G = 1 + 2/2, then 2
    for lowest, worst in ((2.0, 2.0 - 0.25), (-3.0, -3.25)):
        changed = reward.worst_if_cut_off(rewards, mask, finished, 0.5, lowest, margin=0.25)
        assert torch.equal(changed[finished], rewards[finished])
        returns = policy.returns_to_go(changed, mask, 0.5)
        assert_close(returns[2], torch.tensor([0.0, worst, worst]))
    nobody = torch.zeros(4, dtype=torch.bool)
    assert reward.lowest_finished(rewards, mask, nobody, 0.5) == math.inf
    assert not reward.worst_if_cut_off(rewards, mask, nobody, 0.5, math.inf).any()
    at_the_end = reward.worst_if_cut_off(rewards, mask, finished, 1.0, 2.0)  # as with a score per trace
    assert at_the_end[2].tolist() == [0.0, 0.0, 2.0 - 1.0]


def test_behind_a_clip_going_on_for_ever_costs_something():
    """Every finished trace at the clip: a cut-off one was paid as much."""
    rewards, mask = torch.full((4, 1), 0.1), torch.ones(4, 1)
    changed = reward.worst_if_cut_off(rewards, mask, torch.tensor([True, True, True, False]), 1.0, 0.1, margin=0.1)
    assert changed[3] < changed[:3].min()
    advantages = policy.normalise_by_group(changed - policy.group_baseline(changed, mask, 4), mask, 4)
    assert advantages[3] < -1


# negatives -----------------------------------------------------------------------------------------------------


def test_negatives_are_for_the_expert_s_own_question(shipped, comparison):
    _, tokenizer = shipped
    for row, i in enumerate(comparison.pair.tolist()):
        length = int(comparison.negative.prompt_lengths[row])
        assert comparison.negative.tokens[row, :length].tolist() == comparison.expert.tokens[i, :length].tolist()


@pytest.mark.parametrize("granularity", ["dense", "interval"])
def test_the_prefix_shared_with_the_expert_is_no_negative(shipped, granularity):
    """A perturbed trace weighs nothing before its first change, and no logit there has a gradient."""
    _, tokenizer = shipped
    discriminator = make_discriminator(shipped, granularity=granularity)
    found = reward.compare(tokenizer, examples_of(tokenizer, "words", "train", 3), [[], [], []], 2, random.Random(0))
    both = data.cat_batches(found.expert, found.negative)
    counted = discriminator.score_mask(both) * found.from_change_on(both)
    weights = reward.comparison_weights(counted, found.kinds(), 3, len(found.negative))
    weights_e, weights_n = weights[:3], weights[3:]
    assert_close(weights_n.sum(), torch.tensor(0.5))  # experts and negatives weigh the same in total
    assert_close(weights_e.sum(), torch.tensor(0.5))
    for row in range(len(found.negative)):
        first, expert = int(found.negative_from[row]), found.expert.tokens[found.pair[row]]
        assert torch.equal(found.negative.tokens[row, :first], expert[:first])
        assert found.negative.tokens[row, first] != expert[first]
        assert weights_n[row, :first].sum() == 0 and weights_n[row, first:].sum() > 0
        assert granularity == "interval" or weights_n[row, first] > 0
    logits = torch.randn(weights.shape).requires_grad_(True)
    reward.discriminator_loss(logits, found.kinds(), weights, 0.1).backward()
    assert torch.equal(logits.grad[3:] != 0, weights_n > 0)


def test_replay_keeps_the_latest():
    replay = reward.Replay(2)
    replay.add("q", [[1], [2], [3]])
    assert (
        sorted(replay.draw("q", 5, random.Random(0))) == [[2], [3]] and replay.draw("other", 5, random.Random(0)) == []
    )


# updates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["dense", "interval", "sparse"])
def test_micro_batch_size_changes_no_gradient(shipped, comparison, granularity):
    results = []
    for micro_batch in (1000, 6, 1):
        discriminator = make_discriminator(shipped, granularity=granularity)
        optimizer = torch.optim.SGD(discriminator.reward_model.parameters(), lr=0.1)
        metrics = discriminator_update(discriminator, optimizer, shipped[0], comparison, 0.1, 0.2, micro_batch=micro_batch)
        results.append((metrics, torch.cat([p.detach().flatten() for p in discriminator.reward_model.parameters()])))
    for metrics, parameters in results[1:]:
        assert_close(parameters, results[0][1], atol=1e-5, rtol=1e-4)
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], abs=1e-5)


@pytest.mark.parametrize("kind, changes", [("likelihood", True), ("head", False)])
def test_the_demonstrations_likelihood_is_for_a_likelihood_alone(shipped, comparison, kind, changes):
    """-log p of the demonstrations joins the loss of a likelihood reward; a head's f is no log-probability."""
    losses = []
    for nll_coef in (0.0, 1.0):
        discriminator = make_discriminator(shipped, kind)
        torch.manual_seed(1)
        if kind == "head":
            torch.nn.init.normal_(discriminator.reward_model.model.score.weight)
        optimizer = torch.optim.SGD(discriminator.reward_model.parameters(), lr=0.0)
        losses.append(discriminator_update(discriminator, optimizer, shipped[0], comparison, reward_nll=nll_coef)["loss"])
    scores = policy.token_logprobs(shipped[0], comparison.expert)
    nll = -float((reward.trace_weights(comparison.expert.response_mask) * scores).sum().detach())
    assert losses[1] - losses[0] == pytest.approx(nll if changes else 0.0, abs=1e-4)
    assert nll > 0.01


@pytest.mark.parametrize("temperature, smoothing", [(1.0, 0.1), (0.7, 0.3)])
def test_an_update_equals_the_plain_loop(shipped, temperature, smoothing):
    """Loss and metrics, trace by trace and token by token: logit = f - log pi, pi the policy at its temperature; the mean over
    a trace's counted tokens, then over traces; D and its share of right verdicts by kind of trace."""
    model, tokenizer = shipped
    examples = examples_of(tokenizer, "words", "train", 3)
    written = [[data.response_ids(tokenizer, data.response_text(e.trace + "\n1+1=2", e.answer))] for e in examples]
    older = [[data.response_ids(tokenizer, data.response_text(e.trace[3:], "7"))] for e in examples[:2]] + [[]]
    compared = reward.compare(tokenizer, examples, written, 2, random.Random(0), old_samples=older)
    kinds = [reward.KINDS[i] for i in compared.negative_kind]
    assert [kinds.count(kind) for kind in reward.KINDS] == [0, 3, 2, 6]
    discriminator = make_discriminator(shipped)
    for parameter in discriminator.reward_model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no verdict hangs on rounding
    losses, d, right = {}, {}, {}
    traces = [("expert", compared.expert, row, int(compared.expert.prompt_lengths[row])) for row in range(3)]
    traces += [(kinds[row], compared.negative, row, int(compared.negative_from[row])) for row in range(11)]
    for kind, batch, row, first in traces:
        ids = batch.tokens[row : row + 1, : batch.lengths[row]]
        with torch.no_grad():
            log_pi = (model(ids).logits[0] / temperature).log_softmax(-1)
            f = discriminator.reward_model.model(ids).logits[0].log_softmax(-1)
        tokens = []
        for t in range(first, ids.shape[1]):
            chance = (f[t - 1, ids[0, t]] - log_pi[t - 1, ids[0, t]]).double().sigmoid()  # D
            label = 1 - smoothing / 2 if kind == "expert" else smoothing / 2
            loss = -label * chance.log() - (1 - label) * (1 - chance).log()
            tokens.append([float(loss), float(chance), float((chance > 0.5) == (kind == "expert"))])
        for total, value in zip((losses, d, right), zip(*tokens)):
            total.setdefault(kind, []).append(sum(value) / len(value))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    negatives = lambda of: [value for kind in reward.KINDS[1:] for value in of[kind]]  # noqa: E731
    wanted = {"loss": (mean(losses["expert"]) + mean(negatives(losses))) / 2, "d_negative": mean(negatives(d))}
    wanted["accuracy"] = (mean(right["expert"]) + mean(negatives(right))) / 2
    wanted |= {f"d_{kind}": mean(values) for kind, values in d.items()}
    wanted |= {f"accuracy_{kind}": mean(values) for kind, values in right.items()}
    found = discriminator_update(discriminator, torch.optim.SGD(discriminator.reward_model.parameters(), lr=0.0), model, compared,
                          smoothing, micro_batch=5, temperature=temperature)  # fmt: skip
    assert set(found) - {"grad_norm", "skipped"} == set(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert len({round(found[f"d_{kind}"], 3) for kind in d}) == 4  # the kinds differ


def test_a_kind_of_negatives_that_is_not_there_has_no_metrics(shipped):
    compared = reward.compare(shipped[1], examples_of(shipped[1], "words", "train", 2), [[], []], 1, random.Random(0))
    discriminator = make_discriminator(shipped)
    still = torch.optim.SGD(discriminator.reward_model.parameters(), lr=0.0)
    found = discriminator_update(discriminator, still, shipped[0], compared)
    assert "d_broken" in found and not {"d_sample", "d_old", "accuracy_sample", "accuracy_old"} & set(found)


@pytest.mark.parametrize("kind, logit", [("likelihood", "airl"), ("head", "gail")])
def test_the_discriminator_learns(shipped, comparison, kind, logit):
    discriminator = make_discriminator(shipped, kind, logit)
    optimizer = policy.make_optimizer(discriminator.reward_model, 1e-3)
    history = [discriminator_update(discriminator, optimizer, shipped[0], comparison) for _ in range(25)]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["d_expert"] > history[-1]["d_negative"] + 0.05


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_known_reward_is_recovered(smoothing):
    """AIRL at its optimum: f is the expert's log-density, whatever the policy is. One state, three actions. With smoothed
    labels each of the two is seen as mixed with x/2 of the other: nearly so where they are not far apart."""
    expert, pi = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    f = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([f], lr=0.05)
    for _ in range(2000):
        logits = reward.discriminator_logits(f, pi.log(), "airl")
        ones = torch.ones(3)
        loss = expert * reward.bce_loss(logits, ones, smoothing)
        loss = (loss + pi * reward.bce_loss(logits, 0 * ones, smoothing)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = smoothing / 2
    optimum = pi.log() + ((1 - x) * expert + x * pi).log() - ((1 - x) * pi + x * expert).log()
    assert_close(f.detach(), optimum, atol=1e-2, rtol=0)
    assert_close(optimum, expert.log(), atol=1e-6 if not smoothing else 0.35, rtol=0)


# the command line ----------------------------------------------------------------------------------------------


def test_explain_names_the_token_and_refuses_unknown_words(shipped):
    model, tokenizer = shipped
    scored = trace.token_scores(
        reward.LikelihoodReward(model), tokenizer, "Ava has 24 pens. Ava loses 9. How many pens?", "<think>\n24-9=99"
    )
    assert "".join(token for token, _ in scored) == "<think>\n24-9=99"
    assert "suspicious" in trace.show(scored)
    with pytest.raises(UserError, match="vocabulary"):
        trace.token_scores(reward.LikelihoodReward(model), tokenizer, "Zeno has 24 pens.", "<think>")


@pytest.mark.parametrize("values, likelihood, said", [
    ([-0.1, -1.2, -0.3, -3.0], True, "most suspicious: token 2 of 4, 'b' after 'a', f = -1.20"),  # the first, not the lowest
    ([-0.1, -1.2, -0.3, -3.0], False, "most suspicious: token 4 of 4, 'd' after 'abc', f = -3.00"),
    ([-0.1, -1.0, -0.3, -0.2], True, "nothing suspicious; lowest: token 2 of 4, 'b' after 'a', f = -1.00"),
    ([0.1, 1.0, 0.3, 0.2], False, "most suspicious: token 1 of 4, 'a' after '', f = 0.10"),
])  # fmt: skip
def test_where_a_trace_goes_wrong_by_hand(values, likelihood, said):
    assert said in trace.show(list(zip("abcd", values)), likelihood)
