"""One iteration of Algorithm 1 (arXiv 2510.01857) in numbers, stage by stage: for the lecture hall.

    python train.py --explain                                      the shipped base, some seconds
    python train.py --explain --reward head --policy-loss ppo      any settings of a run
    python train.py --explain --model DIR --data FILE              any model, any data

Nothing in it trains: `Lecture` is `irl.IRL` with a voice. Each stage is the inherited one, called by the inherited `step`, so
what is shown is what training does: a lecture leaves behind the very weights that a silent iteration would have left, and
writes nothing to runs/.
"""

import random
import textwrap
from dataclasses import replace

import torch

import data
import irl
import policy
import reward
from engine import logprob

WARM_UP = 10  # updates of the discriminator before the lecture: at a fresh reward's D = 1/2 there is nothing to see
WIDTH = 110  # columns of the output
MOST_ROWS = 48  # of a table; a longer trace is shown in part


class Lecture(irl.IRL):
    """irl.IRL that says what each stage sees and makes. `give` runs the lecture."""

    speaking = False  # the warm-up goes through the same stages, silently

    def __post_init__(self):
        self.stands_still = not self.settings.reward_lr  # then one more update of the warm-up is shown
        self.settings = replace(self.settings, reward_lr=self.settings.reward_lr or self.settings.warm_up_lr)
        super().__post_init__()

    def give(self) -> None:
        """Warm up, run one iteration aloud, and tell at last what the answer check would have said."""
        s = self.settings
        self.logit = "f - log pi" if s.logit == "airl" else "logit"  # the name of its column
        updates = min(WARM_UP, s.warm_up)
        for _ in range(updates):
            self.warm_up()
        say("ONE ITERATION OF ALGORITHM 1 (arXiv 2510.01857)",
            f"  policy '{s.model}', data '{s.data}', {len(self.experts)} demonstrations; reward {s.reward}, logit {s.logit}, "
            f"granularity {s.granularity}; policy loss {s.policy_loss}, alpha {s.entropy_coef:g}, gamma {s.gamma:g}",
            f"  The discriminator has had {updates} updates; a run gives it {s.warm_up} before the policy's first step.")
        if self.stands_still:
            say(f"  After those a run's reward stands still (reward_lr 0): the update below is one of them, at {s.reward_lr:g}.")
        if s.start == "reward":
            say("  A run would now let the policy start as a copy of the reward, at f = log pi; here it stays the base.")
        self.speaking = True
        self.step()
        say("", "WHAT TRAINING NEVER SAW: the answer check (data.is_correct), asked after the iteration")
        for row, text in self.texts.items():
            right = "right" if data.is_correct(self.example, text) else "wrong"
            say(f"  row {row:3d}  {right}   sum of r_t {self.shown_rewards[row].sum():8.3f}")

    def rollout(self, questions: list[str], group: int) -> tuple[policy.Rollout, dict]:
        """Stage 1: the question, the tensors and their shapes, the samples of one question."""
        rollout, metrics = super().rollout(questions, group)
        if not self.speaking:
            return rollout, metrics
        # What is followed: the row with the lowest logit D of all whose question has a demonstration
        batch, by_question = rollout.batch, {e.question: e for e in self.experts}
        known = torch.tensor([question in by_question for question in questions]).repeat_interleave(group)
        logits = self.view(batch, rollout.logprobs)[0][self.logit].min(1).values.cpu()  # [B]
        self.row = row = int(logits.masked_fill(~known, torch.inf).argmin())
        self.example, self.shown, first = by_question[questions[row // group]], batch, row - row % group
        self.texts = {each: data.decode(self.tokenizer, batch.response(each)) for each in range(first, first + group)}
        prompt, length, width = int(batch.prompt_lengths[row]), int(batch.lengths[row]), batch.tokens.shape[1]
        heading("THE QUESTION", f"one of {len(questions)}, with its demonstration")
        say(f"  question   {self.example.question}", f"  expert     {self.example.trace} -> {self.example.answer}")
        heading("1. ROLLOUT", "irl.IRL.rollout, policy.sample")
        say(f"  B = {len(questions)} questions x {group} samples = {len(batch)} rows, T = {width} columns")
        shape("tokens", batch.tokens, f"row {row}: its response begins with {batch.tokens[row, prompt : prompt + 8].tolist()}")
        shape("prompt_lengths", batch.prompt_lengths, f"row {row}: {prompt}")
        shape("lengths", batch.lengths, f"row {row}: {length}, prompt and response with the end token")
        parts = f"0 x {prompt} (prompt), 1 x {length - prompt} (response), 0 x {width - length} (padding)"
        shape("response_mask", batch.response_mask, f"row {row}: {parts}")
        shape("log pi", rollout.logprobs, "of each sampled token, 0 outside the response")
        say(f"  The {group} samples of the question, with log pi of the whole response:")
        say(*(f"  row {i:3d}  {float(rollout.logprobs[i].sum()):8.3f}  {text}" for i, text in self.texts.items()))
        say(f"  Row {row}, followed from here on, holds the least expert-like token of all samples with a demonstration.")
        return rollout, metrics

    def update_discriminator(self, examples: list[data.Example], rollout: policy.Rollout, group: int) -> dict:
        """Stage 2: f, its logit and D of an expert's trace and a sample, and what one update does to D and the loss."""
        if not self.speaking:
            return super().update_discriminator(examples, rollout, group)
        s, device = self.settings, self.policy_model.device
        demonstration = data.demonstration_batch(self.tokenizer, [self.example], device)
        log_pi = policy.in_chunks(lambda b: policy.token_logprobs(self.policy_model, b, s.temperature), demonstration)
        traces = [("The expert's trace", demonstration, log_pi, 0),
                  (f"The policy's, row {self.row}", rollout.batch, rollout.logprobs, self.row)]  # fmt: skip
        fresh = [[rollout.batch.response(i * group + g) for g in range(s.rollouts_per_expert)] for i in range(len(examples))]
        comparison = reward.compare(self.tokenizer, examples, fresh, s.perturbed, random.Random(0), device, s.negatives)
        still = policy.make_optimizer(self.discriminator.reward_model, 0.0)  # a rate at which an update only measures
        measure = lambda: reward.update(self.discriminator, still, self.policy_model, comparison, s.label_smoothing,
                                        s.reward_nll, s.micro_batch, s.temperature)  # fmt: skip
        views, before = [self.view(batch, log_pi) for _, batch, log_pi, _ in traces], measure()
        metrics = super().update_discriminator(examples, rollout, group)
        after = measure()
        heading("2. DISCRIMINATOR", "irl.IRL.update_discriminator, reward.update")
        shape("experts", comparison.expert.tokens, "the demonstrations: label 1")
        sampled = sum(map(len, fresh))
        shape("negatives", comparison.negative.tokens, f"label 0: {sampled} samples of the policy, "
              f"{len(comparison.negative) - sampled} broken demonstrations (from the change on)")  # fmt: skip
        say(f"  f from {type(self.discriminator.reward_model).__name__}.scores, logit D = {self.logit.replace('logit', 'f')} "
            "(reward.discriminator_logits), D = sigmoid(logit)")  # fmt: skip
        for (name, batch, log_pi, row), (columns, ends) in zip(traces, views):
            say(f"\n  {name}, before the update; in the last column D after it")
            columns.pop("logit", None)  # GAIL's logit is f
            self.table(batch, row, columns | {"D after": self.view(batch, log_pi)[0]["D"]}, ends)
        say(f"\n  updates: {s.discriminator_updates}, rate {self.reward_optimizer.param_groups[0]['lr']:.1e}, gradient norm "
            f"{metrics['grad_norm']:.3f}. The comparison above, before and after:")  # fmt: skip
        notes = {"loss": "reward.py has its formula", "d_expert": "mean D of expert tokens",
                 "d_negative": "mean D of negative tokens", "accuracy": "share on the right side of 1/2"}  # fmt: skip
        say(*(f"    {name:11s}{before[name]:9.4f} -> {after[name]:9.4f}   {note}" for name, note in notes.items()))
        return metrics

    def rewards(self, rollout: policy.Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Stage 3: from f to r_t to returns to advantages, token by token."""
        rewards, hidden, metrics = super().rewards(rollout)
        s, batch = self.settings, rollout.batch
        self.shown_rewards, self.shown_advantages = rewards, self.advantages(batch, rewards)
        columns, ends = self.view(batch, rollout.logprobs)
        columns["r_t"] = rewards
        if s.policy_loss == "exact":
            expected = lambda b, x: policy.spread(self.expected_reward(b, x), b.response_mask)
            columns["E_pi[r]"] = policy.in_chunks(expected, batch, s.micro_batch, hidden)
        columns["return"] = policy.returns_to_go(rewards, batch.response_mask, s.gamma)
        columns["advantage"] = self.shown_advantages
        heading("3. REWARD", "irl.IRL.rewards, reward.Discriminator.token_rewards")
        says = f"r_t = f - {s.entropy_coef:g} log pi" if s.logit == "airl" else "r_t = f"
        shape("rewards", rewards, says + (f", held within +-{s.reward_clip:g}" if s.reward_clip else ""))
        exact = f"gamma G_(t+1), gamma {s.gamma:g}, less its mean in the group; the loss itself sums r_t over all actions"
        sampled = "return - group baseline, divided by their root mean square"
        shape("advantages", self.shown_advantages, exact if s.policy_loss == "exact" else sampled)
        say(f"  mean r_t {metrics['mean']:.4f}; mean over rows of the lowest r_t {metrics['lowest']:.4f}")
        if s.granularity != "dense":
            say(f"  {s.granularity}: f and log pi are a segment's, read on its last token; elsewhere r_t is 0, shown as a dot")
        say(f"\n  Row {self.row}; the last line is the end token, which has a reward like any other")
        self.table(batch, self.row, columns, ends)
        return rewards, hidden, metrics

    def update_policy(self, rollout: policy.Rollout, rewards: torch.Tensor, reward_hidden: torch.Tensor) -> dict:
        """Stage 4: the loss, the gradient, and log pi before and after the step."""
        s, batch, row = self.settings, rollout.batch, self.row
        first, last = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        lowest = first + int(rewards[row, first:last].argmin())
        pi = self.all_logprobs(self.policy_model, lowest, s.temperature)
        metrics = super().update_policy(rollout, rewards, reward_hidden)
        self.policy_model.eval()
        new = policy.in_chunks(lambda b: policy.token_logprobs(self.policy_model, b, s.temperature), batch, s.micro_batch)
        heading("4. POLICY", f"irl.IRL.update_policy, policy loss '{s.policy_loss}'")
        rate = self.policy_optimizer.param_groups[0]["lr"]
        say(f"  rate {rate:.1e}, {rate / s.policy_lr:.3f} of its peak: the first of {s.max_steps} steps (policy.set_rate)",
            f"  loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f} (clipped to 1)")  # fmt: skip
        change = new - rollout.logprobs
        columns = {"log pi": rollout.logprobs, "after": new, "change": change, "r_t": rewards, "advantage": self.shown_advantages}
        say(f"\n  Row {row}: the tokens whose log pi moved most")
        most = sorted((first + change[row, first:last].abs().topk(min(8, last - first)).indices).tolist())
        self.table(batch, row, columns, batch.response_mask, most)
        if self.discriminator.reward_model.scores_all_actions:
            f = self.all_logprobs(self.discriminator.reward_model.model, lowest, 1.0)
            pi_after = self.all_logprobs(self.policy_model, lowest, s.temperature)
            say(f"\n  The state before token {lowest}, where r_t is lowest: what policy and reward make of every action",
                f"      {'action':16s}{'pi':>11s}{'exp f':>11s}{'pi after':>11s}")  # fmt: skip
            shares = [x[: min(len(pi), len(f))].exp() for x in (pi, f, pi_after)]  # of three: [V]
            for token in (shares[0] + shares[1]).topk(min(4, len(shares[0]))).indices.tolist():
                values = "".join(f"{float(x[token]):11.4f}" for x in shares)
                mark = "  <- sampled" if token == int(batch.tokens[row, lowest]) else ""
                say(f"      {piece(self.tokenizer, token):16s}{values}{mark}")
        return metrics

    def view(self, batch: data.Batch, log_pi: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """({"log pi", "f", its logit, "D"}, where they are read), each [B, T], in the chunks of training."""
        scores = policy.in_chunks(self.discriminator.reward_model.scores, batch, self.settings.micro_batch)
        f, segment_log_pi, ends = self.discriminator.segments(batch, scores, log_pi)
        logits = self.discriminator.logits(batch, scores, log_pi)
        return {"log pi": segment_log_pi, "f": f, self.logit: logits, "D": logits.sigmoid()}, ends

    @torch.no_grad()
    def all_logprobs(self, model, column: int, temperature: float) -> torch.Tensor:
        """A model's log-probability of every action at the state before a token of the row: [V]."""
        one, (weight, softcap) = self.shown[self.row : self.row + 1], logprob.output_layer(model)
        state = policy.hidden_states(model, one)[column - int(one.prompt_lengths)][None]  # [1, H]
        return logprob.all_logprobs(state, weight, temperature, softcap)[0]

    def table(self, batch: data.Batch, row: int, columns: dict[str, torch.Tensor], ends: torch.Tensor, only: list = ()) -> None:
        """One line per response token of a row, or per t in `only`: t, token, and each column's value, '.' where nothing is
        read (`ends` 0), though returns and advantages exist there, too. A long trace has a gap."""
        shown = list(only) or list(range(int(batch.prompt_lengths[row]), int(batch.lengths[row])))
        gap = max(0, len(shown) - MOST_ROWS)
        say(f"  {'t':>4s}  {'token':14s}" + "".join(f"{name:>11s}" for name in columns))
        for t in shown[: MOST_ROWS // 2] + [None] * bool(gap) + shown[MOST_ROWS // 2 + gap :]:
            if t is None:
                say(f"  {'...':>4s}  {gap} more")
                continue
            numbers = ""
            for name, values in columns.items():
                known = ends[row, t] or name in ("return", "advantage")
                numbers += f"{round(float(values[row, t]), 4) + 0.0:11.4f}" if known else f"{'.':>11s}"  # + 0.0: no -0.0
            say(f"  {t:4d}  {piece(self.tokenizer, int(batch.tokens[row, t])):14s}{numbers}")


def piece(tokenizer, token: int, most: int = 13) -> str:
    """A token as a short word without spaces, newlines as \\n; one without text by its name, such as an end token's."""
    text = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)
    text = text.encode("unicode_escape").decode("ascii").replace(" ", "_")
    return text if len(text) <= most else text[: most - 2] + ".."


def shape(name: str, tensor: torch.Tensor, note: str) -> None:
    """One line: a tensor's name, its shape, and what there is to say about it."""
    say(f"  {name:15s}{str(list(tensor.shape)):12s}{note}")


def heading(title: str, functions: str) -> None:
    say(f"\n{title:20s}{functions}", "-" * 100)


def say(*lines: str) -> None:
    """Print lines, folded at WIDTH: newlines at a line's beginning as they are, those of a trace within it as bars."""
    for line in lines:
        print("\n" * line.startswith("\n"), end="")
        line = line.strip("\n").replace("\n", " | ")
        print("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * 13, drop_whitespace=False)))
