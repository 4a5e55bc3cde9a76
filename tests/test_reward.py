"""reward.py: each equation by hand or by a plain loop, and that a known reward is recovered."""

import math
import random
from xml.etree import ElementTree

import pytest
import torch
from conftest import all_logprobs, discriminator_update, examples_of
from torch.testing import assert_close

import data
import policy
import reward
from engine.errors import UserError
from show import trace


def make_discriminator(shipped, kind="likelihood", logit="airl", granularity="dense"):
    model = reward.load_reward(kind, "base")
    if kind == "head":  # a head starts at 0, and nothing would show
        torch.nn.init.normal_(model.model.score.weight)
    return reward.make_discriminator(model, shipped[1], logit, granularity)


def standing_still(discriminator):
    """An optimizer that moves nothing."""
    return torch.optim.SGD(discriminator.reward_model.parameters(), lr=0.0)


def weights_of(discriminator):
    return torch.cat([p.detach().flatten() for p in discriminator.reward_model.parameters()])


@pytest.fixture(scope="module")
def comparison(shipped):
    """Four experts, each with two samples of the base and two broken copies."""
    model, tokenizer = shipped
    examples = examples_of(tokenizer, "words", "train", 4)
    prompts = [example.prompt for example in examples]
    end_tokens = (tokenizer.eos_token_id,)
    generator = torch.Generator().manual_seed(0)
    batch = policy.sample(model, prompts, end_tokens, 64, 2, generator=generator).batch
    samples = [[batch.response(2 * i), batch.response(2 * i + 1)] for i in range(4)]
    return reward.compare(tokenizer, examples, samples, 2, random.Random(0))


# equations ------------------------------------------------------------------------------------


def test_airl_discriminator_by_hand():
    """D = exp f / (exp f + pi), and the reward log D - log(1 - D) is the logit."""
    f = torch.tensor([0.3, -1.2])
    pi = torch.tensor([0.6, 0.1])
    D = f.exp() / (f.exp() + pi)
    logit = reward.discriminator_logits(f, pi.log(), "airl")
    assert_close(logit.sigmoid(), D)
    assert_close(logit, D.log() - (1 - D).log())
    assert torch.equal(reward.discriminator_logits(f, pi.log(), "gail"), f)


def test_bce_by_hand():
    logit = torch.tensor([0.7])
    D = 1 / (1 + math.exp(-0.7))
    expert = reward.bce_loss(logit, torch.tensor([1.0]), 0.0)
    policys = reward.bce_loss(logit, torch.tensor([0.0]), 0.0)
    smoothed = reward.bce_loss(logit, torch.tensor([1.0]), 0.1)
    assert_close(expert, torch.tensor([-math.log(D)]))
    assert_close(policys, torch.tensor([-math.log(1 - D)]))
    assert_close(smoothed, torch.tensor([-0.95 * math.log(D) - 0.05 * math.log(1 - D)]))


def test_trace_weights_mean_over_tokens_then_traces():
    weights = reward.trace_weights(torch.tensor([[0.0, 1, 1, 1], [0, 0, 1, 0]]), 2)
    assert_close(weights, torch.tensor([[0, 1 / 6, 1 / 6, 1 / 6], [0, 0, 1 / 2, 0]]))


def test_comparison_loss_by_hand():
    """Two experts, three negatives (two for the first), one counted token each."""
    logits = torch.tensor([[1.0], [-0.5], [0.2], [-1.0], [0.4]])
    kinds = torch.tensor([0, 0, 1, 2, 1])
    weights = reward.comparison_weights(torch.ones(5, 1), kinds, 2, 3)
    assert_close(weights.flatten(), torch.tensor([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]))
    D = logits.flatten().sigmoid()
    of_experts = -(D[0].log() + D[1].log()) / 2
    of_negatives = -((1 - D[2]).log() + (1 - D[3]).log() + (1 - D[4]).log()) / 3
    loss = reward.discriminator_loss(logits, kinds, weights, 0.0)
    assert_close(loss, 0.5 * of_experts + 0.5 * of_negatives)


@pytest.mark.parametrize(
    "logits, accuracy",
    [([3.0, -3.0], 1.0), ([-3.0, 3.0], 0.0), ([3.0, 3.0], 0.5), ([0.0, 0.0], 0.5)],
)
def test_accuracy_is_of_both_sides_and_a_tie_is_half(logits, accuracy):
    weights = torch.tensor([[0.5], [0.5]])
    sums = reward.discriminator_sums(torch.tensor(logits)[:, None], torch.tensor([0, 2]), weights)
    metrics = reward.discriminator_metrics(sums)
    assert metrics["accuracy"] == accuracy
    # A kind of negatives that is not there has no metric.
    assert set(metrics) == {"d_expert", "d_broken", "d_negative", "accuracy"}


