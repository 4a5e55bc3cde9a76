"""The command line: settings, runs, evaluation, results.

    python train.py                                          the demo: every method on the embedded problems, minutes
    python train.py --model Qwen2.5-0.5B --data gsm8k        IRL on a real model, on a GPU
    python train.py --method sft --demonstrations 1024       one method, other settings (python train.py --help)
    python train.py --explain                                one iteration in numbers, stage by stage; writes nothing
    python train.py --resume --name demo                     go on with runs/demo, which was stopped or killed

A run writes runs/<name>/: settings.json, metrics.jsonl (a line per step), results.json, traces.json, report.html, and
models that `from_pretrained` loads: policy/ (IRL's, or the only method's), reward/, and sft/, sft_fair/, likelihood/ and
grpo/ of what else was trained. Until it is finished also checkpoints/, from which --resume goes on. With torchrun --nproc-per-node=N train.py many GPUs share a run (parallel.py).
On one machine the same settings give the same numbers, bit for bit, with or
without interruptions. Across machines they do not: the number of threads, the BLAS library, the processor and CUDA's
kernels decide in which order sums are taken, and a sampled token that falls otherwise makes another run.
"""

import datetime
import errno
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
import checkpoint
import data
import explain
import irl
import lora
import memory
import parallel
import policy
import report
import rerank
import reward
from data import UserError


# In the order in which they are trained
METHODS = ("sft", "sft_fair", "likelihood", "irl", "grpo")


def setting(default, help: str, choices: tuple = ()):
    """A field of Settings: its default, what it does, what it may be. None: depends on the model (PRESETS)."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Everything that can be turned. Each becomes a flag (max_steps -> --max-steps) and is kept in settings.json."""

    # What
    model: str = setting(
        None,
        "the policy's start: a folder, a hub name, or e.g. Qwen2.5-0.5B; if not given, the small base that ships here, "
        "base for --data words, countdown-base for --data countdown",
    )
    data: str = setting(None, "words, countdown, gsm8k, medreason, a JSON-lines file, or a folder with train.jsonl and test.jsonl")
    method: str = setting(
        None,
        "what to train: sft; sft_fair, SFT with IRL's two tricks; likelihood, IRL with --discriminator-coef 0; irl; grpo; "
        "some of them (sft,irl), or all",
    )
    start: str = setting(
        None,
        "where IRL's policy starts: at the base, at SFT, or after the warm-up at the reward (default: small models at the "
        "reward if it can be a policy, else at the base; large ones at SFT)",
        ("base", "sft", "reward"),
    )
    name: str = setting("demo", "the run is written to runs/<name>")
    seed: int = setting(0, "seed of the data's order, of sampling and of perturbations")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    date: str = setting(None, "the day, YYYY-MM-DD, that chat templates are told; if not given, that of the run's start")
    explain: bool = setting(False, "print one iteration of IRL in numbers, stage by stage, and write nothing")
    # Data
    demonstrations: int = setting(256, "expert traces to learn from")
    wrong_demonstrations: float = setting(0.0, "share of them that is broken on purpose: a control of SFT and IRL")
    extra_questions: int = setting(None, "training questions without a demonstration, for the policies of IRL and GRPO")
    words_steps: int = setting(3, "steps of arithmetic in a words problem")
    words_largest: int = setting(40, "largest number in the text of a words problem")
    max_new_tokens: int = setting(None, "longest response that is sampled")
    # Reward
    reward_model: str = setting(None, "the reward's start, if not --model; its tokenizer must be the policy's")
    reward: str = setting(
        "likelihood",
        "f = log p_phi, the paper's linear head, or a control: a random head",
        ("likelihood", "head", "random"),
    )
    logit: str = setting("airl", "logit D = f - log pi, or f", ("airl", "gail"))
    granularity: str = setting("dense", "a score per token, per step, or per trace", ("dense", "interval", "sparse"))
    interval: int = setting(0, "tokens per interval; 0 takes the trace's own lines as steps")
    discriminator_loss: str = setting("bce", "cross-entropy, or Bradley-Terry", ("bce", "bt"))
    label_smoothing: float = setting(0.1, "labels 1 and 0 become 1 - x/2 and x/2")
    reward_nll: float = setting(1.0, "weight of the demonstrations' likelihood in a likelihood reward's loss")
    discriminator_coef: float = setting(1.0, "weight of the discriminator's own loss; 0 leaves the likelihood alone")
    reward_average: float = setting(None, "share of its start in the reward's weights after the warm-up")
    rollouts_per_expert: int = setting(2, "sampled negatives per demonstration, old ones included")
    perturbed: int = setting(2, "broken copies of each demonstration as negatives")
    replay: int = setting(4, "old rollouts kept per question; 0 for none")
    warm_up: int = setting(
        None, "discriminator updates before the policy's first; if not given, four passes over the demonstrations, at least 60"
    )
    warm_up_lr: float = setting(None, "learning rate of the warm-up")
    reward_lr: float = setting(None, "learning rate of the discriminator beside the policy")
    discriminator_updates: int = setting(1, "discriminator updates per policy step")
    freeze_reward: bool = setting(False, "stop training the discriminator after the warm-up")
    reward_clip: float = setting(0.0, "hold rewards within [-x, x]; 0 for none (REINFORCE and PPO)")
    # Policy
    policy_loss: str = setting(
        None,
        "exact sums over the vocabulary (where it cannot, the default is ppo), best imitates each group's best sample",
        ("exact", "reinforce", "ppo", "best"),
    )
    baseline: str = setting("group", "of REINFORCE and PPO: the group's mean, or the exact E[r_t]", ("group", "exact"))
    entropy_coef: float = setting(None, "alpha in r = f - alpha log pi: 1 imitates, less sharpens")
    gamma: float = setting(None, "discount of later tokens' rewards; if not given, 1 with a reward per step or trace")
    kl_coef: float = setting(0.0, "weight of the KL to the frozen start")
    ppo_clip: float = setting(0.2, "PPO and GRPO hold the ratio within 1 +- this")
    epochs: int = setting(1, "passes over each rollout")
    questions: int = setting(None, "questions per step")
    group: int = setting(None, "samples per question (G)")
    temperature: float = setting(1.0, "sampling temperature in training")
    top_p: float = setting(1.0, "nucleus of training samples")
    max_steps: int = setting(None, "policy steps of IRL")
    grpo_steps: int = setting(None, "policy steps of GRPO")
    policy_lr: float = setting(None, "learning rate of IRL's policy")
    grpo_lr: float = setting(None, "learning rate of GRPO")
    sft_steps: int = setting(None, "updates of SFT")
    sft_lr: float = setting(None, "peak learning rate of SFT")
    sft_batch: int = setting(32, "demonstrations per update of SFT")
    fair_steps: int = setting(None, "updates of sft_fair")
    fair_lr: float = setting(None, "peak learning rate of sft_fair")
    fair_average: float = setting(None, "share of its start in the weights of sft_fair afterwards")
    fair_temperature: float = setting(None, "what the logits of sft_fair are divided by afterwards")
    # Memory
    micro_batch: int = setting(None, "rows per forward pass in training: memory, nothing else")
    micro_tokens: int = setting(0, "tokens per forward pass, rows of similar length together; 0: --micro-batch rows")
    lora_rank: int = setting(
        0, "adapters of this rank on one frozen base, which policy and reward share; 0: all weights"
    )
    lora_alpha: float = setting(32.0, "an adapter's output counts alpha / rank times")
    weights: str = setting("auto", "auto: bf16 for LoRA on CUDA, else float32", ("auto", "float32", "bf16"))
    gradient_checkpointing: bool = setting(False, "keep each layer's input only, compute the rest again in backward")
    sample_rows: int = setting(512, "responses sampled at once: the size of the cache of keys and values")
    # Evaluation
    test_split: str = setting("test", "where results come from; to choose settings, validation", ("test", "validation"))
    eval_questions: int = setting(None, "test questions")
    eval_samples: int = setting(None, "samples per test question at temperature 1")
    validate_every: int = setting(20, "steps between looks at 100 validation questions; 0 for never")
    rerank_n: int = setting(16, "candidates per question for reranking")
    rerank_questions: int = setting(None, "test questions to rerank")
    rule: str = setting("mean", "how a trace's token rewards become its score", rerank.RULES)
    # Interruptions
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: by the clock, in at most 2% of the time")

    @property
    def methods(self) -> list[str]:
        """What is trained, as a list."""
        if self.method != "all":
            return self.method.split(",")
        return [m for m in METHODS if m != "likelihood" or self.likelihood_alone]

    @property
    def likelihood_alone(self) -> bool:
        """Whether a reward can be trained without its discriminator's loss."""
        return self.reward == "likelihood" and self.reward_nll > 0


