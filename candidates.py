"""Candidates: n responses to each question, and what each model says about their tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

import data
import policy
import reward
from data import Batch, Example
from engine.errors import UserError
from tasks.answers import extract_answer

# rerank.py chooses among candidates and looks for their first errors. They are sampled (`collect`),
# or come as texts, whoever wrote them (`from_texts`). Then `signals` asks the models.

# What a model says about tokens: its values [B, T], and 1 where it says one [B, T]. Elsewhere the
# value means nothing.
Reading = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Candidates:
    """n responses to each question: consecutive rows of batch, which stays on the CPU."""

    examples: list[Example]  # Q questions
    batch: Batch  # B = Q n rows
    texts: list[str]  # B responses
    n: int
    # Of those that were sampled here: log pi of each token [B, T].
    logprobs: torch.Tensor | None = None
    # Whether each ended by itself [B]. None: nobody knows, and all count as ended.
    finished: torch.Tensor | None = None

    @cached_property
    def answers(self) -> list[list[str | None]]:
        """The answer of each response: Q lists of n."""
        answers = [extract_answer(text) for text in self.texts]
        return [answers[i : i + self.n] for i in range(0, len(answers), self.n)]

    @cached_property
    def correct(self) -> torch.Tensor:
        """[Q, n] float, 1 where the answer is right."""
        # The verifier: it says how often a choice was right, and never takes part in one.
        right = [
            data.is_correct(self.examples[row // self.n], text)
            for row, text in enumerate(self.texts)
        ]
        return torch.tensor(right, dtype=torch.float).view(-1, self.n)


def collect(
    model,
    tokenizer,
    examples: list[Example],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    rows: int = 512,
    prompts: list[list[int]] | None = None,
) -> Candidates:
    """Sample n candidates for each example's question, at most `rows` at a time."""
    # A caller may ask in another way, such as with worked examples before the question.
    if prompts is None:
        prompts = [data.prompt_ids(tokenizer, example.question) for example in examples]
    rollout = policy.sample(
        model,
        prompts,
        data.end_tokens(tokenizer, model),
        max_new_tokens,
        group=n,
        temperature=temperature,
        generator=generator,
        rows=rows,
    )
    # What is judged lies on the CPU: of many candidates a GPU holds a few rows at a time.
    batch = rollout.batch.to("cpu")
    texts = [data.decode(tokenizer, batch.response(row)) for row in range(len(batch))]
    return Candidates(examples, batch, texts, n, rollout.logprobs.cpu(), rollout.finished.cpu())


