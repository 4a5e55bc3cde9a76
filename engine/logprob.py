"""log pi(a|s) and entropy from hidden states and the output matrix, without ever holding [N, V].

    1. logprobs_plain     the specification, in four lines
    2. logprobs_chunked   the same tile by tile, with its own backward: any device, float32, bf16 or float64
    3. loss_by_rows       a loss of them, its gradient computed during forward
    4. expected_reward_*  E_{a~pi}[f - alpha log pi] over the whole vocabulary: plain, tile by tile, its sum by rows
    5. logprobs_triton    part 2 as fused CUDA kernels
    6. logprobs, loss_sum, expected_reward, expected_reward_sum    pick one of them; the sums are what training takes

With N = 8,192 response tokens and V = 151,936 one [N, V] tensor is 5 GB, and autograd keeps several. Here a tile of it
lives at a time. What must be kept for backward is one number per row, the log-sum-exp; backward multiplies each tile of
logits again. That makes four matrix products where plain autograd needs three: the price, in time, of the memory. (Gradients
computed during forward would save the fourth, but forward does not know yet what each row's log-probability will be
multiplied by, and the gradient of the output matrix mixes all rows.) Part 3 is told the loss and needs three products,
for [256, V] held at a time; the exact loss needs four that way, six tile by tile. So that is what training takes, but in
half precision. (On one CPU thread of a busy machine, N = 512, V = 32,768, H = 896, without the entropy: tile by tile 1.13
times plain's time, by rows 0.90; the exact loss 1.08 and 0.75. `python -m experiments.bench` measures the former.)

hidden [N, H], weight [V, H], tokens [N]. Sums are float32 whatever the inputs are, float64 if those are; a gradient is
rounded to its input's type once, at the end. No second derivatives. The Triton kernels are tested in Triton's
interpreter, which has no bf16 products, and compile for NVIDIA's 9.0 without spilling registers; they have
neither run nor been timed on a GPU.

Run `python -m engine.logprob` for the distance from float64, and for time and memory of plain against chunked.
"""

import math
import subprocess
import sys
import time

import torch
from torch.autograd.function import once_differentiable

from engine import fused as kernels

# ---------------------------------------------------------------------------------------------------------------
# 1. The specification
# ---------------------------------------------------------------------------------------------------------------


def all_logprobs(hidden: torch.Tensor, weight: torch.Tensor, temperature=1.0, softcap=0.0) -> torch.Tensor:
    """log softmax(x), x = z / temperature, z = hidden weight^T: [N, V].

    With softcap > 0, z becomes softcap * tanh(z / softcap) first (Gemma 2, arXiv 2408.00118, section 2).

    >>> all_logprobs(torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]).log1p()).exp()  # logits log 1, log 4
    tensor([[0.2000, 0.8000]])
    """
    kind = sum_type(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(kind) @ weight.to(kind).T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)


