"""experiments/steps.py: the first wrong step, with numbers worked out by hand."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SHARED

import data
import policy
from engine.errors import UserError
from experiments import steps
from experiments.steps import Solution

T = torch.tensor
PLAIN = {"problem": "1+2?", "steps": ["1+2=4", "so 4"], "label": 0}


def lines(path: Path, *records) -> str:
    written = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(written) + "\n")
    return str(path)


def test_both_forms_and_both_kinds_of_file(tmp_path):
    expected = Solution("1+2?", ("1+2=4", "so 4"), 0)
    assert steps.read_solutions(lines(tmp_path / "a", PLAIN)) == [expected]
    whole = lines(tmp_path / "b", json.dumps([PLAIN, PLAIN], indent=1))
    assert steps.read_solutions(whole) == [expected, expected]
    assert steps.read_solutions(whole, 1) == [expected]
    right = {
        "question": "?",
        "model_output_steps": ["a"],
        "model_output_solution_first_error_step": "N/A",
        "model_output_solution_correctness": "correct",
    }
    assert steps.read_solutions(lines(tmp_path / "c", right))[0].label == -1


@pytest.mark.parametrize(
    "record, says",
    [
        ("{broken", ":2: "),
        ("[1]", ":2: not a JSON object"),
        (PLAIN | {"label": 2}, ":2: field 'label' is 2, no step of 2"),
        (PLAIN | {"label": True}, ":2: field 'label' is True"),
        (PLAIN | {"label": -2}, ":2: field 'label' is -2"),
        (PLAIN | {"label": None}, ":2: field 'label' is None"),
        (PLAIN | {"steps": []}, ":2: field 'label' is 0, no step of 0"),
        (PLAIN | {"steps": ["a", ""]}, ":2: field 'steps' must be"),
        ({"steps": ["a"], "label": 0}, ":2: field 'question' is missing"),
        (PLAIN | {"steps": ["a", "\ud800"]}, ":2: the text holds"),
    ],
)
def test_bad_records_are_named_by_line(tmp_path, record, says):
    with pytest.raises(UserError, match=says):
        steps.read_solutions(lines(tmp_path / "x.jsonl", PLAIN, record))


def test_bad_input_is_one_line_and_exit_status_2(tmp_path):
    path = lines(tmp_path / "x.jsonl", "[{}]")
    command = [sys.executable, "-m", "experiments.steps", "--run", "x"]
    command += ["--dev", path, "--test", path]
    root = Path(steps.__file__).parents[1]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == f"error: {path}:1: field 'question' is missing or empty\n"


def test_the_answer_is_no_step_unless_it_is_the_wrong_one(tmp_path):
    record = {"question": "?", "model_output_steps": ["a", "#### 1", "The answer is: 1"]}
    for label, kept in ((1, ("a",)), (2, ("a", "#### 1"))):
        path = lines(tmp_path / "d", record | {"model_output_solution_first_error_step": label})
        assert steps.read_solutions(path)[0].steps == kept


def test_some_solutions_are_drawn_from_all_of_a_file(tmp_path):
    """ProcessBench's file has the wrong ones first: its first half has no right solution at all."""
    rows = []
    for i in range(100):
        rows.append({"question": f"{i}?", "steps": ["1"], "label": 0 if i < 50 else -1})
    path = lines(tmp_path / "sorted.jsonl", *rows)
    some = steps.read_solutions(path, 40)
    assert len(set(some)) == 40 and 10 < sum(s.label < 0 for s in some) < 30
    assert some == steps.read_solutions(path, 40) and len(steps.read_solutions(path, 1000)) == 100


def test_every_token_is_of_the_step_that_it_begins_in(shipped):
    solution = Solution("Ava has 14 pens. How many?", ("3*12=36", "14+36=50"), 1)
    ids, owners = steps.as_response(shipped[1], solution)

    def of(step: int) -> str:
        return data.decode(shipped[1], [t for t, owner in zip(ids, owners) if owner == step])

    assert of(-1).strip() in ("<think>", "")
    assert of(0).strip() == "3*12=36" and of(1).strip() == "14+36=50"
    whole = data.response_ids(shipped[1], data.response_text("3*12=36\n14+36=50", "50"))
    assert ids == whole[: len(ids)]  # the tokens that the policy would write


