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


def token_ids(tokenizer, text: str, **options) -> list[int]:
    """The tokens of a text, with nothing added. Control tokens that are written out in it become tokens: for text from
    outside take `text_ids`."""
    try:
        return tokenizer(check_text(text), add_special_tokens=False, **options)["input_ids"]
    except ValueError as error:
        raise UserError(f"cannot tokenise: {error}") from None


TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # the response's own: tokens, if a model has such
CONTROL_NAME = re.compile(r"<\|.*\|>")  # <|fim_prefix|>: control, though Qwen's tokenizer lists it as ordinary
CUT = "\ud800"  # half of a surrogate pair: stands in no text that has tokens


@functools.lru_cache(maxsize=8)  # asked for with every text; some tokenizers have thousands
def control_tokens(tokenizer, size: int) -> dict[str, int]:
    """{name: id} of the tokens that steer a model and stand for no text: end of turn, end of text, padding. `size` is
    len(tokenizer), so that a token that is added later is seen."""
    found = {}
    for token, added in tokenizer.added_tokens_decoder.items():
        control = added.special or CONTROL_NAME.fullmatch(added.content)
        if control and added.content not in TAGS:
            found[added.content] = token
    return found


def text_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text that comes from outside: a question, a trace. The name of a control token in it is read letter
    by letter, as other text is. A trace with "<|im_end|>" in it must not teach an end in mid-response, a question must
    not close its own turn. UserError if this tokenizer cannot write the name as text."""
    control = control_tokens(tokenizer, len(tokenizer))
    # the unknown token stands for any letter that is not known: no harm in it
    refused = {name: token for name, token in control.items() if token != tokenizer.unk_token_id}
    ids = token_ids(tokenizer, text)
    if set(refused.values()).isdisjoint(ids):
        return ids
    for name in control:  # transformers splits special ones; the others are cut in two behind their "<"
        if CONTROL_NAME.fullmatch(name):
            text = text.replace(name, "<" + CUT + name[1:])
    ids = []
    for piece in text.split(CUT):
        ids += token_ids(tokenizer, piece, split_special_tokens=True)
    for name, token in refused.items():
        if token in ids:
            raise UserError(f"a question or trace holds {name}, a control token that this tokenizer cannot write as text")
    return ids


def prompt_tokens(tokenizer, prompt: str, text: str) -> list[int]:
    """The tokens of a prompt that holds `text`, which comes from outside. Control tokens in the rest, the chat template's
    own, stay tokens."""
    control = control_tokens(tokenizer, len(tokenizer))
    if not any(name in text for name in control):
        return token_ids(tokenizer, prompt)
    first, *others = prompt.split(text)
    ids = token_ids(tokenizer, first)
    for following in others:
        ids += text_ids(tokenizer, text) + token_ids(tokenizer, following)
    return ids


@functools.lru_cache(maxsize=8)  # asked for with every response; a template is no fast program
def end_of_turn(tokenizer, template: str) -> int | None:
    """The special token that the chat template puts right after the assistant's message; None if there is none."""
    reply = "the reply"
    after = chat_text(tokenizer, "the question", reply=reply).rpartition(reply)[2].lstrip() if template else ""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in token_ids(tokenizer, after)[:1] if token in special), None)


@functools.lru_cache(maxsize=8)
def opening(tokenizer, template: str) -> str:
    """What the chat template writes of the answer itself, at the end of its prompt: "<think>\\n", "<think>" or nothing."""
    prompt = chat_text(tokenizer, "the question") if template else ""
    opened = re.search(r"<think>(\s*)\Z", prompt)
    if opened is None:
        return ""
    return "<think>\n" if "\n" in opened[1] else "<think>"


def without_closed_block(prompt: str) -> str:
    """The prompt of a chat template that says "do not think": it ends in an empty <think> block, already closed. Here thinking
    is asked for, so that block is left out, and the response opens its own.

    >>> without_closed_block("assistant\\n<think>\\n\\n</think>\\n\\n")
    'assistant\\n'
    """
    return re.sub(r"<think>\s*</think>\s*\Z", "", prompt)
