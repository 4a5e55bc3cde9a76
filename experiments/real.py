"""A pretrained model on GSM8K: every baseline beside the reward, from one command that may be cut off at any moment.

    python -m experiments.real --model FOLDER --data FOLDER --processbench FILE --mr-gsm8k FILE
    python -m experiments.real --model FOLDER ... --quick      the whole path with tiny counts; its numbers mean nothing
    python -m experiments.real --tables                        results/real.json and real.md from results/real-samples.json.xz

Stages, in an order of worth. Each writes runs/real-<model>/stages/<stage>.json, texts and scores
included, and is left out when that file is there; what tables need of them goes to
results/real-samples.json.xz. What is sampled or scored is kept question by question, and training
in checkpoints, in runs/real-<model>/, where the trained models are too:
`rerank.py --run runs/real-<model>` and `experiments.steps` take it.

    zero_shot, few_shot   the model as it is: greedy and at temperature 1, asked for tags, or shown four worked examples
    sft, sft_samples      adapters on the demonstrations, and what they write
    sft_fair              SFT averaged with its start, at a temperature; both chosen on validation
    negatives             answers of SFT and of the few-shot model to the demonstrations' questions, for all rewards
    reward                f = log p_phi with AIRL's logit;  reward_dense, reward_sparse: the paper's head with GAIL's;
                          reward_broken: the sparse head, learnt from broken copies alone
    judge_base, judge_..  what the base, SFT, fair SFT and each reward say of all samples, of experts' solutions and the same
                          with one thing broken, and of each step of solutions
    irl, grpo             policies that go on from SFT, as far as --minutes go; GRPO takes as many steps

experiments/real_tables.py makes of them: best of n by every judge, the first wrong step on ProcessBench.

Few-shot samples are in GSM8K's own form, `#### 18` at the end. Judges know the tags of the demonstrations, so samples are put
into them where they have none, and tokenised anew (`in_tags`); their `logprob` is that of the tokens that were sampled. The
answer check is asked by evaluation, by the choice of sft_fair's temperature, which helps a baseline, and by GRPO; no reward
sees it.
"""

import copy
import json
import shutil
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from os import environ
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import baselines
import data
import irl
import policy
import rerank
import reward
import train
from engine import checkpoint, loading, lora
from engine.candidates import collect, from_texts, reward_ends
from engine.chat import at_date, token_ids
from engine.errors import Parser, UserError, exit_status, nearest
from engine.runs import MAY_CHANGE
from engine.settings import parse_settings
from experiments import real_tables, steps
from experiments.real_tables import RULES, SHOTS, SOURCES, own_scores
from negatives import perturb
from show.report import tidy
from tasks.answers import extract_answer

try:
    import resource
except ImportError:  # Windows
    resource = None

SHARES, TEMPERATURES = (0.0, 0.25, 0.5, 0.75), (1.0, 0.5, 0.2)  # as for words (experiments/choose.py)
KINDS = {
    "reward": dict(reward="likelihood", logit="airl", granularity="dense"),
    "reward_dense": dict(reward="head", logit="gail", granularity="dense"),
    "reward_sparse": dict(reward="head", logit="gail", granularity="sparse"),
    # the control: all negatives are broken copies, in the experts' own style, so that style tells nothing
    "reward_broken": dict(reward="head", logit="gail", granularity="sparse", rollouts_per_expert=0, perturbed=4),
    "reward_broken_dense": dict(reward="head", logit="gail", granularity="dense", rollouts_per_expert=0, perturbed=4),
}
# Batches of 8 questions; two passes over 128 demonstrations for a reward, three for SFT. Rates are train.py's.
FLAGS = ("--lora-rank 16 --questions 8 --group 4 --rollouts-per-expert 2 --perturbed 1 --max-new-tokens 320 "
         "--micro-batch 4 --extra-questions 4")  # fmt: skip
QUICK = dict(demonstrations=4, questions=3, samples=2, validation=2, solutions=3, steps=1)
QUICK_FLAGS = "--max-new-tokens 8 --questions 2 --group 2 --rollouts-per-expert 2 --lora-rank 2"


