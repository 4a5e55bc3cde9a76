"""The reward: a discriminator tells expert traces from the policy's; its score pays each token.

In Algorithm 1 this is the discriminator (stage 2) and the reward (stage 3). f is `scores`, the
reward model's own opinion of each token. D = sigmoid(logit) is the probability that a token is the
expert's. One update (irl.IRL.discriminator_step) descends on

    L = c_D (1/2 mean_expert BCE(logit, 1) + 1/2 mean_negative BCE(logit, 0))
        - c_L mean_expert log p_phi(a|s)

Each mean is over a trace's counted tokens, then over the traces. c_D is 1, or 0 for --method
likelihood. The last term, the likelihood of the demonstrations, is ours, and for a likelihood alone
(c_L, --reward-nll). A negative is a sample of the policy, or an expert's trace with something wrong
(negatives.py), which counts from the first changed token on (`compare`).

    equation                                  where                        tests/test_reward.py
    D = e^f / (e^f + pi) (1710.11248; paper)  discriminator_logits         airl_discriminator_..
    logit = f (1606.03476; released code)     discriminator_logits         airl_discriminator_..
    BCE, smoothed labels (released code)      bce_loss                     bce_by_hand
    half experts, half negatives (code)       comparison_weights           comparison_loss_by_hand
    r = log D - log(1-D) (1710.11248; paper)  Discriminator.token_rewards  rewards_are_clipped_..
    r = f - alpha log pi, sharper (ours)      Discriminator.token_rewards  rewards_are_clipped_..
    a trace that was cut off (ours)           worst_if_cut_off             a_trace_that_was_cut_..
    dense (paper), sparse, interval (v2)      segment_ends, segment_sums   segment_ends, segment_..
    f = log p_phi (ours)                      LikelihoodReward             a_likelihood_is_..
    f = w . h + b (paper)                     HeadReward                   a_head_reads_..
    where a negative begins to count (ours)   compare                      the_prefix_shared_..

The paper is arXiv 2510.01857 (v2: from its second version on), the code what its authors released.

Run `python reward.py` for a small demonstration: a reward learnt in seconds, and f and D of every
token of a wrong trace.
"""

import math
import random
from collections import deque
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForTokenClassification

import data
import policy
from data import Batch, Example
from engine import loading
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
    # What -log pi buys: at the optimum f is the expert's log-density, whatever the policy was
    # (nearly so with smoothed labels). With logit = f, f is the log-ratio expert / policy, and is
    # worth nothing once the policy has moved on. The paper says AIRL; its released code trains f.
    if kind == "airl":
        # This holds as far as the negatives are the policy's own. Broken copies are not: a policy
        # that starts at the reward is sharp, so log pi of their wrong token is far below f, and D
        # lies near 1 there until f falls, too. In the demo D of experts and samples is 0.50, of
        # broken copies 0.62. Tried instead, 2 seeds, 300 validation questions: logit = f for
        # copies, and the density of a mixture, half pi, half even over the vocabulary. Accuracy
        # 0.961 as it is, 0.965, 0.956; AUROC of f 0.984, 0.988, 0.987: neither is clearly better.
        return scores - policy_logprobs
    return scores


