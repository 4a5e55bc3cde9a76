"""The first wrong step of a solution, by its tokens' scores, against human labels.

    1. Solution      question, steps, label: the first wrong step, counted from 0; -1 if none is
    2. step_scores   scores of a solution's tokens -> of its steps: the lowest, the mean, the last
       falls         how far a step's lowest is below those of the steps before it
    3. predict       the first step whose score is below a threshold; -1 if none is
    4. accuracies    F1, as in ProcessBench (arXiv 2412.06559): the harmonic mean of the accuracies
                     on wrong and on right solutions
    5. localise      rule and threshold are chosen on some solutions, F1 is measured on others

    python -m experiments.steps --run runs/demo --dev mr_gsm8k.jsonl --test processbench.json

Files are JSON lines or one JSON list, in the form of ProcessBench (problem or question, steps,
label) or of MR-GSM8K (arXiv 2312.17080), whose labels count from 1. Thresholds need right
solutions, too, and MR-GSM8K's dev has none: `--experts` puts solutions of the run's validation
questions beside it, by experts and never trained on.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import policy
import rerank
from engine import checkpoint, loading
from engine.chat import check_text
from engine.errors import Parser, UserError, exit_status
from tasks import records

READ = ("lowest", "mean", "last")  # off a step's tokens
RULES = (*READ, "fall")
ABSENT = torch.inf  # the score of a step that a solution does not have: below no threshold


@dataclass(frozen=True)
class Solution:
    """A solution in steps, and the index of the first wrong one: -1 if none is."""

    question: str
    steps: tuple[str, ...]
    label: int


def read_solutions(path: str, count: int | None = None) -> list[Solution]:
    """`count` solutions of a file, or all. They are drawn: ProcessBench begins with wrong ones."""
    lines = records.text_lines(path)
    if lines and lines[0][1].lstrip().startswith("["):
        try:
            whole = json.loads("\n".join(text for _, text in lines))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {error}") from None
        lines = list(enumerate(map(json.dumps, whole), 1))
    solutions = records.read_objects(path, lines, from_record, "question, steps and label")
    return random.Random(0).sample(solutions, min(count or len(solutions), len(solutions)))


def from_record(record: dict) -> Solution:
    """A record of either form. ValueError says what is wrong with it.

    MR-GSM8K's "Step 3: ", its calculator's annotations and the lines at its end with the answer
    go: a judge that has not met "#### 6" calls it the worst step of all.

    >>> steps = ["Step 1:  2+3=<<2+3=6>>6", "Step 2: #### 6", "The answer is: 6"]
    >>> name = "model_output_steps"
    >>> from_record({"question": "?", name: steps, "model_output_solution_first_error_step": 1})
    Solution(question='?', steps=('2+3=6',), label=0)
    """
    question = records.field(record, "problem" * ("problem" in record) or "question", needed=True)
    steps = record.get("steps", record.get("model_output_steps"))
    label = record.get("label", record.get("model_output_solution_first_error_step"))
    first = 1 - ("label" in record)  # the number of the first step
    if record.get("model_output_solution_correctness") == "correct":
        label = first - 1  # MR-GSM8K names no step of a right solution
    if not isinstance(steps, list) or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError("field 'steps' must be a list of one or more texts")
    if type(label) is not int or not -1 <= label - first < len(steps):
        raise ValueError(f"field 'label' is {label!r}, no step of {len(steps)}")
    steps = [re.sub(r"<<[^<>]{0,200}>>", "", check_text(step)).strip() for step in steps]
    if first:
        steps = [re.sub(r"^Step \d+:\s*", "", step) or step for step in steps]
        while len(steps) > max(1, label) and re.match("####|The answer is:", steps[-1]):
            steps.pop()
    return Solution(question, tuple(steps), label - first)


def right_solutions(examples: list[data.Example]) -> list[Solution]:
    """Experts' solutions, a step a line: right ones for choosing a threshold.

    >>> right_solutions([data.Example("1+2*2?", "2*2=4\\n\\n1+4=5", "5")])
    [Solution(question='1+2*2?', steps=('2*2=4', '1+4=5'), label=-1)]
    """
    lines = [tuple(filter(str.strip, example.trace.split("\n"))) for example in examples]
    return [Solution(e.question, steps, -1) for e, steps in zip(examples, lines) if steps]


# --- scores of steps ------------------------------------------------------------------------------


def as_response(tokenizer, solution: Solution) -> tuple[list[int], list[int]]:
    """(tokens, the step of each; -1 before the first), as the policy would begin to write them.

    A step is a line. The end is left out: no score of a step depends on it. A token that holds the
    end of one step and the beginning of the next is the former's.
    """
    opening = data.response_text("", "").split("\n")[0] + "\n"
    text = opening + "\n".join(solution.steps) + "\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [len(opening)]
    for step in solution.steps[:-1]:
        starts.append(starts[-1] + len(step) + 1)
    owners = [sum(begin >= s for s in starts) - 1 for begin, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], owners


def step_scores(values: torch.Tensor, owners: list[int]) -> dict[str, list[float]]:
    """{rule: score of each step} from the scores of a solution's tokens [T].

    >>> step_scores(torch.tensor([9.0, 4.0, 2.0, 6.0]), [-1, 0, 0, 1])
    {'lowest': [2.0, 6.0], 'mean': [3.0, 6.0], 'last': [2.0, 6.0]}
    """
    steps = [values[torch.tensor(owners) == step] for step in range(max(owners) + 1)]
    return {
        "lowest": [float(step.min()) for step in steps],
        "mean": [float(step.mean()) for step in steps],
        "last": [float(step[-1]) for step in steps],
    }


@torch.no_grad()
def score(tokenizer, solutions: list[Solution], function: Callable, device="cpu") -> list[dict]:
    """step_scores of every solution; function(batch) -> [B, T], the scores of its tokens."""
    written = [as_response(tokenizer, solution) for solution in solutions]
    prompts = [data.prompt_ids(tokenizer, solution.question) for solution in solutions]
    batch = data.make_batch(prompts, [ids for ids, _ in written], device)
    values = policy.in_chunks(function, batch, tokens=4096).cpu()
    if not values.isfinite().all():  # it would hide in a ranking
        raise UserError("the score of some token is not a finite number: the weights have diverged")
    rows = [row[row_mask > 0] for row, row_mask in zip(values, batch.response_mask.cpu())]
    return [step_scores(row, owners) for row, (_, owners) in zip(rows, written)]


def falls(lowest: list[float]) -> list[float]:
    """How far each step's score is below (negative) the mean of those before it; of the first 0.

    Another writer's style moves the scores of all steps, and a threshold with them; not these.

    >>> falls([3.0, 1.0, 2.0])
    [0.0, -2.0, 0.0]
    """
    means = [sum(lowest[:step]) / step for step in range(1, len(lowest))]
    return [0.0] + [score - mean for score, mean in zip(lowest[1:], means)]


def with_falls(scored: list[dict]) -> list[dict]:
    """step_scores of solutions, and each step's fall."""
    return [one | {"fall": falls(one["lowest"])} for one in scored]