# granularity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "granularity, ends",
    [
        ("dense", [[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]),
        ("sparse", [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]),
        ("interval", [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0]]),
    ],
)
def test_segment_ends(granularity, ends):
    batch = data.make_batch([[5], [5, 5]], [[1, 9, 1, 1], [9, 2]])
    step_end_tokens = torch.arange(10) == 9
    assert reward.segment_ends(batch, granularity, step_end_tokens).tolist() == ends


def test_segment_sums_equal_the_plain_loop():
    values = torch.randn(5, 12)
    mask = torch.ones(5, 12)
    mask[:, :2] = 0
    mask[2, 9:] = 0
    ends = (torch.rand(5, 12) < 0.4).float() * mask
    expected = torch.zeros(5, 12)
    for b in range(5):
        running = 0.0
        for t in range(12):
            running += float(values[b, t] * mask[b, t])
            if ends[b, t]:
                expected[b, t] = running
                running = 0.0
    assert_close(reward.segment_sums(values, mask, ends), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["dense", "interval", "sparse"])
def test_a_likelihood_reward_starts_undecided(shipped, comparison, granularity):
    """f starts as the policy's own log pi: D = 1/2 for every token, step and trace."""
    discriminator = make_discriminator(shipped, granularity=granularity)
    with torch.no_grad():
        scores = discriminator.reward_model.scores(comparison.batch)
        log_pi = policy.token_logprobs(shipped[0], comparison.batch)
    logits = discriminator.logits(comparison.batch, scores, log_pi)
    assert scores.abs().max() > 1 and logits.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_a_segments_f_is_a_sum_or_what_the_head_says_at_its_end(shipped, comparison, kind):
    discriminator = make_discriminator(shipped, kind, granularity="sparse")
    scores = torch.randn(comparison.batch.tokens.shape) * comparison.batch.response_mask
    f, log_pi, read = discriminator.segments(comparison.batch, scores, scores)
    last = scores.gather(1, comparison.batch.lengths[:, None] - 1).squeeze(1)
    assert read.sum(1).eq(1).all()
    assert_close(log_pi.sum(1), scores.sum(1))
    assert_close(f.sum(1), last if kind == "head" else scores.sum(1))


# reward models --------------------------------------------------------------------------------


def test_head_starts_at_zero_and_reads_its_own_token():
    model = reward.load_reward("head", "base")
    batch = data.make_batch([[5, 6]], [[7, 8, 9]])
    assert not model.scores(batch).any()
    torch.nn.init.normal_(model.model.score.weight)
    changed = data.make_batch([[5, 6]], [[7, 8, 10]])
    different = model.scores(batch) != model.scores(changed)
    assert different.tolist() == [[False, False, False, False, True]]
    assert reward.load_reward("random", "base").scores(batch).any()


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_padding_and_neighbours_change_no_score(shipped, comparison, kind):
    model = make_discriminator(shipped, kind).reward_model
    together = model.scores(comparison.batch)
    for row in (0, 3):
        alone = model.scores(comparison.batch[row : row + 1])
        assert_close(together[row : row + 1, : alone.shape[1]], alone, atol=1e-4, rtol=1e-4)


def test_a_likelihood_is_a_log_probability(comparison):
    model = reward.load_reward("likelihood", "base")
    batch = comparison.batch
    tokens = batch.tokens[batch.response_mask.bool()]
    chosen = all_logprobs(model.model, batch).gather(-1, tokens[:, None]).squeeze(-1)
    expected = policy.spread(chosen, batch.response_mask)
    assert_close(model.scores(batch), expected, atol=1e-4, rtol=1e-4)


