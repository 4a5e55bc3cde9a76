"""Two models that write together: their logits are added, and nothing is trained.

    pi(a | s) = softmax(z + c z'), which is proportional to p(a | s) p'(a | s)^c

where z and z' are the logits of the models p and p'. If a trace were one token, this would be the
best policy for the reward c log p' at a price of 1 on its KL to p. So it is what a policy that is
trained on the base's log-probability (experiments/real.py: irl_kl_base) has to beat.
"""

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine import loading
from engine.errors import UserError


class SumOfStates(nn.Module):
    """The decoders of two models that share one output matrix W: W h + c W h' = W (h + c h')."""

    def __init__(self, first: nn.Module, second: nn.Module, weight: float):
        super().__init__()
        self.first = first
        self.second = second
        self.weight = weight  # c

    def forward(self, past_key_values: DynamicCache | None = None, **inputs):
        caches = [None, None]
        if past_key_values is not None:
            # One cache holds the layers of both, one model's behind the other's.
            half = len(past_key_values.layers) // 2
            layers = past_key_values.layers
            caches = [with_layers(layers[:half]), with_layers(layers[half:])]
        one = self.first(past_key_values=caches[0], **inputs)
        other = self.second(past_key_values=caches[1], **inputs)
        cache = None
        if one.past_key_values is not None:
            cache = with_layers(one.past_key_values.layers + other.past_key_values.layers)
        states = one.last_hidden_state + self.weight * other.last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=cache)


def with_layers(layers: list) -> DynamicCache:
    """A cache of these layers, which are not copied."""
    cache = DynamicCache()
    cache.layers = layers
    return cache


class Together(nn.Module):
    """A policy for policy.sample: logits z + c z' of two models, c = `weight`.

    UserError if the output matrices differ, or a model caps its logits: then the logits of the sum
    of the states are not the sum of the logits.
    """

    def __init__(self, first: nn.Module, second: nn.Module, weight: float):
        super().__init__()
        matrices = [loading.output_layer(model) for model in (first, second)]
        (matrix, softcap), (other_matrix, other_softcap) = matrices
        alike = matrix.shape == other_matrix.shape and torch.equal(matrix, other_matrix)
        if softcap or other_softcap or not alike:
            raise UserError(
                "the two models' logits are not W h with the same W, which is all that Together "
                "can add: take two fine-tunings by adapters of one base"
            )
        self.first = first
        self.decoder = SumOfStates(first.get_decoder(), second.get_decoder(), weight)

    @property
    def config(self):
        return self.first.config

    @property
    def device(self) -> torch.device:
        return self.first.device

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.first.get_output_embeddings()