def bce_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Binary cross-entropy per token; label 1: expert, 0: policy. Both labels move towards 1/2.

    >>> bce_loss(torch.tensor([0.0]), torch.tensor([1.0]), 0.1)  # log 2, whatever the label
    tensor([0.6931])
    """
    # Smoothing 0.1 asks for D = 0.95 and 0.05: the logit, which is the reward, stays finite where
    # nothing overlaps.
    targets = labels * (1 - smoothing) + smoothing / 2
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def trace_weights(counted: torch.Tensor, n_traces: float) -> torch.Tensor:
    """Weights [B, T]: the mean over each trace's counted tokens, then over `n_traces` traces.

    counted: [B, T], 1 on the tokens that count.

    >>> trace_weights(torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]), 2)
    tensor([[0.0000, 0.2500, 0.2500],
            [0.0000, 0.5000, 0.0000]])
    """
    # A long trace weighs as much as a short one: else length would tell experts from the policy.
    # These rows may be a micro-batch's or a process's part of the n_traces: the weights of all
    # parts sum to 1.
    tokens = counted.sum(1, keepdim=True).clamp(min=1)
    return counted / tokens / max(1, n_traces)


# What a trace of a comparison is: the expert's (label 1); or a negative (label 0), a sample of the
# policy, now or earlier, or the expert's with something wrong. Tensors hold indices into this.
KINDS = ("expert", "sample", "broken")
EXPERT = 0


def comparison_weights(
    counted: torch.Tensor, kinds: torch.Tensor, n_experts: float, n_negatives: float
) -> torch.Tensor:
    """Weights [B, T] of a comparison's tokens: 1/2 for all experts, 1/2 for all negatives.

    counted: [B, T], 1 on the tokens that count; kinds: [B], indices into KINDS; n_experts,
    n_negatives: how many traces the whole comparison has of them.

    >>> comparison_weights(torch.ones(3, 1), torch.tensor([0, 1, 2]), 1, 2).flatten()
    tensor([0.5000, 0.2500, 0.2500])
    """
    # A demonstration has several negatives. Weighed one by one they would move D below 1/2.
    of_experts = trace_weights(counted, n_experts)
    of_negatives = trace_weights(counted, n_negatives)
    return 0.5 * torch.where(kinds[:, None] == EXPERT, of_experts, of_negatives)


def discriminator_loss(
    logits: torch.Tensor, kinds: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """sum_t w_t BCE(logit_t, label) over rows [B, T]: a number. Those of parts add up."""
    labels = (kinds == EXPERT).float()[:, None].expand_as(logits)
    return (weights * bce_loss(logits, labels, smoothing)).sum()


@torch.no_grad()
def discriminator_sums(
    logits: torch.Tensor, kinds: torch.Tensor, weights: torch.Tensor
) -> dict[str, float]:
    """Of each kind of trace the sums of weights and of weighted D; the weight where D is right."""
    # Sums, since they add up over micro-batches and processes.
    # An expert's token is right at D > 1/2, a negative's at D < 1/2. D = 1/2, where AIRL starts, is
    # half right.
    side = torch.where(kinds[:, None] == EXPERT, 1.0, -1.0)
    sums = {"right": float((weights * (1 + side * logits.sign())).sum() / 2)}
    for index, kind in enumerate(KINDS):
        w = weights[kinds == index]
        sums[f"weight_{kind}"] = float(w.sum())
        sums[f"d_{kind}"] = float((w * logits[kinds == index].sigmoid()).sum())
    return sums


def discriminator_metrics(sums: dict[str, float]) -> dict[str, float]:
    """What is logged, from `discriminator_sums` of a whole comparison: mean D and accuracy."""
    # By kind of trace, since AIRL's logit is that of the policy's own samples alone: see
    # `discriminator_logits`.
    there = [kind for kind in KINDS if sums[f"weight_{kind}"]]
    metrics = {f"d_{kind}": sums[f"d_{kind}"] / sums[f"weight_{kind}"] for kind in there}
    # The weights of all negatives sum to 1/2.
    d_negative = 2 * (sums["d_sample"] + sums["d_broken"])
    # An accuracy near 1 with a score per token says that something other than errors gives the
    # policy away, such as length or format; most tokens of a wrong trace are right. What to turn:
    # --reward likelihood for the head, more --demonstrations, a lower --reward-lr, broken copies
    # alone (--rollouts-per-expert 0 --perturbed 4). With a score per trace 0.8 and more is healthy.
    return metrics | {"d_negative": d_negative, "accuracy": sums["right"]}


def segment_ends(batch: Batch, granularity: str, step_end_tokens: torch.Tensor) -> torch.Tensor:
    """[B, T], 1 on the tokens where a score is read. step_end_tokens [V] bool end a step."""
    # dense: every response token
    if granularity == "dense":
        return batch.response_mask
    # sparse: the last one, which is the end token, unless the length limit came first
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    ends = positions == batch.lengths[:, None] - 1
    # interval: the last one of each step, too (the paper also has one for every 15 tokens)
    if granularity == "interval":
        ends = ends | step_end_tokens[batch.tokens]
    return batch.response_mask * ends


def segment_sums(values: torch.Tensor, mask: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum `values` over each segment and place it on the segment's last token: [B, T].

    >>> ends = torch.tensor([[0.0, 1.0, 1.0]])
    >>> segment_sums(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), ends)
    tensor([[0., 3., 3.]])
    """
    segment = (ends.cumsum(1) - ends).long()  # [B, T], how many segments ended before t
    sums = torch.zeros_like(values).scatter_add(1, segment, values * mask)  # [B, segment]
    return sums.gather(1, segment) * ends


