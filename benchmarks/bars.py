"""Tokens/s of stages beside a paper's, as an SVG that is read on light and on dark pages."""

import math
from collections.abc import Sequence
from html import escape

from curve import STYLE, ticks

WIDTH, ROW, BAR = 760, 52, 18
LEFT, RIGHT, TOP, BOTTOM = 140, 60, 84, 40


def bars(title: str, names: tuple[str, str], rows: Sequence[tuple[str, float, float | None]]) -> str:
    """The SVG's text: a row is a stage's name, and two values on a logarithmic scale, the second of which may be
    unknown; `names` are those of the two."""
    values = [value for _, *pair in rows for value in pair if value]
    low, high = min(values) / 1.6, max(values) * 1.1
    height = TOP + ROW * len(rows) + BOTTOM

    def across(value: float) -> float:
        return round(LEFT + math.log(value / low) / math.log(high / low) * (WIDTH - LEFT - RIGHT), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="20" y="30">{escape(title)}</text>',
    ]
    for i, name in enumerate(names):
        at = 20 + 220 * i
        parts.append(f'<rect class="dot{i}" x="{at}" y="46" width="12" height="12"/>')
        parts.append(f'<text x="{at + 18}" y="57">{escape(name)}</text>')
    for tick in ticks(low, high):
        x, end = across(tick), height - BOTTOM
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{end}"/>')
        parts.append(f'<text x="{x}" y="{end + 20}" text-anchor="middle">{tick:g}</text>')
    for number, (stage, *pair) in enumerate(rows):
        y = TOP + ROW * number
        parts.append(f'<text x="{LEFT - 10}" y="{y + BAR + 4}" text-anchor="end">{escape(stage)}</text>')
        for i, value in enumerate(pair):
            if value:
                end, top = across(value), y + i * (BAR + 2)
                parts.append(f'<rect class="dot{i}" x="{LEFT}" y="{top}" width="{end - LEFT:.1f}" height="{BAR}"/>')
                parts.append(f'<text x="{end + 6}" y="{top + 14}">{value:.3g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">tokens/s</text></svg>')
    return "\n".join(parts) + "\n"
