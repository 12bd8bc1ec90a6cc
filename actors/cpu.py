"""The CPU unit: programs run by lanes of compiled code. Its lanes are an actor's; this is the scheduler's side of it,
which meets them at flags in the arena only."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.host import Actor, ThreadActor, UnitLost
from coterie.actors.lanes import NAP, cycles_per_second
from coterie.errors import UnitError
from coterie.kernels import library, target
from coterie.kernels import record as r
from coterie.scheduler.program import Program
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.unit import CONTROL_LINES, ENDED, TRACE_EVENTS, UnitBuffers

SLICE = 0.1  # seconds of a step after which lane 0 looks for signals, between two instructions
SPIN = 0.002  # seconds a lane spins inside a step; instructions take microseconds to milliseconds
NOTHING: Mapping[int, int] = MappingProxyType({})
HUNG = 20.0  # seconds at one piece of an instruction, waits for weights not counted: then a lane counts as hung


class CpuUnit:
    """Runs programs in `arena` with `lanes` lanes, which live in `actor` (by default, threads of this process);
    `buffers` are the unit's own.

    The thread that asks for a step is lane 0, unless the unit is `detached`: then all lanes are the actor's, and the
    caller only watches, so that it can still be interrupted while lanes wait for weights, or are no more.
    """

    def __init__(
        self, arena: Arena, lanes: int, buffers: UnitBuffers, *, detached: bool = False, actor: Actor | None = None
    ) -> None:
        self.arena, self.lanes, self.buffers, self.detached = arena, lanes, buffers, detached
        self.actor = actor or ThreadActor(arena)
        self._part, self._begin = library.function("lane_part", 4), library.function("lane_begin", 3)
        self._watch = library.function("lane_watch", 4)
        self._cycles = library.function("lane_cycles", 0)
        self._maker = os.getpid()
        self._programs: dict[str, tuple[Program, BufferRef]] = {}
        self._lock = threading.Lock()
        self._epoch = 0
        self._closed = self._hung = self._open = self._under_way = False
        # The header that is published is lane 0's copy, or where that is another thread's, one behind all lanes'.
        self._own = self._step(lanes if detached else 0)
        self._header: npt.NDArray[np.int64] = arena.numpy(buffers.steps)[lanes if detached else 0]
        self._lines: npt.NDArray[np.int64] = arena.numpy(buffers.control)[CONTROL_LINES:]
        self._counts: npt.NDArray[np.int64] = arena.numpy(buffers.counts)
        self._rows = {word: arena.numpy(ref) for word, ref in buffers.rows.items()}
        self._header_address = arena.address(buffers.header)
        self._fill_header()
        self._open_lanes()
        self._open = True

    @property
    def _first(self) -> int:
        """The first lane that is the actor's."""
        return 0 if self.detached else 1

    def _open_lanes(self) -> None:
        """Have the actor's lanes, which serve steps from the next one on."""
        publish = self._header, self._begin, self._header_address, self._own, self._go
        # A unit that is dropped without close() stops them all the same, also those whose start was interrupted.
        self._stop = weakref.finalize(self, _stop_lanes, os.getpid(), publish, self.actor)
        buffers, seen = self.buffers, self._epoch
        self.actor.open(
            "cpu", header=buffers.header, steps=buffers.steps, control=buffers.control,
            first=self._first, lanes=self.lanes, seen=seen,
        )  # fmt: skip

    def _fill_header(self) -> None:
        arena, buffers, header = self.arena, self.buffers, self._header
        control = arena.address(buffers.control)
        self._go, self._abort, self._never = (control + i * r.LINE for i in range(CONTROL_LINES))
        self._abort_word = arena.numpy(buffers.control)[1]
        arena.numpy(buffers.nap)[:] = 0, NAP
        self._nap = arena.address(buffers.nap)
        # More spinners than cores would only hold each other up.
        spinning = self.lanes <= len(os.sched_getaffinity(0))
        self._spin = int(SPIN * cycles_per_second()) if spinning else 0
        header[r.LANES_COUNT], header[r.ABORT], header[r.NEVER] = self.lanes, self._abort, self._never
        header[r.SPIN], header[r.NAP], header[r.RATE] = self._spin, self._nap, max(1, int(cycles_per_second() / 1e6))
        header[r.COUNTS] = arena.address(buffers.counts)
        for word, ref in buffers.rows.items():
            header[word] = arena.address(ref)
        if buffers.rings is not None:
            arena.numpy(buffers.rings)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            header[r.TRACE], header[r.TRACE_STRIDE] = arena.address(buffers.rings), buffers.rings.shape[1]
        arena.numpy(buffers.header)[:] = header

    def _step(self, lane: int) -> int:
        return self.arena.address(self.buffers.steps) + lane * r.HEADER_BYTES

    def describe(self) -> dict[str, Any]:
        return {
            "unit": "cpu",
            "runtime": f"numba kernels, {target.path()}",
            "lanes": self.lanes,
            "real": True,
        }

    def cycles_per_second(self) -> float:
        """The rate of the counter that trace events carry."""
        return cycles_per_second()

    @property
    def abort_address(self) -> int:
        """The word that another unit sets to 1 when this one waits for something that will not come."""
        return self._abort

    def connect(self, arrived: int, freed: int) -> None:
        """Tell the lanes which flags count a flash unit's reads."""
        self._header[r.ARRIVED], self._header[r.FREED] = arrived, freed
        self._header[r.YIELD] = int(self.lanes >= len(os.sched_getaffinity(0)))

    def seconds(self) -> npt.NDArray[np.float64]:
        """What lanes have counted so far (record.LINE_...), on average, as seconds: float64[words]."""
        cycles: npt.NDArray[np.int64] = self._counts.sum(axis=0)
        return cycles / (self.lanes * cycles_per_second())

    def skip_to(self, epoch: int) -> None:
        """Give the next step this number, not lower than its own: units in one step have one."""
        self._epoch = max(self._epoch, epoch - 1)

    @property
    def next_epoch(self) -> int:
        """The number of the next step."""
        return self._epoch + 1

    def stalled_seconds(self) -> float:
        """How long lanes have waited for weights, on average."""
        return self._count(r.LINE_STALLED) / self.lanes / cycles_per_second()

    def neuron_counts(self) -> tuple[int, int]:
        """How many neurons of a sparse model were live in decode so far, and how many were asked for."""
        return self._count(r.LINE_LIVE), self._count(r.LINE_ASKED)

    def _count(self, what: int) -> int:
        return int(self._counts[:, what].sum())

    def load(self, program: Program) -> None:
        """Put a program's records into the arena; the actor links, or first compiles, what it needs."""
        if program.name not in self._programs:  # else an actor was lost while it did this
            table = self.arena.allocate("programs", program.words.shape, np.int64)
            self._programs[program.name] = program, table
        self._bind(*self._programs[program.name])

    def _bind(self, program: Program, table: BufferRef) -> None:
        kernels = list(dict.fromkeys(program.kernels))
        self.arena.numpy(table)[:] = program.bound(self.arena.base, self.arena.address(table), kernels)
        self.actor.load(table, kernels)

    def run(
        self,
        name: str,
        ids: npt.ArrayLike,
        positions: npt.ArrayLike,
        tables: npt.ArrayLike,
        outputs: npt.ArrayLike,
        embeddings: npt.ArrayLike = (),
        tape: int = 0,
        watch: Callable[[], None] = lambda: None,
        given: Mapping[int, int] = NOTHING,
    ) -> None:
        """Run a loaded program for one step.

        ids, positions: int32[rows]; tables: int64[rows], addresses of KV block tables; outputs: int32[n], rows
        that want logits; embeddings: int64[rows], addresses of the groups that hold the ids' embeddings; tape: the
        number of the read that stands for tape position 0; given: by header word (record.GIVEN_...) how much of
        products is another unit's. A detached unit calls `watch` once lanes have begun, and some times a second; what
        it raises ends the step.
        A KeyboardInterrupt takes effect between two instructions; the step is then abandoned (docs/flags.md says what
        may be run again). Raises UnitError if a kernel complains, or without rows; UnitLost where lanes have gone,
        until `revive`.
        """
        with self._lock:
            if self._closed:
                raise UnitError("this model has been closed")
            if self.detached and os.getpid() != self._maker:
                raise UnitError("this model belongs to the process that this one was forked from; open it here")
            self._settle()
            program, table = self._programs[name]
            if np.size(ids) == 0 or (program.outputs and np.size(outputs) == 0):
                raise UnitError(f"program {name} was given no rows to work on")
            header = self._header
            for word, values in (
                (r.IDS, ids),
                (r.POSITIONS, positions),
                (r.TABLES, tables),
                (r.OUTPUT_ROWS, outputs),
                (r.EMBEDDINGS, embeddings),
            ):
                array = np.asarray(values)
                self._rows[word][: array.size] = array
                if word == r.IDS:
                    header[r.TOKENS] = array.size
            header[list(r.PRODUCTS)] = 0
            for word, share in given.items():
                header[word] = share
            header[r.OUTPUTS], header[r.LAST] = np.size(outputs), np.max(positions, initial=0)
            header[r.PROGRAM], header[r.RECORDS], header[r.TAPE] = self.arena.address(table), program.length, tape
            try:
                self._under_way = True
                self._epoch += 1
                self._publish()
                if self.detached:
                    self._look_on(program, watch)
                else:
                    self._take_part(program)
            except BaseException:
                self._abandon()
                raise
            self._under_way = False
            self._check(program)

    def settle(self) -> None:
        """Have no lane left in a step: for who writes what the next one reads."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        self.check()
        if self._hung:
            raise UnitError("a lane of this model hangs; end this process")
        if self._abort_word[0] or self._under_way:  # a second interrupt cut an abandonment short
            self._abandon()

    def _publish(self) -> None:
        """Show the lanes the step's header, and raise the go flag."""
        self._header[r.EPOCH] = self._epoch
        self._begin(self._header_address, self._own, self._go)

    def _look_on(self, program: Program, watch: Callable[[], None]) -> None:
        """Wait until the step is done; Python's signal handlers run between looks."""
        flag, lanes = self.arena.base + program.done, _Progress(self._counts)
        watch()
        while not self._watch(flag, self._epoch, 0, self._nap):
            watch()
            self.check(lanes)
            if self._abort_word[0]:
                raise UnitError("the step was abandoned")

    def check(self, lanes: "_Progress | None" = None) -> None:
        """Raise UnitLost where the actor, or one of its lanes, has gone, or a lane hangs."""
        self._check_actor(lanes)
        ended = np.flatnonzero(self._lines[self._first :, ENDED])
        if ended.size:
            raise UnitLost("cpu", f"lane {ended[0] + self._first} has ended")

    def _check_actor(self, lanes: "_Progress | None") -> None:
        if reason := self.actor.lost() or (None if self._open else "its lanes were never ready"):
            raise UnitLost("cpu", reason)
        if lanes is not None and (lane := lanes.hung()) is not None:
            self._hung = True
            raise UnitLost("cpu", f"lane {lane} has been at one piece of work for {HUNG:.0f} seconds", hangs=True)

    def _take_part(self, program: Program) -> None:
        """Be lane 0 until the step is done; Python's signal handlers run between slices."""
        step, at = self._step(0), 0
        length = int(SLICE * cycles_per_second())
        while at < program.length:
            at = self._part(step, 0, at, self._cycles() + length)
            if at < 0:
                raise UnitError("the step was abandoned")
        flag, lanes = self.arena.base + program.done, _Progress(self._counts)
        while not self._watch(flag, self._epoch, self._spin, self._nap):
            self.check(lanes)
            if self._abort_word[0]:
                raise UnitError("the step was abandoned")

    def _abandon(self) -> None:
        """Call the lanes off, and make the counters ready for another try."""
        self._abort_word[0] = 1
        self._publish()  # an interrupt may have come before the lanes heard of the step
        self._park()
        self._forget_pieces()

    def _forget_pieces(self) -> None:
        """No lane works on a step: its finished pieces do not count for the next one."""
        for program, _ in self._programs.values():
            for offset in program.words[: program.length, r.DONE]:
                self._word(int(offset))[0] = 0
        self._under_way = False
        self._abort_word[0] = 0

    def _forget_sleepers(self) -> None:
        """Lanes that were killed in their sleep would have every post call the kernel."""
        self.arena.numpy(self.buffers.control)[:, 1] = 0
        for program, _ in self._programs.values():
            for offset in program.words[: program.length, r.SET]:
                self._word(int(offset) + r.SLEEPERS)[0] = 0

    def revive(self, actor: Actor) -> None:
        """Go on with the lanes of another actor, after `fence` of this one; or of this one, where lanes have ended."""
        with self._lock:
            self._open = False  # until all is done: an interrupt may come anywhere
            self._stop()
            self._header[r.STOP], self._epoch = 0, int(self._header[r.EPOCH])
            self._forget_pieces()
            self._forget_sleepers()
            self._lines[:, 0] = self._epoch  # parked: the new lanes were in no step
            self._counts[:, r.LINE_PROGRESS] = 0
            self.actor, self._hung = actor, False
            self._open_lanes()
            for program, table in self._programs.values():
                self._bind(program, table)
            self._open = True

    def _park(self) -> None:
        """Wait until every lane has left the last step, or for good. Raises UnitLost where that will not be."""
        lanes = _Progress(self._counts)
        for lane in range(self._first, self.lanes):
            line = self._go + (CONTROL_LINES + lane) * r.LINE
            while not self._watch(line, self._epoch, 0, self._nap) and not self._lines[lane, ENDED]:
                self._check_actor(lanes)

    def unload(self) -> None:
        """Forget all programs, once no lane can look at one any more."""
        with self._lock:
            if self._epoch:
                self._park()
            self._programs.clear()

    def _word(self, offset: int) -> npt.NDArray[np.int64]:
        words: npt.NDArray[np.int64] = self.arena.numpy(BufferRef("flags", offset, 8, "<i8", (1,)))
        return words

    def _check(self, program: Program) -> None:
        error = self._word(int(program.words[0, r.ERROR]))
        if error[0]:
            code, error[0] = int(error[0]), 0
            raise UnitError(f"a kernel of program {program.name} reported error {code}")

    def close(self) -> None:
        """Stop the lanes; a second call does nothing."""
        with self._lock:
            self._closed = True
            if self._hung and (last := self._stop.detach()) is not None:
                _publish_stop(*last[2][1])  # should it ever come back; it is not waited for
            self._stop()


