"""Negatives that cost no sampling: an expert's own trace with something wrong in it.

The discriminator of Algorithm 1 (arXiv 2510.01857) learns from experts and negatives. Most
negatives are samples of the policy; the paper adds perturbed experts. They are written in the
expert's own style, so that style tells nothing, and nobody has to say which trace is right: an
expert's trace in which something was changed is wrong.

    broken    one thing changes, everything else stays:      one thing is enough to see it, and
              a number, an operator, the answer, a swap      all that follows contradicts it
    carried   one calculation changes, its result is         every equation is true, only the
              computed anew, and all that used it follows,   reasoning is wrong: so are a model's
              to the answer                                  own errors

              expert             broken             carried
              3*12=36            3*12=36            3*14=42
              24+36=60           24-36=60           24+42=66
              60-9=51  -> 51     60-9=51  -> 51     66-9=57  -> 57

Negative is only what follows from the first changed token on: what stands before it is the expert's
own.

    what                          where                 test, in tests/test_negatives.py
    one thing broken              perturb               perturbations_change_something_and_are_wrong
    a copy that is still right    is_still_right        a_copy_that_is_still_right_is_none
    an error that is carried on   carry_error           every_equation_of_a_carried_copy_is_true
    what is the old result        follow                later_uses_are_replaced_and_nothing_else
    the first changed token       perturbed_negatives   perturbed_negatives_count_from_the_first_..

Run `python negatives.py` to see one example of each kind. Numbers and equations are read in
tasks/arithmetic.py.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import data
from data import Example
from tasks.answers import normalise_text, option_of
from tasks.arithmetic import (
    Calculation,
    Token,
    decimals_of,
    evaluate,
    read_calculations,
    read_tokens,
    write_number,
)
from tasks.common import first_difference

# Nothing here knows what mistakes a policy makes. In particular '*' never becomes '+', which is how
# the pupil of `words` goes wrong: the reward has to find that out from samples.
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
INVERSE |= {"×": "÷", "÷": "×", "x": "/", "X": "/", "−": "+", "–": "+"}  # other spellings

MOST_TEXT = 20_000  # characters of a trace whose equations are read: longer ones fit no context


# 1. One thing broken ------------------------------------------------------------------------------


def perturb(example: Example, rng: random.Random, kind: str = "broken") -> Example | None:
    """A copy of the example with something wrong in it; None if it offers nothing to change.

    kind: "broken" (one of BROKEN at random), "carried" (broken where nothing can be carried on),
    "both" (either, with equal chance); or one of BROKEN alone: "number", "operator", "answer",
    "swap". A change that would change nothing, or leave everything right, is not made.

    >>> expert = Example("?", "3*12=36", "36")
    >>> perturb(expert, random.Random(0), "operator").trace
    '3/12=36'
    >>> perturb(expert, random.Random(0), "carried")
    Example(question='?', trace='3*3=9', answer='9', options=(), task='')
    """
    if kind == "both":
        kind = rng.choice(("broken", "carried"))
    if kind == "carried":
        carried = carry_error(example, rng)
        if carried is not None:
            return carried
    kinds = [kind]
    if kind not in BROKEN:
        kinds = rng.sample(list(BROKEN), len(BROKEN))
    for one in kinds:
        broken = BROKEN[one](example, rng)
        if broken is not None and broken != example and not is_still_right(example, broken):
            return broken
    return None


def break_number(example: Example, rng: random.Random) -> Example | None:
    """Another number in the place of one of the trace's."""
    trace = example.trace
    spans = [match.span() for match in re.finditer("[0-9]+", trace)]
    if not spans:
        return None
    start, end = rng.choice(spans)
    return replace(example, trace=trace[:start] + other_number(trace[start:end], rng) + trace[end:])


