"""The settings of a run: what each may be, its default, and the flags that are made of them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from engine import loading
from engine.errors import Parser, UserError

# Methods, as they are called in tables, in the order in which they are trained
METHODS = {
    "sft": "SFT",
    "sft_fair": "SFT, averaged and sharpened",
    "likelihood": "IRL without its discriminator",
    "irl": "IRL",
    "grpo": "GRPO",
}
DEVICES = ("auto", "cpu", "cuda", "mps")

# What a number may be: (lowest, highest)
COUNT = (1, 10**9)
SHARE = (0, 1)
NOT_NEGATIVE = (0, 10**9)


def setting(default, help: str, may_be: tuple = NOT_NEGATIVE):
    """A field of Settings: its default, what it does, what it may be (some strings, or a range).

    default: None where it depends on the model, the task or other settings; `complete` finds it.
    """
    return field(default=default, metadata={"help": help, "may_be": may_be})


@dataclass
class Settings:
    """What decides about a run's numbers. Each field is a flag (max_steps -> --max-steps)."""

    # What to train
    model: str = setting(None, "the policy's start: a folder, or a name on the hub", ())
    data: str = setting(
        None,
        "words, countdown, gsm8k, medreason, a JSON-lines file, or a folder with train.jsonl and "
        "test.jsonl",
        (),
    )
    method: str = setting(
        None, "sft, sft_fair, likelihood, irl, grpo; some of them (sft,irl); or all", ()
    )
    demonstrations: int = setting(256, "expert traces to learn from", COUNT)
    seed: int = setting(0, "of the data's order, of sampling, of broken copies")

    # Data
    extra_questions: int = setting(
        None, "training questions without a demonstration, for the policies of IRL and GRPO"
    )
    max_new_tokens: int = setting(None, "longest response that is sampled", (1, 10**6))

    # Reward
    reward: str = setting(
        "likelihood",
        "f: a log-likelihood, the paper's linear head, or a random head that learns nothing",
        ("likelihood", "head", "random"),
    )
    logit: str = setting("airl", "logit of D: f - log pi (airl), or f (gail)", ("airl", "gail"))
    granularity: str = setting(
        "dense",
        "one score per token (dense), per line (interval), or per trace (sparse)",
        ("dense", "interval", "sparse"),
    )
    reward_model: str = setting(
        None, "the reward's start, if not --model; of the same tokenizer", ()
    )
    reward_nll: float = setting(
        1.0, "weight of the demonstrations' likelihood in a likelihood reward's loss"
    )
    rollouts_per_expert: int = setting(
        2, "sampled negatives per demonstration, half of them old; 0: broken copies alone"
    )
    perturbed: int = setting(2, "broken copies of each demonstration, as negatives")
    negatives: str = setting(
        "broken",
        "what is wrong in them: one thing (broken), a calculation whose error is carried on to "
        "the answer (carried), a number a digit too short or long (length), half of the first two "
        "(both), or a third of each (all)",
        ("broken", "carried", "length", "both", "all"),
    )
    replay: int = setting(4, "old rollouts kept per question")
    warm_up: int = setting(
        None,
        "updates of the discriminator before the policy's first; if not given, 4 passes over the "
        "demonstrations, at least 60",
    )
    warm_up_lr: float = setting(None, "learning rate of the warm-up")
    warm_up_decay: bool = setting(
        False, "the warm-up's rate rises for a tenth of its updates, then falls to 0, as SFT's does"
    )
    reward_average: float = setting(
        None, "share of its start in the reward's weights after the warm-up", SHARE
    )
    reward_lr: float = setting(
        None, "learning rate of the reward beside the policy; 0: it stands still after the warm-up"
    )
    reward_clip: float = setting(0.0, "hold rewards within [-x, x]; 0: do not")

    # Policy
    start: str = setting(
        None,
        "where the policies of IRL and GRPO start: at the base, at SFT, or (IRL's alone) at the "
        "reward after its warm-up; if not given, at the reward if it can and the model ships "
        "here, at SFT for other models",
        ("base", "sft", "reward"),
    )
    policy_loss: str = setting(
        None,
        "exact (sums over the vocabulary), reinforce or ppo; if not given, exact where it can be",
        ("exact", "reinforce", "ppo"),
    )
    entropy_coef: float = setting(None, "alpha in r = f - alpha log pi: 1 imitates, less sharpens")
    gamma: float = setting(
        None,
        "discount of later rewards; if not given, 0, or 1 with a score per line or trace",
        SHARE,
    )
    kl_coef: float = setting(0.0, "weight of the KL to the policy's frozen start")
    advantage_scale: str = setting(
        "batch",
        "advantages are divided by their root mean square over the batch, or over a question's "
        "group (not with the exact loss)",
        ("batch", "group"),
    )
    epochs: int = setting(1, "passes over each rollout", COUNT)
    questions: int = setting(
        None, "questions per step; SFT takes twice as many demonstrations", COUNT
    )
    group: int = setting(None, "samples per question (G)", (2, 10**6))
    max_steps: int = setting(None, "policy steps of IRL", COUNT)
    policy_lr: float = setting(None, "learning rate of IRL's policy")
    grpo_steps: int = setting(None, "policy steps of GRPO", COUNT)
    grpo_lr: float = setting(None, "learning rate of GRPO")
    sft_steps: int = setting(None, "updates of SFT", COUNT)
    sft_lr: float = setting(None, "highest learning rate of SFT")
    fair_steps: int = setting(None, "updates of sft_fair", COUNT)
    fair_lr: float = setting(None, "highest learning rate of sft_fair")
    fair_average: float = setting(
        None, "share of its start in the weights of sft_fair at the end", SHARE
    )
    fair_temperature: float = setting(
        None, "what the logits of sft_fair are divided by at the end", (0.01, 1000)
    )

    # Memory
    micro_batch: int = setting(None, "rows per forward pass in training", COUNT)
    micro_tokens: int = setting(
        0, "tokens per forward pass, rows of similar length together; 0: --micro-batch rows"
    )
    lora_rank: int = setting(
        0, "adapters of this rank on one frozen base, for policy and reward; 0: train all weights"
    )
    weights: str = setting(
        "auto",
        "number format of the base: float32, bf16, or auto (bf16 for adapters on CUDA)",
        ("auto", "float32", "bf16"),
    )
    gradient_checkpointing: bool = setting(
        False, "keep each layer's input only, and compute the rest again in backward", ()
    )
    sample_rows: int = setting(
        512, "responses sampled at once, at least a --group: the size of the cache", COUNT
    )
    fused: bool = setting(
        False,
        "log-probabilities by Triton kernels, on CUDA; experiments/bench.py says if they pay",
        (),
    )

    # Evaluation
    eval_questions: int = setting(
        None, "test questions; half of them, at most 250, are reranked", COUNT
    )
    test_split: str = setting(
        "test",
        "where results come from: test; or validation, to choose settings",
        ("test", "validation"),
    )

    # No flag: training samples are drawn from all tokens, so that log pi speaks of what is drawn.
    # A smaller nucleus was not tried.
    top_p = 1.0

    # No flags: the field's usual values. Other ones made no difference here (docs/results.md).
    temperature = 1.0  # of training samples
    label_smoothing = 0.1  # the discriminator's labels are 0.95 and 0.05
    discriminator_updates = 1  # per policy step
    ppo_clip = 0.2  # PPO and GRPO hold the ratio within 1 +- this

    @property
    def methods(self) -> list[str]:
        """What is trained, as a list."""
        if self.method != "all":
            return self.method.split(",")
        return [name for name in METHODS if name != "likelihood" or self.can_train_likelihood]

    @property
    def can_train_likelihood(self) -> bool:
        """Whether the reward can be trained without its discriminator's loss."""
        return self.reward == "likelihood" and self.reward_nll > 0

    @property
    def discriminator_coef(self) -> float:
        """Weight of the discriminator's own loss: the method likelihood is IRL without it."""
        return float(self.method != "likelihood")

    @property
    def sft_batch(self) -> int:
        """Demonstrations per update of SFT."""
        return 2 * self.questions


