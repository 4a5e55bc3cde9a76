"""The sampling loop and the forward pass of policy.py, fast: every distinct prompt is read once, the cache has room."""

import torch
from transformers.cache_utils import DynamicLayer

from data import Batch
from engine import logprob, memory
from engine.logprob import output_layer

LOOK_EVERY = {"cpu": 1}  # tokens; to ask a GPU how many rows have ended makes the CPU wait: there, every eighth


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [B, heads, L, D], with room for the tokens to come: transformers' own layer copies all it
    holds to add a column; this one writes it into free room, hands out a view, and copies once in ROOM columns."""

    ROOM = 32

    def update(self, keys, values, *args, **kwargs):
        """Add the columns of keys and values; returns all of them, old and new."""
        start, new = self.keys.shape[-2], keys.shape[-2]
        if start + new > self.store[0].shape[-2]:
            room = lambda x: x.new_empty(*x.shape[:2], new + self.ROOM, x.shape[-1])
            self.store = [torch.cat([x, room(x)], -2) for x in (self.keys, self.values)]
        for store, x in zip(self.store, (keys, values)):
            store[:, :, start : start + new] = x
        self.keys, self.values = (store[:, :, : start + new] for store in self.store)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, room included."""
        used = self.keys.shape[-2]
        self.store = [store[indices] for store in self.store]
        self.keys, self.values = (store[:, :, :used] for store in self.store)


def make_roomy(cache) -> bool:
    """Give every growing layer of a filled cache room. Returns whether all of them grow: a sliding window does not."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__, layer.store = RoomyLayer, [layer.keys, layer.values]
    return all(type(layer) is RoomyLayer for layer in cache.layers)


@torch.inference_mode()
def sample_chunk(model, prompts, ends, max_new_tokens, group, temperature, top_p, generator, choose):
    device, count = model.device, len(prompts) * group
    ends = torch.tensor(ends, device=device)
    # Prompts are padded on the left, so that all rows write their next token in the same column. Each prompt is read
    # once; its keys and values are then repeated for the G samples of its group.
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # [P, L], L the longest
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)  # [P, L]
    positions = _positions(mask)
    decoder, (weight, softcap) = model.get_decoder(), output_layer(model)
    weight = weight.to(logprob.sum_type(weight))  # once, not at every token
    output = decoder(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(group)
    # Where every layer sees all columns, their mask is ours, and we need not have transformers derive it at each token.
    sees_all = make_roomy(cache) and model.config._attn_implementation == "sdpa"
    mask = mask.bool().repeat_interleave(group, 0)  # [B, L], B = P * G
    position = positions[:, -1].repeat_interleave(group)  # [B]
    hidden = output.last_hidden_state[:, -1].repeat_interleave(group, 0)  # [B, H]

    responses = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    rows = torch.arange(count, device=device)  # the rows at work; all tensors below hold just these, [B'] of them
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    look_every = LOOK_EVERY.get(device.type, 8)
    for t in range(max_new_tokens):
        logp = logprob.all_logprobs(hidden, weight, temperature or 1.0, softcap)  # [B', V]
        token = choose(logp, temperature, top_p, generator)  # [B']
        responses[rows, t] = token
        logprobs[rows, t] = logp.gather(-1, token[:, None]).squeeze(-1)
        lengths[rows] += ~ended
        ended = ended | torch.isin(token, ends)
        if t + 1 == max_new_tokens:
            break
        left = len(ended) - (int(ended.sum()) if (t + 1) % look_every == 0 else 0)  # as far as we know
        if left == 0:
            break
        if left <= 0.9 * len(ended):  # those that have ended leave, some at a time: it copies the cache
            going = (~ended).nonzero().squeeze(-1)
            rows, token, mask, position, ended = (x[going] for x in (rows, token, mask, position, ended))
            cache.batch_select_indices(going)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        position = position + 1
        hidden = decoder(input_ids=token[:, None], attention_mask=mask[:, None, None] if sees_all else mask,
                         position_ids=position[:, None], past_key_values=cache,
                         use_cache=True).last_hidden_state[:, -1]  # fmt: skip
    responses, logprobs, lengths = responses.tolist(), logprobs.cpu(), lengths.tolist()
    return [r[:n] for r, n in zip(responses, lengths)], [x[:n] for x, n in zip(logprobs, lengths)]


def response_hidden(model, batch: Batch) -> torch.Tensor:
    """The hidden states after the prompt and after each response token: [B, 1 + R, H], R the longest response.

    Number t chose response token t; t + 1 has read it. Rows that share a prompt (a question's G samples, its expert, its
    broken copies) have it read once: with G = 8, half of the tokens of a short problem.
    """
    decoder, longest = model.get_decoder(), int((batch.lengths - batch.prompt_lengths).max())
    columns = batch.prompt_lengths[:, None] + torch.arange(longest, device=batch.tokens.device)  # of the responses, [B, R]
    with logprob.half_precision(batch.tokens.device):
        prompts, mask, which = _distinct_prompts(batch)  # [P, L], [P, L], [B]
        if len(prompts) == len(batch) or memory.recomputes(decoder):  # nothing to share, or no cache to share it in
            # Padding is on the right, where no token looks: causal attention needs no other mask.
            hidden = decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state  # [B, T, H]
            columns = torch.cat([batch.prompt_lengths[:, None] - 1, columns], 1).clamp(max=hidden.shape[1] - 1)
            return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        prompt = decoder(input_ids=prompts, attention_mask=mask, position_ids=_positions(mask), use_cache=True)
        cache = prompt.past_key_values
        cache.batch_select_indices(which)  # the prompt's keys and values, once per row; gradients add up
        mask = torch.cat([mask[which], (columns < batch.lengths[:, None]).long()], 1)  # [B, L + R]
        responses = batch.tokens.gather(1, columns.clamp(max=batch.tokens.shape[1] - 1))  # moved to the left edge, [B, R]
        rest = decoder(input_ids=responses, attention_mask=mask, position_ids=columns, past_key_values=cache,
                       use_cache=True).last_hidden_state  # fmt: skip
        return torch.cat([prompt.last_hidden_state[which, -1:], rest], 1)


def _distinct_prompts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prompts without repeats, padded on the left, their mask, and which of them each row has."""
    longest = int(batch.prompt_lengths.max())
    columns = torch.arange(longest, device=batch.tokens.device) - (longest - batch.prompt_lengths[:, None])
    prompts = batch.tokens.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)  # -1 is no token
    prompts, which = torch.unique(prompts, dim=0, return_inverse=True)
    return prompts.clamp(min=0), (prompts >= 0).long(), which


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions 0, 1, .. of the real tokens of rows padded on the left: [B, L]."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
