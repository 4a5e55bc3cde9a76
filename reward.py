"""The reward: a discriminator that tells expert traces from the policy's own, read as a reward per token.

In Algorithm 1 this is the discriminator's update (stage 2) and the reward (stage 3). f is `scores`, the reward model's own
opinion of each token. D = sigmoid(logit) is the probability that a token is the expert's. One update descends on

    L = c_D [ 1/2 mean_expert BCE(logit, 1) + 1/2 mean_negative BCE(logit, 0) ]  -  c_L mean_expert log p_phi(a|s)

each mean over a trace's counted tokens, then over the traces; c_D is --discriminator-coef. The last term, the likelihood of
the demonstrations, is ours and for a likelihood alone (c_L, --reward-nll). A negative is a sample, an older sample, or an
expert's trace with one thing broken, which counts from the first changed token on (`compare`).

    equation                                            where                           test, in tests/test_reward.py
    D = e^f / (e^f + pi), logit = f - log pi (AIRL, 4)  discriminator_logits            airl_discriminator_by_hand
    logit = f (GAIL; 2510.01857's released code)        discriminator_logits            airl_discriminator_by_hand
    BCE, smoothed labels (released code)                bce_loss                        bce_by_hand
    half experts, half negatives (released code)        comparison_loss                 comparison_loss_by_hand
    r = log D - log(1-D) (AIRL), f - alpha log pi       Discriminator.token_rewards     rewards_are_clipped_and_sharpened
    sparse, interval, dense (2510.01857, v1 and v2)     segment_ends, segment_sums      segment_ends, segment_sums_..
    f = log p_phi (ours), w . h + b (2510.01857)        LikelihoodReward, HeadReward    a_likelihood_is_.., a_head_reads_..
    perturbed negatives (2510.01857)                    data.perturbed_negatives, compare  perturbed_negatives_count_from_..

Subtracting log pi buys this: at the optimum f is the expert's log-density, whatever the policy was; nearly so with smoothed
labels, and as far as the negatives are the policy's own. With logit = f it is the log-ratio expert / policy, and is worth
nothing once the policy has moved on.

But not all negatives are the policy's own: broken copies and old samples are not drawn from pi. A policy that starts at the
reward is sharp, pi ~ exp(f / alpha). Of nearly all tokens it is sure, so f - log pi lies a hair below 0, for experts and
samples alike: D = 0.496, and whether D > 1/2 says nothing. To the wrong token of a broken copy it gives a log pi far below
f, so there D lies near 1, until f falls too. In the demo D of experts and of samples are 0.50, of broken copies 0.62. We left
-log pi out for copies (logit = f), and we took the density of a mixture, half pi, half even over the vocabulary: two seeds
each, 300 validation questions. Accuracy 0.961 as it is, 0.965, 0.956; AUROC of f 0.984, 0.988, 0.987. Neither is clearly
better, so AIRL's logit stays, and the metrics tell the kinds of negatives apart (`discriminator_metrics`).

Run `python reward.py` for a small demonstration: a reward learnt in seconds, and f and D of every token of two traces.
"""

import math
import random
from collections import defaultdict, deque
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from transformers import AutoModelForTokenClassification

import data
import policy
from data import Batch
from engine import loading, memory, parallel, sampler

# 1. Equations --------------------------------------------------------------------------------------------------------