def padded(scored: list[dict], rule: str) -> torch.Tensor:
    """One rule's scores of all solutions: [B, S]."""
    return pad_sequence([torch.tensor(one[rule]) for one in scored], True, ABSENT)


# --- predictions and their F1 ---------------------------------------------------------------------


def predict(scores: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """The first step below the threshold: [B, S] -> [B]. -1 if no score is.

    Thresholds [K, 1, 1] are tried at once: [K, B].

    >>> predict(torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, 0.0]]), -0.5).tolist()
    [1, -1]
    """
    below = scores < threshold
    return torch.where(below.any(-1), below.long().argmax(-1), -1)


def accuracies(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"wrong": share of wrong solutions whose first wrong step is named, "right": share of right
    ones that are said to be right, "f1"}, over B: [.., B] both, in double precision.

    >>> accuracies(torch.tensor([1, -1, -1, -1]), torch.tensor([1, 0, -1, -1]))["f1"].item()
    0.6666666666666666
    """
    hits = (predicted == labels).double()
    is_wrong = (labels >= 0).double()
    wrong = (hits * is_wrong).sum(-1) / is_wrong.sum(-1).clamp(min=1)
    right = (hits * (1 - is_wrong)).sum(-1) / (1 - is_wrong).sum(-1).clamp(min=1)
    # nothing for who calls everything wrong, or everything right
    f1 = torch.where(wrong * right > 0, 2 * wrong * right / (wrong + right), 0.0)
    return {"wrong": wrong, "right": right, "f1": f1}


def f1_interval(
    predicted: torch.Tensor, labels: torch.Tensor, draws: int = 1000, seed: int = 0
) -> list[float]:
    """[F1, low, high]: 95% percentile bootstrap over solutions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(labels), (draws, len(labels)), generator=generator)  # [D, B]
    values = accuracies(predicted[drawn], labels[drawn])["f1"]  # [D]
    ends = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return [accuracies(predicted, labels)["f1"].item(), *ends.tolist()]


