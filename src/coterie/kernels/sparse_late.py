"""Live neurons that were not in memory when their cluster was decided: as they arrive (docs/sparse.md)."""

from collections.abc import Callable
from typing import Any

from numba.extending import register_jitable

from coterie.kernels import operands as o
from coterie.kernels.atomics import acquire, cycles, pause
from coterie.kernels.cache import PENDING, SERVED, call_reader, demand
from coterie.kernels.compiler import kernel
from coterie.kernels.record import ABORT, LINE_ASKED, LINE_PROGRESS, LINE_STALLED, NAP, TOKENS
from coterie.kernels.shapes import CLUSTER, LIVE_COUNT, LIVE_IDS, LIVE_LATE, LIVE_MISSING, LIVE_ROW
from coterie.kernels.sparse import cluster_of, layer_of, up_op
from coterie.kernels.sync import claim, finish, prepare, sleep_on, tally, word
from coterie.kernels.vector import i32_at, i64_at

LOOKS = 200  # times a lane looks for a neuron before it sleeps: some microseconds


@register_jitable
def await_neuron(record, neuron, step, lane):
    """Wait until a neuron is in memory that was asked for, and ask again where the reader had no room for it; its
    address, or 0 if the step is abandoned meanwhile."""
    cache, entry = word(record, o.N_CACHE), word(record, o.N_ADDRESSES) + 8 * neuron
    at = acquire(entry)
    looks, begun = 0, cycles()
    while at <= PENDING:
        if i64_at(word(step, ABORT)) != 0:
            return at * 0
        if at == 0 and demand(cache, entry, layer_of(record), neuron):
            call_reader(cache, 1)
            tally(step, lane, LINE_ASKED, 1)
        if looks < LOOKS:
            looks += 1
            pause()
        else:
            served = acquire(cache + SERVED)
            at = acquire(entry)
            if at == PENDING:
                tally(step, lane, LINE_PROGRESS, 2)
                sleep_on(cache + SERVED, served + 1, word(step, NAP))
        at = acquire(entry)
    if looks > 0:
        tally(step, lane, LINE_STALLED, cycles() - begun)
    return at


@kernel
def neuron_late(gate_name: str, up_name: str, activation: str, tokens: str, score_name: str = "") -> Callable[..., Any]:
    """The rest of `neuron_gate`: hidden activations of the neurons that it found missing."""
    up = up_op(gate_name, up_name, activation, int(tokens), score_name != "")

    @register_jitable
    def late(record, step, lane, x, scratch, cluster):
        """Those of one cluster; False if the step is abandoned."""
        row = word(record, o.N_LIVE) + cluster * LIVE_ROW
        if i32_at(row + LIVE_MISSING) == 0:
            return True
        for k in range(i32_at(row + LIVE_COUNT)):
            i = i32_at(row + LIVE_IDS + 4 * k)
            if i >= LIVE_LATE:
                neuron = cluster * CLUSTER + i - LIVE_LATE
                address = await_neuron(record, neuron, step, lane)
                if address == 0:
                    return False
                up(record, x, scratch, neuron, address, word(step, TOKENS))
        return True

    def run(record, step, lane):
        x = word(record, o.N_X) + lane * word(record, o.N_X_LANE)
        scratch = word(record, o.N_SCRATCH) + lane * word(record, o.N_SCRATCH_LANE)
        total, pieces = word(record, o.N_COUNT), 0
        piece = claim(record, step, lane, total)
        if piece >= 0:
            prepare(record, step, lane)
        while piece >= 0:
            if not late(record, step, lane, x, scratch, cluster_of(record, piece)):
                return pieces
            pieces += 1
            piece = claim(record, step, lane, total)
        return finish(record, step, pieces, total)

    return run
