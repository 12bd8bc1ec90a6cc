"""Sparse feed-forward networks, neuron by neuron: Gate first, then only what is live (PowerInfer-2, section 4.3).

Decode: `neuron_gate` computes the Gate rows of a cluster of neurons. Where a row's output is positive, for any token,
the neuron is live: its Up row follows at once if it is in memory, else it is asked for, and taken up again by
`neuron_late` (sparse_late.py). The coldest clusters come first, so that reads have the others' time. `neuron_down`
then adds live neurons in ascending order, each lane into its own columns. Prefill: `neuron_all` takes all neurons.

A neuron that is not live would add zero: skipping it changes no bit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from coterie.kernels import operands as o
from coterie.kernels.atomics import acquire, fence, release
from coterie.kernels.cache import PENDING, TICK, call_reader, demand, touch
from coterie.kernels.compiler import kernel
from coterie.kernels.formats import FORMATS
from coterie.kernels.neurons import (
    product_op,
    weave_bytes,
)
from coterie.kernels.record import (
    EPOCH,
    LINE_ASKED,
    LINE_LIVE,
    OPCODE,
    TAPE,
    TOKENS,
)
from coterie.kernels.shapes import (
    CLUSTER,
    LIVE_COUNT,
    LIVE_IDS,
    LIVE_LATE,
    LIVE_MISSING,
    LIVE_ROW,
    NEURON_BUNDLES,
    NEURON_FLAG,
    NEURON_GATE,
    NEURON_GATE_WANTED,
    NEURON_ROW,
    NEURON_SCORES,
    NEURON_WANTED,
)
from coterie.kernels.sync import await_weights, claim, finish, give_way, prepare, tally, word
from coterie.kernels.tile import AHEAD, tile_groups
from coterie.kernels.vector import f32_at, i32_at, i64_at, prefetch, set_f32, set_i32

PATIENCE = 16  # clusters between two looks whether a reader wants the core
BEGINNING = 512  # bytes of a row that are prefetched: the hardware goes on, and more would only hold lanes up


@register_jitable
def here(entry, wanted, step, lane):
    """Wait until a cluster's weights are there; False if the step is abandoned meanwhile."""
    if i64_at(entry + wanted) == 0:
        return True
    return await_weights(i64_at(entry + NEURON_FLAG), word(step, TAPE) + i64_at(entry + wanted), step, lane)


@register_jitable
def layer_of(record):
    return word(record, OPCODE) >> 16


@register_jitable
def cluster_of(record, piece):
    """The cluster that a piece is: from the coldest one on, or in the order in which their weights arrive."""
    first, count = word(record, o.N_FIRST), word(record, o.N_COUNT)
    return first + (piece if word(record, o.N_ASCENDING) != 0 else count - 1 - piece)


@register_jitable
def tick_of(record, step):
    """What a slot is stamped with that this layer uses in this step."""
    return word(step, EPOCH) * word(record, o.N_LAYERS) + layer_of(record)


@register_jitable
def positive(x):
    """relu; what is not a number counts as zero."""
    return x if x > np.float32(0) else np.float32(0)


@register_jitable
def squared(x):
    bounded = positive(x)
    return bounded * bounded


@register_jitable
def unchanged(x):
    return x


SCALAR = {"relu": (positive, unchanged), "relu2": (squared, unchanged), "drelu": (positive, positive)}


def hidden_op(tokens: int) -> Any:
    """Where the hidden activations of a neuron are, for a tile of so many tokens."""

    @register_jitable
    def hidden_at(record, tile, neuron):
        return word(record, o.N_HIDDEN) + tile * word(record, o.N_HIDDEN_TILE) + neuron * tokens * 4

    return hidden_at


