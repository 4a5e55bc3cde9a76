"""data.py: splits, the pupil, the step checker, answers, masks, bad files."""

import copy
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import SHARED

import data
from candidates import from_texts
from data import Example
from engine import loading
from engine.chat import chat_text, control_tokens, set_date, token_ids
from engine.errors import UserError
from engine.settings import BASES
from tasks import records, words
from tasks.answers import extract_answer
from tasks.common import split_of

EXPERT = Example(
    "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9. How many pens?",
    "3*12=36\n24+36=60\n60-9=51",
    "51",
    task="words",
)


def wrap(trace, answer="51"):
    return data.response_text(trace, answer)


# words --------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_reproducible():
    splits = {split: data.load_examples("words", split, 300, seed=1) for split in data.SPLITS}
    questions = {split: {e.question for e in examples} for split, examples in splits.items()}
    assert all(len(q) == 300 for q in questions.values())
    assert (
        not questions["train"] & questions["test"]
        and not questions["train"] & questions["validation"]
    )
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
            assert (
                {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
                == int(result)
                > 0
            )
        assert example.answer == result
        assert data.first_error(example, wrap(example.trace, example.answer)) is None


def test_pupil_misconceptions_are_the_documented_ones_and_propagate():
    problem = words.Problem(EXPERT.question, 24, [("packs", 3, 12), ("loss", 9, 0)])
    pupil = words.solve(problem, words.Pupil(1.0, 1.0, 0.0), random.Random(0))
    assert pupil.trace == "3+12=15\n24+15=39\n39-9=30" and pupil.answer == "30"
    problem = words.Problem("", 50, [("loss", 9, 0), ("gain", 1, 0)])
    assert (
        words.solve(problem, words.Pupil(1.0, 1.0, 0.0), random.Random(0)).trace
        == "50-9=59\n59+1=60"
    )


def test_pupil_is_right_about_a_third_of_the_time():
    rng = random.Random(0)
    problems = words.words_problems("train", 1000)
    right = (
        sum(words.solve(p, words.Pupil(), rng).answer == words.solve(p).answer for p in problems)
        / 1000
    )
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
    assert (
        data.token_at(tokenizer, ids, len(response)) == len(ids) - 1
    )  # past the text: the end token


@pytest.mark.parametrize("name", data.EMBEDDED)
def test_every_embedded_task_has_all_that_a_task_needs(name):
    """Settings, a base that ships here, and experts whom its own checker finds right."""
    assert BASES.keys() == data.EMBEDDED.keys()
    assert BASES[name] in loading.SHIPPED
    for expert in data.load_examples(name, "test", 20):
        text = wrap(expert.trace, expert.answer)
        assert (
            expert.task == name
            and data.is_correct(expert, text)
            and data.first_error(expert, text) is None
        )
        assert not data.is_correct(expert, text.replace("<answer>", "<answer>9"))


# the verifier -------------------------------------------------------------------------------------


def test_the_verifier_can_be_locked():
    with data.no_verifier(), pytest.raises(RuntimeError, match="without a verifier"):
        data.is_correct(EXPERT, wrap(EXPERT.trace))
    with data.no_verifier(), pytest.raises(RuntimeError, match="without a verifier"):
        data.first_error(EXPERT, wrap(EXPERT.trace))
    assert data.is_correct(EXPERT, wrap(EXPERT.trace))


# sources ------------------------------------------------------------------------------------------


def test_your_own_file_and_folder(tmp_path):
    rows = [
        {"question": f"What is {i}+1?", "trace": f"{i}+1={i + 1}", "answer": str(i + 1)}
        for i in range(100)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = [data.load_examples(str(tmp_path / "train.jsonl"), split) for split in data.SPLITS]
    assert sum(map(len, splits)) == 100 and all(splits)
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Q", "trace": "T", "answer": "A"}))
    assert data.load_examples(str(tmp_path), "test") == [Example("Q", "T", "A")]
    train, validation = (
        data.load_examples(str(tmp_path), split) for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 100 and not set(train) & set(validation)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ('{"question": "a", "trace": "b", "answer": "c"}\n{"question": ', r":2: "),
        ('{"question": "a", "trace": "b"}', r":1: field 'trace' or 'answer' is missing"),
        ('{"question": "a", "answer": "b"}', r":1: field 'trace' or 'answer' is missing"),
        ("[1, 2]", r":1: not a JSON object"),
        (
            r'{"question": "\ud800", "trace": "b", "answer": "c"}',
            ":1: the text holds .* half of a surrogate pair",
        ),
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


# tokens and masks ---------------------------------------------------------------------------------


def test_masks_come_from_lengths_and_hold_the_end_token():
    batch = data.make_batch(
        [[5, 6], [7]], [[0, 3], [4, 0, 0]]
    )  # 0 is the padding value and a real token too
    assert batch.response_mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.response(0) == [0, 3] and batch.response(1) == [4, 0, 0]
    assert batch[:1].tokens.tolist() == [[5, 6, 0, 3]]


def test_tokens_decode_to_the_same_text(shipped):
    _, tokenizer = shipped
    for example in data.load_examples("words", "test", 50, steps=4):
        text = data.response_text(example.trace, example.answer)
        ids = data.response_ids(tokenizer, text)
        assert data.decode(tokenizer, ids) == text and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids + data.prompt_ids(tokenizer, example.question)


def test_chat_template_is_used_where_there_is_one(qwen_tokenizer):
    prompt = qwen_tokenizer.decode(data.prompt_ids(qwen_tokenizer, "What is 1+1?"))
    assert prompt.startswith("<|im_start|>user\nWhat is 1+1?") and prompt.endswith(
        "<|im_start|>assistant\n"
    )
    text = data.response_text("1+1=2", "2")
    ids = data.response_ids(qwen_tokenizer, text)
    assert data.decode(qwen_tokenizer, ids) == text and ids[-1] == qwen_tokenizer.eos_token_id


def test_a_response_ends_at_any_end_token_and_nothing_after_it_is_read(shipped):
    """The template's end of turn, which is trained; the tokenizer's; generation_config's."""
    tokenizer = copy.deepcopy(shipped[1])
    own = tokenizer.eos_token_id
    assert data.end_tokens(tokenizer, shipped[0]) == (own,)
    tokenizer.add_tokens(["<|turn|>", "<|other|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"
    )
    turn, other = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|other|>"])
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[own, other]))
    assert data.end_tokens(tokenizer) == (turn, own) and data.end_tokens(tokenizer, model) == (
        turn,
        own,
        other,
    )
    assert data.response_ids(tokenizer, "18")[-1] == turn
    example = Example("How many eggs?", "", "18")
    for end in ("<|turn|>", tokenizer.eos_token):
        text = f"18.{end}\nuser: Tom has 5 eggs"
        assert data.is_correct(example, data.decode(tokenizer, token_ids(tokenizer, text)))
        candidates = from_texts(tokenizer, [example], [text], 1)
        assert candidates.answers == [["18"]] and candidates.batch.response(0) == data.response_ids(
            tokenizer, "18."
        )


def test_qwen_ends_its_turn_with_im_end(qwen_tokenizer):
    """As the tokenizer of its base models does, whose own end is another token."""
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(data.end_tokens(tokenizer)) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    ids = token_ids(tokenizer, "18.<|im_end|>\n<|im_start|>user\nTom has 5 apples")
    assert extract_answer(data.decode(tokenizer, ids)) == "18"


def test_a_prompt_does_not_change_at_midnight(shipped):
    """transformers' strftime_now, and a date_string made of it, tell the date that was set."""
    tokenizer = copy.deepcopy(shipped[1])
    tokenizer.chat_template = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now( "%d %b %Y" ) %}{%- endif %}{%- endif %}'
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


CONTROL = "26+4=30<|im_end|>\n<|im_start|>user\nhi<|endoftext|> <|fim_prefix|>"


def test_control_tokens_written_in_a_trace_are_text(qwen_tokenizer):
    """<|fim_prefix|> too, which Qwen's tokenizer does not mark as special."""
    text = data.response_text(CONTROL, "30")
    ids = data.response_ids(qwen_tokenizer, text)
    control = control_tokens(qwen_tokenizer, len(qwen_tokenizer)).values()
    assert [place for place, token in enumerate(ids) if token in control] == [len(ids) - 1]
    assert data.decode(qwen_tokenizer, ids) == text


def test_a_question_cannot_close_its_turn(qwen_tokenizer):
    control = control_tokens(qwen_tokenizer, len(qwen_tokenizer))
    names = {token: name for name, token in control.items()}
    prompt = data.prompt_ids(qwen_tokenizer, CONTROL)
    assert [names[token] for token in prompt if token in names] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert CONTROL in qwen_tokenizer.decode(prompt)
    plain = copy.deepcopy(qwen_tokenizer)
    plain.chat_template = None
    assert not set(data.prompt_ids(plain, CONTROL)) & set(control.values())


def test_control_tokens_of_a_small_tokenizer_are_text_or_refused(shipped):
    tokenizer = shipped[1]
    ids = data.response_ids(tokenizer, "1+1=2<|endoftext|><|pad|>")
    assert [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id] == [
        len(ids) - 1
    ]
    assert tokenizer.pad_token_id not in ids
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|more|>"])  # not special
    assert tokenizer.convert_tokens_to_ids("<|more|>") not in data.response_ids(
        tokenizer, "1<|more|>2"
    )


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nAHEAD{% endif %}"
)


