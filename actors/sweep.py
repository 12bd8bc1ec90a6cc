"""Measuring a machine for its profile: flash by block, depth and span, and memory, read by all cores."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from coterie.actors.flash import FlashUnit
from coterie.errors import UnitError, UsageError
from coterie.kernels import library
from coterie.kernels import tape as t
from coterie.scheduler.profile import FlashProfile, FlashRow
from coterie.storage.arena import Arena
from coterie.storage.direct import open_direct
from coterie.storage.flash_buffers import lay_out_flash

BLOCKS = tuple(4096 << n for n in range(0, 11, 2))  # 4 KiB to 4 MiB
DEPTHS = (1, 2, 4, 8, 16, 32)
NEAR = 64 << 20  # bytes of the smaller span
LEAST_FILE = 64 << 20
LEAST_DEPTH = 4  # to be chosen
POINT = 0.15  # seconds of a measurement
LONGEST = 1.0  # seconds after which a slow one ends all the same
FINALISTS, TRIALS = 6, 4  # the fastest are measured again
SAME = 0.97  # of the highest rate is as good, if it needs smaller blocks or fewer in flight
READS = 1 << 14  # of a tape, which is gone through again and again
PAUSE = 0.02  # seconds
TURNS = 3  # times what is in flight: memory that is read into, as large as a model's ring on a fast disk
QUICK = 0.6  # seconds of a quick sweep, and its blocks and depths, those with fewer bytes in flight first
QUICK_WAYS = ((1 << 20, 4), (1 << 18, 16), (1 << 20, 8), (4 << 20, 4))

Way = tuple[str, int, int]  # engine, block, depth
Point = tuple[str, str, int, int, int]  # engine, pattern, block, depth, span
Progress = Callable[[str, int, int], None]


class Sweep:
    """Reads of one file, to find out how fast they are. A context manager.

    Raises UsageError where the file is too small or cannot be read directly, ModelError where not at all.
    """

    def __init__(self, path: Path | str) -> None:
        self.fd = open_direct(path)
        self.size = os.fstat(self.fd).st_size // BLOCKS[-1] * BLOCKS[-1]
        if self.size < LEAST_FILE:
            os.close(self.fd)
            raise UsageError(f"{path} is too small to measure with; give a file of {LEAST_FILE >> 20} MiB or more")
        most = BLOCKS[-1] * DEPTHS[-1]
        self._random = np.random.default_rng(1)
        self.arena = Arena({"weights": most, "flash": 4 << 20})
        self._memory = self.arena.allocate("weights", most, align=t.PAGE)
        self._buffers = lay_out_flash(self.arena, entries=READS, ring_bytes=0, depth=DEPTHS[-1], tracing=False)
        self.engines = [engine for engine in ("io_uring", "preadv") if self._has(engine)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)
        self.arena.close()

    def _has(self, engine: str) -> bool:
        try:
            self._unit(engine, 1, t.PAGE).close()
        except UnitError:
            return False
        return True

    def _unit(self, engine: str, depth: int, block: int) -> FlashUnit:
        return FlashUnit(
            self.arena, self._buffers, self.fd, depth=depth, block=block, ring=None, engine=engine, unchecked=True
        )

    def measure(self, point: Point, seconds: float) -> FlashRow:
        """Read for so long, after a little to get going, and go through what came as a model's lanes do: a disk whose
        driver copies into memory that other cores have just read can be slower by half. Raises UnitError where reading
        fails."""
        engine, pattern, block, depth, span = point
        unit = self._unit(engine, depth, block)
        try:
            unit.set_tape(self._tape(pattern, block, depth, span))
            reads, wall, cpu = _count_reads(unit, depth, seconds)
        finally:
            unit.close()
        return FlashRow(pattern, engine, block, depth, span, reads * block / wall, 1e6 * cpu / max(reads, 1))

    def _tape(self, pattern: str, block: int, depth: int, span: int) -> npt.NDArray[Any]:
        numbers = np.arange(READS)
        start = int(self._random.integers(0, self.size - span + 1)) // BLOCKS[-1] * BLOCKS[-1]
        if pattern == "random":
            places = self._random.integers(0, span // block, READS)
        else:
            places = (numbers + self._random.integers(0, span // block)) % (span // block)
        tape = np.zeros(READS, t.READ)
        tape["offset"], tape["nbytes"] = start + places * block, block
        slots = min(TURNS * depth, self._memory.nbytes // block)
        tape["address"] = self.arena.address(self._memory) + numbers % slots * block
        return tape

    def points(self) -> Iterator[Point]:
        """What a whole sweep measures: all with the first engine, and a few with the other one."""
        for block, depth in itertools.product(BLOCKS, DEPTHS):
            for pattern, span in (("sequential", self.size), ("random", self.size), ("random", NEAR)):
                if span == self.size or self.size > NEAR:
                    yield self.engines[0], pattern, block, depth, span
        for engine in self.engines[1:]:
            for block, depth in itertools.product(BLOCKS[3:], DEPTHS[2:4]):
                for pattern in ("sequential", "random"):
                    yield engine, pattern, block, depth, self.size

    def whole(self, progress: Progress = lambda *_: None) -> FlashProfile:
        """Measure all points, the best of them again, and choose. `progress` gets (label, points done, in all)."""
        points, rows, best = list(self.points()), list[FlashRow](), 0.0
        for done, point in enumerate(points):
            progress("measuring flash", done, len(points))
            _, _, block, depth, _ = point
            if best == 0 or block * depth < best * LONGEST / 2:  # a slow disk needs no megabytes in flight
                rows.append(self.measure(point, POINT))
                best = max(best, rows[-1].bytes_per_s)
        rates: dict[Way, list[float]] = {}
        for row in rows:
            if row.span == self.size:
                rates.setdefault((row.engine, row.block, row.depth), []).append(row.bytes_per_s)
        # Reads of a model are often smaller than the block, so a few must be in flight.
        rates = {way: found for way, found in rates.items() if way[2] >= LEAST_DEPTH}
        finalists = sorted(rates, key=lambda way: -statistics.mean(rates[way]))[:FINALISTS]
        again: dict[Way, list[float]] = {way: [] for way in finalists}
        for trial, (engine, block, depth) in itertools.product(range(TRIALS), finalists):
            progress("measuring the fastest again", trial, TRIALS)
            pattern = ("sequential", "random")[trial % 2]
            row = self.measure((engine, pattern, block, depth, self.size), POINT)
            again[engine, block, depth].append(row.bytes_per_s)
        return _chosen({way: statistics.median(found) for way, found in again.items()}, rows, quick=False)

    def quick(self, seconds: float = QUICK) -> FlashProfile:
        """A few large blocks, in about so much time."""
        end, rows = time.perf_counter() + seconds, list[FlashRow]()
        for block, depth in QUICK_WAYS:
            share = seconds / len(QUICK_WAYS) / 2  # the other half is for getting going
            if not rows or time.perf_counter() + 2 * share < end:
                rows.append(self.measure((self.engines[0], "random", block, depth, self.size), share))
        return _chosen({(row.engine, row.block, row.depth): row.bytes_per_s for row in rows}, rows, quick=True)


def _count_reads(unit: FlashUnit, depth: int, seconds: float) -> tuple[int, float, float]:
    """Go through the tape again and again; returns reads that arrived, and the seconds and processor seconds they
    took, from one arrival to another."""
    end = unit.begin(0, READS, ahead=(0, READS)) + READS
    begun = time.perf_counter()
    unit.wait(depth, LONGEST)
    first, at, cpu = unit.arrived_count(), time.perf_counter(), time.process_time()
    while True:
        time.sleep(min(seconds, PAUSE))  # who waits for each arrival takes processor time from the lane
        if unit.arrived_count() >= end:
            end = unit.begin(0, READS, ahead=(0, READS)) + READS
        now, late = time.perf_counter(), time.perf_counter() - begun > LONGEST
        if late or (now - at >= seconds and unit.arrived_count() - first >= 2 * depth):
            break
    unit.wait(unit.arrived_count() + 1, LONGEST)
    if failure := unit.failure():
        raise UnitError(f"measuring flash failed: {failure.reason}")
    return unit.arrived_count() - first, time.perf_counter() - at, time.process_time() - cpu


def _chosen(rates: dict[Way, float], rows: list[FlashRow], *, quick: bool) -> FlashProfile:
    """The fastest way, or one as good that has fewer bytes in flight."""
    enough = SAME * max(rates.values())
    good = [way for way, rate in rates.items() if rate >= enough]
    engine, block, depth = min(good, key=lambda way: (way[1] * way[2], way[1], way[0]))
    return FlashProfile(engine, block, depth, rates[engine, block, depth], quick, tuple(rows))


def quick_flash(path: Path | str, seconds: float = QUICK) -> FlashProfile:
    """How the file system of a file of 64 MiB or more is read fastest, found in about `seconds` (a little more where
    the disk is slow). Raises as Sweep and Sweep.measure."""
    with Sweep(path) as sweep:
        return sweep.quick(seconds)


def memory_bandwidth(threads: int | None = None, nbytes: int = 128 << 20, trials: int = 9) -> float:
    """Bytes/s that so many threads (by default one per usable core) read together, `nbytes` each: a median."""
    count = threads or len(os.sched_getaffinity(0))
    arena = Arena({"weights": count * nbytes})
    memory = arena.numpy(arena.allocate("weights", (count, nbytes)))
    memory[:] = 1
    read = library.function("checksum", 2)
    rates = []
    with ThreadPoolExecutor(count) as pool:
        for _ in range(trials):
            start = time.perf_counter()
            list(pool.map(lambda part: read(part.ctypes.data, nbytes), memory))
            rates.append(count * nbytes / (time.perf_counter() - start))
    arena.close()
    return statistics.median(rates)
