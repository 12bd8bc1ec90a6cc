"""Flags from Python, and waiting for a moment: what units that only act as if they took their time are made of."""

import time

import numpy as np

from coterie.actors.lanes import NAP
from coterie.kernels import library
from coterie.kernels import record as r
from coterie.storage.arena import Arena, BufferRef

SPUN = 150e-6  # seconds before a moment in which a thread polls: sleeping ends that much too late at worst


class Flags:
    """Counters in an arena's flag lines (docs/flags.md), posted and awaited by one thread of Python."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._begin, self._watch = library.function("lane_begin", 3), library.function("lane_watch", 4)
        # Publishing a step's header posts a flag with the header's epoch: here nobody reads the header.
        self._header, self._source = np.zeros(r.HEADER_WORDS, np.int64), np.zeros(r.HEADER_WORDS, np.int64)
        self._nap = np.array([0, NAP], np.int64)

    def post(self, flag: BufferRef, value: int) -> None:
        """Set a flag, and wake who sleeps on it."""
        self._source[r.EPOCH] = value
        self._begin(self._header.ctypes.data, self._source.ctypes.data, self.arena.address(flag))

    def reached(self, flag: BufferRef, value: int) -> bool:
        """Whether a flag comes to `value` before a nap is over."""
        return bool(self._watch(self.arena.address(flag), value, 0, self._nap.ctypes.data))


def wait_until(moment: float) -> None:
    """Come back at that time of time.perf_counter(), or at once where it is over: asleep, but for the last moments."""
    left = moment - time.perf_counter()
    if left > SPUN:
        time.sleep(left - SPUN)
    while time.perf_counter() < moment:
        pass
