"""A trace in the terminal, coloured token by token, and where it goes wrong.

python -m show.trace --run runs/demo --question "..." --trace "..."
"""

import sys
from pathlib import Path

import torch

import data
import reward
from engine import loading
from engine.errors import Parser, UserError, exit_status, printable
from rerank import load_run


def colour(text: str, value: float, scale: float) -> str:
    """`text` on an ANSI background: orange at value = -scale, none at 0, blue at +scale."""
    strength = max(-1.0, min(1.0, value / scale))
    # The report's colours, which a colour-blind reader can tell apart
    full = (58, 134, 226) if strength > 0 else (244, 136, 22)
    red, green, blue = (round(255 + (part - 255) * abs(strength)) for part in full)
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


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="a folder written by train.py")
    parser.add_argument("--question", required=True)
    parser.add_argument("--trace", required=True, help="the reasoning (\\n for a new line)")
    parser.add_argument("--answer", help="the final answer, scored too if given")
    args = parser.parse()
    loading.quiet()
    discriminator, tokenizer, _ = load_run(Path(args.run))
    response = args.trace.replace("\\n", "\n")
    # A whole response may be given, too.
    if "<think>" not in response:
        response = data.response_text(response, args.answer or "")
    if not args.answer:
        response = response.removesuffix("<answer></answer>")
    scored = token_scores(discriminator.reward_model, tokenizer, args.question, response)
    print(show(scored, discriminator.reward_model.scores_all_actions))


if __name__ == "__main__":
    sys.exit(exit_status(main))
