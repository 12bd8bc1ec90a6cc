"""Measuring how units meet, for the device profile: flags, copies, and memory that they read at the same time."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from coterie.actors.lanes import NAP, cycles_per_second
from coterie.kernels import library
from coterie.storage.arena import Arena

READING, TRIALS = 0.15, 3  # seconds of reading, how often
HANDS = 100  # hand-overs
GAP = 0.0005  # seconds between two
COPIES = 20


def hand_over() -> float:
    """Seconds until a thread that waits for another one's flag, as units do, has seen it: a median."""
    arena = Arena({"state": 4096})
    lines = arena.allocate("state", (3, 8), np.int64)
    flag, never, counts = (arena.address(lines) + 64 * i for i in range(3))
    wait, post, cycles = (library.function(f"lane_{name}", n) for name, n in (("await", 6), ("post", 2), ("cycles", 0)))
    rate, seen, posted = max(1, int(cycles_per_second() / 1e6)), list[int](), list[int]()

    def look() -> None:
        for number in range(1, HANDS + 1):
            while not wait(flag, number, never, rate, counts, NAP):
                pass
            seen.append(cycles())

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(1, HANDS + 1):
        time.sleep(GAP)
        posted.append(cycles())
        post(flag, number)
    thread.join()
    arena.close()
    late = [(s - p) / cycles_per_second() for s, p in zip(seen, posted, strict=True)]
    return max(statistics.median(late), 1e-9)


def copying(rows: int, width: int) -> float:
    """Bytes/s of copying float32[rows][width]: a median."""
    source, to, seconds = np.ones((rows, width), np.float32), np.empty((rows, width), np.float32), list[float]()
    for _ in range(COPIES):
        begun = time.perf_counter()
        np.copyto(to, source)
        seconds.append(time.perf_counter() - begun)
    return source.nbytes / statistics.median(seconds)


def reading(readers: Sequence[Callable[[], int]]) -> float:
    """Bytes/s that these units read from memory at the same time: the best of a few times, since what other programs
    read is taken from it."""
    ready = threading.Barrier(len(readers))
    for read in readers:
        read()  # what is built at a first run

    def measure(read: Callable[[], int]) -> float:
        ready.wait()
        begun, nbytes = time.perf_counter(), 0
        while time.perf_counter() < begun + READING:
            nbytes += read()
        return nbytes / (time.perf_counter() - begun)

    with ThreadPoolExecutor(len(readers)) as pool:
        return max(sum(pool.map(measure, readers)) for _ in range(TRIALS))