def up_op(gate_name: str, up_name: str, activation: str, tile_tokens: int, predicted: bool) -> Any:
    """A live neuron's hidden activations, from its bundle: its Gate's, which are there unless a predictor decides,
    times what Up makes of them. What the predictor took for live and is not needs no Up."""
    gate_row = product_op(gate_name, tile_tokens, 1, prefetch=False)
    up_row = product_op(up_name, tile_tokens, 1, prefetch=False)
    x_super = weave_bytes(FORMATS[gate_name]) * tile_tokens
    activate_gate, activate_up = SCALAR[activation]
    hidden_at = hidden_op(tile_tokens)

    @register_jitable
    def up(record, x, scratch, neuron, address, n):
        supers = word(record, o.N_SUPERS)
        for tile in range((n + tile_tokens - 1) // tile_tokens):
            x_at, at = x + tile * supers * x_super, hidden_at(record, tile, neuron)
            live: Any = not predicted
            if predicted:
                gate_row(address, 0, x_at, scratch, supers, 0)
                for t in range(tile_tokens):  # a token has what the predictor took for live for it, not for others
                    chosen = f32_at(at + 4 * t) > np.float32(0)
                    value = activate_gate(f32_at(scratch + 4 * t)) if chosen else np.float32(0)
                    set_f32(at + 4 * t, value)
                    live = live or value > np.float32(0)
            if live:
                up_row(address + word(record, o.N_UP), 0, x_at, scratch, supers, 0)
                for t in range(tile_tokens):
                    set_f32(at + 4 * t, f32_at(at + 4 * t) * activate_up(f32_at(scratch + 4 * t)))

    return up


@kernel
def neuron_gate(gate_name: str, up_name: str, activation: str, tokens: str, score_name: str = "") -> Callable[..., Any]:
    """hidden = activation(Gate x) * activation(Up x) of live neurons, and lists of them: of those whose Gate is
    positive, or with `score_name`, the format of a predictor's rows, whose score is."""
    tile_tokens = int(tokens)
    together, predicted = tile_groups(tile_tokens), score_name != ""
    score_rows = product_op(score_name or gate_name, tile_tokens, together)
    score_super = weave_bytes(FORMATS[score_name or gate_name]) * tile_tokens
    activate_gate, _ = SCALAR[activation]
    hidden_at, up = hidden_op(tile_tokens), up_op(gate_name, up_name, activation, tile_tokens, predicted)

    @register_jitable
    def gates(record, x, scratch, cluster, waiting, n):
        """All rows of a cluster that decide, Gate's or the predictor's, and in between rows of the live neurons of the
        cluster `waiting` (-1: none): so memory is busy while those are computed."""
        supers, row = word(record, o.N_SCORE_SUPERS), word(record, o.N_ROW)
        entry = word(record, o.N_TABLE) + cluster * NEURON_ROW
        w = i64_at(entry + NEURON_SCORES)
        turn = i64_at(entry - NEURON_ROW * min(cluster, 1) + NEURON_SCORES) - w - (CLUSTER - together) * row
        x_at, done = x + word(record, o.N_SCORE_X), 0
        for tile in range((n + tile_tokens - 1) // tile_tokens):
            out = hidden_at(record, tile, cluster * CLUSTER)
            for i in range(0, CLUSTER, together):
                ahead = AHEAD if i < CLUSTER - together else turn  # the cluster before this one comes next
                score_rows(w + i * row, row, x_at, out + i * tile_tokens * 4, supers, ahead)
                if waiting >= 0 and tile == 0 and not predicted:
                    done = early(record, x, scratch, waiting, done, i + together, n)
            x_at += supers * score_super

    @register_jitable
    def find_live(record, cluster, n):
        """Write the list of a cluster's live neurons; how many there are."""
        uses = word(record, o.N_USES)
        ids = word(record, o.N_LIVE) + cluster * LIVE_ROW + LIVE_IDS
        live = 0
        for i in range(CLUSTER):
            alive = False
            for token in range(n):
                tile = token // tile_tokens
                at = hidden_at(record, tile, cluster * CLUSTER + i) + 4 * (token - tile * tile_tokens)
                value = f32_at(at) if predicted else activate_gate(f32_at(at))
                set_f32(at, value)
                alive = alive or value > np.float32(0)
            if alive:
                set_i32(ids + 4 * live, np.int32(i))
                live += 1
                if uses != 0:
                    at = uses + 4 * (cluster * CLUSTER + i)
                    set_i32(at, np.int32(i32_at(at) + 1))
        return live

    @register_jitable
    def look_for(record, cluster, live, tick):
        """Mark a cluster's live neurons that are missing, and ask for them where nobody did. Returns how many they are,
        and for how many was asked."""
        cache, ids = word(record, o.N_CACHE), word(record, o.N_LIVE) + cluster * LIVE_ROW + LIVE_IDS
        missing, asked = 0, 0
        for k in range(live):
            i = i32_at(ids + 4 * k)
            neuron = cluster * CLUSTER + i
            entry = word(record, o.N_ADDRESSES) + 8 * neuron
            if touch(cache, entry, tick) > PENDING:
                continue
            if demand(cache, entry, layer_of(record), neuron):
                asked += 1
            if acquire(entry) <= PENDING:
                set_i32(ids + 4 * k, np.int32(i | LIVE_LATE))
                missing += 1
        if asked > 0:
            call_reader(cache, asked)
        return missing, asked

    @register_jitable
    def expect(record, x, scratch, cluster, live, waiting, n):
        """Prefetch what comes first of a cluster's live neurons: they are computed with the next cluster's Gates, or
        with a predictor, whose rows are short, while the next cluster's are prefetched."""
        ids, addresses = word(record, o.N_LIVE) + cluster * LIVE_ROW + LIVE_IDS, word(record, o.N_ADDRESSES)
        done = 0
        for k in range(live):
            i = i32_at(ids + 4 * k)
            if i < LIVE_LATE:
                at = i64_at(addresses + 8 * (cluster * CLUSTER + i))
                for line in range(0, BEGINNING, 64):
                    prefetch(at + line)
            if predicted and waiting >= 0:
                done = early(record, x, scratch, waiting, done, (k + 1) * CLUSTER // live, n)
        if predicted and waiting >= 0:
            early(record, x, scratch, waiting, done, CLUSTER, n)

    @register_jitable
    def early(record, x, scratch, cluster, done, part, n):
        """Up rows of live neurons that are in memory, from number `done` on, `part` CLUSTERths of the list. Returns
        the number of the next."""
        row, addresses = word(record, o.N_LIVE) + cluster * LIVE_ROW, word(record, o.N_ADDRESSES)
        last = (i32_at(row + LIVE_COUNT) * part + CLUSTER - 1) // CLUSTER
        while done < last:
            i = i32_at(row + LIVE_IDS + 4 * done)
            if i < LIVE_LATE:
                neuron = cluster * CLUSTER + i
                up(record, x, scratch, neuron, i64_at(addresses + 8 * neuron), n)
            done += 1
        return done

    def run(record, step, lane):
        n, cache = word(step, TOKENS), word(record, o.N_CACHE)
        x = word(record, o.N_X) + lane * word(record, o.N_X_LANE)
        scratch = word(record, o.N_SCRATCH) + lane * word(record, o.N_SCRATCH_LANE)
        total, tick = word(record, o.N_COUNT), tick_of(record, step)
        pieces = 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
            if cache != 0:
                release(cache + 8 * TICK, tick)
                fence()  # against the reader, which shows a neuron and then looks at the tick
        waiting = np.int64(-1)  # the cluster whose Up rows are on their way from memory
        while piece >= 0:
            cluster = cluster_of(record, piece)
            row = word(record, o.N_LIVE) + cluster * LIVE_ROW
            if not here(word(record, o.N_TABLE) + cluster * NEURON_ROW, NEURON_GATE_WANTED, step, lane):
                return pieces
            gates(record, x, scratch, cluster, waiting, n)
            live = find_live(record, cluster, n)
            missing, asked = look_for(record, cluster, live, tick) if cache != 0 else (0, 0)
            set_i32(row + LIVE_COUNT, np.int32(live))
            set_i32(row + LIVE_MISSING, np.int32(missing))
            expect(record, x, scratch, cluster, live, waiting, n)
            waiting = cluster
            tally(step, lane, LINE_LIVE, live)
            tally(step, lane, LINE_ASKED, asked)
            pieces += 1
            if pieces % PATIENCE == 0:
                give_way(step)
            piece = claim(record, step, lane, total)
        if waiting >= 0:
            early(record, x, scratch, waiting, 0, CLUSTER, n)
        return finish(record, step, pieces, total)

    return run


@kernel
def neuron_all(gate_name: str, up_name: str, activation: str, tokens: str) -> Callable[..., Any]:
    """The same for all neurons, in order."""
    tile_tokens = int(tokens)
    together = tile_groups(tile_tokens)
    gate_rows = product_op(gate_name, tile_tokens, together)
    up_rows = product_op(up_name, tile_tokens, together)
    x_super = weave_bytes(FORMATS[gate_name]) * tile_tokens
    activate_gate, activate_up = SCALAR[activation]

    def run(record, step, lane):
        n = word(step, TOKENS)
        x = word(record, o.N_X) + lane * word(record, o.N_X_LANE)
        scratch = word(record, o.N_SCRATCH) + lane * word(record, o.N_SCRATCH_LANE)
        first, total = word(record, o.N_FIRST), word(record, o.N_COUNT)
        supers, row, bundle = word(record, o.N_SUPERS), word(record, o.N_ROW), word(record, o.N_BUNDLE)
        pieces = 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            cluster = first + piece
            entry = word(record, o.N_TABLE) + cluster * NEURON_ROW
            if not (here(entry, NEURON_GATE_WANTED, step, lane) and here(entry, NEURON_WANTED, step, lane)):
                return pieces
            w_gate, w_up = i64_at(entry + NEURON_GATE), i64_at(entry + NEURON_BUNDLES) + word(record, o.N_UP)
            for tile in range((n + tile_tokens - 1) // tile_tokens):
                out = (
                    word(record, o.N_HIDDEN)
                    + tile * word(record, o.N_HIDDEN_TILE)
                    + cluster * CLUSTER * tile_tokens * 4
                )
                x_at = x + tile * supers * x_super
                for i in range(0, CLUSTER, together):
                    at = out + i * tile_tokens * 4
                    gate_rows(w_gate + i * row, row, x_at, at, supers, AHEAD)
                    up_rows(w_up + i * bundle, bundle, x_at, scratch, supers, together * bundle)
                    for k in range(together * tile_tokens):
                        gated = activate_gate(f32_at(at + 4 * k))
                        set_f32(at + 4 * k, gated * activate_up(f32_at(scratch + 4 * k)))
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run
