"""Every number of the README's results, from a command for each kind of problems.

    python -m experiments.run                     everything of words: hours on two cores; started again, it goes on
    python -m experiments.run --data countdown --model countdown-base --sizes 64,256       everything of countdown
    python -m experiments.run --only main         one part: choose, main, variants, ablations, ..
    python -m experiments.run --quick             the whole path in minutes with tiny counts; its numbers mean nothing
    python -m experiments.run --tables            only the tables and figures, from the results that are there

A trial is an ordinary `train.py` run, so it can be repeated by hand: its command is kept beside its numbers. Trials are
run `--jobs` at a time, one thread each, in runs/x-<name>; what they found goes to results/trials/<name>.json, and
a trial whose file is there is not run again. A trial that fails leaves its last lines in results/failed/<name>.txt, and
the tables say so. (experiments/tables.py makes results/summary.json, the tables and the figures of them.)

    choose      SFT's and GRPO's settings, on validation questions: no test set here (experiments/choose.py)
    main        SFT, fair SFT, likelihood and IRL with 64, 256 and 1,024 demonstrations, five seeds, 1,000 test questions
    grpo        GRPO on the true answers: no demonstrations, the same seeds and questions
    own_grade   countdown: IRL's policy on the base's own grade in place of a reward that was learnt
    variants    IRL otherwise: from the base, from SFT, without extra questions, PPO with a reward per token, step or trace
    ablations   one setting changed at a time, three seeds, with a policy that starts at the base
    inference   reranking up to N = 64, localisation, and transfer, with the models of the main part
    traces      countdown: one setting of a reward per trace changed at a time, three seeds
    (variants and ablations are of words alone)
"""

import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import environ
from pathlib import Path

from engine import checkpoint
from engine.errors import Parser, UserError, exit_status
from experiments import choose

ROOT = Path(__file__).parents[1]
SIZES = (64, 256, 1024)  # demonstrations, of words
PARTS = ("choose", "main", "grpo", "own_grade", "variants", "ablations", "traces", "inference")
QUICK = ("--max-steps 4 --grpo-steps 4 --sft-steps 4 --fair-steps 4 --warm-up 4 --extra-questions 20 --questions 4 --group 4 "
         "--eval-questions 20")  # fmt: skip

# What is changed, in train.py's flags. PPO is the loss that takes every reward.
PPO = "--policy-loss ppo --gamma 0.9"
LONG = "--max-steps 800 --policy-lr 4e-4"  # IRL on countdown: GRPO's steps and rate (experiments/choose.py)
# countdown's reward is a head, which has no likelihood term: there the likelihood alone is a run of its own
LIKELIHOOD = ("--method likelihood --reward likelihood --logit airl --granularity dense --start reward "
              "--policy-loss exact --gamma 0 --reward-clip 0 --reward-lr 1e-5 --reward-average 0.5 --warm-up-lr 3e-4 "
              "--policy-lr 3e-5 --max-steps 100")  # fmt: skip
