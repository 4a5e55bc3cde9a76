"""What this code costs beside its neighbours: ratios measured in one run, in turn, with their spread.

    1. log-probabilities   loss_sum (whose "forward" computes the gradients, too), logprobs, and the fused kernels on CUDA,
                           against plain PyTorch, torch.compile and Liger: time, memory. The ratios are those of loss_sum,
                           which the policy's training takes; the reward's takes logprobs
    2. sampling            policy.sample against transformers' generate: tokens per second
    3. a policy step       baselines.GRPO.step against TRL's GRPOTrainer, and irl.IRL.step beside them
    4. growth              with rows, length and vocabulary
    5. memory              the most that one iteration of IRL holds, switch by switch

    python -m experiments.bench                              # 1 to 4; on two cores it takes a quarter of an hour
    python -m experiments.bench --quick --json bench.json    # small sizes, under a minute
    python -m experiments.bench --model DIR --lora-rank 16   # 2, 3 and 5 on a model of yours, with adapters

Each round runs every competitor once, A B C A B C .., and gives one ratio; a ratio is the median of the rounds', its
spread their smallest and largest. So whatever else keeps the machine busy slows both sides of a ratio alike. Seconds
are compared with a floor: the matrix products that cannot be avoided, at the rate this machine multiplies a large
matrix, measured in the same rounds.

Memory is the peak beyond the inputs, each measured in a process of its own, because what a process has once held it
still counts. The two gradients, which every method has to hand back, are taken off (and reported with, too).

Log-probabilities want plain tensors, sampling and steps the base that ships here. Torch's thread count is left as it
is (OMP_NUM_THREADS sets it).
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

import data
from engine import loading, logprob
from engine.errors import Parser, UserError, exit_status
from engine.settings import parse_settings
from experiments import fused

# policy, irl, baselines and train bring transformers, seconds of import: the functions that need them import them, so
# that the processes which measure memory start quickly and small.

ROOT = Path(__file__).parents[1]
CLAIM = dict(N=8192, V=151_936, H=896)  # B*T tokens, Qwen2.5's vocabulary, the 0.5B model's width


@dataclass(frozen=True)
class Work:
    """What is sampled from and stepped on: words problems, whatever the model."""

    model: str = "base"
    rank: int = 0  # of the adapters; 0: all weights train
    questions: int = 32
    group: int = 8
    new_tokens: int = 64
    device: str = "cpu"

    def load(self):
        """(model, tokenizer, problems)."""
        loading.quiet()
        model, tokenizer = loading.load_policy(self.model, self.device)
        return model.eval(), tokenizer, data.load_examples("words", "train", 256)

    @property
    def flags(self) -> str:
        """The same for train.py. Rates so small that all keep writing traces of one length."""
        rows = min(96, self.questions * self.group)
        return (f"--model {self.model} --data words --demonstrations 128 --extra-questions 128 --questions {self.questions} "
                f"--group {self.group} --max-new-tokens {self.new_tokens} --micro-batch {rows} --eval-questions 4 "
                f"--lora-rank {self.rank} --device {self.device} --grpo-lr 1e-6 --policy-lr 1e-6 --reward-lr 1e-6")  # fmt: skip

    def run(self, more: str = ""):
        """A train.Run that has loaded everything and writes nothing."""
        import train

        settings = parse_settings(f"{self.flags} {more} --method irl --start base".split())
        return train.Run(settings, device=self.device)


LARGE = dict(questions=3, group=8, new_tokens=128)  # what two cores can do with half a billion weights
# experiments/cards.py's switches, a row each on top of those above it
SWITCHES = {
    "all weights": "--lora-rank 0",
    "--lora-rank 16": "--lora-rank 16",
    "and --gradient-checkpointing": "--lora-rank 16 --gradient-checkpointing",
    "and --sample-rows 4": "--lora-rank 16 --gradient-checkpointing --sample-rows 4",
    "and --weights bf16": "--lora-rank 16 --gradient-checkpointing --sample-rows 4 --weights bf16",
}

# ---------------------------------------------------------------------------------------------------------------
# Rounds and ratios
# ---------------------------------------------------------------------------------------------------------------


def alternate(ways: dict[str, Callable], rounds: int, seconds: float = math.inf, device="cpu") -> dict[str, list]:
    """Run every way once per round, after one round that does not count: its seconds, or what it returns if not None.

    Stops early, but not before two rounds, when `seconds` have passed.

    >>> alternate({"one": lambda: 1.0, "two": lambda: 2.0}, rounds=2)
    {'one': [1.0, 1.0], 'two': [2.0, 2.0]}
    """
    results, begin = {name: [] for name in ways}, time.perf_counter()
    for round_ in range(rounds + 1):
        if round_ > 2 and time.perf_counter() - begin > seconds:
            break
        for name, way in ways.items():
            synchronize(device)
            start = time.perf_counter()
            value = way()
            synchronize(device)
            value = time.perf_counter() - start if value is None else value
            if round_:
                results[name].append(value)
    return results


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def ratio(above: list[float], below: list[float]) -> dict:
    """The median over rounds of above / below, and the smallest and the largest.

    >>> ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    {'ratio': 2.0, 'low': 1.5, 'high': 4.0, 'rounds': 3}
    """
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each), "rounds": len(each)}


def matmul_rate(device="cpu", size: int = 1024, repeats: int = 3) -> float:
    """Floating point operations per second of a large float32 matrix product, the best of a few."""
    a = torch.randn(size, size, device=device)
    times = alternate({"mm": lambda: (torch.mm(a, a), None)[1]}, repeats, device=device)["mm"]
    return 2 * size**3 / min(times)


def copy_rate(device="cpu", megabytes: int = 64) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    a = torch.zeros(megabytes * 2**18, device=device)
    b = torch.zeros_like(a)
    times = alternate({"copy": lambda: (b.copy_(a), None)[1]}, 3, device=device)["copy"]
    return 2 * a.numel() * 4 / min(times)


# ---------------------------------------------------------------------------------------------------------------
# 1. Log-probabilities
# ---------------------------------------------------------------------------------------------------------------


def plain(hidden, weight, tokens) -> torch.Tensor:
    """log pi(tokens) with all logits in memory: [N]."""
    return logprob.of_tokens(logprob.product(hidden, weight), tokens, 1.0, 0.0)


def logprob_ways(device="cpu", compiled: bool = False) -> tuple[dict[str, Callable], list[str]]:
    """(name -> function(hidden, weight, tokens) -> the mean of log pi or of its opposite, a line for each competitor that is
    not here)."""
    ways, absent = {"plain": plain, "logprobs": logprob.logprobs}, []
    if compiled and torch.device(device).type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        absent.append("torch.compile: no C++ compiler here, left out")
    elif compiled:
        ways["compiled"] = torch.compile(plain)
    if torch.device(device).type != "cuda":
        absent.append("Triton kernels, Liger: no CUDA here, left out")
    elif fused.triton is None:
        absent.append("Triton kernels: triton is not installed, left out")
    else:
        ways["triton"] = lambda *inputs: fused.logprobs(*inputs, kind=torch.float32)
    ways = {name: lambda *inputs, way=way: way(*inputs).mean() for name, way in ways.items()}
    ways["loss_sum"] = lambda *inputs: logprob.loss_sum(*inputs, lambda logp, rows: logp) / len(inputs[0])
    if torch.device(device).type == "cuda" and find_spec("liger_kernel") is None:
        absent.append("Liger: liger-kernel is not installed, left out")
    elif torch.device(device).type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()  # the mean of -log pi, its gradients computed during forward
        ways["liger"] = lambda hidden, weight, tokens: liger(weight, hidden, tokens)
    return ways, absent


def logprob_inputs(N: int, V: int, H: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, H] and weight [V, H], which want gradients, tokens [N]; logits of about one unit."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, device=device)
    weight = torch.randn(V, H, generator=generator, device=device).div_(H**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), generator=generator, device=device)


def forward_backward(way: Callable, hidden, weight, tokens) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward."""
    hidden.grad = weight.grad = None
    synchronize(hidden.device)
    start = time.perf_counter()
    loss = way(hidden, weight, tokens)
    synchronize(hidden.device)
    middle = time.perf_counter()
    loss.backward()
    synchronize(hidden.device)
    return middle - start, time.perf_counter() - start


