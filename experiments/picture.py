"""docs/trace.svg: the first wrong trace of a run as an SVG file, in the colours of its report.

Lines are those of the trace. The first wrong token is outlined, the predicted one underlined.

    python -m experiments.picture runs/demo docs/trace.svg
"""

import sys
from html import escape
from pathlib import Path

from engine.errors import Parser, UserError, exit_status, printable
from show.report import dig, finite, full_colour, read_run


def picture(trace: dict, scale: float, cell: float = 9.6, height: float = 26.0) -> str:
    """The SVG of one trace. scale: the reward that gets full colour; cell: the width of a letter; height: of a line."""
    question = printable(str(trace.get("question", ""))).replace("\n", " ")
    shapes, x, y, widest = [], 16.0, 2.4 * height, 9.6 * len(question)
    shapes.append(f'<text x="16" y="{height}" fill="#5b6676">{escape(question)}</text>')
    for index, (token, value) in enumerate(zip(dig(trace, "tokens", kind=list), dig(trace, "rewards", kind=list))):
        shown = printable(str(token)).replace("\n", "⏎") or "∅"
        width, depth = cell * len(shown), max(-1.0, min((finite(value) or 0.0) / scale, 1.0))
        fill = f'"rgb({"58 134 226" if depth > 0 else "244 136 22"})" fill-opacity="{0.8 * abs(depth):.2f}"'
        edge = ' stroke="#1b2230" stroke-width="2"' * (index == trace.get("first_wrong"))
        shapes.append(f'<rect x="{x:.1f}" y="{y - 18:.1f}" width="{width:.1f}" height="24" rx="2" fill={fill}{edge}/>')
        line = ' text-decoration="underline"' * (index == trace.get("predicted"))
        shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" textLength="{width:.1f}"{line}>{escape(shown)}</text>')
        x, widest = x + width + 1, max(widest, x + width)
        if "\n" in str(token):
            x, y = 16.0, y + 1.2 * height
    size = f'viewBox="0 0 {widest + 16:.0f} {y + 18:.0f}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} width="{widest + 16:.0f}" '
            'font-family="monospace" font-size="16" fill="#1b2230" xml:space="preserve">'
            f'<rect width="100%" height="100%" rx="8" fill="#fff"/>{"".join(shapes)}</svg>\n')  # fmt: skip


def main() -> None:
    parser = Parser("Draw the first wrong trace of a run.")
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/demo")
    parser.add_argument("file", type=Path, help="the SVG file to write")
    args = parser.parse()
    traces = [trace for trace in read_run(args.run)["traces"] if isinstance(trace, dict)]
    wrong = [trace for trace in traces if trace.get("first_wrong") is not None]
    if not wrong:
        raise UserError(f"{args.run} holds no wrong trace to draw")
    rewards = [finite(reward) for trace in traces for reward in dig(trace, "rewards", kind=list)]
    drawn = picture(wrong[0], full_colour([reward for reward in rewards if reward is not None]))
    try:  # "replace": a trace may hold half a surrogate pair
        args.file.write_text(drawn, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {args.file}: {error}") from None


if __name__ == "__main__":
    sys.exit(exit_status(main))
