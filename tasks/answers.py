r"""Answers as text: what a response answers, and when two answers say the same.

    1. extract_answer    what the last marker of a response holds: <answer>, \boxed{}, ####,
                         "the answer is"; without one, its last number
    2. read_number       one grammar for numbers, with a unit or without
    3. same_formula      all other mathematics: math-verify compares it
    4. same_answer       the answer check: options, numbers, formulas, else words
    5. option_of         which option an answer names: by its text, its number or its letter
    6. group_answers     votes: which of many answers say the same
    7. odd_answers       a data set's true answers that are not read as the others are

Numbers are read here: math-verify takes "1 234" for 235, "-$5" for nothing and "18 dollars" for a
product of eight letters. One counts only if nothing numeric is left unread beside it: "1.5 million"
is not 1.5, "12:30" is not 12, "3+4" is not 4.

Stricter than a person may be, on purpose:

    two, 2           a word is no number: a response that counts in words was not asked to
    €1.000, 1000     one euro, as in a price of fuel (€1.459)
    1.234,50         no number: here a comma stands between groups of three digits
    3+4, 7           a task and not its answer: a policy that learns from this check must not be
                     paid for work left undone. A root or a power is a value: sqrt(16) is 4
    0.33, 1/3        numbers agree exactly, or not at all
"""

import os
import re
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from math_verify import LatexExtractionConfig, parse, verify

from tasks.common import verifier_is_asked

TAIL = 20_000  # characters at a response's end in which its answer is looked for
LONGEST = 1000  # characters of an answer that may be a number or stand in a box
SHORT = 200  # characters of a sentence behind "the answer is", or of what math-verify is given

# 1. The answer of a response ----------------------------------------------------------------------

PROSE = r"\b(?:answer|correct option|correct choice)(?: is:?|:)[ \t]*"
MARKER = rf"(?i)(?P<tag><answer>)|(?P<box>\\(?:boxed|fbox)\s?\{{)|(?P<hashes>#{{4,}})|{PROSE}"
TAG_END = re.compile(r"(?i)</?answer|</?think|\Z")
SENTENCE_END = r"(?<!\b[A-Z])[.!?](?=\s|$)|\.(?=\s+[A-Z])|</?(?:answer|think)>|\Z"
# A base model runs on: it asks itself the next question and answers that one, too.
ANOTHER_QUESTION = (
    r"(?i)\n\s?(?:#{1,4} |\*\*)?(?:question|problem|exercise|q|user|human)(?: ?\d{1,3})?:"
    r"|<\|im_start\|>user"
)
# between dollars or \( \), with a command or a power in it
INLINE_MATH = (
    r"\$[^$\n\\^]{0,99}[\\^][^$\n]{0,99}\$"
    r"|\\\([^\\^\n]{0,99}(?:\^|\\(?!\)))[^\n]{0,99}?\\\)"
)
# A number in running text with all that belongs to it: a ratio, a fraction, an exponent, ..
NUMBER_IN_TEXT = (
    r"(?<![\w.^_{√\\])(?:(?<![)\]}])[-−])?[$€£¥]?"
    r"(?:\\[dt]?frac\{[^{}\n]{1,40}\}\{[^{}\n]{1,40}\}|[¼-¾⅐-⅞]"
    r"|(?:\d|\.\d)(?:\d|[.,:/']\d|\{,\}\d|[eE][-+]?\d| \d{1,9}/\d|[¼-¾⅐-⅞])*)"
    r"(?![\d^]|[.,:/']\d| ?\^| ?\\(?:sqrt|pi))"
    r"(?: ?(?:\\times|×|\*|x) ?10\^\{?-?\d{1,3}\}?"
    r"| (?:hundred|thousand|million|billion|trillion|dozen)\b| ?\\?%|k\b)?"
)


def extract_answer(response: str) -> str | None:
    """The answer that a response gives, as it is written; None if there is none. Without a marker
    it is the last number, which favours a base model that was never told of our tags.

    >>> extract_answer("<think>2+3=5</think><answer> 5 </answer>")
    '5'
    >>> extract_answer("so it is $1,200."), extract_answer("hm")
    ('$1,200', None)
    >>> extract_answer("#### Final Answer\\nThe answer is \\\\boxed{18}.")
    '18'
    >>> extract_answer("#### 12\\n\\nQuestion: Ben?\\n#### 7")
    '12'
    """
    # The tail alone: no regular expression here sees a novel.
    parts = re.split(ANOTHER_QUESTION, response[-TAIL:])
    for find in (extract_marked, last_words, last_number):
        for part in parts:
            answer = find(part)
            if answer is not None:
                return answer
    return None