def discriminator_logits(scores: torch.Tensor, policy_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """logit D: 'airl' f - log pi (Fu et al. 2018), 'gail' f (Ho & Ermon 2016). Shapes alike, any.

    >>> f, log_pi = torch.tensor([0.2]).log(), torch.tensor([0.6]).log()
    >>> discriminator_logits(f, log_pi, "airl").sigmoid()  # 0.2 / (0.2 + 0.6)
    tensor([0.2500])
    """
    return scores - policy_logprobs if kind == "airl" else scores


def bce_loss(logits: torch.Tensor, is_expert: float, smoothing: float) -> torch.Tensor:
    """Binary cross-entropy per token, expert 1, policy 0, both moved towards 1/2 by label smoothing.

    Smoothing 0.1 asks for D = 0.95 and 0.05: the logit, which is the reward, stays finite where nothing overlaps.

    >>> bce_loss(torch.tensor([0.0]), 1.0, 0.1)  # log 2, whatever the label
    tensor([0.6931])
    """
    target = torch.full_like(logits, is_expert * (1 - smoothing) + smoothing / 2)
    return binary_cross_entropy_with_logits(logits, target, reduction="none")


def trace_weights(mask: torch.Tensor) -> torch.Tensor:
    """Weights [B, T] that take the mean over each trace's counted tokens, then over the traces: they sum to 1.

    >>> trace_weights(torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    tensor([[0.0000, 0.2500, 0.2500],
            [0.0000, 0.5000, 0.0000]])
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(1, len(mask))


def segment_ends(batch: Batch, granularity: str, interval: int, ends_step: torch.Tensor) -> torch.Tensor:
    """[B, T], 1 on the tokens where a score is read.

    dense: every response token. sparse: the last one. interval: the last token of each step (ends_step [V]: it holds a
    newline), or every `interval` tokens if interval > 0; the last token always.
    """
    mask = batch.response_mask
    if granularity == "dense":
        return mask
    positions = torch.arange(mask.shape[1], device=mask.device)
    ends = positions == batch.lengths[:, None] - 1
    if granularity == "interval" and interval > 0:
        ends = ends | ((positions - batch.prompt_lengths[:, None] + 1) % interval == 0)
    elif granularity == "interval":
        ends = ends | ends_step[batch.tokens]
    return mask * ends


def segment_sums(values: torch.Tensor, mask: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum `values` over each segment and place it on the segment's last token: [B, T] -> [B, T], 0 elsewhere.

    >>> segment_sums(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor([[0., 3., 3.]])
    """
    total = (values * mask).cumsum(1)
    # the running total at the previous segment end, carried forward
    at_end = torch.where(ends.bool(), torch.arange(values.shape[1], device=values.device), -1)
    last_end = pad(at_end.cummax(1).values[:, :-1], (1, 0), value=-1)  # [B, T], -1 before the first end
    before = torch.where(last_end >= 0, total.gather(1, last_end.clamp(min=0)), torch.zeros_like(total))
    return (total - before) * ends


# 2. Two reward models ------------------------------------------------------------------------------------------------


class LikelihoodReward(torch.nn.Module):
    """f(s,a) = log p_phi(a|s): the reward is a language model, trained by telling traces apart.

    It starts as a copy of the base, with all that this knows already in f; if the policy does, too, f - log pi = 0 and D = 1/2
    everywhere, at temperature 1. It scores every token of the vocabulary at once.
    """

    scores_all_actions = True

    def __init__(self, model):
        super().__init__()
        self.model = model

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What f(s_t, .) is read off: [B, T, H], the hidden state that has read the tokens before t."""
        return policy.spread(policy.hidden_states(self.model, batch), batch.response_mask)

    def scores(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """f(s_t, a_t): [B, T], 0 outside the response."""
        hidden, mask = self.hidden(batch) if hidden is None else hidden, batch.response_mask
        return policy.spread(policy.logprobs_of(self.model, hidden[mask.bool()], batch), mask)


class HeadReward(torch.nn.Module):
    """f(s,a) = w . h + b, with h the hidden state that has read a: the paper's linear head on a language model. It starts at
    f = 0, and easily learns which prompts go with which traces, rather than which steps are right."""

    scores_all_actions = False

    def __init__(self, model):
        super().__init__()
        self.model = model  # ForTokenClassification with one label: transformers' name for just this head

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What f(s_t, a_t) is read off: [B, T, H], the hidden state that has read token t itself."""
        hidden = sampler.response_hidden(self.model, batch)[:, 1:]
        return policy.spread(hidden[policy.response_part(batch)], batch.response_mask)

    def scores(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """f(s_t, a_t): [B, T], 0 outside the response."""
        hidden, head = self.hidden(batch) if hidden is None else hidden, self.model.score
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float() * batch.response_mask


def load_reward(kind: str, path: str, device="cpu", dtype=torch.float32) -> LikelihoodReward | HeadReward:
    """A reward model from a folder or hub name: `kind` 'likelihood', 'head' or 'random'. A head that is not in the
    checkpoint (the base has none) starts at zero, a random one anywhere."""
    if kind == "likelihood":
        return LikelihoodReward(loading.load_causal(path, device, dtype))
    model, info = loading.load_model(path, AutoModelForTokenClassification, dtype, num_labels=1, output_loading_info=True)
    if any("score" in key for key in info["missing_keys"]):
        (torch.nn.init.normal_ if kind == "random" else torch.nn.init.zeros_)(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
    return HeadReward(model.to(device))


@dataclass
class Discriminator:
    """A reward model with what turns its scores into D, and D into rewards."""

    reward_model: LikelihoodReward | HeadReward
    logit: str  # airl or gail
    granularity: str  # dense, interval or sparse
    interval: int  # tokens per segment; 0: the trace's own steps
    ends_step: torch.Tensor  # [V] bool, the tokens that end a step
    clip: float = 0.0  # rewards are held within [-clip, clip]; 0: they are not

    def ends(self, batch: Batch) -> torch.Tensor:
        """[B, T], 1 where a score is read."""
        return segment_ends(batch, self.granularity, self.interval, self.ends_step)

    def segments(self, batch: Batch, scores: torch.Tensor, policy_logprobs: torch.Tensor):
        """(f, log pi, ends) per segment, each [B, T], on the segment's last token.

        A segment's log pi is the sum over its tokens, and so is a likelihood's f. A head's is read at the segment's end.
        """
        ends = self.ends(batch)
        if self.granularity == "dense":
            return scores, policy_logprobs, ends
        mask = batch.response_mask
        sums = segment_sums(scores, mask, ends) if self.reward_model.scores_all_actions else scores * ends
        return sums, segment_sums(policy_logprobs, mask, ends), ends

    def logits(self, batch: Batch, scores: torch.Tensor, policy_logprobs: torch.Tensor) -> torch.Tensor:
        """logit D from f and log pi of the tokens, each [B, T]: [B, T], where a score is read, 0 elsewhere."""
        scores, log_pi, ends = self.segments(batch, scores, policy_logprobs)
        return discriminator_logits(scores, log_pi, self.logit) * ends

    def token_rewards(
        self, batch: Batch, scores: torch.Tensor, policy_logprobs: torch.Tensor, entropy_coef: float = 1.0
    ) -> torch.Tensor:
        """r_t from f and log pi of the tokens, each [B, T]: [B, T], what the policy is trained on.

        airl: f - alpha log pi. alpha = entropy_coef = 1 is AIRL's log D - log(1-D); less of it sharpens, because
        maximising E[f - alpha log pi] has its optimum at pi ~ exp(f / alpha). gail: f, which holds -log pi already.
        """
        scores, log_pi, ends = self.segments(batch, scores, policy_logprobs)
        rewards = discriminator_logits(scores, entropy_coef * log_pi, self.logit) * ends
        return rewards.clamp(-self.clip, self.clip) if self.clip else rewards


def lowest_finished(rewards: torch.Tensor, mask: torch.Tensor, finished: torch.Tensor, gamma: float) -> float:
    """The lowest return-to-go G_t of any token of a trace that ended by itself; inf if none of these rows did.
    rewards, mask [B, T], finished [B] bool.

    >>> rewards, mask = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]] * 2)
    >>> lowest_finished(rewards, mask, torch.tensor([True, False]), gamma=1.0)
    3.0
    """
    returns = policy.returns_to_go(rewards, mask, gamma)
    counted = finished[:, None] & mask.bool()
    return float(returns.masked_fill(~counted, torch.inf).min())


def worst_if_cut_off(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    finished: torch.Tensor,
    gamma: float = 1.0,
    lowest: float | None = None,
    margin: float = 1.0,
) -> torch.Tensor:
    """A trace that ran into the length limit is worth less than every one that ended by itself: [B, T] -> [B, T].

    Its own scores mislead. A score per trace is learnt, and read, at the end token: without one, whatever was written last
    would be read. And where later rewards count (gamma > 0) a trace that goes on collects more of them for ever. So they are
    replaced: the return-to-go of a cut-off trace is W = lowest - margin at each of its tokens, which

        r_t = (1 - gamma) W before its last token,  r_t = W on it

    brings about, since (1 - gamma) W + gamma W = W. lowest: `lowest_finished` of the whole batch, over all processes; if
    not given, of these rows. It is inf if nobody finished: then W = 0 for all of them, and no trace is better than another.
    margin: in the rewards' own unit, logits of D. 1 is a factor of e in the odds; where rewards are clipped, the clip stands
    for it: a cut-off trace is then as far below the lowest score as this is below 0, and does not drown the others.

    >>> rewards, mask = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]] * 2)
    >>> worst_if_cut_off(rewards, mask, torch.tensor([False, True]))
    tensor([[0., 0.],
            [0., 1.]])
    """
    if lowest is None:
        lowest = lowest_finished(rewards, mask, finished, gamma)
    worst = lowest - margin if lowest != math.inf else 0.0
    left = mask.flip(1).cumsum(1).flip(1)  # [B, T], tokens of the response from t on
    constant = torch.where(left == 1, worst, (1 - gamma) * worst) * mask
    return torch.where(finished[:, None], rewards, constant)


def step_end_tokens(tokenizer, size: int) -> torch.Tensor:
    """[V] bool: which tokens hold a newline, that is, end a step of a trace."""
    ends = torch.zeros(size, dtype=torch.bool)
    for token in range(min(size, len(tokenizer))):
        ends[token] = "\n" in tokenizer.decode([token])
    return ends


def make_discriminator(reward_model: LikelihoodReward | HeadReward, tokenizer, logit: str = "airl", granularity: str = "dense",
                       interval: int = 0, clip: float = 0.0) -> Discriminator:  # fmt: skip
    """A discriminator on a reward model; steps end where this tokenizer writes a newline."""
    vocabulary = reward_model.model.get_input_embeddings().num_embeddings
    ends_step = step_end_tokens(tokenizer, vocabulary).to(reward_model.model.device)
    return Discriminator(reward_model, logit, granularity, interval, ends_step, clip)


# 3. Negatives --------------------------------------------------------------------------------------------------------


KINDS = ("sample", "old", "broken")  # of negatives: the policy's own, those of an earlier policy, the expert's, broken


@dataclass
class Comparison:
    """What one discriminator update sees: experts, and negatives for the same questions."""

    expert: Batch
    negative: Batch
    pair: torch.Tensor  # [M], the expert row that answers the same question as each negative
    negative_from: torch.Tensor  # [M], the first column that counts: of a perturbed trace, that of the change
    kind: torch.Tensor  # [M], what each negative is: an index into KINDS


class Replay:
    """Old rollouts, a few per question: the policy shall not come back to errors that it has given up. (AIRL, section 5,
    mixes in the last 20 iterations.)"""

    def __init__(self, per_question: int):
        self.past: dict[str, deque] = defaultdict(lambda: deque(maxlen=per_question))

    def add(self, question: str, responses: list[list[int]]) -> None:
        self.past[question].extend(responses)

    def draw(self, question: str, count: int, rng: random.Random) -> list[list[int]]:
        """At most `count` old responses to this question."""
        past = list(self.past[question])
        return rng.sample(past, min(count, len(past)))

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {question: list(past) for question, past in self.past.items()}

    def load_state_dict(self, state: dict) -> None:
        """What a checkpoint kept."""
        self.past.clear()
        for question, past in state.items():
            self.add(question, past)


def compare(
    tokenizer,
    examples: list[data.Example],
    rollouts: list[list[list[int]]],
    perturbed: int,
    rng: random.Random,
    device="cpu",
    old: list[list[list[int]]] | None = None,
) -> Comparison:
    """Experts beside negatives: rollouts[i] holds sampled responses (token lists) to examples[i].question, old[i] those that
    an earlier policy wrote to it, if there are any."""
    prompts, responses, pair, start, kind = [], [], [], [], []
    for i, example in enumerate(examples):
        prompt = data.prompt_ids(tokenizer, example.question)
        negatives = {
            "sample": [(response, 0) for response in rollouts[i]],
            "old": [(response, 0) for response in (old[i] if old else [])],
            "broken": data.perturbed_negatives(tokenizer, example, perturbed, rng),
        }
        for name, of_this_kind in negatives.items():
            for response, first_changed in of_this_kind:
                prompts.append(prompt)
                responses.append(response)
                pair.append(i)
                start.append(len(prompt) + first_changed)
                kind.append(KINDS.index(name))
    expert = data.demonstration_batch(tokenizer, examples, device)
    negative = data.make_batch(prompts, responses, device)
    columns = (torch.tensor(x, dtype=torch.long, device=device) for x in (pair, start, kind))
    return Comparison(expert, negative, *columns)


# 4. The discriminator's update ---------------------------------------------------------------------------------------


def comparison_loss(logits_e, weights_e, logits_n, weights_n, smoothing: float) -> torch.Tensor:
    """The discriminator's loss on some experts [E, T] and their negatives [M, T]: sum_t w_t BCE(logit_t), half for experts,
    half for negatives. The weights are `trace_weights` of the whole comparison: losses of parts add up to its loss."""
    expert = (weights_e * bce_loss(logits_e, 1.0, smoothing)).sum()
    return 0.5 * expert + 0.5 * (weights_n * bce_loss(logits_n, 0.0, smoothing)).sum()


@torch.no_grad()
def discriminator_sums(logits_e, weights_e, logits_n, weights_n, kind) -> dict[str, float]:
    """How D and its verdicts stand on some experts [E, T] and their negatives [M, T], weighted as in the loss, by kind of
    trace: {"expert", *KINDS: {weight, weight * D, weight where D is right}}, sums that add up over parts and processes.

    A token of an expert is right at D > 1/2, one of a negative at D < 1/2; D = 1/2, where AIRL starts, is half right.
    """
    sums = {}
    traces = {"expert": (logits_e, weights_e, 1.0)}
    for index, name in enumerate(KINDS):
        rows = kind == index
        traces[name] = logits_n[rows], weights_n[rows], -1.0
    for name, (logits, weights, side) in traces.items():
        sums[f"weight {name}"] = float(weights.sum())
        sums[f"d_{name}"] = float((weights * logits.sigmoid()).sum())
        sums[f"accuracy_{name}"] = float((weights * (1 + side * logits.sign())).sum() / 2)
    return sums


def discriminator_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from the sums of `discriminator_sums`, by kind of trace, of the kinds that there are: mean D ("d_expert",
    "d_sample", ..) and the share of tokens that D is right on ("accuracy_expert", ..). Of all negatives: "d_negative".
    Of both sides: "accuracy"."""
    metrics = {}
    for name in ("expert", *KINDS):
        weight = sums[f"weight {name}"]
        if weight:
            metrics[f"d_{name}"] = sums[f"d_{name}"] / weight
            metrics[f"accuracy_{name}"] = sums[f"accuracy_{name}"] / weight
    right = sum(sums[f"accuracy_{name}"] for name in KINDS)  # their weights sum to 1, as the experts' do
    metrics["d_negative"] = sum(sums[f"d_{name}"] for name in KINDS)
    metrics["accuracy"] = (sums["accuracy_expert"] + right) / 2
    return metrics


def comparison_weights(discriminator: Discriminator, comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """`trace_weights` of experts [E, T] and negatives [M, T], padded to one width; a negative counts from its first
    changed token on."""
    expert, negative = map(discriminator.ends, (comparison.expert, comparison.negative))
    columns = torch.arange(negative.shape[1], device=negative.device)
    negative = negative * (columns >= comparison.negative_from[:, None])
    width = max(expert.shape[1], negative.shape[1])
    share = lambda ends: len(ends) / max(1, parallel.total(len(ends)))  # of all traces, where several processes have some
    return tuple(trace_weights(pad(ends, (0, width - ends.shape[1]))) * share(ends) for ends in (expert, negative))


def expert_parts(comparison: Comparison, micro_batch: int, micro_tokens: int) -> list[torch.Tensor]:
    """memory.micro_batches of the experts, where each brings all its negatives along: at the least one such family."""
    expert, negative, pair = comparison.expert, comparison.negative, comparison.pair
    per_chunk = max(1, micro_batch * len(expert) // (len(expert) + len(negative)))
    family = 1 + int(pair.bincount().max()) if len(pair) else 1  # rows
    longest = expert.lengths.scatter_reduce(0, pair, negative.lengths, "amax")  # [E]
    return memory.micro_batches(family * longest, per_chunk, micro_tokens)


def update(discriminator: Discriminator, optimizer, policy_model, comparison: Comparison,
           smoothing: float = 0.1, nll_coef: float = 0.0, micro_batch: int = 64, temperature: float = 1.0,
           micro_tokens: int = 0, discriminator_coef: float = 1.0) -> dict:  # fmt: skip
    """One optimizer step of the discriminator. Micro-batches are made of experts with all their negatives.

    policy_model: the current pi, at the temperature it samples with, whose log-probability AIRL's logit subtracts (of
    experts and negatives alike; without a gradient). nll_coef is c_L, discriminator_coef c_D.
    """
    expert, negative = comparison.expert, comparison.negative
    model = discriminator.reward_model
    weights_e, weights_n = comparison_weights(discriminator, comparison)
    experts = parallel.total(len(expert))
    sums = defaultdict(float)
    for rows in expert_parts(comparison, micro_batch, micro_tokens):
        count, chosen = len(rows), torch.isin(comparison.pair, rows).nonzero().squeeze(-1)
        both = data.cat_batches(expert[rows], negative[chosen])  # experts above, negatives below
        scores = model.scores(both)
        log_pi = torch.zeros_like(scores)
        if discriminator.logit == "airl":  # GAIL's logit asks no policy: a forward pass less
            with torch.no_grad():
                log_pi = policy.token_logprobs(policy_model, both, temperature)
        logits = discriminator.logits(both, scores, log_pi)  # [E + M, T]
        logits_e, logits_n = logits[:count], logits[count:]
        w_e, w_n = weights_e[rows, : logits.shape[1]], weights_n[chosen, : logits.shape[1]]
        value = discriminator_coef * comparison_loss(logits_e, w_e, logits_n, w_n, smoothing)
        if nll_coef and model.scores_all_actions:  # a head's f is no likelihood
            likelihood = (trace_weights(both.response_mask[:count]) * scores[:count]).sum()  # mean over these experts
            value = value - nll_coef * likelihood * count / experts
        value.backward()
        sums["loss"] += float(value.detach())
        for name, value in discriminator_sums(logits_e, w_e, logits_n, w_n, comparison.kind[chosen]).items():
            sums[name] += value
    sums = parallel.total_of(sums)
    loss = sums.pop("loss")
    return {"loss": loss} | discriminator_metrics(sums) | policy.optimizer_step(optimizer, loss)


SUSPICIOUS = -1.0  # log-probability below which a token is taken for an error; -0.7, -1, -1.6, -2.3 tried on validation


def main() -> None:
    """Learn a reward from 64 demonstrations in some seconds, and show what it makes of a pupil's mistake."""
    loading.quiet()
    base, tokenizer = loading.load_policy("base")
    ends, discriminator = data.end_tokens(tokenizer, base), make_discriminator(load_reward("likelihood", "base"), tokenizer)
    optimizer, rng = policy.make_optimizer(discriminator.reward_model, 3e-4), random.Random(0)
    experts = data.load_examples("words", "train", 64)
    for number in range(1, 21):
        examples = rng.sample(experts, 16)
        prompts = [data.prompt_ids(tokenizer, example.question) for example in examples]
        batch = policy.sample(base, prompts, ends, 64, group=2).batch
        rollouts = [[batch.response(2 * i), batch.response(2 * i + 1)] for i in range(16)]
        metrics = update(discriminator, optimizer, base, compare(tokenizer, examples, rollouts, 2, rng), nll_coef=1.0)
        if number % 10 == 0:
            print(f"discriminator update {number}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    question = "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9. How many pens?"
    for trace, answer in (("3*12=36\n24+36=60\n60-9=51", "51"), ("3+12=15\n24+15=39\n39-9=30", "30")):
        batch = data.demonstration_batch(tokenizer, [data.Example(question, trace, answer)])
        with torch.no_grad():
            scores, log_pi = discriminator.reward_model.scores(batch), policy.token_logprobs(base, batch)
        chance = discriminator.logits(batch, scores, log_pi).sigmoid()
        print(f"\n{question}\n{'token':>10s}{'log pi':>10s}{'f':>10s}{'D':>10s}")
        for t, token in enumerate(batch.response(0), int(batch.prompt_lengths[0])):
            print(f"{tokenizer.decode([token])!r:>10s}{log_pi[0, t]:10.3f}{scores[0, t]:10.3f}{chance[0, t]:10.3f}")


if __name__ == "__main__":
    main()
