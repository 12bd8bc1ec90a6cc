"""Compile steps for a CPU unit and a GPU unit that shares its memory together, in class `exact`.

Prompts are cut by tokens (HeteroInfer's activation-centric cut, arXiv 2501.14794, section 4.2): the GPU unit computes a
chunk's first tokens, the CPU unit the rest, maybe with an NPU unit; since tokens see only those before them, the CPU
unit waits once a layer, for the GPU unit's keys and values, and the GPU unit never.

Decode is cut by rows of weights (its weight-centric cut): of queries, keys and values, of attention's output matrix, of
Gate and Up by neuron clusters, of Down and of the head each unit computes some, into one output; attention and the
residual stream are the CPU unit's. Units meet at flags: the CPU unit's lanes wait for the GPU's `post` kernels, the
GPU's queue waits in `wait` kernels. A meeting costs as much as some rows, so there are programs in which only some
kinds of products are cut.

How much is whose is in the step's header, and for the GPU unit in over how many groups a kernel runs.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.formats import COLUMNS, ROWS
from coterie.kernels.library import kernel_name
from coterie.kernels.record import Opcode
from coterie.scheduler.buffers import Laid
from coterie.scheduler.lower import Lowering
from coterie.scheduler.lower_gpu import GpuLowering
from coterie.scheduler.placement import DECODE
from coterie.scheduler.program import NO_LAYER, Draft, Operand, Program, ProgramBuilder, Share
from coterie.storage.arena import BufferRef, Ledger, round_up
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


# --- decode, cut by rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meetings:
    """Flags of the GPU unit, one a layer: its rows of queries, keys and values, of attention's output matrix, its
    clusters, its rows of Down; `begun`: that it has begun, which takes it longer; `done`: its logits."""

    qkv: list[BufferRef]
    out: list[BufferRef]
    up: list[BufferRef]
    down: list[BufferRef]
    begun: BufferRef
    done: BufferRef

    @classmethod
    def of(cls, ledger: Ledger, layers: int) -> "Meetings":
        qkv, out, up, down = (flags(ledger, layers) for _ in range(4))
        return cls(qkv, out, up, down, *flags(ledger, 2))


class CpuRows(Lowering):
    """The CPU unit's rows of decode steps of one token, of which products of these `kinds` are cut. `embedded`,
    `attention_done`, `out`, `up`, `down`: its flags, behind the embedding, and one a layer, behind attention, the
    matrix that follows, Gate and Up, and Down."""

    kinds: Collection[str] = ()

    def __init__(self, laid: Laid, *, meetings: Meetings, taken: BufferRef) -> None:
        super().__init__(laid, mode="decode", rows=1, tile=1)
        self.meetings, self.taken, self._own_attended = meetings, taken, self.attended

    def whole_of(self, kinds: Collection[str], name: str) -> Program:
        """The program in which products of these kinds are cut."""
        self.kinds, self.given = kinds, {kind: DECODE[kind] for kind in kinds}
        shared = replace(self._own_attended, int_lane=0, float_lane=0)  # one for all, as the other unit reads it too
        self.attended = shared if "out" in kinds else self._own_attended
        self.attention_done, self.out, self.up, self.down = (list[BufferRef]() for _ in range(4))
        self._alone = True
        b = self._head(self._body(self._builder(name)))
        if "head" in kinds:
            b.meet(self.meetings.done.offset, r.GIVEN_HEAD)
            b.add(kernel_name("meet"), Opcode.POST, {})
        return b.build()

    def _embed(self, b: ProgramBuilder) -> None:
        super()._embed(b)
        self.embedded = _posted(b)

    def _project(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> list[int]:
        numbers = super()._project(b, i, layer, ready)
        if "qkv" not in self.kinds:
            return numbers
        waits = self._begin(b, numbers[-2:-1])
        b.meet(self.meetings.qkv[i].offset, r.GIVEN_QKV)
        return [b.add(kernel_name("meet"), Opcode.POST, {}, layer=i, waits=waits), numbers[-1]]

    def _begin(self, b: ProgramBuilder, waits: list[int]) -> list[int]:
        """Before a step's first meeting the other unit may not have begun: a wait that does not count as a
        product's. Returns what to wait for."""
        if not self._alone:
            return waits
        self._alone = False
        b.meet(self.meetings.begun.offset)
        return [b.add(kernel_name("meet"), Opcode.POST, {}, waits=waits)]

    def _row_wise(
        self, b: ProgramBuilder, kernel: str, opcode: Opcode, operands: dict[int, Operand], layer: int
    ) -> Draft | None:
        if opcode != Opcode.MERGE or "out" not in self.kinds:
            return super()._row_wise(b, kernel, opcode, operands, layer)
        b.add(kernel, opcode, operands, layer=layer)
        return None

    def _mix(self, b: ProgramBuilder, i: int, layer: Layer, ready: Draft | None) -> None:
        self.attention_done.append(_posted(b))
        super()._mix(b, i, layer, ready)
        self.out.append(_posted(b))
        if "out" in self.kinds:
            self._begin(b, [len(b.drafts) - 1])
            b.meet(self.meetings.out[i].offset, r.GIVEN_OUT)

    def _ffn(self, b: ProgramBuilder, i: int, ffn: FFN, ready: Draft | None) -> None:
        (span,) = ffn.spans  # all weights are in memory
        layout = ffn.layout
        names = layout.gate.name, layout.up.name, self.spec.activation, self.tile
        up, down = (self.given.get(kind, 0) for kind in ("up", "down"))
        b.add(kernel_name("ffn_up", *names), Opcode.FFN_UP, self._up(ffn, span), layer=i, prepare=ready, part=up)
        self.up.append(_posted(b))
        if up:
            self._begin(b, [len(b.drafts) - 1])
            self._take_hidden(b, i, ffn)
        kernel = kernel_name("ffn_down", layout.down.name, self.tile)
        b.add(kernel, Opcode.FFN_DOWN, self._down(ffn, span), layer=i, part=down)
        self.down.append(_posted(b))
        if down:
            self._begin(b, [len(b.drafts) - 1])
            b.meet(self.meetings.down[i].offset, r.GIVEN_DOWN)

    def _take_hidden(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        layout = ffn.layout
        hidden, _ = self.hidden.of(layout.down)
        taken: dict[int, Operand] = {
            o.HIDDEN_FROM: self.taken,
            o.HIDDEN_OUT: hidden,
            o.HIDDEN_GIVEN: r.GIVEN_UP,
            o.HIDDEN_CLUSTERS: layout.clusters,
            o.HIDDEN_BLOCKS: layout.neurons // COLUMNS,
            o.HIDDEN_FLOAT: int(layout.down.is_float),
        }
        b.meet(self.meetings.up[i].offset, r.GIVEN_UP)
        b.add(kernel_name("take_hidden"), Opcode.POST, taken, layer=i)


def _posted(b: ProgramBuilder) -> BufferRef:
    """The flag of the last instruction."""
    return BufferRef("flags", b.drafts[-1].flag, r.LINE, "<i8", (r.LINE // 8,))


class GpuRows(GpuLowering):
    """The GPU unit's rows of the same steps. It reads and writes the CPU unit's buffers where they meet, and the
    residual stream, which the CPU unit changes only behind a meeting."""

    def __init__(self, laid: Laid, unit: UnitBuffers, *, meetings: Meetings) -> None:
        super().__init__(laid, unit, rows=1)
        self.meetings, self.shares = meetings, dict[int, Share]()

    def beside(self, name: str, cpu: CpuRows) -> Program:
        """The program that runs beside one of `cpu`, the last that it compiled."""
        self.cpu, self.qkv, self.shares = cpu, cpu.qkv, {}
        b = self._body(self._builder(name))
        if "head" in cpu.kinds:
            self._wait(b, NO_LAYER, cpu.down[-1])
            self.residual, self.y = cpu.residuals[-1], cpu.z
            self._head(b)
            self._post(b, NO_LAYER, self.meetings.done)
        program = self._end(b)
        program.shares.update(self.shares)
        return program

    def _body(self, b: ProgramBuilder) -> ProgramBuilder:
        cpu, kinds = self.cpu, self.cpu.kinds
        self._post(b, NO_LAYER, self.meetings.begun)
        for i, layer in enumerate(self.weights.layers):
            assert isinstance(layer.ffn, FFN)
            if "qkv" in kinds:
                self._project(b, i, layer)
            if "out" in kinds:
                self._mix(b, i, layer)
            if "up" in kinds:
                self._wait(b, i, cpu.out[i])
                self.residual, self.y = cpu.residuals[2 * i + 1], cpu.y
                readers = {layer.ffn.layout.gate.is_float, layer.ffn.layout.up.is_float}
                post = layer.norms.get("post_attention_norm")
                self._norm(b, i, layer.norms["ffn_norm"], readers, add=True, post=post)
                self._ffn_up(b, i, layer.ffn)
                self.shares[len(b.drafts) - 1] = self._share_of_up(layer.ffn)
                self._post(b, i, self.meetings.up[i])
            if "down" in kinds:
                self._take_hidden(b, i, layer.ffn)
                self.y = cpu.z
                self._ffn_down(b, i, layer.ffn)
                self.shares[len(b.drafts) - 1] = Share(r.GIVEN_DOWN, 0, layer.ffn.layout.down_groups, 1)
                self._post(b, i, self.meetings.down[i])
        return b

    def _project(self, b: ProgramBuilder, i: int, layer: Layer) -> None:
        """Our rows of queries, keys and values."""
        cpu, layers = self.cpu, self.weights.layers
        self._wait(b, i, cpu.down[i - 1] if i else cpu.embedded)
        self.residual, self.y = cpu.residuals[2 * i], cpu.z
        post = layers[i - 1].norms.get("post_ffw_norm") if i else None
        readers = {matrix.format.is_float for matrix in layer.projections}
        self._norm(b, i, layer.norms["attn_norm"], readers, add=i > 0, post=post)
        before, groups = 0, sum(matrix.rows for matrix in layer.projections) // ROWS
        for matrix in layer.projections:
            x = self.normed if matrix.format.is_float else self.rounded
            self._matmul(b, i, matrix, x, self.qkv, before * ROWS)
            self.shares[len(b.drafts) - 1] = Share(r.GIVEN_QKV, before, groups, 1)
            before += matrix.rows // ROWS
        self._post(b, i, self.meetings.qkv[i])

    def _mix(self, b: ProgramBuilder, i: int, layer: Layer) -> None:
        """What attention, which is the CPU unit's, leaves, and our rows of the matrix behind it."""
        matrix, blocks = layer.output, round_up(self.spec.n_heads * self.spec.head_dim, COLUMNS) // COLUMNS
        floats = matrix.format.is_float
        x = self.attended if floats else self.attended_rounded
        source, _ = self.cpu.attended.of(matrix.format)
        self._wait(b, i, self.cpu.attention_done[i])
        self._add(b, "take", Opcode.POST, i, blocks=blocks, source=source, out=x, rounded=int(not floats))
        self._matmul(b, i, matrix, x, self.cpu.y, 0)
        self.shares[len(b.drafts) - 1] = Share(r.GIVEN_OUT, 0, matrix.run.items, 1)
        self._post(b, i, self.meetings.out[i])

    def _share_of_up(self, ffn: FFN, rest: bool = False) -> Share:
        return Share(r.GIVEN_UP, 0, ffn.layout.clusters, ffn.layout.neurons // COLUMNS, rest)

    def _take_hidden(self, b: ProgramBuilder, i: int, ffn: FFN) -> None:
        """The CPU unit's hidden activations, beside ours."""
        layout = ffn.layout
        self._wait(b, i, self.cpu.up[i])
        source, _ = self.cpu.hidden.of(layout.down)
        self._add(
            b, "take", Opcode.POST, i, blocks=layout.clusters * (layout.neurons // COLUMNS), source=source,
            out=self.hidden, rounded=int(not layout.down.is_float),
        )  # fmt: skip
        self.shares[len(b.drafts) - 1] = self._share_of_up(ffn, rest=True)

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
