"""Compile prompts' chunks for a CPU unit and an NPU unit together: static-shape graphs do the matrix products, the CPU
unit all else (llm.npu, section 3: norms, attention and rotary positions stay in floating point).

A layer's graphs are `qkv`, `out` and `ffn` (Gate, Up, activation and Down in one). Each unit has a program of its own;
they meet at flags, three times a layer and direction.
"""

import numpy as np

from coterie.kernels import operands as o
from coterie.kernels.formats import COLUMNS, Format
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.models.spec import ModelSpec
from coterie.scheduler.buffers import Shared, Tiles
from coterie.scheduler.lower import Lowering
from coterie.scheduler.program import Draft, Operand, Program, ProgramBuilder
from coterie.storage.arena import BufferRef, Ledger, round_up
from coterie.storage.weights import FFN, Layer, Weights


class NpuLowering(Lowering):
    """Compiles the two programs of chunks of up to `rows` tokens, the graphs' length; graphs work on all rows, of which
    a shorter chunk's last ones hold what nobody reads."""

    def __init__(self, spec: ModelSpec, weights: Weights, shared: Shared, ledger: Ledger, *, rows: int) -> None:
        super().__init__(spec, weights, shared, ledger, mode="prefill", rows=rows, tile=1)

    def _allocate_ffn(self) -> None:
        """The graphs keep what is between Gate and Down to themselves."""

    def _tiles(self, columns: int, rows: int, readers: list[Format], shared: bool = False) -> Tiles:
        """What graphs read: plain float rows. The head's matrix is the CPU unit's."""
        if rows == self.shared.logits.shape[0]:
            return super()._tiles(columns, rows, readers, shared)
        subs = round_up(columns, COLUMNS) // COLUMNS
        return Tiles(None, self.ledger.allocate("activations", (rows, COLUMNS * subs), np.float32), subs, 0, 0)

    def both(self, name: str, graphs: str) -> tuple[Program, Program]:
        """All layers: the CPU unit's program, and the NPU unit's."""
        self._npu = self._builder(graphs)
        cpu = self._body(self._builder(name))
        cpu.add(kernel_name("meet"), Opcode.POST, {})  # the step ends on the CPU unit, behind the last graph
        return cpu.build(), self._npu.build()

    def _graph(self, b: ProgramBuilder, i: int, kind: str, x: BufferRef, y: BufferRef) -> None:
        operands: dict[int, Operand] = {
            o.GRAPH_X: x,
            o.GRAPH_X_ROW: 4 * x.shape[1],
            o.GRAPH_Y: y,
            o.GRAPH_Y_ROW: 4 * y.shape[1],
        }
        opcode = Opcode.FFN if kind == "ffn" else Opcode.MATMUL
        name = kernel_name("graph", kind, self.rows)
        self._npu.meet(b.drafts[-1].flag)
        self._npu.add(name, opcode, operands, layer=i, waits=[])
        b.meet(self._npu.drafts[-1].flag)

    # --- operators that are graphs ------------------------------------------------------------------

    def _project(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> list[int]:
        self._graph(b, i, "qkv", _rows(self.normed), self.qkv)
        return [len(b.drafts) - 1]

    def _mix(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> None:
        self._graph(b, i, "out", _rows(self.attended), self.y)

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN, ready: Draft | None) -> None:
        self._graph(b, i, "ffn", _rows(self.normed), self.z)


def _rows(tiles: Tiles) -> BufferRef:
    assert tiles.floats is not None
    return tiles.floats
