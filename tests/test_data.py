"""data.py: splits, the pupil, the step checker, answers, perturbations, masks, bad files."""

import copy
import json
import random
from types import SimpleNamespace

import pytest
from conftest import SHARED

import data
from data import Example
from engine import loading
from engine.candidates import from_texts
from engine.chat import chat_text, set_date, token_ids
from engine.errors import UserError
from engine.settings import BASES
from tasks import records, words
from tasks.answers import extract_answer, option_of, same_answer
from tasks.common import first_difference

EXPERT = Example(
    "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9. How many pens?", "3*12=36\n24+36=60\n60-9=51", "51", task="words"
)


def wrap(trace, answer="51"):
    return data.response_text(trace, answer)


# words ---------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_reproducible():
    splits = {split: data.load_examples("words", split, 300, seed=1) for split in data.SPLITS}
    questions = {split: {e.question for e in examples} for split, examples in splits.items()}
    assert all(len(q) == 300 for q in questions.values())
    assert not questions["train"] & questions["test"] and not questions["train"] & questions["validation"]
    assert splits["test"] == data.load_examples("words", "test", 300, seed=1)
    other_seed = {e.question for e in data.load_examples("words", "train", 300, seed=2)}
    assert not other_seed & questions["test"]


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_expert_traces_are_right_and_as_long_as_asked(steps):
    for example in data.load_examples("words", "train", 100, steps=steps, largest=60):
        lines = example.trace.split("\n")
        assert len(lines) == steps
        for line in lines:  # recomputed here by other means
            left, result = line.split("=")
            a, op, b = next((left.split(o)[0], o, left.split(o)[1]) for o in "+-*" if o in left)
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(result) > 0
        assert example.answer == result
        assert data.first_error(example, wrap(example.trace, example.answer)) is None


def test_pupil_misconceptions_are_the_documented_ones_and_propagate():
    problem = words.Problem(EXPERT.question, 24, [("packs", 3, 12), ("loss", 9, 0)])
    pupil = words.solve(problem, words.Pupil(1.0, 1.0, 0.0), random.Random(0))
    assert pupil.trace == "3+12=15\n24+15=39\n39-9=30" and pupil.answer == "30"
    problem = words.Problem("", 50, [("loss", 9, 0), ("gain", 1, 0)])
    assert words.solve(problem, words.Pupil(1.0, 1.0, 0.0), random.Random(0)).trace == "50-9=59\n59+1=60"


def test_pupil_is_right_about_a_third_of_the_time():
    rng = random.Random(0)
    problems = words.words_problems("train", 1000)
    right = sum(words.solve(p, words.Pupil(), rng).answer == words.solve(p).answer for p in problems) / 1000
    assert 0.25 < right < 0.45


@pytest.mark.parametrize(
    "trace, answer, rest",
    [
        ("3+12=15\n24+15=39\n39-9=30", "30", "+12=15"),  # the operator is the first wrong character
        ("3*12=36\n24+36=61\n61-9=52", "52", "1\n61-9"),  # the last digit of the second result
        ("3*12=36\n24+36=60\n60-9=51", "50", "0</answer>"),  # right trace, wrong answer
        ("3*12=36\n60-9=51", "51", "60-9=51\n"),  # a step left out
    ],
)
def test_first_error_is_exact(trace, answer, rest):
    response = wrap(trace, answer)
    assert response[data.first_error(EXPERT, response) :].startswith(rest)


def test_first_error_accepts_commuted_steps_and_finds_a_missing_end():
    assert data.first_error(EXPERT, wrap("12*3=36\n36+24=60\n60-9=51")) is None
    unfinished = wrap(EXPERT.trace)[:-5]
    assert data.first_error(EXPERT, unfinished) == len(unfinished)
    assert data.first_error(EXPERT, wrap(EXPERT.trace) + " and more") == len(wrap(EXPERT.trace))


def test_token_at_names_the_token_that_holds_a_character(shipped):
    _, tokenizer = shipped
    response = wrap("3+12=15\n24+15=39\n39-9=30", "30")
    ids = data.response_ids(tokenizer, response)
    index = data.token_at(tokenizer, ids, data.first_error(EXPERT, response))
    assert tokenizer.decode([ids[index]]) == "+" and index == 2
    assert data.token_at(tokenizer, ids, len(response)) == len(ids) - 1  # past the text: the end token


