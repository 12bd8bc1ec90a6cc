"""An NPU runtime of plain numpy, for tests of the unit around it: each graph is a block of the float reference."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import CpuUnit
from coterie.actors.npu import NpuUnit
from coterie.actors.npu_product import Product
from coterie.graphs import rows_at
from coterie.kernels import operands as o
from coterie.kernels.record import OPCODE
from coterie.models.llama import activated
from coterie.models.load import Model
from coterie.scheduler.layout import ModelLayout
from coterie.scheduler.lower_npu import cut_of, pieces
from coterie.scheduler.placement import Placement
from coterie.storage.packer import half_split_rows
from coterie.storage.unit import UnitBuffers

Floats = npt.NDArray[np.float32]


class PlainGraph:
    """A graph whose input and output are in the arena. `fails` raises in run, once."""

    def __init__(self, block: Callable[[Floats], Floats], x: Floats, y: Floats) -> None:
        self.block, self.x, self.y, self.fails = block, x, y, False
        self.runs = 0

    def run(self) -> None:
        self.runs += 1
        if self.fails:
            self.fails = False
            raise RuntimeError("the device went away\nfor good")
        found = self.block(np.array(self.x))
        self.y[:, : found.shape[1]] = found


class PlainGraphs:
    """In place of coterie.graphs.Graphs."""

    def __init__(
        self, cpu: CpuUnit, buffers: UnitBuffers, model: Model, progress: Callable[..., None], placement: Placement
    ) -> None:
        self.arena, self.model, self.cuts = cpu.arena, model, placement.cuts
        self.unit = NpuUnit(cpu.arena, buffers, cpu.abort_address)
        self.graphs: list[PlainGraph] = []

    def load(self, layout: ModelLayout) -> None:
        for program in layout.npu.values():
            made, kinds = list[Product](), list[str]()
            for kernel, row in zip(program.kernels, program.words, strict=True):
                _, kind, rows, _ = kernel.split(":")
                kinds.append(cut_of(kind, int(rows)))
                x, y = (rows_at(self.arena, int(row[at]), int(rows), int(row[at + 1])) for at in (o.GRAPH_X, o.GRAPH_Y))
                graphs, outputs, firsts = list[PlainGraph | None](), list[Floats](), list[int]()
                for first, last in pieces(row, self.cuts[kinds[-1]]):
                    width = y.shape[1] if kind == "ffn" else last - first
                    out = y if kind == "ffn" and not graphs else np.zeros((int(rows), width), np.float32)
                    compute = block(self.model, kind, int(row[OPCODE]) >> 16 & 0xFFFF, first, last)
                    graphs.append(PlainGraph(compute, x, out) if first < last else None)
                    outputs.append(out)
                    firsts.append(first)
                made.append(Product(graphs, outputs, y, None if kind == "ffn" else firsts))
                self.graphs += [graph for graph in graphs if graph is not None]
            self.unit.load(program, kinds, made)

    def describe(self) -> dict[str, Any]:
        return {"unit": "npu", "runtime": "numpy"}

    def close(self) -> None:
        self.unit.close()


def block(model: Model, kind: str, layer: int, first: int, last: int) -> Callable[[Floats], Floats]:
    """What a graph of some rows, or neurons, of that kind does with padded rows."""
    spec, source = model.spec, model.source

    def weights(name: str) -> Floats:
        found = source.floats(f"blk.{layer}.{name}.weight")
        if re.fullmatch("attn_[qk]", name) and spec.interleaved_rope:
            found = found[half_split_rows(spec.head_dim, spec.layers[layer].rope.dims, len(found) // spec.head_dim)]
        return found

    if kind == "qkv":
        joined = np.concatenate([weights(f"attn_{name}") for name in "qkv"])[first:last]
        return lambda x: x[:, : joined.shape[1]] @ joined.T
    if kind == "head":
        head = source.floats("output.weight" if "output.weight" in source.tensors else "token_embd.weight")[first:last]
        return lambda x: x[:, : spec.dim] @ head.T
    if kind == "out":
        out = weights("attn_output")[first:last]
        return lambda x: x[:, : out.shape[1]] @ out.T
    gate, up = (weights(f"ffn_{name}")[first:last] for name in ("gate", "up"))
    down = weights("ffn_down")[:, first:last]
    return lambda x: activated(spec.activation, x[:, : spec.dim] @ gate.T, x[:, : spec.dim] @ up.T) @ down.T