def logprobs_plain(hidden, weight, tokens, temperature=1.0, softcap=0.0, entropy=True):
    """(log pi(tokens), entropy), both [N]; entropy = -sum_v p_v log p_v, or None where it is not asked for.

    >>> logprobs_plain(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]))
    (tensor([-0.6931]), tensor([0.6931]))
    """
    logp = all_logprobs(hidden, weight, temperature, softcap)  # [N, V]
    return logp.gather(-1, tokens[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1) if entropy else None


def sum_type(hidden: torch.Tensor) -> torch.dtype:
    """What we add up in: float32, or float64 where the input is."""
    return torch.promote_types(hidden.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# 2. Tile by tile
# ---------------------------------------------------------------------------------------------------------------


def spans(total: int, size: int) -> list[slice]:
    """0..total in pieces of `size`.

    >>> spans(5, 3)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def tile_size(chunk: tuple[int, int] | None, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile: worth waking the threads of a CPU, which on a busy machine wait for each other at every
    operation, and worth a kernel launch on a GPU."""
    return chunk or ((512, 2048) if device.type == "cpu" else (4096, 4096))


def tile_logits(hidden, weight, temperature, softcap, memory=None):
    """x of some rows and columns, [R, H] and [C, H] -> [R, C], in `memory` [R or more, C] if there is any. Scaling inside
    the product saves a pass over the tile. Products here and in backward are `out=` or in place: those autocast leaves
    in the type they are given."""
    x = hidden.new_empty(len(hidden), len(weight)) if memory is None else memory[: len(hidden)]
    torch.addmm(x, hidden, weight.T, beta=0, alpha=1 / (softcap or temperature), out=x)
    return x.tanh_().mul_(softcap / temperature) if softcap else x


class OnlineSoftmax:
    """log-sum-exp and expectations under softmax(x), x arriving in blocks of columns (Milakov & Gimelshein 2018).

    All sums are relative to the largest x so far, `top`; when a larger one turns up they shrink by exp(old - new).
    """

    def __init__(self, rows: int, expectations: int, like: torch.Tensor):
        self.top = like.new_full((rows,), -math.inf)  # [R]
        self.sums = like.new_zeros(1 + expectations, rows)  # sum_v e^{x_v - top} (1, value, value, ..)

    def add(self, x: torch.Tensor, *values: torch.Tensor) -> None:
        """A block x [R, C], and what to take the expectations of: each [R, C or fewer], zero in the columns it lacks."""
        top = torch.maximum(self.top, x.amax(-1))
        e = (x - top[:, None]).exp_()
        block = [e.sum(-1)] + [(e[:, : v.shape[1]] * v).sum(-1) for v in values]
        self.sums = self.sums * (self.top - top).exp() + torch.stack(block)
        self.top = top

    def result(self) -> list[torch.Tensor]:
        """[log-sum-exp, expectation, ..], each [R]."""
        return [self.top + self.sums[0].log(), *(self.sums[1:] / self.sums[0])]


def gradients(hidden, weight, temperature, softcap, chunk, wanted, tile_gradient):
    """(grad hidden, grad weight) from tile_gradient(x, rows, columns) -> dL/dx [R, C], or None where not `wanted`.

    dL/dz = dL/dx (1 - tanh(z/c)^2) / T;  grad hidden = dL/dz weight;  grad weight = (dL/dz)^T hidden.
    Columns are the outer loop: a block of grad weight is finished, and rounded, before the next one starts.
    """
    (tile_rows, tile_columns), kind = tile_size(chunk, hidden.device), sum_type(hidden)
    grad_hidden = torch.zeros_like(hidden, dtype=kind) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    for columns in spans(len(weight), tile_columns):
        w = weight[columns].to(kind)  # [C, H]
        grad_w = torch.zeros_like(w)
        for rows in spans(len(hidden), tile_rows):
            h = hidden[rows].to(kind)  # [R, H]
            x = tile_logits(h, w, temperature, softcap)  # [R, C]
            slope = 1 - (x * (temperature / softcap)) ** 2 if softcap else None
            g = tile_gradient(x, rows, columns)  # [R, C]
            if softcap:
                g *= slope
            if wanted[0]:
                grad_hidden[rows].addmm_(g, w, alpha=1 / temperature)
            if wanted[1]:
                grad_w.addmm_(g.T, h, alpha=1 / temperature)
        if wanted[1]:
            grad_weight[columns] = grad_w
    return grad_hidden.to(hidden.dtype) if wanted[0] else None, grad_weight


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, softcap, entropy, chunk):
        (tile_rows, tile_columns), kind = tile_size(chunk, hidden.device), sum_type(hidden)
        lse, mean, chosen = (torch.zeros(len(hidden), dtype=kind, device=hidden.device) for _ in range(3))
        for rows in spans(len(hidden), tile_rows):
            h, softmax = hidden[rows].to(kind), OnlineSoftmax(len(hidden[rows]), int(entropy), lse)
            for columns in spans(len(weight), tile_columns):
                x = tile_logits(h, weight[columns].to(kind), temperature, softcap)
                column, here = tokens_in(tokens, rows, columns)
                chosen[rows] += x.gather(-1, column).squeeze(-1) * here
                softmax.add(x, *[x] * entropy)
            lse[rows], *expectations = softmax.result()
            if entropy:
                mean[rows] = expectations[0]
        ctx.settings = temperature, softcap, chunk
        return finish(ctx, hidden, weight, tokens, chosen, lse, lse - mean if entropy else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        """With l = log p: d logp_a / dx_v = 1[v = a] - p_v and d entropy / dx_v = -p_v (l_v + entropy)."""
        hidden, weight, tokens, lse, entropy = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 7

        def tile_gradient(x, rows, columns):
            per_row = (None if t is None else t[rows] for t in (lse, entropy, grad_logprob, grad_entropy))
            return logprob_gradient(x, *per_row, *tokens_in(tokens, rows, columns))

        return *gradients(hidden, weight, *ctx.settings, ctx.needs_input_grad, tile_gradient), *[None] * 5


def logprob_gradient(x, lse, entropy, grad_logprob, grad_entropy, column, here):
    """dL/dx of a tile, in the memory of x. Either gradient may be None; column and here are those of `tokens_in`."""
    x -= lse[:, None]  # log p
    if grad_entropy is None:
        g = x.exp_().mul_(-grad_logprob[:, None])
    else:
        factor = (x + entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logprob is not None:
            factor += grad_logprob[:, None]
        g = x.exp_().mul_(factor).neg_()
    if grad_logprob is not None:
        g.scatter_add_(-1, column, (grad_logprob * here)[:, None])
    return g


def tokens_in(tokens, rows, columns):
    """Where each row's token stands in a tile, [R, 1], and whether it is in that tile at all, [R]. (Picking out the
    rows that are would make the CPU wait for the GPU at every tile.)"""
    column, last = tokens[rows] - columns.start, columns.stop - columns.start - 1
    return column.clamp(0, last)[:, None], (column >= 0) & (column <= last)


def finish(ctx, hidden, weight, tokens, chosen, lse, entropy):
    """Save what backward needs; the outputs are log pi = x_a - lse and the entropy lse - E[x]."""
    ctx.save_for_backward(hidden, weight, tokens, lse, entropy)
    ctx.set_materialize_grads(False)  # an output that the loss did not use then costs nothing in backward
    return chosen - lse, entropy


def logprobs_chunked(hidden, weight, tokens, temperature=1.0, softcap=0.0, entropy=True, chunk=None):
    """`logprobs_plain`, holding one tile `chunk` = (rows, columns) of [N, V] at a time. The size changes nothing else.

    >>> logprobs_chunked(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]), chunk=(1, 1))
    (tensor([-0.6931]), tensor([0.6931]))
    """
    return _Logprobs.apply(hidden, weight, tokens, temperature, softcap, entropy, chunk)


# ---------------------------------------------------------------------------------------------------------------
# 3. A loss of them, its gradient computed during forward
# ---------------------------------------------------------------------------------------------------------------


class _ByRows(torch.autograd.Function):
    """The sum of L over blocks of rows. block(x [R, V], rows) -> (L of these rows, a function that returns dL/dx in the
    memory of x, or None where nothing is learnt from them)."""

    @staticmethod
    def forward(ctx, hidden, weight, block, temperature, softcap, tile_rows):
        (wants_hidden, wants_weight), kind = ctx.needs_input_grad[:2], sum_type(hidden)
        total, w = torch.zeros((), dtype=kind, device=hidden.device), weight.to(kind)
        grad_hidden = torch.zeros_like(hidden, dtype=kind) if wants_hidden else None
        grad_weight = torch.zeros_like(w) if wants_weight else None
        tile_rows = min(tile_rows or ROWS, len(hidden))
        memory = w.new_empty(tile_rows, len(w))  # one block for all, or a new one would be made before the last is gone
        for rows in spans(len(hidden), max(1, tile_rows)):
            h = hidden[rows].to(kind)
            x = tile_logits(h, w, temperature, softcap, memory)  # [R, V]
            value, gradient = block(x, rows)
            total += value
            if not (wants_hidden or wants_weight):
                continue
            slope = 1 - (x * (temperature / softcap)) ** 2 if softcap else None
            g = gradient()  # [R, V]
            if g is None:
                continue
            if softcap:
                g *= slope
            if wants_hidden:
                torch.addmm(grad_hidden[rows], g, w, beta=0, alpha=1 / temperature, out=grad_hidden[rows])
            if wants_weight:
                grad_weight.addmm_(g.T, h, alpha=1 / temperature)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # In place: a second copy of the matrix would cost as much as all tiles. (A second backward is then an error.)
        # Autograd rounds to the inputs' types.
        return *(None if g is None else g.mul_(grad) for g in ctx.saved_tensors), *[None] * 4


def sum_by_rows(hidden, weight, block, temperature, softcap, rows):
    """A number, with its gradients where they are wanted."""
    if not torch.is_grad_enabled():  # the function below is not told
        hidden, weight = hidden.detach(), weight.detach()
    return _ByRows.apply(hidden, weight, block, temperature, softcap, rows)


def loss_by_rows(hidden, weight, tokens, loss, temperature=1.0, softcap=0.0, entropy=False, rows=None):
    """sum_n loss(log pi, entropy or None, rows)_n, a few rows of [N, V] at a time: a number, with its gradients.

    loss([R], [R] or None, slice of 0..N) -> [R], row by row: REINFORCE's, PPO's. It is asked during forward, as soon as
    its rows' logits are there, and so they need not be multiplied again in backward: three products, as in plain
    autograd, and the loss must be known at once. Part 2 hands out log pi, and may be told any loss later.

    >>> loss_by_rows(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]), lambda logp, entropy, rows: -2 * logp)
    tensor(1.3863)
    """
    tiles = spans(len(weight), tile_size(None, hidden.device)[1])  # what is computed on the way stays small

    def block(x, rows):
        softmax = OnlineSoftmax(len(x), int(entropy), x)
        for columns in tiles:
            softmax.add(x[:, columns], *[x[:, columns]] * entropy)
        lse, *mean = softmax.result()
        outputs = [x.gather(-1, tokens[rows, None]).squeeze(-1) - lse] + [lse - m for m in mean]  # log pi, entropy
        with torch.enable_grad():
            outputs = [output.requires_grad_() for output in outputs]  # [R] each
            part = loss(*(outputs if entropy else (outputs[0], None)), rows).sum()

        def gradient():
            grads = torch.autograd.grad(part, outputs, allow_unused=True)
            if grads[0] is None and grads[-1] is None:
                return None
            per_row = lse, outputs[1].detach() if entropy else None, grads[0], grads[1] if entropy else None
            for columns in tiles:
                logprob_gradient(x[:, columns], *per_row, *tokens_in(tokens, rows, columns))
            return x

        return part.detach(), gradient

    return sum_by_rows(hidden, weight, block, temperature, softcap, rows)


# ---------------------------------------------------------------------------------------------------------------
# 4. The exact expectation of a likelihood reward
# ---------------------------------------------------------------------------------------------------------------


def expectation(policy_logprobs: torch.Tensor, all_scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """E_{a~pi}[f(s,a) - alpha log pi(a|s)] over the whole vocabulary: [N, V], [N, V] -> [N].

    A likelihood reward scores every action at once, so the expectation that REINFORCE estimates from one sampled token
    can be summed exactly. With a gradient through pi it is an objective (horizon: the next token); without, it is the
    best baseline for the immediate reward, since no other knows the state as well.

    >>> expectation(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 3.0]]), 0.0)
    tensor([2.])
    """
    return (policy_logprobs.exp() * (all_scores - alpha * policy_logprobs)).sum(-1)


def expected_reward_plain(hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0):
    """R = sum_v p_v (f_v - alpha log p_v), f = log softmax(reward logits): [N], with a gradient through pi only.

    The reward's logits have their own hidden state and matrix, the same softcap, and temperature 1. The matrices may be
    padded to different V: each softmax is over its own, the sum over the columns that both have.

    >>> expected_reward_plain(torch.zeros(1, 3), torch.ones(2, 3), torch.zeros(1, 3), torch.ones(4, 3), alpha=1.0)
    tensor([-0.6931])
    """
    logp = all_logprobs(hidden, weight, temperature, softcap)  # [N, V]
    f = all_logprobs(reward_hidden, reward_weight, 1.0, softcap).detach()  # [N, V']
    both = min(logp.shape[1], f.shape[1])
    return expectation(logp[:, :both], f[:, :both], alpha)


class ExpectedSums:
    """E_{a~pi}[f - alpha log pi] of some rows from tiles x of the policy's logits and y of the reward's, tile by tile;
    then its gradient."""

    def __init__(self, rows: int, alpha: float, like: torch.Tensor):
        self.alpha = alpha
        self.softmax, self.reward_softmax = OnlineSoftmax(rows, 2, like), OnlineSoftmax(rows, 0, like)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """[R, C] and [R, C'] of the same columns, but for those that one of the two lacks."""
        both = min(x.shape[1], y.shape[1])
        if x.shape[1]:  # f - alpha log p = y - alpha x, but for one constant per row
            self.softmax.add(x, y[:, :both] - self.alpha * x[:, :both], torch.ones_like(x[:, :both]))
        if y.shape[1]:
            self.reward_softmax.add(y)

    def result(self) -> torch.Tensor:
        """(R, the mass P of the columns that both have, log-sum-exp, the reward's): [4, R]."""
        (lse, mean, mass), (reward_lse,) = self.softmax.result(), self.reward_softmax.result()
        return torch.stack([mean - mass * (reward_lse - self.alpha * lse), mass, lse, reward_lse])


def expected_gradient(x, y, result, alpha):
    """dR/dx_u = p_u (1[u in both] (f_u - alpha log p_u - alpha) - (R - alpha P)) of a tile, in the memory of x; y is
    lost, too."""
    value, mass, lse, reward_lse = result[..., None]  # [R, 1] each
    x -= lse  # log p
    y -= reward_lse  # f
    both = min(x.shape[1], y.shape[1])
    factor = (alpha * mass - value).repeat(1, x.shape[1])
    factor[:, :both] += y[:, :both] - alpha * x[:, :both] - alpha
    return x.exp_().mul_(factor)


class _ExpectedReward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap, chunk):
        (tile_rows, tile_columns), kind = tile_size(chunk, hidden.device), sum_type(hidden)
        results = torch.zeros(4, len(hidden), dtype=kind, device=hidden.device)
        for rows in spans(len(hidden), tile_rows):
            h, reward_h = hidden[rows].to(kind), reward_hidden[rows].to(kind)
            sums = ExpectedSums(len(h), alpha, results)
            for columns in spans(max(len(weight), len(reward_weight)), tile_columns):
                w, reward_w = weight[columns].to(kind), reward_weight[columns].to(kind)  # one may have run out
                sums.add(tile_logits(h, w, temperature, softcap), tile_logits(reward_h, reward_w, 1.0, softcap))
            results[:, rows] = sums.result()
        ctx.save_for_backward(hidden, weight, reward_hidden, reward_weight, results)
        ctx.alpha, ctx.settings = alpha, (temperature, softcap, chunk)
        return results[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, reward_hidden, reward_weight, results = ctx.saved_tensors
        softcap = ctx.settings[1]

        def tile_gradient(x, rows, columns):
            reward_w, reward_h = reward_weight[columns].to(x.dtype), reward_hidden[rows].to(x.dtype)
            y = tile_logits(reward_h, reward_w, 1.0, softcap)  # [R, C or fewer]
            return expected_gradient(x, y, results[:, rows], ctx.alpha).mul_(grad[rows, None])

        return *gradients(hidden, weight, *ctx.settings, ctx.needs_input_grad, tile_gradient), *[None] * 6


def expected_reward_chunked(
    hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0, chunk=None
):
    """`expected_reward_plain`, holding one tile of either [N, V] at a time: six products, for both matrices' logits are
    multiplied again in backward."""
    return _ExpectedReward.apply(hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap, chunk)


def expected_reward_by_rows(
    hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0, rows=None
):
    """sum_n `expected_reward_plain`_n, a few rows of both [N, V] at a time, its gradient computed during forward: a
    number, for four products.

    >>> expected_reward_by_rows(torch.zeros(1, 3), torch.ones(2, 3), torch.zeros(1, 3), torch.ones(4, 3), alpha=1.0)
    tensor(-0.6931)
    """
    reward_w = reward_weight.to(sum_type(hidden))
    tiles = spans(max(len(weight), len(reward_weight)), tile_size(None, hidden.device)[1])

    def block(x, rows):
        y = tile_logits(reward_hidden[rows].to(x.dtype), reward_w, 1.0, softcap)  # [R, V']
        sums = ExpectedSums(len(x), alpha, x)
        for columns in tiles:
            sums.add(x[:, columns], y[:, columns])
        result = sums.result()

        def gradient():
            for columns in tiles:
                expected_gradient(x[:, columns], y[:, columns], result, alpha)
            return x

        return result[0].sum(), gradient

    return sum_by_rows(hidden, weight, block, temperature, softcap, rows)


# ---------------------------------------------------------------------------------------------------------------
# 6. Which one
# ---------------------------------------------------------------------------------------------------------------

ROWS = 256  # of [N, V] that are held at once by rows: with fewer, the matrix would be read too often
SMALL = 2**22  # N * V up to which plain is as fast, on two CPU cores; it is 16 MB a tensor
TRITON = False  # part 4 on CUDA: off until `python -m experiments.bench` has shown there that it pays


def logprobs(hidden, weight, tokens, temperature=1.0, softcap=0.0, entropy=True):
    """(log pi(tokens), entropy or None), both [N] float32: plain for few logits, chunked or (if TRITON) fused for many.

    >>> logprobs(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]), entropy=False)
    (tensor([-0.6931]), None)
    """
    hidden, weight = as_autocast(hidden, weight)
    method = logprobs_plain if few(hidden, weight) else logprobs_chunked
    if fused(hidden, weight):
        method = kernels.logprobs_triton
    return method(hidden, weight, tokens, temperature, softcap, entropy)


def expected_reward(hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0):
    """E_{a~pi}[f - alpha log pi], [N] float32: plain for few logits, chunked for many.

    >>> expected_reward(torch.zeros(1, 3), torch.ones(2, 3), torch.zeros(1, 3), torch.ones(2, 3), alpha=1.0)
    tensor([0.])
    """
    hidden, weight, reward_hidden, reward_weight = as_autocast(hidden, weight, reward_hidden, reward_weight)
    method = expected_reward_plain if few(hidden, weight) else expected_reward_chunked
    return method(hidden, weight, reward_hidden, reward_weight, alpha, temperature, softcap)


def loss_sum(hidden, weight, tokens, loss, temperature=1.0, softcap=0.0):
    """sum_n loss(log pi, None, rows)_n, what training takes: a number. Few logits: `logprobs`; many: by rows.

    >>> loss_sum(torch.zeros(1, 3), torch.ones(2, 3), torch.tensor([1]), lambda logp, entropy, rows: -2 * logp)
    tensor(1.3863)
    """
    hidden, weight = as_autocast(hidden, weight)
    if by_rows(hidden, weight):
        return loss_by_rows(hidden, weight, tokens, loss, temperature, softcap)
    logp, entropy = logprobs(hidden, weight, tokens, temperature, softcap, entropy=False)
    return loss(logp, entropy, slice(0, len(logp))).sum()


def expected_reward_sum(hidden, weight, reward_hidden, reward_weight, alpha, temperature=1.0, softcap=0.0):
    """sum_n `expected_reward`_n, what training takes: a number.

    >>> expected_reward_sum(torch.zeros(1, 3), torch.ones(2, 3), torch.zeros(1, 3), torch.ones(4, 3), alpha=1.0)
    tensor(-0.6931)
    """
    inputs = as_autocast(hidden, weight, reward_hidden, reward_weight)
    if by_rows(*inputs[:2]):
        return expected_reward_by_rows(*inputs, alpha, temperature, softcap)
    return expected_reward(*inputs, alpha, temperature, softcap).sum()


def few(hidden, weight) -> bool:
    """Whether [N, V] may be held. Not in half precision: plain would copy all of the weight."""
    return len(hidden) * len(weight) <= SMALL and weight.dtype == sum_type(hidden)


def by_rows(hidden, weight) -> bool:
    """Whether a sum is taken by rows: of many logits, but not in half precision, where it would hold copies of the
    matrices and a gradient in float32, nor where the fused kernels are wanted."""
    whole = weight.dtype == sum_type(hidden)
    return whole and not few(hidden, weight) and not fused(hidden, weight)


def fused(hidden, weight) -> bool:
    """Whether the Triton kernels are to be used, and can be."""
    kinds = {hidden.dtype, weight.dtype}
    return TRITON and kernels.triton is not None and hidden.is_cuda and kinds <= {torch.float32, torch.bfloat16}


def as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast to autocast's type where that is on, as a linear layer's inputs would be; sums stay float32."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [tensor.to(dtype or tensor.dtype) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------
# 7. What it saves
# ---------------------------------------------------------------------------------------------------------------


def measure(method: str, N: int, V: int, H: int, entropy: bool = True, repeats: int = 1) -> tuple[float, float]:
    """(seconds, MB beyond the inputs) of forward and backward, the best of `repeats`. Call it in a fresh process: what
    a process has once held it still counts."""
    import resource  # not on Windows

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator).div_(H**0.5).requires_grad_()
    tokens = torch.randint(V, (N,), generator=generator)
    torch.mm(hidden.detach()[:8], weight.detach()[:8].T)  # wakes the matrix library
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    before, best = peak(), math.inf
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        outputs = {"plain": logprobs_plain, "chunked": logprobs_chunked}[method](
            hidden, weight, tokens, entropy=entropy
        )
        sum(output.mean() for output in outputs if output is not None).backward()
        best = min(best, time.perf_counter() - start)
    return best, peak() - before


def main() -> None:
    N, V, H = 512, 32768, 256
    print(f"N = {N}, V = {V}, H = {H}, float32 on the CPU: forward and backward, log-probabilities and entropy")
    for method in ("plain", "chunked"):  # before anything large is held here: a child starts from its parent's peak
        code = f"from engine import logprob; print(*logprob.measure('{method}', {N}, {V}, {H}, repeats=3))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if result.returncode:
            print(f"  {method:8s} not measured: {result.stderr.strip().splitlines()[-1]}")
        else:
            seconds, megabytes = map(float, result.stdout.split())
            print(
                f"  {method:8s} {seconds:6.2f} s {megabytes:7.0f} MB (the two gradients are {(N + V) * H / 2**18:.0f})"
            )
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(64, H), torch.randn(V, H) / H**0.5, torch.randint(V, (64,))
    exact = logprobs_plain(hidden.double(), weight.double(), tokens)
    for name, method in (("plain", logprobs_plain), ("chunked", logprobs_chunked)):
        distances = [(a - b).abs().max() for a, b in zip(method(hidden, weight, tokens), exact)]
        print("  {:8s} from float64: log pi {:.1e}, entropy {:.1e}".format(name, *distances))


if __name__ == "__main__":
    main()


def half_precision(device: torch.device):
    """bf16 matrix products on CUDA, float32 elsewhere. The weights and what the optimizer adds up stay float32: steps
    of 1e-6 vanish in bf16. Entered anew for each forward pass, because it caches the weights it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def output_layer(model) -> tuple[torch.Tensor, float]:
    """(output matrix [V, H], softcap): logits are softcap * tanh(W h / softcap), or W h where softcap is 0."""
    return model.get_output_embeddings().weight, getattr(model.config, "final_logit_softcapping", None) or 0.0
