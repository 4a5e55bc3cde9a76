"""tasks/answers.py: what a response answers, and when two answers say the same."""

import json
import threading

import pytest

import data
import rerank
from candidates import Candidates
from data import Example
from engine.errors import UserError
from tasks.answers import extract_answer, group_answers, odd_answers, option_of, same_answer

# A line: an answer ~ others that say the same. First what is read here, then what math-verify reads
SAME = r"""
18 ~ 18 ~ $18.00 ~ 18. ~ 18 dollars ~ => 18 ~ 18.00 USD ~ \$18 ~ 18 more apples
1234 ~ 1,234 ~ 1 234 ~ 1'234
-5 ~ -5 ~ −5 ~ -$5 ~ x=-5
1/2 ~ 0.5
0.75 ~ 3/4
1000.5 ~ €1,000.50
50 ~ 50%
1000000 ~ 1,000,000
left ventricle ~ The left ventricle.
vitamin c ~ B. Vitamin C
A ~ A
-5 dB ~ −5 dB ~ - 5 dB
3-5 days ~ 3 - 5 days
<= 5 mg ~ ≤5 mg
0.5 ~ .5 ~ $.50 ~ 50% ~ 1/2 ~ \frac{1}{2} ~ ½ ~ \frac12 ~ 1⁄2
-0.5 ~ -.5 ~ -\frac{1}{2}
12.5 ~ 12.5 %
3.5 ~ 3 1/2 ~ 3½
3/4 ~ \dfrac{3}{4}
1500 ~ 1.5e3
30000 ~ 3\times 10^4 ~ 3 × 10⁴
1500000 ~ 1.5 million
5000 ~ 5k
5 km ~ 5km ~ 5
5, 7 ~ 5, 7 ~ 7, 5
18% ~ 18\%
sin(x) ~ sin x
true ~ True
12:30 pm ~ 12:30 PM
7 ~ 007
3 + 4 ~ 3+4
42 ~ 6*7=42
7250 ~ $7{,}250$
5/4 ~ 1\frac{1}{4}
2.4000000000000004 ~ 2.4
30000000000000000000000 ~ 3e+22
24 ~ 48/2
30 ~ \boxed{30}
\boxed{30} ~ 30
5 kilometer ~ 5 kilometers
5 dollars ~ $5
12 grams of salt ~ 12 grams
50% ~ 50 percent
5 ~ 5m
90 ~ 90° ~ 90^\circ
12 ~ 12\text{ cm}^2 ~ 12 m²
12 m^2 ~ 12 m²
(1,2) ~ (1, 2)
\{2, 1\} ~ \{1, 2\}
(1, \frac{1}{2}) ~ (1, 1/2)
even ~ \text{even}
x ~ x
3 : 2 ~ 3:2
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ~ \begin{pmatrix}1\\2\end{pmatrix}
2x^2+4x+2 ~ 2(x+1)^2
\sqrt{3} ~ \frac{\sqrt{12}}{2}
x+1 ~ \frac{x^2-1}{x-1}
1 + x ~ \sin^2 x + \cos^2 x + x
\frac{1}{x} ~ x^{-1}
\pi/2 ~ \frac{\pi}{2}
\sqrt{12} ~ 2\sqrt3
1024 ~ 2^{10}
4 ~ \sqrt{16}
2x+1 ~ y = 2x+1
b+a ~ a+b
\frac{x}{2} ~ \frac{1}{2}x
2x ~ 2 \cdot x
(x, x*x) ~ (x, x^2)
2+x ~ \sqrt[3]{8} + x
(e^x)^2 ~ e^{2x}
"""

