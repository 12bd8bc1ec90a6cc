"""Compile steps for a CPU unit and a GPU unit that shares its memory together, in class `exact`.

Prompts are cut by tokens (HeteroInfer's activation-centric cut, arXiv 2501.14794, section 4.2): the GPU unit computes a
chunk's first tokens, the CPU unit the rest; since tokens see only those before them, the CPU unit waits once a layer,
for the GPU unit's keys and values, and the GPU unit never.

Decode is cut by rows of weights (its weight-centric cut): of queries, keys and values, of Gate and Up by neuron
clusters, of Down and of the head each unit computes some, into one output. Both add up the residual stream for
themselves; attention and its output matrix are the CPU unit's. Units meet at flags: the CPU unit's lanes wait for the
GPU's `post` kernels, the GPU's queue waits in `wait` kernels.

How much is whose is in the step's header, and for the GPU unit in over how many groups a kernel runs.
"""

from dataclasses import dataclass
from typing import ClassVar

from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.formats import COLUMNS, ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.scheduler.buffers import Laid
from coterie.scheduler.lower import Lowering, streaming
from coterie.scheduler.lower_gpu import GpuLowering
from coterie.scheduler.program import NO_LAYER, Draft, Operand, Program, ProgramBuilder, Share
from coterie.storage.arena import BufferRef, Ledger
from coterie.storage.unit import UnitBuffers
from coterie.storage.weights import FFN, Layer


