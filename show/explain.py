"""One iteration of Algorithm 1 (arXiv 2510.01857) in numbers, stage by stage: for the lecture hall.

    python train.py --explain                                      the shipped base, some seconds
    python train.py --explain --reward head --policy-loss ppo      any settings of a run
    python train.py --explain --model DIR --data FILE              any model, any data

It is a file of its own because nothing in it trains: `Lecture` is `irl.IRL` with a voice. Each stage is the inherited
one, called by the inherited `step`; only the printing around it is new. So what is shown is what training does, and
tests/test_explain.py checks that a lecture leaves behind the very weights that a silent iteration would have left.

Nothing is written to runs/. The output is plain text, at most WIDTH columns wide.
"""

import random
import sys
import textwrap

import torch

import data
import irl
import policy
import reward
from data import Batch, Example
from engine import logprob
from policy import Rollout

WARM_UP = 10  # updates of the discriminator before the lecture: at a fresh reward's D = 1/2 there is nothing to see
WIDTH = 110  # columns of the output
MOST_ROWS = 48  # of a table; a longer trace is shown in part


class Lecture(irl.IRL):
    """irl.IRL that says what each stage sees and makes. `give` runs the lecture."""

    speaking = False  # the warm-up goes through the same stages, silently

    def give(self) -> None:
        """Warm up, run one iteration aloud, and tell at last what the answer check would have said."""
        s = self.settings
        updates = min(WARM_UP, s.warm_up)
        for _ in range(updates):
            self.warm_up()
        say("ONE ITERATION OF ALGORITHM 1 (arXiv 2510.01857)")
        say(f"  policy '{s.model}', data '{s.data}', {len(self.experts)} demonstrations")
        say(f"  reward {s.reward}, logit {s.logit}, granularity {s.granularity}; policy loss {s.policy_loss}, "
            f"alpha {s.entropy_coef:g}, gamma {s.gamma:g}")  # fmt: skip
        say(
            f"  The discriminator has had {updates} updates; a run gives it {s.warm_up} before the policy's first step."
        )
        say("  Without any, a likelihood has D = 1/2 everywhere and a head f = 0: nothing to look at.")
        if s.start == "reward":
            say(
                "  A run would now let the policy start as a copy of the reward, at f = log pi; here it stays the base."
            )
        self.speaking = True
        self.step()
        say()
        say("WHAT TRAINING NEVER SAW: the answer check (data.is_correct), asked after the iteration")
        for row in self.rows_of_the_question():
            right = "right" if data.is_correct(self.example, self.text(row)) else "wrong"
            say(f"  row {row:3d}  {right}   sum of r_t {self.shown_rewards[row].sum():8.3f}")

    # -------------------------------------------------------------------------------------------------------------
    # The four stages: the inherited one, and what there is to see of it
    # -------------------------------------------------------------------------------------------------------------

    def rollout(self, questions: list[str], group: int) -> tuple[Rollout, dict]:
        """Stage 1: the question, the tensors and their shapes, the samples of one question."""
        rollout, metrics = super().rollout(questions, group)
        if not self.speaking:
            return rollout, metrics
        self.shown, self.questions = rollout, questions
        self.choose_row()
        batch, row = rollout.batch, self.row
        prompt, length, width = int(batch.prompt_lengths[row]), int(batch.lengths[row]), batch.tokens.shape[1]
        heading("THE QUESTION", f"one of {len(questions)}, with its demonstration")
        say(f"  question   {self.example.question}")
        say(f"  expert     {self.example.trace} -> {self.example.answer}")
        say(f"  prompt     {prompt} tokens: {pieces(self.tokenizer, batch.tokens[row, :prompt].tolist())}")

        heading("1. ROLLOUT", "irl.IRL.rollout, policy.sample")
        say(f"  B = {len(questions)} questions x {group} samples = {len(batch)} rows, T = {width} columns")
        ids = batch.tokens[row, prompt : prompt + 8].tolist()
        shape("tokens", batch.tokens, f"row {row}: its response begins with {ids}")
        shape("prompt_lengths", batch.prompt_lengths, f"row {row}: {prompt}")
        shape("lengths", batch.lengths, f"row {row}: {length}, prompt and response with the end token")
        shape("response_mask", batch.response_mask,
              f"row {row}: 0 x {prompt} (prompt), 1 x {length - prompt} (response), 0 x {width - length} (padding)")  # fmt: skip
        shape("log pi", rollout.logprobs, "of each sampled token, 0 outside the response")
        say(f"  mean length {metrics['length']:.1f}, ended by itself {metrics['finished']:.0%}, "
            f"entropy {metrics['entropy']:.3f} per token")  # fmt: skip
        say(f"  The {group} samples of the question, with log pi of the whole response:")
        for each in self.rows_of_the_question():
            say(f"  row {each:3d}  {float(rollout.logprobs[each].sum()):8.3f}  {self.text(each)}")
        say(f"  Row {row} holds the least expert-like token of all samples for questions with a demonstration: it is")
        say("  followed from here on.")
        return rollout, metrics

    def update_discriminator(self, examples: list[Example], rollout: Rollout, group: int) -> dict:
        """Stage 2: f, its logit and D of an expert's trace and a sample, and what one update does to D and the loss."""
        if not self.speaking:
            return super().update_discriminator(examples, rollout, group)
        s = self.settings
        demonstration = data.demonstration_batch(self.tokenizer, [self.example], self.policy_model.device)
        log_pi = policy.in_chunks(lambda b: policy.token_logprobs(self.policy_model, b, s.temperature), demonstration)
        fresh = [[rollout.batch.response(i * group + g) for g in range(s.rollouts_per_expert)]
                 for i in range(len(examples))]  # fmt: skip
        comparison = reward.compare(self.tokenizer, examples, fresh, s.perturbed, random.Random(0), log_pi.device)
        views = [self.view(demonstration, log_pi), self.view(rollout.batch, rollout.logprobs)]
        before = self.measure(comparison)
        metrics = super().update_discriminator(examples, rollout, group)
        after = self.measure(comparison)
        views_after = [self.view(demonstration, log_pi), self.view(rollout.batch, rollout.logprobs)]

        logit = "f - log pi" if s.logit == "airl" else "f"
        heading("2. DISCRIMINATOR", "irl.IRL.update_discriminator, reward.update")
        sampled = sum(map(len, fresh))
        shape("experts", comparison.expert.tokens, "the demonstrations: label 1")
        shape("negatives", comparison.negative.tokens, f"{sampled} samples of the policy, "
              f"{len(comparison.negative) - sampled} broken demonstrations (from the change on): label 0")  # fmt: skip
        say(f"  f from {type(self.discriminator.reward_model).__name__}.scores, logit D = {logit} "
            "(reward.discriminator_logits), D = sigmoid(logit)")  # fmt: skip
        for name, batch, row, old, new in zip(
            ("The expert's trace", f"The policy's, row {self.row}"), (demonstration, rollout.batch), (0, self.row),
            views, views_after,
        ):  # fmt: skip
            say(f"\n  {name}, before the update; in the last column D after it")
            self.table(batch, row, {"log pi": old[1], "f": old[0], logit: old[2], "D": old[2].sigmoid(),
                                    "D after": new[2].sigmoid()}, old[3])  # fmt: skip
        say(f"\n  updates: {s.discriminator_updates}, rate {rate_of(self.reward_optimizer):.1e}, gradient norm "
            f"{metrics['grad_norm']:.3f}. The comparison above, before and after:")  # fmt: skip
        notes = {"loss": self.loss_name(), "d_expert": "mean D of expert tokens",
                 "d_negative": "mean D of negative tokens", "accuracy": "share on the right side of 1/2"}  # fmt: skip
        for name, note in notes.items():
            say(f"    {name:11s}{before[name]:9.4f} -> {after[name]:9.4f}   {note}")
        return metrics

    def rewards(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Stage 3: from f to r_t to returns to advantages, token by token."""
        rewards, states, metrics = super().rewards(rollout)
        s, batch = self.settings, rollout.batch
        f, log_pi, logits, ends = self.view(batch, rollout.logprobs)
        advantages = self.advantages(batch, rewards, states)
        columns = {"log pi": log_pi, "f": f, "f - log pi" if s.logit == "airl" else "logit": logits,
                   "D": logits.sigmoid(), "r_t": rewards}  # fmt: skip
        if s.policy_loss == "exact":
            columns["E_pi[r]"] = policy.in_chunks(
                lambda b, x: policy.spread(self.expected_reward(b, x), b.response_mask), batch, s.micro_batch, states
            )
        columns |= {"return": policy.returns_to_go(rewards, batch.response_mask, s.gamma), "advantage": advantages}
        self.shown_rewards = rewards

        heading("3. REWARD", "irl.IRL.rewards, reward.Discriminator.token_rewards")
        says = f"r_t = f - {s.entropy_coef:g} log pi" if s.logit == "airl" else "r_t = f"
        says += f", held within +-{s.reward_clip:g}" if s.reward_clip else ""
        shape("rewards", rewards, says + (", f frozen" if s.freeze_reward else ", f as the update has left it"))
        shape("advantages", advantages, self.advantage_name())
        say(f"  mean r_t {metrics['mean']:.4f}; mean over rows of the lowest r_t {metrics['lowest']:.4f}")
        if s.granularity != "dense":
            say(
                f"  {s.granularity}: f and log pi are a segment's, read on its last token; elsewhere r_t is 0, shown as a dot"
            )
        say(f"\n  Row {self.row}; the last line is the end token, which has an f and a reward like any other")
        whole = {"return", "advantage"}  # these two exist on tokens between the scores, too
        self.table(batch, self.row, columns, ends, whole)
        return rewards, states, metrics

    def update_policy(self, rollout: Rollout, rewards: torch.Tensor, states: torch.Tensor) -> dict:
        """Stage 4: the loss, the gradient, and log pi before and after the step."""
        s, batch, row = self.settings, rollout.batch, self.row
        advantages = self.advantages(batch, rewards, states)
        before, actions = self.mean_loss(rollout, advantages, states), self.actions(batch, row)
        metrics = super().update_policy(rollout, rewards, states)
        self.policy_model.eval()
        after = self.mean_loss(rollout, advantages, states)
        new = policy.in_chunks(
            lambda b: policy.token_logprobs(self.policy_model, b, s.temperature), batch, s.micro_batch
        )

        heading("4. POLICY", f"irl.IRL.update_policy, policy loss '{s.policy_loss}'")
        rate = rate_of(self.policy_optimizer)
        say(
            f"  rate {rate:.1e}, {rate / s.policy_lr:.3f} of its peak: the first of {s.max_steps} steps (policy.set_rate)"
        )
        say(f"  loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f} (clipped to 1)")
        say(f"  loss of the whole rollout, per token, before and after: {before:.5f} -> {after:.5f}")
        if s.policy_loss == "ppo":
            say("  Before the step PPO's ratio is 1 and its loss -mean A, close to 0. Its gradient is not.")
        moved = (new - rollout.logprobs)[row].abs()
        columns = {"log pi": rollout.logprobs, "after": new, "change": new - rollout.logprobs, "r_t": rewards,
                   "advantage": advantages}  # fmt: skip
        say(f"\n  Row {row}: the tokens whose log pi moved most")
        most = sorted(moved.topk(min(8, len(moved))).indices.tolist())
        self.table(batch, row, columns, batch.response_mask, only=most)
        if actions is not None:
            self.tell_actions(*actions, self.actions(batch, row)[1])
        return metrics

    # -------------------------------------------------------------------------------------------------------------
    # What the stages' own functions say about the rows shown
    # -------------------------------------------------------------------------------------------------------------

    def view(self, batch: Batch, log_pi: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(f, log pi, logit D, ends), each [B, T], by the functions and in the chunks of training."""
        scores = policy.in_chunks(self.discriminator.reward_model.scores, batch, self.settings.micro_batch)
        f, segment_log_pi, ends = self.discriminator.segments(batch, scores, log_pi)
        logits = self.discriminator.logits(batch, scores, log_pi)
        return f, segment_log_pi, logits, ends

    def choose_row(self) -> None:
        """The row to follow, and its demonstration: that with the lowest logit D, of questions that have one."""
        by_question, batch, group = {e.question: e for e in self.experts}, self.shown.batch, self.settings.group
        known = torch.tensor([question in by_question for question in self.questions]).repeat_interleave(group)
        logits = self.view(batch, self.shown.logprobs)[2].min(1).values.cpu()  # [B]
        self.row = int(logits.masked_fill(~known, torch.inf).argmin())
        self.example = by_question[self.questions[self.row // group]]

    def rows_of_the_question(self) -> range:
        first = self.row // self.settings.group * self.settings.group
        return range(first, first + self.settings.group)

    def text(self, row: int) -> str:
        return data.decode(self.tokenizer, self.shown.batch.response(row))

    def measure(self, comparison: reward.Comparison) -> dict:
        """What `reward.update` says of a comparison, with an optimizer at rate 0: nothing moves."""
        s, model = self.settings, self.discriminator.reward_model
        return reward.update(self.discriminator, policy.make_optimizer(model, 0.0), self.policy_model, comparison,
                             s.discriminator_loss, s.label_smoothing, s.reward_nll, micro_batch=s.micro_batch,
                             temperature=s.temperature)  # fmt: skip

    def mean_loss(self, rollout: Rollout, advantages: torch.Tensor, states: torch.Tensor) -> float:
        """`irl.IRL.policy_loss` over all rows, per response token, as `policy.accumulate` adds it up."""
        s, batch, total = self.settings, rollout.batch, 0.0
        for start in range(0, len(batch), s.micro_batch):
            rows = slice(start, start + s.micro_batch)
            with torch.no_grad():
                loss = self.policy_loss(batch[rows], rollout.logprobs[rows], advantages[rows], states[rows])
            total += float(loss.sum())
        return total / float(batch.response_mask.sum())

    def actions(self, batch: Batch, row: int):
        """(index of the token with the lowest r_t, pi [V], f [V]) at its state; None for a reward that scores only the
        token it has read."""
        if not self.discriminator.reward_model.scores_all_actions:
            return None
        one, first = batch[row : row + 1], int(batch.prompt_lengths[row])
        at = int(self.shown_rewards[row].argmin()) - first

        @torch.no_grad()
        def all_logprobs(model, temperature: float) -> torch.Tensor:
            weight, softcap = logprob.output_layer(model)
            state = policy.choosing_states(model, one)[at : at + 1]  # [1, H]
            return logprob.all_logprobs(state, weight, temperature, softcap)[0]

        pi = all_logprobs(self.policy_model, self.settings.temperature).exp()
        return first + at, pi, all_logprobs(self.discriminator.reward_model.model, 1.0)

    def tell_actions(self, column: int, pi: torch.Tensor, scores: torch.Tensor, pi_after: torch.Tensor) -> None:
        """The likeliest actions at one state, before and after the step."""
        say(f"\n  The state before token {column}, where r_t is lowest: what policy and reward make of every action")
        say(f"      {'action':16s}{'pi':>11s}{'exp f':>11s}{'pi after':>11s}")
        width = min(len(pi), len(scores))
        likeliest = (pi[:width] + scores[:width].exp()).topk(min(4, width)).indices.tolist()
        for token in likeliest:
            mark = "  <- sampled" if token == int(self.shown.batch.tokens[self.row, column]) else ""
            values = "".join(f"{float(x):11.4f}" for x in (pi[token], scores[token].exp(), pi_after[token]))
            say(f"      {piece(self.tokenizer, token):16s}{values}{mark}")

    def loss_name(self) -> str:
        """The discriminator's loss in words."""
        s = self.settings
        name = {"bce": f"cross-entropy, labels {1 - s.label_smoothing / 2:g} and {s.label_smoothing / 2:g}",
                "bt": "Bradley-Terry"}[s.discriminator_loss]  # fmt: skip
        return name + (f", + {s.reward_nll:g} x -log p of the demonstrations"
                       if s.reward_nll and self.discriminator.reward_model.scores_all_actions else "")  # fmt: skip

    def advantage_name(self) -> str:
        """What `irl.IRL.advantages` has done, in words."""
        s = self.settings
        if s.policy_loss == "best":
            return "1 on the sample of its group with the highest mean r_t, 0 on the others"
        if s.policy_loss == "exact":
            return f"gamma G_(t+1), gamma {s.gamma:g}, less its mean in the group; the loss itself sums r_t over all actions"
        return f"return - {s.baseline} baseline, divided by their root mean square"

    def table(self, batch: Batch, row: int, columns: dict[str, torch.Tensor], ends: torch.Tensor,
              whole: set | frozenset = frozenset(), only: list[int] | None = None) -> None:  # fmt: skip
        """One line per response token of a row: column t, token, and each column's value, '.' where nothing is read
        (`ends` 0) unless the column's name is in `whole`. `only`: just these t."""
        first, last = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        shown = [t for t in only if first <= t < last] if only else window(first, last)
        say(f"  {'t':>4s}  {'token':14s}" + "".join(f"{name:>11s}" for name in columns))
        previous = first - 1
        for t in shown:
            if not only and t > previous + 1:
                say(f"  {'...':>4s}  {t - previous - 1} more")
            previous = t
            cells = (float(v[row, t]) if ends[row, t] or name in whole else None for name, v in columns.items())
            numbers = "".join(
                f"{'.' if x is None else format(round(x, 4) + 0.0, '.4f'):>11s}" for x in cells
            )  # no -0.0
            say(f"  {t:4d}  {piece(self.tokenizer, int(batch.tokens[row, t])):14s}{numbers}")


def window(first: int, last: int, most: int = MOST_ROWS) -> list[int]:
    """Which of the columns first .. last - 1 to print: all, or the beginning and the end of a long trace.

    >>> window(5, 9), window(0, 100, 4)
    ([5, 6, 7, 8], [0, 1, 98, 99])
    """
    columns = list(range(first, last))
    return columns if len(columns) <= most else columns[: most // 2] + columns[-(most - most // 2) :]


def piece(tokenizer, token: int, most: int = 13) -> str:
    """A token as a short word without spaces, newlines as \\n; one without text by its name, such as an end token's."""
    text = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)
    text = text.encode("unicode_escape").decode("ascii").replace(" ", "_")
    return text if len(text) <= most else text[: most - 2] + ".."


def pieces(tokenizer, tokens: list[int], most: int = 60) -> str:
    """Token texts with bars between them, cut to `most` characters."""
    text = "|".join(piece(tokenizer, token) for token in tokens)
    return text if len(text) <= most else text[:most] + " .."


def rate_of(optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def shape(name: str, tensor: torch.Tensor, note: str) -> None:
    """One line: a tensor's name, its shape, and what there is to say about it."""
    say(f"  {name:15s}{str(list(tensor.shape)):12s}{note}")


def heading(title: str, functions: str) -> None:
    say(f"\n{title:20s}{functions}")
    say("-" * 100)


def say(line: str = "") -> None:
    """Print one line: a trace's own newlines as bars, folded at WIDTH, in what the terminal's encoding can hold."""
    if line.startswith("\n"):
        print()
    line = line.lstrip("\n").rstrip("\n").replace("\n", " | ")
    encoding = sys.stdout.encoding or "utf-8"
    text = line.encode(encoding, "backslashreplace").decode(encoding)
    print("\n".join(textwrap.wrap(text, WIDTH, subsequent_indent=" " * 13, drop_whitespace=False)))
