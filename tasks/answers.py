"""Answers as text: how to find one in a response, what it says, and when two of them say the same.

An answer is read as a number, else as a list, else as a formula (tasks/formulas.py), else as words.
A true answer is read like any other. Own code rather than a library: math-verify 0.9 finds 27 of
the 44 pairs in tests/test_answers.py that a user met, this file 42. It takes `1 234` for 235, `-$5`
for nothing, `18 dollars` for a product of eight letters; it needs 2 to 360 ms for a pair, and a
signal to stop where a text makes it hang. On 26 pairs of formulas, where it is at home, it finds 25
and this file all. A test counts both.

Where this file is stricter than a person may be:

    two, 2           a word is no number: a response that counts in words was not asked to
    €1.000, 1000     one euro, as in a price of fuel (€1.459): 1.234,50 alone must be European
    12,34            12.34 or two numbers: neither is taken for it
    3+4, 7           a task and not its answer: whoever trains on this check must not be paid for
                     work left undone. A root, a power, a fraction is a value: sqrt(16) is 4
    5 km, 5 m        two units that differ (none agrees with any)
    0.33, 1/3        numbers agree exactly, or not at all; only a decimal of 15 digits or more,
                     which was a float, is rounded as one
"""

import re
from bisect import bisect_left
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from tasks import formulas
from tasks.common import verifier_is_asked

LONGEST = 1000  # characters of an answer that may be a number; no formula or list is that long
LONGEST_WORDS = 10_000  # characters that are compared as words
TAIL = 20_000  # characters at a response's end in which its answer is looked for

# 1. Numbers ---------------------------------------------------------------------------------------