# What depends on the size of the model. Rates for large models are the customary ones, not tuned here.
PRESETS = {
    "small": dict(data="words", method="all", extra_questions=4000, max_new_tokens=64, warm_up_lr=3e-4, reward_lr=1e-5,
                  reward_average=0.5, policy_loss="exact", entropy_coef=0.2, gamma=0.0, questions=16, group=4,
                  max_steps=100, policy_lr=3e-5, grpo_steps=400, grpo_lr=4e-4, sft_steps=480, sft_lr=3e-4, micro_batch=96,
                  fair_steps=120, fair_lr=3e-4, fair_average=0.5, fair_temperature=0.2,
                  eval_questions=500, eval_samples=8, rerank_questions=250),
    "large": dict(data="gsm8k", method="irl", extra_questions=0, max_new_tokens=400, warm_up_lr=1e-5, reward_lr=2e-6,
                  reward_average=0.0, policy_loss="exact", entropy_coef=0.1, gamma=0.0, questions=32, group=8,
                  max_steps=200, policy_lr=2e-6, grpo_steps=200, grpo_lr=2e-6, sft_steps=200, sft_lr=1e-5, micro_batch=2,
                  fair_steps=200, fair_lr=1e-5, fair_average=0.0, fair_temperature=0.1,
                  eval_questions=200, eval_samples=4, rerank_questions=100),
    # small, for a task where finished traces are judged: the paper's head, a score per trace
    "countdown": dict(data="countdown", demonstrations=64, extra_questions=3000, max_new_tokens=40,
                      reward="head", logit="gail", granularity="sparse", reward_average=0.0, perturbed=4, warm_up=40,
                      warm_up_lr=1e-3, policy_loss="ppo", gamma=1.0, group=8, kl_coef=0.05, policy_lr=6e-4, max_steps=300,
                      grpo_steps=300, grpo_lr=6e-4),
}  # fmt: skip
LORA_RATES = 10  # adapters take this times the rates: customary, too


# From where to where a number may go. A rate, weight or count that is not named may be 0.
RANGES = {name: ends for names, ends in {
    "demonstrations questions epochs micro_batch eval_samples eval_questions rerank_n rerank_questions max_steps "
    "grpo_steps sft_steps fair_steps sft_batch rollouts_per_expert discriminator_updates sample_rows": (1, 10**9),
    "group": (2, 10**6),  # a sample is judged against the others of its group
    "wrong_demonstrations label_smoothing reward_average fair_average gamma": (0, 1),
    "top_p": (0.01, 1),
    "temperature lora_alpha ppo_clip": (0.01, 1000),
}.items() for name in names.split()} | reward.LIMITS  # fmt: skip


