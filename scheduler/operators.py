"""What the records of a compiled program do, in the words of the device model: rows, columns, bytes, operations.

So a simulated step has the instructions of the real one, with the same cuts, waits and tape positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from coterie.kernels import operands as o
from coterie.kernels import record as r
from coterie.kernels.formats import FORMATS, ROWS
from coterie.models.spec import ModelSpec
from coterie.scheduler.device_model import Instruction
from coterie.scheduler.layout import ModelLayout
from coterie.scheduler.program import NO_LAYER, Program
from coterie.storage.weights import FFN, PINNED, Span, Weights

NORM_FLOPS = 6  # of a value in norms, residual additions, rotary embeddings


@dataclass(frozen=True)
class Operator:
    """A record of a program: `instruction` without a unit; `waits`: numbers of operators before it; `first`, `end`:
    tape positions it reads (PINNED: none); `frees`: as of the record; `prepares`: what every CPU lane does for itself
    before it, and another unit as a kernel of its own."""

    instruction: Instruction
    waits: tuple[int, ...]
    first: int
    end: int
    frees: int
    prepares: tuple[Instruction, ...]


@dataclass(frozen=True)
class Rows:
    """The rows of a step: how many, the first one's position, and how many want logits."""

    tokens: int
    position: int
    outputs: int = 1

    def seen(self, window: int) -> float:
        """Positions that a row attends to, on average."""
        first, last = self.position + 1, self.position + self.tokens
        mean = (first + last) / 2
        if not window or last <= window:
            return mean
        return float(np.minimum(np.arange(first, last + 1), window).mean())


