"""The trials behind the README's tables: what is changed in each, as flags of train.py.

    main        SFT, fair SFT, likelihood and IRL with 64, 256 and 1,024 demonstrations, five seeds
    grpo        GRPO on the true answers: no demonstrations, the same seeds and questions
    own_grade   countdown: IRL's policy on the base's own grade in place of a reward that was learnt
    variants    IRL otherwise: from the base, from SFT, without extra questions, a reward per step
    ablations   one setting changed at a time, three seeds, with a policy that starts at the base
    traces      countdown: one setting of a reward per trace changed at a time, three seeds
    chosen      countdown: how IRL's reward was chosen, on validation questions
    (variants and ablations are of words alone)
"""

from dataclasses import dataclass

from experiments import choose

SIZES = (64, 256, 1024)  # demonstrations, of words

# PPO is the policy loss that takes every reward.
PPO = "--policy-loss ppo --gamma 0.9"
# IRL on countdown: GRPO's steps and rate (experiments/choose.py).
LONG = "--max-steps 800 --policy-lr 4e-4"
# countdown's reward is a head, which has no likelihood term: there the likelihood alone is a run of its own.
LIKELIHOOD = (
    "--method likelihood --reward likelihood --logit airl --granularity dense "
    "--start reward --policy-loss exact --gamma 0 --reward-clip 0 --reward-lr 1e-5 "
    "--reward-average 0.5 --warm-up-lr 3e-4 --policy-lr 3e-5 --max-steps 100"
)
# The control of the discriminator: no expert is told from the policy, as it sees no trace of the policy.
BROKEN = f"--method irl --rollouts-per-expert 0 {LONG}"
# What IRL's temperature alone does for the base: fair SFT with nothing learnt.
SHARPENED = (
    "--method sft_fair --fair-steps 1 --fair-lr 0 --fair-average 1 --fair-temperature 0.2"
)
# The strongest rival without demonstrations, where the base has read grades: it practises on its own.
OWN_GRADE = f"{LONG} --reward-model runs/own-grade --warm-up 0 --reward-average 0"

# How the reward that IRL practises on was chosen on countdown: each choice undone.
NONE_OF_THREE = "--reward-clip 0 --reward-average 0 --reward-lr 1e-5"
CHOICES = {
    "averaged, standing still, clipped": "",
    "advantages scaled over the batch": "--advantage-scale batch",
    "not clipped": "--reward-clip 0",
    "not averaged": "--reward-average 0",
    "not standing still": "--reward-lr 1e-5",
    "none of the three": NONE_OF_THREE,
}
CHOICE_SEEDS = (100, 101, 102)

BASE = "--start base --policy-lr 4e-4 --max-steps 200"  # with all the way to go: more steps
# What a linear head needs: found on validation questions of seed 100.
SLOW_HEAD = "--reward head --warm-up 300 --entropy-coef 0 --policy-lr 1e-4"
VARIANTS = {
    "start at the base": "--start base --policy-lr 4e-4 --max-steps 400",
    "start at SFT": "--start sft --max-steps 200",
    "no extra questions": "--extra-questions 0",
    "reward not averaged": "--reward-average 0",
    "the start alone": "--max-steps 1 --policy-lr 1e-9",
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
    # f <= 0, so D <= 1/2: this is not GAIL's discriminator
    "likelihood, logit f, PPO": f"{PPO} {BASE} --logit gail",
    "random reward, PPO": f"{PPO} {BASE} --reward random",
    "no likelihood term": f"{BASE} --reward-nll 0",
    "reward not averaged": f"{BASE} --reward-average 0",
    "discriminator 30 x faster": f"{BASE} --reward-lr 3e-4",
    "frozen after warm-up": f"{BASE} --reward-lr 0",
    "warm-up 15": f"{BASE} --warm-up 15",
    "alpha 1": f"{BASE} --entropy-coef 1",
    "alpha 0.05": f"{BASE} --entropy-coef 0.05",
    "REINFORCE": f"{BASE} --policy-loss reinforce",
    "policy rate x 3": f"{BASE} --policy-lr 1.2e-3",
    "gamma 0.9": f"{BASE} --gamma 0.9",
    "perturbed 0": f"{BASE} --perturbed 0",
    "no replay": f"{BASE} --replay 0",
    "group 2": f"{BASE} --group 2 --questions 32",
    "group 16": f"{BASE} --group 16 --questions 4",
    "perturbed negatives alone": f"{BASE} --rollouts-per-expert 0",
}

# IRL on countdown, one thing changed: what a reward per trace needs, and how it goes wrong.
TRACES = {
    "default": "",
    "KL 0.05": "--kl-coef 0.05",
    "no perturbed negatives": "--perturbed 0",
    "perturbed negatives alone": "--rollouts-per-expert 0",
    "a random head": "--reward random",
    "start at SFT": "--start sft",
    "AIRL logit": "--logit airl --reward-clip 0",
    "a score per step": "--granularity interval",
    "a score per token": "--granularity dense --gamma 1",
    "likelihood, per trace": "--reward likelihood --logit airl --reward-clip 0",
    "likelihood, per token, exact": (
        "--reward likelihood --logit airl --granularity dense --policy-loss exact --gamma 0 "
        "--reward-lr 1e-5 --reward-clip 0"
    ),
    "16 demonstrations": "--demonstrations 16",
}
CHANGES = {"variants": VARIANTS, "ablations": ABLATIONS, "traces": TRACES}


