"""The trials behind every number of the results: each is a train.py command with a name and a seed.

words-.., countdown-..   the main tables: main, fair-greedy, likelihood, broken, base-sharpened,
                         own-grade, grpo; and inference, which reranks with main's models
ablations-..             words: one setting changed at a time, in a policy that starts at the base
traces-..                countdown: one setting of a reward per trace changed at a time
chosen-..                countdown: how IRL's reward was chosen, on validation questions
tune-..                  how SFT, fair SFT and GRPO were tuned, on validation questions
"""

import itertools

SIZES = (256, 64)  # demonstrations
# (first seed, how many at most) by what a name begins with. countdown's settings were commands with
# the demonstrations of seed 0: it begins at 1. Nothing is chosen with a seed that is tested on.
SEEDS = {
    "words": (0, 10),
    "countdown": (1, 10),
    "ablations": (0, 3),
    "traces": (1, 3),
    "chosen": (100, 3),
    "tune": (100, 1),
}

# --- tuning ---

VALIDATION = "--eval-questions 500 --test-split validation"
# SFT gets what IRL's default gets, so that a difference is no trick that only one of them has: its
# weights may be averaged with the base (shares), its logits divided (temperatures).
UPDATES = (15, 30, 60, 120, 240, 480)
RATES = (3e-4, 6e-4)
SHARES = (0.0, 0.25, 0.5, 0.75)
TEMPERATURES = (1.0, 0.2)
PLAIN = "--fair-average 0.0 --fair-temperature 1.0"  # SFT as it is known
GRPO_TRIED = {
    "words": ((400, 2e-4), (400, 4e-4), (400, 8e-4), (800, 4e-4)),
    "countdown": ((400, 4e-4), (400, 8e-4), (800, 4e-4)),
}
# What was best there; a test holds these against the stored rows. SFT, best at temperature 1:
SFT = {
    "words-64": "--sft-steps 120 --sft-lr 0.0003",
    "words-256": "--sft-steps 480 --sft-lr 0.0006",
    "countdown-64": "--sft-steps 15 --sft-lr 0.0006",
    "countdown-256": "--sft-steps 120 --sft-lr 0.0006",
}
# Fair SFT, best at temperature 1, and best greedy:
FAIR = {
    "words-64": "--fair-steps 60 --fair-lr 0.0006 --fair-average 0.5 --fair-temperature 0.2",
    "words-256": "--fair-steps 120 --fair-lr 0.0003 --fair-average 0.5 --fair-temperature 0.2",
    "countdown-64": "--fair-steps 120 --fair-lr 0.0006 --fair-average 0.5 --fair-temperature 0.2",
    "countdown-256": "--fair-steps 120 --fair-lr 0.0006 --fair-average 0.0 --fair-temperature 0.2",
}
FAIR_GREEDY = {
    "words-64": "--fair-steps 120 --fair-lr 0.0006 --fair-average 0.75 --fair-temperature 0.2",
    "words-256": "--fair-steps 120 --fair-lr 0.0006 --fair-average 0.75 --fair-temperature 0.2",
    "countdown-64": "--fair-steps 120 --fair-lr 0.0006 --fair-average 0.75 --fair-temperature 0.2",
    "countdown-256": "--fair-steps 120 --fair-lr 0.0006 --fair-average 0.0 --fair-temperature 0.2",
}
GRPO = "--grpo-steps 800 --grpo-lr 0.0004"  # of both tasks

# --- the main tables ---

TEST = "--eval-questions 1000"
LONG = "--max-steps 800 --policy-lr 4e-4"  # countdown's IRL takes GRPO's steps and rate
MAIN = {
    "words": "--method sft,sft_fair,likelihood,irl",
    "countdown": f"--method sft,sft_fair,irl {LONG}",
}
# What IRL's temperature alone does for the base: fair SFT with nothing learnt.
SHARPENED = "--method sft_fair --fair-steps 1 --fair-lr 0 --fair-average 1 --fair-temperature 0.2"
# The control of the discriminator: no expert is told from the policy, as it sees no trace of it.
BROKEN = f"--method irl {LONG} --rollouts-per-expert 0"
# The strongest rival without demonstrations, where the base has read grades: the policy practises
# on the base's own grade, which learns nothing (run.save_own_grade).
OWN_GRADE = f"--method irl {LONG} --reward-model runs/own-grade --warm-up 0 --reward-average 0"
# countdown's reward is a head, which has no likelihood term: the likelihood alone is another run.
LIKELIHOOD = (
    "--method likelihood --reward likelihood --logit airl --granularity dense --start reward "
    "--policy-loss exact --gamma 0 --reward-clip 0 --reward-lr 1e-5 --reward-average 0.5 "
    "--warm-up-lr 3e-4 --policy-lr 3e-5 --max-steps 100"
)

# --- one thing changed at a time; the first of each part is the default ---

