"""log pi(a|s) from hidden states and the output matrix, without ever holding all logits.

    1. logits            x = h W^T, softcap and temperature; log pi of every action of a few rows
    2. given tokens      token_logprobs: [N]. Any loss on them is ordinary autograd
    3. all actions       expected_reward_sum: E_{a~pi}[f - alpha log pi], its gradient written out
    4. entropies         of each row, to look at
    5. fused kernels     --fused: Triton, on CUDA

Sizes: N rows (response tokens of a micro-batch), H the model's width, V the vocabulary.
hidden h [N, H], weight W [V, H], tokens [N].

With N = 8,192 and V = 151,936 one [N, V] is 5 GB, and autograd would keep several. So a block of
rows is multiplied at a time, its logits are used, and the next block takes their place. What
autograd would have kept for backward is made again there, or used up at once:

    token_logprobs        backward multiplies h W^T again, for only then is the loss known: four
                          products of this size (x twice, grad h, grad W) instead of three
    expected_reward_sum   is the loss itself, so its gradient is taken in forward: three products

torch.nn.functional.linear_cross_entropy does the first with three products. It is not used: older
versions of torch do not have it, it knows no softcap and no loss but -log pi, and a second way
beside this one would make more code, not less.

Sums are float32 whatever the inputs are, float64 if those are. No second derivatives.
"""

import contextlib
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from engine.errors import UserError
from engine.loading import output_layer  # noqa: F401  (weight, softcap) of a model: for callers

# Numbers in one block of logits, [R, V], that are multiplied at once (128 MB): with fewer rows the
# matrix would be read too often. And of a strip of it, for what is done number by number: on a CPU
# it is to stay in the cache (8 MB), while a GPU wants few launches.
BLOCK = 2**25
STRIP = {"cpu": 2**21, "cuda": 2**24}

# 1. Logits ----------------------------------------------------------------------------------------


def sum_type(hidden: torch.Tensor) -> torch.dtype:
    """What sums are made in: float32, or float64 where the input is."""
    return torch.promote_types(hidden.dtype, torch.float32)


@contextlib.contextmanager
def float32_products(device: torch.device):
    """Inside, matrix products are float32 although autocast is on around it.

    In bf16 a logit of 10 is off by 0.05, and PPO's ratio by as much. On CUDA the tensor cores may
    round float32 inputs to TF32: 10 bits after the point where bf16 has 7, so an eighth of bf16's
    error, and none where h and W are bf16 themselves. It is several times as fast there.
    """
    on_cuda = device.type == "cuda"
    before = torch.get_float32_matmul_precision()
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if on_cuda:
            torch.set_float32_matmul_precision(before)


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x = h W^T: [N, V]."""
    kind = sum_type(hidden)
    with float32_products(hidden.device):
        return hidden.to(kind) @ weight.to(kind).T


def scaled(x: torch.Tensor, temperature: float = 1.0, softcap: float = 0.0) -> torch.Tensor:
    """Logits z as softmax takes them: x / temperature. With softcap > 0, x becomes
    softcap * tanh(x / softcap) first (Gemma 2, arXiv 2408.00118, section 2)."""
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    if temperature != 1:
        x = x / temperature
    return x


def through_scaled(grad_z: torch.Tensor, x: torch.Tensor, temperature: float, softcap: float):
    """dL/dx from dL/dz, where z = scaled(x): the chain rule, for dtanh(y) = (1 - tanh(y)^2) dy."""
    if softcap:
        grad_z = grad_z * (1 - torch.tanh(x / softcap) ** 2)
    if temperature != 1:
        grad_z = grad_z / temperature
    return grad_z


def all_logprobs(hidden, weight, temperature: float = 1.0, softcap: float = 0.0) -> torch.Tensor:
    """log pi of every action, log softmax(h W^T): [N, V]. For few rows: it holds them all.

    >>> all_logprobs(torch.tensor([[1.0]]), torch.tensor([[1.0], [4.0]]).log()).exp()
    tensor([[0.2000, 0.8000]])
    """
    return scaled(product(hidden, weight), temperature, softcap).log_softmax(-1)


def row_pieces(count: int, columns: int, numbers: int) -> list[slice]:
    """0..count in pieces of so many rows that a piece has at most these numbers, but one row.

    >>> row_pieces(count=5, columns=10, numbers=20)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    rows = max(1, numbers // columns)
    return [slice(start, start + rows) for start in range(0, count, rows)]


def row_blocks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    """0..N in pieces whose logits are a block."""
    return row_pieces(len(hidden), len(weight), BLOCK)


def strips(x: torch.Tensor) -> list[slice]:
    """The rows of a block [R, V] in strips."""
    return row_pieces(*x.shape, STRIP.get(x.device.type, STRIP["cpu"]))


class Gradients:
    """grad h [N, H] and grad W [V, H], or None where W is frozen, added up block by block.

    x = h W^T, so grad h = (dL/dx) W and grad W = (dL/dx)^T h.
    """

    def __init__(self, hidden: torch.Tensor, matrix: torch.Tensor, learns_matrix: bool):
        self.hidden = hidden.to(matrix.dtype)
        self.matrix = matrix
        self.of_hidden = torch.empty_like(self.hidden)
        self.of_matrix = torch.zeros_like(matrix) if learns_matrix else None

    def add(self, rows: slice, grad_x: torch.Tensor) -> None:
        """Of a block: dL/dx, [R, V]."""
        with float32_products(grad_x.device):
            self.of_hidden[rows] = grad_x @ self.matrix
            if self.of_matrix is not None:
                self.of_matrix.addmm_(grad_x.T, self.hidden[rows])


# 2. Given tokens ----------------------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """log pi(a_n | s_n) = z_a - log sum_v exp z_v, so d log pi(a) / dz_v = 1[v = a] - pi(v)."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, softcap):
        ctx.save_for_backward(hidden, weight, tokens)  # and no logits
        ctx.scale = (temperature, softcap)
        matrix = weight.to(sum_type(hidden))  # once, not for each block
        logprobs = torch.empty(len(hidden), dtype=matrix.dtype, device=hidden.device)
        for rows in row_blocks(hidden, matrix):
            log_pi = all_logprobs(hidden[rows], matrix, *ctx.scale)  # [R, V]
            logprobs[rows] = log_pi.gather(-1, tokens[rows, None]).squeeze(-1)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):  # [N]
        hidden, weight, tokens = ctx.saved_tensors
        matrix = weight.to(sum_type(hidden))
        gradients = Gradients(hidden, matrix, ctx.needs_input_grad[1])
        for rows in row_blocks(hidden, matrix):
            x = product(hidden[rows], matrix)  # [R, V], once more
            for strip in strips(x):
                grad = grad_logprobs[rows][strip, None]
                token = tokens[rows][strip, None]
                grad_z = -grad * scaled(x[strip], *ctx.scale).softmax(-1)  # for every action,
                grad_z.scatter_add_(-1, token, grad)  # and more for the given one
                x[strip] = through_scaled(grad_z, x[strip], *ctx.scale)
            gradients.add(rows, x)  # by now dL/dx
            del x  # before the next one is made
        return gradients.of_hidden, gradients.of_matrix, None, None, None


