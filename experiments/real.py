"""A pretrained model: what is a reward worth that was learnt from demonstrations alone?

    python -m experiments.real --task countdown --model FOLDER --demonstrations 256 --seed 0
    python -m experiments.real --task gsm8k --model FOLDER --demonstrations 512 \\
        --flags "--data FOLDER" --dev mr_gsm8k.jsonl --test processbench.json
    python -m experiments.real --tables      results/real.json, results/real.md, README.md's table

A stage leaves a file, runs/real-<task>-<name>/<stage>.json, with its seconds, its command and the
code's commit, and is left out when that file is there. What was cut off goes on with the same
command: training is train.py's (runs/real-<task>-<name>-<run>/), sampling and judging are kept in
parts. At the end the stages go to a file in results/, and from there into the tables
(experiments/real_tables.py).

    sft       SFT; its updates and rate are chosen on validation questions. Fair SFT is the same
              model with a share of the base in its weights and its logits divided by a temperature,
              both chosen there too. All policies below start from SFT, the rewards from an SFT of
              few updates, where nothing else is said
    copies    countdown: a reward whose discriminator never sees a sample, only experts' traces and
              copies of them with an error in them
    from_base countdown: the same, but it starts from the base, not from an SFT of few updates
    from_base_likelihood
              countdown: the same, and f is a likelihood (and the logit AIRL's), not a head
    irl       countdown: IRL whose discriminator goes on from that of copies, and learns from the
              policy's samples too, beside the policy. GSM8K: a reward per token, from copies alone
    irl_unclipped
              countdown: the same, its reward not clipped: on irl's samples f stood above the clip
              at nearly every token. Which of the two counts is chosen on validation
    irl_copies, irl_frozen
              countdown: controls of irl. The reward stands still as it comes from copies; or after
              a warm-up with the policy's samples
    irl_kl, irl_kl_long
              countdown: the reward of from_base stands still and is not clipped, and the policy
              pays for its KL to SFT; the same with twice the steps
    irl_no_kl, irl_kl_copies
              countdown: controls of irl_kl. The policy pays nothing; the reward is copies'
    irl_kl_prior, irl_kl_base
              countdown: irl_kl, and the base's log-probability of a token is added to its reward;
              and its rival that learns no reward, f = the base's log-probability
    irl_kl_prior_long, irl_kl_base_long
              countdown: the same two with as many steps as grpo_long
    irl_kl_prior_cheap, irl_kl_base_cheap
              countdown: the same two at a third of the KL's price, with twice irl_kl's steps
    irl_kl_likelihood
              countdown: irl_kl with the reward of from_base_likelihood
    sft_with_base
              countdown: the base's logits are added to SFT's, with a weight that is chosen on
              validation. Nothing is trained: the rival of a training on the base's log-probability
    irl_best  countdown: 4 samples for each of many questions that have no demonstration. Those of
              which D is as sure as of most demonstrations that it has never seen are imitated
              beside the demonstrations, each text of a question once, with as many updates as SFT.
              The samples are of the SFT of few updates, where the reward starts. Its rival
              best_logprob imitates as many of the same samples: where the chosen SFT is surest.
              best_true imitates the right ones, of which somebody has to know that they are right:
              what a reward without a mistake would bring in this way. Controls: best_own_verdict
              asks the base whether a sample is right, best_base_logprob how likely it is, random
              nobody
    grpo, grpo_kl, grpo_long
              countdown: GRPO on true answers, with as many steps as IRL; the same, and the policy
              pays for its KL to SFT as irl_kl does; with as many samples as irl_best chooses from
    sparse    GSM8K: a reward per trace
    kinds     countdown: whether a reward that learnt from one kind of copies tells the other kinds
              on held-out demonstrations (no answer is asked for); and one that starts from the
              base, or from SFT
    rerank_base, rerank_sft, rerank_sft_first
              8 candidates for each test question, of the base that was shown worked examples, of
              SFT, and (countdown) of the SFT of few updates; and what every model that was trained
              says of them, and the base's own verdict, asked "Is this solution right?"
    rerank_validation
              countdown: SFT's candidates for validation questions, for a rule that was found on
              test questions and fixed then (docs/results.md)
    judges    countdown: what the log-probabilities and the rewards say of SFT's samples for the
              validation questions of errors
    places    countdown: the first wrong token of SFT's candidates, by every judge
    errors    countdown: how the samples of every policy go wrong, on validation questions
    steps     GSM8K: the first wrong step on ProcessBench (experiments/steps.py)

True answers are read by tests, by GRPO and best_true, and by what is chosen on validation
questions.
"""

import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import data
import irl
import negatives
import policy
import rerank
import train
from candidates import collect, from_texts, natural_errors, signals, without_cut_off
from engine import checkpoint, loading, lora, memory
from engine.chat import at_date, set_date, text_ids, token_ids
from engine.errors import Parser, UserError, exit_status
from engine.settings import parse_settings
from experiments import real_tables, steps, store
from experiments.together import Together
from tasks import countdown

