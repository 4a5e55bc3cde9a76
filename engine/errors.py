"""Bad input: one clear line that says what is wrong and how to mend it, and exit status 2."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input from outside. `exit_status` makes it one line and exit status 2."""


def exit_status(program: Callable, *arguments) -> int:
    """Run a command line's program(*arguments): 0, or 2 after one line that says what was wrong."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have none, and need none
            # What the terminal's encoding lacks (ASCII, Windows code pages) becomes an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        program(*arguments)
        print(end="", flush=True)
    except UserError as error:
        line = " ".join(str(error).splitlines())  # a file's name or content may hold newlines
        print(f"error: {printable(line)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `| head` has read enough. The interpreter would say so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# Control characters but for the newline, and those that turn the direction of writing round: the
# rest of a line could seem another text.
CONTROL = (
    *range(10),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in CONTROL}


def printable(text: str) -> str:
    r"""`text` with its control characters as escapes, newlines excepted.

    A trace must not move the cursor, ring, or retitle the window of whoever prints it.

    >>> printable("1\n2\x1b[2J")
    '1\n2\\x1b[2J'
    """
    return text.translate(ESCAPES)


def nearest(word: str, choices) -> str:
    """The choice that is most like the word, as a question in brackets; nothing if none is like it.

    >>> nearest("gsm8", ["words", "gsm8k"])
    " (did you mean 'gsm8k'?)"
    """
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is a UserError."""

    def __init__(self, description: str, usage: str | None = None):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage=usage, description=description, allow_abbrev=False, formatter_class=style
        )

    def error(self, message: str):
        raise UserError(f"{message}: see --help")

    parse = argparse.ArgumentParser.parse_args
