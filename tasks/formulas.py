"""Formulas, in LaTeX or plain: what one is worth at three fixed points. Two formulas agree if they
are worth the same at each.

Polynomials and quotients of them are evaluated exactly, in fractions. Two different ones seldom
meet at a point drawn at random (Schwartz 1980, Zippel 1979), and do not meet at three. Roots and
functions are complex floats, close to 1e-9. Nothing is expanded or simplified, so the time grows
with the length of the text, and no text makes it hang."""

import cmath
import math
import re
import zlib
from fractions import Fraction

LONGEST = 300  # characters of a formula that is read
DEEPEST = 30  # brackets inside brackets
LARGEST = 2048  # bits of an exact power; a larger one becomes a float
POINTS = 3
TOKEN = r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\.|[A-Za-zΑ-ω]+|\*\*|\S"
NO_MEANING = {
    "\\left",
    "\\right",
    "\\displaystyle",
    "\\quad",
    "\\qquad",
    "\\,",
    "\\;",
    "\\:",
    "\\!",
    "\\ ",
    "~",
}
SAME_TOKEN = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\times": "*",
    "\\cdot": "*",
    "×": "*",
    "·": "*",
    "⋅": "*",
    "\\div": "/",
    "÷": "/",
    "**": "^",
    "−": "-",
    "√": "\\sqrt",
    "π": "\\pi",
    "\\{": "{",
    "\\}": "}",
}
CLOSING = {"(": ")", "{": "}", "[": "]"}
SUPERSCRIPTS = {"²": 2, "³": 3}
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}


def cotangent(z: complex) -> complex:
    return 1 / cmath.tan(z)


def secant(z: complex) -> complex:
    return 1 / cmath.cos(z)


def cosecant(z: complex) -> complex:
    return 1 / cmath.sin(z)


FUNCTIONS = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": cotangent,
    "sec": secant,
    "csc": cosecant,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": cmath.log10,
}


class NoFormula(ValueError):
    """The text is none."""


def evaluate(text: str) -> list | None:
    """What a formula is worth at each point; None for a text that is none.

    Arithmetic on nothing but numbers is none: `3+4` is a task and not its answer, and `5-10` may be
    a range.

    >>> same_values(evaluate("2(x+1)^2"), evaluate("2x^2 + 4x + 2"))
    True
    >>> same_values(evaluate("x+1"), evaluate("x-1"))
    False
    >>> same_values(evaluate("\\\\frac{\\\\sqrt{12}}{2}"), evaluate("sqrt(3)"))
    True
    >>> evaluate("3+4"), evaluate("the heart")
    (None, None)
    """
    if len(text) > LONGEST:
        return None
    try:
        return Reader(text).whole()
    except (ValueError, ArithmeticError):  # no formula; a division by zero, a float that overflows
        return None


def same_values(first: list, second: list) -> bool:
    """Whether two formulas are worth the same at each point: exactly where both are fractions, else
    to 1e-9."""
    for one, other in zip(first, second):
        if isinstance(one, Fraction) and isinstance(other, Fraction):
            if one != other:
                return False
        elif not close(one, other):
            return False
    return True


def close(one, other) -> bool:
    """Whether two numbers agree to 1e-9."""
    try:
        return cmath.isclose(complex(one), complex(other), rel_tol=1e-9, abs_tol=1e-12)
    except OverflowError:  # a fraction too large for a float
        return False


def value_at(name: str, point: int) -> Fraction:
    """The value that a variable has at a point: drawn by its name, below zero at one of the
    points."""
    size = Fraction(zlib.crc32(f"{name} at {point}".encode()) % 99_989 + 1, 40_009)
    return -size if point == zlib.crc32(name.encode()) % POINTS else size


