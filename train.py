"""A run: the base and every method from it, trained on the same demonstrations, tested on the same questions.

    python train.py                                          the demo: every method on the embedded problems, minutes
    python train.py --model Qwen2.5-0.5B --data gsm8k        IRL on a real model, on a GPU
    python train.py --method sft --demonstrations 1024       one method, other settings (python train.py --help)
    python train.py --explain                                one iteration in numbers, stage by stage; writes nothing
    python train.py --resume --name demo                     go on with runs/demo, which was stopped or killed

Outside of Algorithm 1, which is irl.IRL.step: here its models are made, its steps are counted, and what was learnt is tested
against the true answers, which no training but GRPO's sees. A run leaves in runs/<name>/: settings.json, metrics.jsonl (a
line per step), results.json, traces.json, report.html, and models that `from_pretrained` loads: policy/ (IRL's, or the only
method's), reward/, and sft/, sft_fair/, likelihood/ and grpo/ of what else was trained.

On one machine and one thread the same settings give the same numbers, bit for bit, with or without interruptions
(engine/keeper.py). On another the sums are taken in another order, and a sampled token that falls otherwise makes another
run. Many GPUs share one with torchrun --nproc-per-node=N train.py (engine/parallel.py).
"""

import json
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

import baselines
import data
import irl
import logprob
import negatives
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

# --- evaluation: the answer check is used from here on, and nowhere in irl.py ----------------------------------


def right(model, tokenizer, examples: list[data.Example], n: int, temperature: float, generator, s: Settings) -> torch.Tensor:
    """Which of n samples per question have the true answer, [Q, n] bool; temperature 0 is greedy."""
    sample = lambda mine: rerank.collect(model, tokenizer, mine, n, s.max_new_tokens, temperature, generator, s.sample_rows)
    return parallel.rows(lambda mine: sample(mine).correct, examples)


def evaluate(model, tokenizer, examples: list[data.Example], s: Settings) -> dict:
    """Accuracy at temperature 1 (mean over samples) and greedy, with 95% bootstrap intervals over questions; pass@k."""
    generator = torch.Generator(model.device).manual_seed(parallel.seed(s.seed))
    sampled = right(model, tokenizer, examples, s.eval_samples, 1.0, generator, s)  # [Q, N]
    greedy = right(model, tokenizer, examples, 1, 0.0, generator, s)  # [Q, 1]
    t1, greedy = rerank.bootstrap(sampled.float().mean(1)), rerank.bootstrap(greedy.float().mean(1))
    passes = lambda k: sum(rerank.pass_at_k(s.eval_samples, int(c), k) for c in sampled.sum(1)) / len(sampled)
    at_k = {str(k): passes(k) for k in (1, 2, 4, 8, 16) if k <= s.eval_samples}
    return {"t1": t1[0], "t1_interval": t1[1:], "greedy": greedy[0], "greedy_interval": greedy[1:], "pass@k": at_k}


# --- a run ------------------------------------------------------------------------------------------------------