# With all the way to go, the policy needs more steps.
FROM_BASE = "--start base --policy-lr 4e-4 --max-steps 200"
PPO = "--policy-loss ppo --gamma 0.9"  # the policy loss that takes every reward
CHANGES = {
    "ablations": {
        "default": "",
        "linear-head": f"{PPO} --reward head",
        "random-reward": f"{PPO} --reward random",
        "no-likelihood-term": "--reward-nll 0",
        "reward-not-averaged": "--reward-average 0",
        "REINFORCE": "--policy-loss reinforce",
        "frozen-after-warm-up": "--reward-lr 0",
        "no-perturbed-negatives": "--perturbed 0",
        "perturbed-negatives-alone": "--rollouts-per-expert 0",
        "errors-carried-on": "--negatives carried",
        "errors-carried-on-alone": "--negatives carried --rollouts-per-expert 0",
        "both-kinds-of-copies": "--negatives both",
        "both-kinds-of-copies-alone": "--negatives both --rollouts-per-expert 0",
    },
    "traces": {
        "default": "",
        "no-perturbed-negatives": "--perturbed 0",
        "perturbed-negatives-alone": "--rollouts-per-expert 0",
        "errors-carried-on": "--negatives carried",
        "errors-carried-on-alone": "--negatives carried --rollouts-per-expert 0",
        "both-kinds-of-copies": "--negatives both",
        "both-kinds-of-copies-alone": "--negatives both --rollouts-per-expert 0",
        "random-head": "--reward random",
        "AIRL-logit": "--logit airl --reward-clip 0",
        "a-score-per-step": "--granularity interval",
        "a-score-per-token": "--granularity dense --gamma 1",
        "start-at-SFT": f"--start sft {SFT['countdown-64']}",
    },
    "chosen": {
        "default": "",
        "advantages-scaled-over-the-batch": "--advantage-scale batch",
        "not-clipped": "--reward-clip 0",
        "not-averaged": "--reward-average 0",
        "not-standing-still": "--reward-lr 1e-5",
        "none-of-the-three": "--reward-clip 0 --reward-average 0 --reward-lr 1e-5",
    },
}
COMMON = {
    "ablations": f"--method irl --data words --demonstrations 256 {TEST} {FROM_BASE}",
    "traces": f"--method irl --data countdown --demonstrations 64 {TEST}",
    "chosen": f"--method irl --data countdown --demonstrations 64 {VALIDATION} {LONG}",
}


def all_trials(seeds: int) -> dict[tuple[str, int], str]:
    """{(name, seed): command}, as many seeds of each as are given, or as SEEDS has."""
    commands = {}
    for name, flags in (main_commands() | changed_commands() | tuning_commands()).items():
        first, most = SEEDS[name.split("-")[0]]
        for seed in range(first, first + min(seeds, most)):
            commands[name, seed] = f"train.py --seed {seed} {flags}"
    return commands


def main_commands() -> dict[str, str]:
    """{name: flags} of what the main tables show."""
    commands = {}
    for task, main in MAIN.items():
        flags = f"--data {task} {TEST} --demonstrations"
        for size in SIZES:
            key = f"{task}-{size}"
            commands[f"{task}-main-{size}"] = f"{flags} {size} {main} {SFT[key]} {FAIR[key]}"
            # fair SFT is trained again as it was best greedy
            fair = f"--method sft_fair {FAIR_GREEDY[key]}"
            commands[f"{task}-fair-greedy-{size}"] = f"{flags} {size} {fair}"
            if task == "countdown":
                commands[f"{task}-likelihood-{size}"] = f"{flags} {size} {LIKELIHOOD}"
                commands[f"{task}-broken-{size}"] = f"{flags} {size} {BROKEN}"
        # No demonstrations, so once for both sizes. GRPO's questions are those of 256
        # demonstrations and the extra ones.
        commands[f"{task}-base-sharpened"] = f"{flags} 256 {SHARPENED}"
        commands[f"{task}-grpo"] = f"{flags} 256 --method grpo {GRPO}"
    commands["countdown-own-grade"] = f"--data countdown {TEST} --demonstrations 256 {OWN_GRADE}"
    return commands


def changed_commands() -> dict[str, str]:
    """{name: flags} of one thing changed at a time."""
    commands = {}
    for part, changes in CHANGES.items():
        for label, change in changes.items():
            commands[f"{part}-{label}"] = f"{COMMON[part]} {change}".strip()
    return commands


def tuning_commands() -> dict[str, str]:
    """{name: flags} of SFT's updates, rates, shares, temperatures; of GRPO's steps, rates."""
    commands = {}
    for task in MAIN:
        flags = f"--data {task} {VALIDATION} --demonstrations"
        for size, *values in itertools.product(SIZES, UPDATES, RATES, SHARES, TEMPERATURES):
            steps, rate, share, temperature = values
            name = f"tune-{task}-{size}-{steps}-{rate}-{share}-{temperature}"
            fair = f"--fair-average {share} --fair-temperature {temperature}"
            fair = f"--method sft_fair --fair-steps {steps} --fair-lr {rate} {fair}"
            commands[name] = f"{flags} {size} {fair}"
        for steps, rate in GRPO_TRIED[task]:
            grpo = f"--method grpo --grpo-steps {steps} --grpo-lr {rate}"
            commands[f"tune-{task}-grpo-{steps}-{rate}"] = f"{flags} 256 {grpo}"
    return commands
