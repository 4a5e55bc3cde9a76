"""logprob.py: every fast version equals the plain one, and the plain one equals a hand."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import policy
from engine import fused, logprob

# temperature and softcap: off, one, both
SCALES = pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.7, 0.0), (1.3, 5.0)])


def draw(N=37, V=150, H=24, dtype=torch.float32):
    """hidden [N, H], weight [V, H], tokens [N]: logits of a few units, so that no row is nearly certain or uniform."""
    generator = torch.Generator().manual_seed(N + V)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (N, V))
    return hidden.to(dtype), (weight * 2 / H**0.5).to(dtype), torch.randint(V, (N,), generator=generator)


def run(function, hidden, weight, *inputs, frozen=False, **options):
    """[outputs.., grad hidden, grad weight] of a loss in which every row of every output has its own coefficient."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    outputs = function(hidden, weight, *inputs, **options)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    loss = sum((o * torch.linspace(-1, 2 + i, len(o))).sum() for i, o in enumerate(outputs))
    loss.backward()
    return [*(o.detach() for o in outputs), hidden.grad, weight.grad]


def assert_near(actual, exact, relative=1e-5):
    """||actual - exact|| <= relative ||exact||, for each pair."""
    for a, b in zip(actual, exact, strict=True):
        assert a.shape == b.shape and (a.double() - b.double()).norm() <= relative * b.double().norm()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation's name, and the size of what it returns."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.__name__)
        self.sizes += [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result

    def products(self) -> int:
        return sum("addmm" in name for name in self.names)


# log-probabilities and entropy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [logprob.logprobs_plain, logprob.logprobs_chunked, logprob.logprobs])
def test_by_hand(function):
    # Logits log 1, log 2, log 5, at temperature 1/2 log 1, log 4, log 25: p = 1/30, 4/30, 25/30.
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [2.0], [5.0]]).log()
    tokens, p = torch.tensor([2, 1]), [1 / 30, 4 / 30, 25 / 30]
    values, entropy, grad_hidden, grad_weight = run(function, hidden, weight, tokens, temperature=0.5)
    assert_close(values, torch.tensor([math.log(p[2]), math.log(p[1])]))
    by_hand = -sum(q * math.log(q) for q in p)
    assert_close(entropy, torch.full((2,), by_hand))
    # The loss weighs log pi by (-1, 2) and the entropy by (-1, 3): the rows' sums are 1[a] (-1, 2) - p and 2 dH/dx.
    chosen = [0.0, 2.0, -1.0]
    slope = [(c - q - 2 * q * (math.log(q) + by_hand)) / 0.5 for c, q in zip(chosen, p)]
    assert_close(grad_weight, torch.tensor(slope)[:, None])
    assert_close(grad_hidden.sum(), (torch.tensor(slope) @ weight).squeeze())


@SCALES
@pytest.mark.parametrize("entropy", [True, False])
def test_chunked_float32_is_within_1e5_of_float64(temperature, softcap, entropy):
    hidden, weight, tokens = draw()
    options = dict(temperature=temperature, softcap=softcap, entropy=entropy)
    exact = run(logprob.logprobs_plain, hidden.double(), weight.double(), tokens, **options)
    assert len(exact) == 3 + entropy
    assert_near(run(logprob.logprobs_chunked, hidden, weight, tokens, chunk=(10, 64), **options), exact)


def test_softcap_and_temperature_are_the_formula():
    hidden, weight, tokens = draw()
    logits = 5.0 * torch.tanh(hidden @ weight.T / 5.0) / 1.3
    expected = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    for function in (logprob.logprobs_plain, logprob.logprobs_chunked):
        values, entropy = function(hidden, weight, tokens, 1.3, 5.0)
        assert_close(values, expected)
        assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("chunk", [(1, 1), (37, 150), (5, 149), (1000, 7), None])
def test_chunk_size_changes_nothing(chunk):
    inputs = draw(dtype=torch.float64)
    whole = run(logprob.logprobs_chunked, *inputs, chunk=(8, 32))
    assert_near(run(logprob.logprobs_chunked, *inputs, chunk=chunk), whole, 1e-13)


