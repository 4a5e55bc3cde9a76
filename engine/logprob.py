"""log pi(a|s), and what is summed over all actions, from hidden states and the output matrix, without ever holding [N, V].

    1. equations        of logits x [R, V], one number per row: log pi, E_{a~pi}[f - alpha log pi]
    2. by rows          such a function of a few rows of [N, V] at a time, and its gradients
    3. what is called   logprobs, entropies, expected_reward: [N]; loss_sum, expected_reward_sum: what training takes

With N = 8,192 response tokens and V = 151,936 one [N, V] tensor is 5 GB, and autograd keeps several: few logits are taken so.
By rows, x of 256 rows is multiplied at a time, and autograd differentiates 16 of them at a time. What becomes of dL/dx is
written out: x = h W^T, so grad h = (dL/dx) W, grad W = (dL/dx)^T h. A sum has its gradients computed in forward, while x is
there: three products, and the loss must be known at once. Numbers per row may go into any loss: backward multiplies x again.

hidden [N, H], weight [V, H], tokens [N]. Sums are float32 whatever the inputs are, float64 if those are; autocast does not
reach them, for bf16 logits are off by 0.05, and so would be PPO's ratio. No second derivatives.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

# None, or a function that takes what `logprobs` does, for CUDA: the Triton kernels of experiments/fused.py wait there until
# experiments.bench has shown on a GPU that they pay.
FUSED: Callable | None = None

# 1. Equations ---------------------------------------------------------------------------------------------------


def scaled(x: torch.Tensor, temperature: float = 1.0, softcap: float = 0.0) -> torch.Tensor:
    """Logits as softmax takes them: x / temperature. With softcap > 0, x becomes softcap * tanh(x / softcap) first (Gemma 2,
    arXiv 2408.00118, section 2)."""
    x = softcap * torch.tanh(x / softcap) if softcap else x
    return x if temperature == 1 else x / temperature


def of_tokens(x: torch.Tensor, tokens: torch.Tensor, temperature: float, softcap: float) -> torch.Tensor:
    """log pi(tokens) of logits x [R, V]: [R]."""
    return scaled(x, temperature, softcap).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def expectation(policy_logprobs: torch.Tensor, all_scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """E_{a~pi}[f(s,a) - alpha log pi(a|s)] over the whole vocabulary: [N, V], [N, V] -> [N].

    A likelihood reward scores every action at once, so what REINFORCE estimates from one sampled token is summed exactly: with
    a gradient through pi an objective (horizon: the next token), without it the best baseline for the immediate reward.

    >>> expectation(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    tensor([2.])
    """
    return (policy_logprobs.exp() * (all_scores - alpha * policy_logprobs)).sum(-1)


def all_logprobs(hidden: torch.Tensor, weight: torch.Tensor, temperature=1.0, softcap=0.0) -> torch.Tensor:
    """log pi of every action, log softmax(h W^T): [N, V].

    >>> all_logprobs(torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]).log1p()).exp()  # logits log 1, log 4
    tensor([[0.2000, 0.8000]])
    """
    return scaled(product(hidden, weight), temperature, softcap).log_softmax(-1)


# 2. By rows -----------------------------------------------------------------------------------------------------

SMALL = 2**22  # N * V up to which plain is as fast, on two CPU cores; it is 16 MB a tensor
ROWS = 256  # of [N, V] that are held at once: with fewer, the matrix would be read too often
STRIP = 16  # of them, those that are differentiated at once: autograd keeps several [STRIP, V], best in a cache
COLUMNS = 4096  # of a matrix in half precision, those that are made float32 at once


def sum_type(hidden: torch.Tensor) -> torch.dtype:
    """What we add up in: float32, or float64 where the input is."""
    return torch.promote_types(hidden.dtype, torch.float32)


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x = h W^T: [N, V]."""
    kind = sum_type(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.to(kind) @ weight.to(kind).T


def spans(start: int, stop: int, size: int) -> list[slice]:
    """start..stop in pieces of `size`."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def pieces(weight: torch.Tensor, kind: torch.dtype):
    """(columns of x, their rows of the matrix as `kind`): all at once, or some at a time where that takes a copy."""
    for columns in spans(0, len(weight), len(weight) if weight.dtype == kind else COLUMNS):
        yield columns, weight[columns].to(kind)


def multiplied(hidden: torch.Tensor, weight: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """`product`, in the first rows of `memory`."""
    x = memory[: len(hidden)]
    for columns, some in pieces(weight, x.dtype):
        torch.mm(hidden.to(x.dtype), some.T, out=x[:, columns])  # `out`: autocast leaves it alone
    return x


def by_rows(function: Callable, wanted: tuple[bool, bool], hidden, weight, *other) -> tuple:
    """(function(rows, x [R, V]) -> [R] of all rows: [N]; the gradients of its sum for hidden and weight, None if not `wanted`).
    `rows` is a slice of 0..N; of a second (hidden, weight), `other`, the function gets the logits too."""
    kind, learns, factors = sum_type(hidden), any(wanted), [(hidden, weight), *[other] * bool(other)]
    values = torch.zeros(len(hidden), dtype=kind, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden, dtype=kind) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=kind) if wanted[1] else None
    # One block for all: a new one would be made before the last is gone.
    memory = [values.new_empty(min(ROWS, len(hidden)), len(w)) for _, w in factors]
    for block in spans(0, len(hidden), ROWS):
        logits = [multiplied(h[block], w, m) for (h, w), m in zip(factors, memory)]
        for rows, x, *others in zip(spans(block.start, block.stop, STRIP), *(z.split(STRIP) for z in logits)):
            with torch.set_grad_enabled(learns):
                leaf = x.detach().requires_grad_(learns)
                value = function(rows, leaf, *others)
                if learns:
                    x.copy_(torch.autograd.grad(value.sum(), leaf)[0])  # dL/dx, where x was
            values[rows] = value.detach()
        if wanted[0]:
            for columns, some in pieces(weight, kind):
                grad_hidden[block].addmm_(logits[0][:, columns], some)
        if wanted[1]:
            grad_weight.addmm_(logits[0].T, hidden[block].to(kind))
    return values, grad_hidden, grad_weight


class _ByRows(torch.autograd.Function):
    """The values of `by_rows`; or, with `now`, their sum, whose gradients are computed during forward."""

    @staticmethod
    def forward(ctx, function, now, *inputs):
        values, *gradients = by_rows(function, ctx.needs_input_grad[2:4] if now else (False, False), *inputs)
        ctx.function, ctx.now = function, now
        ctx.save_for_backward(*(gradients if now else inputs))
        return values.sum() if now else values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:4]
        if ctx.now:  # in place: another copy of the matrix would cost as much as all else. (A second backward is an error.)
            gradients = [None if g is None else g.mul_(grad) for g in saved]
        else:
            gradients = by_rows(lambda rows, *x: grad[rows] * ctx.function(rows, *x), wanted, *saved)[1:]
        return None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 4)


def evaluate(function: Callable, total: bool, hidden, weight, *other) -> torch.Tensor:
    """function(rows, x) of all rows, [N], or their `total`, a number; plain or `by_rows`. Gradients go to hidden and weight."""
    if len(hidden) * len(weight) <= SMALL and weight.dtype == sum_type(hidden):  # plain: any other type would be copied
        values = function(slice(0, len(hidden)), product(hidden, weight), *([product(*other).detach()] if other else []))
    else:  # a Function is not told that gradients are switched off
        values = _ByRows.apply(function, total and torch.is_grad_enabled(), hidden, weight, *other)
    return values.sum() if total else values


# 3. What is called ----------------------------------------------------------------------------------------------


def logprobs(hidden, weight, tokens, temperature=1.0, softcap=0.0) -> torch.Tensor:
    """log pi(tokens): [N].

    >>> logprobs(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]))
    tensor([-0.6931])
    """
    if FUSED and hidden.is_cuda:
        return FUSED(hidden, weight, tokens, temperature, softcap)
    return evaluate(lambda rows, x: of_tokens(x, tokens[rows], temperature, softcap), False, hidden, weight)


def loss_sum(hidden, weight, tokens, loss: Callable, temperature=1.0, softcap=0.0) -> torch.Tensor:
    """sum_n loss(log pi, rows)_n of loss([R], slice of 0..N) -> [R], token by token: a number.

    >>> loss_sum(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]), lambda logp, rows: -2 * logp)
    tensor(1.3863)
    """
    if FUSED and hidden.is_cuda:
        return loss(logprobs(hidden, weight, tokens, temperature, softcap), slice(0, len(hidden))).sum()
    return evaluate(lambda rows, x: loss(of_tokens(x, tokens[rows], temperature, softcap), rows), True, hidden, weight)


def entropies(hidden, weight, softcap=0.0) -> torch.Tensor:
    """-sum_a pi(a) log pi(a) of each row: [N].

    >>> entropies(torch.zeros(1, 3), torch.ones(2, 3))
    tensor([0.6931])
    """

    def of_rows(_, x):
        logp = scaled(x, 1.0, softcap).log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    return evaluate(of_rows, False, hidden, weight)


def expected_reward(hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0, total=False):
    """E_{a~pi}[f - alpha log pi], f = log softmax of the reward's logits: [N], or their `total`. The gradient is through pi only.

    The reward's logits have their own hidden states and matrix, the same softcap, and temperature 1. The matrices may be
    padded to different V: each softmax is over its own, the sum over the columns that both have.

    >>> expected_reward(torch.zeros(1, 3), torch.ones(2, 3), torch.zeros(1, 3), torch.ones(4, 3), alpha=1.0)
    tensor([-0.6931])
    """

    def of_rows(_, x, y):
        logp, f = scaled(x, temperature, softcap).log_softmax(-1), scaled(y, 1.0, softcap).log_softmax(-1)
        both = min(x.shape[1], y.shape[1])
        return expectation(logp[:, :both], f[:, :both], alpha)

    return evaluate(of_rows, total, hidden, weight, reward_hidden, reward_weight)


def expected_reward_sum(*inputs) -> torch.Tensor:
    """The sum of `expected_reward`: a number."""
    return expected_reward(*inputs, total=True)


def half_precision(device: torch.device):
    """bf16 matrix products in the layers on CUDA, float32 elsewhere. What trains and what is added up stays float32. Entered
    anew for each forward pass, because it caches the weights it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def output_layer(model) -> tuple[torch.Tensor, float]:
    """(output matrix [V, H], softcap): logits are softcap * tanh(W h / softcap), or W h where softcap is 0."""
    return model.get_output_embeddings().weight, getattr(model.config, "final_logit_softcapping", None) or 0.0