# What may change when a run goes on: where and how it computes, and what is turned when a loss is not finite.
MAY_CHANGE = ("device", "micro_batch", "micro_tokens", "gradient_checkpointing", "sample_rows", "checkpoint_every",
              "warm_up_lr", "reward_lr", "policy_lr", "grpo_lr", "sft_lr", "fair_lr", "reward_clip")  # fmt: skip


def flag(name: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + name.replace("_", "-")


def parse_flags(arguments: list[str]) -> dict:
    """The settings that were given, and no others; {"resume": True} among them for --resume."""
    parser = data.Parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on with runs/<name>, with the settings it has")
    for f in fields(Settings):
        help = f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=help)
            continue
        preset = ", ".join(f"{size}: {values[f.name]}" for size, values in PRESETS.items() if f.name in values)
        preset += f"; {LORA_RATES} times that with --lora-rank" if f.name.endswith("_lr") else ""
        default = preset or f.default
        parser.add_argument(flag(f.name), type=f.type, choices=f.metadata["choices"] or None,
                            help=(help if default is None else f"{help} (default: {default})").replace("%", "%%"),
                            metavar=f.type.__name__ if not f.metadata["choices"] else None)  # fmt: skip
    return {
        name: value for name, value in vars(parser.parse(arguments)).items() if value is not None and value is not False
    }


def parse_settings(arguments: list[str]) -> Settings:
    """Flags to Settings."""
    return complete(parse_flags(arguments))


def complete(given: dict) -> Settings:
    """Settings from those that were given, with what the model's size decides filled in."""
    settings = Settings(**given)
    if settings.model is None:
        settings.model = "countdown-base" if settings.data == "countdown" else "base"
    small = settings.model in policy.SHIPPED
    preset = PRESETS["small" if small else "large"] | (PRESETS["countdown"] if settings.data == "countdown" else {})
    for name in ("reward", "logit", "granularity"):  # they decide about others
        setattr(settings, name, given.get(name, preset.get(name, getattr(settings, name))))
    if settings.granularity != "dense":
        preset["gamma"] = 1.0  # the tokens between two scores have only what follows
    if not scores_all_actions(settings):
        preset["policy_loss"] = "ppo"
    for name, value in preset.items():
        if name not in given:
            setattr(settings, name, LORA_RATES * value if settings.lora_rank and name.endswith("_lr") else value)
    settings.reward_model = settings.reward_model or settings.model
    settings.date = settings.date or datetime.date.today().isoformat()  # a resumed run keeps it
    if settings.warm_up is None:  # few demonstrations are learnt in 60 updates, more of them take longer
        settings.warm_up = max(60, 4 * settings.demonstrations // settings.questions)
    if settings.reward == "random":  # and it stays so
        settings.freeze_reward, settings.warm_up = True, 0
    if settings.start is None:
        start = "reward" if can_start_at_reward(settings) else "base"
        # a pretrained model hardly ever writes the demonstrations' format (irl.first_logprob); a lecture trains no SFT
        settings.start = start if small else "base" if settings.explain else "sft"
    check(settings)
    return settings


def scores_all_actions(s: Settings) -> bool:
    """Whether there is an f of every action at every token, to be summed."""
    return s.reward == "likelihood" and s.logit == "airl" and s.granularity == "dense"


def can_start_at_reward(s: Settings) -> bool:
    """Whether exp(f / alpha) is the best policy: f the expert's log-density, in a network of the policy's own kind, and
    nothing to be had later."""
    density = scores_all_actions(s) and s.discriminator_loss == "bce" and s.reward_nll > 0
    return density and s.reward_model == s.model and s.entropy_coef > 0 and s.gamma == 0


def saved_settings(given: dict) -> Settings:
    """The settings of the run that is to go on. Flags beside --resume may repeat them; only MAY_CHANGE may differ."""
    path = run_folder(given.get("name", Settings.name)) / "settings.json"
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}. Without --resume a run is started")
    saved = reward.read_settings(path.parent)
    names = {f.name for f in fields(Settings)}
    if names != set(saved):
        other = ", ".join(sorted(names ^ set(saved)))
        raise UserError(f"{path} is of another version of train.py (they differ in {other}): it cannot go on")
    for name, value in given.items():
        if name not in (*MAY_CHANGE, "name") and saved[name] != value:
            raise UserError(
                f"{flag(name)} {value} contradicts {path}, which says {saved[name]}: leave it out to go on with that "
                "run, or start another one under a new --name"
            )
    settings = Settings(**saved | given)
    check(settings)
    return settings


def run_folder(name: str) -> Path:
    """Where a run is written."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UserError(
            f"--name '{name}' must be a plain folder name (letters, digits, . _ -): the run goes to runs/<name>"
        )
    return Path("runs") / name


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end: the results are there, the checkpoints are not there any more."""
    return (folder / "results.json").exists() and not (folder / "checkpoints").exists()


