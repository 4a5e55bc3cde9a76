"""Is it right here, is it fast, and what is worth turning on? One command, for a card or a CPU.

    python -m experiments.bench                     all parts: under ten minutes on one card
    python -m experiments.bench --quick             small sizes, a minute or two on two CPU cores
    python -m experiments.bench --json results/bench.json --only sample step
    python -m experiments.bench --only memory       what fits on which card

    right       logprob.py (and --fused, where it can run) against autograd in float64
    run         20 iterations of IRL: every loss finite, no step skipped
    logprob     seconds of token_logprobs, expected_reward_sum and --fused over those of autograd
    sample      tokens per second of policy.sample over those of transformers' generate
    step        seconds of TRL's GRPOTrainer over those of baselines.GRPO.step, if it is installed
    memory      the most that one iteration holds, switch by switch: by arithmetic, and on a card
                measured

Each round runs every competitor once, A B C A B C .., and gives one ratio; a ratio is the median of
the rounds', its spread their smallest and largest. So whatever else keeps the machine busy slows
both sides of a ratio alike. The first round does not count.
"""

import argparse
import copy
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
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback

import baselines
import data
import irl
import logprob
import policy
import reward
from engine import loading, lora, memory
from engine.errors import Parser, UserError, exit_status
from engine.settings import parse_settings

# Rates so small that traces keep their length, and all models of a comparison the same work.
FLAGS = (
    "--data words --method irl --start base --demonstrations 128 --extra-questions 0 "
    "--micro-batch 96 --policy-lr 1e-6 --reward-lr 1e-6 --grpo-lr 1e-6"
)
SIZES = "--questions 32 --group 8"  # of a step on the shipped base
LARGE_SIZES = "--questions 3 --group 8 --max-new-tokens 128"  # on another model
SMALL = dict(N=512, V=32_768, H=256)
PARTS = ("right", "run", "logprob", "sample", "step", "memory")

# Rounds and ratios --------------------------------------------------------------------------------


def timed(way: Callable) -> tuple[float, object]:
    """Seconds of way() and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def alternate(ways: dict[str, Callable], rounds: int) -> dict[str, list[tuple[float, object]]]:
    """`timed` of every way in each round, in turn, after one round that does not count."""
    results = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            results[name].append(timed(way))
    return {name: values[1:] for name, values in results.items()}


def ratio(above: list[float], below: list[float]) -> dict:
    """The median over rounds of above / below, and the smallest and the largest.

    >>> ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    {'ratio': 2.0, 'low': 1.5, 'high': 4.0}
    """
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each)}


# Right, and the time of log-probabilities ---------------------------------------------------------


def inputs(N: int, V: int, H: int, device, dtype=torch.float32) -> list[torch.Tensor]:
    """hidden [N, H] and weight [V, H], which want gradients, and tokens [N]; logits of about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 3 / H**0.5
    tokens = torch.randint(V, (N,), generator=generator).to(device)
    return [*(t.to(device, dtype).requires_grad_() for t in (hidden, weight)), tokens]


def given_tokens(hidden, weight, tokens, logprobs=logprob.token_logprobs) -> torch.Tensor:
    """-log pi of the tokens: a number."""
    return -logprobs(hidden, weight, tokens).sum()


def given_tokens_plain(hidden, weight, tokens) -> torch.Tensor:
    """The same with all logits in memory."""
    return torch.nn.functional.cross_entropy(hidden @ weight.T, tokens, reduction="sum")


def all_actions(hidden, weight, tokens) -> torch.Tensor:
    """The exact expectation, with a reward of the same size."""
    f = (hidden.detach().flip(0), weight.detach())
    return -logprob.expected_reward_sum(hidden, weight, *f, 0.1)


def all_actions_plain(hidden, weight, tokens) -> torch.Tensor:
    """The same with all logits in memory."""
    log_pi = (hidden @ weight.T).log_softmax(-1)
    f = (hidden.detach().flip(0) @ weight.detach().T).log_softmax(-1)
    return -logprob.expectation(log_pi, f, 0.1).sum()