def break_operator(example: Example, rng: random.Random) -> Example | None:
    """An operator of the trace becomes its inverse."""
    trace = example.trace
    places = [match.start() for match in re.finditer(r"(?<=[\d) ])[-+*/×÷](?=[\d( $])", trace)]
    for _ in range(20 * bool(places)):  # nearly always the first will do
        at = rng.choice(places)
        if not is_neutral(trace, at):
            return replace(example, trace=trace[:at] + INVERSE[trace[at]] + trace[at + 1 :])
    return None


def is_neutral(trace: str, at: int) -> bool:
    """Whether the operator at this place and its inverse come to the same: x*1 and x/1, x+0 and
    x-0.

    >>> [is_neutral(text, 1) for text in ("7*1", "7/$1.00 =", "7+0", "7*0", "7*1.5", "7+x")]
    [True, True, True, False, False, False]
    """
    right = re.match(r"[ $]{0,3}([0-9][0-9,]{0,20}(?:\.[0-9]{1,20})?)", trace[at + 1 : at + 60])
    if right is None:
        return False
    neutral = 0.0 if trace[at] in "+-" else 1.0
    return float(right[1].replace(",", "")) == neutral


def break_answer(example: Example, rng: random.Random) -> Example | None:
    """Another option, written as the right one is, or another number."""
    old = example.answer
    others = other_options(example)
    if others:
        other = rng.choice(others)
        is_letter = re.fullmatch(r"\(?[A-Za-z][.):]?", old) and old not in example.options
        if is_letter:  # and it stays one
            letter = chr(ord("A") + example.options.index(other))
            other = re.sub("[A-Za-z]", letter.lower() if old.islower() else letter, old)
        return replace(example, answer=other)
    match = re.search("[0-9]+", old)
    if not match:
        return None
    changed = old[: match.start()] + other_number(match.group(), rng) + old[match.end() :]
    return replace(example, answer=changed)


def other_options(example: Example) -> list[str]:
    """The options that the answer does not name. Options are compared with each other; no verifier
    is asked."""
    options = example.options
    right = option_of(example.answer, options)
    if right is None:
        answer = normalise_text(example.answer)
        return [option for option in options if normalise_text(option) != answer]
    return [option for option in options if option_of(option, options) != right]


def swap_numbers(example: Example, rng: random.Random) -> Example | None:
    """Two different numbers of the trace change places."""
    trace = example.trace
    spans = [match.span() for match in re.finditer("[0-9]+", trace)]
    if len(spans) < 2:
        return None
    for _ in range(20):  # most pairs will do; a short trace of equal numbers has none
        (a, b), (c, d) = sorted(rng.sample(spans, 2))
        between = trace[b:c]
        equal = trace[a:b].lstrip("0") == trace[c:d].lstrip("0")
        # all that stands between is of a sum, or of a product
        commutes = re.fullmatch(r"([\s\d]*\+)+\s*|([\s\d]*[*×])+\s*", between)
        if not equal and not commutes:
            swapped = trace[:a] + trace[c:d] + between + trace[a:b] + trace[d:]
            return replace(example, trace=swapped)
    return None


def other_number(digits: str, rng: random.Random) -> str:
    """A different number with as many digits: near (one digit off by one) or far, with equal
    chance. Compared as text, since Python makes no integer of more than 4,300 digits."""
    if rng.random() < 0.5:
        place = rng.randrange(len(digits))
        near = (int(digits[place]) + rng.choice((1, 9))) % 10
        changed = digits[:place] + str(near) + digits[place + 1 :]
    else:
        changed = "".join(rng.choice("0123456789") for _ in digits)
    leading_zero = len(changed) > 1 and changed[0] == "0" and digits[0] != "0"
    if changed == digits or leading_zero:
        return other_number(digits, rng)
    return changed


BROKEN = {
    "number": break_number,
    "operator": break_operator,
    "answer": break_answer,
    "swap": swap_numbers,
}