def test_bf16_is_exact_but_for_the_rounding_of_the_gradients():
    # Products of bf16 numbers are exact in float32: values stay within 1e-5, gradients are rounded once (2^-9).
    hidden, weight, tokens = draw(dtype=torch.bfloat16)
    exact = run(logprob.logprobs_plain, hidden.double(), weight.double(), tokens)
    actual = run(logprob.logprobs_chunked, hidden, weight, tokens, chunk=(10, 64))
    assert [a.dtype for a in actual] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert_near(actual[:2], exact[:2])
    assert_near(actual[2:], exact[2:], 2**-9)


def test_gradcheck():
    hidden, weight, tokens = draw(3, 7, 4, torch.float64)
    function = lambda h, w: logprob.logprobs_chunked(h, w, tokens, 0.8, 3.0, chunk=(2, 3))
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_of_one_output_alone(used):
    hidden, weight, tokens = draw(dtype=torch.float64)
    only = lambda function: lambda *inputs, **options: function(*inputs, **options)[used]
    plain = run(only(logprob.logprobs_plain), hidden, weight, tokens)
    assert_near(run(only(logprob.logprobs_chunked), hidden, weight, tokens, chunk=(9, 40)), plain, 1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows):
    hidden, weight, tokens = draw(rows, 50, 8)
    for function in (logprob.logprobs_chunked, logprob.logprobs):
        assert_near(run(function, hidden, weight, tokens), run(logprob.logprobs_plain, hidden, weight, tokens))


def test_frozen_weight_costs_no_product_and_no_grad_mode_only_forward():
    hidden, weight, tokens = draw()  # one tile
    with Watch() as watch:
        run(logprob.logprobs_chunked, hidden, weight, tokens)
    assert watch.products() == 4  # logits twice, grad hidden, grad weight
    with Watch() as watch:
        *most, grad_weight = run(logprob.logprobs_chunked, hidden, weight, tokens, frozen=True)
    assert watch.products() == 3 and grad_weight is None
    assert_near(most, run(logprob.logprobs_plain, hidden, weight, tokens)[:-1])
    with torch.no_grad(), Watch() as watch:
        assert not logprob.logprobs_chunked(hidden, weight.requires_grad_(), tokens)[0].requires_grad
    assert watch.products() == 1


def test_large_logits_do_not_overflow():
    hidden, weight, tokens = draw()
    values, entropy = logprob.logprobs_chunked(hidden * 1000, weight, tokens, chunk=(10, 3))
    exact = logprob.logprobs_plain(hidden.double() * 1000, weight.double(), tokens)
    assert_near([values], exact[:1])
    assert (entropy - exact[1]).abs().max() < 1e-2  # 0 is the difference of two numbers in the thousands


