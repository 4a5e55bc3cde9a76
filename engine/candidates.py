"""Candidates: n responses to each of some questions, and what each model says about every token of them.

rerank.py chooses among them and looks for their first errors; show/tables.py takes some of them to the report.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

import data
import policy
import reward
from data import Batch, Example
from engine.errors import UserError
from tasks.answers import extract_answer

Reading = tuple[torch.Tensor, torch.Tensor]  # a model's values [B, T], and 1 on the tokens of which it says one [B, T]


@dataclass
class Candidates:
    """n responses to each question: consecutive rows of batch, which stays on the CPU, and of texts."""

    examples: list[Example]
    batch: Batch
    texts: list[str]
    n: int
    logprobs: torch.Tensor | None = None  # of those that were sampled here: log pi of each token [B, T]
    finished: torch.Tensor | None = None  # whether each ended by itself [B]; None: nobody knows, all count as ended

    @cached_property
    def answers(self) -> list[list[str | None]]:
        """The answer of each response: Q lists of n."""
        found = [extract_answer(text) for text in self.texts]
        return [found[i : i + self.n] for i in range(0, len(found), self.n)]

    @cached_property
    def correct(self) -> torch.Tensor:
        """[Q, n] float, 1 where the answer is right. The verifier: for evaluation only."""
        right = [data.is_correct(self.examples[i // self.n], text) for i, text in enumerate(self.texts)]
        return torch.tensor(right, dtype=torch.float).view(-1, self.n)


def collect(model, tokenizer, examples: list[Example], n: int, max_new_tokens: int, temperature: float = 1.0,
            generator: torch.Generator | None = None, rows: int = 512, prompts=None) -> Candidates:  # fmt: skip
    """Sample n candidates for each example's question, at most `rows` at a time, asked with `prompts` (data.prompt_ids)."""
    prompts = prompts or [data.prompt_ids(tokenizer, example.question) for example in examples]
    rollout = policy.sample(model, prompts, data.end_tokens(tokenizer, model), max_new_tokens, group=n,
                            temperature=temperature, generator=generator, rows=rows)  # fmt: skip
    batch = rollout.batch.to("cpu")
    texts = [data.decode(tokenizer, batch.response(row)) for row in range(len(batch))]
    return Candidates(examples, batch, texts, n, rollout.logprobs.cpu(), rollout.finished.cpu())


def from_texts(tokenizer, examples: list[Example], texts: list[str], n: int, context: int | None = None) -> Candidates:
    """Candidates that somebody else wrote, each up to its first end token. UserError if one is, with its question, longer than
    the models' context.

    A text seldom holds its end token. One that leaves a tag open was cut off, and gets none; any other is taken to have
    ended by itself, and gets one."""
    whole = [has_ended(tokenizer, text) for text in texts]
    texts = [data.until_end(tokenizer, text) for text in texts]
    prompts = [data.prompt_ids(tokenizer, example.question) for example in examples for _ in range(n)]
    responses = []
    for text, ended in zip(texts, whole):
        ids = data.response_ids(tokenizer, text)
        responses.append(ids if ended else ids[:-1])
    batch = data.make_batch(prompts, responses)
    for row, length in enumerate(batch.lengths.tolist()):
        if context is not None and length > context:
            raise UserError(f"candidate {row % n + 1} of question {row // n + 1} is {length} tokens long with its question, "
                            f"but the models read at most {context}")  # fmt: skip
    return Candidates(examples, batch, texts, n, finished=torch.tensor(whole, dtype=torch.bool))


def has_ended(tokenizer, text: str) -> bool:
    """Whether a response ended by itself, as far as its text tells: an end token is written out in it, or no <think> or
    <answer> is left open."""
    if data.until_end(tokenizer, text) != text:
        return True
    return all(text.rfind(f"<{tag}>") <= text.rfind(f"</{tag}>") for tag in ("think", "answer"))


@torch.no_grad()
def signals(batch: Batch, discriminator, policy_model, judges: dict | None = None) -> dict[str, Reading]:
    """What each model says about the response tokens: {name: its reading}, on the CPU.

    logprob      log pi(a_t|s_t) of the policy that wrote them; under their names, of the models in `judges`
    entropy      of that policy's choice of token t
    reward       f, where the discriminator (if any) reads it; a likelihood's is summed over its segment, as in training
    """

    def read(name: str, model, function, where=batch.response_mask) -> Reading:
        model.eval()
        values = policy.in_chunks(lambda part: function(model, part.to(model.device)).cpu(), batch)
        if not values.isfinite().all():
            raise UserError(f"the {name} of some token is not a finite number: the weights have diverged")
        return values, where

    def f(_, part: Batch) -> torch.Tensor:  # [B', T]
        scores = discriminator.reward_model.scores(part)
        segments, _, ends = discriminator.segments(part, scores, torch.zeros_like(scores))  # f asks no policy
        return segments * ends

    models = {"logprob": policy_model} | (judges or {})
    found = {name: read(name, model, policy.token_logprobs) for name, model in models.items()}
    found["entropy"] = read("entropy", policy_model, policy.token_entropies)
    if discriminator is not None:
        found["reward"] = read("reward", discriminator.reward_model.model, f, reward_ends(batch, discriminator))
    return found


def reward_ends(batch: Batch, discriminator: reward.Discriminator) -> torch.Tensor:
    """[B, T], 1 where the reward is read."""
    ends_step = discriminator.step_end_tokens.to(batch.tokens.device)
    return reward.segment_ends(batch, discriminator.granularity, ends_step)


def without_cut_off(reading: Reading, candidates: Candidates) -> Reading:
    """A reward's reading by which candidates are compared: where a score belongs to a step or a trace, one that was cut off
    by the length limit has none, and ranks below all that have.

    In training such a trace is paid below every finished one (reward.worst_if_cut_off): of its end, where a score per trace
    is learnt, there is none, and whatever was written last would be read. A score for every token, a likelihood, needs no
    end: its mean is that of the tokens that are there, and stays.
    """
    values, read = reading
    if candidates.finished is None or torch.equal(read, candidates.batch.response_mask):
        return reading
    return values, read * candidates.finished[:, None]


def per_token_likelihood(discriminator: reward.Discriminator) -> bool:
    """Whether the reward is a log-probability of each token: reward.SUSPICIOUS says which are too low."""
    return discriminator.reward_model.scores_all_actions and discriminator.granularity == "dense"


def natural_errors(candidates: Candidates, tokenizer, ends: tuple[int, ...]) -> torch.Tensor:
    """[B]: column of the first wrong token of each candidate for an embedded problem, -1 where there is none: where the
    answer is right, or the length limit cut the trace off (no token of `ends` last) before any error."""
    places = torch.full((len(candidates.texts),), -1)
    for row, text in enumerate(candidates.texts):
        example, ids = candidates.examples[row // candidates.n], candidates.batch.response(row)
        if example.task and not candidates.correct.flatten()[row]:
            offset = data.first_error(example, text)  # in characters
            if offset is not None and (offset < len(text) or ids[-1] in ends):
                places[row] = candidates.batch.prompt_lengths[row] + data.token_at(tokenizer, ids, offset)
    return places
