"""Solution of exercise 5."""

from torch.nn.functional import logsigmoid


def discriminator_logits(scores, policy_logprobs):
    """D / (1 - D) = exp f / pi, and the logit is its logarithm."""
    return scores - policy_logprobs


def bce_loss(logits, is_expert, smoothing):
    """log D = logsigmoid(logit) and log(1 - D) = logsigmoid(-logit): finite for any logit."""
    y = 1 - smoothing / 2 if is_expert else smoothing / 2
    return -(y * logsigmoid(logits) + (1 - y) * logsigmoid(-logits))


def trace_weights(mask):
    """Each trace has 1/B in all, shared equally by its tokens."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
