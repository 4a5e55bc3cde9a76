"""The command line: settings, runs, evaluation, results.

    python train.py                                          the demo: every method on the embedded problems, minutes
    python train.py --model Qwen2.5-0.5B --data gsm8k        IRL on a real model, on a GPU
    python train.py --method sft --demonstrations 1024       one method, other settings (python train.py --help)
    python train.py --explain                                one iteration in numbers, stage by stage; writes nothing

A run writes runs/<name>/: settings.json, metrics.jsonl (a line per step), results.json, traces.json, report.html, and
models that `from_pretrained` loads: policy/, reward/, and with SFT and GRPO sft/ and grpo/.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
import data
import explain
import irl
import policy
import report
import rerank
import reward
from data import UserError


def setting(default, help: str, choices: tuple = ()):
    """A field of Settings: its default, what it does, what it may be. None: depends on the model (PRESETS)."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Everything that can be turned. Each becomes a flag (max_steps -> --max-steps) and is kept in settings.json."""

    # What
    model: str = setting("base", "the policy's start: 'base' (ships here), a folder, a hub name, or e.g. Qwen2.5-0.5B")
    data: str = setting(None, "words, gsm8k, medreason, a JSON-lines file, or a folder with train.jsonl and test.jsonl")
    method: str = setting(None, "which method to train; 'all' compares the three", ("sft", "irl", "grpo", "all"))
    start: str = setting(
        "base", "where IRL starts: from the base, or from SFT on the same demonstrations", ("base", "sft")
    )
    name: str = setting("demo", "the run is written to runs/<name>")
    seed: int = setting(0, "seed of the data's order, of sampling and of perturbations")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    explain: bool = setting(False, "print one iteration of IRL in numbers, stage by stage, and write nothing")
    # Data
    demonstrations: int = setting(256, "expert traces to learn from")
    extra_questions: int = setting(None, "training questions without a demonstration, for the policies of IRL and GRPO")
    words_steps: int = setting(3, "steps of arithmetic in a words problem")
    words_largest: int = setting(40, "largest number in the text of a words problem")
    max_new_tokens: int = setting(None, "longest response that is sampled")
    # Reward
    reward_model: str = setting(None, "the reward's start, if not --model; its tokenizer must be the policy's")
    reward: str = setting("likelihood", "f = log p_phi, or the paper's linear head", ("likelihood", "head"))
    logit: str = setting("airl", "logit D = f - log pi, or f", ("airl", "gail"))
    granularity: str = setting("dense", "a score per token, per step, or per trace", ("dense", "interval", "sparse"))
    interval: int = setting(0, "tokens per interval; 0 takes the trace's own lines as steps")
    discriminator_loss: str = setting("bce", "cross-entropy, Bradley-Terry, or Wasserstein", ("bce", "bt", "wgan"))
    label_smoothing: float = setting(0.1, "labels 1 and 0 become 1 - x/2 and x/2")
    reward_nll: float = setting(1.0, "weight of the demonstrations' likelihood in a likelihood reward's loss")
    rollouts_per_expert: int = setting(2, "sampled negatives per demonstration, old ones included")
    perturbed: int = setting(2, "broken copies of each demonstration as negatives")
    replay: int = setting(4, "old rollouts kept per question; 0 for none")
    warm_up: int = setting(60, "discriminator updates before the policy's first")
    warm_up_lr: float = setting(None, "learning rate of the warm-up")
    reward_lr: float = setting(None, "learning rate of the discriminator beside the policy")
    discriminator_updates: int = setting(1, "discriminator updates per policy step")
    freeze_reward: bool = setting(False, "stop training the discriminator after the warm-up")
    reward_clip: float = setting(0.0, "hold rewards within [-x, x]; 0 for none (REINFORCE and PPO)")
    # Policy
    policy_loss: str = setting(
        None,
        "exact sums over the vocabulary, best imitates each group's best sample",
        ("exact", "reinforce", "ppo", "best"),
    )
    baseline: str = setting("group", "of REINFORCE and PPO: the group's mean, or the exact E[r_t]", ("group", "exact"))
    entropy_coef: float = setting(0.1, "alpha in r = f - alpha log pi: 1 imitates, less sharpens")
    gamma: float = setting(None, "discount of later tokens' rewards")
    kl_coef: float = setting(0.0, "weight of the KL to the frozen start")
    ppo_clip: float = setting(0.2, "PPO and GRPO hold the ratio within 1 +- this")
    epochs: int = setting(1, "passes over each rollout")
    questions: int = setting(32, "questions per step")
    group: int = setting(8, "samples per question (G)")
    temperature: float = setting(1.0, "sampling temperature in training")
    top_p: float = setting(1.0, "nucleus of training samples")
    max_steps: int = setting(None, "policy steps of IRL and GRPO")
    policy_lr: float = setting(None, "learning rate of IRL's policy")
    grpo_lr: float = setting(None, "learning rate of GRPO")
    sft_steps: int = setting(None, "updates of SFT")
    sft_lr: float = setting(None, "peak learning rate of SFT")
    sft_batch: int = setting(32, "demonstrations per update of SFT")
    micro_batch: int = setting(None, "rows per forward pass in training: memory, nothing else")
    # Evaluation
    eval_questions: int = setting(None, "test questions")
    eval_samples: int = setting(None, "samples per test question at temperature 1")
    validate_every: int = setting(10, "steps between looks at 100 validation questions; 0 for never")
    rerank_n: int = setting(16, "candidates per question for reranking")
    rerank_questions: int = setting(None, "test questions to rerank")
    rule: str = setting("mean", "how a trace's token rewards become its score", rerank.RULES)


