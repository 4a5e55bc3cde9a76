"""The policy: a causal language model that we sample from, score with, and improve. (engine/loading.py loads it.)

In Algorithm 1 this is the rollout (stage 1) and the policy's step (stage 4). Index t is the same everywhere: column t speaks
of tokens[:, t], chosen after reading tokens[:, :t] (data.Batch).

    1. sampling                     `sample_plain` shows what `sample` does faster (engine/sampler.py)
    2. log-probabilities            `token_logprobs_plain` shows what `token_logprobs` does with less (engine/logprob.py)
    3. returns, advantages          pure functions of rewards [B, T]
    4. losses                       SFT, REINFORCE, PPO; KL to a reference
    5. updates                      one optimizer step in micro-batches, whose size changes no gradient

    equation                                                 where               test, in tests/test_policy.py
    G_t = r_t + gamma G_{t+1} (2510.01857)                   returns_to_go       returns_to_go_by_hand
    b_t, the mean of the others (Kool et al. 2019)           group_baseline      the_group_baseline_is_unbiased
    A / its root mean square, of batch or group              normalise           normalise_by_group_makes_groups_alike
    A = (R - mean R) / std R (2402.03300, eq. 3)             grpo_advantages     grpo_advantages_by_hand
    -A log pi (Williams 1992)                                reinforce_loss      reinforce_gradient_is_minus_the_advantage
    -min(ratio A, clip(ratio) A) (1707.06347, eq. 7)         ppo_loss            ppo_clips_where_the_ratio_has_gone_far_..
    KL ~ e^d - d - 1, d = log pi_ref - log pi (k3)           kl_k3               k3_by_hand_and_unbiased
    -log pi of the expert's tokens                           sft_loss            the_end_token_is_trained_and_the_prompt_..

Run `python policy.py` to sample the shipped base and see that its log-probabilities are those of a fresh forward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data import Batch, make_batch
from engine import loading, logprob, memory, parallel, sampler
from engine.errors import UserError

# 1. Sampling ---------------------------------------------------------------------------------------------------------


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
def sample_plain(model, prompt: list[int], ends: tuple[int, ...], max_new_tokens: int, temperature: float = 1.0,
                 top_p: float = 1.0, generator=None) -> tuple[list[int], list[float]]:  # fmt: skip
    """One response and log pi of its tokens, with a whole forward pass for each: what `sample` does, to be read."""
    response, logprobs = [], []
    while len(response) < max_new_tokens and not (response and response[-1] in ends):
        logits = model(torch.tensor([prompt + response], device=model.device)).logits[:, -1].float()  # [1, V]
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        response.append(int(choose(logp, temperature, top_p, generator)))
        logprobs.append(float(logp[0, response[-1]]))
    return response, logprobs


@torch.no_grad()
def sample(
    model, prompts: list[list[int]], ends: tuple[int, ...], max_new_tokens: int, group: int = 1, temperature: float = 1.0,
    top_p: float = 1.0, generator: torch.Generator | None = None, rows: int = 512,
) -> Rollout:  # fmt: skip
    """Sample `group` responses for each prompt, at most `rows` at a time, but one prompt's at least. Row i*group + g is
    sample g of prompt i.
    A row ends with the first of the tokens `ends` (data.end_tokens) that it draws.

    Log-probabilities are those of the policy that temperature makes, log softmax(logits / temperature) (temperature 0:
    of the unchanged logits). top-p only narrows the choice; it is not part of the policy's density.
    """
    model.eval()
    per_chunk, how = max(1, rows // group), (ends, max_new_tokens, group, temperature, top_p, generator, choose)
    responses, logprobs = [], []
    for start in range(0, len(prompts), per_chunk):
        with logprob.half_precision(model.device):
            written, of_written = sampler.sample_chunk(model, prompts[start : start + per_chunk], *how)
        responses, logprobs = responses + written, logprobs + of_written
    repeated = [prompt for prompt in prompts for _ in range(group)]
    batch = make_batch(repeated, responses, model.device)
    values = torch.zeros(batch.tokens.shape)
    for row, (prompt, chosen) in enumerate(zip(repeated, logprobs)):
        values[row, len(prompt) : len(prompt) + len(chosen)] = chosen
    finished = torch.tensor([response[-1] in ends for response in responses])
    return Rollout(batch, values.to(model.device), finished.to(model.device))


# 2. Log-probabilities of given tokens --------------------------------------------------------------------------------


def token_logprobs_plain(model, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a_t | s_t) by one ordinary forward pass: what `token_logprobs` does, to be read. [B, T], 0 elsewhere."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits.float()  # [B, T, V]
    logp = (logits / temperature).log_softmax(-1)[:, :-1]  # what was known before token t is in column t - 1
    chosen = logp.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)  # [B, T-1]
    return torch.nn.functional.pad(chosen, (1, 0)) * batch.response_mask


def hidden_states(model, batch: Batch) -> torch.Tensor:
    """The hidden state that chose each response token: [N, H], N = number of response tokens, in row order. Prompt and
    padding positions never meet the output matrix, which is where the memory goes when V is 151,936."""
    return sampler.response_hidden(model, batch)[:, :-1][response_part(batch)]


def response_part(batch: Batch) -> torch.Tensor:
    """[B, R] bool: which columns of the responses, moved to the left edge, are tokens."""
    lengths = batch.lengths - batch.prompt_lengths
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Flat values of the masked positions, in row order, back to where they belong: [N, ..] and [B, T] -> [B, T, ..]."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.index_put((mask.bool(),), values) if values.ndim > 1 else out.masked_scatter(mask.bool(), values)


def response_tokens(batch: Batch) -> torch.Tensor:
    """The response tokens of all rows, one after another: [N], in the order of `hidden_states`."""
    return batch.tokens[batch.response_mask.bool()]


def token_logprobs(model, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a_t | s_t) for each response token: [B, T], 0 elsewhere."""
    return spread(logprobs_of(model, hidden_states(model, batch), batch, temperature), batch.response_mask)