def logprob_times(N: int, V: int, H: int, rounds: int, seconds: float, device="cpu", compiled=False):
    """(forward's seconds, forward and backward's seconds, lines for what is not here), each name -> one per round.
    `product` in the second is one product hidden weight^T, which the machine cannot do without."""
    inputs = logprob_inputs(N, V, H, device)
    ways, absent = logprob_ways(device, compiled)
    out = torch.empty(N, V, device=device)
    runs = {name: lambda way=way: forward_backward(way, *inputs) for name, way in ways.items()}
    runs["product"] = lambda: (torch.mm(inputs[0].detach(), inputs[1].detach().T, out=out), None)[1]
    both = alternate(runs, rounds, seconds, device)
    product = both.pop("product")
    forward, total = ({name: [pair[i] for pair in pairs] for name, pairs in both.items()} for i in (0, 1))
    return forward, total | {"product": product}, absent


def resident_peak() -> int | None:
    """The most bytes this process has had in memory, or None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's peak from before exec, too
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def logprob_peak(name: str, N: int, V: int, H: int, device="cpu") -> int | None:
    """Peak bytes beyond the inputs of one forward and backward, the two gradients included. For a fresh process."""
    inputs = logprob_inputs(N, V, H, device)
    way = logprob_ways(device, name == "compiled")[0][name]
    forward_backward(way, *logprob_inputs(8, 64, 16, device))  # loads the libraries
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = resident_peak(), resident_peak
    forward_backward(way, *inputs)
    return None if before is None else peak() - before


def in_a_child(function: str, *arguments) -> object:
    """experiments.bench.function(*arguments) in a process of its own; None, and a line, where that fails."""
    code = f"import json; from experiments import bench; print(json.dumps(bench.{function}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        print(f"  {function}{arguments}: not measured ({reason})")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def available_bytes(device="cpu") -> int:
    """Free memory, 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024 if meminfo.exists() else 0