def test_tokens_that_hold_an_end_and_a_newline(qwen_tokenizer):
    """Qwen has a token '.\\n': it ends a step, and is that step's."""
    ids, owners = steps.as_response(qwen_tokenizer, Solution("?", ("It is 4.", "Then 5."), 0))
    tokens = [qwen_tokenizer.decode([i]) for i in ids]
    assert ".\n" in tokens and owners[tokens.index(".\n")] == 0
    assert sorted(set(owners)) == [-1, 0, 1] and owners == sorted(owners)


def test_scores_do_not_depend_on_padding_or_on_what_follows(shipped):
    model, tokenizer = shipped
    question = "Ava has 14 pens. Ava buys 3 bags of 12. How many pens?"
    long = Solution(question, ("3*12=36", "14+36=50", "50-9=41"), -1)
    short = Solution("Ava has 14 pens. How many pens?", ("3+12=15",), 0)
    function = partial(policy.token_logprobs, model)
    both = steps.score(tokenizer, [long, short], function)
    alone = steps.score(tokenizer, [short], function)[0]
    first_two = steps.score(tokenizer, [Solution(question, long.steps[:2], -1)], function)[0]
    # By a forward pass of its own: the tokens of the second step.
    ids, owners = steps.as_response(tokenizer, long)
    batch = data.make_batch([data.prompt_ids(tokenizer, question)], [ids])
    with torch.no_grad():
        logprobs = model(batch.tokens).logits[0].log_softmax(-1)  # [T, V]
    values = logprobs[-len(ids) - 1 : -1].gather(1, T(ids)[:, None]).squeeze(1)
    second = values[T(owners) == 1]
    expected = {"lowest": second.min(), "mean": second.mean(), "last": second[-1]}
    for rule in steps.READ:
        assert both[0][rule][1] == pytest.approx(expected[rule].item(), abs=1e-4)
        assert both[0][rule][:2] == pytest.approx(first_two[rule], abs=1e-4)
        assert both[1][rule] == pytest.approx(alone[rule], abs=1e-4) and len(alone[rule]) == 1


def test_a_score_that_is_not_finite_is_refused(shipped):
    def function(batch):
        return torch.full(batch.tokens.shape, math.nan)

    with pytest.raises(UserError, match="not a finite number"):
        steps.score(shipped[1], [Solution("Ava has 1 pens. How many?", ("1+1=2",), 0)], function)


def test_the_best_threshold_by_trying_all():
    torch.manual_seed(1)
    scores = torch.randn(12, 4).round(decimals=1)
    labels = torch.randint(-1, 4, (12,))
    f1, found = steps.best_threshold(scores, labels)
    tried = []
    for threshold in torch.linspace(-4, 4, 801).tolist():
        tried.append(steps.accuracies(steps.predict(scores, threshold), labels)["f1"].item())
    assert f1 == max(tried)
    assert f1 == steps.accuracies(steps.predict(scores, found), labels)["f1"]


def scored(rows: list, **others) -> list[dict]:
    """Step scores as steps.score gives them: the same by every rule, but for the others."""
    return [
        dict.fromkeys(steps.READ, row) | {r: o[i] for r, o in others.items()}
        for i, row in enumerate(rows)
    ]


def test_the_test_set_chooses_nothing():
    """On dev 'lowest' finds all, 'mean' nothing. On test it is the other way round."""
    good = [[0.0, -5.0], [0.0, 0.0]]
    bad = [[-5.0, 0.0], [-6.0, 0.0]]
    labels = T([1, -1])
    found = steps.localise(scored(bad, lowest=good), labels, scored(good, lowest=bad), labels)
    assert found["rule"] == "lowest" and found["dev_f1"] == 1.0 and found["f1"][0] == 0.0
    # Other solutions beside it change no prediction: scores are not scaled by the test set.
    test = scored([*good, [-90.0, -80.0]])
    more = steps.localise(scored(good), labels, test, T([1, -1, 0]))
    assert more["f1"][0] == 1.0


