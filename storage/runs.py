"""Runs of extents: how a model's weights are cut for the flash file and for memory (docs/packed-format.md).

A run is one matrix, or the neuron clusters of one layer, cut into extents that begin on pages. An extent is what is
read, checked, pinned and freed as one. The same bytes lie in the file and in memory. The cut follows from a model's
header alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.kernels.formats import COLUMNS, FORMATS, ROWS, Format
from coterie.kernels.shapes import CLUSTER, DOWN_FORMATS, SUPERBLOCK
from coterie.models.header import TensorInfo
from coterie.models.spec import ModelSpec
from coterie.storage.arena import LINE, round_up
from coterie.storage.pack import packed_bytes, padded_columns

PAGE = 4096  # bytes: where extents begin
SECTOR = 512  # bytes: where bundles of single neurons begin
SMALL, LARGE = 256 << 10, 1 << 20  # bytes of an extent, about, for small and large models
LARGE_MODEL = 1 << 30  # bytes of weights
LOOKUP = 96 << 10  # bytes of an extent of the embedding at most: single rows are looked up in it
EMBEDDINGS = ("embedding", "lookup")  # kinds


@dataclass(frozen=True)
class Run:
    """Items (groups of 16 rows, neuron clusters, or the one block of all norms) packed `per` an extent.

    `kind`: "norms", "embedding" ("lookup" in a part that has no head), "qkv" (`part` counts a layer's runs of
    neighbouring formats), "attention" (the output projection), "ffn", "output"; of a sparse model, instead of "ffn",
    "gate" and "neurons" (Gate rows, bundles), with predictors "predictor", "scores" and "neurons"; `layer` is -1 where
    there is none; `offset`: bytes from the file's start.
    """

    kind: str
    layer: int
    part: int
    format: str
    items: int
    item_bytes: int
    per: int
    offset: int

    @property
    def extents(self) -> int:
        return -(-self.items // self.per)

    @property
    def stride(self) -> int:
        """Bytes from one extent to the next."""
        return round_up(self.per * self.item_bytes, PAGE)

    def items_of(self, extent: int) -> int:
        return min(self.per, self.items - extent * self.per)

    def extent_bytes(self, extent: int) -> int:
        """Bytes of an extent, padding included."""
        return round_up(self.items_of(extent) * self.item_bytes, PAGE)

    def span(self, first: int, last: int) -> int:
        """Bytes of extents `first` to `last` (excluded), lying one behind the other."""
        return 0 if last <= first else (last - 1 - first) * self.stride + self.extent_bytes(last - 1)

    @property
    def nbytes(self) -> int:
        return self.span(0, self.extents)

    @property
    def end(self) -> int:
        """Where in the file the next run begins."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class ClusterLayout:
    """How a layer's FFN is cut into neuron clusters, and what a cluster's bundle holds: Gate rows, Up rows, and Down's
    column (docs/packed-format.md)."""

    gate: Format
    up: Format
    down: Format
    dim: int
    ffn_dim: int

    @property
    def neurons(self) -> int:
        """Neurons of a cluster: one block of Down's columns."""
        return self.down.columns

    @property
    def clusters(self) -> int:
        return -(-self.ffn_dim // self.neurons)

    @cached_property
    def gate_bytes(self) -> int:
        """Bytes of a cluster's Gate rows; its Up rows follow."""
        return packed_bytes(self.gate.name, self.neurons, self.dim)

    @cached_property
    def down_offset(self) -> int:
        """Where Down's column begins."""
        return round_up(self.gate_bytes + packed_bytes(self.up.name, self.neurons, self.dim), LINE)

    @property
    def down_groups(self) -> int:
        return -(-self.dim // ROWS)

    @cached_property
    def bundle(self) -> int:
        """Bytes of a bundle: an odd number of lines, so that a row group's blocks do not all fall into one cache
        set."""
        return (round_up(self.down_offset + self.down_groups * self.down.block, LINE) // LINE | 1) * LINE

    @property
    def name(self) -> str:
        return f"{self.gate.name}/{self.up.name}/{self.down.name}"


@dataclass(frozen=True)
class NeuronLayout:
    """How a layer's FFN is cut into single neurons: rows of Gate, and bundles of an Up row and a Down row, each a row
    of superblocks (docs/packed-format.md, "Neurons")."""

    gate: Format
    up: Format
    down: Format
    dim: int
    ffn_dim: int
    scores: Format | None = None  # of the predictor's rows; then a Gate row comes first in its bundle
    hidden: int = 0  # columns of those

    @property
    def supers(self) -> int:
        """Superblocks in a row."""
        return -(-self.dim // (SUPERBLOCK * COLUMNS))

    @property
    def clusters(self) -> int:
        return -(-self.ffn_dim // CLUSTER)

    @property
    def neurons(self) -> int:
        """Neurons, those that fill up the last cluster included."""
        return self.clusters * CLUSTER

    @property
    def gate_row(self) -> int:
        """Bytes of a Gate row."""
        return self.supers * self.gate.block

    @property
    def score_supers(self) -> int:
        """Superblocks in a row that says whether its neuron is live: a predictor's, or Gate's own."""
        return -(-self.hidden // (SUPERBLOCK * COLUMNS)) if self.scores else self.supers

    @property
    def score_row(self) -> int:
        """Bytes of such a row."""
        return self.score_supers * (self.scores or self.gate).block

    @property
    def up_offset(self) -> int:
        """Where in a bundle the Up row begins."""
        return self.gate_row if self.scores else 0

    @property
    def down_offset(self) -> int:
        """Where in a bundle the Down row begins, behind the Up row."""
        return self.up_offset + self.supers * self.up.block

    @property
    def bundle(self) -> int:
        """Bytes of a bundle: whole sectors, so that it can be read by itself."""
        return round_up(self.down_offset + self.supers * self.down.block, SECTOR)

    @property
    def name(self) -> str:
        inside = f"{self.gate.name}/" if self.scores else ""
        return f"{inside}{self.up.name}/{self.down.name}"


def norm_sizes(spec: ModelSpec) -> dict[str, int]:
    """A layer's norm vectors, as GGUF names them, and their lengths."""
    sizes = {"attn_norm": spec.dim, "ffn_norm": spec.dim}
    if spec.qk_norm:
        sizes |= {"attn_q_norm": spec.head_dim, "attn_k_norm": spec.head_dim}
    if spec.post_norms:
        sizes |= {"post_attention_norm": spec.dim, "post_ffw_norm": spec.dim}
    return sizes


def norm_places(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Tensor name: (offset, length) of each norm's float32 vector in the run "norms", in values."""
    names = [("output_norm.weight", spec.dim)] if spec.has_head else []
    names += [(f"blk.{i}.{name}.weight", n) for i in range(len(spec.layers)) for name, n in norm_sizes(spec).items()]
    places, at = {}, 0
    for name, size in names:
        places[name] = at, size
        at += round_up(size, COLUMNS)
    return places


def projection_names(tensors: Mapping[str, TensorInfo], layer: int) -> list[tuple[str, ...]]:
    """A layer's query, key and value tensors, neighbours of one format together."""
    runs: list[list[str]] = []
    for name in (f"blk.{layer}.attn_{part}.weight" for part in "qkv"):
        if runs and tensors[runs[-1][0]].format == tensors[name].format:
            runs[-1].append(name)
        else:
            runs.append([name])
    return [tuple(run) for run in runs]


def cluster_layout(tensors: Mapping[str, TensorInfo], spec: ModelSpec, layer: int) -> ClusterLayout:
    """Raises PlanError for a mixture of formats that no kernel serves."""
    gate, up, down = (FORMATS[tensors[f"blk.{layer}.ffn_{part}.weight"].format] for part in ("gate", "up", "down"))
    if gate.subs != up.subs or gate.is_float != up.is_float:
        raise PlanError(f"layer {layer} mixes Gate {gate.name} with Up {up.name}: not supported")
    return ClusterLayout(gate, up, down, spec.dim, spec.ffn_dim)


def neuron_layout(tensors: Mapping[str, TensorInfo], spec: ModelSpec, layer: int) -> NeuronLayout:
    """Raises PlanError for formats that no kernel serves."""
    names = [tensors[f"blk.{layer}.ffn_{part}.weight"].format for part in ("gate", "up", "down_t")]
    gate, up, down = (FORMATS[name] for name in names)
    unfit = [f.name for f in (gate, up) if f.subs > 1] + [down.name] * (down.name not in DOWN_FORMATS)
    if unfit or gate.is_float != up.is_float:
        raise PlanError(f"layer {layer} has neurons in {'/'.join(names)}, which do not work together; Q4_0 and Q8_0 do")
    scores = FORMATS[tensors[f"blk.{layer}.fc2.weight"].format] if spec.predictor else None
    if scores and scores.subs > 1:
        raise PlanError(f"layer {layer} has a predictor in {scores.name}, which is not supported; Q4_0 and Q8_0 are")
    return NeuronLayout(gate, up, down, spec.dim, spec.ffn_dim, scores, spec.predictor)


def lay_out_runs(tensors: Mapping[str, TensorInfo], spec: ModelSpec) -> tuple[Run, ...]:
    """All runs of a model, in the order of the file. Raises PlanError for formats that cannot be combined."""
    size = LARGE if sum(tensor.nbytes for tensor in tensors.values()) >= LARGE_MODEL else SMALL
    runs: list[Run] = []
    for run in _runs(tensors, spec, size):
        runs.append(run if not runs else _moved(run, runs[-1].end))
    return tuple(runs)


def _moved(run: Run, offset: int) -> Run:
    return Run(run.kind, run.layer, run.part, run.format, run.items, run.item_bytes, run.per, offset)


def _runs(tensors: Mapping[str, TensorInfo], spec: ModelSpec, size: int) -> Iterator[Run]:
    def matrix(kind: str, names: tuple[str, ...], layer: int = -1, part: int = 0) -> Run:
        name, columns = tensors[names[0]].format, tensors[names[0]].cols
        group = FORMATS[name].group_bytes(padded_columns(name, columns))
        groups = sum(-(-tensors[each].rows // ROWS) for each in names)
        per = _lookup_groups(group) if kind in EMBEDDINGS else max(1, size // group // 2 * 2)
        return Run(kind, layer, part, name, groups, group, min(per, groups), PAGE)

    places = norm_places(spec).values()
    norms = max(at + round_up(n, COLUMNS) for at, n in places) * 4
    yield Run("norms", -1, 0, "F32", 1, norms, 1, PAGE)
    if spec.has_embedding:
        yield matrix("embedding" if spec.has_head else "lookup", ("token_embd.weight",))
    for i in range(len(spec.layers)):
        for part, names in enumerate(projection_names(tensors, i)):
            yield matrix("qkv", names, i, part)
        yield matrix("attention", (f"blk.{i}.attn_output.weight",), i)
        if spec.predictor:
            yield matrix("predictor", (f"blk.{i}.fc1.weight",), i)
        yield from _ffn(tensors, spec, i, size)
    if spec.has_head and not spec.tied:
        yield matrix("output", ("output.weight",))


def _ffn(tensors: Mapping[str, TensorInfo], spec: ModelSpec, i: int, size: int) -> Iterator[Run]:
    if not spec.sparse:
        dense = cluster_layout(tensors, spec, i)
        per = min(dense.clusters, max(1, size // dense.bundle))
        yield Run("ffn", i, 0, dense.name, dense.clusters, dense.bundle, per, PAGE)
        return
    layout = neuron_layout(tensors, spec, i)
    clusters, bundles = layout.clusters, CLUSTER * layout.bundle
    per = min(clusters, max(1, size // bundles))
    kind, rows = ("scores", layout.scores) if layout.scores else ("gate", layout.gate)
    yield Run(kind, i, 0, rows.name, clusters, CLUSTER * layout.score_row, min(clusters, 2 * per), PAGE)
    yield Run("neurons", i, 0, layout.name, clusters, bundles, per, PAGE)


def embedding_run(runs: Sequence[Run]) -> Run | None:
    """The embedding, if these layers begin with one."""
    return next((run for run in runs if run.kind in EMBEDDINGS), None)


def only_looked_up(runs: Sequence[Run]) -> Run | None:
    """The embedding, if no logits come from it."""
    embedding = embedding_run(runs)
    return embedding if embedding and (embedding.kind == "lookup" or runs[-1].kind == "output") else None


def _lookup_groups(group: int) -> int:
    """Groups of an extent of the embedding: small, and with little padding."""
    sizes = range(1, max(1, LOOKUP // group) + 1)
    return min(sizes, key=lambda per: (round(-per * group % PAGE / (per * group), 3), per))


@dataclass(frozen=True)
class Extents:
    """All extents of a model by number, runs in the order of the file: `run` and `number` (within the run) int32,
    `offset` (in the file) and `nbytes` int64; `first[r]` is the number of run r's first."""

    first: npt.NDArray[np.int64]
    run: npt.NDArray[np.int32]
    number: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Extents":
        counts = np.array([run.extents for run in runs])
        first = np.concatenate([[0], np.cumsum(counts)])
        run = np.repeat(np.arange(len(runs), dtype=np.int32), counts)
        number = (np.arange(first[-1]) - first[run]).astype(np.int32)
        strides = np.array([each.stride for each in runs], np.int64)
        nbytes = strides[run]
        nbytes[first[1:] - 1] = [each.extent_bytes(each.extents - 1) for each in runs]
        offset = np.array([each.offset for each in runs], np.int64)[run] + number * strides[run]
        return cls(first, run, number, offset, nbytes)

    def of_run(self, index: int) -> slice:
        """The numbers of a run's extents."""
        return slice(int(self.first[index]), int(self.first[index + 1]))
