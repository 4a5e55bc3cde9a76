"""A trace in the terminal, coloured token by token, and where it goes wrong.

python -m show.trace --run runs/demo --question "..." --trace "..."
"""

import sys
from pathlib import Path

import torch

import data
import reward
from engine import loading
from engine.chat import token_ids
from engine.errors import Parser, UserError, exit_status, printable
from rerank import load_run


def colour(text: str, value: float, scale: float) -> str:
    """`text` on an ANSI background from red (value = -scale) over none (0) to green (+scale)."""
    strength = 0.0
    if scale > 0:
        strength = max(-1.0, min(1.0, value / scale))
    faded = int(255 * (1 - abs(strength)))
    background = f"255;{faded};{faded}" if strength < 0 else f"{faded};255;{faded}"
    visible = printable(text).replace("\n", "⏎\n")
    return f"\x1b[48;2;{background}m\x1b[38;2;0;0;0m{visible}\x1b[0m"


def token_scores(reward_model, tokenizer, question: str, response: str) -> list[tuple[str, float]]:
    """(token, f) for each token of a response text, in order.

    Needs no policy: f is a property of the trace.
    """
    prompt = data.prompt_ids(tokenizer, question)
    ids = token_ids(tokenizer, response)
    unknown = tokenizer.unk_token_id
    if unknown in prompt + ids and unknown != tokenizer.eos_token_id:
        raise UserError(
            "the question or trace holds something this model's vocabulary lacks; it knows the "
            "words of `python data.py`'s problems, digits, + - * / = and newlines"
        )
    if not ids:
        raise UserError("the trace is empty")
    length = len(prompt) + len(ids)
    context = loading.context_length(reward_model.model)
    if length > context:
        raise UserError(f"question and trace are {length} tokens, the model's context is {context}")
    batch = data.make_batch([prompt], [ids], reward_model.model.device)
    with torch.no_grad():
        scores = reward_model.scores(batch)[0, len(prompt) :].tolist()
    return [(tokenizer.decode([token]), score) for token, score in zip(ids, scores)]


def show(scored: list[tuple[str, float]], likelihood: bool = True) -> str:
    """The trace in colours, and the token where it goes wrong by this reward.

    For a likelihood that is the first token below reward.SUSPICIOUS: the lowest may be a later one,
    which does not fit the error. If there is none, or the reward is a head, which knows no such
    bound, it is the lowest.
    """
    tokens, values = zip(*scored)
    scale = max(1.0, *map(abs, values))
    place = values.index(min(values))
    verdict = "most suspicious"
    if likelihood:
        suspicious = [i for i, f in enumerate(values) if f < reward.SUSPICIOUS]
        if suspicious:
            place = suspicious[0]
        else:
            verdict = "nothing suspicious; lowest"
    coloured = "".join(colour(token, f, scale) for token, f in scored)
    before = "".join(tokens[:place])[-30:]
    return (
        f"{coloured}\n\n{verdict}: token {place + 1} of {len(scored)}, {tokens[place]!r} after "
        f"{before!r}, f = {values[place]:.2f} (mean of the trace {sum(values) / len(values):.2f})"
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="a folder written by train.py")
    parser.add_argument("--question", required=True)
    parser.add_argument(
        "--trace",
        required=True,
        help="the reasoning (\\n for a new line), or a whole response with its tags",
    )
    parser.add_argument("--answer", help="the final answer, scored too if given")
    args = parser.parse()
    loading.quiet()
    discriminator, tokenizer, _ = load_run(Path(args.run))
    trace = args.trace.replace("\\n", "\n")
    if "<think>" not in trace:
        trace = data.response_text(trace, args.answer or "")
        if not args.answer:
            trace = trace[: trace.index("<answer>")]
    scored = token_scores(discriminator.reward_model, tokenizer, args.question, trace)
    print(show(scored, discriminator.reward_model.scores_all_actions))


if __name__ == "__main__":
    sys.exit(exit_status(main))
