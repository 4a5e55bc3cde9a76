"""experiments/steps.py: the first wrong step, with numbers worked out by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHARED

import data
import policy
from engine.errors import UserError
from experiments import steps
from experiments.steps import Solution

T, INF = torch.tensor, math.inf


def lines(path: Path, *records) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


PLAIN = {"problem": "1+2?", "steps": ["1+2=4", "so 4"], "label": 0}


def test_both_forms_and_both_kinds_of_file(tmp_path):
    expected = Solution("1+2?", ("1+2=4", "so 4"), 0)
    assert steps.read_solutions(lines(tmp_path / "a", PLAIN)) == [expected]
    assert steps.read_solutions(lines(tmp_path / "b", json.dumps([PLAIN, PLAIN], indent=1))) == [expected, expected]
    assert steps.read_solutions(lines(tmp_path / "b", json.dumps([PLAIN, PLAIN])), 1) == [expected]
    right = {"question": "?", "model_output_steps": ["a"], "model_output_solution_first_error_step": "N/A",
             "model_output_solution_correctness": "correct"}  # fmt: skip
    assert steps.read_solutions(lines(tmp_path / "c", right))[0].label == -1


@pytest.mark.parametrize("record, says", [
    ("{broken", ":2: "),
    ("[1]", ":2: not a JSON object"),
    (PLAIN | {"label": 2}, ":2: field 'label' is 2, no step of 2"),
    (PLAIN | {"label": True}, ":2: field 'label' is True"),
    (PLAIN | {"label": -2}, ":2: field 'label' is -2"),
    (PLAIN | {"steps": []}, ":2: field 'steps' must be"),
    (PLAIN | {"steps": ["a", ""]}, ":2: field 'steps' must be"),
    ({"steps": ["a"], "label": 0}, ":2: field 'question' is missing"),
    (PLAIN | {"steps": ["a", "\ud800"]}, ":2: the text holds"),
])  # fmt: skip
def test_bad_records_are_named_by_line(tmp_path, record, says):
    with pytest.raises(UserError, match=says):
        steps.read_solutions(lines(tmp_path / "x.jsonl", PLAIN, record))


def test_bad_input_is_one_line_and_exit_status_2(tmp_path):
    path = lines(tmp_path / "x.jsonl", "[{}]")
    command = [sys.executable, "-m", "experiments.steps", "--run", "x", "--dev", path, "--test", path]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(steps.__file__).parents[1])
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == f"error: {path}:1: field 'question' is missing or empty\n"
    with pytest.raises(UserError, match="is empty"):
        steps.read_solutions(lines(tmp_path / "empty"))


def test_every_token_is_of_the_step_that_it_begins_in(shipped):
    solution = Solution("Ava has 14 pens. How many?", ("3*12=36", "14+36=50"), 1)
    ids, owners = steps.as_response(shipped[1], solution)
    of = lambda step: data.decode(shipped[1], [token for token, owner in zip(ids, owners) if owner == step])
    assert of(-1).strip() in ("<think>", "") and of(0).strip() == "3*12=36" and of(1).strip() == "14+36=50"
    whole = data.response_ids(shipped[1], data.response_text("3*12=36\n14+36=50", "50"))
    assert ids == whole[: len(ids)]  # the tokens that the policy would write


def test_tokens_that_hold_an_end_and_a_newline(qwen_tokenizer):
    """Qwen has a token '.\\n': it ends a step, and is that step's."""
    ids, owners = steps.as_response(qwen_tokenizer, Solution("?", ("It is 4.", "Then 5."), 0))
    tokens = [qwen_tokenizer.decode([i]) for i in ids]
    assert ".\n" in tokens and owners[tokens.index(".\n")] == 0
    assert sorted(set(owners)) == [-1, 0, 1] and owners == sorted(owners)


