"""Replacement policies of the neuron cache, on a recorded trace of live neurons.

    python benchmarks/policies.py MODEL.coterie [--tokens 200] [--json FILE]

Decodes a topical stream of tokens (stream.py) with all weights in memory, writes down which neurons were live, and
plays the trace to each policy with caches of several sizes: LRU; the windows of "LLM in a flash" (what the last k
tokens used, k as large as the cache allows); second chance with a count of uses, which the engine has; what is hottest
over the whole trace, pinned; and Belady's optimum, which knows the future. A row is the share of live neurons that were
missing, over the second half of the trace.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from stream import record

Ints = NDArray[np.int64]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
CHANCES = (1, 2, 3, 7, 15)  # uses that count at most
NEVER = 1 << 40


@njit  # type: ignore[untyped-decorator]  # numba is untyped
def second_chance(uses: Ints, ticks: Ints, neurons: int, slots: int, most: int, first: int) -> int:
    """Misses from use `first` on. What the present tick (token and layer) uses is kept; a neuron that is read in begins
    without credit."""
    where, owner = np.full(neurons, -1), np.full(slots, -1)
    counts, stamps = np.zeros(slots, np.int64), np.full(slots, -1)
    hand, used, misses = -1, 0, 0
    for i in range(uses.size):
        n = uses[i]
        slot = where[n]
        if slot >= 0:
            counts[slot] = min(counts[slot] + 1, most)
            stamps[slot] = ticks[i]
            continue
        misses += i >= first
        if used < slots:
            slot, used = used, used + 1
        else:
            while True:
                hand = (hand + 1) % slots
                if stamps[hand] == ticks[i]:
                    continue
                if counts[hand] == 0:
                    break
                counts[hand] -= 1
            slot = hand
            where[owner[slot]] = -1
        where[n], owner[slot], counts[slot], stamps[slot] = slot, n, 0, ticks[i]
    return misses


@njit  # type: ignore[untyped-decorator]  # numba is untyped
def by_rank(uses: Ints, keys: Ints, neurons: int, slots: int, first: int) -> int:
    """Misses if the neuron with the smallest key of its last use is dropped: LRU by the time of the use, Belady by the
    time of the next one, negative. A heap with stale entries."""
    present, latest = np.zeros(neurons, np.bool_), np.zeros(neurons, np.int64)
    heap = np.empty((2 * uses.size + 2, 2), np.int64)
    size, count, misses = 0, 0, 0
    for i in range(uses.size):
        n = uses[i]
        if not present[n]:
            misses += i >= first
            if count == slots:
                while True:  # drop the smallest that is not stale
                    key, victim = heap[0, 0], heap[0, 1]
                    size -= 1
                    heap[0] = heap[size]
                    at = 0
                    while True:
                        child = 2 * at + 1
                        if child >= size:
                            break
                        if child + 1 < size and heap[child + 1, 0] < heap[child, 0]:
                            child += 1
                        if heap[at, 0] <= heap[child, 0]:
                            break
                        for c in range(2):
                            heap[at, c], heap[child, c] = heap[child, c], heap[at, c]
                        at = child
                    if present[victim] and latest[victim] == key:
                        present[victim] = False
                        count -= 1
                        break
            present[n] = True
            count += 1
        latest[n] = keys[i]
        at = size
        heap[at, 0], heap[at, 1] = keys[i], n
        size += 1
        while at > 0 and heap[(at - 1) // 2, 0] > heap[at, 0]:
            parent = (at - 1) // 2
            for c in range(2):
                heap[at, c], heap[parent, c] = heap[parent, c], heap[at, c]
            at = parent
    return misses


def windowed(bits: NDArray[np.uint8], slots: int) -> tuple[float, int]:
    """Share missing where the last k tokens' neurons are kept, for the largest k that always fits; and k. bits:
    uint8[tokens][neurons / 8]."""
    half, best, kept = len(bits) // 2, (1.0, 0), np.zeros_like(bits)
    wanted = int(np.bitwise_count(bits[half:]).sum(dtype=np.int64))
    for k in range(1, half):
        kept[k:] |= bits[:-k]
        if np.bitwise_count(kept[half:]).sum(axis=1, dtype=np.int64).max() > slots:
            break
        best = int(np.bitwise_count(bits[half:] & ~kept[half:]).sum(dtype=np.int64)) / wanted, k
    return best


def next_uses(uses: Ints) -> Ints:
    """When each use's neuron is used again."""
    order = np.lexsort((np.arange(uses.size), uses))
    following = np.full(uses.size, NEVER)
    same = uses[order][1:] == uses[order][:-1]
    following[order[:-1][same]] = order[1:][same]
    return following


def compare(bits: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """bits: uint8[tokens][layers][neurons / 8]."""
    n, neurons, layer = len(bits), bits[0].size * 8, bits.shape[2] * 8
    live = [np.flatnonzero(np.unpackbits(token.reshape(-1))) for token in bits]
    uses = np.concatenate(live)
    tokens = np.repeat(np.arange(n), [one.size for one in live])
    ticks = tokens * bits.shape[1] + uses // layer
    first = int(np.searchsorted(tokens, n // 2))
    total = uses.size - first
    soon, now = -next_uses(uses), np.arange(uses.size)
    hottest = np.argsort(-np.bincount(uses, minlength=neurons), kind="stable")
    rows = []
    for share in SHARES:
        slots = int(share * neurons)
        chance = {m: second_chance(uses, ticks, neurons, slots, m, first) / total for m in CHANCES}
        missing, k = windowed(bits.reshape(n, -1), slots)
        rows.append(
            {
                "share": share,
                "lru": by_rank(uses, now, neurons, slots, first) / total,
                "window": missing,
                "window tokens": k,
                **{f"chance {m}": value for m, value in chance.items()},
                "pinned": 1 - np.isin(uses[first:], hottest[:slots]).mean(),
                "belady": by_rank(uses, soon, neurons, slots, first) / total,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = compare(record(arguments.model, arguments.tokens))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
