"""Which weights stay in memory and which are streamed (design section 8, "Residency of a dense model").

A dense model uses every byte of its layers once a token, in the same order: keeping any one saves as much as keeping
another, and an LRU would keep none. So a fixed part is pinned and the rest streamed round and round. What is pinned
follows one order, so that a larger budget pins a superset at the same addresses. The order spreads what is streamed
evenly over the layers: reads then overlap with the compute around them, and a small ring suffices.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.storage.arena import HUGE, round_up
from coterie.storage.runs import PAGE, Extents, Run
from coterie.storage.weights import PARTS, Residency

RING_MOST = 24 << 20  # bytes: three times what is in flight on a fast disk; more only takes from what is pinned
RING_SHARE = 8  # the ring takes at most one part in so many of the budget for weights ...
RING_MISSING = 8  # ... and of what the budget lacks: a ring larger than that would itself be most of what is streamed
RING_EXTENTS = 2 * PARTS  # of the largest size that the ring holds at least


def spread(n: int) -> list[int]:
    """0 to n - 1, each as far from those before it as may be (van der Corput's sequence)."""
    bits = max(1, (n - 1).bit_length())
    return [i for i in (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)) if i < n]


def pin_order(runs: Sequence[Run]) -> npt.NDArray[np.int64]:
    """Numbers of all extents, those that are pinned first in front: norms, attention, the output matrix, then the
    layers' FFNs an extent at a time, and last an embedding that is only looked up in."""
    first = Extents.of(runs).first
    tied = all(run.kind != "output" for run in runs)
    place = {layer: i for i, layer in enumerate(spread(1 + max(run.layer for run in runs)))}
    ranks = {"norms": 0, "qkv": 1, "attention": 1, "output": 2, "embedding": 2 if tied else 4, "ffn": 3}
    keys = []
    for i, run in enumerate(runs):
        turn = np.arange(run.extents)
        layer = place.get(run.layer, 0)
        by_extent = run.kind == "ffn"
        keys.append(
            np.stack(
                [
                    np.full(run.extents, ranks[run.kind]),
                    turn if by_extent else np.full(run.extents, layer),
                    np.full(run.extents, layer if by_extent else i),
                    first[i] + turn,
                ]
            )
        )
    table = np.concatenate(keys, axis=1)
    order: npt.NDArray[np.int64] = table[3][np.lexsort(table[::-1])]
    return order


def least_budget(runs: Sequence[Run]) -> int:
    """Bytes for weights below which nothing runs: the norms and the smallest ring."""
    return region_bytes(runs[0].nbytes) + region_bytes(_least_ring(runs))


def ring_room(runs: Sequence[Run]) -> int:
    """Bytes of the largest ring that may be chosen."""
    return round_up(max(RING_MOST, _least_ring(runs)), HUGE)


def _least_ring(runs: Sequence[Run]) -> int:
    return RING_EXTENTS * max(run.stride for run in runs[1:])


def region_bytes(nbytes: int) -> int:
    """What a region of so many bytes takes: larger ones are made of huge pages."""
    return round_up(nbytes, HUGE if nbytes >= HUGE else PAGE)


def choose(runs: Sequence[Run], budget: int) -> Residency:
    """Pin what `budget` bytes hold, a ring for the rest included. Raises PlanError if that is too little for any."""
    order = pin_order(runs)
    ends = np.cumsum(Extents.of(runs).nbytes[order])
    tied = all(run.kind != "output" for run in runs)
    used = int(ends[-1]) - (0 if tied else runs[1].nbytes)  # an embedding that is only looked up in needs no ring
    if region_bytes(used) <= budget:
        return Residency(order[: _fitting(ends, budget)])
    if budget < least_budget(runs):
        raise PlanError(
            f"its weights need at least {-(-least_budget(runs) >> 20)} MiB, but only {max(0, budget) >> 20} MiB "
            "are left"
        )
    least = _least_ring(runs)
    ring = min(RING_MOST, budget // RING_SHARE, (used - budget) // RING_MISSING) // HUGE * HUGE
    ring = max(ring, least)
    return Residency(order[: max(1, _fitting(ends, budget - region_bytes(ring)))], ring)


def resume(runs: Sequence[Run], pinned: int, ring: int) -> Residency:
    """The residency that a plan file names. Raises PlanError where it makes no sense for these runs."""
    order = pin_order(runs)
    if not 1 <= pinned <= order.size or (pinned < order.size and not _least_ring(runs) <= ring <= ring_room(runs)):
        raise PlanError(f"a plan with {pinned} extents pinned and a ring of {ring} bytes is not one for this model")
    return Residency(order[:pinned], ring if pinned < order.size else 0)


def _fitting(ends: npt.NDArray[np.int64], nbytes: int) -> int:
    """How many extents a region of so many bytes holds, if their sizes add up to `ends`."""
    whole = nbytes // HUGE * HUGE if nbytes >= HUGE else nbytes
    return int(np.searchsorted(ends, whole, side="right"))
