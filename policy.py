"""The policy: a causal language model that we load, sample from, score with, and improve.

    1. load_policy                      a hub name, a short name (Qwen2.5-0.5B) or a folder -> model, tokenizer
    2. sample                           batched sampling with a key/value cache, written out
    3. choosing_states, token_logprobs  hidden states, and log pi(a_t | s_t) of given tokens (logprob.py does the sums)
    4. returns, baselines, advantages   pure functions of rewards [B, T]
    5. losses                           SFT, REINFORCE, PPO; KL to a reference
    6. update                           one optimizer step in micro-batches, whose size changes no gradient

Index t is the same everywhere: column t speaks of tokens[:, t], chosen after reading tokens[:, :t] (data.Batch).

Run `python policy.py` to sample the shipped base and see that its log-probabilities are those of a fresh forward pass.
"""

import json
import math
import os.path
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

import logprob
import memory
import parallel
from data import Batch, UserError, make_batch, nearest

# ---------------------------------------------------------------------------------------------------------------
# 1. Loading
# ---------------------------------------------------------------------------------------------------------------

BASE = str(Path(__file__).parent / "base")  # the small base that ships with this repository (pretrain.py made it)
SHIPPED = {"base": BASE, "countdown-base": str(Path(__file__).parent / "tasks" / "countdown-base")}  # for words, countdown

_QWEN25 = [f"Qwen2.5-{size}{kind}" for size in ("0.5B", "1.5B", "3B", "7B", "14B") for kind in ("", "-Instruct")]
_QWEN3 = [f"Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")]
_LLAMA = [f"Llama-{size}{kind}" for size in ("3.2-1B", "3.2-3B", "3.1-8B") for kind in ("", "-Instruct")]
SHORT_NAMES = {name: f"Qwen/{name}" for name in _QWEN25 + _QWEN3} | {name: f"meta-llama/{name}" for name in _LLAMA}


def resolve_model(name: str) -> str:
    """'base' and 'countdown-base' ship here, a folder stays, a short name gets its owner, an owner/name goes to the hub as it is.

    >>> resolve_model("Qwen2.5-0.5B")
    'Qwen/Qwen2.5-0.5B'
    """
    if name in SHIPPED:
        return SHIPPED[name]
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name that no folder can have
        if not (Path(name) / "config.json").exists():
            raise UserError(f"folder {name} holds no model: config.json is missing")
        return name
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise UserError(
        f"no model '{name}'{nearest(name, SHORT_NAMES)}: give a folder, a hub name owner/model, or one of "
        + ", ".join(SHORT_NAMES)
    )


