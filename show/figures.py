"""Line charts as inline SVG. They are drawn in the classes and colours of report.css, so they follow the page's light or
dark theme, and hold no ids, links or styles of their own.
"""

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, FOOT = 290, 178, 34  # of a chart; its foot holds the x axis. The page scales it to its column.
BINS = 30


class Line(NamedTuple):
    """One line of a chart. Without a name it is not in the legend."""

    name: str
    colour: str  # a CSS variable without its dashes
    points: list[tuple[float, float]]
    look: str = ""  # CSS class: dashed, dotted, pale, area, band


def chart(label: str, xlabel: str, lines: list[Line], share: bool = False, x_ticks: dict[float, str] | None = None) -> str:
    """Lines in one frame, and their legend below; nothing without lines.

    label: for screen readers. share: y is a share of 1, shown in percent from 0 up. x_ticks: {x: text}, if these are not
    to be round numbers.
    """
    if not lines:
        return ""
    xs, ys = zip(*(point for line in lines for point in line.points))
    (left, right), (low, high) = limits(xs), limits(ys, share)
    whole = all(x == int(x) for x in xs)
    x_ticks = x_ticks or {x: f"{x:g}".replace("-", "−") for x in ticks(left, right) if not whole or x == int(x)}
    y_ticks = {y: f"{100 * y:.0f}%" if share else f"{y:g}".replace("-", "−") for y in ticks(low, high)}
    edge, bottom = 10 + 6 * max(map(len, y_ticks.values())), HEIGHT - FOOT

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return round(edge + across * (WIDTH - 5 - edge), 1), round(bottom - up * (bottom - 5), 1)

    parts = [f'<text class="below" x="{(edge + WIDTH) / 2:.0f}" y="{HEIGHT - 4}">{xlabel}</text>']
    for x, text in x_ticks.items():
        at, _ = place(x, low)
        parts.append(f'<path class="frame" d="M{at} 5V{bottom}"/><text class="below" x="{at}" y="{bottom + 14}">{text}</text>')
    for y, text in y_ticks.items():
        _, at = place(left, y)
        parts.append(f'<path class="frame" d="M{edge} {at}H{WIDTH}"/><text x="{edge - 5}" y="{at + 3.5}">{text}</text>')
    for _, colour, points, look in lines:
        places = [place(*point) for point in points]
        drawn = f'<path class="line {look}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>'
        if len(points) <= 20 and look in ("", "dashed"):
            drawn += "".join(f'<circle cx="{x}" cy="{y}" r="2.6"/>' for x, y in places)
        parts.append(f'<g style="color:var(--{colour})">{drawn}</g>')
    keys = [f'<span><i class="{line.look}" style="color:var(--{line.colour})"></i>{escape(line.name)}</span>'
            for line in lines if line.name]  # fmt: skip
    legend = f'<p class="keys">{"".join(keys)}</p>' if len(keys) > 1 else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>{legend}'


def limits(values: list[float], share: bool = False) -> tuple[float, float]:
    """(low, high) of an axis for these values, never equal; for shares from 0 to a round number."""
    low, high = min(values), max(values)
    if share and low >= 0 and high <= 1:
        return 0.0, next(top for top in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if high <= top)
    size = max(abs(low), abs(high))
    size = size if size > 1e-30 else 1.0
    margin = 0.04 * (high - low) if high - low > 1e-6 * size else size / 2
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """The round numbers from low to high, about five: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((unit * factor for factor in (1, 2, 5) if unit * factor >= 0.999 * rough), 10 * unit)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def histogram(label: str, xlabel: str, groups: dict[str, list[float]]) -> str:
    """The values of groups over each other, each as shares of its group. groups: {name and colour: values}."""
    pooled = sorted(value for values in groups.values() for value in values)
    if not pooled:
        return ""
    edge = len(pooled) // 200  # half a percent on either side goes into the outermost bins
    low, high = limits([pooled[edge], pooled[-1 - edge]])
    lines = []
    for name, values in groups.items():
        shares = [0.0] * BINS
        for value in values:
            shares[int(min(max((value - low) / (high - low), 0.0), 0.999) * BINS)] += 1 / len(values)
        heights = [0.0, *shares, 0.0]
        corners = [(low + (high - low) * i / BINS, heights[i + side]) for i in range(BINS + 1) for side in (0, 1)]
        look = "area dashed" if lines else "area"
        lines += [Line(f"{name} answer ({len(values)})", name, corners, look)] if values else []
    return chart(label, xlabel, lines, share=True)
