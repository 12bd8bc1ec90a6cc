"""Compile the feed-forward networks of sparse models: Gate first in decode, all neurons in prefill (docs/sparse.md)."""

from dataclasses import dataclass

import numpy as np

from coterie.kernels import operands as o
from coterie.kernels.formats import COLUMNS
from coterie.kernels.library import kernel_name
from coterie.kernels.neurons import weave_bytes
from coterie.kernels.record import LINE, Opcode
from coterie.kernels.shapes import CLUSTER, LIVE_ROW, WOVEN_FLOAT
from coterie.kernels.sparse_down import down_scratch
from coterie.models.spec import ModelSpec
from coterie.scheduler.program import Draft, Operand, ProgramBuilder
from coterie.storage.arena import BufferRef, Ledger, round_up
from coterie.storage.weights import PINNED, NeuronSpan, SparseFFN, Weights

BUSY = 32  # reads that take as long as deciding a layer of a 7B by its Gates does
DOWN_PIECES = 2  # a lane of Down, at least, if there are superblocks enough


@dataclass(frozen=True)
class Woven:
    """Woven activations; `lane` bytes apart if each lane has its own (0: shared)."""

    ref: BufferRef
    lane: int
    is_float: bool


class SparseLowering:
    """Buffers for up to `rows` rows in tiles of `tile` tokens, and the instructions that use them.

    `cache`, `uses`: as of Shared.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        ledger: Ledger,
        *,
        lanes: int,
        rows: int,
        tile: int,
        decode: bool,
        cache: BufferRef | None,
        uses: BufferRef | None,
    ) -> None:
        self.spec, self.lanes, self.rows, self.tile, self.decode = spec, lanes, rows, tile, decode
        self.cache, self.uses = cache, uses
        layouts = [layer.ffn.layout for layer in weights.layers if isinstance(layer.ffn, SparseFFN)]
        self.supers, self.neurons = layouts[0].supers, layouts[0].neurons
        kinds = {layout.gate.is_float for layout in layouts}
        assert len(kinds) == 1  # a model mixes formats of one kind
        token = max(weave_bytes(layout.gate) for layout in layouts)
        self.score_at = rows * self.supers * token  # where a predictor's tiles begin
        scores = [layout.scores for layout in layouts if layout.scores]
        self.score_bytes = rows * layouts[0].score_supers * max(map(weave_bytes, scores), default=0)
        size = self.score_at + 2 * self.score_bytes  # of this layer's predictor and of the next one's
        copies = lanes if decode else 1
        self.x = Woven(ledger.allocate("activations", (copies, size)), size if decode else 0, kinds.pop())
        width = round_up(spec.predictor, COLUMNS)
        self.units = None
        if spec.predictor and decode:
            self.units = [ledger.allocate("activations", (rows, width), np.float32) for _ in range(2)]
        self.hidden_tile = self.neurons * tile * 4
        self.hidden = ledger.allocate("activations", (rows // tile, self.hidden_tile))
        self.sums = ledger.allocate("activations", rows * self.supers * WOVEN_FLOAT)
        self.lane = round_up(max(down_scratch(tile), 4 * CLUSTER * tile), LINE)
        self.scratch = ledger.allocate("activations", (lanes, self.lane))
        clusters = self.neurons // CLUSTER
        self.live = ledger.allocate("activations", (clusters, LIVE_ROW)) if decode else None

    def add(
        self,
        b: ProgramBuilder,
        i: int,
        ffn: SparseFFN,
        ready: Draft | None,
        y: BufferRef,
        width: int,
        ahead: tuple[SparseFFN, Draft] | None,
    ) -> None:
        """Append layer `i`'s network: y float32[rows][width]. `ahead`: the next layer's, and the preparation of what
        its predictor reads of this layer's input."""
        layout = ffn.layout
        names: list[str | int] = [layout.gate.name, layout.up.name, self.spec.activation, self.tile]
        down = kernel_name("neuron_down", layout.down.name, self.tile)
        if self.decode:
            names += [layout.scores.name] if layout.scores else []
            for span in ffn.spans:
                streamed = span.position != PINNED
                b.add(
                    kernel_name("neuron_gate", *names), Opcode.FFN_UP, self._neurons(i, ffn, span), layer=i,
                    prepare=ready, ordered=streamed or self.cache is not None, frees=span.end if streamed else 0,
                )  # fmt: skip
            if ahead:
                self.ask(b, i + 1, *ahead)
            if self.cache:
                b.add(
                    kernel_name("neuron_late", *names), Opcode.FFN_LATE, self._neurons(i, ffn, self._all(ffn)), layer=i,
                    prepare=ready, ordered=True,
                )  # fmt: skip
            part = self._down(ffn, 0, layout.clusters, y, width, keep=False, last=True)
            b.add(down, Opcode.FFN_DOWN, part, layer=i)
            return
        for number, span in enumerate(ffn.spans):
            streamed, last = span.position != PINNED, number == len(ffn.spans) - 1
            b.add(
                kernel_name("neuron_all", *names), Opcode.FFN_UP, self._neurons(i, ffn, span), layer=i, prepare=ready,
                ordered=streamed,
            )  # fmt: skip
            part = self._down(ffn, span.first, span.count, y, width, keep=number > 0, last=last)
            b.add(down, Opcode.FFN_DOWN, part, layer=i, frees=span.end if streamed else 0)

    def _all(self, ffn: SparseFFN) -> NeuronSpan:
        """All clusters, in the order in which the spans decide them."""
        return NeuronSpan(0, ffn.layout.clusters, ffn.spans[-1].position, 0)

    def _neurons(self, i: int, ffn: SparseFFN, span: NeuronSpan) -> dict[int, Operand]:
        layout = ffn.layout
        inside = layout.scores is not None
        operands: dict[int, Operand] = {
            o.N_TABLE: ffn.table,
            o.N_FIRST: span.first,
            o.N_COUNT: span.count,
            o.N_SUPERS: layout.supers,
            o.N_ROW: layout.score_row,
            o.N_UP: layout.up_offset,
            o.N_X: self.x.ref,
            o.N_X_LANE: self.x.lane,
            o.N_HIDDEN: self.hidden,
            o.N_HIDDEN_TILE: self.hidden_tile,
            o.N_SCRATCH: self.scratch,
            o.N_SCRATCH_LANE: self.lane,
        }
        if not self.decode:
            return operands | {o.N_ROW: layout.bundle if inside else layout.gate_row, o.N_BUNDLE: layout.bundle}
        return operands | {
            o.N_LIVE: self.live,
            o.N_ADDRESSES: ffn.addresses,
            o.N_CACHE: self.cache,
            o.N_LAYERS: len(self.spec.layers),
            o.N_USES: self.uses.tail(4 * i * self.neurons) if self.uses else None,
            o.N_SCORE_X: self.score_at if inside else 0,
            o.N_SCORE_SUPERS: layout.score_supers,
            o.N_ASCENDING: int(span.position != PINNED),
        }

    def weave(self, b: ProgramBuilder, i: int, ffn: SparseFFN, ready: Draft | None, ahead: int) -> Draft:
        """A preparation of the second matrix of layer `i`'s predictor, from its hidden units; `ahead`: 1 for the
        predictor of the layer that comes next."""
        assert self.units is not None
        assert ffn.layout.scores is not None
        units = self.units[ahead]
        operands: dict[int, Operand] = {
            o.WEAVE_X: units,
            o.WEAVE_X_ROW: 4 * units.shape[1],
            o.WEAVE_SUBS: units.shape[1] // COLUMNS,
            o.WEAVE_OUT: self.x.ref.tail(self.score_at + ahead * self.score_bytes),
            o.WEAVE_OUT_LANE: self.x.lane,
            o.WEAVE_TILE: self.tile,
            o.WEAVE_FLOAT: int(ffn.layout.scores.is_float),
        }
        return b.preparation(kernel_name("weave"), Opcode.NORM, operands, layer=i, prepare=ready)

    def ask(self, b: ProgramBuilder, i: int, ffn: SparseFFN, ready: Draft) -> None:
        """Append what asks for neurons of the next layer, number `i`."""
        layout = ffn.layout
        deciding = layout.scores or layout.gate
        operands = self._neurons(i, ffn, self._all(ffn)) | {o.N_BUSY: 0 if layout.scores else BUSY}
        if layout.scores:
            operands[o.N_SCORE_X] = self.score_at + self.score_bytes
        name = kernel_name("neuron_ask", deciding.name, self.tile)
        b.add(name, Opcode.FFN_ASK, operands, layer=i, prepare=ready)

    def _down(
        self, ffn: SparseFFN, first: int, count: int, y: BufferRef, width: int, *, keep: bool, last: bool
    ) -> dict[int, Operand]:
        layout = ffn.layout
        return {
            o.ND_TABLE: ffn.table,
            o.ND_FIRST: first,
            o.ND_COUNT: count,
            o.ND_LIVE: self.live,
            o.ND_ADDRESSES: ffn.addresses,
            o.ND_BUNDLE: layout.bundle,
            o.ND_DOWN: layout.down_offset,
            o.ND_SUPERS: layout.supers,
            o.ND_CHUNK: max(1, layout.supers // (DOWN_PIECES * self.lanes)),
            o.ND_HIDDEN: self.hidden,
            o.ND_HIDDEN_TILE: self.hidden_tile,
            o.ND_SUMS: self.sums,
            o.ND_Y: y,
            o.ND_Y_ROW: 4 * width,
            o.ND_BLOCKS: width // COLUMNS,
            o.ND_KEEP: int(keep),
            o.ND_LAST: int(last),
            o.ND_SCRATCH: self.scratch,
            o.ND_SCRATCH_LANE: self.lane,
        }