def best_threshold(scores: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """(F1, threshold) with the highest F1, between two neighbouring scores: [B, S], [B].

    Of equals the lowest, which raises fewest alarms.

    >>> best_threshold(torch.tensor([[0.0, -3.0], [-1.0, 0.0]]), torch.tensor([1, -1]))
    (1.0, -2.0)
    """
    known = scores[scores.isfinite()].double().unique()  # ascending
    between = (known[:-1] + known[1:]) / 2  # [K]
    f1 = [
        accuracies(predict(scores, some[:, None, None]), labels)["f1"]
        for some in between.split(256)
    ]
    best = torch.cat(f1).argmax()  # the first, that is the lowest, of equals
    return float(torch.cat(f1)[best]), float(between[best])


def guesses(solutions: list[Solution]) -> dict[str, list[float]]:
    """{"chance", "longest": [F1, low, high]} of who names a step without a model.

    Named is any step, or the one with most letters. A guess that names the right step of a share c
    of the wrong solutions says 'right' with probability q, of all solutions alike: right q, wrong
    (1 - q) c. At the best q = sqrt(c) / (1 + sqrt(c)) that is F1 = 2 c / (1 + sqrt(c))^2.

    >>> solutions = [Solution("", ("aaa", "b"), 0), Solution("", ("a",), -1)]
    >>> guesses(solutions)["longest"]
    [0.5, 0.5, 0.5]
    """
    wrong = [solution for solution in solutions if solution.label >= 0]
    lengths = [[len(step) for step in solution.steps] for solution in wrong]
    hits = {
        "chance": [1 / len(row) for row in lengths],
        "longest": [row.index(max(row)) == s.label for row, s in zip(lengths, wrong)],
    }
    return {
        name: [2 * c / (1 + c**0.5) ** 2 for c in rerank.bootstrap(torch.tensor(values).double())]
        for name, values in hits.items()
    }


def labels_of(solutions: list[Solution]) -> torch.Tensor:
    """[B]"""
    return torch.tensor([solution.label for solution in solutions])


def localise(
    dev: list[dict], dev_labels: torch.Tensor, test: list[dict], labels: torch.Tensor
) -> dict:
    """{"f1": [f1, low, high], "wrong", "right", "rule", "threshold", "dev_f1"} of one signal, and
    "by_rule": the F1 of each rule alone.

    Rule and threshold are those with the highest F1 on dev. Nothing is chosen on test.
    """
    dev = with_falls(dev)
    test = with_falls(test)
    best = {rule: best_threshold(padded(dev, rule), dev_labels) for rule in RULES}
    predicted = {
        rule: predict(padded(test, rule), threshold) for rule, (_, threshold) in best.items()
    }
    by_rule = {rule: f1_interval(named, labels) for rule, named in predicted.items()}
    rule = max(best, key=best.get)
    dev_f1, threshold = best[rule]
    shares = {name: share.item() for name, share in accuracies(predicted[rule], labels).items()}
    chosen = {"rule": rule, "threshold": threshold, "dev_f1": dev_f1}
    return shares | chosen | {"f1": by_rule[rule], "by_rule": by_rule}


# --- a run ----------------------------------------------------------------------------------------


def kept(folder: Path | None, name: str, solutions: list[Solution], make: Callable) -> list[dict]:
    """make()'s step scores of these solutions, from a file if they are there; without a folder,
    anew."""
    if folder is None:
        return make()
    path = folder / f"{name}.json"
    if path.exists():
        scored = json.loads(path.read_text())
        # Those of other solutions, as of another --count, would stand beside the wrong labels.
        if [len(one["lowest"]) for one in scored] == [len(s.steps) for s in solutions]:
            return scored
    folder.mkdir(parents=True, exist_ok=True)
    scored = make()
    checkpoint.write_text(path, json.dumps(scored))
    return scored


def main(arguments: list[str] | None = None) -> dict:
    """{signal: `localise`} of a run's base, of what else was trained on its demonstrations, and of
    its reward; {"chance", "longest": {"f1"}}."""
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py")
    parser.add_argument(
        "--dev", required=True, metavar="FILE", help="the threshold is chosen on it"
    )
    parser.add_argument("--test", required=True, metavar="FILE", help="F1 is measured on it")
    parser.add_argument("--count", type=int, help="so many of each file (default: all)")
    experts = "so many experts' solutions of validation questions, as right ones, to dev"
    parser.add_argument("--experts", type=int, default=100, metavar="N", help=experts)
    scores = "keep what is said of every step here, and do not ask again (of runs with one base)"
    parser.add_argument("--scores", metavar="FOLDER", type=Path, help=scores)
    untrained = "ask this model too, as untrained_logprob: what the run's base was trained from"
    parser.add_argument("--untrained", metavar="MODEL", help=untrained)
    args = parser.parse(arguments)
    loading.quiet()
    dev = read_solutions(args.dev, args.count)
    test = read_solutions(args.test, args.count)
    device = loading.pick_device("auto")
    run = Path(args.run)
    base, tokenizer, discriminator, judges, s = rerank.models_of_run(run, "base", device)
    dev += right_solutions(data.load_examples(s["data"], "validation", args.experts, s["seed"]))
    models = {"logprob": base} | judges
    if args.untrained:
        loading.check_same_tokenizer(tokenizer, args.untrained)
        models["untrained_logprob"] = loading.load_causal(args.untrained, device)
    functions = {"reward": discriminator.reward_model.scores}  # f of every token
    for name, model in models.items():
        functions[name] = partial(policy.token_logprobs, model)
    results = {name: {"f1": f1} for name, f1 in guesses(test).items()}
    for name, function in functions.items():
        who = run.name if name == "reward" else name
        on_dev, on_test = (
            kept(
                args.scores,
                f"{file}-{who}",
                solutions,
                partial(score, tokenizer, solutions, function, device),
            )
            for file, solutions in (("dev", dev), ("test", test))
        )
        results[name] = localise(on_dev, labels_of(dev), on_test, labels_of(test))
    for name, one in results.items():
        f1 = "{:.3f} [{:.3f}, {:.3f}]".format(*one["f1"])
        print(f"{name:18s}{f1:24s}{one.get('rule', '')}")
    return results


if __name__ == "__main__":
    sys.exit(exit_status(main))
