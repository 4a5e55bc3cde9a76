"""experiments/real.py and real_tables.py: a whole run of a tiny model, and the tables by hand."""

import copy
import itertools
import json
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import all_logprobs, examples_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import data
import irl
import policy
import rerank
import reward
import train
from engine import loading
from engine.chat import set_date
from engine.errors import UserError
from experiments import real, real_tables
from experiments.together import Together

T = torch.tensor


def test_ties_fall_to_the_highest_sum():
    """Against counting votes: the most votes, then the highest sum of scores, without weights."""
    torch.manual_seed(3)
    keys = torch.randint(0, 4, (40, 6))
    correct = (keys == 1).float()
    scores = torch.randn(40, 6) * 100
    votes = rerank.majority_vote(correct, keys, 6, real_tables.tie_weights(scores))
    for q in range(40):
        standing = {}
        for answer in set(keys[q].tolist()):
            of_it = scores[q][keys[q] == answer]
            standing[answer] = (len(of_it), float(of_it.sum()))
        assert votes[q] == float(max(standing, key=standing.get) == 1)


def test_a_trace_without_a_score_breaks_no_tie():
    """It counts as a vote and is worth the lowest score; equal scores decide nothing."""
    weights = real_tables.tie_weights(T([[-torch.inf, 1.0, 3.0], [2.0, 2.0, 2.0]]))
    assert weights[0].tolist() == pytest.approx([1, 1, 1 + 1 / 6])
    assert weights[1].tolist() == [1, 1, 1]


def record(texts: list[str], **scores) -> dict:
    return {"question": "2+3?", "answer": "5", "texts": texts, "scores": scores}


def test_a_choice_is_by_its_own_scores():
    """Two questions; the judge is right, the writer is not; the longer text is the wrong one."""
    right = "<answer>5</answer>"
    wrong = "<answer>16</answer>"
    texts = [right, wrong] * 4
    good = [1.0, 0.0] * 4
    bad = [0.0, 1.0] * 4
    records = [record(texts, logprob=bad, reward=good)] * 2
    found = real_tables.choices(records, "gsm8k")
    best = {name: interval[0] for name, interval in found["8"].items()}
    assert best["reward"] == best["shortest"] == best["majority_reward"] == best["oracle"] == 1
    assert best["logprob"] == best["longest"] == best["majority_logprob"] == 0
    assert best["random"] == best["majority"] == 0.5
    assert found["gain"]["majority_reward"] == [0.5, 0.5, 0.5]
    assert found["auroc"]["reward"] == 1
    assert found["tied"] == 1  # 4 votes for either answer


def test_gains_stand_apart_by_what_a_problem_needs():
    """1 + 2 + 3 is 6; from 5, 4 and 7 one gets to 6 by a difference alone. The second seed has no
    fair SFT, so that it does not count."""

    def arm(right_by_sums: float, right_by_difference: float) -> dict:
        right = [right_by_sums, right_by_difference]
        return {
            column: pandas.Series(right, ["1 2 3 > 6", "4 5 7 > 6"]) for column in ("t1", "greedy")
        }

    seeds = [{"irl": arm(1.0, 0.25), "sft_fair": arm(0.5, 0.0)}, {"irl": arm(0.0, 0.0)}]
    assert real_tables.by_need(seeds)["irl"] == {
        "sums alone": [1.0] * 3,
        "sums alone, beyond fair SFT": [0.5] * 3,
        "a difference": [0.25] * 3,
        "a difference, beyond fair SFT": [0.25] * 3,
    }


def test_where_the_question_gives_the_answer_whole_texts_are_voted_on():
    """All 8 say 24, so that the vote on answers is chance; 3 of them write the same."""

    def text(trace: str) -> str:
        return f"<think>\n{trace}\n</think>\n<answer>24</answer>"

    wrong = [text(f"{a}+16=32\n32-8=24") for a in (12, 13, 14, 15, 17)]
    texts = [*wrong, *[text("16+16=32\n32-8=24")] * 3]
    question = {"question": "16 16 8 > 24", "answer": "24", "texts": texts}
    judges = {"good": [0.0] * 5 + [1.0] * 3, "bad": [1.0] * 5 + [0.0] * 3}
    found = real_tables.choices([question | {"scores": judges}], "countdown")
    assert found["8"]["majority"][0] == 3 / 8 and found["8"]["majority_text"][0] == 1
    assert found["beyond_majority_text"]["good"] == [0, 0, 0]
    assert found["beyond_majority_text"]["bad"] == [-1, -1, -1]
    assert found["tied"] == 0