def load_policy(name: str, device="cpu", dtype=torch.float32):
    """(model, tokenizer). Weights come from safetensors files only, and no code of the model's author is run.

    The tokenizer is what tokenizer.json says. AutoTokenizer would rebuild it by the model's architecture, and give any
    Qwen2 model the pre-tokenizer of Qwen2, ours included.
    """
    path, tokenizer = resolve_model(name), load_tokenizer(name)
    with loading(name):
        check_weights(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    check_tokenizer(tokenizer, model, name)
    check_output_layer(model.to(device), name)
    return model, tokenizer


def check_weights(folder: str) -> None:
    """Refuse a model folder whose weights are not safetensors: a pickle (.bin, .pt) can run code when it is opened.

    An index is read too, since transformers opens whatever file it names. A hub name is not looked at here.
    """
    if not os.path.isdir(folder):
        return
    index = Path(folder, "model.safetensors.index.json")
    if not index.is_file():
        if not Path(folder, "model.safetensors").is_file():
            raise UserError(f"folder {folder} holds no model.safetensors: other weights (.bin, .pt) are not opened, they "
                            "can run code. Save them anew with transformers: save_pretrained")  # fmt: skip
        return
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    odd = next(
        (file for file in files if not str(file).endswith(".safetensors") or os.path.basename(file) != file), None
    )
    if odd is not None:
        raise UserError(f"{index} names {odd!r}: weights must be .safetensors files beside it")


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, by the same names."""
    with loading(name):
        return PreTrainedTokenizerFast.from_pretrained(resolve_model(name))


@contextmanager
def loading(name: str):
    """Whatever goes wrong while loading `name` becomes one line that says how to mend it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError; tokenizers raises bare ones
        first_line = str(error).strip().split("\n")[0]
        hint = "" if os.path.isdir(resolve_model(name)) else ". Without a network, give a folder: --model DIR"
        raise UserError(f"cannot load model '{name}': {first_line}{hint}") from None


def check_same_tokenizer(tokenizer, other: str) -> None:
    """The reward scores the very token ids that the policy sampled: text that is tokenised anew shifts by a token."""
    vocabulary = load_tokenizer(other).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of '{other}' differs from that of the model it is to work with ({len(vocabulary)} and "
            f"{len(tokenizer.get_vocab())} tokens): policy and reward must be of one family. What another model wrote can be "
            "judged as text: rerank.py --candidates FILE"
        )


def check_tokenizer(tokenizer, model, name: str) -> None:
    """Refuse what would go wrong silently later: no end token, or tokens that the model has no embedding for."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{name}' has no end token (eos_token): a policy could never stop")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer of '{name}' has {len(tokenizer)} tokens, its model only "
            f"{model.get_input_embeddings().num_embeddings} embeddings"
        )


@torch.no_grad()
def check_output_layer(model, name: str) -> None:
    """Refuse a model whose logits are not softcap(W h), which is all that logprob.py knows: a bias or a scale after W
    would make every log-probability wrong, silently."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    weight, softcap = output_layer(model)
    logits = model.get_decoder()(tokens).last_hidden_state.float() @ weight.float().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = model(tokens).logits.float()
    if logits.shape != expected.shape or (logits - expected).norm() > 0.05 * expected.norm():
        raise UserError(f"the output layer of '{name}' is not of the kind known here, a matrix without bias or scale")


def context_length(model) -> int:
    """The longest sequence the model was made for."""
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is CUDA where there is one, else Apple's MPS, else the CPU."""
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{name}' cannot be used here ({str(error).splitlines()[0]}): --device auto takes what there is"
        ) from None
    return torch.device(name)


def half_precision(device: torch.device):
    """bf16 matrix products on CUDA, float32 elsewhere. The weights and what the optimizer adds up stay float32: steps
    of 1e-6 vanish in bf16. Entered anew for each forward pass, because it caches the weights it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---------------------------------------------------------------------------------------------------------------
# 2. Sampling
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """What the policy wrote: `batch` with G consecutive rows per question, log pi of each response token, and
    whether each row ended by itself (one of the end tokens) rather than by the length limit."""

    batch: Batch
    logprobs: torch.Tensor  # [B, T], 0 outside the response
    finished: torch.Tensor  # [B] bool


def choose(logprobs: torch.Tensor, temperature: float, top_p: float, generator=None) -> torch.Tensor:
    """One token per row: [B, V] log-probabilities -> [B]. temperature 0 is greedy.

    top_p < 1 keeps the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2019).

    >>> choose(torch.tensor([[0.1, 0.6, 0.3]]).log(), 0.0, 1.0), choose(torch.tensor([[0.1, 0.6, 0.3]]).log(), 1.0, 0.5)
    (tensor([1]), tensor([1]))
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    probabilities = logprobs.exp()  # [B, V]
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of all more likely tokens
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    total = probabilities.cumsum(-1)  # u is uniform below the total: the first token whose running total is above u
    u = torch.rand(len(total), 1, generator=generator, device=total.device) * total[:, -1:]
    return torch.searchsorted(total, u, right=True).squeeze(-1).clamp(max=total.shape[1] - 1)