# the control of the discriminator: it never sees a trace of the policy's, so no expert is told from the policy
BROKEN = f"--method irl --rollouts-per-expert 0 {LONG}"
# what IRL's temperature alone does for the base: fair SFT with nothing learnt
SHARPENED = "--method sft_fair --fair-steps 1 --fair-lr 0 --fair-average 1 --fair-temperature 0.2"
# how the reward that IRL practises on was chosen on countdown
LONG_CHOICES = {
    "averaged, standing still, clipped": "",
    "advantages scaled over the batch": "--advantage-scale batch",
    "not clipped": "--reward-clip 0",
    "not averaged": "--reward-average 0",
    "not standing still": "--reward-lr 1e-5",
    "none of the three": "--reward-clip 0 --reward-average 0 --reward-lr 1e-5",
}
CHOICE_SEEDS = (100, 101, 102)
BASE = "--start base --policy-lr 4e-4 --max-steps 200"  # a policy that has all the way to go needs more steps
# what a linear head needs: found on validation questions of seed 100
SLOW_HEAD = "--reward head --warm-up 300 --entropy-coef 0 --policy-lr 1e-4"
VARIANTS = {
    "start at the base": "--start base --policy-lr 4e-4 --max-steps 400",
    "start at SFT": "--start sft --max-steps 200",
    "no extra questions": "--extra-questions 0",
    "reward not averaged": "--reward-average 0",
    "the start alone": "--max-steps 1 --policy-lr 1e-9",
    "from the base, PPO, a reward per token": f"{PPO} {BASE}",
    "from the base, PPO, a reward per step": f"{PPO} {BASE} --granularity interval",
    "from the base, PPO, a reward per trace": f"{PPO} {BASE} --granularity sparse --gamma 1",
}
ABLATIONS = {
    "default": BASE,
    "linear head, PPO": f"{PPO} {BASE} --reward head",
    "linear head, PPO, warm-up 300": f"{PPO} {BASE} --reward head --warm-up 300",
    "linear head, PPO, slow, alpha 0, KL 0.3": f"{PPO} {BASE} {SLOW_HEAD} --kl-coef 0.3",
    "linear head, PPO, slow, alpha 0, KL 1": f"{PPO} {BASE} {SLOW_HEAD} --kl-coef 1",
    "likelihood, PPO": f"{PPO} {BASE}",
    "likelihood, logit f, PPO": f"{PPO} {BASE} --logit gail",  # f <= 0, so D <= 1/2: not GAIL's discriminator
    "random reward, PPO": f"{PPO} {BASE} --reward random",
    "no likelihood term": f"{BASE} --reward-nll 0",
    "reward not averaged": f"{BASE} --reward-average 0",
    "discriminator 10 x faster": f"{BASE} --reward-lr 1e-4",
    "discriminator 30 x faster": f"{BASE} --reward-lr 3e-4",
    "frozen after warm-up": f"{BASE} --reward-lr 0",
    "warm-up 15": f"{BASE} --warm-up 15",
    "warm-up 240": f"{BASE} --warm-up 240",
    "alpha 1": f"{BASE} --entropy-coef 1",
    "alpha 0.05": f"{BASE} --entropy-coef 0.05",
    "REINFORCE": f"{BASE} --policy-loss reinforce",
    "policy rate x 3": f"{BASE} --policy-lr 1.2e-3",
    "gamma 0.9": f"{BASE} --gamma 0.9",
    "perturbed 0": f"{BASE} --perturbed 0",
    "perturbed 4": f"{BASE} --perturbed 4",
    "no replay": f"{BASE} --replay 0",
    "KL 0.1": f"{BASE} --kl-coef 0.1",
    "group 2": f"{BASE} --group 2 --questions 32",
    "group 16": f"{BASE} --group 16 --questions 4",
    "perturbed 1": f"{BASE} --perturbed 1",
    "perturbed negatives alone": f"{BASE} --rollouts-per-expert 0",
    "alpha 0.5": f"{BASE} --entropy-coef 0.5",
    "group 8": f"{BASE} --group 8 --questions 8",
}

# The strongest rival without demonstrations, where the base has read grades: it practises on its own
OWN_GRADE = f"{LONG} --reward-model runs/own-grade --warm-up 0 --reward-average 0"
# IRL on countdown, one thing changed: what a reward per trace needs, and how it goes wrong
TRACES = {
    "default": "",
    "the reward learns on": "--reward-lr 1e-5",
    "it learns on, 10 x faster": "--reward-lr 1e-4",
    "it learns on, 10 x faster, no replay": "--reward-lr 1e-4 --replay 0",
    "not averaged with its start": "--reward-average 0",
    "not clipped": "--reward-clip 0",
    "KL 0.05": "--kl-coef 0.05",
    "advantages scaled over the batch": "--advantage-scale batch",
    "800 steps, none of the three": f"{LONG} {LONG_CHOICES['none of the three']}",
    "no perturbed negatives": "--perturbed 0",
    "perturbed negatives alone": "--rollouts-per-expert 0",
    "a random head": "--reward random",
    "start at SFT": "--start sft",
    "AIRL logit": "--logit airl --reward-clip 0",
    "a score per step": "--granularity interval",
    "a score per token": "--granularity dense --gamma 1",
    "likelihood, per trace": "--reward likelihood --logit airl --reward-clip 0",
    "likelihood, per token, exact": "--reward likelihood --logit airl --granularity dense --policy-loss exact --gamma 0 "
                                    "--reward-lr 1e-5 --reward-clip 0",
    "16 demonstrations": "--demonstrations 16",
}


@dataclass
class Trial:
    """A run of train.py: its name and its flags."""

    name: str
    flags: str

    @property
    def result(self) -> Path:
        return results_folder() / "trials" / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return ROOT / "runs" / f"x-{self.name}"


