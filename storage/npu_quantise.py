"""Weights and activations in the few bits that static graphs of NPUs compute with, and what such graphs then give.

Every function here is plain numpy and the definition that graphs of any runtime are compared with.

* `w8a8`: weights int8, symmetric, a scale per row (output channel) or one for all; activations int8, symmetric, one
  scale for all that was found beforehand (llm.npu, ASPLOS 2025, section 3.3; SmoothQuant, arXiv 2211.10438).
* `w4a8-outliers`: weights int4 with a scale per row, and outliers in int8 (PowerInfer-2, arXiv 2406.06282, section
  7.6, after AWQ and MixQ). Outliers are whole columns (input channels), the sixteenth part that four bits treat
  worst. The few largest weights of every row (1 % of them) would leave a third less error, but each row has them
  elsewhere, and a static graph has no sparse matrices: they would be a second full one. Columns make a dense product
  of a sixteenth of the work: `y = s4 * (q4 @ x) + s8 * (q8 @ x[columns])`. What is left to four bits is clipped where
  that lessens the error of its row.
* `w4a16`: weights int4 in groups of GROUP along a row, activations float (HeteroLLM, arXiv 2501.14794, section 5).
  The groups' scales are half floats, from the largest weight and its sign, as GGML's Q4_0 has them: weights that come
  from Q4_0 are kept exactly.
* `w8a16`: the same with int8 weights, the scale from the largest magnitude, for weights that four bits would change:
  those of Q8_0 are kept.
* Plain int4 with a scale per row (`four_bits`) is what QNN offers, a reference for the error of the others.

Activations of a few channels are far larger than all others' (a SwiGLU's up to a thousand times). With them in range,
the step of int8 would swallow the rest; without, what clipping removes is lost. So a range is made for the others, and
what clipping removes in the HOT largest channels is rounded with a second, coarse scale and multiplied apart:
`y = q(x) @ W + q'(x - clipped x)[hot] @ W[hot]`. This is llm.npu's shadow execution, which has a CPU add the second
term (section 3.3), as a small product inside the static graph: under 3 % of the channels have 80 % of all outliers
(figure 11). What is clipped elsewhere is lost, and `clipped_away` says how much that is.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Int8s = NDArray[np.int8]
Index = NDArray[np.int64]
Scheme = Literal["w8a8", "w4a8-outliers", "w4a16", "w8a16"]

SCHEMES: tuple[Scheme, ...] = ("w8a8", "w4a8-outliers", "w4a16", "w8a16")
SCHEME: Scheme = "w8a8"  # what graphs of prompts are made in
FLOAT_SCHEMES: tuple[Scheme, ...] = ("w4a16", "w8a16")  # with float activations: no ranges, and weights in groups
GROUP = 32  # columns that share a scale in those
OUTLIERS = 1 / 16  # of the columns are kept in eight bits
STEP = 32  # columns: what NPUs pad sizes to (HeteroLLM, section 3.2)
CLIPS = np.linspace(0.45, 1.0, 12, dtype=np.float32)  # of a row's largest weight, tried as the largest kept
HOT = 32  # channels whose clipped activations are multiplied apart
MARGIN = 1.5  # of what was seen on a short text, as other texts go beyond it
NEAR = 1.25  # where the largest channel is within this of the others, none is hot


@dataclass(frozen=True)
class Rounding:
    """How an input is rounded to int8: value / scale. What is clipped of the channels `hot`, int64[m], ascending, is
    rounded with hot_scale."""

    scale: float
    hot: Index
    hot_scale: float


@dataclass(frozen=True)
class Columns:
    """Some columns of a matrix in eight bits: index int64[m], ascending; values int8[rows, m]; scales float32[rows]."""

    index: Index
    values: Int8s
    scales: Floats


@dataclass(frozen=True)
class Quantised:
    """A matrix of weights (outputs x inputs).

    values   int8[rows, cols]: -127..127; in four bits -7..7, with groups -8..7; 0 in the columns of outliers
    scales   float32[rows, groups]: a value times its scale is the weight; one group a row but in FLOAT_SCHEMES
    bits     of `values`: 8 or 4
    outliers columns that `values` leaves out
    hot      columns again, for what is clipped of their activations
    """

    values: Int8s
    scales: Floats
    bits: int
    outliers: Columns
    hot: Columns

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.values.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        """Packed, with two four-bit values a byte: what an NPU has to hold."""
        parts = self.outliers, self.hot
        return (
            self.values.size * self.bits // 8 + self.scales.nbytes + sum(p.values.size + p.scales.nbytes for p in parts)
        )

    def floats(self) -> Floats:
        """The weights that are meant, float32[rows, cols]."""
        rows, cols = self.shape
        grouped = self.values.reshape(rows, self.scales.shape[1], -1) * self.scales[:, :, None]
        weights: Floats = grouped.reshape(rows, cols)
        weights[:, self.outliers.index] = self.outliers.values * self.outliers.scales[:, None]
        return weights

    def halves(self) -> "tuple[Quantised, Quantised]":
        """The upper and the lower half of the rows."""
        middle = len(self.values) // 2
        return self._rows(slice(None, middle)), self._rows(slice(middle, None))

    def _rows(self, rows: slice) -> "Quantised":
        columns = (Columns(part.index, part.values[rows], part.scales[rows]) for part in (self.outliers, self.hot))
        return Quantised(self.values[rows], self.scales[rows], self.bits, *columns)

    def padded(self, rows: int, cols: int) -> "Quantised":
        """The same with zeros in further rows and columns. Raises ValueError where it has more already, or a group
        would be cut."""
        down, right = rows - self.shape[0], cols - self.shape[1]
        groups = self.scales.shape[1]
        width = self.shape[1] // groups
        if down < 0 or right < 0 or (groups > 1 and right % width):
            raise ValueError(f"a matrix of {self.shape} cannot be padded to {rows} x {cols}")
        return Quantised(
            np.pad(self.values, ((0, down), (0, right))),
            np.pad(self.scales, ((0, down), (0, right // width if groups > 1 else 0)), constant_values=1),
            self.bits,
            _more_rows(self.outliers, down),
            _more_rows(self.hot, down),
        )


def token_scheme(formats: Collection[str]) -> Scheme:
    """The scheme of a token's graph, by what its weights are coded in: with float activations, since a token takes as
    long as its weights are read; in four bits (HeteroLLM, section 5) where that keeps them."""
    return "w4a16" if set(formats) == {"Q4_0"} else "w8a16"


def quantise(weights: Floats, scheme: Scheme, hot: Index | None = None, importance: Floats | None = None) -> Quantised:
    """float32[rows, cols] in a scheme's form. `hot`: the rounding's hot channels; `importance`, float32[cols]: how much
    an error in a column weighs, the mean square of its activations; None: all the same."""
    if scheme in FLOAT_SCHEMES:
        return four_bits_in_groups(weights) if scheme == "w4a16" else eight_bits_in_groups(weights)
    made = eight_bits(weights) if scheme == "w8a8" else four_bits_and_outliers(weights, importance=importance)
    return made if hot is None else replace(made, hot=_columns(weights, hot))


def eight_bits(weights: Floats, per_tensor: bool = False) -> Quantised:
    """int8, symmetric, with a scale per row, or one for all."""
    largest = np.abs(weights).max(axis=1, initial=0)
    scales = _scales(np.full_like(largest, largest.max(initial=0)) if per_tensor else largest, 127)
    return _plain(_rounded(weights, scales, 127), scales[:, None], 8)


def four_bits(weights: Floats) -> Quantised:
    """int4, symmetric, a scale per row by its largest weight: what an NPU without groups does at its plainest."""
    scales = _scales(np.abs(weights).max(axis=1, initial=0), 7)
    return _plain(_rounded(weights, scales, 7), scales[:, None], 4)


def four_bits_in_groups(weights: Floats, group: int = GROUP) -> Quantised:
    """int4 in groups of columns: the weight of largest magnitude is -8 times the scale. Raises ValueError where
    columns are not whole groups."""
    grouped = _grouped(weights, group)
    index = np.abs(grouped).argmax(axis=2)[:, :, None]
    largest: Floats = np.take_along_axis(grouped, index, axis=2)[:, :, 0]
    return _in_groups(grouped, largest / np.float32(-8), 4)


def eight_bits_in_groups(weights: Floats, group: int = GROUP) -> Quantised:
    """int8 in groups of columns: the largest magnitude is 127 times the scale. Raises ValueError as the above."""
    grouped = _grouped(weights, group)
    largest: Floats = np.abs(grouped).max(axis=2)
    return _in_groups(grouped, largest / np.float32(127), 8)


def four_bits_and_outliers(
    weights: Floats, share: float = OUTLIERS, importance: Floats | None = None, step: int = STEP
) -> Quantised:
    """int4 with a scale per row, and the share of columns that lose most by it in int8, rounded up to a multiple of
    `step`, though never all."""
    cols = weights.shape[1]
    count = min(-(-int(np.ceil(share * cols)) // step) * step, (cols - 1) // step * step)
    weighing = np.ones(cols, np.float32) if importance is None else importance
    index = np.sort(np.argsort(-_harm(weights) * weighing, kind="stable")[:count])
    rest = weights.copy()
    rest[:, index] = 0
    scales = _clipped_scales(rest, 7, weighing)
    made = _plain(_rounded(rest, scales, 7), scales[:, None], 4)
    return replace(made, outliers=_columns(weights, index))


def fit_rounding(peaks: Floats, hot: int = HOT, margin: float = MARGIN) -> Rounding:
    """The rounding of an input whose channels had these largest magnitudes, float32[cols]: a range for all but the
    `hot` largest of them, and a coarse one for those."""
    order = np.argsort(-peaks, kind="stable")
    top = margin * float(peaks[order[0]])
    rest = margin * float(peaks[order[hot]]) if hot < len(peaks) else 0.0
    if not hot or rest <= 0 or top <= NEAR * rest:
        return Rounding(_unit(top), np.empty(0, np.int64), 1.0)
    return Rounding(_unit(rest), np.sort(order[:hot]), _unit(top - rest))


def rounded(x: Floats, scale: float) -> Floats:
    """Activations as int8 numbers -128..127, in float32: what is beyond is clipped."""
    numbers: Floats = np.clip(np.rint(x / np.float32(scale)), -128, 127)
    return numbers


def clipped_away(x: Floats, scale: float) -> Floats:
    """What rounding to int8 with this scale clips off, float32: x - clipped x."""
    unit = np.float32(scale)
    beyond: Floats = x - np.clip(x, -128 * unit, 127 * unit)
    return beyond


def product(x: Floats, weights: Quantised, rounding: Rounding | None) -> Floats:
    """x float32[n, cols] times the weights: float32[n, rows]. `rounding`: that of int8 activations; None: they are
    floats. Sums of integers are exact, as graphs' int32 sums are."""
    if rounding is None:
        return x @ weights.floats().T
    y = _integers(rounded(x, rounding.scale), weights.values, weights.scales[:, 0], rounding.scale)
    index = weights.outliers.index
    if len(index):
        y += _integers(
            rounded(x[:, index], rounding.scale), weights.outliers.values, weights.outliers.scales, rounding.scale
        )
    if len(rounding.hot):
        beyond = rounded(clipped_away(x[:, rounding.hot], rounding.scale), rounding.hot_scale)
        y += _integers(beyond, weights.hot.values, weights.hot.scales, rounding.hot_scale)
    return y