# A line: an answer ~ others that do not; the last lines are stricter than a person may be
DIFFERENT = r"""
-5 ~ 5
12 ~ 12 34 ~ 12:30 ~ B12
1234 ~ 12,34
18 ~ eighteen ~ not 18
left ventricle ~ right ventricle
vitamin B6 ~ vitamin B12
-5 dB ~ +5 dB
> 5 ~ < 5
<= 5 mg ~ < 5 mg
5 ~ < 5 ~ - 5 ~ –5 ~ 5k ~ less than 5 ~ two and 5 ~ 5 or more ~ 5, 7
2x-3 ~ 2x+3
2x ~ x^2
x_2 ~ x^2
a-b ~ a+b
3:2 ~ 3.2 ~ 3 2
5/10 ~ 5-10
n+1 ~ n-1
-2\sqrt{3} ~ 2\sqrt{3}
2 ~ 2 dozen ~ 2x ~ 2 or 3
1.5 ~ 1.5 million
7 ~ 3+4 ~ 2x+3=7
6 ~ 6*7=42
1/4 ~ 1 1/4
2.4001 ~ 2.4
1/3 ~ 0.33
12.34 ~ 12,34
5 m ~ 5 km
50 ~ 0.5%
12 m ~ 12 m²
3 ~ 3 boys and 2 girls
19 ~ COVID-19
1 ~ 1. Compute it
y = 5 ~ x = 5
(2, 1) ~ (1, 2)
[0, 1] ~ [0, 1)
\begin{pmatrix}2\\1\end{pmatrix} ~ \begin{pmatrix}1\\2\end{pmatrix}
x-1 ~ x+1
1.414 ~ \sqrt{2}
x ~ |x|
x^2 ~ 2x
\frac{1}{x}+1 ~ \frac{1}{x+1}
a+bc ~ ab+c
\cos x ~ \sin x
x+1 ~ \sqrt{x^2+1}
0 ~ 1/0
2 ~ two
1000 ~ €1.000
1234.5 ~ 1.234,50
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """(first, other) for each other answer of each line."""
    lines = [line.split(" ~ ") for line in table.strip().split("\n")]
    return [(first, other) for first, *others in lines for other in others]


@pytest.mark.parametrize("first, other", pairs(SAME))
def test_answers_that_agree(first, other):
    assert same_answer(first, other) is True
    assert same_answer(other, first) is True


@pytest.mark.parametrize("first, other", pairs(DIFFERENT))
def test_answers_that_do_not_agree(first, other):
    assert same_answer(first, other) is False
    assert same_answer(other, first) is False


def test_what_is_an_answer_only_as_a_prediction_or_only_as_the_truth():
    assert same_answer("She has 18 apples.", "18")
    assert not same_answer("2", "Interleukin 2")
    assert same_answer("30", "26+4=30\n#### 30") and not same_answer("4", "26+4=30\n#### 30")
    for nothing in (None, "", "."):
        for truth in ("0", "A", "the", ""):
            assert not same_answer(nothing, truth)


def test_a_formula_that_takes_for_ever_is_given_up():
    """In the main thread, where the library can stop itself."""
    assert same_answer("9^{9^{9}}", "9^{9^{8}}") is False


def test_formulas_are_compared_in_a_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(same_answer("2(y+1)", "2y+2")))
    thread.start()
    thread.join()
    assert verdicts == [True]


VALVES = ("Mitral valve", "Aortic valve", "Neither")
ORGANS = ("Mitral valve", "Aortic valve", "Heart", "Lung", "Liver")
VITAMINS = ("B12", "C", "D")
GERMS = ("S. pneumoniae", "K. pneumoniae")


@pytest.mark.parametrize(
    "answers, options, index",
    [
        # "B" in every dress, with and without the option's text
        ("B ~ b ~ B. ~ (B) ~ B) ~ [B] ~ **B** ~ $B$ ~ Option B ~ The answer is B.", VALVES, 1),
        (r"\text{(B)} ~ \boxed{B} ~ \textbf{B}", VALVES, 1),
        ("aortic valve. ~ B Aortic valve ~ (B) Aortic valve ~ B: Aortic valve", VALVES, 1),
        ("B) the aortic valve ~ B. what leads to the aorta ~ **B. Aortic valve**", VALVES, 1),
        ("D ~  ~ A valve ~ B, C ~ Both A and B", VALVES, None),
        ("E. coli ~ C. difficile", ORGANS, None),
        ("C", VITAMINS, 1),
        ("D", VITAMINS, 2),
        ("18.0 ~ 18 pens", ("17", "18"), 1),
        ("K. pneumoniae", GERMS, 1),
        ("> 5", ("< 5", "> 5"), 1),
        ("A", (), None),
    ],
)
def test_an_answer_names_an_option_by_letter_or_by_text(answers, options, index):
    for answer in answers.split(" ~ "):
        assert option_of(answer, options) == index
        for place, truth in enumerate(options):
            example = Example("Which?", "", truth, options)
            is_right = data.is_correct(example, data.response_text("", answer))
            assert is_right is (index == place)


def test_the_truth_may_be_a_letter():
    for truth in ("B", r"\boxed{B}", "(B)"):
        assert same_answer("Aortic valve", truth, VALVES) and same_answer("b", truth, VALVES)
        assert not same_answer("Mitral valve", truth, VALVES)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>\n1+1=2\n</think>\n<answer>2</answer>", "2"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>7", "7"),
        ("<answer>5</answer> <answer>", "5"),
        ("3+4=7\n<answer></answer>", ""),
        ("<answer>the heart</answer> of 2", "the heart"),
        ("<think>\nThe answer is 5?\n</think>\n<answer>the heart</answer>", "the heart"),
        ("<answer>The answer is 18 apples</answer>", "18 apples"),
        ("<answer>\n\n$216\n\n<think>\n\n<answer>", "$216"),
        ("<ANSWER>5</ANSWER> since 3", "5"),
        ("so 3+4=7.\n#### 7", "7"),
        ("#### $18.00", "$18.00"),
        ("#### 1. Compute\n3*5=15\n#### Answer\n15", "15"),
        ("#### Step 1\nadd\n\n#### Final Answer\nThe answer is \\boxed{18}.", "18"),
        (r"hence \boxed{7}.", "7"),
        (r"Thus \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"\boxed{x^{2}+1}", "x^{2}+1"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} is half, so \boxed{10}", "10"),
        ("The answer is -3.", "-3"),
        ("answer: 1.5e3", "1.5e3"),
        ("The answer is: **18**.", "18"),
        ("The answer is (B) Aortic valve.", "(B) Aortic valve"),
        ("The answer is the left ventricle.", "the left ventricle"),
        ("The answer is correct. 3+4=7", "7"),
        # a text that runs on into another question
        ("6*2=12\n#### 12\n\nQuestion: Ben?\nAnswer: 7\n#### 7", "12"),
        ("so 12.\n\nQuestion: Ben has 3 pens", "12"),
        # no marker: the last number, or a formula
        ("She has 3 and gets 4, so 7.", "7"),
        ("She pays $.50", "$.50"),
        ("the ratio is 3:2", "3:2"),
        ("about 1.5 million", "1.5 million"),
        ("that is 50%", "50%"),
        ("it takes 2 1/2 hours", "2 1/2"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        (r"so it is $2\sqrt{3}$.", r"$2\sqrt{3}$"),
        (r"it is $\frac{3}{4}$", r"$\frac{3}{4}$"),
        (r"so \(x^2\)", r"\(x^2\)"),
        ("vitamin B12", None),
        ("I do not know.", None),
    ],
)
def test_the_last_marker_that_holds_an_answer(text, answer):
    assert extract_answer(text) == answer


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
    ]
    texts += ["the heart", "Heart.", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", None, ""]
    keys = group_answers(texts)
    assert keys == [0, 0, 0, 0, 4, 5, 5, 7, 7, 9, 10, -1, -1]
    backwards = group_answers(texts[::-1])[::-1]
    for one, other in zip(keys, backwards):
        assert [key == one for key in keys] == [key == other for key in backwards]


def test_odd_true_answers_are_told(tmp_path, capsys):
    assert odd_answers(["5", "heart", "lung"]) == odd_answers([]) == []
    answers = ["5", "7.5", "1/2", "eight", "1,000", "12"]
    rows = [{"question": f"{answer}?", "trace": "t", "answer": answer} for answer in answers]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data.load_examples(str(tmp_path / "mine.jsonl"), "train")
    assert "mine.jsonl:4: 1 of 6 answers" in capsys.readouterr().out


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
