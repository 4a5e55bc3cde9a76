"""log pi as fused CUDA kernels (Triton): a tile of logits lives in a multiprocessor and never reaches memory.

An experiment until `python -m experiments.bench` has shown on a GPU that it pays; then `logprobs` is what engine.logprob.FUSED
is to be. The kernels are tested in Triton's interpreter, which has no bf16 products, and compile for NVIDIA's 9.0, where the
backward one spills some registers; they have neither run nor been timed on a GPU. What they compute is `logprobs` of
engine/logprob.py: log pi(a) = x_a - lse(x), and d log pi(a) / dx_v = 1[v = a] - p_v.
"""

import torch
from torch.autograd.function import once_differentiable

try:  # no Triton on Windows, macOS and most CPU installations
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _tile(
        hidden, weight, rows, columns, N, V, softcap, temperature, H: tl.constexpr, CAPPED: tl.constexpr, BH: tl.constexpr
    ):  # fmt: skip
        """x [BN, BV] of some rows and columns, 0 beyond N and V. bf16 products are exact in the float32 they are added
        in; float32 ones are kept from TF32, which rounds to 10 bits."""
        x = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
        for start in range(0, H, BH):
            k = start + tl.arange(0, BH)
            h = tl.load(hidden + rows[:, None] * H + k, (rows[:, None] < N) & (k < H), 0.0)  # [BN, BH]
            w = tl.load(weight + columns[:, None] * H + k, (columns[:, None] < V) & (k < H), 0.0)  # [BV, BH]
            x = tl.dot(h, tl.trans(w), x, input_precision="ieee")
        if CAPPED:
            x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)  # tanh
        return x / temperature

    @triton.jit
    def _forward_kernel(
        hidden, weight, tokens, lse, chosen, N, V, softcap, temperature, per_split,
        H: tl.constexpr, CAPPED: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """Program (i, s): rows i*BN.., column blocks s*per_split... One pass: sums are relative to the largest x so far, and
        shrink when a larger one turns up (Milakov & Gimelshein 2018). Writes log-sum-exp and x of the token, [S, N], of its
        own columns."""
        rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        token = tl.load(tokens + rows, rows < N, -1)
        top, total, found = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
        block = tl.program_id(1) * per_split
        stop = tl.minimum(block + per_split, tl.cdiv(V, BV))
        while block < stop:
            columns = block.to(tl.int64) * BV + tl.arange(0, BV)
            x = _tile(hidden, weight, rows, columns, N, V, softcap, temperature, H, CAPPED, BH)
            x = tl.where(columns[None, :] < V, x, float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top[:, None]), 1)
            found += tl.sum(tl.where(columns[None, :] == token[:, None], x, 0.0), 1)
            top = new_top
            block += 1
        at = tl.program_id(1) * N + rows
        tl.store(lse + at, top + tl.log(total), rows < N)
        tl.store(chosen + at, found, rows < N)

    @triton.jit
    def _backward_kernel(
        hidden, weight, tokens, lse, grad_logprob, grad, N, V, softcap, temperature, per_split,
        H: tl.constexpr, OWN_ROWS: tl.constexpr, CAPPED: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """Program (i, s) owns block i of the rows (of grad hidden) or of the columns (of grad weight), goes through its
        share s of the other's blocks, multiplies each tile again, and adds to grad [S, N or V, H], where nobody else
        writes: no atomics, so the result is the same every time. The price: two launches, each with its own tiles."""
        own, block = tl.program_id(0), tl.program_id(1) * per_split
        stop = tl.minimum(block + per_split, tl.cdiv(V, BV) if OWN_ROWS else tl.cdiv(N, BN))
        while block < stop:
            rows = (own if OWN_ROWS else block).to(tl.int64) * BN + tl.arange(0, BN)
            columns = (block if OWN_ROWS else own).to(tl.int64) * BV + tl.arange(0, BV)
            x = _tile(hidden, weight, rows, columns, N, V, softcap, temperature, H, CAPPED, BH)
            token = tl.load(tokens + rows, rows < N, -1)[:, None]
            g_logprob = tl.load(grad_logprob + rows, rows < N, 0.0)[:, None]  # 0 beyond N: such rows add nothing
            p = tl.exp(x - tl.load(lse + rows, rows < N, 0.0)[:, None])
            g = g_logprob * (tl.where(columns[None, :] == token, 1.0, 0.0) - p)  # dL/dx
            g = tl.where(columns[None, :] < V, g, 0.0) / temperature
            if CAPPED:
                tanh = x * temperature / softcap
                g *= 1 - tanh * tanh
            g = g.to(hidden.dtype.element_ty)  # bf16 inputs: g is rounded to bf16, so that tensor cores can take it
            for start in range(0, H, BH):
                k = start + tl.arange(0, BH)
                if OWN_ROWS:
                    w = tl.load(weight + columns[:, None] * H + k, (columns[:, None] < V) & (k < H), 0.0)
                    new, target, valid = tl.dot(g, w, input_precision="ieee"), rows, rows < N
                    at = grad + (tl.program_id(1) * N + target[:, None]) * H + k
                else:
                    h = tl.load(hidden + rows[:, None] * H + k, (rows[:, None] < N) & (k < H), 0.0)
                    new, target, valid = tl.dot(tl.trans(g), h, input_precision="ieee"), columns, columns < V
                    at = grad + target[:, None] * H + k
                mask = valid[:, None] & (k < H)
                tl.store(at, tl.load(at, mask, 0.0) + new, mask)
            tl.debug_barrier()  # the next block reads what other threads of this program have just written
            block += 1


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, softcap, programs):
        N, V, H = len(hidden), len(weight), hidden.shape[1]
        BV, BH = (128, 64) if hidden.element_size() == 2 else (64, 32)  # more of float32 would not fit the registers
        ctx.blocks = dict(H=H, BN=64, BV=BV, BH=BH, CAPPED=softcap > 0, num_warps=8)
        ctx.numbers = N, V, softcap or 1.0, temperature
        row_blocks, column_blocks = ctx.grid = triton.cdiv(N, 64), triton.cdiv(V, BV)
        # A GPU wants hundreds of programs; where the rows alone are too few, several share a row's columns.
        ctx.per_split = triton.cdiv(column_blocks, max(1, min(programs // max(1, row_blocks), column_blocks)))
        ctx.splits = triton.cdiv(column_blocks, ctx.per_split)
        lse, chosen = torch.empty(2, ctx.splits, N, device=hidden.device)
        grid = row_blocks, ctx.splits
        _forward_kernel[grid](hidden, weight, tokens, lse, chosen, *ctx.numbers, ctx.per_split, **ctx.blocks)
        lse = lse.logsumexp(0)
        ctx.save_for_backward(hidden, weight, tokens, lse)
        return chosen.sum(0) - lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob):
        hidden, weight, tokens, lse = ctx.saved_tensors
        inputs, (row_blocks, column_blocks) = (hidden, weight, tokens, lse, grad_logprob.contiguous()), ctx.grid
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad = hidden.new_zeros(ctx.splits, *hidden.shape, dtype=torch.float32)
            grid, shared = (row_blocks, ctx.splits), ctx.per_split
            _backward_kernel[grid](*inputs, grad, *ctx.numbers, shared, OWN_ROWS=True, **ctx.blocks)
            grad_hidden = grad.sum(0).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad = torch.zeros_like(weight, dtype=torch.float32)
            _backward_kernel[column_blocks, 1](*inputs, grad, *ctx.numbers, row_blocks, OWN_ROWS=False, **ctx.blocks)
            grad_weight = grad.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 4


def logprobs(hidden, weight, tokens, temperature=1.0, softcap=0.0, kind=torch.bfloat16, programs=256):
    """log pi(tokens) on CUDA, [N] float32, from hidden states and matrix rounded to `kind`: tensor cores want bf16.
    `programs`: how many blocks of work to aim for."""
    with torch.cuda.device_of(hidden):
        return _Logprobs.apply(hidden.to(kind).contiguous(), weight.to(kind).contiguous(), tokens.contiguous(), temperature,
                               softcap, programs)  # fmt: skip
