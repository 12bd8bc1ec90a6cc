"""What only predictors need: their hidden units woven, and asking for the next layer's neurons (docs/sparse.md)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from coterie.kernels import operands as o
from coterie.kernels.atomics import acquire
from coterie.kernels.cache import DEMANDED, SERVED, call_reader, demand
from coterie.kernels.compiler import kernel
from coterie.kernels.formats import FORMATS
from coterie.kernels.mathematics import relu
from coterie.kernels.neurons import product_op, weave_bytes
from coterie.kernels.quantise import weave_block
from coterie.kernels.record import LINE_ASKED, TOKENS
from coterie.kernels.shapes import CLUSTER, NEURON_ROW, NEURON_SCORES, SUPERBLOCK
from coterie.kernels.sparse import layer_of
from coterie.kernels.sync import claim, finish, prepare, tally, word
from coterie.kernels.tile import AHEAD, tile_groups
from coterie.kernels.vector import f32_at, floats_at, i64_at


@kernel
def neuron_ask(score_name: str, tokens: str) -> Callable[..., Any]:
    """Ask for neurons of the next layer that its predictor, or its Gate, takes for live on this layer's input, which
    changes little from layer to layer (Deja Vu, section 4.3): flash reads while this layer's Down and the next one's
    attention are computed. What is asked for in vain costs a read, nothing else. Gates take time, so they are computed
    only while the reader has enough to do for lanes to have nothing better."""
    tile_tokens = int(tokens)
    together = tile_groups(tile_tokens)
    score_rows = product_op(score_name, tile_tokens, together)
    score_super = weave_bytes(FORMATS[score_name]) * tile_tokens

    @register_jitable
    def wanted(scratch, i, n):
        """Whether neuron `i` of a cluster has a positive score for a token of the tile."""
        top = np.float32(0)
        for t in range(min(n, tile_tokens)):
            top = max(top, f32_at(scratch + (i * tile_tokens + t) * 4))
        return top > np.float32(0)

    @register_jitable
    def ask(record, step, lane, cluster):
        n, cache = word(step, TOKENS), word(record, o.N_CACHE)
        x = word(record, o.N_X) + lane * word(record, o.N_X_LANE) + word(record, o.N_SCORE_X)
        scratch = word(record, o.N_SCRATCH) + lane * word(record, o.N_SCRATCH_LANE)
        supers, row = word(record, o.N_SCORE_SUPERS), word(record, o.N_ROW)
        w, asked = i64_at(word(record, o.N_TABLE) + cluster * NEURON_ROW + NEURON_SCORES), 0
        for tile in range((n + tile_tokens - 1) // tile_tokens):
            for i in range(0, CLUSTER, together):
                at = scratch + i * tile_tokens * 4
                score_rows(w + i * row, row, x + tile * supers * score_super, at, supers, AHEAD)
            for i in range(CLUSTER):
                entry = word(record, o.N_ADDRESSES) + 8 * (cluster * CLUSTER + i)
                absent = wanted(scratch, i, n - tile * tile_tokens) and acquire(entry) == 0
                if absent and demand(cache, entry, layer_of(record), cluster * CLUSTER + i):
                    asked += 1
        if asked > 0:
            call_reader(cache, asked)
            tally(step, lane, LINE_ASKED, asked)

    def run(record, step, lane):
        cache, total, pieces = word(record, o.N_CACHE), word(record, o.N_COUNT), 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            if acquire(cache + DEMANDED) - acquire(cache + SERVED) >= word(record, o.N_BUSY):
                ask(record, step, lane, piece)
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run


@kernel
def weave() -> Callable[..., Any]:
    """relu(x), woven: what a predictor's second matrix reads. Only as a preparation, which may have one itself."""

    def run(record, step, lane):
        prepare(record, step, lane)
        subs, tile, out = word(record, o.WEAVE_SUBS), word(record, o.WEAVE_TILE), word(record, o.WEAVE_OUT)
        out += lane * word(record, o.WEAVE_OUT_LANE)
        supers, as_float = (subs + SUPERBLOCK - 1) // SUPERBLOCK, word(record, o.WEAVE_FLOAT) != 0
        for row in range(word(step, TOKENS)):
            x = word(record, o.WEAVE_X) + row * word(record, o.WEAVE_X_ROW)
            for sub in range(subs):
                low, high = relu(floats_at(x + 128 * sub)), relu(floats_at(x + 128 * sub + 64))
                weave_block(low, high, out, tile, row, sub, supers, as_float)
        return 0

    return run