def token_logprobs(hidden, weight, tokens, temperature=1.0, softcap=0.0) -> torch.Tensor:
    """log pi(tokens): [N], with a gradient for hidden and weight, whatever loss is made of it.

    >>> token_logprobs(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]))
    tensor([-0.6931])
    """
    if FUSED is not None and hidden.is_cuda:
        return FUSED(hidden, weight, tokens, temperature, softcap)
    return _TokenLogprobs.apply(hidden, weight, tokens, temperature, softcap)


# 3. All actions -----------------------------------------------------------------------------------


def worth(log_pi: torch.Tensor, f: torch.Tensor, alpha: float) -> torch.Tensor:
    """u = f - alpha log pi: what each action is worth. [N, V], 0 for padding.

    The matrices of policy and reward may be padded to different V. Each softmax is over its own
    columns, and an action that only one of them has is padding.
    """
    both = min(log_pi.shape[1], f.shape[1])
    u = torch.zeros_like(log_pi)
    u[:, :both] = torch.sub(f[:, :both], log_pi[:, :both], alpha=alpha)
    return u


def expectation(log_pi: torch.Tensor, f: torch.Tensor, alpha: float) -> torch.Tensor:
    """E_{a~pi}[f(s,a) - alpha log pi(a|s)] over the whole vocabulary: [N, V], [N, V] -> [N].

    A likelihood reward scores every action at once, so what REINFORCE estimates from one sampled
    token is summed exactly: with a gradient through pi an objective (horizon: the next token),
    without it the best baseline for the immediate reward.

    >>> expectation(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    tensor([2.])
    """
    return (log_pi.exp() * worth(log_pi, f, alpha)).sum(-1)


def expectation_gradient(log_pi: torch.Tensor, f: torch.Tensor, alpha: float):
    """(E_{a~pi}[u]: [N], its gradient for the policy's logits z: [N, V]), u = f - alpha log pi.

    Where policy and reward have the same actions the gradient is pi (u - E[u]): actions worth more
    than the mean go up, the others down, and nobody had to be sampled. Step by step, for padding:

        d (pi u) / d log pi   = pi u - alpha pi =: d       u holds -alpha log pi itself
        d log pi(a) / d z(v)  = 1[v = a] - pi(v)
        d E[u] / d z          = d - pi sum_a d(a)          alpha falls out if all actions are in both

    >>> expectation_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    (tensor([2.]), tensor([[-0.5000,  0.5000]]))
    """
    pi = log_pi.exp()  # [N, V]
    u = worth(log_pi, f, alpha)  # [N, V]
    mean = (pi * u).sum(-1)  # E_{a~pi}[u]: [N]
    u[:, : f.shape[1]] -= alpha  # not of padding, which is worth 0 whatever pi is
    d = u.mul_(pi)
    return mean, d.sub_(pi.mul_(d.sum(-1, keepdim=True)))  # in place: a block is large


