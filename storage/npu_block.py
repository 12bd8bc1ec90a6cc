"""A dense block of a layer as a static graph has it: its form, its quantised weights, how its inputs are rounded.

The blocks of a layer are `qkv` (the projections to queries, keys and values), `out` (attention's output projection)
and `ffn` (Gate, Up, activation, Down); behind the last layer there is a `head`. All between them, norms, rope,
attention and residual additions, is other units' work (llm.npu, ASPLOS 2025, section 3.2: these parts depend only on
the number of rows, so one graph serves every chunk of a prompt).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from coterie.models.llama import activated
from coterie.models.spec import Activation
from coterie.storage.npu_quantise import (
    FLOAT_SCHEMES,
    GROUP,
    Floats,
    Quantised,
    Rounding,
    Scheme,
    fit_rounding,
    product,
    quantise,
)

Kind = Literal["qkv", "out", "ffn", "head"]
KINDS: tuple[Kind, ...] = ("ffn", "qkv", "out", "head")  # in the order in which an NPU with too little room gets them


@dataclass(frozen=True)
class Form:
    """What a graph computes apart from its weights: float32[n][width_in] to float32[n][width_out].

    width_in, width_out  of the buffers; the weights may be narrower, the rest of the input is ignored, that of the
                         output zero
    activation           of an ffn, else None
    swapped              compute (W x^T)^T, so that the weights stream and the activations stay (HeteroLLM, section 4.1)
    folded               present the n rows as a x b of them; None: as they are (llm.npu, section 4)
    part                 which rows of the weights, or neurons of an ffn, from the first to behind the last; None: all
    """

    kind: Kind
    layer: int
    n: int
    width_in: int
    width_out: int
    scheme: Scheme
    activation: Activation | None = None
    swapped: bool = False
    folded: tuple[int, int] | None = None
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.activation is not None) != (self.kind == "ffn"):
            raise ValueError("an ffn has an activation, and nothing else has")
        if min(self.n, self.width_in, self.width_out) < 1:
            raise ValueError("rows and widths are at least 1")
        if self.folded is not None and self.folded[0] * self.folded[1] != self.n:
            raise ValueError(f"{self.n} rows are not {self.folded[0]} x {self.folded[1]}")
        if self.folded is not None and self.swapped:
            raise ValueError("a swapped product has its rows as they are")


@dataclass(frozen=True)
class Seen:
    """What calibration found of an input, by channel (models/ranges.py): largest magnitudes and mean squares,
    float32[cols] each."""

    peaks: Floats
    squares: Floats


@dataclass(frozen=True)
class Block:
    """`matrices`: one, or for an ffn Gate above Up, and Down. `roundings`: of each one's input; None with float
    activations."""

    form: Form
    matrices: tuple[Quantised, ...]
    roundings: tuple[Rounding | None, ...]

    def __post_init__(self) -> None:
        if len(self.matrices) != len(self.roundings) or len(self.matrices) != (2 if self.form.kind == "ffn" else 1):
            raise ValueError(f"a block of kind {self.form.kind} with {len(self.matrices)} matrices")
        if self.matrices[0].shape[1] != self.form.width_in or self.matrices[-1].shape[0] != self.form.width_out:
            raise ValueError("the matrices do not fit the form's widths")
        if self.form.kind == "ffn" and self.matrices[0].shape[0] != 2 * self.matrices[1].shape[1]:
            raise ValueError("Gate and Up do not fit Down")

    @property
    def nbytes(self) -> int:
        """Of the weights, packed: what it takes of an NPU's address window."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def digest(self) -> bytes:
        """32 bytes that differ where anything that is computed does."""
        digest = blake2b(repr(astuple(self.form)).encode(), digest_size=32)
        for matrix, rounding in zip(self.matrices, self.roundings, strict=True):
            columns = matrix.outliers, matrix.hot
            for array in (matrix.values, matrix.scales, *(a for c in columns for a in (c.index, c.values, c.scales))):
                digest.update(repr((array.shape, array.dtype.str)).encode() + np.ascontiguousarray(array).tobytes())
            digest.update(repr(matrix.bits).encode())
            if rounding is not None:
                digest.update(repr((rounding.scale, rounding.hot_scale)).encode() + rounding.hot.tobytes())
        return digest.digest()

    def reference(self, x: Floats) -> Floats:
        """What the graph computes, float32[n][width_out] of x float32[n][width_in], in numpy."""
        y = product(x, self.matrices[0], self.roundings[0])
        if self.form.activation is None:
            return y
        gate, up = np.split(y, 2, axis=1)
        return product(activated(self.form.activation, gate, up), self.matrices[1], self.roundings[1])


def make_block(form: Form, weights: Sequence[Floats], seen: Sequence[Seen | None]) -> Block:
    """A block of float weights, float32[rows, cols] each, which are padded to the form's widths: the matrices of a
    qkv or an out that lie above one another, or Gate, Up and Down. `seen`: of the input, and for an ffn of Down's; each
    may be None where activations are floats. Raises ValueError for what does not fit."""
    if form.scheme in FLOAT_SCHEMES:
        weights = [_whole_groups(each, rows=form.kind == "ffn") for each in weights]
    if form.kind != "ffn":
        matrix, rounding = _quantised(form.scheme, list(weights), seen[0])
        return Block(form, (matrix.padded(form.width_out, form.width_in),), (rounding,))
    gate, up, down = weights
    first, rounding = _quantised(form.scheme, [gate, up], seen[0])
    second, inner = _quantised(form.scheme, [down], seen[1])
    rows, cols = first.shape[0], second.shape[1]
    matrices = first.padded(rows, form.width_in), second.padded(form.width_out, cols)
    return Block(form, matrices, (rounding, inner))


def _whole_groups(weights: Floats, rows: bool) -> Floats:
    """With zeros up to whole groups of columns; of a network, whose rows are others' columns, of rows too."""
    down, right = (-size % GROUP for size in weights.shape)
    return np.pad(weights, ((0, down * rows), (0, right)))


def _quantised(scheme: Scheme, weights: list[Floats], seen: Seen | None) -> tuple[Quantised, Rounding | None]:
    """Matrices with one input, as one, and the rounding of that."""
    whole = np.concatenate(weights) if len(weights) > 1 else weights[0]
    if scheme in FLOAT_SCHEMES:
        return quantise(whole, scheme), None
    if seen is None:
        raise ValueError(f"{scheme} rounds activations: it needs their ranges")
    rounding = fit_rounding(seen.peaks)
    return quantise(whole, scheme, rounding.hot, seen.squares), rounding
