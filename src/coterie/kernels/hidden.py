"""Hidden activations of a feed-forward network that a GPU unit has computed."""

from collections.abc import Callable
from typing import Any

from numba import types

from coterie.kernels.compiler import kernel
from coterie.kernels.formats import COLUMNS
from coterie.kernels.gpu.signatures import BLOCK
from coterie.kernels.operands import (
    HIDDEN_BLOCKS,
    HIDDEN_CLUSTERS,
    HIDDEN_FLOAT,
    HIDDEN_FROM,
    HIDDEN_GIVEN,
    HIDDEN_OUT,
)
from coterie.kernels.shapes import FLOAT_TOKEN, INT8_TOKEN
from coterie.kernels.sync import claim, finish, given, word
from coterie.kernels.vector import ADDRESS, F32, F32x16, I8x16, I32x16, across, floats_at, load, op, set_floats, store


@op(types.void, ADDRESS, ADDRESS)
def take_block(b, source, out):
    """32 whole numbers and their scale, as a GPU unit has them, as one token's sub-block of int8 (quantise.py)."""
    scale, sums = load(b, source, F32, 4 * COLUMNS), []
    for half in range(2):
        ints = b.fptosi(load(b, source, F32x16, 64 * half), I32x16)
        store(b, out, b.trunc(ints, I8x16), 16 * half)
        sums.append(across(b, ints, lambda b, p, q: b.add(p, q)))
    both = b.add(*sums)
    for kind, value in enumerate((scale, b.fmul(scale, b.sitofp(both, F32)), b.neg(both), b.neg(sums[0]))):
        store(b, out, value, COLUMNS + 4 * kind)


@kernel
def take_hidden() -> Callable[..., Any]:
    """One row of hidden activations, of the clusters that a GPU unit has computed, from its blocks
    (gpu/signatures.py) into our tile of one token. One piece: a row is short."""

    def run(record, step, lane):
        if claim(record, step, lane, 1) != 0:
            return 0
        clusters = given(record, HIDDEN_GIVEN, step, word(record, HIDDEN_CLUSTERS))
        source, out = word(record, HIDDEN_FROM), word(record, HIDDEN_OUT)
        for block in range(clusters * word(record, HIDDEN_BLOCKS)):
            if word(record, HIDDEN_FLOAT) != 0:
                at, to = source + block * 4 * COLUMNS, out + block * FLOAT_TOKEN
                set_floats(to, floats_at(at))
                set_floats(to + 64, floats_at(at + 64))
            else:
                take_block(source + block * 4 * BLOCK, out + block * INT8_TOKEN)
        return finish(record, step, 1, 1)

    return run