def test_a_head_reads_the_hidden_state(shipped, comparison):
    model = make_discriminator(shipped, "head").reward_model
    batch = comparison.batch
    logits = model.model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
    expected = logits.squeeze(-1) * batch.response_mask
    assert_close(model.scores(batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_reward_models_survive_saving(shipped, comparison, kind, tmp_path):
    model = make_discriminator(shipped, kind).reward_model
    torch.nn.init.normal_(next(model.parameters()), std=0.1)
    model.model.save_pretrained(tmp_path)
    again = reward.load_reward(kind, str(tmp_path))
    assert_close(again.scores(comparison.batch), model.scores(comparison.batch))


# rewards --------------------------------------------------------------------------------------


def test_rewards_are_clipped_and_sharpened(shipped, comparison):
    batch = comparison.batch
    discriminator = make_discriminator(shipped)
    f, log_pi = torch.randn(2, *batch.tokens.shape) * batch.response_mask
    rewards = discriminator.token_rewards(batch, f, log_pi, 0.3)
    assert_close(rewards, f - 0.3 * log_pi)
    discriminator.clip = 0.1
    assert_close(discriminator.token_rewards(batch, f, log_pi, 0.3), rewards.clamp(-0.1, 0.1))
    discriminator.clip = 0.0
    discriminator.logit = "gail"
    assert_close(discriminator.token_rewards(batch, f, log_pi, 0.3), f)


def test_a_trace_that_was_cut_off_lies_below_the_finished_ones_of_all_processes():
    """W = lowest - margin, of the finished rows alone, at each token; it may be another's."""
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 5.0, 7.0], [0.0, -9.0, -9.0], [0.0, 4.0, 0.0]])
    mask = torch.tensor([[0.0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]])
    finished = torch.tensor([True, True, False, True])  # the one with the lowest was cut off
    # row 0: G = 1 + 2/2, then 2
    assert reward.lowest_finished(rewards, mask, finished, 0.5) == 2.0
    for lowest in (2.0, -3.0):
        changed = reward.worst_if_cut_off(rewards, mask, finished, 0.5, lowest, margin=0.25)
        worst = lowest - 0.25
        assert torch.equal(changed[finished], rewards[finished])
        returns = policy.returns_to_go(changed, mask, 0.5)
        assert_close(returns[2], torch.tensor([0.0, worst, worst]))
    nobody = torch.zeros(4, dtype=torch.bool)
    assert reward.lowest_finished(rewards, mask, nobody, 0.5) == math.inf
    assert not reward.worst_if_cut_off(rewards, mask, nobody, 0.5, math.inf).any()
    at_the_end = reward.worst_if_cut_off(rewards, mask, finished, 1.0, 2.0)  # a score per trace
    assert at_the_end[2].tolist() == [0.0, 0.0, 2.0 - 1.0]


def test_behind_a_clip_going_on_for_ever_costs_something():
    """Every finished trace at the clip: a cut-off one was paid as much."""
    rewards = torch.full((4, 1), 0.1)
    mask = torch.ones(4, 1)
    finished = torch.tensor([True, True, True, False])
    changed = reward.worst_if_cut_off(rewards, mask, finished, 1.0, 0.1, margin=0.1)
    assert changed[3] < changed[:3].min()
    centred = changed - policy.group_baseline(changed, mask, 4)
    assert policy.normalise_by_group(centred, mask, 4)[3] < -1


# negatives ------------------------------------------------------------------------------------


def test_negatives_are_for_the_expert_s_own_question(comparison):
    assert [comparison.kinds.tolist().count(kind) for kind in range(3)] == [4, 8, 8]
    experts = comparison[comparison.kinds == reward.EXPERT].batch
    for row, i in enumerate(comparison.family.tolist()):
        prompt = comparison.batch.tokens[row, : comparison.batch.prompt_lengths[row]]
        assert torch.equal(prompt, experts.tokens[i, : experts.prompt_lengths[i]])


@pytest.mark.parametrize("granularity", ["dense", "interval"])
def test_the_prefix_shared_with_the_expert_is_no_negative(shipped, comparison, granularity):
    """A broken copy weighs nothing before its first change, and no logit there has a gradient."""
    discriminator = make_discriminator(shipped, granularity=granularity)
    batch = comparison.batch
    counted = discriminator.score_mask(batch) * comparison.counted()
    weights = reward.comparison_weights(counted, comparison.kinds, 4, 16)
    is_expert = comparison.kinds == reward.EXPERT
    assert_close(weights[is_expert].sum(), torch.tensor(0.5))
    assert_close(weights[~is_expert].sum(), torch.tensor(0.5))
    experts = comparison[is_expert].batch.tokens
    for row in range(len(batch)):
        first = int(comparison.first[row])
        assert weights[row, :first].sum() == 0 and weights[row, first:].sum() > 0
        if reward.KINDS[comparison.kinds[row]] == "broken":
            expert = experts[comparison.family[row]]
            assert first > batch.prompt_lengths[row]
            assert torch.equal(batch.tokens[row, :first], expert[:first])
            assert batch.tokens[row, first] != expert[first]
            assert granularity == "interval" or weights[row, first] > 0
        else:
            assert first == batch.prompt_lengths[row]
    logits = torch.randn(weights.shape).requires_grad_(True)
    reward.discriminator_loss(logits, comparison.kinds, weights, 0.1).backward()
    assert torch.equal(logits.grad != 0, weights > 0)


