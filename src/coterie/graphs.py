"""The graphs of a model on an NPU: made of its weights, built or read from the disk, bound to the arena."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import CpuUnit
from coterie.actors.lanes import only_on
from coterie.actors.npu import NpuUnit
from coterie.actors.npu_cache import GraphCache
from coterie.actors.npu_graphs import WINDOW, Graph, choose_blocks, open_runtime
from coterie.actors.npu_product import BoundGraph, Product
from coterie.errors import PlanError
from coterie.kernels import operands as o
from coterie.kernels.record import OPCODE, OPERANDS, WORDS
from coterie.models.part import model_identity
from coterie.models.ranges import Ranges
from coterie.scheduler.balance import Given
from coterie.scheduler.layout import ModelLayout
from coterie.scheduler.lower_npu import cut_of, pieces
from coterie.scheduler.placement import Placement
from coterie.scheduler.program import NO_LAYER, Program
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.npu_block import KINDS, Block, Form, Kind, Seen, make_block
from coterie.storage.npu_quantise import FLOAT_SCHEMES, SCHEMES, Scheme
from coterie.storage.npu_ranges import model_ranges
from coterie.storage.packer import half_split_rows
from coterie.storage.unit import UnitBuffers

if TYPE_CHECKING:
    from coterie.models.load import Model

Floats = npt.NDArray[np.float32]
MATRICES: dict[Kind, tuple[str, ...]] = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "ffn": ("ffn_gate", "ffn_up", "ffn_down"),
    "head": ("output",),
}


class Graphs:
    """The NPU unit of a model, and where its graphs come from. Raises UnitError where there is no runtime, UsageError
    for a packed model: graphs are made of what that was made of."""

    def __init__(
        self,
        cpu: CpuUnit,
        buffers: UnitBuffers,
        model: "Model",
        progress: Callable[..., None],
        placement: Placement,
    ) -> None:
        self.arena, self.model, self._progress = cpu.arena, model, progress
        self._cuts = placement.cuts
        self._source, self._identity = model.source, model_identity(model.source).encode()
        cores = placement.own_cores()
        self.runtime = open_runtime(threads=len(cores) if cores else None)
        self.cache = GraphCache(self.runtime)
        self.unit = NpuUnit(cpu.arena, buffers, cpu.abort_address, cores)
        self._cores = cores
        self._ranges: Ranges | None = None
        self._schemes: dict[Scheme, None] = {}
        self.nbytes = 0  # that the process grew by when graphs were loaded, at least the graphs' own

    def load(self, layout: ModelLayout) -> None:
        """Have every graph, and give it its buffers. Raises PlanError where an NPU cannot address or compute them."""
        records = {name: [_computed(p, i) for i in range(p.length)] for name, p in layout.npu.items()}
        firsts = {record: (p, i) for name, p in layout.npu.items() for i, record in enumerate(records[name])}
        forms = {record: self._forms(program, i) for record, (program, i) in firsts.items()}
        self._schemes = {form.scheme: None for each in forms.values() for form in each if form is not None}
        if lacking := [scheme for scheme in self._schemes if scheme not in self.runtime.schemes]:
            raise PlanError(
                f"{self.runtime.name} has no graphs in {lacking[0]} here; leave decode out of the plan's cuts"
            )
        if not self.runtime.stand_in:
            sizes = [(form, self._nbytes(form)) for each in forms.values() for form in each if form is not None]
            if len(choose_blocks(sizes)) < len(sizes):
                raise PlanError(f"the graphs are more than the {WINDOW >> 30} GiB that an NPU addresses; drop npu")
        before = _private_bytes()
        products = dict[tuple[str, bytes], Product]()
        with only_on(self._cores):
            for done, (record, (program, i)) in enumerate(firsts.items()):
                self._progress("graphs for the NPU", done, len(firsts))
                products[record] = self._product(program, i, forms[record])
        for name, program in layout.npu.items():
            kinds = [cut_of(kind, rows) for kind, rows, _ in map(_named, program.kernels)]
            self.unit.load(program, kinds, [products[record] for record in records[name]])
        self._ranges = None
        self.nbytes = max(_private_bytes() - before, self.cache.nbytes)  # others may have given memory back meanwhile
        self.cache.drop_pages()

    def describe(self) -> dict[str, Any]:
        slept, polled = self.unit.waits()
        return {
            "unit": "npu",
            "runtime": self.runtime.describe(),
            "real": not self.runtime.stand_in,
            "scheme": ",".join(self._schemes),
            "builds": self.cache.builds,
            "loads": self.cache.loads,
            "weight_copies": self.nbytes,
            "slept_s": slept,
            "polled_s": polled,
        }

    def close(self) -> None:
        self.unit.close()

    def _forms(self, program: Program, i: int) -> list[Form | None]:
        """What record `i` of a program computes, piece by piece; None: nothing."""
        kind, rows, scheme = _named(program.kernels[i])
        words, layer = program.words[i], int(program.words[i][OPCODE]) >> 16 & NO_LAYER
        width, out = int(words[o.GRAPH_X_ROW]) // 4, int(words[o.GRAPH_Y_ROW]) // 4
        activation = self.model.spec.activation if kind == "ffn" else None
        cut = self._cuts[cut_of(kind, rows)]
        if cut == Given.whole():
            return [Form(kind, layer, rows, width, out, scheme, activation)]

        def form(first: int, last: int) -> Form | None:
            if first == last:
                return None
            made = out if kind == "ffn" else last - first
            return Form(kind, layer, rows, width, made, scheme, activation, part=(first, last))

        return [form(first, last) for first, last in pieces(words, cut)]

    def _nbytes(self, form: Form) -> int:
        """Bytes of a graph's weights, without scales."""
        bits = 4 if form.scheme == "w4a16" else 8
        if form.kind != "ffn":
            return form.width_in * form.width_out * bits // 8
        first, last = form.part or (0, self.model.spec.ffn_dim)
        return 3 * form.width_in * (last - first) * bits // 8

    def _product(self, program: Program, i: int, forms: list[Form | None]) -> Product:
        """The graphs of a record, bound to where they read and write."""
        words, (kind, n, _) = program.words[i], _named(program.kernels[i])
        x, y = (rows_at(self.arena, int(words[at]), n, int(words[at + 1])) for at in (o.GRAPH_X, o.GRAPH_Y))
        graphs, outputs, columns = list[BoundGraph | None](), list[Floats](), list[int]()
        for form in forms:
            out = y
            if form is not None and form.part is not None and (kind != "ffn" or graphs):
                out = rows_at(self.arena, int(words[o.GRAPH_PIECE]), n, 4 * form.width_out)
            graphs.append(None if form is None else self._bound(form, x, out))
            outputs.append(out)
            columns.append(form.part[0] if form is not None and form.part else 0)
        return Product(graphs, outputs, y, None if kind == "ffn" else columns)

    def _bound(self, form: Form, x: Floats, y: Floats) -> Graph:
        started, builds = self.unit.cycles(), self.cache.builds
        graph = self.cache.open(form, self._identity, lambda: self._block(form))
        if self.cache.builds != builds:
            self.unit.built(started)
        graph.bind(x, y)
        graph.run()  # what runtimes leave for the first time is done now, on whatever the buffers hold
        return graph

    def _block(self, form: Form) -> Block:
        """A block of the model's own weights."""
        seen = [None, None] if form.scheme in FLOAT_SCHEMES else self._seen(form)
        weights = [self._weights(form.layer, name) for name in MATRICES[form.kind]]
        if form.part is None:
            return make_block(form, weights, seen)
        rows = slice(*form.part)
        if form.kind != "ffn":
            return make_block(form, [np.concatenate(weights)[rows]], seen)
        gate, up, down = weights
        inner = seen[1] and Seen(seen[1].peaks[rows], seen[1].squares[rows])
        return make_block(form, [gate[rows], up[rows], np.ascontiguousarray(down[:, rows])], [seen[0], inner])

    def _seen(self, form: Form) -> list[Seen | None]:
        """The ranges of a block's inputs."""
        if self._ranges is None:
            self._ranges = model_ranges(self.model, say=self._progress)
        inputs = ("ffn", "hidden") if form.kind == "ffn" else (form.kind,)
        return [Seen(self._ranges.peaks[name][form.layer], self._ranges.squares[name][form.layer]) for name in inputs]

    def _weights(self, layer: int, name: str) -> Floats:
        """A matrix with its rows in packed order: rotary pairs are split."""
        if name == "output":
            tied = f"{name}.weight" not in self._source.tensors
            return self._source.floats("token_embd.weight" if tied else f"{name}.weight")
        spec, found = self.model.spec, self._source.floats(f"blk.{layer}.{name}.weight")
        if name in ("attn_q", "attn_k") and spec.interleaved_rope:
            heads = len(found) // spec.head_dim
            found = found[half_split_rows(spec.head_dim, spec.layers[layer].rope.dims, heads)]
        return found


def _computed(program: Program, i: int) -> tuple[str, bytes]:
    """What a record computes, from what into what, whichever flags it waits for."""
    return program.kernels[i], program.words[i, [OPCODE, *range(OPERANDS, WORDS)]].tobytes()


def _named(kernel: str) -> tuple[Kind, int, Scheme]:
    """What the name of a graph's kernel says (lower_npu.py): kind, rows, scheme."""
    _, kind, rows, scheme = kernel.split(":")
    return next(known for known in KINDS if known == kind), int(rows), next(s for s in SCHEMES if s == scheme)


def _private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def rows_at(arena: Arena, offset: int, rows: int, row: int) -> Floats:
    """The rows of `row` bytes at an arena offset."""
    found: Floats = arena.numpy(BufferRef("activations", offset, rows * row, "<f4", (rows, row // 4)))
    return found