# 2. Two reward models -------------------------------------------------------------------------


class LikelihoodReward(torch.nn.Module):
    """f(s,a) = log p_phi(a|s): the reward is a language model, trained by telling traces apart."""

    # Ours. It starts as a copy of the base, so all that the base knows is in f from the start. And
    # f of all V actions is there at once: the exact expectation sums them.
    scores_all_actions = True

    def __init__(self, model):
        super().__init__()
        self.model = model

    def states(self, batch: Batch) -> torch.Tensor:
        """What f(s_t, .) is read off: the hidden state *before* token t. [B, T, H]"""
        return policy.spread(policy.hidden_states(self.model, batch), batch.response_mask)

    def scores(self, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
        """f(s_t, a_t): [B, T], 0 outside the response."""
        if states is None:
            states = self.states(batch)
        # f, at temperature 1 whatever the policy samples at. Where the policy is the base, too,
        # f - log pi = 0 and D = 1/2 everywhere at the start.
        return policy.logprobs_of(self.model, states[batch.response_mask.bool()], batch)


class HeadReward(torch.nn.Module):
    """f(s,a) = w . h + b on the hidden state that has read a: the paper's linear head."""

    scores_all_actions = False

    def __init__(self, model):
        super().__init__()
        # ForTokenClassification with one label is transformers' name for just this head.
        self.model = model

    def states(self, batch: Batch) -> torch.Tensor:
        """What f(s_t, a_t) is read off: the hidden state *after* token t. [B, T, H]"""
        hidden = policy.hidden_states(self.model, batch, after=True)
        return policy.spread(hidden, batch.response_mask)

    def scores(self, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
        """f(s_t, a_t): [B, T], 0 outside the response."""
        if states is None:
            states = self.states(batch)
        # f. It starts at 0, and easily learns which prompts go with which traces, rather than
        # which steps are right.
        f = self.model.score(states.to(self.model.score.weight.dtype)).squeeze(-1).float()
        return f * batch.response_mask


def load_reward(
    kind: str, path: str, device="cpu", dtype=torch.float32
) -> LikelihoodReward | HeadReward:
    """A reward model from a folder or hub name: `kind` 'likelihood', 'head' or 'random'."""
    if kind == "likelihood":
        return LikelihoodReward(loading.load_causal(path, device, dtype))
    model, info = loading.load_model(
        path, AutoModelForTokenClassification, dtype, num_labels=1, output_loading_info=True
    )
    # A head that is not in the checkpoint (the base has none) starts at 0, a random one anywhere.
    if any("score" in key for key in info["missing_keys"]):
        torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
        if kind == "random":
            torch.nn.init.normal_(model.score.weight)
    return HeadReward(model.to(device))


# 3. From scores to D and to rewards -----------------------------------------------------------


@dataclass
class Discriminator:
    """A reward model with what turns its scores into D, and D into rewards."""

    reward_model: LikelihoodReward | HeadReward
    # airl or gail
    logit: str
    # dense, interval or sparse
    granularity: str
    # [V] bool, the tokens that end a step
    step_end_tokens: torch.Tensor
    # Rewards are held within [-clip, clip]; with 0 they are not.
    clip: float = 0.0

    def score_mask(self, batch: Batch) -> torch.Tensor:
        """[B, T], 1 where a score is read."""
        return segment_ends(batch, self.granularity, self.step_end_tokens)

    def segments(
        self, batch: Batch, scores: torch.Tensor, policy_logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(f, log pi, score mask) per segment, each [B, T], on the segment's last token."""
        score_mask = self.score_mask(batch)
        # The probability of a segment is the product of its tokens': log pi is their sum, and so is
        # a likelihood's f. A head's f is what it says once it has read the segment. Where the score
        # is dense, each token is a segment.
        log_pi = segment_sums(policy_logprobs, batch.response_mask, score_mask)
        f = scores * score_mask
        if self.reward_model.scores_all_actions:
            f = segment_sums(scores, batch.response_mask, score_mask)
        return f, log_pi, score_mask

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
        """r_t from f and log pi of the tokens, each [B, T]: what the policy is trained on."""
        f, log_pi, score_mask = self.segments(batch, scores, policy_logprobs)
        # r, with GAIL's logit: f is a log-ratio of expert and policy already.
        rewards = f
        if self.logit == "airl":
            # r, with AIRL's: alpha = entropy_coef = 1 is its log D - log(1-D) = f - log pi, and
            # imitates. Less sharpens: E[f - alpha log pi] is greatest at pi ~ exp(f / alpha).
            rewards = f - entropy_coef * log_pi
        # Two or three tokens with a huge r would else make the whole gradient (released code: 5).
        limit = self.clip or math.inf
        return (rewards * score_mask).clamp(-limit, limit)


def lowest_finished(
    rewards: torch.Tensor, mask: torch.Tensor, finished: torch.Tensor, gamma: float
) -> float:
    """The lowest return-to-go G_t of any token of a trace that ended by itself, inf if none did.

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
    """Rewards [B, T] by which a trace that ran into the length limit is worth W = lowest - margin.

    finished: [B] bool. lowest: `lowest_finished` of the whole batch, over all processes. margin: in
    the rewards' own unit, logits of D; 1 is a factor of e in the odds.

    >>> rewards, mask = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]] * 2)
    >>> worst_if_cut_off(rewards, mask, torch.tensor([False, True]), gamma=1.0, lowest=1.0)
    tensor([[0., 0.],
            [0., 1.]])
    """
    # Ours, since its own scores mislead: a score per trace is learnt, and read, at the end token,
    # and where later rewards count a trace that goes on collects more of them for ever. (A policy
    # found out: docs/collapses.md.) If no trace ended, all are alike: W = 0.
    worst = lowest - margin if math.isfinite(lowest) else 0.0
    # r_t = W on its last token and (1 - gamma) W before it make G_t = W at each of its tokens,
    # since (1 - gamma) W + gamma W = W.
    tokens_left = mask.flip(1).cumsum(1).flip(1)  # [B, T], of the response, from t on
    constant = torch.where(tokens_left == 1, worst, (1 - gamma) * worst) * mask
    return torch.where(finished[:, None], rewards, constant)


def find_step_end_tokens(tokenizer, size: int) -> torch.Tensor:
    """[V] bool: which tokens hold a newline, that is, end a step of a trace."""
    # The model's matrix may have more rows than the tokenizer has tokens: padding.
    ids = range(min(size, len(tokenizer)))
    is_end = ["\n" in tokenizer.decode([token]) for token in ids]
    return torch.tensor(is_end + [False] * (size - len(ids)))


def make_discriminator(
    reward_model: LikelihoodReward | HeadReward,
    tokenizer,
    logit: str = "airl",
    granularity: str = "dense",
    clip: float = 0.0,
) -> Discriminator:
    """A discriminator on a reward model; steps end where this tokenizer writes a newline."""
    model = reward_model.model
    step_end_tokens = find_step_end_tokens(tokenizer, model.get_input_embeddings().num_embeddings)
    return Discriminator(reward_model, logit, granularity, step_end_tokens.to(model.device), clip)


# 4. Experts and their negatives ---------------------------------------------------------------


@dataclass
class Comparison:
    """What one discriminator update sees: experts' traces, each with its negatives below it."""

    # Rows of a family stand together, since a forward pass reads the prompt that they share once.
    batch: Batch
    # [B], what each row is: an index into KINDS.
    kinds: torch.Tensor
    # [B], the number of the demonstration whose question each row answers.
    family: torch.Tensor
    # [B], the first column that counts.
    first: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Comparison":
        # Some of the rows: indices or a mask.
        return Comparison(self.batch[rows], self.kinds[rows], self.family[rows], self.first[rows])

    def counted(self) -> torch.Tensor:
        """[B, T], 1 on the response tokens from the first that counts on."""
        columns = torch.arange(self.batch.tokens.shape[1], device=self.first.device)
        return self.batch.response_mask * (columns >= self.first[:, None])


