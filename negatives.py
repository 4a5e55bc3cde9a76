"""Negatives that cost no sampling: an expert's own trace with something wrong in it.

The discriminator of Algorithm 1 (arXiv 2510.01857) learns from experts and negatives. Most
negatives are samples of the policy; the paper adds perturbed experts. Nobody has to say which trace
is right: an expert's trace in which something was changed is wrong.

    expert             broken             carried
    3*12=36            3*12=36            3*14=42        the error
    24+36=60           24-36=60           24+42=66
    60-9=51  -> 51     60-9=51  -> 51     66-9=57  -> 57

broken: one thing changes, everything else stays. carried: one calculation changes, its result is
computed anew, and all that used it follows, to the answer. length: a number is a digit too short
or too long, 5 for 51.

    what                          where                 test, in tests/test_negatives.py
    one thing broken              perturb               perturbations_change_something_and_are_wrong
    a copy that is still right    meaning               a_copy_that_is_still_right_is_none
    a digit too few or too many   change_length         a_number_is_a_digit_shorter_or_longer
    an error that is carried on   carry_error           every_equation_of_a_carried_copy_is_true
    what is an old result         carry_on              later_uses_are_replaced_and_nothing_else
    the first changed token       perturbed_negatives   perturbed_negatives_count_from_the_first_..

Run `python negatives.py` to see one example of each kind. Numbers and equations are read in
tasks/arithmetic.py.
"""

import random
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import data
from data import Example
from tasks.answers import option_of
from tasks.arithmetic import (
    EQUATION,
    EXPRESSION,
    NUMBER,
    OPERATOR,
    evaluate,
    read_number,
    value_of_sides,
    write_number,
)
from tasks.common import first_difference

# Nothing here knows what mistakes a policy makes. In particular '*' never becomes '+', which is how
# the pupil of `words` goes wrong: the reward has to find that out from samples.
INVERSE = {
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
    # other spellings
    "×": "÷",
    "÷": "×",
    "x": "/",
    "X": "/",
    "−": "+",
    "–": "+",
}

# How often one kind of change is tried before the next kind's turn comes.
ATTEMPTS = 20


# 1. One thing broken ------------------------------------------------------------------------------
# Copies are written in the expert's own style, so that style tells the discriminator nothing. One
# thing is enough to see that a broken copy is wrong, and all that follows contradicts it.


def perturb(example: Example, rng: random.Random, kind: str = "broken") -> Example | None:
    """A copy of the example with something wrong in it, not yet tokenised; None if it offers
    nothing to change.

    kind: "broken" (one of BROKEN at random), "carried" (broken where nothing can be carried on),
    "length" (the answer or the trace is drawn; broken where that has no whole number), "both"
    (broken or carried, with equal chance), "all" (any of the three), or one of BROKEN alone.

    >>> expert = Example("?", "3*12=36", "36")
    >>> perturb(expert, random.Random(0), "operator").trace
    '3/12=36'
    """
    if kind in MIXED:
        kind = rng.choice(MIXED[kind])
    # The kinds to try, in this order: a trace without an operator still has numbers.
    shuffled = rng.sample(list(BROKEN), len(BROKEN))
    kinds = [kind]
    if kind == "broken":
        kinds = shuffled
    elif kind not in BROKEN:
        kinds += shuffled
    for one in kinds:
        # Nearly always the first attempt will do. Some put 7/1 in the place of 7*1, or swap the
        # numbers of 3+4=7: what they say is as right as before, so it is no negative.
        for _ in range(ATTEMPTS):
            changed = CHANGES[one](example, rng)
            if changed is None:
                break
            trace, answer = changed
            if answer != example.answer or meaning(trace) != meaning(example.trace):
                # The prompt stays. The expert's response tokens and marks tell of the old trace.
                return replace(example, trace=trace, answer=answer, marks=(), response=[])
    return None