def check(s: Settings) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    for f in fields(s):
        value, (low, high) = getattr(s, f.name), RANGES.get(f.name, (0, 10**9))
        if f.type in (int, float) and not (isinstance(value, (int, float)) and low <= value <= high):  # nan is refused too
            raise UserError(f"{flag(f.name)} must be from {low:,} to {high:,}, not {value}")
    if s.start == "reward" and not can_start_at_reward(s):
        raise UserError(
            "--start reward takes --reward likelihood, --logit airl, --granularity dense, --discriminator-loss bce, "
            "--gamma 0, --reward-nll and --entropy-coef above 0, and no other --reward-model"
        )
    if not s.likelihood_alone and (not s.discriminator_coef or "likelihood" in s.methods):
        how = "--method likelihood" if s.discriminator_coef else "--discriminator-coef 0"
        raise UserError(f"{how} leaves the likelihood alone, which takes --reward likelihood and a --reward-nll above 0")
    if s.rollouts_per_expert > s.group:
        raise UserError(f"--rollouts-per-expert {s.rollouts_per_expert} is more than --group {s.group} samples")
    sums = "--policy-loss exact" if s.policy_loss == "exact" else "--baseline exact" if s.baseline == "exact" else ""
    if sums and not scores_all_actions(s):
        raise UserError(
            f"{sums} sums f over the whole vocabulary, which takes --reward likelihood, --logit airl and "
            "--granularity dense: with others use --policy-loss ppo and --baseline group"
        )
    if not set(s.methods) <= set(METHODS):
        raise UserError(f"no method '{s.method}': {', '.join(METHODS)}, some of them with commas between, or all")
    if s.explain and ("irl" not in s.methods or s.start == "sft" or not s.discriminator_coef):
        raise UserError(
            "--explain shows one iteration of IRL from the base: leave out --method, --start and --discriminator-coef"
        )
    run_folder(s.name)
    if s.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"no device '{s.device}': auto, cpu, cuda or mps")


# ---------------------------------------------------------------------------------------------------------------
# Evaluation: the answer check is used from here on, and nowhere in irl.py
# ---------------------------------------------------------------------------------------------------------------


def evaluate(model, tokenizer, examples: list[data.Example], s: Settings) -> dict:
    """Accuracy at temperature 1 (mean over samples) and greedy, with 95% bootstrap intervals over questions; pass@k."""
    generator = torch.Generator(model.device).manual_seed(parallel.seed(s.seed))
    correct = lambda n, temperature: parallel.rows(lambda mine: rerank.collect(
        model, tokenizer, mine, n, s.max_new_tokens, temperature, generator, s.sample_rows).correct, examples)  # fmt: skip
    sampled, greedy = correct(s.eval_samples, 1.0), correct(1, 0.0)  # [Q, N], [Q, 1]
    t1, greedy = rerank.bootstrap(sampled.float().mean(1)), rerank.bootstrap(greedy.float().mean(1))
    ks = [k for k in (1, 2, 4, 8, 16) if k <= s.eval_samples]
    passes = {
        str(k): sum(rerank.pass_at_k(s.eval_samples, int(c), k) for c in sampled.sum(1)) / len(sampled) for k in ks
    }
    return {"t1": t1[0], "t1_interval": t1[1:], "greedy": greedy[0], "greedy_interval": greedy[1:], "pass@k": passes}


class Log:
    """metrics.jsonl and the progress bar."""

    def __init__(self, path: Path, size: int = 0):
        """Go on after `size` bytes: what a killed run wrote after its last checkpoint will be written again."""
        self.file = open(path, "ab", buffering=0)
        if self.size() < size:
            raise UserError(f"{path} is shorter than when it was last saved: remove {path.parent} and start again")
        self.file.truncate(size)

    def write(self, method: str, step: int, metrics: dict, bar: tqdm) -> None:
        """One line {"method", "step", "stage/metric": value, ...}, and the few numbers that matter beside the bar."""
        flat = {f"{stage}/{name}": value for stage, values in metrics.items() for name, value in values.items()}
        known = {name: value if math.isfinite(value) else None for name, value in flat.items()}  # JSON has no NaN
        line = json.dumps({"method": method, "step": step} | known).encode() + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shown = ("validation/t1", "reward/mean", "discriminator/accuracy", "rollout/entropy", "policy/loss")
        bar.set_postfix({name.split("/")[1]: f"{flat[name]:.3f}" for name in shown if name in flat})

    def size(self) -> int:
        """Bytes that the disk holds by now."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size


# ---------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is. A checkpoint holds this and the state of what is being trained."""

    finished: list[str] = field(default_factory=list)  # phases, by name
    steps: dict[str, int] = field(default_factory=dict)  # of each method
    seconds: dict[str, float] = field(default_factory=dict)  # of training, by method
    skipped: dict[str, list[int]] = field(default_factory=dict)  # updates left out: [in all, steps in a row]
    results: dict = field(default_factory=lambda: {"methods": {}, "reward": {}, "rerank": {}, "localise": {}})
    metrics_size: int = 0  # bytes of metrics.jsonl


