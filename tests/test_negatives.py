"""negatives.py and tasks/arithmetic.py: what is changed in an expert's trace, what follows from it,
what is no negative."""

import random
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from conftest import SHARED, report_line
from hypothesis import given
from hypothesis import settings as inputs
from hypothesis import strategies as st

import data
import negatives
from data import Example
from engine.settings import parse_settings
from tasks.answers import extract_answer
from tasks.arithmetic import (
    EQUATION,
    NUMBER,
    evaluate,
    read_number,
    value_of_sides,
    write_number,
)
from tasks.records import from_record

VALVES = ("Mitral valve", "Aortic valve", "Tricuspid valve")
AVA = Example(
    "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9.", "3*12=36\n24+36=60\n60-9=51", "51"
)


def carry_error(example: Example, rng: random.Random) -> Example | None:
    """A carried copy, without the other kinds where there is none."""
    carried = negatives.carry_error(example, rng)
    if carried is None:
        return None
    trace, answer = carried
    return replace(example, trace=trace, answer=answer, marks=())


def carried_copies(example: Example, count: int = 40) -> list[Example]:
    """Different carried copies of one demonstration."""
    copies = (carry_error(example, random.Random(seed)) for seed in range(count))
    return list({copy.trace: copy for copy in copies if copy is not None}.values())


def equations(text: str) -> list[str]:
    """What is written with equals signs between, and calculates something."""
    return [found for found in re.findall(EQUATION, text) if re.search("[-+*/×÷x]", found)]


def false_equations(text: str) -> list[str]:
    """Equations of a text that do not hold."""
    return [equation for equation in equations(text) if value_of_sides(equation) is None]


def read_results(text: str) -> list[Fraction]:
    """The results of a text's equations."""
    return [read_number(re.findall(NUMBER, equation)[-1]) for equation in equations(text)]


def gsm8k(count: int) -> list[Example]:
    folder = SHARED / "data" / "gsm8k"
    if not folder.exists():
        pytest.skip("GSM8K is not beside this checkout (../shared/data/gsm8k)")
    return data.load_examples(str(folder), "train", count)


# one thing broken ---------------------------------------------------------------------------------


def test_a_wrong_answer_is_another_option_in_the_same_form():
    rng = random.Random(0)
    written = {"B": {"A", "C"}, "(b)": {"(a)", "(c)"}, "the aortic valve": {VALVES[0], VALVES[2]}}
    for answer, others in written.items():
        example = Example("Which?", "", answer, VALVES)
        assert {negatives.perturb(example, rng, "answer").answer for _ in range(20)} == others


def test_another_option_is_found_without_the_verifier(monkeypatch):
    """Options are compared with each other: copies are made inside training, where no answer may be
    checked."""
    from tasks import answers

    def locked(*arguments):
        raise RuntimeError("the answer check was called")

    monkeypatch.setattr(answers, "same_answer", locked)
    monkeypatch.setattr(data, "same_answer", locked)
    assert not hasattr(negatives, "same_answer")
    with data.no_verifier():
        others = {"the aortic valve": {VALVES[0], VALVES[2]}, "a valve": set(VALVES)}
        for answer, expected in others.items():
            example = Example("Which?", "", answer, VALVES)
            copies = [negatives.perturb(example, random.Random(i), "answer") for i in range(30)]
            assert {copy.answer for copy in copies} == expected


def test_perturbations_change_something_and_are_wrong():
    rng = random.Random(0)
    for example in data.load_examples("words", "train", 200):
        for kind in (*negatives.BROKEN, "carried"):
            copy = negatives.perturb(example, rng, kind)
            if copy is None:
                continue
            response = data.response_text(copy.trace, copy.answer)
            assert data.first_error(example, response) is not None  # wrong, not only different
            assert (copy.answer != example.answer) == (kind in ("answer", "carried"))


@pytest.mark.parametrize("kind", ["operator", "carried"])
def test_no_perturbation_imitates_the_pupil(kind):
    """'*' to '+', the pupil's first mistake, is never made: the reward must find it in samples."""
    rng = random.Random(0)
    for example in data.load_examples("words", "train", 300):
        before = re.findall("[-+*/]", example.trace)
        after = re.findall("[-+*/]", negatives.perturb(example, rng, kind).trace)
        changed = {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]}
        assert changed <= {("+", "-"), ("-", "+"), ("*", "/"), ("/", "*")}
        assert changed or kind == "carried"