def power(base, exponent):
    """base^exponent: exact where both allow it, else a complex float."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = base.numerator.bit_length() + base.denominator.bit_length()
        if bits * abs(exponent.numerator) <= LARGEST:
            return base**exponent.numerator
    return complex(base) ** complex(exponent)


def root(base, degree):
    """The degree-th root. An odd root of a real number below zero is real."""
    base = complex(base)
    degree = complex(degree)
    if base.imag == 0 and base.real < 0 and degree.imag == 0 and degree.real % 2 == 1:
        return -((-base) ** (1 / degree))
    return base ** (1 / degree)


class Reader:
    """A recursive descent over the tokens of one formula.

    sum      product (('+' | '-') product)*
    product  signed (('*' | '/' | nothing, before a name, a command or a bracket) signed)*
    signed   ('+' | '-')* powered
    powered  atom ('^' exponent | '!')*
    atom     number | name | bracket | |sum| | \\frac{sum}{sum} | \\sqrt[sum]{sum}
             | function argument
    """

    def __init__(self, text: str) -> None:
        tokens = [SAME_TOKEN.get(token, token) for token in re.findall(TOKEN, text)]
        self.tokens = [token for token in self.split_words(tokens) if token not in NO_MEANING]
        self.at = 0
        self.depth = 0
        self.arithmetic_only = True

    def split_words(self, tokens: list[str]):
        """Letters that stand together are a product of names, unless they are a function's name."""
        short = len(tokens) > 1
        for token in tokens:
            if not token.isalpha() or token in FUNCTIONS or token in ("sqrt", "pi"):
                yield token
            elif len(token) == 1 or (short and len(token) == 2):
                yield from token
            else:
                raise NoFormula(f"{token!r} is a word")

    def whole(self) -> list:
        value = self.sum()
        if self.peek() or self.arithmetic_only:
            raise NoFormula("something is left unread, or nothing but numbers was there")
        return value

    def peek(self) -> str:
        """The next token, "" at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        """The next token, which must be the wanted one, if any."""
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise NoFormula(f"{wanted or 'more'} is missing")
        self.at += 1
        return token

    def sum(self) -> list:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NoFormula("too many brackets")
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = [one + sign * other for one, other in zip(value, self.product())]
        self.depth -= 1
        return value

    def product(self) -> list:
        value = self.signed()
        while True:
            token = self.peek()
            if token == "/":
                self.take()
                value = [one / other for one, other in zip(value, self.signed())]
            elif token == "*" or self.starts_factor(token):
                if token == "*":
                    self.take()
                value = [one * other for one, other in zip(value, self.signed())]
            else:
                return value

    def starts_factor(self, token: str) -> bool:
        """Whether a token after a factor begins another one: not a number, since `x 2` may be
        x_2."""
        return token.isalpha() or token in ("(", "{") or token.startswith("\\")

    def signed(self) -> list:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= 1 if self.take() == "+" else -1
        value = self.powered()
        return value if sign > 0 else [-one for one in value]

    def powered(self) -> list:
        value = self.atom()
        while self.peek() in ("^", "!") or self.peek() in SUPERSCRIPTS:
            self.arithmetic_only = False
            token = self.take()
            if token == "!":
                value = [self.factorial(one) for one in value]
            else:
                exponent = (
                    self.exponent() if token == "^" else [Fraction(SUPERSCRIPTS[token])] * POINTS
                )
                value = [power(one, other) for one, other in zip(value, exponent)]
        return value

    def exponent(self) -> list:
        """With a power of its own: 2^3^2 is 2^9."""
        sign = 1
        if self.peek() == "-":
            self.take()
            sign = -1
        value = self.argument()
        if self.peek() == "^":
            self.take()
            value = [power(one, other) for one, other in zip(value, self.exponent())]
        return [sign * one for one in value]

    def factorial(self, value):
        if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 100:
            raise NoFormula("no factorial of this")
        return Fraction(math.factorial(value.numerator))

    def atom(self) -> list:
        token = self.take()
        if token[0].isdecimal() or token[0] == ".":
            if self.peek()[:1].isdecimal() or self.peek().startswith("."):
                raise NoFormula("two numbers stand side by side")
            return [Fraction(token)] * POINTS
        if token in CLOSING:
            value = self.sum()
            self.take(CLOSING[token])
            return value
        if token == "|":
            value = self.sum()
            self.take("|")
            self.arithmetic_only = False
            return [abs(one) for one in value]
        if token == "\\frac":
            self.split_digit()
            above = self.argument()
            self.split_digit()
            below = self.argument()
            return [one / other for one, other in zip(above, below)]
        return self.named(token)

    def split_digit(self) -> None:
        """LaTeX's \\frac takes one digit, or one bracket: `\\frac12` is a half."""
        token = self.peek()
        if len(token) > 1 and token.isdecimal():
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]

    def argument(self) -> list:
        """What a command takes: a bracket, or one token."""
        if self.peek()[:1].isdecimal():
            return [Fraction(self.take())] * POINTS
        self.depth += 1  # exponents and roots nest without a bracket
        if self.depth > DEEPEST:
            raise NoFormula("too many levels")
        value = self.atom()
        self.depth -= 1
        return value

    def named(self, token: str) -> list:
        """A root, a function, a constant or a variable."""
        name = token.removeprefix("\\")
        if not name.isalpha():
            raise NoFormula(f"{token!r} has no place here")
        self.arithmetic_only = False
        if name == "sqrt":
            degree = [Fraction(2)] * POINTS
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return [root(one, other) for one, other in zip(self.argument(), degree)]
        if name in FUNCTIONS:
            return self.function(name)
        if self.peek() == "_":
            self.take()
            name = f"{name}_{self.subscript()}"
        elif self.peek()[:1].isdecimal():
            raise NoFormula("a number follows a name")
        if name in CONSTANTS:
            return [CONSTANTS[name]] * POINTS
        return [value_at(name, point) for point in range(POINTS)]

    def subscript(self) -> str:
        """The text of a subscript."""
        if self.peek() != "{":
            return self.take()
        self.take()
        text = ""
        while self.peek() != "}":
            text += self.take()
        self.take()
        return text

    def function(self, name: str) -> list:
        """f(z), f z, f^2 z, \\log_b z. Without brackets the argument is one product of atoms: sin
        2x is sin(2x)."""
        exponent = base = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                exponent = self.exponent()
            else:
                base = self.argument()
        bracketed = self.peek() in ("(", "{")
        value = self.argument() if bracketed else self.plain_argument()
        value = [FUNCTIONS[name](complex(one)) for one in value]
        if base:
            bases = [FUNCTIONS[name](complex(one)) for one in base]
            value = [one / other for one, other in zip(value, bases)]
        if exponent:
            value = [power(one, other) for one, other in zip(value, exponent)]
        return value

    def plain_argument(self) -> list:
        """An argument without brackets: numbers, names, fractions and roots side by side, up to a
        function or an operator."""
        value = self.powered()
        while (
            self.starts_factor(self.peek())
            and self.peek().removeprefix("\\") not in FUNCTIONS
            and self.peek() != "("
        ):
            value = [one * other for one, other in zip(value, self.powered())]
        return value
