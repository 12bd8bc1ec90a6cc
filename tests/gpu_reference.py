"""What GPU kernels compute but for matrices, in numpy, bit by bit in the order of docs/numerics.md.

Rows are float32[n][columns]. Matrices and rounding are in `reference`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import COLUMNS, Blocks, Floats, floats_of, fma, integer_blocks, quantise

from coterie.kernels.formats import FORMATS
from coterie.kernels.gpu.signatures import BLOCK

SPAN, TILE = 256, 64  # positions
F = np.float32
NOTHING = F(-1e30)
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def fused(x: Any, y: Any, z: Any) -> Floats:
    """x * y + z, rounded once; numbers stand for arrays of them."""
    return fma(*(np.array(v, F) for v in np.broadcast_arrays(x, y, z)))


def blocks_of(x: Floats) -> Floats:
    """Rows as a GPU unit's products of integers read them, float32[n][blocks * 34]: whole numbers, scale, their sum."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % COLUMNS)))
    whole, scale = quantise(padded)
    rows: Floats = np.concatenate([whole, scale[..., None], whole.sum(-1, keepdims=True)], axis=-1).astype(F)
    assert rows.shape[-1] == BLOCK
    return rows.reshape(len(x), -1)


def left_over(x: Floats) -> Floats:
    """What rounding of rows leaves: the second plane, not yet rounded."""
    whole, scale = quantise(x)
    return fused(-scale[..., None], whole.astype(F), x.reshape(whole.shape)).reshape(x.shape)


def by_halves(v: Floats) -> Floats:
    """Sums over the last axis, of 16."""
    while v.shape[-1] > 1:
        v = v[..., : v.shape[-1] // 2] + v[..., v.shape[-1] // 2 :]
    return v[..., 0]


def normed(x: Floats, weight: Floats, eps: float) -> Floats:
    """rms_norm over the last axis."""
    dim = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -dim % 16)])
    squares = np.zeros((*x.shape[:-1], 16), F)
    for c in range(0, dim, 16):
        squares = fused(padded[..., c : c + 16], padded[..., c : c + 16], squares)
    factor = F(1) / np.sqrt(by_halves(squares) / F(dim) + F(eps))
    result: Floats = x * factor[..., None] * weight
    return result


def exp(x: Floats) -> Floats:
    bounded = np.maximum(np.minimum(x, F(88)), F(-87))
    n = np.rint(bounded * F(1.4426950408889634))
    r = fused(n, F(-0.693359375), bounded)
    r = fused(n, F(2.12194440054690583e-4), r)
    p = fused(F(POLYNOMIAL[0]), r, F(POLYNOMIAL[1]))
    for coefficient in POLYNOMIAL[2:]:
        p = fused(p, r, F(coefficient))
    p = fused(p, r * r, r) + F(1)
    result: Floats = np.where(x < F(-87), F(0), p * ((n.astype(np.int32) + 127) << 23).view(F))
    return result


def activated(name: str, gate: Floats, up: Floats) -> Floats:
    """activation(gate) * up"""
    one, positive = F(1), np.maximum(gate, F(0))
    match name:
        case "silu":
            value = gate / (exp(-gate) + one)
        case "gelu":
            z = fused(gate * gate * gate, F(0.044715), gate) * F(1.5957691216057308)
            value = gate / (exp(-z) + one)
        case "relu2":
            value = positive * positive
        case _:
            value = positive
    result: Floats = value * (np.maximum(up, F(0)) if name == "drelu" else up)
    return result


def embedded(name: str, raw: NDArray[np.uint8], scale: float) -> Floats:
    """Rows of an embedding, float32[n][columns]: every step rounded."""
    if FORMATS[name].is_float:
        return floats_of(name, raw) * F(scale)
    w: Blocks = integer_blocks(name, raw)
    weights = w.ints.astype(F) * w.scale[..., None]
    if w.low is not None:
        weights = weights + w.low[..., None]
    result: Floats = (weights * F(scale)).reshape(len(raw), -1)
    return result


def rotated(x: Floats, table: Floats, scale: float) -> Floats:
    """Heads [n][heads][dim], turned by rows [n][cos half, sin half], times `scale`."""
    half = table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    low, high = x[..., :half], x[..., half : 2 * half]
    parts = [low * cos - high * sin, low * sin + high * cos, x[..., 2 * half :]]
    result: Floats = np.concatenate(parts, axis=-1) * F(scale)
    return result


def attended(q: Floats, keys: Floats, values: Floats, position: int, window: int) -> Floats:
    """Attention of one row's queries [heads][dim] to keys and values [heads][positions][dim]."""
    first = max(0, position + 1 - window) if window else 0
    state = np.full(len(q), NOTHING), np.zeros(len(q), F), np.zeros(q.shape, F)
    for span in range(first // SPAN * SPAN, position + 1, SPAN):
        own = np.full(len(q), NOTHING), np.zeros(len(q), F), np.zeros(q.shape, F)
        for tile in range(max(span, first // TILE * TILE), min(span + SPAN, position + 1), TILE):
            at = np.arange(tile, tile + TILE)
            seen = (at >= first) & (at <= position)
            own = _tile(own, q, keys[:, at], values[:, at], seen)
        top = np.maximum(state[0], own[0])
        old, new = exp(state[0] - top), exp(own[0] - top)
        mass = state[1] * old + own[1] * new
        state = top, mass, state[2] * old[:, None] + own[2] * new[:, None]
    result: Floats = state[2] / state[1][:, None]
    return result


State = tuple[Any, Any, Any]


def _tile(state: State, q: Floats, keys: Floats, values: Floats, seen: NDArray[np.bool_]) -> State:
    """A span's softmax state after 64 more positions, of which those `seen` count."""
    top, mass, mixed = state
    scores = np.zeros((len(q), TILE), F)
    for d in range(q.shape[1]):
        scores = fused(q[:, d, None], keys[:, :, d], scores)
    scores[:, ~seen] = -np.inf
    now = np.maximum(top, scores.max(-1))
    p, keep = exp(scores - now[:, None]), exp(top - now)
    parts = [p[:, i : i + 16] for i in range(0, TILE, 16)]
    mass = mass * keep + by_halves((parts[0] + parts[1]) + (parts[2] + parts[3]))
    mixed = mixed * keep[:, None]
    for j in np.flatnonzero(seen):
        mixed = fused(p[:, j, None], values[:, j], mixed)
    return now, mass, mixed