def results_folder() -> Path:
    return ROOT / environ.get("IRL_RESULTS", "results")


def plain(label: str) -> str:
    """A label as part of a file's name.

    >>> plain("2 discriminator updates"), plain("dense, PPO")
    ('2-discriminator-updates', 'dense-PPO')
    """
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in label).split())


def seeds_of(data: str, count: int) -> range:
    """countdown's settings were found with the demonstrations of seed 0 (and validation questions): it begins at 1."""
    return range(1, count + 1) if data == "countdown" else range(count)


def main_trials(data: str, model: str, sizes: tuple, seeds: int) -> list[Trial]:
    """Fair SFT is trained twice: as it was best at temperature 1, and as it was best greedy."""
    trials = []
    for seed in seeds_of(data, seeds):
        flags = f"--data {data} --model {model} --demonstrations 256 --seed {seed} --eval-questions 1000"
        trials.append(Trial(f"{data}-base-sharpened-{seed}", f"{flags} {SHARPENED}"))
        for size in sorted(sizes, key=lambda n: n != 256):
            flags = f"--data {data} --model {model} --demonstrations {size} --seed {seed} --eval-questions 1000"
            methods = "sft,sft_fair," + "likelihood," * (data == "words") + "irl"
            chosen = f"{choose.sft_flags(data, size)} {choose.fair_flags(data, size)}"
            more = f"--method {methods} {chosen}" + f" {LONG}" * (data == "countdown")
            trials.append(Trial(f"{data}-main-{size}-{seed}", f"{flags} {more}"))
            greedy = f"--method sft_fair {choose.fair_flags(data, size, 'greedy')}"
            trials.append(Trial(f"{data}-fair-greedy-{size}-{seed}", f"{flags} {greedy}"))
            if data == "countdown":
                trials.append(Trial(f"{data}-likelihood-{size}-{seed}", f"{flags} {LIKELIHOOD}"))
                trials.append(Trial(f"{data}-broken-{size}-{seed}", f"{flags} {BROKEN}"))
    return trials


def choose_trials(data: str) -> list[Trial]:
    """IRL's reward on countdown, on validation questions, as choose.py has it for the others: three sets of demonstrations, as
    it differs more between them."""
    flags = "--data countdown --demonstrations 64 --test-split validation --eval-questions 500 --method irl"
    flags += f" {LONG}"
    return [
        Trial(f"chosen-{plain(label)}-{seed}", f"{flags} --seed {seed} {change}".strip())
        for seed in CHOICE_SEEDS
        for label, change in (LONG_CHOICES if data == "countdown" else {}).items()
    ]


def grpo_trials(data: str, model: str, seeds: int) -> list[Trial]:
    """GRPO learns from answers, not from demonstrations: once per seed, on the questions of the 256 and the extra ones."""
    flags = f"--data {data} --model {model} --demonstrations 256 --eval-questions 1000 --method grpo"
    return [
        Trial(f"{data}-grpo-{seed}", f"{flags} --seed {seed} {choose.grpo_flags(data)}") for seed in seeds_of(data, seeds)
    ]


def own_grade_trials(seeds: int) -> list[Trial]:
    """IRL's policy on the base's own grade (inference.save_own_grade): no demonstrations, as GRPO."""
    flags = "--data countdown --demonstrations 256 --eval-questions 1000 --method irl"
    return [Trial(f"countdown-own-grade-{seed}", f"{flags} --seed {seed} {OWN_GRADE}") for seed in seeds_of("countdown", seeds)]


def changed_trials(part: str, changes: dict[str, str], seeds: int) -> list[Trial]:
    """One thing changed: words with 256 demonstrations, countdown with 64."""
    task, size = ("countdown", 64) if part == "traces" else ("words", 256)
    flags = f"--data {task} --method irl --demonstrations {size} --eval-questions 1000"
    flags += f" {choose.sft_flags(task, size)}"
    return [
        Trial(f"{part}-{plain(label)}-{seed}", f"{flags} --seed {seed} {change}")
        for seed in seeds_of(task, seeds)
        for label, change in changes.items()
    ]