def is_still_right(before: Example, after: Example) -> bool:
    """Whether all that changed lies in written calculations that still hold and still have the same
    result.

    >>> before = Example("?", "10+2-3=9", "9")
    >>> copies = [replace(before, trace=trace) for trace in ("2+10-3=9", "10-2+3=9", "10+2-9=3")]
    >>> [is_still_right(before, copy) for copy in copies]
    [True, False, False]
    """
    if before.answer != after.answer or max(len(before.trace), len(after.trace)) > MOST_TEXT:
        return False
    tokens = read_tokens(before.trace)
    changed_tokens = read_tokens(after.trace)
    if len(tokens) != len(changed_tokens):
        return False
    # where those tokens of the copy begin that are in the expression of a true calculation
    in_true = set()
    for calculation in read_calculations(changed_tokens)[0]:
        if calculation.holds:
            in_true.update(token.start for token in calculation.expression)
    # the same of the expert's trace, true or rounded
    in_any = set()
    for calculation in read_calculations(tokens)[0]:
        in_any.update(token.start for token in calculation.expression)
    for old, new in zip(tokens, changed_tokens):
        if old.text == new.text:
            continue
        if new.start not in in_true or old.start not in in_any:
            return False  # it changed in a sentence, in a result, or in what is now false
    return True


# 2. An error that is carried on -------------------------------------------------------------------
# From the demonstration alone: `a op b = c` as it stands in the text; and where a data set marks
# its calculations (GSM8K's <<48/2=24>>, which tasks/records.py keeps) those told in words, too.

ATTEMPTS = 24  # changes that are tried on one trace
ATTEMPTS_AT_A_STEP = 6
ABSURD = 10  # a carried number may be this times the largest one of question and trace
WINDOW = 12  # numbers before a result that may be its operands, or tell of it

# Numbers that a text brings in without digits. What equals one of them may be a given number.
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WORD_VALUES = {word: Fraction(value) for value, word in enumerate(WORDS)}
WORD_VALUES |= {"half": Fraction(2), "twice": Fraction(2), "double": Fraction(2)}
WORD_VALUES |= {"both": Fraction(2), "third": Fraction(3), "triple": Fraction(3)}
WORD_VALUES |= {"quarter": Fraction(4), "dozen": Fraction(12), "percent": Fraction(100)}


class Unclear(Exception):
    """This change cannot be carried on: nobody can tell what would have to follow, or something
    absurd would."""


@dataclass(frozen=True)
class Step:
    """One calculation of a trace, with the places of its parts."""

    calculation: Calculation
    # of the operands that the trace shows: index in the expression -> index among its numbers
    shown: dict[int, int]
    result: int  # index among the trace's numbers
    marked: bool  # told by a mark: its tokens are the mark's, without percent signs


@dataclass(frozen=True)
class Change:
    """What goes wrong in one step: another operand, or another operator."""

    step: Step
    index: int  # of that operand or operator in the expression
    operand: Fraction | None = None
    operator: str = ""


@dataclass(frozen=True)
class Worked:
    """A trace as calculations: what is read once for all changes that are tried."""

    trace: str
    numbers: list[Token]
    steps: dict[int, Step]  # by the index of their result
    # "20 hours because 1500/75=20": index of the first 20 -> that of the result
    announced: dict[int, int]
    unread: frozenset[int]  # numbers in equations that are not understood: they cannot follow
    given: frozenset[Fraction]  # numbers of the question, and those that words bring in
    candidates: list[Fraction]  # numbers of the question that may stand in the place of an operand
    largest: Fraction


def carry_error(example: Example, rng: random.Random) -> Example | None:
    """The example with one operand or operator changed, and all that follows from it; None if that
    does not come about.

    The change reaches the answer, and every written equation that was true is still true. Given up
    is a change after which a number would be negative, endless, absurd, or not to be told from
    another one (`follow`).

    >>> trace = "3*12=36\\n24+36=60\\nSo she has 60 pens."
    >>> expert = Example("Ava has 24 pens and buys 3 bags of 12.", trace, "60 pens")
    >>> carried = carry_error(expert, random.Random(1))
    >>> carried.trace, carried.answer
    ('3*17=51\\n24+51=75\\nSo she has 75 pens.', '75 pens')
    """
    if len(example.trace) > MOST_TEXT or len(example.question) > MOST_TEXT:
        return None
    answer = the_number(example.answer)
    if answer is None:
        return None
    worked = read_worked(example)
    last = last_step(worked, answer)
    if last is None:
        return None
    for change in changes(worked, last.result, rng):
        try:
            values = follow(worked, change)
            copy = write_copy(example, worked, change, values, answer, last)
        except Unclear:
            continue
        if equations_hold(example.trace, copy.trace):
            return copy
    return None


