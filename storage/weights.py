"""A model's weights in the arena: where each extent lies, and the matrices and neuron clusters made of them.

Pinned extents lie in the region `weights`, in the order in which they are given up last to first. The others come
through `staging`, a ring that reads fill and instructions free, at addresses that never change: a streamed extent has a
place on the tape, the order in which a step uses them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.kernels.formats import FORMATS, ROWS, Format
from coterie.kernels.shapes import (
    CLUSTER_ROW,
    NEURON_ROW,
)
from coterie.models.header import TensorInfo
from coterie.models.spec import ModelSpec
from coterie.storage.arena import BufferRef, Ledger
from coterie.storage.runs import (
    EMBEDDINGS,
    PAGE,
    ClusterLayout,
    Extents,
    NeuronLayout,
    Run,
    cluster_layout,
    neuron_layout,
    norm_places,
    norm_sizes,
)

PARTS = 4  # of the ring: what one instruction uses at once is no more than one of them
Int64s = npt.NDArray[np.int64]
PINNED = -1  # the tape position of an extent that is not streamed


@dataclass(frozen=True)
class Residency:
    """What stays in memory: `pinned`, numbers of extents in the order of their addresses; all others are streamed
    through a ring of `ring` bytes. Of a sparse model's bundles, decode keeps `slots` in the neuron cache instead."""

    pinned: npt.NDArray[np.int64]
    ring: int = 0
    slots: int = 0


@dataclass(frozen=True)
class Slice:
    """Consecutive extents of a matrix that lie together; `position` is the first one's on the tape, or PINNED."""

    first: int
    count: int
    ref: BufferRef
    position: int


@dataclass(frozen=True)
class Matrix:
    """A packed matrix: rows of one tensor, or of several of one format, one below the other. Together the slices are
    all of it, but for an embedding that is only looked up in."""

    run: Run
    rows: int
    columns: int
    slices: tuple[Slice, ...]

    @property
    def format(self) -> Format:
        return FORMATS[self.run.format]

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.run.item_bytes // self.format.block


@dataclass(frozen=True)
class Span:
    """Neuron clusters that run together. `list`: int32[1 + count], the count and the ids; `position`: of the first
    one's extent on the tape, or PINNED; `end`: the position behind the last one's."""

    list: BufferRef
    first: int
    count: int
    position: int
    end: int


@dataclass(frozen=True)
class FFN:
    """A layer's clusters, cut into spans in ascending order. `table`: int64[clusters][4] (docs/packed-format.md)."""

    run: Run
    index: int  # of the run
    layout: ClusterLayout
    table: BufferRef
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class NeuronSpan:
    """Clusters of neurons whose streamed weights are in memory together: positions `position` to `end` (excluded) of
    the tape, or PINNED."""

    first: int
    count: int
    position: int
    end: int


@dataclass(frozen=True)
class SparseFFN:
    """A layer's neurons, cut into spans in ascending order. `deciding`, `bundles`: numbers of the runs, the first of
    Gate rows or a predictor's; `table`:
    int64[clusters][8], shapes.NEURON_ROW; `addresses`: int64[neurons], of bundles (0: not in memory)."""

    deciding: int
    bundles: int
    layout: NeuronLayout
    table: BufferRef
    addresses: BufferRef
    spans: tuple[NeuronSpan, ...]