# What each setting may be, where not anything goes
MAY_BE = {f.name: f.metadata["may_be"] for f in fields(Settings) if f.metadata["may_be"]}

# --- defaults: of any model, of a task, of a base that ships --------------------------------------

# For a pretrained model of some size. The rates are the customary ones: they are not tuned here.
PRETRAINED = dict(
    method="irl",
    extra_questions=0,
    max_new_tokens=400,
    reward_average=0.0,
    entropy_coef=0.1,
    questions=32,
    group=8,
    warm_up_lr=1e-5,
    reward_lr=2e-6,
    max_steps=200,
    policy_lr=2e-6,
    grpo_steps=200,
    grpo_lr=2e-6,
    sft_steps=100,
    sft_lr=1e-5,
    fair_steps=100,
    fair_lr=1e-5,
    fair_average=0.0,
    fair_temperature=0.1,
    micro_batch=2,
    eval_questions=200,
)

# What a task asks of the method, whatever the model
TASKS = {
    "words": dict(),
    # Finished traces are judged: the paper's head, one score per trace. It stands still while the
    # policy practises on it, and all but its sign is clipped: what it says beyond right or wrong is
    # noise (docs/collapses.md).
    "countdown": dict(
        extra_questions=3000,
        max_new_tokens=48,
        reward="head",
        logit="gail",
        granularity="sparse",
        policy_loss="ppo",
        gamma=1.0,
        reward_clip=0.1,
        advantage_scale="group",
        perturbed=4,
        reward_lr=0.0,
    ),
}

