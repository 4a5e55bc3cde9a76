"""Results as plain text, and some traces for the report: what train.py and rerank.py have found."""

import pandas
import torch

import data
import reward
from candidates import Candidates, natural_errors, per_token_likelihood, signals
from engine.errors import printable
from engine.settings import METHODS


def aligned(columns: dict[str, dict]) -> str:
    """{heading: {row: cell}} as lines. A cell is a number, [mean, low, high], or not there.

    >>> print(aligned({"best of 2": {"random": [0.5, 0.4, 0.6]}, "AUROC": {"random": None}}))
                     best of 2 AUROC
    random  0.500 [0.40, 0.60]     -
    """

    def text(cell) -> str:
        if isinstance(cell, list):
            mean, low, high = cell
            return f"{mean:.3f} [{low:.2f}, {high:.2f}]"
        return "-" if pandas.isna(cell) else f"{cell:.3f}"

    return pandas.DataFrame(columns).map(text).to_string()


def table(results: dict) -> str:
    """The results of train.py: methods, then what the reward is worth at inference."""
    columns: dict[str, dict] = {"temperature 1": {}, "greedy": {}, "seconds": {}}
    for method, measured in results["methods"].items():
        name = METHODS.get(method, method)
        columns["temperature 1"][name] = [measured["t1"], *measured["t1_interval"]]
        columns["greedy"][name] = [measured["greedy"], *measured["greedy_interval"]]
        columns["seconds"][name] = measured.get("seconds")
    parts = ["Share of test questions answered right", aligned(columns)]
    if results["rerank"]:
        parts.append("\nThe reward at inference, on the base's samples\n\n" + show_results(results))
    return "\n".join(parts)


def show_results(results: dict) -> str:
    """`rerank.assess`'s results: every way to choose, and every way to find the first error."""
    ranking = results["rerank"]
    sizes = [key for key in ranking if key.isdigit()]
    columns = {f"best of {n}": ranking[n] for n in sizes[-3:]}
    columns["beyond random"] = ranking["beyond"]
    columns["AUROC"] = ranking["auroc"]
    columns["in questions"] = ranking["auroc_within"]
    parts = [aligned(columns)]
    kinds = {"natural": "the policy's own errors", "single": "experts' traces with one error"}
    for kind, errors in results.get("localise", {}).items():
        if errors["count"]:
            columns = {"Hit@0": errors["hit0"], "Hit@1": errors["hit1"]}
            title = f"The first wrong token of {errors['count']} traces: {kinds[kind]}"
            parts.append(f"{title}\n{aligned(columns)}")
    return "\n\n".join(parts)


def show_choices(candidates: Candidates, scores: torch.Tensor) -> str:
    """The candidate with the highest score [Q, n] of each question: nobody knows the answer."""
    parts = []
    for question, (example, row) in enumerate(zip(candidates.examples, scores)):
        best = int(row.argmax())
        answer = candidates.answers[question][best]
        text = candidates.texts[question * candidates.n + best].strip()
        parts.append(
            f"{example.question}\ncandidate {best + 1} of {candidates.n}, score {row[best]:.3f}, "
            f"answer {answer}:\n{text}"
        )
    return printable("\n\n".join(parts))


@torch.no_grad()
def show_traces(
    candidates: Candidates, discriminator, policy_model, tokenizer, count: int = 24
) -> list[dict]:
    """Of each question one right and one wrong trace, where there are, for the report.

    "rewards": the logit of D for each token; positive is the expert's. "predicted": the first
    suspicious token, if any; for a reward that is no log-probability the lowest f.
    """
    rows = []
    for question, correct in enumerate(candidates.correct):
        for verdict in (1.0, 0.0):
            places = (correct == verdict).nonzero().flatten()[:1]
            rows += (question * candidates.n + places).tolist()
    rows = rows[:count]
    examples = [candidates.examples[row // candidates.n] for row in rows]
    batch = candidates.batch[rows]
    shown = Candidates(examples, batch, [candidates.texts[row] for row in rows], 1)
    readings = signals(batch, discriminator, policy_model)
    f, ends = readings["reward"]
    on_device = batch.to(policy_model.device)
    scores = discriminator.reward_model.scores(on_device)
    log_pi = readings["logprob"][0].to(policy_model.device)
    logits = discriminator.logits(on_device, scores, log_pi).cpu()
    # Where no score is read: never the lowest.
    f = f.masked_fill(ends == 0, torch.inf)
    wrong = natural_errors(shown, tokenizer, data.end_tokens(tokenizer, policy_model)).tolist()
    traces = []
    for i, example in enumerate(examples):
        first = int(batch.prompt_lengths[i])
        tokens = batch.response(i)
        columns = range(first, first + len(tokens))
        predicted = int(f[i].argmin()) - first
        if per_token_likelihood(discriminator):
            low = (f[i] < reward.SUSPICIOUS).nonzero().flatten().tolist()
            predicted = low[0] - first if low else None
        traces.append(
            {
                "question": example.question,
                "source": "policy",
                "correct": bool(shown.correct[i, 0]),
                "answer": shown.answers[i][0],
                "tokens": [tokenizer.decode([token]) for token in tokens],
                "rewards": [float(logits[i, t]) if ends[i, t] else None for t in columns],
                "predicted": predicted,
                "first_wrong": wrong[i] - first if wrong[i] >= 0 else None,
            }
        )
    return traces
