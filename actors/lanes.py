"""The CPU unit's lanes: threads of compiled code, in the process where the unit's host keeps them."""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt

from coterie.errors import UnitError
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.unit import CONTROL_LINES, ENDED

NAP = 50_000_000  # nanoseconds after which a sleeper looks around
IDLE_SPIN = 0.0005  # seconds a lane spins for the next step: longer than Python needs between two tokens


@cache
def cycles_per_second() -> float:
    """The rate of the cycle counter, measured for some milliseconds."""
    cycles = library.function("lane_cycles", 0)
    count, start = cycles(), time.perf_counter()
    while time.perf_counter() - start < 0.005:
        pass
    return (cycles() - count) / (time.perf_counter() - start)


@contextmanager
def only_on(cores: Collection[int]) -> Iterator[None]:
    """Have threads that are started meanwhile keep to these cores (none: to what they may)."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Lanes:
    """Lanes `first` to `lanes` - 1, which serve steps after number `seen` until the header says that they leave.
    `header`, `steps`, `control`: as in UnitBuffers. They are pinned to cores where there is one for each."""

    def __init__(
        self,
        arena: Arena,
        *,
        header: BufferRef,
        steps: BufferRef,
        control: BufferRef,
        first: int,
        lanes: int,
        seen: int,
    ) -> None:
        copies, _ = steps.shape
        if not 0 <= first <= lanes <= copies - 1 or control.shape != (CONTROL_LINES + lanes, r.LINE // 8):
            raise UnitError(f"lanes {first} to {lanes} do not fit their buffers")
        self.arena, self.threads = arena, list[threading.Thread]()
        cores = sorted(os.sched_getaffinity(0))
        spinning = lanes <= len(cores)  # more spinners than cores would only hold each other up
        idle = int(IDLE_SPIN * cycles_per_second()) if spinning else 0
        worker, lines = library.function("lane_worker", 7), arena.numpy(control)
        go = arena.address(control)
        for lane in range(first, lanes):
            step = arena.address(steps) + lane * r.HEADER_BYTES
            call = arena.address(header), step, lane, go, go + (CONTROL_LINES + lane) * r.LINE, seen, idle
            line = lines[CONTROL_LINES + lane]
            line[ENDED] = 0
            serve = line, worker, call, cores[lane] if spinning else None
            self.threads.append(threading.Thread(target=_serve, args=serve, name=f"coterie-lane-{lane}", daemon=True))
        for thread in self.threads:
            thread.start()

    def load(self, table: BufferRef, kernels: list[str]) -> None:
        """Put this process's addresses of kernels into a program's records, which have their numbers in `kernels`."""
        addresses = np.array([library.address(name) for name in kernels], np.int64)
        words = self.arena.numpy(table)
        numbers = words[:, r.KERNEL]
        if table.shape[1:] != (r.WORDS,) or not 0 <= numbers.min() <= numbers.max() < len(kernels):
            raise UnitError("a program's records do not name their kernels")
        numbers[:] = addresses[numbers]

    def close(self) -> None:
        """Wait for lanes that have been told to leave."""
        for thread in self.threads:
            thread.join()


def _serve(line: npt.NDArray[np.int64], worker: Callable[..., int], call: tuple[int, ...], core: int | None) -> None:
    """A lane's thread: pinned to its core if there are enough, and never back in Python until the end. Meanwhile it
    holds a view of the arena's memory."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    worker(*call)
    line[ENDED] = 1
