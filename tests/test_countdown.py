"""tasks/countdown.py: problems, the checker of whole traces, the corpus; and the shipped base."""

import itertools
import random
import re

import pytest
import torch

import data
import negatives
import rerank
from candidates import collect
from engine import loading
from engine.chat import token_ids
from tasks import countdown
from tasks.common import Solution, first_difference, wrong_digit


def brute_force(numbers, target):
    """Every way to combine the numbers, without `moves`: is the target among the results?"""
    if len(numbers) == 1:
        return numbers[0] == target
    results = False
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = [n for i, n in enumerate(numbers) if i not in (a, b)]
        for result in (numbers[a] + numbers[b], numbers[a] - numbers[b]):
            results |= result >= 0 and brute_force(rest + [result], target)
    return results


def response(*lines, answer):
    return data.response_text("\n".join(lines), str(answer))


def test_reachable_is_what_brute_force_finds():
    rng = random.Random(0)
    for _ in range(200):
        numbers = tuple(rng.randint(1, 9) for _ in range(3))
        target = rng.randint(0, 27)
        assert countdown.reachable(numbers, target) == brute_force(list(numbers), target)


def test_splits_share_no_problem_in_any_order():
    made = {
        s: [countdown.problem_of(solution.question) for solution in countdown.solutions(s, 300)]
        for s in data.SPLITS
    }
    found = {
        split: {(tuple(sorted(n)), t) for n, t in problems} for split, problems in made.items()
    }
    assert all(len(problems) == 300 for problems in found.values())
    for a, b in itertools.combinations(data.SPLITS, 2):
        assert not found[a] & found[b]
    assert all(countdown.split_of(n, t) == countdown.split_of(n[::-1], t) for n, t in made["test"])


def test_the_same_seed_makes_the_same_problems_and_too_many_are_not_there():
    assert countdown.solutions("train", 20, 1) == countdown.solutions("train", 20, 1)
    assert countdown.solutions("train", 20, 1) != countdown.solutions("train", 20, 2)
    everything = countdown.solutions("test", 700)
    assert 300 < len(everything) < 700


def test_every_expert_is_right_and_so_are_its_tokens():
    examples = data.load_examples("countdown", "train", 200)
    tokenizer = loading.load_tokenizer("countdown-base")
    for example in examples:
        text = data.response_text(example.trace, example.answer)
        assert data.is_correct(example, text)
        ids = token_ids(tokenizer, example.question + "\n" + text)
        assert (
            tokenizer.unk_token_id not in ids
            and data.decode(tokenizer, ids) == example.question + "\n" + text
        )


QUESTION = Solution("7 12 4 > 15", "", "15")


@pytest.mark.parametrize(
    "text, at",
    [
        (response("12+7=19", "19-4=15", answer=15), None),
        (response("7+12=19", "19-4=15", answer=15), None),
        (response("12-4=8", "8+7=15", answer=15), None),
        # says what it has not found: '1' is still right
        (response("12+7=19", "19-4=15", answer=19), "19</answer>"),
        (response("12+7=18", "18-4=14", answer=14), "8\n18"),  # a false line
        (response("12+7=19", "19-4=14", answer=15), "4\n</think>"),  # a false line to the target
        # true, but the target is out of reach: only 4 may be taken from 12
        (response("12-7=5", "5+4=9", answer=9), "7=5"),
        (response("12+3=15", answer=15), "3=15"),  # a number that is not there
        (response("12+12=24", "24-9=15", answer=15), "12=24"),  # a number used twice
        (response("12+7=19", answer=19), "</think>"),  # stops too early
        (response("12+7=19", "19-4=15", "15+0=15", answer=15), "15+0"),  # goes on
        (response("12+7=19", "19-4=15", answer=15) + " ", " "),
        ("", ""),
    ],
)
def test_the_first_error_is_where_no_good_line_goes(text, at):
    found = countdown.first_error(QUESTION, text)
    assert countdown.is_right(QUESTION, text) == (at is None)
    if at is None:
        assert found is None
    elif at == "19</answer>":
        assert text[found:] == "9</answer>"
    else:
        assert text[found:].startswith(at)


def test_the_verifier_reads_the_whole_trace_and_is_locked_in_training():
    example = data.load_examples("countdown", "test", 1)[0]
    assert not data.is_correct(example, f"<think>\n</think>\n<answer>{example.answer}</answer>")
    with data.no_verifier(), pytest.raises(RuntimeError, match="without a verifier"):
        data.is_correct(example, data.response_text(example.trace, example.answer))


def test_differences_and_slips():
    assert (
        first_difference("abc", "abd") == first_difference([1, 2], [1, 2, 3]) == 2
        and first_difference("", "") == 0
    )
    rng = random.Random(0)
    for number in (0, 7, 10, 305):
        for _ in range(20):
            slip = str(wrong_digit(number, rng))
            assert (
                len(slip) == len(str(number))
                and sum(a != b for a, b in zip(slip, str(number))) == 1
            )


def test_broken_copies_of_experts_are_wrong():
    rng = random.Random(0)
    for example in data.load_examples("countdown", "train", 100):
        broken = negatives.perturb(example, rng)
        if broken:
            assert not data.is_correct(example, data.response_text(broken.trace, broken.answer))


def test_grades_in_the_corpus_are_true_and_writers_are_sound():
    aimed = 0
    for question, trace, last, grade, stranger in countdown.graded_attempts(2000):
        right = countdown.is_right(Solution(question, "", ""), data.response_text(trace, last))
        assert right == (grade == "right")
        numbers, target = countdown.problem_of(question)
        assert countdown.split_of(numbers, target) == "train"
        for a, operator, b, result in re.findall(r"(\d+)([+-])(\d+)=(\d+)", trace):
            true = int(result) == (int(a) + int(b) if operator == "+" else int(a) - int(b))
            assert true or stranger
        aimed += right and not stranger
    assert 0.25 < aimed / 1400 < 0.45  # one in ten aims, of the others every fourth hits


def test_the_base_calculates_and_judges_and_does_not_plan():
    model, tokenizer = loading.load_policy("countdown-base")
    examples = data.load_examples("countdown", "validation", 200)
    generator = torch.Generator().manual_seed(0)
    candidates = collect(model, tokenizer, examples, 2, 40, 1.0, generator)
    lines = [
        line for text in candidates.texts for line in re.findall(r"(\d+)([+-])(\d+)=(\d+)", text)
    ]
    sound = sum(
        int(r) == (int(a) + int(b) if o == "+" else int(a) - int(b)) for a, o, b, r in lines
    ) / len(lines)
    assert sound >= 0.98
    assert 0.15 < float(candidates.correct.mean()) < 0.4
    batch, (right, wrong) = candidates.batch, tokenizer.convert_tokens_to_ids(["right", "wrong"])
    with torch.no_grad():
        logits = model(input_ids=batch.tokens).logits[
            torch.arange(len(batch)), batch.lengths - 1
        ]  # behind the end token
    assert rerank.auroc(logits[:, right] - logits[:, wrong], candidates.correct.flatten()) > 0.95