def logprobs_of(model, hidden: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a_t | s_t) from `hidden_states`: [N, H] -> [N]."""
    weight, softcap = logprob.output_layer(model)
    return logprob.logprobs(hidden, weight, response_tokens(batch), temperature, softcap)


def loss_of_logprobs(model, hidden, batch: Batch, loss: Callable, temperature: float = 1.0) -> torch.Tensor:
    """sum_n loss(log pi(a_n|s_n), n), n all response tokens: a number, with its gradients. What training takes: told the
    loss, logprob.py need not multiply a large vocabulary's logits twice. loss([R], slice n of 0..N) -> [R], by token."""
    weight, softcap = logprob.output_layer(model)
    return logprob.loss_sum(hidden, weight, response_tokens(batch), loss, temperature, softcap)


def token_entropies(model, batch: Batch) -> torch.Tensor:
    """-sum_a pi(a|s_t) log pi(a|s_t) at each response token: [B, T]."""
    return spread(logprob.entropies(hidden_states(model, batch), *logprob.output_layer(model)), batch.response_mask)


@torch.no_grad()
def in_chunks(function: Callable, batch: Batch, rows: int = 64, *aligned: torch.Tensor, tokens: int = 0) -> torch.Tensor:
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

    Logits are linear in what the last norm scales (unless they are capped), so it is its weight w that is divided. Gemma's
    norms scale by 1 + w: there w becomes (1 + w) / by - 1. UserError, and weights as before, if neither divides the logits.
    """
    tokens = loading.ordinary_tokens(model)  # [1, n]
    before = model(tokens).logits.float()  # [1, n, V]
    norm = getattr(model.get_decoder(), "norm", None)
    if norm is not None and before.norm() > 0:  # of logits that are all 0 nothing could be seen
        weight = norm.weight.clone()
        for offset in (0.0, 1.0):
            norm.weight.copy_((offset + weight) / by - offset)
            after = model(tokens).logits.float()
            if (after * by - before).norm() <= 1e-2 * before.norm():
                return
        norm.weight.copy_(weight)
    raise UserError("this model's logits cannot be divided by scaling its last norm: use --start base")


# 3. Returns, baselines, advantages -----------------------------------------------------------------------------------


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


def normalise(advantages: torch.Tensor, mask: torch.Tensor, group: int = 0) -> torch.Tensor:
    """Divide by the root mean square over the batch's response tokens, so that the learning rate alone sets the step. With a
    `group`, over those of each question's G rows, as GRPO does: a question that is answered well once in a while then weighs
    more than its rewards say, a bias (Liu et al. 2025, arXiv 2503.20783) that keeps rare kinds of solutions alive.

    The mean is left alone: the baseline has dealt with it, and a second centring would punish long traces.
    """
    if group:
        squares, tokens = ((x * mask).reshape(-1, group * mask.shape[1]).sum(1) for x in (advantages**2, mask))
        scale = (squares / tokens.clamp(min=1)).sqrt().clamp(min=1e-4)  # equal rewards differ by rounding, which is no unit
        return advantages / scale.repeat_interleave(group)[:, None] * mask
    sums = parallel.total_of({"square": (advantages**2 * mask).sum(), "tokens": mask.sum()})
    scale = (sums["square"] / max(1.0, sums["tokens"])) ** 0.5
    return advantages / max(1e-6, scale) * mask


def grpo_advantages(outcomes: torch.Tensor, group: int) -> torch.Tensor:
    """A = (R - mean R) / std R over the G samples of a question (Shao et al. 2024, eq. 3): [B] -> [B].

    A group whose outcomes are all alike teaches nothing: its advantages are 0.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 1., -1.,  0.,  0.])
    """
    grouped = outcomes.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / grouped.std(1, unbiased=False, keepdim=True).clamp(min=1e-6)).flatten()


# 4. Losses, one value per token [B, T] or [N]. `accumulate` divides their sum by the tokens of the whole batch. ------


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

    Never negative, and unbiased for samples of pi (Schulman 2020, 'Approximating KL divergence', k3). As a loss, as GRPO has
    it, too, its gradient on such samples is that of KL(pi_ref || pi): E_pi[1 - pi_ref / pi] d log pi.

    >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.])
    """
    d = reference_logprobs - logprobs
    return d.exp() - d - 1


