"""Is it right here, is it fast, and what is worth turning on? One command, for a card or a CPU.

    python -m experiments.bench                          # all parts: under ten minutes on one card
    python -m experiments.bench --quick                  # small sizes, a minute or two on two CPU cores
    python -m experiments.bench --model DIR --lora-rank 16    # sampling and steps on a model of yours
    python -m experiments.bench --json results/bench.json --only sample step

    right       logprob.py (and --fused, where it can run) against autograd in float64
    run         20 iterations of IRL: every loss finite, no step skipped
    memory      the most that a step and sampling hold, switch by switch, beside experiments/cards.py
    logprob     seconds of token_logprobs, expected_reward_sum and --fused over those of autograd
    sample      tokens per second of policy.sample over those of transformers' generate
    step        seconds of TRL's GRPOTrainer over those of baselines.GRPO.step, where TRL is installed

Each round runs every competitor once, A B C A B C .., and gives one ratio; a ratio is the median of the
rounds', its spread their smallest and largest. So whatever else keeps the machine busy slows both sides
of a ratio alike. The first round does not count.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

import baselines
import data
import logprob
import policy
import train
from engine import loading, lora, memory
from engine.errors import Parser, UserError, exit_status
from engine.settings import parse_settings
from experiments import cards

# Rates so small that traces keep their length; as many problems as both sides can draw.
FLAGS = (
    "--data words --method irl --start base --explain --demonstrations 128 --extra-questions 128 "
    "--eval-questions 4 --policy-lr 1e-6 --reward-lr 1e-6 --grpo-lr 1e-6 --micro-batch 96"
)
SWITCHES = {  # name: (--lora-rank, --gradient-checkpointing, --sample-rows), one more on each line
    "all weights": (0, False, 512),
    "--lora-rank 16": (16, False, 512),
    "and --gradient-checkpointing": (16, True, 512),
    "and --sample-rows 64": (16, True, 64),
}

SMALL = dict(N=512, V=32_768, H=256)
ROWS_OF_BASE = "--questions 32 --group 8"

# Rounds and ratios ------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(way: Callable) -> float:
    """Seconds of way()."""
    synchronize()
    start = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - start


def alternate(ways: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in each round, in turn, after one round that does not count."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            value = seconds_of(way)
            if number:
                seconds[name].append(value)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict:
    """The median over rounds of above / below, and the smallest and the largest.

    >>> ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    {'ratio': 2.0, 'low': 1.5, 'high': 4.0}
    """
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each)}


# Right ------------------------------------------------------------------------------------------------


def inputs(N: int, V: int, H: int, device, kind=torch.float32) -> list[torch.Tensor]:
    """hidden [N, H] and weight [V, H], which want gradients, and tokens [N]; logits of about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 3 / H**0.5
    tokens = torch.randint(V, (N,), generator=generator).to(device)
    return [*(t.to(device, kind).requires_grad_() for t in (hidden, weight)), tokens]


def plain(hidden, weight, tokens) -> torch.Tensor:
    """-log pi of the tokens with all logits in memory: a number."""
    return torch.nn.functional.cross_entropy(hidden @ weight.T, tokens, reduction="sum")


def ours(hidden, weight, tokens) -> torch.Tensor:
    """The same by logprob.py."""
    return -logprob.token_logprobs(hidden, weight, tokens).sum()


def exact(hidden, weight, tokens) -> torch.Tensor:
    """The exact expectation, with a reward of the same size."""
    return -logprob.expected_reward_sum(
        hidden, weight, hidden.detach().flip(0), weight.detach(), 0.1
    )


def plain_exact(hidden, weight, tokens) -> torch.Tensor:
    """The same with all logits in memory."""
    log_pi = (hidden @ weight.T).log_softmax(-1)
    f = (hidden.detach().flip(0) @ weight.detach().T).log_softmax(-1)
    return -logprob.expectation(log_pi, f, 0.1).sum()


