"""logprob.py: by rows equals plain, in value and gradient, and plain equals a hand."""

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
from engine import logprob
from experiments import fused

# temperature and softcap: off, one, both
SCALES = pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.7, 0.0), (1.3, 5.0)])


def draw(N=37, V=150, H=24, dtype=torch.float32):
    """hidden [N, H], weight [V, H], tokens [N]: logits of a few units, so that no row is nearly certain or uniform."""
    generator = torch.Generator().manual_seed(N + V)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (N, V))
    return hidden.to(dtype), (weight * 2 / H**0.5).to(dtype), torch.randint(V, (N,), generator=generator)


def run(function, hidden, weight, *inputs, frozen=False, **options):
    """[values, grad hidden, grad weight] of a loss in which every row has its own coefficient; of a number, a third of it."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    values = function(hidden, weight, *inputs, **options)
    ((values * torch.linspace(-1, 2, len(values))).sum() if values.ndim else values / 3).backward()
    return [values.detach(), hidden.grad, weight.grad]


def assert_near(actual, exact, relative=1e-5):
    """||actual - exact|| <= relative ||exact||, for each pair."""
    for a, b in zip(actual, exact, strict=True):
        assert a.shape == b.shape and (a.double() - b.double()).norm() <= relative * b.double().norm()


@pytest.fixture
def by_rows(monkeypatch):
    """Call it, and everything goes by rows: blocks, strips and pieces of these sizes."""

    def switch(rows=10, strip=4, columns=64):
        for name, value in (("SMALL", 0), ("ROWS", rows), ("STRIP", strip), ("COLUMNS", columns)):
            monkeypatch.setattr(logprob, name, value)

    return switch


def ppo_like(logp, rows):
    """A loss that is not linear, and differs by row."""
    old, weights = torch.linspace(-6, -1, 37), torch.linspace(-1, 2, 37)
    return weights[rows] * (logp - old[rows].to(logp)).exp().clamp(max=1.2)


# All that is called, as function(hidden, weight, **temperature and softcap); the tokens and the reward are those of draw().
TOKENS, (REWARD_HIDDEN, REWARD_WEIGHT, _) = draw()[2], draw(37, 131, 16)
reward_like = lambda hidden: [t.double() if hidden.dtype == torch.float64 else t for t in (REWARD_HIDDEN, REWARD_WEIGHT)]
CALLED = {
    "logprobs": lambda h, w, **s: logprob.logprobs(h, w, TOKENS, **s),
    "entropies": lambda h, w, temperature=1.0, softcap=0.0: logprob.entropies(h / temperature, w, softcap / temperature),
    "expected_reward": lambda h, w, **s: logprob.expected_reward(h, w, *reward_like(h), 0.3, **s),
    "loss_sum": lambda h, w, **s: logprob.loss_sum(h, w, TOKENS, ppo_like, **s),
    "expected_reward_sum": lambda h, w, temperature=1.0, softcap=0.0: logprob.expected_reward_sum(
        h, w, *reward_like(h), 0.3, temperature, softcap),
}  # fmt: skip
PRODUCTS = {"logprobs": 4, "entropies": 4, "expected_reward": 6, "loss_sum": 3, "expected_reward_sum": 4}
EACH_OF_THEM = pytest.mark.parametrize("name", CALLED)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation's name, and the sizes of the float32 that it returns."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.__name__)
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.sizes += [t.numel() for t in tensors if t.dtype == torch.float32]
        return result

    def products(self) -> int:
        return sum(name.split(".")[0] in ("mm", "addmm", "addmm_") for name in self.names)


# plain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
def test_by_hand(plain, by_rows):
    # Logits log 1, log 2, log 5, at temperature 1/2 log 1, log 4, log 25: p = 1/30, 4/30, 25/30.
    if not plain:
        by_rows()
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [2.0], [5.0]]).log()
    tokens, p = torch.tensor([2, 1]), [1 / 30, 4 / 30, 25 / 30]
    values, grad_hidden, grad_weight = run(logprob.logprobs, hidden, weight, tokens, temperature=0.5)
    assert_close(values, torch.tensor([math.log(p[2]), math.log(p[1])]))
    slope = [(c - q) / 0.5 for c, q in zip([0.0, 2.0, -1.0], p)]  # the loss weighs log pi by (-1, 2): 1[a] (-1, 2) - p
    assert_close(grad_weight, torch.tensor(slope)[:, None])
    assert_close(grad_hidden.sum(), (torch.tensor(slope) @ weight).squeeze())
    values = logprob.entropies(hidden, 2 * weight)
    assert_close(values, torch.full((2,), -sum(q * math.log(q) for q in p)))


def test_softcap_and_temperature_are_the_formula():
    hidden, weight, tokens = draw()
    logits = 5.0 * torch.tanh(hidden @ weight.T / 5.0)
    expected = -torch.nn.functional.cross_entropy(logits / 1.3, tokens, reduction="none")
    assert_close(logprob.logprobs(hidden, weight, tokens, 1.3, 5.0), expected)
    assert_close(logprob.entropies(hidden, weight, 5.0), torch.distributions.Categorical(logits=logits).entropy())


# by rows --------------------------------------------------------------------------------------------------------


@SCALES
@EACH_OF_THEM
def test_by_rows_in_float64_float32_and_bf16(temperature, softcap, name, by_rows):
    """In bf16 products are exact in float32: values stay within 1e-5, gradients are rounded once (2^-9)."""
    function, scales, all_exact = CALLED[name], dict(temperature=temperature, softcap=softcap), {}
    kinds = torch.float64, torch.float32, torch.bfloat16
    for dtype in kinds:
        all_exact[dtype] = run(function, *(t.double() for t in draw(dtype=dtype)[:2]), **scales)
    by_rows()
    for dtype, of_values, of_gradients in zip(kinds, (1e-13, 1e-5, 1e-5), (1e-13, 1e-5, 2**-8)):
        hidden, weight, _ = draw(dtype=dtype)
        if name == "entropies" and dtype == torch.bfloat16 and temperature != 1:
            continue  # its temperature is in the hidden states here, which would be rounded
        for frozen in (False, True):
            actual = run(function, hidden, weight, frozen=frozen, **scales)
            assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert actual[1].dtype == dtype and (actual[2] is None) == frozen
            assert_near(actual[:1], all_exact[dtype][:1], of_values)
            assert_near(actual[1 : 3 - frozen], all_exact[dtype][1 : 3 - frozen], of_gradients)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (37, 37, 150), (5, 3, 149), (1000, 7, 7)])
@EACH_OF_THEM
def test_the_size_of_a_block_changes_nothing(name, sizes, by_rows):
    exact = run(CALLED[name], *draw(dtype=torch.float64)[:2])
    by_rows(*sizes)
    assert_near(run(CALLED[name], *draw(dtype=torch.float64)[:2]), exact, 1e-13)


@EACH_OF_THEM
def test_no_product_in_vain_and_without_a_gradient_only_forward(name, by_rows):
    by_rows(rows=37)
    hidden, weight, _ = draw()
    for frozen in (False, True):
        with Watch() as watch:
            run(CALLED[name], hidden, weight, frozen=frozen)
        assert watch.products() == PRODUCTS[name] - frozen
    with Watch() as watch, torch.no_grad():
        assert not CALLED[name](hidden, weight.requires_grad_()).requires_grad
    assert watch.products() == (2 if "expected" in name else 1)


@EACH_OF_THEM
def test_by_rows_holds_a_block_of_rows(name, by_rows):
    by_rows(rows=3, strip=2)
    with Watch() as watch:
        run(CALLED[name], *draw(V=4096, H=2)[:2])
    assert max(watch.sizes) == 3 * 4096


@pytest.mark.parametrize("name", ["logprobs", "loss_sum"])
def test_no_float32_copy_of_a_matrix_in_half_precision(name, by_rows):
    by_rows(rows=2)
    hidden, weight, _ = draw(V=4096, H=64, dtype=torch.bfloat16)
    with Watch() as watch:
        run(CALLED[name], hidden, weight, frozen=True)
    assert max(watch.sizes) == 2 * 4096 < weight.numel()  # two rows of logits; 64 columns of the matrix are half of it


def test_gradcheck(by_rows):
    by_rows(2, 1, 3)
    hidden, weight, tokens = draw(3, 7, 4, torch.float64)
    reward_hidden, reward_weight, _ = draw(3, 5, 4, torch.float64)
    for function in (lambda h, w: logprob.logprobs(h, w, tokens, 0.8, 3.0),
                     lambda h, w: logprob.expected_reward(h, w, reward_hidden, reward_weight, 0.3, 0.8, 3.0)):  # fmt: skip
        assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows, by_rows):
    hidden, weight, tokens = draw(rows, 50, 8)
    exact = run(logprob.logprobs, hidden, weight, tokens)
    by_rows()
    assert_near(run(logprob.logprobs, hidden, weight, tokens), exact)
    assert logprob.loss_sum(hidden[:0], weight.requires_grad_(), tokens[:0], lambda logp, rows: logp) == 0


def test_large_logits_do_not_overflow(by_rows):
    hidden, weight, tokens = draw()
    exact = logprob.logprobs(hidden.double() * 1000, weight.double(), tokens)
    of_entropy = logprob.entropies(hidden.double() * 1000, weight.double())
    by_rows()
    assert_near([logprob.logprobs(hidden * 1000, weight, tokens)], [exact])
    assert (logprob.entropies(hidden * 1000, weight) - of_entropy).abs().max() < 1e-3


@pytest.mark.parametrize("plain", [True, False])
@EACH_OF_THEM
def test_autocast_rounds_nothing_here(name, plain, by_rows):
    if not plain:
        by_rows()
    outside = run(CALLED[name], *draw()[:2])

    def inside(hidden, weight):  # as in training, where backward comes after it
        with torch.autocast("cpu", torch.bfloat16):
            return CALLED[name](hidden, weight)

    for a, b in zip(run(inside, *draw()[:2]), outside):
        assert torch.equal(a, b)


def test_what_nothing_is_learnt_from(by_rows):
    by_rows()
    hidden, weight, tokens = draw()
    assert not any(t.any() for t in run(lambda h, w: logprob.loss_sum(h, w, tokens, lambda logp, rows: 0 * logp), hidden, weight))


def test_a_sum_refuses_a_second_backward(by_rows):
    by_rows()
    hidden, weight, tokens = draw()
    loss = logprob.loss_sum(hidden.requires_grad_(), weight, tokens, ppo_like)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@EACH_OF_THEM
def test_by_rows_is_taken_where_there_are_many_logits_or_half_precision(name, monkeypatch):
    called, real = [], logprob.by_rows
    monkeypatch.setattr(logprob, "by_rows", lambda *inputs: called.append(inputs[2].dtype) or real(*inputs))
    hidden, weight, _ = draw()
    small = run(CALLED[name], hidden, weight)
    assert not called
    run(CALLED[name], hidden, weight.bfloat16())
    assert called
    called.clear()
    monkeypatch.setattr(logprob, "SMALL", 37 * 150 - 1)
    assert_near(run(CALLED[name], hidden, weight), small)
    assert set(called) == {torch.float32}


# expected reward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
def test_expected_reward_by_hand(plain, by_rows):
    # pi = (1/4, 3/4), f = log (1/2, 1/2): the expectation of f is log 1/2, the entropy term adds alpha H(pi).
    if not plain:
        by_rows()
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0]]).log()
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    value = logprob.expected_reward(hidden, weight, torch.ones(1, 1), torch.zeros(2, 1), 0.1)
    assert_close(value, torch.tensor([math.log(0.5) + 0.1 * entropy]))


@pytest.mark.parametrize("columns", [150, 131, 180])  # the reward's matrix: as wide, narrower, wider
@pytest.mark.parametrize("take", ["expected_reward", "expected_reward_sum"])
def test_a_softmax_is_over_its_own_columns_and_the_sum_over_those_of_both(columns, take, by_rows):
    hidden, weight, _ = draw(dtype=torch.float64)
    reward = draw(37, columns, 16, torch.float64)[:2]
    by_rows()
    h, w = (t.clone().requires_grad_() for t in (hidden, weight))
    logp, f = (h @ w.T).log_softmax(-1), (reward[0] @ reward[1].T).log_softmax(-1)
    exact = sum((logp[:, v].exp() * (f[:, v] - 0.3 * logp[:, v])) for v in range(min(150, columns)))
    exact = exact if take == "expected_reward" else exact.sum()
    ((exact * torch.linspace(-1, 2, 37)).sum() if exact.ndim else exact / 3).backward()
    actual = run(getattr(logprob, take), hidden, weight, *reward, 0.3)
    assert_near(actual, [exact.detach(), h.grad, w.grad], 1e-12)


@pytest.mark.parametrize("plain", [True, False])
def test_expected_reward_has_no_gradient_through_the_reward(plain, by_rows):
    if not plain:
        by_rows()
    for function in (logprob.expected_reward, logprob.expected_reward_sum):
        inputs = [t.clone().requires_grad_() for t in (*draw()[:2], *draw(37, 150, 16)[:2])]
        function(*inputs, 0.3).sum().backward()
        assert [t.grad is None for t in inputs] == [False, False, True, True]


def test_the_expectation_by_hand_and_as_the_mean_of_samples():
    logprobs, scores = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[2.0, -1.0]])
    by_hand = 0.25 * (2 - 0.5 * math.log(0.25)) + 0.75 * (-1 - 0.5 * math.log(0.75))
    assert_close(logprob.expectation(logprobs, scores, 0.5), torch.tensor([by_hand]))
    actions = policy.choose(logprobs.expand(20_000, 2), 1.0, 1.0)
    sampled = (scores[0] - 0.5 * logprobs[0])[actions].mean()
    assert abs(sampled - by_hand) < 0.03


def test_the_expectation_is_greatest_at_the_tempered_scores():
    """max_pi E[f - alpha log pi] is at pi ~ exp(f / alpha): alpha < 1 sharpens, alpha = 1 imitates."""
    scores, alpha = torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5
    best = (scores / alpha).log_softmax(-1)
    value = logprob.expectation(best, scores, alpha)
    for _ in range(50):
        other = torch.randn(1, 3).log_softmax(-1)
        assert logprob.expectation(other, scores, alpha) <= value + 1e-6


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
            options = dict(temperature=temperature, softcap=softcap)
            exact = run(logprob.logprobs, hidden.double(), weight.double(), tokens, **options)
            moved = (t.to(device) for t in (hidden, weight, tokens))
            with torch.device(device):
                actual = [t.cpu() for t in run(fused.logprobs, *moved, kind=dtype, programs=programs, **options)]
            assert_near(actual[:1], exact[:1])
            assert_near(actual[1:], exact[1:], bound)
    hidden, weight, tokens = (t.to(device) for t in draw())
    with torch.device(device):
        assert run(fused.logprobs, hidden, weight, tokens, kind=torch.float32, frozen=True)[-1] is None


def test_the_kernels_are_off_and_one_switch_turns_them_on(monkeypatch):
    hidden, weight, tokens = draw()
    assert logprob.FUSED is None
    monkeypatch.setattr(logprob, "FUSED", lambda h, w, t, temperature, softcap: (h @ w.T).log_softmax(-1)[range(37), t])
    on_cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": True})
    values = logprob.logprobs(hidden.as_subclass(on_cuda), weight, tokens)
    monkeypatch.delattr(logprob, "evaluate")
    total = logprob.loss_sum(hidden.as_subclass(on_cuda), weight, tokens, ppo_like)
    assert torch.equal(total, ppo_like(values, slice(0, 37)).sum())


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


@pytest.mark.skipif(not torch.cuda.is_available() or fused.triton is None, reason="needs CUDA and triton")
def test_triton_kernels_on_a_gpu():
    check_triton("cuda")
