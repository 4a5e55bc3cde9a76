"""log pi of given tokens as fused CUDA kernels (Triton): a tile of logits lives in a multiprocessor
and never reaches memory.

`--fused` takes `token_logprobs` in place of logprob.py's, which it equals:
log pi(a) = z_a - lse(z), and d log pi(a) / dz_v = 1[v = a] - pi(v). Importing this module takes
Triton, which has no build for Windows, macOS and most CPUs. The tests run the kernels in Triton's
interpreter, on a CPU;
`python -m experiments.bench` runs them on a card, and says whether they pay there.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def _tile(
    hidden,
    weight,
    rows,
    columns,
    N,
    V,
    softcap,
    temperature,
    H: tl.constexpr,
    CAPPED: tl.constexpr,
    BH: tl.constexpr,
):
    """z [BN, BV] of some rows and columns, 0 beyond N and V."""
    # bf16 products are exact in the float32 they are added in. float32 inputs are rounded to TF32,
    # as logprob.float32_products has it.
    x = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, H, BH):
        k = start + tl.arange(0, BH)
        h = tl.load(hidden + rows[:, None] * H + k, (rows[:, None] < N) & (k < H), 0.0)  # [BN, BH]
        w = tl.load(weight + columns[:, None] * H + k, (columns[:, None] < V) & (k < H), 0.0)
        x = tl.dot(h, tl.trans(w), x, input_precision="tf32")  # w [BV, BH]
    if CAPPED:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)  # tanh
    return x / temperature


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    tokens,
    lse,
    chosen,
    N,
    V,
    softcap,
    temperature,
    per_split,
    H: tl.constexpr,
    CAPPED: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Program (i, s): rows i*BN.., column blocks s*per_split... Writes log-sum-exp and z of the
    token, [S, N], of its own columns."""
    # One pass: sums are relative to the largest z so far, and shrink when a larger one turns up
    # (Milakov & Gimelshein 2018, arXiv 1805.02867).
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.load(tokens + rows, rows < N, -1)
    largest = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)  # sum of exp(z - largest)
    z_token = tl.zeros([BN], tl.float32)
    block = tl.program_id(1) * per_split
    stop = tl.minimum(block + per_split, tl.cdiv(V, BV))
    while block < stop:
        columns = block.to(tl.int64) * BV + tl.arange(0, BV)
        z = _tile(hidden, weight, rows, columns, N, V, softcap, temperature, H, CAPPED, BH)
        z = tl.where(columns[None, :] < V, z, float("-inf"))
        new = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        z_token += tl.sum(tl.where(columns[None, :] == token[:, None], z, 0.0), 1)
        largest = new
        block += 1
    at = tl.program_id(1) * N + rows
    tl.store(lse + at, largest + tl.log(total), rows < N)
    tl.store(chosen + at, z_token, rows < N)