def logprob_ways(device) -> dict[str, tuple[Callable, Callable]]:
    """{name: (a loss, the same by autograd)}: with the fused kernels where they can run."""
    ways = {"token_logprobs": (ours, plain), "expected_reward_sum": (exact, plain_exact)}
    if torch.device(device).type == "cuda" and find_spec("triton"):
        from engine import fused

        def kernel(hidden, weight, tokens):
            return -fused.token_logprobs(hidden, weight, tokens).sum()

        ways["--fused"] = (kernel, plain)
    return ways


def right(device, sizes: dict) -> dict:
    """The relative error of each loss and of its gradients, against autograd in float64."""
    errors = {}
    for name, (way, reference) in logprob_ways(device).items():
        results = []
        for function, kind in ((way, torch.float32), (reference, torch.float64)):
            hidden, weight, tokens = inputs(**sizes, device=device, kind=kind)
            loss = function(hidden, weight, tokens)
            loss.backward()
            results.append([t.detach().double() for t in (loss, hidden.grad, weight.grad)])
        pairs = zip(*results)
        error = max(float((value - good).norm() / good.norm()) for value, good in pairs)
        bound = 5e-3 if torch.device(device).type == "cuda" else 1e-4  # TF32 has 10 bits
        errors[name] = {"error": error, "right": error < bound}
    return errors


def run_some_steps(loop, steps: int) -> dict:
    """`steps` iterations of IRL: the first and the last loss, and whether all were finite."""
    losses = []
    for _ in range(steps):
        metrics = loop.step()["policy"]
        losses.append(metrics["loss"])
    finite = metrics["skipped"] == 0 and all(map(lambda loss: abs(loss) < 1e6, losses))
    return {"steps": steps, "first": losses[0], "last": losses[-1], "right": finite}


# Memory -----------------------------------------------------------------------------------------------