def test_an_arm_is_averaged_over_problems():
    """Each problem is the mean of its seeds, in whatever order they asked; against fair SFT problem
    by problem. A seed without shares leaves nothing."""

    def shares(values, problems="ab"):
        return pandas.Series(values, list(problems), dtype=float)

    seeds = [
        {
            "irl": {"t1": shares([1, 0]), "greedy": shares([1, 0])},
            "sft_fair": {"t1": shares([0.5, 0]), "greedy": shares([0, 0])},
        },
        {
            "irl": {"t1": shares([0, 1], "ba"), "greedy": shares([0, 0], "ba")},
            "sft_fair": {"t1": shares([0, 1], "ba"), "greedy": shares([1, 0], "ba")},
        },
    ]
    over = real_tables.over_problems(seeds, "irl")
    # In both seeds "a" is right and "b" wrong: there are two problems, not four.
    assert over["t1"] == [0.5, 0, 1] and over["greedy"][0] == 0.25
    # "a" has 1 to fair SFT's 0.75 at T = 1; greedily "a" has 0.5 to 0 and "b" 0 to 0.5.
    assert over["beyond_sft_fair"] == {"t1": [0.125, 0, 0.25], "greedy": [0, -0.5, 0.5]}
    one = {name: columns for name, columns in seeds[0].items() if name == "irl"}
    assert "beyond_sft_fair" not in real_tables.over_problems([one], "irl")
    assert real_tables.over_problems([*seeds, {"irl": {}}], "irl") == {}


def test_policies_are_compared_on_the_seeds_that_have_both():
    """A pair of COMPARED, and with several seeds each arm and fair SFT, seed by seed."""

    def arm(first, second):
        values = pandas.Series([first, second], ["a", "b"], dtype=float)
        return {"t1": values, "greedy": values}

    both = {"irl_kl": arm(1, 0), "best_logprob": arm(0, 0), "sft_fair": arm(1, 1)}
    alone = {"irl_kl": arm(1, 1), "sft_fair": arm(1, 0)}
    compared = real_tables.side_by_side({0: both, 1: alone})
    pair = compared["irl_kl, beyond best_logprob"]
    assert pair == {"t1": [0.5, 0, 1], "greedy": [0.5, 0, 1], "seeds": 1}
    assert compared["irl_kl, seed 0"] == {"t1": [0.5, 0, 1], "greedy": [0.5, 0, 1], "seeds": 1}
    assert compared["irl_kl, beyond sft_fair, seed 0"]["t1"] == [-0.5, -1, 0]
    assert compared["irl_kl, beyond sft_fair, seed 1"]["t1"] == [0.5, 0, 1]
    assert "irl_kl, beyond best_logprob" not in real_tables.side_by_side({1: alone})
    # With one seed the table of arms says it already.
    assert set(real_tables.side_by_side({0: both})) == {"irl_kl, beyond best_logprob"}


def test_every_seed_asks_the_same_problems():
    """All 515, in another order: so that their answers are no independent ones."""
    orders = [real_tables.countdown_problems(seed) for seed in (0, 1)]
    assert len(orders[0]) > 500 and orders[0] != orders[1]
    assert len(set(orders[0]) & set(orders[1])) > 500
    # Shares stand beside the problems in the order in which they were asked.
    of_seed = real_tables.of_problems({"t1": [1.0, 0.5]}, 1)
    assert of_seed["t1"].to_dict() == dict(zip(orders[1], [1.0, 0.5]))


def test_what_arms_wrote_is_judged_question_by_question():
    right = "<answer>5</answer>"
    texts = {
        "sft": {"t1": [[right, "6"], ["6", "6"]], "greedy": [["6"], [right]]},
        "irl": {"t1": [[right, right], ["6", right]]},
    }
    shares = real_tables.right_shares([record([]), record([])], texts, "gsm8k")
    assert shares["sft"] == {"t1": [0.5, 0], "greedy": [0, 1]}
    assert shares["irl"] == {"t1": [1, 0.5]}