@triton.jit
def _backward_kernel(
    hidden,
    weight,
    tokens,
    lse,
    grad_logprob,
    grad,
    N,
    V,
    softcap,
    temperature,
    per_split,
    H: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Program (i, s) owns block i of the rows (of grad hidden) or of the columns (of grad weight),
    goes through its share s of the other's blocks, and adds to grad [S, N or V, H]."""
    # Each tile is multiplied again, and nobody else writes where this program does: no atomics, so
    # the result is the same every time. The price: two launches, each with its own tiles.
    own = tl.program_id(0)
    block = tl.program_id(1) * per_split
    stop = tl.minimum(block + per_split, tl.cdiv(V, BV) if OWN_ROWS else tl.cdiv(N, BN))
    while block < stop:
        rows = (own if OWN_ROWS else block).to(tl.int64) * BN + tl.arange(0, BN)
        columns = (block if OWN_ROWS else own).to(tl.int64) * BV + tl.arange(0, BV)
        z = _tile(hidden, weight, rows, columns, N, V, softcap, temperature, H, CAPPED, BH)
        token = tl.load(tokens + rows, rows < N, -1)[:, None]
        g_logprob = tl.load(grad_logprob + rows, rows < N, 0.0)[:, None]  # 0 beyond N: adds nothing
        pi = tl.exp(z - tl.load(lse + rows, rows < N, 0.0)[:, None])
        g = g_logprob * (tl.where(columns[None, :] == token, 1.0, 0.0) - pi)  # dL/dz
        g = tl.where(columns[None, :] < V, g, 0.0) / temperature
        if CAPPED:
            tanh = z * temperature / softcap
            g *= 1 - tanh * tanh  # dL/dx
        g = g.to(hidden.dtype.element_ty)  # of bf16 inputs bf16, for tensor cores
        for start in range(0, H, BH):
            k = start + tl.arange(0, BH)
            if OWN_ROWS:
                w_mask = (columns[:, None] < V) & (k < H)
                w = tl.load(weight + columns[:, None] * H + k, w_mask, 0.0)
                new = tl.dot(g, w, input_precision="tf32")
                mask = (rows[:, None] < N) & (k < H)
                at = grad + (tl.program_id(1) * N + rows[:, None]) * H + k
            else:
                h_mask = (rows[:, None] < N) & (k < H)
                h = tl.load(hidden + rows[:, None] * H + k, h_mask, 0.0)
                new = tl.dot(tl.trans(g), h, input_precision="tf32")
                mask = (columns[:, None] < V) & (k < H)
                at = grad + columns[:, None] * H + k
            tl.store(at, tl.load(at, mask, 0.0) + new, mask)
        tl.debug_barrier()  # the next block reads what other threads of this program have written
        block += 1


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, softcap, programs):
        N, H = hidden.shape
        V = len(weight)
        BV, BH = 64, 32  # more of float32 would not fit the registers
        if hidden.element_size() == 2:
            BV, BH = 128, 64
        ctx.blocks = dict(H=H, BN=64, BV=BV, BH=BH, CAPPED=softcap > 0, num_warps=8)
        ctx.numbers = (N, V, softcap or 1.0, temperature)
        ctx.row_blocks = triton.cdiv(N, 64)
        ctx.column_blocks = triton.cdiv(V, BV)
        # A GPU wants hundreds of programs: where there are few rows, several share a row's columns.
        splits = max(1, min(programs // max(1, ctx.row_blocks), ctx.column_blocks))
        ctx.per_split = triton.cdiv(ctx.column_blocks, splits)
        ctx.splits = triton.cdiv(ctx.column_blocks, ctx.per_split)
        lse, chosen = torch.empty(2, ctx.splits, N, device=hidden.device)
        grid = (ctx.row_blocks, ctx.splits)
        _forward_kernel[grid](
            hidden, weight, tokens, lse, chosen, *ctx.numbers, ctx.per_split, **ctx.blocks
        )
        lse = lse.logsumexp(0)
        ctx.save_for_backward(hidden, weight, tokens, lse)
        return chosen.sum(0) - lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob):
        hidden, weight, tokens, lse = ctx.saved_tensors
        inputs = (hidden, weight, tokens, lse, grad_logprob.contiguous())
        grad = hidden.new_zeros(ctx.splits, *hidden.shape, dtype=torch.float32)
        _backward_kernel[ctx.row_blocks, ctx.splits](
            *inputs, grad, *ctx.numbers, ctx.per_split, OWN_ROWS=True, **ctx.blocks
        )
        grad_hidden = grad.sum(0).to(hidden.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad = torch.zeros_like(weight, dtype=torch.float32)
            _backward_kernel[ctx.column_blocks, 1](
                *inputs, grad, *ctx.numbers, ctx.row_blocks, OWN_ROWS=False, **ctx.blocks
            )
            grad_weight = grad.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def token_logprobs(hidden, weight, tokens, temperature=1.0, softcap=0.0, programs=256):
    """log pi(tokens): [N] float32, from h [N, H] and W [V, H] as they are, or both in float32 where
    their types differ. `programs`: how many blocks of work to aim for."""
    kind = torch.promote_types(hidden.dtype, weight.dtype)
    hidden = hidden.to(kind).contiguous()
    weight = weight.to(kind).contiguous()
    with torch.cuda.device_of(hidden):
        return _Logprobs.apply(hidden, weight, tokens.contiguous(), temperature, softcap, programs)