def test_autocast_rounds_the_inputs_and_nothing_else():
    hidden, weight, tokens = draw()
    rounded = hidden.bfloat16(), weight.bfloat16(), tokens
    exact = run(logprob.logprobs_plain, *(t.double() for t in rounded[:2]), tokens)

    def inside(*inputs, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return logprob.logprobs(*inputs, **options)

    forward_inside = run(inside, hidden, weight, tokens)
    assert forward_inside[2].dtype == torch.float32  # the gradient goes back through the cast
    with torch.autocast("cpu", torch.bfloat16):
        all_inside = run(logprob.logprobs_chunked, *rounded, chunk=(10, 64))
    for actual in (forward_inside, all_inside):
        assert_near(actual[:2], exact[:2])
        assert_near(actual[2:], exact[2:], 2**-9)


def test_the_choice_by_size_changes_nothing(monkeypatch):
    inputs = draw()
    small = run(logprob.logprobs, *inputs)
    monkeypatch.setattr(logprob, "SMALL", 0)
    monkeypatch.delattr(logprob, "logprobs_plain")  # it would be an error to call it now
    assert_near(run(logprob.logprobs, *inputs), small)


def test_chunked_holds_no_tensor_as_large_as_the_logits():
    hidden, weight, tokens = draw(256, 4096, 8)
    with Watch() as watch:
        run(logprob.logprobs_chunked, hidden, weight, tokens, chunk=(64, 128))
    assert max(watch.sizes) == weight.numel() == 4096 * 8  # the matrix and its gradient; the tile has 64 * 128


# a loss, by rows -------------------------------------------------------------------------------------------------


def row_losses(entropy):
    """A loss that is not linear, and differs by row: PPO's ratio, and the entropy where it is asked for."""
    old, weights = torch.linspace(-6, -1, 37), torch.linspace(-1, 2, 37)
    ratio = lambda logp, ent, rows: weights[rows] * (logp - old[rows].to(logp)).exp().clamp(max=1.2)
    return (lambda logp, ent, rows: ratio(logp, ent, rows) - 0.3 * weights[rows] * ent) if entropy else ratio


@SCALES
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("rows", [1, 10, None])
def test_loss_by_rows_equals_plain(temperature, softcap, entropy, rows):
    hidden, weight, tokens = draw()
    loss, everything = row_losses(entropy), slice(0, 37)
    inputs = [t.double().requires_grad_() for t in (hidden, weight)]
    exact = loss(*logprob.logprobs_plain(*inputs, tokens, temperature, softcap, entropy), everything).sum() * 3
    exact.backward()
    actual = [t.clone().requires_grad_() for t in (hidden, weight)]
    value = logprob.loss_by_rows(*actual, tokens, loss, temperature, softcap, entropy, rows) * 3
    value.backward()
    assert_near([value.detach(), *(t.grad for t in actual)], [exact.detach(), *(t.grad for t in inputs)])


def test_loss_by_rows_multiplies_no_logits_twice():
    hidden, weight, tokens = draw()
    loss = row_losses(False)
    for frozen, products in ((False, 3), (True, 2)):
        with Watch() as watch:
            run(lambda h, w: logprob.loss_by_rows(h, w, tokens, loss)[None], hidden, weight, frozen=frozen)
        assert watch.products() == products
    with Watch() as watch, torch.no_grad():
        logprob.loss_by_rows(hidden, weight, tokens, loss)
    assert watch.products() == 1


def test_loss_by_rows_of_what_nothing_is_learnt_from():
    hidden, weight, tokens = draw()
    zero = lambda logp, entropy, rows: 0 * entropy
    assert all(not t.any() for t in run(lambda h, w: logprob.loss_by_rows(h, w, tokens, zero, entropy=True)[None],
                                        hidden, weight))  # fmt: skip
    assert logprob.loss_by_rows(hidden[:0], weight, tokens[:0], zero, entropy=True) == 0


def test_loss_by_rows_refuses_a_second_backward():
    hidden, weight, tokens = draw()
    loss = logprob.loss_by_rows(hidden.requires_grad_(), weight, tokens, row_losses(False))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def sums_by_rows(rows=None):
    """(function by rows, the plain one, products), each of (hidden, weight) -> a number in a tuple."""
    _, _, tokens = draw()
    reward_hidden, reward_weight, _ = draw(37, 131, 16)
    cast = lambda t, like: t.to(like.dtype if like.dtype == torch.float64 else torch.float32)
    loss = row_losses(False)
    f = lambda function, **o: lambda h, w, **s: function(h, w, cast(reward_hidden, h), cast(reward_weight, h), 0.3, **s, **o)
    return [
        (
            lambda h, w, **s: logprob.loss_by_rows(h, w, tokens, loss, rows=rows, **s)[None] / 3,
            lambda h, w, **s: loss(*logprob.logprobs_plain(h, w, tokens, **s), slice(0, 37)).sum()[None] / 3,
            3,
        ),
        (
            lambda *inputs, **s: f(logprob.expected_reward_by_rows, rows=rows)(*inputs, **s)[None] / 3,
            lambda *inputs, **s: f(logprob.expected_reward_plain)(*inputs, **s).sum()[None] / 3,
            4,
        ),
    ]


@SCALES
@pytest.mark.parametrize("which", [0, 1])
def test_by_rows_in_float64_float32_and_bf16(temperature, softcap, which, monkeypatch):
    monkeypatch.setattr(logprob, "tile_size", lambda *_: (512, 64))  # the block of rows is read in three tiles
    function, plain, _ = sums_by_rows(rows=10)[which]
    scales = dict(temperature=temperature, softcap=softcap)
    for dtype, of_values, of_gradients in (
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 1e-5, 2**-8),  # products of bf16 numbers are exact in float32; a gradient is rounded once
    ):
        hidden, weight, _ = draw(dtype=dtype)
        exact = run(plain, hidden.double(), weight.double(), **scales)
        for frozen in (False, True):
            actual = run(function, hidden, weight, frozen=frozen, **scales)
            assert actual[1].dtype == dtype and (actual[2] is None) == frozen
            assert_near(actual[:1], exact[:1], of_values)
            assert_near(actual[1 : 3 - frozen], exact[1 : 3 - frozen], of_gradients)