def sft_loss(model, batch: Batch) -> torch.Tensor:
    """-log pi(expert's token | expert's prefix), summed over the response tokens: a number. The end token is one."""
    return loss_of_logprobs(model, hidden_states(model, batch), batch, lambda logprobs, n: -logprobs)


# 5. Updates ----------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay: a policy that starts from a pretrained model should stay near it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return parallel.make_optimizer(torch.optim.AdamW, parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def set_rate(optimizer, peak: float, done: int, steps: int, warm_up: float = 0.1) -> None:
    """Linear warm-up over the first tenth of `steps`, then linear decay to 0; `done` updates are behind us.

    Without the decay a small policy ends wherever the last noisy step has left it: several points lower.
    """
    rise, fall = (done + 1) / max(1, warm_up * steps), 1 - done / steps
    set_constant_rate(optimizer, peak * max(0.0, min(1.0, rise, fall)))


def set_constant_rate(optimizer, rate: float) -> None:
    """One rate for all parameters, from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(optimizer, loss: float, max_norm: float = 1.0) -> dict:
    """Sum the gradients of all processes, clip their norm, step, clear. Returns {"loss", "grad_norm" (before), "skipped"}.

    If the loss, that of all processes, or the gradient is not finite, nobody steps: one NaN in AdamW's averages would stay
    there for ever. "skipped" counts such steps since the optimizer was made; train.py stops the run when they come in a row.
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


def descend(model, optimizer, batch: Batch, loss: Callable[[torch.Tensor], torch.Tensor], settings, epochs: int = 1,
            rows: torch.Tensor | None = None) -> dict:  # fmt: skip
    """`epochs` optimizer steps on the mean of loss(row numbers), a sum over response tokens. Returns the last one's metrics.
    rows: those that have a gradient, if not all; the mean is over the tokens of all of them."""
    rows = torch.arange(len(batch), device=batch.lengths.device) if rows is None else rows
    parts = [rows[part] for part in memory.micro_batches(batch.lengths[rows], settings.micro_batch, settings.micro_tokens)]
    model.train()
    for _ in range(epochs):
        value = accumulate(loss, parts, float(batch.response_mask.sum()))
        metrics = optimizer_step(optimizer, value)
    return metrics


def main() -> None:
    import data

    loading.quiet()
    model, tokenizer = loading.load_policy(loading.BASE)
    example = data.load_examples("words", "test", 1)[0]
    generator = torch.Generator().manual_seed(0)
    prompt = data.prompt_ids(tokenizer, example.question)
    rollout = sample(model, [prompt], data.end_tokens(tokenizer, model), max_new_tokens=64, group=4, generator=generator)
    print(example.question, "\n")
    for row in range(4):
        text, log_pi = data.decode(tokenizer, rollout.batch.response(row)), rollout.logprobs[row].sum()
        print(f"{text.replace(chr(10), ' ')}   log pi = {log_pi:.2f}", "right" * data.is_correct(example, text))
    again = in_chunks(lambda b: token_logprobs(model, b), rollout.batch)
    print(f"\nlargest difference from a fresh forward pass: {(again - rollout.logprobs).abs().max():.1e}")


if __name__ == "__main__":
    main()
