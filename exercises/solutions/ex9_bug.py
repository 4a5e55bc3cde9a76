"""Exercise 9: a silent bug. In the repository: irl.py, `IRL.step`, the same four stages.

This is inverse RL in one screen: Q questions, a response is one of V tokens, f and the policy are
tables [Q, V]. It runs, the curves look fine, and it learns the wrong thing. One line is wrong. Find
it, and say why before you fix it.

    python exercises/ex9_bug.py      # a few seconds

What ought to come out: f = log expert (AIRL's discriminator), and the policy with the greatest
E[f - alpha log pi], which is pi ~ expert^(1/alpha): the expert itself for alpha = 1 (exercise 7).
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

# [Q, V], seen by the training only through its samples
EXPERT = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])


def train(alpha: float = 1.0, steps: int = 300, count: int = 512, seed: int = 0):
    """(the policy's probabilities [Q, V], f [Q, V], the mean reward of the last iteration)."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.zeros_like(EXPERT).requires_grad_()  # [Q, V], the reward model's scores
    theta = torch.zeros_like(EXPERT).requires_grad_()  # [Q, V], the policy's logits
    f_optimizer, policy_optimizer = torch.optim.Adam([f]), torch.optim.Adam([theta])

    def optimizer_step(optimizer, loss, rate):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in range(steps):
        rate = 0.1 * (1 - step / steps)
        log_pi = theta.log_softmax(-1)  # [Q, V]

        # 1. rollout: `count` tokens per question, the policy's and the expert's. Both [Q, count].
        pi = log_pi.exp().detach()
        sampled = torch.multinomial(pi, count, replacement=True, generator=generator)
        expert = torch.multinomial(EXPERT, count, replacement=True, generator=generator)

        # 2. discriminator: logit D = f - log pi, cross-entropy; the expert's tokens are 1, the
        # policy's 0
        logits = f - log_pi.detach()  # [Q, V]
        on_expert = logits.gather(1, expert)  # [Q, count]
        on_sampled = logits.gather(1, sampled)  # [Q, count]
        loss = bce(on_expert, torch.ones_like(on_expert))
        loss = loss + bce(on_sampled, torch.zeros_like(on_sampled))
        optimizer_step(f_optimizer, loss, rate)

        # 3. reward: r = f - alpha log pi of the sampled tokens
        chosen = log_pi.gather(1, sampled)  # [Q, count]
        rewards = f.detach().gather(1, sampled) - alpha * chosen.detach()  # [Q, count]

        # 4. policy: REINFORCE with the question's mean reward as the baseline
        advantages = rewards - rewards.mean(1, keepdim=True)  # [Q, count]
        optimizer_step(policy_optimizer, -(advantages * chosen).mean(), rate)
    return theta.detach().softmax(-1), f.detach(), float(rewards.detach().mean())


if __name__ == "__main__":
    probabilities, f, reward = train()
    print("expert    ", [[round(x, 2) for x in row] for row in EXPERT.tolist()])
    print("exp f     ", [[round(x, 2) for x in row] for row in f.exp().tolist()])
    print("policy    ", [[round(x, 2) for x in row] for row in probabilities.tolist()])
    print(f"reward     {reward:.2f}")
