"""Compile a model and a plan into programs (design section 6).

One function an operator, in the order of a layer. Decode: row-wise work (norms, merging attention) is a
preparation that each lane runs for itself, so that a layer costs five hand-overs. Prefill: row-wise work is cut
over rows and claimed like the rest.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypedDict

from coterie.kernels import operands as o
from coterie.kernels.formats import COLUMNS, ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.kernels.shapes import FLOAT_TOKEN, INT8_TOKEN
from coterie.scheduler.buffers import Tiles
from coterie.scheduler.lower_sparse import SparseLowering, Woven
from coterie.scheduler.program import NO_LAYER, Draft, Operand, Program, ProgramBuilder
from coterie.scheduler.workspace import Workspace
from coterie.storage.arena import BufferRef, round_up
from coterie.storage.weights import FFN, PINNED, Layer, Matrix, Span, SparseFFN

PIECES = 4  # pieces a lane of an operator, at least
PIECE_BYTES = 256 << 10  # of weights: a larger piece is cut further
PANEL_BYTES = 448 << 10  # of activations that stay in the second-level cache


class Lowering(Workspace):
    """Compiles programs for up to `rows` rows in tiles of `tile` tokens.

    given  of products in which other units take part, the header word that says how much is theirs
    again  what another unit sums up of each FFN, to be added to `z`
    plain  where norms leave their rows for units with graphs
    residuals  what each norm of the last body reads, and of the head behind it
    written  a layer's flag that another unit posts once keys and values of the tokens before are in the KV cache
    """

    given: Mapping[str, int] = MappingProxyType({})
    again: BufferRef | None = None
    plain: BufferRef | None = None
    written: Sequence[BufferRef] = ()

    # --- programs ---------------------------------------------------------------------------------

    @property
    def entering(self) -> BufferRef:
        """Where the rows' hidden states are when a body begins: float32[rows][dim, padded with zeros]."""
        return self.x[0]

    @property
    def leaving(self) -> BufferRef:
        """Where they are behind the body that was compiled last."""
        return self.x[self._at]

    def body(self, name: str) -> Program:
        """All layers; the last FFN's output is left for the head to add, if there is one."""
        return self._body(self._builder(name)).build()

    def head(self, name: str) -> Program:
        """Logits of the rows that want them; each row at most once after a body."""
        return self._head(self._builder(name)).build()

    def whole(self, name: str) -> Program:
        """Body and head in one, where there is a head."""
        body = self._body(self._builder(name))
        return (self._head(body) if self.spec.has_head else body).build()

    def _builder(self, name: str) -> ProgramBuilder:
        return ProgramBuilder(name, self.ledger, self.lanes, self.shared.error)

    def _body(self, b: ProgramBuilder) -> ProgramBuilder:
        self._at = 0  # which of the two residual buffers is current
        self.residuals = list[BufferRef]()
        if self.spec.has_embedding:
            self._embed(b)
        for i, layer in enumerate(self.weights.layers):
            post = self.weights.layers[i - 1].norms.get("post_ffw_norm") if i else None
            ready = self._norm(b, i, layer.norms["attn_norm"], self.normed, self.z if i else None, post)
            self._attend(b, i, layer, self._project(b, i, layer, ready))
            post = layer.norms.get("post_attention_norm")
            woven = self.sparse.x if self.sparse else None
            ready = self._norm(b, i, layer.norms["ffn_norm"], self.normed, self.y, post, woven=woven)
            if isinstance(layer.ffn, FFN):
                self._ffn(b, i, layer.ffn, ready)
            elif self.sparse:
                self._sparse_ffn(b, i, layer.ffn, ready, self.sparse)
        if not self.spec.has_head:
            self._sum(b)
        return b

    def _head(self, b: ProgramBuilder) -> ProgramBuilder:
        weights, post = self.weights, self.weights.layers[-1].norms.get("post_ffw_norm")
        assert weights.output is not None
        assert weights.output_norm is not None
        ready = self._norm(b, NO_LAYER, weights.output_norm, self.final, self.z, post, select=True)
        logits, b.outputs = self.shared.logits, True
        width, given = logits.shape[1], (self.given.get("head", 0), 0, weights.output.run.items)
        self._matmul(
            b, NO_LAYER, weights.output, self.final, logits, 0, width, outputs=True, prepare=ready, given=given
        )
        return b

    # --- operators --------------------------------------------------------------------------------

    def _embed(self, b: ProgramBuilder) -> None:
        e = self.weights.embedding
        assert e is not None
        b.add(
            kernel_name("embed", e.format.name),
            Opcode.EMBED,
            {
                o.EMBED_BLOCKS: e.blocks,
                o.EMBED_VOCAB: self.spec.vocab,
                o.EMBED_X: self.x[0],
                o.EMBED_ROW: 4 * self.width,
                o.EMBED_SCALE: float(self.spec.embedding_scale),
                o.EMBED_SCRATCH: self.unpack_scratch,
            },
        )

    def _norm(
        self,
        b: ProgramBuilder,
        layer: int,
        weight: BufferRef,
        out: Tiles,
        add: BufferRef | None,
        post: BufferRef | None,
        *,
        select: bool = False,
        woven: Woven | None = None,
    ) -> Draft | None:
        """Residual addition of `add` (if there is one) and norm, into `out`, `woven` or both: in decode a preparation
        for the instructions that read it, which writes the new residual into the other of two buffers; in prefill an
        instruction."""
        source, alone = self.x[self._at], woven is not None and not self.spec.predictor
        self.residuals.append(source)
        if self.mode == "decode" and add is not None:
            self._at = 1 - self._at
        operands: dict[int, Operand] = {
            o.NORM_X: source,
            o.NORM_X_OUT: self.x[self._at],
            o.NORM_ROW: 4 * self.width,
            o.NORM_Y: add,
            o.NORM_AGAIN: self.again if add is self.z else None,
            o.NORM_POST: post,
            o.NORM_WEIGHT: weight,
            o.NORM_DIM: self.spec.dim,
            o.NORM_EPS: float(self.spec.norm_eps),
            o.NORM_OUT: None if alone else out.ints,
            o.NORM_OUT_LANE: out.int_lane,
            o.NORM_FLOAT_OUT: None if alone else out.floats,
            o.NORM_FLOAT_LANE: out.float_lane,
            o.NORM_TILE: self.final_tile if select else self.tile,
            o.NORM_SELECT: int(select),
            o.NORM_TILE_SUBS: out.subs,
            o.NORM_PLANES: self.planes if select else 1,
            o.NORM_PLAIN: self.plain,
        }
        if woven:
            operands |= {
                o.NORM_WOVEN: woven.ref,
                o.NORM_WOVEN_LANE: woven.lane,
                o.NORM_WOVEN_FLOAT: int(woven.is_float),
            }
        return self._row_wise(b, kernel_name("norm"), Opcode.NORM, operands, layer)

    def _sum(self, b: ProgramBuilder) -> None:
        """Add the last FFN's output to the residual stream, in place: the hidden states that leave a part. The kernel
        for norms does it, with nowhere to put its norm."""
        norms = self.weights.layers[-1].norms
        operands: dict[int, Operand] = {
            o.NORM_X: self.leaving,
            o.NORM_X_OUT: self.leaving,
            o.NORM_ROW: 4 * self.width,
            o.NORM_Y: self.z,
            o.NORM_POST: norms.get("post_ffw_norm"),
            o.NORM_WEIGHT: norms["ffn_norm"],  # it reads one
            o.NORM_DIM: self.spec.dim,
            o.NORM_EPS: float(self.spec.norm_eps),
            o.NORM_TILE: self.tile,
            o.NORM_PLANES: 1,
        }
        b.add(kernel_name("norm"), Opcode.NORM, operands, layer=len(self.weights.layers) - 1)

    def _row_wise(
        self, b: ProgramBuilder, kernel: str, opcode: Opcode, operands: dict[int, Operand], layer: int
    ) -> Draft | None:
        """A preparation in decode; in prefill an instruction, and None."""
        if self.mode == "decode":
            return b.preparation(kernel, opcode, operands, layer=layer)
        b.add(kernel, opcode, operands, layer=layer)
        return None

    def _matmul(
        self,
        b: ProgramBuilder,
        layer: int,
        matrix: Matrix,
        x: Tiles,
        y: BufferRef,
        column: int,
        width: int,
        *,
        outputs: bool = False,
        prepare: Draft | None = None,
        waits: list[int] | None = None,
        given: tuple[int, int, int] = (0, 0, 0),
    ) -> int:
        """y[row][column:] = matrix x[row], a slice after the other. `given`: the header word that says which share of a
        product is another unit's, and of its row groups those before this matrix, and all."""
        run, number = matrix.run, 0
        tiles, lane = x.of(matrix.format)
        token = FLOAT_TOKEN if matrix.format.is_float else INT8_TOKEN
        rows = self.shared.logits.shape[0] if outputs else self.rows
        tile = self.final_tile if outputs else self.tile
        panel = max(1, PANEL_BYTES // (rows * token * matrix.format.subs))
        for part in matrix.slices:
            first, last = part.first * run.per, min(run.items, (part.first + part.count) * run.per)
            operands: dict[int, Operand] = {
                o.MATMUL_WEIGHTS: part.ref,
                o.MATMUL_GROUP: run.item_bytes,
                o.MATMUL_GROUPS: last - first,
                o.MATMUL_BLOCKS: matrix.blocks,
                o.MATMUL_X: tiles,
                o.MATMUL_X_LANE: lane,
                o.MATMUL_Y: y.tail(4 * (column + first * ROWS)),
                o.MATMUL_Y_ROW: 4 * width,
                o.MATMUL_CHUNK: self._chunk(last - first, run.item_bytes),
                o.MATMUL_PANEL: panel,
                o.MATMUL_OUTPUTS: int(outputs),
                o.MATMUL_X_SUBS: x.subs,
                o.MATMUL_PLANES: self.planes if outputs else 1,
                o.MATMUL_PER: run.per,
                o.MATMUL_STRIDE: run.stride,
                o.MATMUL_ARRIVAL: 0 if part.position == PINNED else part.position + 1,
                o.MATMUL_GIVEN: given[0],
                o.MATMUL_BEFORE: given[1] + first,
                o.MATMUL_ALL: given[2],
            }
            number = b.add(
                kernel_name("matmul", matrix.format.name, tile), Opcode.MATMUL, operands,
                layer=layer, waits=waits, prepare=prepare, part=given[0],
                **streaming(part.position, part.position + part.count),
            )  # fmt: skip
            waits = None
        return number

    def _chunk(self, groups: int, nbytes: int) -> int:
        """Row groups (or clusters) of `nbytes` each in a piece."""
        return max(1, min(groups // (PIECES * self.lanes), max(1, PIECE_BYTES // nbytes)))

    def _project(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> list[int]:
        """Queries, keys and values: up to two instructions that run side by side (a record has two waits; a
        third, where every one has a format of its own, waits for the first). What is streamed is computed in order."""
        pinned = all(part.position == PINNED for matrix in layer.projections for part in matrix.slices)
        waits, column, numbers = [len(b.drafts) - 1] if b.drafts else [], 0, list[int]()
        groups = sum(matrix.rows for matrix in layer.projections) // ROWS
        for matrix in layer.projections:
            before = numbers[-1:] or waits
            if pinned:
                before = waits if len(numbers) < 2 else numbers[:1]
            target = self.normed, self.qkv, column, self.qkv_width
            given = self.given.get("qkv", 0), column // ROWS, groups
            numbers.append(self._matmul(b, i, matrix, *target, prepare=ready, waits=before, given=given))
            column += matrix.rows
        return numbers[-2:] if pinned else numbers[-1:]

    def _attend(self, b: ProgramBuilder, i: int, layer: Layer, waits: list[int]) -> None:
        spec, at = self.spec, self.spec.layers[i]
        decode = self.mode == "decode"
        operands: dict[int, Operand] = {
            o.A_QKV: self.qkv,
            o.A_QKV_ROW: 4 * self.qkv_width,
            o.A_HEADS: spec.n_heads,
            o.A_KV_HEADS: spec.n_kv_heads,
            o.A_DIM: spec.head_dim,
            o.A_WINDOW: at.window,
            o.A_LAYER: self.kv.layer(i),
            o.A_VALUES: self.kv.values,
            o.A_ROPE: self.shared.ropes[at.rope],
            o.A_HALF: at.rope.dims // 2,
            o.A_QUERY_NORM: layer.norms.get("attn_q_norm"),
            o.A_KEY_NORM: layer.norms.get("attn_k_norm"),
            o.A_EPS: float(spec.norm_eps),
            o.A_SCALE: float(spec.attention_scale),
            o.A_OUT: self.states if decode else self.attention,
            o.A_OUT_ROW: self.state_row if decode else 4 * self.heads_width,
            o.A_SPANS: self.spans,
            o.A_SCRATCH: self.attend_scratch,
            o.A_SCRATCH_LANE: self.attend_lane,
        }
        merge: dict[int, Operand] = {
            o.MERGE_STATES: self.states if decode else None,
            o.MERGE_STATES_ROW: self.state_row,
            o.MERGE_SPANS: self.spans,
            o.MERGE_HEADS: spec.n_heads,
            o.MERGE_DIM: spec.head_dim,
            o.MERGE_WINDOW: at.window,
            o.MERGE_ROWS: self.attention,
            o.MERGE_ROWS_LANE: 4 * self.rows * self.heads_width if decode else 0,
            o.MERGE_ROWS_ROW: 4 * self.heads_width,
            o.MERGE_SUBS: self.heads_width // COLUMNS,
            o.MERGE_TILE: self.tile,
            o.MERGE_OUT: self.attended.ints,
            o.MERGE_OUT_LANE: self.attended.int_lane,
            o.MERGE_FLOAT_OUT: self.attended.floats,
            o.MERGE_FLOAT_LANE: self.attended.float_lane,
            o.MERGE_SCRATCH: self.attend_scratch,
            o.MERGE_SCRATCH_LANE: self.attend_lane,
            o.MERGE_TILE_SUBS: self.attended.subs,
        }
        if decode:
            b.add(kernel_name("attend_one"), Opcode.ATTEND, operands, layer=i, waits=waits)
        else:
            b.add(kernel_name("rope"), Opcode.ROPE, operands, layer=i, waits=waits)
            if self.written:
                b.meet(self.written[i].offset)
            b.add(kernel_name("attend"), Opcode.ATTEND, operands, layer=i)
        self._mix(b, i, layer, self._row_wise(b, kernel_name("merge"), Opcode.MERGE, merge, i))

    def _mix(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> None:
        """Attention's output matrix."""
        given = self.given.get("out", 0), 0, layer.output.run.items
        self._matmul(b, i, layer.output, self.attended, self.y, 0, self.width, prepare=ready, given=given)

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN, ready: Draft | None) -> None:
        layout = ffn.layout
        names = layout.gate.name, layout.up.name, self.spec.activation, self.tile
        for span in ffn.spans:
            up, down = self._up(ffn, span), self._down(ffn, span)
            how = streaming(span.position, span.end)
            ordered, frees = how["ordered"], how["frees"]
            kernel = kernel_name("ffn_up", *names)
            b.add(kernel, Opcode.FFN_UP, up, layer=i, prepare=ready, ordered=ordered, part=self.given.get("up", 0))
            kernel, part = kernel_name("ffn_down", layout.down.name, self.tile), self.given.get("down", 0)
            part = part or self.given.get("sums", 0)
            b.add(kernel, Opcode.FFN_DOWN, down, layer=i, frees=frees, part=part)

    def _sparse_ffn(
        self, b: ProgramBuilder, i: int, ffn: SparseFFN, ready: Draft | None, sparse: SparseLowering
    ) -> None:
        layers, ahead, given = self.weights.layers, None, ready
        if sparse.units is not None:
            ready = self._predict(b, i, i, given, sparse)
        following = layers[i + 1].ffn if i + 1 < len(layers) else None
        wanted = sparse.decode and sparse.cache is not None
        if wanted and isinstance(following, SparseFFN) and self.weights.stays(following.deciding):
            seen = given if sparse.units is None else self._predict(b, i, i + 1, given, sparse)
            assert seen is not None
            ahead = following, seen
        sparse.add(b, i, ffn, ready, self.z, self.width, ahead)

    def _predict(self, b: ProgramBuilder, i: int, of: int, ready: Draft | None, sparse: SparseLowering) -> Draft:
        """The hidden units of layer `of`'s predictor on layer `i`'s input; the preparation of what reads them."""
        layer = self.weights.layers[of]
        assert layer.predictor is not None
        assert sparse.units is not None
        assert isinstance(layer.ffn, SparseFFN)
        units = sparse.units[of - i]
        self._matmul(b, of, layer.predictor, self.normed, units, 0, units.shape[1], prepare=ready)
        return sparse.weave(b, of, layer.ffn, ready, of - i)

    def _up(self, ffn: FFN, span: Span) -> dict[int, Operand]:
        layout = ffn.layout
        x, x_lane = self.normed.of(layout.gate)
        token = FLOAT_TOKEN if layout.gate.is_float else INT8_TOKEN
        hidden, _ = self.hidden.of(layout.down)
        return {
            o.UP_TABLE: ffn.table,
            o.UP_LIST: span.list,
            o.UP_NEURONS: layout.neurons,
            o.UP_BLOCKS: round_up(layout.dim, layout.gate.columns) // layout.gate.columns,
            o.UP_X: x,
            o.UP_X_LANE: x_lane,
            o.UP_X_SUBS: self.normed.subs,
            o.UP_OUT: hidden,
            o.UP_OUT_SUBS: self.hidden.subs,
            o.UP_OUT_FLOAT: int(layout.down.is_float),
            o.UP_CHUNK: self._chunk(span.count, layout.down_offset),
            o.UP_PANEL: max(1, PANEL_BYTES // (self.rows * token * layout.gate.subs)),
            o.UP_SCRATCH: self.ffn_scratch,
            o.UP_SCRATCH_LANE: self.ffn_lane,
            o.UP_UP_OFFSET: layout.gate_bytes,
            o.UP_GIVEN: self.given.get("up", 0),
        }

    def _down(self, ffn: FFN, span: Span) -> dict[int, Operand]:
        layout = ffn.layout
        hidden, _ = self.hidden.of(layout.down)
        token = FLOAT_TOKEN if layout.down.is_float else INT8_TOKEN
        return {
            o.DOWN_TABLE: ffn.table,
            o.DOWN_LIST: span.list,
            o.DOWN_GROUPS: layout.down_groups,
            o.DOWN_X: hidden,
            o.DOWN_X_SUBS: self.hidden.subs,
            o.DOWN_Y: self.z,
            o.DOWN_Y_ROW: 4 * self.width,
            o.DOWN_CHUNK: max(1, layout.down_groups // (PIECES * self.lanes)),
            o.DOWN_PANEL: max(1, PANEL_BYTES // (self.rows * token * layout.down.subs)),
            o.DOWN_KEEP: int(span.first > 0),
            o.DOWN_GIVEN: self.given.get("down", 0),
            o.DOWN_WITHOUT: self.given.get("sums", 0),
        }


class Streaming(TypedDict):
    frees: int
    ordered: bool


def streaming(position: int, end: int) -> Streaming:
    """How an instruction on weights at tape positions `position` to `end` (excluded) differs from one on pinned ones:
    what it frees, and that lanes take its pieces as they arrive."""
    streamed = position != PINNED
    return {"frees": end if streamed else 0, "ordered": streamed}
