"""The reward: a discriminator that tells expert traces from the policy's, read as a reward per token.

In Algorithm 1 this is the discriminator (stage 2) and the reward (stage 3). f is `scores`, the
reward model's own opinion of each token. D = sigmoid(logit) is the probability that a token is the
expert's. One update (irl.IRL.discriminator_step) descends on

    L = c_D (1/2 mean_expert BCE(logit, 1) + 1/2 mean_negative BCE(logit, 0))
        - c_L mean_expert log p_phi(a|s)

Each mean is over a trace's counted tokens, then over the traces. c_D is --discriminator-coef. The
last term, the likelihood of the demonstrations, is ours, and for a likelihood alone (c_L,
--reward-nll). A negative is a sample, an older sample, or an expert's trace with something wrong
(negatives.py), which counts from the first changed token on (`compare`).

    equation                                      where                        tests/test_reward.py
    D = e^f / (e^f + pi): logit f - log pi, AIRL  discriminator_logits         airl_discriminator_by_hand
    logit = f (GAIL; 2510.01857's released code)  discriminator_logits         airl_discriminator_by_hand
    BCE, smoothed labels (released code)          bce_loss                     bce_by_hand
    half experts, half negatives (released code)  comparison_weights           comparison_loss_by_hand
    r = log D - log(1-D) (AIRL), f - alpha log pi  Discriminator.token_rewards  rewards_are_clipped_..
    a trace that was cut off (ours)               worst_if_cut_off             a_trace_that_was_cut_off_..
    sparse, interval, dense (2510.01857)          segment_ends, segment_sums   segment_ends, segment_sums_..
    f = log p_phi (ours)                          LikelihoodReward             a_likelihood_is_..
    f = w . h + b (2510.01857)                    HeadReward                   a_head_reads_..
    where a negative begins to count (ours)       compare                      the_prefix_shared_..

Subtracting log pi buys this: at the optimum f is the expert's log-density, whatever the policy
was; nearly so with smoothed labels, and as far as the negatives are the policy's own. With
logit = f it is the log-ratio expert / policy, and is worth nothing once the policy has moved on.

But not all negatives are the policy's own: broken copies and old samples are not drawn from pi. A
policy that starts at the reward is sharp, pi ~ exp(f / alpha). Of nearly all tokens it is sure, so
f - log pi lies a hair below 0, for experts and samples alike: D = 0.496, and whether D > 1/2 says
nothing. To the wrong token of a broken copy it gives a log pi far below f, so there D lies near 1,
until f falls too. In the demo D of experts and of samples are 0.50, of broken copies 0.62. We left
-log pi out for copies (logit = f), and we took the density of a mixture, half pi, half even over
the vocabulary: two seeds each, 300 validation questions. Accuracy 0.961 as it is, 0.965, 0.956;
AUROC of f 0.984, 0.988, 0.987. Neither is clearly better, so AIRL's logit stays, and the metrics
tell the kinds of negatives apart (`discriminator_metrics`).

Run `python reward.py` for a small demonstration: a reward learnt in seconds, and f and D of every
token of two traces.
"""

import math
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from transformers import AutoModelForTokenClassification

import data
import policy
from data import Batch, Example
from engine import loading, memory, sampler
from negatives import perturbed_negatives

# 1. Equations ---------------------------------------------------------------------------------


def discriminator_logits(
    scores: torch.Tensor, policy_logprobs: torch.Tensor, kind: str
) -> torch.Tensor:
    """logit D: 'airl' f - log pi (Fu et al. 2018), 'gail' f (Ho & Ermon 2016). Any shape.

    >>> f, log_pi = torch.tensor([0.2]).log(), torch.tensor([0.6]).log()
    >>> discriminator_logits(f, log_pi, "airl").sigmoid()  # 0.2 / (0.2 + 0.6)
    tensor([0.2500])
    """
    if kind == "airl":
        return scores - policy_logprobs
    return scores


