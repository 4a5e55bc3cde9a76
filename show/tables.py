"""Results as plain text, and some traces for the report: what train.py and rerank.py have found, shown."""

import torch

import data
import reward
from candidates import Candidates, natural_errors, per_token_likelihood, signals
from engine.errors import printable
from engine.settings import METHODS


def aligned(rows: list[list], widths: list[int], digits: int = 2) -> str:
    """Lines of cells, the first to the left. A cell is text, a number, [mean, low, high], or None.

    >>> print(aligned([["best of", "1", "2"], ["random", [0.5, 0.4, 0.6], None]], [8, 18, 6]))
    best of                  1     2
    random   0.50 [0.40, 0.60]     -
    """

    def text(cell) -> str:
        if isinstance(cell, list):
            return "{} [{}, {}]".format(*map(text, cell))
        return cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.{digits}f}"

    lines = ([row[0].ljust(widths[0]), *(text(cell).rjust(n) for cell, n in zip(row[1:], widths[1:]))] for row in rows)
    return "\n".join(map("".join, lines))


def table(results: dict) -> str:
    """The results of train.py: methods, then what the reward is worth at inference."""
    methods = [["share of test questions right", "temperature 1", "greedy", "seconds"]]
    for method, r in results["methods"].items():
        shares = [[r[how], *r[f"{how}_interval"]] for how in ("t1", "greedy")]
        methods.append([METHODS.get(method, method), *shares, f"{r.get('seconds', 0):.0f}"])
    worth: dict[str, dict] = {}  # what it is: name -> value
    ways = ("random", "longest", "shortest", "majority", "logprob", "sft_logprob", "sft_fair_logprob", "reward", "oracle")
    for n in ("4", "16"):
        row = results["rerank"].get(n, {})
        worth[f"best of {n} samples of the base"] = {way: row[way][0] for way in ways if way in row}
    worth["AUROC, right against wrong"] = {"reward": results["reward"].get("auroc")}
    for kind, name in (("natural", "its own errors"), ("single", "one planted error")):
        hits = results["localise"].get(kind, {}).get("hit0", {})
        lowest = [] if "reward_first" in hits else ["reward"]  # a head's: it has no bound to fall below
        worth[f"first wrong token, {name}"] = {key: hits[key][0] for key in hits if key.endswith("_first") or key in lowest}
    found = {what: {name: value for name, value in values.items() if value is not None} for what, values in worth.items()}
    rows = [[what, ", ".join(f"{name} {v:.3f}" for name, v in values.items())] for what, values in found.items() if values]
    return aligned(methods, [37, 22, 22, 9], 3) + "\n" * bool(rows) + aligned(rows, [37, 0])


def show_results(results: dict) -> str:
    """The results of rerank.py: `rerank.rerank_results` under "rerank" and, if it is there, "localise"."""
    ranking = results["rerank"]
    ns = [key for key in ranking if key.isdigit()]
    columns, beyond = [ranking[n] for n in ns], ranking["beyond"]
    ways = [["best of n =", *ns, "beyond random"]]
    ways += [[way, *(found[way] for found in columns), beyond.get(way)] for way in columns[0]]
    ks = [["k =", *ns], *([at, *ranking[at].values()] for at in ("pass@k", "success@k") if at in ranking)]
    areas = [["right from wrong", "AUROC", "within questions"]]
    areas += [[name, area, ranking["auroc_within"][name]] for name, area in ranking["auroc"].items()]
    texts = [aligned(rows, [18] * len(rows[0])) for rows in (ways, ks, areas)]
    titles = {"natural": "the policy's own errors", "single": "expert traces with a single thing broken"}
    for kind, found in results.get("localise", {}).items():
        rows = [["", "Hit@0", "Hit@1", "same step"]]
        rows += [[name, *(found[hit][name] for hit in ("hit0", "hit1", "step"))] for name in found.get("hit0", ())]
        texts.append(f"first wrong token of {found['count']} traces: {titles[kind]}\n" + aligned(rows, [18] * 4))
    return "\n\n".join(texts)


def show_choices(candidates: Candidates, scores: torch.Tensor) -> str:
    """The candidate with the highest score [Q, n] of each question, where nobody knows the answer."""
    parts = []
    for i, (example, row) in enumerate(zip(candidates.examples, scores)):
        best = int(row.argmax())
        found = f"candidate {best + 1} of {candidates.n}, score {row[best]:.3f}, answer {candidates.answers[i][best]}"
        parts.append(f"{example.question}\n{found}:\n{candidates.texts[i * candidates.n + best].strip()}")
    return printable("\n\n".join(parts))


@torch.no_grad()
def show_traces(candidates: Candidates, discriminator, policy_model, tokenizer, count: int = 24) -> list[dict]:
    """Of each question one right and one wrong trace, where there are, with the logit of D for each token (positive: the
    expert's). Predicted is the first suspicious token, if any; for a reward that is no log-probability, the lowest f."""
    n, kinds = candidates.n, [(q, right == kind) for q, right in enumerate(candidates.correct) for kind in (1.0, 0.0)]
    rows = torch.cat([q * n + chosen.nonzero().flatten()[:1] for q, chosen in kinds])[:count].tolist()
    texts, examples = [candidates.texts[row] for row in rows], [candidates.examples[row // n] for row in rows]
    shown = Candidates(examples, candidates.batch[rows], texts, 1)
    readings = signals(shown.batch, discriminator, policy_model)
    (f, ends), (log_pi, _) = readings["reward"], readings["logprob"]
    batch = shown.batch.to(policy_model.device)
    logits = discriminator.logits(batch, discriminator.reward_model.scores(batch), log_pi.to(batch.tokens.device)).cpu()
    wrong = natural_errors(shown, tokenizer, data.end_tokens(tokenizer, policy_model)).tolist()
    traces, likelihood = [], per_token_likelihood(discriminator)
    for i, example in enumerate(examples):
        first, last = int(shown.batch.prompt_lengths[i]), int(shown.batch.lengths[i])
        read = [(float(f[i, t]), t - first) for t in range(first, last) if ends[i, t]]
        low = [t for value, t in read if value < reward.SUSPICIOUS] if likelihood else [min(read)[1]]
        traces.append({
            "question": example.question, "source": "policy", "correct": bool(shown.correct[i, 0]),
            "answer": shown.answers[i][0], "tokens": [tokenizer.decode([t]) for t in shown.batch.response(i)],
            "rewards": [float(logits[i, t]) if ends[i, t] else None for t in range(first, last)],
            "predicted": low[0] if low else None, "first_wrong": wrong[i] - first if wrong[i] >= 0 else None,
        })  # fmt: skip
    return traces
