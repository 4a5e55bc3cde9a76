"""parallel.py: two processes take the step that one process takes on all their rows; torchrun runs train.py.

Communication is gloo's, on the CPU. Each test of an equality runs `step` below in one process and in two, where each of the
two sees half of the questions.
"""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import data
import irl
import policy
import reward
import train
from engine import loading, parallel
from engine.errors import UserError
from engine.settings import METHODS, parse_settings

ROOT = Path(__file__).parents[1]
GROUP = 3
FLAGS = (
    "--demonstrations 8 --extra-questions 0 --questions 4 --group 3 --gamma 0.5 --device cpu --policy-lr 1e-3".split()
)
KINDS = {
    "exact": "",
    "ppo": "--policy-loss ppo --micro-tokens 300",
    "reinforce": "--policy-loss reinforce",
    "adamw": "",
}
TINY = ("--demonstrations 16 --extra-questions 4 --questions 4 --group 4 --eval-questions 7 --rerank-questions 6 --rerank-n 4 "
        "--eval-samples 2 --max-steps 2 --grpo-steps 2 --sft-steps 2 --fair-steps 2 "
        "--warm-up 2 --validate-every 2 --device cpu").split()  # fmt: skip


def rollout_of(tokenizer, questions: list[int]) -> policy.Rollout:
    """Made-up responses of many lengths to these questions, the same in every process."""
    examples = data.load_examples("words", "train", 4)
    rng, prompts, responses = random.Random(0), [], []
    for i, example in enumerate(examples):
        for _ in range(GROUP):
            response = data.response_ids(tokenizer, "1+1=2\n" * rng.randint(1, 6))
            if i in questions:
                prompts.append(data.prompt_ids(tokenizer, example.question))
                responses.append(response)
    batch = data.make_batch(prompts, responses)
    return policy.Rollout(batch, -batch.response_mask, torch.ones(len(batch), dtype=torch.bool))


def step(questions: list[int], kind: str) -> dict:
    """One update of the discriminator and one of the policy on these questions: weights and metrics after it."""
    s = parse_settings(FLAGS + KINDS[kind].split())
    model, tokenizer = loading.load_policy("base")
    reward_model = reward.load_reward("likelihood", "base")
    ends = reward.step_end_tokens(tokenizer, len(tokenizer))
    discriminator = reward.Discriminator(reward_model, "airl", "dense", 0, ends)
    examples = [data.load_examples("words", "train", 4)[i] for i in questions]
    loop = irl.IRL(s, tokenizer, model, discriminator, examples)
    if kind != "adamw":  # Adam's first step is the gradient's sign, and rounding decides where it is near 0
        loop.policy_optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loop.reward_optimizer = torch.optim.SGD(reward_model.parameters(), lr=1.0)
    rollout = rollout_of(tokenizer, questions)
    negatives = [[rollout.batch.response(i * GROUP + g) for g in range(GROUP)] for i in range(len(examples))]
    comparison = reward.compare(tokenizer, examples, negatives, 0, random.Random(0))
    metrics = {"discriminator": reward.update(discriminator, loop.reward_optimizer, model, comparison, 0.1, 0.5,
                                              micro_batch=5)}  # fmt: skip
    rewards = (rollout.batch.tokens * 0.1).sin() * rollout.batch.response_mask
    metrics["policy"] = loop.update_policy(rollout, rewards, loop.rewards(rollout)[1])
    weights = [p.detach().flatten() for m in (model, reward_model) for p in m.parameters()]
    return {"weights": torch.cat(weights), "metrics": metrics, "optimizer": type(loop.policy_optimizer).__name__}


def work(rank: int, port: int, folder: str) -> None:
    """What each of two processes does."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}  # fmt: skip
    parallel.start("cpu")
    torch.save({kind: step(parallel.share([0, 1, 2, 3]), kind) for kind in KINDS}, f"{folder}/{rank}.pt")
    rows = parallel.rows(lambda items: torch.tensor(items)[:, None] * 2.0, [5, 6, 7, 8, 9])
    assert rows.tolist() == [[10.0], [12.0], [14.0], [16.0], [18.0]]
    assert parallel.mean({"a": {"x": float(rank), "y": 4.0}}) == {"a": {"x": 0.5, "y": 4.0}}
    try:
        parallel.share_of(5, "--questions")
    except UserError as error:
        assert "--questions 5 cannot be shared among 2 processes" in str(error)
    else:
        raise AssertionError("5 questions were shared between 2 processes")
    assert (parallel.seed(7) == 7) == (rank == 0)
    os.chdir(folder)
    assert train.main([*TINY, "--questions", "5", "--group", "2"]) == 2 and not Path("runs").exists()
    parallel.leave()
    assert rank == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes come to, by kind of update: once for all tests, because they take seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_step_of_one(kind, ranks):
    one, (first, second) = step([0, 1, 2, 3], kind), (rank[kind] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])  # the ranks stay together, to the bit
    if kind == "adamw":  # ZeRO: each rank steps half of the weights, then sends them around
        assert first["optimizer"] == "ZeroRedundancyOptimizer" and one["optimizer"] == "AdamW"
        start = torch.cat([p.detach().flatten() for p in loading.load_policy("base")[0].parameters()])
        moved = (one["weights"][: len(start)] != start).float().mean()
        differ = ((first["weights"] - one["weights"]).abs() > 1e-5).float().mean()  # where a gradient's sign is rounding's
        assert moved > 0.3 and differ < 0.02
    else:
        assert_close(first["weights"], one["weights"], atol=1e-6, rtol=1e-5)
    for stage, values in one["metrics"].items():
        for rank in (first, second):
            assert rank["metrics"][stage] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_without_torchrun_nothing_is_shared():
    parallel.start("cpu")
    assert (parallel.world(), parallel.rank(), parallel.seed(3), parallel.share([1, 2, 3])) == (1, 0, 3, [1, 2, 3])
    assert parallel.total(2.5) == 2.5 and parallel.share_of(5, "--questions") == 5


def torchrun(folder, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    alone = dict(cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})  # two threads each are slow
    return subprocess.run([*command, str(ROOT / "train.py"), *TINY, *flags], **alone, capture_output=True, text=True)


def test_torchrun_runs_every_method(tmp_path):
    done = torchrun(tmp_path, "--method", "all", "--lora-rank", "2", "--kl-coef", "0.01", "--name", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("results: ") == 1 and done.stdout.count("greedy") == 1  # one process prints
    run = tmp_path / "runs" / "two"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["sft"] * 2 + ["sft_fair"] * 2 + [
        "likelihood warm-up"] * 2 + ["likelihood"] * 2 + ["warm-up"] * 2 + ["irl"] * 2 + ["grpo"] * 2  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert set(results["methods"]) == {"base", *METHODS} and (run / "report.html").exists()
    assert results["methods"]["base"]["t1"] * 14 == pytest.approx(round(results["methods"]["base"]["t1"] * 14))
    assert results["settings"]["questions"] == 4 and results["settings"]["seed"] == 0
    for folder in ("policy", "reward", "sft", "sft_fair", "likelihood", "grpo"):
        AutoModelForCausalLM.from_pretrained(run / folder, use_safetensors=True)