def losses(device: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """{name: (a loss, the same by autograd)}, with what only some machines and versions have."""
    pairs = {
        "token_logprobs": (given_tokens, given_tokens_plain),
        "expected_reward_sum": (all_actions, all_actions_plain),
    }
    if device.type == "cuda" and find_spec("triton"):
        from engine import fused

        kernel = partial(given_tokens, logprobs=fused.token_logprobs)
        pairs["--fused"] = (kernel, given_tokens_plain)
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        torchs = partial(torch.nn.functional.linear_cross_entropy, reduction="sum")
        pairs["torch's linear_cross_entropy"] = (torchs, given_tokens_plain)
    return pairs


def right(device: torch.device, sizes: dict) -> dict:
    """The relative error of each loss and of its gradients, against autograd in float64."""
    errors = {}
    bound = 5e-3 if device.type == "cuda" else 1e-4  # TF32 has 10 bits
    for name, pair in losses(device).items():
        results = []
        for function, dtype in zip(pair, (torch.float32, torch.float64)):
            hidden, weight, tokens = inputs(**sizes, device=device, dtype=dtype)
            loss = function(hidden, weight, tokens)
            loss.backward()
            results.append([t.detach().double() for t in (loss, hidden.grad, weight.grad)])
        error = max(float((value - good).norm() / good.norm()) for value, good in zip(*results))
        errors[name] = {"error": error, "right": error < bound}
    return errors


def time_logprobs(device: torch.device, sizes: dict, rounds: int) -> dict:
    """Seconds of forward and backward of each loss over those of autograd."""
    tensors = inputs(**sizes, device=device)

    def step(loss: Callable) -> None:
        tensors[0].grad = tensors[1].grad = None
        loss(*tensors).backward()

    ratios = {}
    for name, (ours, plain) in losses(device).items():
        results = alternate({"ours": partial(step, ours), "plain": partial(step, plain)}, rounds)
        seconds, seconds_plain = ([way[0] for way in results[key]] for key in ("ours", "plain"))
        ratios[name] = ratio(seconds, seconds_plain)
    return sizes | ratios


# A run, sampling, a step --------------------------------------------------------------------------


def run_some_steps(loop: irl.IRL, steps: int) -> dict:
    """`steps` iterations of IRL: the first and the last loss, and whether all were finite."""
    metrics = [loop.step()["policy"] for _ in range(steps)]
    values = [m["loss"] for m in metrics]
    finite = metrics[-1]["skipped"] == 0 and all(abs(loss) < 1e6 for loss in values)
    return {"steps": steps, "first": values[0], "last": values[-1], "right": finite}


def generate(model, tokenizer, prompts: list[list[int]], group: int, new_tokens: int) -> int:
    """transformers' own sampling. Returns the number of response tokens, end tokens included."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    rows = model.generate(
        **padded.to(model.device),
        num_return_sequences=group,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=list(data.end_tokens(tokenizer, model)),
        pad_token_id=tokenizer.pad_token_id,
    )
    responses = rows[:, padded["input_ids"].shape[1] :]
    return int((responses != tokenizer.pad_token_id).sum())


def time_sampling(settings, model, tokenizer, examples: list[data.Example], rounds: int) -> dict:
    """Tokens per second of policy.sample over generate's, on the same prompts."""
    s = settings
    prompts = [example.prompt for example in examples[: s.questions]]
    ends = data.end_tokens(tokenizer, model)

    def ours() -> int:
        rollout = policy.sample(model, prompts, ends, s.max_new_tokens, s.group)
        return int(rollout.batch.response_mask.sum())

    theirs = partial(generate, model, tokenizer, prompts, s.group, s.max_new_tokens)
    rates = {}
    for name, results in alternate({"ours": ours, "generate": theirs}, rounds).items():
        rates[name] = [tokens / seconds for seconds, tokens in results]
    return ratio(rates["ours"], rates["generate"]) | {"tokens_per_second": rates}


def time_steps(settings, load: Callable, tokenizer, examples: list, rounds: int) -> dict:
    """Seconds of TRL's GRPO step over those of ours, in turn: ours runs between two of TRL's.

    The same model, problems, rate and sizes; no KL, one optimizer step per generation. Every other
    answer counts as right: a group that is all right or all wrong would be left out by us and not
    by TRL.
    """
    import datasets
    import trl

    s = settings
    ours = baselines.GRPO(s, tokenizer, load(), examples)
    every_other = itertools.cycle((True, False))
    seconds = {"trl": [], "ours": []}

    def verifier(prompts, completions, **_) -> list[float]:
        return [float(next(every_other)) for _ in completions]

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_, **__):  # before generation
            timed(dict)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            timed(dict)
            seconds["trl"].append(time.perf_counter() - self.start)
            seconds["ours"].append(timed(ours.step)[0])

    left_padded = copy.deepcopy(tokenizer)
    left_padded.padding_side = "left"
    texts = [tokenizer.decode(example.prompt) for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=s.questions * s.group,
            num_generations=s.group,
            max_completion_length=s.max_new_tokens,
            max_steps=rounds + 1,
            beta=0.0,
            top_k=0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=ours.policy_model.device.type == "cuda",
            use_cpu=ours.policy_model.device.type == "cpu",
            dataloader_pin_memory=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        theirs = trl.GRPOTrainer(
            model=load(),
            reward_funcs=verifier,
            args=arguments,
            processing_class=left_padded,
            callbacks=[InTurn()],
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        )
        with mock.patch.object(data, "is_correct", lambda *_: next(every_other)):
            theirs.train()
    # The first is a warm-up.
    return ratio(seconds["trl"][1:], seconds["ours"][1:]) | {"seconds": seconds}


# Memory -------------------------------------------------------------------------------------------

V = 151_936  # Qwen2.5's vocabulary
SHAPES = {  # width H, the MLP's inner width I, layers, heads
    "Qwen2.5-0.5B": (896, 4864, 24, 14),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12),
}
SWITCHES = {  # name: (--lora-rank, --gradient-checkpointing, --sample-rows), one more on each line
    "all weights": (0, False, 512),
    "--lora-rank 16": (16, False, 512),
    "and --gradient-checkpointing": (16, True, 512),
    "and --sample-rows 64": (16, True, 64),
}
ROWS = 2  # of a micro-batch, each of PROMPT + RESPONSE tokens
PROMPT = 150
RESPONSE = 400


