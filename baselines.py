"""What IRL is measured against, with the same sampler, losses and optimizer.

SFT imitates the demonstrations: it sees what IRL sees and never samples. GRPO (Shao et al. 2024, arXiv 2402.03300)
samples and asks a verifier about each answer: it sees what IRL may not see, and shows what a verifier buys. It is the
only place where the answer check enters training, and the reason why these two live outside irl.py. (No part of Algorithm 1.)

    equation                                         where            test, in tests/test_irl.py
    -log pi of the demonstrations' tokens            SFT.step         sft_fits_its_demonstrations
    A = (R - mean R) / std R, R = 1 if right         GRPO.step        grpo_leaves_out_only_what_teaches_nothing

Run `python baselines.py` for a few updates of each on the shipped base.
"""

import random
from dataclasses import dataclass

import torch

import data
import policy
from engine import loading
from engine.settings import parse_settings
from irl import IRL


@dataclass
class SFT:
    """Supervised fine-tuning on the demonstrations, response tokens only, with warm-up and linear decay of the rate."""

    settings: object
    tokenizer: object
    policy_model: torch.nn.Module
    experts: list[data.Example]

    changes = ("policy_model", "optimizer", "rng", "done")  # what a checkpoint keeps

    def __post_init__(self):
        self.optimizer = policy.make_optimizer(self.policy_model, self.settings.sft_lr)
        self.rng = random.Random(f"sft {self.settings.seed}")
        self.done = 0

    def step(self) -> dict:
        """One update on a batch of demonstrations: minimise -log pi(expert's token)."""
        s = self.settings
        policy.set_rate(self.optimizer, s.sft_lr, self.done, s.sft_steps)
        batch = data.demonstration_batch(
            self.tokenizer, data.draw(self.experts, s.sft_batch, self.rng), self.policy_model.device
        )
        loss = lambda rows: policy.sft_loss(self.policy_model, batch[rows])
        metrics = policy.descend(self.policy_model, self.optimizer, batch, loss, s)
        self.done += 1
        return {"policy": metrics}


@dataclass
class GRPO:
    """Group-relative policy optimisation on the true answer: reward 1 if it is right, 0 if not."""

    settings: object
    tokenizer: object
    policy_model: torch.nn.Module
    examples: list[data.Example]  # all questions that IRL's policy sees, and their answers, which IRL does not have

    changes = ("policy_model", "optimizer", "rng", "generator", "done")  # what a checkpoint keeps

    def __post_init__(self):
        self.optimizer = policy.make_optimizer(self.policy_model, self.settings.grpo_lr)
        self.rng = random.Random(f"grpo {self.settings.seed}")
        self.generator = torch.Generator(self.policy_model.device).manual_seed(self.settings.seed)
        self.ends = data.end_tokens(self.tokenizer, self.policy_model)
        self.done = 0

    def step(self) -> dict:
        """Rollout, verify, normalise within the group, policy gradient."""
        s = self.settings
        policy.set_rate(self.optimizer, s.grpo_lr, self.done, s.grpo_steps)
        examples = data.draw(self.examples, s.questions, self.rng)
        rollout, sampled = self.rollout([e.question for e in examples], s.group)
        batch, mask = rollout.batch, rollout.batch.response_mask
        texts = [data.decode(self.tokenizer, batch.response(row)) for row in range(len(batch))]
        outcomes = torch.tensor([float(data.is_correct(examples[i // s.group], text)) for i, text in enumerate(texts)])
        advantages = policy.grpo_advantages(outcomes, s.group).to(mask.device)[:, None] * mask  # [B, T]
        # A group that was all right, or all wrong, has no advantage and no gradient: its rows are left out. Late in
        # training that is most of them.
        taught = advantages.any(1).nonzero().squeeze(-1)
        loss = lambda rows: self.loss(batch[rows], rollout.logprobs[rows], advantages[rows])
        metrics = policy.descend(self.policy_model, self.optimizer, batch, loss, s, s.epochs, taught)
        self.done += 1
        return {"rollout": sampled, "reward": {"mean": float(outcomes.mean())}, "policy": metrics}

    rollout = IRL.rollout  # the same stage 1

    def loss(self, batch: data.Batch, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """PPO's clipped loss with the group's advantage on every token of a trace, summed over them: a number."""
        s, chosen = self.settings, batch.response_mask.bool()
        old_logprobs, advantages = (x[:, : chosen.shape[1]][chosen] for x in (old_logprobs, advantages))  # [N]
        hidden = policy.hidden_states(self.policy_model, batch)  # [N, H]
        logprobs = policy.logprobs_of(self.policy_model, hidden, batch, s.temperature)  # [N]
        return policy.ppo_loss(logprobs, old_logprobs, advantages, s.ppo_clip).sum()


def main() -> None:
    loading.quiet()
    flags = "--demonstrations 64 --questions 16 --group 4 --max-steps 3 --sft-steps 15 --device cpu"
    settings = parse_settings(flags.split())
    examples = data.load_examples("words", "train", 64)
    print("SFT: -log pi of the demonstrations' tokens")
    trainer = SFT(settings, *reversed(loading.load_policy("base")), examples)
    for update in range(1, settings.sft_steps + 1):
        metrics = trainer.step()
        if update % 5 == 0:
            print(f"  update {update:2d}  loss {metrics['policy']['loss']:.3f}")
    print("GRPO: the mean reward is the share of samples that the answer check accepts")
    trainer = GRPO(settings, *reversed(loading.load_policy("base")), examples)
    for step in range(1, settings.max_steps + 1):
        metrics = trainer.step()
        print(
            f"  step {step}  " + ", ".join(f"{k} {v:.3f}" for k, v in (metrics["reward"] | metrics["policy"]).items())
        )


if __name__ == "__main__":
    main()
