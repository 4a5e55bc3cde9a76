"""experiments/bench.py at minuscule sizes: what it counts and writes. No test looks at how fast
anything was."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import logprob
import policy
from engine import lora, memory
from engine.errors import exit_status
from experiments import bench

ROOT = Path(bench.__file__).parents[1]
TINY = dict(N=64, V=512, H=16)
SHAPE = (64, 160, 3, 4)  # H, I, layers, heads
CPU = torch.device("cpu")


def test_ratio_is_of_rounds_not_of_medians():
    # Medians are 3 and 2; the rounds' ratios are 1/2, 1 and 8.
    assert bench.ratio([3.0, 2.0, 8.0], [6.0, 2.0, 1.0]) == {"ratio": 1.0, "low": 0.5, "high": 8.0}
    with pytest.raises(ValueError):
        bench.ratio([1.0, 2.0], [1.0])


def test_ways_run_in_turn_and_the_first_round_does_not_count():
    order = []

    def way(name):
        return lambda: order.append(name) or len(order)

    results = bench.alternate({"a": way("a"), "b": way("b")}, rounds=2)
    assert order == list("ababab")
    assert [result for _, result in results["a"]] == [3, 5]


def test_what_is_right_is_called_right_and_what_is_wrong_wrong(monkeypatch):
    results = bench.right(CPU, TINY)
    assert {"token_logprobs", "expected_reward_sum"} <= set(results)
    assert all(row["right"] for row in results.values())
    wrong = (lambda *inputs: 1.01 * bench.given_tokens_plain(*inputs), bench.given_tokens_plain)
    monkeypatch.setattr(bench, "losses", lambda device: {"wrong": wrong})
    assert not bench.right(CPU, TINY)["wrong"]["right"]


def test_generate_counts_up_to_the_first_end_token(shipped, monkeypatch):
    model, tokenizer = shipped
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    x = end + 4
    rows = torch.tensor([[5, 6, 7, x, end, pad], [5, 6, 7, x, x, x], [5, 6, 7, end, pad, pad]])
    monkeypatch.setattr(model, "generate", lambda **_: rows)
    assert bench.generate(model, tokenizer, [[5, 6, 7]], 3, 3) == 2 + 3 + 1


def test_a_run_that_is_not_finite_is_not_right():
    class Loop:
        def step(self):
            return {"policy": {"loss": losses.pop(0), "skipped": 0}}

    losses = [0.5, 0.4, 0.3, float("nan")]
    assert bench.run_some_steps(Loop(), 2)["right"]
    assert not bench.run_some_steps(Loop(), 2)["right"]


def test_one_command_writes_one_file(monkeypatch, tmp_path, capsys):
    """All parts, TRL's step where it is installed."""
    sizes = "--questions 2 --group 2 --max-new-tokens 6"
    monkeypatch.setattr(bench, "SIZES", sizes)
    monkeypatch.setattr(bench, "SMALL", TINY)
    file = tmp_path / "bench.json"
    flags = ["--quick", "--rounds", "1", "--device", "cpu", "--json", str(file)]
    assert exit_status(lambda: bench.main(flags)) == 0
    results = json.loads(file.read_text())
    assert results["right"]["token_logprobs"]["right"] and results["run"]["right"]
    assert results["sample"]["ratio"] > 0 and results["logprob"]["token_logprobs"]["ratio"] > 0
    assert ("step" in results) == bool(bench.find_spec("trl"))
    assert "turn on: nothing" in capsys.readouterr().out


def test_what_pays_is_turned_on():
    results = {
        "machine": {"bytes": 50},
        "right": {"--fused": {"right": True}},
        "logprob": {"--fused": {"high": 0.9}},
        "memory": {"all weights": {"measured": 100}, "--lora-rank 16": {"measured": 10}},
    }
    fused, memory = bench.turn_on(results)
    assert fused.startswith("--fused") and memory.endswith(": --lora-rank 16")
    results["right"]["--fused"]["right"] = False
    assert "--fused" not in " ".join(bench.turn_on(results))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quik"], "unrecognized arguments: --quik"),
        (["--rounds", "x"], "invalid int"),
        (["--only", "speed"], "invalid choice"),
        (["--json", "nowhere/at/all.json"], "a folder that is there"),
        (["--json", "."], "a folder that is there"),
        (["--device", "tpu"], "cannot be used here"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flags, message, capsys):
    assert exit_status(lambda: bench.main(flags)) == 2
    assert message in capsys.readouterr().err


# Memory: the formulas against what real models, optimizers and caches hold ------------------------


def small_model(rank, layers=3):
    H, I, _, heads = SHAPE  # noqa: E741
    model = AutoModelForCausalLM.from_config(bench.config_of(H, I, layers, heads, 96))
    return model.to(memory.weight_type("auto", rank, torch.device("cuda")))


def needed(rank, recompute=False, rows=5):
    return bench.bytes_needed(SHAPE, rank, recompute, rows, V=96)


def has_a_place(name):
    """Biases and norms are too few to count: here too."""
    return "norm" not in name and "bias" not in name


