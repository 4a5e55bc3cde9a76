"""How the methods that IRL is compared with are tuned: on validation questions of seed 100.

SFT gets what IRL's default gets, so that a difference is no trick that only one of them has: its
weights may be averaged with the base, its logits divided. Each number of updates and rate is
trained once, and looked at with every share of the base and every temperature: the rows of one
trial in results/tuning.csv. GRPO, which learns from answers, is tuned in its steps and rate.

`python -m experiments.run --only choose` runs all of it. Chosen is what is best there: `sft_flags`
for SFT as it is known, `fair_flags` for SFT with both, at temperature 1 or greedy, `grpo_flags`.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import pandas
import torch

import baselines
import train
from candidates import collect
from engine import loading, lora
from engine.errors import UserError
from engine.settings import parse_settings
from experiments import store

SHARES = (0.0, 0.25, 0.5, 0.75)  # of the base in the weights
TEMPERATURES = (1.0, 0.2)  # what divides the logits, as IRL's alpha
UPDATES = (15, 30, 60, 120, 240, 480)
MORE_UPDATES = (960,)  # for 1,024 demonstrations
RATES = (3e-4, 6e-4)
GRPO = ((400, 4e-4), (400, 8e-4), (800, 4e-4))  # steps, rate
QUESTIONS = 500
SEED = 100  # which nothing else uses


@dataclass(frozen=True)
class Cell:
    """One training."""

    data: str
    model: str
    method: str  # sft or grpo
    demonstrations: int
    steps: int
    rate: float

    @property
    def name(self) -> str:
        """A trial's name."""
        return f"{self.data}-{self.method}-{self.demonstrations}-{self.steps}-{self.rate:g}"


def cells(data: str, model: str, sizes: tuple, quick: bool) -> list[Cell]:
    """All trainings; GRPO's questions are those of 256 demonstrations and the extra ones."""
    trainings = []
    for size in sizes:
        updates = UPDATES + MORE_UPDATES if size >= 1024 else UPDATES
        for steps in (2, 4) if quick else updates:
            trainings += [Cell(data, model, "sft", size, steps, rate) for rate in RATES]
    for steps, rate in ((2, 4e-4),) if quick else GRPO:
        trainings.append(Cell(data, model, "grpo", 256, steps, rate))
    return trainings


def measure(cell: Cell, quick: bool) -> list[dict]:
    """Train, then look with each share and temperature: the rows of tuning.csv, and seconds."""
    torch.set_num_threads(1)
    loading.quiet()
    flags = f"--data {cell.data} --model {cell.model} --demonstrations {cell.demonstrations}"
    flags += f" --{cell.method}-steps {cell.steps} --{cell.method}-lr {cell.rate}"
    flags += f" --seed {SEED} --test-split validation --device cpu"
    flags += " --eval-questions 20 --extra-questions 20" if quick else f" --eval-questions {QUESTIONS}"
    run = train.Run(parse_settings(flags.split()), device="cpu")
    model = run.to_train()
    start = lora.start_of(model)
    if cell.method == "sft":
        trainer = baselines.SFT(run.process_settings, run.tokenizer, model, run.experts)
        shares = SHARES
        temperatures = TEMPERATURES
    else:
        trainer = baselines.GRPO(run.process_settings, run.tokenizer, model, run.answered)
        shares = SHARES[:1]
        temperatures = TEMPERATURES[:1]
    for _ in range(cell.steps):
        trainer.step()
    learnt = lora.start_of(model)

    def accuracy(temperature: float) -> float:
        """One sample for each question."""
        generator = torch.Generator().manual_seed(SEED)
        samples = collect(
            model,
            run.tokenizer,
            run.test,
            1,
            run.s.max_new_tokens,
            temperature,
            generator,
            run.s.sample_rows,
        )
        return round(float(samples.correct.mean()), 4)

    rows = []
    for share in shares:
        lora.average(model, learnt, 1.0)  # back to what was learnt
        lora.average(model, start, share)
        greedy = accuracy(0.0)
        for temperature in temperatures:
            # dividing the logits and sampling at that temperature are the same
            look = {"share": share, "temperature": temperature, "t1": accuracy(temperature)}
            rows.append(look | {"greedy": greedy})
    return rows


def run(data: str, model: str, sizes: tuple, jobs: int, quick: bool) -> None:
    """Every training that has no rows yet, `jobs` at a time, one thread each."""
    known = set(store.read("tuning")["trial"])
    left = [cell for cell in cells(data, model, sizes, quick) if cell.name not in known]
    begun = time.perf_counter()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(measure, cell, quick): cell for cell in left}
        for number, ended in enumerate(as_completed(waiting), 1):
            cell = waiting[ended]
            about = {name: value for name, value in vars(cell).items() if name != "model"}
            store.add("tuning", cell.name, SEED, [about | row for row in ended.result()])
            seconds = time.perf_counter() - begun
            print(f"{number:4d} of {len(left)}  choose {cell.name}  {seconds:.0f} s", flush=True)


def best(looks: pandas.DataFrame, by: str, tricks: bool = True) -> pandas.Series:
    """The row that is best by "t1" or "greedy"; where that ties, by the other.

    Without tricks: of the rows whose weights are not averaged and whose logits are not divided.
    """
    if not tricks:
        looks = looks[(looks["share"] == 0) & (looks["temperature"] == 1)]
    other = "greedy" if by == "t1" else "t1"
    return looks.sort_values([by, other], ascending=False).iloc[0]


def looks_of(data: str, method: str, demonstrations: int) -> pandas.DataFrame:
    """What is known of this method's trainings."""
    table = store.read("tuning")
    same = (table["data"] == data) & (table["method"] == method)
    looks = table[same & (table["demonstrations"] == demonstrations)]
    if not len(looks):
        raise UserError(f"{method} on {data} is not tuned yet: run --only choose first")
    return looks


def sft_flags(data: str, size: int) -> str:
    """SFT as it is known, best at temperature 1."""
    one = best(looks_of(data, "sft", size), "t1", tricks=False)
    return f"--sft-steps {one['steps']} --sft-lr {one['rate']}"


def fair_flags(data: str, size: int, by: str = "t1") -> str:
    """SFT with what IRL gets."""
    one = best(looks_of(data, "sft", size), by)
    flags = f"--fair-steps {one['steps']} --fair-lr {one['rate']}"
    return f"{flags} --fair-average {one['share']} --fair-temperature {one['temperature']}"


def grpo_flags(data: str) -> str:
    """GRPO at its best at temperature 1."""
    one = best(looks_of(data, "grpo", 256), "t1", tricks=False)
    return f"--grpo-steps {one['steps']} --grpo-lr {one['rate']}"
