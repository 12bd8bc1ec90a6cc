"""Down of a sparse feed-forward network: live neurons' rows added to the output, in ascending order (sparse.py).

A lane owns columns of the output and walks all neurons, so the order of additions does not depend on lanes, clusters or
what was in memory. Neurons are taken a panel at a time, for batches and prompts while its rows are in the cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from coterie.kernels import operands as o
from coterie.kernels.compiler import kernel
from coterie.kernels.formats import FORMATS
from coterie.kernels.neurons import LATER, NEURONS_TOGETHER, accumulate_op, unweave
from coterie.kernels.record import TOKENS
from coterie.kernels.shapes import (
    CLUSTER,
    LIVE_COUNT,
    LIVE_IDS,
    LIVE_LATE,
    LIVE_ROW,
    NEURON_BUNDLES,
    NEURON_ROW,
    WOVEN_FLOAT,
)
from coterie.kernels.sync import claim, finish, prepare, word
from coterie.kernels.vector import f32_at, i32_at, i64_at, set_f32, set_i64

PANEL = 256  # neurons whose rows stay in the second-level cache while tokens pass
HELD = PANEL + CLUSTER + NEURONS_TOGETHER + LATER  # neurons in a lane's scratch
SCRATCH_IDS, SCRATCH_HIDDEN = 8 * HELD, 16 * HELD  # behind their addresses


def down_scratch(tokens: int) -> int:
    """Bytes of scratch that a lane of `neuron_down` needs."""
    return 16 * HELD + 4 * HELD * tokens


@kernel
def neuron_down(name: str, tokens: str) -> Callable[..., Any]:
    """y = Down hidden over lists of neurons in ascending order; a piece is some superblocks of columns."""
    tile_tokens = int(tokens)
    accumulate = accumulate_op(name, tile_tokens)
    block = FORMATS[name].block

    @register_jitable
    def add_held(record, scratch, held, first, supers, tiles):
        """Add the neurons in scratch, a multiple of NEURONS_TOGETHER."""
        sums_row = word(record, o.ND_SUPERS) * WOVEN_FLOAT
        offset = word(record, o.ND_DOWN) + first * block
        h = scratch + SCRATCH_HIDDEN
        for tile in range(tiles):
            hidden = word(record, o.ND_HIDDEN) + tile * word(record, o.ND_HIDDEN_TILE)
            for k in range(held):
                neuron = i64_at(scratch + SCRATCH_IDS + 8 * k)
                for t in range(tile_tokens):
                    value = f32_at(hidden + (neuron * tile_tokens + t) * 4) if neuron >= 0 else np.float32(0)
                    set_f32(h + (k * tile_tokens + t) * 4, value)
            y = word(record, o.ND_SUMS) + tile * tile_tokens * sums_row + first * WOVEN_FLOAT
            for k in range(0, held, NEURONS_TOGETHER):
                accumulate(scratch + 8 * k, h + k * tile_tokens * 4, offset, supers, y, sums_row)

    @register_jitable
    def hold(record, scratch, held, cluster):
        """Put a cluster's neurons into scratch behind `held` others; how many there are then."""
        live, bundle = word(record, o.ND_LIVE), word(record, o.ND_BUNDLE)
        base = i64_at(word(record, o.ND_TABLE) + cluster * NEURON_ROW + NEURON_BUNDLES)
        row = live + cluster * LIVE_ROW
        for k in range(i32_at(row + LIVE_COUNT) if live != 0 else CLUSTER):
            i = np.int64(i32_at(row + LIVE_IDS + 4 * k)) % LIVE_LATE if live != 0 else np.int64(k)
            neuron = cluster * CLUSTER + i
            at = i64_at(word(record, o.ND_ADDRESSES) + 8 * neuron) if live != 0 else base + i * bundle
            set_i64(scratch + 8 * held, at)
            set_i64(scratch + SCRATCH_IDS + 8 * held, neuron)
            held += 1
        return held

    @register_jitable
    def pad(scratch, held):
        """Fill up with neurons that add nothing."""
        while held % NEURONS_TOGETHER != 0:
            set_i64(scratch + 8 * held, i64_at(scratch + 8 * (held - 1)))
            set_i64(scratch + SCRATCH_IDS + 8 * held, -1)
            held += 1
        return held

    def run(record, step, lane):
        n = word(step, TOKENS)
        tiles = (n + tile_tokens - 1) // tile_tokens
        scratch = word(record, o.ND_SCRATCH) + lane * word(record, o.ND_SCRATCH_LANE)
        supers, chunk = word(record, o.ND_SUPERS), word(record, o.ND_CHUNK)
        sums, sums_row = word(record, o.ND_SUMS), supers * WOVEN_FLOAT
        total = (supers + chunk - 1) // chunk
        pieces = 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            first = piece * chunk
            width = min(chunk, supers - first)
            if word(record, o.ND_KEEP) == 0:
                for row in range(tiles * tile_tokens):
                    at = sums + row * sums_row + first * WOVEN_FLOAT
                    for i in range(0, width * WOVEN_FLOAT, 8):
                        set_i64(at + i, 0)
            held = 0
            for cluster in range(word(record, o.ND_FIRST), word(record, o.ND_FIRST) + word(record, o.ND_COUNT)):
                held = hold(record, scratch, held, cluster)
                if held >= PANEL:
                    whole = held // NEURONS_TOGETHER * NEURONS_TOGETHER
                    add_held(record, scratch, whole, first, width, tiles)
                    for k in range(held - whole):
                        set_i64(scratch + 8 * k, i64_at(scratch + 8 * (whole + k)))
                        set_i64(scratch + SCRATCH_IDS + 8 * k, i64_at(scratch + SCRATCH_IDS + 8 * (whole + k)))
                    held -= whole
            if held > 0:
                add_held(record, scratch, pad(scratch, held), first, width, tiles)
            if word(record, o.ND_LAST) != 0:
                for row in range(n):
                    y = word(record, o.ND_Y) + row * word(record, o.ND_Y_ROW)
                    at = sums + row * sums_row + first * WOVEN_FLOAT
                    unweave(at, y, first, width, word(record, o.ND_BLOCKS))
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run
