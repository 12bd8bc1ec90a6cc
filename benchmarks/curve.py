"""Tokens/s over the share of the weights that may be resident, as an SVG that is read on light and on dark pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 118, 56, 58  # margins of the plot; the right one holds the names of the lines

COLOURS = (("#0b62c4", "#58a6ff"), ("#c2410c", "#ff9457"))  # of each line, on light and on dark


def _line_style(number: int, colour: str) -> str:
    kinds = (("line", "stroke"), ("band", "fill"), ("dot", "fill"), ("name", "fill"))
    return " ".join(f".{kind}{number} {{ {what}: {colour} }}" for kind, what in kinds)


STYLE = f"""
  text {{ font: 13px system-ui, sans-serif; fill: #333 }}
  .title {{ font-size: 16px; font-weight: 600 }}
  .page {{ fill: #fff }} .grid {{ stroke: #ddd }} .axis {{ stroke: #777 }}
  .line {{ fill: none; stroke-width: 2.5 }} .band {{ opacity: .18 }} .name {{ font-weight: 600 }}
  {" ".join(_line_style(i, light) for i, (light, _) in enumerate(COLOURS))}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #ddd }} .page {{ fill: #0d1117 }} .grid {{ stroke: #333 }} .axis {{ stroke: #888 }}
    {" ".join(_line_style(i, dark) for i, (_, dark) in enumerate(COLOURS))}
  }}
"""


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float, float, float]]  # x, least, middle, most


def ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten in low..high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def curve(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """The SVG's text, of up to two lines. x falls from left to right, y is logarithmic, a band goes from the least to
    the most."""
    xs = sorted({x for line in lines for x, *_ in line.points}, reverse=True)
    low = min(least for line in lines for _, least, _, _ in line.points) / 1.15
    high = max(most for line in lines for *_, most in line.points) * 1.15
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    span = (xs[0] - xs[-1]) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (xs[0] - x) / span * plot_width
        down = math.log(high / y) / math.log(high / low) * plot_height
        return round(LEFT + across, 1), round(TOP + down, 1)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{across},{down}" for across, down in points)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        f'<text x="{LEFT}" y="44">{escape(y_label)}</text>',
        f'<text x="{LEFT + plot_width / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for value in ticks(low, high):
        across, down = place(xs[0], value)
        out.append(f'<path class="grid" d="M{across},{down}H{LEFT + plot_width}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{value:g}</text>')
    floor, free = TOP + plot_height, -math.inf
    out.append(f'<path class="axis" d="M{LEFT},{floor}H{LEFT + plot_width}"/>')
    for x in xs:
        across, _ = place(x, low)
        out.append(f'<path class="axis" d="M{across},{floor}v5"/>')
        if across - free >= 26:  # where shares lie close together only some are named
            out.append(f'<text x="{across}" y="{floor + 20}" text-anchor="middle">{x:g}</text>')
            free = across
    ends = []
    for number, line in enumerate(lines):
        points = sorted(line.points, reverse=True)
        band = [place(x, most) for x, _, _, most in points] + [place(x, least) for x, least, _, _ in reversed(points)]
        middle = [place(x, y) for x, _, y, _ in points]
        out.append(f'<path class="band band{number}" d="{path(band)}Z"/>')
        out.append(f'<path class="line line{number}" d="{path(middle)}"/>')
        for (across, down), (x, least, y, most) in zip(middle, points, strict=True):
            note = escape(f"{line.name}, {x:g} %: {y:.3g} ({least:.3g}-{most:.3g})")
            out.append(f'<circle class="dot{number}" cx="{across}" cy="{down}" r="3.5"><title>{note}</title></circle>')
        ends.append((middle[-1][1], number, line.name))
    under = -math.inf
    for down, number, name in sorted(ends):  # names side by side even where lines end together
        under = max(under + 16, down)
        x = LEFT + plot_width + 9
        out.append(f'<text class="name name{number}" x="{x}" y="{under + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])