def the_number(answer: str) -> Token | None:
    """The only number of an answer; None if there is none, or several."""
    if len(answer) > 200:
        return None
    numbers = [token for token in read_tokens(answer) if token.kind == "number"]
    return numbers[0] if len(numbers) == 1 else None


def last_step(worked: Worked, answer: Token) -> Step | None:
    """The step that the answer comes from: the last one with this result. (18% and 18 may both be
    written as 18.)"""
    for index in sorted(worked.steps, reverse=True):
        number = worked.numbers[index]
        if number.amount(number.value) == answer.amount(answer.value):
            return worked.steps[index]
    return None


# Reading


@lru_cache(maxsize=4096)
def read_worked(example: Example) -> Worked:
    """A demonstration's numbers, and the steps that calculate them."""
    tokens = read_tokens(example.trace)
    numbers = [token for token in tokens if token.kind == "number"]
    index_at = {number.start: index for index, number in enumerate(numbers)}
    calculations, others = read_calculations(tokens)
    steps = {}
    for calculation in calculations:
        if not calculation.holds:  # 10/3 = 3.33
            others += [token for token in calculation.expression if token.kind == "number"]
            others.append(calculation.result)
            continue
        shown = {}
        for i, token in enumerate(calculation.expression):
            if token.kind == "number":
                shown[i] = index_at[token.start]
        result = index_at[calculation.result.start]
        steps[result] = Step(calculation, shown, result, marked=False)
    starts = [number.start for number in numbers]
    for place, mark in example.marks:
        step = read_mark(example.trace, numbers, bisect_left(starts, place), place, mark)
        if step is not None and step.result not in steps:
            steps[step.result] = step
    calculated = places_of(steps)
    unread = {index_at[token.start] for token in others} - calculated
    question = [token for token in read_tokens(example.question) if token.kind == "number"]
    given = {number.value for number in question}
    words = words_of(example.question) | words_of(example.trace)
    given |= {value for word, value in WORD_VALUES.items() if word in words}
    if "%" in example.question or "%" in example.trace:
        given.add(Fraction(100))
    candidates = [number.value for number in question if stands_alone(example.question, number)]
    amounts = [number.amount(number.value) for number in (*question, *numbers)]
    return Worked(
        example.trace,
        numbers,
        steps,
        read_announced(example.trace, numbers, steps, calculated | unread),
        frozenset(unread),
        frozenset(given),
        candidates,
        max(amounts, default=Fraction(0)),
    )


def places_of(steps: dict[int, Step]) -> set[int]:
    """Indices of all numbers that the steps are made of."""
    places = set()
    for step in steps.values():
        places.update((step.result, *step.shown.values()))
    return places


def words_of(text: str) -> set[str]:
    """The words of a text in lower case."""
    return set(re.findall("[a-z]+", text.lower()))


def read_mark(trace: str, numbers: list[Token], result: int, place: int, mark: str) -> Step | None:
    """The step that a mark such as 48/2=24 tells of, whose result, the next number, stands at
    `place` of the trace. Its operands are those numbers just before it, in the same line, that have
    their values. None if the mark and the trace do not agree."""
    calculations, _ = read_calculations(read_tokens(mark))
    if len(calculations) != 1 or not calculations[0].holds:
        return None
    calculation = calculations[0]
    # a currency sign and a space may stand between
    if result == len(numbers) or numbers[result].start > place + 3:
        return None
    if numbers[result].amount(numbers[result].value) != calculation.result.value:
        return None
    shown = {}
    free = before_in_line(trace, numbers, result)
    for i in reversed(range(len(calculation.expression))):
        token = calculation.expression[i]
        if token.kind != "number":
            continue
        for index in free:
            if numbers[index].amount(numbers[index].value) == token.value:
                shown[i] = index
                free = [other for other in free if other < index]
                break
    return Step(calculation, shown, result, marked=True)


