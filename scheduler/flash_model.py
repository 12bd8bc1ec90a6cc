"""What reads of a disk cost, from measured points: by pattern, block, span, and the core that issues them.

For devices that are not here (design section 9): phones' flash depends on all four, and has one queue, so that several
cores that issue reads slow each other down (PowerInfer-2, section 2.3.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

from coterie.errors import UsageError

PATTERNS = ("sequential", "random")
CORES = ("big", "mid", "little")


@dataclass(frozen=True)
class FlashPoint:
    """A measured rate: reads of `block` bytes, "sequential" or "random" within `span` bytes (0: it does not
    matter), issued from a core of that kind."""

    pattern: str
    block: int
    bytes_per_s: float
    span: int = 0
    core: str = "big"


@dataclass(frozen=True)
class FlashModel:
    """Rates between points follow powers: straight lines between logarithms, of blocks and then of spans; beyond the
    outermost points they stay; a span of 0 is the widest known. `crowd`: what is left of the rate when several cores
    issue reads."""

    points: tuple[FlashPoint, ...]
    crowd: float = 1.0

    def bandwidth(self, pattern: str, block: int, *, span: int = 0, core: str = "big", readers: int = 1) -> float:
        """Bytes/s of reads of `block` bytes. Raises UsageError for a pattern or a core of which nothing is known."""
        rate = self._rate(pattern, block, span) * self._slowness(pattern, core)
        return rate * (self.crowd if readers > 1 else 1.0)

    def _rate(self, pattern: str, block: int, span: int) -> float:
        points = [p for p in self.points if p.pattern == pattern and p.core == "big"]
        if not points:
            raise UsageError(f"nothing is known of {pattern} reads from a big core")
        spans = {p.span for p in points}
        by_span = [(s, between(block, [(p.block, p.bytes_per_s) for p in points if p.span == s])) for s in spans]
        return between(span or max(spans), by_span)

    def _slowness(self, pattern: str, core: str) -> float:
        """Of a core against the big one, where both were measured alike."""
        for p in self.points:
            for q in self.points:
                same = (p.pattern, p.block, p.span) == (q.pattern, q.block, q.span)
                if same and p.core == core and q.core == "big":
                    return p.bytes_per_s / q.bytes_per_s
        raise UsageError(f"nothing is known of reads from a {core} core")


def between(x: float, points: Iterable[tuple[float, float]]) -> float:
    """The value at x on straight lines between the logarithms of points; outside of them the outermost's."""
    known = sorted(points)
    if x <= known[0][0]:
        return known[0][1]
    for (x0, y0), (x1, y1) in pairwise(known):
        if x <= x1:
            part = (log(x) - log(x0)) / (log(x1) - log(x0))
            return exp(log(y0) + part * (log(y1) - log(y0)))
    return known[-1][1]
