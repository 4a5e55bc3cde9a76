"""Inverse reinforcement learning for reasoning: the loop (arXiv 2510.01857, Algorithm 1).

    0. warm-up         ours, not the paper's: the discriminator learns alone. Then `end_warm_up`
                       averages the reward's weights with their start and, where f is a
                       likelihood, lets the policy start at the best policy for this f
    repeat             (the paper's Algorithm 1: `IRL.step`)
        1. rollout         the policy answers some questions, `group` times each
        2. discriminator   learns to tell the experts' traces from these (and from older and
                           broken ones); with --reward-lr 0 it stands still after the warm-up
        3. reward          its score of every token becomes r_t = f - alpha log pi
        4. policy          one step uphill: on E_{a~pi}[r_t], summed over all actions a, or
                           a policy gradient on the r_t of the sampled tokens and what follows

Read `IRL.step`, then the four stages below it, in this order. Each `backward()` and each optimizer
step of the method stands in this file. What they call is in reward.py (f, D, losses) and policy.py
(sampling, log-probabilities, returns, losses).

Nobody checks an answer here: every step runs inside `data.no_verifier()`, where the answer check
raises. (The baselines, SFT and GRPO, are in baselines.py. GRPO may look.)

    equation                                       where                   tests/test_irl.py
    Algorithm 1                                    IRL.step                a_policy_improves_..
    L of the discriminator                         IRL.discriminator_step  the_discriminators_loss_..
    pi ~ exp(f / alpha) is best for r, gamma = 0   IRL.end_warm_up         the_policy_starts_at_..
    max E_{a~pi}[f - alpha log pi], gamma 0, ours  IRL.exact_loss          exact_loss_equals_..
    A_t = G_t - b_t, or F_t less its mean (v1)     IRL.advantages          sums_over_actions_..
    no verifier in training                        data.no_verifier        training_raises_if_..

Run `python irl.py` for three iterations on the shipped base, stage by stage.
"""

import random
from dataclasses import dataclass, field

import torch

import data
import logprob
import policy
import reward
from data import Batch, Example
from engine import loading, lora, memory, parallel
from engine.settings import parse_settings
from policy import Rollout