@pytest.mark.parametrize("which", [0, 1])
def test_by_rows_takes_no_product_in_vain(which):
    function, _, products = sums_by_rows()[which]
    hidden, weight, _ = draw()
    for frozen in (False, True):
        with Watch() as watch:
            run(function, hidden, weight, frozen=frozen)
        assert watch.products() == products - frozen
    with Watch() as watch, torch.no_grad():
        assert not function(hidden, weight.requires_grad_()).requires_grad
    assert watch.products() == products - 2


@pytest.mark.parametrize("which", [0, 1])
def test_by_rows_holds_a_block_of_rows(which, monkeypatch):
    monkeypatch.setattr(logprob, "ROWS", 4)
    hidden, weight, tokens = draw(64, 4096, 2)
    function = (
        lambda h, w: logprob.loss_by_rows(h, w, tokens, lambda logp, entropy, rows: logp)[None],
        lambda h, w: logprob.expected_reward_by_rows(h, w, hidden.flip(0), weight, 0.3)[None],
    )[which]
    with Watch() as watch:
        run(function, hidden, weight)
    assert max(watch.sizes) == 4 * 4096


def test_a_sum_is_by_rows_where_the_vocabulary_is_large_and_the_matrix_whole(monkeypatch):
    hidden, weight, tokens = draw()
    loss = lambda logp, entropy, rows: -logp
    sums = lambda h, w: (logprob.loss_sum(h, w, tokens, loss), logprob.expected_reward_sum(h, w, h, w, 0.3))
    called, apply = [], logprob._ByRows.apply
    monkeypatch.setattr(logprob._ByRows, "apply", lambda *inputs: called.append(inputs[0].dtype) or apply(*inputs))
    small = sums(hidden, weight)
    expected = -logprob.logprobs_plain(hidden, weight, tokens)[0].sum()
    expected = expected, logprob.expected_reward_plain(hidden, weight, hidden, weight, 0.3).sum()
    assert not called and small == expected  # bit for bit
    monkeypatch.setattr(logprob, "SMALL", 0)
    assert_close(sums(hidden, weight), small)
    assert called == [torch.float32] * 2
    sums(hidden.double(), weight.double())
    assert called[2:] == [torch.float64] * 2
    with torch.autocast("cpu", torch.bfloat16):
        sums(hidden, weight)
    sums(hidden.bfloat16(), weight.bfloat16())
    sums(hidden, weight.bfloat16())
    assert len(called) == 4  # half precision: tile by tile


# expected reward ------------------------------------------------------------------------------------------------


def test_expected_reward_by_hand():
    # pi = (1/4, 3/4), f = log (1/2, 1/2): the expectation of f is log 1/2, the entropy term adds alpha H(pi).
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0]]).log()
    reward_hidden, reward_weight = torch.ones(1, 1), torch.zeros(2, 1)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    for function in (logprob.expected_reward_plain, logprob.expected_reward_chunked):
        value = function(hidden, weight, reward_hidden, reward_weight, 0.1)
        assert_close(value, torch.tensor([math.log(0.5) + 0.1 * entropy]))


@SCALES
@pytest.mark.parametrize("reward_columns", [150, 131, 180])  # the reward's matrix: as wide, narrower, wider
def test_expected_reward_chunked_equals_plain(temperature, softcap, reward_columns):
    hidden, weight, _ = draw()
    reward_hidden, reward_weight, _ = draw(37, reward_columns, 16)
    inputs, options = (hidden, weight, reward_hidden, reward_weight), dict(temperature=temperature, softcap=softcap)
    exact = run(logprob.expected_reward_plain, *(t.double() for t in inputs), 0.3, **options)
    for chunk in ((10, 64), (37, 180), (50, 7)):
        assert_near(run(logprob.expected_reward_chunked, *inputs, 0.3, chunk=chunk, **options), exact)
    exact = run(lambda *i, **o: logprob.expected_reward_plain(*i, **o).sum()[None], *(t.double() for t in inputs), 0.3,
                **options)  # fmt: skip
    by_rows = lambda *i, **o: logprob.expected_reward_by_rows(*i, **o)[None]
    for rows in (1, 10, None):
        assert_near(run(by_rows, *inputs, 0.3, rows=rows, **options), exact)