@torch.no_grad()
def sample(
    model, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, group: int = 1, temperature: float = 1.0,
    top_p: float = 1.0, generator: torch.Generator | None = None, rows: int = 512,
) -> Rollout:  # fmt: skip
    """Sample `group` responses for each prompt, at most `rows` at a time. Row i*group + g is sample g of prompt i.
    A row ends with the first of the tokens `ends` (data.end_tokens) that it draws.

    Log-probabilities are those of the policy that temperature makes, log softmax(logits / temperature) (temperature 0:
    of the unchanged logits). top-p only narrows the choice; it is not part of the policy's density.
    """
    model.eval()
    per_chunk = max(1, rows // group)
    responses, logprobs = [], []
    for start in range(0, len(prompts), per_chunk):
        chunk = prompts[start : start + per_chunk]
        with half_precision(model.device):
            chunk_responses, chunk_logprobs = _sample_chunk(
                model, chunk, ends, max_new_tokens, group, temperature, top_p, generator
            )
        responses += chunk_responses
        logprobs += chunk_logprobs
    repeated = [prompt for prompt in prompts for _ in range(group)]
    batch = make_batch(repeated, responses, model.device)
    values = torch.zeros(batch.tokens.shape)
    for row, (prompt, chosen) in enumerate(zip(repeated, logprobs)):
        values[row, len(prompt) : len(prompt) + len(chosen)] = chosen
    finished = torch.tensor([response[-1] in ends for response in responses])
    return Rollout(batch, values.to(model.device), finished.to(model.device))


LOOK_EVERY = {"cpu": 1}  # tokens; to ask a GPU how many rows have ended makes the CPU wait: there, every eighth


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [B, heads, L, D], with room for the tokens to come.

    transformers' own layer copies everything it holds to add a column. This one writes the column into free room and
    hands out a view; it copies only when the room is used up, every ROOM columns.
    """

    ROOM = 32

    def update(self, keys, values, *args, **kwargs):
        """Add the columns of keys and values; returns all of them, old and new."""
        start, new = self.keys.shape[-2], keys.shape[-2]
        if start + new > self.store[0].shape[-2]:
            self.store = [
                torch.cat([x, x.new_empty(*x.shape[:2], new + self.ROOM, x.shape[-1])], -2)
                for x in (self.keys, self.values)
            ]
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
    """Give every growing layer of a filled cache room. Returns whether all of them grow: a sliding window does not, it
    keeps the layer that it has."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__, layer.store = RoomyLayer, [layer.keys, layer.values]
    return all(type(layer) is RoomyLayer for layer in cache.layers)


@torch.inference_mode()
def _sample_chunk(model, prompts, ends, max_new_tokens, group, temperature, top_p, generator):
    device, count = model.device, len(prompts) * group
    ends = torch.tensor(ends, device=device)
    # Prompts are padded on the left, so that all rows write their next token in the same column. Each prompt is read
    # once; its keys and values are then repeated for the G samples of its group.
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # [P, L]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)  # [P, L]
    positions = _positions(mask)
    # Logits in float32 from the hidden states, as in training: bf16 ones are off by 0.05, and so would be PPO's ratio.
    # What autocast rounds is rounded here too, the output matrix once.
    decoder, (weight, softcap) = model.get_decoder(), output_layer(model)
    weight = logprob.as_autocast(weight)[0].to(logprob.sum_type(weight))
    output = decoder(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(group)
    # Where every layer sees all columns, their mask is ours, and we need not have transformers derive it at each token.
    sees_all = make_roomy(cache) and model.config._attn_implementation == "sdpa"
    mask = mask.bool().repeat_interleave(group, 0)  # [B, L], B = P * G
    position = positions[:, -1].repeat_interleave(group)  # [B]
    states = output.last_hidden_state[:, -1].repeat_interleave(group, 0)  # [B, H]

    responses = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    rows = torch.arange(count, device=device)  # the rows at work; all tensors below hold just these, [B'] of them
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    look_every = LOOK_EVERY.get(device.type, 8)
    for t in range(max_new_tokens):
        logp = logprob.all_logprobs(*logprob.as_autocast(states), weight, temperature or 1.0, softcap)  # [B', V]
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
        states = decoder(
            input_ids=token[:, None],
            attention_mask=mask[:, None, None] if sees_all else mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    lengths = lengths.tolist()
    responses, logprobs = responses.tolist(), logprobs.cpu()
    return [r[:n] for r, n in zip(responses, lengths)], [logprobs[i, :n] for i, n in enumerate(lengths)]


# ---------------------------------------------------------------------------------------------------------------
# 3. Log-probabilities of given tokens
# ---------------------------------------------------------------------------------------------------------------


def response_states(model, batch: Batch) -> torch.Tensor:
    """The hidden states after the prompt and after each response token: [B, 1 + R, H], R the longest response.

    State t chose response token t; state t + 1 has read it. Rows that share a prompt (a question's G samples, its
    expert, its broken copies) have it read once: with G = 8, half of the tokens of a short problem.
    """
    responses, columns = _response_columns(batch)  # [B, R]
    decoder = model.get_decoder()
    with half_precision(batch.tokens.device):
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
        rest = decoder(input_ids=responses, attention_mask=mask, position_ids=columns, past_key_values=cache,
                       use_cache=True).last_hidden_state  # fmt: skip
        return torch.cat([prompt.last_hidden_state[which, -1:], rest], 1)


def _response_columns(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Responses moved to the left edge, [B, R], and the columns of batch.tokens they come from."""
    longest = int((batch.lengths - batch.prompt_lengths).max())
    columns = batch.prompt_lengths[:, None] + torch.arange(longest, device=batch.tokens.device)
    return batch.tokens.gather(1, columns.clamp(max=batch.tokens.shape[1] - 1)), columns


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


def choosing_states(model, batch: Batch) -> torch.Tensor:
    """The hidden state that chose each response token: [N, H], N = number of response tokens, in row order. Prompt and
    padding positions never meet the output matrix, which is where the memory goes when V is 151,936."""
    return response_states(model, batch)[:, :-1][response_part(batch)]


def response_part(batch: Batch) -> torch.Tensor:
    """[B, R] bool: which columns of the responses, moved to the left edge, are tokens."""
    lengths = batch.lengths - batch.prompt_lengths
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def output_layer(model) -> tuple[torch.Tensor, float]:
    """(output matrix [V, H], softcap): logits are softcap * tanh(W h / softcap), or W h where softcap is 0."""
    return model.get_output_embeddings().weight, getattr(model.config, "final_logit_softcapping", None) or 0.0


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Flat values of the masked positions, in row order, back to where they belong: [N, ..] and [B, T] -> [B, T, ..]."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.index_put((mask.bool(),), values) if values.ndim > 1 else out.masked_scatter(mask.bool(), values)


def response_tokens(batch: Batch) -> torch.Tensor:
    """The response tokens of all rows, one after another: [N], in the order of `choosing_states`."""
    return batch.tokens[batch.response_mask.bool()]


def token_logprobs(model, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a_t | s_t) for each response token: [B, T], 0 elsewhere."""
    return spread(logprobs_of(model, choosing_states(model, batch), batch, temperature), batch.response_mask)


def logprobs_of(model, states: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a_t | s_t) from `choosing_states`: [N, H] -> [N]."""
    weight, softcap = output_layer(model)
    with half_precision(states.device):
        return logprob.logprobs(states, weight, response_tokens(batch), temperature, softcap, entropy=False)[0]


def loss_of_logprobs(model, states, batch: Batch, loss: Callable, temperature: float = 1.0) -> torch.Tensor:
    """sum_n loss(log pi(a_n|s_n), n), n all response tokens: a number, with its gradients. What training takes: told the
    loss, logprob.py need not multiply a large vocabulary's logits twice. loss([R], slice n of 0..N) -> [R], by token."""
    weight, softcap = output_layer(model)
    by_token = lambda logprobs, entropy, n: loss(logprobs, n)
    with half_precision(states.device):
        return logprob.loss_sum(states, weight, response_tokens(batch), by_token, temperature, softcap)


def token_entropies(model, batch: Batch) -> torch.Tensor:
    """-sum_a pi(a|s_t) log pi(a|s_t) at each response token: [B, T]."""
    states, (weight, softcap) = choosing_states(model, batch), output_layer(model)
    with half_precision(states.device):
        return spread(logprob.logprobs(states, weight, response_tokens(batch), 1.0, softcap)[1], batch.response_mask)


@torch.no_grad()
def in_chunks(
    function: Callable, batch: Batch, rows: int = 64, *aligned: torch.Tensor, tokens: int = 0
) -> torch.Tensor:
    """function(batch, *aligned) -> [B, T] or [B, T, H] without a gradient, a few rows at a time, so that memory does not
    grow with B. `aligned` are [B, T, ..] tensors that belong to the batch; each call gets its rows of them. `rows` and
    `tokens` are those of memory.micro_batches."""
    result = None
    for chosen in memory.micro_batches(batch.lengths, rows, tokens):
        part = batch[chosen]
        values = function(part, *(a[chosen, : part.tokens.shape[1]] for a in aligned))
        if result is None:
            result = values.new_zeros(*batch.tokens.shape, *values.shape[2:])
        result[chosen, : values.shape[1]] = values
    return result


@torch.no_grad()
def divide_logits(model, by: float) -> None:
    """Change the weights so that all logits come out divided by `by`: a policy at temperature `by`, for good.

    Logits are linear in what the last norm scales (unless they are capped), so it is its weight that is divided.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    before, norm = model(tokens).logits, getattr(model.get_decoder(), "norm", None)
    if norm is not None:
        norm.weight /= by
    after = model(tokens).logits
    if (after * by - before).norm() > 1e-2 * before.norm():
        raise UserError("this model's logits cannot be divided by scaling its last norm: use --start base")


# ---------------------------------------------------------------------------------------------------------------
# 4. Returns, baselines, advantages
# ---------------------------------------------------------------------------------------------------------------


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma G_{t+1} = sum_k gamma^k r_{t+k}, backwards over the response: [B, T] -> [B, T].

    A loop from the end, not a division by gamma^t, which overflows float32 near t = 824 at gamma = 0.9.

    >>> returns_to_go(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]), 0.5)
    tensor([[0., 2., 2.]])
    """
    returns, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = (rewards[:, t] + gamma * running) * mask[:, t]
        returns[:, t] = running
    return returns


def group_baseline(returns: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    """b_t: the mean return at t of the *other* samples of the same question that are still writing at t.

    [B, T] -> [B, T]; rows i*group .. i*group + group-1 share a prompt, so column t is the same step for all of them.
    In the units of the return at t, not of the reward: a baseline of another length of future would be a bias.
    Leaving the row itself out keeps the gradient unbiased (Kool et al. 2019). A row alone at t is compared with what the
    others' last tokens brought: its own return would be a baseline that knows a_t, and would drop the gradient; 0 would
    make the last tokens of the longest trace pay for the level of all rewards.

    >>> group_baseline(torch.tensor([[1.0, 4.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 2)
    tensor([[3., 3.],
            [1., 0.]])
    """
    grouped, alive = (returns * mask).view(-1, group, returns.shape[1]), mask.view(-1, group, returns.shape[1])
    of_others = lambda x: x.sum(1, keepdim=True) - x
    columns = torch.arange(returns.shape[1], device=returns.device)
    last = grouped.gather(-1, (alive * columns).argmax(-1, keepdim=True))  # [Q, G, 1], each row's return at its end
    how_many = of_others(alive)  # [Q, G, T]
    baseline = torch.where(how_many > 0, of_others(grouped) / how_many.clamp(min=1), of_others(last) / (group - 1))
    return baseline.view_as(returns) * mask


def normalise(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the batch's response tokens, so that the learning rate alone sets the step.

    The mean is left alone: the baseline has dealt with it, and a second centring would punish long traces.
    """
    sums = parallel.total_of({"square": (advantages**2 * mask).sum(), "tokens": mask.sum()})
    scale = (sums["square"] / max(1.0, sums["tokens"])) ** 0.5
    return advantages / max(1e-6, scale) * mask


def best_of_group(scores: torch.Tensor, group: int) -> torch.Tensor:
    """1 for the sample with the highest score among the G of its question, 0 for the others: [B] -> [B].

    As an advantage it makes REINFORCE the likelihood of the winners: reward-ranked fine-tuning (RAFT, Dong et al. 2023,
    arXiv 2304.06767), here with a reward learnt from demonstrations.

    >>> best_of_group(torch.tensor([0.1, 0.7, 0.5, 0.2]), 2)
    tensor([0., 1., 1., 0.])
    """
    best = scores.view(-1, group).argmax(1)
    return torch.nn.functional.one_hot(best, group).flatten().to(scores.dtype)


def grpo_advantages(outcomes: torch.Tensor, group: int) -> torch.Tensor:
    """A = (R - mean R) / std R over the G samples of a question (Shao et al. 2024, eq. 3): [B] -> [B].

    A group whose outcomes are all alike teaches nothing: its advantages are 0.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 1., -1.,  0.,  0.])
    """
    grouped = outcomes.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / grouped.std(1, unbiased=False, keepdim=True).clamp(min=1e-6)).flatten()


# ---------------------------------------------------------------------------------------------------------------
# 5. Losses, one value per token [B, T] or [N]. `accumulate` divides their sum by the tokens of the whole batch.
# ---------------------------------------------------------------------------------------------------------------


def reinforce_loss(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """-A_t log pi(a_t|s_t): its gradient is the policy gradient (Williams 1992).

    >>> reinforce_loss(torch.tensor([-1.0]), torch.tensor([2.0]))
    tensor([2.])
    """
    return -advantages.detach() * logprobs


def ppo_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """-min(ratio A, clip(ratio, 1-clip, 1+clip) A), ratio = pi / pi_old (Schulman et al. 2017, eq. 7).

    On the first epoch ratio = 1: the loss is -A, whose mean is 0 for centred advantages, yet the gradient is
    REINFORCE's. A loss of zero is no sign of a dead run.

    >>> ppo_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    ratio = (logprobs - old_logprobs.detach()).exp()
    advantages = advantages.detach()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl_k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) per token, estimated from the sampled one: exp(d) - d - 1 with d = log pi_ref - log pi.

    Never negative, and unbiased for samples of pi (Schulman 2020, 'Approximating KL divergence', k3).

    >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.])
    """
    d = reference_logprobs - logprobs
    return d.exp() - d - 1


def sft_loss(model, batch: Batch) -> torch.Tensor:
    """-log pi(expert's token | expert's prefix), summed over the response tokens: a number. The end token is one."""
    return loss_of_logprobs(model, choosing_states(model, batch), batch, lambda logprobs, n: -logprobs)


# ---------------------------------------------------------------------------------------------------------------
# 6. Updates
# ---------------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay: a policy that starts from a pretrained model should stay near it. Weights in bf16 get
    float32 masters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not any(p.dtype == torch.bfloat16 for p in parameters):
        return parallel.make_optimizer(torch.optim.AdamW, parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for parameter in parameters:
        parameter.grad_dtype = torch.float32  # micro-batches add up in it: in bf16, 1 + 0.003 is 1
    return parallel.make_optimizer(memory.MasterAdamW, parameters, lr=lr, betas=(0.9, 0.99))


def set_rate(optimizer, peak: float, done: int, steps: int, warm_up: float = 0.1) -> None:
    """Linear warm-up over the first tenth of `steps`, then linear decay to 0; `done` updates are behind us.

    Without the decay a small policy ends wherever the last noisy step has left it: several points lower.
    """
    rise = (done + 1) / max(1, warm_up * steps)
    fall = 1 - done / steps
    set_constant_rate(optimizer, peak * max(0.0, min(1.0, rise, fall)))


def set_constant_rate(optimizer, rate: float) -> None:
    """One rate for all parameters, from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(optimizer, loss: float, max_norm: float = 1.0) -> dict:
    """Sum the gradients of all processes, clip their norm, step, clear. Returns {"loss", "grad_norm" (before clipping),
    "skipped"}.

    If the loss or the gradient is not finite, no step is made: one NaN in AdamW's averages would stay there for ever.
    "skipped" counts such steps since the optimizer was made; train.py stops the run when they come in a row. `loss` is
    that of all processes, and so are the gradients by then: either all of them step or none.
    """
    first = optimizer.param_groups[0]
    first.setdefault("skipped", 0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    else:
        first["skipped"] += 1
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": norm, "skipped": first["skipped"]}


def accumulate(loss_of_rows: Callable[[torch.Tensor], torch.Tensor], parts: list[torch.Tensor], total: float) -> float:
    """Backward of sum(losses) / total, part by part of the rows (memory.micro_batches). Returns the loss.

    loss_of_rows(rows) gives per-token losses, 0 outside the response, or their sum. `total` is that of the *whole* batch
    (its number of response tokens), so the micro-batch size sets the memory and nothing else. Of several processes each
    brings its own rows and their total; the gradients are those of all rows once optimizer_step has summed them.
    """
    loss, total = 0.0, parallel.total(total)
    for rows in parts:
        part = loss_of_rows(rows).sum() / total
        part.backward()
        loss += float(part.detach())
    return parallel.total(loss)


def quiet() -> None:
    """Silence the libraries' progress bars and advice, which would bury our own lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    import data

    quiet()

    model, tokenizer = load_policy(BASE)
    example = data.load_examples("words", "test", 1)[0]
    generator = torch.Generator().manual_seed(0)
    prompt = data.prompt_ids(tokenizer, example.question)
    rollout = sample(model, [prompt], data.end_tokens(tokenizer, model), max_new_tokens=64, group=4, generator=generator)
    print(example.question, "\n")
    for row in range(4):
        text = data.decode(tokenizer, rollout.batch.response(row))
        print(
            f"{text.replace(chr(10), ' ')}   log pi = {rollout.logprobs[row].sum():.2f}",
            "right" * data.is_correct(example, text),
        )
    again = in_chunks(lambda b: token_logprobs(model, b), rollout.batch)
    print(f"\nlargest difference from a fresh forward pass: {(again - rollout.logprobs).abs().max():.1e}")


if __name__ == "__main__":
    main()
