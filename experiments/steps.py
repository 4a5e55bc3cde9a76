"""The first wrong step of a solution, by its tokens' scores, against human labels.

    1. Solution         question, steps, label: the first wrong step, counted from 0; -1 if none is wrong
    2. step_scores      scores of tokens [B, T] -> one per step [B, S]: the lowest, the mean, the last
    3. predict          the first step below a threshold, or the lowest step if it is below; -1 if none is
    4. F1               harmonic mean of the accuracy on wrong and on right solutions (ProcessBench, arXiv 2412.06559)
    5. localise         the threshold is chosen on one set of solutions, and F1 measured on another

    python -m experiments.steps --run runs/demo --dev mr_gsm8k.jsonl --experts 200 --test processbench.json

Files are JSON lines or one JSON list, in the form of ProcessBench (problem or question, steps, label) or of MR-GSM8K
(arXiv 2312.17080: model_output_steps, model_output_solution_first_error_step, which counts from 1).

Thresholds need right solutions, too: one from wrong solutions alone calls everything wrong. MR-GSM8K's
dev has none, so `--experts` puts solutions of the run's validation questions beside it, written by
experts and never trained on. Without them the threshold is chosen with `right_parts`: a causal model
scores a step before it has read the next one, so what a wrong solution wrote before its first wrong
step is a right solution with scores of its own. Those are shorter than whole solutions, so that a
threshold errs towards alarms.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import data
import policy
import rerank
from engine import loading
from engine.chat import check_text
from engine.errors import Parser, UserError, exit_status
from tasks import records
from tasks.common import first_difference

RULES = ("lowest", "mean", "last")
POINTERS = ("first", "lowest")
ABSENT = torch.inf  # the score of a step that a solution does not have: below no threshold

# ---------------------------------------------------------------------------------------------------------------
# 1. Solutions
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """A solution in steps, and the index of the first wrong one: -1 if none is."""

    question: str
    steps: tuple[str, ...]
    label: int


def read_solutions(path: str, count: int | None = None) -> list[Solution]:
    """`count` solutions of a file, or all. Some are drawn, always the same: ProcessBench has its wrong solutions first, and
    without right ones there is no F1. What is wrong with the file is said in one line."""
    lines = records.text_lines(path)
    try:
        whole = json.loads("\n".join(text for _, text in lines)) if lines and lines[0][1].lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None
    lines = lines if whole is None else list(enumerate(map(json.dumps, whole), 1))
    found = records.read_objects(path, lines, from_record, "question, steps and label")
    return found if count is None else random.Random(0).sample(found, min(count, len(found)))


def from_record(record: dict) -> Solution:
    """A record of either form. MR-GSM8K's "Step 3: ", its calculator's annotations and the answer's lines at its end go: no
    policy here writes them, and a judge that has not met "#### 6" calls it the worst step of all.

    >>> from_record({"question": "?", "model_output_steps": ["Step 1:  2+3=<<2+3=6>>6", "Step 2: #### 6", "The answer is: 6"],
    ...              "model_output_solution_first_error_step": 1})
    Solution(question='?', steps=('2+3=6',), label=0)
    """
    name, labelled, first = "steps", "label", 0
    if "model_output_steps" in record:
        name, labelled, first = "model_output_steps", "model_output_solution_first_error_step", 1
    question = records.field(record, "problem" if "problem" in record else "question", needed=True)
    steps, label = record.get(name), record.get(labelled)
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError(f"field '{name}' must be a list of one or more texts")
    if first and label in (None, "", "N/A") and record.get("model_output_solution_correctness") == "correct":
        label = first - 1  # of a right solution MR-GSM8K names no step
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label - first < len(steps):
        raise ValueError(f"field '{labelled}' is {label!r}, no step of {len(steps)}")
    steps = [check_text(re.sub(r"<<[^<>]{0,200}>>", "", step)).strip() for step in steps]
    if first:
        steps = [re.sub(r"^Step \d+:\s*", "", step) or step for step in steps]
        while len(steps) > max(1, label) and re.match("####|The answer is:", steps[-1]):
            steps.pop()
    return Solution(question, tuple(steps), label - first)


def as_response(tokenizer, solution: Solution) -> tuple[list[int], list[int]]:
    """(tokens, the step of each; -1 before the first) of a solution as the policy would begin to write it, a step a line.

    The end is left out: no score of a step depends on it. A token that holds the end of one step and the beginning of
    the next is the former's.
    """
    whole, trace = data.response_text("", ""), "\n".join(solution.steps) + "\n"
    begin = first_difference(data.response_text("a", ""), data.response_text("b", ""))
    text = check_text(whole[:begin] + trace)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [begin]
    for step in solution.steps[:-1]:
        starts.append(starts[-1] + len(step) + 1)
    owners = [sum(start >= s for s in starts) - 1 for start, _ in found["offset_mapping"]]
    return found["input_ids"], owners


def as_batch(tokenizer, solutions: list[Solution]) -> tuple[data.Batch, torch.Tensor]:
    """(batch, steps [B, T]: the step that each token belongs to, -1 for none)."""
    prompts = [data.prompt_ids(tokenizer, s.question) for s in solutions]
    written = [as_response(tokenizer, s) for s in solutions]
    batch = data.make_batch(prompts, [ids for ids, _ in written])
    steps = torch.full(batch.tokens.shape, -1)
    for row, (prompt, (_, owners)) in enumerate(zip(prompts, written)):
        steps[row, len(prompt) : len(prompt) + len(owners)] = torch.tensor(owners)
    return batch, steps


# ---------------------------------------------------------------------------------------------------------------
# 2. Scores of steps
# ---------------------------------------------------------------------------------------------------------------


def step_scores(values: torch.Tensor, steps: torch.Tensor, rule: str) -> torch.Tensor:
    """Scores of tokens to scores of steps: [B, T], [B, T] -> [B, S], S the most steps of a row, ABSENT where it has fewer.

    With t over the tokens of step s:  lowest  min_t f_t    mean  the mean of f_t    last  f at the step's last token

    >>> f, steps = torch.tensor([[9.0, 4.0, 2.0, 6.0], [9.0, 1.0, 9.0, 9.0]]), torch.tensor([[-1, 0, 0, 1], [-1, 0, -1, -1]])
    >>> [step_scores(f, steps, rule).tolist() for rule in RULES]
    [[[2.0, 6.0], [1.0, inf]], [[3.0, 6.0], [1.0, inf]], [[2.0, 6.0], [1.0, inf]]]
    """
    count = int(steps.max()) + 1
    member = steps[:, None, :] == torch.arange(count)[:, None]  # [B, S, T]
    values = values[:, None, :].expand(member.shape)
    if rule == "lowest":
        return values.masked_fill(~member, ABSENT).amin(2)
    if rule == "mean":
        scores = values.masked_fill(~member, 0.0).sum(2) / member.sum(2)  # 0 / 0 is NaN: absent
    else:
        final = torch.where(member, torch.arange(member.shape[2]), 0).amax(2, keepdim=True)  # [B, S, 1]
        scores = values.gather(2, final).squeeze(2)
    return scores.masked_fill(~member.any(2), ABSENT)


def padded(rows: list[list[float]]) -> torch.Tensor:
    """Lists of step scores as one tensor [B, S].

    >>> padded([[1.0], [2.0, 3.0]])
    tensor([[1., inf],
            [2., 3.]])
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, ABSENT)


