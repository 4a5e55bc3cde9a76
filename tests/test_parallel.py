"""Two processes take the step that one process takes on all their rows; they save, stop and go on
together.

Communication is gloo's, on the CPU. Processes are forked from one that has imported torch and
transformers; one test starts torchrun itself.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import discriminator_update, examples_of
from safetensors.torch import load_file
from torch.testing import assert_close

import data
import irl
import policy
import reward
import train
from engine import loading, parallel
from engine.errors import UserError
from engine.keeper import Keeper
from engine.settings import parse_settings

ROOT = Path(__file__).parents[1]
GROUP = 3
FLAGS = (
    "--demonstrations 8 --extra-questions 0 --questions 4 --group 3 --gamma 0.5 --policy-lr 1e-3"
).split()
KINDS = {
    "exact": "",
    "ppo": "--policy-loss ppo --micro-tokens 300",
    "adamw": "",
}
TINY = (
    "--demonstrations 8 --extra-questions 4 --questions 2 --group 2 --eval-questions 3 "
    "--max-new-tokens 8 --max-steps 2 --grpo-steps 2 --sft-steps 2 --fair-steps 2 --warm-up 2 "
    "--device cpu"
).split()


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
    """One update of the discriminator and one of the policy on these questions: weights and metrics
    after it.
    """
    s = parse_settings(FLAGS + KINDS[kind].split())
    model, tokenizer = loading.load_policy("base")
    reward_model = reward.load_reward("likelihood", "base")
    ends = reward.find_step_end_tokens(tokenizer, len(tokenizer))
    discriminator = reward.Discriminator(reward_model, "airl", "dense", ends)
    examples = [examples_of(tokenizer, "words", "train", 4)[i] for i in questions]
    loop = irl.IRL(s, tokenizer, model, discriminator, examples)
    if (
        kind != "adamw"
    ):  # Adam's first step is the gradient's sign, and rounding decides where it is near 0
        loop.policy_optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loop.reward_optimizer = torch.optim.SGD(reward_model.parameters(), lr=1.0)
    rollout = rollout_of(tokenizer, questions)
    negatives = [
        [rollout.batch.response(i * GROUP + g) for g in range(GROUP)] for i in range(len(examples))
    ]
    comparison = reward.compare(tokenizer, examples, negatives, 0, random.Random(0))
    metrics = {
        "discriminator": discriminator_update(
            discriminator, loop.reward_optimizer, model, comparison, 0.1, 0.5, micro_batch=5
        )
    }
    rewards = (rollout.batch.tokens * 0.1).sin() * rollout.batch.response_mask
    metrics["policy"] = loop.update_policy(rollout, rewards, loop.rewards(rollout)[1])
    weights = [p.detach().flatten() for m in (model, reward_model) for p in m.parameters()]
    return {
        "weights": torch.cat(weights),
        "metrics": metrics,
        "states": len(loop.policy_optimizer.state),
    }


def worth_of_cut_off(questions: list[int]) -> torch.Tensor:
    """The rewards [B] of traces of these questions, the second of each cut off: a score per trace,
    its length in tokens.
    """
    s = parse_settings(
        FLAGS + "--gamma 1 --reward head --granularity sparse --policy-loss ppo".split()
    )
    model, tokenizer = loading.load_policy("base")
    reward_model = reward.load_reward("head", "base")
    reward_model.scores = lambda batch, hidden=None: (
        batch.response_mask.sum(1, keepdim=True) * batch.response_mask
    )
    discriminator = reward.make_discriminator(reward_model, tokenizer, "gail", "sparse")
    loop = irl.IRL(s, tokenizer, model, discriminator, [])
    rollout = rollout_of(tokenizer, questions)
    rollout.finished[1::GROUP] = False
    return loop.rewards(rollout)[0].sum(1)


def work(rank: int, folder: Path) -> None:
    """What each of two processes does."""
    parallel.start("cpu")
    mine = parallel.share([0, 1, 2, 3])
    torch.save(
        {kind: step(mine, kind) for kind in KINDS} | {"cut off": worth_of_cut_off(mine)},
        f"{rank}.pt",
    )
    rows = parallel.rows(lambda items: torch.tensor(items)[:, None] * 2.0, [5, 6, 7, 8, 9])
    assert rows.tolist() == [[10.0], [12.0], [14.0], [16.0], [18.0]]
    assert parallel.mean({"a/x": float(rank), "a/y": 4.0, "b/x": 2 * rank}) == {
        "a/x": 0.5,
        "a/y": 4.0,
        "b/x": 1.0,
    }
    try:
        parallel.share_of(5, "--questions")
    except UserError as error:
        assert "--questions 5 cannot be shared among 2 processes" in str(error)
    else:
        raise AssertionError("5 questions were shared between 2 processes")
    assert (
        parallel.lowest([2.5, -1.0][rank]) == -1.0
        and parallel.lowest([math.inf, math.inf][rank]) == math.inf
    )
    assert (parallel.seed(7) == 7) == (rank == 0)
    assert parallel.even([1, 2, 3], "demonstrations") == [1, 2] and parallel.even(
        [1, 2], "demonstrations"
    ) == [1, 2]
    parallel.check_same_folder(folder)
    try:
        parallel.check_same_folder(folder if rank == 0 else folder / "elsewhere")
    except UserError as error:  # on both: neither waits for the other
        assert "1 of 2 processes do not see" in str(error)
    else:
        raise AssertionError("two folders were taken for one")
    parallel.wait()  # rank 0 removes its mark
    assert not list(folder.glob(".seen*"))
    with torch.no_grad():
        run = train.Run(
            parse_settings(
                [*TINY, "--demonstrations", "3", "--extra-questions", "5", "--method", "sft"]
            ),
            device="cpu",
        )
    assert (len(run.experts), len(run.extra), len(run.answered)) == (1, 2, 3)  # as many on both
    assert run.counts["demonstrations"] == 2 and run.counts["extra_questions"] == 4
    assert train.main([*TINY, "--questions", "5"]) == 2 and not Path("runs").exists()
    parallel.leave()
    assert rank == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def begin(rank: int, port: int, folder: Path, function, arguments) -> None:
    """A process as torchrun starts it; what it prints goes to <folder>/<rank>."""
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    os.chdir(folder)
    sys.stdout = sys.stderr = open(str(rank), "w", buffering=1)
    torch.set_num_threads(1)
    sys.exit(function(rank, *arguments))


def in_two(folder: Path, function, *arguments) -> tuple[list[int], list[str]]:
    """function(rank, *arguments) in two processes: their exit statuses, and what they printed."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(
        ["torch.distributed", "transformers.models.qwen2.modeling_qwen2"]
    )
    pair = [
        context.Process(target=begin, args=(rank, port, folder, function, arguments))
        for rank in (0, 1)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    return [process.exitcode for process in pair], [
        (folder / str(rank)).read_text() for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes come to, by kind of update: once for all tests, because they take seconds
    to start.
    """
    folder = tmp_path_factory.mktemp("ranks")
    statuses, printed = in_two(folder, work, folder)
    assert statuses == [0, 0], printed
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_step_of_one(kind, ranks):
    one, (first, second) = step([0, 1, 2, 3], kind), (rank[kind] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])  # the ranks stay together, to the bit
    if kind == "adamw":  # ZeRO: each rank steps half of the weights, then sends them around
        assert (
            first["states"] + second["states"] == one["states"]
            and abs(first["states"] - second["states"]) <= 1
        )
        start = torch.cat(
            [p.detach().flatten() for p in loading.load_policy("base")[0].parameters()]
        )
        moved = (one["weights"][: len(start)] != start).float().mean()
        differ = (
            ((first["weights"] - one["weights"]).abs() > 1e-5).float().mean()
        )  # where a gradient's sign is rounding's
        assert moved > 0.3 and differ < 0.02
    else:
        assert_close(first["weights"], one["weights"], atol=1e-6, rtol=1e-5)
    for stage, values in one["metrics"].items():
        for rank in (first, second):
            assert rank["metrics"][stage] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_a_trace_that_was_cut_off_is_worth_the_same_in_every_process(ranks):
    """Below every finished one of all processes: as if one had all rows."""
    rows = worth_of_cut_off([0, 1, 2, 3]).view(4, GROUP)
    for rank in (0, 1):
        assert torch.equal(ranks[rank]["cut off"].view(2, GROUP), rows[rank::2])
    assert rows[:, 1].tolist() == [rows[:, [0, 2]].min() - 1] * 4


def test_without_torchrun_nothing_is_shared():
    parallel.start("cpu")
    assert (parallel.world(), parallel.rank(), parallel.seed(3), parallel.share([1, 2, 3])) == (
        1,
        0,
        3,
        [1, 2, 3],
    )
    assert parallel.even([1, 2, 3], "demonstrations") == [1, 2, 3]
    assert parallel.total(2.5) == 2.5 and parallel.share_of(5, "--questions") == 5


# --- runs -----------------------------------------------------------------------------------------
# ------------------

ALL = [*TINY, *"--method sft,irl,grpo --lora-rank 2 --kl-coef 0.01".split()]
RESUME = ["--resume", "--name", "demo"]
RUN = Path("runs/demo")


def run(rank: int, flags: list[str], number=0, asked=0, ranks=(0, 1), saving=False) -> int:
    """train.py with these flags.

    These ranks get the signal `asked` in the `number`-th call of IRL.step. The clock tells rank 1
    all the time that it is time to save, which is not its to say; with `saving` rank 0, too.
    """
    calls = []
    real = irl.IRL.step

    def step(self):
        calls.append(1)
        if len(calls) == number and rank in ranks:
            os.kill(os.getpid(), asked)
        return real(self)

    irl.IRL.step = step
    train.VALIDATION_QUESTIONS = 4
    train.RERANK_CANDIDATES = 2
    if rank == 1 or saving:
        Keeper.save_is_due = lambda *_: True
    return train.main(flags)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes: (its folder, what they printed)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    statuses, printed = in_two(folder, run, ALL)
    assert statuses == [0, 0], printed
    return folder / RUN, printed


def test_two_processes_run_every_kind_of_trainer(undisturbed):
    folder, printed = undisturbed
    assert printed[0].count("results: ") == 1 and printed[1] == ""  # one prints
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    methods = ["sft", "warm-up", "irl", "grpo"]
    assert [line["method"] for line in lines] == [method for method in methods for _ in range(2)]
    results = json.loads((folder / "results.json").read_text())
    assert list(results["methods"]) == ["base", "sft", "irl", "grpo"]
    assert (folder / "report.html").exists()
    right = results["methods"]["base"]["t1"] * 3 * train.EVAL_SAMPLES
    assert right == pytest.approx(round(right))
    assert results["settings"]["questions"] == 2 and results["settings"]["seed"] == 0
    for name in ("policy", "reward", "sft", "grpo"):
        loading.load_causal(str(folder / name), torch.device("cpu"))


def test_stopped_then_killed_two_processes_go_on_bit_for_bit(
    undisturbed, tmp_path, monkeypatch, capsys
):
    # One is asked to stop, in irl's first step.
    statuses, printed = in_two(tmp_path, run, ALL, 1, signal.SIGTERM, (1,))
    assert statuses == [143, 143], printed
    assert printed[0].endswith(
        "stopped by SIGTERM: what was saved stands. Go on with: torchrun --nproc-per-node=2 "
        "--nnodes=1 train.py --resume --name demo\n"
    )
    # After three phases: by the clock rank 0 has saved nothing in between.
    newest = tmp_path / RUN / "checkpoints" / "000004"
    assert {file.name for file in newest.iterdir()} == {
        "state.json",
        "tensors.safetensors",
        "state-rank1.json",
        "tensors-rank1.safetensors",
        "checksums.json",
    }
    first, second = (
        json.loads((newest / name).read_text()) for name in ("state.json", "state-rank1.json")
    )
    assert first["progress"]["steps"]["irl"] == second["progress"]["steps"]["irl"] == 1
    first, second = first["trainer"], second["trainer"]
    assert first["policy_model"] and not second["policy_model"]  # the same: written once
    assert not first["policy_optimizer"]["state"].keys() & second["policy_optimizer"]["state"]

    monkeypatch.chdir(tmp_path)
    assert train.main(RESUME) == 2
    assert capsys.readouterr().err == (
        "error: runs/demo/checkpoints/000004 is of 2 processes, not 1: use torchrun "
        "--nproc-per-node=2\n"
    )

    statuses, printed = in_two(tmp_path, run, RESUME, 1, signal.SIGKILL, (0, 1), True)
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL], printed
    assert "'sft': 2, 'warm-up': 2, 'irl': 1" in printed[0]
    statuses, printed = in_two(tmp_path, run, RESUME)
    assert statuses == [0, 0] and printed[1] == "", printed
    whole = undisturbed[0]
    parts = tmp_path / RUN
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    for model in whole.glob("*/model.safetensors"):
        other = load_file(parts / model.relative_to(whole))
        assert_close(other, load_file(model), rtol=0, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_share_a_folder_or_are_refused(tmp_path, shared):
    """Two agents of torchrun on one machine, each a "machine" with one process.

    Where they share, one gets a signal, passes it on, and both stop at the same step.
    """
    port = str(free_port())
    agents = []
    for node in ("0", "1"):
        folder = tmp_path if shared else tmp_path / node
        folder.mkdir(exist_ok=True)
        torchrun = "-m torch.distributed.run --nproc-per-node=1 --nnodes=2 --node-rank".split()
        command = [sys.executable, *torchrun, node, "--master-addr=127.0.0.1", "--master-port"]
        command += [port, str(ROOT / "train.py"), *TINY, "--method", "sft", "--sft-steps", "10000"]
        agents.append(
            subprocess.Popen(
                command, cwd=folder, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
    metrics = tmp_path / RUN / "metrics.jsonl"
    if shared:
        while agents[0].poll() is None and not (metrics.exists() and metrics.read_bytes()):
            time.sleep(0.05)
        agents[0].send_signal(signal.SIGTERM)
    errors = [agent.communicate()[1] for agent in agents]
    assert all(agent.returncode for agent in agents)
    if not shared:
        for error in errors:
            assert error.count("error: 1 of 2 processes do not see runs/demo") == 1, error
        return
    assert "".join(errors).count("stopped by SIGTERM: what was saved stands") == 1, errors
    newest = max((tmp_path / RUN / "checkpoints").iterdir())
    for file in newest.glob("state*.json"):
        steps = json.loads(file.read_text())["progress"]["steps"]["sft"]
        assert steps == metrics.read_bytes().count(b"\n")
