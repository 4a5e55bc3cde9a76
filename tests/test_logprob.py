"""logprob.py: by blocks equals plain, in value and gradient, and plain equals a hand."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import logprob
import policy
from engine.errors import UserError

# temperature and softcap: off, one, both
SCALES = pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.7, 0.0), (1.3, 5.0)])
DTYPES = pytest.mark.parametrize(
    "dtype, of_values, of_gradients",
    # Of bf16 numbers products are exact in float32, and gradients are rounded once.
    [(torch.float64, 1e-13, 1e-13), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 2**-8)],
)
BOTH = pytest.mark.parametrize("name", ["token_logprobs", "expected_reward_sum"])


def draw(N=37, V=150, H=24, dtype=torch.float32):
    """hidden [N, H], weight [V, H], tokens [N]: logits of a few units, no row nearly certain."""
    generator = torch.Generator().manual_seed(N + V)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (N, V))
    tokens = torch.randint(V, (N,), generator=generator)
    return hidden.to(dtype), (weight * 2 / H**0.5).to(dtype), tokens


def reward_like(hidden, V=131):
    """The reward's hidden states and matrix, of another width and padding than the policy's."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    return draw(len(hidden), V, 16, kind)[:2]


def plain_token_logprobs(hidden, weight, temperature=1.0, softcap=0.0):
    """log pi by autograd through all logits."""
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_pi = (logits / temperature).log_softmax(-1)
    return log_pi.gather(-1, draw()[2][: len(hidden), None]).squeeze(-1)


def plain_expected_reward(hidden, weight, temperature=1.0, softcap=0.0, V=131):
    """E[f - 0.3 log pi] by autograd, column by column."""
    logits = [h @ w.T for h, w in ((hidden, weight), reward_like(hidden, V))]
    if softcap:
        logits = [softcap * torch.tanh(x / softcap) for x in logits]
    log_pi = (logits[0] / temperature).log_softmax(-1)
    f = logits[1].log_softmax(-1)
    total = 0.0
    for v in range(len(weight)):
        f_v = f[:, v] if v < V else -100.0  # the reward would never do it
        total = total + log_pi[:, v].exp() * (f_v - 0.3 * log_pi[:, v])
    return total


def values_of(name, hidden, weight, plain=False, **scales):
    """What a loss is made of: [N] for token_logprobs; a number for expected_reward_sum."""
    if name == "token_logprobs":
        if plain:
            return plain_token_logprobs(hidden, weight, **scales)
        return logprob.token_logprobs(hidden, weight, draw()[2][: len(hidden)], **scales)
    if plain:
        return plain_expected_reward(hidden, weight, **scales).sum()
    return logprob.expected_reward_sum(hidden, weight, *reward_like(hidden), 0.3, **scales)


def loss_of(values):
    """PPO's loss of log-probabilities, each row with its own advantage; a third of a number."""
    if not values.ndim:
        return values / 3
    old = torch.linspace(-6, -1, len(values)).to(values)
    advantages = torch.linspace(-1, 2, len(values)).to(values)
    return policy.ppo_loss(values, old, advantages, 0.2).sum()


