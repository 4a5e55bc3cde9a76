"""Thousands of made-up inputs: whatever a file, a model's answer or a template holds, the worst that comes of it is a
UserError, one clear line. The same inputs every time (derandomize), so that a failure can be looked at.

pytest prints how many inputs there were; a crash fails its test, with the input shrunk to what matters.
"""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import report_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import full_run

import data
import negatives
import rerank
import reward
from data import Example
from engine import loading
from engine.errors import UserError, exit_status
from engine.runs import read_settings
from rerank import load_run
from show import report, trace
from show.report import chart, histogram
from tasks import records, words
from tasks.answers import extract_answer, same_answer


def inputs(count: int):
    """hypothesis.settings for a test of `count` inputs."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.fixture(scope="module")
def survives(request):
    """Call a function on an input; None after a UserError (or an error of `allowed`). Anything else fails the test."""
    counts = {"inputs": 0, "crashes": 0}

    def call(function, *arguments, allowed=UserError):
        counts["inputs"] += 1
        try:
            return function(*arguments)
        except allowed as error:
            assert str(error).strip(), "an error without a word"
            return None
        except BaseException:  # BaseException: a panic in the tokenizers library is one
            counts["crashes"] += 1
            raise

    yield call
    report_line(request.config, f"fuzz: {counts['inputs']:,} inputs, {counts['crashes']} crashes")


# What is likely to trip a parser, and to be found together with other such things only by chance.
PIECES = ("<answer>", "</answer>", "<think>\n", "</think>", "####", "\\boxed{", "}", "<<1+1=2>>", "<<", "1,234", "1/0", "/",
          "-", "−", "$", "€", ".", "%", "3*12=36", "14+36=50", "+", "×", "007", "9" * 5000, "٣", "²", "Ⅷ", "ﬁ", "İ", "\x00",
          "\r\n", "\n", "\u2028", "\u202e", "\ufeff", "\ud800", "\udfff", "😀", " " * 50, "{{", "{%", "<|im_end|>",
          "<|endoftext|>", "(A)", "B. ", "the", "a")  # fmt: skip
anything = st.text(st.characters(exclude_categories=()), max_size=30)  # half surrogate pairs included
texts = st.lists(st.sampled_from(PIECES) | anything, max_size=8).map("".join)
scalars = (st.none() | st.booleans() | st.integers() | st.floats() | texts
           | st.sampled_from([10**4000, -(10**30), 1e308, float("nan")]))  # fmt: skip
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6)
LITERALS = (b'{"question": "1+1?", "trace": "1+1=2", "answer": "2"}\n', b'{"question": ', b'"answer": ', b"[" * 20_000,
            b'{"a":' * 5000, b"1" * 5000, b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"\xef\xbb\xbf", b"\xff\xfe",
            b"\xed\xa0\x80", b"\x00", b"\r\n", b"\n\n", b"}", b"]", b",", b'"', b"null", b"\xc3")  # fmt: skip
raw = st.lists(st.sampled_from(LITERALS) | st.binary(max_size=20), max_size=6).map(b"".join)


@st.composite
def objects(draw, fields: tuple[str, ...]):
    """An object with these fields, filled with texts; in half of them some are missing, doubled, or of any type."""
    pairs = [(field, [draw(texts)] if field in ("options", "candidates") else draw(texts) + "1") for field in fields]
    if draw(st.booleans()):
        pairs = draw(st.lists(st.sampled_from(pairs), max_size=5))
        pairs.insert(0, (draw(st.sampled_from(fields + ("extra",))), draw(values)))
    pairs = [f"{json.dumps(field)}: {json.dumps(value)}" for field, value in pairs]
    return ("{" + ", ".join(pairs) + "}").encode()


@st.composite
def examples(draw):
    options = draw(st.lists(texts, max_size=3).map(tuple))
    return Example(draw(texts), draw(texts), draw(texts | st.sampled_from(options or ("1",))), options)


def lines_of(record):
    return st.lists(record | raw, max_size=4).map(b"\n".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "mine.jsonl"


# Data files ----------------------------------------------------------------------------------------------------


def test_demonstration_files(survives, file):
    @inputs(300)
    @given(lines_of(objects(("question", "trace", "answer", "options"))), st.sampled_from(data.SPLITS))
    def check(content, split):
        file.write_bytes(content)
        for example in survives(records.read_jsonl, file) or []:
            for text in (example.question, example.trace, example.answer, *example.options):
                assert isinstance(text, str) and text.encode() is not None
            assert example.question and example.answer
        survives(data.load_examples, str(file), split)

    check()


def test_records(survives):
    @inputs(300)
    @given(st.dictionaries(st.sampled_from(["question", "trace", "answer", "options"]), values | texts))
    def check(record):
        survives(records.from_record, record, allowed=ValueError)  # read_objects adds file and line

    check()


def test_medreason_rows(survives):
    @inputs(200)
    @given(texts, texts, texts, texts)
    def check(question, options, reasoning, answer):
        row = {"question": question, "options": options, "reasoning": reasoning, "answer": answer}
        survives(records.from_medreason, row, allowed=ValueError)

    check()


def test_candidate_files(survives, file):
    @inputs(200)
    @given(lines_of(objects(("question", "candidates", "answer"))), st.none() | st.integers(1, 3))
    def check(content, n):
        file.write_bytes(content)
        found = survives(rerank.read_candidates, str(file), n)
        if found:
            read, responses, width = found
            assert len(responses) == len(read) * width

    check()


def test_names_that_no_file_can_have(survives):
    @inputs(100)
    @given(texts | st.sampled_from(["a" * 5000, "a\x00b", "/dev/full/x", "~", "..", "\\\\?\\nul"]))
    def check(name):
        survives(data.load_examples, name, "train")
        for read in (rerank.read_candidates, loading.load_tokenizer):
            survives(read, name)
        for read in (load_run, report.write_report):
            survives(read, Path(name))

    check()


# Answers and perturbations -------------------------------------------------------------------------------------


def test_answers(survives):
    @inputs(500)
    @given(texts, texts)
    def check(response, truth):
        answer = survives(extract_answer, response)
        assert answer is None or answer in response
        assert survives(same_answer, answer, truth) in (True, False)
        assert survives(data.is_correct, Example("?", "", truth), response) in (True, False)
        assert survives(same_answer, None, truth) is False
        survives(rerank.answer_keys, [[answer, truth, None]], [()])

    check()


def test_a_number_agrees_with_itself_however_it_is_written(survives):
    @inputs(200)
    @given(st.integers(-(10**12), 10**12))
    def check(number):
        for form in (f"{number}", f"{number:,}", f" {number}.", f"{number}.00", f"{number} pens"):
            assert survives(same_answer, form, str(number)) is True
        assert survives(same_answer, str(number + 1), str(number)) is False

    check()


def test_first_errors(survives):
    @inputs(300)
    @given(examples(), texts)
    def check(expert, response):
        expert = replace(expert, task="words")
        place = survives(data.first_error, expert, response)
        assert 0 <= place <= len(response)
        assert survives(data.first_error, expert, data.response_text(expert.trace, expert.answer)) is None

    check()


def test_perturbations(survives):
    @inputs(500)
    @given(examples(), st.integers(0, 2**32), st.sampled_from([*negatives.BROKEN, "broken", "carried", "both"]))
    def check(example, seed, kind):
        found = survives(negatives.perturb, example, random.Random(seed), kind)
        if found:
            before, after = (data.response_text(e.trace, e.answer) for e in (example, found))
            assert before != after and found.question == example.question

    check()


def test_a_swap_of_equal_numbers_is_none():
    """However they are written, and however long: Python makes no integer of more than 4,300 digits."""
    long = "9" * 5000
    for equal in ("7-07", f"{long}-0{long}"):
        assert negatives.perturb(Example("?", equal, "x"), random.Random(0), "swap") is None
    assert negatives.perturb(Example("?", f"{long}-{long}1", "x"), random.Random(0), "swap") is not None


# Tokens and templates ------------------------------------------------------------------------------------------


def test_tokens(survives, shipped):
    model, tokenizer = shipped
    judge = reward.LikelihoodReward(model)

    @inputs(250)
    @given(texts, texts)
    def check(question, response):
        prompt = survives(data.prompt_ids, tokenizer, question)
        ids = survives(data.response_ids, tokenizer, response)
        assert prompt is None or prompt
        if ids is not None:
            assert ids[-1] == tokenizer.eos_token_id
            if len(ids) < 100:
                place = survives(data.token_at, tokenizer, ids, len(response) // 2)
                assert 0 <= place < len(ids)
        scored = survives(trace.token_scores, judge, tokenizer, question, response)
        if scored:
            shown = survives(trace.show, scored)
            assert "\x00" not in shown and "\u202e" not in shown

    check()


TEMPLATE_PIECES = ("{{ messages[0].content }}", "{{ messages[0]['content'] }}", "{% for m in messages %}", "{% endfor %}",
                   "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ x.y.z }}",
                   "{% if add_generation_prompt %}", "{% endif %}", "{{", "}}", "{%", "%}", "{{ 1/0 }}", "{{ range(10**9) }}",
                   "{% set x = messages.append(1) %}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
                   "{{ messages[7].content }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}",
                   "{{ lipsum.__globals__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'a' | nope }}",
                   "{{ messages | tojson }}", "user\n", "{# ", " #}", "{% break %}", "{% generation %}")  # fmt: skip


def test_chat_templates(survives, shipped):
    tokenizer = copy.deepcopy(shipped[1])
    question = "Ava has 24 pens. How many pens?"

    @inputs(250)
    @given(st.lists(st.sampled_from(TEMPLATE_PIECES) | texts, max_size=5).map("".join))
    def check(template):
        tokenizer.chat_template = template
        assert survives(data.prompt_ids, tokenizer, question) != []

    check()


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('touch HACKED') }}", "SecurityError"),
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("{{ messages[0].content", "TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ range(10**12) }}", "fails"),
        ("always the same", "leaves the question out"),
    ],
)
def test_a_bad_chat_template_is_one_clear_line(shipped, tmp_path, monkeypatch, template, message):
    monkeypatch.chdir(tmp_path)
    tokenizer = copy.deepcopy(shipped[1])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        data.prompt_ids(tokenizer, "1+1?")
    assert "chat_template" in str(error.value) and not list(tmp_path.iterdir())


def test_a_chat_template_that_never_ends(tmp_path):
    """In a process of its own, which must end, too."""
    shutil.copytree(loading.BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": loop}))
    program = "import sys; from engine.chat import chat_text; from engine.errors import exit_status; "
    program += "from engine.loading import load_tokenizer; t = load_tokenizer(sys.argv[1]); "
    program += "sys.exit(exit_status(lambda: chat_text(t, 'hello', seconds=0.5)))"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "base")], timeout=60, check=False,
                          cwd=Path(data.__file__).parent, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "takes more than 0.5 seconds" in done.stderr


# Runs ----------------------------------------------------------------------------------------------------------

SETTINGS = {"model": "base", "data": "words", "reward": "likelihood", "logit": "airl", "granularity": "dense",
            "interval": 0, "words_steps": 3, "words_largest": 40, "max_new_tokens": 64,
            "fair_temperature": 0.2}  # fmt: skip


def test_settings_of_a_run(survives, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")

    @inputs(300)
    @given(st.dictionaries(st.sampled_from(list(SETTINGS)), values | st.integers(), max_size=3).map(
        lambda odd: json.dumps(SETTINGS | odd).encode()) | raw | st.integers(1, 2000).map(
        lambda deep: b'{"model": ' + b"[" * deep + b"]" * deep + b"}"))  # fmt: skip
    def check(content):
        (run / "settings.json").write_bytes(content)
        found = survives(read_settings, run)
        if found:  # what is let through can be used
            assert words.words_problems("train", 1, 0, min(found["words_steps"], 9), found["words_largest"])
        survives(load_run, run)

    check()


@pytest.mark.parametrize("key, value", [("interval", -1), ("interval", True), ("words_steps", 0), ("words_steps", 10**9),
                                        ("words_largest", 7), ("max_new_tokens", 0), ("max_new_tokens", 10**12),
                                        ("reward", "other"), ("model", None)])  # fmt: skip
def test_settings_out_of_range_are_refused(tmp_path, key, value):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    assert read_settings(tmp_path) == SETTINGS
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | {key: value}))
    with pytest.raises(UserError, match=key):
        read_settings(tmp_path)


def damage(content: bytes, place: float, what: bytes) -> bytes:
    at = int(place * len(content))
    return content[:at] + what + content[at + len(what) :]


def test_a_damaged_model_folder(survives, tmp_path_factory):
    run = tmp_path_factory.mktemp("damaged")
    shutil.copytree(loading.BASE, run / "reward")
    (run / "settings.json").write_text(json.dumps(SETTINGS))
    whole = {name: (run / "reward" / name).read_bytes() for name in os.listdir(run / "reward")}

    @inputs(40)
    @given(
        st.sampled_from(sorted(whole)),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
        st.booleans(),
    )
    def check(name, place, what, cut):
        content = whole[name]
        broken = content[: int(place * len(content))] if cut else damage(content, place, what)
        (run / "reward" / name).write_bytes(broken)
        survives(load_run, run)
        (run / "reward" / name).write_bytes(content)

    check()


@st.composite
def odd_runs(draw):
    """The files of a run with up to three values replaced by anything."""
    files = full_run()
    files["metrics.jsonl"] = files["metrics.jsonl"][:20]
    for _ in range(draw(st.integers(1, 3))):
        tree = files
        while True:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            key = draw(st.sampled_from(keys))
            if not isinstance(tree[key], (dict, list)) or not tree[key] or draw(st.integers(0, 3)) == 0:
                break
            tree = tree[key]
        if isinstance(tree, dict) and tree is not files and draw(st.booleans()):
            tree[draw(texts)] = draw(values)
        tree[key] = draw(values)
    return files


def test_reports_of_odd_runs(survives, tmp_path_factory):
    run = tmp_path_factory.mktemp("report")

    @inputs(300)
    @given(odd_runs() | st.dictionaries(st.sampled_from(list(full_run())), raw, min_size=1, max_size=2))
    def check(files):
        for name in full_run():
            (run / name).unlink(missing_ok=True)
        for name, content in files.items():
            if not isinstance(content, bytes):
                lines = content if name == "metrics.jsonl" and isinstance(content, list) else [content]
                content = "\n".join(map(json.dumps, lines)).encode()
            (run / name).write_bytes(content)
        survives(report.write_report, run)

    check()


finite = st.floats(-1e30, 1e30, exclude_min=True, exclude_max=True)


def test_figures_of_odd_numbers(survives):
    points = st.lists(st.tuples(finite, finite), min_size=1, max_size=5)

    @inputs(100)
    @given(st.lists(finite, max_size=5), st.lists(finite, max_size=5))
    def check_histogram(right, wrong):
        survives(histogram, "reward", {"right": right, "wrong": wrong})

    @inputs(200)
    @given(st.lists(points, min_size=1, max_size=3), st.booleans(), st.sampled_from(["", "pale", "band", "dashed"]))
    def check_chart(lines, share, look):
        survives(chart, "step", [("a", "irl", look, line) for line in lines], share)

    check_histogram(), check_chart()


def test_an_error_is_one_line_whatever_it_quotes(survives, capsys):
    @inputs(250)
    @given(texts)
    def check(text):
        def program():
            raise UserError(text)

        assert survives(exit_status, program) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1 and "\x1b" not in said

    check()
