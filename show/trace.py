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
    """`text` on an ANSI background from red (value = -scale) over none (0) to green (+scale)."""
    strength = max(-1.0, min(1.0, value / scale)) if scale > 0 else 0.0
    faded = int(255 * (1 - abs(strength)))
    red, green = (255, faded) if strength < 0 else (faded, 255)
    visible = printable(text).replace("\n", "⏎\n")
    return f"\x1b[48;2;{red};{green};{faded}m\x1b[38;2;0;0;0m{visible}\x1b[0m"


def token_scores(reward_model, tokenizer, question: str, response: str) -> list[tuple[str, float]]:
    """(token, f) for each token of a response text, in order. Needs no policy: f is a property of the trace."""
    prompt = data.prompt_ids(tokenizer, question)
    ids = data.response_ids(tokenizer, response)[:-1]  # without the end token
    if tokenizer.unk_token_id in prompt + ids and tokenizer.unk_token_id != tokenizer.eos_token_id:
        raise UserError("the question or trace holds something this model's vocabulary lacks; it knows the words of "
                        "`python data.py`'s problems, digits, + - * / = and newlines")  # fmt: skip
    if not ids:
        raise UserError("the trace is empty")
    context = loading.context_length(reward_model.model)
    if len(prompt) + len(ids) > context:
        raise UserError(f"question and trace are {len(prompt) + len(ids)} tokens, the model's context is {context}")
    batch = data.make_batch([prompt], [ids], reward_model.model.device)
    with torch.no_grad():
        scores = reward_model.scores(batch)[0, len(prompt) :].tolist()
    return [(tokenizer.decode([token]), score) for token, score in zip(ids, scores)]


def show(scored: list[tuple[str, float]], likelihood: bool = True) -> str:
    """The trace in colours, and where it goes wrong by this reward: at the first token whose likelihood is suspicious. The
    lowest may be a later one, which does not fit the error. A head knows no such bound: there it is the lowest."""
    tokens, values = zip(*scored)
    scale = max(1.0, *map(abs, values))
    first = next((i for i, f in enumerate(values) if likelihood and f < reward.SUSPICIOUS), None)
    found = "nothing suspicious; lowest" if likelihood and first is None else "most suspicious"
    place = values.index(min(values)) if first is None else first
    return (f"{''.join(colour(token, f, scale) for token, f in scored)}\n\n{found}: token {place + 1} of {len(scored)}, "
            f"{tokens[place]!r} after {''.join(tokens[:place])[-30:]!r}, f = {values[place]:.2f} "
            f"(mean of the trace {sum(values) / len(values):.2f})")  # fmt: skip


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="a folder written by train.py")
    parser.add_argument("--question", required=True)
    parser.add_argument("--trace", required=True, help="the reasoning (\\n for a new line), or a whole response with its tags")
    parser.add_argument("--answer", help="the final answer, scored too if given")
    args = parser.parse()
    loading.quiet()
    discriminator, tokenizer, _ = load_run(Path(args.run))
    trace = args.trace.replace("\\n", "\n")
    if "<think>" not in trace:
        whole = data.response_text(trace, args.answer or "")
        trace = whole if args.answer else whole[: whole.index("<answer>")]
    scored = token_scores(discriminator.reward_model, tokenizer, args.question, trace)
    print(show(scored, discriminator.reward_model.scores_all_actions))


if __name__ == "__main__":
    sys.exit(exit_status(main))