class _Progress:
    """Notices a lane that does not come out of an instruction. Only time counts in which it was looked at: this process
    may have been stopped meanwhile."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self._counts, self._looked = counts, time.monotonic()
        self._seen, self._stuck = counts[:, r.LINE_PROGRESS].copy(), np.zeros(len(counts))

    def hung(self) -> int | None:
        """A lane that has been at one piece of an instruction, without waiting for weights, for HUNG seconds."""
        now, progress = time.monotonic(), self._counts[:, r.LINE_PROGRESS].copy()
        waited, self._looked = min(now - self._looked, 1.0), now
        inside = (progress == self._seen) & (progress % 2 == 1)
        self._stuck, self._seen = np.where(inside, self._stuck + waited, 0), progress
        return int(self._stuck.argmax()) if self._stuck.max() > HUNG else None


def _stop_lanes(maker: int, publish: tuple[Any, ...], actor: Actor) -> None:
    """Tell the lanes to leave, and wait until they have."""
    if os.getpid() != maker:
        return  # a fork's copy of the unit is no unit
    _publish_stop(*publish)
    actor.close("cpu")


def _publish_stop(header: npt.NDArray[np.int64], begin: Callable[..., int], *addresses: int) -> None:
    """Publish a last step that tells the lanes to leave."""
    header[r.STOP] = 1
    header[r.EPOCH] += 1
    begin(*addresses)
