"""Everything that can be turned: settings, their presets and ranges, and the flags made of them."""

import datetime
from dataclasses import dataclass, field, fields

from engine import loading
from engine.errors import Parser, UserError
from engine.runs import LIMITS, read_settings, run_folder

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
    rule: str = setting("mean", "how a trace's token rewards become its score", ("mean", "last", "lowest", "discounted"))
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
}.items() for name in names.split()} | LIMITS  # fmt: skip


# What may change when a run goes on: where and how it computes, and what is turned when a loss is not finite.
MAY_CHANGE = ("device", "micro_batch", "micro_tokens", "gradient_checkpointing", "sample_rows", "checkpoint_every",
              "warm_up_lr", "reward_lr", "policy_lr", "grpo_lr", "sft_lr", "fair_lr", "reward_clip")  # fmt: skip


def flag(name: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + name.replace("_", "-")


def parse_flags(arguments: list[str]) -> dict:
    """The settings that were given, and no others; {"resume": True} among them for --resume."""
    parser = Parser(__doc__)
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
    small = settings.model in loading.SHIPPED
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
    saved = read_settings(path.parent)
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
