"""Compile a model and a plan into programs (design section 6).

One function an operator, in the order of a layer. Decode: row-wise work (norms, merging attention) is a
preparation that each lane runs for itself, so that a layer costs five hand-overs. Prefill: row-wise work is cut
over rows and claimed like the rest.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from coterie.kernels import attention as a
from coterie.kernels import ffn as f
from coterie.kernels import matmul as m
from coterie.kernels import rows as rw
from coterie.kernels.compiled import kernel_name
from coterie.kernels.formats import COLUMNS, Format
from coterie.kernels.record import Opcode
from coterie.kernels.tile import FLOAT_TOKEN, INT8_TOKEN
from coterie.models.spec import ModelSpec, Rope
from coterie.scheduler.program import Draft, Operand, Program, ProgramBuilder
from coterie.storage.arena import BufferRef, Ledger, round_up
from coterie.storage.kv import KVLayout
from coterie.storage.weights import Layer, Matrix, Weights

Mode = Literal["decode", "prefill"]
PIECES = 4  # pieces a lane of an operator, at least
PIECE_BYTES = 256 << 10  # of weights: a larger piece is cut further
PANEL_BYTES = 448 << 10  # of activations that stay in the second-level cache


@dataclass(frozen=True)
class Tiles:
    """Input of a matrix: int8 tiles, float tiles, or both, as its readers want; `lane` bytes apart if each lane
    has its own (0: shared)."""

    ints: BufferRef | None
    floats: BufferRef | None
    subs: int
    int_lane: int
    float_lane: int

    def of(self, weights: Format) -> tuple[BufferRef, int]:
        """The tiles that weights of this format read, and their distance between lanes."""
        ref, lane = (self.floats, self.float_lane) if weights.is_float else (self.ints, self.int_lane)
        assert ref is not None
        return ref, lane


@dataclass(frozen=True)
class Shared:
    """What all programs of a model share. `ropes`: float32[context][2][dims/2]; `logits`:
    float32[rows][vocabulary, padded]; `error`: the word kernels complain into."""

    lanes: int
    context: int
    error: BufferRef
    ropes: dict[Rope, BufferRef]
    logits: BufferRef


class Lowering:
    """Compiles programs for up to `rows` rows in tiles of `tile` tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        shared: Shared,
        ledger: Ledger,
        *,
        mode: Mode,
        rows: int,
        tile: int,
    ) -> None:
        self.spec, self.weights, self.shared, self.ledger, self.mode = spec, weights, shared, ledger, mode
        self.rows, self.tile, self.lanes = round_up(rows, tile), tile, shared.lanes
        self.width = round_up(spec.dim, COLUMNS)
        self.heads_width = round_up(spec.n_heads * spec.head_dim, COLUMNS)
        self.qkv_width = round_up((spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim, COLUMNS)
        self.kv = KVLayout.of(spec)
        self._allocate()

    # --- buffers ----------------------------------------------------------------------------------

    def _floats(self, *shape: int) -> BufferRef:
        return self.ledger.allocate("activations", shape, np.float32)

    def _allocate(self) -> None:
        spec, rows = self.spec, self.rows
        self.x = [self._floats(rows, self.width) for _ in range(2)]
        self.y = self._floats(rows, self.width)
        self.qkv = self._floats(rows, self.qkv_width)
        layers = self.weights.layers
        readers = [m.format for layer in layers for m in layer.projections]
        readers += [g for layer in layers for g in (layer.ffn.layout.gate, layer.ffn.layout.up)]
        self.normed = self._tiles(spec.dim, rows, readers)
        self.attended = self._tiles(spec.n_heads * spec.head_dim, rows, [layer.output.format for layer in layers])
        private = self._private
        self.attention = self._floats(private, rows, self.heads_width)
        hidden = max(layer.ffn.layout.clusters * layer.ffn.layout.neurons for layer in layers)
        self.hidden = self._tiles(hidden, rows, [layer.ffn.layout.down for layer in layers], shared=True)
        self.output_rows = self.shared.logits.shape[0]
        self.final = self._tiles(spec.dim, self.output_rows, [self.weights.output.format])
        share = spec.n_heads // spec.n_kv_heads
        self.attend_lane = round_up(a.attend_scratch(share, spec.head_dim, a.QUERY_TOKENS), 64)
        self.attend_scratch = self.ledger.allocate("activations", self.lanes * self.attend_lane)
        neurons = max(layer.ffn.layout.neurons for layer in layers)
        self.ffn_lane = rows * 2 * neurons * 4
        self.ffn_scratch = self.ledger.allocate("activations", self.lanes * self.ffn_lane)
        self.unpack_scratch = self.ledger.allocate("activations", self.lanes * rw.UNPACKED)
        self.spans = -(-self.shared.context // a.SPAN) + 1
        self.state_row = spec.n_heads * self.spans * (a.HEAD + 4 * spec.head_dim)
        states = rows * self.state_row if self.mode == "decode" else 64
        self.states = self.ledger.allocate("activations", states)

    @property
    def _private(self) -> int:
        """How many copies a prepared buffer has: one a lane in decode."""
        return self.lanes if self.mode == "decode" else 1

    def _tiles(self, columns: int, rows: int, readers: list[Format], shared: bool = False) -> Tiles:
        """Tiles for whichever kinds the readers want. K-quants read whole blocks of 256 columns."""
        subs = max(round_up(columns, reader.columns) for reader in readers) // COLUMNS
        copies = 1 if shared else self._private
        refs: list[BufferRef | None] = []
        for is_float, token in ((False, INT8_TOKEN), (True, FLOAT_TOKEN)):
            wanted = any(reader.is_float == is_float for reader in readers)
            refs.append(self.ledger.allocate("activations", (copies, rows * subs * token)) if wanted else None)
        step = 0 if shared or self.mode == "prefill" else rows * subs
        return Tiles(refs[0], refs[1], subs, step * INT8_TOKEN, step * FLOAT_TOKEN)

    # --- programs ---------------------------------------------------------------------------------

    def body(self, name: str) -> Program:
        """All layers; prefill leaves the last FFN's output for `head` to add."""
        return self._body(self._builder(name)).build()

    def head(self, name: str) -> Program:
        """Logits of the rows that want them; each row at most once after a body."""
        return self._head(self._builder(name)).build()

    def whole(self, name: str) -> Program:
        """Body and head in one."""
        return self._head(self._body(self._builder(name))).build()

    def _builder(self, name: str) -> ProgramBuilder:
        return ProgramBuilder(name, self.ledger, self.lanes, self.shared.error)

    def _body(self, b: ProgramBuilder) -> ProgramBuilder:
        self._at = 0  # which of the two residual buffers is current
        self._embed(b)
        for i, layer in enumerate(self.weights.layers):
            post = self.weights.layers[i - 1].norms.get("post_ffw_norm") if i else None
            ready = self._norm(b, i, layer.norms["attn_norm"], self.normed, i > 0, post)
            self._attend(b, i, layer, self._project(b, i, layer, ready))
            ready = self._norm(b, i, layer.norms["ffn_norm"], self.normed, True, layer.norms.get("post_attention_norm"))
            self._ffn(b, i, layer, ready)
        return b

    def _head(self, b: ProgramBuilder) -> ProgramBuilder:
        post = self.weights.layers[-1].norms.get("post_ffw_norm")
        ready = self._norm(b, len(self.weights.layers), self.weights.output_norm, self.final, True, post, select=True)
        logits = self.shared.logits
        self._matmul(
            b, len(self.weights.layers), self.weights.output, self.final, logits, 0, logits.shape[1],
            outputs=True, prepare=ready,
        )  # fmt: skip
        return b

    # --- operators --------------------------------------------------------------------------------

    def _embed(self, b: ProgramBuilder) -> None:
        e = self.weights.embedding
        b.add(
            kernel_name(rw.embed, e.format.name),
            Opcode.EMBED,
            {
                rw.EMBED_WEIGHTS: e.ref,
                rw.EMBED_GROUP: e.group_bytes,
                rw.EMBED_BLOCKS: e.blocks,
                rw.EMBED_X: self.x[0],
                rw.EMBED_ROW: 4 * self.width,
                rw.EMBED_SCALE: float(self.spec.embedding_scale),
                rw.EMBED_SCRATCH: self.unpack_scratch,
            },
        )

    def _norm(
        self,
        b: ProgramBuilder,
        layer: int,
        weight: BufferRef,
        out: Tiles,
        add: bool,
        post: BufferRef | None,
        *,
        select: bool = False,
    ) -> Draft | None:
        """Residual addition (if `add`) and norm: in decode a preparation for the instructions that read `out`,
        which writes the new residual into the other of two buffers; in prefill an instruction of its own."""
        source = self.x[self._at]
        if self.mode == "decode" and add:
            self._at = 1 - self._at
        operands: dict[int, Operand] = {
            rw.NORM_X: source,
            rw.NORM_X_OUT: self.x[self._at],
            rw.NORM_ROW: 4 * self.width,
            rw.NORM_Y: self.y if add else None,
            rw.NORM_POST: post,
            rw.NORM_WEIGHT: weight,
            rw.NORM_DIM: self.spec.dim,
            rw.NORM_SUBS: self.width // COLUMNS,
            rw.NORM_EPS: float(self.spec.norm_eps),
            rw.NORM_OUT: out.ints,
            rw.NORM_OUT_LANE: out.int_lane,
            rw.NORM_FLOAT_OUT: out.floats,
            rw.NORM_FLOAT_LANE: out.float_lane,
            rw.NORM_TILE: self.tile,
            rw.NORM_SELECT: int(select),
            rw.NORM_Y_ROW: 4 * self.width,
            rw.NORM_TILE_SUBS: out.subs,
        }
        return self._row_wise(b, kernel_name(rw.norm), Opcode.NORM, operands, layer)

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
    ) -> int:
        """y[row][column:] = matrix x[row]."""
        tiles, lane = x.of(matrix.format)
        token = FLOAT_TOKEN if matrix.format.is_float else INT8_TOKEN
        rows = self.output_rows if outputs else self.rows
        panel = max(1, PANEL_BYTES // (rows * token * matrix.format.subs))
        return b.add(
            kernel_name(m.matmul, matrix.format.name, self.tile),
            Opcode.MATMUL,
            {
                m.MATMUL_WEIGHTS: matrix.ref,
                m.MATMUL_GROUP: matrix.group_bytes,
                m.MATMUL_GROUPS: matrix.groups,
                m.MATMUL_BLOCKS: matrix.blocks,
                m.MATMUL_X: tiles,
                m.MATMUL_X_LANE: lane,
                m.MATMUL_Y: BufferRef(y.region, y.offset + 4 * column, y.nbytes - 4 * column, y.dtype, y.shape),
                m.MATMUL_Y_ROW: 4 * width,
                m.MATMUL_CHUNK: self._chunk(matrix.groups, matrix.group_bytes),
                m.MATMUL_PANEL: panel,
                m.MATMUL_OUTPUTS: int(outputs),
                m.MATMUL_X_SUBS: x.subs,
            },
            layer=layer,
            waits=waits,
            prepare=prepare,
        )

    def _chunk(self, groups: int, nbytes: int) -> int:
        """Row groups (or clusters) of `nbytes` each in a piece."""
        return max(1, min(groups // (PIECES * self.lanes), max(1, PIECE_BYTES // nbytes)))

    def _project(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> list[int]:
        """Queries, keys and values: up to two instructions that run side by side (a record has two waits; a
        third, where every one has a format of its own, waits for the first)."""
        waits, column, numbers = [len(b.drafts) - 1], 0, list[int]()
        for matrix in layer.projections:
            numbers.append(
                self._matmul(
                    b, i, matrix, self.normed, self.qkv, column, self.qkv_width, prepare=ready,
                    waits=waits if len(numbers) < 2 else numbers[:1],
                )  # fmt: skip
            )
            column += matrix.rows
        return numbers[-2:]

    def _attend(self, b: ProgramBuilder, i: int, layer: Layer, waits: list[int]) -> None:
        spec, at = self.spec, self.spec.layers[i]
        decode = self.mode == "decode"
        operands: dict[int, Operand] = {
            a.A_QKV: self.qkv,
            a.A_QKV_ROW: 4 * self.qkv_width,
            a.A_HEADS: spec.n_heads,
            a.A_KV_HEADS: spec.n_kv_heads,
            a.A_DIM: spec.head_dim,
            a.A_WINDOW: at.window,
            a.A_LAYER: self.kv.layer(i),
            a.A_VALUES: self.kv.values,
            a.A_ROPE: self.shared.ropes[at.rope],
            a.A_HALF: at.rope.dims // 2,
            a.A_QUERY_NORM: layer.norms.get("attn_q_norm"),
            a.A_KEY_NORM: layer.norms.get("attn_k_norm"),
            a.A_EPS: float(spec.norm_eps),
            a.A_SCALE: float(spec.attention_scale),
            a.A_OUT: self.states if decode else self.attention,
            a.A_OUT_ROW: self.state_row if decode else 4 * self.heads_width,
            a.A_SPANS: self.spans,
            a.A_SCRATCH: self.attend_scratch,
            a.A_SCRATCH_LANE: self.attend_lane,
        }
        merge: dict[int, Operand] = {
            a.MERGE_STATES: self.states if decode else None,
            a.MERGE_STATES_ROW: self.state_row,
            a.MERGE_SPANS: self.spans,
            a.MERGE_HEADS: spec.n_heads,
            a.MERGE_DIM: spec.head_dim,
            a.MERGE_WINDOW: at.window,
            a.MERGE_ROWS: self.attention,
            a.MERGE_ROWS_LANE: 4 * self.rows * self.heads_width if decode else 0,
            a.MERGE_ROWS_ROW: 4 * self.heads_width,
            a.MERGE_SUBS: self.heads_width // COLUMNS,
            a.MERGE_TILE: self.tile,
            a.MERGE_OUT: self.attended.ints,
            a.MERGE_OUT_LANE: self.attended.int_lane,
            a.MERGE_FLOAT_OUT: self.attended.floats,
            a.MERGE_FLOAT_LANE: self.attended.float_lane,
            a.MERGE_SCRATCH: self.attend_scratch,
            a.MERGE_SCRATCH_LANE: self.attend_lane,
            a.MERGE_TILE_SUBS: self.attended.subs,
        }
        if decode:
            b.add(kernel_name(a.attend_one), Opcode.ATTEND, operands, layer=i, waits=waits)
        else:
            b.add(kernel_name(a.rope), Opcode.ROPE, operands, layer=i, waits=waits)
            b.add(kernel_name(a.attend), Opcode.ATTEND, operands, layer=i)
        ready = self._row_wise(b, kernel_name(a.merge), Opcode.MERGE, merge, i)
        self._matmul(b, i, layer.output, self.attended, self.y, 0, self.width, prepare=ready)

    def _ffn(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> None:
        layout, tile = layer.ffn.layout, self.tile
        x, x_lane = self.normed.of(layout.gate)
        token = FLOAT_TOKEN if layout.gate.is_float else INT8_TOKEN
        hidden, _ = self.hidden.of(layout.down)
        hidden_token = FLOAT_TOKEN if layout.down.is_float else INT8_TOKEN
        blocks = round_up(layout.dim, layout.gate.columns) // layout.gate.columns
        up: dict[int, Operand] = {
            f.UP_TABLE: layer.ffn.table,
            f.UP_LIST: layer.ffn.list,
            f.UP_NEURONS: layout.neurons,
            f.UP_BLOCKS: blocks,
            f.UP_X: x,
            f.UP_X_LANE: x_lane,
            f.UP_X_SUBS: self.normed.subs,
            f.UP_OUT: hidden,
            f.UP_OUT_SUBS: self.hidden.subs,
            f.UP_OUT_FLOAT: int(layout.down.is_float),
            f.UP_CHUNK: self._chunk(layout.clusters, layout.gate_up_stride),
            f.UP_PANEL: max(1, PANEL_BYTES // (self.rows * token * layout.gate.subs)),
            f.UP_SCRATCH: self.ffn_scratch,
            f.UP_SCRATCH_LANE: self.ffn_lane,
            f.UP_UP_OFFSET: layout.gate_bytes,
        }
        down: dict[int, Operand] = {
            f.DOWN_TABLE: layer.ffn.table,
            f.DOWN_LIST: layer.ffn.list,
            f.DOWN_GROUPS: layout.down_groups,
            f.DOWN_X: hidden,
            f.DOWN_X_SUBS: self.hidden.subs,
            f.DOWN_Y: self.y,
            f.DOWN_Y_ROW: 4 * self.width,
            f.DOWN_CHUNK: max(1, layout.down_groups // (PIECES * self.lanes)),
            f.DOWN_PANEL: max(1, PANEL_BYTES // (self.rows * hidden_token * layout.down.subs)),
        }
        names = layout.gate.name, layout.up.name, self.spec.activation, tile
        b.add(kernel_name(f.ffn_up, *names), Opcode.FFN_UP, up, layer=i, prepare=ready)
        b.add(kernel_name(f.ffn_down, layout.down.name, tile), Opcode.FFN_DOWN, down, layer=i)