class Replay:
    """The latest responses to each question."""

    # The policy shall not come back to errors that it has given up. (AIRL mixes in samples of the
    # last 20 iterations; the released code keeps 100.)

    def __init__(self, per_question: int):
        self.per_question = per_question
        self.past = {}

    def add(self, question: str, responses: list[list[int]]) -> None:
        """Keep these responses; the oldest ones go."""
        latest = deque(self.past.get(question, []) + responses, self.per_question)
        self.past[question] = list(latest)

    def draw(self, question: str, count: int, rng: random.Random) -> list[list[int]]:
        """At most `count` old responses to a question."""
        past = self.past.get(question, [])
        return rng.sample(past, min(count, len(past)))

    def state_dict(self) -> dict:
        return self.past

    def load_state_dict(self, state: dict) -> None:
        self.past = state


def compare(
    tokenizer,
    examples: list[Example],
    samples: list[list[list[int]]],
    n_broken: int,
    rng: random.Random,
    device="cpu",
    wrong: str = "broken",
) -> Comparison:
    """Experts beside negatives for the same questions.

    examples: tokenised demonstrations. samples[i]: responses (token lists) to examples[i].question
    that the policy wrote. n_broken: copies of each expert's trace with something wrong, at most;
    `wrong` says what (negatives.perturb).
    """
    rows = []  # (kind, family, response, the first of its tokens that counts)
    for i, example in enumerate(examples):
        rows.append(("expert", i, example.response, 0))
        rows += [("sample", i, response, 0) for response in samples[i]]
        # A broken copy is the expert's own up to its first changed token: to call that prefix a
        # negative would contradict the label above. (The released code does, pairs copies with
        # other questions' prompts, and keeps copies that changed nothing.)
        copies = perturbed_negatives(tokenizer, example, n_broken, rng, wrong)
        rows += [("broken", i, response, changed) for response, changed in copies]
    kinds, family, responses, first = zip(*rows)
    batch = data.make_batch([examples[i].prompt for i in family], responses, device)
    kinds = torch.tensor([KINDS.index(kind) for kind in kinds], device=device)
    first = batch.prompt_lengths + torch.tensor(first, device=device)
    return Comparison(batch, kinds, torch.tensor(family, device=device), first)


