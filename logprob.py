"""log pi(a|s) from hidden states and the output matrix, without ever holding all logits.

    1. logits            x = h W^T, softcap and temperature; log pi of every action of a few rows
    2. given tokens      token_logprobs: [N]. Any loss on them is ordinary autograd
    3. all actions       expected_reward_sum: E_{a~pi}[f - alpha log pi], its gradient written out
    4. fused kernels     --fused: Triton, on CUDA

Sizes: N rows (response tokens of a micro-batch), H the model's width, V the vocabulary.
hidden h [N, H], weight W [V, H], tokens [N].

With N = 8,192 and V = 151,936 one [N, V] is 5 GB, and autograd would keep several. So a block of
rows is multiplied at a time, its logits are used, and the next block takes their place.

Sums are float32 whatever the inputs are, float64 if those are. No second derivatives.
"""

import contextlib
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from engine.errors import UserError
from engine.loading import output_layer  # noqa: F401  (weight, softcap) of a model: for callers

# Numbers in one block of logits [R, V], which is multiplied at once: 128 MB of float32. With fewer
# rows the output matrix, 545 MB of a Qwen2.5-0.5B, would be read too often.
BLOCK = 2**25
# Numbers in a strip of a block, for what is done number by number: on a CPU 8 MB, which stay in
# its cache. A GPU wants few launches.
STRIP = {"cpu": 2**21, "cuda": 2**24}
# f of an action that the policy has and the reward has not: log of next to nothing.
NEVER = -100.0

# 1. Logits ----------------------------------------------------------------------------------------


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in the type that sums are made in: float32, or float64 where it is that already."""
    # A running sum in bf16, which has 8 significant bits, loses all that is below 1/256 of it.
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextlib.contextmanager
def float32_products(device: torch.device):
    """Inside, matrix products are float32 although autocast is on around it."""
    before = torch.get_float32_matmul_precision()
    # In bf16 a logit of 10 is off by 0.05, and PPO's ratio by as much. A card's tensor cores may
    # round float32 to TF32 here, 10 bits where bf16 has 7: several times as fast.
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x = h W^T: [N, V]."""
    with float32_products(hidden.device):
        return widened(hidden) @ widened(weight).T


def scaled(x: torch.Tensor, temperature: float = 1.0, softcap: float = 0.0) -> torch.Tensor:
    """Logits z as softmax takes them: x / temperature, after softcap * tanh(x / softcap) if > 0."""
    # Gemma 2 caps its logits (arXiv 2408.00118, section 2); the other families do not.
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    if temperature != 1:
        x = x / temperature
    return x


def through_scaled(grad_z: torch.Tensor, x: torch.Tensor, temperature: float, softcap: float):
    """dL/dx from dL/dz, where z = scaled(x): the chain rule."""
    # d tanh(y) / dy = 1 - tanh(y)^2
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


def strips(x: torch.Tensor) -> list[slice]:
    """The rows of a block [R, V], a strip at a time."""
    return row_pieces(*x.shape, STRIP.get(x.device.type, STRIP["cpu"]))


def add_gradients(grad_x, hidden, matrix, grad_hidden, grad_matrix) -> None:
    """The chain rule through x = h W^T, of one block: dL/dx [R, V], h [R, H], W [V, H].

    grad_hidden [R, H] is written. To grad_matrix [V, H], which all blocks share, is added; it is
    None where W is frozen.
    """
    with float32_products(grad_x.device):
        # grad h = (dL/dx) W
        grad_hidden.copy_(grad_x @ matrix)
        if grad_matrix is not None:
            # grad W = (dL/dx)^T h
            grad_matrix.addmm_(grad_x.T, widened(hidden))


# 2. Given tokens ----------------------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    # log pi(a_n | s_n) = z_a - log sum_v exp z_v, so d log pi(a) / dz_v = 1[v = a] - pi(v).

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, softcap):
        # No logits are kept for backward: it multiplies h W^T again. Only then is the loss known,
        # so there are four products of this size instead of three.
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.scale = (temperature, softcap)
        matrix = widened(weight)
        logprobs = torch.empty(len(hidden), dtype=matrix.dtype, device=hidden.device)
        for rows in row_pieces(len(hidden), len(matrix), BLOCK):
            log_pi = all_logprobs(hidden[rows], matrix, temperature, softcap)  # [R, V]
            logprobs[rows] = log_pi.gather(-1, tokens[rows, None]).squeeze(-1)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):  # [N]
        hidden, weight, tokens = ctx.saved_tensors
        matrix = widened(weight)
        grad_hidden = torch.empty_like(hidden, dtype=matrix.dtype)
        grad_matrix = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        for rows in row_pieces(len(hidden), len(matrix), BLOCK):
            x = product(hidden[rows], matrix)  # [R, V]
            for strip in strips(x):
                grad = grad_logprobs[rows][strip, None]
                # -pi(v) for every action, and 1 more for the given one
                grad_z = -grad * scaled(x[strip], *ctx.scale).softmax(-1)
                grad_z.scatter_add_(-1, tokens[rows][strip, None], grad)
                # dL/dx takes the place of x
                x[strip] = through_scaled(grad_z, x[strip], *ctx.scale)
            add_gradients(x, hidden[rows], matrix, grad_hidden[rows], grad_matrix)
            # before the next block is made
            del x
        return grad_hidden, grad_matrix, None, None, None


def token_logprobs(hidden, weight, tokens, temperature=1.0, softcap=0.0) -> torch.Tensor:
    """log pi(tokens): [N], with a gradient for hidden and weight, whatever loss is made of it.

    >>> token_logprobs(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]))
    tensor([-0.6931])
    """
    # torch.nn.functional.linear_cross_entropy does the same with three products. It is not used:
    # torch 2.11 has none, and it knows neither softcap nor a loss other than -log pi.
    if FUSED is not None and hidden.is_cuda:
        return FUSED(hidden, weight, tokens, temperature, softcap)
    return _TokenLogprobs.apply(hidden, weight, tokens, temperature, softcap)