def before_in_line(trace: str, numbers: list[Token], result: int) -> list[int]:
    """The numbers before a result in its line, the nearest first; WINDOW of them at most."""
    line = trace.rfind("\n", 0, numbers[result].start) + 1
    indices = range(result - 1, max(-1, result - 1 - WINDOW), -1)
    return [index for index in indices if numbers[index].start >= line]


def read_announced(
    trace: str, numbers: list[Token], steps: dict[int, Step], calculated: set[int]
) -> dict[int, int]:
    """The results that a sentence tells before it calculates them: {index of such a number: index
    of the result}."""
    announced = {}
    for result in steps:
        for index in before_in_line(trace, numbers, result):
            number = numbers[index]
            if index in calculated or number.value != numbers[result].value:
                continue
            if stands_alone(trace, number):
                announced[index] = result
    return announced


def stands_alone(text: str, number: Token) -> bool:
    """Whether a number of a sentence counts or measures something: it is no part of a date, a time,
    a fraction, an ordinal, a name such as B12, and no label of a list.

    >>> text = "1. On 5/24/2020, the 24th, at 24:00, COVID-24: a 24-inch pipe, $24 and 24."
    >>> numbers = [token for token in read_tokens(text) if token.text == "24"]
    >>> [text[number.start :] for number in numbers if stands_alone(text, number)]
    ['24-inch pipe, $24 and 24.', '24 and 24.', '24.']
    """
    before = text[max(0, number.start - 12) : number.start]
    after = text[number.end : number.end + 2]
    if re.search(r"\w$|\w[-–:/.,]$|[-–]$", before):  # B24, 5/24, -24
        return False
    if re.match(r"\w|[:/.,]\w|[-–][0-9]", after):  # 24th, 24:00, 24-30
        return False
    in_a_list = re.search(r"(?:^|\n)[ \t]{0,8}$", before) and re.match(r"[.):]\s", after)
    labelled = re.search(r"(?:step|stage|part|no\.|#) ?$", before, re.IGNORECASE)
    return not (in_a_list or labelled)


# Changing


