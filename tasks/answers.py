"""Answers as text: how to find one in a response, and when two of them are the same."""

import re
from fractions import Fraction

from tasks.common import verifier_is_asked

NUMBER = r"[-+−]?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,30})(?:\.\d{1,30})?(?:\s?/\s?\d{1,30})?"
ONLY_NUMBER = rf"\s*{NUMBER}\s*(?:[%.]\s*)?"  # a text that states a number and nothing else
# What changes the number after it: a comparator (no arrow), a sign (no hyphen, as in '3-5' or '3 - 5').
COMPARATOR = r"(?<![-=])[<>≤≥]=?(?=\s*[-+−]?[$€£]?\.?\d)"
SIGN = r"(?<!\w)[-+−](?=[$€£]?\.?\d)|(?<!\w)(?<!\w\s)[-+−](?=\s[$€£]?\.?\d)"
ONE_SPELLING = str.maketrans({"−": "-", "≤": "<=", "≥": ">="})


def extract_answer(response: str) -> str | None:
    """The answer a response gives: the last <answer>...</answer>; without one, what follows '####', is \\boxed{}, or
    is the last number. The fallbacks favour a base model that was never told about our tags; None if nothing fits.

    >>> extract_answer("<think>2+3=5</think><answer> 5 </answer>"), extract_answer("so it is $1,200."), extract_answer("hm")
    ('5', '$1,200', None)
    """
    tail = response[-20_000:]  # no answer starts earlier, and no regular expression sees a novel
    start = tail.rfind("<answer>")
    if start >= 0:
        return tail[start + len("<answer>") :].split("</answer>")[0].strip()
    for marker, end in (("####", "\n"), ("\\boxed{", "}")):
        if marker in tail:
            return tail.rsplit(marker, 1)[1].split(end)[0].strip()
    numbers = re.findall(NUMBER, tail)
    return numbers[-1] if numbers else None


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` states: sign, commas, decimals, fraction, currency, unit, trailing dot. A bound states none.

    >>> [str(parse_number(t)) for t in ("-1,234.50", "$3/4.", "12 apples", "two", "= 7 %", "< 5")]
    ['-2469/2', '3/4', '12', 'None', '7', 'None']
    """
    found = re.findall(NUMBER, text[:1000])
    if len(found) != 1 or re.search(COMPARATOR, text[:1000]):
        return None
    top, _, bottom = re.sub(r"[$€£,\s]", "", found[0]).replace("−", "-").partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except ZeroDivisionError:
        return None


def same_answer(predicted: str | None, truth: str, options: tuple[str, ...] = ()) -> bool:
    """Whether two answers agree: as options where both name one, as numbers when the truth is one, else as text without
    case, punctuation, articles. An empty answer agrees with nothing.

    >>> same_answer("$18.00", "18"), same_answer("The left ventricle.", "left ventricle"), same_answer(None, "4")
    (True, True, False)
    >>> same_answer("(B)", "Aortic valve", ("Mitral valve", "Aortic valve"))
    True
    """
    verifier_is_asked("same_answer")
    if predicted is None:
        return False
    chosen, right = option_of(predicted, options), option_of(truth, options)
    if right is not None:
        return chosen == right
    if chosen is not None:
        predicted = options[chosen]
    if re.fullmatch(ONLY_NUMBER, truth[:1000]):
        value = parse_number(truth)
        return value is not None and parse_number(predicted) == value
    return normalise_text(predicted) == normalise_text(truth) != ""


def option_of(answer: str, options: tuple[str, ...]) -> int | None:
    """Which option an answer names: by its text, its number, or its letter. Text comes first: with the options B12, C and D
    an answer "C" is the vitamin, not the third.

    >>> [option_of(answer, ("Mitral valve", "Aortic valve")) for answer in ("b", "B. the aorta", "aortic valve.", "C", "")]
    [1, 1, 1, None, None]
    """
    # First with what may be an option's letter: S. pneumoniae is not K. pneumoniae.
    for form in (plain_words, normalise_text):
        forms = [form(option) for option in options]
        if form(answer) and form(answer) in forms:
            return forms.index(form(answer))
    numbers = [parse_number(option) if re.fullmatch(ONLY_NUMBER, option[:1000]) else None for option in options]
    if any(number is not None for number in numbers) and parse_number(answer) in numbers:
        return numbers.index(parse_number(answer))
    letter = re.match(r"\s*\(?([A-Za-z])(?:[.):]|\s*$)", answer)
    index = ord(letter[1].upper()) - ord("A") if letter else len(options)
    return index if index < len(options) else None


def normalise_text(text: str) -> str:
    """Lower case, no option letter, punctuation or articles, single spaces. Empty only if `text` is.

    >>> [normalise_text(t) for t in ("B. The left  ventricle!", "A", "≤ 5 mg", "−5 dB")]
    ['left ventricle', 'a', '<= 5 mg', '- 5 db']
    """
    return plain_words(re.sub(r"^\s*\(?[A-Za-z][.)]\s+(?=\S)", "", text[:10_000]))


def plain_words(text: str) -> str:
    """`normalise_text` without a look at option letters."""
    words = re.findall(rf"{COMPARATOR}|{SIGN}|\w+", text := text[:10_000].lower())
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words or text.split()).translate(ONE_SPELLING)