def test_a_number_is_a_digit_shorter_or_longer():
    """One number of trace and answer, by one digit; never with a leading zero; and wrong."""
    rng = random.Random(0)
    places = set()
    for example in data.load_examples("words", "train", 200):
        copy = negatives.perturb(example, rng, "length")
        before, after = (re.findall("[0-9]+", f"{e.trace} {e.answer}") for e in (example, copy))
        [(old, new)] = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        assert abs(len(new) - len(old)) == 1 and new[0] != "0"
        longer, shorter = sorted((old, new), key=len, reverse=True)
        assert shorter in {longer[:i] + longer[i + 1 :] for i in range(len(longer))}
        assert data.first_error(example, data.response_text(copy.trace, copy.answer)) is not None
        places.add((copy.answer != example.answer, len(new) > len(old)))
    assert len(places) == 4  # both of them, shorter and longer


def test_decimals_and_thousands_keep_their_length():
    """2.5 for 2.50 would be right; 1,20 for 1,200 would be known by its looks."""
    example = Example("?", "1,200+2.50=1,202.50", "1,202.50")
    assert negatives.change_length(example, random.Random(0)) is None
    assert negatives.perturb(example, random.Random(0), "length") is not None


def test_perturbing_text_answers_takes_another_option_and_nothing_else_to_break_is_none():
    rng = random.Random(0)
    example = Example("Which?", "Because so.", "Vitamin C", ("Vitamin C", "Vitamin D"))
    for kind in ("broken", "carried", "length", "both", "all"):
        assert negatives.perturb(example, rng, kind).answer == "Vitamin D"
        assert negatives.perturb(Example("Which?", "Because so.", "Vitamin C"), rng, kind) is None
    assert negatives.perturb(Example("?", "5", "no"), rng, "swap") is None


@pytest.mark.parametrize(
    "trace, answer, kind",
    [
        ("So 7*1 = 7", "7", "operator"),
        ("It is $7 / $1.00 = 7", "7", "operator"),
        ("7+0=7", "7", "operator"),
        ("7 - 0 = 7", "7", "operator"),
        ("10+2-3 = 9", "9", "swap"),
        ("2+3*4 = 14", "14", "swap"),
        ("10-2-3 = 5", "5", "swap"),
        ("3+4=7", "7", "swap"),
    ],
)
def test_a_copy_that_is_still_right_is_none(trace, answer, kind):
    """x*1 and x/1, x+0 and x-0, 10+2-3 and 2+10-3: all equations still true, with the same
    results."""
    example = Example("?", trace, answer)
    for seed in range(60):
        copy = negatives.perturb(example, random.Random(seed), kind)
        assert (
            copy is None
            or false_equations(copy.trace)
            or read_results(copy.trace) != read_results(trace)
        ), copy


def test_what_a_change_may_not_leave_as_it_is():
    right = "I have 10 pens. 10+2-3=9 and 4*2=8."
    for trace, same in (
        ("I have 10 pens. 2+10-3=9 and 2*4=8.", True),
        ("I have 10 pens. 10-2-3=5 and 4*2=8.", False),  # true, but something else
        ("I have 10 pens. 10+2-3=9 and 4*2=9.", False),
        ("I have 11 pens. 10+2-3=9 and 4*2=8.", False),  # a sentence: nobody can tell
        ("I have 10 pens. 10+2-3=9 and 4/2=8.", False),
    ):
        assert (negatives.meaning(trace) == negatives.meaning(right)) is same, trace


# an error that is carried on ----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["words", "countdown"])
def test_every_equation_of_a_carried_copy_is_true(task):
    """And the answer another one: the last result. Nearly every demonstration offers one."""
    rng = random.Random(0)
    examples = data.load_examples(task, "train", 200)
    copies = [carry_error(example, rng) for example in examples]
    assert sum(copy is not None for copy in copies) > 190
    for example, copy in zip(examples, copies):
        if copy is None:
            continue
        assert not false_equations(copy.trace)
        assert copy.question == example.question and copy.answer != example.answer
        assert read_results(copy.trace)[-1] == int(copy.answer)
        assert len(read_results(copy.trace)) == len(read_results(example.trace))


