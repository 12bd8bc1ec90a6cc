"""The graphs of a model's prompts on an NPU: made of its weights, built or read from the disk, bound to the arena."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import CpuUnit
from coterie.actors.npu import BoundGraph, NpuUnit
from coterie.actors.npu_cache import GraphCache
from coterie.actors.npu_graphs import WINDOW, Graph, choose_blocks, open_runtime
from coterie.errors import PlanError
from coterie.kernels import operands as o
from coterie.kernels.record import OPCODE
from coterie.models.part import model_identity
from coterie.models.ranges import Ranges
from coterie.scheduler.layout import ModelLayout
from coterie.scheduler.program import Program
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.npu_block import Block, Form, Kind, Seen, make_block
from coterie.storage.npu_quantise import Scheme
from coterie.storage.npu_ranges import model_ranges
from coterie.storage.packer import half_split_rows
from coterie.storage.unit import UnitBuffers

if TYPE_CHECKING:
    from coterie.models.load import Model

Floats = npt.NDArray[np.float32]
SCHEME: Scheme = "w8a8"


class Graphs:
    """The NPU unit of a model, and where its graphs come from. Raises UnitError where there is no runtime, UsageError
    for a packed model: graphs are made of what that was made of."""

    def __init__(self, cpu: CpuUnit, buffers: UnitBuffers, model: "Model", progress: Callable[..., None]) -> None:
        self.arena, self.model, self._progress = cpu.arena, model, progress
        self._source, self._identity = model.source, model_identity(model.source).encode()
        self.runtime = open_runtime()
        self.cache = GraphCache(self.runtime)
        self.unit = NpuUnit(cpu.arena, buffers, cpu.abort_address)
        self._ranges: Ranges | None = None
        self.nbytes = 0  # that the process grew by when graphs were loaded, at least the graphs' own

    def load(self, layout: ModelLayout) -> None:
        """Have every graph, and give it its buffers. Raises PlanError where an NPU cannot address them all."""
        records = [(program, i) for program in layout.npu.values() for i in range(program.length)]
        forms = [self._form(program, i) for program, i in records]
        if not self.runtime.stand_in:
            spec = self.model.spec
            ffn = 3 * spec.dim * spec.ffn_dim  # bytes of int8 weights
            sizes = [(form, ffn if form.kind == "ffn" else form.width_in * form.width_out) for form in forms]
            if len(choose_blocks(sizes)) < len(forms):
                raise PlanError(f"the graphs are more than the {WINDOW >> 30} GiB that an NPU addresses; drop npu")
        graphs, before = dict[str, list[BoundGraph]](), _private_bytes()
        for done, ((program, i), form) in enumerate(zip(records, forms, strict=True)):
            self._progress("graphs for the NPU", done, len(records))
            graphs.setdefault(program.name, []).append(self._bound(program, i, form))
        for program in layout.npu.values():
            self.unit.load(program, graphs[program.name])
        self._ranges = None
        self.nbytes = max(_private_bytes() - before, self.cache.nbytes)  # others may have given memory back meanwhile
        self.cache.drop_pages()

    def describe(self) -> dict[str, Any]:
        slept, polled = self.unit.waits()
        return {
            "unit": "npu",
            "runtime": self.runtime.describe(),
            "real": not self.runtime.stand_in,
            "scheme": SCHEME,
            "builds": self.cache.builds,
            "loads": self.cache.loads,
            "weight_copies": self.nbytes,
            "slept_s": slept,
            "polled_s": polled,
        }

    def close(self) -> None:
        self.unit.close()

    def _form(self, program: Program, i: int) -> Form:
        """What record `i` of a program computes."""
        _, kind, rows = program.kernels[i].split(":")
        words = program.words[i]
        widths = int(words[o.GRAPH_X_ROW]) // 4, int(words[o.GRAPH_Y_ROW]) // 4
        activation = self.model.spec.activation if kind == "ffn" else None
        return Form(_KINDS[kind], int(words[OPCODE]) >> 16, int(rows), *widths, SCHEME, activation)

    def _bound(self, program: Program, i: int, form: Form) -> Graph:
        started, builds = self.unit.cycles(), self.cache.builds
        graph = self.cache.open(form, self._identity, lambda: self._block(form))
        if self.cache.builds != builds:
            self.unit.built(started)
        words = program.words[i]
        x, y = (rows_at(self.arena, int(words[at]), form.n, int(words[at + 1])) for at in (o.GRAPH_X, o.GRAPH_Y))
        graph.bind(x, y)
        graph.run()  # what runtimes leave for the first time is done now, on whatever the buffers hold
        return graph

    def _block(self, form: Form) -> Block:
        """A block of the model's own weights."""
        if self._ranges is None:
            self._ranges = model_ranges(self.model, say=self._progress)
        names = {
            "qkv": ("attn_q", "attn_k", "attn_v"),
            "out": ("attn_output",),
            "ffn": ("ffn_gate", "ffn_up", "ffn_down"),
        }
        inputs = ("ffn", "hidden") if form.kind == "ffn" else (form.kind,)
        seen = [Seen(self._ranges.peaks[name][form.layer], self._ranges.squares[name][form.layer]) for name in inputs]
        return make_block(form, [self._weights(form.layer, name) for name in names[form.kind]], seen)

    def _weights(self, layer: int, name: str) -> Floats:
        """A matrix with its rows in packed order: rotary pairs are split."""
        spec, found = self.model.spec, self._source.floats(f"blk.{layer}.{name}.weight")
        if name in ("attn_q", "attn_k") and spec.interleaved_rope:
            heads = len(found) // spec.head_dim
            found = found[half_split_rows(spec.head_dim, spec.layers[layer].rope.dims, heads)]
        return found


_KINDS: dict[str, Kind] = {"qkv": "qkv", "out": "out", "ffn": "ffn"}


def _private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def rows_at(arena: Arena, offset: int, rows: int, row: int) -> Floats:
    """The rows of `row` bytes at an arena offset."""
    found: Floats = arena.numpy(BufferRef("activations", offset, rows * row, "<f4", (rows, row // 4)))
    return found