# What was found for the small bases that ship here
TUNED = {
    "base": dict(
        method="all",
        extra_questions=4000,
        max_new_tokens=64,
        reward_average=0.5,
        entropy_coef=0.2,
        questions=16,
        group=4,
        warm_up_lr=3e-4,
        reward_lr=1e-5,
        max_steps=100,
        policy_lr=3e-5,
        grpo_steps=400,
        grpo_lr=4e-4,
        sft_steps=480,
        sft_lr=3e-4,
        fair_steps=120,
        fair_lr=3e-4,
        fair_average=0.5,
        fair_temperature=0.2,
        micro_batch=96,
        eval_questions=500,
    ),
    # SFT's are what experiments/trials.py chose for 64 demonstrations. GRPO gets IRL's steps and
    # rate.
    "countdown-base": dict(
        method="all",
        demonstrations=64,
        max_new_tokens=40,
        reward_average=0.5,
        entropy_coef=0.2,
        questions=16,
        group=8,
        warm_up=40,
        warm_up_lr=1e-3,
        max_steps=400,
        policy_lr=6e-4,
        grpo_steps=400,
        grpo_lr=6e-4,
        sft_steps=15,
        sft_lr=6e-4,
        fair_steps=120,
        fair_lr=6e-4,
        fair_average=0.5,
        fair_temperature=0.2,
        micro_batch=96,
        eval_questions=500,
    ),
}
BASES = {"words": "base", "countdown": "countdown-base"}  # what ships for each embedded task
LORA_RATES = 10  # adapters learn at rates so many times as high: customary, too


def preset(model: str, data: str) -> dict:
    """The defaults for a model on a task: any model's, the task's, those of a base that ships."""
    return PRETRAINED | TASKS.get(data, {}) | TUNED.get(model, {})