class Run:
    """One call of train.py: `go` takes its `phases` one after the other; a run that goes on leaves out those that are
    finished, and enters the one that was cut off where its last checkpoint was written."""

    def __init__(self, s: Settings):
        """Load the base and the data. Nothing is written."""
        self.s, self.folder = s, run_folder(s.name)
        self.device = loading.pick_device(s.device)
        if s.fused:
            logprob.use_fused(self.device)
        self.dtype = memory.weight_type(s.weights, s.lora_rank, self.device)
        torch.manual_seed(s.seed)
        base, self.tokenizer = loading.load_policy(s.model, self.device, self.dtype)
        set_date(self.tokenizer, s.date)
        self.context = loading.context_length(base)
        self.base = base if s.lora_rank else None  # kept: every adapter is put on this one copy
        self.load_data()
        # what the trainers of this process go by: its share of each step's questions, and random numbers of its own
        self.mine = replace(s, questions=parallel.share_of(s.questions, "--questions"), seed=parallel.seed(s.seed),
                            sft_batch=parallel.share_of(s.sft_batch, "--sft-batch"))  # fmt: skip

    def load_data(self) -> None:
        """Demonstrations, extra questions, validation and test, all of them short enough for the model's context. What
        there is less of than was asked for is said, and what was used is kept in results.json ("counts")."""
        s, parts, dropped = self.s, [], 0
        counts = (("train", s.demonstrations + s.extra_questions), ("validation", 100), (s.test_split, s.eval_questions))
        for split, count in counts:
            examples, too_long = data.load_fitting(
                self.tokenizer, self.context, s.max_new_tokens, s.data, split, count, s.seed,
                s.words_steps, s.words_largest, in_words=s.model not in loading.SHIPPED)  # fmt: skip
            parts.append(examples)
            dropped += too_long
        train, self.validation, self.test = parts
        experts = parallel.even(train[: s.demonstrations], "demonstrations")
        extra = parallel.even(train[s.demonstrations :], "extra questions")
        train = experts + extra
        if not experts or not self.test:
            raise UserError(f"'{s.data}' has {len(experts)} demonstrations and {len(self.test)} {s.test_split} questions: "
                            "give a folder with train.jsonl and test.jsonl")  # fmt: skip
        rng, wrong = random.Random(f"wrong {s.seed}"), round(s.wrong_demonstrations * len(experts))
        experts[:wrong] = [negatives.perturb(example, rng) or example for example in experts[:wrong]]
        for name, used, asked in (
            ("demonstrations", experts, s.demonstrations),
            ("extra questions", extra, s.extra_questions),
            ("validation questions", self.validation, 100),
            (f"{s.test_split} questions for the results", self.test, s.eval_questions),
        ):
            if len(used) < asked:
                print(f"only {len(used)} {name} are there, not {asked}")
        if dropped:
            print(f"{dropped} examples are longer than the model's context of {self.context} tokens: skipped")
        if min(len(experts), len(self.test), len(self.validation) or parallel.world()) < parallel.world():
            raise UserError(f"{parallel.world()} processes need as many demonstrations, validation and test questions")
        self.counts = {
            "demonstrations": len(experts),
            "extra_questions": len(extra),
            "validation": len(self.validation),
            "test": len(self.test),
            "reranked": min(len(self.test), s.rerank_questions),
        }
        self.data_sum = zlib.crc32(repr((experts, extra, self.validation, self.test)).encode())
        self.experts = parallel.share(data.tokenize(self.tokenizer, experts))
        self.extra = parallel.share(data.tokenize(self.tokenizer, extra))
        # GRPO's: it learns from answers, and these are not broken.
        self.answered = parallel.share(data.tokenize(self.tokenizer, train))

    def go(self, keeper: Keeper) -> None:
        """Every phase that is not finished yet, then the results."""
        self.keeper = keeper
        with keeper.opened(self.device.type, self.data_sum):
            self.results = keeper.progress.results
            self.results["counts"] = self.counts
            for name, phase in self.phases():
                if name not in keeper.progress.finished:
                    phase()
                    keeper.finish(name)
            self.finish()

    def phases(self) -> Iterator[tuple[str, Callable]]:
        """What was asked for, in order: the base, METHODS, then what the reward is worth at inference.

        Every phase loads the models that it needs and drops them: at 0.5B each one counts.
        """
        wanted = set(self.s.methods)
        if self.s.start == "sft" and wanted & {"likelihood", "irl", "grpo"}:
            wanted.add("sft")
        train = {"grpo": self.train_grpo, "irl": self.train_irl, "likelihood": self.train_irl}
        yield "test base", partial(self.test_method, "base")
        for method in filter(wanted.__contains__, METHODS):
            yield f"train {method}", partial(train.get(method, self.train_sft), method)
            yield f"test {method}", partial(self.test_method, method)
        if "irl" in wanted:
            yield "use reward", self.use_reward

    # --- the phases ---------------------------------------------------------------------------------------------

    def test_method(self, method: str) -> None:
        """Evaluate the base or a trained policy on the test questions."""
        with self.keeper.signals.at_once():
            model = self.load(None if method == "base" else self.folder_of(method))
            found = evaluate(model, self.tokenizer, self.test, self.s)
        if method != "base":
            seconds = self.keeper.progress.seconds
            found["seconds"] = seconds.get(warm_up_of(method), 0.0) + seconds.get(method, 0.0)
        self.results["methods"][method] = found

    def train_sft(self, method: str) -> None:
        """Imitate the demonstrations. sft_fair then gets what IRL's default gets: weights averaged with the start, and
        logits divided for good; and updates and a rate of its own, for those that are best with these are others."""
        s, fair, model = self.mine, method == "sft_fair", self.to_train()
        if fair:
            start = lora.start_of(model) if s.fair_average else []
            s = replace(s, sft_steps=s.fair_steps, sft_lr=s.fair_lr)
        trainer = self.keeper.resumed(baselines.SFT(s, self.tokenizer, model, self.experts))
        self.run_steps(method, trainer, s.sft_steps)
        if fair:
            lora.average(model, start, s.fair_average)
            policy.divide_logits(model, s.fair_temperature)
        self.save_model(model, self.folder_of(method))

    def train_grpo(self, method: str) -> None:
        """Train on the true answers, from where IRL's policy starts: at SFT with --start sft. (With --start reward, at the
        base: that start is a reward that IRL has learnt, and belongs to IRL.)"""
        trainer = self.keeper.resumed(baselines.GRPO(self.mine, self.tokenizer, self.policy_start(), self.answered))
        self.run_steps(method, trainer, self.s.grpo_steps)
        self.save_model(trainer.policy_model, self.folder_of(method))

    def train_irl(self, method: str) -> None:
        """Warm the discriminator up, run the loop, save policy and reward. likelihood is the same without the
        discriminator's loss: what IRL has beyond it is what telling apart from negatives brings."""
        loop = self.keeper.resumed(self.make_loop(**{"discriminator_coef": 0.0} if method == "likelihood" else {}))
        done = self.keeper.progress.steps.get
        if self.s.start == "base" and not done(warm_up_of(method)):
            first = irl.first_logprob(loop.policy_model, self.experts[:32])
            if first < -8:
                print(f"the base all but never begins as the demonstrations do (log pi of their first token {first:.1f}): "
                      "IRL cannot teach it that, --start sft can")  # fmt: skip
        self.run_steps(warm_up_of(method), loop, self.s.warm_up)
        if not done(method):
            loop.end_warm_up()
        self.run_steps(method, loop, self.s.max_steps)
        self.save_model(loop.policy_model, self.folder_of(method))
        if method == "irl":
            self.save_model(loop.discriminator.reward_model.model, "reward")

    def use_reward(self) -> None:
        """Rerank the base's samples, find first errors, keep some traces for the report: one process's work."""
        parallel.leave()
        with self.keeper.signals.at_once():
            s, test, base = self.s, self.test[: self.s.rerank_questions], self.load()
            discriminator = self.load_discriminator("reward")
            judges = rerank.load_judges(self.folder, self.tokenizer, s.fair_temperature, self.device)
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

    # --- steps --------------------------------------------------------------------------------------------------

    def run_steps(self, method: str, trainer, steps: int) -> None:
        """Call trainer.step (of a warm-up: warm_up) until `steps` are done, validating now and then."""
        warm_up, seconds = method.endswith("warm-up"), self.keeper.progress.seconds
        every = 0 if warm_up or not self.validation else self.s.validate_every
        for step in self.keeper.steps(method, steps):
            start = time.perf_counter()
            metrics = {"discriminator": trainer.warm_up()} if warm_up else trainer.step()
            seconds[method] = seconds.get(method, 0.0) + time.perf_counter() - start
            if every and (step % every == 0 or step == steps):
                metrics["validation"] = {"t1": self.validate(trainer.policy_model)}
            self.keeper.after(method, step, metrics, trainer)

    def validate(self, model) -> float:
        """Accuracy of one sample at temperature 1 on the validation questions. For curves; nothing trains on it."""
        generator = torch.Generator(model.device).manual_seed(parallel.seed(0))
        return float(right(model, self.tokenizer, self.validation, 1, 1.0, generator, self.s).mean())

    def make_loop(self, kind: type[irl.IRL] = irl.IRL, **changes) -> irl.IRL:
        """The loop with all it needs, before its first update; `kind` may be explain.Lecture. changes: of settings."""
        loading.check_same_tokenizer(self.tokenizer, self.s.reward_model)
        discriminator = self.load_discriminator()
        model = self.policy_start()
        extra = [data.question_only(example) for example in self.extra]
        return kind(replace(self.mine, **changes), self.tokenizer, model, discriminator, self.experts, extra)

    # --- models -------------------------------------------------------------------------------------------------

    def load(self, trained: str | None = None):
        """The base, or what this run has trained under that name: to be looked at, not trained."""
        if trained is None and self.base is not None:
            return self.base
        folder = str(self.folder / trained) if trained else self.s.model
        return loading.load_causal(folder, self.device, torch.float32 if trained else self.dtype)

    def to_train(self, model=None):
        """The model, by default the base, as it is trained: with an adapter of its own if there is a --lora-rank."""
        s, model = self.s, self.load() if model is None else model
        if s.lora_rank:  # a generator of its own: a resumed run, which has drawn less, starts each method as before
            model = lora.adapt(model, s.lora_rank, s.lora_alpha, torch.Generator().manual_seed(s.seed))
        if s.gradient_checkpointing:
            memory.recompute_layers(model)
        return model

    def policy_start(self):
        """What the policies of IRL and GRPO are before their first step: SFT's with --start sft, else the base."""
        return self.to_train(self.load("sft" if self.s.start == "sft" else None))

    def load_reward(self, trained: str | None = None):
        """The reward to train, on the policy's own base if it starts there and has an adapter; or what this run has
        trained under that name."""
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
        kind = s.logit, s.granularity, s.reward_clip
        return reward.make_discriminator(self.load_reward(trained), self.tokenizer, *kind)

    def save_model(self, model, name: str) -> None:
        """A folder that from_pretrained loads: complete, or not there. One process fills it, the others may load it next."""
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


def main(arguments: list[str] | None = None) -> int:
    """Run with these flags (by default the command line's); returns the exit status: 0, 2 after one line that says what
    was wrong, 130 or 143 when a signal has stopped the run."""
    signals = Signals()

    def program():
        loading.quiet()
        given = parse_flags(sys.argv[1:] if arguments is None else arguments)
        resume, folder = given.pop("resume", False), run_folder(given.get("name", Settings.name))
        if resume and is_finished(folder):
            checkpoint.remove(folder / "checkpoints")  # what a kill may have left
            return print(f"{folder} is finished: its report is {folder / 'report.html'}, its results are in "
                         f"{folder / 'results.json'}. To run anew give another --name, or remove that folder")  # fmt: skip
        s = saved_settings(given) if resume else complete(given)
        parallel.start(s.device)
        with in_one_line(s):
            keeper = Keeper(s, resume, signals)
            with signals.at_once():
                run = Run(s)
            if s.explain:
                run.make_loop(explain.Lecture).give()
            else:
                run.go(keeper)

    try:
        with signals:
            return exit_status(program)
    except Stopped as stopped:
        status, told = stopped.args
        if parallel.rank() == 0:
            print(f"\nstopped by {told}", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
