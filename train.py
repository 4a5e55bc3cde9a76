"""A run: the base and every method, trained on the same demonstrations, tested on the same
questions.

    python train.py                                      the demo: every method on word problems
    python train.py --model Qwen2.5-0.5B --data gsm8k    IRL on a real model, on a GPU
    python train.py --method sft --demonstrations 1024   one method, other settings (--help)
    python train.py --explain                            one step of IRL in numbers; writes nothing
    python train.py --resume --name demo                 go on with runs/demo, which was stopped

This is what stands around Algorithm 1, which is irl.IRL.step. Here its models are made, its steps
are counted, and what was learnt is tested against the true answers, which no training but GRPO's
sees.

A run leaves in runs/<name>/: settings.json; metrics.jsonl, a line per step; results.json;
traces.json; report.html; and models that `from_pretrained` loads: policy/ (IRL's, or the only
method's), reward/, and sft/, sft_fair/, likelihood/ and grpo/ of what else was trained.

On one machine and one thread the same settings give the same numbers, bit for bit, with or without
interruptions (engine/keeper.py). Another machine takes the sums in another order; a sampled token
that falls otherwise then makes another run. Many GPUs share a run with torchrun --nproc-per-node=N
train.py (engine/parallel.py).
"""

import datetime
import json
import random
import sys
import time
import zlib
from dataclasses import replace

import torch

import baselines
import data
import irl
import policy
import rerank
import reward
from engine import checkpoint, loading, lora, memory, parallel
from engine.chat import set_date
from engine.errors import UserError, exit_status
from engine.keeper import Keeper, Signals, Stopped, in_one_line
from engine.runs import is_finished, run_folder, saved_settings
from engine.settings import METHODS, Settings, complete, parse_flags
from show import explain, report
from show.tables import show_traces, table

VALIDATE_EVERY = 20  # steps between looks at 100 validation questions; 0 for never
EVAL_SAMPLES = 8  # per test question at temperature 1,
EVAL_ANSWERS = 4000  # and fewer where these are more in all
RERANK_QUESTIONS = 250  # half of the test questions are reranked, at most so many
RERANK_CANDIDATES = 16  # per question

# --- evaluation: the answer check is used from here on, and nowhere in irl.py ---------------------


def check_samples(
    model,
    tokenizer,
    examples: list[data.Example],
    n: int,
    temperature: float,
    generator,
    s: Settings,
) -> torch.Tensor:
    """Which of n samples per question have the true answer, [Q, n] of 0 and 1;

    temperature 0 is greedy.
    """

    def check(examples: list[data.Example]) -> torch.Tensor:
        candidates = rerank.collect(
            model, tokenizer, examples, n, s.max_new_tokens, temperature, generator, s.sample_rows
        )
        return candidates.correct

    return parallel.rows(check, examples)  # each process samples for its share of the questions