# ---------------------------------------------------------------------------------------------------------------
# 3. and 4. Predictions and their F1
# ---------------------------------------------------------------------------------------------------------------


def predict(
    scores: torch.Tensor, threshold: float | torch.Tensor, pointer: str
) -> torch.Tensor:
    """The step that is said to be the first wrong one: [B, S] -> [B]. -1 if no score is below.

    first: the first that is below the threshold. lowest: the lowest of all, the first of equals.
    Thresholds [K, 1, 1] are tried at once: [K, B].

    >>> scores = torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, 0.0]])
    >>> [predict(scores, -0.5, pointer).tolist() for pointer in POINTERS]
    [[1, -1], [2, -1]]
    """
    below = scores < threshold
    place = below.long().argmax(-1) if pointer == "first" else scores.argmin(-1)
    return torch.where(below.any(-1), place, -1)


def f1_of(wrong: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """2 w r / (w + r): nothing for a predictor that calls everything wrong, or everything right.

    >>> f1_of(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.0]))
    tensor([0.6667, 0.0000])
    """
    return torch.where(wrong * right > 0, 2 * wrong * right / (wrong + right), 0.0)


def accuracies(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of predictions [.., B] for solutions with labels [.., B], over B, in double precision:

    {"wrong": share of wrong solutions whose first wrong step is named,
     "right": share of right solutions that are said to be right, "f1"}

    >>> accuracies(torch.tensor([1, -1, -1, -1]), torch.tensor([1, 0, -1, -1]))["f1"].item()
    0.6666666666666666
    """
    hits = (predicted == labels).double()
    is_wrong = (labels >= 0).double()
    wrong = (hits * is_wrong).sum(-1) / is_wrong.sum(-1).clamp(min=1)
    right = (hits * (1 - is_wrong)).sum(-1) / (1 - is_wrong).sum(-1).clamp(min=1)
    return {"wrong": wrong, "right": right, "f1": f1_of(wrong, right)}


def f1_interval(
    predicted: torch.Tensor, labels: torch.Tensor, draws: int = 1000, seed: int = 0
) -> list[float]:
    """[F1, low, high]: 95% percentile bootstrap over solutions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(labels), (draws, len(labels)), generator=generator)  # [D, B]
    values = accuracies(predicted[drawn], labels[drawn])["f1"]  # [D]
    ends = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return [accuracies(predicted, labels)["f1"].item(), *ends.tolist()]


def best_threshold(
    scores: torch.Tensor, labels: torch.Tensor, pointer: str
) -> tuple[float, float]:
    """(threshold, F1) with the highest F1, between two neighbouring scores: [B, S], [B].

    Of equals the lowest, which raises fewest alarms.

    >>> best_threshold(torch.tensor([[0.0, -3.0], [-1.0, 0.0]]), torch.tensor([1, -1]), "first")
    (-2.0, 1.0)
    """
    known = scores[scores.isfinite()].double().unique()  # ascending
    between = (known[:-1] + known[1:]) / 2 if len(known) > 1 else known  # [K]
    best = (float(between[0]), -1.0)
    for some in between.split(256):
        predicted = predict(scores, some[:, None, None], pointer)  # [k, B]
        f1 = accuracies(predicted, labels)["f1"]  # [k]
        if f1.max() > best[1]:  # argmax: the first, that is the lowest, of equals
            best = (float(some[f1.argmax()]), float(f1.max()))
    return best


def guess_f1(c: float) -> float:
    """The highest F1 of a guess that names the right step of a share c of the wrong solutions: it says 'right' with
    probability q, of all solutions alike. Right q, wrong (1 - q) c; at the best q = sqrt(c) / (1 + sqrt(c))

        F1 = 2 c / (1 + sqrt(c))^2

    >>> guess_f1(0.25)  # q = 1/3: right 1/3, wrong 2/3 * 1/4 = 1/6
    0.2222222222222222
    """
    return 2 * c / (1 + c**0.5) ** 2


def guess_hits(lengths: list[list[int]], labels: list[int]) -> dict[str, torch.Tensor]:
    """{"chance", "longest": [wrong solutions], how likely the first wrong step is named}.

    By what asks no model. lengths: of every step, in letters. A threshold of length would be one of
    the writer's style, and says nothing of another's.

    >>> guess_hits([[3, 9], [1, 2], [5]], [1, 0, -1])
    {'chance': tensor([0.5000, 0.5000]), 'longest': tensor([1., 0.])}
    """
    chance = []
    longest = []
    for row, label in zip(lengths, labels):
        if label >= 0:
            chance.append(1 / len(row))
            longest.append(float(row.index(max(row)) == label))
    return {"chance": torch.tensor(chance), "longest": torch.tensor(longest)}


def guesses(hits: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """{"chance", "longest": [F1, low, high]}: F1 at its best grows with the share that is named."""
    return {
        name: [guess_f1(share) for share in rerank.bootstrap(values)]
        for name, values in hits.items()
    }


# ---------------------------------------------------------------------------------------------------------------
# 5. Results
# ---------------------------------------------------------------------------------------------------------------


def right_parts(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S], [B] with, below them, what each wrong solution wrote before its first wrong step, as right solutions.

    >>> right_parts(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]))
    (tensor([[1., 2.],
            [3., 4.],
            [1., inf]]), tensor([ 1,  0, -1]))
    """
    cut = labels > 0
    later = torch.arange(scores.shape[1]) >= labels[cut, None]
    parts = scores[cut].masked_fill(later, ABSENT)
    return torch.cat([scores, parts]), torch.cat([labels, torch.full((len(parts),), -1)])


def localise(
    dev: dict, dev_labels: torch.Tensor, test: dict, test_labels: torch.Tensor
) -> dict:
    """{"f1": [f1, low, high], "wrong", "right", "rule", "pointer", "threshold", "dev_f1", "points"}.

    dev, test: {rule: step scores [B, S]} of one signal. Rule, pointer and threshold are those with
    the highest F1 on dev, and nothing is chosen on test, nor are its scores scaled by its own mean.
    points: the share of the test's wrong solutions whose lowest step, by that rule, is the first
    wrong one, which needs no threshold.
    """
    best: dict = {"dev_f1": -1.0}
    for rule in dev:
        scores = dev[rule]
        labels = dev_labels
        if not (labels < 0).any():
            scores, labels = right_parts(scores, labels)
        for pointer in POINTERS:
            threshold, dev_f1 = best_threshold(scores, labels, pointer)
            if dev_f1 > best["dev_f1"]:
                best = {"rule": rule, "pointer": pointer, "threshold": threshold, "dev_f1": dev_f1}
    scores = test[best["rule"]]
    predicted = predict(scores, best["threshold"], best["pointer"])
    shares = accuracies(predicted, test_labels)
    lowest = accuracies(predict(scores, ABSENT, "lowest"), test_labels)
    return best | {
        "wrong": shares["wrong"].item(),
        "right": shares["right"].item(),
        "f1": f1_interval(predicted, test_labels),
        "points": lowest["wrong"].item(),
    }


def right_solutions(examples: list[data.Example]) -> list[Solution]:
    """Experts' solutions, a step a line: right ones for choosing a threshold.

    >>> right_solutions([data.Example("1+2*2?", "2*2=4\\n\\n1+4=5", "5")])
    [Solution(question='1+2*2?', steps=('2*2=4', '1+4=5'), label=-1)]
    """
    solutions = []
    for example in examples:
        lines = tuple(line for line in example.trace.split("\n") if line.strip())
        if lines:
            solutions.append(Solution(example.question, lines, -1))
    return solutions


def labels_of(solutions: list[Solution]) -> torch.Tensor:
    """[B]"""
    return torch.tensor([s.label for s in solutions])


@torch.no_grad()
def score(tokenizer, solutions: list[Solution], function, device="cpu") -> list[dict[str, list[float]]]:
    """{rule: [score of each step]} for every solution; function(batch) -> [B, T], the scores of its tokens."""
    batch, steps = as_batch(tokenizer, solutions)
    values = policy.in_chunks(lambda part: function(part.to(device)).cpu(), batch, tokens=4096)
    check_finite(values)
    found = {rule: step_scores(values, steps, rule).tolist() for rule in RULES}
    return [{rule: found[rule][i][: len(s.steps)] for rule in RULES} for i, s in enumerate(solutions)]


def check_finite(values: torch.Tensor) -> None:
    """Raise if a score is NaN or infinite: it would hide in a ranking."""
    if not values.isfinite().all():
        raise UserError("the score of some token is not a finite number: the weights have diverged")


def fitting(tokenizer, solutions: list[Solution], context: int) -> list[Solution]:
    """Those that a model can read; how many are left out is said."""
    length = lambda s: len(data.prompt_ids(tokenizer, s.question)) + len(as_response(tokenizer, s)[0])
    kept = [s for s in solutions if length(s) <= context]
    if not kept:
        raise UserError(f"none of the {len(solutions)} solutions fits the model's context of {context} tokens")
    if len(kept) < len(solutions):
        print(f"{len(solutions) - len(kept)} solutions are longer than the context of {context} tokens: left out")
    return kept


def by_rule(scored: list[dict[str, list[float]]]) -> dict[str, torch.Tensor]:
    """What `score` gives, as {rule: [B, S]}."""
    return {rule: padded([one[rule] for one in scored]) for rule in RULES}


def show(results: dict, guessed: dict[str, list[float]]) -> str:
    """A line per signal."""
    lines = [f"{'':18s}  {'F1':22s}{'wrong':>8s}{'right':>8s}  chosen on dev"]
    for name, f1 in guessed.items():
        lines.append(f"{name:18s}  " + "{:.3f} [{:.3f}, {:.3f}]".format(*f1))
    for name, r in results.items():
        f1 = "{:.3f} [{:.3f}, {:.3f}]".format(*r["f1"])
        chosen = f"{r['rule']}, {r['pointer']} below {r['threshold']:.3g}"
        lines.append(f"{name:18s}  {f1:22s}{r['wrong']:8.3f}{r['right']:8.3f}  {chosen}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """A run's reward, its policy and the models trained on its demonstrations alone."""
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py")
    parser.add_argument("--dev", required=True, metavar="FILE", help="the threshold is chosen on it")
    parser.add_argument("--test", required=True, metavar="FILE", help="F1 is measured on it")
    parser.add_argument("--count", type=int, help="so many of each file, at random (default: all)")
    experts = "so many experts' solutions of the run's validation questions, as right ones, to dev"
    parser.add_argument("--experts", type=int, default=0, metavar="N", help=experts)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse(arguments)
    if args.count is not None and args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    if args.experts < 0:
        raise UserError(f"--experts must be at least 0, not {args.experts}")
    loading.quiet()
    dev = read_solutions(args.dev, args.count)
    test = read_solutions(args.test, args.count)
    device = loading.pick_device(args.device)
    parts = rerank.models_of_run(Path(args.run), "base", device)
    model, tokenizer, discriminator, judges, settings = parts
    if args.experts:
        validation = data.load_examples(
            settings["data"], "validation", args.experts, settings["seed"]
        )
        dev += right_solutions(validation)
    context = loading.context_length(model)
    dev = fitting(tokenizer, dev, context)
    test = fitting(tokenizer, test, context)
    functions = {}
    for name, judge in ({"logprob": model} | judges).items():
        functions[name] = partial(policy.token_logprobs, judge)
    # f of every token, also where training reads fewer
    functions["reward"] = discriminator.reward_model.scores
    results = {}
    for name, function in functions.items():
        on_dev = by_rule(score(tokenizer, dev, function, device))
        on_test = by_rule(score(tokenizer, test, function, device))
        results[name] = localise(on_dev, labels_of(dev), on_test, labels_of(test))
    print(f"{len(test)} solutions; rule, pointer and threshold chosen on {len(dev)} others\n")
    lengths = [[len(step) for step in s.steps] for s in test]
    print(show(results, guesses(guess_hits(lengths, [s.label for s in test]))))


if __name__ == "__main__":
    sys.exit(exit_status(main))
