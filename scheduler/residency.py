"""Which weights stay in memory and which are streamed (design section 8, "Residency of a dense model").

A dense model uses every byte of its layers once a token, in the same order: keeping any one saves as much as keeping
another, and an LRU would keep none. So a fixed part is pinned and the rest streamed round and round. What is pinned
follows one order, so that a larger budget pins a superset at the same addresses. The order spreads what is streamed
evenly over the layers: reads then overlap with the compute around them, and a small ring suffices.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.storage.arena import round_up
from coterie.storage.mapping import HUGE
from coterie.storage.neuron_buffers import bundle_runs, layer_neurons, slot_bytes
from coterie.storage.runs import EMBEDDINGS, PAGE, Extents, Run, only_looked_up
from coterie.storage.weights import PARTS, Residency

SLOT_METADATA = 32  # bytes that the cache keeps of a slot, at most
CACHE_SHARE = 0.75  # of the memory for bundles
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
    layers' FFNs an extent at a time, of sparse models Gates before bundles, and last an embedding that is only looked
    up in."""
    first = Extents.of(runs).first
    place = {layer: i for i, layer in enumerate(spread(1 + max(run.layer for run in runs)))}
    ranks = {"norms": 0, "qkv": 1, "attention": 1, "output": 2, "predictor": 2, "scores": 2}
    ranks |= {"ffn": 3, "gate": 3, "neurons": 4}
    ranks |= dict.fromkeys(EMBEDDINGS, 5 if only_looked_up(runs) else 2)
    keys = []
    for i, run in enumerate(runs):
        turn = np.arange(run.extents)
        layer = place.get(run.layer, 0)
        by_extent = run.kind in ("ffn", "gate", "neurons")
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


def least_budget(runs: Sequence[Run], sector: int = PAGE) -> int:
    """Bytes for weights below which nothing runs: the norms and the smallest ring, and of a sparse model the smallest
    cache, on a disk that is read in sectors of so many bytes."""
    least = region_bytes(runs[0].nbytes) + region_bytes(_least_ring(runs))
    return least + region_bytes(_least_slots(runs) * slot_cost(runs, sector))


def ring_room(runs: Sequence[Run]) -> int:
    """Bytes of the largest ring that may be chosen."""
    return round_up(max(RING_MOST, _least_ring(runs)), HUGE)


def _least_ring(runs: Sequence[Run]) -> int:
    least = RING_EXTENTS * max(run.stride for run in runs[1:])
    for gate, bundles in pairwise(runs):
        if bundles.kind == "neurons":  # an extent of Gates is used together with its bundles
            least = max(least, PARTS * (gate.stride + -(-bundles.extents // gate.extents) * bundles.stride))
    return least


def _least_slots(runs: Sequence[Run]) -> int:
    """Neurons that the cache holds at least: a step may use all of a layer."""
    bundles = bundle_runs(runs)
    return layer_neurons(bundles[0]) if bundles else 0


def slot_cost(runs: Sequence[Run], sector: int) -> int:
    """Bytes of a neuron's slot and of what is known about it."""
    return max((slot_bytes(run, sector) for run in bundle_runs(runs)), default=0) + SLOT_METADATA


def region_bytes(nbytes: int) -> int:
    """What a region of so many bytes takes: larger ones are made of huge pages."""
    return round_up(nbytes, HUGE if nbytes >= HUGE else PAGE)


def choose(runs: Sequence[Run], budget: int, sector: int = PAGE) -> Residency:
    """Pin what `budget` bytes hold, a ring for the rest and the neuron cache of a sparse model included. Raises
    PlanError if that is too little for any."""
    order = pin_order(runs)
    ends = np.cumsum(Extents.of(runs).nbytes[order])
    lookup = only_looked_up(runs)
    used = int(ends[-1]) - (lookup.nbytes if lookup else 0)  # an embedding that is only looked up in needs no ring
    if region_bytes(used) <= budget:
        return Residency(order[: _fitting(ends, budget)])
    if budget < least_budget(runs, sector):
        least = -(-least_budget(runs, sector) >> 20)
        raise PlanError(f"its weights need at least {least} MiB, but only {max(0, budget) >> 20} MiB are left")
    least = _least_ring(runs)
    ring = min(RING_MOST, budget // RING_SHARE, (used - budget) // RING_MISSING) // HUGE * HUGE
    ring = max(ring, least)
    room, slots = budget - region_bytes(ring), 0
    if bundle_runs(runs):
        slots, room = _cache(runs, room, sector)
    return Residency(order[: max(1, _fitting(ends, room))], ring, slots)


def _cache(runs: Sequence[Run], room: int, sector: int) -> tuple[int, int]:
    """Slots of the neuron cache, and the bytes that are left for pinned weights. What would hold bundles is shared: hot
    ones are pinned, which spares prompts their reading, and the cache follows what is used."""
    least, cost = _least_slots(runs), slot_cost(runs, sector)
    others = sum(run.nbytes for run in runs if run.kind not in ("neurons", *EMBEDDINGS))
    extra = max(0, room - region_bytes(least * cost) - others)
    every = sum(map(layer_neurons, bundle_runs(runs)))
    slots = min(every, least + int(extra * CACHE_SHARE) // cost)
    return slots, room - region_bytes(slots * cost)


def resume(runs: Sequence[Run], pinned: int, ring: int, slots: int = 0) -> Residency:
    """The residency that a plan file names. Raises PlanError where it makes no sense for these runs."""
    order = pin_order(runs)
    if not 1 <= pinned <= order.size or (pinned < order.size and not _least_ring(runs) <= ring <= ring_room(runs)):
        raise PlanError(f"a plan with {pinned} extents pinned and a ring of {ring} bytes is not one for this model")
    streamed = {runs[run].kind for run in np.unique(Extents.of(runs).run[order[pinned:]])}
    least, every = _least_slots(runs), sum(map(layer_neurons, bundle_runs(runs)))
    if slots != 0 if "neurons" not in streamed else not least <= slots <= every:
        raise PlanError(f"a plan with {slots} neurons in the cache is not one for this model")
    return Residency(order[:pinned], ring if pinned < order.size else 0, slots)


def _fitting(ends: npt.NDArray[np.int64], nbytes: int) -> int:
    """How many extents a region of so many bytes holds, if their sizes add up to `ends`."""
    whole = nbytes // HUGE * HUGE if nbytes >= HUGE else nbytes
    return int(np.searchsorted(ends, whole, side="right"))
