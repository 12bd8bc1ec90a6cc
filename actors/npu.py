"""The NPU unit: static-shape graphs, run one after the other by a thread that meets the CPU unit's lanes at flags."""

import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from coterie.actors.host import UnitLost
from coterie.actors.lanes import NAP, cycles_per_second
from coterie.actors.npu_product import Product
from coterie.errors import CoterieError
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.scheduler.program import Program
from coterie.storage.arena import Arena
from coterie.storage.unit import TRACE_EVENTS, UnitBuffers

SLICE = 0.1  # seconds of waiting for a flag after which the thread looks around
LAST_WAIT = 5.0  # seconds that close waits for a graph under way


class NpuUnit:
    """Runs programs of graphs. `abort`: address of the word that calls the CPU unit's lanes off; `cores`: those that
    its thread keeps to (none: any)."""

    def __init__(self, arena: Arena, buffers: UnitBuffers, abort: int, cores: Collection[int] = ()) -> None:
        self.arena, self.buffers, self._cores = arena, buffers, cores
        self._programs: dict[str, list[tuple[tuple[int, ...], str, Product]]] = {}
        self._pieces: Mapping[str, int] = {}
        self._busy = dict[str, int]()
        self._await, self._post = library.function("lane_await", 6), library.function("lane_post", 2)
        self._watch, self._nap = library.function("lane_watch", 4), arena.address(buffers.nap)
        self._event, self.cycles = library.function("lane_event", 7), library.function("lane_cycles", 0)
        self._abort, self._complaint = abort, ""
        self._counts, self._rate = arena.address(buffers.counts), max(1, int(cycles_per_second() / 1e6))
        self._go = arena.address(buffers.control)
        self._own_abort, self._parked = self._go + r.LINE, self._go + 3 * r.LINE
        self._abort_word: npt.NDArray[np.int64] = arena.numpy(buffers.control)[1]
        arena.numpy(buffers.nap)[:] = 0, NAP
        self._epoch, self._serial, self._name, self._ring = 0, 0, "", 0
        if buffers.rings is not None:
            arena.numpy(buffers.rings)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            self._ring = arena.address(buffers.rings)
        self._thread: threading.Thread | None = None

    def load(self, program: Program, kinds: Sequence[str], products: Sequence[Product]) -> None:
        """A program, and of each of its records the kind of cut that it follows, and its product."""
        base, records = self.arena.base, []
        for row, kind, product in zip(program.words[: program.length], kinds, products, strict=True):
            flag, opcode = base + int(row[r.SET]), int(row[r.OPCODE])
            waits = tuple(base + int(row[r.WAIT + n]) - r.FOREIGN for n in range(r.WAITS) if row[r.WAIT + n])
            records.append(((flag, opcode, *waits), kind, product))
        self._programs[program.name] = records
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="coterie-npu", daemon=True)
            self._thread.start()

    def built(self, started: int) -> None:
        """Record that a graph was built since `started`, in cycles."""
        self._record(started, self.cycles(), r.Opcode.BUILD, 0)

    @contextmanager
    def beside(self, name: str, epoch: int, pieces: Mapping[str, int]) -> Iterator[None]:
        """Run a program while the CPU unit runs its step of that number: of each product so many pieces, by kind.
        Raises UnitLost where a graph fails."""
        self.begin(name, epoch, pieces)
        try:
            yield
        except BaseException:
            self.call_off()
            self.check()  # if it complains, that is the reason
            raise

    def begin(self, name: str, epoch: int, pieces: Mapping[str, int]) -> None:
        """Start a program beside the CPU unit's step of that number."""
        self._name, self._epoch, self._complaint, self._pieces = name, epoch, "", pieces
        self._busy = dict.fromkeys(pieces, 0)
        self._serial += 1
        self._post(self._go, self._serial)

    def call_off(self) -> None:
        """End the step under way, once the graph under way has ended, and be ready for another one."""
        self._abort_word[0] = 1
        while not self._watch(self._parked, self._serial, 0, self._nap):
            pass
        self._abort_word[0] = 0

    def check(self) -> None:
        """Raise UnitLost where a graph could not be run."""
        if self._complaint:
            raise UnitLost("npu", self._complaint)

    def busy_seconds(self) -> dict[str, float]:
        """How long products of each kind took in the last step."""
        return {kind: cycles / cycles_per_second() for kind, cycles in self._busy.items()}

    def waits(self) -> tuple[float, float]:
        """Seconds of waiting for other units so far: asleep, and looking."""
        slept, polled = self.arena.numpy(self.buffers.counts)[0, [r.LINE_SLEPT, r.LINE_POLLED]]
        return float(slept) / cycles_per_second(), float(polled) / cycles_per_second()

    def _serve(self) -> None:
        """The unit's thread."""
        if self._cores:
            os.sched_setaffinity(0, self._cores)
        serial = 0
        while True:
            while not self._watch(self._go, serial + 1, 0, self._nap):
                pass
            serial += 1
            if not self._name:
                return
            try:
                self._run(self._programs[self._name])
            except CoterieError as error:
                self._fail(str(error))
            except Exception as error:  # a runtime's own; the CPU unit would wait for ever
                self._fail(f"a graph failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            self._post(self._parked, serial)

    def _run(self, records: list[tuple[tuple[int, ...], str, Product]]) -> None:
        most = int(SLICE * cycles_per_second())
        for (flag, opcode, *waits), kind, product in records:
            asked = self.cycles()
            for awaited in waits:
                while not self._await(awaited, self._epoch, self._own_abort, self._rate, self._counts, most):
                    if self._abort_word[0]:
                        return
            begun = self.cycles()
            product.run(self._pieces[kind])
            ended = self.cycles()
            self._busy[kind] += ended - begun
            self._post(flag, self._epoch)
            self._record(begun, ended, opcode, begun - asked)

    def _fail(self, complaint: str) -> None:
        self._complaint = complaint
        self._post(self._abort, 1)

    def _record(self, started: int, ended: int, opcode: int, waited: int) -> None:
        if self._ring:
            self._event(self._ring, started, ended, waited, self._epoch, opcode, 1)

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self.call_off()
            self.begin("", 0, {})
            thread.join(LAST_WAIT)
