"""What IRL is measured against, with the same sampler, losses and optimizer. (No part of
Algorithm 1.)

    equation                                   where       tests/test_irl.py
    -log pi of the demonstrations' tokens      SFT.step    sft_fits_its_demonstrations
    A = (R - mean R) / std R, R = 1 if right   GRPO.step   grpo_leaves_out_only_what_teaches_nothing
    + kl_coef KL(pi, pi_ref)                   GRPO.loss   grpo_pays_for_its_kl_on_every_row

Run `python baselines.py` for a few updates of each on the shipped base.
"""

import random
from dataclasses import dataclass

import torch

import data
import policy
from data import Batch, Example
from engine import loading, lora, memory, parallel
from engine.settings import parse_settings

# SFT imitates the demonstrations: it sees what IRL sees, and it never samples. What IRL has over it
# is what its own samples, beside the experts, have taught the reward.


@dataclass
class SFT:
    """Supervised fine-tuning on the demonstrations' responses."""

    settings: object
    tokenizer: object
    policy_model: torch.nn.Module
    experts: list[Example]  # tokenised

    # What a checkpoint keeps: with these a run goes on as if it had never stopped.
    changes = ("policy_model", "optimizer", "rng", "steps_done")

    def __post_init__(self):
        self.optimizer = policy.make_optimizer(self.policy_model, self.settings.sft_lr)
        self.rng = random.Random(f"sft {self.settings.seed}")
        self.steps_done = 0

    def step(self) -> dict:
        """One update on a batch of demonstrations: minimise -log pi(expert's token)."""
        s = self.settings
        # The rate rises over the first tenth of the steps, then falls: policy.set_rate.
        policy.set_rate(self.optimizer, s.sft_lr, self.steps_done, s.sft_steps)
        examples = data.draw(self.experts, s.sft_batch, self.rng)
        batch = data.demonstration_batch(examples, self.policy_model.device)

        # A mean over the response tokens (the end token among them) of the whole batch, of all
        # processes: the size of a micro-batch sets the memory and nothing else.
        n_tokens = parallel.total(float(batch.response_mask.sum()))
        self.policy_model.train()
        mean_loss = 0.0
        for rows in memory.micro_batches(batch.lengths, s.micro_batch, s.micro_tokens):
            logprobs = policy.token_logprobs(self.policy_model, batch[rows])  # [B, T]
            loss = -logprobs.sum() / n_tokens
            # Gradients of all micro-batches add up in .grad, until the optimizer's step.
            loss.backward()
            mean_loss += float(loss.detach())
        mean_loss = parallel.total(mean_loss)
        # The gradient is clipped to norm 1; a loss that is not finite skips the step.
        metrics = policy.optimizer_step(self.optimizer, mean_loss)

        self.steps_done += 1
        return {"policy": metrics}


# GRPO (Shao et al. 2024, arXiv 2402.03300) samples and asks a verifier about each answer: it sees
# what IRL may not see, and shows what a verifier buys. This is the only place where the answer
# check enters training, and the reason why these two live outside irl.py.