class Reader:
    """Reads programs of a model that was laid out."""

    def __init__(self, spec: ModelSpec, layout: ModelLayout) -> None:
        self.spec, self.layout = spec, layout
        self._spans: dict[int, tuple[FFN, Span]] = {}
        self._known: dict[tuple[str, int, int], list[Operator]] = {}
        self._attends: dict[str, list[int]] = {}
        for weights in (layout.weights, layout.whole):
            for layer in weights.layers:
                if isinstance(layer.ffn, FFN):
                    self._spans |= {span.list.offset: (layer.ffn, span) for span in layer.ffn.spans}
        self._kinds: dict[int, Callable[[list[int], str, Rows], Instruction]] = {
            r.Opcode.EMBED: self._embed,
            r.Opcode.NORM: self._norm,
            r.Opcode.MATMUL: self._matmul,
            r.Opcode.ROPE: self._rope,
            r.Opcode.ATTEND: self._attend,
            r.Opcode.MERGE: self._merge,
            r.Opcode.FFN_UP: self._up,
            r.Opcode.FFN_DOWN: self._down,
        }

    def operators(self, program: Program, rows: Rows) -> list[Operator]:
        """A program's records for these rows. Of steps that differ in their position only, attention is all that
        differs."""
        key = program.name, rows.tokens, rows.outputs
        if key not in self._known:
            self._known[key] = self._read(program, rows)
        found = list(self._known[key])
        for i in self._attends[program.name]:
            words = program.words[i].tolist()
            instruction = self._instruction(words, program.kernels[i], rows)
            found[i] = replace(found[i], instruction=instruction)
        return found

    def _read(self, program: Program, rows: Rows) -> list[Operator]:
        words = program.words.tolist()
        numbers = {row[r.SET]: i for i, row in enumerate(words[: program.length])}
        attends = [i for i, row in enumerate(words[: program.length]) if row[r.OPCODE] & 0xFFFF == r.Opcode.ATTEND]
        self._attends[program.name] = attends
        prepared, found = set[int](), list[Operator]()
        weights = self.layout.whole if program.name == "prefill" else self.layout.weights
        for i, row in enumerate(words[: program.length]):
            chain, at = list[int](), row[r.PREPARE]
            while at and at not in prepared:
                prepared.add(at)
                chain.insert(0, at)
                at = words[at][r.PREPARE]
            prepares = tuple(self._instruction(words[at], program.kernels[at], rows) for at in chain)
            waits = tuple(numbers[flag] for flag in row[r.WAIT : r.WAIT + r.WAITS] if flag)
            first, end = self._positions(row, weights)
            instruction = self._instruction(row, program.kernels[i], rows)
            found.append(Operator(instruction, waits, first, end, row[r.FREES], prepares))
        return found

    def _positions(self, row: list[int], weights: Weights) -> tuple[int, int]:
        """Tape positions that a record waits for by itself."""
        opcode = row[r.OPCODE] & 0xFFFF
        if opcode == r.Opcode.MATMUL and row[o.MATMUL_ARRIVAL]:
            first = row[o.MATMUL_ARRIVAL] - 1
            return first, first + -(-row[o.MATMUL_GROUPS] // row[o.MATMUL_PER])
        if opcode == r.Opcode.FFN_UP:
            _, span = self._spans[row[o.UP_LIST]]
            return span.position, span.end
        return PINNED, PINNED

    def _instruction(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        layer = row[r.OPCODE] >> 16 & 0xFFFF
        made = self._kinds[row[r.OPCODE] & 0xFFFF](row, kernel, rows)
        return made if layer == NO_LAYER else replace(made, layer=layer)

    def _embed(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        values = rows.tokens * self.spec.dim
        return Instruction("embed", "", tokens=rows.tokens, kernel=kernel, nbytes=4.0 * values, flops=values)

    def _values(self, kernel: str, rows: Rows, width: int) -> Instruction:
        values = rows.tokens * width
        return Instruction(
            "norm", "", columns=width, tokens=rows.tokens, kernel=kernel, nbytes=8.0 * values, flops=NORM_FLOPS * values
        )

    def _norm(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        if row[o.NORM_SELECT]:
            rows = Rows(rows.outputs, rows.position)
        return self._values(kernel, rows, self.spec.dim)

    def _rope(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        return self._values(kernel, rows, self.spec.qkv_rows)

    def _merge(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        return self._values(kernel, rows, self.spec.n_heads * self.spec.head_dim)

    def _attend(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        spec, seen = self.spec, rows.seen(row[o.A_WINDOW])
        values = 2 * spec.n_kv_heads * spec.head_dim * (rows.position + rows.tokens)
        flops = 4.0 * spec.n_heads * spec.head_dim * seen * rows.tokens
        return Instruction("attention", "", tokens=rows.tokens, kernel=kernel, nbytes=2.0 * values, flops=flops)

    def _matmul(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        name = kernel.split(":")[1]
        groups = row[o.MATMUL_GROUPS]
        tokens = rows.outputs * row[o.MATMUL_PLANES] if row[o.MATMUL_OUTPUTS] else rows.tokens
        return Instruction(
            "matmul",
            "",
            rows=groups * ROWS,
            columns=row[o.MATMUL_BLOCKS] * FORMATS[name].columns,
            tokens=tokens,
            format=name,
            nbytes=float(groups * row[o.MATMUL_GROUP]),
            kernel=kernel,
        )

    def _up(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        ffn, span = self._spans[row[o.UP_LIST]]
        layout = ffn.layout
        neurons = span.count * layout.neurons
        return Instruction(
            "ffn",
            "",
            rows=2 * neurons,
            columns=row[o.UP_BLOCKS] * layout.gate.columns,
            tokens=rows.tokens,
            format=layout.gate.name,
            nbytes=float(span.count * layout.down_offset),
            kernel=kernel,
        )

    def _down(self, row: list[int], kernel: str, rows: Rows) -> Instruction:
        ffn, span = self._spans[row[o.DOWN_LIST]]
        layout = ffn.layout
        return Instruction(
            "ffn",
            "",
            rows=layout.down_groups * ROWS,
            columns=span.count * layout.neurons,
            tokens=rows.tokens,
            format=layout.down.name,
            nbytes=float(span.count * (layout.bundle - layout.down_offset)),
            kernel=kernel,
            inner=layout.clusters * layout.neurons,
        )
