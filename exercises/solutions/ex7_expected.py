"""Solution of exercise 7.

With p = softmax(f/alpha): E[f - alpha log pi] = -alpha KL(pi || p) + alpha logsumexp(f/alpha). The
KL is least, 0, at pi = p. For f = log expert, p is expert^(1/alpha), normalised: alpha = 1/2
squares the probabilities, so what was likely becomes likelier.
"""


def expected_reward(policy_logprobs, all_scores, alpha):
    """The weights are the policy's probabilities."""
    return (policy_logprobs.exp() * (all_scores - alpha * policy_logprobs)).sum(-1)


def best_logprobs(all_scores, alpha):
    """pi* ~ exp(f / alpha)."""
    return (all_scores / alpha).log_softmax(-1)