# 3. All actions -----------------------------------------------------------------------------------


def worth(log_pi: torch.Tensor, f: torch.Tensor, alpha: float) -> torch.Tensor:
    """u = f - alpha log pi, what each action is worth: [N, V], [N, V'] -> [N, V]."""
    # Models of a family pad their matrices differently. Each softmax is over its own columns; then
    # f is cut, or filled, to those of the policy.
    f = pad(f, (0, log_pi.shape[1] - f.shape[1]), value=NEVER)
    return torch.sub(f, log_pi, alpha=alpha)


def expectation(log_pi: torch.Tensor, f: torch.Tensor, alpha: float) -> torch.Tensor:
    """E_{a~pi}[f(s,a) - alpha log pi(a|s)] over the whole vocabulary: [N, V], [N, V] -> [N].

    >>> expectation(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    tensor([2.])
    """
    # A likelihood scores every action at once. So what REINFORCE estimates from one sampled token
    # is summed exactly, for as far as the next token goes: at gamma = 0 that is the whole return.
    # (Ours. The paper samples, as it must: its head scores one action at a time.)
    return (log_pi.exp() * worth(log_pi, f, alpha)).sum(-1)


def expectation_gradient(log_pi: torch.Tensor, f: torch.Tensor, alpha: float):
    """(`expectation` [N], its gradient for the policy's logits z [N, V]), log pi = log softmax z.

    >>> expectation_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    (tensor([2.]), tensor([[-0.5000,  0.5000]]))
    """
    pi = log_pi.exp()  # [N, V]
    u = worth(log_pi, f, alpha)  # [N, V]
    mean = (pi * u).sum(-1, keepdim=True)  # [N, 1], E_{a~pi}[u]
    # pi stands in E[u] = sum_a pi(a) u(a) twice, as the weight and within u:
    #     dE / d log pi(a)      = pi(a) (u(a) - alpha)
    #     d log pi(a) / d z(v)  = 1[v = a] - pi(v)
    #     dE / d z(v)           = pi(v) (u(v) - alpha) - pi(v) sum_a pi(a) (u(a) - alpha)
    #                           = pi(v) (u(v) - E[u])
    # alpha falls out, for the pi(a) sum to 1. Actions worth more than the mean go up, the others
    # down, and nobody had to be sampled. In place, since a block is large.
    return mean.squeeze(-1), u.sub_(mean).mul_(pi)


class _ExpectedRewardSum(torch.autograd.Function):
    # A sum is a loss itself: its gradient is taken in forward, while the logits are there. Three
    # products of the policy's size are enough.

    @staticmethod
    def forward(ctx, hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap):
        matrix = widened(weight)
        # With adapters policy and reward have one base, and one output matrix.
        reward_matrix = matrix if reward_weight is weight else widened(reward_weight)
        grad_hidden = torch.empty_like(hidden, dtype=matrix.dtype)
        grad_matrix = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=matrix.dtype, device=hidden.device)
        for rows in row_pieces(len(hidden), len(matrix), BLOCK):
            x = product(hidden[rows], matrix)  # [R, V]
            y = product(reward_hidden[rows], reward_matrix)  # [R, V']
            for strip in strips(x):
                log_pi = scaled(x[strip], temperature, softcap).log_softmax(-1)
                # f is no policy that samples: its temperature is 1.
                f = scaled(y[strip], 1.0, softcap).log_softmax(-1)
                mean, grad_z = expectation_gradient(log_pi, f, alpha)
                total += mean.sum()
                # dL/dx takes the place of x
                x[strip] = through_scaled(grad_z, x[strip], temperature, softcap)
            add_gradients(x, hidden[rows], matrix, grad_hidden[rows], grad_matrix)
            # before the next blocks are made
            del x, y
        ctx.save_for_backward(grad_hidden, grad_matrix)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # a number
        # In place: one more [V, H] would be as large as all else. So there is no second backward.
        grad_hidden, grad_matrix = ctx.saved_tensors
        grad_hidden.mul_(grad)
        if grad_matrix is not None:
            grad_matrix.mul_(grad)
        return grad_hidden, grad_matrix, None, None, None, None, None


def expected_reward_sum(
    hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0
) -> torch.Tensor:
    """sum_n E_{a~pi}[f(s_n,a) - alpha log pi(a|s_n)]: a number. The gradient is through pi alone.

    f is the log softmax of the reward's own logits, from its hidden states [N, H'] and its matrix
    [V', H'].

    >>> h, W = torch.zeros(2, 3), torch.ones(2, 3)
    >>> expected_reward_sum(h, W, h, torch.ones(4, 3), alpha=1.0)  # twice log 1/4 - log 1/2
    tensor(-1.3863)
    """
    return _ExpectedRewardSum.apply(
        hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap
    )


# 4. Fused kernels ---------------------------------------------------------------------------------

# What --fused puts here: a function like token_logprobs, for CUDA. It is off by default, since
# `python -m experiments.bench` found it slower than the blocks on the one card that was tried.
FUSED: Callable | None = None


def use_fused(device: torch.device) -> None:
    """From now on `token_logprobs` is engine/fused.py's kernel. UserError where that cannot run."""
    global FUSED
    if device.type != "cuda":
        raise UserError(f"--fused needs a GPU with CUDA, and this is '{device}': leave it out")
    try:
        from engine import fused
    except ImportError:
        raise UserError("--fused needs Triton: pip install triton, or leave it out") from None
    FUSED = fused.token_logprobs
