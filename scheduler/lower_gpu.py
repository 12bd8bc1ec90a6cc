"""Compile a model into programs for a GPU unit: one kernel an operator, in the order of a queue.

A queue runs its kernels one after the other, so no instruction waits for a flag; the last one posts the flag that the
step is done (HeteroInfer, section 4.3: decode joins by queue order). Weights and KV blocks are the CPU unit's own, in
the arena; only activations are apart.
"""

import numpy as np

from coterie.errors import PlanError
from coterie.kernels import record as r
from coterie.kernels.formats import COLUMNS
from coterie.kernels.gpu.signatures import BLOCK, MOST_DIM, NONE, TOKENS, operands
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.scheduler.buffers import Laid
from coterie.scheduler.program import NO_LAYER, Program, ProgramBuilder
from coterie.storage.arena import BufferRef, round_up
from coterie.storage.kv import KVLayout
from coterie.storage.unit import UnitBuffers
from coterie.storage.weights import FFN, Layer, Matrix, Weights

FLOAT = 4  # bytes
OUTPUTS = 8  # rows at most whose logits are computed together


class GpuLowering:
    """Compiles programs for steps of up to `rows` rows, one or several; `unit`: the GPU unit's own buffers. Raises
    PlanError for what a GPU unit cannot do."""

    def __init__(self, laid: Laid, unit: UnitBuffers, *, rows: int) -> None:
        self.spec, self.weights, self.shared, self.ledger = laid
        self.unit, spec = unit, laid.spec
        if spec.head_dim > MOST_DIM:
            raise PlanError(
                f"heads of {spec.head_dim} dimensions are more than a GPU unit takes: drop gpu from --units"
            )
        self.tokens = 1 if rows == 1 else TOKENS
        self.rows, self.kv = round_up(rows, self.tokens), KVLayout.of(spec)
        self.width = round_up(spec.dim, COLUMNS)
        self.heads_width = round_up(spec.n_heads * spec.head_dim, COLUMNS)
        self.qkv_width = round_up(spec.qkv_rows, COLUMNS)
        self._allocate()

    def _floats(self, width: int, rows: int | None = None) -> BufferRef:
        return self.ledger.allocate("activations", (self.rows if rows is None else rows, width), np.float32)

    def _allocate(self) -> None:
        self.x, self.y, self.qkv = self._floats(self.width), self._floats(self.width), self._floats(self.qkv_width)
        self.residual = self.x  # what norms read
        self.inputs, self.mixed = self._columns(self.spec.dim), self._columns(self.spec.n_heads * self.spec.head_dim)
        self.normed, self.rounded = self._floats(self.inputs), self._rounded(self.inputs)
        self.attended, self.attended_rounded = self._floats(self.mixed), self._rounded(self.mixed)
        ffns = [layer.ffn.layout for layer in self.weights.layers if isinstance(layer.ffn, FFN)]
        self.hidden = self._rounded(max((layout.clusters * layout.neurons for layout in ffns), default=COLUMNS))
        selected = round_up(min(self.rows, OUTPUTS), self.tokens)
        output = self.weights.output
        assert output is not None
        self.planes = 1 if output.format.is_float else 2
        self.selected = self._floats(self.width, selected)
        self.final = (self._floats if output.format.is_float else self._rounded)(self.inputs, self.planes * selected)

    def _rounded(self, columns: int, rows: int | None = None) -> BufferRef:
        """Rows of blocks as int8 would have them; float rows fit too."""
        return self._floats(columns // COLUMNS * BLOCK, rows)

    def _columns(self, columns: int) -> int:
        """Columns of a row that any format may read: K-quants read whole blocks of 256."""
        return round_up(columns, 8 * COLUMNS)

    # --- programs ---------------------------------------------------------------------------------

    def body(self, name: str) -> Program:
        """All layers; the last FFN's output is left for the head to add."""
        return self._end(self._body(self._builder(name)))

    def head(self, name: str) -> Program:
        """Logits of the rows that want them."""
        return self._end(self._head(self._builder(name)))

    def whole(self, name: str) -> Program:
        """Body and head in one."""
        return self._end(self._head(self._body(self._builder(name))))

    def _builder(self, name: str) -> ProgramBuilder:
        return ProgramBuilder(name, self.ledger, 1, self.shared.error)

    def _add(
        self, b: ProgramBuilder, kernel: str, opcode: Opcode, layer: int, /, **values: int | float | BufferRef
    ) -> None:
        family, given = kernel.partition(":")[0], {"step": self.unit.header, **values}
        b.add(kernel, opcode, operands(family, given), layer=layer, waits=[])

    def _end(self, b: ProgramBuilder) -> Program:
        """The program's own flag is posted by the last kernel in the queue."""
        self._add(b, "post", Opcode.POST, NO_LAYER, flag=NONE)
        last = b.drafts[-1]
        flag = BufferRef("flags", last.flag, r.LINE, "<i8", (r.LINE // 8,))
        last.operands = operands("post", {"step": self.unit.header, "flag": flag})
        return b.build()

    def _body(self, b: ProgramBuilder) -> ProgramBuilder:
        self._embed(b)
        layers = self.weights.layers
        for i, layer in enumerate(layers):
            post = layers[i - 1].norms.get("post_ffw_norm") if i else None
            readers = {matrix.format.is_float for matrix in layer.projections}
            self._norm(b, i, layer.norms["attn_norm"], readers, add=i > 0, post=post)
            self._attend(b, i, layer)
            assert isinstance(layer.ffn, FFN)
            readers = {layer.ffn.layout.gate.is_float, layer.ffn.layout.up.is_float}
            self._norm(b, i, layer.norms["ffn_norm"], readers, add=True, post=layer.norms.get("post_attention_norm"))
            self._ffn(b, i, layer.ffn)
        return b

    def _head(self, b: ProgramBuilder) -> ProgramBuilder:
        weights, logits = self.weights, self.shared.logits
        assert weights.output is not None
        assert weights.output_norm is not None
        post = weights.layers[-1].norms.get("post_ffw_norm")
        readers = {weights.output.format.is_float}
        self._norm(b, NO_LAYER, weights.output_norm, readers, add=True, post=post, select=True)
        self._matmul(b, NO_LAYER, weights.output, self.final, logits, 0, select=True)
        b.outputs = True
        return b

    # --- operators --------------------------------------------------------------------------------

    def _embed(self, b: ProgramBuilder) -> None:
        e = self.weights.embedding
        assert e is not None
        self._add(
            b, kernel_name("embed", e.format.name), Opcode.EMBED, NO_LAYER,
            ids=self.unit.rows[r.IDS], weights=_whole(e), per=e.run.per, stride=e.run.stride, group=e.run.item_bytes,
            blocks=e.blocks, vocab=self.spec.vocab, out=self.x, out_row=FLOAT * self.width, width=self.width,
            scale=float(self.spec.embedding_scale),
        )  # fmt: skip

    def _norm(
        self,
        b: ProgramBuilder,
        layer: int,
        weight: BufferRef,
        readers: set[bool],
        *,
        add: bool,
        post: BufferRef | None,
        select: bool = False,
    ) -> None:
        """Residual addition and norm, for readers that take floats (True), what int8 leaves of them (False), or both.
        The selected rows of a head are added nowhere, so that it can be run again for others."""
        floats, rounded = (self.final, self.final) if select else (self.normed, self.rounded)
        self._add(
            b, "norm", Opcode.NORM, layer,
            select=int(select), outputs=self.unit.rows[r.OUTPUT_ROWS], x=self.residual, y=self.y if add else NONE,
            x_out=self.selected if select else self.x, row=FLOAT * self.width, post=NONE if post is None else post,
            weight=weight, dim=self.spec.dim, eps=float(self.spec.norm_eps), out=floats if True in readers else NONE,
            out_row=FLOAT * floats.shape[1], rounded=rounded if False in readers else NONE,
            rounded_row=FLOAT * rounded.shape[1], planes=self.planes if select else 1, width=self.inputs,
        )  # fmt: skip

    def _matmul(
        self, b: ProgramBuilder, layer: int, matrix: Matrix, x: BufferRef, y: BufferRef, column: int, *,
        select: bool = False,
    ) -> None:  # fmt: skip
        run = matrix.run
        self._add(
            b, kernel_name("matmul", matrix.format.name, self.tokens), Opcode.MATMUL, layer,
            select=int(select), weights=_whole(matrix), groups=run.items, blocks=matrix.blocks, group=run.item_bytes,
            per=run.per, stride=run.stride, x=x, x_row=FLOAT * x.shape[1], planes=self.planes if select else 1,
            y=y.tail(FLOAT * column), y_row=FLOAT * y.shape[1],
        )  # fmt: skip

    def _attend(self, b: ProgramBuilder, i: int, layer: Layer) -> None:
        spec, at, column = self.spec, self.spec.layers[i], 0
        for matrix in layer.projections:
            x = self.normed if matrix.format.is_float else self.rounded
            self._matmul(b, i, matrix, x, self.qkv, column)
            column += matrix.rows
        heads: dict[str, int | float | BufferRef] = {
            "positions": self.unit.rows[r.POSITIONS], "tables": self.unit.rows[r.TABLES], "base": 0, "qkv": self.qkv,
            "qkv_row": FLOAT * self.qkv_width, "heads": spec.n_heads, "kv_heads": spec.n_kv_heads,
            "dim": spec.head_dim, "layer": self.kv.layer(i), "values": self.kv.values,
        }  # fmt: skip
        query, key = (layer.norms.get(name, NONE) for name in ("attn_q_norm", "attn_k_norm"))
        self._add(
            b, "rope", Opcode.ROPE, i, **heads, half=at.rope.dims // 2, angles=self.shared.ropes[at.rope],
            query_norm=query, key_norm=key, eps=float(spec.norm_eps), scale=float(spec.attention_scale),
        )  # fmt: skip
        self._keys_written(b, i)
        rounded, floats = self.attended_rounded, layer.output.format.is_float
        self._add(
            b, "attend", Opcode.ATTEND, i, **heads, window=at.window, out=self.attended, out_row=FLOAT * self.mixed,
            rounded=NONE if floats else rounded, rounded_row=FLOAT * rounded.shape[1], width=self.mixed,
        )  # fmt: skip
        self._matmul(b, i, layer.output, self.attended if floats else rounded, self.y, 0)

    def _keys_written(self, b: ProgramBuilder, i: int) -> None:
        """A layer's keys and values are in the KV cache."""

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        self._ffn_up(b, i, ffn)
        self._ffn_down(b, i, ffn)

    def _bundles(self, ffn: FFN) -> dict[str, int | float | BufferRef]:
        """What both halves are told of a network."""
        layout = ffn.layout
        return {
            "weights": _clusters(self.weights, ffn), "clusters": layout.clusters, "neurons": layout.neurons,
            "bundle": layout.bundle, "per": ffn.run.per, "stride": ffn.run.stride, "hidden": self.hidden,
            "hidden_row": FLOAT * self.hidden.shape[1],
        }  # fmt: skip

    def _ffn_up(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        layout = ffn.layout
        x = self.normed if layout.gate.is_float else self.rounded
        names = layout.gate.name, layout.up.name, self.spec.activation, self.tokens
        self._add(
            b, kernel_name("ffn_up", *names), Opcode.FFN_UP, i, **self._bundles(ffn), up=layout.gate_bytes,
            blocks=round_up(layout.dim, layout.gate.columns) // layout.gate.columns, x=x, x_row=FLOAT * x.shape[1],
            rounded=int(not layout.down.is_float),
        )  # fmt: skip

    def _ffn_down(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        layout = ffn.layout
        self._add(
            b, kernel_name("ffn_down", layout.down.name, self.tokens), Opcode.FFN_DOWN, i, **self._bundles(ffn),
            down=layout.down_offset, groups=layout.down_groups, y=self.y, y_row=FLOAT * self.width,
        )  # fmt: skip


def _whole(matrix: Matrix) -> BufferRef:
    """A matrix that is in memory in one piece."""
    if len(matrix.slices) != 1 or matrix.slices[0].count != matrix.run.extents:
        raise PlanError("a GPU unit needs all weights in memory: raise --memory, or leave gpu out of --units")
    return matrix.slices[0].ref


def _clusters(weights: Weights, ffn: FFN) -> BufferRef:
    """A layer's bundles, in one piece."""
    extents = weights.extents
    numbers = np.arange(extents.first[ffn.index], extents.first[ffn.index + 1])
    where, sizes = weights.where[numbers], extents.nbytes[numbers]
    if not weights.is_pinned(numbers).all() or (np.diff(where) != sizes[:-1]).any():
        raise PlanError("a GPU unit needs all weights in memory: raise --memory, or leave gpu out of --units")
    return BufferRef("weights", int(where[0]), int(sizes.sum()), "|u1", (int(sizes.sum()),))