@dataclass(frozen=True)
class Layer:
    """A layer's weights. `projections` give queries, keys and values, in this order."""

    projections: tuple[Matrix, ...]
    output: Matrix
    ffn: FFN | SparseFFN
    predictor: Matrix | None = None  # its first matrix
    norms: dict[str, BufferRef] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """All weights of a model. `where`: the arena offset of every extent, -1 of those that have none (parts of an
    embedding that is only looked up in); `tape`: numbers of the streamed extents in the order of use, from position
    `begin` on, the last layers' before the output's, which begin at position `head`."""

    runs: tuple[Run, ...]
    extents: Extents
    where: npt.NDArray[np.int64]
    tape: npt.NDArray[np.int64]
    begin: int
    head: int
    pinned: BufferRef
    staging: BufferRef
    embedding: Matrix | None  # None: these layers are a part that ...
    output: Matrix | None  # ... lacks it
    output_norm: BufferRef | None
    layers: tuple[Layer, ...]

    def embedding_places(self, ids: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Of the groups of rows that hold the ids' embeddings: their extents' numbers, where in those they begin
        (bytes), and where in the arena."""
        assert self.embedding is not None
        run, groups = self.embedding.run, ids // ROWS
        numbers = self.extents.first[self.runs.index(run)] + groups // run.per
        within = groups % run.per * run.item_bytes
        return numbers, within, self.where[numbers] + within

    def stays(self, index: int) -> bool:
        """Whether all of a run is pinned."""
        return bool(self.is_pinned(np.arange(self.extents.first[index], self.extents.first[index + 1])).all())

    @property
    def positions(self) -> tuple[int, int, int]:
        """Where on the tape its body begins, its head, and what is behind both."""
        return self.begin, self.head, self.begin + self.tape.size

    def is_pinned(self, numbers: Int64s) -> npt.NDArray[np.bool_]:
        """Whether these extents stay in memory."""
        at = self.where[numbers] - self.pinned.offset
        return (at >= 0) & (at < self.pinned.nbytes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads from memory; of a sparse model without its bundles, since which
        of them are used is known only then."""
        used = {"qkv", "attention", "ffn", "gate", "predictor", "scores"}
        used |= {self.output.run.kind} if self.output else set()
        return sum(run.nbytes for run in self.runs if run.kind in used)

    @property
    def streamed(self) -> int:
        """Bytes that one decoded token has read from flash."""
        return int(self.extents.nbytes[self.tape].sum())


class _Placing:
    """Gives extents their addresses and tape positions, in the regions of `beside` if that is given."""

    def __init__(
        self, runs: tuple[Run, ...], residency: Residency, ledger: Ledger, tape: int, beside: Weights | None
    ) -> None:
        self.runs, self.extents, self.begin = runs, Extents.of(runs), tape
        sizes = self.extents.nbytes[residency.pinned]
        self.pinned = beside.pinned if beside else ledger.allocate("weights", int(sizes.sum()), align=PAGE)
        self.staging = beside.staging if beside else ledger.allocate("staging", residency.ring, align=PAGE)
        self.where = np.full(int(self.extents.first[-1]), -1, np.int64)
        self.where[residency.pinned] = self.pinned.offset + np.cumsum(sizes) - sizes
        self._resident = np.bincount(self.extents.run[residency.pinned], minlength=len(runs))
        self.tape: list[int] = []
        self._at = 0  # in the ring

    @property
    def limit(self) -> int:
        return self.staging.nbytes // PARTS

    def resident(self, index: int) -> int:
        """How many of a run's extents are pinned: always the first ones."""
        return int(self._resident[index])

    def slices(self, index: int, *, streamed: bool = True) -> Iterator[Slice]:
        """A matrix's parts, each in one piece of memory; without `streamed` what is not pinned is left out."""
        run, first = self.runs[index], int(self.extents.first[index])
        for begin, end, position in self._parts(index):
            nbytes = run.span(begin, end)
            if position == PINNED:
                yield Slice(begin, end - begin, self._ref("weights", int(self.where[first]), nbytes), PINNED)
            elif streamed:
                offset = self._take(first + begin, end - begin, nbytes)
                yield Slice(begin, end - begin, self._ref("staging", offset, nbytes), position)

    def spans(self, index: int, ledger: Ledger) -> Iterator[Span]:
        """A layer's clusters in parts; an extent of them may lie anywhere."""
        run, first = self.runs[index], int(self.extents.first[index])
        for begin, end, position in self._parts(index):
            if position != PINNED:
                for extent in range(begin, end):
                    self._take(first + extent, 1, run.extent_bytes(extent))
            cluster, count = begin * run.per, min(run.items, end * run.per) - begin * run.per
            names = ledger.allocate("tables", 1 + count, np.int32)
            yield Span(names, cluster, count, position, self._next)

    def neuron_spans(self, gate: int, bundles: int, whole: bool) -> Iterator[NeuronSpan]:
        """A sparse layer's clusters in parts; without `whole` only Gates are streamed. An extent of Gates has the
        clusters of two of bundles."""
        unit, pair = self.runs[gate], self.runs[bundles]
        most = -(-pair.extents // unit.extents)

        def missing(i: int) -> list[tuple[int, Run, int]]:
            """Unit `i`'s extents that must be streamed: the run's number, the run, the extent's."""
            wanted = [(gate, unit, i)] if i >= self.resident(gate) else []
            last = min(pair.extents, (i + 1) * most)
            begin = max(i * most, self.resident(bundles))
            return wanted + [(bundles, pair, e) for e in range(begin, last)] * whole

        at = 0
        while at < unit.extents:
            parts, end = missing(at), at + 1
            nbytes = sum(run.stride for _, run, _ in parts)
            while end < unit.extents:
                more = missing(end)
                nbytes += sum(run.stride for _, run, _ in more)
                if bool(more) != bool(parts) or nbytes > self.limit:
                    break
                parts, end = parts + more, end + 1
            position = self._next if parts else PINNED
            for index, run, extent in sorted(parts, key=lambda part: (part[0], part[2])):
                self._take(int(self.extents.first[index]) + extent, 1, run.extent_bytes(extent))
            first = at * unit.per
            yield NeuronSpan(first, min(unit.items, end * unit.per) - first, position, self._next)
            at = end

    @property
    def _next(self) -> int:
        """The position that the next extent on the tape gets."""
        return self.begin + len(self.tape)

    def _parts(self, index: int) -> Iterator[tuple[int, int, int]]:
        """A run's extents, those that are pinned and then as many at a time as one instruction may hold of the ring:
        the first, the one behind the last, and the first's tape position."""
        run, at = self.runs[index], self.resident(index)
        if at:
            yield 0, at, PINNED
        while at < run.extents:
            end = at + max(1, min(run.extents - at, self.limit // run.stride))
            yield at, end, self._next
            at = end

    def _take(self, number: int, count: int, nbytes: int) -> int:
        """Put extents on the tape, and together into the ring; returns their arena offset."""
        if nbytes > self.staging.nbytes:
            raise PlanError(f"a ring of {self.staging.nbytes >> 10} KiB cannot hold an extent of {nbytes >> 10} KiB")
        if self._at + nbytes > self.staging.nbytes:
            self._at = 0
        offset = self.staging.offset + self._at
        sizes = self.extents.nbytes[number : number + count]
        self.where[number : number + count] = offset + np.cumsum(sizes) - sizes
        self.tape.extend(range(number, number + count))
        self._at += nbytes
        return offset

    def _ref(self, region: str, offset: int, nbytes: int) -> BufferRef:
        return BufferRef(region, offset, nbytes, "|u1", (nbytes,))


def lay_out(
    tensors: Mapping[str, TensorInfo],
    spec: ModelSpec,
    runs: tuple[Run, ...],
    residency: Residency,
    ledger: Ledger,
    *,
    whole: bool = True,
    beside: Weights | None = None,
) -> Weights:
    """Cut buffers for all weights. Without `whole` a sparse model's bundles are not streamed; `beside`: what was laid
    out before, whose pinned weights, ring and addresses are shared, and behind whose tape this one's begins. Raises
    PlanError where an extent is larger than the ring."""
    begin = beside.begin + beside.tape.size if beside else 0
    placing = _Placing(runs, residency, ledger, begin, beside)
    index = {(run.kind, run.layer, run.part): i for i, run in enumerate(runs)}
    norms = int(placing.where[0])

    def vector(name: str) -> BufferRef:
        at, size = places[name]
        return BufferRef("weights", norms + 4 * at, 4 * size, "<f4", (size,))

    def matrix(kind: str, layer: int = -1, part: int = 0, *, streamed: bool = True) -> Matrix:
        i = index[kind, layer, part]
        of_layer = "fc1" if kind == "predictor" else "attn_output"
        named = dict.fromkeys(EMBEDDINGS, "token_embd.weight") | {"output": "output.weight"}
        name = named.get(kind, f"blk.{layer}.{of_layer}.weight")
        rows, columns = runs[i].items * ROWS, spec.dim
        if kind != "qkv":
            rows, columns = tensors[name].rows, tensors[name].cols
        return Matrix(runs[i], rows, columns, tuple(placing.slices(i, streamed=streamed)))

    def layer(i: int) -> Layer:
        parts = [run.part for run in runs if (run.kind, run.layer) == ("qkv", i)]
        projections = tuple(matrix("qkv", i, part) for part in parts)
        output = matrix("attention", i)
        norms = {name: vector(f"blk.{i}.{name}.weight") for name in norm_sizes(spec)}
        predictor = matrix("predictor", i) if spec.predictor else None
        return Layer(projections, output, sparse(i) if spec.sparse else dense(i), predictor, norms)

    def dense(i: int) -> FFN:
        layout, run = cluster_layout(tensors, spec, i), index["ffn", i, 0]
        table = ledger.allocate("tables", (layout.clusters, CLUSTER_ROW // 8), np.int64)
        return FFN(runs[run], run, layout, table, tuple(placing.spans(run, ledger)))

    def sparse(i: int) -> SparseFFN:
        layout, bundles = neuron_layout(tensors, spec, i), index["neurons", i, 0]
        gate = index["scores" if spec.predictor else "gate", i, 0]
        table = ledger.allocate("tables", (layout.clusters, NEURON_ROW // 8), np.int64)
        shared = beside.layers[i].ffn if beside else None
        known = shared.addresses if isinstance(shared, SparseFFN) else None
        addresses = known or ledger.allocate("tables", layout.neurons, np.int64)
        return SparseFFN(gate, bundles, layout, table, addresses, tuple(placing.neuron_spans(gate, bundles, whole)))

    places = norm_places(spec)
    layers = tuple(layer(i) for i in range(len(spec.layers)))
    head = begin + len(placing.tape)
    output = matrix("embedding" if spec.tied else "output") if spec.has_head else None
    lookup = "embedding" if spec.has_head else "lookup"
    embedding = matrix(lookup, streamed=False) if spec.has_embedding else None
    return Weights(
        runs,
        placing.extents,
        placing.where,
        np.array(placing.tape, np.int64),
        begin,
        head,
        placing.pinned,
        placing.staging,
        embedding,
        output,
        vector("output_norm.weight") if spec.has_head else None,
        layers,
    )