def test_a_change_reaches_all_that_used_the_result_and_nothing_else():
    """Line by line: what a line does not use stays, and what it uses is the new result."""
    starts = set()
    for copy in carried_copies(AVA, 200):
        lines = copy.trace.split("\n")
        first, second, third = (re.findall(r"\d+", line) for line in lines)
        assert second[1] == first[2] or lines[0] == "3*12=36"
        assert third[0] == second[2] or lines[:2] == ["3*12=36", "24+36=60"]
        assert copy.answer == third[2]
        starts.add(next(i for i, line in enumerate(lines) if line != AVA.trace.split("\n")[i]))
    assert starts == {0, 1, 2}  # an error may begin anywhere


CLIPS = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "She sold 48+24 = <<48+24=72>>72 clips.\n"
    "#### 72"
)
# Text before the last line, which uses the 24 of the first one; what of it must not change
STAYS = {
    "part of a number": "The 124 others, 240 of them, 2.4 and 24.5, stay.",
    "a date": "It was 5/24/2020, 2020-05-24, the 24th of May.",
    "a time": "They met at 10:24 and 24:00.",
    "a name": "On the A24, with vitamin B24 and COVID-24.",
    "a range and a fraction": "That is 20-24 of 1/24.",
    "percent": "They got 24% more.",
    "a label": "24. This is the next line.",
    "a step": "See step 24 for more.",
}


@pytest.mark.parametrize("text", STAYS.values(), ids=STAYS)
def test_later_uses_are_replaced_and_nothing_else(text):
    """A 24 that is no number by itself is none. What stands alone follows, however it is
    written."""
    example = Example(
        "She sold 48 clips.", f"48/2 = 24.\n{text}\nSo $24, $24.00 or 24 clips: 48+24 = 72", "72"
    )
    followed = [
        copy for copy in carried_copies(example, 80) if not copy.trace.startswith("48/2 = 24.")
    ]
    assert followed
    for copy in followed:
        first, middle, last = copy.trace.split("\n")
        result = re.fullmatch(r".* = (\d+)\.", first)[1]
        assert middle == text
        assert last.startswith(f"So ${result}, ${result}.00 or {result} clips: 48+{result} = ")
        assert not false_equations(copy.trace)


@pytest.mark.parametrize(
    "question, trace",
    [
        ("He has 24 dogs and 48 cats.", "48/2 = 24\n48+24 = 72"),  # which 24?
        ("He has 48 cats.", "There are 24 dogs.\n48/2 = 24\n48+24 = 72"),
        ("He has 48 cats.", "48/2 = 24\n30-6 = 24\n48+24 = 72"),
    ],
)
def test_a_number_that_may_be_another_one_is_not_followed(question, trace):
    """The 24 of the last line may be the given one. So only the last line itself can go wrong."""
    for copy in carried_copies(Example(question, trace, "72")):
        assert copy.trace.split("\n")[:-1] == trace.split("\n")[:-1]


@pytest.mark.parametrize(
    "trace, answer, pattern",
    [
        ("600+600 = 1,200\nSo $1200.00 or 1200: 1200*2 = $2,400", "$2,400", r"\$\d{1,3}(,\d{3})*"),
        ("2*$1.75 = $3.50\nThen $3.50*2 = $7.00", "$7.00", r"\$\d+\.\d\d"),
        (".5*10 = 5\n5+.25 = 5.25", "5.25 km", r"\d+\.?\d* km"),
        ("50% * 40 = 20\n40-20 = 20\n20/40 = 50%", "50%", r"\d+%"),
    ],
)
def test_numbers_keep_their_form(trace, answer, pattern):
    def shape_of(text: str) -> str:
        """All but numbers and operators."""
        return re.sub("[-+*/]", "", re.sub("[0-9.,]+", "#", text))

    copies = carried_copies(Example("?", trace, answer), 200)
    assert copies
    for copy in copies:
        assert re.fullmatch(pattern, copy.answer), copy
        assert not false_equations(copy.trace)
        assert shape_of(copy.trace) == shape_of(trace)


def test_equal_values_are_equal_however_they_are_written():
    example = Example("?", "600+650 = 1,250\nSo $1,250.00 or 1250: 1250*2 = 2500", "2500")
    followed = [copy for copy in carried_copies(example, 80) if "1,250\n" not in copy.trace]
    assert followed
    for copy in followed:
        assert "1250" not in copy.trace and "1,250" not in copy.trace


def test_what_cannot_be_carried_on_is_broken():
    """No equation, none with the answer, or only absurd changes: the other kinds are left."""
    rng = random.Random(0)
    for trace, answer in (
        ("He has 3 pens.", "3"),
        ("1+2=3", "yes"),
        ("1+2=3", "1/2"),
        ("1+2=4", "4"),
        ("5-5=0", "0.5"),
    ):
        example = Example("?", trace, answer)
        assert carry_error(example, rng) is None
        copy = negatives.perturb(example, rng, "carried")
        assert copy is not None and copy != example


