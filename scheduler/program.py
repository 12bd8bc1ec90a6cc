"""Programs: what the scheduler compiles and a unit runs (design section 6, docs/instruction-record.md).

A program names kernels and arena offsets; a unit that loads it puts in its own addresses. So the same program
serves every process that maps the arena.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coterie.kernels import record as r
from coterie.storage.arena import BufferRef, Ledger

Operand = int | float | BufferRef | None
NO_LAYER = 0xFFFF


class Share(NamedTuple):
    """A kernel of a GPU unit that computes a part of a product: the header word that says how much of it is the GPU
    unit's, of `whole` row groups or clusters those `before` the kernel's own, and work-groups for each; `rest`: the
    kernel is for what is not the GPU unit's."""

    word: int
    before: int
    whole: int
    units: int
    rest: bool = False

    def launched(self, words: Mapping[int, int], most: int) -> tuple[int, int]:
        """From which of its `most` work-groups on, and over how many of them, it runs, the header saying that."""
        given = self.whole * words[self.word] // r.WHOLE - self.before
        own = min(max(given * self.units, 0), most)
        return (own, most - own) if self.rest else (0, own)


@dataclass
class Program:
    """A table of instruction records, int64[n, WORDS].

    Words marked in `relocate` are offsets into the arena. `kernels[i]` is the kernel of record i.
    `length` records are the program; those behind it are preparations, reached through PREPARE words.
    """

    name: str
    words: npt.NDArray[np.int64]
    relocate: npt.NDArray[np.bool_]
    kernels: list[str]
    length: int
    done: int  # arena offset of the flag that the last instruction sets
    outputs: bool  # whether it computes logits, and so wants rows to do it for
    shares: dict[int, Share] = field(default_factory=dict)  # records of a GPU unit that compute a part

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded table, rounded up to lines."""
        return -(-self.words.nbytes // r.LINE) * r.LINE

    def bound(self, base: int, address: int, kernels: list[str]) -> npt.NDArray[np.int64]:
        """The records for an arena mapped at `base` and a table at `address`, with the numbers of their kernels in
        `kernels`: whose lanes run them puts in where those lie in its process."""
        words = self.words + np.where(self.relocate, base, 0)
        words[:, r.KERNEL] = [kernels.index(name) for name in self.kernels]
        prepared = words[:, r.PREPARE] != 0
        words[prepared, r.PREPARE] = address + self.words[prepared, r.PREPARE] * r.RECORD_BYTES
        return words


@dataclass
class Draft:
    """An instruction while its program is being built; flag, claim and done are arena offsets."""

    kernel: str
    opcode: r.Opcode
    layer: int
    operands: dict[int, Operand]
    waits: list[int]
    shared: bool
    frees: int = 0
    ordered: bool = False
    flag: int = 0
    claim: int = 0
    done: int = 0
    foreign: tuple[int, ...] = ()
    part: int = 0
    rest: int = 0
    prepare: "Draft | None" = None


@dataclass
class ProgramBuilder:
    """Collects instructions; each waits for the one before it, unless told what to wait for."""

    name: str
    arena: Ledger
    lanes: int
    error: BufferRef
    outputs: bool = False
    drafts: list[Draft] = field(default_factory=list)
    _met: tuple[int, ...] = ()
    _rest: int = 0

    def meet(self, flag: int, rest: int = 0) -> None:
        """Have the next instruction wait for a flag of another unit's program, at that arena offset; `rest`: the header
        word of the product whose other part that is."""
        self._met, self._rest = (flag,), rest

    def add(
        self,
        kernel: str,
        opcode: r.Opcode,
        operands: dict[int, Operand],
        *,
        layer: int = NO_LAYER,
        waits: "list[int] | None" = None,
        prepare: Draft | None = None,
        frees: int = 0,
        ordered: bool = False,
        part: int = 0,
    ) -> int:
        """Append an instruction; returns its number, for others to wait for. `frees`: the tape position below which
        nothing is needed once it is finished; `ordered`: its pieces are taken strictly in order; `part`: the header
        word of the product that units share, of which it computes a part."""
        if waits is None:
            waits = [len(self.drafts) - 1] if self.drafts else []
        foreign, self._met, rest, self._rest = self._met, (), self._rest, 0
        assert len(waits) + len(foreign) <= r.WAITS
        draft = Draft(
            kernel, opcode, layer, operands, waits, True, frees, ordered,
            foreign=foreign, part=part, rest=rest, prepare=prepare,
        )  # fmt: skip
        draft.flag = self.arena.allocate("flags", r.LINE).offset
        draft.claim = self.arena.allocate("flags", r.LINE * self.lanes).offset
        draft.done = self.arena.allocate("flags", r.LINE).offset
        self.drafts.append(draft)
        return len(self.drafts) - 1

    def preparation(
        self,
        kernel: str,
        opcode: r.Opcode,
        operands: dict[int, Operand],
        *,
        layer: int = NO_LAYER,
        prepare: Draft | None = None,
    ) -> Draft:
        """An instruction that a lane runs for itself, given to `add` as `prepare` of one or more others; it may have
        one itself."""
        draft = Draft(kernel, opcode, layer, operands, [], shared=False, prepare=prepare)
        draft.done = self.arena.allocate("flags", r.LINE * self.lanes).offset
        return draft

    def build(self) -> Program:
        """The finished program."""
        prepared: dict[int, Draft] = {}
        for draft in self.drafts:
            while draft.prepare is not None:  # which may have a preparation of its own
                draft = draft.prepare
                prepared[id(draft)] = draft
        everything = [*self.drafts, *prepared.values()]
        number = {id(draft): i for i, draft in enumerate(everything)}
        words = np.zeros((len(everything), r.WORDS), np.int64)
        relocate = np.zeros(words.shape, np.bool_)
        for i, draft in enumerate(everything):
            row, moves = words[i], relocate[i]
            row[r.OPCODE] = draft.opcode | draft.layer << 16 | _number(draft.part) << 32 | _number(draft.rest) << 40
            row[r.FREES], row[r.ORDERED] = draft.frees, draft.ordered
            places = {r.ERROR: self.error.offset, r.DONE: draft.done}
            if draft.shared:
                places |= {r.SET: draft.flag, r.CLAIM: draft.claim}
            flags = [self.drafts[wait].flag for wait in draft.waits] + [flag + r.FOREIGN for flag in draft.foreign]
            places |= {r.WAIT + n: flag for n, flag in enumerate(flags)}
            for index, offset in places.items():
                row[index], moves[index] = offset, True
            if draft.prepare is not None:
                row[r.PREPARE] = number[id(draft.prepare)]
            for index, operand in draft.operands.items():
                if isinstance(operand, BufferRef):
                    row[index], moves[index] = operand.offset, True
                elif isinstance(operand, float):
                    row[index] = r.float_bits(operand)
                elif operand is not None:
                    row[index] = operand
        kernels = [d.kernel for d in everything]
        return Program(self.name, words, relocate, kernels, len(self.drafts), self.drafts[-1].flag, self.outputs)


def _number(word: int) -> int:
    """What a record says of a product that units share (record.OPCODE)."""
    return word and r.PRODUCTS.index(word) + 1
