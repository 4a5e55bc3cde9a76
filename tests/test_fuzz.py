"""Thousands of made-up inputs: whatever a file, an answer or a template holds, the worst that
comes of it is a UserError, one clear line. The same inputs every time (derandomize), so that a
failure can be looked at.

pytest prints how many inputs there were; a crash fails its test, with the input shrunk to what
matters.
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
from engine.runs import READ, read_settings
from engine.settings import parse_settings
from show import report, trace
from show.report import chart, histogram
from tasks import records
from tasks.answers import extract_answer, same_answer


def fuzz(count: int, *strategies, **named):
    """Call the function below with `count` inputs of these strategies, at once."""

    def run(check):
        options = {"derandomize": True, "deadline": None, "database": None}
        options["suppress_health_check"] = list(HealthCheck)
        settings(max_examples=count, **options)(given(*strategies, **named)(check))()

    return run


@pytest.fixture(scope="module")
def survives(request):
    """Call a function on an input; None after a UserError (or an error of `allowed`). Anything else
    fails the test."""
    counts = {"inputs": 0, "crashes": 0}

    def call(function, *arguments, allowed=UserError):
        counts["inputs"] += 1
        try:
            return function(*arguments)
        except allowed as error:
            assert str(error).strip(), "an error without a word"
            return None
        except BaseException:  # a panic in the tokenizers library is one
            counts["crashes"] += 1
            raise

    yield call
    line = f"fuzz: {counts['inputs']:,} inputs, {counts['crashes']} crashes"
    report_line(request.config, line)


# What is likely to trip a parser, and to be found together with other such things only by chance.
PIECES = (
    *("<answer>", "</answer>", "<think>\n", "</think>", "####", "\\boxed{", "}", "<<1+1=2>>", "<<"),
    *("1,234", "1/0", "/", "-", "−", "$", "€", ".", "%", "3*12=36", "14+36=50", "+", "×", "007"),
    *("9" * 5000, "٣", "²", "Ⅷ", "ﬁ", "İ", "\x00", "\r\n", "\n", "\u2028", "\u202e", "\ufeff"),
    *("\ud800", "\udfff", "😀", " " * 50, "{{", "{%", "<|im_end|>", "<|endoftext|>"),
    *("(A)", "B. ", "the", "a"),
)
LITERALS = (
    b'{"question": "1+1?", "trace": "1+1=2", "answer": "2"}\n',
    *(b'{"question": ', b'"answer": ', b"[" * 20_000, b'{"a":' * 5000, b"1" * 5000, b"NaN"),
    *(b"-Infinity", b"1e999", b'"\\ud800"', b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x00"),
    *(b"\r\n", b"\n\n", b"}", b"]", b",", b'"', b"null", b"\xc3"),
)
anything = st.text(st.characters(exclude_categories=()), max_size=30)  # half surrogate pairs, too
texts = st.lists(st.sampled_from(PIECES) | anything, max_size=8).map("".join)
odd_numbers = st.sampled_from([10**4000, -(10**30), 1e308, float("nan")])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | odd_numbers


def lists_and_objects(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)


values = st.recursive(scalars, lists_and_objects, max_leaves=6)
raw = st.lists(st.sampled_from(LITERALS) | st.binary(max_size=20), max_size=6).map(b"".join)


@st.composite
def objects(draw, fields: tuple[str, ...]):
    """An object with these fields, filled with texts; in half of them some are missing, doubled, or
    of any type."""
    pairs = []
    for field in fields:
        is_list = field in ("options", "candidates")
        pairs.append((field, [draw(texts)] if is_list else draw(texts) + "1"))
    if draw(st.booleans()):
        pairs = draw(st.lists(st.sampled_from(pairs), max_size=5))
        pairs.insert(0, (draw(st.sampled_from((*fields, "extra"))), draw(values)))
    pairs = [f"{json.dumps(field)}: {json.dumps(value)}" for field, value in pairs]
    return ("{" + ", ".join(pairs) + "}").encode()


@st.composite
def examples(draw):
    options = draw(st.lists(texts, max_size=3).map(tuple))
    answer = draw(texts | st.sampled_from(options or ("1",)))
    return Example(draw(texts), draw(texts), answer, options)


def lines_of(*fields):
    return st.lists(objects(fields) | raw, max_size=4).map(b"\n".join)


# Data files ---------------------------------------------------------------------------------------


def test_demonstration_files(survives, tmp_path):
    file = tmp_path / "mine.jsonl"
    fields = ("question", "trace", "answer", "options")

    @fuzz(300, lines_of(*fields), st.sampled_from(data.SPLITS))
    def check(content, split):
        file.write_bytes(content)
        for example in survives(records.read_jsonl, file) or []:
            for text in (example.question, example.trace, example.answer, *example.options):
                assert isinstance(text, str) and text.encode() is not None
            assert example.question and example.answer
        survives(data.load_examples, str(file), split)

    @fuzz(300, st.dictionaries(st.sampled_from(fields), values | texts))
    def check_record(record):
        survives(records.from_record, record, allowed=ValueError)  # the caller adds file and line

    @fuzz(200, texts, texts, texts, texts)
    def check_medreason(question, options, reasoning, answer):
        row = {"question": question, "options": options, "reasoning": reasoning, "answer": answer}
        survives(records.from_medreason, row, allowed=ValueError)


def test_candidate_files(survives, tmp_path):
    file = tmp_path / "mine.jsonl"

    @fuzz(200, lines_of("question", "candidates", "answer"), st.none() | st.integers(1, 3))
    def check(content, n):
        file.write_bytes(content)
        found = survives(rerank.read_candidates, str(file), n)
        if found:
            read, responses, width = found
            assert len(responses) == len(read) * width


def test_names_that_no_file_can_have(survives):
    @fuzz(
        100, texts | st.sampled_from(["a" * 5000, "a\x00b", "/dev/full/x", "~", "..", "\\\\?\\nul"])
    )
    def check(name):
        survives(data.load_examples, name, "train")
        for read in (rerank.read_candidates, loading.load_tokenizer):
            survives(read, name)
        for read in (rerank.load_run, report.write_report):
            survives(read, Path(name))


# Answers and perturbations ------------------------------------------------------------------------


def test_answers(survives):
    @fuzz(500, texts, texts)
    def check(response, truth):
        answer = survives(extract_answer, response)
        assert answer is None or answer in response
        assert survives(same_answer, answer, truth) in (True, False)
        assert survives(data.is_correct, Example("?", "", truth), response) in (True, False)
        assert survives(same_answer, None, truth) is False
        survives(rerank.answer_keys, [[answer, truth, None]], [()])

    @fuzz(200, st.integers(-(10**12), 10**12))
    def check_number(number):
        """It agrees with itself, however it is written."""
        for form in (f"{number}", f"{number:,}", f" {number}.", f"{number}.00", f"{number} pens"):
            assert survives(same_answer, form, str(number)) is True
        assert survives(same_answer, str(number + 1), str(number)) is False


def test_first_errors(survives):
    @fuzz(300, examples(), texts)
    def check(expert, response):
        expert = replace(expert, task="words")
        place = survives(data.first_error, expert, response)
        assert 0 <= place <= len(response)
        right = data.response_text(expert.trace, expert.answer)
        assert survives(data.first_error, expert, right) is None


def test_perturbations(survives):
    kinds = [*negatives.BROKEN, "broken", "carried", "length", "both", "all"]

    @fuzz(500, examples(), st.integers(0, 2**32), st.sampled_from(kinds))
    def check(example, seed, kind):
        found = survives(negatives.perturb, example, random.Random(seed), kind)
        if found:
            before, after = (data.response_text(e.trace, e.answer) for e in (example, found))
            assert before != after and found.question == example.question


def test_a_swap_of_equal_numbers_is_none():
    """However long they are: Python makes no integer of more than 4,300 digits."""
    long = "9" * 5000
    for trace_, swapped in (("7-07", False), (f"{long}-0{long}", False), (f"{long}-{long}1", True)):
        found = negatives.perturb(Example("?", trace_, "x"), random.Random(0), "swap")
        assert (found is not None) == swapped


# Tokens and templates -----------------------------------------------------------------------------


def test_tokens(survives, shipped):
    model, tokenizer = shipped
    judge = reward.LikelihoodReward(model)

    @fuzz(250, texts, texts)
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


TEMPLATE_PIECES = (
    *("{{ messages[0].content }}", "{{ messages[0]['content'] }}", "{% for m in messages %}"),
    *(
        "{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
        "{% if add_generation_prompt %}",
    ),
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% endif %}", "{{", "}}", "{%", "%}"),
    *(
        "{{ 1/0 }}",
        "{{ range(10**9) }}",
        "{% set x = messages.append(1) %}",
        "user\n",
        "{# ",
        " #}",
    ),
    *("{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ messages[7].content }}"),
    *("{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}", "{% break %}"),
    *("{{ lipsum.__globals__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    *("{{ 'a' | nope }}", "{{ messages | tojson }}", "{% generation %}"),
)


def test_chat_templates(survives, shipped):
    tokenizer = copy.deepcopy(shipped[1])

    @fuzz(250, st.lists(st.sampled_from(TEMPLATE_PIECES) | texts, max_size=5).map("".join))
    def check(template):
        tokenizer.chat_template = template
        assert survives(data.prompt_ids, tokenizer, "Ava has 24 pens. How many pens?") != []


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


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ASK_ONCE = """
import sys
from engine.chat import chat_text
from engine.errors import exit_status
from engine.loading import load_tokenizer