def complete(given: dict, explain: bool = False) -> Settings:
    """All settings from those that were given. Raises UserError if they do not go together.

    What was not given comes from `preset`, and then from what is decided so far.
    explain: for --explain, which trains no SFT to start at.
    """
    tasks = {base: task for task, base in BASES.items()}
    model = given.get("model") or BASES.get(given.get("data"), "base")
    data = given.get("data") or tasks.get(model, "gsm8k")
    defaults = preset(model, data)
    if given.get("lora_rank"):
        defaults |= {name: LORA_RATES * defaults[name] for name in defaults if name.endswith("_lr")}
    s = Settings(**defaults | {"model": model, "data": data} | given)

    if s.policy_loss is None:
        s.policy_loss = "exact" if scores_all_actions(s) else "ppo"
    if s.gamma is None:  # where few tokens have a score, the others have only what follows them
        s.gamma = float(s.granularity != "dense")
    s.reward_model = s.reward_model or s.model
    if s.warm_up is None:  # few demonstrations are learnt in 60 updates, more of them take longer
        s.warm_up = max(60, 4 * s.demonstrations // s.questions)
    if s.reward == "random":  # and it stays random
        s.reward_lr = 0.0
        s.warm_up = 0
    if s.start is None:
        s.start = "base"
        if s.model not in loading.SHIPPED and not explain:
            s.start = "sft"  # a pretrained model hardly ever writes the demonstrations' format
        elif s.model in loading.SHIPPED and can_start_at_reward(s):
            s.start = "reward"
    check(s, given)
    return s


# --- what goes together ---------------------------------------------------------------------------


def scores_all_actions(s: Settings) -> bool:
    """Whether there is an f of every action at every token, to be summed."""
    return s.reward == "likelihood" and s.logit == "airl" and s.granularity == "dense"


def can_start_at_reward(s: Settings) -> bool:
    """Whether exp(f / alpha) is the best policy, and the policy can be a copy of the network of f.

    That takes an f that is the expert's log-density, and a reward now rather than later.
    """
    density = scores_all_actions(s) and s.reward_nll > 0
    return density and s.reward_model == s.model and s.entropy_coef > 0 and s.gamma == 0


def flag(name: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + name.replace("_", "-")


def check_values(
    values: dict, may_be: dict[str, tuple], shown: Callable[[str], str] = flag
) -> None:
    """Refuse the first value that is not one of some strings, or in a range. None is left out.

    shown: what the name of a value is called in the message.

    >>> check_values({"group": 0}, MAY_BE)
    Traceback (most recent call last):
    engine.errors.UserError: --group must be from 2 to 1,000,000, not 0
    """
    for name, allowed in may_be.items():
        value = values.get(name)
        if isinstance(allowed[0], str):
            good = value in allowed
            expected = f"one of {', '.join(allowed)}"
        else:
            good = value is None or allowed[0] <= value <= allowed[1]  # of nan this is false
            expected = f"from {allowed[0]:,} to {allowed[1]:,}"
        if value is not None and not good:
            raise UserError(f"{shown(name)} must be {expected}, not {value!r}")


def check(s: Settings, given: dict) -> None:
    """Refuse settings that cannot work, and those that were given and would change nothing."""
    check_values(vars(s), MAY_BE)
    trains_irl = "irl" in s.methods
    # The policy's loss needs no sampled token: there is f of every action, and nothing follows.
    sums_all = s.policy_loss == "exact" and not s.gamma and not s.kl_coef
    for wrong, why in (
        (
            not set(s.methods) <= set(METHODS),
            f"no method '{s.method}': {', '.join(METHODS)}, some with commas between, or all",
        ),
        (
            s.rollouts_per_expert > s.group,
            f"--rollouts-per-expert {s.rollouts_per_expert} is more than --group {s.group}",
        ),
        (
            trains_irl and not s.rollouts_per_expert and not s.perturbed,
            "--rollouts-per-expert 0 and --perturbed 0 leave the discriminator no negatives: give "
            "one of them",
        ),
        (
            "likelihood" in s.methods and not s.can_train_likelihood,
            "--method likelihood trains the likelihood alone, which takes --reward likelihood and "
            "a --reward-nll above 0",
        ),
        (
            s.policy_loss == "exact" and not scores_all_actions(s),
            "--policy-loss exact sums f over the whole vocabulary, which takes --reward "
            "likelihood, --logit airl and --granularity dense: with others use --policy-loss ppo",
        ),
        (
            s.start == "reward" and not can_start_at_reward(s),
            "--start reward takes --reward likelihood, --logit airl, --granularity dense, --gamma "
            "0, --reward-nll and --entropy-coef above 0, and no other --reward-model",
        ),
        (
            trains_irl and s.granularity != "dense" and s.gamma == 0,
            "--gamma 0 pays each token for its own score alone, and with --granularity "
            f"{s.granularity} most have none: leave it out, or give --gamma 1",
        ),
        (
            trains_irl and s.epochs > 1 and s.policy_loss != "ppo" and not sums_all,
            f"--epochs {s.epochs} takes --policy-loss ppo, whose ratio accounts for samples of an "
            "earlier policy",
        ),
        (
            s.weights == "bf16" and not s.lora_rank,
            "--weights bf16 is for a frozen base, with --lora-rank: weights that train are "
            "float32, or small steps would vanish",
        ),
        (
            given.get("entropy_coef") and s.logit == "gail",
            "--entropy-coef changes nothing beside --logit gail: leave one of them out",
        ),
        (
            given.get("replay") and s.rollouts_per_expert < 2,
            f"--replay changes nothing beside --rollouts-per-expert {s.rollouts_per_expert}, of "
            "which half, rounded down, would be old: leave one of them out",
        ),
        (
            given.get("reward_clip") and sums_all,
            "--reward-clip changes nothing beside --policy-loss exact, which sums f itself: leave "
            "one of them out",
        ),
        (
            given.get("reward_lr") and s.reward == "random",
            "--reward-lr changes nothing beside --reward random: leave one of them out",
        ),
        (
            given.get("negatives") and not s.perturbed,
            "--negatives changes nothing beside --perturbed 0: leave one of them out",
        ),
    ):
        if wrong:
            raise UserError(why)


# --- the command line -----------------------------------------------------------------------------

DESCRIPTION = """\
Train a policy and a reward from solved problems, test them, and write runs/<name>/report.html.

  python train.py                                          the demo: every method on word problems
  python train.py --data countdown --name countdown        a reward for each finished trace
  python train.py --model Qwen2.5-0.5B --data gsm8k        SFT, then IRL, on a real model, on a GPU
"""
# The headings of --help, each with the first setting below it
GROUPS = {
    "model": "what to train",
    "extra_questions": "data",
    "reward": "reward",
    "start": "policy",
    "micro_batch": "memory: none of these changes what is learnt, but for rounding and --lora-rank",
    "eval_questions": "evaluation",
}


# Whose defaults --help shows
KINDS = {
    "words": preset("base", "words"),
    "countdown": preset("countdown-base", "countdown"),
    "other models": PRETRAINED,
}


def help_of(f) -> str:
    """What a setting does, and its default: one value, or one for each kind of model."""
    values = {kind: str(preset.get(f.name, f.default)) for kind, preset in KINDS.items()}
    default = ", ".join(f"{kind} {value}" for kind, value in values.items() if value != "None")
    if len(set(values.values())) == 1:
        default = values["words"]
    if default in ("None", "False"):  # `complete` finds it, or it is a switch
        return f.metadata["help"]
    return f"{f.metadata['help']} (default: {default})"


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, by default the command line's; `given`: the settings that are among them."""
    parser = Parser(DESCRIPTION, usage="train.py [flags]")
    call = parser.add_argument_group("this call")
    call.add_argument("--name", default="demo", help="the run goes to runs/<name> (default: demo)")
    call.add_argument("--resume", action="store_true", help="go on with runs/<name> as it began")
    call.add_argument("--explain", action="store_true", help="one step of IRL in numbers, no more")
    call.add_argument("--device", default="auto", choices=DEVICES, help="where to compute")
    call.add_argument(
        "--date", help="YYYY-MM-DD, what chat templates take for today (default: the run's start)"
    )
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        options = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            options = {"action": "store_true", "default": None}
        group.add_argument(flag(f.name), help=help_of(f), **options)
    command = parser.parse(arguments)
    values = {f.name: getattr(command, f.name) for f in fields(Settings)}
    command.given = {name: value for name, value in values.items() if value is not None}
    return command


def parse_settings(arguments: list[str]) -> Settings:
    """Flags to Settings."""
    command = parse_flags(arguments)
    return complete(command.given, command.explain)