@dataclass
class Trial:
    """A run of train.py: its name, its seed and its flags."""

    name: str
    seed: int
    flags: str

    @property
    def run_name(self) -> str:
        """Its folder in runs/."""
        return f"x-{self.name}-{self.seed}"


def plain(label: str) -> str:
    """A label as part of a trial's name.

    >>> plain("2 discriminator updates"), plain("dense, PPO")
    ('2-discriminator-updates', 'dense-PPO')
    """
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in label).split())


def seeds_of(data: str, count: int) -> range:
    """countdown's settings were found with the demonstrations of seed 0: it begins at 1."""
    first = 1 if data == "countdown" else 0
    return range(first, first + count)


def main_trials(data: str, model: str, sizes: tuple, seeds: int) -> list[Trial]:
    """Fair SFT is trained twice: as it was best at temperature 1, and as it was best greedy."""
    trials = []
    for seed in seeds_of(data, seeds):

        def trial(name: str, size: int, more: str, seed: int = seed) -> Trial:
            flags = f"--data {data} --model {model} --demonstrations {size} --seed {seed}"
            flags += " --eval-questions 1000"
            return Trial(f"{data}-{name}", seed, f"{flags} {more}")

        trials.append(trial("base-sharpened", 256, SHARPENED))
        for size in sorted(sizes, key=(256).__ne__):  # 256 first: the part `inference` needs it
            methods = "sft,sft_fair,irl"
            if data == "words":
                methods = "sft,sft_fair,likelihood,irl"
            main = f"--method {methods}"
            main += f" {choose.sft_flags(data, size)} {choose.fair_flags(data, size)}"
            if data == "countdown":
                main += f" {LONG}"
            trials.append(trial(f"main-{size}", size, main))
            greedy = f"--method sft_fair {choose.fair_flags(data, size, 'greedy')}"
            trials.append(trial(f"fair-greedy-{size}", size, greedy))
            if data == "countdown":
                trials.append(trial(f"likelihood-{size}", size, LIKELIHOOD))
                trials.append(trial(f"broken-{size}", size, BROKEN))
    return trials


def chosen_trials() -> list[Trial]:
    """IRL's reward on countdown, on validation questions as choose.py has them for SFT and GRPO.

    Three sets of demonstrations, as it differs more between them.
    """
    flags = "--data countdown --demonstrations 64 --test-split validation --eval-questions 500"
    flags += f" --method irl {LONG}"
    return [
        Trial(f"chosen-{plain(label)}", seed, f"{flags} --seed {seed} {change}".strip())
        for seed in CHOICE_SEEDS
        for label, change in CHOICES.items()
    ]


def grpo_trials(data: str, model: str, seeds: int) -> list[Trial]:
    """GRPO learns from answers, not from demonstrations: once per seed.

    Its questions are those of the 256 demonstrations and the extra ones.
    """
    flags = f"--data {data} --model {model} --demonstrations 256 --eval-questions 1000"
    flags += " --method grpo"
    return [
        Trial(f"{data}-grpo", seed, f"{flags} --seed {seed} {choose.grpo_flags(data)}")
        for seed in seeds_of(data, seeds)
    ]


def own_grade_trials(seeds: int) -> list[Trial]:
    """IRL's policy on the base's own grade (inference.save_own_grade): no demonstrations."""
    flags = "--data countdown --demonstrations 256 --eval-questions 1000"
    flags += " --method irl"
    return [
        Trial("countdown-own-grade", seed, f"{flags} --seed {seed} {OWN_GRADE}")
        for seed in seeds_of("countdown", seeds)
    ]


def changed_trials(part: str, seeds: int) -> list[Trial]:
    """One thing changed: words with 256 demonstrations, countdown with 64."""
    data = "countdown" if part == "traces" else "words"
    size = 64 if part == "traces" else 256
    flags = f"--data {data} --method irl --demonstrations {size} --eval-questions 1000"
    flags += f" {choose.sft_flags(data, size)}"
    return [
        Trial(f"{part}-{plain(label)}", seed, f"{flags} --seed {seed} {change}")
        for seed in seeds_of(data, seeds)
        for label, change in CHANGES[part].items()
    ]


def all_trials(parts: list[str], data: str, model: str, sizes: tuple, seeds: int) -> list[Trial]:
    """In the order in which they are worth having."""
    trials = []
    if "choose" in parts and data == "countdown":
        trials += chosen_trials()
    if "main" in parts:
        trials += main_trials(data, model, sizes, seeds)
    if "grpo" in parts:
        trials += grpo_trials(data, model, seeds)
    if "own_grade" in parts:
        trials += own_grade_trials(seeds)
    if "variants" in parts:
        trials += changed_trials("variants", seeds)
    for part in ("ablations", "traces"):
        if part in parts:
            trials += changed_trials(part, min(seeds, 3))
    return trials