def logprob_memory(names: list[str], N: int, V: int, H: int, device="cpu") -> dict:
    """Peak bytes of each way at [N, V], and those of loss_sum / plain beyond the gradients.

    Where [N, V] several times over does not fit, plain's peak is extrapolated in a line from N/8 and N/4 rows and
    flagged. (From fewer, the line would be too flat: there the peak is the gradient of the matrix and one [N, V], later
    it is three of those.)
    """
    gradients, extrapolated = 4 * (N + V) * H, False
    peaks = {name: in_a_child("logprob_peak", name, N, V, H, device) for name in names if name != "plain"}
    plain = None
    if 6 * 4 * N * V < 0.7 * available_bytes(device):  # plain holds at most five, and somebody else may want some
        plain = in_a_child("logprob_peak", "plain", N, V, H, device)
    if plain is None:
        small, large = N // 8, N // 4
        low, high = (in_a_child("logprob_peak", "plain", rows, V, H, device) for rows in (small, large))
        if low and high:
            plain, extrapolated = high + (high - low) / (large - small) * (N - large), True
    result = {"N": N, "V": V, "H": H, "extrapolated": extrapolated, "gradients_bytes": gradients}
    result["bytes"] = {"plain": plain} | peaks
    ours = peaks.get("loss_sum")
    if plain and ours is not None:
        # Plain's own peak may come before its gradients exist: taking them off is to our disadvantage.
        result["memory_ratio"] = max(0, ours - gradients) / (plain - gradients)
        result["memory_ratio_with_gradients"] = ours / plain
    return result


def bench_logprob(quick: bool, rounds: int, device="cpu") -> dict:
    """time_ratio and memory_ratio of loss_sum, which training takes, to plain. (On CUDA, too, all multiply in float32.)"""
    on_gpu = torch.device(device).type == "cuda"
    sizes = dict(N=512, V=32768, H=256) if quick else CLAIM | dict(N=8192 if on_gpu else 512)
    forward, times, absent = logprob_times(**sizes, rounds=rounds, seconds=4 if quick else 240, device=device, compiled=not quick)
    # plain and loss_sum have three products; logprobs multiplies again instead of keeping the logits: four
    result = sizes | {
        "dtype": "float32",
        "time_ratio": ratio(times["loss_sum"], times["plain"])["ratio"],
        "flop_per_product": 2 * sizes["N"] * sizes["V"] * sizes["H"],
        "ways": {
            name: {
                "seconds": statistics.median(times[name]),
                "forward_seconds": statistics.median(forward[name]),
                "to_plain": ratio(times[name], times["plain"]),
                "forward_to_plain": ratio(forward[name], forward["plain"]),
                "products_to_floor": ratio(times[name], [3 * t for t in times["product"]]),
            }
            for name in forward
        },
    }
    memory = logprob_memory([name for name in forward if name != "compiled"],
                            **(sizes | dict(N=4096) if quick else CLAIM), device=device)  # fmt: skip
    result |= {"memory": memory} | ({"memory_ratio": memory["memory_ratio"]} if "memory_ratio" in memory else {})
    return result | {"left_out": absent + (["torch.compile: not in --quick"] if quick else [])}


