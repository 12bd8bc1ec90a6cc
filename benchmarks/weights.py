"""Random weights in packed form, for models of any shape; those of sparse ones with a planted activation profile.

Weights are uniform quanta with scales such that a weight's deviation is about 1/sqrt(columns), and what a layer adds to
the hidden state is small, so that activations stay finite. They are cut from a pool of random blocks at random places,
as fast as a disk writes.

The profile. Coordinate 0 of the hidden state is a constant, CONSTANT, whatever the token (1 to 31 are 0: it has a
block to itself): the embedding has it, and no layer adds to it. Through it every Gate row gets a threshold of its own,
so that its neuron is live for a chosen share of tokens: a power law over neurons, hot ones first. Tokens of one topic
(64 neighbours in the vocabulary) share a part of their embedding, so that a text that dwells on a topic uses the same
neurons again. With predictors, Gates have a low rank, so that predictors can be right: theirs are Gate's own factors,
with each factor and its negative for the sake of the ReLU between. It proves speed and exactness; it proves nothing
about quality.
"""

from dataclasses import dataclass
from statistics import NormalDist

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

from coterie.kernels.formats import COLUMNS, FORMATS
from coterie.kernels.shapes import CLUSTER, SUPERBLOCK
from coterie.models.header import ModelHeader
from coterie.models.spec import ModelSpec
from coterie.storage.pack import pack
from coterie.storage.packer import pack_rows
from coterie.storage.runs import ClusterLayout, Run, cluster_layout, neuron_layout, norm_places

Bytes = NDArray[np.uint8]
POOL = 32 << 20  # bytes of random blocks of one kind
CONSTANT = 64.0
LIVE = 0.1  # of all neurons, on average over tokens
SKEW = 0.8344  # of the power law: a quarter of the neurons does four fifths of the work (PowerInfer, figure 5)
MOST = 0.95  # of tokens that a neuron is live for
TOPIC = 64  # tokens
SHARED = 0.5  # part of an embedding's variance that a topic's tokens share
CAUTION = 0.07  # deviations of a Gate's output by which predictors ask for more than is live: recall for speed
DRAWN = 4  # layers with Gates of their own
AT_ONCE = 4096  # rows that are quantised together
UNIT = 16.0  # of predictors' constant hidden unit
QUIET = 0.25  # of what layers add to the hidden state, so that its deviation stays what thresholds reckon with


def random_blocks(rng: np.random.Generator, name: str, std: float) -> Bytes:
    """Packed blocks uint8[n, block bytes] of weights of this deviation (docs/packed-format.md)."""
    f = FORMATS[name]
    count = POOL // f.block
    blocks = rng.integers(0, 256, (count, f.block), dtype=np.uint8)
    amplitude = std * rng.uniform(0.5, 1.5, (count, 16))
    if name == "Q4_K":  # d * scale * q - dmin * low, with low = scale and dmin = 7.5 d: the quanta's middle is 0
        d = amplitude / (4.6 * 48)
        blocks[:, 0:32] = d.astype("<f2").view(np.uint8)
        blocks[:, 32:64] = (7.5 * d).astype("<f2").view(np.uint8)
        subs = blocks[:, 64:].reshape(count, f.subs, f.sub)
        subs[..., :16] = subs[..., :16] % 32 + 32
        subs[..., 16:32] = subs[..., :16]
    else:
        quanta = {"Q4_0": 4.18, "Q8_0": 73.9}[name]
        if name == "Q4_0":  # no -8, or all weights together would have a mean
            blocks[(blocks & 15) == 0] |= 8
            blocks[(blocks >> 4) == 0] |= 128
        blocks[:, 0:32] = (amplitude / quanta).astype("<f2").view(np.uint8)
    return blocks