@dataclass
class Job:
    """What was asked for, and what several stages need: loaded when the first of them asks."""

    args: object
    name: str
    seconds: float = 0.0  # of earlier, cut-off attempts at this stage

    @cached_property
    def run(self) -> train.Run:
        """Data, base and tokenizer. --explain: a run that loads everything and writes nothing."""
        a, saved = self.args, self.folder / "settings.json"
        flags = ["--model", a.model, "--data", a.data, "--demonstrations", str(a.demonstrations), "--seed", str(a.seed)]
        flags += ["--eval-questions", str(a.questions), "--start", "base"]
        before = json.loads(saved.read_text()) if saved.exists() else {}
        settings = parse_settings([*flags, *FLAGS.split(), *(QUICK_FLAGS.split() if a.quick else []), *a.flags.split()])
        chosen = ("fair_average", "fair_temperature")  # by the stage sft_fair
        now = asdict(settings) | {"start": "sft"} | {name: before[name] for name in chosen if before}
        other = [name for name in now if before and name not in MAY_CHANGE and now[name] != before.get(name)]
        if other:
            raise UserError(f"{self.folder} was begun with another {', '.join(other)}: give the same, or another --name")
        run = train.Run(settings, self.folder.name, a.device, before.get("date"))  # prompts may name the day
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keep_settings(run, **{name: now[name] for name in chosen})
        return run

    def keep_settings(self, run: train.Run, **changes) -> None:
        """settings.json, with which rerank.py and experiments.steps take the folder for a run."""
        run.s = replace(run.s, **changes)
        kept = asdict(replace(run.s, start="sft")) | {"date": run.date}
        checkpoint.write_text(self.folder / "settings.json", json.dumps(kept, indent=1))

    @property
    def folder(self) -> Path:
        return Path("runs") / f"real-{self.name}{'-quick' * self.args.quick}"

    @property
    def results(self) -> Path:
        return self.folder / "stages"

    def found(self, stage: str) -> dict:
        """What a stage before this one has found."""
        path = self.results / f"{stage}.json"
        if not path.exists():
            raise UserError(f"the stage {stage} must come first: {path} is missing")
        return json.loads(path.read_text())

    @cached_property
    def solutions(self) -> dict[str, list[steps.Solution]]:
        """{"dev", "test"} of --mr-gsm8k and --processbench: nothing without both."""
        a = self.args
        files = {"dev": a.mr_gsm8k, "test": a.processbench} if a.mr_gsm8k and a.processbench else {}
        read = {part: steps.read_solutions(path, a.solutions) for part, path in files.items()}
        return {part: steps.fitting(self.run.tokenizer, solutions, self.run.context) for part, solutions in read.items()}

    def few_shot_ids(self, question: str) -> list[int]:
        """The prompt that shows worked examples first. They are training examples beside the demonstrations."""
        return few_shot_ids(self.run.tokenizer, self.run.extra[:SHOTS], question)

    def run_of(self, kind: str) -> train.Run:
        """The run with the settings of that kind of reward; its load_discriminator() puts a new adapter on the base."""
        run = copy.copy(self.run)
        run.s = replace(run.s, **KINDS[kind])
        return run

    def trained_discriminator(self, kind: str) -> reward.Discriminator:
        """What `learn_reward` has trained."""
        found = self.run_of(kind).load_discriminator()
        self.recall(found.reward_model.model, kind)
        return found

    def keep(self, model, name: str) -> None:
        """What was trained alone: with --lora-rank an adapter, a hundredth of the merged model that a run's folder has."""
        self.adapters.mkdir(parents=True, exist_ok=True)
        trained = {key: p.detach().cpu().contiguous() for key, p in model.named_parameters() if p.requires_grad}
        save_file(trained, self.adapters / f"{name}.safetensors")

    def recall(self, model, name: str):
        """`model`, as the run would begin to train it, with what `keep` has kept: bf16 weights under a float32 adapter, which
        a merged model in bf16 would have rounded away."""
        kept, parameters = load_file(self.adapters / f"{name}.safetensors"), dict(model.named_parameters())
        for key, value in kept.items():
            parameters[key].data.copy_(value)
        return model

    def load(self, name: str):
        """The policy that was trained under that name."""
        return self.recall(self.run.to_train(), name)

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"


