"""Ranges of activations: how large what goes into a model's dense blocks gets, found once on a short text.

Static graphs of NPUs round activations with scales that are fixed beforehand (llm.npu, ASPLOS 2025, section 3.3;
SmoothQuant, arXiv 2211.10438). The oracle (`forward`) computes a text, and `RangeFinder` looks on: at the inputs of
the projections to q, k and v ("qkv"), of the output projection ("out"), of Gate and Up ("ffn"), and of Down ("hidden").
"""

from dataclasses import dataclass, field
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError
from coterie.models.llama import Floats, Weights, activated, down, gate_and_up, matrix_product
from coterie.models.spec import ModelSpec

INPUTS = ("qkv", "out", "ffn", "hidden")
FIRST_TOKENS = 1  # of a text: attention sinks there are far out of the others' range, and are counted apart

VERSION = 1
KIND = "coterie activation ranges"
LARGEST_FILE = 64 << 20  # bytes

BINS = 1 << 16  # a magnitude's bin is its exponent and eight bits behind it: 0.4 % wide
BIN_SHIFT = 15


@dataclass(frozen=True)
class Ranges:
    """What was seen, by an input's name: `peaks`, the largest magnitude of every channel, and `squares`, the mean
    square of every channel, float32[layers, width] each; `counts`, how many values had a magnitude in each bin,
    int64[layers, BINS]. `model`: the identity of the weights; `tokens`: how many were seen."""

    model: str
    tokens: int
    peaks: dict[str, Floats]
    squares: dict[str, Floats]
    counts: dict[str, NDArray[np.int64]] = field(repr=False)

    def largest(self, name: str, layer: int, share: float = 1.0) -> float:
        """The magnitude under which this share of the values lies; of 1 the largest of all."""
        if share >= 1:
            return float(self.peaks[name][layer].max())
        below = np.cumsum(self.counts[name][layer])
        index = np.uint32(np.searchsorted(below, share * below[-1]) + 1)  # the bin's upper bound
        return min(float((index << BIN_SHIFT).view(np.float32)), self.largest(name, layer))

    def to_bytes(self) -> bytes:
        """What a ranges file holds. Of the counts only bins with something in them."""
        tensors: dict[str, Any] = {}
        for name in INPUTS:
            layers, bins = np.nonzero(self.counts[name])
            tensors[name] = {
                "peaks": self.peaks[name].astype("<f4").tobytes(),
                "squares": self.squares[name].astype("<f4").tobytes(),
                "layers": layers.astype("<u2").tobytes(),
                "bins": bins.astype("<u2").tobytes(),
                "counts": self.counts[name][layers, bins].astype("<u8").tobytes(),
            }
        head = {"kind": KIND, "version": VERSION, "model": self.model, "tokens": self.tokens}
        packed: bytes = msgpack.packb(head | {"inputs": tensors})
        return packed

    @classmethod
    def from_bytes(cls, data: bytes, name: str, model: str, spec: ModelSpec) -> Self:
        """The ranges in a file called `name`. Raises ModelError for what is damaged, of another version, or of
        another model than the one with this identity and shape."""
        try:
            content = msgpack.unpackb(data)
        except (ValueError, RecursionError, msgpack.UnpackException):
            content = None
        if not isinstance(content, dict) or content.get("kind") != KIND or content.get("version") != VERSION:
            raise ModelError(f"{name} is no file of activation ranges of version {VERSION}, or damaged")
        if content.get("model") != model:
            raise ModelError(f"{name} was made for another model")
        try:
            found = cls(model, int(content["tokens"]), {}, {}, {})
            for each, width in widths(spec).items():
                found._read(each, content["inputs"][each], (len(spec.layers), width))
        except (KeyError, TypeError, ValueError, IndexError):
            raise ModelError(f"{name}: its ranges do not fit the model; the file is damaged") from None
        return found

    def _read(self, name: str, raw: dict[str, bytes], shape: tuple[int, int]) -> None:
        for kind, kept in (("peaks", self.peaks), ("squares", self.squares)):
            values = np.frombuffer(raw[kind], "<f4").astype(np.float32).reshape(shape)
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(kind)
            kept[name] = values
        counts = np.zeros((shape[0], BINS), np.int64)
        layers, bins = (np.frombuffer(raw[kind], "<u2") for kind in ("layers", "bins"))
        counts[layers, bins] = np.frombuffer(raw["counts"], "<u8").astype(np.int64)
        if (counts < 0).any() or not (counts.sum(axis=1) > 0).all():
            raise ValueError("counts")
        self.counts[name] = counts


def widths(spec: ModelSpec) -> dict[str, int]:
    """How wide each input is."""
    return {"qkv": spec.dim, "out": spec.n_heads * spec.head_dim, "ffn": spec.dim, "hidden": spec.ffn_dim}


class RangeFinder:
    """Looks on: `network` and `product` are the oracle's own, and note what they are given.

    The first tokens of a text are left out of the counts, so that a percentile is not about them, but are in the peaks.
    """

    def __init__(self, spec: ModelSpec) -> None:
        layers = len(spec.layers)
        self._tokens = 0
        self._peaks = {name: np.zeros((layers, width), np.float32) for name, width in widths(spec).items()}
        self._squares = {name: np.zeros((layers, width)) for name, width in widths(spec).items()}
        self._counts = {name: np.zeros((layers, BINS), np.int64) for name in INPUTS}

    def network(self, spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        hidden = activated(spec.activation, *gate_and_up(weights, layer, h))
        self._note("ffn", layer, h)
        self._note("hidden", layer, hidden)
        return down(spec, weights, layer, hidden)

    def product(self, weights: Weights, name: str, x: Floats) -> Floats:
        _, layer, role, _ = name.split(".")
        if role == "attn_q":  # k and v have the same input
            self._note("qkv", int(layer), x)
            self._tokens += len(x) if layer == "0" else 0
        elif role == "attn_output":
            self._note("out", int(layer), x)
        return matrix_product(weights, name, x)

    def _note(self, name: str, layer: int, x: Floats) -> None:
        magnitudes = np.abs(x)
        np.maximum(self._peaks[name][layer], magnitudes.max(axis=0), out=self._peaks[name][layer])
        self._squares[name][layer] += np.square(magnitudes, dtype=np.float64).sum(axis=0)
        bins = np.ascontiguousarray(magnitudes[FIRST_TOKENS:], np.float32).view(np.uint32) >> BIN_SHIFT
        self._counts[name][layer] += np.bincount(bins.ravel(), minlength=BINS)

    def ranges(self, model: str) -> Ranges:
        """What was seen so far, for the model of this identity."""
        squares = {name: (s / max(1, self._tokens)).astype(np.float32) for name, s in self._squares.items()}
        return Ranges(model, self._tokens, self._peaks, squares, self._counts)
