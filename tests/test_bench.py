"""experiments/bench.py at minuscule sizes: what it counts and writes. No test looks at how fast anything was."""

import copy
import json

import pytest

import train
from engine.errors import exit_status
from engine.settings import parse_settings
from experiments import bench, cards

SMALL = dict(N=64, V=512, H=16)
FEW = "--questions 2 --group 2 --max-new-tokens 6 --device cpu"


def few():
    return train.Run(parse_settings(f"{bench.FLAGS} {FEW}".split()))


def test_ratio_is_of_rounds_not_of_medians():
    # Medians are 3 and 2; the rounds' ratios are 1/2, 1 and 8.
    assert bench.ratio([3.0, 2.0, 8.0], [6.0, 2.0, 1.0]) == {"ratio": 1.0, "low": 0.5, "high": 8.0}
    with pytest.raises(ValueError):
        bench.ratio([1.0, 2.0], [1.0])


def test_ways_run_in_turn_and_the_first_round_does_not_count():
    order = []
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = bench.alternate(ways, rounds=2)
    assert order == list("ababab")
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_what_is_right_is_called_right_and_what_is_wrong_wrong(monkeypatch):
    results = bench.right("cpu", SMALL)
    assert set(results) == {"token_logprobs", "expected_reward_sum"}
    assert all(row["right"] for row in results.values())
    monkeypatch.setattr(bench, "ours", lambda *inputs: 1.01 * bench.plain(*inputs))
    assert not bench.right("cpu", SMALL)["token_logprobs"]["right"]


def test_twice_the_tensors_are_twice_the_peak():
    hold = lambda count: [bench.torch.zeros(1000) for _ in range(count)]
    one, two = (bench.peak_bytes(lambda count=count: hold(count), "cpu") for count in (10, 20))
    assert one >= 40_000 and two == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize("rank, recompute", [(0, False), (4, True)])
def test_memory_is_measured_beside_the_arithmetic(rank, recompute, monkeypatch):
    config = copy.deepcopy(cards.SHAPES["Qwen2.5-0.5B"])
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 160, 96
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    config.num_attention_heads, config.head_dim = 4, 16
    monkeypatch.setattr(cards, "PROMPT", 12)
    monkeypatch.setattr(cards, "RESPONSE", 8)
    row = bench.memory_of(config, rank, recompute, 3, "cpu")
    for part in ("step", "sampling"):  # on a CPU without autocast: of the same size, no more
        assert 0.3 < row["measured"][part] / row["arithmetic"][part] < 4


def test_generate_counts_up_to_the_first_end_token(shipped, monkeypatch):
    model, tokenizer = shipped
    end, prompt = tokenizer.eos_token_id, [5, 6, 7]
    x = end + 4
    rows = [[*prompt, x, end, x, end], [*prompt, x, x, x, x], [*prompt, end, end, end, end]]
    monkeypatch.setattr(model, "generate", lambda **_: bench.torch.tensor(rows))
    assert bench.generate(model, tokenizer, [prompt], 3, 4) == 2 + 4 + 1


def test_a_run_that_is_not_finite_is_not_right():
    loop = few().make_loop()
    assert bench.run_some_steps(loop, 2)["right"]
    loop.policy_model.get_decoder().norm.weight.data.fill_(float("nan"))
    loop.update_discriminator = lambda *_: {}
    assert not bench.run_some_steps(loop, 1)["right"]


def test_one_command_writes_one_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FLAGS", f"{bench.FLAGS} --max-new-tokens 6")
    monkeypatch.setattr(bench, "ROWS_OF_BASE", "--questions 2 --group 2")
    monkeypatch.setattr(bench, "SMALL", SMALL)
    file = tmp_path / "bench.json"
    assert exit_status(lambda: bench.main(["--quick", "--device", "cpu", "--json", str(file)])) == 0
    results = json.loads(file.read_text())
    assert results["right"]["token_logprobs"]["right"] and results["run"]["right"]
    assert (
        results["sample"]["ratio"] > 0 and results["logprob"]["token_logprobs"]["bytes"]["ours"] > 0
    )
    assert ("step" in results) == bool(bench.find_spec("trl"))
    assert "turn on: nothing" in capsys.readouterr().out


def test_what_pays_is_turned_on():
    row = lambda step: {"measured": {"step": step, "sampling": 0}}
    results = {
        "right": {"--fused": {"right": True}},
        "logprob": {"--fused": {"high": 0.9}},
        "memory": {"all weights": row(100), "--lora-rank 16": row(10)},
    }
    fused, memory = bench.turn_on(results, 50)
    assert fused.startswith("--fused") and memory.endswith(": --lora-rank 16")
    results["right"]["--fused"]["right"] = False
    assert "--fused" not in " ".join(bench.turn_on(results, 50))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quik"], "unrecognized arguments: --quik"),
        (["--rounds", "x"], "invalid int"),
        (["--only", "speed"], "invalid choice"),
        (["--json", "nowhere/at/all.json"], "there is no such folder"),
        (["--json", "."], "is a folder"),
        (["--device", "tpu"], "cannot be used here"),
        (["--lora-rank", "-1"], "must be from 0"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flags, message, capsys):
    assert exit_status(lambda: bench.main(flags)) == 2
    assert message in capsys.readouterr().err
