"""A run: the base and every method, trained on the same demonstrations, tested on the same
questions.

    python train.py                                      the demo: every method on word problems
    python train.py --model Qwen2.5-0.5B --data gsm8k    IRL on a real model, on a GPU
    python train.py --method sft --demonstrations 1024   one method, other settings (--help)
    python train.py --explain                            one step of IRL in numbers; writes nothing
    python train.py --resume --name demo                 go on with runs/demo, which was stopped

This is what stands around Algorithm 1, which is irl.IRL.step. Here its models are made, its steps
are counted, and what was learnt is tested against the true answers, which no training but GRPO's
sees. Read `Run` from top to bottom: settings, data, models, the phases (SFT, IRL, GRPO), results.

A run leaves in runs/<name>/: settings.json; metrics.jsonl, a line per step; results.json;
traces.json; report.html; and models that `from_pretrained` loads: policy/ (IRL's, or the only
method's), reward/, and sft/, sft_fair/, likelihood/ and grpo/ of what else was trained.

Many GPUs share a run with torchrun --nproc-per-node=N train.py (engine/parallel.py).
"""

# On one machine and one thread the same settings give the same numbers, bit for bit, with or
# without interruptions (engine/keeper.py). Another machine takes the sums in another order; a
# sampled token that falls otherwise then makes another run.

import datetime
import json
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import baselines
import data
import irl
import logprob
import policy
import rerank
import reward
from engine import checkpoint, loading, lora, memory, parallel
from engine.chat import set_date
from engine.errors import UserError, exit_status
from engine.keeper import Keeper, in_one_line
from engine.runs import run_folder, saved_settings
from engine.settings import METHODS, Settings, complete, parse_flags
from show import explain, report
from show.tables import show_traces, table

VALIDATE_EVERY = 20  # steps between looks at the validation questions
VALIDATION_QUESTIONS = 100
EVAL_SAMPLES = 4  # per test question, at temperature 1
RERANK_QUESTIONS = 250  # half of the test questions are reranked, at most so many
RERANK_CANDIDATES = 16  # per question
LORA_ALPHA = 32.0  # an adapter's output counts alpha / rank times: customary

# --- evaluation: the answer check is used from here on, and nowhere in irl.py ---------------------


def check_samples(
    model, tokenizer, examples: list, n: int, temperature: float, generator, s: Settings
) -> torch.Tensor:
    """Which of n samples per question have the true answer, [Q, n] of 0 and 1."""

    def check(share: list[data.Example]) -> torch.Tensor:
        candidates = rerank.collect(
            model, tokenizer, share, n, s.max_new_tokens, temperature, generator, s.sample_rows
        )
        return candidates.correct

    # Each process samples for its share of the questions, and all get all of the result.
    return parallel.rows(check, examples)


def right_answers(
    model, tokenizer, examples: list[data.Example], s: Settings
) -> dict[str, torch.Tensor]:
    """{"t1": which of some samples at temperature 1 are right [Q, n], "greedy": [Q, 1]}."""
    # The same random numbers for every method: what differs is the policy.
    generator = torch.Generator(model.device).manual_seed(parallel.seed(s.seed))
    return {
        "t1": check_samples(model, tokenizer, examples, EVAL_SAMPLES, 1.0, generator, s),
        "greedy": check_samples(model, tokenizer, examples, 1, 0.0, generator, s),
    }