@pytest.mark.parametrize("rank", [0, 4])
def test_the_states_are_those_that_an_iteration_holds(rank):
    """Counted after a step of real optimizers: every tensor once, gradients of one model."""
    base = small_model(rank)
    models = [lora.adapt(base, rank, 8.0) if rank else copy.deepcopy(base) for _ in range(2)]
    reference = lora.share(models[0]) if rank else base
    held = {}
    for model in models:
        optimizer = policy.make_optimizer(model, 1e-3)
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
        named = [(n, p) for n, p in model.named_parameters() if has_a_place(n)]
        gradient = sum(p.grad.nbytes for _, p in named if p.requires_grad)
        policy.optimizer_step(optimizer, 0.0)
        for _, p in named:
            moments = [
                v for v in optimizer.state.get(p, {}).values() if torch.is_tensor(v) and v.ndim
            ]
            held |= {v.data_ptr(): v for v in (p, *moments)}
    named = reference.named_parameters()
    held |= {p.data_ptr(): p for name, p in named if has_a_place(name)}
    assert sum(v.nbytes for v in held.values()) + gradient == needed(rank)["states"]


def kept_bytes(rank, recompute, layers):
    """What autograd keeps of a forward pass of so many layers, parameters not counted."""
    model = small_model(rank, layers).train()
    if rank:
        model = lora.adapt(model, rank, 32.0)
    if recompute:
        memory.recompute_layers(model)
    constant = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held: no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):  # as the one that runs on CUDA
        ids = torch.zeros(1, bench.ROWS * (bench.PROMPT + bench.RESPONSE), dtype=torch.long)
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in constant)


@pytest.mark.parametrize("rank, recompute", [(0, False), (0, True), (4, False), (4, True)])
def test_the_layers_keep_what_is_said(rank, recompute, monkeypatch):
    monkeypatch.setattr(bench, "PROMPT", 42)
    of_layers = kept_bytes(rank, recompute, 4) - kept_bytes(rank, recompute, 1)
    whole = needed(rank)["layers"] / 3 if recompute else 0  # one at a time, in backward
    assert needed(rank, recompute)["layers"] - whole == pytest.approx(of_layers, rel=0.01)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_cache_is_as_large_as_is_said(rank):
    prompt = torch.zeros(5, 7, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = small_model(rank)(input_ids=prompt, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    a_token = held * 4 / 3 / 35  # one layer more than three
    more = needed(rank, rows=6)["sampling"] - needed(rank, rows=5)["sampling"]
    assert more == a_token * (bench.PROMPT + bench.RESPONSE) + 4 * 4 * 96


@pytest.mark.parametrize("rank", [0, 4])
def test_the_output_matrix_takes_what_is_said(rank, monkeypatch):
    """The exact loss with its backward, where [N, V] alone would be several times as much."""
    H, V, N = 64, 20_000, bench.ROWS * bench.RESPONSE
    monkeypatch.setattr(logprob, "BLOCK", 2**20)
    for device in logprob.STRIP:
        monkeypatch.setitem(logprob.STRIP, device, 2**18)
    dtype = memory.weight_type("auto", rank, torch.device("cuda"))
    weight = torch.randn(V, H).to(dtype)
    reward_weight = weight if rank else weight.clone()  # adapters share their base
    weight.requires_grad_(not rank)
    hidden, reward_hidden = torch.randn(2, N, H)
    hidden.requires_grad_()
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        logprob.expected_reward_sum(hidden, weight, reward_hidden, reward_weight, 0.1).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    expected = bench.bytes_needed((H, 160, 3, 4), rank, False, 5, V=V)["output"]
    assert 0.6 * expected < most < 1.2 * expected < 2 * 4 * N * V


@pytest.mark.parametrize("rank, recompute", [(0, False), (4, True)])
def test_the_iteration_that_a_card_measures_runs(shipped, rank, recompute, monkeypatch):
    monkeypatch.setattr(bench, "PROMPT", 12)
    monkeypatch.setattr(bench, "RESPONSE", 8)
    config = bench.config_of(*SHAPE, 96)
    bench.one_iteration(config, rank, recompute, 3, shipped[1], CPU)


# docs/speed.md ------------------------------------------------------------------------------------


def page():
    return (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def test_the_memory_table_is_the_programs(shipped):
    for name, row in bench.measure_memory(shipped[1], CPU).items():
        cells = " | ".join(f"{value / 1e9:.1f}" for value in row.values())
        assert f"| {name.replace(', ', ' | ')} | {cells} |" in page().replace("`", "")


def test_every_ratio_is_one_of_a_stored_file():
    """'1.46 [1.06, 1.96]', as the page writes it, stands in one of the files that it names."""
    stored = set()
    for file in re.findall(r"results/(bench[\w-]*\.json)", page()):
        results = json.loads((ROOT / "results" / file).read_text(encoding="utf-8"))
        rows = [results.get("sample"), results.get("step"), *results["logprob"].values()]
        for row in rows:
            if isinstance(row, dict):
                stored.add("{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**row))
    quoted = re.findall(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", page())
    assert len(quoted) >= 5 and set(quoted) <= stored