def _grouped(weights: Floats, group: int) -> Floats:
    rows, cols = weights.shape
    if cols % group:
        raise ValueError(f"{cols} columns are not whole groups of {group}")
    return weights.reshape(rows, -1, group)


def _in_groups(grouped: Floats, scales: Floats, bits: int) -> Quantised:
    """float32[rows, groups, group] in so many bits, with these scales as half floats."""
    halves = scales.astype(np.float16).astype(np.float32)
    halves[halves == 0] = 1
    most = (1 << bits - 1) - 1
    values = np.clip(np.rint(grouped / halves[:, :, None]), -most - (bits == 4), most).astype(np.int8)
    return _plain(values.reshape(len(grouped), -1), halves, bits)


def _integers(q: Floats, values: Int8s, scales: Floats, unit: float) -> Floats:
    """q @ values.T, scaled back. In float64, where sums of such integers are exact."""
    sums = q.astype(np.float64) @ values.T.astype(np.float64)
    scaled: Floats = sums.astype(np.float32) * (scales * np.float32(unit))
    return scaled


def _harm(weights: Floats) -> Floats:
    """By column, how much four bits lose in it and by it, in squared error: what plain rounding loses, and what is
    beyond three deviations of its row and so stretches the scale of all others."""
    beyond = np.maximum(np.abs(weights) - 3 * weights.std(axis=1, keepdims=True), 0)
    harm: Floats = (np.square(weights - four_bits(weights).floats()) + np.square(beyond)).sum(axis=0)
    return harm