def flags(ledger: Ledger, count: int) -> list[BufferRef]:
    """Flags that a GPU unit's kernels post."""
    lines = [ledger.allocate("flags", r.LINE) for _ in range(count)]
    return [BufferRef("flags", line.offset, r.LINE, "<i8", (r.LINE // 8,)) for line in lines]


# --- prompts, cut by tokens -------------------------------------------------------------------------------------------


class FirstTokens(GpuLowering):
    """The GPU unit's part of a chunk: its first tokens. Posts a layer's flag of `written` once keys and values are."""

    def __init__(self, laid: Laid, unit: UnitBuffers, *, rows: int, written: list[BufferRef]) -> None:
        super().__init__(laid, unit, rows=rows)
        self.written = written

    def _keys_written(self, b: ProgramBuilder, i: int) -> None:
        self._add(b, "post", Opcode.POST, i, flag=self.written[i])


class OtherTokens(Lowering):
    """The CPU unit's part: the other tokens, which also see the first ones."""

    def __init__(self, laid: Laid, *, rows: int, tile: int, written: list[BufferRef]) -> None:
        super().__init__(laid, mode="prefill", rows=rows, tile=tile)
        self.written = written

    def _before_attention(self, b: ProgramBuilder, i: int) -> None:
        b.meet(self.written[i].offset)


# --- decode, cut by rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meetings:
    """Flags of the GPU unit, one a layer: its rows of queries, keys and values, its clusters, its rows of Down; `done`:
    its logits."""

    qkv: list[BufferRef]
    up: list[BufferRef]
    down: list[BufferRef]
    done: BufferRef

    @classmethod
    def of(cls, ledger: Ledger, layers: int) -> "Meetings":
        qkv, up, down = (flags(ledger, layers) for _ in range(3))
        return cls(qkv, up, down, flags(ledger, 1)[0])


class CpuRows(Lowering):
    """The CPU unit's rows of a decode step of one token; `out`, `up`, `down`: its flags, one a layer, behind
    attention's output, behind its clusters, and behind its rows of Down."""

    given: ClassVar = {"qkv": r.GIVEN_QKV, "up": r.GIVEN_UP, "down": r.GIVEN_DOWN, "head": r.GIVEN_HEAD}

    def __init__(self, laid: Laid, *, meetings: Meetings, taken: BufferRef) -> None:
        super().__init__(laid, mode="decode", rows=1, tile=1)
        self.meetings, self.taken = meetings, taken
        self.out, self.up, self.down = (list[BufferRef]() for _ in range(3))

    def whole(self, name: str) -> Program:
        b = self._head(self._body(self._builder(name)))
        b.meet(self.meetings.done.offset)
        b.add(kernel_name("meet"), Opcode.POST, {})
        return b.build()

    def _project(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> list[int]:
        numbers = super()._project(b, i, layer, ready)
        b.meet(self.meetings.qkv[i].offset)
        met = b.add(kernel_name("meet"), Opcode.POST, {}, layer=i, waits=numbers[-2:-1])
        return [met, numbers[-1]]

    def _mix(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> None:
        super()._mix(b, i, layer, ready)
        self.out.append(_posted(b))

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN, ready: Draft | None) -> None:
        (span,) = ffn.spans  # all weights are in memory
        layout = ffn.layout
        names = layout.gate.name, layout.up.name, self.spec.activation, self.tile
        ordered = streaming(span.position, span.end)["ordered"]
        b.add(
            kernel_name("ffn_up", *names), Opcode.FFN_UP, self._up(ffn, span), layer=i, prepare=ready, ordered=ordered
        )
        self.up.append(_posted(b))
        hidden, _ = self.hidden.of(layout.down)
        taken: dict[int, Operand] = {
            o.HIDDEN_FROM: self.taken,
            o.HIDDEN_OUT: hidden,
            o.HIDDEN_GIVEN: r.GIVEN_UP,
            o.HIDDEN_CLUSTERS: layout.clusters,
            o.HIDDEN_BLOCKS: layout.neurons // COLUMNS,
            o.HIDDEN_FLOAT: int(layout.down.is_float),
        }
        b.meet(self.meetings.up[i].offset)
        b.add(kernel_name("take_hidden"), Opcode.POST, taken, layer=i)
        b.add(kernel_name("ffn_down", layout.down.name, self.tile), Opcode.FFN_DOWN, self._down(ffn, span), layer=i)
        self.down.append(_posted(b))
        b.meet(self.meetings.down[i].offset)


def _posted(b: ProgramBuilder) -> BufferRef:
    """The flag of the last instruction."""
    return BufferRef("flags", b.drafts[-1].flag, r.LINE, "<i8", (r.LINE // 8,))


class GpuRows(GpuLowering):
    """The GPU unit's rows of the same step, which reads and writes the CPU unit's buffers where they meet."""

    def __init__(self, laid: Laid, unit: UnitBuffers, *, meetings: Meetings) -> None:
        super().__init__(laid, unit, rows=1)
        self.meetings, self.shares = meetings, dict[int, Share]()

    def beside(self, name: str, cpu: CpuRows) -> Program:
        """The program that runs beside one of `cpu`, the last that it compiled."""
        self.cpu, self.qkv = cpu, cpu.qkv
        b = self._head(self._body(self._builder(name)))
        self._post(b, NO_LAYER, self.meetings.done)
        program = self._end(b)
        program.shares.update(self.shares)
        return program

    def _body(self, b: ProgramBuilder) -> ProgramBuilder:
        cpu, meetings, layers = self.cpu, self.meetings, self.weights.layers
        self._embed(b)
        for i, layer in enumerate(layers):
            if i:
                self._wait(b, i, cpu.down[i - 1])
            self.y = cpu.z
            post = layers[i - 1].norms.get("post_ffw_norm") if i else None
            readers = {matrix.format.is_float for matrix in layer.projections}
            self._norm(b, i, layer.norms["attn_norm"], readers, add=i > 0, post=post)
            self._project(b, i, layer)
            self._post(b, i, meetings.qkv[i])
            self._wait(b, i, cpu.out[i])
            self.y = cpu.y
            ffn = layer.ffn
            assert isinstance(ffn, FFN)
            readers = {ffn.layout.gate.is_float, ffn.layout.up.is_float}
            self._norm(b, i, layer.norms["ffn_norm"], readers, add=True, post=layer.norms.get("post_attention_norm"))
            self.y = cpu.z
            self._ffn(b, i, ffn)
            self._post(b, i, meetings.down[i])
        self._wait(b, NO_LAYER, cpu.down[-1])
        return b

    def _project(self, b: ProgramBuilder, i: int, layer: Layer) -> None:
        before, groups = 0, sum(matrix.rows for matrix in layer.projections) // ROWS
        for matrix in layer.projections:
            x = self.normed if matrix.format.is_float else self.rounded
            self._matmul(b, i, matrix, x, self.qkv, before * ROWS)
            self.shares[len(b.drafts) - 1] = Share(r.GIVEN_QKV, before, groups, 1)
            before += matrix.rows // ROWS

    def _hidden_ready(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        """Between Up and Down: the CPU unit gets our clusters, and we take its."""
        layout, blocks = ffn.layout, ffn.layout.neurons // COLUMNS
        self.shares[len(b.drafts) - 1] = Share(r.GIVEN_UP, 0, layout.clusters, blocks)
        self._post(b, i, self.meetings.up[i])
        self._wait(b, i, self.cpu.up[i])
        source, _ = self.cpu.hidden.of(layout.down)
        self._add(
            b, "take", Opcode.POST, i,
            blocks=layout.clusters * blocks, source=source, out=self.hidden, rounded=int(not layout.down.is_float),
        )  # fmt: skip
        self.shares[len(b.drafts) - 1] = Share(r.GIVEN_UP, 0, layout.clusters, blocks, rest=True)

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        super()._ffn(b, i, ffn)
        self.shares[len(b.drafts) - 1] = Share(r.GIVEN_DOWN, 0, ffn.layout.down_groups, 1)

    def _head(self, b: ProgramBuilder) -> ProgramBuilder:
        super()._head(b)
        assert self.weights.output is not None
        self.shares[len(b.drafts) - 1] = Share(r.GIVEN_HEAD, 0, self.weights.output.run.items, 1)
        return b

    def _post(self, b: ProgramBuilder, i: int, flag: BufferRef) -> None:
        self._add(b, "post", Opcode.POST, i, flag=flag)

    def _wait(self, b: ProgramBuilder, i: int, flag: BufferRef) -> None:
        off = self.unit.control
        abort = BufferRef(off.region, off.offset + r.LINE, r.LINE, "<i8", (r.LINE // 8,))
        self._add(b, "wait", Opcode.POST, i, flag=flag, abort_word=abort)