@dataclass
class GRPO:
    """Group-relative policy optimisation on the true answer: reward 1 if it is right, 0 if not.

    It starts from the same policy as IRL (train.Run) and sees the same questions. For each it
    has the answer, which IRL has not.
    """

    settings: object
    tokenizer: object
    policy_model: torch.nn.Module
    examples: list[Example]  # tokenised

    # As for SFT, and the state of the sampler.
    changes = ("policy_model", "optimizer", "rng", "generator", "steps_done")

    def __post_init__(self):
        seed = self.settings.seed
        self.optimizer = policy.make_optimizer(self.policy_model, self.settings.grpo_lr)
        self.rng = random.Random(f"grpo {seed}")
        self.generator = torch.Generator(self.policy_model.device).manual_seed(seed)
        self.end_tokens = data.end_tokens(self.tokenizer, self.policy_model)
        self.steps_done = 0
        # pi_ref is the policy before its first step, as IRL's is.
        if self.settings.kl_coef:
            self.reference = lora.share(self.policy_model)
            self.changes = (*self.changes, "reference")

    def step(self) -> dict:
        """Sample, verify, compare within the group, policy gradient."""
        s = self.settings
        policy.set_rate(self.optimizer, s.grpo_lr, self.steps_done, s.grpo_steps)

        # 1. Sample: G responses to each question.
        examples = data.draw(self.examples, s.questions, self.rng)
        rollout, sampled = policy.rollout(
            self.policy_model, examples, self.end_tokens, s.group, s, self.generator
        )
        batch = rollout.batch

        # 2. Verify: R = 1 or 0 for each response. Rows i*G .. (i+1)*G - 1 answer examples[i].
        outcomes = torch.zeros(len(batch))
        for row in range(len(batch)):
            text = data.decode(self.tokenizer, batch.response(row))
            outcomes[row] = float(data.is_correct(examples[row // s.group], text))

        # 3. Compare: one advantage per response, on each of its tokens. The outcome says nothing
        # about single tokens; IRL's reward does.
        mask = batch.response_mask
        advantages = policy.grpo_advantages(outcomes, s.group).to(mask.device)
        advantages = advantages[:, None] * mask  # [B, T]

        # 4. Policy gradient: `epochs` optimizer steps on this one rollout.
        # With more than one the policy has moved on since it sampled: hence PPO's clipped ratio.
        # A group that was all right, or all wrong, has no advantage and no gradient: its rows
        # are left out of the forward pass, not of the mean. Late in training that is most rows.
        # A KL has a gradient on every row.
        teaches = advantages.any(1) | bool(s.kl_coef)
        teaching = teaches.nonzero().squeeze(-1)
        n_tokens = parallel.total(float(mask.sum()))
        self.policy_model.train()
        for _ in range(s.epochs):
            mean_loss = 0.0
            lengths = batch.lengths[teaching]
            for part in memory.micro_batches(lengths, s.micro_batch, s.micro_tokens):
                rows = teaching[part]
                loss = self.loss(batch[rows], rollout.logprobs[rows], advantages[rows]) / n_tokens
                loss.backward()
                mean_loss += float(loss.detach())
            mean_loss = parallel.total(mean_loss)
            metrics = policy.optimizer_step(self.optimizer, mean_loss)

        self.steps_done += 1
        return {
            "rollout": sampled,
            "reward": {"mean": float(outcomes.mean())},
            "policy": metrics,
        }

    def loss(
        self, batch: Batch, old_logprobs: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """PPO's clipped loss, and the KL to the start, summed over some rows' response tokens."""
        s = self.settings
        # Log pi at the temperature that sampled. On the first epoch it equals old_logprobs, so the
        # ratio is 1 and nothing is clipped; its gradient is that of log pi all the same.
        logprobs = policy.token_logprobs(self.policy_model, batch, s.temperature)  # [B, T]
        width = batch.tokens.shape[1]  # cut to the longest of these rows
        old_logprobs = old_logprobs[:, :width]
        losses = policy.ppo_loss(logprobs, old_logprobs, advantages[:, :width], s.ppo_clip)
        if s.kl_coef:
            with torch.no_grad():
                reference = policy.token_logprobs(self.reference, batch, s.temperature)
            losses = losses + s.kl_coef * policy.kl_k3(logprobs, reference)
        return losses.sum()


def main() -> None:
    """A few updates of SFT, then of GRPO, from the same base."""
    loading.quiet()
    # Small counts, so that it takes seconds; `python train.py --method grpo` is the real thing.
    flags = "--demonstrations 64 --questions 16 --group 4 --max-steps 3 --sft-steps 15"
    settings = parse_settings(flags.split())
    for method, steps in ((SFT, settings.sft_steps), (GRPO, settings.max_steps)):
        # The base again: each starts where the other did.
        model, tokenizer = loading.load_policy("base")
        examples = data.tokenize(tokenizer, data.load_examples("words", "train", 64))
        trainer = method(settings, tokenizer, model, examples)
        print(method.__doc__.splitlines()[0])
        for step in range(1, steps + 1):
            metrics = trainer.step()
            # GRPO's mean reward is the share of samples that the answer check accepts.
            shown = metrics.get("reward", {}) | metrics["policy"]
            print(f"  step {step:2d}  " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