def test_commuted_sums_and_equal_results_are_no_change():
    for trace in ("0*5=0", "3+4=7", "2*2=4"):
        for copy in carried_copies(Example("?", trace, trace.split("=")[1])):
            assert read_results(copy.trace) != read_results(trace)


def test_absurd_numbers_are_given_up():
    """Negative, zero, not whole, far larger than all others: such a copy would be known by its
    looks."""
    for copy in carried_copies(Example("?", "12/3 = 4\n20-4 = 16\n16*2 = 32", "32"), 200):
        for number in map(read_number, re.findall(NUMBER, copy.trace)):
            assert number.denominator == 1 and 0 < number <= 32 * negatives.ABSURD
        assert "-" not in re.sub(r"\d+-\d+", "", copy.trace)


def test_marks_are_read_kept_and_used():
    """GSM8K's <<..>> leave the text. They tell of calculations in words, and of an operand that is
    not shown."""
    solution = from_record({"question": "How many?", "answer": CLIPS})
    assert "<<" not in solution.trace
    for place, mark in solution.marks:
        assert solution.trace[place:].startswith(mark.split("=")[1])
    words = (
        "Half of the 48 is <<48/2=24>>24.\n"
        "Three times as many are <<24*3=72>>72, and <<72+5=77>>77 in all.\n"
        "#### 77"
    )
    copies = carried_copies(Example(*from_record({"question": "?", "answer": words})), 200)
    assert copies
    for copy in copies:
        numbers = [int(number) for number in re.findall(r"\d+", copy.trace)]
        first, half, three_times, answer = numbers
        assert half == first / 2 and three_times == 3 * half and answer == three_times + 5
        assert copy.marks == ()
    # marks that the trace does not agree with
    marks = ((3, "48/2=24"), (18, "1+1=2"), (99, "1+1=2"), (-5, "="))
    wrong = Example("?", "Half of the 48 is 24.", "24", marks=marks)
    assert carry_error(wrong, random.Random(0)) is None


def test_a_result_that_is_told_beforehand_would_stay():
    """So the calculation that it comes from is not changed, nor one before it."""
    trace = "He drives 1,500-0 = 1,500 miles\nIt takes 20 hours because 1,500/75 = 20\n20*2 = 40"
    copies = carried_copies(Example("?", trace, "40"), 80)
    assert copies
    for copy in copies:
        assert copy.trace.splitlines()[:2] == trace.splitlines()[:2]


def test_gsm8k_carries_errors_on(request):
    """1,000 demonstrations of GSM8K: the share that gives a copy, and every copy's equations."""
    examples = gsm8k(1000)
    rng = random.Random(0)
    worked = 0
    for example in examples:
        copy = carry_error(example, rng)
        if copy is None:
            continue
        worked += 1
        rounded = len(false_equations(example.trace))  # 10/3 = 3.33
        assert len(false_equations(copy.trace)) <= rounded
        assert copy.answer != example.answer and copy.question == example.question
        assert copy.trace.count("\n") == example.trace.count("\n")
        assert negatives.perturb(example, rng) is not None
    report_line(request.config, f"errors carried on in {worked} of {len(examples)} traces of GSM8K")
    assert worked > 0.85 * len(examples)


# negatives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["broken", "carried", "length", "both", "all"])
def test_perturbed_negatives_count_from_the_first_changed_token(shipped, kind):
    _, tokenizer = shipped
    question = "Ava has 24 pens. Ava loses 9. Ava finds 3. How many pens?"
    [example] = data.tokenize(tokenizer, [Example(question, "24-9=15\n15+3=18", "18")])
    expert = example.response
    made = negatives.perturbed_negatives(tokenizer, example, 50, random.Random(0), kind)
    assert len(made) == 50
    carried = 0
    for ids, first in made:
        assert ids != expert and ids[:first] == expert[:first] and ids[first] != expert[first]
        text = data.decode(tokenizer, ids)
        carried += not false_equations(text) and extract_answer(text) != example.answer
    if kind == "carried":
        assert carried == 50
    elif kind == "both":
        assert 15 <= carried <= 45


def test_the_setting_reaches_the_negatives():
    assert parse_settings([]).negatives == "broken"
    for kind in ("broken", "carried", "length", "both", "all"):
        assert parse_settings(["--negatives", kind]).negatives == kind