def from_texts(
    tokenizer, examples: list[Example], texts: list[str], n: int, context: int | None = None
) -> Candidates:
    """Candidates that somebody else wrote, each up to its first end token."""
    finished = [has_ended(tokenizer, text) for text in texts]
    texts = [data.until_end(tokenizer, text) for text in texts]
    prompts = [data.prompt_ids(tokenizer, examples[row // n].question) for row in range(len(texts))]
    responses = []
    for text, ended in zip(texts, finished):
        ids = data.response_ids(tokenizer, text)
        # Nobody wrote an end token behind a text that was cut off: neither a score per trace nor
        # a likelihood may read one.
        responses.append(ids if ended else ids[:-1])
    batch = data.make_batch(prompts, responses)
    # Cut to the models' context, a text would be judged by a part of it.
    for row, length in enumerate(batch.lengths.tolist()):
        if context is not None and length > context:
            raise UserError(
                f"candidate {row % n + 1} of question {row // n + 1} is {length} tokens long with "
                f"its question, but the models read at most {context}"
            )
    return Candidates(examples, batch, texts, n, finished=torch.tensor(finished, dtype=torch.bool))


def has_ended(tokenizer, text: str) -> bool:
    """Whether a response ended by itself, as far as its text tells."""
    if data.until_end(tokenizer, text) != text:
        return True
    # Texts seldom hold their end token. One that leaves a tag open was cut off by a length limit;
    # any other is taken to have ended.
    return all(text.rfind(f"<{tag}>") <= text.rfind(f"</{tag}>") for tag in ("think", "answer"))


@torch.no_grad()
def signals(
    batch: Batch, discriminator, policy_model, judges: dict | None = None
) -> dict[str, Reading]:
    """What each model says about the response tokens: {name: its reading}, on the CPU."""
    readings = {}
    # log pi(a_t|s_t): "logprob" is that of the policy; the judges stand under their own names.
    for name, model in ({"logprob": policy_model} | (judges or {})).items():
        values = values_of(partial(policy.token_logprobs, model), model, batch)
        readings[name] = (values, batch.response_mask)
    # "reward" is f. AIRL's r = f - log pi compares with the policy of the last training step; f
    # asks no policy, and can judge anybody's samples.
    if discriminator is not None:

        def f(part: Batch) -> torch.Tensor:
            # A likelihood's f is summed over its segment, as in training. 0 takes the place of
            # log pi.
            scores = discriminator.reward_model.scores(part)
            segments, _, ends = discriminator.segments(part, scores, torch.zeros_like(scores))
            return segments * ends

        values = values_of(f, discriminator.reward_model.model, batch)
        readings["reward"] = (values, reward_ends(batch, discriminator))
    for name, (values, _) in readings.items():
        if not values.isfinite().all():
            raise UserError(f"the {name} of some token is no finite number: the weights diverged")
    return readings


def values_of(function: Callable, model, batch: Batch) -> torch.Tensor:
    """function(batch) [B, T], computed where the model is, some rows at a time."""
    # without dropout: a model may come from training
    model.eval()

    def on_its_device(part: Batch) -> torch.Tensor:
        return function(part.to(model.device)).cpu()

    return policy.in_chunks(on_its_device, batch)


def reward_ends(batch: Batch, discriminator: reward.Discriminator) -> torch.Tensor:
    """[B, T], 1 where the reward is read: at every token, or at the end of a step or a trace."""
    return discriminator.score_mask(batch.to(discriminator.step_end_tokens.device)).cpu()


def without_cut_off(reading: Reading, candidates: Candidates) -> Reading:
    """A reward's reading by which candidates are compared: one that was cut off has no score."""
    # A score per step or trace is learnt at its end; of a trace without an end whatever came last
    # would be read. Without a score it ranks below all that have one, and in training it is paid
    # less than they are (reward.worst_if_cut_off).
    values, read = reading
    # A score for every token needs no end: its mean is that of the tokens that are there.
    if candidates.finished is None or torch.equal(read, candidates.batch.response_mask):
        return reading
    return values, read * candidates.finished[:, None]


def per_token_likelihood(discriminator: reward.Discriminator) -> bool:
    """Whether f is a log-probability of each token."""
    # Then it has a unit, and reward.SUSPICIOUS says what is too low. A head's f has none, and that
    # of a step or a trace is a sum over more or fewer tokens.
    return discriminator.reward_model.scores_all_actions and discriminator.granularity == "dense"


def natural_errors(candidates: Candidates, tokenizer, ends: tuple[int, ...]) -> torch.Tensor:
    """[B]: the column of the first wrong token of each candidate, or -1."""
    # Only an embedded problem has a checker that reads every line of a trace. -1: the answer is
    # right, or the length limit cut the trace off before any error.
    places = torch.full((len(candidates.texts),), -1)
    correct = candidates.correct.flatten()
    for row, text in enumerate(candidates.texts):
        example = candidates.examples[row // candidates.n]
        if example.task and not correct[row]:
            ids = candidates.batch.response(row)
            offset = data.first_error(example, text)  # in characters
            # An offset at the text's end means that it stops too early. A trace that was cut off
            # did not choose to.
            if offset is not None and (offset < len(text) or ids[-1] in ends):
                column = data.token_at(tokenizer, ids, offset)
                places[row] = candidates.batch.prompt_lengths[row] + column
    return places