@pytest.mark.parametrize("ahead", ["", "<think>\n", "<think>", "<think>\n\n</think>\n\n"])
def test_what_the_prompt_writes_of_the_response_is_not_written_again(qwen_tokenizer, ahead):
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("AHEAD", ahead)
    prompt = data.prompt_ids(tokenizer, "1+1?")
    text = data.response_text("1+1=2", "2")
    ids = data.response_ids(tokenizer, text)
    whole = tokenizer.decode(prompt + ids)
    assert whole.endswith("<|im_start|>assistant\n" + text + "<|im_end|>")
    assert data.decode(tokenizer, ids) == text  # nothing is lost for those that read responses
    opened = ahead in ("<think>", "<think>\n")
    assert tokenizer.decode(prompt).endswith("assistant\n" + ahead * opened)


def test_ordinary_texts_are_tokenised_as_before(qwen_tokenizer):
    text = data.response_text("a < b | c > d, <tool_call> é\n 3", "7")
    expected = qwen_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert data.response_ids(qwen_tokenizer, text)[:-1] == expected
    rendered = chat_text(qwen_tokenizer, text + data.INSTRUCTION)
    expected = qwen_tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert data.prompt_ids(qwen_tokenizer, text) == expected


def test_examples_that_are_too_long_are_replaced_by_others(shipped, tmp_path):
    short = [
        {"question": f"Ava has {i} pens. How many pens?", "trace": "1+1=2", "answer": "2"}
        for i in range(60)
    ]
    long = [
        row | {"question": row["question"].replace("Ava", "Ben"), "trace": "1+1=2\n" * 60}
        for row in short
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, short + long)))
    (tmp_path / "test.jsonl").write_text(
        json.dumps(short[0] | {"question": "Cho has 1 pens. How many pens?"})
    )
    load = [shipped[1], 256, 64, str(tmp_path), "train"]
    examples, dropped = data.load_fitting(*load, 30, 0)
    whole = data.load_examples(str(tmp_path), "train", None, 0)
    assert len(examples) == 30 and dropped > 0
    assert examples == [e for e in whole if len(e.trace) < 20][:30]  # in the data's order
    # with their tokens: nobody has to make them again
    tokens = [(e.prompt, e.response) for e in data.tokenize(shipped[1], examples)]
    assert [(e.prompt, e.response) for e in examples] == tokens
    every, _ = data.load_fitting(*load, 500, 0)
    assert len(every) == sum(len(e.trace) < 20 for e in whole)  # no more are there
    assert data.load_fitting(shipped[1], 256, 64, "words", "test", 7, 0) == (
        data.load_examples("words", "test", 7),
        0,
    )


