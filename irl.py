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
(sampling, log-probabilities, returns, losses); logprob.py has the exact sum with its gradient.

    equation                                       where                   tests/test_irl.py
    Algorithm 1                                    IRL.step                a_policy_improves_..
    L of the discriminator                         IRL.discriminator_step  the_discriminators_..
    pi ~ exp(f / alpha) is best for r, gamma = 0   IRL.end_warm_up         the_policy_starts_at_..
    max E_{a~pi}[f - alpha log pi] (ours)          IRL.policy_loss         exact_loss_equals_..
    A_t = G_t - b_t (v1), or F_t less its mean     IRL.advantages          sums_over_actions_..
    no verifier in training                        data.no_verifier        training_raises_if_..

Run `python irl.py` for three iterations on the shipped base, stage by stage.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

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
    """All that changes during training, and what it needs."""

    settings: object  # engine.settings.Settings
    tokenizer: object
    policy_model: torch.nn.Module
    discriminator: reward.Discriminator
    # The demonstrations, tokenised (data.tokenize): question, trace, answer.
    experts: list[Example]
    # Questions without a demonstration (data.question_only), which only the policy sees.
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
        "updates_done",
        "steps_done",
    )

    def __post_init__(self):
        # Without the discriminator's own loss (--method likelihood) negatives would weigh nothing.
        if not self.settings.discriminator_coef:
            self.settings = replace(self.settings, rollouts_per_expert=0, perturbed=0)
        s = self.settings
        self.reward_model = self.discriminator.reward_model
        self.policy_optimizer = policy.make_optimizer(self.policy_model, s.policy_lr)
        self.reward_optimizer = policy.make_optimizer(self.reward_model, s.reward_lr)
        # Two sources of chance: one draws questions, broken copies and old samples, the other one,
        # on the policy's device, the samples.
        self.rng = random.Random(f"irl {s.seed}")
        self.generator = torch.Generator(self.policy_model.device).manual_seed(s.seed)
        self.replay = reward.Replay(s.replay)
        self.end_tokens = data.end_tokens(self.tokenizer, self.policy_model)
        self.updates_done = 0  # of the warm-up
        self.steps_done = 0
        # `end_warm_up` averages with these, a copy of the reward's weights.
        self.reward_start = lora.start_of(self.reward_model) if s.reward_average else []
        # pi_ref is the policy before its first step. What is frozen in the policy is shared.
        if s.kl_coef:
            self.reference = lora.share(self.policy_model)
            self.changes = (*self.changes, "reference")

    # Algorithm 1 ------------------------------------------------------------------------------

    def step(self) -> dict:
        """One iteration. Returns each stage's metrics: {"rollout": {..}, "discriminator": ..}."""
        s = self.settings
        metrics = {}
        policy.set_rate(self.policy_optimizer, s.policy_lr, self.steps_done, s.max_steps)
        policy.set_constant_rate(self.reward_optimizer, s.reward_lr)
        # Nobody checks an answer in here. The lock is on the checks themselves (tasks/): whatever
        # asks whether an answer is right raises, however it gets there. So a run that comes to its
        # end proves that nothing asked. (The paper's later configurations relabel rollouts by
        # their answers: a verifier. Ours is GRPO's alone, in baselines.py.)
        with data.no_verifier():
            # Which questions: those of some demonstrations first, then some extra ones.
            examples, questions = self.draw()

            # 1. The policy answers each question G times: B = questions x G rows.
            rollout, metrics["rollout"] = self.rollout(questions, s.group)

            # 2. The discriminator learns: is a token the expert's or the policy's? With
            #    --reward-lr 0 it has learnt all that it will in the warm-up.
            if s.reward_lr:
                metrics["discriminator"] = self.update_discriminator(examples, rollout, s.group)

            # 3. Its score becomes a reward for each token, [B, T].
            rewards, reward_states, metrics["reward"] = self.rewards(rollout)

            # 4. The policy takes a step towards more of it.
            metrics["policy"] = self.update_policy(rollout, rewards, reward_states)
        self.steps_done += 1
        return metrics

    def draw(self) -> tuple[list[Example], list[Example]]:
        """(demonstrations for the discriminator, all questions of a step: theirs come first)."""
        s = self.settings
        # Where the discriminator stands still it needs no demonstration: all questions are alike.
        if not s.reward_lr:
            return [], data.draw(self.experts + self.extra, s.questions, self.rng)
        # Half of the questions are extra ones, if there are any.
        n_extra = s.questions // 2 if self.extra else 0
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
        """Experts against negatives. Rows i*group .. of the rollout answer examples[i]."""
        s = self.settings
        samples = []
        for i, example in enumerate(examples):
            rows = range(i * group, i * group + s.rollouts_per_expert)
            fresh = [rollout.batch.response(row) for row in rows]
            # Up to half are old ones, in the place of fresh ones: the number of negatives stays.
            old = self.replay.draw(example.question, s.rollouts_per_expert // 2, self.rng)
            self.replay.add(example.question, fresh)
            samples.append(fresh[: len(fresh) - len(old)] + old)
        for _ in range(s.discriminator_updates):
            # Further negatives are broken copies of the expert's own trace (negatives.py).
            comparison = reward.compare(
                self.tokenizer,
                examples,
                samples,
                s.perturbed,
                self.rng,
                self.policy_model.device,
                s.negatives,
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
        n_experts = parallel.total(float((comparison.kinds == reward.EXPERT).sum()))
        n_negatives = parallel.total(float(len(comparison.kinds))) - n_experts
        sums = Counter()
        for rows in memory.micro_batches(comparison.batch.lengths, s.micro_batch, s.micro_tokens):
            part = comparison[rows]
            batch = part.batch  # B rows of T columns; part.kinds [B] says what each row is

            # f, with a gradient; log pi, without. GAIL's logit needs no policy.
            f = self.reward_model.scores(batch)  # [B, T]
            log_pi = torch.zeros_like(f)
            if s.logit == "airl":
                with torch.no_grad():
                    log_pi = policy.token_logprobs(self.policy_model, batch, s.temperature)
            logits = self.discriminator.logits(batch, f, log_pi)  # [B, T], D = sigmoid(logit)

            # Which tokens count: of experts and samples all that have a score. Of a broken copy
            # those from the first changed one on: what stands before it is the expert's own.
            # The weights of those that count sum to 1/2 over all experts, and over all negatives:
            # each trace's share is the same, and is spread evenly over its tokens.
            counted = self.discriminator.score_mask(batch) * part.counted()
            weights = reward.comparison_weights(counted, part.kinds, n_experts, n_negatives)
            loss = s.discriminator_coef * reward.discriminator_loss(
                logits, part.kinds, weights, s.label_smoothing
            )

            # The demonstrations' likelihood, ours. A head's f is no likelihood.
            if s.reward_nll and self.reward_model.scores_all_actions:
                of_experts = batch.response_mask * (part.kinds == reward.EXPERT)[:, None]
                likelihood = reward.trace_weights(of_experts, n_experts) * f
                loss = loss - s.reward_nll * likelihood.sum()

            loss.backward()  # gradients of all parts add up
            sums.update(reward.discriminator_sums(logits, part.kinds, weights))
            sums["loss"] += float(loss.detach())
        sums = parallel.total_of(sums)
        metrics = policy.optimizer_step(self.reward_optimizer, sums["loss"])
        return metrics | reward.discriminator_metrics(sums)

    # 3. Reward --------------------------------------------------------------------------------

    def rewards(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """(r_t of each response token [B, T], the states that f was read off [B, T, H], metrics).

        From the states stage 4 reads f of all other actions too, where f is a likelihood.
        """
        s = self.settings
        # The token ids that were sampled are scored. (The released code tokenises their text anew,
        # which shifts rewards by a token.)
        batch = rollout.batch
        states = policy.in_chunks(
            self.reward_model.states, batch, s.micro_batch, s.micro_tokens
        )  # [B, T, H]
        f = policy.in_chunks(
            self.reward_model.scores, batch, s.micro_batch, s.micro_tokens, states
        )  # [B, T]
        rewards = self.discriminator.token_rewards(batch, f, rollout.logprobs, s.entropy_coef)
        # Where later rewards count, a trace that goes on for ever would collect them.
        if s.gamma:
            limits = (batch.response_mask, rollout.finished, s.gamma)
            # The lowest of all processes: a trace is worth the same in whichever it is.
            lowest = parallel.lowest(reward.lowest_finished(rewards, *limits))
            # Behind a clip a cut-off trace lies as far below the lowest score as this is below 0,
            # and does not drown the others.
            rewards = reward.worst_if_cut_off(rewards, *limits, lowest, s.reward_clip or 1.0)
        # Where no score is read r_t is 0, which is no opinion.
        mean = float(rewards.sum() / self.discriminator.score_mask(batch).sum())
        return rewards, states, {"mean": mean}

    # 4. Policy --------------------------------------------------------------------------------

    def update_policy(
        self, rollout: Rollout, rewards: torch.Tensor, reward_states: torch.Tensor
    ) -> dict:
        """`epochs` optimizer steps on one rollout. Returns the last one's metrics."""
        s = self.settings
        batch = rollout.batch
        advantages = self.advantages(batch, rewards)  # [B, T]
        # The loss is a mean over the response tokens of the whole batch, of all processes: the
        # size of a micro-batch sets the memory and nothing else. On a card of 16 GB fits, by the
        # arithmetic of docs/speed.md, a Qwen2.5-0.5B with --lora-rank 16 (7 GB), a 1.5B (14 GB;
        # with --gradient-checkpointing --sample-rows 64 6 GB). All weights of a 0.5B take 24 GB:
        # weights, gradients and AdamW's two moments, of policy and reward, in float32.
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
        """A_t: what the sampled token and all after it brought, beyond what was expected. [B, T]"""
        s = self.settings
        mask = batch.response_mask
        returns = policy.returns_to_go(rewards, mask, s.gamma)  # G_t = r_t + gamma G_{t+1}
        if s.policy_loss == "exact":
            # r_t itself is summed over all actions. Only what follows it, F_t = gamma G_{t+1}, is
            # sampled. F_t is 0 after an end token, and that counts in the group's mean: ending is
            # compared with going on.
            following = s.gamma * torch.nn.functional.pad(returns[:, 1:], (0, 1)) * mask
            return following - policy.group_baseline(following, mask, s.group)
        # b_t is the mean of the question's other samples: policy.group_baseline says why.
        advantages = returns - policy.group_baseline(returns, mask, s.group)
        if s.advantage_scale == "group":
            return policy.normalise_by_group(advantages, mask, s.group)
        # One scale for the rows of all processes.
        squares = parallel.total(float((advantages**2 * mask).sum()))
        return policy.normalise(advantages, mask, squares, parallel.total(float(mask.sum())))

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
            # -sum_t E_{a~pi}[f(s_t,a) - alpha log pi(a|s_t)]. The gradient is through pi alone,
            # pi(a) (u(a) - E[u]) for u = f - alpha log pi: by hand in logprob.expectation_gradient.
            weight, softcap = logprob.output_layer(self.policy_model)
            reward_weight, _ = logprob.output_layer(self.reward_model.model)
            reward_hidden = reward_states[batch.response_mask.bool()]  # [N, H]
            loss = -logprob.expected_reward_sum(
                hidden, weight, reward_hidden, reward_weight, s.entropy_coef, s.temperature, softcap
            )
            # The default on words: what follows counts nothing, and no sampled token is asked.
            if not s.gamma and not s.kl_coef:
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

    # 0. Warm-up -------------------------------------------------------------------------------

    def warm_up(self) -> dict:
        """One of many updates of the discriminator alone, on a policy that stands still."""
        # With an untrained f the reward -alpha log pi pays for rare tokens, and a policy that
        # starts on a reward at chance learns noise.
        s = self.settings
        rollout = None
        with data.no_verifier():
            if s.warm_up_decay:
                rate = (s.warm_up_lr, self.updates_done, s.warm_up)
                policy.set_rate(self.reward_optimizer, *rate)
            else:
                policy.set_constant_rate(self.reward_optimizer, s.warm_up_lr)
            self.updates_done += 1
            examples = data.draw(self.experts, s.questions, self.rng)
            if s.rollouts_per_expert:
                rollout, _ = self.rollout(examples, s.rollouts_per_expert)
            return self.update_discriminator(examples, rollout, s.rollouts_per_expert)

    @torch.no_grad()
    def end_warm_up(self) -> None:
        """Average the reward with its start; with --start reward, copy it into the policy."""
        s = self.settings
        # What few demonstrations taught has cost the reward skills of its start: lora.average.
        lora.average(self.reward_model, self.reward_start, s.reward_average)
        self.reward_start = []
        if s.start == "reward":
            # Ours; on words this alone makes nearly all of the result. With gamma = 0 and f a
            # likelihood E[f - alpha log pi] is greatest at pi ~ exp(f / alpha): that is the
            # reward's own network with its logits divided by alpha. (pi is the policy as it
            # samples, at its temperature.) With adapters, these alone are copied.
            parameters = lora.trained(self.policy_model)
            for parameter, value in zip(parameters, lora.trained(self.reward_model), strict=True):
                parameter.copy_(value)
            policy.divide_logits(self.policy_model, s.entropy_coef / s.temperature)
            if s.kl_coef:
                self.reference = lora.share(self.policy_model)


def main() -> None:
    """Three iterations on word problems."""
    loading.quiet()
    settings = parse_settings("--questions 16 --group 4 --max-steps 3 --device cpu".split())
    model, tokenizer = loading.load_policy("base")
    discriminator = reward.make_discriminator(reward.load_reward("likelihood", "base"), tokenizer)
    experts = data.tokenize(tokenizer, data.load_examples("words", "train", 64))
    loop = IRL(settings, tokenizer, model, discriminator, experts)
    for _ in range(10):
        loop.warm_up()
    loop.end_warm_up()
    for iteration in range(1, settings.max_steps + 1):
        print(f"iteration {iteration}")
        for stage, metrics in loop.step().items():
            shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"  {stage:14s}{shown}")


if __name__ == "__main__":
    main()
