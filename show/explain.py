"""One iteration of Algorithm 1 (arXiv 2510.01857) in numbers, stage by stage: for the lecture hall.

    python train.py --explain                                     the shipped base, some seconds
    python train.py --explain --reward head --policy-loss ppo     any settings of a run
    python train.py --explain --model DIR --data FILE             any model, any data

`Lecture` is `irl.IRL` with a voice. Each stage is the inherited one, called by the inherited
`step`, so what is shown is what training does: a lecture leaves behind the very weights that a
silent iteration would have left, and writes nothing to runs/.
"""

import textwrap
from dataclasses import replace

import pandas
import torch

import data
import irl
import logprob
import policy

WARM_UP = 10  # discriminator updates before the lecture: at a fresh reward's D = 1/2 nothing shows
WIDTH = 110  # columns of the output
MOST_ROWS = 48  # of a table; a longer trace is shown in part


class Lecture(irl.IRL):
    """irl.IRL that says what each stage sees and makes. `give` runs the lecture."""

    speaking = False  # the warm-up goes through the same stages, silently

    def give(self) -> None:
        """Warm up, run one iteration aloud, then tell what the answer check would have said."""
        s = self.settings
        n_updates = min(WARM_UP, s.warm_up)
        for _ in range(n_updates):
            self.warm_up()
        say(
            "ONE ITERATION OF ALGORITHM 1 (arXiv 2510.01857)",
            f"  policy '{s.model}', data '{s.data}', {len(self.experts)} demonstrations; reward "
            f"{s.reward}, logit {s.logit}, granularity {s.granularity}; policy loss "
            f"{s.policy_loss}, alpha {s.entropy_coef:g}, gamma {s.gamma:g}",
            f"  The discriminator has had {n_updates} updates; a run gives it {s.warm_up} before "
            "the policy's first step.",
        )
        if s.start == "reward":
            say("  A run would now let the policy start as a copy of the reward, at f = log pi.")
        # After its warm-up a run's reward may stand still. Then one more of those updates is shown.
        if not s.reward_lr:
            say(f"  The reward would now stand still: one more update of it, at {s.warm_up_lr:g}.")
            self.settings = replace(s, reward_lr=s.warm_up_lr)
        self.speaking = True
        self.step()
        heading("WHAT TRAINING NEVER SAW", "data.is_correct, asked after the iteration")
        for row, text in self.texts.items():
            verdict = "right" if data.is_correct(self.example, text) else "wrong"
            total = float(self.shown_rewards[row].sum())
            say(f"  row {row:3d}  {verdict}   sum of r_t {total:8.3f}")

    # The four stages, aloud ----------------------------------------------------------------------

    def rollout(self, questions: list[data.Example], group: int) -> tuple[policy.Rollout, dict]:
        """Stage 1: the question, the tensors and their shapes, the samples of one question."""
        rollout, metrics = super().rollout(questions, group)
        if not self.speaking:
            return rollout, metrics
        batch = rollout.batch
        # The row to follow: of the questions with a demonstration, the one with the lowest logit.
        demonstrations = {expert.question: expert for expert in self.experts}
        known = torch.tensor([question.question in demonstrations for question in questions])
        logits = self.view(batch, rollout.logprobs)["logit"].nan_to_num(torch.inf).cpu()
        lowest = logits.amin(1).masked_fill(~known.repeat_interleave(group), torch.inf)  # [B]
        self.row = int(lowest.argmin())
        self.example = demonstrations[questions[self.row // group].question]
        first_row = self.row - self.row % group
        self.texts = {}
        for row in range(first_row, first_row + group):
            self.texts[row] = data.decode(self.tokenizer, batch.response(row))

        heading("THE QUESTION", f"one of {len(questions)}, with its demonstration")
        say(
            f"  question   {self.example.question}",
            f"  expert     {self.example.trace} -> {self.example.answer}",
        )
        heading("1. ROLLOUT", "irl.IRL.rollout, policy.sample")
        prompt = int(batch.prompt_lengths[self.row])
        length = int(batch.lengths[self.row])
        n_rows, width = batch.tokens.shape
        say(
            f"  B = {len(questions)} questions x {group} samples = {n_rows} rows; T = {width}",
            "  tokens, response_mask, log pi: [B, T]; prompt_lengths, lengths: [B]",
            f"  response_mask of row {self.row}: 0 x {prompt} (prompt), 1 x {length - prompt} "
            f"(response with its end token), 0 x {width - length} (padding)",
            "  The samples of the question, with log pi of the whole response:",
        )
        for row, text in self.texts.items():
            say(f"  row {row:3d}  {float(rollout.logprobs[row].sum()):8.3f}  {text}")
        say(f"  Row {self.row} holds the least expert-like token. It is followed from here on.")
        return rollout, metrics

    def update_discriminator(
        self, examples: list[data.Example], rollout: policy.Rollout, group: int
    ) -> dict:
        """Stage 2: f, its logit and D of an expert's trace and a sample, before and after."""
        if not self.speaking:
            return super().update_discriminator(examples, rollout, group)
        demonstration = data.demonstration_batch([self.example], self.policy_model.device)
        log_pi = policy.token_logprobs(self.policy_model, demonstration).detach()
        traces = {
            "The expert's trace": (demonstration, log_pi, 0),
            f"The policy's, row {self.row}": (rollout.batch, rollout.logprobs, self.row),
        }
        before = [self.view(batch, log_pi) for batch, log_pi, _ in traces.values()]
        heading("2. DISCRIMINATOR", "irl.IRL.update_discriminator, reward.compare")
        metrics = super().update_discriminator(examples, rollout, group)
        s = self.settings
        formula = "f - log pi" if s.logit == "airl" else "f"
        say(
            f"  f is {type(self.reward_model).__name__}.scores; logit D = {formula} "
            "(reward.discriminator_logits); D = sigmoid(logit)",
            f"  Each demonstration (label 1) against {s.rollouts_per_expert} samples and "
            f"{s.perturbed} broken copies of itself, which count from the change on (label 0).",
            f"  Before the update: loss {metrics['loss']:.4f}, right on {metrics['accuracy']:.4f} "
            f"of the tokens; mean D of experts {metrics['d_expert']:.4f}, of negatives "
            f"{metrics['d_negative']:.4f}; gradient norm {metrics['grad_norm']:.3f}",
        )
        for columns, (name, (batch, log_pi, row)) in zip(before, traces.items()):
            say(f"\n  {name}, before the update; in the last column D after it")
            columns["D after"] = self.view(batch, log_pi)["D"]
            self.table(batch, row, columns)
        return metrics

    def rewards(self, rollout: policy.Rollout) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Stage 3: from f to r_t to returns to advantages, token by token."""
        rewards, states, metrics = super().rewards(rollout)
        s = self.settings
        batch = rollout.batch
        self.shown_rewards = rewards
        columns = self.view(batch, rollout.logprobs)
        # Where no score is read r_t is 0, and says nothing. Returns and advantages do.
        columns["r_t"] = rewards.masked_fill(columns["f"].isnan(), torch.nan)
        columns["return"] = policy.returns_to_go(rewards, batch.response_mask, s.gamma)
        columns["advantage"] = self.advantages(batch, rewards)
        del columns["D"]
        heading(
            "3. REWARD", "irl.IRL.rewards, reward.Discriminator.token_rewards, irl.IRL.advantages"
        )
        formula = f"f - {s.entropy_coef:g} log pi" if s.logit == "airl" else "f"
        say(
            f"  r_t = {formula}; return G_t = r_t + {s.gamma:g} G_(t+1); advantage: the return, or "
            "with the exact loss what follows r_t, less that of the question's other samples",
            f"  mean r_t {metrics['mean']:.4f}",
            f"\n  Row {self.row}; its last token is the end token, with a reward like any other",
        )
        self.table(batch, self.row, columns)
        return rewards, states, metrics

    def update_policy(
        self, rollout: policy.Rollout, rewards: torch.Tensor, reward_states: torch.Tensor
    ) -> dict:
        """Stage 4: the loss, the gradient, and the actions at the worst token's state."""
        s = self.settings
        batch = rollout.batch[self.row : self.row + 1]
        first = int(batch.prompt_lengths)
        column = first + int(rewards[self.row, first : int(batch.lengths)].argmin())
        token = int(batch.tokens[0, column])
        before = self.all_logprobs(self.policy_model, batch, column)  # [V]
        metrics = super().update_policy(rollout, rewards, reward_states)
        after = self.all_logprobs(self.policy_model, batch, column)
        heading("4. POLICY", f"irl.IRL.update_policy, policy loss '{s.policy_loss}'")
        rate = self.policy_optimizer.param_groups[0]["lr"]
        say(
            f"  loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f} (clipped to "
            f"1), rate {rate:.1e}: the first of {s.max_steps} steps",
            f"  Token {column}, {piece(self.tokenizer, token)}, has row {self.row}'s lowest r_t, "
            f"{float(rewards[self.row, column]):.4f}: its log pi {float(before[token]):.4f} -> "
            f"{float(after[token]):.4f}",
        )
        if self.reward_model.scores_all_actions:
            f = self.all_logprobs(self.reward_model.model, batch, column)  # [V]
            size = min(len(before), len(f))  # matrices may be padded differently
            expected = logprob.expectation(before[None, :size], f[None, :size], s.entropy_coef)
            actions = (before[:size].exp() + f[:size].exp()).topk(4).indices.tolist()
            say(
                "\n  The state before it: what policy and reward make of the likeliest actions. "
                f"Over all actions E_pi[r] = {float(expected):.4f} (logprob.expectation)"
            )
            columns = {"pi": before, "exp f": f, "pi after": after}
            cells: dict = {"action": [piece(self.tokenizer, action) for action in actions]}
            cells |= {name: values.exp()[actions].tolist() for name, values in columns.items()}
            show_table(cells)
        return metrics

    # What they show ------------------------------------------------------------------------------

    def view(self, batch: data.Batch, log_pi: torch.Tensor) -> dict[str, torch.Tensor]:
        """log pi, f, its logit and D, each [B, T]; NaN where no score is read."""
        scores = policy.in_chunks(self.reward_model.scores, batch, self.settings.micro_batch)
        f, segment_log_pi, read = self.discriminator.segments(batch, scores, log_pi)
        logits = self.discriminator.logits(batch, scores, log_pi)
        columns = {"log pi": segment_log_pi, "f": f, "logit": logits, "D": logits.sigmoid()}
        return {name: x.masked_fill(read == 0, torch.nan) for name, x in columns.items()}

    @torch.no_grad()
    def all_logprobs(self, model, batch: data.Batch, column: int) -> torch.Tensor:
        """A model's log-probability of every action at the state before a token: [V]."""
        model.eval()
        weight, softcap = logprob.output_layer(model)
        states = policy.hidden_states(model, batch)  # [N, H]
        state = states[column - int(batch.prompt_lengths)][None]  # [1, H]
        return logprob.all_logprobs(state, weight, 1.0, softcap)[0]

    def table(self, batch: data.Batch, row: int, columns: dict[str, torch.Tensor]) -> None:
        """One line per response token of a row: t, token, each column's value."""
        tokens = batch.response(row)
        first = int(batch.prompt_lengths[row])
        end = first + len(tokens)
        cells = {"t": range(first, end), "token": [piece(self.tokenizer, one) for one in tokens]}
        show_table(cells | {name: x[row, first:end].tolist() for name, x in columns.items()})


def show_table(cells: dict) -> None:
    """Print columns of cells; '.' stands where there is no number."""
    frame = pandas.DataFrame(cells).round(4).replace(-0.0, 0.0)
    print(frame.to_string(index=False, na_rep=".", max_rows=MOST_ROWS, float_format="%.4f"))


def piece(tokenizer, token: int, most: int = 13) -> str:
    """A token as a short word without spaces; one without text, such as an end token, by name."""
    text = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)
    text = text.encode("unicode_escape").decode("ascii").replace(" ", "_")
    return text if len(text) <= most else text[: most - 2] + ".."


def heading(title: str, functions: str) -> None:
    say(f"\n{title:26s}{functions}", "-" * 100)


def say(*lines: str) -> None:
    """Print lines, folded at WIDTH. A newline at the beginning stays; in a trace it is a bar."""
    for line in lines:
        if line.startswith("\n"):
            print()
        line = line.strip("\n").replace("\n", " | ")
        print(textwrap.fill(line, WIDTH, subsequent_indent=" " * 13, drop_whitespace=False))