@pytest.mark.parametrize("name", data.EMBEDDED)
def test_every_embedded_task_has_all_that_a_task_needs(name):
    """Settings, a base that ships here, and experts whom its own checker finds right."""
    assert BASES.keys() == data.EMBEDDED.keys()
    assert BASES[name] in loading.SHIPPED
    for expert in data.load_examples(name, "test", 20):
        text = wrap(expert.trace, expert.answer)
        assert expert.task == name and data.is_correct(expert, text) and data.first_error(expert, text) is None
        assert not data.is_correct(expert, text.replace("<answer>", "<answer>9"))


# answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predicted, truth, same",
    [
        ("18", "18", True), ("$18.00", "18", True), ("18.", "18", True), ("18 dollars", "18", True), ("1,234", "1234", True),
        ("-5", "-5", True), ("5", "-5", False), ("−5", "-5", True), ("0.5", "1/2", True), ("3/4", "0.75", True),
        ("€1,000.50", "1000.5", True), ("50%", "50", True), ("12 34", "12", False), ("", "0", False), (None, "0", False),
        ("1/0", "0", False), ("12,34", "1234", False), ("eighteen", "18", False), ("1,000,000", "1000000", True),
        ("The left ventricle.", "left ventricle", True), ("B. Vitamin C", "vitamin c", True),
        ("right ventricle", "left ventricle", False),
        ("vitamin B12", "vitamin B6", False), ("A", "A", True), ("", "A", False), ("", "the", False), (".", "A", False),
        ("+5 dB", "-5 dB", False), ("−5 dB", "-5 dB", True), ("- 5 dB", "-5 dB", True), ("3 - 5 days", "3-5 days", True),
        ("< 5", "> 5", False), ("≤5 mg", "<= 5 mg", True), ("< 5 mg", "<= 5 mg", False), ("< 5", "5", False),
        ("=> 18", "18", True),
    ],
)  # fmt: skip
def test_same_answer(predicted, truth, same):
    assert same_answer(predicted, truth) is same


VALVES = ("Mitral valve", "Aortic valve", "Neither")


