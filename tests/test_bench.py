"""experiments/bench.py at minuscule sizes: what it counts, what it writes. No test looks at how fast anything was."""

import json

import pytest

import data
from engine import logprob
from engine.errors import UserError, exit_status
from experiments import bench

FEW = bench.Work(questions=2, group=2, new_tokens=6)
SMALL = dict(N=64, V=512, H=16)


def test_ratio_is_of_rounds_not_of_medians():
    # Medians are 3 and 3; the rounds' ratios are 1/2, 1 and 8.
    assert bench.ratio([3.0, 2.0, 8.0], [6.0, 2.0, 1.0]) == {"ratio": 1.0, "low": 0.5, "high": 8.0, "rounds": 3}
    with pytest.raises(ValueError):
        bench.ratio([1.0, 2.0], [1.0])


def test_ways_run_in_turn_and_the_first_round_does_not_count():
    order = []
    ways = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert bench.alternate(ways, rounds=2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert order == list("ababab")


def test_a_spent_budget_stops_after_two_rounds():
    assert bench.alternate({"a": lambda: 1.0}, rounds=100, seconds=0) == {"a": [1.0, 1.0]}


def test_a_way_without_a_value_is_timed():
    (seconds,) = bench.alternate({"a": lambda: None}, rounds=1)["a"]
    assert seconds > 0


def test_every_way_has_the_gradients_of_plain(monkeypatch):
    monkeypatch.setattr(logprob, "SMALL", 0)
    ways, absent = bench.logprob_ways("cpu")
    gradients = {}
    for name, way in ways.items():
        hidden, weight, tokens = bench.logprob_inputs(**SMALL)
        bench.forward_backward(way, hidden, weight, tokens)
        gradients[name] = hidden.grad, weight.grad
    for name, pair in gradients.items():
        for a, b in zip(pair, gradients["plain"]):
            assert (a - b).norm() <= 1e-5 * b.norm(), name
    assert set(gradients) == {"plain", "logprobs", "loss_sum"} and absent


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    ways, absent = bench.logprob_ways("cpu", compiled=True)
    assert "compiled" not in ways and any("no C++ compiler" in line for line in absent)


def test_peak_counts_what_plain_holds():
    sizes = dict(N=2048, V=16384, H=16)  # one [N, V] is 134 MB: a process gains up to 33 MB by itself (threads, buffers)
    peaks = {name: bench.in_a_child("logprob_peak", name, *sizes.values()) for name in ("plain", "logprobs", "loss_sum")}
    if None in peaks.values():
        pytest.skip("this system does not say how much memory a process has had")
    assert 1.9 * 4 * 2048 * 16384 < peaks["plain"] < 7 * 4 * 2048 * 16384
    assert max(peaks["logprobs"], peaks["loss_sum"]) < 0.9 * 4 * 2048 * 16384


def test_a_child_that_fails_is_a_line_and_none(capsys):
    assert bench.in_a_child("logprob_peak", "nothing", 1, 2, 3) is None
    assert "KeyError" in capsys.readouterr().out


def line(function, name, N, V, H, device):
    """Instead of a process: a peak in a line of N for plain, twice the gradients for the rest."""
    return 4 * (N + V) * H + 1000 * N if name == "plain" else 8 * (N + V) * H


@pytest.mark.parametrize("free", [1 << 50, 0])
def test_plain_is_extrapolated_where_it_does_not_fit_and_only_there(monkeypatch, free):
    asked = []
    monkeypatch.setattr(bench, "in_a_child", lambda *a: asked.append(a[2]) or line(*a))
    monkeypatch.setattr(bench, "available_bytes", lambda device: free)
    result = bench.logprob_memory(["plain", "loss_sum"], 1024, 4096, 8)
    assert result["extrapolated"] == (not free) and asked == ([1024, 1024] if free else [1024, 128, 256])
    gradients = 4 * (1024 + 4096) * 8
    assert result["bytes"]["plain"] == pytest.approx(gradients + 1000 * 1024)
    assert result["memory_ratio"] == pytest.approx(gradients / (1000 * 1024))
    assert result["memory_ratio_with_gradients"] == pytest.approx(2 * gradients / (gradients + 1000 * 1024))


def test_generate_counts_up_to_the_first_end_token(shipped, monkeypatch):
    model, tokenizer = shipped
    end, prompt = tokenizer.eos_token_id, [5, 6, 7]
    other = end + 4
    rows = [[5, 6, 7, other, end, other, end], [5, 6, 7, other, other, other, other], [5, 6, 7, end, end, end, end]]
    monkeypatch.setattr(model, "generate", lambda **_: bench.torch.tensor(rows))
    assert bench.generate(model, tokenizer, [prompt], 3, 4) == 2 + 4 + 1


def test_sampling_ways_give_rates(shipped):
    model, tokenizer = shipped
    examples = data.load_examples("words", "train", 2)
    for rate in bench.alternate(bench.sample_ways(model, tokenizer, examples, FEW), 2).values():
        assert len(rate) == 2 and min(rate) > 0


def quick(monkeypatch, tmp_path, *flags) -> dict:
    """`--quick` with all its sizes cut down."""
    monkeypatch.setattr(bench, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(bench, "matmul_rate", lambda device, size=0: 1e9)
    monkeypatch.setattr(bench, "in_a_child", line)
    sizes = bench.logprob_times
    monkeypatch.setattr(bench, "logprob_times", lambda N, V, H, **options: sizes(**SMALL, **options))
    for name in ("bench_sample", "bench_step"):
        part = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda work, *a, part=part, **b: part(FEW, *a, **b))
    bench.main(["--quick", "--rounds", "2", "--device", "cpu", "--json", str(tmp_path / "bench.json"), *flags])
    return json.loads((tmp_path / "bench.json").read_text())


def test_quick_writes_the_ratios_and_prints_them(monkeypatch, tmp_path, capsys):
    results = quick(monkeypatch, tmp_path)
    for key in ("time_ratio", "memory_ratio"):
        assert results["logprob"][key] > 0
    assert results["sample"]["speedup"] > 0
    printed = capsys.readouterr().out
    assert f"ours / generate      {results['sample']['speedup']:5.2f} [" in printed
    assert results["logprob"]["time_ratio"] == results["logprob"]["ways"]["loss_sum"]["to_plain"]["ratio"]
    assert f"loss_sum / plain     {100 * results['logprob']['memory_ratio']:7.2f} %" in printed
    if bench.find_spec("trl") is None:
        assert "step" not in results and "TRL is not installed" in printed
    else:
        assert results["step"]["speedup"] > 0 and "TRL / our GRPO" in printed


def test_our_steps_are_steps():
    steps = bench.our_steps(FEW)
    assert set(steps) == {"grpo", "irl"} and min(bench.alternate_once(steps, "cpu").values()) > 0


def test_a_model_with_adapters_is_measured_switch_by_switch(monkeypatch, capsys):
    monkeypatch.setattr(bench, "LARGE", dict(questions=1, group=2))
    monkeypatch.setattr(bench, "in_a_child", lambda name, *arguments: getattr(bench, name)(*arguments))
    monkeypatch.setattr(bench, "SWITCHES", dict(list(bench.SWITCHES.items())[1:3]))
    bench.main("--quick --rounds 2 --device cpu --model base --lora-rank 2 --only memory".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "--lora-rank 16" in line or "checkpointing" in line]
    assert len(rows) == 2 and all(float(row[-2]) > 0.1 for row in rows)
    steps = bench.our_steps(bench.Work(rank=2, questions=2, group=2, new_tokens=6))
    assert min(bench.alternate_once(steps, "cpu").values()) > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quik"], "did you mean '--quick'"),
        (["--rounds", "1"], "needs at least 2"),
        (["--rounds", "x"], "invalid int"),
        (["--only", "speed"], "invalid choice"),
        (["--quick", "--only", "growth"], "not part of --quick"),
        (["--json", "nowhere/at/all.json"], "there is no folder"),
        (["--json", "."], "is a folder"),
        (["--device", "tpu"], "choose auto, cpu or cuda"),
        (["--only", "memory"], "goes with --model"),
        (["--only", "growth", "--model", "base"], "goes without --model"),
        (["--lora-rank", "4"], "takes --model"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flags, message, capsys):
    assert exit_status(lambda: bench.main(flags)) == 2
    assert message in capsys.readouterr().err


def test_no_cuda_is_said(monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        bench.parse(["--device", "cuda"])