# What depends on the size of the model. Rates for large models are the customary ones, not tuned here.
PRESETS = {
    "small": dict(data="words", method="all", extra_questions=4000, max_new_tokens=64, warm_up_lr=3e-4, reward_lr=3e-5,
                  policy_loss="exact", gamma=0.0, max_steps=150, policy_lr=4e-4, grpo_lr=6e-4, sft_steps=200, sft_lr=3e-4,
                  micro_batch=256, eval_questions=500, eval_samples=8, rerank_questions=250),
    "large": dict(data="gsm8k", method="irl", extra_questions=0, max_new_tokens=400, warm_up_lr=1e-5, reward_lr=2e-6,
                  policy_loss="exact", gamma=0.0, max_steps=200, policy_lr=2e-6, grpo_lr=2e-6, sft_steps=200, sft_lr=1e-5,
                  micro_batch=2, eval_questions=200, eval_samples=4, rerank_questions=100),
}  # fmt: skip


def parse_settings(arguments: list[str]) -> Settings:
    """Flags to Settings, with what the model's size decides filled in."""
    parser = data.Parser(__doc__)
    for f in fields(Settings):
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        preset = ", ".join(f"{size}: {values[f.name]}" for size, values in PRESETS.items() if f.name in values)
        parser.add_argument(flag, type=f.type, default=f.default, choices=f.metadata["choices"] or None,
                            help=f"{help} (default: {preset or f.default})".replace("%", "%%"), metavar=f.type.__name__
                            if not f.metadata["choices"] else None)  # fmt: skip
    settings = Settings(**vars(parser.parse(arguments)))
    for name, value in PRESETS["small" if settings.model == "base" else "large"].items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.reward_model = settings.reward_model or settings.model
    check(settings)
    return settings


