"""A model without its weights' values on the CPU unit, to time the instructions of its programs.

Programs are compiled as for a real run. A step's trace gives every instruction's time, from the end of the one before
to its own end, so that handing over and what lanes prepare for themselves are in it.
"""

from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import CpuUnit
from coterie.errors import UsageError
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.kernels.library import kernel_name
from coterie.models.spec import ModelSpec
from coterie.scheduler.layout import BATCH, ModelLayout
from coterie.scheduler.operators import Reader, Rows
from coterie.scheduler.placement import CPU_ONLY, Placement
from coterie.scheduler.program import Program, ProgramBuilder
from coterie.scheduler.resident import CONTEXT, Resident, Tensors
from coterie.storage.arena import Arena, Ledger
from coterie.storage.available import available_memory
from coterie.storage.kv import KVCache, KVLayout
from coterie.storage.tables import fill_tables
from coterie.trace.chrome import read_rings

FILL = 0x3C  # every byte of weights: float16 1.06, float32 0.011, so that nothing overflows or is denormal
MEETS = 16  # instructions that do nothing
BUSY = "this machine is too busy to measure its kernels; try again when it is quiet"
Progress = Callable[..., None]


class ModelBench:
    """A model in memory, with a unit to run it. A context manager. `placement`: with a GPU its programs are laid out
    too; `variants`: of each program so many more may be loaded, with tables of their own. `empty`: a program of
    instructions that do nothing."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Tensors,
        lanes: int,
        progress: Progress,
        *,
        placement: Placement = CPU_ONLY,
        variants: int = 0,
    ) -> None:
        self.spec = spec
        resident, paper = Resident(spec, tensors, lanes, placement), Ledger()
        layout = resident.model(paper, resident.units(paper))
        programs = layout.programs | {"empty": _empty(paper, layout)}
        regions = paper.usage() | {"kv": KVLayout.of(spec).region(CONTEXT)}
        regions["state"] += (BATCH + 1) * (CONTEXT + 64)
        regions["programs"] = (1 + variants) * sum(program.nbytes for program in programs.values())
        regions["tables"] *= 1 + variants
        kernels = [kernel for program in programs.values() for kernel in program.kernels]
        library.compile_missing(kernels, progress, available_memory())
        self.arena = Arena(regions)
        self.units = resident.units(self.arena)
        assert self.units.cpu.rings is not None
        self._rings = self.units.cpu.rings
        self.cache = KVCache(self.arena, KVLayout.of(spec), CONTEXT, BATCH + 1)
        self.unit = CpuUnit(self.arena, lanes, self.units.cpu)
        self.layout = resident.model(self.arena, self.units)
        self.arena.numpy(self.arena.whole("weights"))[:] = FILL
        fill_tables(self.arena, self.layout.weights, 0)
        self.empty = _empty(self.arena, self.layout)
        for name in ("decode", "prefill", "head", "probe"):
            self.unit.load(self.layout.programs[name])
        self.unit.load(self.empty)
        self.sequence = self.cache.sequence()
        self.sequence.reserve(CONTEXT)
        self.reader = Reader(spec, self.layout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.unit.close()
        self.arena.close()

    def step(self, program: Program, rows: Rows) -> None:
        """Run a loaded program; the last rows want logits, where it computes any."""
        ids = np.arange(rows.tokens) % self.spec.vocab
        positions = rows.position + np.arange(rows.tokens)
        tables = np.full(rows.tokens, self.sequence.table_address)
        outputs = np.arange(rows.tokens - rows.outputs, rows.tokens) if program.outputs else ()
        places = self.arena.base + self.layout.weights.embedding_places(ids)[2]
        self.unit.run(program.name, ids, positions, tables, outputs, places)

    def seconds(self, program: Program, rows: Rows, repeat: int) -> npt.NDArray[np.float64]:
        """Of each instruction of a loaded program, float64[length], medians of `repeat` steps behind one that warms up.
        Raises UsageError on a machine that is too busy."""
        steps = [self.spans(program, rows) for _ in range(repeat + 1)]
        times = [spans for spans in steps[1:] if spans is not None]
        if not times:
            raise UsageError(BUSY)
        medians: npt.NDArray[np.float64] = np.median(np.array(times), axis=0)
        return medians

    def spans(self, program: Program, rows: Rows) -> npt.NDArray[np.float64] | None:
        """Seconds of each instruction in one step; None where the trace does not show them all."""
        self._forget_events()
        self.step(program, rows)
        return self._spans(program)

    def _forget_events(self) -> None:
        self.arena.numpy(self._rings)[:, :8].view(np.int64)[:] = 0

    def _spans(self, program: Program) -> npt.NDArray[np.float64] | None:
        """A lane's events are in the program's order, without those of which it got no piece."""
        wanted = program.words[: program.length, r.OPCODE].tolist()
        ends, begun = np.zeros(len(wanted), np.int64), list[int]()
        for events in read_rings(self.arena.numpy(self._rings)):
            at = 0
            for start, end, _, _, opcode, layer, _ in events.tolist():
                while at < len(wanted) and wanted[at] != opcode | layer << 16:
                    at += 1
                if at == len(wanted):
                    return None
                ends[at] = max(ends[at], end)
                begun.append(start)
                at += 1
        if not ends.all():
            return None
        at_least = np.maximum.accumulate(np.concatenate([[min(begun)], ends]))
        return np.diff(at_least) / self.unit.cycles_per_second()


def _empty(ledger: Ledger, layout: ModelLayout) -> Program:
    """MEETS instructions, one behind the other, in which nothing is done."""
    builder = ProgramBuilder("empty", ledger, layout.shared.lanes, layout.shared.error)
    for _ in range(MEETS):
        builder.add(kernel_name("meet"), r.Opcode.POST, {})
    return builder.build()