@lru_cache(maxsize=4096)
def meaning(trace: str) -> str:
    """A trace with the value of each true equation in the equation's place: what a change may not
    leave as it is.

    >>> [meaning(trace) for trace in ("so 10+2-3=9", "so 2+10-3=9", "so 10+2-9=3", "so 10-2+3=9")]
    ['so=9', 'so=9', 'so=3', 'so 10-2+3=9']
    """

    def shortened(equation: re.Match) -> str:
        value = value_of_sides(equation[0])
        if value is None:
            return equation[0]
        return f"={value}"

    return re.sub(EQUATION, shortened, trace)


# Each of these five returns the copy's trace and answer; None where there is nothing of its kind.
# An attempt that fails returns the expert's own, and `perturb` tries again.


def break_number(example: Example, rng: random.Random) -> tuple[str, str] | None:
    """Another number in the place of one of the trace's."""
    spans = digit_spans(example.trace)
    if not spans:
        return None
    return change_digits(example.trace, rng.choice(spans), rng), example.answer


def break_operator(example: Example, rng: random.Random) -> tuple[str, str] | None:
    """An operator of the trace becomes its inverse."""
    trace = example.trace
    places = [match.start() for match in re.finditer(r"(?<=[\d) ])[-+*/×÷](?=[\d( $])", trace)]
    if not places:
        return None
    at = rng.choice(places)
    return trace[:at] + INVERSE[trace[at]] + trace[at + 1 :], example.answer


def break_answer(example: Example, rng: random.Random) -> tuple[str, str] | None:
    """Another option, written as the right one is, or another number."""
    answer = example.answer
    options = example.options
    # Options are compared with each other; no verifier is asked.
    right = option_of(answer, options)
    others = [option for option in options if option_of(option, options) != right]
    spans = digit_spans(answer)
    if others:
        other = rng.choice(others)
        letter = re.fullmatch(r"\(?([A-Za-z])[.):]?", answer)
        # A letter stays one: "(b)" becomes "(c)", not the third option's text. With the options
        # B12, C and D an answer "C" is the vitamin.
        if letter and right is not None and answer not in options:
            shifted = chr(ord(letter[1]) + options.index(other) - right)
            other = answer.replace(letter[1], shifted)
        return example.trace, other
    if spans:
        return example.trace, change_digits(answer, spans[0], rng)
    return None


def swap_numbers(example: Example, rng: random.Random) -> tuple[str, str] | None:
    """Two different numbers of the trace change places."""
    trace = example.trace
    spans = digit_spans(trace)
    if len(spans) < 2:
        return None
    (a, b), (c, d) = sorted(rng.sample(spans, 2))
    equal = trace[a:b].lstrip("0") == trace[c:d].lstrip("0")  # 7 and 07
    # In a sum, and in a product, nothing changes (and where no result is written, `meaning` sees no
    # equation). The pattern skips a few pairs too many: those of 21 and 5 in "=21\n5*6".
    commutes = re.fullmatch(r"([\s\d]*\+)+\s*|([\s\d]*[*×])+\s*", trace[b:c])
    if equal or commutes:
        return trace, example.answer
    return trace[:a] + trace[c:d] + trace[b:c] + trace[a:b] + trace[d:], example.answer


@lru_cache(maxsize=4096)
def digit_spans(text: str) -> list[tuple[int, int]]:
    """Where the whole numbers of a text begin and end; 2.50 is two."""
    # ASCII alone: \d would match the digits of every script.
    return [match.span() for match in re.finditer("[0-9]+", text)]


def change_digits(text: str, span: tuple[int, int], rng: random.Random) -> str:
    """The text with another number of as many digits in this place: near (one digit off by one) or
    far, with equal chance."""
    start, end = span
    digits = text[start:end]
    changed = digits
    # Compared as text: Python makes no integer of more than 4,300 digits. A number that gets a
    # leading zero would be known by its looks.
    while changed == digits or (changed[0] == "0" and digits[0] != "0" and len(digits) > 1):
        if rng.random() < 0.5:
            place = rng.randrange(len(digits))
            near = (int(digits[place]) + rng.choice((1, 9))) % 10
            changed = digits[:place] + str(near) + digits[place + 1 :]
        else:
            changed = "".join(rng.choice("0123456789") for _ in digits)
    return text[:start] + changed + text[end:]