def test_replay_keeps_the_latest():
    replay = reward.Replay(2)
    replay.add("q", [[1], [2], [3]])
    assert sorted(replay.draw("q", 5, random.Random(0))) == [[2], [3]]
    assert replay.draw("other", 5, random.Random(0)) == []
    again = reward.Replay(2)
    again.load_state_dict(replay.state_dict())
    again.add("q", [[4]])
    assert again.past == {"q": [[3], [4]]}
    none = reward.Replay(0)
    none.add("q", [[1]])
    assert none.draw("q", 1, random.Random(0)) == []


# updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["dense", "interval", "sparse"])
def test_micro_batch_size_changes_no_gradient(shipped, comparison, granularity):
    results = []
    for micro_batch in (1000, 6, 1):
        discriminator = make_discriminator(shipped, granularity=granularity)
        optimizer = torch.optim.SGD(discriminator.reward_model.parameters(), lr=0.1)
        metrics = discriminator_update(
            discriminator, optimizer, shipped[0], comparison, 0.1, 0.2, micro_batch=micro_batch
        )
        results.append((metrics, weights_of(discriminator)))
    for metrics, parameters in results[1:]:
        assert_close(parameters, results[0][1], atol=1e-5, rtol=1e-4)
        assert metrics == pytest.approx(results[0][0], abs=1e-4)


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_the_demonstrations_likelihood_is_for_a_likelihood_alone(shipped, comparison, kind):
    """-log p of the demonstrations joins a likelihood's loss; a head's f is no log-probability."""
    discriminator = make_discriminator(shipped, kind)
    losses = []
    for weight in (0.0, 1.0):
        optimizer = standing_still(discriminator)
        metrics = discriminator_update(
            discriminator, optimizer, shipped[0], comparison, reward_nll=weight
        )
        losses.append(metrics["loss"])
    experts = comparison[comparison.kinds == reward.EXPERT].batch
    log_p = policy.token_logprobs(shipped[0], experts).detach().sum(1)
    likelihood = float((log_p / experts.response_mask.sum(1)).mean())
    assert likelihood < -0.01
    difference = -likelihood if kind == "likelihood" else 0.0
    assert losses[1] - losses[0] == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("temperature, smoothing", [(1.0, 0.1), (0.7, 0.3)])
def test_an_update_equals_the_plain_loop(shipped, comparison, temperature, smoothing):
    """Loss and metrics, token by token: means over a trace's counted tokens, then over traces.

    logit = f - log pi, pi the policy at its temperature; D by kind of trace; accuracy.
    """
    discriminator = make_discriminator(shipped)
    for parameter in discriminator.reward_model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no verdict hangs on rounding
    losses = {kind: [] for kind in reward.KINDS}
    D = {kind: [] for kind in reward.KINDS}
    right = {kind: [] for kind in reward.KINDS}
    for row in range(len(comparison.batch)):
        kind = reward.KINDS[comparison.kinds[row]]
        ids = comparison.batch.tokens[row : row + 1, : comparison.batch.lengths[row]]
        with torch.no_grad():
            log_pi = (shipped[0](ids).logits[0] / temperature).log_softmax(-1)
            f = discriminator.reward_model.model(ids).logits[0].log_softmax(-1)
        of_tokens = []
        for t in range(int(comparison.first[row]), ids.shape[1]):
            of_tokens.append((f[t - 1, ids[0, t]] - log_pi[t - 1, ids[0, t]]).double().sigmoid())
        chance = torch.stack(of_tokens)
        label = 1 - smoothing / 2 if kind == "expert" else smoothing / 2
        loss = -label * chance.log() - (1 - label) * (1 - chance).log()
        losses[kind].append(float(loss.mean()))
        D[kind].append(float(chance.mean()))
        right[kind].append(float(((chance > 0.5) == (kind == "expert")).double().mean()))

    def both_sides(values):
        negatives = values["sample"] + values["broken"]
        return sum(values["expert"]) / 4, sum(negatives) / len(negatives)

    wanted = {f"d_{kind}": sum(values) / len(values) for kind, values in D.items()}
    wanted["loss"] = sum(both_sides(losses)) / 2
    wanted["d_negative"] = both_sides(D)[1]
    wanted["accuracy"] = sum(both_sides(right)) / 2
    optimizer = standing_still(discriminator)
    metrics = discriminator_update(
        discriminator,
        optimizer,
        shipped[0],
        comparison,
        smoothing,
        micro_batch=5,
        temperature=temperature,
    )
    del metrics["grad_norm"], metrics["skipped"]
    assert metrics == pytest.approx(wanted, abs=1e-4)


