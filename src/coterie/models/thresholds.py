"""Leaving out what matters least in SwiGLU networks: thresholds (TEAL, CATS) and sentence cores (CoreInfer).

All three are lossy. Here they are defined, once each, as networks of the oracle (`llama.forward`), which compute
everything and then put zeros where the method would not have computed: what that costs in quality is what it would
cost anywhere. Positions before `prompt` are computed in full, as the engine does with prompts.

* CATS (arXiv 2404.08763, section 3): a neuron is left out where the magnitude of its activated Gate is under the
  layer's threshold.
* TEAL (arXiv 2408.14690, sections 4 and 5): what goes into a matrix is zero where its magnitude is under the matrix's
  threshold. Here for Gate and Up, which share one, and Down; all matrices at the same sparsity, without the paper's
  greedy allocation, and attention's are left alone.
* CoreInfer (arXiv 2410.18311, section 4): a token's core are the neurons with the largest activations, a share ALPHA,
  the sentence's core those that are in most tokens' cores. Only these are computed for the tokens that follow, and the
  core is chosen again every RESELECT tokens, of all tokens so far, by their full activations. The paper counts
  positive activations, as it comes from ReLU; SwiGLU's have no preferred sign, so magnitudes count here, which is
  far better (docs/decisions/0011-swiglu.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from coterie.errors import ModelError
from coterie.models.llama import Floats, Network, Weights, activated, down, gate_and_up
from coterie.models.spec import ModelSpec

METHODS = ("cats", "teal", "core")
ALPHA = 0.4  # of its neurons are a token's core (CoreInfer, section 5)
RESELECT = 64  # tokens for which a core serves

VERSION = 1
KIND = "coterie thresholds"
LARGEST_FILE = 4 << 20  # bytes
TENSORS = ("gate", "input", "hidden")
PERCENT = range(1, 100)

BINS = 1 << 16  # a magnitude's bin is its exponent and eight bits behind it
BIN_SHIFT = 15


@dataclass(frozen=True)
class Thresholds:
    """Magnitudes, float32[sparsities, layers] each, under which a share of values is dropped: of activated Gates
    (CATS), of what goes into Gate and Up, and of what goes into Down (TEAL). `sparsities`: percent, ascending;
    `model`: the key of the weights they belong to."""

    model: bytes
    sparsities: tuple[int, ...]
    gate: Floats
    input: Floats
    hidden: Floats

    def network(self, method: str, sparsity: int, prompt: int) -> Network:
        """The network of a method at one of the sparsities."""
        if method == "core":
            return core(sparsity / 100, prompt)
        row = self.sparsities.index(sparsity)
        if method == "cats":
            return cats(self.gate[row], prompt)
        return teal(self.input[row], self.hidden[row], prompt)

    def to_bytes(self) -> bytes:
        """What a thresholds file holds."""
        tensors = {name: getattr(self, name).astype("<f4").tobytes() for name in TENSORS}
        head = {"kind": KIND, "version": VERSION, "model": self.model, "sparsities": list(self.sparsities)}
        packed: bytes = msgpack.packb(head | tensors)
        return packed

    @classmethod
    def from_bytes(cls, data: bytes, name: str, model: bytes, layers: int) -> Self:
        """The thresholds in a file called `name`. Raises ModelError, in one line, for what is damaged, of another
        version, or made for another model than that with this key and so many layers."""
        content = _unpacked(data, name)
        if content.get("version") != VERSION:
            raise ModelError(
                f"{name}: not version {VERSION} of the thresholds file; make it anew: coterie calibrate -o"
            )
        if content.get("model") != model:
            raise ModelError(f"{name} was made for another model; make it anew: coterie calibrate -o")
        sparsities = content.get("sparsities")
        if not (
            isinstance(sparsities, list)
            and sparsities
            and all(type(each) is int and each in PERCENT for each in sparsities)
            and sparsities == sorted(set(sparsities))
        ):
            raise ModelError(f"{name}: its sparsities are not ascending whole numbers of percent; the file is damaged")
        shape = len(sparsities), layers
        tensors = {tensor: _tensor(content.get(tensor), shape, f"{name}: {tensor}") for tensor in TENSORS}
        return cls(model, tuple(sparsities), **tensors)


def _unpacked(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = msgpack.unpackb(data)
    except (ValueError, RecursionError, msgpack.UnpackException):
        content = None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ModelError(f"{name} is no thresholds file, or damaged; make one with coterie calibrate -o")
    return content


def _tensor(data: object, shape: tuple[int, int], what: str) -> Floats:
    if not isinstance(data, bytes) or len(data) != 4 * shape[0] * shape[1]:
        raise ModelError(f"{what} is not {shape[0]} x {shape[1]} thresholds; the file is damaged")
    tensor: Floats = np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
    if not (np.isfinite(tensor).all() and (tensor >= 0).all() and (np.diff(tensor, axis=0) >= 0).all()):
        raise ModelError(f"{what} are not finite thresholds that grow with the sparsity; the file is damaged")
    return tensor


class Calibration:
    """Counts the magnitudes in a dense model; its `network` is `feed_forward`, looked on at.

    A histogram a layer and tensor, int64[layers, BINS], so that a text's length takes no memory. A bin is 0.4 % wide.
    """

    def __init__(self, layers: int) -> None:
        self._counts = {name: np.zeros((layers, BINS), np.int64) for name in TENSORS}

    def network(self, spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        gate, up = gate_and_up(weights, layer, h)
        hidden = activated(spec.activation, gate, up)
        for name, values in (("gate", gate_magnitude(spec, gate)), ("input", h), ("hidden", hidden)):
            bins = np.abs(values).view(np.uint32) >> BIN_SHIFT
            self._counts[name][layer] += np.bincount(bins.ravel(), minlength=BINS)
        return down(spec, weights, layer, hidden)

    def thresholds(self, model: bytes, sparsities: Sequence[int]) -> Thresholds:
        """The bounds of bins under which the share of values is nearest to each sparsity."""
        shares = np.array(sparsities)[:, None] / 100
        found = {name: np.empty((len(shares), len(counts)), np.float32) for name, counts in self._counts.items()}
        for name, counts in self._counts.items():
            for layer, row in enumerate(counts):
                below = (np.cumsum(row) - row) / max(1, row.sum())
                nearest = np.abs(below - shares).argmin(axis=1).astype(np.uint32)
                found[name][:, layer] = (nearest << BIN_SHIFT).view(np.float32)
        return Thresholds(model, tuple(sparsities), **found)


def gate_magnitude(spec: ModelSpec, gate: Floats) -> Floats:
    """What CATS compares: the magnitude of the activated Gate."""
    return np.abs(activated(spec.activation, gate, np.ones_like(gate)))


def cats(thresholds: Floats, prompt: int) -> Network:
    """CATS with a threshold a layer."""

    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        gate, up = gate_and_up(weights, layer, h)
        dropped = gate_magnitude(spec, gate) < thresholds[layer]
        return down(spec, weights, layer, _without(activated(spec.activation, gate, up), dropped, prompt))

    return network


def teal(inputs: Floats, hiddens: Floats, prompt: int) -> Network:
    """TEAL with two thresholds a layer: for what goes into Gate and Up, and what goes into Down."""

    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        h = _without(h, np.abs(h) < inputs[layer], prompt)
        hidden = activated(spec.activation, *gate_and_up(weights, layer, h))
        return down(spec, weights, layer, _without(hidden, np.abs(hidden) < hiddens[layer], prompt))

    return network


def core(share: float, prompt: int, every: int = RESELECT) -> Network:
    """CoreInfer that leaves out this share of the neurons, its core chosen at `prompt` and `every` tokens again."""

    def network(spec: ModelSpec, weights: Weights, layer: int, h: Floats) -> Floats:
        hidden = activated(spec.activation, *gate_and_up(weights, layer, h))
        members, dropped = token_cores(hidden), np.zeros(hidden.shape, bool)
        for start in range(prompt, len(h), every):
            dropped[start : start + every] = outside_core(members[:start], share)
        return down(spec, weights, layer, _without(hidden, dropped, prompt))

    return network


def token_cores(hidden: Floats, alpha: float = ALPHA) -> NDArray[np.bool_]:
    """Which neurons are in each token's core, bool[n, ffn_dim]: the share alpha of largest magnitude, and what is as
    large as the least of these."""
    magnitudes, count = np.abs(hidden), max(1, round(alpha * hidden.shape[1]))
    least = np.partition(magnitudes, -count, axis=1)[:, -count]
    core: NDArray[np.bool_] = magnitudes >= least[:, None]
    return core


def outside_core(members: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Which neurons the sentence's core leaves out, bool[ffn_dim]: the share that is in fewest tokens' cores; of
    equals the later ones."""
    order = np.argsort(-members.sum(axis=0), kind="stable")
    outside = np.zeros(len(order), bool)
    outside[order[len(order) - round(share * len(order)) :]] = True
    return outside


def _without(values: Floats, dropped: NDArray[np.bool_], prompt: int) -> Floats:
    """The values with zeros for what is dropped from position `prompt` on."""
    kept = values.copy()
    kept[prompt:][dropped[prompt:]] = 0
    return kept
