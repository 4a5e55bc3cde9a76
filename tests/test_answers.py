"""tasks/answers.py and tasks/formulas.py: what an answer says, when two say the same, where a
response gives one."""

import json
from fractions import Fraction

import pytest

import data
import rerank
from candidates import Candidates
from data import Example
from engine.errors import UserError
from tasks import answers, formulas
from tasks.answers import extract_answer, odd_answers, option_of, same_answer


@pytest.mark.parametrize(
    "predicted, truth, same",
    [
        ("18", "18", True),
        ("$18.00", "18", True),
        ("18.", "18", True),
        ("18 dollars", "18", True),
        ("1,234", "1234", True),
        ("-5", "-5", True),
        ("5", "-5", False),
        ("−5", "-5", True),
        ("0.5", "1/2", True),
        ("3/4", "0.75", True),
        ("€1,000.50", "1000.5", True),
        ("50%", "50", True),
        ("12 34", "12", False),
        ("", "0", False),
        (None, "0", False),
        ("1/0", "0", False),
        ("12,34", "1234", False),
        ("eighteen", "18", False),
        ("1,000,000", "1000000", True),
        ("The left ventricle.", "left ventricle", True),
        ("B. Vitamin C", "vitamin c", True),
        ("right ventricle", "left ventricle", False),
        ("vitamin B12", "vitamin B6", False),
        ("A", "A", True),
        ("", "A", False),
        ("", "the", False),
        (".", "A", False),
        ("+5 dB", "-5 dB", False),
        ("−5 dB", "-5 dB", True),
        ("- 5 dB", "-5 dB", True),
        ("3 - 5 days", "3-5 days", True),
        ("< 5", "> 5", False),
        ("≤5 mg", "<= 5 mg", True),
        ("< 5 mg", "<= 5 mg", False),
        ("< 5", "5", False),
        ("=> 18", "18", True),
    ],
)
def test_same_answer(predicted, truth, same):
    assert same_answer(predicted, truth) is same


VALVES = ("Mitral valve", "Aortic valve", "Neither")


@pytest.mark.parametrize(
    "answer, options, index",
    [
        ("B", VALVES, 1),
        ("b", VALVES, 1),
        ("B.", VALVES, 1),
        ("(B)", VALVES, 1),
        ("B) the aortic valve", VALVES, 1),
        ("B. what leads to the aorta", VALVES, 1),
        ("aortic valve.", VALVES, 1),
        ("D", VALVES, None),
        ("", VALVES, None),
        ("A valve", VALVES, None),
        ("C", ("B12", "C", "D"), 1),
        ("D", ("B12", "C", "D"), 2),
        ("18.0", ("17", "18"), 1),
        ("18 pens", ("17", "18"), 1),
        ("K. pneumoniae", ("S. pneumoniae", "K. pneumoniae"), 1),
        ("A", (), None),
        ("> 5", ("< 5", "> 5"), 1),
    ],
)
def test_an_answer_names_an_option_by_letter_or_by_text(answer, options, index):
    assert option_of(answer, options) == index
    for truth in range(
        len(options)
    ):  # the truth may be a letter, too, unless a letter is an option's text
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


