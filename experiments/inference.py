"""What a learnt reward is worth at inference, with the models of the main part (experiments/run.py).

For each seed: the reward learnt from 256 demonstrations reranks the samples of the base (up to N = 64), of SFT and of
IRL's policy: it was learnt against IRL's policy, and is used on others here. Then transfer, for words: the same reward on
problems with a step more, and with numbers twice as large, than any it was trained on.
"""

import json
from pathlib import Path

import torch

import data
import rerank
import reward
from engine import loading
from engine.candidates import collect
from engine.errors import UserError
from experiments import run as runs

# what is judged: (label, whose samples, how many, what the problems are)
CASES = (
    ("base", "base", 64, {}),
    ("sft", "sft", 16, {}),
    ("irl", "policy", 16, {}),
    ("a step more", "base", 16, {"steps": 4}),
    ("numbers twice as large", "base", 16, {"largest": 80}),
)


def judge(name: str, seed: int, quick: bool) -> dict:
    """{label: what rerank.assess says} for the models of one seed."""
    folder = runs.ROOT / "runs" / f"x-{name}-main-256-{seed}"
    if not (folder / "reward").exists():
        raise UserError(f"{folder} holds no models: run --only main first")
    base, tokenizer, discriminator, judges, _ = rerank.models_of_run(folder, "base", "cpu")
    found = {}
    for label, whose, count, problems in CASES:
        if problems and name != "words":
            continue
        model = base if whose == "base" else loading.load_policy(str(folder / whose))[0]
        test = data.load_examples(name, "test", 20 if quick else 300, seed, **problems)
        count = min(count, 4) if quick else count
        generator = torch.Generator().manual_seed(seed)
        candidates = collect(model, tokenizer, test, count, 96, 1.0, generator)
        found[label] = rerank.assess(candidates, discriminator, base, judges, tokenizer, seed=seed)
        found[label].pop("distributions")
    return found


def own_grades(seed: int, quick: bool) -> dict:
    """What countdown's base itself would say behind each trace, log p("right") - log p("wrong"), as a way to choose: {n:
    [mean, low, high], .., "auroc": ..}. It takes no demonstrations, but somebody who knows what to ask for: the control
    that tells how much of the learnt reward was in the base."""
    base, tokenizer = loading.load_policy("countdown-base")
    test = data.load_examples("countdown", "test", 20 if quick else 250, seed)
    candidates = collect(base, tokenizer, test, 16, 40, 1.0, torch.Generator().manual_seed(seed + 1))
    batch, (right, wrong) = candidates.batch, tokenizer.convert_tokens_to_ids(["right", "wrong"])
    with torch.no_grad():
        logits = base(input_ids=batch.tokens).logits[torch.arange(len(batch)), batch.lengths - 1]  # [B, V]
    scores = (logits[:, right] - logits[:, wrong]).view(-1, candidates.n)
    found = {str(n): rerank.bootstrap(rerank.best_of_n(candidates.correct, scores, n)) for n in (4, 8, 16)}
    return found | {"auroc": rerank.auroc(scores.flatten(), candidates.correct.flatten())}


def save_own_grade(folder: Path) -> None:
    """The same grade as a reward model that has learnt nothing: a head w = W["right"] - W["wrong"], rows of the base's output
    matrix. A policy can practise on it like on a learnt one."""
    base, tokenizer = loading.load_policy("countdown-base")
    head = reward.load_reward("head", "countdown-base").model
    right, wrong = tokenizer.convert_tokens_to_ids(["right", "wrong"])
    with torch.no_grad():
        head.score.weight.copy_(base.get_output_embeddings().weight[right] - base.get_output_embeddings().weight[wrong])
    head.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(name: str, seeds: int, quick: bool) -> None:
    """results/inference/<data>-<seed>.json for every seed that has none yet."""
    loading.quiet()
    for seed in runs.seeds_of(name, seeds) if name == "countdown" else ():
        path = runs.results_folder() / "grades" / f"{seed}.json"
        if not path.exists():
            runs.keep(path, json.dumps(own_grades(seed, quick)))
    for seed in runs.seeds_of(name, seeds):
        path = runs.results_folder() / "inference" / f"{name}-{seed}.json"
        if not path.exists():
            runs.keep(path, json.dumps(judge(name, seed, quick)))
            print(f"inference, {name}, seed {seed}", flush=True)