def _clipped_scales(weights: Floats, limit: int, weighing: Floats) -> Floats:
    """Per row the scale of least weighed squared error, float32[rows], among CLIPS of the largest weight."""
    largest = np.abs(weights).max(axis=1, initial=0)
    best, least = _scales(largest, limit), np.full(len(weights), np.inf)
    for clip in CLIPS:
        scales = _scales(clip * largest, limit)
        error = (np.square(weights - _rounded(weights, scales, limit) * scales[:, None]) * weighing).sum(axis=1)
        best = np.where(error < least, scales, best)
        least = np.minimum(error, least)
    return best


def _unit(largest: float) -> float:
    """The scale that makes this magnitude 127, as a float32; of nothing 1."""
    return float(np.float32(largest / 127)) or 1.0


def _scales(largest: Floats, limit: int) -> Floats:
    """Scales by which the largest magnitudes become `limit`; 1 where all is zero."""
    scales = (largest / limit).astype(np.float32)
    scales[scales == 0] = 1
    return scales


def _rounded(weights: Floats, scales: Floats, limit: int) -> Int8s:
    values: Int8s = np.clip(np.rint(weights / scales[:, None]), -limit, limit).astype(np.int8)
    return values


def _plain(values: Int8s, scales: Floats, bits: int) -> Quantised:
    none = Columns(np.empty(0, np.int64), np.empty((len(values), 0), np.int8), np.ones(len(values), np.float32))
    return Quantised(values, scales, bits, none, none)


def _columns(weights: Floats, index: Index) -> Columns:
    made = eight_bits(weights[:, index])
    return Columns(index, made.values, made.scales[:, 0])


def _more_rows(part: Columns, count: int) -> Columns:
    values = np.pad(part.values, ((0, count), (0, 0)))
    return Columns(part.index, values, np.pad(part.scales, (0, count), constant_values=1))
