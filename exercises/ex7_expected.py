"""Exercise 7: no sampling needed. In the repository: logprob.py, `expectation`.

A reward that is itself a language model scores every token of the vocabulary at once. So the
expectation that REINFORCE estimates from one sampled token can be summed, and we can write down
which policy makes it greatest.
"""

import torch


def expected_reward(
    policy_logprobs: torch.Tensor, all_scores: torch.Tensor, alpha: float
) -> torch.Tensor:
    """E_{a~pi}[f(s,a) - alpha log pi(a|s)], summed over the vocabulary.
    log pi [N, V], f [N, V] -> [N]

    >>> expected_reward(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    tensor([2.])
    """
    raise NotImplementedError("expected_reward in ex7_expected.py")


def best_logprobs(all_scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """log pi* of the policy pi* for which `expected_reward` is greatest, alpha > 0.
    f [N, V] -> [N, V]

    Hint: E[f - alpha log pi] = alpha E[f/alpha - log pi] = -alpha KL(pi || ?) + a constant. With
    alpha = 1 and f = the expert's log-probabilities, pi* is the expert. What does alpha = 1/2 do to
    its probabilities?

    >>> expert = torch.tensor([[0.8, 0.2]])
    >>> best_logprobs(expert.log(), 1.0).exp()
    tensor([[0.8000, 0.2000]])
    """
    raise NotImplementedError("best_logprobs in ex7_expected.py")