def test_scores_equal_a_loop_and_padding_changes_nothing(shipped):
    model, tokenizer = shipped
    long = Solution("Ava has 14 pens. Ava buys 3 bags of 12. How many pens?", ("3*12=36", "14+36=50", "50-9=41"), -1)
    short = Solution("Ava has 14 pens. How many pens?", ("3+12=15",), 0)
    function = lambda batch: policy.token_logprobs(model, batch)
    both = steps.score(tokenizer, [long, short], function)
    alone = steps.score(tokenizer, [short], function)[0]
    batch, owners = steps.as_batch(tokenizer, [long])
    with torch.no_grad():
        values = function(batch)[0]
    for step in range(3):
        mine = values[owners[0] == step]
        for rule, expected in (("lowest", mine.min()), ("mean", mine.mean()), ("last", mine[-1])):
            assert both[0][rule][step] == pytest.approx(expected.item(), abs=1e-5)
    for rule in steps.RULES:
        assert both[1][rule] == pytest.approx(alone[rule], abs=1e-4) and len(alone[rule]) == 1
    # a step's score does not depend on what follows: the premise of right_parts
    cut = steps.score(tokenizer, [Solution(long.question, long.steps[:2], -1)], function)[0]
    assert cut["lowest"] == pytest.approx(both[0]["lowest"][:2], abs=1e-4)


def test_the_best_threshold_by_trying_all():
    torch.manual_seed(1)
    scores, labels = torch.randn(12, 4).round(decimals=1), torch.randint(-1, 4, (12,))
    for pointer in steps.POINTERS:
        found, f1 = steps.best_threshold(scores, labels, pointer)
        tried = [steps.accuracies(steps.predict(scores, t, pointer), labels)["f1"] for t in torch.linspace(-4, 4, 801).tolist()]
        assert f1 == max(tried) == steps.accuracies(steps.predict(scores, found, pointer), labels)["f1"]


def test_the_test_set_chooses_nothing():
    """On dev 'lowest' finds all, 'mean' nothing. On test it is the other way round, and 'lowest' is reported."""
    good, bad = T([[0.0, -5.0], [0.0, 0.0]]), T([[-5.0, 0.0], [-6.0, 0.0]])
    labels = T([1, -1])
    found = steps.localise({"lowest": good, "mean": bad}, labels, {"lowest": bad, "mean": good}, labels)
    assert (found["rule"], found["dev_f1"], found["f1"][0]) == ("lowest", 1.0, 0.0)
    found = steps.localise({"lowest": good, "mean": bad}, labels, {"lowest": good, "mean": bad}, labels)
    assert found["f1"][0] == 1.0 and found["wrong"] == found["right"] == 1.0


def test_wrong_solutions_alone_are_enough_for_a_threshold():
    dev = {"lowest": T([[-0.1, -4.0, 0.0], [-0.2, -0.1, -3.0]])}
    found = steps.localise(dev, T([1, 2]), {"lowest": T([[-0.3, -9.0], [-0.1, INF]])}, T([1, -1]))
    lowest, next_one = -3.0, -0.2
    assert lowest < found["threshold"] < next_one and found["dev_f1"] == 1.0 and found["f1"][0] == 1.0


def test_nothing_about_the_test_set_moves_a_threshold():
    """Other test solutions beside it change no prediction: scores are not scaled by the test set."""
    scores = T([[-0.1, -4.0, 0.0], [-0.2, -0.1, 0.3], [-3.0, -0.1, INF]])
    labels = T([1, -1, 0])
    alone = steps.localise({"lowest": scores}, labels, {"lowest": scores}, labels)
    assert alone["f1"][0] == alone["points"] == 1.0
    more = torch.cat([scores, T([[-90.0, -80.0, -99.0]])])
    both = steps.localise({"lowest": scores}, labels, {"lowest": more}, T([1, -1, 0, 0]))
    assert both["threshold"] == alone["threshold"] and both["f1"][0] == 1.0
    assert steps.localise({"lowest": scores}, labels, {"lowest": -scores}, labels)["points"] == 0.0


