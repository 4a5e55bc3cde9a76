"""Text to tokens, and chat templates: programs that come with a model, and are run with care."""

import datetime
import functools
import re
import threading

from engine.errors import UserError

# Text ---------------------------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # the response's own: some models' tokens
CONTROL_NAME = re.compile(r"<\|.*\|>")  # <|fim_prefix|>: an ordinary token to Qwen's tokenizer
CUT = "\ud800"  # half of a surrogate pair: in no text that has tokens


def check_text(text: str) -> str:
    """`text` as it is; ValueError if it holds half a surrogate pair: legal JSON, but it has no
    tokens and no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"the text holds {half!a}, half of a surrogate pair: no UTF-8") from None
    return text


def token_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text, with nothing added. Control tokens that are written out in it become
    tokens: for text from outside take `text_ids`."""
    try:
        return tokenizer(check_text(text), add_special_tokens=False)["input_ids"]
    except ValueError as error:
        raise UserError(f"cannot tokenise: {error}") from None


@functools.lru_cache(maxsize=8)  # asked for with every text; some tokenizers have thousands
def control_tokens(tokenizer, size: int) -> dict[str, int]:
    """{name: id} of the tokens that steer a model and stand for no text: end of turn, padding, ..

    `size` is len(tokenizer), so that a token that is added later is seen.
    """
    control = {}
    for token, added in tokenizer.added_tokens_decoder.items():
        name = added.content
        if name not in TAGS and (added.special or CONTROL_NAME.fullmatch(name)):
            control[name] = token
    return control


def text_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text that comes from outside: a question, a trace. The name of a control
    token in it is text: a trace with "<|im_end|>" in it must not teach an end in mid-response."""
    return prompt_tokens(tokenizer, text, text)


def prompt_tokens(tokenizer, prompt: str, text: str) -> list[int]:
    """The tokens of a prompt that holds `text`, which comes from outside. Control tokens in the
    rest, the chat template's own, stay tokens: a question cannot close its own turn."""
    if CUT in text:
        return token_ids(tokenizer, text)  # which refuses it
    # Cut in two, a name is no token any more.
    cut = text
    for name in control_tokens(tokenizer, len(tokenizer)):
        cut = cut.replace(name, name[0] + CUT + name[1:])
    ids = []
    for piece in prompt.replace(text, cut).split(CUT):
        ids += token_ids(tokenizer, piece)
    return ids


# Chat templates -----------------------------------------------------------------------------------


def chat_text(tokenizer, message: str, seconds: float = 10.0, reply: str | None = None) -> str:
    """One user turn in the tokenizer's chat template, up to where the answer begins; with a
    `reply`, that one too, and whatever the template puts after it."""
    turns = [{"role": "user", "content": message}]
    if reply is not None:
        turns.append({"role": "assistant", "content": reply})
    result = {"problem": f"takes more than {seconds:g} seconds for one question"}

    def render():
        try:
            day = getattr(tokenizer, "date", datetime.date.today())
            result["text"] = tokenizer.apply_chat_template(
                turns,
                chat_template=at_date(tokenizer.get_chat_template(), day),
                add_generation_prompt=reply is None,
                tokenize=False,
            )
            result["problem"] = "leaves the question out"
        except Exception as error:  # Jinja's own, and whatever Python raises inside a template
            result["problem"] = f"fails: {type(error).__name__}: {error}"

    # transformers runs a template in Jinja's sandbox, where it can reach neither Python nor files.
    # But it may never end: a thread can be left behind.
    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(seconds)
    if message.strip() in result.get("text", ()):
        return result["text"]
    raise UserError(
        f"the tokenizer's chat template {result['problem']}. Mend or remove chat_template in the "
        "model's folder"
    )


def set_date(tokenizer, date: str | None) -> None:
    """The day (ISO; None: today) that a template is told that asks for it: the same in all prompts
    of a run."""
    try:
        tokenizer.date = datetime.date.fromisoformat(date or str(datetime.date.today()))
    except (TypeError, ValueError):
        raise UserError(f"the date must be written YYYY-MM-DD, not {date!r}") from None


def at_date(template: str, day: datetime.date) -> str:
    """A chat template in which strftime_now, transformers' clock, stands still: it takes no clock
    of ours, since functions that are handed to a template become text."""

    def told(call: re.Match) -> str:
        return repr(day.strftime(call[2]))

    return re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", told, template)


@functools.lru_cache(maxsize=8)  # asked for with every response, and templates are slow
def end_of_turn(tokenizer, template: str) -> int | None:
    """The special token that the chat template puts right after the assistant's message."""
    reply = "the reply"
    text = chat_text(tokenizer, "the question", reply=reply) if template else ""
    first = token_ids(tokenizer, text.rpartition(reply)[2].lstrip())[:1]
    control = control_tokens(tokenizer, len(tokenizer)).values()
    return next((token for token in first if token in control), None)


@functools.lru_cache(maxsize=8)
def opening(tokenizer, template: str) -> str:
    """What the chat template writes of the answer itself, at the end of its prompt: "<think>" and
    a newline, "<think>" or nothing."""
    prompt = chat_text(tokenizer, "the question") if template else ""
    opened = re.search(r"<think>[^\S\n]*(\n?)\s*\Z", prompt)
    return opened.expand(r"<think>\1") if opened else ""


def without_closed_block(prompt: str) -> str:
    """The prompt of a chat template that says "do not think": it ends in an empty <think> block,
    already closed. Here thinking is asked for, and the response opens its own.

    >>> without_closed_block("assistant\\n<think>\\n\\n</think>\\n\\n")
    'assistant\\n'
    """
    return re.sub(r"<think>\s*</think>\s*\Z", "", prompt)