def test_expected_reward_has_no_gradient_through_the_reward():
    hidden, weight, _ = draw()
    reward_hidden, reward_weight, _ = draw(37, 150, 16)
    for function in (logprob.expected_reward_plain, logprob.expected_reward_chunked):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, reward_hidden, reward_weight)]
        function(*inputs, 0.3).sum().backward()
        assert [t.grad is None for t in inputs] == [False, False, True, True]


def test_expected_reward_gradcheck():
    hidden, weight, _ = draw(3, 7, 4, torch.float64)
    reward_hidden, reward_weight, _ = draw(3, 5, 4, torch.float64)
    function = lambda h, w: logprob.expected_reward_chunked(h, w, reward_hidden, reward_weight, 0.3, 0.8, 3.0, (2, 3))
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


# Triton ---------------------------------------------------------------------------------------------------------


def check_triton(device: str) -> None:
    """What both Triton tests run: V is no multiple of a block of columns, N crosses a block of rows, H is odd; many
    programs to a row's columns, then few, then one. The interpreter has no bf16 products: float16 stands in there."""
    half = torch.bfloat16 if device == "cuda" else torch.float16
    for dtype, bound in ((torch.float32, 1e-5), (half, 2**-8)):
        for N, V, temperature, softcap, programs in (
            (5, 150, 1.0, 0.0, 256),
            (70, 300, 0.7, 5.0, 6),
            (1, 300, 1.3, 0.0, 1),
            (0, 150, 1.0, 0.0, 256),
        ):
            hidden, weight, tokens = draw(N, V, 41, dtype)
            for entropy in (True, False):
                options = dict(temperature=temperature, softcap=softcap, entropy=entropy)
                exact = run(logprob.logprobs_plain, hidden.double(), weight.double(), tokens, **options)
                moved = (t.to(device) for t in (hidden, weight, tokens))
                with torch.device(device):
                    actual = [t.cpu() for t in run(fused.logprobs_triton, *moved, programs=programs, **options)]
                values = len(exact) - 2
                assert_near(actual[:values], exact[:values])
                assert_near(actual[values:], exact[values:], bound)
    hidden, weight, tokens = (t.to(device) for t in draw())
    with torch.device(device):
        assert run(fused.logprobs_triton, hidden, weight, tokens, frozen=True)[-1] is None


def test_triton_kernels_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton): its kernels are not tested")
    here = Path(__file__).parent  # a process of its own: the interpreter must be chosen before Triton is imported
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]),
    }
    code = "import test_logprob; test_logprob.check_triton('cpu')"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available() or logprob.triton is None, reason="needs CUDA and triton")
def test_triton_kernels_on_a_gpu():
    check_triton("cuda")


def test_expected_reward_by_hand_and_as_the_mean_of_samples():
    logprobs, scores = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[2.0, -1.0]])
    by_hand = 0.25 * (2 - 0.5 * math.log(0.25)) + 0.75 * (-1 - 0.5 * math.log(0.75))
    assert_close(logprob.expectation(logprobs, scores, 0.5), torch.tensor([by_hand]))
    actions = policy.choose(logprobs.expand(20_000, 2), 1.0, 1.0)
    sampled = (scores[0] - 0.5 * logprobs[0])[actions].mean()
    assert abs(sampled - by_hand) < 0.03


def test_expected_reward_is_greatest_at_the_tempered_scores():
    """max_pi E[f - alpha log pi] is at pi ~ exp(f / alpha): alpha < 1 sharpens, alpha = 1 imitates."""
    scores, alpha = torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5
    best = (scores / alpha).log_softmax(-1)
    value = logprob.expectation(best, scores, alpha)
    for _ in range(50):
        other = torch.randn(1, 3).log_softmax(-1)
        assert logprob.expectation(other, scores, alpha) <= value + 1e-6
