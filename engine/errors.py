"""Bad input: one clear line that says what is wrong and how to mend it, and exit status 2."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input from outside. `exit_status` makes it one line and exit status 2."""


def exit_status(program: Callable[[], object]) -> int:
    """Run a command line's `program`: 0, or 2 after one line that says what was wrong with the
    input.

    What the terminal's encoding lacks (ASCII, Windows code pages) is printed as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have none, and need none
            stream.reconfigure(errors="backslashreplace")
    try:
        program()
        print(end="", flush=True)
    except UserError as error:
        line = " ".join(str(error).splitlines())  # a file's name or content may hold newlines
        print(f"error: {printable(line)}", file=sys.stderr)
        return 2
    except (
        BrokenPipeError
    ):  # `| head` has read enough; the interpreter would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# Control characters but for the newline, and those that turn the direction of writing round: the
# rest of a line could seem another text.
CONTROL = {}
for code in (
    *range(10),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
):
    CONTROL[code] = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def printable(text: str) -> str:
    r"""`text` with its control characters in hex, newlines excepted.

    A trace must not move the cursor, ring, or retitle the window of whoever prints it.

    >>> printable("1\n2\x1b[2J")
    '1\n2\\x1b[2J'
    """
    return text.translate(CONTROL)


def nearest(word: str, choices) -> str:
    """The choice that is most like the word, as a question in brackets; nothing if none is like it.

    >>> nearest("gsm8", ["words", "gsm8k"])
    " (did you mean 'gsm8k'?)"
    """
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with a column for long flags, at most 100 characters wide."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)
        self._width = min(self._width, 100)


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is a UserError, which names the flag nearest to an unknown one."""

    def __init__(self, description: str, usage: str | None = None):
        super().__init__(
            usage=usage, description=description, allow_abbrev=False, formatter_class=Help
        )

    def error(self, message: str):  # argparse's own complaints
        raise UserError(message)

    def parse(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """The arguments (by default the command line's) as a namespace. Raises UserError."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            raise UserError(
                f"unknown flag {name}{nearest(name, self._option_string_actions)}: see --help"
            )
        return known
