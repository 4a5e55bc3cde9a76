"""How the methods that IRL is compared with are tuned: on validation questions of seed 100, which nothing else uses.

SFT gets what IRL's default gets, so that a difference is no trick that only one of them has: its weights may be averaged
with the base, its logits divided. Each number of updates and rate is trained once, and looked at with every share of the
base and every temperature: results/choose/<data>-sft-<demonstrations>-<updates>-<rate>.json. GRPO, which learns from
answers, is tuned in its steps and rate.

`python -m experiments.run --only choose` runs all of it. Chosen is what is best there: `sft_flags` for SFT as it is
known, `fair_flags` for SFT with both, at temperature 1 or greedy, `grpo_flags`.
"""

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

import baselines
import train
from engine import loading, lora
from engine.candidates import collect
from engine.errors import UserError
from engine.settings import parse_settings
from experiments import run as runs

SHARES, TEMPERATURES = (0.0, 0.25, 0.5, 0.75), (1.0, 0.2)  # of the base in the weights; what divides the logits, as IRL's alpha
UPDATES, MORE_UPDATES, RATES = (15, 30, 60, 120, 240, 480), (960,), (3e-4, 6e-4)  # more for 1,024 demonstrations
GRPO = ((400, 4e-4), (400, 8e-4), (800, 4e-4))  # steps, rate
QUESTIONS, SAMPLES, SEED = 500, 1, 100


@dataclass(frozen=True)
class Cell:
    """One training."""

    data: str
    model: str
    method: str  # sft or grpo
    size: int  # demonstrations
    steps: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.data}-{self.method}-{self.size}-{self.steps}-{self.lr:g}"


def cells(data: str, model: str, sizes: tuple, quick: bool) -> list[Cell]:
    """All trainings; GRPO's questions are those of 256 demonstrations and the extra ones, as in the main part."""
    updates = lambda size: (2, 4) if quick else UPDATES + MORE_UPDATES * (size >= 1024)
    found = [Cell(data, model, "sft", n, steps, lr) for n in sizes for steps in updates(n) for lr in RATES]
    return found + [Cell(data, model, "grpo", 256, n, lr) for n, lr in (((2, 4e-4),) if quick else GRPO)]


def measure(cell: Cell, quick: bool) -> dict:
    """Train, then look: {.., "t1": {share: {temperature: accuracy}}, "greedy": {share: accuracy}}."""
    torch.set_num_threads(1)
    loading.quiet()
    flags = f"--data {cell.data} --model {cell.model} --demonstrations {cell.size} --seed {SEED} --device cpu"
    flags += f" --{cell.method}-steps {cell.steps} --{cell.method}-lr {cell.lr} --test-split validation"
    flags += f" --eval-questions {20 if quick else QUESTIONS}{' --extra-questions 20' * quick}"
    run, begin = train.Run(parse_settings(flags.split()), device="cpu"), time.perf_counter()
    model, sft = run.to_train(), cell.method == "sft"
    start = lora.start_of(model)
    trainer = baselines.SFT if sft else baselines.GRPO
    trainer = trainer(run.process_settings, run.tokenizer, model, run.experts if sft else run.answered)
    for _ in range(cell.steps):
        trainer.step()
    trained, learnt = time.perf_counter(), lora.start_of(model)

    def accuracy(samples: int, temperature: float) -> float:
        generator = torch.Generator().manual_seed(SEED)
        return float(collect(model, run.tokenizer, run.test, samples, run.s.max_new_tokens, temperature, generator,
                             run.s.sample_rows).correct.mean())  # fmt: skip

    t1, greedy = {}, {}
    for share in SHARES if sft else SHARES[:1]:
        lora.average(model, learnt, 1.0)  # back to what was learnt
        lora.average(model, start, share)
        # dividing the logits and sampling at that temperature are the same
        t1[str(share)] = {str(t): round(accuracy(SAMPLES, t), 4) for t in (TEMPERATURES if sft else TEMPERATURES[:1])}
        greedy[str(share)] = round(accuracy(1, 0.0), 4)
    seconds = {"training": round(trained - begin), "in all": round(time.perf_counter() - begin)}
    return asdict(cell) | {"t1": t1, "greedy": greedy, "seconds": seconds}


def run(data: str, model: str, sizes: tuple, jobs: int, quick: bool) -> None:
    """Every training whose file is not there yet, `jobs` at a time, one thread each."""
    path = lambda cell: runs.results_folder() / "choose" / f"{cell.name}.json"
    left = [cell for cell in cells(data, model, sizes, quick) if not path(cell).exists()]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for number, (cell, found) in enumerate(zip(left, pool.map(measure, left, [quick] * len(left)))):
            runs.keep(path(cell), json.dumps(found) + "\n")
            print(f"{number + 1:4d} of {len(left)}  choose {cell.name}  {found['seconds']['in all']} s", flush=True)


def found_of(data: str, method: str, size: int) -> list[dict]:
    """What is known of this method's trainings."""
    paths = sorted((runs.results_folder() / "choose").glob(f"{data}-{method}-{size}-*.json"))
    if not paths:
        raise UserError(f"{method} on {data} is not tuned yet: run --only choose first")
    return [json.loads(path.read_text()) for path in paths]


def best(found: list[dict], by: str, tricks: bool) -> tuple[dict, str, str]:
    """(training, share of the base, temperature) that is best by "t1" or "greedy"; where that ties, by the other."""
    options = [
        ((one["t1"][share][t], one["greedy"][share]), one, share, t)
        for one in found
        for share in one["t1"]
        for t in one["t1"][share]
        if tricks or (share, t) == ("0.0", "1.0")
    ]
    return max(options, key=lambda option: option[0][:: 1 if by == "t1" else -1])[1:]


def sft_flags(data: str, size: int) -> str:
    """SFT as it is known, best at temperature 1."""
    one, _, _ = best(found_of(data, "sft", size), "t1", tricks=False)
    return f"--sft-steps {one['steps']} --sft-lr {one['lr']}"


def fair_flags(data: str, size: int, by: str = "t1") -> str:
    """SFT with what IRL gets."""
    one, share, t = best(found_of(data, "sft", size), by, tricks=True)
    return f"--fair-steps {one['steps']} --fair-lr {one['lr']} --fair-average {share} --fair-temperature {t}"


def grpo_flags(data: str) -> str:
    one, _, _ = best(found_of(data, "grpo", 256), "t1", tricks=False)
    return f"--grpo-steps {one['steps']} --grpo-lr {one['lr']}"