class _ExpectedRewardSum(torch.autograd.Function):
    """A sum is a loss, so dL/dx is used while x is there: forward takes the gradients, too."""

    @staticmethod
    def forward(ctx, hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap):
        matrix = weight.to(sum_type(hidden))
        reward_matrix = matrix  # of adapters on one base
        if reward_weight is not weight:
            reward_matrix = reward_weight.to(sum_type(reward_hidden))
        gradients = Gradients(hidden, matrix, ctx.needs_input_grad[1])
        total = torch.zeros((), dtype=matrix.dtype, device=hidden.device)
        for rows in row_blocks(hidden, matrix):
            x = product(hidden[rows], matrix)  # [R, V]
            y = product(reward_hidden[rows], reward_matrix)  # [R, V']
            for strip in strips(x):
                log_pi = scaled(x[strip], temperature, softcap).log_softmax(-1)
                f = scaled(y[strip], 1.0, softcap).log_softmax(-1)
                mean, grad_z = expectation_gradient(log_pi, f, alpha)
                total += mean.sum()
                x[strip] = through_scaled(grad_z, x[strip], temperature, softcap)
            gradients.add(rows, x)  # by now dL/dx
            del x, y  # before the next ones are made
        ctx.save_for_backward(gradients.of_hidden, gradients.of_matrix)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # a number
        # In place: one more [V, H] would be as large as all else. So there is no second backward.
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight.mul_(grad)
        return grad_hidden, grad_weight, None, None, None, None, None


def expected_reward_sum(
    hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0
) -> torch.Tensor:
    """sum_n E_{a~pi}[f(s_n,a) - alpha log pi(a|s_n)]: a number. The gradient is through pi alone.

    f is the log softmax of the reward's own logits, from its own hidden states [N, H'] and matrix
    [V', H'], at temperature 1 and with the same softcap.

    >>> h, W = torch.zeros(2, 3), torch.ones(2, 3)
    >>> expected_reward_sum(h, W, h, torch.ones(4, 3), alpha=1.0)  # twice log 1/4 - log 1/2
    tensor(-1.3863)
    """
    inputs = (hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap)
    if not torch.is_grad_enabled():  # which a Function is not told
        return expected_reward(*inputs).sum()
    return _ExpectedRewardSum.apply(*inputs)


@torch.no_grad()
def expected_reward(
    hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0
) -> torch.Tensor:
    """E_{a~pi}[f - alpha log pi] of each row, without a gradient: [N]. To look at, or a baseline.

    >>> h, W = torch.zeros(1, 3), torch.ones(2, 3)
    >>> expected_reward(h, W, h, torch.ones(4, 3), alpha=1.0)
    tensor([-0.6931])
    """
    matrix = weight.to(sum_type(hidden))
    reward_matrix = reward_weight.to(sum_type(reward_hidden))
    values = torch.empty(len(hidden), dtype=matrix.dtype, device=hidden.device)
    for rows in row_blocks(hidden, matrix):
        log_pi = all_logprobs(hidden[rows], matrix, temperature, softcap)  # [R, V]
        f = all_logprobs(reward_hidden[rows], reward_matrix, 1.0, softcap)  # [R, V']
        values[rows] = expectation(log_pi, f, alpha)
    return values


# 4. Entropies -------------------------------------------------------------------------------------


@torch.no_grad()
def entropies(hidden, weight, softcap=0.0) -> torch.Tensor:
    """-sum_a pi(a) log pi(a) of each row, without a gradient: [N].

    >>> entropies(torch.zeros(1, 3), torch.ones(2, 3))
    tensor([0.6931])
    """
    matrix = weight.to(sum_type(hidden))
    values = torch.empty(len(hidden), dtype=matrix.dtype, device=hidden.device)
    for rows in row_blocks(hidden, matrix):
        log_pi = all_logprobs(hidden[rows], matrix, 1.0, softcap)  # [R, V]
        values[rows] = -(log_pi.exp() * log_pi).sum(-1)
    return values


# 5. Fused kernels ---------------------------------------------------------------------------------

FUSED: Callable | None = None  # what --fused puts here: a function like token_logprobs, for CUDA


def use_fused(device: torch.device) -> None:
    """From now on `token_logprobs` is engine/fused.py's kernel. UserError where that cannot run.

    Off by default: `python -m experiments.bench` says on a card whether they pay there.
    """
    global FUSED
    if device.type != "cuda":
        raise UserError(f"--fused needs a GPU with CUDA, and this is '{device}': leave it out")
    try:
        from engine import fused
    except ImportError:
        raise UserError("--fused needs Triton: pip install triton, or leave it out") from None
    FUSED = fused.token_logprobs