# What users met: as a person judges, but for STRICTER, which tasks/answers.py argues
PAIRS = [
    (".5", "0.5", True),
    ("$.50", "0.5", True),
    ("-.5", "-0.5", True),
    ("- 5", "5", False),
    ("–5", "5", False),
    ("-$5", "-5", True),
    ("50%", "0.5", True),
    ("12.5 %", "12.5", True),
    ("1 234", "1234", True),
    ("1.234,50", "1234.5", True),
    ("3 1/2", "3.5", True),
    ("1/2", "0.5", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac{3}{4}", "3/4", True),
    ("1.5e3", "1500", True),
    (r"3\times 10^4", "30000", True),
    ("1.5 million", "1500000", True),
    ("5k", "5000", True),
    ("18 dollars", "18", True),
    ("5km", "5 km", True),
    ("5", "5 km", True),
    ("18.00 USD", "18", True),
    ("x=-5", "-5", True),
    ("5, 7", "5, 7", True),
    ("two", "2", True),
    ("18.", "18", True),
    (r"\$18", "18", True),
    (r"18\%", "18%", True),
    ("2x+3", "2x-3", False),
    ("x^2", "2x", False),
    ("x^2", "x_2", False),
    ("a+b", "a-b", False),
    ("3.2", "3:2", False),
    ("5-10", "5/10", False),
    ("n-1", "n+1", False),
    ("sin x", "sin(x)", True),
    (r"2\sqrt{3}", r"-2\sqrt{3}", False),
    ("True", "true", True),
    ("12:30 PM", "12:30 pm", True),
    ("1,000,000", "1000000", True),
    ("007", "7", True),
    ("2 dozen", "2", False),
    ("€1.000", "1000", True),
    ("½", "0.5", True),
]
STRICTER = {("two", "2"), ("€1.000", "1000")}


@pytest.mark.parametrize("predicted, truth, same", PAIRS)
def test_pairs_that_users_met(predicted, truth, same):
    expected = same and (predicted, truth) not in STRICTER
    assert same_answer(predicted, truth) is expected
    assert same_answer(truth, predicted) is expected


@pytest.mark.parametrize(
    "predicted, truth, same",
    [
        ("1.5 million", "1.5", False),
        ("12:30", "12", False),
        ("5k", "5", False),
        ("3+4", "7", False),
        ("3+4", "3 + 4", True),
        ("6*7=42", "42", True),
        ("6*7=42", "6", False),
        ("2x+3=7", "7", False),
        ("1'234", "1234", True),
        (r"$7{,}250$", "7250", True),
        (r"1\frac{1}{4}", "5/4", True),
        ("3½", "3.5", True),
        ("1 1/4", "1/4", False),
        (r"\frac12", "0.5", True),
        (r"-\frac{1}{2}", "-0.5", True),
        ("1⁄2", "0.5", True),
        ("3 × 10⁴", "30000", True),
        ("2.4", "2.4000000000000004", True),
        ("2.4", "2.4001", False),
        ("3e+22", "30000000000000000000000", True),
        ("48/2", "24", True),
        ("0.33", "1/3", False),
        ("12,34", "12.34", False),
        (r"\boxed{30}", "30", True),
        ("30", r"\boxed{30}", True),
        ("30", "26+4=30\n#### 30", True),
        ("4", "26+4=30\n#### 30", False),
        ("5 km", "5 m", False),
        ("5 kilometers", "5 kilometer", True),
        ("$5", "5 dollars", True),
        ("12 grams", "12 grams of salt", True),
        ("50 percent", "50%", True),
        ("0.5%", "50", False),
        ("2x", "2", False),
        ("5m", "5", True),
        ("90°", "90", True),
        (r"90^\circ", "90", True),
        (r"12\text{ cm}^2", "12", True),
        ("12 m²", "12 m^2", True),
        ("12 m²", "12", True),
        ("12 m²", "12 m", False),
        ("She has 18 apples.", "18", True),
        ("not 18", "18", False),
        ("less than 5", "5", False),
        ("2 or 3", "2", False),
        ("3 boys and 2 girls", "3", False),
        ("COVID-19", "19", False),
        ("B12", "12", False),
        ("1. Compute it", "1", False),
        ("two and 5", "5", False),
        ("x = 5", "y = 5", False),
        ("18 more apples", "18", True),
        ("5 or more", "5", False),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2, 1)", False),
        ("[0, 1)", "[0, 1]", False),
        ("7, 5", "5, 7", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("(1, 1/2)", r"(1, \frac{1}{2})", True),
        ("5, 7", "5", False),
        (r"\text{even}", "even", True),
        ("x", "x", True),
        ("3:2", "3 : 2", True),
        ("3 2", "3:2", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
    ],
)
def test_nothing_numeric_is_left_unread(predicted, truth, same):
    assert same_answer(predicted, truth) is same


OPTIONS = ("Mitral valve", "Aortic valve", "Heart", "Lung", "Liver")


@pytest.mark.parametrize(
    "predicted, truth, same",
    [
        ("B", "Aortic valve", True),
        ("B)", "B", True),
        ("**B**", "Aortic valve", True),
        ("Option B", "Aortic valve", True),
        ("B Aortic valve", "Aortic valve", True),
        ("b", "B", True),
        ("B, C", "Aortic valve", False),
        ("$B$", "Aortic valve", True),
        (r"\text{(B)}", "Aortic valve", True),
        ("(B) Aortic valve", "Aortic valve", True),
        ("E. coli", "Liver", False),
        ("C. difficile", "Heart", False),
        (r"\boxed{B}", "Aortic valve", True),
        ("Aortic valve", r"\boxed{B}", True),
        ("B: Aortic valve", "B", True),
        ("[B]", "B", True),
        ("Both A and B", "A", False),
        ("**B. Aortic valve**", "B", True),
        (r"\textbf{B}", "B", True),
        ("The answer is B.", "B", True),
    ],
)
def test_letters_of_options_in_every_dress(predicted, truth, same):
    assert same_answer(predicted, truth, OPTIONS) is same


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"Thus \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"\boxed{x^{2}+1}", "x^{2}+1"),
        (r"\fbox{3}", "3"),
        ("#### Step 1\nadd\n\n#### Final Answer\nThe answer is \\boxed{18}.", "18"),
        ("She pays $.50", "$.50"),
        ("the ratio is 3:2", "3:2"),
        ("#### $18.00", "$18.00"),
        ("<answer>5</answer> <answer>6</answer>", "6"),
        ("The answer is -3.", "-3"),
        ("answer: 1.5e3", "1.5e3"),
        ("<ANSWER>5</ANSWER> since 3", "5"),
        ("6*2=12\n#### 12\n\nQuestion: Ben?\nAnswer: 7\n#### 7", "12"),
        ("so 12.\n\nQuestion: Ben has 3 pens", "12"),
        ("<answer>5</answer> <answer>", "5"),
        ("3+4=7\n<answer></answer>", ""),
        ("<answer>the heart</answer> of 2", "the heart"),
        ("<think>\nThe answer is 5?\n</think>\n<answer>left ventricle</answer>", "left ventricle"),
        ("#### 1. Compute\n3*5=15\n#### Answer\n15", "15"),
        ("The answer is (B) Aortic valve.", "(B) Aortic valve"),
        ("The answer is correct. 3+4=7", "7"),
        ("The answer is the left ventricle.", "the left ventricle"),
        (r"\boxed{5} is half, so \boxed{10}", "10"),
        (r"so it is $2\sqrt{3}$.", r"$2\sqrt{3}$"),
        (r"so \(x^2\)", r"\(x^2\)"),
        ("about 1.5 million", "1.5 million"),
        ("that is 50%", "50%"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        ("vitamin B12", None),
        (r"it is $\frac{3}{4}$", r"$\frac{3}{4}$"),
        ("it takes 2 1/2 hours", "2 1/2"),
        ("The answer is: **18**.", "18"),
        ("<answer>The answer is 18 apples</answer>", "18 apples"),
        ("<answer>\n\n$216\n\n<think>\n\n<answer>", "$216"),
    ],
)
def test_the_last_marker_that_holds_an_answer(text, answer):
    assert extract_answer(text) == answer


def test_halves_and_thirds_are_two_votes():
    half, third = (extract_answer(rf"\boxed{{\frac{{1}}{{{n}}}}}") for n in (2, 3))
    assert not same_answer(half, third) and rerank.answer_keys([[half, third]], [()]).tolist() == [
        [0, 1]
    ]


# Formulas: where a library of computer algebra is at home. The last are different ones
FORMULAS = [
    ("2(x+1)^2", "2x^2+4x+2", True),
    (r"\frac{\sqrt{12}}{2}", r"\sqrt{3}", True),
    (r"\frac{x^2-1}{x-1}", "x+1", True),
    (r"\sin^2 x + \cos^2 x + x", "1 + x", True),
    ("x^{-1}", r"\frac{1}{x}", True),
    (r"\frac{\pi}{2}", r"\pi/2", True),
    (r"2\sqrt3", r"\sqrt{12}", True),
    ("2^{10}", "1024", True),
    (r"\sqrt{16}", "4", True),
    ("y = 2x+1", "2x+1", True),
    ("a+b", "b+a", True),
    (r"\frac{1}{2}x", r"\frac{x}{2}", True),
    (r"2 \cdot x", "2x", True),
    ("(x, x^2)", "(x, x*x)", True),
    (r"\sqrt[3]{8} + x", "2+x", True),
    ("e^{2x}", "(e^x)^2", True),
    (r"\log_2 8 \cdot x", "3x", True),
    ("x^2", "x_2", False),
    ("x+1", "x-1", False),
    (r"\sqrt{2}", "1.414", False),
    ("|x|", "x", False),
    ("2x", "x^2", False),
    (r"\frac{1}{x+1}", r"\frac{1}{x}+1", False),
    ("ab+c", "a+bc", False),
    (r"\sin x", r"\cos x", False),
    ("9^{9^{9}}", "9^{9^{8}}", False),
    (r"\sqrt{x^2+1}", "x+1", False),
]


TAME = [
    pair for pair in FORMULAS if "9^{9" not in pair[0]
]  # a power of a power makes the library hang


@pytest.mark.parametrize("one, other, same", FORMULAS)
def test_formulas(one, other, same):
    assert same_answer(one, other) is same and same_answer(other, one) is same


def by_math_verify(predicted: str, truth: str) -> bool:
    """The verdict of the field's library, given the answer alone, as LaTeX where it can be."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        return parse(text if "$" in text else f"${text}$", parsing_timeout=None) or parse(
            text, parsing_timeout=None
        )

    return verify(read(truth), read(predicted), timeout_seconds=None)


@pytest.mark.parametrize("pairs, rights", [(PAIRS, (27, 42)), (TAME, (25, 26))])
def test_own_code_beside_math_verify(pairs, rights):
    """As often right as the library on formulas, more often on what users met."""
    pytest.importorskip("math_verify")
    theirs = sum(by_math_verify(predicted, truth) == same for predicted, truth, same in pairs)
    own = sum(same_answer(predicted, truth) == same for predicted, truth, same in pairs)
    assert (theirs, own) == rights


def test_what_is_no_formula():
    for text in (
        "3+4",
        "5-10",
        "the heart",
        "no",
        "B12",
        "H2O",
        "",
        "x/0",
        "(" * 300,
        "x^" * 150,
        "|x",
        r"\frac{1}",
        "9^9^9^9^9",
    ):
        assert formulas.evaluate(text) is None, text


def test_exact_values_do_not_round():
    """A float has 16 digits: these differ in the 21st, and at the size of 1e-9 of their value."""
    one, other = (formulas.evaluate(f"x + 10^{{20}} + {n}") for n in (1, 2))
    assert isinstance(one[0], Fraction) and not formulas.same_values(one, other)


# Votes, and a data set's answers ------------------------------------------------------------------


def test_votes_do_not_depend_on_the_order():
    texts = [
        "1,200",
        "$1200.00",
        "1200 pens",
        "It is 1200",
        "12",
        r"\sqrt{2}",
        r"\frac{2}{\sqrt{2}}",
        "the heart",
        "Heart.",
        None,
        "",
    ]
    keys = answers.group_answers(texts)
    assert keys == [0, 0, 0, 0, 4, 5, 5, 7, 7, -1, -1]
    backwards = answers.group_answers(texts[::-1])[::-1]
    assert [[a == b for b in keys] for a in keys] == [
        [a == b for b in backwards] for a in backwards
    ]


def test_votes_group_as_same_answer_does():
    texts = [text for pair in PAIRS for text in pair[:2] if "%" not in text and "km" not in text]
    keys = answers.group_answers(texts)
    for text, key in zip(texts, keys):
        head = texts[key]
        assert (
            text == head
            or same_answer(text, head)
            or same_answer(head, text)
            or keys.count(key) > 2
        )


def test_odd_true_answers_are_told():
    assert odd_answers(["5", "7.5", "1/2", "eight", "1,000", "12"]) == [3]
    assert odd_answers(["A", "b", "(C)", "D", "Aorta", "B"]) == [4]
    assert odd_answers(["5", "heart", "lung", "", "7"]) == [3] and odd_answers([]) == []


# Candidates from a file ---------------------------------------------------------------------------


def read_candidates(tmp_path, record: str) -> Candidates:
    path = tmp_path / "c.jsonl"
    path.write_text(record)
    examples, texts, n = rerank.read_candidates(str(path))
    return Candidates(examples, data.make_batch([], []), texts, n)


@pytest.mark.parametrize("options", ['["Mitral", "Aortic"]', '{"B": "Aortic", "A": "Mitral"}'])
def test_candidates_keep_their_options(tmp_path, options):
    texts = '["<answer>Aortic</answer>", "<answer>B</answer>", "<answer>A</answer>"]'
    record = f'{{"question": "?", "options": {options}, "answer": "B", "candidates": {texts}}}'
    found = read_candidates(tmp_path, record)
    assert found.examples[0].options == ("Mitral", "Aortic") and found.correct.tolist() == [
        [1, 1, 0]
    ]
    assert rerank.answer_keys(found.answers, [found.examples[0].options]).tolist() == [[0, 0, 2]]


@pytest.mark.parametrize(
    "options", ['"A"', '{"x": "Aortic"}', "[1, null]", '{"A": "Mitral", "C": "Aortic"}']
)
def test_options_that_are_none_are_one_line(tmp_path, options):
    with pytest.raises(UserError, match="c.jsonl:1: field 'options'"):
        read_candidates(
            tmp_path,
            f'{{"question": "?", "options": {options}, "answer": "B", "candidates": ["B"]}}',
        )


def test_candidates_for_an_embedded_task_go_to_its_own_checker(tmp_path):
    """The right target after two false lines is wrong, from a file as when it is sampled."""
    wrong = "<think>\n7+12=20\n20-4=15\n</think>\n<answer>15</answer>"
    right = "<think>\n7+12=19\n19-4=15\n</think>\n<answer>15</answer>"
    found = read_candidates(
        tmp_path,
        json.dumps({"question": "7 12 4 > 15", "answer": "15", "candidates": [wrong, right]}),
    )
    own = Example("7 12 4 > 15", "", "15", task="countdown")
    assert (
        found.correct.tolist()
        == [[0, 1]]
        == [[data.is_correct(own, text) for text in (wrong, right)]]
    )