class RandomWeights:
    """Makes extents of any run of a model."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, seed: int) -> None:
        self.file, self.spec = file, spec
        self.rng = np.random.Generator(np.random.SFC64(seed))
        self.mix = (2 * len(spec.layers)) ** -0.5  # what a layer adds, beside an embedding of deviation 1
        self.pools: dict[tuple[str, float], Bytes] = {}

    def fill(self, run: Run, extent: int, out: Bytes) -> None:
        count = run.items_of(extent)
        items = out[: count * run.item_bytes].reshape(count, run.item_bytes)
        match run.kind:
            case "norms":
                for at, size in norm_places(self.spec).values():
                    items[0].view("<f4")[at : at + size] = 1
            case "ffn":
                self._bundles(items, cluster_layout(self.file.tensors, self.spec, run.layer))
            case "embedding":
                self._blocks(items, run.format, 1.0)
            case "attention":
                self._blocks(items, run.format, self.mix * (self.spec.n_heads * self.spec.head_dim) ** -0.5)
            case _:
                self._blocks(items, run.format, self.spec.dim**-0.5)

    def _bundles(self, items: Bytes, layout: ClusterLayout) -> None:
        gate, up, down = layout.gate_bytes, layout.down_offset, layout.down_groups * layout.down.block
        for item in items:
            self._blocks(item[:gate], layout.gate.name, layout.dim**-0.5)
            self._blocks(item[gate : gate + layout.gate_bytes], layout.up.name, layout.dim**-0.5)
            self._blocks(item[up : up + down], layout.down.name, self.mix * layout.ffn_dim**-0.5)

    def _blocks(self, out: Bytes, name: str, std: float) -> None:
        """Fill `out`, contiguous, with blocks in a row from a random place of the pool."""
        if (name, std) not in self.pools:
            self.pools[name, std] = random_blocks(self.rng, name, std)
        pool = self.pools[name, std]
        flat, at = out.reshape(-1), 0
        while at < flat.size:
            first = int(self.rng.integers(len(pool)))
            taken = pool[first:].reshape(-1)[: flat.size - at]
            flat[at : at + taken.size] = taken
            at += taken.size


def live_shares(neurons: int) -> NDArray[np.float64]:
    """For what share of tokens each neuron is to be live, the hottest first; LIVE on average."""
    rank = (np.arange(neurons) + 0.5) / neurons
    shares = np.minimum(MOST, LIVE * (1 - SKEW) * rank**-SKEW)
    for _ in range(50):  # what the hottest lose to MOST goes to the others
        shares = np.minimum(MOST, shares * LIVE / shares.mean())
    return shares


class PlantedWeights(RandomWeights):
    """The same for sparse models in Q4_0."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, seed: int) -> None:
        super().__init__(file, spec, seed)
        self.mix *= QUIET
        layout = neuron_layout(file.tensors, spec, 0)
        assert (layout.gate.name, layout.up.name, layout.down.name) == ("Q4_0",) * 3
        below = [NormalDist().inv_cdf(share) for share in live_shares(spec.ffn_dim)]
        self.thresholds = np.array(below, np.float32) / CONSTANT  # weights of coordinate 0
        self.topics = self.rng.standard_normal((-(-spec.vocab // TOPIC), spec.dim), np.float32)

    def fill(self, run: Run, extent: int, out: Bytes) -> None:
        count = run.items_of(extent)
        items = out[: count * run.item_bytes].reshape(count, run.item_bytes)
        first = extent * run.per
        match run.kind:
            case "embedding":
                self._embeddings(first, items)
            case "gate":
                self._gates(first, items)
            case "neurons":
                self._neurons(items, run.layer)
            case _:
                super().fill(run, extent, out)
        if run.kind == "attention" and first < 2:
            items[: 2 - first] = 0  # adds nothing to coordinates 0 to 31

    def _embeddings(self, first: int, items: Bytes) -> None:
        dim, f = self.spec.dim, FORMATS["Q4_0"]
        ids = np.arange(16 * first, 16 * (first + len(items)))
        own = self.rng.standard_normal((ids.size, dim), np.float32)
        rows = SHARED**0.5 * self.topics[np.minimum(ids // TOPIC, len(self.topics) - 1)] + (1 - SHARED) ** 0.5 * own
        rows[:, 0], rows[:, 1:32] = -CONSTANT, 0  # Q4_0 gives the exact value to what is largest
        raw = quantize(rows, gguf.GGMLQuantizationType.Q4_0)
        pack("Q4_0", raw, items.reshape(len(items), -1, f.block))

    def _gates(self, first: int, items: Bytes) -> None:
        layout = neuron_layout(self.file.tensors, self.spec, 0)
        self._blocks(items, "Q4_0", layout.dim**-0.5)
        rows = items.reshape(-1, layout.gate_row)
        low = first * CLUSTER
        wanted = -self.thresholds[low : low + len(rows)]  # times -CONSTANT
        quanta = np.where(wanted < 0, 0, 15)  # less 8
        scales = (wanted / (quanta - 8)).astype("<f2")
        rows[: wanted.size, 0:2] = scales[:, None].view(np.uint8)
        rows[: wanted.size, 32] = rows[: wanted.size, 32] & 0xF0 | quanta
        rows[wanted.size :] = 0

    def _neurons(self, items: Bytes, layer: int) -> None:
        layout = neuron_layout(self.file.tensors, self.spec, layer)
        bundles, size = items.reshape(-1, layout.bundle), layout.down_offset - layout.up_offset
        rows = np.empty((2, len(bundles), size), np.uint8)
        self._blocks(rows[0], "Q4_0", layout.dim**-0.5)
        self._blocks(rows[1], "Q4_0", self.mix * (LIVE * layout.ffn_dim) ** -0.5)
        rows[1, :, 0:2] = 0  # the scale of coordinates 0 to 31
        bundles[:, layout.up_offset :][:, : 2 * size] = np.concatenate(list(rows), axis=1)


@dataclass(frozen=True)
class Drawn:
    """A layer's predictor and Gate, packed: raw rows of the first matrix, rows of single neurons of the others."""

    first: Bytes
    second: Bytes
    gate: Bytes


class PredictedWeights(PlantedWeights):
    """Gates of low rank, and predictors that know it. Layers DRAWN apart have the same, which saves most of the time
    that a model takes."""

    def __init__(self, file: ModelHeader, spec: ModelSpec, seed: int) -> None:
        super().__init__(file, spec, seed)
        self.drawn: dict[int, Drawn] = {}

    def fill(self, run: Run, extent: int, out: Bytes) -> None:
        count = run.items_of(extent)
        items = out[: count * run.item_bytes].reshape(count, run.item_bytes)
        first = extent * run.per
        match run.kind:
            case "predictor":
                rows = self._of(run.layer).first[16 * first : 16 * (first + count)]
                pack("Q4_0", rows, items.reshape(count, -1, FORMATS["Q4_0"].block))
            case "scores":
                self._rows(self._of(run.layer).second, first, items.reshape(count * CLUSTER, -1))
            case "neurons":
                self._neurons(items, run.layer)
                layout = neuron_layout(self.file.tensors, self.spec, run.layer)
                self._rows(self._of(run.layer).gate, first, items.reshape(-1, layout.bundle)[:, : layout.up_offset])
            case _:
                super().fill(run, extent, out)

    def _of(self, layer: int) -> Drawn:
        if layer % DRAWN not in self.drawn:
            self.drawn[layer % DRAWN] = self._draw()
        return self.drawn[layer % DRAWN]

    def _draw(self) -> Drawn:
        """gate = factors @ basis, with the thresholds in coordinate 0. The predictor's constant unit has a block to
        itself."""
        spec, rng = self.spec, self.rng
        rank = (spec.predictor - COLUMNS) // 2
        basis = rng.standard_normal((rank, spec.dim), np.float32) * np.float32(spec.dim**-0.5)
        basis[:, :COLUMNS] = 0
        factors = rng.standard_normal((spec.ffn_dim, rank), np.float32) * np.float32(rank**-0.5)
        gate = factors @ basis
        gate[:, 0] = -self.thresholds
        constant, weights = np.zeros((COLUMNS, spec.dim), np.float32), np.zeros((spec.ffn_dim, COLUMNS), np.float32)
        constant[0, 0] = -UNIT / CONSTANT
        weights[:, 0] = (self.thresholds * CONSTANT + CAUTION) / UNIT
        first = quantize(np.concatenate([basis, -basis, constant]), gguf.GGMLQuantizationType.Q4_0)
        return Drawn(first, packed_rows(np.concatenate([factors, -factors, weights], axis=1)), packed_rows(gate))

    def _rows(self, rows: Bytes, first: int, out: Bytes) -> None:
        """Rows of the neurons from cluster `first` on, uint8[neurons][row bytes]."""
        here = rows[first * CLUSTER : first * CLUSTER + len(out)]
        out[: len(here)] = here


def packed_rows(rows: NDArray[np.float32]) -> Bytes:
    """Rows of single neurons in Q4_0, uint8[neurons][row bytes]."""
    supers = -(-rows.shape[1] // (SUPERBLOCK * COLUMNS))
    out = np.empty((len(rows), supers * FORMATS["Q4_0"].block), np.uint8)
    for first in range(0, len(rows), AT_ONCE):
        part = quantize(rows[first : first + AT_ONCE], gguf.GGMLQuantizationType.Q4_0)
        pack_rows("Q4_0", part, out[first : first + AT_ONCE])
    return out