def change_length(example: Example, rng: random.Random) -> tuple[str, str] | None:
    """A whole number of the answer or of the trace is a digit shorter or longer.

    A policy finds out what copies never show. Where all of them had as many digits as the expert's,
    it learnt to answer 5 for 52: up to there, that looks right.
    """
    in_answer = rng.random() < 0.5
    text = example.answer if in_answer else example.trace
    # Not 2.50 and not 1,200: a shorter one is worth the same, or is known by its looks.
    whole = [match for match in re.finditer(NUMBER, text) if match[0].isdecimal()]
    if not whole:
        return None
    number = rng.choice(whole)
    digits = number[0]
    place = rng.randrange(len(digits))
    if len(digits) > 1 and rng.random() < 0.5:
        changed = digits[:place] + digits[place + 1 :]
    else:
        changed = digits[: place + 1] + rng.choice("0123456789") + digits[place + 1 :]
    if changed[0] == "0":
        changed = digits
    text = text[: number.start()] + changed + text[number.end() :]
    return (example.trace, text) if in_answer else (text, example.answer)


# change_length is none of these: "broken" copies stay what the published rewards have learnt from.
BROKEN = {
    "number": break_number,
    "operator": break_operator,
    "answer": break_answer,
    "swap": swap_numbers,
}


# 2. An error that is carried on -------------------------------------------------------------------
# Every equation of such a copy is true, only the reasoning is wrong. So are a model's own errors:
# arithmetic alone does not find them. It is made from the demonstration alone: from `a op b = c` as
# it stands in the text, and, where a data set marks its calculations (GSM8K's <<48/2=24>>, which
# tasks/records.py keeps), from those told in words, too.
#
#     48/2 = 24 in May.                   84/2 = 42 in May.
#     Twice the 24 is <<24*2=48>>48.      Twice the 42 is <<42*2=84>>84.
#
# Question and trace are read once from left to right, part by part. Where 48 becomes 84 in one
# calculation, its result 24 becomes 42; from there on each 24 becomes 42, and what uses it is
# computed anew. Where nobody can tell whether a 24 is that result or another number, the change is
# given up, and another one is tried.

# A number of a sentence that counts or measures something. Not what is part of a date, a time, a
# fraction, an ordinal, a range or a name: 5/24, 24:00, 24th, 20-24, B12.
ALONE = rf"(?<!\w)(?<!\w[-–:/.,])(?<![-–]){NUMBER}(?! ?%|\w|[:/.,]\w|[-–][0-9])"
# The label of a list or of a step, "2. Then", "in step 2", is read before ALONE is tried, and left
# as it is.
LABEL = r"(?m:^)[ \t]{0,8}[0-9]{1,9}[.):](?=\s)|(?i:step|stage|part|no\.|#) ?[0-9]{1,9}"
MARK = "<<[^<>]{0,200}>>"
PART = re.compile(
    rf"(?P<equation>{MARK}[ $€£]{{0,3}}{NUMBER}|{EQUATION})|{LABEL}|(?P<number>{ALONE})"
)
# Written, 48/2 = $24, or marked, <<48/2=24>>$24. Its groups are the whole of it.
CALCULATION = re.compile(
    rf"(?P<mark><<)?(?P<expression>{EXPRESSION})"
    rf"(?P<equals>=(?:[^<>]{{0,200}}>>)?[ $€£]{{0,3}})(?P<result>{NUMBER})(?P<end>[) ]{{0,4}})"
)

# A copy's numbers may be this times the largest of the example: size alone shall not tell it.
ABSURD = 10