def bce_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Binary cross-entropy per token; label 1: expert, 0: policy. Both labels move towards 1/2.

    Smoothing 0.1 asks for D = 0.95 and 0.05: the logit, which is the reward, stays finite where
    nothing overlaps.

    >>> bce_loss(torch.tensor([0.0]), torch.tensor([1.0]), 0.1)  # log 2, whatever the label
    tensor([0.6931])
    """
    targets = labels * (1 - smoothing) + smoothing / 2
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def trace_weights(counted: torch.Tensor, n_traces: float | None = None) -> torch.Tensor:
    """Weights [B, T]: the mean over each trace's counted tokens, then over `n_traces` traces.

    counted: [B, T], 1 on the tokens that count. n_traces: by default B; more where these rows are
    a part of a whole. The weights of a whole sum to 1.

    >>> trace_weights(torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    tensor([[0.0000, 0.2500, 0.2500],
            [0.0000, 0.5000, 0.0000]])
    """
    if n_traces is None:
        n_traces = len(counted)
    tokens = counted.sum(1, keepdim=True).clamp(min=1)
    return counted / tokens / max(1, n_traces)


# What a trace of a comparison is: the expert's (label 1), or a negative (label 0): a sample of the
# policy, one of an earlier policy, the expert's with something wrong. Tensors hold indices.
KINDS = ("expert", "sample", "old", "broken")
EXPERT = 0


def comparison_weights(
    counted: torch.Tensor, kinds: torch.Tensor, n_experts: float, n_negatives: float
) -> torch.Tensor:
    """Weights [B, T] of a comparison's tokens: 1/2 for all experts, 1/2 for all negatives.

    counted: [B, T], 1 on the tokens that count; kinds: [B], indices into KINDS; n_experts,
    n_negatives: the numbers of traces of the whole comparison, of which these rows may be a part.

    >>> comparison_weights(torch.ones(3, 1), torch.tensor([0, 1, 3]), 1, 2).flatten()
    tensor([0.5000, 0.2500, 0.2500])
    """
    of_experts = trace_weights(counted, n_experts)
    of_negatives = trace_weights(counted, n_negatives)
    return 0.5 * torch.where(kinds[:, None] == EXPERT, of_experts, of_negatives)


def discriminator_loss(
    logits: torch.Tensor, kinds: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """sum_t w_t BCE(logit_t, label) over rows [B, T]: a number.

    The weights are those of the whole comparison: the losses of its parts add up to its loss.
    """
    labels = (kinds == EXPERT).float()[:, None].expand_as(logits)
    return (weights * bce_loss(logits, labels, smoothing)).sum()


@torch.no_grad()
def discriminator_sums(
    logits: torch.Tensor, kinds: torch.Tensor, weights: torch.Tensor
) -> dict[str, float]:
    """Of each kind of trace the sums of weights, of weighted D, and of weights where D is right.

    They add up over parts and processes. A token of an expert is right at D > 1/2, one of a
    negative at D < 1/2; D = 1/2, where AIRL starts, is half right.
    """
    sums = {}
    for index, kind in enumerate(KINDS):
        rows = kinds == index
        w = weights[rows]
        side = 1.0 if index == EXPERT else -1.0
        sums[f"weight_{kind}"] = float(w.sum())
        sums[f"d_{kind}"] = float((w * logits[rows].sigmoid()).sum())
        sums[f"right_{kind}"] = float((w * (1 + side * logits[rows].sign())).sum() / 2)
    return sums


def discriminator_metrics(sums: dict[str, float]) -> dict[str, float]:
    """What is logged, from `discriminator_sums` of a whole comparison.

    By kind, of those that there are, mean D ("d_expert", "d_sample", ..) and the share of tokens
    that D is right on ("accuracy_expert", ..); "d_negative" of all negatives; "accuracy" of both
    sides.
    """
    metrics = {}
    d_negative = 0.0
    accuracy = 0.0
    for kind in KINDS:
        weight = sums[f"weight_{kind}"]
        if weight:
            metrics[f"d_{kind}"] = sums[f"d_{kind}"] / weight
            metrics[f"accuracy_{kind}"] = sums[f"right_{kind}"] / weight
        if kind != "expert":
            d_negative += 2 * sums[f"d_{kind}"]  # the weights of all negatives sum to 1/2
        accuracy += sums[f"right_{kind}"]
    return metrics | {"d_negative": d_negative, "accuracy": accuracy}


def segment_ends(
    batch: Batch, granularity: str, interval: int, step_end_tokens: torch.Tensor
) -> torch.Tensor:
    """[B, T], 1 on the tokens where a score is read.

    dense: every response token. sparse: the last one. interval: the last token of each step
    (step_end_tokens [V] bool: it holds a newline), or every `interval` tokens if interval > 0;
    the last token always.
    """
    mask = batch.response_mask
    if granularity == "dense":
        return mask
    positions = torch.arange(mask.shape[1], device=mask.device)
    ends = positions == batch.lengths[:, None] - 1
    if granularity == "interval" and interval > 0:
        ends = ends | ((positions - batch.prompt_lengths[:, None] + 1) % interval == 0)
    elif granularity == "interval":
        ends = ends | step_end_tokens[batch.tokens]
    return mask * ends


def segment_sums(values: torch.Tensor, mask: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum `values` over each segment and place it on the segment's last token: [B, T].

    >>> ends = torch.tensor([[0.0, 1.0, 1.0]])
    >>> segment_sums(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), ends)
    tensor([[0., 3., 3.]])
    """
    total = (values * mask).cumsum(1)
    # The running total at the previous segment's end, carried forward.
    columns = torch.arange(values.shape[1], device=values.device)
    end_columns = torch.where(ends.bool(), columns, -1)
    last_end = pad(end_columns.cummax(1).values[:, :-1], (1, 0), value=-1)  # -1: none before
    before = total.gather(1, last_end.clamp(min=0))
    before = torch.where(last_end >= 0, before, torch.zeros_like(total))
    return (total - before) * ends


# 2. Two reward models -------------------------------------------------------------------------


class LikelihoodReward(torch.nn.Module):
    """f(s,a) = log p_phi(a|s): the reward is a language model, trained by telling traces apart.

    It starts as a copy of the base, so all that the base knows is in f from the start. Where the
    policy is the base too, f - log pi = 0 and D = 1/2 everywhere, at temperature 1. It scores
    every token of the vocabulary at once.
    """

    scores_all_actions = True

    def __init__(self, model):
        super().__init__()
        self.model = model

    def states(self, batch: Batch) -> torch.Tensor:
        """What f(s_t, .) is read off: the hidden state *before* token t. [B, T, H]"""
        hidden = policy.hidden_states(self.model, batch)  # [N, H]
        return policy.spread(hidden, batch.response_mask)

    def scores(self, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
        """f(s_t, a_t): [B, T], 0 outside the response."""
        if states is None:
            states = self.states(batch)
        hidden = states[batch.response_mask.bool()]  # [N, H]
        return policy.logprobs_of(self.model, hidden, batch)


class HeadReward(torch.nn.Module):
    """f(s,a) = w . h + b on the hidden state that has read a: the paper's linear head.

    It starts at f = 0, and easily learns which prompts go with which traces, rather than which
    steps are right.
    """

    scores_all_actions = False

    def __init__(self, model):
        super().__init__()
        # ForTokenClassification with one label is transformers' name for just this head.
        self.model = model

    def states(self, batch: Batch) -> torch.Tensor:
        """What f(s_t, a_t) is read off: the hidden state *after* token t. [B, T, H]"""
        hidden = sampler.response_hidden(self.model, batch)[:, 1:]  # [B, R, H]
        return policy.spread(hidden[policy.response_part(batch)], batch.response_mask)

    def scores(self, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
        """f(s_t, a_t): [B, T], 0 outside the response."""
        if states is None:
            states = self.states(batch)
        head = self.model.score  # a linear layer, H -> 1
        f = head(states.to(head.weight.dtype)).squeeze(-1).float()
        return f * batch.response_mask


def load_reward(
    kind: str, path: str, device="cpu", dtype=torch.float32
) -> LikelihoodReward | HeadReward:
    """A reward model from a folder or hub name: `kind` 'likelihood', 'head' or 'random'.

    A head that is not in the checkpoint (the base has none) starts at zero, a random one anywhere.
    """
    if kind == "likelihood":
        return LikelihoodReward(loading.load_causal(path, device, dtype))
    model, info = loading.load_model(
        path, AutoModelForTokenClassification, dtype, num_labels=1, output_loading_info=True
    )
    if any("score" in key for key in info["missing_keys"]):
        if kind == "random":
            torch.nn.init.normal_(model.score.weight)
        else:
            torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
    return HeadReward(model.to(device))


# 3. From scores to D and to rewards -----------------------------------------------------------


@dataclass
class Discriminator:
    """A reward model with what turns its scores into D, and D into rewards."""

    reward_model: LikelihoodReward | HeadReward
    logit: str  # airl or gail
    granularity: str  # dense, interval or sparse
    interval: int  # tokens per segment; 0: the trace's own steps
    step_end_tokens: torch.Tensor  # [V] bool, the tokens that end a step
    clip: float = 0.0  # rewards are held within [-clip, clip]; 0: they are not

    def score_mask(self, batch: Batch) -> torch.Tensor:
        """[B, T], 1 where a score is read."""
        return segment_ends(batch, self.granularity, self.interval, self.step_end_tokens)

    def segments(
        self, batch: Batch, scores: torch.Tensor, policy_logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(f, log pi, score mask) per segment, each [B, T], on the segment's last token.

        A segment's log pi is the sum over its tokens, and so is a likelihood's f. A head's f is
        read at the segment's end.
        """
        score_mask = self.score_mask(batch)
        if self.granularity == "dense":
            return scores, policy_logprobs, score_mask
        mask = batch.response_mask
        if self.reward_model.scores_all_actions:
            f = segment_sums(scores, mask, score_mask)
        else:
            f = scores * score_mask
        return f, segment_sums(policy_logprobs, mask, score_mask), score_mask

    def logits(
        self, batch: Batch, scores: torch.Tensor, policy_logprobs: torch.Tensor
    ) -> torch.Tensor:
        """logit D from f and log pi of the tokens: [B, T] each, 0 where no score is read."""
        f, log_pi, score_mask = self.segments(batch, scores, policy_logprobs)
        return discriminator_logits(f, log_pi, self.logit) * score_mask

    def token_rewards(
        self,
        batch: Batch,
        scores: torch.Tensor,
        policy_logprobs: torch.Tensor,
        entropy_coef: float = 1.0,
    ) -> torch.Tensor:
        """r_t from f and log pi of the tokens, each [B, T]: what the policy is trained on.

        airl: f - alpha log pi. alpha = entropy_coef = 1 is AIRL's log D - log(1-D). Less of it
        sharpens: E[f - alpha log pi] is greatest at pi ~ exp(f / alpha). gail: f, which is a
        log-ratio of expert and policy already.
        """
        f, log_pi, score_mask = self.segments(batch, scores, policy_logprobs)
        if self.logit == "airl":
            rewards = f - entropy_coef * log_pi
        else:
            rewards = f
        rewards = rewards * score_mask
        if self.clip:
            rewards = rewards.clamp(-self.clip, self.clip)
        return rewards


def lowest_finished(
    rewards: torch.Tensor, mask: torch.Tensor, finished: torch.Tensor, gamma: float
) -> float:
    """The lowest return-to-go G_t of any token of a trace that ended by itself.

    rewards, mask: [B, T]; finished: [B] bool. inf if none of these rows ended.

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
    gamma: float,
    lowest: float,
    margin: float = 1.0,
) -> torch.Tensor:
    """A trace that ran into the length limit is worth less than every one that ended: [B, T].

    Its own scores mislead. A score per trace is learnt, and read, at the end token: without one,
    whatever was written last would be read. And where later rewards count (gamma > 0), a trace
    that goes on collects more of them for ever. So its scores are replaced: its return-to-go is
    W = lowest - margin at each of its tokens, which

        r_t = (1 - gamma) W before its last token,  r_t = W on it

    brings about, since (1 - gamma) W + gamma W = W.

    rewards, mask: [B, T]; finished: [B] bool. lowest: `lowest_finished` of the whole batch, over
    all processes. It is inf if no trace ended: then W = 0 for all, and none is better than
    another. margin: in the rewards' own unit, logits of D; 1 is a factor of e in the odds. Where
    rewards are clipped, the clip stands for it: a cut-off trace is then as far below the lowest
    score as this is below 0, and does not drown the others.

    >>> rewards, mask = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]] * 2)
    >>> worst_if_cut_off(rewards, mask, torch.tensor([False, True]), gamma=1.0, lowest=1.0)
    tensor([[0., 0.],
            [0., 1.]])
    """
    worst = 0.0
    if math.isfinite(lowest):
        worst = lowest - margin
    tokens_left = mask.flip(1).cumsum(1).flip(1)  # [B, T], of the response, from t on
    constant = torch.where(tokens_left == 1, worst, (1 - gamma) * worst) * mask
    return torch.where(finished[:, None], rewards, constant)


def find_step_end_tokens(tokenizer, size: int) -> torch.Tensor:
    """[V] bool: which tokens hold a newline, that is, end a step of a trace."""
    is_end = torch.zeros(size, dtype=torch.bool)
    for token in range(min(size, len(tokenizer))):
        is_end[token] = "\n" in tokenizer.decode([token])
    return is_end


def make_discriminator(
    reward_model: LikelihoodReward | HeadReward,
    tokenizer,
    logit: str = "airl",
    granularity: str = "dense",
    interval: int = 0,
    clip: float = 0.0,
) -> Discriminator:
    """A discriminator on a reward model; steps end where this tokenizer writes a newline."""
    model = reward_model.model
    vocabulary = model.get_input_embeddings().num_embeddings
    step_end_tokens = find_step_end_tokens(tokenizer, vocabulary).to(model.device)
    return Discriminator(reward_model, logit, granularity, interval, step_end_tokens, clip)


# 4. Experts and their negatives ---------------------------------------------------------------


@dataclass
class Comparison:
    """What one discriminator update sees: experts, and negatives for the same questions."""

    expert: Batch  # E rows
    negative: Batch  # M rows
    pair: torch.Tensor  # [M], the expert row that answers the same question as each negative
    # [M], the first column that counts: of a sample, that of its first token; of a broken copy,
    # that of the first changed token
    negative_from: torch.Tensor
    negative_kind: torch.Tensor  # [M], what each negative is: an index into KINDS

    def kinds(self) -> torch.Tensor:
        """[E + M], what each row is: experts above, negatives below."""
        experts = torch.full((len(self.expert),), EXPERT, device=self.pair.device)
        return torch.cat([experts, self.negative_kind])

    def from_change_on(self, batch: Batch) -> torch.Tensor:
        """[E + M, T], 1 from the first column that counts on. batch: experts above negatives."""
        of_experts = torch.zeros(len(self.expert), dtype=torch.long, device=self.pair.device)
        first = torch.cat([of_experts, self.negative_from])  # [E + M]
        columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return (columns >= first[:, None]).float()

    def parts(self, micro_batch: int, micro_tokens: int) -> Iterator["Comparison"]:
        """Some experts at a time, with all their negatives: micro-batches of at most `micro_batch`
        rows, or `micro_tokens` tokens (memory.micro_batches), but of one such family at least."""
        n_rows = len(self.expert) + len(self.negative)
        experts_at_once = max(1, micro_batch * len(self.expert) // n_rows)
        family_size = 1  # rows: an expert and its negatives
        if len(self.pair):
            family_size += int(self.pair.bincount().max())
        longest = self.expert.lengths.scatter_reduce(
            0, self.pair, self.negative.lengths, "amax"
        )  # [E], of each family
        for rows in memory.micro_batches(family_size * longest, experts_at_once, micro_tokens):
            chosen = torch.isin(self.pair, rows).nonzero().squeeze(-1)
            yield Comparison(
                self.expert[rows],
                self.negative[chosen],
                self.pair[chosen],
                self.negative_from[chosen],
                self.negative_kind[chosen],
            )


class Replay:
    """Old rollouts, a few per question: the policy shall not come back to errors that it has
    given up. (AIRL, section 5, mixes in the last 20 iterations.)"""

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
    examples: list[Example],
    samples: list[list[list[int]]],
    n_broken: int,
    rng: random.Random,
    device="cpu",
    wrong: str = "broken",
    old_samples: list[list[list[int]]] | None = None,
) -> Comparison:
    """Experts beside negatives for the same questions.

    examples: E tokenised demonstrations. samples[i], old_samples[i]: responses (token lists) to
    examples[i].question that the policy wrote, and an earlier one. n_broken: copies of each
    expert's trace with something wrong, at most; `wrong` says what (negatives.perturb).
    """
    prompts = []
    responses = []
    pair = []
    negative_from = []
    kinds = []
    for i, example in enumerate(examples):
        negatives = {"sample": [(response, 0) for response in samples[i]]}
        if old_samples is not None:
            negatives["old"] = [(response, 0) for response in old_samples[i]]
        negatives["broken"] = perturbed_negatives(tokenizer, example, n_broken, rng, wrong)
        for kind, of_this_kind in negatives.items():
            for response, first_changed in of_this_kind:
                prompts.append(example.prompt)
                responses.append(response)
                pair.append(i)
                negative_from.append(len(example.prompt) + first_changed)
                kinds.append(KINDS.index(kind))
    return Comparison(
        data.demonstration_batch(examples, device),
        data.make_batch(prompts, responses, device),
        torch.tensor(pair, dtype=torch.long, device=device),
        torch.tensor(negative_from, dtype=torch.long, device=device),
        torch.tensor(kinds, dtype=torch.long, device=device),
    )


# A log-probability below this is taken for an error; -0.7, -1, -1.6, -2.3 tried on validation.
SUSPICIOUS = -1.0


def main() -> None:
    """Learn a reward from 64 demonstrations in some seconds, and show what it makes of a pupil's
    mistake."""
    loading.quiet()
    base, tokenizer = loading.load_policy("base")
    discriminator = make_discriminator(load_reward("likelihood", "base"), tokenizer)
    optimizer = policy.make_optimizer(discriminator.reward_model, 3e-4)
    experts = data.tokenize(tokenizer, data.load_examples("words", "train", 64))
    end_tokens = data.end_tokens(tokenizer, base)
    rng = random.Random(0)
    for update in range(1, 21):
        examples = rng.sample(experts, 16)
        prompts = [example.prompt for example in examples]
        sampled = policy.sample(base, prompts, end_tokens, 64, group=2).batch
        samples = [[sampled.response(2 * i), sampled.response(2 * i + 1)] for i in range(16)]
        comparison = compare(tokenizer, examples, samples, 2, rng)

        # irl.IRL.discriminator_step does the same in micro-batches, on several processes.
        batch = data.cat_batches(comparison.expert, comparison.negative)
        kinds = comparison.kinds()
        f = discriminator.reward_model.scores(batch)
        with torch.no_grad():
            log_pi = policy.token_logprobs(base, batch)
        logits = discriminator.logits(batch, f, log_pi)
        counted = discriminator.score_mask(batch) * comparison.from_change_on(batch)
        n_negatives = len(comparison.negative)
        weights = comparison_weights(counted, kinds, len(examples), n_negatives)
        loss = discriminator_loss(logits, kinds, weights, smoothing=0.1)
        experts_mask = batch.response_mask[: len(examples)]
        likelihood = (trace_weights(experts_mask) * f[: len(examples)]).sum()
        loss = loss - likelihood
        loss.backward()
        policy.optimizer_step(optimizer, float(loss.detach()))
        if update % 10 == 0:
            metrics = discriminator_metrics(discriminator_sums(logits, kinds, weights))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"discriminator update {update}: loss {float(loss.detach()):.3f}, {shown}")

    question = "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9. How many pens?"
    right = Example(question, "3*12=36\n24+36=60\n60-9=51", "51")
    wrong = Example(question, "3+12=15\n24+15=39\n39-9=30", "30")
    for example in data.tokenize(tokenizer, [right, wrong]):
        batch = data.demonstration_batch([example])
        with torch.no_grad():
            f = discriminator.reward_model.scores(batch)
            log_pi = policy.token_logprobs(base, batch)
        D = discriminator.logits(batch, f, log_pi).sigmoid()
        print(f"\n{question}\n{'token':>10s}{'log pi':>10s}{'f':>10s}{'D':>10s}")
        for t in range(len(example.prompt), int(batch.lengths[0])):
            token = tokenizer.decode([int(batch.tokens[0, t])])
            print(f"{token!r:>10s}{log_pi[0, t]:10.3f}{f[0, t]:10.3f}{D[0, t]:10.3f}")


if __name__ == "__main__":
    main()