def test_a_fall_is_the_same_in_every_style():
    """Test solutions are of another writer: all scores are 10 lower. The wrong steps are the ones
    that fall, on dev and there."""
    dev = [[5.0, 5.0, 1.0], [5.0, 2.0, 5.0], [1.0, 1.0, 1.0]]
    labels = T([2, 1, -1])
    test = [[score - 10 for score in row] for row in dev]
    found = steps.localise(scored(dev), labels, scored(test), labels)
    assert found["rule"] == "fall" and found["f1"][0] == 1.0
    assert found["by_rule"]["fall"] == found["f1"] and found["by_rule"]["lowest"][0] == 0.0


def test_scores_are_kept(tmp_path):
    """And are made again where no folder keeps them, and for other solutions."""
    made = []
    one = [Solution("?", ("1+1=2",), -1)]
    longer = [Solution("?", ("1+1=2", "2+1=3"), -1)]

    def make():
        made.append(1)
        return [{"lowest": [float(len(made))]}]

    for _ in range(2):
        assert steps.kept(tmp_path / "new", "dev-reward", one, make) == [{"lowest": [1.0]}]
    assert steps.kept(None, "dev-reward", one, make) == [{"lowest": [2.0]}]
    assert steps.kept(tmp_path / "new", "dev-reward", longer, make) == [{"lowest": [3.0]}]


def test_a_threshold_lies_between_wrong_steps_and_right_solutions():
    dev = scored([[-0.1, -2.0], [-0.1, -3.0], [-0.1, -0.2]])
    labels = T([1, 1, -1])
    found = steps.localise(dev, labels, dev, labels)
    assert found["right"] == found["wrong"] == found["f1"][0] == 1.0
    assert -2.0 < found["threshold"] < -0.2


def test_a_guess_at_its_best():
    """By trying every probability of saying 'right'; the longest is named for two of the three."""
    texts = [("aaa", "b"), ("a", "bb", "c"), ("aa", "b", "c", "d"), ("a",)]
    solutions = [Solution("?", text, label) for text, label in zip(texts, (0, 1, 2, -1))]
    found = steps.guesses(solutions)
    for name, c in (("chance", (1 / 2 + 1 / 3 + 1 / 4) / 3), ("longest", 2 / 3)):
        q = torch.arange(1, 1000) / 1000
        tried = 2 * q * (1 - q) * c / (q + (1 - q) * c)
        assert found[name][0] == pytest.approx(tried.max().item(), abs=1e-5)
        assert found[name][1] <= found[name][0] <= found[name][2]


def test_the_real_files():
    """What is known of them: 207 wrong; chance names 20.8% of these, the longest step 40.6%."""
    if not (SHARED / "data" / "processbench").is_dir():
        pytest.skip("no real data beside this checkout")
    solutions = steps.read_solutions(str(SHARED / "data" / "processbench" / "gsm8k.json"))
    dev = steps.read_solutions(str(SHARED / "data" / "mr_gsm8k" / "dev.jsonl"))
    wrong = [s for s in solutions if s.label >= 0]
    assert (len(solutions), len(wrong), len(dev)) == (400, 207, 295)
    assert (steps.labels_of(dev) >= 0).all()
    found = steps.guesses(solutions)
    for name, c in (("longest", 0.406), ("chance", 0.208)):
        assert found[name][0] == pytest.approx(2 * c / (1 + c**0.5) ** 2, abs=1e-3)


def test_the_interval_of_f1_holds_95_percent_over_solutions():
    """400 wrong and 400 right solutions, half of each judged rightly: F1 = 1/2.

    Both shares have a variance of 1/4 over 400; around equal shares F1 moves as their mean does.
    """
    labels = T([0, -1] * 400)
    predicted = T([0, -1, 5, 5] * 200)
    f1, low, high = steps.f1_interval(predicted, labels, draws=2000)
    error = (0.25 / 400 / 2) ** 0.5
    assert f1 == 0.5
    assert low == pytest.approx(0.5 - 1.96 * error, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * error, abs=0.005)
    again = steps.f1_interval(predicted, labels, draws=50, seed=3)
    assert again == steps.f1_interval(predicted, labels, draws=50, seed=3)
    assert again != steps.f1_interval(predicted, labels, draws=50, seed=4)