HEAD = "--lora-rank 16 --weights float32 --reward head --logit gail --reward-lr 0 "
HEAD += "--reward-average 0 --perturbed 4 --questions 8 --eval-questions 2 "
FLAGS = {
    # 64 rows a step: what two CPU cores do in half a minute, or in one where the reward learns on.
    # IRL's rate was looked at on validation, with 60 updates of SFT before; GRPO takes the same.
    # What SFT of 240 updates gets wrong is nearly always a false last line that ends at the target.
    # A score per trace does not see it (docs/collapses.md): so a score per token, and a long
    # warm-up. Both were chosen by samples of the first 96 extra questions, whose answers were read.
    "countdown": HEAD + "--data countdown --negatives all --extra-questions 3000 "
    "--max-new-tokens 48 --group 8 --micro-tokens 16384 --micro-batch 64 --sample-rows 256 "
    "--granularity dense --reward-clip 0.1 --advantage-scale group --max-steps 60 "
    "--policy-lr 5e-4 --grpo-steps 60 --grpo-lr 5e-4 --warm-up 120 --warm-up-lr 7e-4 "
    "--warm-up-decay",
    # The reward is all that is wanted: one step of a policy. Which copies it learns from was fixed
    # before any test, so those of a wrong length, which countdown asked for, are not among them.
    # 48 updates are half an hour of two CPU cores.
    "gsm8k": HEAD + "--data gsm8k --negatives both --extra-questions 64 "
    "--max-new-tokens 256 --group 2 --max-steps 1 --micro-batch 8 --sample-rows 256 "
    "--granularity dense --rollouts-per-expert 0 --perturbed 2 --warm-up 48 --warm-up-lr 3e-4",
}
# From the reward of copies. A run without it (20 updates with samples at 5e-4, then on at 5e-4) got
# a reward for the target behind the last "=", true or not: validation fell from 49 % to 32.
GO_ON = "--method irl --warm-up 4 --warm-up-lr 2e-4"
REWARD_ALONE = "--method irl --rollouts-per-expert 0 --max-steps 1"
STANDING = "--method irl --rollouts-per-expert 0 --warm-up 0"  # a reward that learns no more
# The KL's weight was fixed before any look at what it brings. A guide, for the KL(pi || pi_SFT) of
# a trace: were advantages normal with a spread of 1, the best policy at this price would lie at
# 1 / (2 * 0.3^2) = 5.6 nats. (The loss, kl_k3, has the gradient of KL(pi_SFT || pi).)
KL_COEF = 0.3
WITH_KL = f"{STANDING} --reward-clip 0 --kl-coef {KL_COEF}"
# The price was the first guess, and with it more steps brought nothing (irl_kl_prior_long): a third
# of it, for twice the steps. Both were fixed before any look at what they bring.
CHEAP = f"{STANDING} --reward-clip 0 --kl-coef 0.1"
# Fixed before any look at what they bring. The weight alpha of -log pi in r is the default, 0.1.
LIKELIHOOD = "--reward likelihood --logit airl"
# Both parts of the reward weigh alike: the spread of from_base's score, the mean of a trace, is so
# many times that of the base's log-probability (0.746 and 0.267, over 8 samples of SFT to each of
# 100 validation questions; no answer was asked for). Fixed before any run with it.
PRIOR_COEF = 2.8
LONG = 188  # steps of 64 samples: as many samples as irl_best chooses from
TWICE = 120  # steps; fixed before any look at what they bring
RUNS = {  # of train.py, from SFT
    "countdown": {
        "copies": REWARD_ALONE,
        "irl": f"{GO_ON} --reward-lr 2e-4",
        "irl_unclipped": f"{GO_ON} --reward-lr 2e-4 --reward-clip 0",
        "irl_copies": STANDING,
        "irl_frozen": GO_ON,
        "irl_kl": WITH_KL,
        "irl_kl_long": f"{WITH_KL} --max-steps {TWICE}",
        "irl_no_kl": f"{STANDING} --reward-clip 0",
        "irl_kl_copies": WITH_KL,
        "irl_kl_prior": WITH_KL,
        "irl_kl_prior_long": f"{WITH_KL} --max-steps {LONG}",
        "irl_kl_prior_cheap": f"{CHEAP} --max-steps {TWICE}",
        "irl_kl_base_long": f"{WITH_KL} {LIKELIHOOD} --max-steps {LONG}",
        "irl_kl_base_cheap": f"{CHEAP} {LIKELIHOOD} --max-steps {TWICE}",
        "irl_kl_likelihood": f"{WITH_KL} {LIKELIHOOD}",
        "irl_kl_base": f"{WITH_KL} {LIKELIHOOD}",
        "grpo": "--method grpo",
        "grpo_kl": f"--method grpo --kl-coef {KL_COEF}",
        "grpo_long": f"--method grpo --grpo-steps {LONG}",
        "from_base": REWARD_ALONE,
        "from_base_likelihood": f"{REWARD_ALONE} {LIKELIHOOD}",
        # for the stage kinds
        "broken": f"{REWARD_ALONE} --negatives broken",
        "carried": f"{REWARD_ALONE} --negatives carried",
        "from_sft": REWARD_ALONE,
    },
    "gsm8k": {
        "irl": "--method irl",
        "sparse": "--method irl --granularity sparse",
    },
}
BASE = "the base"
# Countdown's policies that are trained on a reward, and the run from which this one comes.
REWARD_OF = {
    "irl": "copies",
    "irl_unclipped": "copies",
    "irl_copies": "copies",
    "irl_frozen": "copies",
    "irl_kl": "from_base",
    "irl_kl_long": "from_base",
    "irl_no_kl": "from_base",
    "irl_kl_copies": "copies",
    "irl_kl_prior": "from_base",
    "irl_kl_prior_long": "from_base",
    "irl_kl_prior_cheap": "from_base",
    "irl_kl_likelihood": "from_base_likelihood",
    "irl_kl_base": BASE,
    "irl_kl_base_long": BASE,
    "irl_kl_base_cheap": BASE,
}
WITH_PRIOR = ("irl_kl_prior", "irl_kl_prior_long", "irl_kl_prior_cheap")
GRPO = ("grpo", "grpo_kl", "grpo_long")
REWARDS_ALONE = ("broken", "carried", "from_sft")
REWARDS = {
    "countdown": (
        "reward",
        "reward_copies",
        "reward_from_base",
        "reward_from_base_likelihood",
    ),
    "gsm8k": ("reward", "reward_sparse"),
}
# SFT's (updates, rate), then fair SFT's (share of the base, temperature)
CELLS = {
    "countdown": ((60, 1e-3), (120, 1e-3), (240, 1e-3), (120, 2e-3), (120, 4e-3), (240, 2e-3)),
    "gsm8k": ((32, 2e-4),),  # each of 512 demonstrations once
}
LOOKS = {"countdown": ((0.0, 1.0), (0.0, 0.5), (0.0, 0.2), (0.25, 0.2)), "gsm8k": ()}
WEIGHTS = (0.25, 0.5, 1.0, 2.0)  # of the base's logits beside SFT's; all that was tried
TEMPERATURE = {"countdown": 1.0, "gsm8k": 0.7}  # of candidates: 0.7 is what users sample with
SHOTS = 4  # worked examples before a question
CANDIDATES = 8
EXTRA_SAMPLES = 4  # for each of irl_best's questions
# Who chooses the samples that an arm imitates.
CHOOSERS = {
    "irl_best": "reward_copies",
    "best_logprob": "sft_logprob",
    "best_base_logprob": "logprob",
    "best_own_verdict": "own_verdict",
}
# Countdown's, beside SFT's.
POLICIES = (*REWARD_OF, *GRPO, *CHOOSERS, "best_true", "random")
VERDICT = "Is this solution right? Answer Yes or No."


