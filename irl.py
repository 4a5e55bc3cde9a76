"""Inverse reinforcement learning for reasoning: the loop (arXiv 2510.01857, Algorithm 1).

    0. warm-up         ours, not the paper's: the discriminator learns alone, then `end_warm_up` averages the reward's weights
                       with their start and, where f is a likelihood, has the policy start at the best policy for this f
    repeat             (the paper's Algorithm 1)
        1. rollout         the policy answers some questions, `group` times each
        2. discriminator   learns to tell the experts' traces from these (and older, and broken) ones; or stands still since
                           the warm-up (--reward-lr 0, as on countdown)
        3. reward          its score of every token, r_t = f - alpha log pi
        4. policy          one step. By default on E_{a~pi}[r_t], summed over all actions a: then r_t of the sampled tokens is
                           logged and not used. Else a policy gradient on r_t and what follows

Nobody checks an answer here: every step runs inside `data.no_verifier()`, where the answer check raises. (The baselines, SFT
and GRPO, are in baselines.py. GRPO may look.)

    equation                                               where                          test, in tests/test_irl.py
    Algorithm 1                                            IRL.step                       a_policy_improves_from_demonstrations_..
    pi ~ exp(f / alpha) is best for r at gamma = 0         IRL.end_warm_up                the_policy_starts_at_the_averaged_reward
    max E_{a~pi}[f - alpha log pi], gamma = 0 (ours)       IRL.exact_loss                 exact_loss_equals_the_plain_loop
    A_t = G_t - b_t, or F_t - its mean (method of v1, v2)  IRL.advantages                 sums_over_actions_and_..
    no verifier in training                                data.no_verifier               training_raises_if_..

Run `python irl.py` for three iterations on the shipped base, stage by stage.
"""

import random
from dataclasses import dataclass, field

import torch

import data
import policy
import reward
from data import Example
from engine import loading, logprob, lora, parallel
from engine.settings import parse_settings, sums_all
from policy import Rollout