@pytest.mark.parametrize("kind", ["broken", "carried"])
def test_a_copy_has_no_tokens_of_the_expert(shipped, kind):
    [expert] = data.tokenize(shipped[1], [AVA])
    copy = negatives.perturb(expert, random.Random(0), kind)
    assert copy.prompt == expert.prompt and copy.response == []


# arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("10-2-3", 5),
        ("8/4/2", 1),
        ("2 x $3", 6),
        ("2×3÷4", "3/2"),
        ("5−2", 3),
        ("1,200.50*2", 2401),
        ("20% * 50", 10),
        (".5+.25", "3/4"),
        ("((2))", 2),
        ("2*(3-(1+1))", 2),
        ("(1+2", 3),  # the sentence's own parenthesis
    ],
)
def test_values(text, value):
    assert evaluate(text) == Fraction(value)


NO_EXPRESSIONS = (
    "1/0",
    "1+",
    "2(3)",
    "",
    "()",
    "a+1",
    "1 2",
    "1=1",
    "-1",
    "2**3",
    "1,2",
    "1j",
    "'a'",
)


@pytest.mark.parametrize("text", NO_EXPRESSIONS)
def test_what_has_no_value(text):
    assert evaluate(text) is None


@pytest.mark.parametrize(
    "text, calculations",
    [
        ("48/2 = $24.", ["24"]),
        ("(48/2 = 24) and x = 3*4 = 12", ["24", "12"]),
        ("- 48/2 = 24 - 3 apples", []),  # 24 - 3 is no result
        ("- 48/2 = 24\n- 24*2 = 48", ["24", "48"]),  # dashes of a list
        ("5 apples * 2 = 10", []),  # "2 = 10" is none; a mark would tell
        ("x = 24, 2y = 8, 25+x = 2(6+x)", []),
        ("1+1=3", []),  # not true
        ("2*3+4 = 6+4 = 10", []),  # true, but no single calculation
        ("9" * 20 + "+1=2", []),
        ("tax 3+4=7 max", ["7"]),
        ("5-5=0", ["0"]),
    ],
)
def test_calculations(text, calculations):
    parts = negatives.read_parts(text)
    assert [part["result"] for part in parts if part.re is negatives.CALCULATION] == calculations


@inputs(max_examples=300, deadline=None)
@given(
    st.fractions(0, 10**6, max_denominator=8),
    st.sampled_from(["5", "12.50", "1,200", ".5", "100.0", "7.25", "20%", "5 %"]),
)
def test_a_written_number_is_read_as_itself(value, like):
    try:
        written = write_number(value, like)
    except ValueError:
        return
    assert re.fullmatch(NUMBER, written) and read_number(written) == value


# any text at all ----------------------------------------------------------------------------------

PIECES = [*"10+-*/x=()$%a½٣ \n", "24", "3.50", "1,200", "<<", "48/2=24"]
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def without_brackets(text: str) -> str:
    """As in a mark that tasks/records.py has read."""
    return re.sub("[<>]", "", text)


MARKS = st.tuples(st.integers(0, 80), TEXTS.map(without_brackets))


@inputs(max_examples=500, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.lists(MARKS, max_size=3), st.integers(0, 99))
def test_any_text_is_survived(question, trace, answer, marks, seed):
    example = Example(question, trace, answer, marks=tuple(marks))
    for kind in (*negatives.BROKEN, "broken", "carried", "length", "both", "all"):
        copy = negatives.perturb(example, random.Random(seed), kind)
        assert copy is None or (copy.trace, copy.answer) != (trace, answer)
    carried = carry_error(example, random.Random(seed))
    if carried is not None:
        assert len(false_equations(carried.trace)) <= len(false_equations(trace))
        assert carried.answer != answer


@inputs(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["24", "48", "2", "(", ")", *"+-*/"]), min_size=3, max_size=8),
    st.integers(0, 9),
)
def test_written_calculations_stay_true(expression, seed):
    """Any true calculation, used twice."""
    expression = "".join(expression)
    value = evaluate(expression)
    if value is None or value.denominator != 1 or value <= 0:
        return
    example = Example("?", f"{expression} = {value}\nThen {value}*2 = {value * 2}", str(value * 2))
    carried = carry_error(example, random.Random(seed))
    if carried is not None:
        assert len(equations(carried.trace)) == len(equations(example.trace))
        assert not false_equations(carried.trace)