# ---------------------------------------------------------------------------------------------------------------
# 2. Sampling
# ---------------------------------------------------------------------------------------------------------------


def generate(model, tokenizer, prompts: list[list[int]], group: int, new_tokens: int) -> int:
    """transformers' own sampling of the same thing. Returns the number of response tokens, end tokens included."""
    longest, ends = max(map(len, prompts)), data.end_tokens(tokenizer, model)
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        rows = model.generate(
            input_ids=tokens, attention_mask=mask, num_return_sequences=group, max_new_tokens=new_tokens,
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id,
        )[:, longest:]  # fmt: skip
    ended = torch.isin(rows, torch.tensor(ends, device=rows.device)).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def sample_ways(model, tokenizer, examples, work: Work) -> dict[str, Callable]:
    """Ways that return tokens per second, on the same prompts."""
    import policy

    prompts = [data.prompt_ids(tokenizer, e.question) for e in examples[: work.questions]]
    generator, ends = torch.Generator(model.device).manual_seed(0), data.end_tokens(tokenizer, model)

    def ours() -> int:
        rollout = policy.sample(model, prompts, ends, work.new_tokens, work.group, generator=generator)
        return int(rollout.batch.response_mask.sum())

    def rate(way: Callable[[], int]) -> float:
        synchronize(model.device)
        start = time.perf_counter()
        tokens = way()
        synchronize(model.device)
        return tokens / (time.perf_counter() - start)

    return {
        "ours": lambda: rate(ours),
        "generate": lambda: rate(lambda: generate(model, tokenizer, prompts, work.group, work.new_tokens)),
    }