def test_right_solutions_keep_a_threshold_from_calling_everything_wrong():
    """On wrong solutions alone the best threshold lies above what right ones score."""
    wrong = T([[-0.1, -2.0], [-0.1, -3.0]])
    right = T([[-2.5, -2.6], [-0.3, -2.7]])
    test = {"lowest": torch.cat([wrong, right])}
    labels = T([1, 1, -1, -1])
    alone = steps.localise({"lowest": wrong}, labels[:2], test, labels)
    assert alone["right"] == 0.0 and alone["f1"][0] == 0.0
    both = steps.localise(test, labels, test, labels)
    assert both["right"] == 1.0 and both["f1"][0] > 0.6


def test_the_answer_is_no_step_unless_it_is_the_wrong_one(tmp_path):
    record = {"question": "?", "model_output_steps": ["a", "#### 1", "The answer is: 1"]}
    for label, kept in ((1, ("a",)), (2, ("a", "#### 1"))):
        path = lines(tmp_path / "d", record | {"model_output_solution_first_error_step": label})
        assert steps.read_solutions(path)[0].steps == kept


def test_a_guess_at_its_best():
    """By trying every probability of saying 'right'; the longest is named for two of the three."""
    lengths = [[3, 1], [1, 2, 1], [2, 1, 1, 1], [1]]
    found = steps.guesses(steps.guess_hits(lengths, [0, 1, 2, -1]))
    for name, c in (("chance", (1 / 2 + 1 / 3 + 1 / 4) / 3), ("longest", 2 / 3)):
        q = torch.arange(1, 1000) / 1000
        tried = steps.f1_of((1 - q) * c, q).max().item()
        assert found[name][0] == pytest.approx(tried, abs=1e-5)
        assert found[name][1] <= found[name][0] <= found[name][2]


def test_the_real_files():
    """What is known of them: 207 wrong and 193 right; chance names 20.8% of the wrong, the longest step 40.6%."""
    if not (SHARED / "data" / "processbench").is_dir():
        pytest.skip("no real data beside this checkout")
    solutions = steps.read_solutions(str(SHARED / "data" / "processbench" / "gsm8k.json"))
    dev = steps.read_solutions(str(SHARED / "data" / "mr_gsm8k" / "dev.jsonl"))
    wrong = [s for s in solutions if s.label >= 0]
    assert len(solutions) == 400 and len(wrong) == 207 and len(dev) == 295
    assert (steps.labels_of(dev) >= 0).all() and sum(1 / len(s.steps) for s in wrong) / 207 == pytest.approx(0.208, abs=5e-4)
    lengths = [[len(step) for step in s.steps] for s in solutions]
    found = steps.guesses(steps.guess_hits(lengths, [s.label for s in solutions]))
    assert found["longest"][0] == pytest.approx(steps.guess_f1(0.406), abs=1e-3)
    assert found["chance"][0] == pytest.approx(steps.guess_f1(0.208), abs=1e-3)


def test_some_solutions_are_drawn_from_all_of_a_file(tmp_path):
    """ProcessBench's file has the wrong ones first: the first half of it has no right solution at all."""
    path = tmp_path / "sorted.jsonl"
    lines = [{"question": f"{i}?", "steps": ["1"], "label": 0 if i < 50 else -1} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, lines)))
    some = steps.read_solutions(str(path), 40)
    assert len(set(some)) == 40 and 10 < sum(s.label < 0 for s in some) < 30
    assert some == steps.read_solutions(str(path), 40) and len(steps.read_solutions(str(path), 1000)) == 100


def test_the_interval_of_f1_holds_95_percent_over_solutions():
    """400 wrong and 400 right solutions, half of each judged rightly: F1 = 1/2. Both shares have a variance of 1/4 over 400, and
    around equal shares F1 moves as their mean does."""
    labels = T([0, -1] * 400)
    predicted = T([0, -1, 5, 5] * 200)
    f1, low, high = steps.f1_interval(predicted, labels, draws=2000)
    error = (0.25 / 400 / 2) ** 0.5
    assert f1 == 0.5
    assert low == pytest.approx(0.5 - 1.96 * error, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * error, abs=0.005)
    one, again, other = (steps.f1_interval(predicted, labels, draws=50, seed=seed) for seed in (3, 3, 4))
    assert one == again != other