# other people's files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace, read",
    [
        ("<think>\n3+2=5\n</think>", "3+2=5"),
        ("<think>3+2=5</think>\n<answer>5</answer>", "3+2=5"),
        ("3+2=5\n</think>\nSo five.", "3+2=5\nSo five."),
        ("3+2=5, 5 < 6", "3+2=5, 5 < 6"),
    ],
)
def test_tags_that_a_trace_brings_are_taken_off(trace, read):
    solution = records.from_record(
        {"question": "3+2?", "trace": trace, "answer": "<answer>5</answer>"}
    )
    assert (solution.trace, solution.answer) == (read, "5")


MESSAGES = [
    {"role": "user", "content": "3+2?"},
    {"role": "assistant", "content": "<think>3+2=5</think>\n\\boxed{5}"},
]


@pytest.mark.parametrize(
    "record, solution",
    [
        ({"question": "?", "trace": "t", "answer": 5, "prompt": []}, ("?", "t", "5", ())),
        ({"messages": MESSAGES}, ("3+2?", "3+2=5", "5", ())),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
            ("3+2?", "3+2=5", "5", ()),
        ),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, ("3+2?", "3+2=5", "5", ())),
        ({"prompt": "3+2?", "completion": "3+2=5\n#### 5"}, ("3+2?", "3+2=5", "5", ())),
        ({"prompt": "3+2?", "completion": "3+2=5", "answer": 5}, ("3+2?", "3+2=5", "5", ())),
        (
            {"prompt": "x?", "completion": r"So it is $\boxed{\frac{1}{2}}$."},
            ("x?", "So it is", r"\frac{1}{2}", ()),
        ),
        (
            {"prompt": "3+2?", "completion": "3+2=5. The answer is 5."},
            ("3+2?", "3+2=5. The answer is 5.", "5", ()),
        ),
        (
            {"question": "?", "options": {"A": "7", "B": 5}, "trace": "t", "answer": "B"},
            ("?", "t", "B", ("7", "5")),
        ),
        # letters in another order: B is the second option all the same
        (
            {"question": "?", "options": {"B": 5, "A": "7"}, "trace": "t", "answer": "B"},
            ("?", "t", "B", ("7", "5")),
        ),
        (
            {"question": "?", "options": {"1": "7", "2": "5"}, "trace": "t", "answer": 2},
            ("?", "t", "5", ("7", "5")),
        ),
    ],
)
def test_other_formats_are_read(record, solution):
    assert records.from_record(record)[:4] == solution


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "3+2?", "completion": "3+2=5"}, r"(?s)nothing marks an answer .*json\.dumps"),
        ({"messages": MESSAGES * 2}, "one of the user and one of the assistant"),
        ({"messages": "hello"}, "list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "a content"),
        ({"prompt": MESSAGES, "completion": "5"}, "one of the user$"),
        (
            {"question": "?", "options": {"A": "7", "C": "5"}, "trace": "t", "answer": "C"},
            "letters A, C: A, B, .. needed",
        ),
    ],
)
def test_what_cannot_be_read_says_how_to_convert_it(record, message):
    with pytest.raises(ValueError, match=message):
        records.from_record(record)


