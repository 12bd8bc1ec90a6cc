"""The GPU unit: programs that a device's queue runs in order. Between the enqueueing of a step and the flag that its
last kernel posts, this process does nothing: no wait for a kernel, no finish (HeteroInfer, section 4.3)."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coterie.actors.host import UnitLost
from coterie.actors.lanes import cycles_per_second
from coterie.actors.unit import Rows
from coterie.errors import UnitError
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.scheduler.program import NO_LAYER, Program
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.unit import TRACE_EVENTS, UnitBuffers

LOOK = 0.05  # seconds after which a wait looks for signals
PATIENCE = 120.0  # seconds for one step: then the device counts as hung


class Loaded(Protocol):
    """A program on a device."""

    def run(self, tokens: int, outputs: int) -> None:
        """Enqueue all of it, for so many rows, of which so many want logits, and come back at once."""


class Device(Protocol):
    """A runtime with a queue: OpenCL (actors/opencl.py) or CUDA (actors/cuda.py)."""

    @property
    def builds(self) -> int:
        """Programs that were compiled so far."""

    @property
    def integrated(self) -> bool:
        """Whether it computes in the arena itself; else weights, KV blocks and activations live in memory of its
        own."""

    def describe(self) -> dict[str, Any]: ...

    def upload(self, offset: int, nbytes: int) -> None:
        """Copy pinned weights at that arena offset to a device with memory of its own."""

    def load(self, words: npt.NDArray[np.int64], kernels: list[str]) -> Loaded: ...

    def before_step(self, refs: Sequence[BufferRef]) -> None:
        """Let the device see these buffers as they are now; nothing to do where memory is shared."""

    def after_step(self, refs: Sequence[BufferRef]) -> None:
        """Let this process see these buffers as the device left them."""

    def finish(self) -> None:
        """Wait until nothing is in the queue. Raises UnitError where that failed."""

    def close(self) -> None: ...


class GpuUnit:
    """Runs programs on `device`; `buffers` are the unit's own. Raises UnitError, UnitLost."""

    def __init__(self, arena: Arena, buffers: UnitBuffers, device: Device) -> None:
        self.arena, self.buffers, self.device = arena, buffers, device
        self._programs: dict[str, tuple[Program, Loaded]] = {}
        self._lock, self._epoch, self._closed = threading.Lock(), 0, False
        self._under_way: Program | None = None  # what the queue may still be at
        self._await, self._event = library.function("lane_await", 6), library.function("lane_event", 7)
        self._cycles = library.function("lane_cycles", 0)
        self._header: npt.NDArray[np.int64] = arena.numpy(buffers.header)
        self._rows = {word: arena.numpy(ref) for word, ref in buffers.rows.items()}
        self._told = [buffers.header, *buffers.rows.values()]
        self._rate = max(1, int(cycles_per_second() / 1e6))
        self._never = arena.address(buffers.control) + 2 * r.LINE
        self._ring = 0
        if buffers.rings is not None:
            arena.numpy(buffers.rings)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            self._ring = arena.address(buffers.rings)

    def describe(self) -> dict[str, Any]:
        about = self.device.describe()
        slept, polled = self.waits()
        own = {"unit": "gpu", "real": not about["stand_in"], "builds": self.device.builds}
        return own | about | {"slept_s": slept, "polled_s": polled}

    def load(self, program: Program) -> None:
        """Have the device compile what it needs, before any step."""
        started, builds = self._cycles(), self.device.builds
        self._programs[program.name] = program, self.device.load(program.words, program.kernels)
        if self.device.builds != builds:
            self._record(started, r.Opcode.BUILD, 0)

    def run(self, name: str, rows: Rows, results: Sequence[BufferRef] = ()) -> None:
        """Run a loaded program for one step, and come back when its flag is posted; `results`: what this process reads
        then."""
        with self._lock:
            if self._closed:
                raise UnitError("this model has been closed")
            self._settle()
            program, loaded = self._programs[name]
            count, wanted = np.size(rows.ids), np.size(rows.outputs)
            if count == 0 or (program.outputs and wanted == 0):
                raise UnitError(f"program {name} was given no rows to work on")
            words = r.IDS, r.POSITIONS, r.TABLES, r.OUTPUT_ROWS
            for word, values in zip(words, rows, strict=True):
                array = np.asarray(values)
                self._rows[word][: array.size] = array
            self._epoch += 1
            self._header[[r.EPOCH, r.TOKENS, r.OUTPUTS]] = self._epoch, count, wanted
            started = self._cycles()
            try:
                self.device.before_step(self._told)
                self._under_way = program
                loaded.run(count, wanted)
                self._join(program)
                self.device.after_step(results)
            except UnitLost:
                raise
            except UnitError as error:
                with suppress(UnitError):  # what was enqueued before it failed may still be running
                    self.device.finish()
                self._under_way = None
                raise UnitLost("gpu", str(error)) from None
            self._record(started, r.Opcode.STEP, self._epoch)

    def settle(self) -> None:
        """Have nothing left in the queue: for who writes what kernels read, or reads what they write."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        if self._under_way is not None:
            self._join(self._under_way)

    def _join(self, program: Program) -> None:
        """Wait for the flag; Python's signal handlers run between looks. A queue cannot be called off: what is in it
        runs on after an interrupt, and whoever comes next waits for it first."""
        flag, counts = self.arena.base + program.done, self.arena.address(self.buffers.counts)
        slice_cycles, end = int(LOOK * cycles_per_second()), time.monotonic() + PATIENCE
        while not self._await(flag, self._epoch, self._never, self._rate, counts, slice_cycles):
            if time.monotonic() > end:
                raise UnitLost("gpu", f"a step has not ended in {PATIENCE:.0f} seconds", hangs=True)
        self._under_way = None

    def waits(self) -> tuple[float, float]:
        """Seconds of waiting for the device so far: asleep, and looking."""
        counts = self.arena.numpy(self.buffers.counts)[0]
        return float(counts[r.LINE_SLEPT]) / cycles_per_second(), float(counts[r.LINE_POLLED]) / cycles_per_second()

    def _record(self, started: int, opcode: r.Opcode, epoch: int) -> None:
        if self._ring:
            self._event(self._ring, started, self._cycles(), 0, epoch, opcode | NO_LAYER << 16, 1)

    def close(self) -> None:
        """Give the device back; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._programs.clear()
                self.device.close()