def run(function, hidden, weight, frozen=False):
    """[values, grad hidden, grad weight] of loss_of(function(hidden, weight))."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(not frozen)
    values = function(hidden, weight)
    loss_of(values).backward()
    return [values.detach(), hidden.grad, weight.grad]


def called(name, plain=False, **scales):
    return lambda hidden, weight: values_of(name, hidden, weight, plain, **scales)


def assert_near(actual, exact, relative=1e-5):
    """||actual - exact|| <= relative ||exact||, for each pair."""
    for a, b in zip(actual, exact, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= relative * b.double().norm()


@pytest.fixture
def rows_of_ten(monkeypatch):
    """Ten rows of 150 columns to a block, four to a strip: neither goes into 37 rows evenly."""
    monkeypatch.setattr(logprob, "BLOCK", 1500)
    monkeypatch.setitem(logprob.STRIP, "cpu", 600)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation's name, and the sizes of the float32 that it returns."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.__name__)
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.sizes.append(leaf.numel())
        return result

    def products(self) -> int:
        return sum(name.split(".")[0] in ("mm", "addmm", "addmm_") for name in self.names)


# by hand --------------------------------------------------------------------------------------


def test_by_hand():
    # Logits log 1, log 2, log 5, at temperature 1/2 log 1, log 4, log 25: pi = 1/30, 4/30, 25/30.
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log().requires_grad_()
    pi = [1 / 30, 4 / 30, 25 / 30]
    values = logprob.token_logprobs(hidden, weight, torch.tensor([2, 1]), temperature=0.5)
    assert_close(values.detach(), torch.tensor([math.log(pi[2]), math.log(pi[1])]))
    (values * torch.tensor([-1.0, 2.0])).sum().backward()
    # The loss weighs log pi by -1 and 2, so dL/dx = (1[a] (-1, 2) - pi) / temperature.
    slope = torch.tensor([(c - q) / 0.5 for c, q in zip([0.0, 2.0, -1.0], pi)])
    assert_close(weight.grad, slope[:, None])
    assert_close(hidden.grad.sum(), (slope @ weight.detach()).squeeze())


def test_expected_reward_by_hand():
    # pi = (1/4, 3/4), f = log (1/2, 1/2): E[f] is log 1/2, the entropy term adds alpha H(pi).
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[1.0], [3.0]]).log()
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    inputs = (hidden, weight, torch.ones(1, 1), torch.zeros(2, 1), 0.1)
    assert_close(logprob.expected_reward_sum(*inputs), torch.tensor(math.log(0.5) + 0.1 * entropy))


@SCALES
def test_all_actions_are_the_formula(temperature, softcap):
    hidden, weight, tokens = draw()
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = (logits / temperature).log_softmax(-1)
    assert_close(logprob.all_logprobs(hidden, weight, temperature, softcap), expected)


# against autograd -----------------------------------------------------------------------------


@SCALES
@DTYPES
@BOTH
def test_values_and_gradients_are_those_of_autograd(
    temperature, softcap, name, dtype, of_values, of_gradients, rows_of_ten
):
    scales = dict(temperature=temperature, softcap=softcap)
    hidden, weight, _ = draw(dtype=dtype)
    exact = run(called(name, plain=True, **scales), hidden.double(), weight.double())
    for frozen in (False, True):
        actual = run(called(name, **scales), hidden, weight, frozen)
        assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
        assert actual[1].dtype == dtype
        assert (actual[2] is None) == frozen
        if name == "token_logprobs" or dtype == torch.float64:
            assert_near(actual[:1], exact[:1], of_values)
        else:  # a sum of 37 terms of both signs
            assert (actual[0] - exact[0]).abs() < 1e-4
        assert_near(actual[1 : 3 - frozen], exact[1 : 3 - frozen], of_gradients)


@pytest.mark.parametrize("V", [150, 131, 180])  # the reward's matrix: as wide, narrower, wider
@SCALES
def test_the_expectation_is_over_the_columns_of_both(temperature, softcap, V):
    """Each softmax is over its own columns; the gradient knows of the policy's padding."""
    hidden, weight, _ = draw(dtype=torch.float64)
    scales = dict(temperature=temperature, softcap=softcap)
    inputs = (*reward_like(hidden, V), 0.3)
    exact = run(lambda h, w: plain_expected_reward(h, w, V=V, **scales).sum(), hidden, weight)
    actual = run(lambda h, w: logprob.expected_reward_sum(h, w, *inputs, **scales), hidden, weight)
    assert_near(actual, exact, 1e-12)


def test_gradcheck():
    hidden, weight, _ = draw(3, 7, 4, torch.float64)
    tokens = torch.tensor([0, 6, 2])

    def function(h, w):
        return logprob.token_logprobs(h, w, tokens, 0.8, 3.0)

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(
    "block, strip", [(1, 1), (301, 150), (37 * 150, 301), (10**9, 301), (10**9, 10**9)]
)
@BOTH
def test_the_size_of_a_block_changes_nothing(name, block, strip, monkeypatch):
    inputs = draw(dtype=torch.float64)[:2]
    exact = run(called(name, plain=True), *inputs)
    monkeypatch.setattr(logprob, "BLOCK", block)
    monkeypatch.setitem(logprob.STRIP, "cpu", strip)
    assert_near(run(called(name), *inputs), exact, 1e-12)


