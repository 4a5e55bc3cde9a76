"""The policy: a causal language model that we sample from, score with, and improve.

In Algorithm 1 this is the rollout (stage 1) and the policy's step (stage 4). engine/loading.py
loads the model. Index t is the same everywhere: column t speaks of tokens[:, t], chosen after
reading tokens[:, :t] (data.Batch).

    1. sampling              what a token is drawn from; engine/sampler.py has the loop over t
    2. log-probabilities     of given tokens, with little memory (logprob.py)
    3. returns, advantages   pure functions of rewards [B, T]
    4. losses                REINFORCE, PPO, KL to a reference: a value per token
    5. updates               the rate, one optimizer step

    equation                                        where               tests/test_policy.py
    G_t = r_t + gamma G_{t+1} (2510.01857)          returns_to_go       returns_to_go_by_hand
    b_t, mean of the others (Kool et al. 2019)      group_baseline      the_group_baseline_is_..
    A / its root mean square over the batch         normalise           normalise_keeps_the_sign_..
    A / that over a question's samples              normalise_by_group  normalise_by_group_..
    A = (R - mean R) / std R (2402.03300, eq. 3)    grpo_advantages     grpo_advantages_by_hand
    -A log pi (Williams 1992)                       reinforce_loss      reinforce_gradient_is_..
    -min(rho A, clip(rho) A) (1707.06347, eq. 7)    ppo_loss            ppo_clips_where_the_..
    KL ~ e^d - d - 1, d = log pi_ref - log pi (k3)  kl_k3               k3_by_hand_and_unbiased

Run `python policy.py` to sample the shipped base.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import data
import logprob
from data import Batch, Example
from engine import loading, memory, parallel, sampler
from engine.errors import UserError

# 1. Sampling ----------------------------------------------------------------------------------


@dataclass
class Rollout:
    """What the policy wrote: G consecutive rows per question."""

    batch: Batch
    # [B, T], log pi of each response token when it was sampled, 0 elsewhere.
    logprobs: torch.Tensor
    # [B] bool: an end token ended the row, not the length limit.
    finished: torch.Tensor


def choose(
    logprobs: torch.Tensor, temperature: float, top_p: float, generator=None
) -> torch.Tensor:
    """One token per row: [B, V] log-probabilities -> [B]. Temperature 0 is greedy.

    >>> logprobs = torch.tensor([[0.1, 0.6, 0.3]]).log()
    >>> choose(logprobs, 0.0, 1.0), choose(logprobs, 1.0, 0.5)
    (tensor([1]), tensor([1]))
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    probabilities = logprobs.exp()  # [B, V]
    # The nucleus (Holtzman et al. 2019): the smallest set of most likely tokens whose probability
    # reaches top_p. A token stays if those before it have not reached it yet.
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(mass_before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    # Inverse transform: with u uniform below the total mass, take the first token whose running
    # total is above u. The total is below 1 where the nucleus has cut tokens off.
    running_total = probabilities.cumsum(-1)  # [B, V]
    total = running_total[:, -1:]  # [B, 1]
    u = torch.rand(len(total), 1, generator=generator, device=total.device) * total
    # Rounding may put u at the very end, behind the last token.
    last = logprobs.shape[1] - 1
    return torch.searchsorted(running_total, u, right=True).squeeze(-1).clamp(max=last)


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    end_tokens: tuple[int, ...],
    max_new_tokens: int,
    group: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    rows: int = 512,
) -> Rollout:
    """`group` responses to each prompt, which end with the first of `end_tokens` that they draw.

    Row i*group + g is sample g of prompt i. At most `rows` are sampled at a time (memory), but one
    prompt's at least.
    """
    # In short: at each t a forward pass, log pi = log softmax(z / temperature), one token from it;
    # the end token is an action like any other, part of the response, trained and paid.
    # (tests/test_policy.py has this as a plain loop.)
    model.eval()
    weight, softcap = logprob.output_layer(model)
    matrix = logprob.widened(weight)  # once, not at every token

    def draw(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The next token of some rows and its log pi: [B', H] -> [B'], [B'].
        # The density is that of the policy at its temperature, log softmax(z / temperature).
        # The nucleus only narrows the choice: a ratio of two policies would else be 0 / 0.
        log_pi = logprob.all_logprobs(hidden, matrix, temperature or 1.0, softcap)  # [B', V]
        token = choose(log_pi, temperature, top_p, generator)
        return token, log_pi.gather(-1, token[:, None]).squeeze(-1)

    responses = []  # B lists of tokens
    logprobs = []  # B tensors [response length]
    at_once = max(1, rows // group)
    for start in range(0, len(prompts), at_once):
        with memory.half_precision(model.device):
            new_responses, new_logprobs = sampler.sample_chunk(
                model, prompts[start : start + at_once], end_tokens, max_new_tokens, group, draw
            )
        responses += new_responses
        logprobs += new_logprobs

    repeated = [prompt for prompt in prompts for _ in range(group)]
    batch = data.make_batch(repeated, responses, model.device)
    values = spread(torch.cat(logprobs).to(model.device), batch.response_mask)  # [B, T]
    # The others ran into the length limit.
    finished = [response[-1] in end_tokens for response in responses]
    return Rollout(batch, values, torch.tensor(finished, device=model.device))


def rollout(
    model, questions: list[Example], end_tokens: tuple[int, ...], group: int, settings, generator
) -> tuple[Rollout, dict]:
    """Stage 1 of IRL and of GRPO: samples at the training temperature, and their metrics."""
    s = settings
    prompts = [question.prompt for question in questions]
    sampled = sample(
        model,
        prompts,
        end_tokens,
        s.max_new_tokens,
        group,
        s.temperature,
        s.top_p,
        generator,
        s.sample_rows,
    )
    mask = sampled.batch.response_mask
    # A length that creeps up to the limit, or fewer finished rows, are the first signs of a reward
    # that is exploited.
    metrics = {
        "length": float(mask.sum(1).mean()),
        "finished": float(sampled.finished.float().mean()),
        # -E log pi of the sampled tokens estimates the policy's entropy per token.
        "entropy": float(-sampled.logprobs.sum() / mask.sum()),
    }
    return sampled, metrics


# 2. Log-probabilities of given tokens ---------------------------------------------------------


def token_logprobs(model, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a_t | s_t) for each response token: [B, T], 0 elsewhere."""
    return logprobs_of(model, hidden_states(model, batch), batch, temperature)


def hidden_states(model, batch: Batch, after: bool = False) -> torch.Tensor:
    """The hidden state before each response token, or after it: [N, H], N tokens in row order."""
    # Prompt and padding positions are left out here: they never meet the output matrix [V, H],
    # which is where the memory goes when V is 151,936.
    states = sampler.response_hidden(model, batch)  # [B, 1 + R, H], R the longest response
    lengths = batch.lengths - batch.prompt_lengths
    is_token = torch.arange(states.shape[1] - 1, device=lengths.device) < lengths[:, None]  # [B, R]
    # State 0 has read the prompt and chose response token 0; state 1 has read this token, too.
    shifted = states[:, 1:] if after else states[:, :-1]
    return shifted[is_token]


def logprobs_of(
    model, hidden: torch.Tensor, batch: Batch, temperature: float = 1.0
) -> torch.Tensor:
    """log pi(a_t | s_t) from `hidden_states`: [N, H] -> [B, T], 0 outside the response."""
    # A pass over the output matrix per block of rows, instead of the model's own [B, T, V] logits.
    weight, softcap = logprob.output_layer(model)
    tokens = batch.tokens[batch.response_mask.bool()]  # [N], in the order of `hidden`
    logprobs = logprob.token_logprobs(hidden, weight, tokens, temperature, softcap)  # [N]
    return spread(logprobs, batch.response_mask)


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the masked positions, in row order, back to their places: [N, ..] -> [B, T, ..]."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    out[mask.bool()] = values
    return out


@torch.no_grad()
def in_chunks(
    function: Callable, batch: Batch, rows: int = 64, tokens: int = 0, *aligned: torch.Tensor
) -> torch.Tensor:
    """function(batch, *aligned), [B, T] or [B, T, H], without a gradient, a few rows at a time.

    rows, tokens: as in memory.micro_batches.
    """
    # A few, so that memory does not grow with B. aligned: tensors [B, T, ..] that belong to the
    # batch; each call gets its rows of them.
    result = None
    for chosen in memory.micro_batches(batch.lengths, rows, tokens):
        part = batch[chosen]  # cut to the longest of these rows
        values = function(part, *(a[chosen, : part.tokens.shape[1]] for a in aligned))
        if result is None:
            result = values.new_zeros(*batch.tokens.shape, *values.shape[2:])
        result[chosen, : values.shape[1]] = values
    return result


# 3. Returns, baselines, advantages ------------------------------------------------------------


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma G_{t+1} = sum_k gamma^k r_{t+k} over the response: [B, T] -> [B, T].

    >>> returns_to_go(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]), 0.5)
    tensor([[0., 2., 2.]])
    """
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # [B], G_{t+1}
    # From the end. The paper's released code divides a running sum by gamma^t, which overflows
    # float32 near t = 824 at gamma = 0.9.
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = (rewards[:, t] + gamma * running) * mask[:, t]
        returns[:, t] = running
    return returns


def group_baseline(returns: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    """b_t: the mean return at t of the *other* samples of the question still writing at t.

    [B, T] -> [B, T]. Rows i*group .. i*group + group - 1 share a prompt.

    >>> returns = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    >>> group_baseline(returns, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 2)
    tensor([[3., 3.],
            [1., 0.]])
    """
    # Units: those of the return at t, the sum of what is still to come, since it is subtracted from
    # it. Rows of a group share their prompt, so column t is the same step for all of them. (The
    # released code subtracts the last token's mean from every token before it discounts: a bias
    # that depends on how much is still to come.)
    T = returns.shape[1]
    G = (returns * mask).view(-1, group, T)  # [Q, group, T], Q questions
    alive = mask.view(-1, group, T)  # 1: still writing at t
    # No bias: the row itself is left out, so b_t does not depend on a_t. Then E_{a~pi}[b_t grad
    # log pi(a)] = b_t sum_a grad pi(a) = b_t grad 1 = 0 (Kool et al. 2019).
    others = G.sum(1, keepdim=True) - G
    n_others = alive.sum(1, keepdim=True) - alive

    # A row that is alone at t is compared with what the others' last tokens brought. Its own return
    # would know a_t, and drop the gradient. 0 would make the last tokens of the longest trace pay
    # for the level of all rewards.
    last_t = (alive * torch.arange(T, device=mask.device)).argmax(-1, keepdim=True)
    last = G.gather(-1, last_t)  # [Q, group, 1], the return at each row's end token
    others_last = (last.sum(1, keepdim=True) - last) / (group - 1)

    baseline = torch.where(n_others > 0, others / n_others.clamp(min=1), others_last)
    return baseline.view_as(returns) * mask


def normalise(
    advantages: torch.Tensor, mask: torch.Tensor, squares: float, tokens: float
) -> torch.Tensor:
    """Divide by the batch's root mean square, so that the rate alone sets the step: [B, T].

    squares, tokens: the sum of A^2 and the number of response tokens of the whole batch.
    """
    # The sums come from outside: processes share a batch. The mean is left alone: the baseline has
    # dealt with it, and to subtract it once more would punish long traces.
    scale = (squares / max(1.0, tokens)) ** 0.5
    return advantages / max(1e-6, scale) * mask


def normalise_by_group(advantages: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    """Divide by the root mean square over each question's G rows, as GRPO does: [B, T]."""
    # A question that is answered well once in a while then weighs more than its rewards say. That
    # is a bias (Liu et al. 2025, arXiv 2503.20783), and it keeps rare kinds of solutions alive.
    of_group = (-1, group * mask.shape[1])
    squares = (advantages**2 * mask).reshape(of_group).sum(1)  # [Q]
    tokens = mask.reshape(of_group).sum(1)  # [Q]
    # Equal rewards differ by rounding, which is no unit: at least 1e-4.
    scale = (squares / tokens).sqrt().clamp(min=1e-4)
    return advantages / scale.repeat_interleave(group)[:, None] * mask


def grpo_advantages(outcomes: torch.Tensor, group: int) -> torch.Tensor:
    """A = (R - mean R) / std R over the G samples of a question (Shao et al. 2024, eq. 3): [B].

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 1., -1.,  0.,  0.])
    """
    grouped = outcomes.view(-1, group)  # [Q, G]
    centred = grouped - grouped.mean(1, keepdim=True)
    deviation = grouped.std(1, unbiased=False, keepdim=True)
    # A group whose outcomes are all alike teaches nothing: its advantages are 0, not 0 / 0.
    return (centred / deviation.clamp(min=1e-6)).flatten()


# 4. Losses: one value per token, 0 outside the response ---------------------------------------
# A step's loss is their sum, divided by the number of response tokens of the whole batch.


def reinforce_loss(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """-A_t log pi(a_t|s_t): its gradient is the policy gradient (Williams 1992).

    >>> reinforce_loss(torch.tensor([-1.0]), torch.tensor([2.0]))
    tensor([2.])
    """
    # d/d theta of -A log pi is -A grad log pi, whose mean over samples is -grad E[return].
    return -advantages.detach() * logprobs


def ppo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> torch.Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = pi / pi_old (1707.06347, eq. 7).

    >>> old, new = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
    >>> ppo_loss(new, old, torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    # Textbook PPO has, and this has not:
    #     a learned critic with GAE    the question's other samples are the baseline, without a
    #                                  second network that would have to be right first
    #     reshuffled minibatches       one pass over a rollout (--epochs 1) is nearly on-policy
    #     an entropy bonus             -alpha log pi is in the reward already
    # On the first pass ratio = 1: the loss is -A, whose mean is 0 for centred advantages, yet the
    # gradient is REINFORCE's. A loss of zero is no sign of a dead run.
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    # The smaller of the two: a ratio that has gone far enough has no gradient, one that went the
    # wrong way keeps it.
    advantages = advantages.detach()
    return -torch.min(ratio * advantages, clipped * advantages)


def kl_k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) per token from the sampled one: e^d - d - 1, d = log pi_ref - log pi.

    >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.])
    """
    # Never negative, and unbiased for samples of pi (Schulman 2020, 'Approximating KL divergence',
    # k3). As a loss, which it is in GRPO too, its gradient on such samples is that of
    # KL(pi_ref || pi): E_pi[1 - pi_ref / pi] d log pi.
    d = reference_logprobs - logprobs
    # expm1(d) is e^d - 1 without the rounding of e^d near 1.
    return torch.expm1(d) - d


# 5. Updates -----------------------------------------------------------------------------------


def make_optimizer(model, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay: a policy that starts from a pretrained model stays near it."""
    # betas: the customary 0.999 remembers 1,000 steps of squares, longer than a whole run.
    return parallel.make_optimizer(
        torch.optim.AdamW,
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )


def set_rate(optimizer, peak: float, steps_done: int, steps: int, warm_up: float = 0.1) -> None:
    """Linear warm-up over the first tenth of `steps`, then linear decay to 0."""
    # Without the decay a small policy ends wherever the last noisy step has left it: several
    # points lower.
    rise = (steps_done + 1) / max(1, warm_up * steps)
    fall = 1 - steps_done / steps
    set_constant_rate(optimizer, peak * max(0.0, min(1.0, rise, fall)))


def set_constant_rate(optimizer, rate: float) -> None:
    """One rate for all parameters, from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_step(optimizer, loss: float, max_norm: float = 1.0) -> dict:
    """Sum the gradients of all processes, clip their norm, step, clear. loss: of all processes.

    Returns {"loss", "grad_norm" (before clipping), "skipped"}.
    """
    # "skipped" counts the steps left out since the optimizer was made. It lives in the optimizer's
    # state, so that a resumed run goes on counting. train.py stops when three in a row are.
    first = optimizer.param_groups[0]
    first.setdefault("skipped", 0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    # One NaN in AdamW's averages would stay there for ever: then nobody steps.
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    else:
        first["skipped"] += 1
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": norm, "skipped": first["skipped"]}


@torch.no_grad()
def divide_logits(model, divisor: float) -> None:
    """Change the weights so that all logits come out divided: a policy at a temperature, for good.

    UserError, and the weights as before, if that cannot be.
    """
    tokens = loading.ordinary_tokens(model)  # [1, n]
    before = model(tokens).logits.float()  # [1, n, V]
    norm = getattr(model.get_decoder(), "norm", None)
    # Of logits that are all 0 nothing could be seen.
    if norm is not None and before.norm() > 0:
        weight = norm.weight.clone()
        # Logits are linear in what the last norm scales (unless they are capped), so its weight w
        # is divided. Gemma's norms scale by 1 + w: there w becomes (1 + w) / divisor - 1.
        for offset in (0.0, 1.0):
            norm.weight.copy_((offset + weight) / divisor - offset)
            after = model(tokens).logits.float()
            if (after * divisor - before).norm() <= 1e-2 * before.norm():
                return
        norm.weight.copy_(weight)
    raise UserError(
        "this model's logits cannot be divided by scaling its last norm: use --start base"
    )


def main() -> None:
    """Sample four responses, and compare their log-probabilities with a fresh forward pass."""
    loading.quiet()
    model, tokenizer = loading.load_policy(loading.BASE)
    (example,) = data.tokenize(tokenizer, data.load_examples("words", "test", 1))
    end_tokens = data.end_tokens(tokenizer, model)
    generator = torch.Generator().manual_seed(0)
    sampled = sample(model, [example.prompt], end_tokens, 64, group=4, generator=generator)
    print(example.question, "\n")
    for row in range(4):
        text = data.decode(tokenizer, sampled.batch.response(row)).replace("\n", " ")
        print(f"{text}   log pi = {float(sampled.logprobs[row].sum()):.2f}")
    again = token_logprobs(model, sampled.batch).detach()
    difference = float((again - sampled.logprobs).abs().max())
    print(f"\nlargest difference from a fresh forward pass: {difference:.1e}")


if __name__ == "__main__":
    main()