def carry_error(example: Example, rng: random.Random) -> tuple[str, str] | None:
    """Trace and answer with one operand or operator changed, and all that follows from it; None if
    that does not come about.

    The change reaches the answer, and every written equation that was true is still true.

    >>> trace = "3*12=36\\n24+36=60\\nSo she has 60 pens."
    >>> expert = Example("Ava has 24 pens and buys 3 bags of 12.", trace, "60 pens")
    >>> carry_error(expert, random.Random(1))
    ('3*3=9\\n24+9=33\\nSo she has 33 pens.', '33 pens')
    """
    # An answer without a number, or with two of them, is no result of a calculation.
    numbers = re.findall(NUMBER, example.answer)
    if len(numbers) != 1:
        return None
    answer = read_number(numbers[0])
    text = whole_text(example)
    parts = read_parts(text)
    begin = len(example.question) + 1  # of the trace
    calculations = [
        i for i, part in enumerate(parts) if part.re is CALCULATION and part.start() >= begin
    ]
    # The answer comes from the last calculation with its value. A change behind it reaches nothing.
    while calculations and read_number(parts[calculations[-1]]["result"]) != answer:
        calculations.pop()
    limit = ABSURD * max(map(read_number, re.findall(NUMBER, text)), default=0)
    # Some changes cannot be carried on, such as 48/5 for 48/2: 24 was whole, 9.6 is not.
    for _ in range(ATTEMPTS * bool(calculations)):
        try:
            changes = draw_change(text, parts, rng.choice(calculations), rng)
            changed, values = carry_on(text, parts, changes)
            result = write_number(values[answer], numbers[0])
        # ValueError: nobody can tell what would have to follow, or a number cannot be written.
        # KeyError: the answer's value has not become another one.
        except (ValueError, KeyError):
            continue
        if values[answer] != answer and max(values.values()) <= limit:
            return re.sub(MARK, "", changed[begin:]), example.answer.replace(numbers[0], result)
    return None


def whole_text(example: Example) -> str:
    """Question and trace, with the marks in their places again."""
    # Where the calculation is written out in the trace, its mark would say the same once more, and
    # tear it in two: 48/2 = <<48/2=24>>24.
    text = f"{example.question}\n{example.trace}"
    written: set[int] = set()
    for part in read_parts(text):
        if part.lastgroup != "number" and re.search(OPERATOR, part[0]):
            written.update(range(*part.span()))
    # From the last mark to the first: the places of the others stay what they are.
    for place, mark in sorted(example.marks, reverse=True):
        start = len(example.question) + 1 + place
        if start not in written:
            text = f"{text[:start]}<<{mark}>>{text[start:]}"
    return text


@lru_cache(maxsize=4096)
def read_parts(text: str) -> list[re.Match]:
    """Numbers alone (with a group "number"), true calculations (matches of CALCULATION), and what
    else has an equals sign (with a group "equation"), in their order."""
    parts = []
    for part in PART.finditer(text):
        # Calculations that are rounded or wrong, and equations with several signs, remain what PART
        # says: an "equation".
        calculation = CALCULATION.fullmatch(text, *part.span())
        if calculation and evaluate(calculation["expression"]) == read_number(
            calculation["result"]
        ):
            parts.append(calculation)
        elif part.lastgroup:
            parts.append(part)
    return parts


def draw_change(text: str, parts: list[re.Match], index: int, rng: random.Random) -> dict[int, str]:
    """Another operand or operator in one calculation: {index of a part: its new number or
    expression}."""
    expression = parts[index]["expression"]
    old = rng.choice(list(re.finditer(f"{NUMBER}|{OPERATOR}", expression)))
    changes = {}
    if old[0] in INVERSE:
        new = INVERSE[old[0]]
    else:
        # With equal chance a number of the question or of the trace so far (the wrong one of those
        # at hand is a model's usual error), or its own digits changed.
        other = change_digits(old[0], digit_spans(old[0])[0], rng)
        before = re.findall(NUMBER, text[: parts[index].start()])
        if before and rng.random() < 0.5:
            other = rng.choice(before)
        new = write_number(read_number(other), old[0])
        # "At $5 a bid there were 50/5 bids": where the words tell the operand, it changes, too. A
        # mark's operands stand nowhere else.
        for i in words_with(text, parts, index, read_number(old[0])):
            changes[i] = write_number(read_number(other), parts[i][0])
    # Else a reader would see another result and no reason for it.
    if parts[index]["mark"] and not changes:
        raise ValueError("the change would stand in the mark alone")
    changes[index] = expression[: old.start()] + new + expression[old.end() :]
    return changes