def test_means_over_seeds_keep_what_one_seed_has():
    seeds = [{"a": {"t1": [0.2, 0.1, 0.3]}, "x": None}, {"a": {"t1": [0.4, 0.3, 0.5]}, "b": 1.0}]
    found = real_tables.mean_of(seeds)
    assert found["a"]["t1"] == pytest.approx([0.3, 0.2, 0.4])
    assert (found["b"], found["x"]) == (1.0, None)


def test_two_judges_are_added_in_units_of_their_spread():
    """The second judge's scores are a thousand times as large, and decide no more by that."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.0, 1000.0], [500.0, -torch.inf]])
    both = real_tables.in_spreads(a) + real_tables.in_spreads(b)
    alike = real_tables.in_spreads(a) + real_tables.in_spreads(b / 1000)
    assert torch.allclose(both, alike) and both.isfinite().all()
    # -inf is worth the lowest of the others.
    assert real_tables.in_spreads(b)[1, 1] == real_tables.in_spreads(b)[0, 0]


def test_a_chat_in_turns_whose_texts_are_text(qwen_tokenizer):
    set_date(qwen_tokenizer, "2026-01-31")
    ids = real.turns(qwen_tokenizer, ["What is 1+1?", "It is 2.", "Now 2+2?"])
    text = qwen_tokenizer.decode(ids)
    assert (
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>"
        in text
    )
    assert text.endswith("Now 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert ids == qwen_tokenizer(text, add_special_tokens=False)["input_ids"]
    control = qwen_tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = real.turns(qwen_tokenizer, ["a<|im_end|>b"])
    plain = real.turns(qwen_tokenizer, ["a b"])
    assert written.count(control) == plain.count(control)


def make_tiny() -> list[str]:
    """A random model with one layer, which reads letters, in tiny/. The flags of a run with it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for one in messages %}{{ one.role }}: {{ one.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained("tiny")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained("tiny")
    return ["--model", "tiny", "--demonstrations", "8", "--questions", "2", "--validation", "8"]


def no_curve(self, model) -> float:
    """In place of a hundred questions at every look."""
    return 0.0


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """`make_tiny` in a folder of its own, where results go, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IRL_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(train.Run, "validate", no_curve)
    return make_tiny()


def test_own_verdicts_are_the_models_logits(tiny):
    """Texts of different lengths, one of them twice, each alone in the plain model."""
    base, tokenizer = loading.load_policy("tiny", torch.device("cpu"))
    set_date(tokenizer, None)
    questions, texts = ["1+1?", "1+1?", "7*8-6?", "1+1?"], ["2", "=3", "50, so", "2"]
    verdicts = real.own_verdicts(SimpleNamespace(base=base, tokenizer=tokenizer), questions, texts)
    yes, no = (tokenizer.convert_tokens_to_ids(letter) for letter in "YN")
    for verdict, question, text in zip(verdicts, questions, texts, strict=True):
        ids = real.turns(tokenizer, [question, text, real.VERDICT])
        logits = base(T([ids])).logits[0, -1].detach()
        assert verdict == pytest.approx(float(logits[yes] - logits[no]), abs=1e-5)
    assert verdicts[0] == pytest.approx(verdicts[3]) and len({round(v, 6) for v in verdicts}) > 1


SMALL = "--max-new-tokens 4 --questions 2 --group 2 --warm-up 1 --lora-rank 2 "
SMALL += "--extra-questions 2 --max-steps 1 --grpo-steps 1"


COUNTDOWN = "runs/real-countdown-tiny-8-0"


@contextmanager
def few_steps(where: Path):
    """Runs in this folder, of countdown's shortest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("IRL_RESULTS", str(where / "results"))
        patch.setattr(train.Run, "validate", no_curve)
        patch.setitem(real.CELLS, "countdown", ((1, 1e-3),))
        patch.setitem(real.LOOKS, "countdown", ((0.0, 1.0), (0.25, 0.2)))
        for run, flags in real.RUNS["countdown"].items():
            shorter = re.sub(r"-steps \d+", "-steps 2", flags)
            patch.setitem(real.RUNS["countdown"], run, shorter)
        yield patch


@pytest.fixture(scope="module")
def countdown_runs(tmp_path_factory):
    """Every stage of countdown, by one command: it takes a minute, so several tests read it."""
    where = tmp_path_factory.mktemp("countdown")
    with few_steps(where):
        command = [*make_tiny(), "--extra", "3", "--flags", SMALL]
        real.main(command)
    return SimpleNamespace(
        where=where,
        command=command,
        folder=where / COUNTDOWN,
        results=json.loads((where / "results/real.json").read_text()),
        page=(where / "results/real.md").read_text(),
    )


def of_the_tiny(runs) -> dict:
    """What real.json holds of these runs."""
    return runs.results["countdown"]["tiny"]["8"]


def kept_of(runs, stage: str) -> dict:
    """A stage's file."""
    return json.loads((runs.folder / f"{stage}.json").read_text())


def test_every_stage_says_how_it_was_made(countdown_runs):
    stages = {path.stem for path in countdown_runs.folder.glob("*.json")}
    assert stages == set(real.STAGES["countdown"])
    for stage in stages:
        kept = kept_of(countdown_runs, stage)
        assert kept["command"] and kept["commit"] == real.commit()


def test_every_policy_is_in_the_tables(countdown_runs):
    one = of_the_tiny(countdown_runs)
    arms = {"base", "sft", "sft_fair", "sft_with_base", *real.POLICIES}
    assert arms <= set(real_tables.arms_of(one)) and one["irl"]["seeds"] == 1 and "room" in one
    beyond = one["irl"]["beyond_sft_fair"]["t1"][0]
    assert abs(beyond - (one["irl"]["t1"][0] - one["sft_fair"]["t1"][0])) < 1e-6
    assert "beyond_sft_fair" in one["base"]  # its answers are kept as texts, the others' as shares
    assert set(one["errors"]) == {"sft", *real.POLICIES}
    table = real_tables.policies_table(countdown_runs.results)
    assert all(f"| {real_tables.ARMS[arm]} (8) |" in table for arm in arms)
    assert "## Countdown, tiny, 8 demonstrations" in countdown_runs.page


def test_every_judge_is_asked(countdown_runs):
    one = of_the_tiny(countdown_runs)
    rules = {
        "majority_text",
        "majority_reward",
        "reward_copies",
        "own_verdict",
        "sft_logprob",
        "oracle",
    }
    assert set(one["rerank"]) == {"base", "sft", "sft_first", "sft_validation", "errors-sft"}
    asked = ("base", "sft", "sft_first")
    assert all(rules <= set(one["rerank"][source]["8"]) for source in asked)
    # Two judges at once, beside one of them, and beside another two.
    for beyond, rival in real_tables.RIVALS.items():
        gains = one["rerank"]["sft_validation"][beyond]
        assert {"logprob + reward_copies", "logprob + sft_logprob"} <= set(gains)
        assert gains[rival] == [0, 0, 0]
    assert all(one["rerank"][of]["questions"] == 8 for of in ("sft_validation", "errors-sft"))
    assert {"reward", "logprob", "sft_logprob", "chance"} <= set(one["places"]["hit0"])
    # Which kinds a reward tells, by the kind that it has learnt from.
    told = kept_of(countdown_runs, "kinds")["told"]
    assert set(told) == {"copies", "broken", "carried", "from_base", "from_sft"}
    assert all(set(row) == {"broken", "carried", "length"} for row in told.values())
    assert one["told"] == told


def test_every_look_at_validation_is_kept(countdown_runs):
    """By fair SFT and by the rivals alike."""
    one = of_the_tiny(countdown_runs)
    asked = ("share of the base 0, T = 1, seed 0", "share of the base 0.25, T = 0.2, seed 0")
    runs = ("sft", *real.CHOOSERS, "best_true", "random")
    looks = {f"{run}-1-0.001, {how}" for run in runs for how in asked}
    # A policy that was trained on a reward is looked at as it is, and as fair SFT was chosen.
    fair = kept_of(countdown_runs, "sft")["chosen"]["temperature"]
    policies = (*real.REWARD_OF, *real.GRPO)
    as_it_is = "share of the base 0, T ="
    looks |= {f"{run}, {as_it_is} {t:g}, seed 0" for run in policies for t in {1, fair}}
    together = [f"sft + {weight:g} of the base's logits" for weight in real.WEIGHTS]
    looks |= {f"{name}, {as_it_is} {fair:g}, seed 0" for name in together}
    assert set(one["validation"]) == looks
    assert all(f"| {look} |" in countdown_runs.page for look in looks)


def test_the_rival_imitates_as_many(countdown_runs):
    """What irl_best imitates are demonstrations, and samples whose answers nobody has seen."""
    rows = (countdown_runs.folder / "irl_best" / "train.jsonl").read_text().splitlines()
    assert 8 <= len(rows) <= 8 + 3 * real.EXTRA_SAMPLES
    winners = kept_of(countdown_runs, "irl_best")["winners"]
    assert winners == kept_of(countdown_runs, "best_logprob")["winners"]
    assert len(rows) <= 8 + winners


def test_where_policies_and_rewards_start(countdown_runs):
    """All that follows SFT starts from the cell that was chosen."""
    at_base = (
        "from_base",
        "from_base_likelihood",
        "irl_kl_base",
        "irl_kl_base_long",
        "irl_kl_base_cheap",
    )
    reward_starts = {
        name: f"{COUNTDOWN}-{reward}/reward" for name, reward in real.REWARD_OF.items()
    } | dict.fromkeys(at_base, "tiny")
    few_updates = f"{COUNTDOWN}-sft-1-0.001/policy"
    chosen = kept_of(countdown_runs, "sft")["chosen"]["run"]
    for run in (*real.REWARD_OF, *real.GRPO, "copies", *at_base):
        path = countdown_runs.where / f"{COUNTDOWN}-{run}" / "settings.json"
        settings = json.loads(path.read_text())
        assert settings["model"] == f"{COUNTDOWN}-{chosen}/policy"
        assert settings["start"] == "base"
        assert settings["reward_model"] == reward_starts.get(run, few_updates)


def test_a_stage_whose_file_is_gone_is_made_of_what_is_kept(countdown_runs):
    """Nothing is sampled, looked at or trained again."""
    gone = ("irl", "rerank_sft")
    before = [without_seconds(countdown_runs, stage) for stage in gone]
    for stage in gone:
        (countdown_runs.folder / f"{stage}.json").unlink()
    with few_steps(countdown_runs.where) as patch:
        patch.setattr(real, "collect", None)
        patch.setattr(real.train, "evaluate", None)
        patch.setattr(train.Run, "train_irl", None)
        real.main(countdown_runs.command)
    assert before == [without_seconds(countdown_runs, stage) for stage in gone]


def test_a_prior_pays_for_what_it_holds_likely(shipped, settings):
    """c log p of every sampled token comes on top; nothing else changes."""
    discriminator = reward.make_discriminator(reward.load_reward("head", "base"), shipped[1])
    experts = examples_of(shipped[1], "words", "train", 4)
    parts = (settings, shipped[1], copy.deepcopy(shipped[0]), discriminator, experts)
    prior = copy.deepcopy(shipped[0])
    for parameter in prior.parameters():  # it is no copy of the policy
        parameter.data += 0.02 * torch.randn_like(parameter)
    loop = real.WithPrior(*parts, prior=prior)
    rollout, _ = loop.rollout(experts[:1], 2)
    without, _, _ = irl.IRL(*parts).rewards(rollout)
    rewards, _, _ = loop.rewards(rollout)
    batch = rollout.batch
    expected = without.clone()
    expected[batch.response_mask.bool()] += (
        real.PRIOR_COEF
        * all_logprobs(prior, batch)
        .gather(1, batch.tokens[batch.response_mask.bool()][:, None])
        .squeeze(1)
        .detach()
    )
    torch.testing.assert_close(rewards, expected, atol=1e-3, rtol=0)


def test_two_models_write_by_the_sum_of_their_logits(shipped):
    """Greedy, token by token, against each model's own logits without a cache."""
    torch.manual_seed(0)
    first, other = copy.deepcopy(shipped[0]), copy.deepcopy(shipped[0])
    for parameter in other.get_decoder().layers.parameters():  # the output matrix stays
        parameter.data += 0.1 * torch.randn_like(parameter)
    prompts = [example.prompt for example in examples_of(shipped[1], "words", "train", 5)]
    ends = data.end_tokens(shipped[1], first)
    both = Together(first, other, 2.0)
    written = policy.sample(both, prompts, ends, 12, 2, temperature=0.0)
    differ = 0
    for row, prompt in enumerate(p for p in prompts for _ in range(2)):
        start, stop = len(prompt), int(written.batch.lengths[row])
        tokens = written.batch.tokens[row : row + 1, :stop]
        with torch.no_grad():
            alone = first(tokens).logits[0, start - 1 : -1]
            logits = alone + 2.0 * other(tokens).logits[0, start - 1 : -1]
        assert torch.equal(logits.argmax(-1), tokens[0, start:])
        expected = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(written.logprobs[row, start:stop], expected, atol=1e-4, rtol=0)
        differ += int((alone.argmax(-1) != tokens[0, start:]).sum())
    assert differ > 0  # the other model has a say


def test_logits_of_two_output_matrices_are_not_added(shipped):
    other = copy.deepcopy(shipped[0])
    other.get_output_embeddings().weight.data += 0.1
    with pytest.raises(UserError, match="the same W"):
        Together(shipped[0], other, 1.0)


def without_seconds(runs, stage: str) -> dict:
    """What a stage has left."""
    return kept_of(runs, stage) | {"seconds": 0}


def test_gsm8k_from_one_command(tiny, monkeypatch):
    monkeypatch.setattr(real, "CELLS", {"gsm8k": ((1, 1e-3),)})
    rows = []
    for a, b in itertools.product(range(2, 12), range(2, 12)):
        row = {"question": f"Ava has {a} pens and buys {b}. How many?", "answer": f"{a + b}"}
        rows.append(json.dumps(row | {"trace": f"{a}+{b}={a + b}"}))
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(rows[:80]))
    Path("data/test.jsonl").write_text("\n".join(rows[80:]))
    solution = {"question": "1+2?", "steps": ["1+2=4", "so 4"]}
    labelled = [json.dumps(solution | {"label": label}) for label in (0, -1, 1)]
    Path("labelled.jsonl").write_text("\n".join(labelled))
    files = ["--dev", "labelled.jsonl", "--test", "labelled.jsonl"]
    real.main(["--task", "gsm8k", *tiny, *files, "--flags", f"{SMALL} --data data"])
    found = json.loads(Path("results/real.json").read_text())
    votes = found["gsm8k_votes"]["tiny"]
    assert (votes["questions"], votes["temperature"]) == (2, 0.7)
    assert {"majority_reward", "majority_reward_sparse", "majority_shortest"} <= set(votes["8"])
    assert {"majority_own_verdict", "majority_sft_logprob", "reward"} <= set(votes["gain"])
    judges = {"reward", "logprob", "sft_logprob", "longest", "chance"}
    assert judges == set(found["processbench"]["tiny"]["reward"])
    assert set(found["processbench"]["tiny"]) == {"reward", "reward_sparse"}
    assert "| by fall |" in Path("results/real.md").read_text()
    # Another run does not look at the same questions.
    seen = real_tables.questions_seen("another")
    assert len(seen) == 2 and real_tables.questions_seen("tiny-8-0") == set()


def test_a_part_of_fewer_items_is_made_again(tmp_path):
    """Else the answers to three questions would stand beside five."""
    x = SimpleNamespace(folder=tmp_path)
    calls = []

    def square(items, start):
        calls.append(start)
        return [item**2 for item in items]

    assert real.in_parts(x, "squares", [1, 2, 3], 2, square) == [1, 4, 9]
    assert real.in_parts(x, "squares", [1, 2, 3, 4, 5], 2, square) == [1, 4, 9, 16, 25]
    assert calls == [0, 2, 2, 4]


def test_winners_come_the_surest_first(monkeypatch):
    """Of three questions' samples: each text once, in the order of its logit."""
    examples = [data.Example(f"{name}?", "", "5") for name in "abc"]
    texts = [["a0", "a1", "a1"], ["b0", "b1", "b0"], ["c0", "c1", "c2"]]
    scores = [[-2.0, -1.0, -1.0], [0.5, -3.0, 0.5], [0.1, 2.0, 1.0]]
    asked = []

    def judge(x, name, by, examples, samples):
        asked.append(by)
        return scores

    monkeypatch.setattr(real, "sample", lambda *_: [{"texts": some} for some in texts])
    monkeypatch.setattr(real, "judge", judge)
    monkeypatch.setattr(real.loading, "load_causal", lambda *_: None)
    x = SimpleNamespace(extra=examples, base=SimpleNamespace(device="cpu"), first_sft=lambda: "")
    for name in ("irl_best", "best_logprob", "best_base_logprob", "best_own_verdict"):
        surest = real.winners(name, x)
        assert [text for _, _, text in surest] == ["c1", "c2", "b0", "c0", "a1", "a0", "b1"]
        assert all(example.question[0] == text[0] for _, example, text in surest)
        assert all(not example.answer for _, example, _ in surest)
    assert asked == ["reward_copies", "sft_logprob", "logprob", "own_verdict"]


def test_a_choice_at_random_is_the_seeds(monkeypatch):
    """Nobody is asked, and another seed chooses others."""
    examples = [data.Example(f"{name}?", "", "5") for name in "abcdefgh"]
    monkeypatch.setattr(real, "sample", lambda *_: [{"texts": [e.question]} for e in examples])
    monkeypatch.setattr(real, "judge", None)
    monkeypatch.setattr(real.loading, "load_causal", lambda *_: None)

    def order(seed):
        base = SimpleNamespace(device="cpu")
        args = SimpleNamespace(seed=seed)
        x = SimpleNamespace(extra=examples, base=base, first_sft=lambda: "", args=args)
        return [text for _, _, text in real.winners("random", x)]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == [example.question for example in examples]


def test_who_knows_the_answers_imitates_right_ones(monkeypatch):
    """The second question has no right sample."""
    examples = [data.Example(f"{name}?", "", "5") for name in "ab"]
    texts = [["<answer>4</answer>", "<answer>5</answer>"], ["<answer>4</answer>"] * 2]
    monkeypatch.setattr(real, "sample", lambda *_: [{"texts": some} for some in texts])
    monkeypatch.setattr(real.loading, "load_causal", lambda *_: None)
    x = SimpleNamespace(extra=examples, base=SimpleNamespace(device="cpu"), first_sft=lambda: "")
    surest = real.winners("best_true", x)
    assert [(score, example.question) for score, example, _ in surest] == [
        (1, "a?"),
        (0, "a?"),
        (0, "b?"),
    ]
    assert surest[0][2] == "<answer>5</answer>"


def test_errors_are_told_by_where_they_arrive(tmp_path, monkeypatch):
    """Two right samples of four, a false last line, and a trace that misses the target."""
    question = "7 12 4 > 15"
    right = data.response_text("12+7=19\n19-4=15", "15")
    forced = data.response_text("12-7=5\n5+4=15", "15")
    misses = data.response_text("12-7=5\n5+4=9", "9")
    texts = [right, right, forced, misses]
    (tmp_path / "sft.json").write_text(json.dumps({"chosen": {"run": "sft-1-0.001"}}))
    monkeypatch.setattr(real, "sample", lambda *_: [{"texts": texts}])
    loaded = []
    monkeypatch.setattr(real.loading, "load_causal", lambda path, _: loaded.append(path))
    expert = data.Example(question, "", "15", task="countdown")
    x = SimpleNamespace(folder=tmp_path, run=Path, validation=[expert])
    x.base = SimpleNamespace(device="cpu")
    [shares] = real.kinds_of_errors(x)["errors"].values()
    assert loaded == ["sft-1-0.001/policy"]
    assert {kind: share[0] for kind, share in shares.items()} == {
        "right": 0.5,
        "wrong, at the target": 0.25,
        "wrong, elsewhere": 0.25,
    }


def test_imitated_are_winners_as_sure_as_demonstrations_and_as_many_of_the_rivals(
    tmp_path, monkeypatch
):
    """That is two of three; the rival's scores, all negative, do not say where to stop."""
    right = "<think>\n1+1=2\n</think>\n<answer>2</answer>"
    scores = {"irl_best": (2.0, 1.5, 0.5), "best_logprob": (-1.0, -2.0, -3.0)}

    def winners(name, x):
        return [(score, data.Example(f"{score}?", "", ""), right) for score in scores[name]]

    chosen = {"updates": 1, "rate": 1e-3, "run": "a", "share": 0.0, "temperature": 1.0}
    (tmp_path / "sft.json").write_text(json.dumps({"chosen": chosen}))
    monkeypatch.setattr(real, "winners", winners)
    monkeypatch.setattr(real, "tuned", lambda *_: {"chosen": chosen})
    # What D says of five demonstrations: three quarters of them reach 1.
    monkeypatch.setattr(real, "judge", lambda *_: [[2.0], [0.0], [3.0], [1.0], [2.0]])
    seen = {"t1": [0, 0, 0], "greedy": [0, 0, 0], "shares": {}}
    monkeypatch.setattr(real, "look", lambda *_: [seen])
    expert = data.Example("2+1?", "2+1=3", "3")
    x = SimpleNamespace(experts=[expert], validation=[expert], test=[], folder=tmp_path)
    x.result_of = partial(real.Experiment.result_of, x)
    with pytest.raises(UserError, match="run the stage irl_best first"):
        real.imitate_best("best_logprob", x)
    for name in scores:
        stage = real.imitate_best(name, x)
        (tmp_path / f"{name}.json").write_text(json.dumps(stage))
        rows = (tmp_path / name / "train.jsonl").read_text().splitlines()
        asked = [json.loads(row)["question"] for row in rows]
        assert asked == ["2+1?", *(f"{score}?" for score in scores[name][:2])]


def test_room_is_of_the_seeds_that_have_grpo_and_hours_are_of_all(monkeypatch):
    """Where one of two seeds has no GRPO, its fair SFT does not count."""

    def arm(share: float) -> dict:
        columns = {"t1": [share] * 3, "greedy": [share] * 3}
        return columns | {"shares": {column: [share] * 4 for column in columns}}

    seeds = [{"sft_fair": arm(0.25), "grpo": arm(0.5)}, {"sft_fair": arm(0.0)}]
    runs = {
        str(seed): {
            "model": "m",
            "demonstrations": 8,
            "seed": seed,
            "stages": {"some": {"arms": arms, "seconds": 3600}, "other": {"seconds": 1800}},
        }
        for seed, arms in enumerate(seeds)
    }
    monkeypatch.setattr(real_tables, "stored", {"countdown": runs}.get)
    one = real_tables.results_of("countdown")["m"]["8"]
    assert one["room"] == 25 and one["sft_fair"]["t1"][0] == 0.125
    assert one["hours"] == 3


def test_another_seed_takes_the_settings_of_the_first(tiny, monkeypatch):
    """Beside the first cell, where the reward starts; a look has their share and temperature."""
    monkeypatch.setattr(real, "CELLS", {"countdown": ((1, 1e-3), (3, 1e-3))})
    command = [*tiny, "--flags", SMALL, "--seed", "1", "--sft", "2", "0.001", "0.25", "0.2"]
    real.main([*command, "--only", "sft"])
    stage = json.loads(Path("runs/real-countdown-tiny-8-1/sft.json").read_text())
    assert [look["updates"] for look in stage["looks"]] == [1, 2]
    for look in stage["looks"]:
        assert (look["rate"], look["share"], look["temperature"]) == (0.001, 0.25, 0.2)
    assert {run.name for run in Path("runs").iterdir()} == {
        "real-countdown-tiny-8-1",
        "real-countdown-tiny-8-1-sft-1-0.001",
        "real-countdown-tiny-8-1-sft-2-0.001",
    }


def test_what_sft_tries_can_be_given(tiny):
    """Its updates and rates, and fair SFT's shares of the base and temperatures."""
    given = ["--cells", "1 1e-3, 2 2e-3", "--looks", "0 1, 0.25 0.2"]
    real.main([*tiny, "--flags", SMALL, *given, "--only", "sft"])
    stage = json.loads(Path("runs/real-countdown-tiny-8-0/sft.json").read_text())
    columns = ("updates", "rate", "share", "temperature")
    assert [tuple(look[column] for column in columns) for look in stage["looks"]] == [
        (1, 0.001, 0.0, 1.0),
        (1, 0.001, 0.25, 0.2),
        (2, 0.002, 0.0, 1.0),
        (2, 0.002, 0.25, 0.2),
    ]


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "--model is missing"),
        (["--model", "x", "--only", "few_shott"], "invalid choice: 'few_shott'"),
        (["--model", "x", "--demonstrations", "0"], "--demonstrations must be"),
        (
            ["--task", "gsm8k", "--model", "x", "--sft", "240", "2e-3", "0", ".2"],
            "--sft, --cells and --looks are for countdown",
        ),
        (["--model", "x", "--cells", "60"], "'60' is not updates and a rate"),
        (
            ["--model", "x", "--cells", "60 1e-3", "--sft", "240", "2e-3", "0", ".2"],
            "leave one of them out",
        ),
        (
            ["--model", "x", "--looks", "0 .2", "--sft", "240", "2e-3", "0", ".2"],
            "leave one of them out",
        ),
        (["--model", "x", "--looks", "0"], "'0' is not a share and a temperature"),
    ],
)
def test_bad_flags(flags, says):
    with pytest.raises(UserError, match=says):
        real.main(flags)