def changes(worked: Worked, last: int, rng: random.Random) -> Iterator[Change]:
    """Changes to try: the steps up to the one with the answer in random order, some of each, an
    operand or an operator."""
    indices = [index for index in worked.steps if index <= last]
    for place in rng.sample(indices, min(len(indices), ATTEMPTS // ATTEMPTS_AT_A_STEP)):
        step = worked.steps[place]
        expression = step.calculation.expression
        operators = []
        if not step.marked:  # a mark's operators have no place in the text
            operators = [i for i, token in enumerate(expression) if token.kind in INVERSE]
        operands = sorted(step.shown)
        for _ in range(ATTEMPTS_AT_A_STEP):
            if operators and (not operands or rng.random() < 0.5):
                index = rng.choice(operators)
                yield Change(step, index, operator=INVERSE[expression[index].text])
            elif operands:
                index = rng.choice(operands)
                yield Change(step, index, operand=other_operand(worked, step.shown[index], rng))


def other_operand(worked: Worked, index: int, rng: random.Random) -> Fraction:
    """Another value for an operand, with equal chance a number of the question or one just before
    it in the trace (the wrong one of those at hand), or the same number with other digits."""
    number = worked.numbers[index]
    before = worked.numbers[max(0, index - WINDOW) : index]
    at_hand = worked.candidates + [other.value for other in before]
    if at_hand and rng.random() < 0.5:
        return rng.choice(at_hand)
    digits = iter(other_number(re.sub("[^0-9]", "", number.text), rng))
    changed = re.sub("[0-9]", lambda _: next(digits), number.text)
    value = Fraction(changed.replace(",", ""))
    return value / 100 if number.percent else value


def follow(worked: Worked, change: Change) -> dict[int, Fraction]:
    """All that a change brings about: {index among the trace's numbers: its new value}. Unclear
    where that is.

    The rule for what follows, from the changed step on. A number is the old result, and follows, if
    it has exactly its value, stands alone or is an operand, and this value is not that of a number
    of the question, of a word ("two"), or of a number that stood before the old result: of those
    nobody can tell which is meant, and the change is given up. A step with an operand that has
    changed is computed anew; its own result is then followed like the first one.
    """
    first = change.step
    values: dict[int, Fraction] = {}  # index among the numbers -> new value
    new: dict[Fraction, Fraction] = {}  # value of an old result -> that of the new one
    other = set(worked.given)  # values of numbers that are no old result
    calculated = places_of(worked.steps)
    if change.operand is not None:
        if change.operand in (0, 1):
            raise Unclear("it would calculate nothing")
        for index in (first.shown[change.index], *mentions(worked, change)):
            values[index] = change.operand
    ambiguous = set()  # announced results whose value another number has
    for index, number in enumerate(worked.numbers):
        step = worked.steps.get(index)
        if index in worked.announced:
            if number.value in other:
                ambiguous.add(index)
        elif index < first.result:
            other.add(number.value)
        elif step is not None:
            result = recompute(worked, step, values, new, other, change if step is first else None)
            if result == number.value:  # nothing that it uses has changed
                if number.value in new:
                    other.add(number.value)  # and now there are two of this value
                continue
            check_plausible(number, result, worked.largest)
            if new.get(number.value, result) != result:
                other.add(number.value)  # two old results of one value have become different ones
            values[index] = result
            new[number.value] = result
        elif number.value not in new:
            other.add(number.value)
        elif index in worked.unread:
            raise Unclear("an equation that is not understood uses it")
        elif index in calculated or stands_alone(worked.trace, number):
            if number.value in other:
                raise Unclear("another number has the same value")
            values[index] = new[number.value]
    for index, result in worked.announced.items():
        if result in values and index in ambiguous:
            raise Unclear("another number has the same value")
        if result in values:
            values[index] = values[result]
    return values


def mentions(worked: Worked, change: Change) -> list[int]:
    """Where the line tells of the operand that changes, before it calculates: "at $5 a bid there
    were 50/5 bids". None if that may be said of two numbers."""
    old = worked.numbers[change.step.shown[change.index]].value
    line = before_in_line(worked.trace, worked.numbers, change.step.result)
    calculated = places_of(worked.steps)
    same = [index for index in line if worked.numbers[index].value == old]
    if len(same) != 2:  # the operand itself, and what tells of it
        return []
    told = [index for index in same if index not in calculated and index not in worked.announced]
    return [index for index in told if stands_alone(worked.trace, worked.numbers[index])]


def recompute(
    worked: Worked, step: Step, values: dict, new: dict, other: set, change: Change | None
) -> Fraction:
    """The value of a step's result, now that some of its operands have changed, or itself. values,
    new, other: as `follow` has them so far."""
    expression = list(step.calculation.expression)
    operands = {}
    for i, token in enumerate(expression):
        if token.kind != "number":
            continue
        if i in step.shown:
            number = worked.numbers[step.shown[i]]
            value = values.get(step.shown[i], number.value)
            operands[i] = number.amount(value) if step.marked else value
        elif token.value in new:  # the mark uses it, the text does not show it: "twice as many"
            if token.value in other:
                raise Unclear("another number has the same value")
            operands[i] = new[token.value]
    if change is not None and change.operator:
        operator = change.operator
        plain = {"×": "*", "÷": "/"}.get(operator, operator)
        expression[change.index] = expression[change.index]._replace(text=operator, kind=plain)
    result = evaluate(expression, operands)
    if result is None:
        raise Unclear("it divides by zero")
    if step.marked and worked.numbers[step.result].percent:
        result = result / 100
    return result


def check_plausible(number: Token, value: Fraction, largest: Fraction) -> None:
    """Unclear if `value` in the place of `number` would be told by its looks: negative, zero, far
    larger than all others, broken where the expert's is whole, or with more decimals than cents
    have."""
    old = number.amount(number.value)
    amount = number.amount(value)
    most = 0
    if old.denominator > 1:
        most = max(2, decimals_of(old, 20) or 0)
    if amount <= 0 or amount > ABSURD * largest or decimals_of(amount, most) is None:
        raise Unclear(f"{amount} in the place of {old} is absurd")


# Writing


def write_copy(
    example: Example,
    worked: Worked,
    change: Change,
    values: dict[int, Fraction],
    answer: Token,
    last: Step,
) -> Example:
    """The example with the changed operator and all changed numbers, each written as the old one
    is."""
    if last.result not in values:
        raise Unclear("it does not reach the answer")
    commas = any("," in number.text for number in worked.numbers)
    edits = {}  # start -> (end, text)
    for index, value in values.items():
        number = worked.numbers[index]
        edits[number.start] = (number.end, write_number(number.amount(value), number.text, commas))
    if change.operator:
        operator = change.step.calculation.expression[change.index]
        edits[operator.start] = (operator.end, change.operator)
    pieces = []
    end = 0
    for start in sorted(edits):
        pieces.append(example.trace[end:start])
        end, text = edits[start]
        if text is None:
            raise Unclear("it cannot be written")
        pieces.append(text)
    trace = "".join([*pieces, example.trace[end:]])
    result = worked.numbers[last.result].amount(values[last.result])
    written = write_number(result, answer.text, commas)
    if written is None:
        raise Unclear("it cannot be written")
    text = example.answer[: answer.start] + written + example.answer[answer.end :]
    return replace(example, trace=trace, answer=text, marks=())  # the marks tell of the old numbers


def equations_hold(before: str, after: str) -> bool:
    """Whether each equation that is true in one text is true in the other: what was carried on is
    read once more."""
    old, _ = read_calculations(read_tokens(before))
    new, _ = read_calculations(read_tokens(after))
    if len(old) != len(new):
        return False
    return all(then.holds for now, then in zip(old, new) if now.holds)


# 3. Negatives -------------------------------------------------------------------------------------


def perturbed_negatives(
    tokenizer, example: Example, count: int, rng: random.Random, kind: str = "broken"
) -> list[tuple[list[int], int]]:
    """At most `count` copies of an expert's trace with something wrong: (response tokens, index of
    the first changed token). A copy whose tokens equal the expert's is dropped: a no-op is no
    negative."""
    expert = data.response_ids(tokenizer, data.response_text(example.trace, example.answer))
    negatives = []
    for _ in range(count):
        copy = perturb(example, rng, kind)
        if copy is None:  # nothing to change
            continue
        ids = data.response_ids(tokenizer, data.response_text(copy.trace, copy.answer))
        if ids != expert:
            negatives.append((ids, first_difference(ids, expert)))
    return negatives


def main() -> None:
    """One example of each kind, on a problem of each embedded task."""
    rng = random.Random(0)
    for task in data.EMBEDDED:
        expert = data.load_examples(task, "train", 1)[0]
        print("question ", expert.question)
        print("expert   ", expert.trace.replace("\n", " | "), "->", expert.answer)
        whole = data.response_text(expert.trace, expert.answer)
        for kind in (*BROKEN, "carried"):
            copy = perturb(expert, rng, kind)
            if copy is not None:
                at = first_difference(whole, data.response_text(copy.trace, copy.answer))
                trace = copy.trace.replace("\n", " | ")
                print(f"{kind:9s}", trace, "->", copy.answer, f"(differs at {at})")


if __name__ == "__main__":
    main()