def peak_bytes(function: Callable, device) -> int:
    """The most that tensors held at once while function() ran, beyond what they held before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def memory_of(config, rank: int, recompute: bool, rows: int, device) -> dict:
    """Bytes that a step of the policy, and sampling `rows` rows, hold with both models and their
    optimizers: measured, and by the arithmetic of cards.py. Random weights of that shape."""

    def work(part: str) -> None:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config).to(cards.type_of_base(rank))
        models = []
        for _ in range(2):
            models.append(lora.adapt(base, rank, 32.0) if rank else copy.deepcopy(base))
        if rank == 0:
            base.requires_grad_(False)  # the reference
        optimizers = [policy.make_optimizer(model, 1e-5) for model in models]
        for optimizer, model in zip(optimizers, models):
            for parameter in lora.trained(model):
                parameter.grad = torch.zeros_like(parameter)
            policy.optimizer_step(optimizer, 0.0)
        if part == "sampling":  # few tokens after a long prompt hold what many would
            prompt = [1] * (cards.PROMPT + cards.RESPONSE - 4)
            policy.sample(models[0], [prompt], (-1,), 4, group=rows, rows=rows)
            return
        if recompute:
            memory.recompute_layers(models[0])
        models[0].train()
        ids = torch.randint(config.vocab_size, (cards.ROWS, cards.PROMPT + cards.RESPONSE)).tolist()
        prompts = [row[: cards.PROMPT] for row in ids]
        batch = data.make_batch(prompts, [row[cards.PROMPT :] for row in ids], device)
        with torch.no_grad():
            reward_hidden = policy.hidden_states(models[1], batch)
        hidden = policy.hidden_states(models[0], batch)
        weight, reward_weight = (model.get_output_embeddings().weight for model in models)
        logprob.expected_reward_sum(hidden, weight, reward_hidden, reward_weight, 0.1).backward()
        policy.optimizer_step(optimizers[0], 0.0)

    tokens = cards.ROWS * (cards.PROMPT + cards.RESPONSE)
    state = cards.state_bytes(config, rank)
    step = cards.activation_bytes(config, rank, recompute, tokens)
    step += cards.output_bytes(config, rank, cards.ROWS * cards.RESPONSE, torch.device(device).type)
    sampling = cards.sampling_bytes(config, rank, rows, cards.PROMPT + cards.RESPONSE)
    measured = {part: peak_bytes(partial(work, part), device) for part in ("step", "sampling")}
    return {
        "measured": measured,
        "arithmetic": {"step": state + step, "sampling": state + sampling},
    }


# Fast -------------------------------------------------------------------------------------------------


def time_logprobs(device, sizes: dict, rounds: int) -> dict:
    """Seconds of forward and backward of each loss over those of autograd, and the most it holds."""
    result = dict(sizes)
    tensors = inputs(**sizes, device=device)

    def step(way):
        tensors[0].grad = tensors[1].grad = None
        way(*tensors).backward()

    for name, (way, reference) in logprob_ways(device).items():
        ways = {"ours": partial(step, way), "plain": partial(step, reference)}
        seconds = alternate(ways, rounds)
        peaks = {}
        for key, function in ways.items():
            tensors[0].grad = tensors[1].grad = None  # or to free them would count as room
            peaks[key] = peak_bytes(function, device)
        result[name] = ratio(seconds["ours"], seconds["plain"]) | {"bytes": peaks}
    return result


def generate(model, tokenizer, prompts: list[list[int]], group: int, new_tokens: int) -> int:
    """transformers' own sampling. Returns the number of response tokens, end tokens included."""
    longest = max(map(len, prompts))
    ends = data.end_tokens(tokenizer, model)
    tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    rows = model.generate(
        input_ids=torch.tensor(tokens, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        num_return_sequences=group,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=list(ends),
        pad_token_id=tokenizer.pad_token_id,
    )[:, longest:]
    ended = torch.isin(rows, torch.tensor(ends, device=rows.device)).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def time_sampling(run, rounds: int) -> dict:
    """Tokens per second of policy.sample over generate's, on the same prompts."""
    s = run.s
    model = run.load().eval()
    examples = run.experts[: s.questions]
    prompts = [data.prompt_ids(run.tokenizer, example.question) for example in examples]
    ends = data.end_tokens(run.tokenizer, model)
    rates = {"ours": [], "generate": []}
    for number in range(rounds + 1):
        for name in rates:
            synchronize()
            start = time.perf_counter()
            if name == "ours":
                rollout = policy.sample(model, prompts, ends, s.max_new_tokens, s.group)
                tokens = int(rollout.batch.response_mask.sum())
            else:
                tokens = generate(model, run.tokenizer, prompts, s.group, s.max_new_tokens)
            synchronize()
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
    medians = {f"{name}_tokens_per_second": statistics.median(r) for name, r in rates.items()}
    return ratio(rates["ours"], rates["generate"]) | medians


def time_steps(run, rounds: int) -> dict:
    """Seconds of TRL's GRPO step over those of ours, in turn: ours runs between two of TRL's.

    The same model, adapters (by peft), problems, rate and sizes; no KL, one optimizer step per
    generation. Its clock starts at on_step_begin, before generation. Every other answer counts as
    right: a group that is all right or all wrong would be left out by us and not by TRL.
    """
    import datasets
    import transformers
    import trl

    s = run.s
    device = run.device.type
    trainer = baselines.GRPO(run.process_settings, run.tokenizer, run.to_train(), run.answered)
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.padding_side = "left"
    prompts = [data.prompt_ids(tokenizer, example.question) for example in run.answered]
    every_other = itertools.cycle((True, False))
    seconds = {"trl": [], "ours": []}
    adapters = None
    if s.lora_rank:
        import peft

        adapters = peft.LoraConfig(
            r=s.lora_rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    def verifier(prompts, completions, **_) -> list[float]:
        return [float(next(every_other)) for _ in completions]

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize()
            seconds["trl"].append(time.perf_counter() - self.start)
            seconds["ours"].append(seconds_of(trainer.step))

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=s.questions * s.group,
            num_generations=s.group,
            max_completion_length=s.max_new_tokens,
            max_steps=rounds + 1,
            beta=0.0,
            top_k=0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        other = trl.GRPOTrainer(
            model=run.load(),
            reward_funcs=verifier,
            args=settings,
            processing_class=tokenizer,
            callbacks=[InTurn()],
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": list(map(tokenizer.decode, prompts))}
            ),
            peft_config=adapters,
        )
        right_by_turns = mock.patch.object(data, "is_correct", lambda *_: next(every_other))
        with right_by_turns, contextlib.redirect_stdout(io.StringIO()):
            other.train()
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first is a warm-up
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    return ratio(seconds["trl"], seconds["ours"]) | medians


# The command ------------------------------------------------------------------------------------------

PARTS = ("right", "run", "memory", "logprob", "sample", "step")


def turn_on(results: dict, card_bytes: int | None) -> list[str]:
    """What these results speak for turning on."""
    advice = []
    kernel = results.get("logprob", {}).get("--fused")
    if kernel and kernel["high"] < 1 and results.get("right", {}).get("--fused", {}).get("right"):
        advice.append("--fused: right, and faster in every round")
    for name, row in results.get("memory", {}).items():
        if card_bytes and max(row["measured"].values()) < 0.9 * card_bytes:
            advice.append(f"for a model of {next(iter(cards.SHAPES))}'s size: {name}")
            break
    return advice or ["nothing: the defaults are best here"]


def show(results: dict) -> None:
    """The results, a line each."""
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for part in PARTS:
        for name, value in results.get(part, {}).items():
            print(f"{part:8s} {name:30s} {json.dumps(value)}")
    print("turn on: " + "; ".join(results["turn_on"]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's flags, checked."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts")
    parser.add_argument(
        "--rounds", type=int, help="rounds that count (default: 3 with --quick, else 7)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--model", default="base", metavar="DIR", help="sample and step on it")
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters, in TRL's step too")
    args = parser.parse(arguments)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no such folder")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json} is a folder: give a file")
    args.rounds = args.rounds or (3 if args.quick else 7)
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    loading.quiet()
    args = parse(arguments)
    device = loading.pick_device(args.device)
    on_gpu = device.type == "cuda"
    begin = time.perf_counter()
    parts = args.only or [part for part in PARTS if part != "memory" or on_gpu]
    large = dict(N=4096 if on_gpu else 512, V=cards.VOCABULARY, H=896)
    config = cards.SHAPES["Qwen2.5-0.5B"]
    card_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    rows = ROWS_OF_BASE
    if args.model != "base":
        rows = "--questions 3 --group 8 --max-new-tokens 128"
    flags = f"{FLAGS} {rows} --model {args.model} --lora-rank {args.lora_rank} --device {device}"
    run = train.Run(parse_settings(flags.split()), device=device.type)
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    machine = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    results = {"machine": machine, "quick": args.quick, "model": args.model, "flags": flags}
    for part in PARTS:
        if part not in parts:
            continue
        if part == "right":
            results[part] = right(device, SMALL)
        elif part == "run":
            results[part] = run_some_steps(run.make_loop(), 3 if args.quick else 20)
        elif part == "memory":  # of half a billion weights: a CPU measures it when it is asked to
            results[part] = {
                name: memory_of(config, *switches, device) for name, switches in SWITCHES.items()
            }
        elif part == "logprob":
            results[part] = time_logprobs(device, SMALL if args.quick else large, args.rounds)
        elif part == "sample":
            results[part] = time_sampling(run, args.rounds)
        elif part == "step" and find_spec("trl"):
            results[part] = time_steps(run, args.rounds)
    results["turn_on"] = turn_on(results, card_bytes)
    results["seconds"] = time.perf_counter() - begin
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    sys.exit(exit_status(main))
