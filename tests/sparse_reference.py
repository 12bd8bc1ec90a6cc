"""The arithmetic of single neurons once more in numpy (docs/numerics.md, "Neurons")."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import COLUMNS, INTEGER_FORMATS, Bytes, Floats, floats_of, fma, integer_blocks, quantise

LANES = 16


def across(sums: Floats) -> Floats:
    """The sum of 16 lanes, by halves."""
    n = sums.shape[-1]
    while n > 1:
        n //= 2
        sums = sums[..., :n] + sums[..., n : 2 * n]
    return sums[..., 0]


def padded(array: NDArray[Any], blocks: int) -> NDArray[Any]:
    """Blocks [..., n, ...] along axis 1 filled up to whole superblocks."""
    width = [(0, 0)] * array.ndim
    width[1] = (0, -blocks % LANES)
    return np.pad(array, width)


def neuron_product(name: str, raw: Bytes, x: Floats) -> Floats:
    """float32[n, rows] of x float32[n, columns]: a lane adds blocks l, l + 16, ...; then the lanes are added."""
    n, rows = len(x), len(raw)
    if name in INTEGER_FORMATS:
        w, (q, scale) = integer_blocks(name, raw), quantise(x)
        blocks = w.ints.shape[1]
        ints, factor = padded(w.ints, blocks), padded(w.scale, blocks)
        q, scale = padded(q, blocks), padded(scale, blocks)
        low = None if w.low is None else padded(w.low, blocks)
        total = np.zeros((n, rows, LANES), np.float32)
        for first in range(0, ints.shape[1], LANES):
            here = slice(first, first + LANES)
            dots = np.einsum("nbc,rbc->nrb", q[:, here].astype(np.int64), ints[:, here].astype(np.int64))
            total = fma(dots.astype(np.float32), factor[None, :, here] * scale[:, None, here], total)
            if low is not None:
                sums = scale[:, here] * q[:, here].sum(axis=-1).astype(np.float32)
                total = fma(np.broadcast_to(low[None, :, here], total.shape), sums[:, None] + 0 * total, total)
        return across(total)
    weights = floats_of(name, raw)
    blocks = weights.shape[1] // COLUMNS
    w3, x3 = padded(weights.reshape(rows, -1, COLUMNS), blocks), padded(x.reshape(n, -1, COLUMNS), blocks)
    total = np.zeros((n, rows, LANES), np.float32)
    for first in range(0, w3.shape[1], LANES):
        for c in range(COLUMNS):
            left, right = w3[None, :, first : first + LANES, c], x3[:, None, first : first + LANES, c]
            total = fma(left + 0 * total, right + 0 * total, total)
    return across(total)


def down(name: str, raw: Bytes, hidden: Floats) -> Floats:
    """float32[n, columns]: neurons' rows times hidden float32[n, neurons], added in ascending order."""
    n = len(hidden)
    if name in INTEGER_FORMATS:
        w = integer_blocks(name, raw)
        ints, scale = w.ints.astype(np.float32), w.scale
        total = np.zeros((n, *ints.shape[1:]), np.float32)
        for neuron in range(len(raw)):
            factor = scale[neuron][None] * hidden[:, neuron, None]
            total = fma(ints[neuron][None] + 0 * total, factor[..., None] + 0 * total, total)
        return total.reshape(n, -1)
    weights = floats_of(name, raw)
    flat = np.zeros((n, weights.shape[1]), np.float32)
    for neuron in range(len(raw)):
        flat = fma(weights[neuron][None] + 0 * flat, hidden[:, neuron, None] + 0 * flat, flat)
    return flat


def network(names: tuple[str, ...], raw: tuple[Bytes, ...], activation: str, x: Floats) -> Floats:
    """A sparse feed-forward network, every neuron computed. `raw`: rows of Gate, Up and Down."""
    gate, up = neuron_product(names[0], raw[0], x), neuron_product(names[1], raw[1], x)
    zero = np.float32(0)
    gated = np.where(gate > 0, gate, zero)
    if activation == "relu2":
        gated = gated * gated
    if activation == "drelu":
        up = np.where(up > 0, up, zero)
    return down(names[2], raw[2], gated * up)
