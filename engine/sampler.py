"""The sampling loop and the forward pass of policy.py, fast: every distinct prompt is read once,
the cache has room, and rows that have ended leave. What a token is drawn from stands in policy.py.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from engine import memory

# To ask how many rows have ended makes the CPU wait for a GPU: there, every eighth token.
LOOK_EVERY = {"cpu": 1}


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [B, heads, L, D], with room for the tokens to come.

    transformers' own layer copies all it holds to add a column. This one writes the column into
    free room, hands out a view of what is filled, and copies once in ROOM columns.
    """

    ROOM = 32

    def update(self, keys, values, *args, **kwargs):
        """Add the columns of keys and values; returns all of them, old and new."""
        start = self.keys.shape[-2]
        stop = start + keys.shape[-2]
        if stop > self.store[0].shape[-2]:
            room = (0, 0, 0, stop + self.ROOM - start)  # columns behind those that are filled
            self.store = [pad(self.keys, room), pad(self.values, room)]
        self.store[0][:, :, start:stop] = keys
        self.store[1][:, :, start:stop] = values
        self.keys = self.store[0][:, :, :stop]
        self.values = self.store[1][:, :, :stop]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows. What is left is copied anyway, and gets room with its next token."""
        super().batch_select_indices(indices)
        self.store = [self.keys, self.values]


def make_roomy(cache) -> bool:
    """Give every growing layer of a filled cache room. Returns whether all of them grow: a sliding
    window does not."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer
            layer.store = [layer.keys, layer.values]
    return all(type(layer) is RoomyLayer for layer in cache.layers)


@torch.inference_mode()
def sample_chunk(
    model,
    prompts: list[list[int]],
    ends: tuple[int, ...],
    max_new_tokens: int,
    group: int,
    draw: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """`group` responses to each of P prompts, B = P * group of them, and log pi of their tokens.

    draw(hidden [B', H]) -> (tokens [B'], log pi [B']) chooses the next token of the rows at work.
    """
    device = model.device
    decoder = model.get_decoder()
    ends = torch.tensor(ends, device=device)
    count = len(prompts) * group  # B
    responses = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)

    hidden, cache, mask, position = _read_prompts(model, prompts, group)
    # Where every layer sees all columns, their mask is ours, and transformers need not derive it at
    # each token.
    sees_all = make_roomy(cache) and model.config._attn_implementation == "sdpa"
    # The rows at work, B' of them: hidden, cache, mask, position and `ended` hold just these.
    rows = torch.arange(count, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token, log_pi = draw(hidden)  # [B'], [B']
        responses[rows, t] = token
        logprobs[rows, t] = log_pi
        lengths[rows] += ~ended  # a row that has ended and not left yet grows no more
        ended = ended | torch.isin(token, ends)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % LOOK_EVERY.get(device.type, 8) == 0:
            going = (~ended).nonzero().squeeze(-1)
            if len(going) == 0:
                break
            # They leave some at a time, for that copies the cache.
            if len(going) <= 0.9 * len(ended):
                at_work = (rows, token, mask, position, ended)
                rows, token, mask, position, ended = (tensor[going] for tensor in at_work)
                cache.batch_select_indices(going)

        # Read the new token.
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        position = position + 1
        output = decoder(
            input_ids=token[:, None],
            attention_mask=mask[:, None, None] if sees_all else mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]  # [B', H]
    lengths = lengths.tolist()
    written = [row[:length] for row, length in zip(responses.tolist(), lengths)]
    return written, [row[:length] for row, length in zip(logprobs.cpu(), lengths)]


def _read_prompts(model, prompts: list[list[int]], group: int):
    """Reads each of P prompts once; of B = P * group rows: the hidden state [B, H] that chooses the
    first token, the cache, the mask of real tokens [B, L] and the last position [B]."""
    # Padded on the left, so that all rows write their next token in the same column.
    longest = max(map(len, prompts))  # L
    tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    tokens = torch.tensor(tokens, device=model.device)  # [P, L]
    mask = torch.tensor(mask, device=model.device)  # [P, L]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0, 1, .. of the real tokens
    output = model.get_decoder()(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True
    )
    # The samples of a group share their prompt's keys and values.
    cache = output.past_key_values
    cache.batch_repeat_interleave(group)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(group, 0)
    mask = mask.bool().repeat_interleave(group, 0)
    return hidden, cache, mask, positions[:, -1].repeat_interleave(group)


def response_hidden(model, batch) -> torch.Tensor:
    """The hidden states after the prompt and after each response token of a data.Batch:
    [B, 1 + R, H], R the longest response. Number t chose response token t; t + 1 has read it."""
    decoder = model.get_decoder()
    longest = int((batch.lengths - batch.prompt_lengths).max())
    columns = torch.arange(longest, device=batch.tokens.device)
    columns = batch.prompt_lengths[:, None] + columns  # of the response tokens: [B, R]
    with memory.half_precision(batch.tokens.device):
        # Rows that share a prompt (a question's G samples, its expert, its broken copies) have it
        # read once: with G = 8, half of the tokens of a short problem.
        prompts, mask, which = _distinct_prompts(batch)  # [P, L], [P, L], [B]
        # Nothing to share, or no cache to share it in:
        if len(prompts) == len(batch) or memory.recomputes(decoder):
            # Padding is on the right, where no token looks: causal attention needs no other mask.
            hidden = decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state  # [B, T, H]
            columns = torch.cat([batch.prompt_lengths[:, None] - 1, columns], 1)  # [B, 1 + R]
            columns = columns.clamp(max=hidden.shape[1] - 1)
            return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0, 1, .. of the real tokens
        prompt = decoder(
            input_ids=prompts, attention_mask=mask, position_ids=positions, use_cache=True
        )
        cache = prompt.past_key_values
        cache.batch_select_indices(which)  # the prompt's, once per row; gradients add up
        in_response = (columns < batch.lengths[:, None]).long()  # [B, R]
        responses = batch.tokens.gather(1, columns.clamp(max=batch.tokens.shape[1] - 1))  # [B, R]
        rest = decoder(
            input_ids=responses,  # moved to the left edge
            attention_mask=torch.cat([mask[which], in_response], 1),  # [B, L + R]
            position_ids=columns,
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([prompt.last_hidden_state[which, -1:], rest.last_hidden_state], 1)


def _distinct_prompts(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prompts without repeats, padded on the left, [P, L]; their mask; and which of them each
    row has, [B]."""
    longest = int(batch.prompt_lengths.max())
    padding = longest - batch.prompt_lengths[:, None]  # [B, 1]
    columns = torch.arange(longest, device=batch.tokens.device) - padding  # [B, L]
    prompts = batch.tokens.gather(1, columns.clamp(min=0))
    prompts = prompts.masked_fill(columns < 0, -1)  # -1 is no token
    prompts, which = torch.unique(prompts, dim=0, return_inverse=True)
    return prompts.clamp(min=0), (prompts >= 0).long(), which