def evaluate(model, tokenizer, examples: list[data.Example], s: Settings) -> dict:
    """Shares of right answers at temperature 1 (mean over samples) and greedy, and pass@k.

    Each share comes with its 95% bootstrap interval over questions.
    """
    right = right_answers(model, tokenizer, examples, s)
    results = {"pass@k": {}}
    for name, rows in right.items():
        results[name], *results[f"{name}_interval"] = rerank.bootstrap(rows.float().mean(1))
    # The chance that one of k samples is right, from how many of EVAL_SAMPLES are.
    for k in (1, 2, 4):
        chances = [rerank.pass_at_k(EVAL_SAMPLES, int(count), k) for count in right["t1"].sum(1)]
        results["pass@k"][str(k)] = sum(chances) / len(chances)
    return results


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """One call of train.py: settings, data, models; `go` trains and tests method after method."""

    # The loop that is trained. An experiment, or a fork, may give one of its own to `main`.
    loop: Callable[..., irl.IRL] = irl.IRL

    def __init__(
        self, s: Settings, name: str = "demo", device: str = "auto", date: str | None = None
    ):
        """Load the base and the data. Nothing is written.

        date: the day that chat templates are told, or today.
        """
        self.s = s
        self.folder = run_folder(name)
        # A template may name the day. A run that goes on tomorrow keeps that of its start.
        self.date = date or datetime.date.today().isoformat()
        self.device = loading.pick_device(device)
        if s.fused:
            logprob.use_fused(self.device)
        self.dtype = memory.weight_type(s.weights, s.lora_rank, self.device)
        # torch's own numbers start a random head. All that is sampled has generators of its own.
        torch.manual_seed(s.seed)
        base, self.tokenizer = loading.load_policy(s.model, self.device, self.dtype)
        set_date(self.tokenizer, self.date)
        # The reward scores the very token ids that the policy has sampled.
        if s.reward_model != s.model:
            loading.check_same_tokenizer(self.tokenizer, s.reward_model)
        self.context = loading.context_length(base)
        # With adapters the base is kept: every adapter is put on this one copy.
        self.base = base if s.lora_rank else None
        self.load_data()
        # The trainers of this process go by its share of each step's questions, and draw random
        # numbers of its own.
        self.process_settings = replace(
            s, questions=parallel.share_of(s.questions, "--questions"), seed=parallel.seed(s.seed)
        )

    # --- data -------------------------------------------------------------------------------------

    def load_data(self) -> None:
        """Demonstrations, extra questions, validation and test questions that fit the context.

        What there is less of than was asked for is said, and what was used is kept (`counts`).
        """
        s = self.s
        parts = []
        # A shorter list is the beginning of a longer one: runs with more demonstrations have those
        # of runs with fewer.
        for split, count in (
            ("train", s.demonstrations + s.extra_questions),
            ("validation", VALIDATION_QUESTIONS),
            (s.test_split, s.eval_questions),
        ):
            examples, n_too_long = data.load_fitting(
                self.tokenizer,
                self.context,
                s.max_new_tokens,
                s.data,
                split,
                count,
                s.seed,
                # A pretrained model has read words; the bases that ship read their own notation.
                in_words=s.model not in loading.SHIPPED,
            )
            parts.append(examples)
            if n_too_long:
                print(
                    f"{n_too_long} examples of {split} are longer than the model's context of "
                    f"{self.context} tokens: skipped"
                )
        train, self.validation, self.test = parts
        # Candidates take long: half of the test questions, and not more than are needed for narrow
        # intervals.
        self.reranked = self.test[: min(RERANK_QUESTIONS, (s.eval_questions + 1) // 2)]

        # Demonstrations are solved problems. Of extra questions no policy is shown a solution.
        experts = parallel.even(train[: s.demonstrations], "demonstrations")
        extra = parallel.even(train[s.demonstrations :], "extra questions")
        if not experts or not self.test:
            raise UserError(
                f"'{s.data}' has {len(experts)} demonstrations and {len(self.test)} {s.test_split} "
                "questions: give a folder with train.jsonl and test.jsonl"
            )
        self.count_data(len(experts), len(extra))
        # By this a resumed run knows its data: with other examples it would not be the same run.
        self.data_sum = zlib.crc32(repr((experts, extra, self.validation, self.test)).encode())
        # They have been tokenised, once: each is used in many steps.
        self.experts = parallel.share(experts)
        self.extra = parallel.share(extra)
        # GRPO learns from the answers of all of them.
        self.answered = parallel.share(experts + extra)

    def count_data(self, n_experts: int, n_extra: int) -> None:
        """Keep how many examples there are, and say of what there is less than was asked for."""
        self.counts = {
            "demonstrations": n_experts,
            "extra_questions": n_extra,
            "validation": len(self.validation),
            "test": len(self.test),
            "reranked": len(self.reranked),
        }
        # A number over fewer questions than were asked for must not look like one over all.
        s = self.s
        asked = (s.demonstrations, s.extra_questions, VALIDATION_QUESTIONS, s.eval_questions)
        for (name, count), wanted in zip(self.counts.items(), asked):
            if count < wanted:
                print(f"{name.replace('_', ' ')}: only {count} are there, not {wanted}")

    # --- models -----------------------------------------------------------------------------------

    def load(self, trained: str | None = None):
        """The base, or what this run has trained under that name: to be looked at, not trained."""
        if trained:
            # What was saved is merged and float32, whatever the base is held in.
            return loading.load_causal(str(self.folder / trained), self.device, torch.float32)
        return self.base or loading.load_causal(self.s.model, self.device, self.dtype)

    def to_train(self, model=None):
        """The model, by default the base, as it is trained: with --lora-rank, with an adapter."""
        s = self.s
        model = model or self.load()
        if s.lora_rank:
            # A generator of its own: a resumed run, which has drawn less, starts each method as
            # before.
            generator = torch.Generator().manual_seed(s.seed)
            model = lora.adapt(model, s.lora_rank, LORA_ALPHA, generator)
        if s.gradient_checkpointing:
            # Less memory, a third more time, the same gradient.
            memory.recompute_layers(model)
        return model

    def policy_start(self):
        """What the policies of IRL and GRPO are before their first step."""
        return self.to_train(self.load("sft" if self.s.start == "sft" else None))

    def load_discriminator(self) -> reward.Discriminator:
        """The discriminator to train."""
        s = self.s
        # With adapters the reward shares the policy's base, if it starts there.
        if self.base is None or s.reward_model != s.model:
            reward_model = reward.load_reward(s.reward, s.reward_model, self.device, self.dtype)
        elif s.reward == "likelihood":
            reward_model = reward.LikelihoodReward(self.base)
        else:
            reward_model = reward.HeadReward(lora.with_head(self.base, s.reward == "random"))
        reward_model.model = self.to_train(reward_model.model)
        return reward.make_discriminator(
            reward_model, self.tokenizer, s.logit, s.granularity, clip=s.reward_clip
        )

    def make_loop(self, kind: Callable[..., irl.IRL] = irl.IRL, **changes) -> irl.IRL:
        """The loop with all it needs, before its first update.

        kind: explain.Lecture talks. changes: of settings.
        """
        return kind(
            settings=replace(self.process_settings, **changes),
            tokenizer=self.tokenizer,
            discriminator=self.load_discriminator(),
            policy_model=self.policy_start(),
            experts=self.experts,
            # Without their answers: nothing in the loop could check one.
            extra=[data.question_only(example) for example in self.extra],
        )

    def save_model(self, model, name: str) -> None:
        """A folder that from_pretrained loads: complete, or not there."""
        with checkpoint.new_folder(self.folder / name) as folder:
            # The processes have the same weights: the first one writes them.
            if parallel.rank() == 0:
                lora.save(model, folder)
                self.tokenizer.save_pretrained(folder)

    def folder_of(self, method: str) -> str:
        """The folder's name of a trained policy: policy/ for IRL, or for the only method."""
        # Whoever trains IRL, or one method alone, looks for its policy under the same name.
        return "policy" if method == "irl" or self.s.methods == [method] else method

    # --- the phases -------------------------------------------------------------------------------

    def go(self, resume: bool) -> None:
        """Test the base; train and test every method; then see what the reward is worth."""
        keeper = Keeper(self.folder)
        self.keeper = keeper
        wanted = set(self.s.methods)
        # The policies of these methods may start at SFT, which then comes first.
        if self.s.start == "sft" and wanted & {"likelihood", "irl", "grpo"}:
            wanted.add("sft")
        training = {
            "sft": self.train_sft,
            "sft_fair": self.train_sft,
            "likelihood": self.train_irl,
            "irl": self.train_irl,
            "grpo": self.train_grpo,
        }
        # Each phase loads the models that it needs and drops them: at 0.5B every one counts.
        phases = [("test base", self.test_method, "base")]
        for method in METHODS:
            if method in wanted:
                phases.append((f"train {method}", training[method], method))
                phases.append((f"test {method}", self.test_method, method))

        # With another kind of device, or other data, a checkpoint is of no use.
        made_with = {"device": self.device.type, "examples": self.data_sum}
        with keeper.opened(asdict(self.s) | {"date": self.date}, made_with, resume):
            self.results = keeper.progress.results
            self.results["counts"] = self.counts
            # A run that goes on leaves out the phases that are finished. The one that was cut off
            # it enters where the last checkpoint was written (Keeper.resumed, Keeper.steps).
            for name, phase, method in phases:
                if name not in keeper.progress.finished:
                    phase(method)
                    keeper.progress.finished.append(name)
                    keeper.save()
            # The rest is one process's work, and short: a kill from here on repeats it.
            parallel.leave()
            if "irl" in wanted:
                self.use_reward()
            text = json.dumps(self.results, indent=1) + "\n"
            checkpoint.write_text(self.folder / "results.json", text)
            print(f"\n{table(self.results)}\n")
            conclude(self.folder)

    def test_method(self, method: str) -> None:
        """Evaluate the base or a trained policy on the test questions."""
        model = self.load(None if method == "base" else self.folder_of(method))
        # Here, and in `use_reward`, the true answers are looked at: after training.
        result = evaluate(model, self.tokenizer, self.test, self.s)
        if method != "base":
            seconds = self.keeper.progress.seconds
            result["seconds"] = seconds.get(warm_up_of(method), 0.0) + seconds.get(method, 0.0)
        self.results["methods"][method] = result

    def train_sft(self, method: str) -> None:
        """Imitate the demonstrations: what IRL, which learns from them too, must beat."""
        s = self.process_settings
        model = self.to_train()
        if method == "sft_fair":
            # It gets what IRL gets by default, too: its weights are averaged with their start, and
            # its logits are divided for good. Other updates and rates are best with that, so it
            # has its own.
            start = lora.start_of(model)
            s = replace(s, sft_steps=s.fair_steps, sft_lr=s.fair_lr)
        trainer = self.keeper.resumed(baselines.SFT(s, self.tokenizer, model, self.experts))
        self.run_steps(method, trainer, s.sft_steps)
        if method == "sft_fair":
            lora.average(model, start, s.fair_average)
            policy.divide_logits(model, s.fair_temperature)
        self.save_model(model, self.folder_of(method))

    def train_irl(self, method: str) -> None:
        """Warm the discriminator up, run the loop, save policy and reward."""
        # The method likelihood is IRL without the discriminator's loss: discriminator_coef is 0 in
        # its settings. What IRL has beyond it is what telling the expert from others brings.
        loop = self.keeper.resumed(self.make_loop(self.loop, method=method))
        steps = self.keeper.progress.steps
        warm_up = warm_up_of(method)
        # A fresh discriminator knows nothing, and the policy would learn noise from it: it learns
        # alone first.
        self.run_steps(warm_up, loop, self.s.warm_up)
        if method not in steps:
            # Once, between the two: average the reward with its start, and with --start reward let
            # the policy begin as the best one for it.
            loop.end_warm_up()
        # Algorithm 1. No answer is checked in it (data.no_verifier).
        self.run_steps(method, loop, self.s.max_steps)
        self.save_model(loop.policy_model, self.folder_of(method))
        if method == "irl":
            self.save_model(loop.discriminator.reward_model.model, "reward")

    def train_grpo(self, method: str) -> None:
        """Train on the true answers: what IRL would do if somebody checked every answer."""
        # It starts where IRL's policy starts, at SFT with --start sft: another start would be
        # unfair to one of them. With --start reward it is the base, since that start is IRL's own
        # work.
        model = self.policy_start()
        trainer = baselines.GRPO(self.process_settings, self.tokenizer, model, self.answered)
        self.run_steps(method, self.keeper.resumed(trainer), self.s.grpo_steps)
        self.save_model(model, self.folder_of(method))

    def run_steps(self, method: str, trainer, steps: int) -> None:
        """Call trainer.step (in a warm-up: trainer.warm_up) until `steps` are done."""
        # Of training alone: the table's last column. Checkpoints and validation do not count.
        seconds = self.keeper.progress.seconds
        with self.keeper.steps(method, steps) as left_to_do:
            for step in left_to_do:
                start = time.perf_counter()
                if method.endswith("warm-up"):
                    metrics = {"discriminator": trainer.warm_up()}
                else:
                    metrics = trainer.step()
                seconds[method] = seconds.get(method, 0.0) + time.perf_counter() - start
                # For the report's curves, one sample for each validation question: nothing trains
                # on what this finds.
                if step % VALIDATE_EVERY == 0 or step == steps:
                    if self.validation and not method.endswith("warm-up"):
                        metrics["validation"] = {"t1": self.validate(trainer.policy_model)}
                self.keeper.after(method, step, metrics, trainer)

    def validate(self, model) -> float:
        """Share of right answers on the validation questions."""
        # The same draws at every look: the curve shows the policy, not the luck of its samples.
        generator = torch.Generator(model.device).manual_seed(parallel.seed(0))
        right = check_samples(model, self.tokenizer, self.validation, 1, 1.0, generator, self.s)
        return float(right.mean())

    def use_reward(self) -> None:
        """Rerank the base's samples, find first errors, keep some traces for the report."""
        s = self.s
        # Not the policy that the reward has trained: whoever reranks has the base, or another one.
        base = self.load()
        discriminator, _, _ = rerank.load_run(self.folder, self.device)
        # SFT models, whose log-probability is the rival of the reward.
        judges = rerank.load_judges(self.folder, self.tokenizer, s.fair_temperature, self.device)
        generator = torch.Generator(self.device).manual_seed(s.seed + 1)
        candidates = rerank.collect(
            base,
            self.tokenizer,
            self.reranked,
            RERANK_CANDIDATES,
            s.max_new_tokens,
            1.0,
            generator,
            s.sample_rows,
        )
        # How often the best by the reward is right, whether its score tells right from wrong, and
        # whether its tokens point at the first error.
        self.results |= rerank.assess(
            candidates, discriminator, base, judges, self.tokenizer, seed=s.seed
        )
        self.results["reward"]["auroc"] = self.results["rerank"]["auroc"]["reward"]
        traces = show_traces(candidates, discriminator, base, self.tokenizer)
        checkpoint.write_text(self.folder / "traces.json", json.dumps(traces))


def warm_up_of(method: str) -> str:
    """What the steps of a method's warm-up are called in metrics.jsonl."""
    return "warm-up" if method == "irl" else f"{method} warm-up"


def conclude(folder: Path) -> None:
    """A run with results.json gets its report. Its checkpoints have done their work."""
    # Whatever a kill has left out of this is done by --resume.
    page = report.write_report(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"results: {folder / 'results.json'}\nreport:  {page}")


# --- the command line -----------------------------------------------------------------------------


def begin(arguments: list[str] | None, loop: Callable[..., irl.IRL] = irl.IRL) -> None:
    """Do what the flags ask for. Raises UserError."""
    loading.quiet()
    # All that can be wrong with flags is told before anything is loaded or written.
    command = parse_flags(arguments)
    folder = run_folder(command.name)
    if command.resume and (folder / "results.json").exists():
        print(f"{folder} is finished. To run anew give another --name, or remove that folder")
        conclude(folder)
        return
    if command.resume:
        s, command.date = saved_settings(folder, command.given)
    else:
        s = complete(command.given, command.explain)
    parallel.start(command.device)
    # Nothing is overwritten: a run is begun in a folder of its own.
    if not command.resume and not command.explain and any(folder.glob("[!.]*")):
        go_on = parallel.resume_command(command.name)
        raise UserError(
            f"{folder} already holds a run: go on with it ({go_on}), give another --name, or "
            "remove that folder"
        )
    # From here on a stop, a full disk and a full memory are told in one line, too.
    with in_one_line(s, folder):
        run = Run(s, command.name, command.device, command.date)
        run.loop = loop
        if not command.explain:
            run.go(command.resume)
        elif "irl" not in s.methods or s.start == "sft" or s.reward == "random":
            raise UserError(
                "--explain shows one step of IRL from the base: leave out --method, --start and a "
                "random reward"
            )
        else:
            run.make_loop(explain.Lecture).give()


def main(arguments: list[str] | None = None, loop: Callable[..., irl.IRL] = irl.IRL) -> int:
    """Run with these flags, by default the command line's. Returns the exit status.

    0, or 2 after one line that says what was wrong. SystemExit: a signal has stopped the run.
    """
    return exit_status(begin, arguments, loop)


if __name__ == "__main__":
    sys.exit(main())