def words_with(text: str, parts: list[re.Match], index: int, value: Fraction) -> list[int]:
    """Those of the eight parts before a calculation that are numbers of this value, in its line."""
    return [
        i
        for i in range(max(0, index - 8), index)
        if parts[i].lastgroup == "number"
        and read_number(parts[i][0]) == value
        and "\n" not in text[parts[i].start() : parts[index].start()]
    ]


def carry_on(
    text: str, parts: list[re.Match], changes: dict[int, str]
) -> tuple[str, dict[Fraction, Fraction]]:
    """(the text after some changes and all that follows from them, {value of an old result: that of
    the new one}).

    A later number is an old result if it has exactly its value, and this is not the value of
    another number that stood there before.
    """
    new: dict[Fraction, Fraction] = {}
    # Values of numbers that are no old result: of a given 24, for example. Up to the change `new`
    # is empty, so that every number is one of these.
    others: set[Fraction] = set()

    def follow(number: re.Match) -> str:
        """What has to stand in the place of a number."""
        value = read_number(number[0])
        if value not in new:
            others.add(value)
            return number[0]
        if value in others:
            raise ValueError("another number has the same value")
        return write_number(new[value], number[0])

    pieces = []
    behind = 0
    for i, part in enumerate(parts):
        pieces.append(text[behind : part.start()])
        behind = part.end()
        if part.re is not CALCULATION:
            followed = re.sub(NUMBER, follow, part[0])
            # 10/3 = 3.33 is rounded, 2*3+4 = 6+4 = 10 has a result within: neither can follow.
            if part["equation"] and followed != part[0]:
                raise ValueError("an equation that is no exact calculation uses it")
            pieces.append(changes.get(i, followed))
            continue
        # A calculation: first its operands follow, then its result.
        expression = re.sub(NUMBER, follow, part["expression"])
        expression = changes.get(i, expression)
        old = read_number(part["result"])
        value = evaluate(expression)
        result = part["result"]
        if value == old or new.get(old, value) != value:
            # It is no old result, or there are two of this value that differ now.
            others.add(old)
        if value != old or old in new:
            result = write_number(value, result)
            new[old] = value
            # "It takes 20 hours, because 1500/75 = 20": that 20 has been passed already.
            if words_with(text, parts, i, old):
                raise ValueError("the words tell it before it is calculated")
        pieces.append(f"{part['mark'] or ''}{expression}{part['equals']}{result}{part['end']}")
    pieces.append(text[behind:])
    return "".join(pieces), new


CHANGES = BROKEN | {"carried": carry_error, "length": change_length}
MIXED = {"both": ("broken", "carried"), "all": ("broken", "carried", "length")}


# 3. Negatives -------------------------------------------------------------------------------------


def perturbed_negatives(
    tokenizer, example: Example, count: int, rng: random.Random, kind: str = "broken"
) -> list[tuple[list[int], int]]:
    """At most `count` copies of a tokenised expert's trace with something wrong: (response tokens,
    index of the first changed token)."""
    negatives = []
    for _ in range(count):
        copy = perturb(example, rng, kind)
        # "He has three pens." with the answer "three" offers nothing to change.
        if copy is None:
            continue
        ids = data.response_ids(tokenizer, data.response_text(copy.trace, copy.answer))
        # Negative is only what follows from the first changed token on: what stands before it is
        # the expert's own. Two texts may have the same tokens: a no-op is no negative.
        if ids != example.response:
            negatives.append((ids, first_difference(ids, example.response)))
    return negatives


def main() -> None:
    """One example of each kind."""
    rng = random.Random(0)
    expert = data.load_examples("words", "train", 1)[0]
    print("question ", expert.question)
    print("expert   ", expert.trace.replace("\n", " | "), "->", expert.answer)
    for kind in CHANGES:
        copy = perturb(expert, rng, kind)
        at = first_difference(expert.trace + "->", copy.trace + "->")
        trace = copy.trace.replace("\n", " | ")
        print(f"{kind:9s}", trace, "->", copy.answer, f"(differs at {at})")


if __name__ == "__main__":
    main()