@pytest.mark.parametrize("rows", [0, 1])
@BOTH
def test_no_row_and_one_row(name, rows):
    hidden, weight, _ = draw()
    inputs = (hidden[:rows], weight)
    if rows:
        assert_near(run(called(name), *inputs), run(called(name, plain=True), *inputs), 1e-4)
    else:
        for value in run(called(name), *inputs):
            assert not value.any()


def test_large_logits_do_not_overflow():
    hidden, weight, tokens = draw()
    exact = logprob.token_logprobs(hidden.double() * 1000, weight.double(), tokens)
    assert_near([logprob.token_logprobs(hidden * 1000, weight, tokens)], [exact])


def test_the_expected_reward_has_no_gradient_through_the_reward():
    inputs = [t.clone().requires_grad_() for t in (*draw()[:2], *draw(37, 150, 16)[:2])]
    logprob.expected_reward_sum(*inputs, 0.3).backward()
    assert [t.grad is None for t in inputs] == [False, False, True, True]


def test_one_matrix_for_policy_and_reward():
    """As adapters on one base have it: bf16, and the reward's matrix is the policy's own."""
    hidden, weight, _ = draw(dtype=torch.bfloat16)
    reward_hidden = draw(37, 150, 24)[0].flip(0)
    copied = logprob.expected_reward_sum(hidden, weight, reward_hidden, weight.clone(), 0.3)
    hidden.requires_grad_()
    shared = logprob.expected_reward_sum(hidden, weight, reward_hidden, weight, 0.3)
    assert torch.equal(shared, copied)


# what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, products", [("token_logprobs", 4), ("expected_reward_sum", 4)])
def test_no_product_in_vain(name, products):
    """x twice and two gradients; or x, the reward's logits and two gradients."""
    hidden, weight, _ = draw()
    for frozen in (False, True):
        with Watch() as watch:
            run(called(name), hidden, weight, frozen)
        assert watch.products() == products - frozen


@BOTH
def test_no_more_than_a_block_of_logits_is_held(name, monkeypatch):
    hidden, weight, tokens = draw(V=4096, H=2)
    reward = draw(V=4000, H=2)[:2]

    def function(h, w):
        if name == "token_logprobs":
            return logprob.token_logprobs(h, w, tokens)
        return logprob.expected_reward_sum(h, w, *reward, 0.3)

    monkeypatch.setattr(logprob, "BLOCK", 3 * 4096)
    with Watch() as watch:
        run(function, hidden, weight)
    assert max(watch.sizes) == 3 * 4096


@BOTH
def test_autocast_rounds_nothing_here(name):
    outside = run(called(name), *draw()[:2])

    def inside(hidden, weight):  # as in training, where backward comes after it
        with torch.autocast("cpu", torch.bfloat16):
            return values_of(name, hidden, weight)

    for a, b in zip(run(inside, *draw()[:2]), outside):
        assert torch.equal(a, b)