def all_trials(parts: list[str], data: str, model: str, sizes: tuple, seeds: int) -> list[Trial]:
    """In the order in which they are worth having."""
    trials = choose_trials(data) if "choose" in parts else []
    trials += main_trials(data, model, sizes, seeds) if "main" in parts else []
    trials += grpo_trials(data, model, seeds) if "grpo" in parts else []
    trials += own_grade_trials(seeds) if "own_grade" in parts else []
    if "variants" in parts:
        trials += changed_trials("variants", VARIANTS, seeds)
    if "ablations" in parts:
        trials += changed_trials("ablations", ABLATIONS, min(seeds, 3))
    if "traces" in parts:
        trials += changed_trials("traces", TRACES, min(seeds, 3))
    return trials


def run_trial(trial: Trial, quick: bool) -> bool:
    """Run it, or go on with it, and keep what it found. Returns whether it came to its end."""
    if trial.result.exists():
        return True
    flags = trial.flags.split() + (QUICK.split() if quick else [])
    command = [sys.executable, "train.py", *flags, "--device", "cpu", "--name", trial.folder.name]
    if (trial.folder / "settings.json").exists():
        command = [sys.executable, "train.py", "--resume", "--name", trial.folder.name]
    environment = environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        if run.returncode > 0 and run.returncode < 128:  # it said what was wrong; a kill is no result
            keep(results_folder() / "failed" / f"{trial.name}.txt", " ".join(command) + "\n" + run.stderr[-2000:])
        return False
    results = json.loads((trial.folder / "results.json").read_text())
    spread = lambda values: [statistics.mean(values), statistics.pstdev(values)]
    results["scores"] = {kind: spread(values) for kind, values in results.pop("distributions", {}).items() if values}
    results["command"] = "python train.py " + " ".join(flags)
    results["curve"] = curve(trial.folder / "metrics.jsonl")
    keep(trial.result, json.dumps(results))
    if "-main-256-" not in trial.name:  # whose models the part `inference` uses
        shutil.rmtree(trial.folder)
    return True


def curve(metrics: Path) -> dict[str, list]:
    """What tables and figures show of a training: {"irl validation/t1": [[step, value], ..], ..}."""
    kept = ("validation/t1", "rollout/entropy", "rollout/length", "rollout/finished", "reward/mean",
            "discriminator/accuracy", "discriminator/d_expert", "discriminator/d_negative")  # fmt: skip
    series: dict[str, list] = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        if "validation/t1" in line or line["method"] == "warm-up" and line["step"] % 10 == 0:
            for name in kept:
                if name in line:
                    series.setdefault(f"{line['method']} {name}", []).append([line["step"], round(line[name], 4)])
    return series


def keep(path: Path, text: str) -> None:
    """A file of results, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, text)


def run_all(trials: list[Trial], jobs: int, quick: bool) -> int:
    """All of them, `jobs` at a time. Returns how many failed."""

    def one(numbered):
        number, trial = numbered
        good = run_trial(trial, quick)
        print(f"{number + 1:4d} of {len(trials)}  {trial.name}{'' if good else '  FAILED'}", flush=True)
        return not good

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, enumerate(trials)))


def main() -> None:
    from experiments import inference, tables

    parser = Parser(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--data", default="words", help="whose problems (default words)")
    parser.add_argument("--model", default="base", help="the base that they start from (default base)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of demonstrations (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time, one thread each (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny counts, written to results-quick/")
    parser.add_argument("--tables", action="store_true", help="run nothing: tables and figures only")
    args = parser.parse()
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    if args.quick:
        environ["IRL_RESULTS"] = "results-quick"
    alone = {"variants": "words", "ablations": "words", "traces": "countdown", "own_grade": "countdown"}
    parts = [args.only] if args.only else [part for part in PARTS if alone.get(part, args.data) == args.data]
    if not all(size.isdigit() and int(size) for size in args.sizes.split(",")):
        raise UserError(f"--sizes must be numbers with commas between, not {args.sizes}")
    source, failed = (args.data, args.model, tuple(map(int, args.sizes.split(",")))), 0
    if not args.tables:
        if "choose" in parts:
            choose.run(*source, args.jobs, args.quick)
        if "own_grade" in parts:
            inference.save_own_grade(ROOT / "runs" / "own-grade")
        failed += run_all(all_trials(parts, *source, args.seeds), args.jobs, args.quick)
        if "inference" in parts:
            inference.run(args.data, args.seeds, args.quick)
    tables.write()
    if failed:
        raise UserError(f"{failed} trials failed: {results_folder() / 'failed'} says why")


if __name__ == "__main__":
    sys.exit(exit_status(main))