def bench_sample(work: Work, rounds: int, seconds: float) -> dict:
    """Tokens per second of policy.sample over generate's. Ours also returns each token's log-probability."""
    model, tokenizer, examples = work.load()
    rates = alternate(sample_ways(model, tokenizer, examples, work), rounds, seconds, work.device)
    each = ratio(rates["ours"], rates["generate"])
    parameters = sum(p.numel() for p in model.parameters())
    tokens_per_second = statistics.median(rates["ours"])
    return {
        "speedup": each["ratio"], "low": each["low"], "high": each["high"], "rounds": each["rounds"],
        **asdict(work), "parameters": parameters,
        "tokens_per_second": tokens_per_second, "generate_tokens_per_second": statistics.median(rates["generate"]),
        # 2 operations per parameter and token. A small model is far from it: its cost is the calls, not the sums.
        "arithmetic_share": 2 * parameters * tokens_per_second / matmul_rate(work.device),
        # A step must read all weights once for at most questions * group tokens.
        "bandwidth_share": 4 * parameters * tokens_per_second / (work.questions * work.group) / copy_rate(work.device),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# 3. A policy step
# ---------------------------------------------------------------------------------------------------------------


def our_steps(work: Work) -> dict[str, Callable]:
    """One optimizer step of GRPO, and an iteration of IRL (rollout, discriminator, rewards, policy)."""
    import baselines

    run = work.run()
    grpo, loop = baselines.GRPO(run.process_settings, run.tokenizer, run.to_train(), run.answered), run.make_loop()
    return {"grpo": lambda: (grpo.step(), None)[1], "irl": lambda: (loop.step(), None)[1]}


def trl_times(ours: dict[str, Callable], work: Work, rounds: int, seconds=math.inf) -> dict:
    """Seconds of TRL's steps and of ours, in turn: ours run between two steps of its GRPOTrainer.

    The same model, adapters (by peft), problems, verifier, rate and sizes; no KL, no checkpoints of activations, no logging
    or saving, one optimizer step per generation. Its clock starts at on_step_begin, which comes before generation.
    """
    import datasets
    import transformers
    import trl

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # TRL's own flags, renamed
    device, rows = work.device, work.questions * work.group
    model, tokenizer, examples = work.load()
    tokenizer.padding_side = "left"
    by_prompt = {tokenizer.decode(data.prompt_ids(tokenizer, e.question)): e for e in examples}
    adapters = None
    if work.rank:
        import peft

        adapters = peft.LoraConfig(r=work.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    times, begin = {"trl": []} | {name: [] for name in ours}, time.perf_counter()

    def verifier(prompts, completions, **_) -> list[float]:
        return [float(data.is_correct(by_prompt[p], c)) for p, c in zip(prompts, completions)]

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            synchronize(device)
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            synchronize(device)
            times["trl"].append(time.perf_counter() - self.start)
            for name, seconds_ in alternate_once(ours, device).items():
                times[name].append(seconds_)
            if len(times["trl"]) > 2 and time.perf_counter() - begin > seconds:
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=rows, num_generations=work.group,
            max_completion_length=work.new_tokens, max_steps=rounds + 1, gradient_accumulation_steps=1, num_iterations=1,
            beta=0.0, temperature=1.0, top_p=1.0, top_k=0, learning_rate=1e-6, lr_scheduler_type="constant",
            gradient_checkpointing=False, bf16=torch.device(device).type == "cuda", fp16=False,
            use_cpu=torch.device(device).type == "cpu", use_vllm=False, dataloader_num_workers=0,
            dataloader_pin_memory=False, report_to="none", logging_strategy="no", save_strategy="no",
            eval_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=verifier, args=settings, processing_class=tokenizer, callbacks=[InTurn()],
            train_dataset=datasets.Dataset.from_dict({"prompt": list(by_prompt)}), peft_config=adapters,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # it ends by printing its own metrics
            trainer.train()
    return {name: values[1:] for name, values in times.items()}  # the first of each is a warm-up


def alternate_once(ways: dict[str, Callable], device) -> dict[str, float]:
    """Seconds of one run of each."""
    seconds = {}
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        synchronize(device)
        seconds[name] = time.perf_counter() - start
    return seconds


def bench_step(work: Work, rounds: int, seconds: float, with_irl: bool = True) -> dict:
    """Seconds of TRL's step over those of baselines.GRPO.step, and of irl.IRL.step, which does more."""
    ours = our_steps(work)
    if not with_irl:
        del ours["irl"]
    # Groups that are all right or all wrong are left out by us and not by TRL: with a model that solves few of these problems
    # it would be no race. There every other answer counts as right, so that all groups teach.
    every_other = itertools.cycle((True, False))
    large = work.model != Work.model
    with mock.patch.object(data, "is_correct", lambda *_: next(every_other)) if large else contextlib.nullcontext():
        times = trl_times(ours, work, rounds, seconds)
    each = ratio(times["trl"], times["grpo"])
    result = {"speedup": each["ratio"], "low": each["low"], "high": each["high"], "rounds": each["rounds"]}
    result |= {"irl_speedup": ratio(times["trl"], times["irl"])} if "irl" in times else {}
    result |= asdict(work)
    return result | {"seconds": {name: statistics.median(values) for name, values in times.items()}}


# ---------------------------------------------------------------------------------------------------------------
# 4. Growth
# ---------------------------------------------------------------------------------------------------------------


def bench_growth(rounds: int, device="cpu") -> dict:
    """Time and memory from a small size, each of rows, vocabulary, batch and length doubled twice."""
    rows = []
    for N, V in ((256, 32768), (512, 32768), (1024, 32768), (512, 16384), (512, 65536)):
        sizes = dict(N=N, V=V, H=256)
        _, times, _ = logprob_times(**sizes, rounds=rounds, seconds=20, device=device)
        for name in ("plain", "logprobs", "loss_sum"):
            peak = in_a_child("logprob_peak", name, N, V, 256, device)
            beyond = None if peak is None else max(0, peak - 4 * (N + V) * 256)
            rows.append(sizes | {"way": name, "seconds": statistics.median(times[name]), "bytes": beyond})
    model, tokenizer, examples = Work(device=device).load()
    samples = []
    for questions, new_tokens in ((8, 64), (16, 64), (32, 64), (64, 64), (32, 16), (32, 32)):
        work = Work(questions=questions, new_tokens=new_tokens, device=device)
        rates = alternate(sample_ways(model, tokenizer, examples, work), rounds, 20, device)
        each = ratio(rates["ours"], rates["generate"])
        samples.append({"rows": 8 * questions, "new_tokens": new_tokens, "speedup": each}
                       | {f"{name}_tokens_per_second": statistics.median(r) for name, r in rates.items()}
                       | {"bytes": in_a_child("sample_peak", questions, new_tokens, device)})  # fmt: skip
    return {"logprob": rows, "sample": samples}


def sample_peak(questions: int, new_tokens: int, device="cpu") -> int | None:
    """Peak bytes beyond the model of policy.sample. For a fresh process."""
    work = Work(questions=questions, new_tokens=new_tokens, device=device)
    model, tokenizer, examples = work.load()
    sample_ways(model, tokenizer, examples, Work(questions=1, group=1, new_tokens=2))["ours"]()  # loads the libraries
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = resident_peak(), resident_peak
    sample_ways(model, tokenizer, examples, work)["ours"]()
    return None if before is None else peak() - before


# ---------------------------------------------------------------------------------------------------------------
# 5. Memory
# ---------------------------------------------------------------------------------------------------------------


def step_peak(sizes: dict, switches: str) -> list[float] | None:
    """[the most bytes, seconds] of a process that loads the models and takes one iteration of IRL. For a fresh process."""
    begin = time.perf_counter()
    Work(**sizes).run(f"{switches} --micro-batch 2").make_loop().step()
    if sizes["device"] == "cuda":
        return [torch.cuda.max_memory_allocated(), time.perf_counter() - begin]
    return None if resident_peak() is None else [resident_peak(), time.perf_counter() - begin]


def bench_memory(work: Work) -> dict:
    """{switches: {"bytes", "seconds"}, or None where it did not fit}. The whole process, Python and PyTorch with it."""
    rows = {}
    for name, switches in SWITCHES.items():
        found = in_a_child("step_peak", asdict(work), switches)
        rows[name] = found and {"bytes": found[0], "seconds": found[1]}
    return asdict(work) | {"switches": rows}


# ---------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """The results as lines to read."""
    machine = results["machine"]
    lines = [f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}: "
             f"{machine['gflop_per_s']:.0f} GFLOP/s, {machine['gb_per_s']:.1f} GB/s"]  # fmt: skip
    spread = lambda r: f"{r['ratio']:5.2f} [{r['low']:.2f}, {r['high']:.2f}]"
    megabytes = lambda n: "      ?" if n is None else f"{n / 1e6:7.0f}"
    part = results.get("logprob")
    if part:
        lines += ["", f"log-probabilities, N = {part['N']}, V = {part['V']:,}, H = {part['H']}, {part['dtype']}: forward "
                  "and backward", "                       seconds   x plain               x three products"]  # fmt: skip
        for name, way in part["ways"].items():
            lines.append(f"  {name:20s} {way['seconds']:7.2f}   {spread(way['to_plain']):20s}"
                         f"  {spread(way['products_to_floor'])}")  # fmt: skip
        m = part["memory"]
        flag = " (extrapolated from fewer rows)" if m["extrapolated"] else ""
        lines.append(f"  memory at N = {m['N']}, beyond inputs and their gradients, in MB:")
        for name, peak in m["bytes"].items():
            beyond = None if peak is None else max(0, peak - m["gradients_bytes"])
            lines.append(f"  {name:20s} {megabytes(beyond)}" + flag * (name == "plain"))
        if "memory_ratio" in m:
            lines.append(f"  {'loss_sum / plain':20s} {100 * m['memory_ratio']:7.2f} %, with the "
                         f"gradients {100 * m['memory_ratio_with_gradients']:.2f} %")  # fmt: skip
        lines += [f"  {line}" for line in part["left_out"]]
    part = results.get("sample")
    if part:
        lines += ["", f"sampling, {part['questions']} questions x {part['group']}, {part['new_tokens']} tokens, {part['model']}",
                  f"  policy.sample        {part['tokens_per_second']:7.0f} tokens/s",
                  f"  generate             {part['generate_tokens_per_second']:7.0f} tokens/s",
                  f"  ours / generate      {spread(part | {'ratio': part['speedup']})}",
                  f"  of the machine       {100 * part['arithmetic_share']:.1f} % of its arithmetic, "
                  f"{100 * part['bandwidth_share']:.1f} % of its memory's rate"]  # fmt: skip
    part = results.get("step")
    if part:
        lines += [
            "",
            f"a policy step, {part['questions']} questions x {part['group']}, {part['new_tokens']} tokens, {part['model']}"
            + f", --lora-rank {part['rank']}" * bool(part["rank"]),
        ]
        lines += [f"  {name:20s} {value:7.2f} s" for name, value in part["seconds"].items()]
        lines.append(f"  TRL / our GRPO       {spread(part | {'ratio': part['speedup']})}")
        if "irl_speedup" in part:
            lines.append(f"  TRL / our IRL        {spread(part['irl_speedup'])}")
    part = results.get("memory")
    if part:
        lines += ["", f"an iteration of IRL, {part['questions']} questions x {part['group']}, {part['new_tokens']} tokens, "
                  f"{part['model']}, --micro-batch 2: the whole process", "                                      GB   seconds"]
        for name, row in part["switches"].items():
            lines.append(f"  {name:32s}" + (f"{row['bytes'] / 1e9:8.2f}  {row['seconds']:8.1f}" if row else "   did not fit"))
    lines += [f"{line}" for line in results.get("left_out", [])]
    part = results.get("growth")
    if part:
        lines += ["", "growth                               seconds  MB beyond"]
        for r in part["logprob"]:
            lines.append(
                f"  {r['way']:8s} N = {r['N']:5d}, V = {r['V']:6d}   {r['seconds']:9.3f}    {megabytes(r['bytes'])}"
            )
        lines.append("                                     tokens/s      MB   x generate")
        for r in part["sample"]:
            lines.append(f"  sample   {r['rows']:4d} rows, {r['new_tokens']:3d} tokens  {r['ours_tokens_per_second']:12.0f} "
                         f"{megabytes(r['bytes'])}   {spread(r['speedup'])}")  # fmt: skip
    return "\n".join(lines)


PARTS = ("logprob", "sample", "step", "growth", "memory")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags, checked."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute, no growth")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rounds", type=int, help="rounds that count (default: 3 with --quick, else 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--model", metavar="DIR", help="sample, step and memory on a model of yours, 24 rows of 128 tokens")
    parser.add_argument("--lora-rank", type=int, default=0, help="with --model: adapters of this rank, in TRL's step too")
    args = parser.parse(arguments)
    args.rounds = args.rounds if args.rounds is not None else 3 if args.quick else 7
    if args.rounds < 2:
        raise UserError(f"--rounds {args.rounds}: a spread needs at least 2")
    if args.quick and args.only == "growth":
        raise UserError("--only growth is not part of --quick: leave --quick out")
    if args.model and args.only in ("logprob", "growth") or not args.model and args.only == "memory":
        raise UserError(f"--only {args.only} goes {'without' if args.model else 'with'} --model")
    if args.lora_rank < 0 or args.lora_rank and not args.model:
        raise UserError(f"--lora-rank {args.lora_rank} takes --model, and is at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {Path(args.json).absolute().parent}")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json} is a folder: give a file")
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {args.device}: choose auto, cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device auto takes what there is")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and ours would fight; it warns at forks
    begin = time.perf_counter()
    results = {
        "quick": args.quick,
        "machine": {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
            "gflop_per_s": matmul_rate(args.device, 1024 if args.quick else 4096) / 1e9,
            "gb_per_s": copy_rate(args.device) / 1e9,
        },
    }  # fmt: skip
    whole = ("sample", "step", "memory") if args.model else PARTS[:3] if args.quick else PARTS[:4]
    wanted = [args.only] if args.only else whole
    work = Work(device=args.device)
    if args.model:
        work = Work(args.model, args.lora_rank, **(LARGE | ({'new_tokens': 8} if args.quick else {})), device=args.device)
    for_sample, for_step = (4, 8) if args.quick else (600, 1800) if args.model else (60, 300)  # seconds
    if "logprob" in wanted:  # first, while this process is small
        results["logprob"] = bench_logprob(args.quick, args.rounds, args.device)
    if "sample" in wanted:
        results["sample"] = bench_sample(work, args.rounds if args.model else 2 * args.rounds, for_sample)
    if "step" in wanted and find_spec("trl") is None:
        results["left_out"] = ["a policy step: TRL is not installed (pip install trl), nothing to compare with"]
    elif "step" in wanted:
        # beside a large model and TRL's logits of all rows in float32 there is no room for IRL's two models
        results["step"] = bench_step(work, args.rounds, for_step, with_irl=not (args.quick or args.model))
    if "growth" in wanted:
        results["growth"] = bench_growth(args.rounds, args.device)
    if "memory" in wanted:
        results["memory"] = bench_memory(work)
    results["seconds"] = time.perf_counter() - begin
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    sys.exit(exit_status(main))