def extract_marked(text: str) -> str | None:
    """What the last marker that holds something holds; "" if all there is are empty tags. Behind
    hashes and "the answer is" a result alone counts: "#### Step 1" is a heading."""
    answer = None
    for marker in re.finditer(MARKER, text):
        start = marker.end()
        if marker["tag"]:
            content = text[start : TAG_END.search(text, start).start()].strip()
            answer = answer or ""
        elif marker["box"]:
            content = up_to_closing_brace(text[start : start + LONGEST]).strip()
        else:
            content = text[start : start + SHORT].partition("\n")[0]
            if not marker["hashes"]:
                content = content[: re.search(SENTENCE_END, content).start()]
            content = content.strip("*`_ \t")
            content = content if states_result(content) else ""
        if any(map(str.isalnum, content)):
            answer = content
    return answer


def up_to_closing_brace(text: str) -> str:
    r"""What stands in a brace that was opened before `text`: all of it where it is not closed.

    >>> up_to_closing_brace(r"\frac{3}{4}}.")
    '\\frac{3}{4}'
    """
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text


def states_result(text: str) -> bool:
    """Whether a text is a number, an option's letter or a formula, and nothing else."""
    plain = undress(text)
    letter = re.match(r"[(\[]?[A-Z][)\].:]?(?:\s|$)", plain)
    return bool(letter or read_number(plain) or is_formula(plain))


def last_words(text: str) -> str | None:
    """The words with which a text ends in "the answer is ..", where no digit is in them."""
    match = re.fullmatch(rf"(?is).*{PROSE}([^\d\n]{{1,200}})", text.strip("*.!_ \n"))
    return match[1] if match else None


def last_number(text: str) -> str | None:
    """The last number of a running text, as it is written; or the last formula between dollars."""
    numbers = list(re.finditer(NUMBER_IN_TEXT, text))
    formulas = [match for match in re.finditer(INLINE_MATH, text) if states_result(match[0])]
    places = sorted(numbers + formulas, key=re.Match.end)
    return places[-1][0] if places else None


# 2. Numbers ---------------------------------------------------------------------------------------

# One spelling for all that mean the same: minus signs, slashes, operators, spaces, apostrophes
ONE_SPELLING = str.maketrans(
    dict(zip("−–﹣－⁻⁄∕×⋅÷\u00a0\u2009\u202f\u2007’", "-----//**/    '")) | {"≤": "<=", "≥": ">="}
)
LATEX_MARKS = {"\\$": "$", "\\%": "%", "{,}": ",", "~": " ", "\\;": " ", "\\approx": ""} | {
    **dict.fromkeys(("\\(", "\\)", "\\[", "\\]", "\\,", "\\!", "\\left", "\\right"), ""),
    **{"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\times": "*", "\\cdot": "*"},
}
FUNCTION = r"(?<![\\A-Za-z])(?:sin|cos|tan|log|ln|exp|sqrt|pi)(?![A-Za-z])"
DRESS = r"\\(?:text[a-z]{0,4}|math[a-z]{2}|mbox)\s?\{([^{}]*)\}"
EQUALS = r"(?<![<>!=≤≥])=(?![=>])"
# A side of an equation that states the result behind it: words (Total cost), or arithmetic
WORDS_OR_TASK = r"\s*(?:[A-Za-z][A-Za-z ]*[A-Za-z]\s*|(?:[\d\s.,()+*/$€£¥%^{}-]|\\[a-z]+)*)"

