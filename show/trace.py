"""A trace in the terminal, coloured token by token, and where it goes wrong.

    python -m show.trace --run runs/demo --question "..." --trace "..."

`--svg FILE` draws it, too; several `--trace` stand side by side there, as in docs/trace.svg.
"""

import sys
from html import escape
from pathlib import Path

import torch

import data
import reward
from engine import loading
from engine.errors import Parser, UserError, exit_status, printable
from rerank import load_run


def shade(value: float, scale: float) -> list[int]:
    """Red, green, blue: orange at value = -scale, white at 0, blue at +scale."""
    strength = max(-1.0, min(1.0, value / scale))
    # The report's colours, which a colour-blind reader can tell apart
    full = (58, 134, 226) if strength > 0 else (244, 136, 22)
    return [round(255 + (part - 255) * abs(strength)) for part in full]


def colour(text: str, value: float, scale: float) -> str:
    """`text` on an ANSI background of its shade."""
    red, green, blue = shade(value, scale)
    visible = printable(text).replace("\n", "⏎\n")
    return f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;0;0;0m{visible}\x1b[0m"


def token_scores(reward_model, tokenizer, question: str, response: str) -> list[tuple[str, float]]:
    """(token, f) for each token of a response text. Needs no policy: f is the trace's own."""
    prompt = data.prompt_ids(tokenizer, question)
    ids = data.response_ids(tokenizer, response)[:-1]  # without the end token
    if tokenizer.unk_token_id in prompt + ids and tokenizer.unk_token_id != tokenizer.eos_token_id:
        raise UserError(
            "the question or trace holds something this model's vocabulary lacks; it knows the "
            "words of `python data.py`'s problems, digits, + - * / = and newlines"
        )
    length = len(prompt) + len(ids)
    context = loading.context_length(reward_model.model)
    if not ids or length > context:
        raise UserError(
            f"the trace must have from 1 token to as many as the model's context of {context} "
            f"holds; with its question it is {length} tokens long"
        )
    batch = data.make_batch([prompt], [ids], reward_model.model.device)
    with torch.no_grad():
        scores = reward_model.scores(batch)[0, len(prompt) :].tolist()
    return [(tokenizer.decode([token]), score) for token, score in zip(ids, scores)]


def show(scored: list[tuple[str, float]], likelihood: bool = True) -> str:
    """The trace in colours, and where it goes wrong by this reward."""
    tokens, values = zip(*scored)
    scale = max(1.0, *(abs(value) for value in values))
    coloured = "".join(colour(token, value, scale) for token, value in scored)
    # The lowest may be a later token, which does not fit the error: of a likelihood the first
    # suspicious one is named. A head knows no such bound.
    suspicious = [i for i, value in enumerate(values) if likelihood and value < reward.SUSPICIOUS]
    place = suspicious[0] if suspicious else values.index(min(values))
    verdict = "nothing suspicious; lowest"
    if suspicious or not likelihood:
        verdict = "most suspicious"
    return (
        f"{coloured}\n\n{verdict}: token {place + 1} of {len(scored)}, {tokens[place]!r} after "
        f"{''.join(tokens[:place])[-30:]!r}, f = {values[place]:.2f} (mean of the trace "
        f"{sum(values) / len(values):.2f})"
    )


CELL = 9.6  # width of a letter of 16 pixels in a monospaced font
LINE = 30  # height of a line


def picture(question: str, traces: list[list[tuple[str, float]]]) -> str:
    """An SVG of traces side by side, each a list of (token, f), below their question."""
    scale = max(1.0, *(abs(value) for scored in traces for _, value in scored))
    shapes = [f'<text x="16" y="{LINE}" fill="#5b6676">{escape(printable(question))}</text>']
    left = 16.0
    bottom = 0.0
    for scored in traces:
        x = left
        y = 2.2 * LINE
        for token, value in scored:
            shown = printable(token).replace("\n", "⏎")
            width = CELL * len(shown)
            fill = "rgb({}, {}, {})".format(*shade(value, scale))
            shapes.append(f'<rect x="{x}" y="{y - 18}" width="{width}" height="24" fill="{fill}"/>')
            shapes.append(f'<text x="{x}" y="{y}" textLength="{width}">{escape(shown)}</text>')
            x += width
            if "\n" in token:
                x = left
                y += LINE
        bottom = max(bottom, y)
        left += 330
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 40}" height="{bottom + 20}" '
        'font-family="monospace" font-size="16" fill="#1b2230" xml:space="preserve">'
        f'<rect width="100%" height="100%" rx="8" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="a folder written by train.py")
    parser.add_argument("--question", required=True)
    parser.add_argument(
        "--trace", required=True, action="append", help="the reasoning (\\n for a new line)"
    )
    parser.add_argument("--answer", help="the final answer, scored too if given")
    parser.add_argument("--svg", help="a file to draw the traces in, side by side")
    args = parser.parse()
    loading.quiet()
    discriminator, tokenizer, _ = load_run(Path(args.run))
    traces = []
    for trace in args.trace:
        response = trace.replace("\\n", "\n")
        # A whole response may be given, too.
        if "<think>" not in response:
            response = data.response_text(response, args.answer or "")
        if not args.answer:
            response = response.removesuffix("<answer></answer>")
        scored = token_scores(discriminator.reward_model, tokenizer, args.question, response)
        print(show(scored, discriminator.reward_model.scores_all_actions))
        traces.append(scored)
    if args.svg:
        try:
            Path(args.svg).write_text(picture(args.question, traces), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.svg}: {error}") from None


if __name__ == "__main__":
    sys.exit(exit_status(main))