# A log-probability below this is taken for an error; -0.7, -1, -1.6, -2.3 tried on validation.
SUSPICIOUS = -1.0


def main() -> None:
    """Learn a reward from 64 demonstrations in some seconds, and show a mistake in its eyes."""
    loading.quiet()
    base, tokenizer = loading.load_policy("base")
    discriminator = make_discriminator(load_reward("likelihood", "base"), tokenizer)
    optimizer = policy.make_optimizer(discriminator.reward_model, 3e-4)
    experts = data.tokenize(tokenizer, data.load_examples("words", "train", 64))
    rng = random.Random(0)
    for update in range(1, 21):
        # irl.IRL.discriminator_step does the same in micro-batches, on several processes, and with
        # samples of the policy. Here all negatives are broken copies, two of each demonstration.
        part = compare(tokenizer, rng.sample(experts, 16), [[]] * 16, 2, rng)
        f = discriminator.reward_model.scores(part.batch)
        log_pi = policy.token_logprobs(base, part.batch).detach()
        logits = discriminator.logits(part.batch, f, log_pi)
        weights = comparison_weights(part.counted(), part.kinds, 16, len(part.kinds) - 16)
        loss = discriminator_loss(logits, part.kinds, weights, smoothing=0.1)
        loss.backward()
        policy.optimizer_step(optimizer, float(loss.detach()))
        metrics = discriminator_metrics(discriminator_sums(logits, part.kinds, weights))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"discriminator update {update}: {shown}")

    question = "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9. How many pens?"
    wrong = Example(question, "3+12=15\n24+15=39\n39-9=30", "30")
    batch = data.demonstration_batch(data.tokenize(tokenizer, [wrong]))
    f = discriminator.reward_model.scores(batch)
    log_pi = policy.token_logprobs(base, batch)
    D = discriminator.logits(batch, f, log_pi).sigmoid()
    print(f"\n{question}\n{'token':>10s}{'log pi':>10s}{'f':>10s}{'D':>10s}")
    for t in range(int(batch.prompt_lengths), int(batch.lengths)):
        token = tokenizer.decode([int(batch.tokens[0, t])])
        print(f"{token!r:>10s}{log_pi[0, t]:10.3f}{f[0, t]:10.3f}{D[0, t]:10.3f}")


if __name__ == "__main__":
    main()