# ---------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------


def few_shot_ids(tokenizer, shots: list[data.Example], question: str) -> list[int]:
    """Worked examples in GSM8K's own form, then the question: in the chat template's turns, or without one as text."""
    solved = [f"{shot.trace}\n#### {shot.answer}" for shot in shots]
    if not getattr(tokenizer, "chat_template", None):
        parts = [f"Question: {shot.question}\nAnswer: {text}\n\n" for shot, text in zip(shots, solved)]
        return token_ids(tokenizer, (tokenizer.bos_token or "") + "".join(parts) + f"Question: {question}\nAnswer:")
    turns = []
    for shot, text in zip(shots, solved):
        turns += [{"role": "user", "content": shot.question}, {"role": "assistant", "content": text}]
    template = at_date(tokenizer.get_chat_template(), tokenizer.date)
    text = tokenizer.apply_chat_template([*turns, {"role": "user", "content": question}], tokenize=False,
                                         chat_template=template, add_generation_prompt=True)  # fmt: skip
    return token_ids(tokenizer, text)


def cut(text: str) -> str:
    """What a model that was shown examples wrote up to its first answer: without a template it invents more questions.

    >>> cut("2+3=5\\n#### 5\\n\\nQuestion: next?")
    '2+3=5\\n#### 5'
    """
    text = text.split("\n\nQuestion:")[0]
    before, mark, after = text.partition("####")
    return before + mark + after.split("\n")[0]


def in_tags(text: str) -> str:
    """A sample as the demonstrations are written, if it is not: the same words, the answer in tags.

    >>> in_tags("2+3=5\\n#### 5"), in_tags("so it is 5.")
    ('<think>\\n2+3=5\\n</think>\\n<answer>5</answer>', '<think>\\nso it is 5.\\n</think>\\n<answer>5</answer>')
    """
    if "<answer>" in text:
        return text
    trace = text.split("####")[0].replace("<think>", "").replace("</think>", "").strip()
    return data.response_text(trace, extract_answer(text) or "")


# ---------------------------------------------------------------------------------------------------------------
# Sampling, scoring and training, each of which goes on where it was cut off
# ---------------------------------------------------------------------------------------------------------------


def in_parts(job: Job, name: str, items: list, size: int, function: Callable) -> list:
    """function(some items, their place) -> a record for each; the records of all. Kept as they come, a line each, in
    runs/real-<model>/parts: a part that was cut off is done again, and the ones before are not."""
    path = job.folder / "parts" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_text().split("\n")[:-1] if path.exists() else []  # a line without its end was cut off
    whole = whole[: len(items) if len(whole) >= len(items) else len(whole) // size * size]  # whole parts
    checkpoint.write_text(path, "".join(line + "\n" for line in whole))
    job.seconds += sum(json.loads(line)["seconds"] for line in whole)
    with tqdm(total=len(items), initial=len(whole), desc=name, dynamic_ncols=True) as bar:
        for start in range(len(whole), len(items), size):
            begun, chosen = time.perf_counter(), items[start : start + size]
            found = function(chosen, start)
            each = (time.perf_counter() - begun) / len(chosen)
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"found": one, "seconds": each}) + "\n" for one in found))
            bar.update(len(chosen))
    return [json.loads(line)["found"] for line in path.read_text().split("\n")[:-1]]