DECIMAL = r"(?:(?:\d{1,3}(?:[, ']\d{3})+(?!\d)|\d{1,100})(?:\.\d{1,100})?|\.\d{1,100})"
NUMBER = (
    r"(?P<before>(?:[^\W\d_]|[ ,:;()'\"\n]|\.(?!\d))*)(?<!\w)"
    r"(?P<sign>[-+]?)\s?(?P<money>[$€£¥]?)\s?(?P<minus>-?)"
    rf"(?:(?P<whole>\d{{1,15}})\s(?=[\d.]{{1,100}}\s?/))?"
    rf"(?P<over>{DECIMAL})(?:\s?/\s?(?P<under>{DECIMAL}))?"
    r"(?:(?:[eE]|\s?[*x]\s?10\s?(?:\^|\*\*)\s?\{?)(?P<power>[-+]?\d{1,3})(?!\d)\}?)?"
    r"(?:\s?(?P<times>hundred|thousand|million|billion|trillion|dozen|[kK])s?\b)?"
    r"(?P<percent>\s?(?:%|per ?cent\b))?"
    # words, with m^2; not "5. Go on", and not "5-x"
    r"(?P<unit>(?!\s*(?:\.|[-/(]\s?\w\b)\s?\w)"
    r"(?:[^\W\d_](?:\s?\^\{?[23]\}?)?|[ ,.;()'\"/°\n-])*)"
)
MULTIPLIERS = {"dozen": 12, "hundred": 100, "k": 10**3, "K": 10**3, "thousand": 10**3} | {
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
CURRENCIES = {"$": "dollar", "usd": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
# Beside a number these change it: less than 5, two and 5, 5 squared; and 2x is not 2, though 2 m is
CHANGES = set(
    "zero one two three four five six seven eight nine ten eleven twelve twenty hundred thousand "
    "million billion dozen half third quarter twice double triple squared cubed plus minus times "
    "not no never than least most under below above over between up until or "
    "b c d e f i j k n o p q r t u v w x y z".split()
)


class Number(NamedTuple):
    """A number with what stands beside it."""

    value: Fraction
    unit: str  # in the singular, currencies by name
    percent: bool


@lru_cache(maxsize=10_000)
def undress(text: str) -> str:
    r"""An answer without what only dresses it: its marker, LaTeX's commands, asterisks, quotes, a
    full stop; and without the task or the words before the equals sign.

    >>> undress("**$7{,}250$**."), undress(r"\text{(B)}"), undress("=> 18"), undress("6*7=42")
    ('7,250', '(B)', '18', '42')
    >>> undress("2x+3=7"), undress("26+4=30\n#### 30")
    ('2x+3=7', '30')
    """
    if len(text) > LONGEST:
        return text
    text = (extract_marked(text) or text).translate(ONE_SPELLING)
    for mark, plain in LATEX_MARKS.items():
        text = text.replace(mark, plain)
    text = re.sub(FUNCTION, r"\\\g<0>", text)  # as LaTeX writes it
    text = re.sub(DRESS, r" \1 ", text).strip("*`\"“”' \t\r\n").rstrip(".,; *")
    text = re.sub(r"^(\$\$?)([^$]+)\1$", r"\2", text)
    text = re.sub(r"^(?:=>|->|[=:→⇒≈])\s*", "", text)
    *before, last = re.split(EQUALS, text)
    if all(re.fullmatch(WORDS_OR_TASK, side) for side in before):
        text = last
    return text.strip()


@lru_cache(maxsize=10_000)
def read_number(text: str, in_sentence: bool = False) -> Number | None:
    """The number that an undressed answer states; None if anything numeric or operational is left.
    In a sentence there may be words before it, if they do not change it.

    >>> texts = ("1,234.50", "- 3/4", "1.5e3", "3 1/2 cups", "5k", "$.50", "1.5 million")
    >>> [str(read_number(text).value) for text in texts]
    ['2469/2', '-3/4', '1500', '7/2', '5000', '1/2', '1500000']
    >>> [read_number(t) for t in ("12:30", "3+4", "5-10", "2x", "1/0", "12,34", "B12", "5 or more")]
    [None, None, None, None, None, None, None, None]
    >>> str(read_number("She has 18 pens", True).value), read_number("less than 5", True)
    ('18', None)
    """
    # fractions and exponents in LaTeX and Unicode as 1/4 and ^2; 1\frac{1}{4} is 1 1/4
    text = re.sub(r"\\frac\s?\{?(\d[\d.,]{0,40}?)\}?\s?\{?(\d[\d.,]{0,40})\}?", r" \1/\2", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)
    text = re.sub("[²³¹⁰⁴-⁹]{1,3}", r"^\g<0>", text)
    text = unicodedata.normalize("NFKC", text).translate(ONE_SPELLING).strip()
    match = re.fullmatch(NUMBER, text[:LONGEST])
    if not match or (match["sign"] and match["minus"]) or (match["before"] and not in_sentence):
        return None
    beside = f"{match['before']} {match['unit']}"
    if CHANGES & set(re.findall(r"[^\W\d_]+", beside.lower())):
        return None
    digits = [re.sub("[, ']", "", match[part] or "1") for part in ("over", "under")]
    # 12 decimals: what a float loses behind them (2.4000000000000004) is forgiven
    over, under = (round(Fraction(decimal), 12) for decimal in digits)
    if under == 0:
        return None
    sign = -1 if "-" in (match["sign"], match["minus"]) else 1
    scale = Fraction(10) ** int(match["power"] or 0) * MULTIPLIERS.get(match["times"], 1)
    value = sign * (int(match["whole"] or 0) + over / under) * scale
    unit = re.sub(r"(?<=\w{3})s\b", "", match["unit"].strip(" .,;()\n").lower())
    unit = CURRENCIES.get(match["money"] or unit, unit)
    return Number(value, unit, match["percent"] is not None)


def same_number(first: Number, second: Number) -> bool:
    """The same value, and no two units that differ. A percentage agrees with its number, and with
    the hundredth of it."""
    short, long = sorted((first.unit, second.unit), key=len)
    if short and not f"{long} ".startswith(f"{short} "):
        return False
    as_share = first.value / Fraction(100) ** (first.percent - second.percent)
    return second.value in (first.value, as_share)


# 3. Formulas --------------------------------------------------------------------------------------

SECONDS = 3  # for each of the library's steps: formulas can be made to take for ever


def is_formula(text: str) -> bool:
    """Whether math-verify is to read an answer: no words, and more than arithmetic on numbers.

    >>> [is_formula(text) for text in ("2x+1", "(0, 1]", "x^2", "3+4", "no", "the heart", "H2O")]
    [True, True, True, False, False, False, False]
    """
    letters = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", " ", text)
    # words as "the", "it is" and "B12"
    if re.search(r"[^\W\d_]{3}|(?<!\S)[^\W\d_]{2}(?!\S)|[^\W\d_]\d", letters):
        return False
    return bool(re.search(r"[\\^,!]|[^\W\d_]", text) and re.search(r"[^\sA-Za-z().:]", text))


@lru_cache(maxsize=10_000)
def same_formula(predicted: str, truth: str) -> bool:
    """Whether two formulas are the same: as math-verify simplifies them, or letter by letter.

    >>> same_formula("2(x+1)^2", "2x^2+4x+2"), same_formula("x+1", "x-1")
    (True, False)
    """
    if "".join(predicted.split()) == "".join(truth.split()):
        return True
    equations = [text for text in (predicted, truth) if "=" in text]
    if len(equations) == 1 and not re.match(r"[A-Za-z]\s*=", equations[0]):
        return False  # the library would take 2x+3=7 for 7, as it takes x=7
    if max(len(predicted), len(truth)) > SHORT:
        return False
    # It stops itself by a signal, which only the main thread of a POSIX system can have.
    can_stop = threading.current_thread() is threading.main_thread() and os.name == "posix"
    seconds = SECONDS if can_stop else None
    only_latex = [LatexExtractionConfig()]  # its other patterns would read a part of the text
    parsed = [
        parse(f"${text}$", only_latex, "no_fallback", parsing_timeout=seconds)
        for text in (truth, predicted)
    ]
    return verify(*parsed, timeout_seconds=seconds)


# 4. The answer check ------------------------------------------------------------------------------


OPTION_LETTER = r"^\s*\(?[A-Za-z][.)]\s+(?=\S)"  # before the option's words


def same_answer(predicted: str | None, truth: str, options: tuple[str, ...] = ()) -> bool:
    """Whether two answers agree: as options where the truth names one, as numbers, as formulas,
    else as text without case, punctuation and articles. An empty answer agrees with nothing.

    >>> same_answer("$18.00", "18"), same_answer("The heart.", "heart"), same_answer(None, "4")
    (True, True, False)
    >>> same_answer("(B)", "Aortic valve", ("Mitral valve", "Aortic valve"))
    True
    """
    verifier_is_asked("same_answer")
    if predicted is None:
        return False
    right = option_of(truth, options)
    if right is not None:
        return option_of(predicted, options) == right
    first = undress(predicted)
    second = undress(truth)
    if agree(first, second):
        return True
    return agree(re.sub(OPTION_LETTER, "", first), re.sub(OPTION_LETTER, "", second))


def agree(predicted: str, truth: str) -> bool:
    """Whether two undressed answers agree: as numbers, as formulas, or word by word."""
    number = read_number(truth)
    # a prediction may be a sentence with the number in it
    stated = read_number(predicted, in_sentence=number is not None)
    if number and stated:
        return same_number(stated, number)
    if is_formula(predicted) or is_formula(truth):
        return same_formula(predicted, truth)
    return not (number or stated) and plain_words(predicted) == plain_words(truth) != ""


def plain_words(text: str) -> str:
    """Lower case, no punctuation or articles, single spaces. Empty only if `text` is."""
    text = text.lower().translate(ONE_SPELLING)
    # signs that say something; hyphens, stars and colons only before a number: COVID-19 is a name
    words = re.findall(r"\w+|[+=<>^/|]|(?<![^\W\d_])[-*:](?=\s?[$€£]?\.?\d)", text)
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words or text.split())


# 5. Options ---------------------------------------------------------------------------------------


def option_of(answer: str, options: tuple[str, ...]) -> int | None:
    """Which option an answer names: by what it says, or by its letter, alone or before words. What
    it says comes first: with the options B12, C and D an answer "C" is the vitamin.

    >>> options = ("Mitral valve", "Aortic valve", "Heart", "Lung", "Liver")
    >>> texts = ("b", "B. the aorta", "aortic valve.", "(B) both", "Option B", "B Aortic valve")
    >>> [option_of(text, options) for text in texts]
    [1, 1, 1, 1, 1, 1]
    >>> [option_of(text, options) for text in ("F", "", "E. coli", "B, C", "A valve")]
    [None, None, None, None, None]
    """
    text = undress(answer)
    for index, option in enumerate(options):
        if agree(text, undress(option)):
            return index
    pattern = r"(?:(?i:option|choice|answer)\s+)?[(\[]?([A-Za-z])([)\]:.]?)\.?((?:\s.*)?)"
    match = re.fullmatch(pattern, text.replace("*", ""), re.DOTALL)
    index = ord(match[1].upper()) - ord("A") if match else len(options)
    if index >= len(options):
        return None
    # Behind a bare letter the words must be the option's, behind a full stop some of them, told by
    # the first four letters of long words (aorta, aortic): E. coli is not the fifth option.
    words = [plain_words(match[3]), plain_words(options[index])]
    first, second = (set(re.findall(r"\b\w{4}", text)) for text in words)
    is_named = words[0] in ("", words[1]) or (match[2] == "." and first & second)
    return index if is_named or match[2] in (")", "]", ":") else None


# 6. Votes -----------------------------------------------------------------------------------------


def group_answers(answers: list[str | None], options: tuple[str, ...] = ()) -> list[int]:
    """For each answer the index of the first one that says the same, -1 for none. There is no truth
    here: two agree if either agrees with the other as its truth. That is not transitive (5 agrees
    with 5 km and with 5 m), so each answer joins the shortest one that it agrees with.

    >>> group_answers(["1,200", "$1200.00", "1200 pens", None, "It is 1200", "12"])
    [0, 0, 0, -1, 0, 5]
    """
    head_of: dict[str, str] = {}
    spellings = sorted(answer for answer in set(answers) if answer and answer.strip())
    for answer in sorted(spellings, key=len):
        agreeing = (
            head
            for head in head_of.values()
            if same_answer(answer, head, options) or same_answer(head, answer, options)
        )
        head_of[answer] = next(agreeing, answer)
    heads = [head_of.get(answer) for answer in answers]
    return [-1 if head is None else heads.index(head) for head in heads]


# 7. A data set's answers --------------------------------------------------------------------------


def odd_answers(answers: list[str]) -> list[int]:
    """The places of true answers that are no numbers where four in five are.

    >>> odd_answers(["5", "7.5", "1/2", "eight", "1,000", "12"]), odd_answers(["5", "heart"])
    ([3], [])
    """
    odd = [place for place, one in enumerate(answers) if read_number(undress(one)) is None]
    return odd if len(odd) <= 0.2 * len(answers) else []