@dataclass
class IRL:
    """All that changes during training, and what it needs. `settings` is Settings, read only."""

    settings: object
    tokenizer: object
    policy_model: torch.nn.Module
    discriminator: reward.Discriminator
    experts: list[Example]  # the demonstrations: question, trace, answer
    extra: list[str] = field(default_factory=list)  # questions without a demonstration: only the policy sees them

    changes = ("policy_model", "discriminator.reward_model", "policy_optimizer", "reward_optimizer", "replay", "rng",
               "generator", "done")  # what a checkpoint keeps  # fmt: skip

    def __post_init__(self):
        s = self.settings
        self.policy_optimizer = policy.make_optimizer(self.policy_model, s.policy_lr)
        self.reward_optimizer = policy.make_optimizer(self.discriminator.reward_model, s.reward_lr)
        self.rng = random.Random(f"irl {s.seed}")
        self.generator = torch.Generator(self.policy_model.device).manual_seed(s.seed)
        self.replay = reward.Replay(s.replay)
        self.ends = data.end_tokens(self.tokenizer, self.policy_model)
        self.done = 0
        self.reward_start = lora.start_of(self.discriminator.reward_model) if s.reward_average else []
        if s.kl_coef:
            self.keep_reference()
            self.changes = (*self.changes, "reference")

    def step(self) -> dict:
        """One iteration of Algorithm 1. Returns every stage's metrics."""
        s, metrics = self.settings, {}
        policy.set_rate(self.policy_optimizer, s.policy_lr, self.done, s.max_steps)
        policy.set_constant_rate(self.reward_optimizer, s.reward_lr)
        with data.no_verifier():
            examples, questions = self.draw()
            rollout, metrics["rollout"] = self.rollout(questions, s.group)  # G traces per question
            if s.reward_lr:
                metrics["discriminator"] = self.update_discriminator(examples, rollout, s.group)  # D: expert or policy?
            rewards, reward_hidden, metrics["reward"] = self.rewards(rollout)  # [B, T], [B, T, H]
            metrics["policy"] = self.update_policy(rollout, rewards, reward_hidden)
        self.done += 1
        return metrics

    def draw(self) -> tuple[list[Example], list[str]]:
        """Demonstrations for the discriminator, and the questions of a step: theirs first. Half of them are extra ones, if
        there are any; where the discriminator stands still, all questions are alike."""
        s = self.settings
        if not s.reward_lr:
            return [], data.draw([e.question for e in self.experts] + self.extra, s.questions, self.rng)
        examples = data.draw(self.experts, s.questions - (s.questions // 2 if self.extra else 0), self.rng)
        return examples, [e.question for e in examples] + data.draw(self.extra, s.questions // 2, self.rng)

    def warm_up(self) -> dict:
        """Step 0, one of many: an update of the discriminator alone, on fresh samples of a policy that stands still. A policy
        that starts on a reward at chance learns noise."""
        s, rollout = self.settings, None
        with data.no_verifier():
            policy.set_constant_rate(self.reward_optimizer, s.warm_up_lr)
            examples = data.draw(self.experts, s.questions, self.rng)
            if s.discriminator_coef and s.rollouts_per_expert:
                rollout, _ = self.rollout([e.question for e in examples], s.rollouts_per_expert)
            return self.update_discriminator(examples, rollout, s.rollouts_per_expert)

    @torch.no_grad()
    def end_warm_up(self) -> None:
        """Step 0, its end. On words this alone makes nearly all of the result; the paper has no such step.

        The reward's weights are averaged with their start (lora.average says why). With start = reward the policy then begins
        at the optimum for this f: E[f - alpha log pi] is greatest at pi ~ exp(f / alpha), which is the reward's own network
        with its logits divided by alpha, as long as gamma = 0 and f is a likelihood. (pi is the policy as it samples in
        training, at --temperature.) With adapters, these alone are copied.
        """
        s, reward_model = self.settings, self.discriminator.reward_model
        lora.average(reward_model, self.reward_start, s.reward_average)
        self.reward_start = []
        if s.start == "reward":
            for parameter, learnt in zip(lora.trained(self.policy_model), lora.trained(reward_model), strict=True):
                parameter.copy_(learnt)
            policy.divide_logits(self.policy_model, s.entropy_coef / s.temperature)
            if s.kl_coef:
                self.keep_reference()

    def keep_reference(self) -> None:
        """pi_ref is the policy as it is now. No optimizer has its parameters; what is frozen in the policy is shared."""
        self.reference = lora.share(self.policy_model)

    def rollout(self, questions: list[str], group: int) -> tuple[Rollout, dict]:
        """Stage 1. `group` responses to each question, sampled from the policy as it is now."""
        s = self.settings
        prompts = [data.prompt_ids(self.tokenizer, question) for question in questions]
        rollout = policy.sample(self.policy_model, prompts, self.ends, s.max_new_tokens, group,
                                s.temperature, s.top_p, self.generator, s.sample_rows)  # fmt: skip
        mask = rollout.batch.response_mask
        entropy = -rollout.logprobs.sum() / mask.sum()  # of the sampled tokens: -E log pi
        found = {"length": mask.sum(1).mean(), "finished": rollout.finished.float().mean(), "entropy": entropy}
        return rollout, {name: float(value) for name, value in found.items()}

    def update_discriminator(self, examples: list[Example], rollout: Rollout | None, group: int) -> dict:
        """Stage 2. Rows i*group .. of the rollout answer examples[i]. A few of them, some that the policy wrote before
        to the same question, and broken copies of the expert's trace are the negatives. With discriminator_coef 0 they
        would weigh nothing, and are left out: what trains is the demonstrations' likelihood."""
        s = self.settings
        samples: list[list[list[int]]] = [[] for _ in examples]  # the negatives of each question that the policy wrote now ..
        old: list[list[list[int]]] = [[] for _ in examples]  # .. and before
        compared = bool(s.discriminator_coef)
        for i, example in enumerate(examples if compared else ()):
            fresh = [rollout.batch.response(i * group + g) for g in range(s.rollouts_per_expert)]
            old[i] = self.replay.draw(example.question, s.rollouts_per_expert // 2 if s.replay else 0, self.rng)
            self.replay.add(example.question, fresh)
            samples[i] = fresh[: len(fresh) - len(old[i])]
        for _ in range(s.discriminator_updates):
            comparison = reward.compare(self.tokenizer, examples, samples, s.perturbed * compared, self.rng,
                                        self.policy_model.device, old)  # fmt: skip
            metrics = reward.update(self.discriminator, self.reward_optimizer, self.policy_model, comparison,
                                    s.label_smoothing, s.reward_nll, s.micro_batch, s.temperature, s.micro_tokens,
                                    s.discriminator_coef)  # fmt: skip
        return metrics

    def rewards(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Stage 3. r_t for every response token, [B, T], and the reward model's hidden states, [B, T, H], from which
        stage 4 reads f of all other actions too. The same token ids that were sampled are scored."""
        s, batch, reward_model = self.settings, rollout.batch, self.discriminator.reward_model
        hidden = policy.in_chunks(reward_model.hidden, batch, s.micro_batch, tokens=s.micro_tokens)
        scores = policy.in_chunks(reward_model.scores, batch, s.micro_batch, hidden, tokens=s.micro_tokens)  # f, [B, T]
        rewards = self.discriminator.token_rewards(batch, scores, rollout.logprobs, s.entropy_coef)
        read = self.discriminator.ends(batch).bool()  # elsewhere r_t is 0, which is no opinion
        if s.gamma:  # later rewards count: a trace that goes on for ever would collect them
            mask, finished = batch.response_mask, rollout.finished
            lowest = parallel.lowest(reward.lowest_finished(rewards, mask, finished, s.gamma))  # over all processes
            rewards = reward.worst_if_cut_off(rewards, mask, finished, s.gamma, lowest, s.reward_clip or 1.0)
        of_each = rewards.masked_fill(~read, torch.inf).amin(1)  # [B], each trace's lowest
        return rewards, hidden, {"mean": float(rewards.sum() / read.sum()), "lowest": float(of_each.mean())}

    def update_policy(self, rollout: Rollout, rewards: torch.Tensor, reward_hidden: torch.Tensor) -> dict:
        """Stage 4. One step of the policy (`epochs` of them on one rollout)."""
        s, batch = self.settings, rollout.batch
        if sums_all(s):  # the default: nothing hangs on the sampled tokens
            loss = lambda rows: self.exact_loss(batch[rows], reward_hidden[rows])
        else:
            advantages = self.advantages(batch, rewards)  # [B, T]
            loss = lambda rows: self.policy_loss(
                batch[rows], rollout.logprobs[rows], advantages[rows], reward_hidden[rows])  # fmt: skip
        return policy.descend(self.policy_model, self.policy_optimizer, batch, loss, s, s.epochs)

    def advantages(self, batch: data.Batch, rewards: torch.Tensor) -> torch.Tensor:
        """A_t: what the sampled token and what follows brought, beyond what was to be expected. [B, T]

        Where r_t itself is summed over all actions, only F_t = gamma G_{t+1}, what follows, is sampled. It is 0 after an end
        token, and that counts in the group's mean: ending is compared with going on.
        """
        s, mask = self.settings, batch.response_mask
        returns = policy.returns_to_go(rewards, mask, s.gamma)
        if s.policy_loss == "exact":
            following = s.gamma * torch.nn.functional.pad(returns[:, 1:], (0, 1)) * mask  # F_t
            return following - policy.group_baseline(following, mask, s.group)
        group = s.group if s.advantage_scale == "group" else 0
        return policy.normalise(returns - policy.group_baseline(returns, mask, s.group), mask, group)

    def expected_reward(self, batch: data.Batch, reward_hidden, hidden=None, method=logprob.expected_reward):
        """E_{a~pi}[f(s_t,a) - alpha log pi(a|s_t)] at each response token, [N], or whatever `method` makes of it: their
        sum. The gradient, if any, is through pi. reward_hidden [B, T, H] are those of stage 3; the policy's own, hidden
        [N, H], are computed if they are not at hand."""
        s, reward_model = self.settings, self.discriminator.reward_model.model
        hidden = policy.hidden_states(self.policy_model, batch) if hidden is None else hidden
        (weight, softcap), (reward_weight, _) = map(logprob.output_layer, (self.policy_model, reward_model))
        reward_hidden = reward_hidden[:, : batch.tokens.shape[1]][batch.response_mask.bool()]  # [N, H]
        return method(hidden, weight, reward_hidden, reward_weight, s.entropy_coef, s.temperature, softcap)

    def exact_loss(self, batch: data.Batch, reward_hidden, hidden=None) -> torch.Tensor:
        """-sum_t E_{a~pi}[f(s_t,a) - alpha log pi(a|s_t)] over the response tokens of some rows: a number."""
        return -self.expected_reward(batch, reward_hidden, hidden, logprob.expected_reward_sum)

    def policy_loss(self, batch: data.Batch, old_logprobs, advantages, reward_hidden) -> torch.Tensor:
        """The loss of some rows, summed over their response tokens: a number. policy.py has the equations."""
        s, chosen = self.settings, batch.response_mask.bool()
        old_logprobs, advantages = (x[:, : chosen.shape[1]][chosen] for x in (old_logprobs, advantages))  # [N]
        hidden = policy.hidden_states(self.policy_model, batch)  # [N, H]
        # r_t over all actions, if it can be; what follows, and other rewards, from the sampled one
        loss = self.exact_loss(batch, reward_hidden, hidden) if s.policy_loss == "exact" else 0.0
        if s.kl_coef:
            with torch.no_grad():
                reference = policy.token_logprobs(self.reference, batch, s.temperature)[chosen]  # [N]

        def sampled(logprobs, n):
            """Of some tokens, a slice n of 0..N: a loss for each."""
            if s.policy_loss == "ppo":
                loss = policy.ppo_loss(logprobs, old_logprobs[n], advantages[n], s.ppo_clip)
            else:
                loss = policy.reinforce_loss(logprobs, advantages[n])
            return loss + s.kl_coef * policy.kl_k3(logprobs, reference[n]) if s.kl_coef else loss

        return loss + policy.loss_of_logprobs(self.policy_model, hidden, batch, sampled, s.temperature)


def first_logprob(model, tokenizer, experts: list[Example]) -> float:
    """Mean log pi of the demonstrations' first token. The exact loss's gradient on an action is proportional to pi(a), and
    sampling must meet it: a policy that never begins so learns it from SFT alone."""
    prompts = [data.prompt_ids(tokenizer, e.question) for e in experts]
    first = [data.response_ids(tokenizer, data.response_text(e.trace, e.answer))[:1] for e in experts]
    batch = data.make_batch(prompts, first, model.device)
    return float(policy.in_chunks(lambda b: policy.token_logprobs(model, b), batch, 4).sum()) / len(experts)


def main() -> None:
    loading.quiet()
    settings = parse_settings("--demonstrations 64 --questions 16 --group 4 --max-steps 3 --device cpu".split())
    model, tokenizer = loading.load_policy("base")
    discriminator = reward.make_discriminator(reward.load_reward("likelihood", "base"), tokenizer)
    loop = IRL(settings, tokenizer, model, discriminator, data.load_examples("words", "train", 64))
    print(f"{len(loop.experts)} demonstrations, for instance\n{loop.experts[0].question}\n{loop.experts[0].trace}\n")
    for _ in range(10):
        metrics = loop.warm_up()
    loop.end_warm_up()
    print("after 10 warm-up updates, discriminator: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    for iteration in range(1, 4):
        print(f"\niteration {iteration}")
        for stage, metrics in loop.step().items():
            print(f"  {stage:14s}" + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