def sample(job: Job, name: str, model, examples, prompt: Callable, n: int, temperature: float) -> list[dict]:
    """n samples for each example: {"texts", "ids", "finished", and for each rule of RULES the trace's log-probability}.

    The random numbers of a part are its own, so that a run that was cut off draws what one that was not would have drawn.
    """
    tokenizer, s = job.run.tokenizer, job.run.s

    def some(chosen, start):
        generator = torch.Generator(model.device).manual_seed(s.seed * 1_000_003 + start)
        prompts = [prompt(example.question) for example in chosen]
        if max(map(len, prompts)) + s.max_new_tokens > job.run.context:
            raise UserError(f"a prompt of {max(map(len, prompts))} tokens and {s.max_new_tokens} new ones are more than the "
                            f"model's context of {job.run.context}")  # fmt: skip
        written = collect(model, tokenizer, chosen, n, s.max_new_tokens, temperature, generator, s.sample_rows, prompts)
        scores = trace_scores(written.logprobs, written.batch.response_mask, n)
        ids = [written.batch.response(row) for row in range(len(written.batch))]
        found = []
        for i in range(len(chosen)):
            rows = slice(i * n, i * n + n)
            texts = [cut(text) for text in written.texts[rows]]
            found.append({"texts": texts, "ids": ids[rows], "finished": written.finished[rows].tolist()} | scores[i])
        return found

    rows = 256 if model.device.type == "cuda" else 48  # more read the weights no less often per token on a CPU
    return in_parts(job, name, examples, max(1, rows // n), some)


def trace_scores(values: torch.Tensor, ends: torch.Tensor, n: int) -> list[dict[str, list[float]]]:
    """{rule: [n scores]} for each question, from scores of tokens and where they are read, [Q * n, T] both."""
    steps.check_finite(values)
    scores = {rule: rerank.trace_scores(values, ends, rule).view(-1, n) for rule in RULES}
    return [{rule: [round(v, 4) for v in scores[rule][q].tolist()] for rule in RULES} for q in range(len(values) // n)]


def accuracy(examples, samples: list[dict]) -> list[float]:
    """[mean, low, high] over questions."""
    right = [[data.is_correct(e, text) for text in one["texts"]] for e, one in zip(examples, samples)]
    return rerank.bootstrap(torch.tensor(right).float().mean(1))


def evaluate(job: Job, name: str, model, prompt: Callable | None = None, n: int | None = None) -> dict:
    """{"t1", "greedy": [mean, low, high], "samples", "greedy_samples", "finished"} on the test questions."""
    test, prompt = job.run.test, prompt or partial(data.prompt_ids, job.run.tokenizer)
    sampled = sample(job, f"{name}_t1", model, test, prompt, n or job.args.samples, 1.0)
    greedy = sample(job, f"{name}_greedy", model, test, prompt, 1, 0.0)
    found = {"t1": accuracy(test, sampled), "greedy": accuracy(test, greedy)}
    found["finished"] = float(torch.tensor([one["finished"] for one in sampled]).float().mean())
    without = lambda records: [{k: v for k, v in one.items() if k != "ids"} for one in records]
    return found | {"samples": without(sampled), "greedy_samples": without(greedy)}


def says(found: dict) -> str:
    """An evaluation in a few words."""
    return f"T=1 {found['t1'][0]:.3f}, greedy {found['greedy'][0]:.3f}, {found['finished']:.0%} end by themselves"


def train_steps(job: Job, name: str, trainer, count: int, minutes: float = 0.0) -> list[dict]:
    """Call trainer.step() `count` times, or as often as `minutes` allow by its first step; returns the metrics. A checkpoint
    is written when one has become worth its time, and gone on from."""
    folder = job.folder / "checkpoints" / name
    saved = checkpoint.load(folder)
    log = {"metrics": [], "seconds": 0.0, "count": count}

    def plan(steps: int) -> None:  # the rates fall until the last step: it must be known
        log["count"] = bar.total = steps
        trainer.settings = replace(trainer.settings, max_steps=steps, grpo_steps=steps)

    if saved:
        checkpoint.load_trainer(trainer, saved)
        log |= saved["log"]
        job.seconds += log["seconds"]
    kept = time.perf_counter()
    with tqdm(total=log["count"], initial=len(log["metrics"]), desc=name, dynamic_ncols=True) as bar:
        if minutes:
            plan(log["count"])
        while len(log["metrics"]) < log["count"]:
            begun = time.perf_counter()
            log["metrics"].append(trainer.step())
            log["seconds"] += time.perf_counter() - begun
            if minutes and len(log["metrics"]) == 1:
                plan(max(1, min(count, int(60 * minutes / log["seconds"]))))
            bar.update()
            if time.perf_counter() - kept > 600:
                checkpoint.save(folder, checkpoint.trainer_state(trainer) | {"log": log})
                kept = time.perf_counter()
    return log["metrics"]


# ---------------------------------------------------------------------------------------------------------------
# Stages: each returns what it found and a line that says it
# ---------------------------------------------------------------------------------------------------------------


def zero_shot(job: Job) -> tuple[dict, str]:
    """Asked for the demonstrations' tags. A quarter of the samples will do: nothing is reranked here."""
    found = evaluate(job, "zero_shot", job.run.base, n=max(1, job.args.samples // 4))
    return found, says(found)


def few_shot(job: Job) -> tuple[dict, str]:
    """Shown worked examples: what the rest is compared with. Also as a file that rerank.py --candidates takes."""
    found = evaluate(job, "few_shot", job.run.base, job.few_shot_ids)
    lines = [{"question": e.question, "answer": e.answer, "candidates": [in_tags(text) for text in one["texts"]]}
             for e, one in zip(job.run.test, found["samples"])]  # fmt: skip
    checkpoint.write_text(job.folder / "few_shot.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return found, says(found)


def sft(job: Job) -> tuple[dict, str]:
    """Adapters on the demonstrations."""
    run, passes = job.run, 1 if job.args.quick else 3
    count = max(1, passes * len(run.experts) // run.s.sft_batch)
    trainer = baselines.SFT(replace(run.s, sft_steps=count), run.tokenizer, run.to_train(), run.experts)
    metrics = train_steps(job, "sft", trainer, count)
    job.keep(trainer.policy_model, "sft")
    run.save_model(trainer.policy_model, "sft")
    losses = [one["policy"]["loss"] for one in metrics]
    return {"losses": losses}, f"{count} updates, loss {losses[0]:.3f} to {losses[-1]:.3f}"


def sft_samples(job: Job) -> tuple[dict, str]:
    """What SFT's policy writes, as many samples as the few-shot model."""
    found = evaluate(job, "sft", job.load("sft"))
    return found, says(found)


def sft_fair(job: Job) -> tuple[dict, str]:
    """Shares of the start by the likelihood of held-out demonstrations, then the temperature by accuracy on the same
    validation questions."""
    run, a = job.run, job.args
    held, start = run.validation[: a.validation], lora.start_of(run.to_train())
    batch = data.demonstration_batch(data.tokenize(run.tokenizer, held), run.device)

    def averaged(share: float):
        model = job.load("sft")
        lora.average(model, start, share)
        return model

    def likelihood(share: float) -> float:
        values = policy.in_chunks(partial(policy.token_logprobs, averaged(share)), batch, 8)
        return float(values.sum() / batch.response_mask.sum())

    by_share = {share: likelihood(share) for share in SHARES}
    share = max(by_share, key=by_share.get)
    model = averaged(share)
    prompt, by_temperature = partial(data.prompt_ids, run.tokenizer), {}
    for t in TEMPERATURES:
        by_temperature[t] = accuracy(held, sample(job, f"sft_fair_{share}_{t}", model, held, prompt, 1, t))[0]
    t = max(by_temperature, key=by_temperature.get)
    job.keep(model, "sft_fair")  # as a judge it is not divided (rerank.load_judges says why)
    policy.divide_logits(model, t)
    run.save_model(model, "sft_fair")
    job.keep_settings(run, fair_average=share, fair_temperature=t)
    found = {"share": share, "temperature": t, "by_share": by_share, "by_temperature": by_temperature}
    found |= evaluate(job, "sft_fair", model, n=max(1, a.samples // 4))
    return found, f"share {share} of the start, temperature {t}: {says(found)}"


def negatives(job: Job) -> tuple[dict, str]:
    """Two answers of SFT's policy to each demonstration's question, and two of the few-shot model: sampling is dear, so all
    rewards learn from the same. They are texts; whether they are right is not asked."""
    run = job.run
    own = sample(job, "negatives_sft", job.load("sft"), run.experts, partial(data.prompt_ids, run.tokenizer), 2, 1.0)
    shown = sample(job, "negatives_few_shot", run.base, run.experts, job.few_shot_ids, 2, 1.0)
    texts = [{"sft": a["ids"], "few_shot": [in_tags(text) for text in b["texts"]]} for a, b in zip(own, shown)]
    return {"negatives": texts}, f"{4 * len(texts)} samples for {len(texts)} demonstrations"


@dataclass
class RewardTrainer(irl.IRL):
    """The discriminator of irl.IRL on negatives that are there already; no policy moves."""

    pool: list[dict] = field(default_factory=list)  # of each expert: who wrote it -> responses

    # what a checkpoint keeps
    changes = ("discriminator.reward_model", "reward_optimizer", "rng", "steps_done")

    def step(self) -> dict:
        """One update: some experts, each with a response of every writer and broken copies."""
        s = self.settings
        policy.set_constant_rate(self.reward_optimizer, s.warm_up_lr)
        with data.no_verifier():
            rows = data.draw(list(range(len(self.experts))), s.questions, self.rng)
            samples = []
            for row in rows:
                samples.append([self.rng.choice(texts) for texts in self.pool[row].values()])
            comparison = reward.compare(
                self.tokenizer,
                [self.experts[row] for row in rows],
                samples,
                s.perturbed,
                self.rng,
                self.reward_model.model.device,
                s.negatives,
            )
            metrics = self.discriminator_step(comparison)
        self.steps_done += 1
        return metrics


def learn_reward(kind: str, job: Job) -> tuple[dict, str]:
    """Two passes over the demonstrations, from SFT's weights, where a likelihood is pi itself: D = 1/2 everywhere. From the
    base's, updates are spent on making up for SFT, whose pi is the better one on demonstrations. (SFT's policy stands for pi,
    though half of the negatives are another's: as with replay, old writers are compared with the present one.)"""
    run, ids = job.run_of(kind), partial(data.response_ids, job.run.tokenizer)
    texts = job.found("negatives")["negatives"]
    pool = [{"sft": one["sft"], "few_shot": [ids(text) for text in one["few_shot"]]} for one in texts]
    pool = pool if run.s.rollouts_per_expert else [{}] * len(pool)
    discriminator = run.load_discriminator()
    job.recall(discriminator.reward_model.model, "sft")
    pi = job.load("sft")  # whose log pi AIRL's logit subtracts
    trainer = RewardTrainer(run.s, run.tokenizer, pi, discriminator, run.experts, pool=pool)
    count = max(1, (1 if job.args.quick else 2) * len(run.experts) // run.s.questions)
    metrics = train_steps(job, kind, trainer, count)
    job.keep(discriminator.reward_model.model, kind)
    run.save_model(discriminator.reward_model.model, kind)
    last = metrics[-4:]
    means = {name: sum(one[name] for one in last) / len(last) for name in ("loss", "accuracy", "d_expert", "d_negative")}
    return {"metrics": metrics}, f"{count} updates, D right on {means['accuracy']:.3f} of the last tokens"


def load_judge(job: Job, name: str) -> tuple[Callable, Callable]:
    """(function(batch) -> scores of tokens, function(batch) -> where a trace's are read): [B, T] both."""
    if name in KINDS:
        discriminator = job.trained_discriminator(name)
        return discriminator.reward_model.scores, lambda batch: reward_ends(batch, discriminator)
    model = job.run.load() if name == "base" else job.load(name)
    return partial(policy.token_logprobs, model), lambda batch: batch.response_mask


def judge(name: str, job: Job) -> tuple[dict, str]:
    """What one model says: {"few_shot", "sft": of every sample that is there {rule: [n]} per question, "pairs": of an expert's
    solution and of the same with one thing broken, "dev", "test": of every step}. Of its own samples it has said it when it
    sampled."""
    if name == "sft_fair" and job.found("sft_fair")["share"] == 0:  # SFT itself, at another temperature: as a judge the same
        found = {part: scores for part, scores in job.found("judge_sft").items() if isinstance(scores, list)}
        return found, "as judge_sft"
    run, loaded = job.run, []

    def model():
        loaded[:] = loaded or load_judge(job, name)  # not at all if everything is there
        return loaded

    def of_texts(chosen, start):
        (function, ends), n = model(), len(chosen[0])
        texts = [text for some in chosen for text in some]
        batch = from_texts(run.tokenizer, run.test[start : start + len(chosen)], texts, n).batch
        values = policy.in_chunks(lambda part: function(part.to(run.device)).cpu(), batch, tokens=2048)  # alike in length
        return trace_scores(values, ends(batch), n)

    def of_steps(chosen, start):
        return steps.score(run.tokenizer, chosen, model()[0], run.device)

    texts, found = {}, {}
    for source, stage in SOURCES.items() if name != "base" else ():
        if source == name:
            found[source] = own_scores(job.found(stage)["samples"])
        elif (job.results / f"{stage}.json").exists():
            texts[source] = [[in_tags(text) for text in one["texts"]] for one in job.found(stage)["samples"]]
    for source, some in (texts | {"pairs": expert_pairs(run.test)}).items():
        found[source] = in_parts(job, f"{source}_{name}", some, max(1, 64 // len(some[0])), of_texts)
    for part, solutions in job.solutions.items():
        found[part] = in_parts(job, f"steps_{part}_{name}", solutions, 16, of_steps)
    return found, ", ".join(f"{len(scores)} of {part}" for part, scores in found.items())


def expert_pairs(examples: list[data.Example], seed: int = 0) -> list[list[str]]:
    """Of each example [the expert's solution, the same with one thing broken]; twice the same where nothing can be broken."""
    rng, whole = random.Random(f"pairs {seed}"), lambda e: data.response_text(e.trace, e.answer)
    return [[whole(example), whole(perturb(example, rng) or example)] for example in examples]


def irl_policy(job: Job) -> tuple[dict, str]:
    """IRL's loop from SFT, on the reward that was learnt, which goes on learning beside it unless --reward-lr is 0."""
    run, a = job.run, job.args
    discriminator = job.trained_discriminator("reward")
    settings = replace(run.s, start="sft", max_steps=a.steps, grpo_steps=a.steps)
    loop = irl.IRL(settings, run.tokenizer, job.load("sft"), discriminator, run.experts)
    metrics = train_steps(job, "irl", loop, a.steps, a.minutes)
    run.save_model(loop.policy_model, "policy")
    found = {"steps": len(metrics), "metrics": metrics} | evaluate(job, "irl", loop.policy_model, n=max(1, a.samples // 4))
    return found, f"{len(metrics)} steps: {says(found)}"


def grpo(job: Job) -> tuple[dict, str]:
    """True answers, from the same start, on the same questions, for as many samples as IRL took."""
    run, count = job.run, job.found("irl")["steps"]
    settings = replace(run.s, grpo_steps=count, max_steps=count)
    trainer = baselines.GRPO(settings, run.tokenizer, job.load("sft"), run.experts)
    metrics = train_steps(job, "grpo", trainer, count)
    run.save_model(trainer.policy_model, "grpo")
    found = {"steps": count, "metrics": metrics}
    found |= evaluate(job, "grpo", trainer.policy_model, n=max(1, job.args.samples // 4))
    return found, f"{count} steps: {says(found)}"


STAGES: dict[str, Callable] = {
    "zero_shot": zero_shot, "few_shot": few_shot, "sft": sft, "sft_samples": sft_samples, "sft_fair": sft_fair,
    "negatives": negatives, "reward": partial(learn_reward, "reward"),
    **{f"judge_{name}": partial(judge, name) for name in ("base", "sft", "sft_fair", "reward")}, "irl": irl_policy, "grpo": grpo,
    **{name: partial(stage, kind) for kind in KINDS if kind != "reward"
       for name, stage in ((kind, learn_reward), (f"judge_{kind}", judge))},
}  # fmt: skip


def memory_gb(device: torch.device) -> float:
    """The most memory so far: of the GPU, which `run_stage` sets back, or of this process since it began; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def run_stage(job: Job, stage: str) -> None:
    """Do it, keep what it found with its time and memory, and say so in one line."""
    if job.run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    job.seconds, begun = 0.0, time.perf_counter()
    found, line = STAGES[stage](job)
    found["seconds"] = round(job.seconds + time.perf_counter() - begun, 1)
    found["memory_gb"] = round(memory_gb(job.run.device), 2)
    job.results.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(job.results / f"{stage}.json", json.dumps(found) + "\n")
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    print(f"{stage}: {line}  ({found['seconds'] / 60:.1f} min, {found['memory_gb']:.1f} GB)", flush=True)


def device_name(device: torch.device) -> str:
    """What the numbers are from."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def parser_of() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="a pretrained model's folder or hub name")
    parser.add_argument("--name", help="what it is called in results (default: the folder's name)")
    parser.add_argument("--data", default="gsm8k", help="gsm8k, from the hub, or a folder with train.jsonl and test.jsonl")
    parser.add_argument("--demonstrations", type=int, default=128)
    parser.add_argument("--questions", type=int, default=150, help="test questions")
    parser.add_argument("--samples", type=int, default=8, help="candidates per test question")
    parser.add_argument("--validation", type=int, default=60, help="questions that fair SFT is chosen on (at most 100)")
    parser.add_argument("--processbench", metavar="FILE", help="solutions with a human label, for localise")
    parser.add_argument("--mr-gsm8k", metavar="FILE", help="others, on which thresholds are chosen")
    parser.add_argument("--solutions", type=int, help="so many of each, drawn at random (default: all)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of IRL's training")
    parser.add_argument("--steps", type=int, default=60, help="of IRL and GRPO at most")
    parser.add_argument("--only", help="some stages, with commas between: " + ", ".join(STAGES))
    parser.add_argument("--without", default="", help="leave these out")
    parser.add_argument("--flags", default="", help="train.py's, for instance '--sft-lr 5e-5 --micro-batch 2'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny counts, written to results-quick/")
    parser.add_argument("--tables", action="store_true", help="run nothing: tables only")
    return parser


def wanted(args) -> list[str]:
    """The stages that were asked for, in their order."""
    only, without = (names.split(",") if names else [] for names in (args.only, args.without))
    for name in [*only, *without]:
        if name not in STAGES:
            raise UserError(f"no stage '{name}'{nearest(name, STAGES)}: {', '.join(STAGES)}")
    found = [stage for stage in STAGES if (not only or stage in only) and stage not in without]
    if not (args.processbench and args.mr_gsm8k):  # said now, not after hours
        print("no --processbench and --mr-gsm8k: no first wrong step")
    return found


def main(arguments: list[str] | None = None) -> None:
    args = parser_of().parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    whole = [one for before, one in zip(["", *given], given) if "--only" not in (before, one)]  # what makes all stages
    command = "python -m experiments.real " + shlex.join(map(tidy, whole))  # for all to read: without this machine's folders
    if args.quick:
        environ.setdefault("IRL_RESULTS", "results-quick")
        vars(args).update(QUICK)
    if args.tables:
        return real_tables.write()
    if not args.model:
        raise UserError("--model is missing: a folder with a pretrained model, or a hub name")
    for name in ("demonstrations", "questions", "samples", "validation", "steps", "solutions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    loading.quiet()
    job = Job(args, args.name or Path(args.model).name)
    for stage in wanted(args):
        if not (job.results / f"{stage}.json").exists():
            job.run  # noqa: B018  loads, once
            with checkpoint.locked(job.folder):
                run_stage(job, stage)
    stages = {stage: job.found(stage) for stage in STAGES if (job.results / f"{stage}.json").exists()}
    about = {"demonstrations": len(job.run.experts), "questions": len(job.run.test),
             "device": device_name(job.run.device), "command": command}  # fmt: skip
    real_tables.keep(job.name, real_tables.kept_of(about, job.run.test, job.solutions, stages))
    real_tables.write()


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
