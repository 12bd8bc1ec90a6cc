"""Compile prompts' chunks for a CPU unit and an NPU unit together: static-shape graphs compute a part of the matrix
products, or all of them, the CPU unit the rest and all else (llm.npu, section 3: norms, attention and rotary positions
stay in floating point; HeteroInfer, section 4.2: a product cut by the rows of its weights).

A layer's graphs are `qkv`, `out` and `ffn` (Gate, Up, activation and Down in one). Of qkv and out the NPU computes the
first rows, into its columns of the CPU unit's own output; of an ffn the first neurons, whose sums the next norm adds.
How much is in the step's header. Each unit has a program of its own; they meet at flags, three times a layer and
direction.
"""

from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.formats import ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.scheduler.balance import Given
from coterie.scheduler.buffers import Laid
from coterie.scheduler.lower import Lowering
from coterie.scheduler.program import Draft, Operand, Program, ProgramBuilder
from coterie.storage.arena import BufferRef
from coterie.storage.weights import FFN, Layer

GROUPED = {"qkv": "matmul", "out": "matmul", "ffn": "ffn"}  # kinds of graphs whose cuts move together
SHARES = {"matmul": (r.GIVEN_QKV, r.GIVEN_OUT), "ffn": (r.GIVEN_UP,)}  # header words of what is cut alike


class NpuLowering(Lowering):
    """Compiles the two programs of chunks of up to `rows` tokens, the graphs' length; graphs work on all rows, of which
    a shorter chunk's last ones hold what nobody reads."""

    given = MappingProxyType({"qkv": r.GIVEN_QKV, "out": r.GIVEN_OUT, "up": r.GIVEN_UP, "sums": r.GIVEN_UP})

    def __init__(self, laid: Laid, *, rows: int, tile: int) -> None:
        self.length = rows
        super().__init__(laid, mode="prefill", rows=rows, tile=tile)
        self.z = self._floats(self.rows, self.width)  # y still holds what norms have added
        self.plain = self.normed_rows = self._floats(self.rows, self.width)
        self.again = self.sums = self._floats(self.rows, self.width)
        # What one graph makes, until it is added:
        self.piece = self._floats(self.length, max(self.width, self.qkv_width))

    def both(self, name: str, graphs: str) -> tuple[Program, Program]:
        """All layers: the CPU unit's program, and the NPU unit's."""
        self._npu = self._builder(graphs)
        cpu = self._body(self._builder(name))
        cpu.add(kernel_name("meet"), Opcode.POST, {})  # the step ends on the CPU unit, behind the last graph
        return cpu.build(), self._npu.build()

    # --- operators in which graphs take part ----------------------------------------------------------

    def _graph(
        self, b: ProgramBuilder, i: int, kind: str, parts: tuple[int, int, int], x: BufferRef, y: BufferRef
    ) -> int:
        """Have the NPU unit compute its share of a product, once the last instruction is done; returns the flag that it
        posts then. `parts`: row groups or clusters, rows or neurons of each, and of all."""
        count, each, rows = parts
        operands: dict[int, Operand] = {
            o.GRAPH_X: x,
            o.GRAPH_X_ROW: 4 * x.shape[-1],
            o.GRAPH_Y: y,
            o.GRAPH_Y_ROW: 4 * y.shape[-1],
            o.GRAPH_PIECE: self.piece,
            o.GRAPH_COUNT: count,
            o.GRAPH_EACH: each,
            o.GRAPH_ROWS: rows,
        }
        opcode = Opcode.FFN if kind == "ffn" else Opcode.MATMUL
        self._npu.meet(b.drafts[-1].flag)
        self._npu.add(kernel_name("graph", kind, self.length), opcode, operands, layer=i, waits=[])
        return self._npu.drafts[-1].flag

    def _project(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> list[int]:
        rows = sum(matrix.rows for matrix in layer.projections)
        flag = self._graph(b, i, "qkv", (rows // ROWS, ROWS, rows), self.normed_rows, self.qkv)
        numbers = super()._project(b, i, layer, ready)
        b.meet(flag, r.GIVEN_QKV)
        met = b.add(kernel_name("meet"), Opcode.POST, {}, layer=i, waits=numbers[-2:-1])
        return [met, numbers[-1]]

    def _mix(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> None:
        parts = layer.output.run.items, ROWS, layer.output.rows
        flag = self._graph(b, i, "out", parts, self.attention, self.y)
        super()._mix(b, i, layer, ready)
        b.meet(flag, r.GIVEN_OUT)

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN, ready: Draft | None) -> None:
        layout = ffn.layout
        flag = self._graph(b, i, "ffn", (layout.clusters, layout.neurons, layout.ffn_dim), self.normed_rows, self.sums)
        super()._ffn(b, i, ffn, ready)
        b.meet(flag, r.GIVEN_UP)


def pieces(words: NDArray[np.int64], cut: Given) -> list[tuple[int, int]]:
    """The first row, or neuron, of each of a record's graphs, and that behind its last; some may have none."""
    each, rows = int(words[o.GRAPH_EACH]), int(words[o.GRAPH_ROWS])
    return list(pairwise(min(rows, each * bound) for bound in cut.bounds(int(words[o.GRAPH_COUNT]))))
