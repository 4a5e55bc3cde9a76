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

import json
import random
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from tqdm import tqdm

import baselines
import data
import irl
import policy
import rerank
import reward
from engine import checkpoint, loading, lora, memory, parallel
from engine.chat import set_date
from engine.errors import UserError, exit_status
from engine.runs import Log, is_finished, run_folder
from engine.settings import METHODS, Settings, complete, flag, parse_flags, saved_settings
from show import explain, report
from show.tables import show_traces, table

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
        self.device = loading.pick_device(s.device)
        self.dtype = memory.weight_type(s.weights, s.lora_rank, self.device)
        # merged weights stay float32: bf16 would round away what an adapter has learnt
        self.trained_dtype = torch.float32 if s.lora_rank else self.dtype
        torch.manual_seed(s.seed)
        base, self.tokenizer = loading.load_policy(s.model, self.device, self.dtype)
        set_date(self.tokenizer, s.date)
        self.context = loading.context_length(base)
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
        return loading.load_policy(folder, self.device, self.trained_dtype if trained else self.dtype)[0]

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
        loading.check_same_tokenizer(self.tokenizer, s.reward_model)
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
            found = rerank.assess(candidates, discriminator, base, judges, self.tokenizer, s.rule, s.seed)
            traces = show_traces(candidates, discriminator, base, self.tokenizer)
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


def main(arguments: list[str] | None = None) -> int:
    """Run with these flags (by default the command line's); returns the exit status: 0, 2 after one line that says what
    was wrong, 130 or 143 when a signal has stopped the run."""
    command, begun, signals = "python train.py --resume", False, checkpoint.Signals()

    def program():
        nonlocal command, begun
        loading.quiet()
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
            return exit_status(program)
    except checkpoint.Stopped as stopped:
        how = f"; what was done is saved. Go on with: {command}" if begun else " before anything was done"
        print(f"\nstopped by {stopped}{how}", file=sys.stderr)
        return stopped.status


if __name__ == "__main__":
    sys.exit(main())
