"""What a learnt reward is worth at inference, with the models of the main part (run.py).

For each seed: the reward learnt from 256 demonstrations reranks the samples of the base (up to
N = 64), of SFT and of IRL's policy: it was learnt against IRL's policy, and is used on others here.
Then transfer, for words: the same reward on problems with a step more, and with numbers twice as
large, than any it was trained on.
"""

from collections.abc import Iterator

import torch

import data
import rerank
import reward
from candidates import collect
from engine import loading
from engine.errors import UserError
from experiments import store, trials

# What is judged: (label, whose samples, how many, what the problems are).
CASES = (
    ("base", "base", 64, {}),
    ("sft", "sft", 16, {}),
    ("irl", "policy", 16, {}),
    ("a step more", "base", 16, {"steps": 4}),
    ("numbers twice as large", "base", 16, {"largest": 80}),
)


def score_rows(results: dict, samples: str) -> Iterator[dict]:
    """The rows of scores.csv that rerank.assess's results have: means, without their intervals.

    >>> found = {"rerank": {"4": {"reward": [0.7, 0.6, 0.8]}, "auroc": {"reward": 0.9}}}
    >>> for row in score_rows(found, "base"):
    ...     print(row)
    {'samples': 'base', 'quantity': 'best of 4', 'by': 'reward', 'value': 0.7}
    {'samples': 'base', 'quantity': 'auroc', 'by': 'reward', 'value': 0.9}
    """
    tables = {}
    for name, table in results.get("rerank", {}).items():
        if name.isdigit():
            tables[f"best of {name}"] = table
    tables["auroc"] = results.get("rerank", {}).get("auroc", {})
    for kind, hits in results.get("localise", {}).items():
        for hit in ("hit0", "hit1", "step"):
            tables[f"{kind} {hit}"] = hits.get(hit, {})
    for by, rates in results.get("alarms", {}).items():
        for kind, rate in rates.items():
            tables.setdefault(f"alarms {kind}", {})[by] = rate
    for quantity, table in tables.items():
        for by, value in table.items():
            mean = value[0] if isinstance(value, list) else value
            yield {"samples": samples, "quantity": quantity, "by": by, "value": mean}


def judge(name: str, seed: int, quick: bool) -> list[dict]:
    """Rows of scores.csv for the models of one seed."""
    folder = store.ROOT / "runs" / f"x-{name}-main-256-{seed}"
    if not (folder / "reward").exists():
        raise UserError(f"{folder} holds no models: run --only main first")
    base, tokenizer, discriminator, judges, _ = rerank.models_of_run(folder, "base", "cpu")
    rows = []
    for label, whose, count, problems in CASES:
        if problems and name != "words":
            continue
        model = base
        if whose != "base":
            model, _ = loading.load_policy(str(folder / whose))
        test = data.load_examples(name, "test", 20 if quick else 300, seed, **problems)
        n = min(count, 4) if quick else count
        generator = torch.Generator().manual_seed(seed)
        candidates = collect(model, tokenizer, test, n, 96, 1.0, generator)
        assessed = rerank.assess(candidates, discriminator, base, judges, tokenizer, seed=seed)
        rows += score_rows(assessed, label)
    return rows


def own_grades(seed: int, quick: bool) -> list[dict]:
    """What countdown's base itself would say behind each trace, as a way to choose among them.

    That is log p("right") - log p("wrong"). It takes no demonstrations, but somebody who knows what
    to ask for: the control that tells how much of the learnt reward was in the base.
    """
    base, tokenizer = loading.load_policy("countdown-base")
    test = data.load_examples("countdown", "test", 20 if quick else 250, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    candidates = collect(base, tokenizer, test, 16, 40, 1.0, generator)
    batch = candidates.batch
    right, wrong = tokenizer.convert_tokens_to_ids(["right", "wrong"])
    with torch.no_grad():
        logits = base(input_ids=batch.tokens).logits  # [B, T, V]
    last = logits[torch.arange(len(batch)), batch.lengths - 1]  # [B, V]
    scores = (last[:, right] - last[:, wrong]).view(-1, candidates.n)  # [Q, N]
    own = {"samples": "base", "by": "own_grade"}
    rows = [{"quantity": "auroc", "value": rerank.auroc(scores.flatten(), candidates.correct.flatten())}]
    for n in (4, 8, 16):
        share = float(rerank.best_of_n(candidates.correct, scores, n).mean())
        rows.append({"quantity": f"best of {n}", "value": share})
    return [own | row for row in rows]


def save_own_grade(folder) -> None:
    """The same grade as a reward model that has learnt nothing, which a policy can practise on.

    A head w = W["right"] - W["wrong"], rows of the base's output matrix.
    """
    base, tokenizer = loading.load_policy("countdown-base")
    head = reward.load_reward("head", "countdown-base").model
    right, wrong = tokenizer.convert_tokens_to_ids(["right", "wrong"])
    with torch.no_grad():
        weight = base.get_output_embeddings().weight
        head.score.weight.copy_(weight[right] - weight[wrong])
    head.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(name: str, seeds: int, quick: bool) -> None:
    """Whatever seed has no rows yet."""
    loading.quiet()
    for seed in trials.seeds_of(name, seeds):
        known = store.read("scores")
        seeds_there = known[known["seed"] == seed]["trial"].unique()
        if name == "countdown" and "countdown-grades" not in seeds_there:
            store.add("scores", "countdown-grades", seed, own_grades(seed, quick))
        if f"{name}-inference" not in seeds_there:
            store.add("scores", f"{name}-inference", seed, judge(name, seed, quick))
            print(f"inference, {name}, seed {seed}", flush=True)