@dataclass
class IRL:
    """All that changes during training, and what it needs.

    settings: engine.settings.Settings, read only.
    experts: the demonstrations, tokenised (data.tokenize): question, trace, answer.
    extra: questions without a demonstration, tokenised, their answers removed
        (data.question_only). Only the policy sees them.
    """

    settings: object
    tokenizer: object
    policy_model: torch.nn.Module
    discriminator: reward.Discriminator
    experts: list[Example]
    extra: list[Example] = field(default_factory=list)

    # what a checkpoint keeps
    changes = (
        "policy_model",
        "discriminator.reward_model",
        "policy_optimizer",
        "reward_optimizer",
        "replay",
        "rng",
        "generator",
        "steps_done",
    )

    def __post_init__(self):
        s = self.settings
        self.reward_model = self.discriminator.reward_model
        self.policy_optimizer = policy.make_optimizer(self.policy_model, s.policy_lr)
        self.reward_optimizer = policy.make_optimizer(self.reward_model, s.reward_lr)
        self.rng = random.Random(f"irl {s.seed}")  # draws questions, broken copies, old samples
        self.generator = torch.Generator(self.policy_model.device).manual_seed(s.seed)  # samples
        self.replay = reward.Replay(s.replay)
        self.end_tokens = data.end_tokens(self.tokenizer, self.policy_model)
        self.steps_done = 0
        self.reward_start = []
        if s.reward_average:  # `end_warm_up` will average with these
            self.reward_start = lora.start_of(self.reward_model)
        if s.kl_coef:
            self.keep_reference()
            self.changes = (*self.changes, "reference")

    # Algorithm 1 ------------------------------------------------------------------------------

    def step(self) -> dict:
        """One iteration. Returns each stage's metrics: {"rollout": {..}, "discriminator": ..}."""
        s = self.settings
        metrics = {}
        policy.set_rate(self.policy_optimizer, s.policy_lr, self.steps_done, s.max_steps)
        policy.set_constant_rate(self.reward_optimizer, s.reward_lr)
        with data.no_verifier():
            # Which questions: those of some demonstrations first, then some extra ones.
            examples, questions = self.draw()

            # 1. The policy answers each question G times: B = questions x G rows.
            rollout, metrics["rollout"] = self.rollout(questions, s.group)

            # 2. The discriminator learns: is a token the expert's or the policy's?
            if s.reward_lr:
                metrics["discriminator"] = self.update_discriminator(examples, rollout, s.group)

            # 3. Its score becomes a reward for each token, [B, T].
            rewards, reward_states, metrics["reward"] = self.rewards(rollout)

            # 4. The policy takes a step towards more of it.
            metrics["policy"] = self.update_policy(rollout, rewards, reward_states)
        self.steps_done += 1
        return metrics

    def draw(self) -> tuple[list[Example], list[Example]]:
        """(demonstrations for the discriminator, all questions of a step: theirs come first).

        Half of the questions are extra ones, if there are any. Where the discriminator stands
        still no demonstration is needed, and all questions are alike.
        """
        s = self.settings
        if not s.reward_lr:
            return [], data.draw(self.experts + self.extra, s.questions, self.rng)
        n_extra = 0
        if self.extra:
            n_extra = s.questions // 2
        examples = data.draw(self.experts, s.questions - n_extra, self.rng)
        return examples, examples + data.draw(self.extra, n_extra, self.rng)

    # 1. Rollout -------------------------------------------------------------------------------

    def rollout(self, questions: list[Example], group: int) -> tuple[Rollout, dict]:
        """`group` responses to each question from the policy as it is now: rows i*group + g."""
        return policy.rollout(
            self.policy_model, questions, self.end_tokens, group, self.settings, self.generator
        )

    # 2. Discriminator -------------------------------------------------------------------------

    def update_discriminator(
        self, examples: list[Example], rollout: Rollout | None, group: int
    ) -> dict:
        """Experts against negatives. Rows i*group .. of the rollout answer examples[i].

        Negatives of each demonstration: some samples of the policy, of which a part may be older
        ones (replay), and broken copies of the expert's own trace (negatives.py).
        """
        s = self.settings
        samples = [[] for _ in examples]
        old_samples = [[] for _ in examples]
        n_broken = 0
        if s.discriminator_coef:  # with 0 negatives would weigh nothing
            n_broken = s.perturbed
            for i, example in enumerate(examples):
                first = i * group
                rows = range(first, first + s.rollouts_per_expert)
                fresh = [rollout.batch.response(row) for row in rows]
                n_old = 0
                if s.replay:
                    n_old = s.rollouts_per_expert // 2
                old_samples[i] = self.replay.draw(example.question, n_old, self.rng)
                self.replay.add(example.question, fresh)
                # Old samples take the place of fresh ones: the number of negatives stays.
                samples[i] = fresh[: len(fresh) - len(old_samples[i])]
        for _ in range(s.discriminator_updates):
            comparison = reward.compare(
                self.tokenizer,
                examples,
                samples,
                n_broken,
                self.rng,
                self.policy_model.device,
                s.negatives,
                old_samples,
            )
            metrics = self.discriminator_step(comparison)
        return metrics

    def discriminator_step(self, comparison: reward.Comparison) -> dict:
        """One optimizer step on

            L = c_D (1/2 mean_expert BCE(logit, 1) + 1/2 mean_negative BCE(logit, 0))
                - c_L mean_expert log p_phi

        Each mean is over a trace's counted tokens, then over the traces. Returns its metrics.
        """
        s = self.settings
        # A trace weighs the same in whichever process and micro-batch it is.
        n_experts = parallel.total(len(comparison.expert))
        n_negatives = parallel.total(len(comparison.negative))
        sums = {}
        for part in comparison.parts(s.micro_batch, s.micro_tokens):
            batch = data.cat_batches(part.expert, part.negative)  # E experts above M negatives
            kinds = part.kinds()  # [E + M]: the expert's, the policy's, ..

            # f, with a gradient; log pi, without. GAIL's logit needs no policy.
            f = self.reward_model.scores(batch)  # [E + M, T]
            log_pi = torch.zeros_like(f)
            if s.logit == "airl":
                with torch.no_grad():
                    log_pi = policy.token_logprobs(self.policy_model, batch, s.temperature)
            logits = self.discriminator.logits(batch, f, log_pi)  # [E + M, T]

            # The weights of the tokens that count sum to 1/2 over all experts, and over all
            # negatives. A broken copy counts from its first changed token on.
            counted = self.discriminator.score_mask(batch) * part.from_change_on(batch)
            weights = reward.comparison_weights(counted, kinds, n_experts, n_negatives)
            loss = s.discriminator_coef * reward.discriminator_loss(
                logits, kinds, weights, s.label_smoothing
            )

            # The demonstrations' likelihood, ours. A head's f is no likelihood.
            if s.reward_nll and self.reward_model.scores_all_actions:
                mask = batch.response_mask * (kinds == reward.EXPERT)[:, None]
                likelihood = (reward.trace_weights(mask, n_experts) * f).sum()
                loss = loss - s.reward_nll * likelihood

            loss.backward()  # gradients of all parts add up
            part_sums = reward.discriminator_sums(logits, kinds, weights)
            part_sums["loss"] = float(loss.detach())
            for name, value in part_sums.items():
                sums[name] = sums.get(name, 0.0) + value
        sums = parallel.total_of(sums)
        metrics = policy.optimizer_step(self.reward_optimizer, sums["loss"])
        return metrics | reward.discriminator_metrics(sums)

    # 3. Reward --------------------------------------------------------------------------------

    def rewards(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """(r_t of each response token [B, T], the states that f was read off [B, T, H], metrics).

        The token ids that were sampled are scored, not their text. From the states stage 4 reads
        f of all other actions too, where f is a likelihood.
        """
        s = self.settings
        batch = rollout.batch
        size = (s.micro_batch, s.micro_tokens)
        states = policy.in_chunks(self.reward_model.states, batch, *size)  # [B, T, H]
        f = policy.in_chunks(self.reward_model.scores, batch, *size, states)  # [B, T]
        rewards = self.discriminator.token_rewards(batch, f, rollout.logprobs, s.entropy_coef)
        score_mask = self.discriminator.score_mask(batch).bool()  # elsewhere r_t is 0: no opinion
        if s.gamma:  # later rewards count: a trace that goes on for ever would collect them
            mask = batch.response_mask
            finished = rollout.finished
            lowest = reward.lowest_finished(rewards, mask, finished, s.gamma)
            lowest = parallel.lowest(lowest)  # of all processes: a trace's reward is the same in each
            margin = s.reward_clip or 1.0
            rewards = reward.worst_if_cut_off(rewards, mask, finished, s.gamma, lowest, margin)
        lowest_of_each = rewards.masked_fill(~score_mask, torch.inf).amin(1)  # [B]
        metrics = {
            "mean": float(rewards.sum() / score_mask.sum()),
            "lowest": float(lowest_of_each.mean()),
        }
        return rewards, states, metrics

    # 4. Policy --------------------------------------------------------------------------------

    def update_policy(
        self, rollout: Rollout, rewards: torch.Tensor, reward_states: torch.Tensor
    ) -> dict:
        """`epochs` optimizer steps on one rollout. Returns the last one's metrics."""
        s = self.settings
        batch = rollout.batch
        advantages = self.advantages(batch, rewards)  # [B, T]
        # The loss is a mean over the response tokens of the whole batch, of all processes: the
        # size of a micro-batch sets the memory and nothing else.
        n_tokens = parallel.total(float(batch.response_mask.sum()))
        self.policy_model.train()
        for _ in range(s.epochs):
            mean_loss = 0.0
            for rows in memory.micro_batches(batch.lengths, s.micro_batch, s.micro_tokens):
                part = batch[rows]
                width = part.tokens.shape[1]  # cut to the longest of these rows
                loss = self.policy_loss(
                    part,
                    rollout.logprobs[rows, :width],
                    advantages[rows, :width],
                    reward_states[rows, :width],
                )
                loss = loss / n_tokens
                loss.backward()  # gradients of all micro-batches add up
                mean_loss += float(loss.detach())
            mean_loss = parallel.total(mean_loss)
            metrics = policy.optimizer_step(self.policy_optimizer, mean_loss)
        return metrics

    def advantages(self, batch: Batch, rewards: torch.Tensor) -> torch.Tensor:
        """A_t: what the sampled token and all after it brought, beyond what was expected. [B, T]

        G_t = r_t + gamma G_{t+1} is the return, b_t the mean of the question's other samples.
        With the exact loss r_t itself is summed over all actions: only what follows it,
        F_t = gamma G_{t+1}, is sampled. F_t is 0 after an end token, and that counts in the
        group's mean: ending is compared with going on.
        """
        s = self.settings
        mask = batch.response_mask
        returns = policy.returns_to_go(rewards, mask, s.gamma)
        if s.policy_loss == "exact":
            following = s.gamma * policy.shift_left(returns) * mask  # F_t
            return following - policy.group_baseline(following, mask, s.group)
        advantages = returns - policy.group_baseline(returns, mask, s.group)
        if s.advantage_scale == "group":
            return policy.normalise_by_group(advantages, mask, s.group)
        # One scale for the rows of all processes.
        sums = {"squares": float((advantages**2 * mask).sum()), "tokens": float(mask.sum())}
        sums = parallel.total_of(sums)
        return policy.normalise(advantages, mask, sums["squares"], sums["tokens"])

    def policy_loss(
        self,
        batch: Batch,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        reward_states: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of some rows, summed over their response tokens: a number.

        old_logprobs, advantages: [B, T]; reward_states: [B, T, H]. policy.py has the equations.
        """
        s = self.settings
        hidden = policy.hidden_states(self.policy_model, batch)  # [N, H], N response tokens
        loss = 0.0
        if s.policy_loss == "exact":
            loss = self.exact_loss(batch, reward_states, hidden)
            if not s.gamma and not s.kl_coef:  # the default on words: no sampled token counts
                return loss

        logprobs = policy.logprobs_of(self.policy_model, hidden, batch, s.temperature)  # [B, T]
        if s.policy_loss == "ppo":
            token_losses = policy.ppo_loss(logprobs, old_logprobs, advantages, s.ppo_clip)
        else:
            token_losses = policy.reinforce_loss(logprobs, advantages)
        if s.kl_coef:
            with torch.no_grad():
                reference = policy.token_logprobs(self.reference, batch, s.temperature)
            token_losses = token_losses + s.kl_coef * policy.kl_k3(logprobs, reference)
        return loss + token_losses.sum()

    def exact_loss(
        self, batch: Batch, reward_states: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """-sum_t E_{a~pi}[f(s_t,a) - alpha log pi(a|s_t)] over the response tokens: a number.

        The gradient is through pi alone; logprob.expectation_gradient has it by hand.
        reward_states [B, T, H] are those of stage 3; hidden [N, H] are the policy's.
        """
        s = self.settings
        weight, softcap = logprob.output_layer(self.policy_model)
        reward_weight, _ = logprob.output_layer(self.reward_model.model)
        reward_hidden = reward_states[batch.response_mask.bool()]  # [N, H]
        return -logprob.expected_reward_sum(
            hidden, weight, reward_hidden, reward_weight, s.entropy_coef, s.temperature, softcap
        )

    # 0. Warm-up -------------------------------------------------------------------------------

    def warm_up(self) -> dict:
        """One of many updates of the discriminator alone, on fresh samples of a policy that
        stands still. A policy that starts on a reward at chance learns noise."""
        s = self.settings
        rollout = None
        with data.no_verifier():
            policy.set_constant_rate(self.reward_optimizer, s.warm_up_lr)
            examples = data.draw(self.experts, s.questions, self.rng)
            if s.discriminator_coef and s.rollouts_per_expert:
                rollout, _ = self.rollout(examples, s.rollouts_per_expert)
            return self.update_discriminator(examples, rollout, s.rollouts_per_expert)

    @torch.no_grad()
    def end_warm_up(self) -> None:
        """On words this alone makes nearly all of the result; the paper has no such step.

        The reward's weights are averaged with their start (lora.average says why). With
        start = reward the policy then begins at the optimum for this f: E[f - alpha log pi] is
        greatest at pi ~ exp(f / alpha), which is the reward's own network with its logits divided
        by alpha, as long as gamma = 0 and f is a likelihood. (pi is the policy as it samples in
        training, at --temperature.) With adapters, these alone are copied.
        """
        s = self.settings
        lora.average(self.reward_model, self.reward_start, s.reward_average)
        self.reward_start = []
        if s.start == "reward":
            parameters = lora.trained(self.policy_model)
            learnt = lora.trained(self.reward_model)
            for parameter, value in zip(parameters, learnt, strict=True):
                parameter.copy_(value)
            policy.divide_logits(self.policy_model, s.entropy_coef / s.temperature)
            if s.kl_coef:
                self.keep_reference()

    def keep_reference(self) -> None:
        """pi_ref is the policy as it is now. What is frozen in the policy is shared with it."""
        self.reference = lora.share(self.policy_model)


def first_logprob(model, experts: list[Example]) -> float:
    """Mean log pi of the demonstrations' first token.

    The exact loss's gradient on an action is proportional to pi(a), and sampling must meet it:
    a policy that never begins as the experts do learns it from SFT alone.
    """
    prompts = [example.prompt for example in experts]
    first_tokens = [example.response[:1] for example in experts]
    batch = data.make_batch(prompts, first_tokens, model.device)

    def logprobs(part: Batch) -> torch.Tensor:
        return policy.token_logprobs(model, part)

    return float(policy.in_chunks(logprobs, batch, 4).sum()) / len(experts)


def main() -> None:
    loading.quiet()
    flags = "--demonstrations 64 --questions 16 --group 4 --max-steps 3 --device cpu"
    settings = parse_settings(flags.split())
    model, tokenizer = loading.load_policy("base")
    experts = data.tokenize(tokenizer, data.load_examples("words", "train", 64))
    reward_model = reward.load_reward("likelihood", "base")
    loop = IRL(
        settings, tokenizer, model, reward.make_discriminator(reward_model, tokenizer), experts
    )
    print(f"{len(experts)} demonstrations, for instance\n{experts[0].question}\n{experts[0].trace}")
    for _ in range(10):
        metrics = loop.warm_up()
    loop.end_warm_up()
    print("\nafter 10 warm-up updates:", in_one_line(metrics))
    for iteration in range(1, 4):
        print(f"\niteration {iteration}")
        for stage, metrics in loop.step().items():
            print(f"  {stage:14s}{in_one_line(metrics)}")


def in_one_line(metrics: dict) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


if __name__ == "__main__":
    main()