def check(s: Settings) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    counts = ("demonstrations", "words_steps", "max_new_tokens", "questions", "group", "epochs", "micro_batch",
              "eval_samples", "eval_questions", "rerank_n", "rerank_questions", "max_steps", "sft_steps", "sft_batch",
              "rollouts_per_expert")  # fmt: skip
    for name in counts:
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(s, name)}")
    if s.words_largest < 8:
        raise UserError(f"--words-largest must be at least 8, not {s.words_largest}")
    if s.group < 2:
        raise UserError("--group must be at least 2: a sample is judged against the others of its group")
    if s.rollouts_per_expert > s.group:
        raise UserError(f"--rollouts-per-expert {s.rollouts_per_expert} is more than --group {s.group} samples")
    sums = "--policy-loss exact" if s.policy_loss == "exact" else "--baseline exact" if s.baseline == "exact" else ""
    if sums and (s.reward != "likelihood" or s.logit != "airl" or s.granularity != "dense"):
        raise UserError(
            f"{sums} sums f over the whole vocabulary, which takes --reward likelihood, --logit airl and "
            "--granularity dense: with others use --policy-loss ppo and --baseline group"
        )
    if not re.fullmatch(r"[\w.-]+", s.name) or s.name.startswith("."):
        raise UserError(
            f"--name '{s.name}' must be a plain folder name (letters, digits, . _ -): the run goes to runs/<name>"
        )
    if s.explain and (s.method in ("sft", "grpo") or s.start == "sft"):
        raise UserError("--explain shows one iteration of IRL from the base: leave out --method and --start")
    if s.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"no device '{s.device}': auto, cpu, cuda or mps")


# ---------------------------------------------------------------------------------------------------------------
# Evaluation: the answer check is used from here on, and nowhere in irl.py
# ---------------------------------------------------------------------------------------------------------------


def evaluate(model, tokenizer, examples: list[data.Example], s: Settings) -> dict:
    """Accuracy at temperature 1 (mean over samples) and greedy, with 95% bootstrap intervals over questions; pass@k."""
    generator = torch.Generator(model.device).manual_seed(s.seed)
    sampled = rerank.collect(
        model, tokenizer, examples, s.eval_samples, s.max_new_tokens, 1.0, generator
    ).correct  # [Q, N]
    greedy = rerank.collect(model, tokenizer, examples, 1, s.max_new_tokens, 0.0).correct  # [Q, 1]
    t1, greedy = rerank.bootstrap(sampled.float().mean(1)), rerank.bootstrap(greedy.float().mean(1))
    ks = [k for k in (1, 2, 4, 8, 16) if k <= s.eval_samples]
    passes = {
        str(k): sum(rerank.pass_at_k(s.eval_samples, int(c), k) for c in sampled.sum(1)) / len(sampled) for k in ks
    }
    return {"t1": t1[0], "t1_interval": t1[1:], "greedy": greedy[0], "greedy_interval": greedy[1:], "pass@k": passes}


class Log:
    """metrics.jsonl and the progress bar."""

    def __init__(self, folder: Path):
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def write(self, method: str, step: int, metrics: dict, bar: tqdm) -> None:
        """One line {"method", "step", "stage/metric": value, ...}, and the few numbers that matter beside the bar."""
        flat = {f"{stage}/{name}": value for stage, values in metrics.items() for name, value in values.items()}
        self.file.write(json.dumps({"method": method, "step": step} | flat) + "\n")
        self.file.flush()
        shown = ("validation/t1", "reward/mean", "discriminator/accuracy", "rollout/entropy", "policy/loss")
        bar.set_postfix({name.split("/")[1]: f"{flat[name]:.3f}" for name in shown if name in flat})


def run_steps(method: str, trainer, steps: int, log: Log, validate=None, every: int = 0) -> float:
    """Call trainer.step `steps` times, looking at the validation questions now and then. Returns seconds of training."""
    seconds = 0.0
    bar = tqdm(range(1, steps + 1), desc=f"{method:8s}", dynamic_ncols=True)
    for step in bar:
        start = time.perf_counter()
        metrics = trainer.warm_up() if method == "warm-up" else trainer.step()
        seconds += time.perf_counter() - start
        if method == "warm-up":
            metrics = {"discriminator": metrics}
        if validate is not None and every and (step % every == 0 or step == steps):
            metrics["validation"] = {"t1": validate()}
        log.write(method, step, metrics, bar)
    return seconds


