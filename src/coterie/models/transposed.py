"""Dense models by neurons: Down transposed and coded anew along the output, so that a neuron's weights are rows.

Formats of single neurons' rows (docs/packed-format.md) have no blocks of 256 columns: Gate and Up in K-quants are coded
anew as well. Where neurons get another order, their rows in Gate, Up, Down and the predictors' scores move with them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError, UsageError
from coterie.kernels.formats import FORMATS
from coterie.kernels.shapes import DOWN_FORMATS
from coterie.models.dequant import dequantise, quantise
from coterie.models.header import BLOCKS
from coterie.models.source import Bytes, DerivedModel, Made, WeightSource
from coterie.models.spec import ModelSpec

ACTIVATIONS = ("relu", "relu2", "drelu")  # those that leave neurons idle
# What stands in for a format that has no rows of single neurons, or that Down cannot have.
NEAREST = {"Q4_1": "Q4_0", "Q4_K": "Q4_0", "Q5_0": "Q8_0", "Q5_K": "Q8_0", "Q6_K": "Q8_0"}
PARTS = {"ffn_gate": "Gate", "ffn_up": "Up", "ffn_down_t": "Down", "fc2": "predictors' scores"}
CHUNK = 1024  # neurons whose Down is transposed at a time

Order = NDArray[np.int64]


class ByNeurons(DerivedModel):
    """A model by neurons. `changes` says in lines what is coded anew; `errors`, by layer, how much Down lost by it:
    |new - old| / |old|, of the layers that were made so far."""

    def __init__(
        self,
        base: WeightSource,
        made: Mapping[str, Made],
        *,
        dropped: frozenset[str],
        metadata: Mapping[str, Any],
        salt: str,
        changes: Sequence[str],
        errors: Mapping[int, float],
    ) -> None:
        super().__init__(base, made, dropped=dropped, metadata=metadata, salt=salt)
        self.changes, self.errors = tuple(changes), errors


def by_neurons(
    source: WeightSource,
    spec: ModelSpec,
    *,
    activation: str | None = None,
    format: str | None = None,
    order: Order | None = None,
) -> ByNeurons:
    """The model in `source`, of shape `spec`, with `ffn_down_t` in place of `ffn_down`.

    `activation`: of a ReLU model whose file does not say so. `format`: Down's, of DOWN_FORMATS; by default as near to
    its own as can be, F16 where rows are no blocks of 32. `order`, int64[layers, ffn_dim]: the neuron at each place. A
    model by neurons keeps its formats. Raises UsageError for what makes no sense, ModelError where `format` does not
    fit.
    """
    activation = _activation(source, spec, activation)
    _check_order(spec, order)
    if format is not None and format not in DOWN_FORMATS:
        raise UsageError(f"neurons cannot be coded as {format!r}; choose one of {', '.join(DOWN_FORMATS)}")
    if spec.sparse and format is not None:
        raise UsageError(f"{source.path.name} is by neurons already and keeps its formats; leave out the format")
    maker, changes, made = _Maker(source, order), Counter[str](), dict[str, Made]()
    parts = PARTS if spec.predictor else {part: label for part, label in PARTS.items() if part != "fc2"}
    for layer in range(len(spec.layers)):
        for part, label in parts.items():
            name = f"blk.{layer}.{part}.weight"
            turned = part == "ffn_down_t" and not spec.sparse
            old = source.tensor(f"blk.{layer}.ffn_down.weight" if turned else name)
            new = _down_format(source, spec, old.format, format) if turned else _row_format(spec, old.format)
            if turned or new != old.format:
                changes[f"{label}{', transposed,' * turned} {source.stored_format(old.name)} to {new}"] += 1
            if turned or new != old.format or order is not None:
                cols = spec.predictor if part == "fc2" else spec.dim
                made[name] = maker.made(layer, part, new, (spec.ffn_dim, cols))
    digest = "" if order is None else sha256(np.ascontiguousarray(order).tobytes()).hexdigest()
    return ByNeurons(
        source,
        made,
        dropped=frozenset(f"blk.{layer}.ffn_down.weight" for layer in range(len(spec.layers))),
        metadata={f"{spec.architecture}.hidden_activation": activation},
        salt=f"by neurons, {activation}, {format}, {digest}",
        changes=[f"{change} in {count} layers" for change, count in changes.items()],
        errors=maker.errors,
    )


def _activation(source: WeightSource, spec: ModelSpec, named: str | None) -> str:
    if named is not None and named not in ACTIVATIONS:
        raise UsageError(f"activation {named!r} leaves no neuron idle; choose one of {', '.join(ACTIVATIONS)}")
    if spec.activation == "gelu" or (named is None and spec.activation not in ACTIVATIONS):
        raise UsageError(
            f"{source.path.name}: with {spec.activation} neurons are never idle, so there is nothing to skip; pack it "
            f"without --sparse, or name the activation of a ReLU model that does not: {', '.join(ACTIVATIONS)}"
        )
    return named or spec.activation


def _check_order(spec: ModelSpec, order: Order | None) -> None:
    if order is None:
        return
    shape = len(spec.layers), spec.ffn_dim
    if order.dtype != np.int64 or order.shape != shape:
        raise UsageError(f"the order of neurons is {order.dtype}{list(order.shape)}, but must be int64{list(shape)}")
    wrong = np.flatnonzero((np.sort(order, axis=1) != np.arange(spec.ffn_dim)).any(axis=1))
    if wrong.size:
        raise UsageError(f"the order of neurons of layer {wrong[0]} is no permutation of {spec.ffn_dim} neurons")


def _row_format(spec: ModelSpec, old: str) -> str:
    return old if spec.sparse or FORMATS[old].subs == 1 else NEAREST[old]


def _down_format(source: WeightSource, spec: ModelSpec, old: str, wanted: str | None) -> str:
    new = wanted or (old if old in DOWN_FORMATS else NEAREST[old])
    block = BLOCKS[new][0]
    if spec.dim % block == 0:
        return new
    if wanted:
        raise ModelError(
            f"{source.path.name}: rows of {spec.dim} columns are no {wanted} blocks of {block}; choose the format F16"
        )
    return "F16"


class _Maker:
    """Makes matrices, and keeps of each part the one that was made last: packing asks for extents in the file's order.

    Several threads may ask, but where they ask for several layers at a time, much is made more than once.
    `errors`: by layer, |new - old| / |old| of a Down that was coded anew.
    """

    def __init__(self, source: WeightSource, order: Order | None) -> None:
        self.source, self.order = source, order
        self.errors: dict[int, float] = {}
        self._kept: dict[str, tuple[int, Bytes]] = {}
        self._lock = Lock()

    def made(self, layer: int, part: str, format: str, shape: tuple[int, int]) -> Made:
        def read(rows: range) -> Bytes:
            return self._matrix(layer, part, format)[rows.start : rows.stop].copy()

        return Made(format, shape, read)

    def _matrix(self, layer: int, part: str, format: str) -> Bytes:
        with self._lock:
            if part in self._kept and self._kept[part][0] == layer:
                return self._kept[part][1]
            self._kept.pop(part, None)  # before there are two
            matrix = self._make(layer, part, format)
            self._kept[part] = layer, matrix
            return matrix

    def _make(self, layer: int, part: str, format: str) -> Bytes:
        name = f"blk.{layer}.{part}.weight"
        if name not in self.source.tensors:
            rows = self._transposed(layer, format)
        elif self.source.tensors[name].format == format:
            rows = self.source.read(name)
        else:
            rows = quantise(np.atleast_2d(self.source.floats(name)), format)
        return rows if self.order is None else rows[self.order[layer]]

    def _transposed(self, layer: int, format: str) -> Bytes:
        """Down's columns as rows. Its floats are those that the source has, before it codes them itself."""
        down = np.atleast_2d(self.source.floats(f"blk.{layer}.ffn_down.weight"))
        values, size = BLOCKS[format]
        rows = np.empty((down.shape[1], len(down) // values * size), np.uint8)
        error = norm = 0.0
        for first in range(0, len(rows), CHUNK):
            old = np.ascontiguousarray(down[:, first : first + CHUNK].T)
            rows[first : first + CHUNK] = quantise(old, format)
            new = dequantise(rows[first : first + CHUNK], format)
            with np.errstate(all="ignore"):  # weights that are no numbers are refused when they are packed
                error += float(np.sum(np.square(new - old), dtype=np.float64))
                norm += float(np.sum(np.square(old), dtype=np.float64))
        self.errors[layer] = (error / norm) ** 0.5 if norm else 0.0
        return rows