tokenizer = load_tokenizer("base")
tokenizer.chat_template = sys.argv[1]
sys.exit(exit_status(lambda: chat_text(tokenizer, "hello", seconds=0.5)))
"""


def test_a_chat_template_that_never_ends():
    """In a process of its own, which must end, too."""
    result = subprocess.run(
        [sys.executable, "-c", ASK_ONCE, ENDLESS],
        cwd=Path(data.__file__).parent,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "takes more than 0.5 seconds" in result.stderr


# Runs ---------------------------------------------------------------------------------------------

# What is read of a run's settings.json.
SETTINGS = {name: getattr(parse_settings(["--data", "words"]), name) for name in READ}
DEEP = [b'{"model": ' + b"[" * deep + b"]" * deep + b"}" for deep in (1, 100, 990, 1000, 2000)]


def test_settings_of_a_run(survives, tmp_path):
    changes = st.dictionaries(st.sampled_from(READ), values | st.integers(), max_size=3)

    @fuzz(300, changes.map(lambda odd: json.dumps(SETTINGS | odd).encode()) | raw)
    def check(content):
        (tmp_path / "settings.json").write_bytes(content)
        survives(read_settings, tmp_path)
        survives(rerank.load_run, tmp_path)

    for content in DEEP:
        (tmp_path / "settings.json").write_bytes(content)
        survives(read_settings, tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**12),
        ("max_new_tokens", True),
        ("reward", "other"),
        ("model", None),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, key, value):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    assert read_settings(tmp_path) == SETTINGS
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | {key: value}))
    with pytest.raises(UserError, match=key):
        read_settings(tmp_path)


def test_a_damaged_model_folder(survives, tmp_path):
    shutil.copytree(loading.BASE, tmp_path / "reward")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    names = sorted(os.listdir(tmp_path / "reward"))
    places = st.floats(0, 1, exclude_max=True)

    @fuzz(40, st.sampled_from(names), places, st.binary(min_size=1, max_size=8), st.booleans())
    def check(name, place, new, cut):
        file = tmp_path / "reward" / name
        whole = file.read_bytes()
        at = int(place * len(whole))
        file.write_bytes(whole[:at] if cut else whole[:at] + new + whole[at + len(new) :])
        survives(rerank.load_run, tmp_path)
        file.write_bytes(whole)


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
            is_leaf = not isinstance(tree[key], (dict, list)) or not tree[key]
            if is_leaf or draw(st.integers(0, 3)) == 0:
                break
            tree = tree[key]
        if isinstance(tree, dict) and tree is not files and draw(st.booleans()):
            tree[draw(texts)] = draw(values)
        tree[key] = draw(values)
    return files


def test_reports_of_odd_runs(survives, tmp_path):
    names = list(full_run())
    raw_files = st.dictionaries(st.sampled_from(names), raw, min_size=1, max_size=2)

    @fuzz(300, odd_runs() | raw_files)
    def check(files):
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in files.items():
            if not isinstance(content, bytes):
                is_lines = name == "metrics.jsonl" and isinstance(content, list)
                content = "\n".join(map(json.dumps, content if is_lines else [content])).encode()
            (tmp_path / name).write_bytes(content)
        survives(report.write_report, tmp_path)


finite = st.floats(-1e30, 1e30, exclude_min=True, exclude_max=True)


def test_figures_of_odd_numbers(survives):
    points = st.lists(st.tuples(finite, finite), min_size=1, max_size=5)
    looks = st.sampled_from(["", "pale", "band", "dashed"])

    @fuzz(100, st.lists(finite, max_size=5), st.lists(finite, max_size=5))
    def check_histogram(right, wrong):
        survives(histogram, "reward", {"right": right, "wrong": wrong})

    @fuzz(200, st.lists(points, min_size=1, max_size=3), st.booleans(), looks)
    def check_chart(lines, share, look):
        survives(chart, "step", [("a", "irl", look, line) for line in lines], share)


def test_an_error_is_one_line_whatever_it_quotes(survives, capsys):
    @fuzz(250, texts)
    def check(text):
        def program():
            raise UserError(text)

        assert survives(exit_status, program) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and len(line.splitlines()) == 1 and "\x1b" not in line
