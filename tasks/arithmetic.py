"""Arithmetic as it stands in a text: its written equations and their exact values.

    Natalia sold 48/2 = $24.50 on May 3rd.
                 ^^^^    ^^^^^
           expression    result

Python's own parser reads an expression, but nothing is ever handed to Python's eval: only numbers
and + - * / have a value. Every repetition in the patterns is bounded, so that reading takes linear
time: a text may be anybody's.
"""

import ast
import operator
import re
from fractions import Fraction
from functools import lru_cache

# 48, 1,200, 24.50, .5 or 50%; not the 24 in 124. Nobody calculates with a longer number.
NUMBER = (
    r"(?<![0-9])(?<![0-9][.,])"
    r"(?:[0-9]{1,9}(?:,[0-9]{3}(?![0-9])){0,2}(?:\.[0-9]{1,6})?|\.[0-9]{1,6})(?: ?%)?"
)
OPERATOR = r"[-+*/×÷−–xX]"
OPERAND = rf"[( $€£]{{0,5}}{NUMBER}[) ]{{0,4}}"
EXPRESSION = rf"{OPERAND}(?:{OPERATOR}{OPERAND}){{1,20}}"
SIDE = rf"{OPERAND}(?:{OPERATOR}{OPERAND}){{0,20}}"

EQUATION = rf"{SIDE}(?:={SIDE}){{1,5}}"  # 48/2 = 24, and 2*3+4 = 6+4 = 10

SPELLINGS = str.maketrans({"×": "*", "x": "*", "X": "*", "÷": "/", "−": "-", "–": "-"})
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of_sides(equation: str) -> Fraction | None:
    """The value of all sides of an equation; None if it is not true.

    >>> [str(value_of_sides(text)) for text in ("48/2 = $24", "2*3+4 = 6+4 = 10", "1+1=3")]
    ['24', '10', 'None']
    """
    values = {evaluate(side) for side in equation.split("=")}
    return values.pop() if len(values) == 1 else None


def read_number(text: str) -> Fraction:
    """The value of a NUMBER.

    >>> [str(read_number(text)) for text in ("1,200", ".5", "50 %")]
    ['1200', '1/2', '1/2']
    """
    value = Fraction(text.rstrip(" %").replace(",", ""))
    return value / 100 if "%" in text else value


@lru_cache(maxsize=100_000)
def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression; None if it has none.

    >>> texts = ("10-2+3", "2 x ($3+4)", "50% * 12", "(1+2", "1/0", "2+", "2**3", "abs(2)")
    >>> [str(evaluate(text)) for text in texts]
    ['11', '14', '6', '3', 'None', 'None', 'None', 'None']
    """
    text = re.sub(r"[$€£]|,(?=[0-9]{3})", "", expression.strip(" =")).translate(SPELLINGS)
    text = re.sub(r"([0-9.]{1,20}) ?%", r"(\1/100)", text)
    # a parenthesis without its other half belongs to the sentence
    opened = text.count("(") - text.count(")")
    text = text.removeprefix("(" * opened).removesuffix(")" * -opened)
    try:
        return value_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def value_of(node: ast.expr) -> Fraction:
    """The value of a parsed expression; ValueError if anything but numbers and + - * / is in it."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
        raise ValueError("no arithmetic")
    return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))


def write_number(value: Fraction | None, like: str) -> str:
    """`value` as `like` is written: its commas, its cents, its percent sign. ValueError where its
    looks would give it away: negative, zero, endless, with more decimals than `like` has.

    >>> pairs = (("2400", "1,200"), ("3.5", "1.50"), ("1/4", ".50"), ("1/2", "20%"))
    >>> [write_number(Fraction(value), like) for value, like in pairs]
    ['2,400', '3.50', '.25', '50%']
    """
    if value is None:
        raise ValueError("it divides by zero")
    digits = like.rstrip(" %")
    sign = like[len(digits) :]
    if sign:
        value = value * 100
    decimals = len(digits.partition(".")[2])
    if (value * 10**decimals).denominator != 1 or not 0 < value < 10**9:
        raise ValueError(f"{value} cannot be written as {like} is")
    text = f"{float(value):,.{decimals}f}"
    if "," not in digits:
        text = text.replace(",", "")
    if digits.startswith("."):
        text = text.removeprefix("0")
    return text + sign