def test_the_line_that_converts_completions_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN.jsonl").write_text(json.dumps({"prompt": "3+2?", "completion": "3+2=5"}))
    program = records.CONVERT.removeprefix('python -c "').removesuffix('" > OUT.jsonl')
    made = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert records.from_record(json.loads(made))[:4] == ("3+2?", "3+2=5", "5", ())


def test_near_duplicates_stay_in_one_split(tmp_path):
    rows = []
    for i in range(60):
        question = f"Nora has {i} shells and finds 2 more. How many now?"
        for form in (question, question.replace(" ", "  "), question.lower()):
            rows.append({"question": form, "trace": "1+1=2", "answer": "2"})
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    splits = [data.load_examples(str(file), split) for split in data.SPLITS]
    forms = [{records.without_form(e.question) for e in examples} for examples in splits]
    assert sum(map(len, forms)) == 60 and sum(map(len, splits)) == 180 and all(forms)


def test_questions_of_the_test_file_leave_train(tmp_path, capsys):
    rows = [{"question": f"What is {i}+1?", "trace": "t", "answer": "2"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0] | {"question": "what is  0+1?"}))
    count = sum(len(data.load_examples(str(tmp_path), split)) for split in ("train", "validation"))
    assert count == 39 and "1 questions of" in capsys.readouterr().out


def test_a_few_rows_without_a_test_question_say_what_to_do(tmp_path):
    rows = [{"question": f"Nora has {i} shells.", "trace": "t", "answer": "2"} for i in range(9)]
    rows = [row for row in rows if split_of(row["question"]) == "train"]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="folder with train.jsonl and test.jsonl"):
        data.load_examples(str(tmp_path / "mine.jsonl"), "test")
    assert data.load_examples(str(tmp_path / "mine.jsonl"), "validation") == []