def test_the_discriminators_weight(shipped, comparison, monkeypatch):
    """The gradient is the likelihood's plus c_D times the discriminator's."""

    def gradient(c_L, c_D):
        monkeypatch.setattr(policy, "optimizer_step", lambda *_: {})  # so that the gradients stay
        discriminator = make_discriminator(shipped)
        settings = dict(reward_nll=c_L, discriminator_coef=c_D)
        discriminator_update(discriminator, None, shipped[0], comparison, **settings)
        return torch.cat([p.grad.flatten() for p in discriminator.reward_model.parameters()])

    likelihood = gradient(1.0, 0.0)
    both = gradient(1.0, 0.5)
    assert_close(both, likelihood + 0.5 * gradient(0.0, 1.0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both, likelihood)


@pytest.mark.parametrize("kind, logit", [("likelihood", "airl"), ("head", "gail")])
def test_the_discriminator_learns(shipped, comparison, kind, logit):
    discriminator = make_discriminator(shipped, kind, logit)
    optimizer = policy.make_optimizer(discriminator.reward_model, 1e-3)
    history = []
    for _ in range(25):
        history.append(discriminator_update(discriminator, optimizer, shipped[0], comparison))
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["d_expert"] > history[-1]["d_negative"] + 0.05


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_known_reward_is_recovered(smoothing):
    """AIRL at its optimum: f is the expert's log-density, whatever the policy is.

    One state, three actions. With smoothed labels each of the two is seen as mixed with x/2 of the
    other: nearly so where they are not far apart.
    """
    expert = torch.tensor([0.7, 0.2, 0.1])
    pi = torch.tensor([0.1, 0.3, 0.6])
    f = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([f], lr=0.05)
    for _ in range(1000):
        logits = reward.discriminator_logits(f, pi.log(), "airl")
        loss = expert * reward.bce_loss(logits, torch.ones(3), smoothing)
        loss = loss + pi * reward.bce_loss(logits, torch.zeros(3), smoothing)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    x = smoothing / 2
    optimum = pi.log() + ((1 - x) * expert + x * pi).log() - ((1 - x) * pi + x * expert).log()
    assert_close(f.detach(), optimum, atol=1e-2, rtol=0)
    assert_close(optimum, expert.log(), atol=0.35 if smoothing else 1e-6, rtol=0)


# a trace in colours ---------------------------------------------------------------------------


def test_explain_names_the_token_and_refuses_unknown_words(shipped):
    model = reward.LikelihoodReward(shipped[0])
    question = "Ava has 24 pens. Ava loses 9. How many pens?"
    scored = trace.token_scores(model, shipped[1], question, "<think>\n24-9=99")
    assert "".join(token for token, _ in scored) == "<think>\n24-9=99"
    assert "suspicious" in trace.show(scored)
    with pytest.raises(UserError, match="vocabulary"):
        trace.token_scores(model, shipped[1], "Zeno has 24 pens.", "<think>")


@pytest.mark.parametrize(
    "values, likelihood, line",
    [
        # the first suspicious one, not the lowest
        ([-0.1, -1.2, -0.3, -3.0], True, "most suspicious: token 2 of 4, 'b' after 'a', f = -1.20"),
        ([-0.1, -1.2, -0.3, -3.0], False, "suspicious: token 4 of 4, 'd' after 'abc', f = -3.00"),
        ([-0.1, -1.0, -0.3, -0.2], True, "nothing suspicious; lowest: token 2 of 4, 'b' after 'a'"),
        ([0.1, 1.0, 0.3, 0.2], False, "most suspicious: token 1 of 4, 'a' after '', f = 0.10"),
    ],
)
def test_where_a_trace_goes_wrong_by_hand(values, likelihood, line):
    assert line in trace.show(list(zip("abcd", values)), likelihood)


def test_a_picture_shows_every_token_as_text_in_its_shade():
    drawn = trace.picture("a < b?", [[("1\n", 0.0), ("<", -2.0)], [("\x1b", 1.0)]])
    root = ElementTree.fromstring(drawn)
    texts = [node.text for node in root if node.tag.endswith("text")]
    assert texts[:3] == ["a < b?", "1⏎", "<"] and "\x1b" not in drawn
    # f = -2 is the largest: it has the full colour, and 0 has none
    fills = [node.get("fill") for node in root if node.tag.endswith("rect")]
    assert fills[1:3] == ["rgb(255, 255, 255)", "rgb(244, 136, 22)"]
