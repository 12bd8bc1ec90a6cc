"""The GPU unit: programs that a device's queue runs in order. Between the enqueueing of a step and the flag that its
last kernel posts, this process does nothing: no wait for a kernel, no finish (HeteroInfer, section 4.3)."""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
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

    def run(self, tokens: int, outputs: int, records: range | None = None) -> None:
        """Enqueue these records of it, by default all, for so many rows, of which so many want logits, and come back at
        once."""

    def units(self, record: int) -> int:
        """Over how many work-groups a record can run."""

    def limit(self, record: int, first: int, units: int) -> None:
        """Run a record over some of its work-groups only, from now on."""


class Device(Protocol):
    """A runtime with a queue: OpenCL (actors/opencl.py) or CUDA (actors/cuda.py)."""

    @property
    def builds(self) -> int:
        """Programs that were compiled so far."""

    @property
    def integrated(self) -> bool:
        """Whether it computes in the arena itself; else weights, KV blocks and activations live in memory of its
        own."""

    @property
    def share(self) -> float:
        """Of its time, what it may take: below 1 enqueueing takes as long as the step."""

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
    """Runs programs on `device`; `buffers` are the unit's own. `cores`: those that its thread keeps to beside another
    unit's steps (none: any); `fast`: its queue itself waits for other units' flags; else this process waits for the
    device, posts and looks (HeteroInfer, section 4.3, without fast synchronisation). Raises UnitError, UnitLost."""

    def __init__(
        self, arena: Arena, buffers: UnitBuffers, device: Device, cores: Collection[int] = (), fast: bool = True
    ) -> None:
        self.arena, self.buffers, self.device, self._cores, self._fast = arena, buffers, device, cores, fast
        self._started, self._deadline = 0, 0.0  # of the step under way: cycles at its begin, when it counts as hung
        self._given: dict[str, dict[int, int]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Callable[[], None] | None = None  # puts a step in the queue, once the other unit has begun
        self._post = library.function("lane_post", 2)
        self._programs: dict[str, tuple[Program, Loaded]] = {}
        self._lock, self._epoch, self._closed = threading.Lock(), 0, False
        self._under_way: Program | None = None  # what the queue may still be at
        self._await, self._event = library.function("lane_await", 6), library.function("lane_event", 7)
        self._cycles = library.function("lane_cycles", 0)
        self._header: npt.NDArray[np.int64] = arena.numpy(buffers.header)
        self._rows = {word: arena.numpy(ref) for word, ref in buffers.rows.items()}
        self._told = [buffers.header, *buffers.rows.values()]
        self._rate = max(1, int(cycles_per_second() / 1e6))
        control = arena.address(buffers.control)
        self._off, self._never = control + r.LINE, control + 2 * r.LINE  # a word that ends waits; one that stays 0
        self._off_word: npt.NDArray[np.int64] = arena.numpy(buffers.control)[1]
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

    @property
    def next_epoch(self) -> int:
        """The number of the next step."""
        return self._epoch + 1

    @contextmanager
    def beside(self, name: str, rows: Rows, epoch: int, words: Mapping[int, int], abort: int) -> Iterator[None]:
        """Run a step with that number while another unit runs its own of the same number. `words`: of the step's
        header, how much of products is ours; `abort`: address of the word that calls the other unit's lanes off. Raises
        UnitLost where this one is."""
        self.settle()  # of a step that was called off, while its waits still end at once
        self._off_word[0] = 0
        self._share(name, words)
        enqueued: Future[None] | None = None
        serve = partial(self._serve, name, rows, epoch)
        if self._fast and self.device.share >= 1:
            self._pending = serve
        else:
            enqueued = self._in_thread(serve, abort)
        try:
            yield
        except BaseException:
            self._off_word[0] = 1  # the queue runs on, and waits for nobody
            self._pending = None
            if enqueued is not None:
                enqueued.result()  # if it was lost, that is the reason
            raise
        if enqueued is not None:
            enqueued.result()
        self.settle()

    def watch(self) -> None:
        """For who runs beside us, once it has begun, and while it waits for what we post. Raises UnitLost where we are,
        or a step takes too long."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()
        elif self._under_way is not None and time.monotonic() > self._deadline:
            raise UnitLost("gpu", f"a step has not ended in {PATIENCE:.0f} seconds", hangs=True)

    def _serve(self, name: str, rows: Rows, epoch: int) -> None:
        """Enqueue a step. A queue's own thread may be on the same core, so nobody looks for its end before the other
        unit's."""
        with self._lock:
            self._start(name, rows, epoch)

    def _in_thread(self, serve: Callable[[], None], abort: int) -> "Future[None]":
        """Enqueue where that takes as long as the step, and the other unit is to be looked after meanwhile."""
        if self._thread is None:
            keep = (lambda: os.sched_setaffinity(0, self._cores)) if self._cores else None
            self._thread = ThreadPoolExecutor(1, "coterie-gpu", keep)

        def surely() -> None:
            try:
                serve()
            except BaseException:
                self._post(abort, 1)  # the other unit would wait for ever
                raise

        return self._thread.submit(surely)

    def _share(self, name: str, words: Mapping[int, int]) -> None:
        """Have records that compute a part compute this one."""
        program, loaded = self._programs[name]
        known = self._given.get(name, {})
        if changed := {word for word, share in words.items() if known.get(word) != share}:
            for record, share in program.shares.items():
                if share.word in changed:
                    loaded.limit(record, *share.launched(words, loaded.units(record)))
            self._given[name] = dict(words)

    def run(self, name: str, rows: Rows, results: Sequence[BufferRef] = ()) -> None:
        """Run a loaded program for one step, and come back when its flag is posted; `results`: what this process reads
        then."""
        with self._lock:
            self._start(name, rows, self._epoch + 1)
            self._settle()
            self.device.after_step(results)

    def _start(self, name: str, rows: Rows, epoch: int) -> None:
        """Enqueue a step of that number, higher than any before."""
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
        self._epoch, self._started = epoch, self._cycles()
        self._header[[r.EPOCH, r.TOKENS, r.OUTPUTS]] = epoch, count, wanted
        try:
            self.device.before_step(self._told)
            self._under_way, self._deadline = program, time.monotonic() + PATIENCE
            if self._fast:
                loaded.run(count, wanted)
            else:
                self._run_parts(program, loaded, count, wanted)
        except UnitLost:
            raise
        except BaseException as error:
            self._off_word[0] = 1  # what was put there before it failed may still be running, and waits for nobody
            with suppress(UnitError):
                self.device.finish()
            self._under_way = None
            if isinstance(error, UnitError):
                raise UnitLost("gpu", str(error)) from None
            raise

    def _run_parts(self, program: Program, loaded: Loaded, count: int, wanted: int) -> None:
        """Enqueue what lies between meetings with other units; at each wait for the device, and post or look here."""
        first = 0
        for i in range(program.length):
            family = program.kernels[i]
            if family not in ("post", "wait") or i == program.length - 1:  # which is our own end
                continue
            if i > first:
                loaded.run(count, wanted, range(first, i))
                self.device.finish()
            flag = self.arena.base + int(program.words[i, r.OPERANDS + 1])
            if family == "post":
                self._post(flag, self._epoch)
            else:
                self._await_flag(flag, self._off)
            first = i + 1
        loaded.run(count, wanted, range(first, program.length))

    def settle(self) -> None:
        """Have nothing left in the queue: for who writes what kernels read, or reads what they write."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        if self._under_way is not None:
            self._join(self._under_way)
            self._record(self._started, r.Opcode.STEP, self._epoch)

    def _join(self, program: Program) -> None:
        """Wait for the flag; Python's signal handlers run between looks. A queue cannot be called off: what is in it
        runs on after an interrupt, and whoever comes next waits for it first."""
        self._await_flag(self.arena.base + program.done, self._never)
        self._under_way = None

    def _await_flag(self, flag: int, off: int) -> None:
        """Until it is posted, or the word at `off` is not 0."""
        counts, slice_cycles = self.arena.address(self.buffers.counts), int(LOOK * cycles_per_second())
        end = time.monotonic() + PATIENCE
        while not self._await(flag, self._epoch, off, self._rate, counts, slice_cycles):
            if off == self._off and self._off_word[0]:
                return
            if time.monotonic() > end:
                raise UnitLost("gpu", f"a step has not ended in {PATIENCE:.0f} seconds", hangs=True)

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
                if self._thread is not None:
                    self._thread.shutdown()
                self._programs.clear()
                self.device.close()