class Run:
    """One call of train.py: loads, trains each method from the same base on the same demonstrations, compares.

    A run is a list of phases. After each, and now and then within one, it is saved; a run that goes on leaves out the
    phases that are finished, and enters the one that was cut off where its last checkpoint was written.
    """

    def __init__(self, settings: Settings, signals: checkpoint.Signals, resume: bool = False):
        self.s = s = settings
        self.signals, self.resume, self.folder = signals, resume, run_folder(s.name)
        self.command = f"python train.py --resume --name {s.name}"
        if (
            not (resume or s.explain)
            and self.folder.exists()
            and any(not f.name.startswith(".") for f in self.folder.iterdir())
        ):
            how = "" if is_finished(self.folder) else f"go on with it ({self.command}), "
            raise UserError(f"{self.folder} already holds a run: {how}give another --name, or remove that folder")
        self.device = policy.pick_device(s.device)
        self.dtype = memory.weight_type(s.weights, s.lora_rank, self.device)
        # merged weights stay float32: bf16 would round away what an adapter has learnt
        self.trained_dtype = torch.float32 if s.lora_rank else self.dtype
        torch.manual_seed(s.seed)
        base, self.tokenizer = policy.load_policy(s.model, self.device, self.dtype)
        data.set_date(self.tokenizer, s.date)
        self.context = policy.context_length(base)
        self.base = base if s.lora_rank else None  # kept: every adapter is put on this one copy
        self.load_data()
        # what the trainers of this process go by: its share of each step's questions, and random numbers of its own
        self.mine = replace(s, questions=parallel.share_of(s.questions, "--questions"), seed=parallel.seed(s.seed),
                            sft_batch=parallel.share_of(s.sft_batch, "--sft-batch"))  # fmt: skip
        self.alone = parallel.world() == 1  # otherwise nothing is saved before the end: see `save`
        parallel.wait()  # all have seen that the folder is free
        if s.explain:  # a lecture leaves nothing behind
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None

    def open(self) -> None:
        """Go back to the newest checkpoint, or begin; make the files that the run writes to as it goes."""
        self.progress, self.saved = Progress(), None
        if self.resume:
            self.restore()
        if parallel.rank() == 0:  # writes for all
            checkpoint.write_text(self.folder / "settings.json", json.dumps(asdict(self.s), indent=1))
            self.log = Log(self.folder / "metrics.jsonl", self.progress.metrics_size)
        self.results = self.progress.results
        self.results["settings"] = asdict(self.s)
        self.saved_at, self.save_seconds = time.monotonic(), 0.0

    def restore(self) -> None:
        """Go back to the newest checkpoint; to the beginning if the run was killed before its first."""
        self.saved, name = checkpoint.load(self.folder / "checkpoints")
        if self.saved is None:
            print(f"{self.folder} has no checkpoint yet: from the beginning")
            return
        if self.saved["device"] != self.device.type:
            raise UserError(f"{self.folder} was trained on {self.saved['device']}, whose random numbers "
                            f"{self.device.type} cannot go on with: --device {self.saved['device']}")  # fmt: skip
        if self.saved["data"] != self.data_sum:
            raise UserError(f"the examples of {self.s.data} are not those that {self.folder} was started with")
        self.progress = Progress(**self.saved["progress"])
        self.note_changes()
        steps = ", ".join(f"{method} {step}" for method, step in self.progress.steps.items())
        print(f"{self.folder} goes on from checkpoint {name} (steps done: {steps or 'none'})")

    def note_changes(self) -> None:
        """Settings that were turned when the run went on are told here and kept in results.json."""
        before, now = self.progress.results["settings"], asdict(self.s)
        changed = {name: [before[name], value] for name, value in now.items() if before[name] != value}
        if changed:
            after = dict(self.progress.steps)
            self.progress.results.setdefault("changed", []).append({"after_steps": after, "settings": changed})
            print("; ".join(f"{flag(name)} is now {new}, was {old}" for name, (old, new) in changed.items()))

    def save(self, trainer=None) -> None:
        """Write a checkpoint: in the middle of training with all that changes in `trainer`.

        Not with several processes: each has a replay, random numbers and a part of the optimizers' states of its own,
        and --resume would have to give them all back.
        """
        if not self.alone:
            return
        start = time.monotonic()
        self.progress.metrics_size = self.log.size()
        state = {"progress": asdict(self.progress), "device": self.device.type, "data": self.data_sum}
        state["random"] = checkpoint.random_state()
        state["trainer"] = checkpoint.trainer_state(trainer) if trainer is not None else None
        checkpoint.save(self.folder / "checkpoints", state)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def resumed(self, trainer):
        """The trainer of a phase: as it is, or as the checkpoint has it that this run goes on from."""
        saved, self.saved = self.saved, None
        if saved is not None:
            if saved["trainer"] is not None:
                checkpoint.load_trainer(trainer, saved["trainer"])
            checkpoint.set_random_state(saved["random"])  # last: loading models may have drawn from it
        return trainer

    def save_is_due(self, step: int) -> bool:
        """Every so many steps; or by the clock, fifty times as long after a checkpoint as it took to write."""
        if self.s.checkpoint_every:
            return step % self.s.checkpoint_every == 0
        return time.monotonic() - self.saved_at > max(15, 50 * self.save_seconds)

    def load_data(self) -> None:
        """Demonstrations, extra questions, validation and test, all of them short enough for the model's context."""
        s, dropped = self.s, 0

        def load(split, count):
            nonlocal dropped
            examples = data.load_examples(s.data, split, count, s.seed, s.words_steps, s.words_largest)
            examples, too_long = data.fit_context(self.tokenizer, examples, self.context, s.max_new_tokens)
            dropped += too_long
            return examples

        train = load("train", s.demonstrations + s.extra_questions)
        self.answered = parallel.share(train)  # GRPO's: it learns from answers, and these are not broken
        self.experts, self.extra = train[: s.demonstrations], train[s.demonstrations :]
        rng, wrong = random.Random(f"wrong {s.seed}"), round(s.wrong_demonstrations * len(self.experts))
        broken = [data.perturb(example, rng) for example in self.experts[:wrong]]
        self.experts[:wrong] = [found[0] if found else example for found, example in zip(broken, self.experts)]
        if len(self.experts) < s.demonstrations and parallel.rank() == 0:
            print(f"only {len(self.experts)} demonstrations are there, not {s.demonstrations}")
        self.validation, self.test = load("validation", 100), load(s.test_split, s.eval_questions)
        self.data_sum = zlib.crc32(repr((self.experts, self.extra, self.validation, self.test)).encode())
        if min(len(self.experts), len(self.validation), len(self.test)) < parallel.world():
            raise UserError(f"{parallel.world()} processes need as many demonstrations, validation and test questions")
        self.experts, self.extra = parallel.share(self.experts), parallel.share(self.extra)
        if dropped and parallel.rank() == 0:
            print(f"{dropped} examples are longer than the model's context of {self.context} tokens: skipped")

    def validate(self, model) -> float:
        """Accuracy of one sample at temperature 1 on the validation questions. For curves; nothing trains on it."""
        generator = torch.Generator(model.device).manual_seed(parallel.seed(0))
        correct = parallel.rows(lambda mine: rerank.collect(
            model, self.tokenizer, mine, 1, self.s.max_new_tokens, 1.0, generator, self.s.sample_rows
        ).correct, self.validation)  # fmt: skip
        return float(correct.mean())

    def phases(self) -> dict[str, Callable]:
        """What was asked for, in order: the base, METHODS, then what the reward is worth at inference.

        Every phase loads the models that it needs and drops them: at 0.5B each one counts.
        """
        wanted = set(self.s.methods)
        if self.s.start == "sft" and wanted & {"likelihood", "irl"}:
            wanted.add("sft")
        trains = dict(zip(METHODS, (self.train_sft, self.train_sft, self.train_irl, self.train_irl, self.train_grpo)))
        phases = {"test base": lambda: self.test_method("base")}
        for method in filter(wanted.__contains__, METHODS):
            phases[f"train {method}"] = partial(trains[method], method)
            phases[f"test {method}"] = partial(self.test_method, method)
        if "irl" in wanted:
            phases["use reward"] = self.use_reward
        return phases

    def go(self) -> None:
        """Every phase that is not finished yet, then the results."""
        with checkpoint.locked(self.folder) if parallel.rank() == 0 else nullcontext():
            self.open()
            for name, phase in self.phases().items():
                if name not in self.progress.finished:
                    phase()
                    self.progress.finished.append(name)
                    self.save()
                    self.signals.check()
            self.finish()

    def run_steps(self, method: str, trainer, steps: int, validate: bool = False) -> None:
        """Call trainer.step (warm_up) until `steps` are done, looking at the validation questions now and then."""
        progress, every = self.progress, self.s.validate_every if validate else 0
        done = progress.steps.get(method, 0)
        with tqdm(range(done + 1, steps + 1), f"{method:8s}", steps, initial=done, dynamic_ncols=True,
                  disable=parallel.rank() > 0) as bar:  # fmt: skip
            for step in bar:
                start = time.perf_counter()
                warm_up = method.endswith("warm-up")
                metrics = {"discriminator": trainer.warm_up()} if warm_up else trainer.step()
                progress.seconds[method] = progress.seconds.get(method, 0.0) + time.perf_counter() - start
                if every and (step % every == 0 or step == steps):
                    metrics["validation"] = {"t1": self.validate(trainer.policy_model)}
                metrics = parallel.mean(metrics)
                if parallel.rank() == 0:
                    self.log.write(method, step, metrics, bar)
                progress.steps[method] = step
                broken = self.count_skipped(method, metrics)
                if broken or self.signals.received or self.save_is_due(step):
                    self.save(trainer)
                if broken:
                    raise UserError(self.diagnosis(method, broken, step, metrics[broken]))
                self.signals.check()

    def count_skipped(self, method: str, metrics: dict) -> str:
        """Follow the updates that were left out because they were not finite. Returns the stage, policy or
        discriminator, that did not move in three steps in a row; normally ''."""
        for stage in ("discriminator", "policy"):
            skipped = metrics.get(stage, {}).get("skipped", 0)
            before, in_a_row = self.progress.skipped.get(f"{method} {stage}", (0, 0))
            in_a_row = in_a_row + 1 if skipped > before else 0
            self.progress.skipped[f"{method} {stage}"] = [skipped, in_a_row % 3]
            if in_a_row == 3:
                return stage
        return ""

    def diagnosis(self, method: str, stage: str, step: int, values: dict) -> str:
        """What was not finite, and what to turn: the rate, and with sampled rewards their clip."""
        rates = {"sft": "sft_lr", "sft_fair": "fair_lr", "grpo": "grpo_lr", "warm-up": "warm_up_lr"}
        rate = rates.get(method.split()[-1]) or ("policy_lr" if stage == "policy" else "reward_lr")
        sampled = rate == "policy_lr" and self.s.policy_loss in ("reinforce", "ppo")
        turn = f"{flag(rate)} {getattr(self.s, rate) / 2:g}{' --reward-clip 10' * sampled}"
        return (
            f"{method}: the {stage}'s loss or gradient was not finite in three steps in a row (step {step}: loss "
            f"{values['loss']:.3g}, norm of the gradient {values['grad_norm']:.3g}). "
            + ("What is saved is as it was after the last good update. Go on with something turned, for instance: "
               f"{self.command} {turn}" if self.alone else f"Start again with something turned, for instance: {turn}")
        )

    def load(self, trained: str | None = None):
        """The base, or what this run has trained under that name: to be looked at, not trained."""
        if trained is None and self.base is not None:
            return self.base
        folder = str(self.folder / trained) if trained else self.s.model
        return policy.load_policy(folder, self.device, self.trained_dtype if trained else self.dtype)[0]

    def to_train(self, model=None):
        """The model, by default the base, as it is trained: with an adapter of its own if there is a --lora-rank."""
        s, model = self.s, self.load() if model is None else model
        if s.lora_rank:  # a generator of its own: a resumed run, which has drawn less, starts each method as before
            model = lora.adapt(model, s.lora_rank, s.lora_alpha, torch.Generator().manual_seed(s.seed))
        if s.gradient_checkpointing:
            memory.recompute_layers(model)
        return model

    def load_reward(self, trained: str | None = None):
        """The reward to train, on the policy's own base if it starts there and has an adapter; or what this run has
        trained under that name."""
        s = self.s
        if trained is not None:
            return reward.load_reward(s.reward, str(self.folder / trained), self.device, self.trained_dtype)
        if self.base is None or s.reward_model != s.model:
            reward_model = reward.load_reward(s.reward, s.reward_model, self.device, self.dtype)
        elif s.reward == "likelihood":
            reward_model = reward.LikelihoodReward(self.base)
        else:
            reward_model = reward.HeadReward(lora.with_head(self.base, s.reward == "random"))
        reward_model.model = self.to_train(reward_model.model)
        return reward_model

    def load_discriminator(self, trained: str | None = None) -> reward.Discriminator:
        """The discriminator on a reward model: the one to train, or what this run has trained."""
        s, reward_model = self.s, self.load_reward(trained)
        vocabulary = reward_model.model.get_input_embeddings().num_embeddings
        ends_step = reward.step_end_tokens(self.tokenizer, vocabulary).to(self.device)
        return reward.Discriminator(reward_model, s.logit, s.granularity, s.interval, ends_step, s.reward_clip)

    def save_model(self, model, name: str) -> None:
        """A folder that from_pretrained loads: complete, or not there. One process writes, the others wait: they may load
        it next."""
        if parallel.rank() == 0:
            with checkpoint.new_folder(self.folder / name) as folder:
                lora.save(model, folder)
                self.tokenizer.save_pretrained(folder)
        parallel.wait()

    def folder_of(self, method: str) -> str:
        """The folder's name of a trained policy: policy/ for IRL, or for the only method."""
        return "policy" if method == "irl" or self.s.methods == [method] else method

    def test_method(self, method: str) -> None:
        """Evaluate the base or a trained policy on the test questions."""
        with self.signals.at_once():
            model = self.load(None if method == "base" else self.folder_of(method))
            found = evaluate(model, self.tokenizer, self.test, self.s)
        if method != "base":
            stages = (warm_up_of(method), method)
            found["seconds"] = sum(self.progress.seconds.get(stage, 0.0) for stage in stages)
        self.results["methods"][method] = found

    def train_sft(self, method: str) -> None:
        """Imitate the demonstrations. sft_fair then gets what IRL's default gets: weights averaged with the start, and
        logits divided for good; and updates and a rate of its own, for those that are best with these are others."""
        s, fair, model = self.mine, method == "sft_fair", self.to_train()
        start = lora.start_of(model) if fair and s.fair_average else []
        s = replace(s, sft_steps=s.fair_steps, sft_lr=s.fair_lr) if fair else s
        self.run_steps(method, self.resumed(baselines.SFT(s, self.tokenizer, model, self.experts)), s.sft_steps, validate=True)
        if fair:
            lora.average(model, start, s.fair_average)
            policy.divide_logits(model, s.fair_temperature)
        self.save_model(model, self.folder_of(method))

    def train_grpo(self, method: str) -> None:
        """Train on the true answers."""
        trainer = self.resumed(baselines.GRPO(self.mine, self.tokenizer, self.to_train(), self.answered))
        self.run_steps(method, trainer, self.s.grpo_steps, validate=True)
        self.save_model(trainer.policy_model, self.folder_of(method))

    def make_loop(self, kind: type[irl.IRL] = irl.IRL, **changes) -> irl.IRL:
        """The loop with all it needs, before its first update; `kind` may be explain.Lecture. changes: of settings."""
        s, start = self.s, "sft" if self.s.start == "sft" else None
        policy.check_same_tokenizer(self.tokenizer, s.reward_model)
        discriminator = self.load_discriminator()
        extra = [example.question for example in self.extra]
        mine, model = replace(self.mine, **changes), self.to_train(self.load(start))
        return kind(mine, self.tokenizer, model, discriminator, self.experts, extra)

    def train_irl(self, method: str) -> None:
        """Warm the discriminator up, run the loop, save policy and reward. likelihood is the same without the
        discriminator's loss: what IRL has beyond it is what telling apart from negatives brings."""
        loop = self.resumed(self.make_loop(**{"discriminator_coef": 0.0} if method == "likelihood" else {}))
        if self.s.start == "base" and not self.progress.steps.get(warm_up_of(method)):
            first = irl.first_logprob(loop.policy_model, self.tokenizer, self.experts[:32])
            if first < -8 and parallel.rank() == 0:
                print(f"the base all but never begins as the demonstrations do (log pi of their first token {first:.1f}): "
                      "IRL cannot teach it that, --start sft can")  # fmt: skip
        self.run_steps(warm_up_of(method), loop, self.s.warm_up)
        if not self.progress.steps.get(method):
            loop.end_warm_up()
        self.run_steps(method, loop, self.s.max_steps, validate=True)
        self.save_model(loop.policy_model, self.folder_of(method))
        if method == "irl":
            self.save_model(loop.discriminator.reward_model.model, "reward")

    def use_reward(self) -> None:
        """Rerank the base's samples, find first errors, keep some traces for the report: one process's work."""
        parallel.leave()
        with self.signals.at_once():
            s, test, base = self.s, self.test[: self.s.rerank_questions], self.load()
            discriminator = self.load_discriminator("reward")
            judges = rerank.load_judges(self.folder, self.tokenizer, s.fair_temperature, self.device, self.trained_dtype)
            generator = torch.Generator(self.device).manual_seed(s.seed + 1)
            candidates = rerank.collect(base, self.tokenizer, test, s.rerank_n, s.max_new_tokens, 1.0, generator,
                                        s.sample_rows)  # fmt: skip
            found = rerank.assess(candidates, discriminator, base, judges, self.tokenizer, s)
            traces = rerank.show_traces(candidates, discriminator, base, self.tokenizer, s)
        checkpoint.write_text(self.folder / "traces.json", json.dumps(traces))
        self.results |= found
        self.results["reward"]["auroc"] = found["rerank"]["auroc"]["reward"]

    def finish(self) -> None:
        """results.json, report.html and the table. The checkpoints have done their work."""
        parallel.leave()
        checkpoint.write_text(self.folder / "results.json", json.dumps(self.results, indent=1) + "\n")
        page = report.write_report(self.folder)
        checkpoint.remove(self.folder / "checkpoints")
        print("\n" + table(self.results) + f"\n\nresults: {self.folder / 'results.json'}\nreport:  {page}")