@dataclass
class WithPrior(irl.IRL):
    """IRL, and what the base knew before it saw a demonstration counts, too: r_t + c log p."""

    # The base, whose log-probability of a token is added to its reward. Nothing trains it.
    prior: torch.nn.Module | None = None

    def rewards(self, rollout: policy.Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Stage 3. Its metrics are those of r_t alone."""
        rewards, states, metrics = super().rewards(rollout)
        limits = (self.settings.micro_batch, self.settings.micro_tokens)
        log_p = policy.in_chunks(partial(policy.token_logprobs, self.prior), rollout.batch, *limits)
        return rewards + PRIOR_COEF * log_p, states, metrics


class Experiment:
    """What several stages need: the base, questions, train.py's flags."""

    def __init__(self, args):
        self.args = args
        self.folder = Path("runs") / f"real-{args.task}-{args.name}"
        self.flags = shlex.split(f"{FLAGS[args.task]} {args.flags}")
        self.flags += ["--model", args.model, "--demonstrations", str(args.demonstrations)]
        self.flags += ["--seed", str(args.seed)]
        self.settings = parse_settings(self.flags)
        self.cells = CELLS[args.task]
        self.looks = LOOKS[args.task]
        if args.cells:
            pairs = pairs_of("--cells", args.cells, "updates and a rate", "60 1e-3, 120 2e-3")
            self.cells = tuple((int(updates), rate) for updates, rate in pairs)
        if args.looks:
            self.looks = pairs_of(
                "--looks", args.looks, "a share and a temperature", "0 0.2, 0.25 0.2"
            )
        if args.sft:
            updates, rate, share, temperature = args.sft
            # The first cell is where the reward starts.
            self.cells = (self.cells[0], (int(updates), rate))
            self.looks = ((share, temperature),)
        self.base, self.tokenizer = loading.load_policy(args.model, loading.pick_device("auto"))
        set_date(self.tokenizer, None)
        train_questions = self.examples("train", args.demonstrations + SHOTS + args.extra)
        self.experts = train_questions[: args.demonstrations]
        self.shots = train_questions[args.demonstrations :][:SHOTS]
        self.extra = train_questions[args.demonstrations + SHOTS :]
        self.validation = self.examples("validation", args.validation)
        # What an earlier experiment has looked at does not count any more.
        seen = real_tables.questions_seen(args.name)
        test = [
            e for e in self.examples("test", args.questions + len(seen)) if e.question not in seen
        ]
        self.test = test[: args.questions]

    def examples(self, split: str, count: int) -> list[data.Example]:
        """The first `count` of a split, as train.py takes them."""
        return data.load_examples(
            self.settings.data, split, count, self.settings.seed, in_words=True
        )

    def run(self, name: str) -> Path:
        """The folder of a run of train.py."""
        return self.folder.with_name(f"{self.folder.name}-{name}")

    def run_of(self, reward: str) -> Path:
        """The folder of the run of a reward: of irl, or of <run> if it is called reward_<run>."""
        return self.run(reward.removeprefix("reward").removeprefix("_") or "irl")

    def result_of(self, stage: str) -> dict:
        """What a stage has left. UserError if it has not run."""
        path = self.folder / f"{stage}.json"
        if not path.exists():
            raise UserError(f"{path} is not there: run the stage {stage} first")
        return json.loads(path.read_text())

    def sft(self) -> str:
        """The folder of SFT's model."""
        return str(self.run(self.result_of("sft")["chosen"]["run"]) / "policy")

    def first_sft(self) -> str:
        """The folder of the SFT with the fewest updates, of the first cell."""
        self.result_of("sft")
        return str(self.run(run_name("sft", *self.cells[0])) / "policy")

    def reward_start(self, run: str) -> str:
        """The folder of the model from which a run's reward starts.

        That is the SFT with the fewest updates: it can read the task. One that knows the
        demonstrations by heart might tell them from copies by that (see the stage kinds).
        """
        starts_at_base = ("from_base", "from_base_likelihood")
        if run in starts_at_base or REWARD_OF.get(run) == BASE:
            return self.args.model
        if run == "from_sft":
            return self.sft()
        if self.args.task == "countdown" and run in REWARD_OF:
            stage = REWARD_OF[run]
            reward = self.run(stage) / "reward"
            if not reward.exists():
                raise UserError(f"{reward} is not there: run the stage {stage} first")
            return str(reward)
        return self.first_sft()


def pairs_of(flag: str, text: str, what: str, example: str) -> tuple[tuple[float, float], ...]:
    """The pairs of numbers that a flag gives. UserError, with an example, if they are not pairs.

    >>> pairs_of("--cells", "60 1e-3, 120 2e-3", "updates and a rate", "")
    ((60.0, 0.001), (120.0, 0.002))
    """
    try:
        pairs = [one.split() for one in text.split(",")]
        return tuple((float(first), float(second)) for first, second in pairs)
    except ValueError:
        raise UserError(
            f"{flag} {text!r} is not {what}, with a comma between two such pairs: "
            f"write it as {flag} {example!r}"
        ) from None


def run_name(arm: str, updates: int, rate: float) -> str:
    """The name of a run of SFT, or of an arm that is trained as SFT is.

    >>> run_name("sft", 60, 1e-3)
    'sft-60-0.001'
    """
    return f"{arm}-{updates}-{rate:g}"


def trained(x: Experiment, name: str, flags: str, loop: Callable[..., irl.IRL] = irl.IRL) -> None:
    """Have train.py make a run, or go on with it."""
    folder = x.run(name)
    arguments = ["--name", folder.name]
    if (folder / "settings.json").exists():
        arguments.append("--resume")
    else:
        arguments += [*x.flags, *shlex.split(flags)]
    status = train.main(arguments, loop)
    if status:
        sys.exit(status)


def in_parts(x: Experiment, name: str, items: list, size: int, function: Callable) -> list:
    """function(some items, the place of their first) -> a record of each. All records.

    A part that is there is not made again. The random numbers of a part are its own, so that a run
    that was cut off draws what another one draws.
    """
    records = []
    for start in range(0, len(items), size):
        path = x.folder / "parts" / f"{name}-{start}.json"
        part = items[start : start + size]
        # The last part of fewer items, as of another --extra, is too short for more.
        if not path.exists() or len(json.loads(path.read_text())) != len(part):
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(path, json.dumps(function(part, start)))
        records += json.loads(path.read_text())
    return records


# --- candidates, and what is said of them ---------------------------------------------------------


def sample(
    x: Experiment, name: str, model, examples: list, n: int, temperature: float, shots: list = ()
) -> list[dict]:
    """n answers to each question: {"texts", "logprob": the mean of each, by who wrote it}.

    shots: demonstrations that stand before every question, as turns of a chat.
    """
    s = x.settings

    def some(chosen: list, start: int) -> list[dict]:
        generator = torch.Generator(model.device).manual_seed(s.seed * 1_000_003 + start)
        prompts = [example.prompt for example in data.tokenize(x.tokenizer, chosen)]
        if shots:
            before = [
                text for e in shots for text in (e.question, data.response_text(e.trace, e.answer))
            ]
            prompts = [turns(x.tokenizer, [*before, example.question]) for example in chosen]
        limits = (n, s.max_new_tokens, temperature, generator, s.sample_rows, prompts)
        written = collect(model, x.tokenizer, chosen, *limits)
        means = rerank.trace_scores(written.logprobs, written.batch.response_mask, "mean")
        rows = zip(batched(written.texts, n), means.view(-1, n).tolist())
        return [{"texts": texts, "logprob": logprob} for texts, logprob in rows]

    return in_parts(x, name, examples, max(1, s.sample_rows // n), some)


def judge(x: Experiment, name: str, by: str, examples: list, samples: list[dict]) -> list:
    """What one model says of each question's samples: [n], the mean over each trace.

    by: logprob (the base's), sft_logprob, own_verdict; reward, of the run irl; reward_<run>, of
    another.
    """
    discriminator = None
    if by.startswith("reward"):
        discriminator, _, _ = rerank.load_run(x.run_of(by), x.base.device)
        function = discriminator.reward_model.scores
    else:
        writer = loading.load_causal(x.sft(), x.base.device) if by == "sft_logprob" else x.base
        function = partial(policy.token_logprobs, writer)

    def some(chosen: list[dict], start: int) -> list[list[float]]:
        asked = examples[start : start + len(chosen)]
        texts = [text for one in chosen for text in one["texts"]]
        n = len(chosen[0]["texts"])
        if by == "own_verdict":
            questions = [example.question for example in asked for _ in range(n)]
            return batched(own_verdicts(x, questions, texts), n)
        candidates = from_texts(x.tokenizer, asked, texts, n)
        batch = candidates.batch.to(x.base.device)
        values = policy.in_chunks(function, batch, tokens=4096).cpu()
        reading = (values, candidates.batch.response_mask)
        if discriminator:
            ends = discriminator.score_mask(batch).cpu()
            reading = without_cut_off((values, ends), candidates)
        return batched(rerank.trace_scores(*reading, "mean").tolist(), n)

    return in_parts(x, f"{name}-{by}", samples, 16, some)


def batched(items: list, n: int) -> list[list]:
    """n at a time.

    >>> batched([1, 2, 3, 4], 2)
    [[1, 2], [3, 4]]
    """
    return [items[first : first + n] for first in range(0, len(items), n)]


def own_verdicts(x: Experiment, questions: list[str], texts: list[str]) -> list[float]:
    """The base as its own judge: log P(Yes) - log P(No) of each text, asked whether it is right."""
    answers = [[token_ids(x.tokenizer, word)[0]] for word in ("Yes", "No")]
    # Two rows for a text, one with each answer: what they share is read once.
    prompts = []
    for question, text in zip(questions, texts):
        prompts += [turns(x.tokenizer, [question, text, VERDICT])] * len(answers)
    batch = data.make_batch(prompts, answers * len(texts)).to(x.base.device)
    values = policy.in_chunks(partial(policy.token_logprobs, x.base), batch, tokens=8192)
    yes, no = values.sum(1).view(-1, len(answers)).T
    return (yes - no).tolist()


def turns(tokenizer, texts: list[str]) -> list[int]:
    """The tokens of a chat, the user's turn first and last, up to where the next answer begins.

    A control token's name in a text is text; only the template's own are tokens.
    """
    mark = "A TEXT"
    roles = ["user", "assistant"] * len(texts)
    chat = [{"role": role, "content": mark} for role in roles[: len(texts)]]
    template = at_date(tokenizer.get_chat_template(), tokenizer.date)
    first, *others = tokenizer.apply_chat_template(
        chat, tokenize=False, chat_template=template, add_generation_prompt=True
    ).split(mark)
    ids = token_ids(tokenizer, first)
    for text, following in zip(texts, others, strict=True):
        ids += text_ids(tokenizer, text) + token_ids(tokenizer, following)
    return ids


# --- stages: each returns what its file holds -----------------------------------------------------


def look(x: Experiment, run: str, examples: list, chosen: list, _start: int = 0) -> list[dict]:
    """The accuracy of a run's policy with each (share of the base, temperature) that is chosen."""
    looks = []
    for share, temperature in chosen:
        model = loading.load_causal(str(x.run(run) / "policy"), x.base.device)
        lora.average(model, lora.start_of(x.base), share)
        policy.divide_logits(model, temperature)
        about = {"run": run, "share": share, "temperature": temperature}
        looks.append(about | accuracy(x, model, examples))
    return looks


def accuracy(x: Experiment, model, examples: list) -> dict:
    """{"t1", "greedy": [mean, low, high], "shares": of each question's answers, how many are
    right}."""
    right = train.right_answers(model, x.tokenizer, examples, x.settings)
    shares = {column: rows.float().mean(1) for column, rows in right.items()}
    means = {column: rerank.bootstrap(values) for column, values in shares.items()}
    return means | {"shares": {column: shares[column].tolist() for column in shares}}


def on_test(x: Experiment, run: str, share: float = 0.0, temperature: float = 1.0) -> dict:
    """{"t1", "greedy": [mean, low, high], "shares"} of a run's policy on the test questions."""
    name = f"{run}-{share:g}-{temperature:g}"
    return tested(x, name, (share, temperature), partial(look, x, run, x.test))


def tested(x: Experiment, name: str, setting, looking: Callable) -> dict:
    """{"t1", "greedy": [mean, low, high], "shares"} of one look at the test questions."""
    [result] = in_parts(x, f"test-{len(x.test)}-{name}", [setting], 1, looking)
    return {column: result[column] for column in ("t1", "greedy", "shares")}


def on_validation(one: dict) -> float:
    """By what a look at validation questions is chosen."""
    return one["t1"][0]


def tuned(x: Experiment, name: str, cells: tuple, flags: str = "") -> dict:
    """SFT with every cell's updates and rate, looked at with every share and temperature.

    {"looks", "chosen": the one that is best on validation at T = 1}.
    """
    looks = []
    for updates, rate in cells:
        run = run_name(name, updates, rate)
        trained(x, run, f"--method sft --sft-steps {updates} --sft-lr {rate} {flags}")
        seen = in_parts(x, run, x.looks, 1, partial(look, x, run, x.validation))
        looks += [{"updates": updates, "rate": rate} | one for one in seen]

    return {"looks": looks, "chosen": max(looks, key=on_validation)}


def train_sft(x: Experiment) -> dict:
    """SFT and fair SFT, with the settings that are best on validation."""
    tuning = tuned(x, "sft", x.cells)
    best = tuning["chosen"]
    arms = {
        "sft": on_test(x, best["run"]),
        "sft_fair": on_test(x, best["run"], best["share"], best["temperature"]),
    }
    return tuning | {"arms": arms}


def train_judge(x: Experiment) -> dict:
    """GSM8K's SFT: a rival judge, and where the rewards start. What it can do nobody asks."""
    updates, rate = x.cells[0]
    run = run_name("sft", updates, rate)
    trained(x, run, f"--method sft --sft-steps {updates} --sft-lr {rate}")
    return {"chosen": {"run": run, "updates": updates, "rate": rate}}


def train_from_sft(name: str, x: Experiment) -> None:
    """A run of train.py whose base is SFT."""
    starts = f"--model {shlex.quote(x.sft())} --start base"
    starts += f" --reward-model {shlex.quote(x.reward_start(name))}"
    loop = partial(WithPrior, prior=x.base) if name in WITH_PRIOR else irl.IRL
    trained(x, name, f"{RUNS[x.args.task][name]} {starts}", loop)


def reward_from_sft(name: str, x: Experiment) -> dict:
    """A reward; its policy is of no interest."""
    train_from_sft(name, x)
    return {}


def policy_from_sft(name: str, x: Experiment) -> dict:
    """A policy, and how it does on validation and on the test questions.

    Its logits may be divided as fair SFT's are, if that is better on validation.
    """
    train_from_sft(name, x)
    temperatures = sorted({1.0, x.result_of("sft")["chosen"]["temperature"]}, reverse=True)
    cells = [(0.0, temperature) for temperature in temperatures]
    looks = in_parts(x, name, cells, 1, partial(look, x, name, x.validation))
    best = max(looks, key=on_validation)
    arms = {name: on_test(x, name, temperature=best["temperature"])}
    return {"looks": looks, "chosen": best, "arms": arms}


def look_together(x: Experiment, examples: list, weights: list, _start: int = 0) -> list[dict]:
    """The accuracy of SFT whose logits have `weight` times the base's added, at fair SFT's
    temperature."""
    temperature = x.result_of("sft")["chosen"]["temperature"]
    looks = []
    for weight in weights:
        both = [loading.load_causal(folder, x.base.device) for folder in (x.sft(), x.args.model)]
        for model in both:
            policy.divide_logits(model, temperature)
        name = f"sft + {weight:g} of the base's logits"
        about = {"run": name, "weight": weight, "share": 0.0, "temperature": temperature}
        looks.append(about | accuracy(x, Together(*both, weight), examples))
    return looks


def sft_with_base(x: Experiment) -> dict:
    """SFT and the base write together; the base's weight is chosen on validation."""
    looks = in_parts(x, "sft_with_base", WEIGHTS, 1, partial(look_together, x, x.validation))
    best = max(looks, key=on_validation)
    name = f"sft_with_base-{best['weight']:g}"
    arm = tested(x, name, best["weight"], partial(look_together, x, x.test))
    return {"looks": looks, "chosen": best, "arms": {"sft_with_base": arm}}


def kinds_of_copies(x: Experiment) -> dict:
    """{"told": {run: {kind of copy: [share, low, high]}}}: of validation's demonstrations and a
    copy of each, how often the run's reward gives the demonstration more.

    No answer is asked for: by this the kind of copies can be chosen, and where a reward starts.
    """
    told: dict = {}
    for run in ("copies", "from_base", *REWARDS_ALONE):
        train_from_sft(run, x)
        for kind in ("broken", "carried", "length"):
            rng = random.Random(x.args.seed)
            pairs = []
            for example in x.validation:
                copy = negatives.perturb(example, rng, kind)
                texts = [data.response_text(one.trace, one.answer) for one in (example, copy)]
                pairs.append({"texts": texts})
            scores = torch.tensor(judge(x, f"told-{kind}", f"reward_{run}", x.validation, pairs))
            above = (scores[:, 0] > scores[:, 1]).float()
            told.setdefault(run, {})[kind] = rerank.bootstrap(above)
    return {"told": told}


def candidates(source: str, x: Experiment) -> dict:
    """{source: [{"question", "answer", "texts", "scores": {signal: [n]}}], "temperature"}.

    source: base, sft, or sft_first: countdown's SFT of few updates, where the rewards start;
    sft_validation, errors-sft: SFT, asked validation questions. "written": the base's texts, as an
    arm's.
    """
    temperature = TEMPERATURE[x.args.task]
    folders = {"base": x.args.model, "sft_first": x.first_sft()}
    model = loading.load_causal(folders.get(source, x.sft()), x.base.device)
    asks_validation = source in ("sft_validation", "errors-sft")
    examples = x.validation if asks_validation else x.test
    before = x.shots if source == "base" else ()
    samples = sample(x, source, model, examples, CANDIDATES, temperature, before)
    signals = ["logprob", "sft_logprob", *trained_rewards(x, REWARDS[x.args.task])]
    if not asks_validation:
        signals.append("own_verdict")
    if source == "sft" and x.args.task == "countdown":
        signals += trained_rewards(x, [f"reward_{run}" for run in REWARDS_ALONE])
    scores = {}
    stage = {"temperature": temperature}
    if source == "base":
        # Its own log-probability is that of its tokens as it wrote them: after worked examples.
        signals.remove("logprob")
        scores["logprob"] = [one["logprob"] for one in samples]
        if x.args.task == "countdown":
            greedy = sample(x, "greedy", model, examples, 1, 0.0, before)
            written = {"t1": samples, "greedy": greedy}
            base = {column: [one["texts"] for one in rows] for column, rows in written.items()}
            stage["written"] = {"base": base}
    scores |= {by: judge(x, source, by, examples, samples) for by in signals}
    stage[source] = []
    for q, example in enumerate(examples):
        row = {"question": example.question, "answer": example.answer}
        row |= {"texts": samples[q]["texts"], "scores": {by: scores[by][q] for by in scores}}
        stage[source].append(row)
    return stage


def trained_rewards(x: Experiment, names: list[str]) -> list[str]:
    """Those whose stages have run; the others are named."""
    there = [name for name in names if (x.run_of(name) / "reward").exists()]
    missing = [name for name in names if name not in there]
    if missing:
        print(f"without {', '.join(missing)}: not trained", flush=True)
    return there


def winners(name: str, x: Experiment) -> list[tuple[float, data.Example, str]]:
    """(score, question, sample), the surest first; each text of a question is there once.

    The samples are of the SFT of few updates: it errs openly, so that the reward and the chosen
    SFT's log-probability tell more of them than of the chosen SFT's own (docs/results.md).
    best_true alone looks at answers.
    """
    asked = [data.question_only(example) for example in x.extra]
    writer = loading.load_causal(x.first_sft(), x.base.device)
    samples = sample(x, "extra", writer, asked, EXTRA_SAMPLES, 1.0)
    if name == "best_true":
        scores = [
            [float(data.is_correct(example, text)) for text in one["texts"]]
            for example, one in zip(x.extra, samples)
        ]
    elif name == "random":
        rng = random.Random(x.args.seed)
        scores = [[rng.random() for _ in one["texts"]] for one in samples]
    else:
        scores = judge(x, "extra", CHOOSERS[name], asked, samples)
    scored = [
        (said, example, text)
        for example, one, row in zip(asked, samples, scores)
        for text, said in dict(zip(one["texts"], row)).items()
    ]

    def score(winner: tuple) -> float:
        return winner[0]

    return sorted(scored, key=score, reverse=True)


def held_out_logit(x: Experiment) -> float:
    """D's logit that three quarters of validation's demonstrations reach: it has seen none of them.

    Above 0, "rather an expert's than a copy", is too little: an error that no copy shows is, too.
    """
    texts = [[data.response_text(example.trace, example.answer)] for example in x.validation]
    demonstrations = [{"texts": one} for one in texts]
    logits = judge(x, "held_out", "reward_copies", x.validation, demonstrations)
    return float(torch.tensor(logits).quantile(0.25))


def imitate_best(name: str, x: Experiment) -> dict:
    """Imitate the demonstrations, and the samples that are sure to be good."""
    surest = winners(name, x)
    if name == "irl_best":
        enough = held_out_logit(x)
        kept = sum(score >= enough for score, _, _ in surest)
    elif name == "best_true":
        kept = sum(score > 0 for score, _, _ in surest)  # a right answer's is 1
    else:
        # A log-probability does not say where to stop. The rivals take as many, their surest.
        kept = x.result_of("irl_best")["winners"]
    rows = [as_row(example) for example in x.experts]
    for _, example, text in surest[:kept]:
        written = re.fullmatch(r"<think>\n(.*)\n</think>\n<answer>(.*)</answer>", text, re.DOTALL)
        if written:
            rows.append(as_row(replace(example, trace=written[1], answer=written[2])))
    folder = x.folder / name
    folder.mkdir(exist_ok=True)
    test = [as_row(example) for example in x.validation[:8]]  # train.py wants one
    for file, some in (("train", rows), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        checkpoint.write_text(folder / f"{file}.jsonl", lines)
    flags = f"--data {shlex.quote(str(folder))} --demonstrations {len(rows)}"
    chosen = x.result_of("sft")["chosen"]
    tuning = tuned(x, name, ((chosen["updates"], chosen["rate"]),), flags)
    best = tuning["chosen"]
    arms = {name: on_test(x, best["run"], best["share"], best["temperature"])}
    return tuning | {"winners": kept, "arms": arms}


def as_row(example: data.Example) -> dict:
    """A demonstration, for a file."""
    return {"question": example.question, "trace": example.trace, "answer": example.answer}


def first_wrong_tokens(x: Experiment) -> dict:
    """{"places": rerank.place_results}: how often the reward of copies and the log-probabilities
    point at the token with which a wrong candidate of rerank_sft goes wrong."""
    texts = [text for one in x.result_of("rerank_sft")["sft"] for text in one["texts"]]
    candidates = from_texts(x.tokenizer, x.test, texts, CANDIDATES)
    discriminator, _, _ = rerank.load_run(x.run("copies"), x.base.device)
    judges = {"sft_logprob": loading.load_causal(x.sft(), x.base.device)}
    readings = signals(candidates.batch, discriminator, x.base, judges)
    truth = natural_errors(candidates, x.tokenizer, data.end_tokens(x.tokenizer, x.base))
    questions = torch.arange(len(texts)) // CANDIDATES
    # A head's f has no unit, so that no threshold of a log-probability is for it.
    places = rerank.place_results(candidates.batch, truth, questions, readings, likelihood=False)
    return {"places": places}


def kinds_of_errors(x: Experiment) -> dict:
    """{"errors": {policy: {"right", "wrong, at the target", "wrong, elsewhere": [share, low,
    high]}}}: of 8 samples to each validation question, at T = 1, by every policy that is there.

    A wrong sample that arrives at the target has nearly always a false last line.
    """
    shares: dict = {}
    for name in ("sft", *POLICIES):
        stage = x.folder / f"{name}.json"
        if not stage.exists():
            print(f"without {name}: not trained", flush=True)
            continue
        run = json.loads(stage.read_text()).get("chosen", {"run": name})["run"]
        model = loading.load_causal(str(x.run(run) / "policy"), x.base.device)
        samples = sample(x, f"errors-{name}", model, x.validation, CANDIDATES, 1.0)
        right = []  # of each question's samples, which are
        at_target = []  # and which end there
        for example, one in zip(x.validation, samples):
            _, target = countdown.problem_of(example.question)
            end = f"={target}\n</think>\n<answer>{target}</answer>"
            right.append([data.is_correct(example, text) for text in one["texts"]])
            at_target.append([text.endswith(end) for text in one["texts"]])
        is_right, arrives = torch.tensor(right), torch.tensor(at_target)
        kinds = {
            "right": is_right,
            "wrong, at the target": ~is_right & arrives,
            "wrong, elsewhere": ~is_right & ~arrives,
        }
        shares[name] = {
            kind: rerank.bootstrap(is_so.float().mean(1)) for kind, is_so in kinds.items()
        }
    return {"errors": shares}


def first_wrong_steps(x: Experiment) -> dict:
    """F1 on ProcessBench of each reward that has been trained, and of the log-probabilities."""
    x.result_of("irl")
    files = ["--dev", x.args.dev, "--test", x.args.test, "--experts", str(x.args.validation)]
    files += ["--scores", str(x.folder / "parts" / "steps"), "--untrained", x.args.model]
    files += shlex.split(x.args.steps)
    by_reward = {}
    for reward in trained_rewards(x, REWARDS[x.args.task]):
        by_signal = steps.main(["--run", str(x.run_of(reward)), *files])
        by_signal["sft_logprob"] = by_signal.pop("logprob")  # the base of these runs is SFT
        by_signal["logprob"] = by_signal.pop("untrained_logprob")
        by_reward[reward] = by_signal
    return {"processbench": by_reward}


def commit() -> str | None:
    """Which commit this code is, with "-dirty" if it was changed; None outside a git repository."""
    git = ["git", "-C", str(store.ROOT), "describe", "--always", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


STAGES: dict[str, dict[str, Callable]] = {
    "countdown": {
        "sft": train_sft,
        "copies": partial(reward_from_sft, "copies"),
        "from_base": partial(reward_from_sft, "from_base"),
        "from_base_likelihood": partial(reward_from_sft, "from_base_likelihood"),
        **{run: partial(policy_from_sft, run) for run in (*REWARD_OF, *GRPO)},
        **{arm: partial(imitate_best, arm) for arm in (*CHOOSERS, "best_true", "random")},
        "sft_with_base": sft_with_base,
        "kinds": kinds_of_copies,
        "rerank_base": partial(candidates, "base"),
        "rerank_sft": partial(candidates, "sft"),
        "rerank_sft_first": partial(candidates, "sft_first"),
        "rerank_validation": partial(candidates, "sft_validation"),
        "judges": partial(candidates, "errors-sft"),
        "places": first_wrong_tokens,
        "errors": kinds_of_errors,
    },
    "gsm8k": {
        "sft": train_judge,
        "irl": partial(reward_from_sft, "irl"),
        "sparse": partial(reward_from_sft, "sparse"),
        "rerank_base": partial(candidates, "base"),
        "rerank_sft": partial(candidates, "sft"),
        "steps": first_wrong_steps,
    },
}


ARGUMENTS = {
    "--task": dict(choices=tuple(STAGES), default="countdown"),
    "--model": dict(help="a pretrained model's folder or hub name"),
    "--demonstrations": dict(type=int, default=256),
    "--seed": dict(type=int, default=0),
    "--questions": dict(type=int, default=300, help="test questions"),
    "--validation": dict(type=int, default=100, help="questions for choices"),
    "--sft": dict(
        type=float,
        nargs=4,
        metavar=("UPDATES", "RATE", "SHARE", "TEMPERATURE"),
        help="fair SFT's settings, as another seed has chosen them: no others but the first cell's",
    ),
    "--cells": dict(
        help="countdown: SFT's updates and rates, instead of those here: '60 1e-3, 120 2e-3'. The "
        "reward starts from the first"
    ),
    "--looks": dict(
        help="countdown: fair SFT's shares of the base and temperatures, instead of those here: "
        "'0 0.2, 0.25 0.2'"
    ),
    "--extra": dict(type=int, default=3000, help="questions that irl_best answers"),
    "--dev": dict(metavar="FILE", help="labelled solutions, for a threshold"),
    "--test": dict(metavar="FILE", help="ProcessBench's file, for F1"),
    "--steps": dict(default="", help="experiments/steps.py's other flags"),
    "--only": dict(nargs="+", choices=sorted({name for some in STAGES.values() for name in some})),
    "--flags": dict(default="", help="train.py's, instead of those here"),
    "--name": dict(help="of the run (default: <model>-<demonstrations>-<seed>)"),
    "--tables": dict(action="store_true", help="run nothing: tables only"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    for flag, options in ARGUMENTS.items():
        parser.add_argument(flag, **options)
    args = parser.parse(arguments)
    if args.tables:
        return real_tables.write()
    if not args.model:
        raise UserError("--model is missing: a folder with a pretrained model, or a hub name")
    if (args.sft or args.cells or args.looks) and args.task == "gsm8k":
        raise UserError(
            "--sft, --cells and --looks are for countdown: GSM8K's SFT is not tuned. Leave them out"
        )
    if args.sft and (args.cells or args.looks):
        raise UserError("--sft fixes what --cells and --looks would try: leave one of them out")
    model = Path(args.model).name
    args.name = args.name or f"{model}-{args.demonstrations}-{args.seed}"
    loading.quiet()
    x = Experiment(args)
    x.folder.mkdir(parents=True, exist_ok=True)
    code = commit()  # before the first stage: a repository may move on while hours of them run
    for stage, function in STAGES[args.task].items():
        path = x.folder / f"{stage}.json"
        if path.exists() or (args.only and stage not in args.only):
            continue
        begun = time.monotonic()
        result = function(x)
        result["seconds"] = round(time.monotonic() - begun, 1)
        result["commit"] = code
        result["command"] = shlex.join(
            ["python", "-m", "experiments.real", *(arguments or sys.argv[1:])]
        )
        checkpoint.write_text(path, json.dumps(result))
        print(f"{stage}: {result['seconds'] / 60:.1f} min", flush=True)
    stages = {path.stem: json.loads(path.read_text()) for path in x.folder.glob("*.json")}
    about = {"model": model, "demonstrations": args.demonstrations, "seed": args.seed}
    real_tables.keep(args.task, args.name, about | {"stages": stages})
    real_tables.write()


if __name__ == "__main__":
    # As on CUDA. Where a CPU multiplies bf16 by itself, training takes two thirds of the time.
    memory.HALF_PRECISION.add("cpu")
    sys.exit(exit_status(main))