def test_products_are_tf32_on_cuda_alone_and_only_inside():
    before = torch.get_float32_matmul_precision()
    with logprob.float32_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    with logprob.float32_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_sum_refuses_a_second_backward():
    hidden, weight, _ = draw()
    loss = values_of("expected_reward_sum", hidden.requires_grad_(), weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


# the expectation ------------------------------------------------------------------------------


def test_the_expectation_by_hand_and_as_the_mean_of_samples():
    logprobs = torch.tensor([[0.25, 0.75]]).log()
    scores = torch.tensor([[2.0, -1.0]])
    by_hand = 0.25 * (2 - 0.5 * math.log(0.25)) + 0.75 * (-1 - 0.5 * math.log(0.75))
    assert_close(logprob.expectation(logprobs, scores, 0.5), torch.tensor([by_hand]))
    actions = policy.choose(logprobs.expand(20_000, 2), 1.0, 1.0)
    sampled = (scores[0] - 0.5 * logprobs[0])[actions].mean()
    assert abs(sampled - by_hand) < 0.03


def test_the_gradient_is_pi_times_u_minus_its_mean():
    """The formula by hand, and autograd through log pi = log softmax z in `expectation`."""
    z = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    f = torch.randn(5, 9, dtype=torch.float64)
    log_pi = z.log_softmax(-1)
    value = logprob.expectation(log_pi, f, 0.4)
    (autograd,) = torch.autograd.grad(value.sum(), z)
    log_pi = log_pi.detach()
    u = f - 0.4 * log_pi
    mean, gradient = logprob.expectation_gradient(log_pi, f, 0.4)
    assert_close(mean, value.detach())
    assert_close(gradient, log_pi.exp() * (u - mean[:, None]))
    assert_close(gradient, autograd)


def test_the_expectation_is_greatest_at_the_tempered_scores():
    """max_pi E[f - alpha log pi] is at pi ~ exp(f / alpha): alpha < 1 sharpens, 1 imitates."""
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    best = (scores / 0.5).log_softmax(-1)
    value, gradient = logprob.expectation_gradient(best, scores, 0.5)
    assert gradient.abs().max() < 1e-6
    for _ in range(50):
        other = torch.randn(1, 3).log_softmax(-1)
        assert logprob.expectation(other, scores, 0.5) <= value + 1e-6


# --fused --------------------------------------------------------------------------------------


def test_fused_is_off_and_refused_in_one_line_where_it_cannot_run(monkeypatch):
    assert logprob.FUSED is None
    with pytest.raises(UserError, match="--fused needs a GPU with CUDA"):
        logprob.use_fused(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "engine.fused", raising=False)
    with pytest.raises(UserError, match="pip install triton"):
        logprob.use_fused(torch.device("cuda"))
    assert logprob.FUSED is None


def test_fused_is_taken_on_cuda(monkeypatch):
    hidden, weight, tokens = draw()
    monkeypatch.setattr(logprob, "FUSED", lambda *inputs: "the kernel's")
    on_cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": True})
    assert logprob.token_logprobs(hidden.as_subclass(on_cuda), weight, tokens) == "the kernel's"
    assert logprob.token_logprobs(hidden, weight, tokens).shape == (37,)


def check_triton(device: str) -> None:
    """What both Triton tests run.

    V is no multiple of a block of columns, N crosses a block of rows, H is odd; many programs to a
    row's columns, then few, then one.

    The interpreter has no bf16 products: float16 stands in there. It does not round to TF32.
    """
    from engine import fused

    half = torch.bfloat16 if device == "cuda" else torch.float16
    float32_bound = 1e-3 if device == "cuda" else 1e-5
    cases = [(5, 150, 1.0, 0.0, 256), (37, 300, 0.7, 5.0, 6), (1, 300, 1.3, 0.0, 1)]
    for dtype, bound in ((torch.float32, float32_bound), (half, 2**-8)):
        for N, V, temperature, softcap, programs in (*cases, (0, 150, 1.0, 0.0, 256)):
            hidden, weight, _ = draw(N, V, 41, dtype)
            tokens = draw()[2][:N]
            scales = dict(temperature=temperature, softcap=softcap)

            def kernel(h, w, tokens=tokens, scales=scales, programs=programs):
                return fused.token_logprobs(h, w, tokens.to(device), **scales, programs=programs)

            exact = run(called("token_logprobs", True, **scales), hidden.double(), weight.double())
            actual = run(kernel, hidden.to(device), weight.to(device))
            actual = [t.cpu() for t in actual]
            assert_near(actual[:1], exact[:1], float32_bound)
            assert_near(actual[1:], exact[1:], bound)
            assert run(kernel, hidden.to(device), weight.to(device), frozen=True)[2] is None


def test_triton_kernels_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton): its kernels are not tested")
    here = Path(
        __file__
    ).parent  # a process of its own: the interpreter is chosen before the import
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    code = "import test_logprob; test_logprob.check_triton('cpu')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_triton_kernels_on_a_gpu():
    check_triton("cuda")