def warm_up_of(method: str) -> str:
    """What the steps of a method's warm-up are called in metrics.jsonl."""
    return "warm-up" if method == "irl" else f"{method} warm-up"


def table(results: dict) -> str:
    """The results as plain text: methods, then what the reward is worth at inference."""
    lines = [f"{'share of test questions right':37s}{'temperature 1':>22s}{'greedy':>22s}{'seconds':>9s}"]
    names = {"base": "base", "sft": "SFT", "sft_fair": "SFT, averaged and sharpened as IRL", "irl": "IRL (no verifier)",
             "likelihood": "IRL without its discriminator", "grpo": "GRPO (true answer)"}  # fmt: skip
    for method, r in results["methods"].items():
        cells = [f"{r[k]:.3f} [{r[k + '_interval'][0]:.3f}, {r[k + '_interval'][1]:.3f}]" for k in ("t1", "greedy")]
        lines.append(f"{names[method]:37s}{cells[0]:>22s}{cells[1]:>22s}{r.get('seconds', 0):9.0f}")
    rules = ("random", "longest", "shortest", "majority", *rerank.LOGPROBS, "reward", "oracle")
    for n in (key for key in ("4", "16") if key in results["rerank"]):
        row = results["rerank"][n]
        found = ", ".join(f"{rule} {row[rule][0]:.3f}" for rule in rules if rule in row)
        lines.append(f"{'best of ' + n + ' samples of the base':37s}{found}")
    if results["reward"].get("auroc") is not None:  # None where all samples were right, or all wrong
        lines.append(f"{'AUROC, right against wrong':37s}reward {results['reward']['auroc']:.3f}")
    for kind in ("wrong", "right"):
        rates = {name: found[kind] for name, found in results.get("alarms", {}).items() if found[kind] is not None}
        shown = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
        lines += [f"{f'{kind} traces with a token below -1':37s}{shown}"] if shown else []
    for kind, name in (("natural", "its own errors"), ("single", "one planted error")):
        hits = results["localise"].get(kind, {}).get("hit0", {})
        found = ", ".join(
            f"{key} {value[0]:.3f}"
            for key, value in hits.items()
            if key.endswith("_first") or (key == "reward" and "reward_first" not in hits)
        )
        lines += [f"{'first wrong token, ' + name:37s}{found}"] if hits else []
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run with these flags (by default the command line's); returns the exit status: 0, 2 after one line that says what
    was wrong, 130 or 143 when a signal has stopped the run."""
    command, begun, signals = "python train.py --resume", False, checkpoint.Signals()

    def program():
        nonlocal command, begun
        policy.quiet()
        given = parse_flags(sys.argv[1:] if arguments is None else arguments)
        resume = begun = given.pop("resume", False)
        s = saved_settings(given) if resume else complete(given)
        folder, command = run_folder(s.name), f"{command} --name {s.name}"
        if resume and is_finished(folder):
            checkpoint.remove(folder / "checkpoints")
            return print(f"{folder} is finished: its results are in {folder / 'results.json'}")
        disk = f"what was saved before stands. When there is room, go on with {command}"
        parallel.start(s.device)
        if parallel.world() > 1 and (resume or s.explain):
            raise UserError("--resume and --explain are for one process: run them without torchrun")
        begun = begun and parallel.world() == 1
        memory = (f"in training a smaller --micro-batch helps ({s.micro_batch} now), or --gradient-checkpointing; in "
                  f"sampling fewer --sample-rows ({s.sample_rows}); {command} takes them. A new run may have a smaller "
                  f"--max-new-tokens ({s.max_new_tokens}) or a --lora-rank")  # fmt: skip
        with checkpoint.in_one_line(folder, disk, memory):
            with signals.at_once():
                run = Run(s, signals, resume)
            if s.explain:
                return run.make_loop(explain.Lecture).give()
            begun = run.alone  # otherwise there is nothing to go on with
            run.go()

    try:
        with signals:
            return data.exit_status(program)
    except checkpoint.Stopped as stopped:
        how = f"; what was done is saved. Go on with: {command}" if begun else " before anything was done"
        print(f"\nstopped by {stopped}{how}", file=sys.stderr)
        return stopped.status


if __name__ == "__main__":
    sys.exit(main())
