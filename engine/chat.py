"""Text to tokens, and chat templates: programs that come with a model, and are run with care."""

import datetime
import functools
import re
import threading

from engine.errors import UserError


def check_text(text: str) -> str:
    """`text` as it is; ValueError if it holds half a surrogate pair: legal JSON, but no text that has tokens or bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds {text[error.start]!a}, half of a surrogate pair, which no UTF-8 can say") from None
    return text


def chat_text(tokenizer, message: str, seconds: float = 10.0, reply: str | None = None) -> str:
    """One user turn in the tokenizer's chat template, up to where the answer begins; with a `reply`, that one too, and
    whatever the template puts after it.
    transformers runs a template in Jinja's sandbox, where it can reach neither Python nor files; but it may fail, drop the
    question, or never end, so it has `seconds` in a thread of its own.
    """
    turns, found = [{"role": "user", "content": message}], {}
    turns += [{"role": "assistant", "content": reply}] if reply is not None else []

    def render():
        try:
            template = at_date(tokenizer.get_chat_template(), getattr(tokenizer, "date", datetime.date.today()))
            how = {"chat_template": template, "add_generation_prompt": reply is None, "tokenize": False}
            found["text"] = tokenizer.apply_chat_template(turns, **how)
        except Exception as error:  # Jinja's own, and whatever Python raises inside a template
            found["error"] = error

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        problem = f"takes more than {seconds:g} seconds for one question"
    elif "error" in found:
        problem = f"fails: {type(found['error']).__name__}: {found['error']}"
    elif message.strip() in found["text"]:
        return found["text"]
    else:
        problem = "leaves the question out"
    raise UserError(f"the tokenizer's chat template {problem}. Mend or remove chat_template in the model's folder")


def set_date(tokenizer, date: str | None) -> None:
    """The day (ISO; None: today) that `chat_text` tells a template that asks for it: the same in all prompts of a run."""
    try:
        tokenizer.date = datetime.date.fromisoformat(date) if date else datetime.date.today()
    except (TypeError, ValueError):
        raise UserError(f"the date must be written YYYY-MM-DD, not {date!r}") from None


def at_date(template: str, day: datetime.date) -> str:
    """A chat template in which strftime_now, transformers' clock, stands still. (It takes no clock of ours: functions that
    are handed to a template become text.)"""
    return re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", lambda m: repr(day.strftime(m[2])), template)


def token_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text, with nothing added."""
    try:
        return tokenizer(check_text(text), add_special_tokens=False)["input_ids"]
    except ValueError as error:
        raise UserError(f"cannot tokenise: {error}") from None


@functools.lru_cache(maxsize=8)  # asked for with every response; a template is no fast program
def end_of_turn(tokenizer, template: str) -> int | None:
    """The special token that the chat template puts right after the assistant's message; None if there is none."""
    reply = "the reply"
    after = chat_text(tokenizer, "the question", reply=reply).rpartition(reply)[2].lstrip() if template else ""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in token_ids(tokenizer, after)[:1] if token in special), None)
