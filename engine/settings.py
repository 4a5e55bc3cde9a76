"""Everything that can be turned: settings, what they may be and are when nobody gives them, and the flags made of them."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from engine import loading
from engine.errors import Parser, UserError

METHODS = {"sft": "SFT", "sft_fair": "SFT, averaged and sharpened", "likelihood": "IRL without its discriminator", "irl": "IRL",
           "grpo": "GRPO"}  # what they are called on tables, in the order in which they are trained  # fmt: skip
DEVICES = ("auto", "cpu", "cuda", "mps")
RULES = ("mean", "last", "lowest", "discounted")  # rerank.trace_scores
COUNT, SHARE, POSITIVE = (1, 10**9), (0, 1), (0.01, 1000)


def setting(default, help: str, may_be: tuple = ()):
    """A field of Settings: its default (None: `complete` finds it), what it does, what it may be."""
    return field(default=default, metadata={"help": help, "may_be": may_be})


@dataclass
class Settings:
    """Everything that can be turned. Each becomes a flag (max_steps -> --max-steps) and is kept in settings.json."""

    # What
    model: str = setting(None, "the policy's start: a folder, a hub name, Qwen2.5-0.5B, ..; if not given, what ships here")
    data: str = setting(None, "words, countdown, gsm8k, medreason, a JSON-lines file, or a folder with train.jsonl, test.jsonl")
    method: str = setting(None, "sft; sft_fair, with IRL's tricks; likelihood, IRL's alone; irl; grpo; some (sft,irl), or all")
    start: str = setting(None, "where the policies of IRL and GRPO start; reward, for IRL's alone (GRPO: base), is the reward "
                         "after its warm-up. If not given, small models at the reward if that can be a policy, else at the "
                         "base; large ones at SFT", ("base", "sft", "reward"))  # fmt: skip
    name: str = setting("demo", "the run is written to runs/<name>")
    seed: int = setting(0, "seed of the data's order, of sampling and of perturbations")
    device: str = setting("auto", "where to compute", DEVICES)
    date: str = setting(None, "the day, YYYY-MM-DD, that chat templates are told; if not given, that of the run's start")
    explain: bool = setting(False, "print one iteration of IRL in numbers, stage by stage, and write nothing")
    # Data
    demonstrations: int = setting(256, "expert traces to learn from", COUNT)
    wrong_demonstrations: float = setting(0.0, "share of them that is broken on purpose: a control of SFT and IRL", SHARE)
    extra_questions: int = setting(None, "training questions without a demonstration, for the policies of IRL and GRPO")
    words_steps: int = setting(3, "steps of arithmetic in a words problem", (1, 100))
    words_largest: int = setting(40, "largest number in the text of a words problem", (8, 10**6))
    max_new_tokens: int = setting(None, "longest response that is sampled", (1, 10**6))
    # Reward
    reward_model: str = setting(None, "the reward's start, if not --model; its tokenizer must be the policy's")
    reward: str = setting("likelihood", "f = log p_phi, the paper's linear head, or a control: a random head",
                          ("likelihood", "head", "random"))  # fmt: skip
    logit: str = setting("airl", "logit D = f - log pi, or f", ("airl", "gail"))
    granularity: str = setting("dense", "a score per token, per step, or per trace", ("dense", "interval", "sparse"))
    interval: int = setting(0, "tokens per interval; 0 takes the trace's own lines as steps", (0, 10**6))
    label_smoothing: float = setting(0.1, "labels 1 and 0 become 1 - x/2 and x/2", SHARE)
    reward_nll: float = setting(1.0, "weight of the demonstrations' likelihood in a likelihood reward's loss")
    discriminator_coef: float = setting(1.0, "weight of the discriminator's own loss; 0 leaves the likelihood alone")
    reward_average: float = setting(None, "share of its start in the reward's weights after the warm-up", SHARE)
    rollouts_per_expert: int = setting(2, "sampled negatives per demonstration, old ones included; 0: broken copies alone")
    perturbed: int = setting(2, "copies of each demonstration with something wrong, as negatives")
    negatives: str = setting("broken", "what is wrong in them: one thing broken, a calculation whose error is carried on to "
                             "the answer, or both, half of each", ("broken", "carried", "both"))  # fmt: skip
    replay: int = setting(4, "old rollouts kept per question; 0 for none")
    warm_up: int = setting(None, "discriminator updates before the policy's first; if not given, 4 passes over the "
                           "demonstrations, at least 60")  # fmt: skip
    warm_up_lr: float = setting(None, "learning rate of the warm-up")
    reward_lr: float = setting(None, "learning rate of the discriminator beside the policy; 0: after the warm-up it stands still")
    discriminator_updates: int = setting(1, "discriminator updates per policy step", COUNT)
    reward_clip: float = setting(0.0, "hold rewards within [-x, x]; 0 for none (REINFORCE and PPO)")
    # Policy
    policy_loss: str = setting(None, "exact sums over the vocabulary; if not given, exact where it can, else ppo",
                               ("exact", "reinforce", "ppo"))  # fmt: skip
    entropy_coef: float = setting(None, "alpha in r = f - alpha log pi: 1 imitates, less sharpens")
    gamma: float = setting(None, "discount of later rewards; if not given, 0, or 1 with a reward per step or trace", SHARE)
    kl_coef: float = setting(0.0, "weight of the KL to the frozen start")
    ppo_clip: float = setting(0.2, "PPO and GRPO hold the ratio within 1 +- this", POSITIVE)
    advantage_scale: str = setting("batch", "advantages are divided by their root mean square over the batch, or over the "
                                   "group of each question, as in GRPO (REINFORCE and PPO)", ("batch", "group"))  # fmt: skip
    epochs: int = setting(1, "passes over each rollout", COUNT)
    questions: int = setting(None, "questions per step", COUNT)
    group: int = setting(None, "samples per question (G)", (2, 10**6))
    temperature: float = setting(1.0, "sampling temperature in training", POSITIVE)
    top_p: float = setting(1.0, "nucleus of training samples", (0.01, 1))
    max_steps: int = setting(None, "policy steps of IRL", COUNT)
    grpo_steps: int = setting(None, "policy steps of GRPO", COUNT)
    policy_lr: float = setting(None, "learning rate of IRL's policy")
    grpo_lr: float = setting(None, "learning rate of GRPO")
    sft_steps: int = setting(None, "updates of SFT", COUNT)
    sft_lr: float = setting(None, "peak learning rate of SFT")
    sft_batch: int = setting(32, "demonstrations per update of SFT", COUNT)
    fair_steps: int = setting(None, "updates of sft_fair", COUNT)
    fair_lr: float = setting(None, "peak learning rate of sft_fair")
    fair_average: float = setting(None, "share of its start in the weights of sft_fair afterwards", SHARE)
    fair_temperature: float = setting(None, "what the logits of sft_fair are divided by afterwards", POSITIVE)
    # Memory
    micro_batch: int = setting(None, "rows per forward pass in training: memory, nothing else", COUNT)
    micro_tokens: int = setting(0, "tokens per forward pass, rows of similar length together; 0: --micro-batch rows")
    lora_rank: int = setting(0, "adapters of this rank on one frozen base, which policy and reward share; 0: all weights")
    lora_alpha: float = setting(32.0, "an adapter's output counts alpha / rank times", POSITIVE)
    weights: str = setting("auto", "of the base: auto is bf16 for LoRA on CUDA, else float32", ("auto", "float32", "bf16"))
    gradient_checkpointing: bool = setting(False, "keep each layer's input only, compute the rest again in backward")
    fused: bool = setting(False, "log-probabilities by Triton kernels, on CUDA; experiments/bench.py says whether they pay")
    sample_rows: int = setting(512, "responses sampled at once, but a --group at least: the size of the cache of keys and "
                               "values", COUNT)  # fmt: skip
    # Evaluation
    test_split: str = setting("test", "where results come from; to choose settings, validation", ("test", "validation"))
    eval_questions: int = setting(None, "test questions", COUNT)
    eval_samples: int = setting(None, "samples per test question at temperature 1", COUNT)
    validate_every: int = setting(20, "steps between looks at 100 validation questions; 0 for never")
    rerank_n: int = setting(16, "candidates per question for reranking", COUNT)
    rerank_questions: int = setting(None, "test questions to rerank", COUNT)
    rule: str = setting("mean", "how a trace's token rewards become its score", RULES)
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


# What each may be: one of some strings, or a number from, to
MAY_BE = {f.name: f.metadata["may_be"] or (0, 10**9) for f in fields(Settings) if f.metadata["may_be"] or f.type in (int, float)}

# What depends on the task and on the model's size. Rates for large models are the customary ones, not tuned here.
WORDS = dict(
    model="base", data="words", method="all", extra_questions=4000, max_new_tokens=64, eval_questions=500, eval_samples=8,
    rerank_questions=250, micro_batch=96, questions=16, group=4, entropy_coef=0.2, reward_average=0.5, warm_up_lr=3e-4,
    reward_lr=1e-5, max_steps=100, policy_lr=3e-5, grpo_steps=400, grpo_lr=4e-4, sft_steps=480, sft_lr=3e-4, fair_steps=120,
    fair_lr=3e-4, fair_average=0.5, fair_temperature=0.2)  # fmt: skip
# Finished traces are judged here: the paper's head, a score per trace. It stands still while the policy practises on it,
# and all but its sign is clipped: what it says beyond right or wrong is noise (docs/collapses.md). SFT's settings are those
# that experiments/choose.py found for 64 demonstrations; GRPO gets as many steps as IRL, at the same rate
COUNTDOWN = WORDS | dict(
    model="countdown-base", data="countdown", reward="head", logit="gail", granularity="sparse", policy_loss="ppo",
    gamma=1.0, reward_clip=0.1, advantage_scale="group", demonstrations=64, extra_questions=3000, max_new_tokens=40,
    perturbed=4, group=8, reward_lr=0.0, warm_up=40, warm_up_lr=1e-3, max_steps=400, policy_lr=6e-4, grpo_steps=400,
    grpo_lr=6e-4, sft_steps=15, sft_lr=6e-4, fair_lr=6e-4)  # fmt: skip
LARGE = dict(
    data="gsm8k", method="irl", extra_questions=0, max_new_tokens=400, eval_questions=200, eval_samples=4,
    rerank_questions=100, micro_batch=2, questions=32, group=8, entropy_coef=0.1,
    reward_average=0.0, warm_up_lr=1e-5, reward_lr=2e-6, max_steps=200, policy_lr=2e-6, grpo_steps=200, grpo_lr=2e-6,
    sft_steps=200, sft_lr=1e-5, fair_steps=200, fair_lr=1e-5, fair_average=0.0, fair_temperature=0.1)  # fmt: skip
TASKS = {"words": WORDS, "countdown": COUNTDOWN}  # data.EMBEDDED, with the bases that ship here
PRESETS = TASKS | {"large": LARGE}
LORA_RATES = 10  # with --lora-rank the rates above are this times as high: customary, too


def flag(name: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + name.replace("_", "-")


def parse_flags(arguments: list[str]) -> dict:
    """The settings that were given, and no others; {"resume": True} among them for --resume."""
    parser = Parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on with runs/<name>, with the settings it has")
    for f in fields(Settings):
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
            continue
        of = {size: str(preset.get(f.name, f.default)) for size, preset in PRESETS.items()}
        default = of["words"] if len(set(of.values())) == 1 else ", ".join(map(": ".join, of.items()))
        shown = f"{f.metadata['help']} (default: {default})" if default != "None" else f.metadata["help"]
        choices = f.metadata["may_be"] if f.type is str else None
        parser.add_argument(flag(f.name), type=f.type, choices=choices or None, help=shown.replace("%", "%%"),
                            metavar=None if choices else f.type.__name__)  # fmt: skip
    given = vars(parser.parse(arguments))
    return {name: value for name, value in given.items() if value is not None and value is not False}


def parse_settings(arguments: list[str]) -> Settings:
    """Flags to Settings."""
    return complete(parse_flags(arguments))


def complete(given: dict) -> Settings:
    """Settings from those that were given; the others by the task and the model's size, then by what is decided so far."""
    preset = TASKS.get(given.get("data"), WORDS)
    small = given.get("model", preset["model"]) in loading.SHIPPED
    preset = preset if small else LARGE
    if given.get("lora_rank"):
        preset = preset | {name: LORA_RATES * rate for name, rate in preset.items() if name.endswith("_lr")}
    s = Settings(**preset | given)
    if s.policy_loss is None:
        s.policy_loss = "exact" if scores_all_actions(s) else "ppo"
    if s.gamma is None:  # the tokens between two scores have only what follows
        s.gamma = 0.0 if s.granularity == "dense" else 1.0
    s.reward_model = s.reward_model or s.model
    s.date = s.date or datetime.date.today().isoformat()  # a resumed run keeps it
    if s.warm_up is None:  # few demonstrations are learnt in 60 updates, more of them take longer
        s.warm_up = max(60, 4 * s.demonstrations // s.questions)
    if s.reward == "random":  # and it stays so
        s.reward_lr, s.warm_up = 0.0, 0
    if s.start is None:  # a pretrained model hardly ever writes the demonstrations' format; a lecture trains no SFT
        small_start = "reward" if can_start_at_reward(s) else "base"
        s.start = small_start if small else "base" if s.explain else "sft"
    check(s)
    check_given(given, s)
    return s


def scores_all_actions(s: Settings) -> bool:
    """Whether there is an f of every action at every token, to be summed."""
    return s.reward == "likelihood" and s.logit == "airl" and s.granularity == "dense"


def sums_all(s: Settings) -> bool:
    """Whether the policy's loss hangs on no sampled token: f of every action, and nothing that follows."""
    return s.policy_loss == "exact" and not s.gamma and not s.kl_coef


def can_start_at_reward(s: Settings) -> bool:
    """Whether exp(f / alpha) is the best policy: f the expert's log-density, in a network of the policy's own kind, and
    nothing to be had later."""
    density = scores_all_actions(s) and s.reward_nll > 0
    return density and s.reward_model == s.model and s.entropy_coef > 0 and s.gamma == 0


def check_values(values: dict, may_be: dict[str, tuple], named: Callable[[str], str] = flag) -> None:
    """Refuse the first value that is not what it may be: one of these strings, or a number from, to. None is not looked at.

    >>> check_values({"group": 0}, MAY_BE)
    Traceback (most recent call last):
    engine.errors.UserError: --group must be from 2 to 1,000,000, not 0
    """
    for name, allowed in may_be.items():
        value = values.get(name)
        if isinstance(allowed[0], str):
            good, expected = value in allowed, f"one of {', '.join(allowed)}"
        else:
            low, high = allowed
            good, expected = value is None or low <= value <= high, f"from {low:,} to {high:,}"  # nan is not
        if value is not None and not good:
            raise UserError(f"{named(name)} must be {expected}, not {value!r}")


def check_given(given: dict, s: Settings) -> None:
    """Refuse what was given and would change nothing: whoever gave it expects that it does."""
    for name, idle, beside in (
        ("interval", s.granularity != "interval", f"--granularity {s.granularity}"),
        ("entropy_coef", s.logit == "gail", "--logit gail"),
        ("replay", s.rollouts_per_expert < 2,
         f"--rollouts-per-expert {s.rollouts_per_expert}, of which half, rounded down, would be old"),
        ("reward_clip", sums_all(s), "--policy-loss exact, which sums f itself"),
        ("reward_lr", s.reward == "random", "--reward random"),
        ("negatives", not s.perturbed, "--perturbed 0"),
    ):
        if idle and given.get(name):
            raise UserError(f"{flag(name)} {given[name]} changes nothing beside {beside}: leave one of them out")


def check(s: Settings) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    check_values(vars(s), MAY_BE)
    alone = "--method likelihood" if "likelihood" in s.methods else "" if s.discriminator_coef else "--discriminator-coef 0"
    for wrong, why in (
        (not set(s.methods) <= set(METHODS), f"no method '{s.method}': {', '.join(METHODS)}, some with commas between, or all"),
        (s.rollouts_per_expert > s.group, f"--rollouts-per-expert {s.rollouts_per_expert} is more than --group {s.group}"),
        ("irl" in s.methods and s.discriminator_coef and not (s.rollouts_per_expert or s.perturbed),
         "--rollouts-per-expert 0 and --perturbed 0 leave the discriminator no negatives: give one of them"),
        (alone and not s.likelihood_alone,
         f"{alone} leaves the likelihood alone, which takes --reward likelihood and a --reward-nll above 0"),
        (s.policy_loss == "exact" and not scores_all_actions(s),
         "--policy-loss exact sums f over the whole vocabulary, which takes --reward likelihood, --logit airl and "
         "--granularity dense: with others use --policy-loss ppo"),
        (s.start == "reward" and not can_start_at_reward(s),
         "--start reward takes --reward likelihood, --logit airl, --granularity dense, --gamma 0, "
         "--reward-nll and --entropy-coef above 0, and no other --reward-model"),
        ("irl" in s.methods and s.granularity != "dense" and s.gamma == 0,
         f"--gamma 0 pays each token for its own score alone, and with --granularity {s.granularity} most have none: leave it "
         "out, or give --gamma 1"),
        ("irl" in s.methods and s.epochs > 1 and s.policy_loss != "ppo" and not sums_all(s),
         f"--epochs {s.epochs} takes --policy-loss ppo, whose ratio accounts for samples of an earlier policy"),
        (s.weights == "bf16" and not s.lora_rank,
         "--weights bf16 is for a frozen base, with --lora-rank: weights that train are float32, or small steps would vanish"),
        (s.explain and ("irl" not in s.methods or s.start == "sft" or not s.discriminator_coef or s.reward == "random"),
         "--explain shows one iteration of IRL from the base: leave out --method, --start, --discriminator-coef and a random "
         "reward"),
    ):  # fmt: skip
        if wrong:
            raise UserError(why)