# ---------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------


class Run:
    """One call of train.py: loads, trains each method from the same base on the same demonstrations, compares."""

    def __init__(self, settings: Settings):
        self.s = s = settings
        self.folder = Path("runs") / s.name
        if not s.explain and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} already holds a run: give another --name, or remove that folder")
        self.device = policy.pick_device(s.device)
        torch.manual_seed(s.seed)
        base, self.tokenizer = policy.load_policy(s.model, self.device)
        self.context = policy.context_length(base)
        self.load_data()
        if s.explain:  # a lecture leaves nothing behind
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "settings.json").write_text(json.dumps(asdict(s), indent=1))
            self.log = Log(self.folder)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from None
        self.results = {"methods": {}, "reward": {}, "rerank": {}, "localise": {}, "settings": asdict(s)}

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
        self.experts, self.extra = train[: s.demonstrations], train[s.demonstrations :]
        if len(self.experts) < s.demonstrations:
            print(f"only {len(self.experts)} demonstrations are there, not {s.demonstrations}")
        self.validation, self.test = load("validation", 100), load("test", s.eval_questions)
        if dropped:
            print(f"{dropped} examples are longer than the model's context of {self.context} tokens: skipped")

    def validate(self, model) -> float:
        """Accuracy of one sample at temperature 1 on the validation questions. For curves; nothing trains on it."""
        generator = torch.Generator(model.device).manual_seed(0)
        return float(
            rerank.collect(model, self.tokenizer, self.validation, 1, self.s.max_new_tokens, 1.0, generator)
            .correct.float()
            .mean()
        )

    def train(self, method: str, trainer, steps: int) -> None:
        """Train, evaluate on the test questions, save."""
        model = trainer.policy_model
        seconds = run_steps(method, trainer, steps, self.log, lambda: self.validate(model), self.s.validate_every)
        self.results["methods"][method] = evaluate(model, self.tokenizer, self.test, self.s) | {"seconds": seconds}
        folder = self.folder / ("policy" if method in ("irl", self.s.method) else method)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def all_methods(self) -> None:
        """Base, SFT, IRL, GRPO, as far as asked for; then what the reward is worth at inference.

        Every model is loaded when it is needed and dropped after: at 0.5B each one counts.
        """
        s = self.s
        wanted = ("sft", "irl", "grpo") if s.method == "all" else (s.method,)
        self.results["methods"]["base"] = evaluate(self.load(), self.tokenizer, self.test, s)
        if "sft" in wanted or ("irl" in wanted and s.start == "sft"):
            self.train("sft", baselines.SFT(s, self.tokenizer, self.load(), self.experts), s.sft_steps)
        discriminator = self.train_irl() if "irl" in wanted else None
        if "grpo" in wanted:
            self.train("grpo", baselines.GRPO(s, self.tokenizer, self.load(), self.experts + self.extra), s.max_steps)
        if discriminator is not None:
            self.use_reward(discriminator)

    def load(self, trained: str | None = None):
        """The base, or what this run has trained under that name."""
        folder = str(self.folder / trained) if trained else self.s.model
        return policy.load_policy(folder, self.device)[0]

    def make_loop(self, kind: type[irl.IRL] = irl.IRL) -> irl.IRL:
        """The loop with all it needs, before its first update; `kind` may be explain.Lecture."""
        s, start = self.s, "sft" if self.s.start == "sft" else None
        policy.check_same_tokenizer(self.tokenizer, s.reward_model)
        reward_model = reward.load_reward(s.reward, s.reward_model, self.device)
        vocabulary = reward_model.model.get_input_embeddings().num_embeddings
        ends_step = reward.step_end_tokens(self.tokenizer, vocabulary).to(self.device)
        discriminator = reward.Discriminator(reward_model, s.logit, s.granularity, s.interval, ends_step, s.reward_clip)
        reference = self.load(start).requires_grad_(False) if s.kl_coef else None
        extra = [example.question for example in self.extra]
        return kind(s, self.tokenizer, self.load(start), discriminator, self.experts, extra, reference)

    def train_irl(self) -> reward.Discriminator:
        """Warm the discriminator up, run the loop, save policy and reward."""
        s, loop = self.s, self.make_loop()
        warm_up_seconds = run_steps("warm-up", loop, s.warm_up, self.log)
        self.train("irl", loop, s.max_steps)
        self.results["methods"]["irl"]["seconds"] += warm_up_seconds
        loop.discriminator.reward_model.model.save_pretrained(self.folder / "reward")
        self.tokenizer.save_pretrained(self.folder / "reward")
        return loop.discriminator

    def use_reward(self, discriminator: reward.Discriminator) -> None:
        """Rerank the base's samples, find first errors, keep some traces for the report."""
        s, test, base = self.s, self.test[: self.s.rerank_questions], self.load()
        sft_model = self.load("sft") if (self.folder / "sft").exists() else None
        generator = torch.Generator(self.device).manual_seed(s.seed + 1)
        candidates = rerank.collect(base, self.tokenizer, test, s.rerank_n, s.max_new_tokens, 1.0, generator)
        self.results |= rerank.assess(candidates, discriminator, base, sft_model, self.tokenizer, s)
        self.results["reward"]["auroc"] = self.results["rerank"]["auroc"]["reward"]
        traces = rerank.show_traces(candidates, discriminator, base, self.tokenizer, s)
        (self.folder / "traces.json").write_text(json.dumps(traces))

    def finish(self) -> None:
        """results.json, report.html and the table."""
        (self.folder / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        page = report.write_report(self.folder)
        print("\n" + table(self.results) + f"\n\nresults: {self.folder / 'results.json'}\nreport:  {page}")


def table(results: dict) -> str:
    """The results as plain text: methods, then what the reward is worth at inference."""
    lines = [f"{'share of test questions right':37s}{'temperature 1':>22s}{'greedy':>22s}{'seconds':>9s}"]
    names = {"base": "base", "sft": "SFT", "irl": "IRL (no verifier)", "grpo": "GRPO (true answer)"}
    for method, r in results["methods"].items():
        cells = [f"{r[k]:.3f} [{r[k + '_interval'][0]:.3f}, {r[k + '_interval'][1]:.3f}]" for k in ("t1", "greedy")]
        lines.append(f"{names[method]:37s}{cells[0]:>22s}{cells[1]:>22s}{r.get('seconds', 0):9.0f}")
    rules = ("random", "majority", "logprob", "sft_logprob", "reward", "oracle")
    for n in (key for key in ("4", "16") if key in results["rerank"]):
        row = results["rerank"][n]
        found = ", ".join(f"{rule} {row[rule][0]:.3f}" for rule in rules if rule in row)
        lines.append(f"{'best of ' + n + ' samples of the base':37s}{found}")
    if results["reward"].get("auroc") is not None:  # None where all samples were right, or all wrong
        lines.append(f"{'AUROC, right against wrong':37s}reward {results['reward']['auroc']:.3f}")
    for kind, name in (("natural", "its own errors"), ("single", "one planted error")):
        hits = results["localise"].get(kind, {}).get("hit0", {})
        found = ", ".join(f"{key} {value[0]:.3f}" for key, value in hits.items() if key != "chance_reward")
        lines += [f"{'first wrong token, ' + name:37s}{found}"] if hits else []
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run with these flags (by default the command line's); returns the exit status."""

    def program():
        policy.quiet()
        run = Run(parse_settings(sys.argv[1:] if arguments is None else arguments))
        if run.s.explain:
            run.make_loop(explain.Lecture).give()
            return
        run.all_methods()
        run.finish()

    return data.exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
