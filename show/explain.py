"""One iteration of Algorithm 1 (arXiv 2510.01857) in numbers, stage by stage: for the lecture hall.

    python train.py --explain                                     the shipped base, some seconds
    python train.py --explain --reward head --policy-loss ppo     any settings of a run
    python train.py --explain --model DIR --data FILE             any model, any data

Nothing in it trains: `Lecture` is `irl.IRL` with a voice. Each stage is the inherited one, called
by the inherited `step`, so what is shown is what training does: a lecture leaves behind the very
weights that a silent iteration would have left, and writes nothing to runs/.
"""

import random
import textwrap
from dataclasses import replace

import torch

import data
import irl
import logprob
import policy
import reward

WARM_UP = 10  # discriminator updates before the lecture: at a fresh reward's D = 1/2 nothing shows
WIDTH = 110  # columns of the output
MOST_ROWS = 48  # of a table; a longer trace is shown in part


class Lecture(irl.IRL):
    """irl.IRL that says what each stage sees and makes. `give` runs the lecture."""

    speaking = False  # the warm-up goes through the same stages, silently

    def __post_init__(self):
        s = self.settings
        self.stands_still = not s.reward_lr
        if self.stands_still:  # then one more update of the warm-up is shown
            self.settings = replace(s, reward_lr=s.warm_up_lr)
        super().__post_init__()

    def give(self) -> None:
        """Warm up, run one iteration aloud, then tell what the answer check would have said."""
        s = self.settings
        self.logit_column = "f - log pi"
        if s.logit == "gail":
            self.logit_column = "logit"
        n_updates = min(WARM_UP, s.warm_up)
        for _ in range(n_updates):
            self.warm_up()
        say(
            "ONE ITERATION OF ALGORITHM 1 (arXiv 2510.01857)",
            f"  policy '{s.model}', data '{s.data}', {len(self.experts)} demonstrations; "
            f"reward {s.reward}, logit {s.logit}, granularity {s.granularity}; "
            f"policy loss {s.policy_loss}, alpha {s.entropy_coef:g}, gamma {s.gamma:g}",
            f"  The discriminator has had {n_updates} updates; a run gives it {s.warm_up} before "
            "the policy's first step.",
        )
        if self.stands_still:
            say(
                "  After those a run's reward stands still (reward_lr 0): the update below is one "
                f"of them, at {s.reward_lr:g}."
            )
        if s.start == "reward":
            say(
                "  A run would now let the policy start as a copy of the reward, at f = log pi; "
                "here it stays the base."
            )
        self.speaking = True
        self.step()
        say(
            "",
            "WHAT TRAINING NEVER SAW: the answer check (data.is_correct), asked after the iteration",
        )
        for row, text in self.texts.items():
            verdict = "wrong"
            if data.is_correct(self.example, text):
                verdict = "right"
            total = float(self.shown_rewards[row].sum())
            say(f"  row {row:3d}  {verdict}   sum of r_t {total:8.3f}")

    # The four stages, aloud ----------------------------------------------------------------------

    def rollout(self, questions: list[data.Example], group: int) -> tuple[policy.Rollout, dict]:
        """Stage 1: the question, the tensors and their shapes, the samples of one question."""
        rollout, metrics = super().rollout(questions, group)
        if not self.speaking:
            return rollout, metrics
        batch = rollout.batch
        self.follow_a_row(rollout, questions, group)
        row = self.row
        prompt = int(batch.prompt_lengths[row])
        length = int(batch.lengths[row])
        width = batch.tokens.shape[1]

        heading("THE QUESTION", f"one of {len(questions)}, with its demonstration")
        say(
            f"  question   {self.example.question}",
            f"  expert     {self.example.trace} -> {self.example.answer}",
        )
        heading("1. ROLLOUT", "irl.IRL.rollout, policy.sample")
        say(
            f"  B = {len(questions)} questions x {group} samples = {len(batch)} rows, "
            f"T = {width} columns"
        )
        beginning = batch.tokens[row, prompt : prompt + 8].tolist()
        shape("tokens", batch.tokens, f"row {row}: its response begins with {beginning}")
        shape("prompt_lengths", batch.prompt_lengths, f"row {row}: {prompt}")
        note = f"row {row}: {length}, prompt and response with the end token"
        shape("lengths", batch.lengths, note)
        parts = (
            f"0 x {prompt} (prompt), 1 x {length - prompt} (response), "
            f"0 x {width - length} (padding)"
        )
        shape("response_mask", batch.response_mask, f"row {row}: {parts}")
        shape("log pi", rollout.logprobs, "of each sampled token, 0 outside the response")
        say(f"  The {group} samples of the question, with log pi of the whole response:")
        for i, text in self.texts.items():
            say(f"  row {i:3d}  {float(rollout.logprobs[i].sum()):8.3f}  {text}")
        say(
            f"  Row {row}, followed from here on, holds the least expert-like token of all samples "
            "with a demonstration."
        )
        return rollout, metrics

    def follow_a_row(
        self, rollout: policy.Rollout, questions: list[data.Example], group: int
    ) -> None:
        """Choose the row to follow: of the questions with a demonstration, the lowest logit D."""
        batch = rollout.batch
        demonstrations = {e.question: e for e in self.experts}
        known = torch.tensor([q.question in demonstrations for q in questions])
        known = known.repeat_interleave(group)  # [B]
        columns, _ = self.view(batch, rollout.logprobs)
        lowest = columns[self.logit_column].min(1).values.cpu()  # [B]
        self.row = int(lowest.masked_fill(~known, torch.inf).argmin())
        self.example = demonstrations[questions[self.row // group].question]
        self.shown = batch
        first = self.row - self.row % group
        self.texts = {}
        for row in range(first, first + group):
            self.texts[row] = data.decode(self.tokenizer, batch.response(row))

    def update_discriminator(
        self, examples: list[data.Example], rollout: policy.Rollout, group: int
    ) -> dict:
        """Stage 2: f, its logit and D of an expert's trace and a sample; what one update does."""
        if not self.speaking:
            return super().update_discriminator(examples, rollout, group)
        s = self.settings
        demonstration = data.demonstration_batch([self.example], self.policy_model.device)

        def log_pi_of(batch):
            return policy.token_logprobs(self.policy_model, batch, s.temperature)

        traces = [
            ("The expert's trace", demonstration, policy.in_chunks(log_pi_of, demonstration), 0),
            (f"The policy's, row {self.row}", rollout.batch, rollout.logprobs, self.row),
        ]
        samples = []
        for i in range(len(examples)):
            rows = range(i * group, i * group + s.rollouts_per_expert)
            samples.append([rollout.batch.response(row) for row in rows])
        comparison = reward.compare(
            self.tokenizer,
            examples,
            samples,
            s.perturbed,
            random.Random(0),
            self.policy_model.device,
            s.negatives,
        )
        views = [self.view(batch, log_pi) for _, batch, log_pi, _ in traces]
        before = self.measure(comparison)
        metrics = super().update_discriminator(examples, rollout, group)
        after = self.measure(comparison)

        heading("2. DISCRIMINATOR", "irl.IRL.update_discriminator, discriminator_step")
        is_expert = comparison.kinds == reward.EXPERT
        shape("experts", comparison[is_expert].batch.tokens, "the demonstrations: label 1")
        n_sampled = sum(len(responses) for responses in samples)
        n_broken = int((~is_expert).sum()) - n_sampled
        note = (
            f"label 0: {n_sampled} samples of the policy, {n_broken} broken demonstrations "
            "(from the change on)"
        )
        shape("negatives", comparison[~is_expert].batch.tokens, note)
        logit = self.logit_column.replace("logit", "f")
        say(
            f"  f from {type(self.reward_model).__name__}.scores, logit D = {logit} "
            "(reward.discriminator_logits), D = sigmoid(logit)"
        )
        for (name, batch, log_pi, row), (columns, score_mask) in zip(traces, views):
            say(f"\n  {name}, before the update; in the last column D after it")
            columns.pop("logit", None)  # GAIL's logit is f
            columns["D after"] = self.view(batch, log_pi)[0]["D"]
            self.table(batch, row, columns, score_mask)
        rate = self.reward_optimizer.param_groups[0]["lr"]
        say(
            f"\n  updates: {s.discriminator_updates}, rate {rate:.1e}, gradient norm "
            f"{metrics['grad_norm']:.3f}. The comparison above, before and after:"
        )
        notes = {
            "loss": "reward.py has its formula",
            "d_expert": "mean D of expert tokens",
            "d_negative": "mean D of negative tokens",
            "accuracy": "share on the right side of 1/2",
        }
        for name, note in notes.items():
            say(f"    {name:11s}{before[name]:9.4f} -> {after[name]:9.4f}   {note}")
        return metrics

    def measure(self, comparison: reward.Comparison) -> dict:
        """The discriminator's metrics on a comparison: a step at rate 0, which moves nothing."""
        optimizer = self.reward_optimizer
        self.reward_optimizer = policy.make_optimizer(self.reward_model, 0.0)
        metrics = self.discriminator_step(comparison)
        self.reward_optimizer = optimizer
        return metrics

    def rewards(self, rollout: policy.Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Stage 3: from f to r_t to returns to advantages, token by token."""
        rewards, states, metrics = super().rewards(rollout)
        s = self.settings
        batch = rollout.batch
        self.shown_rewards = rewards
        self.shown_advantages = self.advantages(batch, rewards)
        columns, score_mask = self.view(batch, rollout.logprobs)
        columns["r_t"] = rewards
        if s.policy_loss == "exact":
            columns["E_pi[r]"] = policy.in_chunks(
                self.expected_reward, batch, s.micro_batch, 0, states
            )
        columns["return"] = policy.returns_to_go(rewards, batch.response_mask, s.gamma)
        columns["advantage"] = self.shown_advantages

        heading("3. REWARD", "irl.IRL.rewards, reward.Discriminator.token_rewards")
        note = "r_t = f"
        if s.logit == "airl":
            note = f"r_t = f - {s.entropy_coef:g} log pi"
        if s.reward_clip:
            note += f", held within +-{s.reward_clip:g}"
        shape("rewards", rewards, note)
        note = "return - group baseline, divided by their root mean square"
        if s.policy_loss == "exact":
            note = (
                f"gamma G_(t+1), gamma {s.gamma:g}, less its mean in the group; the loss itself "
                "sums r_t over all actions"
            )
        shape("advantages", self.shown_advantages, note)
        say(f"  mean r_t {metrics['mean']:.4f}")
        if s.granularity != "dense":
            say(
                f"  {s.granularity}: f and log pi are a segment's, read on its last token; "
                "elsewhere r_t is 0, shown as a dot"
            )
        say(
            f"\n  Row {self.row}; the last line is the end token, which has a reward like any other"
        )
        self.table(batch, self.row, columns, score_mask)
        return rewards, states, metrics

    def update_policy(
        self, rollout: policy.Rollout, rewards: torch.Tensor, reward_states: torch.Tensor
    ) -> dict:
        """Stage 4: the loss, the gradient, and log pi before and after the step."""
        s = self.settings
        batch = rollout.batch
        row = self.row
        first = int(batch.prompt_lengths[row])
        last = int(batch.lengths[row])
        lowest = first + int(rewards[row, first:last].argmin())
        pi_before = self.all_logprobs(self.policy_model, lowest, s.temperature)
        metrics = super().update_policy(rollout, rewards, reward_states)
        self.policy_model.eval()

        def log_pi_of(part):
            return policy.token_logprobs(self.policy_model, part, s.temperature)

        after = policy.in_chunks(log_pi_of, batch, s.micro_batch)
        change = after - rollout.logprobs

        heading("4. POLICY", f"irl.IRL.update_policy, policy loss '{s.policy_loss}'")
        rate = self.policy_optimizer.param_groups[0]["lr"]
        say(
            f"  rate {rate:.1e}, {rate / s.policy_lr:.3f} of its peak: the first of {s.max_steps} "
            "steps (policy.set_rate)",
            f"  loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f} (clipped to 1)",
        )
        columns = {
            "log pi": rollout.logprobs,
            "after": after,
            "change": change,
            "r_t": rewards,
            "advantage": self.shown_advantages,
        }
        say(f"\n  Row {row}: the tokens whose log pi moved most")
        moved_most = change[row, first:last].abs().topk(min(8, last - first)).indices
        self.table(batch, row, columns, batch.response_mask, sorted((first + moved_most).tolist()))
        if self.reward_model.scores_all_actions:
            self.show_actions(lowest, pi_before)
        return metrics

    def show_actions(self, column: int, pi_before: torch.Tensor) -> None:
        """What policy and reward make of the likeliest actions at one state of the row."""
        f = self.all_logprobs(self.reward_model.model, column, 1.0)
        pi_after = self.all_logprobs(self.policy_model, column, self.settings.temperature)
        say(
            f"\n  The state before token {column}, where r_t is lowest: what policy and reward make "
            "of every action",
            f"      {'action':16s}{'pi':>11s}{'exp f':>11s}{'pi after':>11s}",
        )
        size = min(len(pi_before), len(f))  # matrices may be padded differently
        shares = [x[:size].exp() for x in (pi_before, f, pi_after)]  # [V] each
        likeliest = (shares[0] + shares[1]).topk(min(4, size)).indices
        for token in likeliest.tolist():
            values = "".join(f"{float(x[token]):11.4f}" for x in shares)
            mark = ""
            if token == int(self.shown.tokens[self.row, column]):
                mark = "  <- sampled"
            say(f"      {piece(self.tokenizer, token):16s}{values}{mark}")

    # What they show ------------------------------------------------------------------------------

    def view(
        self, batch: data.Batch, log_pi: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """({"log pi", "f", its logit, "D"}, where they are read), each [B, T]."""
        scores = policy.in_chunks(self.reward_model.scores, batch, self.settings.micro_batch)
        f, segment_log_pi, score_mask = self.discriminator.segments(batch, scores, log_pi)
        logits = self.discriminator.logits(batch, scores, log_pi)
        columns = {"log pi": segment_log_pi, "f": f}
        columns[self.logit_column] = logits
        columns["D"] = logits.sigmoid()
        return columns, score_mask

    def expected_reward(self, batch: data.Batch, states: torch.Tensor) -> torch.Tensor:
        """E_{a~pi}[f(s_t,a) - alpha log pi(a|s_t)] at each response token: [B, T]."""
        s = self.settings
        mask = batch.response_mask
        weight, softcap = logprob.output_layer(self.policy_model)
        reward_weight, _ = logprob.output_layer(self.reward_model.model)
        hidden = policy.hidden_states(self.policy_model, batch)  # [N, H]
        log_pi = logprob.all_logprobs(hidden, weight, s.temperature, softcap)  # [N, V]
        f = logprob.all_logprobs(states[mask.bool()], reward_weight, 1.0, softcap)
        return policy.spread(logprob.expectation(log_pi, f, s.entropy_coef), mask)

    @torch.no_grad()
    def all_logprobs(self, model, column: int, temperature: float) -> torch.Tensor:
        """A model's log-probability of every action at the state before a token of the row: [V]."""
        one = self.shown[self.row : self.row + 1]
        weight, softcap = logprob.output_layer(model)
        states = policy.hidden_states(model, one)  # [N, H]
        state = states[column - int(one.prompt_lengths)][None]  # [1, H]
        return logprob.all_logprobs(state, weight, temperature, softcap)[0]

    def table(
        self,
        batch: data.Batch,
        row: int,
        columns: dict[str, torch.Tensor],
        score_mask: torch.Tensor,
        only: list[int] | None = None,
    ) -> None:
        """One line per response token of a row, or per t in `only`: t, token, each column's value.

        '.' stands where no score is read, though returns and advantages exist there, too. A long
        trace has a gap.
        """
        shown = only
        if shown is None:
            shown = list(range(int(batch.prompt_lengths[row]), int(batch.lengths[row])))
        gap = max(0, len(shown) - MOST_ROWS)
        say(f"  {'t':>4s}  {'token':14s}" + "".join(f"{name:>11s}" for name in columns))
        for place, t in enumerate(shown):
            if gap and place == MOST_ROWS // 2:
                say(f"  {'...':>4s}  {gap} more")
            if MOST_ROWS // 2 <= place < MOST_ROWS // 2 + gap:
                continue
            numbers = ""
            for name, values in columns.items():
                if score_mask[row, t] or name in ("return", "advantage"):
                    value = round(float(values[row, t]), 4) + 0.0  # + 0.0: no -0.0
                    numbers += f"{value:11.4f}"
                else:
                    numbers += f"{'.':>11s}"
            say(f"  {t:4d}  {piece(self.tokenizer, int(batch.tokens[row, t])):14s}{numbers}")


def piece(tokenizer, token: int, most: int = 13) -> str:
    """A token as a short word without spaces; one without text, such as an end token, by its name."""
    text = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)
    text = text.encode("unicode_escape").decode("ascii").replace(" ", "_")
    if len(text) > most:
        return text[: most - 2] + ".."
    return text


def shape(name: str, tensor: torch.Tensor, note: str) -> None:
    """One line: a tensor's name, its shape, and what there is to say about it."""
    say(f"  {name:15s}{str(list(tensor.shape)):12s}{note}")


def heading(title: str, functions: str) -> None:
    say(f"\n{title:20s}{functions}", "-" * 100)


def say(*lines: str) -> None:
    """Print lines, folded at WIDTH.

    Newlines at a line's beginning stay as they are; those of a trace within it become bars.
    """
    for line in lines:
        if line.startswith("\n"):
            print()
        line = line.strip("\n").replace("\n", " | ")
        folded = textwrap.wrap(line, WIDTH, subsequent_indent=" " * 13, drop_whitespace=False)
        print("\n".join(folded))
