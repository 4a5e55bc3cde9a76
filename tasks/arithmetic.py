"""Arithmetic as it stands in a text: its numbers, its written calculations, their exact values.

    Natalia sold 48/2 = $24.50 on May 3rd.     numbers 48, 2, 24.50 and 3
                 ^^^^   ^^^^^                  a calculation: an expression, and its result

Nothing is handed to Python's eval, and everything takes linear time: a text may be anybody's.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MOST_DIGITS = 15  # of a number that is read
MOST_TOKENS = 40  # of an expression that is evaluated; both keep exact fractions small

TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?P<percent> ?%)?)"
    r"|(?P<sign>[-+*/×÷−–()=xX])"
    r"|(?P<gap>[ \t$€£]+)"
    r"|(?P<word>[^-0-9.+*/×÷−–()= \t$€£]+|.)",
    re.DOTALL,
)
# other spellings of an operator
SIGNS = {"×": "*", "÷": "/", "−": "-", "–": "-", "x": "*", "X": "*"}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class Token(NamedTuple):
    """A number, an operator, a parenthesis, an equals sign, or a word (anything else) of a text."""

    start: int  # its first character; of a number the first digit, behind a currency sign
    end: int  # behind its last character; of a number behind its last digit, before a percent sign
    text: str
    kind: str  # "number", "word", or one of + - * / ( ) =
    value: Fraction | None = None  # of a number; 50% is 1/2
    percent: bool = False  # whether a percent sign follows

    def amount(self, value: Fraction) -> Fraction:
        """What has to be written before the percent sign, if there is one, to say `value`."""
        return value * 100 if self.percent else value


class Calculation(NamedTuple):
    """`expression = result`. In GSM8K's own marks the tokens' places are those in the mark, not in
    the trace."""

    expression: tuple[Token, ...]
    result: Token

    @property
    def holds(self) -> bool:
        """Whether it is true."""
        return evaluate(self.expression) == self.result.value


# 1. Reading ---------------------------------------------------------------------------------------
# -------------------


def read_tokens(text: str) -> list[Token]:
    """Numbers, signs and words of a text in their order; spaces and currency signs are left out,
    line ends are words.

    >>> [token.text for token in read_tokens("2 x $1,200.50 = all")]
    ['2', 'x', '1,200.50', '=', 'all']
    """
    tokens = []
    for match in TOKEN.finditer(text):
        kind, written = match.lastgroup, match.group()
        if match["number"] is not None:
            tokens.append(number_token(match))
        elif kind == "sign":
            tokens.append(Token(match.start(), match.end(), written, SIGNS.get(written, written)))
        elif kind == "word":
            tokens.append(Token(match.start(), match.end(), written, "word"))
    return [as_word(tokens, i) if is_letter_x(tokens, i) else tokens[i] for i in range(len(tokens))]


def number_token(match: re.Match) -> Token:
    """The number that a match of TOKEN holds. One with too many digits is a word: nobody calculates
    with it."""
    percent = match["percent"] or ""
    digits = match["number"].removesuffix(percent)
    end = match.start() + len(digits)
    if len(digits) > MOST_DIGITS:
        return Token(match.start(), end, digits, "word")
    value = Fraction(digits.replace(",", ""))
    if percent:
        value = value / 100
    return Token(match.start(), end, digits, "number", value, bool(percent))


def is_letter_x(tokens: list[Token], i: int) -> bool:
    """Whether token i is an 'x' that does not stand between two factors, as in 'x = 3' or 'tax'."""
    if tokens[i].text not in ("x", "X"):
        return False
    before = tokens[i - 1].kind if i > 0 else "word"
    after = tokens[i + 1].kind if i + 1 < len(tokens) else "word"
    return not (before in ("number", ")") and after in ("number", "("))


def as_word(tokens: list[Token], i: int) -> Token:
    """Token i as a word."""
    return Token(tokens[i].start, tokens[i].end, tokens[i].text, "word")


def chains(tokens: list[Token]) -> list[list[list[Token]]]:
    """What is written with equals signs between: for each such chain its parts, each a list of
    tokens.

    >>> written = chains(read_tokens("so 1+2 = 3 and x = 4*2 = 8"))
    >>> [[part[0].text for part in chain] for chain in written]
    [['1', '3'], ['4', '8']]
    """
    found: list[list[list[Token]]] = []
    chain: list[list[Token]] = [[]]
    for token in [
        *tokens,
        Token(0, 0, "", "word"),
    ]:  # a word at the end, which closes the last chain
        part = chain[-1]
        if token.kind == "=":
            chain.append([])
        elif token.kind == "word":
            found.append(chain)
            chain = [[]]
        elif token.kind == "number" and part and part[-1].kind in ("number", ")"):
            found.append(chain)  # a number right behind a number: a new expression begins
            chain = [[token]]
        else:
            part.append(token)
    trimmed = ([trim(part) for part in chain] for chain in found if len(chain) > 1)
    return [[part for part in chain if part] for chain in trimmed]


def trim(part: list[Token]) -> list[Token]:
    """An expression without what does not belong to it: a dash before it, an operator behind it, an
    open parenthesis."""
    if len(part) > MOST_TOKENS:
        return part  # `evaluate` refuses it
    open_count = sum(token.kind == "(" for token in part) - sum(token.kind == ")" for token in part)
    start = 0
    end = len(part)
    while start < end:
        if part[start].kind in PRECEDENCE or part[start].kind == ")":
            open_count += part[start].kind == ")"
        elif part[start].kind == "(" and open_count > 0:
            open_count -= 1
        else:
            break
        start += 1
    while start < end:
        if part[end - 1].kind in PRECEDENCE or part[end - 1].kind == "(":
            open_count -= part[end - 1].kind == "("
        elif part[end - 1].kind == ")" and open_count < 0:
            open_count += 1
        else:
            break
        end -= 1
    return part[start:end]


def is_expression(part: list[Token]) -> bool:
    """Whether an operator stands in it: a lone number calculates nothing."""
    return any(token.kind in PRECEDENCE for token in part)


def read_calculations(tokens: list[Token]) -> tuple[list[Calculation], list[Token]]:
    """(the calculations `expression = number` of a text, the numbers of all other chains that
    calculate something).

    >>> calculations, others = read_calculations(read_tokens("48/2 = $24, and 2*3+4 = 6+4 = 10"))
    >>> [(one.result.text, one.holds) for one in calculations], [number.text for number in others]
    ([('24', True)], ['2', '3', '4', '6', '4', '10'])
    """
    calculations = []
    others = []
    for chain in chains(tokens):
        if not any(is_expression(part) for part in chain):
            continue  # x = 24
        if len(chain) == 2 and len(chain[1]) == 1 and evaluate(chain[0]) is not None:
            calculations.append(Calculation(tuple(chain[0]), chain[1][0]))
        else:
            others += [token for part in chain for token in part if token.kind == "number"]
    return calculations, others


# 2. Evaluating ------------------------------------------------------------------------------------
# -------------------


def evaluate(expression, values: dict[int, Fraction] | None = None) -> Fraction | None:
    """The exact value of an expression; None if it is none, is too long, or divides by zero.

    values: {index in the expression: another value for the number there}. Operators wait on a stack
    until one that binds less closely comes (Dijkstra's shunting yard), so that no nesting is too
    deep.

    >>> texts = ("10-2+3", "2*(3+4)", "50% x 12", "1/0", "2+")
    >>> [str(evaluate(read_tokens(text))) for text in texts]
    ['11', '14', '6', 'None', 'None']
    """
    values = values or {}
    operands: list[Fraction] = []
    waiting: list[str] = []
    operand_next = True  # an operand or '(' has to come next, not an operator or ')'
    if len(expression) > MOST_TOKENS:
        return None
    for i, token in enumerate(expression):
        if (token.kind in ("number", "(")) != operand_next or token.kind in ("word", "="):
            return None
        if token.kind == "number":
            operands.append(values.get(i, token.value))
            operand_next = False
        elif token.kind == "(":
            waiting.append("(")
        elif token.kind == ")":
            while waiting and waiting[-1] != "(":
                if not apply(waiting.pop(), operands):
                    return None
            if not waiting:
                return None  # nothing has opened it
            waiting.pop()
        else:
            while waiting and PRECEDENCE.get(waiting[-1], 0) >= PRECEDENCE[token.kind]:
                if not apply(waiting.pop(), operands):
                    return None
            waiting.append(token.kind)
            operand_next = True
    if operand_next:
        return None  # it ends with an operator
    while waiting:
        if not apply(waiting.pop(), operands):
            return None
    return operands[0]


def apply(operator: str, operands: list[Fraction]) -> bool:
    """Put the result of the last two operands in their place; False if there is none."""
    if operator == "(":
        return False  # nothing has closed it
    right = operands.pop()
    left = operands.pop()
    if operator == "/" and right == 0:
        return False
    if operator == "+":
        operands.append(left + right)
    elif operator == "-":
        operands.append(left - right)
    elif operator == "*":
        operands.append(left * right)
    else:
        operands.append(left / right)
    return True


# 3. Writing ---------------------------------------------------------------------------------------
# -------------------


def decimals_of(value: Fraction, most: int) -> int | None:
    """How many decimals write `value` exactly; None if that takes more than `most`.

    >>> decimals_of(Fraction(5, 4), 3), decimals_of(Fraction(1, 3), 3)
    (2, None)
    """
    for count in range(most + 1):
        if (value * 10**count).denominator == 1:
            return count
    return None


def write_number(value: Fraction, like: str, commas: bool = False) -> str | None:
    """`value` as `like` is written: its commas, its cents, its leading point. None if it takes more
    than 10 decimals.

    commas: whether the text groups digits, for where `like` is too short to tell.

    >>> pairs = (("2400", "1,200"), ("3.5", "1.50"), ("1/4", ".5"))
    >>> [write_number(Fraction(value), like) for value, like in pairs]
    ['2,400', '3.50', '.25']
    """
    count = decimals_of(value, 10)
    if count is None:
        return None
    written_decimals = len(like.partition(".")[2])
    if written_decimals == 2 or like.endswith("0"):  # 1.50: cents, or zeros that somebody cares for
        count = max(count, written_decimals)
    whole, rest = divmod(abs(value) * 10**count, 10**count)
    text = str(whole)
    if "," in like or commas and len(like.partition(".")[0]) < 4:
        text = f"{whole:,}"
    if value < 0:
        text = "-" + text
    if count:
        text += f".{int(rest):0{count}d}"
    return text.removeprefix("0") if like.startswith(".") and text.startswith("0.") else text