def config_of(H: int, I: int, layers: int, heads: int, vocabulary: int = V) -> Qwen2Config:  # noqa: E741
    """A member of the Qwen2.5 family."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def bytes_needed(shape, rank: int, recompute: bool, sample_rows: int, V: int = V) -> dict:
    """What an iteration holds on CUDA, by arithmetic, in bytes.

    rank 0 trains all weights, in float32; else the base is frozen, in bf16 (--weights auto).
    """
    H, I, layers, heads = shape  # noqa: E741
    K = 2 * H // heads  # width of a layer's keys, and of its values
    size = 2 if rank else 4  # bytes of a number in the base, the residual stream and the cache
    # Weights; biases and norms are too few to count.
    base = layers * H * (2 * H + 2 * K + 3 * I) + V * H
    trained = base
    trained_in_layer = H * (2 * H + 2 * K + 3 * I)
    if rank:
        trained_in_layer = rank * (9 * H + 2 * K + 3 * I)  # A and B of q k v o, gate up down
        trained = layers * trained_in_layer
    # Of policy and reward the weights and AdamW's two moments; a gradient of one of them, for each
    # is cleared after its step; the reference. Adapters have their base beside them.
    states = (2 * (4 + 8) + 4 + 4) * trained + size * base * bool(rank)

    # What autograd keeps of a layer, in bytes a token: of norms and residuals, which are float32
    # unless the base is bf16; of the MLP gate, up, activation and product; q k v, attention's
    # output and sums; an adapter's inner products. And a bf16 copy of what trains.
    tokens = ROWS * (PROMPT + RESPONSE)
    kept = (12 if rank else 26) * H + 8 * I + 4 * (H + K + heads) + 8 + 14 * rank
    one_layer = tokens * kept + 2 * trained_in_layer
    all_layers = layers * one_layer
    if recompute:  # the input of every layer, and one layer at a time whole
        all_layers = layers * tokens * H * size + one_layer

    # logprob.expected_reward_sum, in float32: a block of the policy's logits and one of the
    # reward's, six of a strip, the matrix's gradient or its float32 copy, three of hidden states.
    N = ROWS * RESPONSE
    block = min(logprob.BLOCK, N * V)
    strip = min(logprob.STRIP["cuda"], N * V)
    output = 4 * (2 * block + 6 * strip + V * H + 3 * N * H)

    # policy.sample: keys and values, of one layer more, for the layer that is being made longer is
    # there twice; logits, log-probabilities, probabilities and their running sum, in float32; and
    # of a bf16 output matrix a float32 copy.
    cache = 2 * size * K * (layers + 1) * sample_rows * (PROMPT + RESPONSE)
    sampling = cache + 4 * (4 * sample_rows * V + V * H * bool(rank))

    # Training and sampling take turns.
    together = states + max(all_layers + output, sampling)
    return {
        "states": states,
        "layers": all_layers,
        "output": output,
        "sampling": sampling,
        "together": together,
    }


def one_iteration(config, rank: int, recompute: bool, sample_rows: int, tokenizer, device) -> None:
    """An iteration of IRL and a look at many samples, with random weights of that shape."""
    dtype = memory.weight_type("auto", rank, torch.device("cuda"))
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config).to(dtype)
    models = [lora.adapt(base, rank, 32.0) if rank else copy.deepcopy(base) for _ in range(2)]
    if recompute:
        memory.recompute_layers(models[0])
    discriminator = reward.make_discriminator(reward.LikelihoodReward(models[1]), tokenizer)
    expert = data.Example("?", "1+1=2", "2", prompt=[1] * PROMPT, response=[1] * RESPONSE)
    flags = f"{FLAGS} --questions 1 --group {ROWS} --max-new-tokens {RESPONSE} --micro-batch {ROWS}"
    settings = parse_settings(f"{flags} --kl-coef 0.1 --perturbed 0".split())
    irl.IRL(settings, tokenizer, models[0], discriminator, [expert]).step()
    # Few tokens after a long prompt hold what many would.
    prompt = [1] * (PROMPT + RESPONSE - 4)
    policy.sample(models[0], [prompt], (-1,), 4, group=sample_rows, rows=sample_rows)


def measure_memory(tokenizer, device: torch.device) -> dict:
    """{"model, switch": bytes that an iteration holds, by arithmetic; on a card, measured}."""
    results = {}
    for model, shape in SHAPES.items():
        for switch, values in SWITCHES.items():
            needed = bytes_needed(shape, *values)
            if device.type == "cuda" and model == "Qwen2.5-0.5B":
                torch.cuda.reset_peak_memory_stats()
                one_iteration(config_of(*shape), *values, tokenizer, device)
                needed["measured"] = torch.cuda.max_memory_allocated()
            results[f"{model}, {switch}"] = needed
    return results


# The command --------------------------------------------------------------------------------------


def turn_on(results: dict) -> list[str]:
    """What these results speak for turning on."""
    advice = []
    kernel = results.get("logprob", {}).get("--fused")
    if kernel and kernel["high"] < 1 and results.get("right", {}).get("--fused", {}).get("right"):
        advice.append("--fused: right, and faster in every round")
    for name, row in results.get("memory", {}).items():
        if row.get("measured", 1e12) < 0.9 * results["machine"]["bytes"]:
            advice.append(f"for a model of that size: {name}")
            break
    return advice or ["nothing: the defaults are best here"]


def parts(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], dict]]:
    """{part: what measures it}, of all parts that can run here."""
    large = dict(N=4096 if device.type == "cuda" else 512, V=V, H=896)
    sizes = SIZES if args.model == "base" else LARGE_SIZES
    s = parse_settings(f"{FLAGS} {sizes} --model {args.model}".split())
    _, tokenizer = loading.load_policy(args.model)
    examples = data.load_examples("words", "train", s.demonstrations)
    examples = data.tokenize(tokenizer, examples)

    def load():
        return loading.load_causal(args.model, device)

    def run() -> dict:
        likelihood = reward.load_reward("likelihood", args.model, device)
        discriminator = reward.make_discriminator(likelihood, tokenizer)
        loop = irl.IRL(s, tokenizer, load(), discriminator, examples)
        return run_some_steps(loop, 3 if args.quick else 20)

    measures = {
        "right": partial(right, device, SMALL),
        "run": run,
        "logprob": partial(time_logprobs, device, SMALL if args.quick else large, args.rounds),
        "sample": partial(time_sampling, s, load(), tokenizer, examples, args.rounds),
        "memory": partial(measure_memory, tokenizer, device),
    }
    if find_spec("trl"):
        measures["step"] = partial(time_steps, s, load, tokenizer, examples, args.rounds)
    return measures


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's flags, checked."""
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--model", default="base", metavar="DIR", help="run, sample and step on it")
    args = parser.parse(arguments)
    file = Path(args.json or "bench.json").absolute()
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--json {args.json}: give a file in a folder that is there")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write."""
    loading.quiet()
    args = parse(arguments)
    device = loading.pick_device(args.device)
    machine = {
        "device": f"{platform.machine()} CPU",
        "bytes": 0,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine |= {"device": card.name, "bytes": card.total_memory}
    results = {"machine": machine | {"torch": torch.__version__}, "flags": vars(args)}
    for part, measure in parts(args, device).items():
        if part in args.only:
            results[part] = measure()
            print(part, json.dumps(results[part], indent=1))
    results["turn_on"] = turn_on(results)
    print("turn on: " + "; ".join(results["turn_on"]))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_status(main))