def evaluate(model, tokenizer, examples: list[data.Example], s: Settings) -> dict:
    """Shares of right answers at temperature 1 (mean over samples) and greedy, and pass@k.

    Each share comes with its 95% bootstrap interval over questions.
    """
    n = max(1, min(EVAL_SAMPLES, EVAL_ANSWERS // len(examples)))
    generator = torch.Generator(model.device).manual_seed(parallel.seed(s.seed))
    sampled = check_samples(model, tokenizer, examples, n, 1.0, generator, s)  # [Q, n]
    greedy = check_samples(model, tokenizer, examples, 1, 0.0, generator, s)  # [Q, 1]
    t1, *t1_interval = rerank.bootstrap(sampled.float().mean(1))
    greedy, *greedy_interval = rerank.bootstrap(greedy.float().mean(1))
    pass_at_k = {}
    for k in (1, 2, 4, 8):
        if k <= n:
            chances = [rerank.pass_at_k(n, int(right), k) for right in sampled.sum(1)]
            pass_at_k[str(k)] = sum(chances) / len(chances)
    return {
        "t1": t1,
        "t1_interval": t1_interval,
        "greedy": greedy,
        "greedy_interval": greedy_interval,
        "pass@k": pass_at_k,
    }


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """One call of train.py: `go` takes its `phases` one after the other.

    A run that goes on leaves out the phases that are finished, and enters the one that was cut off
    where its last checkpoint was written.
    """

    def __init__(
        self, s: Settings, name: str = "demo", device: str = "auto", date: str | None = None
    ):
        """Load the base and the data.

        Nothing is written. date: the day that chat templates are told, or today.
        """
        self.s = s
        self.folder = run_folder(name)
        self.date = date or datetime.date.today().isoformat()
        self.device = loading.pick_device(device)
        self.dtype = memory.weight_type(s.weights, s.lora_rank, self.device)
        torch.manual_seed(s.seed)
        base, self.tokenizer = loading.load_policy(s.model, self.device, self.dtype)
        set_date(self.tokenizer, self.date)
        self.context = loading.context_length(base)
        self.base = base if s.lora_rank else None  # kept: every adapter is put on this one copy
        self.load_data()
        # For the trainers of this process: its share of each step's questions, and random numbers
        # of its own.
        self.process_settings = replace(
            s, questions=parallel.share_of(s.questions, "--questions"), seed=parallel.seed(s.seed)
        )

    def load_data(self) -> None:
        """Demonstrations, extra questions, validation and test, all of them short enough for the model's context."""
        s, parts, dropped = self.s, [], 0
        counts = (("train", s.demonstrations + s.extra_questions), ("validation", 100), (s.test_split, s.eval_questions))
        for split, count in counts:
            examples = data.load_examples(s.data, split, count, s.seed, s.words_steps, s.words_largest,
                                          in_words=s.model not in loading.SHIPPED)  # fmt: skip
            examples, too_long = data.fit_context(self.tokenizer, examples, self.context, s.max_new_tokens)
            parts.append(examples)
            dropped += too_long
        train, self.validation, self.test = parts
        experts, extra = train[: s.demonstrations], train[s.demonstrations :]
        rng, wrong = random.Random(f"wrong {s.seed}"), round(s.wrong_demonstrations * len(experts))
        experts[:wrong] = [data.perturb(example, rng) or example for example in experts[:wrong]]
        if len(experts) < s.demonstrations:
            print(f"only {len(experts)} demonstrations are there, not {s.demonstrations}")
        if dropped:
            print(f"{dropped} examples are longer than the model's context of {self.context} tokens: skipped")
        if min(len(experts), len(self.validation), len(self.test)) < parallel.world():
            raise UserError(f"{parallel.world()} processes need as many demonstrations, validation and test questions")
        self.data_sum = zlib.crc32(repr((experts, extra, self.validation, self.test)).encode())
        self.experts, self.extra = parallel.share(experts), parallel.share(extra)
        self.answered = parallel.share(train)  # GRPO's: it learns from answers, and these are not broken

    def go(self, keeper: Keeper) -> None:
        """Every phase that is not finished yet, then the results."""
        self.keeper = keeper
        with keeper.opened(self.device.type, self.date, self.data_sum):
            self.results = keeper.progress.results
            for phase in self.phases():
                if phase not in keeper.progress.finished:
                    self.do(phase)
                    keeper.finish(phase)
            self.finish()

    def phases(self) -> list[str]:
        """What was asked for, in order:

        the base, METHODS, then what the reward is worth at inference.
        """
        wanted = set(self.s.methods)
        if self.s.start == "sft" and wanted & {"likelihood", "irl"}:
            wanted.add("sft")
        phases = ["test base"]
        for method in METHODS:
            if method in wanted:
                phases += [f"train {method}", f"test {method}"]
        if "irl" in wanted:
            phases.append("use reward")
        return phases

    def do(self, phase: str) -> None:
        """One phase.

        Each loads the models that it needs and drops them: at 0.5B every one counts.
        """
        action, method = phase.split()
        if action == "test":
            self.test_method(method)
        elif action == "use":
            self.use_reward()
        elif method in ("sft", "sft_fair"):
            self.train_sft(method)
        elif method == "grpo":
            self.train_grpo(method)
        else:
            self.train_irl(method)

    # --- the phases -------------------------------------------------------------------------------

    def test_method(self, method: str) -> None:
        """Evaluate the base or a trained policy on the test questions."""
        with self.keeper.signals.at_once():
            model = self.load(None if method == "base" else self.folder_of(method))
            result = evaluate(model, self.tokenizer, self.test, self.s)
        if method != "base":
            seconds = self.keeper.progress.seconds
            result["seconds"] = seconds.get(warm_up_of(method), 0.0) + seconds.get(method, 0.0)
        self.results["methods"][method] = result

    def train_sft(self, method: str) -> None:
        """Imitate the demonstrations.

        sft_fair gets what IRL gets by default, too: its weights are averaged with their start, and
        its logits are divided for good. Other updates and rates are best with that, so it has its
        own.
        """
        s = self.process_settings
        model = self.to_train()
        start = []
        if method == "sft_fair":
            if s.fair_average:
                start = lora.start_of(model)
            s = replace(s, sft_steps=s.fair_steps, sft_lr=s.fair_lr)
        trainer = self.keeper.resumed(baselines.SFT(s, self.tokenizer, model, self.experts))
        self.run_steps(method, trainer, s.sft_steps)
        if method == "sft_fair":
            lora.average(model, start, s.fair_average)
            policy.divide_logits(model, s.fair_temperature)
        self.save_model(model, self.folder_of(method))

    def train_grpo(self, method: str) -> None:
        """Train on the true answers."""
        trainer = self.keeper.resumed(baselines.GRPO(self.process_settings, self.tokenizer, self.to_train(), self.answered))
        self.run_steps(method, trainer, self.s.grpo_steps)
        self.save_model(trainer.policy_model, self.folder_of(method))

    def train_irl(self, method: str) -> None:
        """Warm the discriminator up, run the loop, save policy and reward.

        likelihood is IRL without the discriminator's loss (Settings.discriminator_coef): what IRL
        has beyond it is what telling the expert from others brings.
        """
        loop = self.keeper.resumed(self.make_loop(method=method))
        steps = self.keeper.progress.steps
        warm_up = warm_up_of(method)
        if self.s.start == "base" and warm_up not in steps:
            first = irl.first_logprob(loop.policy_model, self.tokenizer, self.experts[:32])
            if first < -8:
                print(
                    "the base all but never begins as the demonstrations do (log pi of their "
                    f"first token {first:.1f}): IRL cannot teach it that, --start sft can"
                )
        self.run_steps(warm_up, loop, self.s.warm_up)
        if method not in steps:
            loop.end_warm_up()
        self.run_steps(method, loop, self.s.max_steps)
        self.save_model(loop.policy_model, self.folder_of(method))
        if method == "irl":
            self.save_model(loop.discriminator.reward_model.model, "reward")

    def use_reward(self) -> None:
        """Rerank the base's samples, find first errors, keep some traces for the report."""
        parallel.leave()  # one process does this
        s = self.s
        with self.keeper.signals.at_once():
            test = self.test[: min(RERANK_QUESTIONS, (s.eval_questions + 1) // 2)]
            base = self.load()
            discriminator = self.load_discriminator("reward")
            judges = rerank.load_judges(
                self.folder, self.tokenizer, s.fair_temperature, self.device
            )
            generator = torch.Generator(self.device).manual_seed(s.seed + 1)
            candidates = rerank.collect(
                base,
                self.tokenizer,
                test,
                RERANK_CANDIDATES,
                s.max_new_tokens,
                1.0,
                generator,
                s.sample_rows,
            )
            found = rerank.assess(
                candidates, discriminator, base, judges, self.tokenizer, seed=s.seed
            )
            traces = show_traces(candidates, discriminator, base, self.tokenizer)
        checkpoint.write_text(self.folder / "traces.json", json.dumps(traces))
        self.results |= found
        self.results["reward"]["auroc"] = found["rerank"]["auroc"]["reward"]

    def finish(self) -> None:
        """results.json, report.html and the table. The checkpoints have done their work."""
        parallel.leave()
        path = self.folder / "results.json"
        checkpoint.write_text(path, json.dumps(self.results, indent=1) + "\n")
        page = report.write_report(self.folder)
        checkpoint.remove(self.folder / "checkpoints")
        print(f"\n{table(self.results)}\n\nresults: {path}\nreport:  {page}")

    # --- steps ------------------------------------------------------------------------------------

    def run_steps(self, method: str, trainer, steps: int) -> None:
        """Call trainer.step (of a warm-up:

        warm_up) until `steps` are done, validating now and then.
        """
        is_warm_up = method.endswith("warm-up")
        seconds = self.keeper.progress.seconds
        for step in self.keeper.steps(method, steps):
            start = time.perf_counter()
            if is_warm_up:
                metrics = {"discriminator": trainer.warm_up()}
            else:
                metrics = trainer.step()
            seconds[method] = seconds.get(method, 0.0) + time.perf_counter() - start
            if VALIDATE_EVERY and not is_warm_up and (step % VALIDATE_EVERY == 0 or step == steps):
                metrics["validation"] = {"t1": self.validate(trainer.policy_model)}
            self.keeper.after(method, step, metrics, trainer)

    def validate(self, model) -> float:
        """Share of right answers, one sample each, on the validation questions.

        Nothing trains on it.
        """
        generator = torch.Generator(model.device).manual_seed(parallel.seed(0))
        right = check_samples(model, self.tokenizer, self.validation, 1, 1.0, generator, self.s)
        return float(right.mean())

    def make_loop(self, kind: type[irl.IRL] = irl.IRL, **changes) -> irl.IRL:
        """The loop with all it needs, before its first update.

        kind: explain.Lecture talks. changes: of settings.
        """
        loading.check_same_tokenizer(self.tokenizer, self.s.reward_model)
        discriminator = self.load_discriminator()
        model = self.to_train(self.load("sft" if self.s.start == "sft" else None))
        extra = [example.question for example in self.extra]
        settings = replace(self.process_settings, **changes)
        return kind(settings, self.tokenizer, model, discriminator, self.experts, extra)

    # --- models -----------------------------------------------------------------------------------

    def load(self, trained: str | None = None):
        """The base, or what this run has trained under that name: to be looked at, not trained."""
        if trained:
            return loading.load_causal(str(self.folder / trained), self.device, torch.float32)
        if self.base is not None:
            return self.base
        return loading.load_causal(self.s.model, self.device, self.dtype)

    def to_train(self, model=None):
        """The model, by default the base, as it is trained:

        with an adapter of its own if there is a --lora-rank.
        """
        s = self.s
        if model is None:
            model = self.load()
        if s.lora_rank:
            # A generator of its own: a resumed run, which has drawn less, starts each method as
            # before.
            generator = torch.Generator().manual_seed(s.seed)
            model = lora.adapt(model, s.lora_rank, lora.ALPHA, generator)
        if s.gradient_checkpointing:
            memory.recompute_layers(model)
        return model

    def load_reward(self, trained: str | None = None):
        """The reward to train, or what this run has trained under that name.

        With adapters it shares the policy's base, if it starts there.
        """
        s = self.s
        if trained is not None:
            return reward.load_reward(s.reward, str(self.folder / trained), self.device)
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
        s = self.s
        return reward.make_discriminator(
            self.load_reward(trained), self.tokenizer, s.logit, s.granularity, clip=s.reward_clip
        )

    def save_model(self, model, name: str) -> None:
        """A folder that from_pretrained loads:

        complete, or not there. The first process fills it.
        """
        with checkpoint.new_folder(self.folder / name) as folder:
            if parallel.rank() == 0:
                lora.save(model, folder)
                self.tokenizer.save_pretrained(folder)

    def folder_of(self, method: str) -> str:
        """The folder's name of a trained policy: policy/ for IRL, or for the only method."""
        return "policy" if method == "irl" or self.s.methods == [method] else method


def warm_up_of(method: str) -> str:
    """What the steps of a method's warm-up are called in metrics.jsonl."""
    return "warm-up" if method == "irl" else f"{method} warm-up"


def explain_one_step(s: Settings, device: str) -> None:
    """One step of IRL in numbers, stage by stage. Nothing is written. Raises UserError."""
    if "irl" not in s.methods or s.start == "sft" or s.reward == "random":
        raise UserError(
            "--explain shows one step of IRL from the base: leave out --method, --start and a "
            "random reward"
        )
    Run(s, device=device).make_loop(explain.Lecture).give()


def begin(arguments: list[str] | None, signals: Signals) -> None:
    """Do what the flags ask for."""
    loading.quiet()
    command = parse_flags(arguments)
    folder = run_folder(command.name)
    if command.resume and is_finished(folder):
        checkpoint.remove(folder / "checkpoints")  # what a kill may have left
        print(
            f"{folder} is finished: its report is {folder / 'report.html'}, its results are in "
            f"{folder / 'results.json'}. To run anew give another --name, or remove that folder"
        )
        return
    date = None  # today
    if command.resume:
        s, date = saved_settings(folder, command.given)
    else:
        s = complete(command.given, command.explain)
    parallel.start(command.device)
    with in_one_line(s, folder):
        if command.explain:
            explain_one_step(s, command.device)
            return
        keeper = Keeper(folder, s, command.resume, signals)
        with signals.at_once():
            run = Run(s, command.name, command.device, date)
        run.go(keeper)


def main(arguments: list[str] | None = None) -> int:
    """Run with these flags, by default the command line's. Returns the exit status.

    0; 2 after one line that says what was wrong; 130 or 143 when a signal has stopped the run.
    """
    signals = Signals()

    def program() -> None:
        begin(arguments, signals)

    try:
        with signals:
            return exit_status(program)
    except Stopped as stopped:
        if parallel.rank() == 0:
            print(f"\nstopped by {stopped.reason}", file=sys.stderr)
        return stopped.status


if __name__ == "__main__":
    sys.exit(main())