@pytest.mark.parametrize(
    "answer, options, index",
    [
        ("B", VALVES, 1), ("b", VALVES, 1), ("B.", VALVES, 1), ("(B)", VALVES, 1), ("B) the aortic valve", VALVES, 1),
        ("B. what leads to the aorta", VALVES, 1), ("aortic valve.", VALVES, 1), ("D", VALVES, None), ("", VALVES, None),
        ("A valve", VALVES, None), ("C", ("B12", "C", "D"), 1), ("D", ("B12", "C", "D"), 2), ("18.0", ("17", "18"), 1),
        ("18 pens", ("17", "18"), 1), ("K. pneumoniae", ("S. pneumoniae", "K. pneumoniae"), 1), ("A", (), None),
        ("> 5", ("< 5", "> 5"), 1),
    ],
)  # fmt: skip
def test_an_answer_names_an_option_by_letter_or_by_text(answer, options, index):
    assert option_of(answer, options) == index
    for truth in range(len(options)):  # the truth may be a letter, too, unless a letter is an option's text
        truths = [options[truth]] + (["ABC"[truth]] if "C" not in options else [])
        for written in truths:
            example = Example("Which?", "", written, options)
            assert data.is_correct(example, data.response_text("", answer)) is (index == truth)


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<think>\n1+1=2\n</think>\n<answer>2</answer>", "2"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>7", "7"),
        ("so 3+4=7.\n#### 7", "7"),
        ("hence \\boxed{7}.", "7"),
        ("She has 3 and gets 4, so 7.", "7"),
        ("I do not know.", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_the_verifier_can_be_locked():
    with data.no_verifier(), pytest.raises(RuntimeError, match="without a verifier"):
        data.is_correct(EXPERT, wrap(EXPERT.trace))
    with data.no_verifier(), pytest.raises(RuntimeError, match="without a verifier"):
        data.first_error(EXPERT, wrap(EXPERT.trace))
    assert data.is_correct(EXPERT, wrap(EXPERT.trace))


# perturbations -------------------------------------------------------------------------------------------------


def test_a_wrong_answer_is_another_option_in_the_same_form():
    rng, written = random.Random(0), {"B": {"A", "C"}, "(b)": {"(a)", "(c)"}, "the aortic valve": {VALVES[0], VALVES[2]}}
    for answer, others in written.items():
        example = Example("Which?", "", answer, VALVES)
        assert {data.perturb(example, rng, "answer").answer for _ in range(20)} == others


def test_perturbations_change_something_and_are_wrong():
    rng = random.Random(0)
    for example in data.load_examples("words", "train", 200):
        for kind in data.PERTURBATIONS:
            broken = data.perturb(example, rng, kind)
            if broken is None:
                continue
            assert data.first_error(example, wrap(broken.trace, broken.answer)) is not None  # wrong, not only different
            assert (broken.answer != example.answer) == (kind == "answer")


def test_no_perturbation_imitates_the_pupil():
    """'*' to '+', the pupil's first mistake, is never made: the reward must find it in samples."""
    rng = random.Random(0)
    for example in data.load_examples("words", "train", 300):
        before, after = example.trace, data.perturb(example, rng, "operator").trace
        changed = first_difference(before, after)
        assert (before[changed], after[changed]) in {("+", "-"), ("-", "+"), ("*", "/"), ("/", "*")}


def test_perturbing_text_answers_takes_another_option_and_nothing_else_to_break_is_none():
    rng = random.Random(0)
    example = Example("Which?", "Because so.", "Vitamin C", ("Vitamin C", "Vitamin D"))
    assert data.perturb(example, rng).answer == "Vitamin D"
    assert data.perturb(Example("Which?", "Because so.", "Vitamin C"), rng) is None
    assert data.perturb(Example("?", "5", "no"), rng, "swap") is None


# sources -------------------------------------------------------------------------------------------------------


def test_your_own_file_and_folder(tmp_path):
    rows = [{"question": f"What is {i}+1?", "trace": f"{i}+1={i + 1}", "answer": str(i + 1)} for i in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = [data.load_examples(str(tmp_path / "train.jsonl"), split) for split in data.SPLITS]
    assert sum(map(len, splits)) == 100 and all(splits)
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Q", "trace": "T", "answer": "A"}))
    assert data.load_examples(str(tmp_path), "test") == [Example("Q", "T", "A")]
    train, validation = (data.load_examples(str(tmp_path), split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 100 and not set(train) & set(validation)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ('{"question": "a", "trace": "b", "answer": "c"}\n{"question": ', r":2: "),
        ('{"question": "a", "trace": "b"}', r":1: field 'answer' is missing"),
        ('{"question": "a", "answer": "b"}', r":1: field 'trace' is missing"),
        ("[1, 2]", r":1: not a JSON object"),
        (r'{"question": "\ud800", "trace": "b", "answer": "c"}', r":1: field 'question': .* half of a surrogate pair"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, content, message):
    file = tmp_path / "mine.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        data.load_examples(str(file), "train")


def test_unknown_source_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        data.load_examples("gsm8", "train")


def test_hub_out_of_reach_says_how_to_give_a_folder():
    with pytest.raises(UserError, match="--data DIR"):
        data.load_examples("gsm8k", "train")


def test_gsm8k_real_text():
    if not (SHARED / "data" / "gsm8k").exists():
        pytest.skip("GSM8K is not beside this checkout (../shared/data/gsm8k)")
    folder = str(SHARED / "data" / "gsm8k")
    train, validation, test = (data.load_examples(folder, split) for split in data.SPLITS)
    assert len(train) + len(validation) == 7473 and len(test) == 1319
    assert not any("<<" in e.trace or "####" in e.trace for e in train + test)
    for example in train[:500]:
        response = data.response_text(example.trace, example.answer)
        assert data.is_correct(example, response)
        assert not data.is_correct(example, data.response_text(example.trace, example.answer + "1"))
        assert data.perturb(example, random.Random(0)) is not None


# tokens and masks ----------------------------------------------------------------------------------------------


def test_masks_come_from_lengths_and_hold_the_end_token():
    batch = data.make_batch([[5, 6], [7]], [[0, 3], [4, 0, 0]])  # 0 is the padding value and a real token too
    assert batch.response_mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.response(0) == [0, 3] and batch.response(1) == [4, 0, 0]
    assert batch[:1].tokens.tolist() == [[5, 6, 0, 3]]


def test_batches_of_different_width_join():
    joined = data.cat_batches(data.make_batch([[1]], [[2]]), data.make_batch([[1]], [[2, 3, 4]]))
    assert joined.tokens.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]] and joined.lengths.tolist() == [2, 4]


def test_tokens_decode_to_the_same_text(shipped):
    _, tokenizer = shipped
    for example in data.load_examples("words", "test", 50, steps=4):
        text = data.response_text(example.trace, example.answer)
        ids = data.response_ids(tokenizer, text)
        assert data.decode(tokenizer, ids) == text and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids + data.prompt_ids(tokenizer, example.question)


def test_chat_template_is_used_where_there_is_one(qwen_tokenizer):
    prompt = qwen_tokenizer.decode(data.prompt_ids(qwen_tokenizer, "What is 1+1?"))
    assert prompt.startswith("<|im_start|>user\nWhat is 1+1?") and prompt.endswith("<|im_start|>assistant\n")
    text = data.response_text("1+1=2", "2")
    ids = data.response_ids(qwen_tokenizer, text)
    assert data.decode(qwen_tokenizer, ids) == text and ids[-1] == qwen_tokenizer.eos_token_id


def test_a_response_ends_at_any_end_token_and_nothing_after_it_is_read(shipped):
    """The template's end of turn, which is trained; the tokenizer's; those of the model's generation_config."""
    tokenizer = copy.deepcopy(shipped[1])
    own = tokenizer.eos_token_id
    assert data.end_tokens(tokenizer, shipped[0]) == (own,)
    tokenizer.add_tokens(["<|turn|>", "<|other|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"
    turn, other = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|other|>"])
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[own, other]))
    assert data.end_tokens(tokenizer) == (turn, own) and data.end_tokens(tokenizer, model) == (turn, own, other)
    assert data.response_ids(tokenizer, "18")[-1] == turn
    example = Example("How many eggs?", "", "18")
    for end in ("<|turn|>", tokenizer.eos_token):
        text = f"18.{end}\nuser: Tom has 5 eggs"
        assert data.is_correct(example, data.decode(tokenizer, token_ids(tokenizer, text)))
        candidates = from_texts(tokenizer, [example], [text], 1)
        assert candidates.answers == [["18"]] and candidates.batch.response(0) == data.response_ids(tokenizer, "18.")


def test_qwen_ends_its_turn_with_im_end(qwen_tokenizer):
    """As the tokenizer of its base models does, whose own end is another token."""
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(data.end_tokens(tokenizer)) == ["<|im_end|>", "<|endoftext|>"]
    ids = token_ids(tokenizer, "18.<|im_end|>\n<|im_start|>user\nTom has 5 apples")
    assert extract_answer(data.decode(tokenizer, ids)) == "18"


def test_a_prompt_does_not_change_at_midnight(shipped):
    """transformers' strftime_now, and a date_string made of it, tell the date that was set."""
    tokenizer = copy.deepcopy(shipped[1])
    tokenizer.chat_template = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now( \"%d %b %Y\" ) %}{%- endif %}{%- endif %}"
        "{{ date_string }} {{ strftime_now('%Y-%m-%d') }}: {{ messages[0].content }}"
    )
    set_date(tokenizer, "2001-02-03")
    assert chat_text(tokenizer, "1+1?") == "03 Feb 2001 2001-02-03: 1+1?"
    with pytest.raises(UserError, match="YYYY-MM-DD, not '3.2.2001'"):
        set_date(tokenizer, "3.2.2001")


def test_too_long_examples_are_dropped_and_counted(shipped):
    _, tokenizer = shipped
    short, long = EXPERT, Example(EXPERT.question, "\n".join(["1+1=2"] * 100), "2")
    assert data.fit_context(tokenizer, [short, long], 256) == ([short], 1)
    with pytest.raises(UserError, match="none of the 1 examples fits"):
        data.fit_context(tokenizer, [long], 256)


def test_medreason_row_keeps_answer_text_only():
    row = {"question": "Which valve?", "options": "Answer Choices:\nA. Mitral valve\nB. Aortic valve", "reasoning": "...",
           "answer": "Aortic valve. Explanation: it lies between."}  # fmt: skip
    example = records.from_medreason(row)
    assert example.answer == "Aortic valve" and example.options == ("Mitral valve", "Aortic valve")
    assert "B. Aortic valve" in example.question