# One character for all that mean the same: minus signs, slashes, spaces
ONE_SPELLING = str.maketrans("−–﹣－⁻⁄∕\u00a0\u2009\u202f\u2007’", "-----//    '")
DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)"  # 1,234
    r"|\d{1,3}(?: \d{3})+(?![\d/])"  # 1 234
    r"|\d{1,3}(?:'\d{3})+(?!\d)"  # 1'234
    r"|\d{1,100})"
)
DECIMAL = rf"(?:{DIGITS}(?:\.\d{{1,100}})?|\.\d{{1,100}})"
EUROPEAN = r"\d{1,3}(?:\.\d{3})+,\d{1,2}(?!\d)"  # 1.234,50
POWER_OF_TEN = (
    r"\s?(?:\\times|\\cdot|[×·*x])\s?10\s?(?:\^|\*\*)\s?\{?(?P<power>[-+]?\d{1,3})(?!\d)\}?"
)
QUOTIENT = rf"(?:(?P<whole>\d{{1,15}})\s)?(?P<over>-?{DECIMAL})\s?/\s?(?P<under>{DECIMAL})"
NUMBER = (
    r"(?P<sign>[-+]?)\s?(?P<money>[$€£¥]?)\s?(?P<minus>-?)"
    rf"(?:(?P<european>{EUROPEAN})|{QUOTIENT}|(?P<plain>{DECIMAL})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)|{POWER_OF_TEN})?)"
    r"(?P<rest>.*)"
)
MULTIPLIER = (
    r"\s?(?:(?P<word>hundred|thousand|million|billion|trillion|dozen)s?(?![^\W\d_])"
    r"|(?P<letter>[kKMB]|bn)(?!\w))"
)
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "k": 10**3,
    "K": 10**3,
    "thousand": 10**3,
    "M": 10**6,
    "million": 10**6,
    "B": 10**9,
    "bn": 10**9,
    "billion": 10**9,
    "trillion": 10**12,
}
PERCENT = r"\s?(?:%|per ?cent\b|percentage points?\b)"
VULGAR = {
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "⅕": "1/5",
    "⅖": "2/5",
    "⅗": "3/5",
    "⅘": "4/5",
    "⅙": "1/6",
    "⅚": "5/6",
    "⅛": "1/8",
    "⅜": "3/8",
    "⅝": "5/8",
    "⅞": "7/8",
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
UNITS_OF_ONE_LETTER = set("mgshlLVWNJCFa")  # other letters alone are variables: 2x is not 2
CURRENCIES = {
    "$": "dollar",
    "usd": "dollar",
    "€": "euro",
    "eur": "euro",
    "£": "pound",
    "gbp": "pound",
    "¥": "yen",
}
# Beside a number these change it
NUMERIC_WORDS = set(
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty "
    "hundred thousand million billion trillion dozen half halves third thirds quarter quarters "
    "twice double triple squared cubed plus minus times not no never less fewer more greater least "
    "most under below above over between than or and to from until".split()
)
HARMLESS = {
    "more",
    "over",
    "less",
    "fewer",
    "from",
    "to",
    "and",
}  # .. but not behind it: 18 more apples


class Number(NamedTuple):
    """A number with what stands beside it."""

    value: Fraction
    unit: str = ""  # in the singular, currencies by name
    percent: bool = False
    was_float: bool = False  # 15 digits and more behind the point


def read_number(text: str) -> Number | None:
    """The number that an undressed text states, with a unit or without; None if anything numeric or
    operational is left.

    >>> texts = ("1,234.50", "- 3/4", "1.5e3", "3 1/2 cups", "5k", "$.50", "1.5 million")
    >>> [str(read_number(text).value) for text in texts]
    ['2469/2', '-3/4', '1500', '7/2', '5000', '1/2', '1500000']
    >>> [read_number(t) for t in ("12:30", "3+4", "5-10", "2x", "1/0", "12,34", "B12")]
    [None, None, None, None, None, None, None]
    """
    match = re.fullmatch(NUMBER, fractions_as_quotients(text).strip())
    if not match:
        return None
    part = match.groupdict()
    value = value_of(part)
    if value is None or (part["sign"] and part["minus"]):
        return None
    rest = part["rest"]
    multiplier = re.match(MULTIPLIER, rest)
    if multiplier and (multiplier["word"] or multiplier["letter"] == "k" or part["money"]):
        value *= MULTIPLIERS[multiplier["word"] or multiplier["letter"]]
        rest = rest[multiplier.end() :]
    percent = re.match(PERCENT, rest)
    if percent:
        rest = rest[percent.end() :]
    unit = read_unit(rest)
    if unit is None:
        return None
    negative = part["sign"] == "-" or part["minus"] == "-"
    was_float = len((part["plain"] or "").partition(".")[2]) >= 15
    return Number(
        -value if negative else value,
        CURRENCIES.get(part["money"]) or unit,
        bool(percent),
        was_float,
    )


def fractions_as_quotients(text: str) -> str:
    """Fractions in LaTeX and in Unicode as `a/b`, a space before them: 1\\frac{1}{4} and 1¼ as `1
    1/4`."""
    if "\\frac" in text:
        text = re.sub(
            r"\\frac\s?\{\s?(-?[\d.,]{1,40})\s?\}\s?\{\s?([\d.,]{1,40})\s?\}", r" \1/\2", text
        )
        text = re.sub(r"\\frac\s?(\d)\s?(\d)", r" \1/\2", text)
    if not text.isascii():
        for sign, quotient in VULGAR.items():
            text = text.replace(sign, f" {quotient}")
        raised = re.search(r"(?<=10)[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3}", text)
        if raised:
            exponent = raised[0].translate(SUPERSCRIPTS)
            text = f"{text[: raised.start()]}^{exponent}{text[raised.end() :]}"
    return text


def value_of(part: dict) -> Fraction | None:
    """The value of a match of NUMBER, without its sign."""
    if part["european"]:
        return Fraction(part["european"].replace(".", "").replace(",", "."))
    if part["over"]:
        below = as_fraction(part["under"])
        if below == 0:
            return None
        value = as_fraction(part["over"]) / below
        return value + int(part["whole"]) if part["whole"] else value
    return as_fraction(part["plain"]) * Fraction(10) ** int(part["exponent"] or part["power"] or 0)


def as_fraction(digits: str) -> Fraction:
    """A decimal without the marks between its groups."""
    for mark in ", '":
        digits = digits.replace(mark, "")
    return Fraction(digits)


def read_unit(text: str) -> str | None:
    """What stands behind a number, if it is a unit or other words that leave the number alone; None
    if it is not.

    >>> [read_unit(text) for text in (" dollars.", "km/h", " m^2", "x", " + 1", ":30")]
    ['dollar', 'km/h', 'm²', None, None, None]
    """
    text = text.strip()
    if not text:
        return ""
    text = re.sub(r"(?<=[^\W\d_])\s?\^\{?2\}?", "²", text)
    text = re.sub(r"(?<=[^\W\d_])\s?\^\{?3\}?", "³", text)
    text = re.sub(r"\^\s?\{?\s?(?:\\circ|°)\s?\}?|\\circ|\\degree", "°", text)
    if not re.fullmatch(r"(?:[^\W\d_]|[ ,.;()'\"/·°²³µ\n-])*", text) or re.match(
        r"[/·(-]\s*\w\b|\.\s*\w", text
    ):
        return None
    words = re.findall(r"[^\W\d_]+", text)
    for word in words:
        if word.lower() in NUMERIC_WORDS - HARMLESS or (
            len(word) == 1 and word not in UNITS_OF_ONE_LETTER
        ):
            return None
    if re.search(r"(?i)\bor (?:more|less|fewer)\b|\bto\b", text):
        return None
    singular = [
        word[:-1] if len(word) > 3 and word.endswith("s") else word
        for word in text.strip(" .,;()").split()
    ]
    return " ".join(CURRENCIES.get(word.lower(), word) for word in singular)


def number_in_words(text: str) -> Number | None:
    """The one number of a sentence: `She has 18 apples`. None if a word before it changes it
    (`not`, `less than`), or if there is more than one.

    >>> number_in_words("She has 18 apples").value
    Fraction(18, 1)
    >>> number_in_words("less than 5"), number_in_words("3 boys, 2 girls")
    (None, None)
    """
    match = re.search(r"(?:[-+]\s?)?(?:[$€£¥]\s?)?(?:\.?\d|\\frac|[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", text)
    if not match:
        return None
    before = text[: match.start()]
    if before and not re.fullmatch(r"(?:(?:[^\W\d_]|[ ,.:;()'\"\n])*[ :(\"'\n])?", before):
        return None
    if {word.lower() for word in re.findall(r"[^\W\d_]+", before)} & NUMERIC_WORDS:
        return None
    return read_number(text[match.start() :])


def same_number(first: Number, second: Number) -> bool:
    """The same value, and no two units that differ. A percentage agrees with its number, and with
    the hundredth of it."""
    one, other = first.unit.lower(), second.unit.lower()
    if (
        one
        and other
        and not (f"{one} ".startswith(f"{other} ") or f"{other} ".startswith(f"{one} "))
    ):
        return False
    if same_value(first, second, Fraction(1)):
        return True
    if first.percent == second.percent:
        return False
    return same_value(first, second, Fraction(1, 100) if first.percent else Fraction(100))


def same_value(first: Number, second: Number, factor: Fraction) -> bool:
    one = first.value * factor
    if first.was_float or second.was_float:  # as 2.4000000000000004 is 2.4
        return abs(one - second.value) <= abs(second.value) / 10**12
    return one == second.value


# 2. Reading an answer -----------------------------------------------------------------------------

DRESS = r"\\(?:text[a-z]{0,4}|math(?:rm|bf|it|sf)|mbox|operatorname|boxed|fbox)\s?\{([^{}]*)\}"
LATEX_MARKS = {
    "\\\\": "↵",  # a matrix's next row; first, so that its second stroke begins nothing else
    "\\$": "$",
    "\\%": "%",
    "\\left": "",
    "\\right": "",
    "{,}": ",",
    "\\,": " ",
    "\\;": " ",
    "\\:": " ",
    "\\!": "",
    "\\ ": " ",
    "~": " ",
    "\\(": "",
    "\\)": "",
    "\\[": "",
    "\\]": "",
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\displaystyle": "",
    "\\approx": "",
    "\\lbrace": "\\{",
    "\\rbrace": "\\}",
}
EQUALS = r"(?<![<>!=≤≥])=(?![=>])"
NAME = r"[A-Za-z]?[A-Za-z ]*(?:_\{?\w{1,9}\}?)?(?:\([a-z, ]{0,9}\))?"
ARITHMETIC = r"[\d\s.,()+*/×÷·$€£¥%:^-]*"


class Answer(NamedTuple):
    """What an answer says: one of number, items, formula; its words in any case."""

    words: str
    number: Number | None = None
    items: tuple["Answer", ...] = ()
    brackets: str = ""  # around the items; none for a set, whose order says nothing
    formula: tuple | None = None  # its values at the points of tasks/formulas.py
    name: str = ""  # x, in x = 5
    latex: str = ""  # without its spaces, for what is LaTeX and yet none of these


def read(text: str) -> Answer:
    """What an answer says. Read once, and kept.

    >>> read("$x = \\\\frac{1}{2}$").number.value
    Fraction(1, 2)
    >>> read("(1, x^2)").brackets, read("The heart.").words
    ('()', 'heart')
    """
    return read_short(text) if len(text) <= LONGEST else Answer(normalise_text(text))


@lru_cache(maxsize=10_000)
def read_short(text: str) -> Answer:
    marked = extract_marked(text)
    plain = undress(marked or text)
    words = normalise_text(plain if marked or "\\" in text else text)
    stated, name = last_side(plain)
    number = read_number(stated)
    if number is not None:
        return Answer(words, number, name=name)
    if len(stated) > formulas.LONGEST:
        return Answer(words)
    brackets, items = split_items(stated)
    if items:
        read_items = tuple(read_short(item) for item in items)
        if any(item.number or item.formula for item in read_items):
            return Answer(words, items=read_items, brackets=brackets)
    formula = formulas.evaluate(stated)
    if formula is not None and (len(stated) > 1 or name):
        return Answer(words, formula=tuple(formula), name=name)
    return Answer(words, latex=re.sub(r"\s", "", plain) if "\\" in plain else "")


def undress(text: str) -> str:
    """An answer without what only dresses it: dollar signs and commands of LaTeX, asterisks,
    quotes, a full stop.

    >>> undress("**$7{,}250$**."), undress(r"\\text{(B)}"), undress("=> 18"), undress("−5")
    ('7,250', '(B)', '18', '-5')
    """
    text = text.translate(ONE_SPELLING).strip()
    if "\\" in text or "{" in text or "~" in text:
        for mark, plain in LATEX_MARKS.items():
            text = text.replace(mark, plain)
        for _ in range(3):  # one in another
            text = re.sub(DRESS, r" \1 ", text)
    text = text.strip("*`\"“”' \t\r\n").rstrip(".,; *")
    text = re.sub(r"^(?:=>|->|[=:→⇒≈])\s*", "", text)
    if text.count("$") == 2 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip()
    elif text.startswith("$$") and text.endswith("$$"):
        text = text[2:-2].strip()
    return text.strip()


def last_side(text: str) -> tuple[str, str]:
    """(the last side of an equation that states a result, the name of what it states). `6*7=42`
    states 42, `x=5` states 5; `2x+3=7` is an equation and states itself.

    >>> last_side("6*7=42"), last_side("x = 5"), last_side("2x+3=7"), last_side("12 * 2 = 24 pens")
    (('42', ''), ('5', 'x'), ('2x+3=7', ''), ('24 pens', ''))
    """
    if "=" not in text:
        return text, ""
    *before, last = re.split(EQUALS, text)
    name = ""
    for part in before:
        part = part.strip()
        if re.fullmatch(NAME, part):
            name = part if len(part) <= 2 or "_" in part else ""
        elif not re.fullmatch(ARITHMETIC, re.sub(r"[^\W\d_]{3,}", "", part)):
            return text, ""
    return last.strip(), name


def split_items(text: str) -> tuple[str, list[str]]:
    """(brackets, items) of a list: `(1, 2)`, `[0, 1)`, `\\\\{1, 2\\\\}`, `1, 2`; ("", []) for
    anything else."""
    if "," not in text:
        return "", []
    inside = text.removeprefix("\\")
    brackets = ""
    if inside[0] in "([{" and inside[-1] in ")]}":
        brackets = inside[0] + inside[-1]
        inside = inside[1:-1].rstrip("\\")
    items, start, depth = [], 0, 0
    for at, char in enumerate(inside + ","):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append(inside[start:at].strip())
            start = at + 1
        if depth < 0:
            return "", []
    brackets = "" if brackets == "{}" else brackets
    return (brackets, items) if depth == 0 and len(items) > 1 and all(items) else ("", [])


# 3. Comparing -------------------------------------------------------------------------------------


def same_answer(predicted: str | None, truth: str, options: tuple[str, ...] = ()) -> bool:
    """Whether two answers agree: as options where both name one; as numbers, lists or formulas
    where both are some; else as text without case, punctuation, articles. An empty answer agrees
    with nothing.

    >>> same_answer("$18.00", "18"), same_answer("The heart.", "heart"), same_answer(None, "4")
    (True, True, False)
    >>> same_answer("(B)", "Aortic valve", ("Mitral valve", "Aortic valve"))
    True
    """
    verifier_is_asked("same_answer")
    if predicted is None:
        return False
    if options:
        chosen = option_of(predicted, options)
        right = option_of(truth, options)
        if right is not None:
            return chosen == right
        if chosen is not None:
            predicted = options[chosen]
    if predicted.strip() == truth.strip():
        return bool(truth.strip())
    first = read(predicted)
    second = read(truth)
    if (
        second.number
        and not (first.number or first.items or first.formula)
        and len(predicted) <= LONGEST
    ):
        number = number_in_words(undress(extract_marked(predicted) or predicted))
        return number is not None and same_number(number, second.number)
    return agree(first, second)


def agree(first: Answer, second: Answer) -> bool:
    """Whether two answers that were read say the same."""
    if first.name and second.name and first.name != second.name:
        return False
    if first.number and second.number:
        if same_number(first.number, second.number):
            return True
        return first.words == second.words != "" and first.number.value == second.number.value
    if first.items and second.items:
        return same_items(first, second)
    if first.items or second.items:
        return False
    one = first.formula or (
        first.number and second.formula and [first.number.value] * formulas.POINTS
    )
    other = second.formula or (
        second.number and first.formula and [second.number.value] * formulas.POINTS
    )
    if one and other:
        return formulas.same_values(one, other)
    if one or other or first.number or second.number:
        return False
    if first.latex or second.latex:
        return first.latex == second.latex or (
            not (first.latex and second.latex) and first.words == second.words != ""
        )
    return first.words == second.words != ""


def same_items(first: Answer, second: Answer) -> bool:
    """Whether two lists agree: brackets and order included, unless both are sets."""
    if first.brackets != second.brackets or len(first.items) != len(second.items):
        return False
    left = list(second.items)
    for item in first.items:
        candidates = left[:1] if first.brackets else left
        match = next((other for other in candidates if agree(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def group_answers(answers: list[str | None], options: tuple[str, ...] = ()) -> list[int]:
    """For each answer the index of the first one that says the same, -1 for none. There is no truth
    here: two agree if either agrees with the other as its truth. That is not transitive (5 agrees
    with 5 km and with 5 m, 50% with 50 and with 0.5), so each answer joins the first group whose
    head it agrees with; heads are the plainest spellings, the most frequent first.

    >>> group_answers(["1,200", "$1200.00", "1200 pens", None, "It is 1200", "12"])
    [0, 0, 0, -1, 0, 5]
    """
    places: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if answer and normalise_text(answer):
            places.setdefault(answer, index)
    counts = Counter(answer for answer in answers if answer)

    def plainness(answer: str) -> tuple:
        number = read(answer).number
        if number is None:
            return True, True, True, -counts[answer], answer
        return False, number.percent, bool(number.unit), -counts[answer], answer

    head_of: dict[str, str] = {}
    heads: list[str] = []  # of the groups that name no option
    head_of_option: dict[int, str] = {}
    for answer in sorted(places, key=plainness):
        option = option_of(answer, options)
        if option is not None:
            head_of[answer] = head_of_option.setdefault(option, answer)
            continue
        same = (head for head in heads if same_answer(answer, head) or same_answer(head, answer))
        head_of[answer] = next(same, answer)
        if head_of[answer] == answer:
            heads.append(answer)
    first: dict[str, int] = {}  # the place of the first answer of each group
    for answer, head in head_of.items():
        first[head] = min(places[answer], first.get(head, places[answer]))
    return [first[head_of[answer]] if answer in head_of else -1 for answer in answers]


# 4. Options ---------------------------------------------------------------------------------------

LETTER = (
    r"(?:(?i:option|choice|answer)\s+)?[(\[]?(?P<letter>[A-Za-z])(?P<closed>[)\]:])?(?P<dot>\.)?"
    r"(?P<rest>(?:\s.*)?)"
)


def option_of(answer: str, options: tuple[str, ...]) -> int | None:
    """Which option an answer names: by its text, its number, or its letter. Text comes first: with
    the options B12, C and D an answer "C" is the vitamin, not the third.

    >>> options = ("Mitral valve", "Aortic valve")
    >>> [option_of(answer, options) for answer in ("b", "B. the aorta", "aortic valve.", "C", "")]
    [1, 1, 1, None, None]
    """
    if not options:
        return None
    marked = extract_marked(answer[:LONGEST])
    answer = undress(marked or answer[:LONGEST_WORDS])
    # First with what may be an option's letter: S. pneumoniae is not K. pneumoniae.
    for form in (plain_words, normalise_text):
        forms = [form(option) for option in options]
        if form(answer) and form(answer) in forms:
            return forms.index(form(answer))
    stated = read(answer).number
    if stated is None and len(answer) <= LONGEST:
        stated = number_in_words(answer)
    if stated is not None:
        numbers = [read(option).number for option in options]
        for index, number in enumerate(numbers):
            if number is not None and same_number(stated, number):
                return index
    return option_by_letter(answer, options)


def option_by_letter(answer: str, options: tuple[str, ...]) -> int | None:
    """Which option an answer names by its letter, alone or before words. Behind a bare letter, or
    one with a full stop, the words must be of the option: E. coli is not the fifth.

    >>> options = ("Mitral valve", "Aortic valve", "Heart", "Lung", "Liver")
    >>> texts = ("(B) what ever", "Option B", "B Aortic valve", "E. coli", "B, C", "A valve")
    >>> [option_by_letter(text, options) for text in texts]
    [1, 1, 1, None, None, None]
    """
    match = re.fullmatch(LETTER, answer.replace("*", "").strip(), re.DOTALL)
    if not match:
        return None
    index = ord(match["letter"].upper()) - ord("A")
    if index >= len(options):
        return None
    rest = plain_words(match["rest"])
    option = plain_words(options[index])
    if not rest or match["closed"]:
        return index
    if match["dot"]:
        return index if stems(rest) & stems(option) or rest.split()[0] in option.split() else None
    return index if rest == option else None


def stems(words: str) -> set[str]:
    """The first four letters of each word that has them: aorta and aortic share theirs."""
    return {word[:4] for word in words.split() if len(word) >= 4}


# 5. Words ---------------------------------------------------------------------------------------

# What changes the number after it: a comparator (no arrow), a sign (no hyphen, as in '3 - 5')
COMPARATOR = r"(?<![-=])[<>≤≥]=?(?=\s*[-+−]?[$€£]?\.?\d)"
SIGN = r"(?<!\w)[-+−](?=[$€£]?\.?\d)|(?<!\w)(?<!\w\s)[-+−](?=\s[$€£]?\.?\d)"
OPERATOR = r"(?<=\d)[-+−*/:^=×÷](?=\s?\d)|(?<=\d\s)[-+−*/:^=×÷](?=\s?\d)"
ONE_SYMBOL = str.maketrans({"−": "-", "≤": "<=", "≥": ">=", "×": "*", "÷": "/"})


def normalise_text(text: str) -> str:
    """Lower case, no option letter, punctuation or articles, single spaces. Empty only if `text`
    is.

    >>> [normalise_text(t) for t in ("B. The left  ventricle!", "A", "≤ 5 mg", "−5 dB", "12:30")]
    ['left ventricle', 'a', '<= 5 mg', '- 5 db', '12 : 30']
    """
    return plain_words(re.sub(r"^\s*\(?[A-Za-z][.)]\s+(?=\S)", "", text[:LONGEST_WORDS]))


def plain_words(text: str) -> str:
    """`normalise_text` without a look at option letters."""
    text = text[:LONGEST_WORDS].lower()
    words = re.findall(rf"{COMPARATOR}|{SIGN}|{OPERATOR}|\w+", text)
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words or text.split()).translate(ONE_SYMBOL)


# 6. Finding the answer in a response --------------------------------------------------------------

MARKER = (
    r"(?i)(?P<tag><answer>)|(?P<box>\\(?:boxed|fbox)\s?\{)|(?P<hashes>#{4,})"
    r"|(?P<prose>\b(?:answer|correct option|correct choice)(?: is:?|:)[ \t]*)"
)
TAG_END = r"(?i)</?answer|</?think"
SENTENCE_END = r"\n|(?<!\b[A-Z])[.!?](?=\s|$)|\.(?=\s+[A-Z])|</?(?:answer|think)>"
LONGEST_SENTENCE = 200
ANOTHER_QUESTION = (
    r"(?i)\n\s?(?:#{1,4} |\*\*)?(?:question|problem|exercise|q|user|human)(?: ?\d{1,3})?:"
    r"|<\|im_start\|>user"
)
INLINE_MATH = r"\$[^$\n]{1,200}\$|\\\((?:[^\\\n]|\\[^()\n])*\\\)"
# A number in running text with all that belongs to it: a ratio, a fraction, a power of ten, ..
NUMBER_IN_TEXT = (
    r"(?<![\w.^_{√\\])(?:(?<![)\]}])[-+−])?[$€£¥]?"
    r"(?:\\[dtc]?frac\{[^{}\n]{1,40}\}\{[^{}\n]{1,40}\}|[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
    r"|(?:\d|\.\d)(?:\d|[.,:/']\d|\{,\}\d|[eE][-+]?\d| \d{1,9}/\d|[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])*)"
    r"(?![\d^]|[.,:/']\d| ?\^| ?\\(?:sqrt|pi))"
    r"(?: ?(?:\\times|×|\*|x) ?10\^\{?-?\d{1,3}\}?"
    r"| (?:hundred|thousand|million|billion|trillion|dozen)\b| ?\\?%|k\b)?"
)


def extract_answer(response: str) -> str | None:
    """The answer a response gives: what the last marker holds among <answer>, \\boxed{}, `####` and
    `the answer is`, up to where the text runs on into another question. Headings and empty markers
    hold nothing. Without a marker, the last number: that favours a base model which was never told
    about our tags. None if nothing fits.

    >>> extract_answer("<think>2+3=5</think><answer> 5 </answer>")
    '5'
    >>> extract_answer("so it is $1,200."), extract_answer("hm")
    ('$1,200', None)
    >>> extract_answer("#### Final Answer\\nThe answer is \\\\boxed{18}.")
    '18'
    >>> extract_answer("#### 12\\n\\nQuestion: Ben?\\n#### 7")
    '12'
    """
    tail = response[-TAIL:]  # no answer starts earlier, and no regular expression sees a novel
    marked = extract_marked(tail)
    if marked is not None:
        return marked
    another = re.search(ANOTHER_QUESTION, tail)
    stated = last_number(tail[: another.start()]) if another else None
    return stated or last_statement(tail) or last_number(tail)


def extract_marked(text: str) -> str | None:
    """What the last marker of a text holds, None if there is none. An empty tag holds the empty
    answer, if nothing else is there."""
    places = list(re.finditer(MARKER, text))
    if not places:
        return None
    ends = [match.start() for match in re.finditer(TAG_END, text)] if "<" in text else []
    braces = matching_braces(text) if any(match["box"] for match in places) else {}
    answer = "" if any(match["tag"] for match in places) else None
    limit = None  # where another question begins
    for match in places:
        if limit is not None and match.start() > limit:
            break
        content = content_of(match, text, ends, braces)
        if content is not None:
            answer = content
            if limit is None:
                another = re.compile(ANOTHER_QUESTION).search(text, match.end())
                limit = another.start() if another else len(text)
    return answer


def content_of(match: re.Match, text: str, ends: list[int], braces: dict[int, int]) -> str | None:
    """What one marker holds: in a tag or a box anything, elsewhere a number, an option's letter or
    a formula."""
    start = match.end()
    if match["tag"]:
        place = bisect_left(ends, start)
        content = text[start : ends[place] if place < len(ends) else len(text)].strip()
        return content if any(map(str.isalnum, content)) else None
    if match["box"]:
        end = braces.get(start - 1)
        if end is None:  # cut off
            end = text.find("\n", start, start + LONGEST)
        content = text[start : end if end >= 0 else start + LONGEST].strip()
        return content if any(map(str.isalnum, content)) else None
    sentence = text[start : start + LONGEST_SENTENCE]
    end = sentence.find("\n") if match["hashes"] else None
    if end is None:
        stop = re.search(SENTENCE_END, sentence)
        end = stop.start() if stop else -1
    content = (sentence if end < 0 else sentence[:end]).strip().strip("*`_ ").strip()
    return content if states_result(content) else None


def matching_braces(text: str) -> dict[int, int]:
    """The place of each opening brace -> that of its closing one."""
    pairs, opened = {}, []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            pairs[opened.pop()] = match.start()
    return pairs


def states_result(text: str) -> bool:
    """Whether a text is a number, an option's letter, a formula or a list of them, and nothing
    else."""
    plain = undress(text)
    if not plain:
        return False
    if re.match(r"[(\[]?[A-Z][)\].:]?(?:\s|$)", plain):
        return True
    stated, name = last_side(plain)
    if read_number(stated) is not None or formulas.evaluate(stated) is not None:
        return True
    return any(read_number(item) or formulas.evaluate(item) for item in split_items(stated)[1])


def last_number(text: str) -> str | None:
    """The last number of a running text, as it is written; or the last formula between dollars, if
    no number follows it."""
    numbers = list(re.finditer(NUMBER_IN_TEXT, text))
    last = numbers[-1] if numbers else None
    formula = None
    if "\\" in text or "^" in text:
        for match in re.finditer(INLINE_MATH, text):
            if re.search(r"[\\^]", match[0].strip("\\()")) and states_result(match[0]):
                formula = match
    if formula and (last is None or last.start() < formula.end()):
        return formula[0]
    return last[0] if last else None


def last_statement(text: str) -> str | None:
    """The words with which a text ends in `the answer is ..`, where no number is in them."""
    markers = list(re.finditer(MARKER, text))
    if not markers or not markers[-1]["prose"]:
        return None
    words = text[markers[-1].end() :].strip().strip("*.!_ ")
    return (
        words
        if words and len(words) <= LONGEST_SENTENCE and not re.search(r"[\d\n]", words)
        else None
    )


# 7. A data set's answers --------------------------------------------------------------------------

MOST = 0.8  # of the answers of one kind make the others odd


def kind_of(answer: str) -> str:
    """How an answer is read: number, list, formula, letter, words, or nothing."""
    stated = read(answer)
    if stated.number:
        return "number"
    if re.fullmatch(
        r"\W*[A-Za-z]\W*", undress(extract_marked(answer[:LONGEST]) or answer[:LONGEST])
    ):
        return "letter"
    if stated.items or stated.formula:
        return "list" if stated.items else "formula"
    return "words" if stated.words else "nothing"


def odd_answers(answers: list[str]) -> list[int]:
    """The places of true answers that are not read as their neighbours are: where four in five are
    numbers, those that are none; where four in five are letters, likewise. Words may be of any
    kind: with them nothing is odd but what is empty.

    >>> odd_answers(["5", "7.5", "1/2", "eight", "1,000", "12"])
    [3]
    >>> odd_answers(["B", "C", "A"]), odd_answers(["5", "heart"])
    ([], [])
    """
    kinds = [kind_of(answer) for answer in answers]
    for kind in ("number", "letter"):
        if kinds.count(kind) >= MOST * len(kinds):
            return [place for place, other in enumerate(kinds) if other != kind]
    return [place for place, kind in enumerate(kinds) if kind == "nothing"]
