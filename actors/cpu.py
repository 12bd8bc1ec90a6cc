"""The CPU unit: lanes of compiled code. The thread that asks for a step is lane 0; the others are its own."""

import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.errors import UnitError
from coterie.kernels import library, target
from coterie.kernels import record as r
from coterie.scheduler.program import Program
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.unit import CONTROL_LINES, TRACE_EVENTS, UnitBuffers

SLICE = 0.1  # seconds of a step after which lane 0 looks for signals, between two instructions
SPIN = 0.002  # seconds a lane spins inside a step; instructions take microseconds to milliseconds
IDLE_SPIN = 0.0005  # seconds a lane spins for the next step: longer than Python needs between two tokens
NAP = 50_000_000  # nanoseconds


@cache
def cycles_per_second() -> float:
    """The rate of the cycle counter, measured for some milliseconds."""
    cycles = library.function("lane_cycles", 0)
    count, start = cycles(), time.perf_counter()
    while time.perf_counter() - start < 0.005:
        pass
    return (cycles() - count) / (time.perf_counter() - start)


class CpuUnit:
    """Runs programs in `arena` with `lanes` lanes; `buffers` are its own.

    The thread that asks for a step is lane 0, unless the unit is `detached`: then all lanes are threads of its own, and
    the caller only watches, so that it can still be interrupted while lanes wait for weights.
    """

    def __init__(self, arena: Arena, lanes: int, buffers: UnitBuffers, *, detached: bool = False) -> None:
        self.arena, self.lanes, self.buffers, self.detached = arena, lanes, buffers, detached
        self._worker, self._part = library.function("lane_worker", 7), library.function("lane_part", 4)
        self._begin, self._wait = library.function("lane_begin", 3), library.function("lane_wait", 5)
        self._watch = library.function("lane_watch", 3)
        self._cycles = library.function("lane_cycles", 0)
        self._programs: dict[str, tuple[Program, int]] = {}
        self._lock = threading.Lock()
        self._epoch = 0
        self._closed = False
        # The header that is published is lane 0's copy, or where that is another thread's, one behind all lanes'.
        self._own = self._step(lanes if detached else 0)
        self._header: npt.NDArray[np.int64] = arena.numpy(buffers.steps)[lanes if detached else 0]
        self._rows = {word: arena.numpy(ref) for word, ref in buffers.rows.items()}
        self._header_address = arena.address(buffers.header)
        self._fill_header()
        self._threads = [self._lane_thread(lane) for lane in range(0 if detached else 1, lanes)]
        # Threads know the arena's memory, not the unit: one that is dropped without close() stops them all the same.
        publish = self._begin, self._header_address, self._own, self._go
        self._stop = weakref.finalize(self, _stop_lanes, self._header, publish, self._threads)
        for thread in self._threads:
            thread.start()

    def _fill_header(self) -> None:
        arena, buffers, header = self.arena, self.buffers, self._header
        control = arena.address(buffers.control)
        self._go, self._abort, self._never = (control + i * r.LINE for i in range(CONTROL_LINES))
        self._parked = [control + (CONTROL_LINES + i) * r.LINE for i in range(self.lanes)]
        self._abort_word = arena.numpy(buffers.control)[1]
        arena.numpy(buffers.nap)[:] = 0, NAP
        self._nap = arena.address(buffers.nap)
        # More spinners than cores would only hold each other up.
        self._spinning = self.lanes <= len(os.sched_getaffinity(0))
        self._spin = int(SPIN * cycles_per_second()) if self._spinning else 0
        header[r.LANES_COUNT], header[r.ABORT], header[r.NEVER] = self.lanes, self._abort, self._never
        header[r.SPIN], header[r.NAP] = self._spin, self._nap
        header[r.COUNTS] = arena.address(buffers.counts)
        for word, ref in buffers.rows.items():
            header[word] = arena.address(ref)
        if buffers.rings is not None:
            arena.numpy(buffers.rings)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            header[r.TRACE], header[r.TRACE_STRIDE] = arena.address(buffers.rings), buffers.rings.shape[1]
        arena.numpy(buffers.header)[:] = header

    def _lane_thread(self, lane: int) -> threading.Thread:
        idle = int(IDLE_SPIN * cycles_per_second()) if self._spinning else 0
        core = sorted(os.sched_getaffinity(0))[lane] if self._spinning else None
        call = self._header_address, self._step(lane), lane, self._go, self._parked[lane], 0, idle
        arguments = self._header, self._worker, call, core
        return threading.Thread(target=_serve, args=arguments, name=f"coterie-lane-{lane}", daemon=True)

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

    def stalled_seconds(self) -> float:
        """How long lanes have waited for weights, on average."""
        return self._count(r.LINE_STALLED) / self.lanes / cycles_per_second()

    def neuron_counts(self) -> tuple[int, int]:
        """How many neurons of a sparse model were live in decode so far, and how many were asked for."""
        return self._count(r.LINE_LIVE), self._count(r.LINE_ASKED)

    def _count(self, what: int) -> int:
        return int(self.arena.numpy(self.buffers.counts)[:, what].sum())

    def load(self, program: Program) -> None:
        """Link, or first compile, what the program needs, and put its records into the arena."""
        kernels = {name: library.address(name) for name in program.kernels}
        table = self.arena.allocate("programs", program.words.shape, np.int64)
        address = self.arena.address(table)
        self.arena.numpy(table)[:] = program.bound(self.arena.base, address, kernels)
        self._programs[program.name] = program, address

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
    ) -> None:
        """Run a loaded program for one step.

        ids, positions: int32[rows]; tables: int64[rows], addresses of KV block tables; outputs: int32[n], rows
        that want logits; embeddings: int64[rows], addresses of the groups that hold the ids' embeddings; tape: the
        number of the read that stands for tape position 0. A detached unit calls `watch` some times a second; what it
        raises ends the step. A KeyboardInterrupt takes effect between two instructions; the step is then abandoned
        (docs/flags.md says what may be run again). Raises UnitError if a kernel complains, or without rows.
        """
        with self._lock:
            if self._closed:
                raise UnitError("this model has been closed")
            self._settle()
            program, address = self._programs[name]
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
            header[r.OUTPUTS], header[r.LAST] = np.size(outputs), np.max(positions, initial=0)
            header[r.PROGRAM], header[r.RECORDS], header[r.TAPE] = address, program.length, tape
            try:
                self._epoch += 1
                self._publish()
                if self.detached:
                    self._look_on(program, watch)
                else:
                    self._take_part(program)
            except BaseException:
                self._abandon()
                raise
            self._check(program)

    def settle(self) -> None:
        """Have no lane left in a step: for who writes what the next one reads."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        if self._abort_word[0]:  # a second interrupt cut an abandonment short
            self._abandon()

    def _publish(self) -> None:
        """Show the lanes the step's header, and raise the go flag."""
        self._header[r.EPOCH] = self._epoch
        self._begin(self._header_address, self._own, self._go)

    def _look_on(self, program: Program, watch: Callable[[], None]) -> None:
        """Wait until the step is done; Python's signal handlers run between looks."""
        flag = self.arena.base + program.done
        while not self._watch(flag, self._epoch, self._nap):
            watch()
            if self._abort_word[0]:
                raise UnitError("the step was abandoned")

    def _take_part(self, program: Program) -> None:
        """Be lane 0 until the step is done; Python's signal handlers run between slices."""
        step, at = self._step(0), 0
        length = int(SLICE * cycles_per_second())
        while at < program.length:
            at = self._part(step, 0, at, self._cycles() + length)
            if at < 0:
                raise UnitError("the step was abandoned")
        if not self._wait(self.arena.base + program.done, self._epoch, self._spin, self._abort, self._nap):
            raise UnitError("the step was abandoned")

    def _abandon(self) -> None:
        """Call the lanes off, and make the counters ready for another try."""
        self._abort_word[0] = 1
        self._publish()  # an interrupt may have come before the lanes heard of the step
        self._park()
        for program, _ in self._programs.values():
            for offset in program.words[: program.length, r.DONE]:
                self._word(int(offset))[0] = 0
        self._abort_word[0] = 0

    def _park(self) -> None:
        """Wait until every lane has left the last step."""
        for lane in range(0 if self.detached else 1, self.lanes):
            self._wait(self._parked[lane], self._epoch, 0, self._never, self._nap)

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
            self._stop()


def _serve(memory: npt.NDArray[np.int64], worker: Callable[..., int], call: tuple[int, ...], core: int | None) -> None:
    """A lane's thread: pinned to its core if there are enough, and never back in Python until the end. Meanwhile it
    holds a view of the arena's memory."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    worker(*call)


def _stop_lanes(
    header: npt.NDArray[np.int64],
    publish: tuple[Callable[..., int], int, int, int],
    threads: list[threading.Thread],
) -> None:
    """Publish a last step that tells the lanes to leave."""
    header[r.STOP] = 1
    header[r.EPOCH] += 1
    begin, *addresses = publish
    begin(*addresses)
    for thread in threads:
        if thread.is_alive():  # an interrupt may have come before all were started
            thread.join()
