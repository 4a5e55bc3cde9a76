"""experiments/real.py: the whole path with a tiny random model, and going on where a run was cut off."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHARED
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import rerank
import reward
from data import Example
from engine.chat import set_date
from engine.errors import UserError
from engine.runs import read_settings
from engine.settings import parse_settings
from experiments import real, real_tables

SHOT = Example("Ava has 2 pens and buys 3 . How many ?", "2+3=5", "5")


def test_parts_go_on_where_they_were_cut_off(tmp_path):
    job, calls = SimpleNamespace(folder=tmp_path, seconds=0.0), []

    def double(items, start):
        calls.append((items, start))
        if start == 2 and len(calls) == 2:
            raise KeyboardInterrupt
        return [2 * item for item in items]

    with pytest.raises(KeyboardInterrupt):
        real.in_parts(job, "x", [1, 2, 3, 4, 5], 2, double)
    with open(tmp_path / "parts" / "x.jsonl", "a") as file:
        file.write('{"found": 6, "seconds": 0.1}\n{"found": 8')  # killed while writing: half a part
    assert real.in_parts(job, "x", [1, 2, 3, 4, 5], 2, double) == [2, 4, 6, 8, 10]
    assert calls == [([1, 2], 0), ([3, 4], 2), ([3, 4], 2), ([5], 4)]
    assert real.in_parts(job, "x", [1, 2, 3, 4, 5], 2, double) == [2, 4, 6, 8, 10] and len(calls) == 4


def test_worked_examples_in_turns_or_as_text(qwen_tokenizer):
    set_date(qwen_tokenizer, "2026-01-31")
    text = qwen_tokenizer.decode(real.few_shot_ids(qwen_tokenizer, [SHOT], "What is 1+1?"))
    turns = f"<|im_start|>user\n{SHOT.question}<|im_end|>\n<|im_start|>assistant\n2+3=5\n#### 5<|im_end|>\n"
    assert turns in text and text.endswith("What is 1+1?<|im_end|>\n<|im_start|>assistant\n")
    recorded = []
    plain = lambda text, add_special_tokens: recorded.append(text) or {"input_ids": [1]}
    plain.bos_token = None
    real.few_shot_ids(plain, [SHOT], "What is 1+1?")
    assert recorded == [f"Question: {SHOT.question}\nAnswer: 2+3=5\n#### 5\n\nQuestion: What is 1+1?\nAnswer:"]


def test_a_choice_is_by_its_own_scores():
    """Two questions, two samples; the judge is right, the writer is not; the longer text is the wrong one."""
    examples = [SHOT, SHOT]
    sampled = [{"texts": ["#### 5", "so #### 6"]}, {"texts": ["so #### 6", "#### 5"]}]
    good = [dict.fromkeys(real_tables.RULES, row) for row in ([0.0, -1.0], [-1.0, 0.0])]
    bad = [dict.fromkeys(real_tables.RULES, row) for row in ([-1.0, 0.0], [0.0, -1.0])]
    found = real_tables.choices(examples, sampled, {"logprob": bad, "reward": good})
    row = found["2"]
    assert row["reward"][0] == row["shortest"][0] == row["weighted_majority_reward"][0] == 1.0
    assert row["logprob"][0] == row["longest"][0] == 0.0 and row["random"][0] == row["majority"][0] == 0.5
    assert found["auroc"]["reward"] == 1.0 and (found["length"]["reward"], found["length"]["logprob"]) == (-1.0, 1.0)


def test_what_a_judge_tells_apart():
    """Two questions with two samples each: by hand, ties half; the logit is f less log pi."""
    mean = lambda *rows: [{"mean": list(row)} for row in rows]
    f = {"pairs": mean((2.0, 1.0), (1.0, 1.0)), "sft": mean((3.0, 0.0), (3.0, 3.0))}
    pi = {"pairs": mean((2.0, 0.0), (0.0, 0.0)), "sft": mean((0.0, 0.0), (0.0, 9.0))}
    found = real_tables.told_apart({"base": {"pairs": pi["pairs"]}, "sft": pi, "reward": f, "reward_dense": {"sft": f["sft"]}})
    assert list(found) == ["logprob", "sft_logprob", "reward", "reward_logit"] and list(found["logprob"]) == ["broken"]
    assert found["reward"]["broken"][0] == 0.75 and found["reward"]["sft"][0] == 0.25
    # (0, 1), (1, 1) above (3, 0), (3, -6)?
    assert found["reward_logit"]["broken"][0] == 0.25 and found["reward_logit"]["sft"][0] == 0.375


def test_an_experts_pair():
    pairs = real.expert_pairs([SHOT, data.Example("?", "so", "")])
    assert pairs[0][0] == data.response_text(SHOT.trace, SHOT.answer) != pairs[0][1] and pairs[1][0] == pairs[1][1]
    assert pairs == real.expert_pairs([SHOT, data.Example("?", "so", "")])


def test_a_head_with_gails_logit_asks_no_policy(shipped):
    tokenizer, example = shipped[1], data.load_examples("words", "train", 1)[0]
    head = reward.load_reward("head", "base")
    discriminator = reward.Discriminator(head, "gail", "sparse", reward.find_step_end_tokens(tokenizer, len(tokenizer)))
    pool = [{"sft": [data.response_ids(tokenizer, "7")]}]
    flags = "--questions 1 --perturbed 1 --warm-up-lr 1e-3 --reward head --logit gail --granularity sparse"
    settings = parse_settings(flags.split())
    experts = data.tokenize(tokenizer, [example])
    pi = copy.deepcopy(shipped[0])
    trainer = real.RewardTrainer(settings, tokenizer, pi, discriminator, experts, pool=pool)
    losses = [trainer.step()["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] and trainer.steps_done == 8


def tiny_model(folder, tokenizer):
    """A random model with one layer."""
    size = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, **size)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("problems", ["words", "gsm8k"])
def test_every_stage_from_one_command(problems, shipped, request, tmp_path, monkeypatch, capsys):
    """Without a chat template and on made-up labels; with Qwen's, and the real data."""
    if problems == "words":
        tokenizer, source, files = shipped[1], "words", {"dev": tmp_path / "dev.jsonl", "test": tmp_path / "test.jsonl"}
        for path in files.values():
            solutions = [{"question": SHOT.question, "steps": ["2+3=5", "5+1=7"], "label": label} for label in (1, -1, 1)]
            path.write_text("\n".join(map(json.dumps, solutions)))
    else:
        tokenizer, folder = request.getfixturevalue("qwen_tokenizer"), SHARED / "data"
        if not folder.exists():
            pytest.skip("no real data beside this checkout")
        source = folder / "gsm8k"
        files = {"dev": folder / "mr_gsm8k" / "dev.jsonl", "test": folder / "processbench" / "gsm8k.json"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IRL_RESULTS", str(tmp_path / "results"))
    tiny_model(tmp_path / "tiny", tokenizer)
    command = ["--model", str(tmp_path / "tiny"), "--data", str(source), "--quick", "--device", "cpu"]
    command += ["--processbench", str(files["test"]), "--mr-gsm8k", str(files["dev"])]
    real.main(command)
    shown = capsys.readouterr().out
    folder = Path("runs/real-tiny-quick/stages")
    for stage in real.STAGES:
        assert f"{stage}: " in shown and (folder / f"{stage}.json").exists(), stage
    found = json.loads((tmp_path / "results" / "real.json").read_text())
    one = found["models"]["tiny"]
    assert found == real_tables.summary()
    assert set(one["gsm8k"]) == set(real_tables.METHODS)
    assert all(len(r["t1"]) == len(r["greedy"]) == 3 for r in one["gsm8k"].values())
    ways = {"random", "majority", "logprob", "sft_logprob", "sft_fair_logprob", "longest", "reward", "reward_dense",
            "reward_sparse", "reward_broken", "weighted_majority_reward", "oracle"}  # fmt: skip
    assert ways <= set(one["rerank"]["2"]) and ways <= set(one["rerank_sft"]["2"])
    assert {"longest", "reward_sparse", "logprob"} <= set(one["length"]) == set(one["length_sft"])
    assert {"reward", "logprob", "sft_logprob", "longest", "chance"} <= set(one["processbench"])
    assert set(one["told"]["reward"]) == {"broken", "sft"} and one["told"]["logprob"].keys() == {"broken"}
    assert set(one["seconds"]) == set(one["memory_gb"]) == set(real.STAGES)
    assert one["command"].startswith("python -m experiments.real --model tiny --data ") and str(tmp_path) not in one["command"]
    assert (one["demonstrations"], one["questions"]) == (4, 3) and one["device"].startswith("cpu")
    assert "best of n, SFT's samples" in (tmp_path / "results" / "real.md").read_text()

    # again: nothing is run; a stage whose file is gone is made of the parts that are kept, and says the same
    before = (tmp_path / "results" / "real.md").read_text().split("hours")[1]
    (folder / "judge_reward.json").unlink()
    real.main(command)
    assert (tmp_path / "results" / "real.md").read_text().split("hours")[1] == before
    assert "sft: " not in capsys.readouterr().out
    # the folder is a run that the other programs take
    settings = read_settings(Path("runs/real-tiny-quick"))
    assert settings["fair_temperature"] == json.loads((folder / "sft_fair.json").read_text())["temperature"]
    rerank.main(["--run", "runs/real-tiny-quick", "--candidates", "runs/real-tiny-quick/few_shot.jsonl", "--device", "cpu"])
    assert "is text, whoever wrote it" in capsys.readouterr().out
    (folder / "zero_shot.json").unlink()
    with pytest.raises(UserError, match="was begun with another seed"):
        real.main([*command, "--seed", "1"])


@pytest.mark.parametrize("flags, says", [
    ([], "--model is missing"),
    (["--model", "x", "--samples", "0"], "--samples must be"),
    (["--model", "x", "--only", "few_shott"], "did you mean 'few_shot'"),
])  # fmt: skip
def test_bad_flags(flags, says):
    with pytest.raises(UserError, match=says):
        real.main(flags)
