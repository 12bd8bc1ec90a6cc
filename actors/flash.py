"""The flash unit: one lane of compiled code that reads weights from the flash file into the arena."""

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coterie.actors.host import Actor, ThreadActor, UnitLost
from coterie.actors.lanes import NAP, cycles_per_second
from coterie.errors import ModelError, UnitError, UsageError
from coterie.kernels import library
from coterie.kernels import tape as t
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.flash_buffers import REGION, TRACE_EVENTS, WINDOW, FlashBuffers

PATIENCE = 30.0  # seconds without a read that was asked for: then the disk counts as dead
SLICE = 0.1  # seconds after which a wait looks for signals
LARGEST = 1 << 30  # bytes of one read
CODES = {t.IO: "io", t.SHORT: "short", t.CHECKSUMS: "checksum", t.ENGINE: "engine"}


class ReadFailure(NamedTuple):
    """Why reading ended: code is "io", "short", "checksum" or "engine"; the position is of the tape; errno, or 0."""

    code: str
    position: int
    errno: int

    @property
    def reason(self) -> str:
        if self.code == "short":
            return "the file ends too early; it has been cut"
        if self.code == "checksum":
            return "what was read has a wrong checksum; the file or the disk is damaged"
        return ("io_uring: " if self.code == "engine" else "") + os.strerror(self.errno)


class FlashUnit:
    """Reads the file `fd` into `arena`; `buffers` are its own. Its lane lives in `actor` (by default, a thread of this
    process), which takes a duplicate of `fd`, now and when it is revived.

    depth: requests in flight; block: bytes up to which neighbours are read as one; ring: memory that is used again and
    again, and is written only when the reads there before are freed; abort: address of a word that is set to 1
    when reading has failed; engine: "io_uring" or "preadv", by default the first that works; patience: seconds that
    `begin` and `halt` wait for reads in flight; reader: address of a function (fd, address, nbytes, offset) -> bytes
    read or -errno, in place of pread; unchecked: do not compare checksums, for measuring.
    """

    def __init__(
        self,
        arena: Arena,
        buffers: FlashBuffers,
        fd: int,
        *,
        depth: int,
        block: int,
        ring: BufferRef | None,
        abort: int | None = None,
        engine: str | None = None,
        patience: float = PATIENCE,
        reader: int | None = None,
        unchecked: bool = False,
        actor: Actor | None = None,
    ) -> None:
        if not 1 <= depth <= buffers.slots.shape[0] // WINDOW or block < t.PAGE:
            raise UsageError(f"a flash unit cannot have depth {depth} and blocks of {block} bytes")
        self.arena, self.buffers, self.depth, self.block, self.ring = arena, buffers, depth, block, ring
        self.patience, self.actor = patience, actor or ThreadActor(arena)
        self._control: npt.NDArray[np.int64] = arena.numpy(buffers.control)
        self._address = arena.address(buffers.control)
        self._tape: npt.NDArray[Any] = arena.numpy(buffers.tape).reshape(-1).view(t.READ)
        self._owners: npt.NDArray[np.int64] = arena.numpy(buffers.owners)
        self._entries = 0
        self._wait, self._cycles = library.function("flash_wait", 5), library.function("lane_cycles", 0)
        self._announce = library.function("flash_announce", 2)
        self._lock = threading.Lock()
        self._closed = False
        self._direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._file_bytes = os.fstat(fd).st_size
        self._abort, self._unchecked = abort, unchecked
        self._wanted = {"file": (os.getpid(), fd), "engine": engine, "depth": depth, "reader": reader or 0}
        self._open_lane()

    def _open_lane(self) -> None:
        """Have a lane, with nothing announced and no read in flight."""
        self._fill_control()
        self._stop = weakref.finalize(self, _stop_lane, os.getpid(), self._control, self._announce, self.actor)
        found = self.actor.open("flash", lane="flash_lane", control=self.buffers.control, **self._wanted)
        self.engine, self._readers = str(found["engine"]), int(found["readers"])

    def revive(self, actor: Actor) -> None:
        """Go on with the lane of another actor, after `fence` of this one, or with another of this one, where it has
        ended. What was in the ring is lost: reads of the lost lane may land there as long as the disk likes. Raises
        UnitError where a lane of this process does not leave."""
        with self._lock:
            self._stop()
            if self.actor.lost() is None and not self._control[t.ENDED]:
                raise UnitError("the flash unit's lane does not leave; its disk does not answer")
            if self.ring is not None:
                self.arena.discard(self.ring.region)
            self.actor = actor
            self._open_lane()

    def _fill_control(self) -> None:
        arena, buffers, control = self.arena, self.buffers, self._control
        control[:] = 0
        self._owners[:] = 0
        words = {
            t.TAPE: arena.address(buffers.tape),
            t.SLOTS: arena.address(buffers.slots),
            t.QUEUE: arena.address(buffers.queue),
            t.OWNERS: arena.address(buffers.owners),
            t.SLOT_COUNT: WINDOW * self.depth,
            t.DEPTH: self.depth,
            t.BLOCK: self.block,
            t.ABORT: self._abort or self._address + 8 * t.NOBODY,
            t.NAP: self._address + 8 * t.SECONDS,
            t.NANOSECONDS: NAP,
            t.ENDED: 1,  # until it runs
            t.UNCHECKED: int(self._unchecked),
        }
        if self.ring is not None:
            if self.ring.offset % t.PAGE or self.ring.nbytes % t.PAGE or self.ring.nbytes // t.PAGE > self._owners.size:
                raise UsageError(f"a ring of {self.ring.nbytes} bytes does not fit this flash unit")
            words |= {t.RING: arena.address(self.ring), t.RING_BYTES: self.ring.nbytes}
        if buffers.trace is not None:
            arena.numpy(buffers.trace)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            words[t.TRACE] = arena.address(buffers.trace)
        for word, value in words.items():
            control[word] = value

    # --- what the engine tells it -----------------------------------------------------------------------

    @property
    def arrived(self) -> int:
        """Address of the flag ARRIVED."""
        return self._address + t.ARRIVED

    @property
    def freed(self) -> int:
        """Address of the flag FREED."""
        return self._address + t.FREED

    def set_tape(self, entries: npt.NDArray[Any]) -> None:
        """Halt, and work on a copy of these reads (tape.READ[n]) from now on. Raises UnitError where one does not
        lie in whole pages of the arena, ModelError where one lies outside of the file."""
        if entries.dtype != t.READ or entries.ndim != 1 or entries.size > self._tape.size:
            raise UnitError(f"a tape must be up to {self._tape.size} reads")
        self._check_tape(entries)
        self.halt()
        self._tape[: entries.size] = entries
        self._entries = entries.size
        self._owners[:] = 0

    def set_block(self, block: int) -> None:
        """Halt, and read neighbours as one up to so many bytes from now on."""
        self.halt()
        self.block = self._control[t.BLOCK] = block

    def begin(self, first: int, end: int, ahead: tuple[int, int] = (0, 0), redirect: bool = False) -> int:
        """Announce a step that consumes positions first..end-1, and what is expected after it. No step may be running.

        If the reads under way are not the announced ones, or `redirect`, they are dropped. Returns the sequence
        number that position 0 would have. Raises UnitError when the unit is closed, its engine broke down, or the disk
        does not answer.
        """
        if not (0 <= first <= end <= self._entries and 0 <= ahead[0] <= ahead[1] <= self._entries):
            raise UnitError(f"positions {first}..{end}, {ahead[0]}..{ahead[1]} of a tape of {self._entries} reads")
        with self._lock:
            self._check_alive()
            failed = bool(self._control[t.FAILED])
            seq = _announce(self._announce, self._control, (first, end, *ahead), redirect or failed)
            if failed:  # until the lane has left the failure behind, it may end the step that is about to begin
                self._wait_taken()
        return seq - first

    def halt(self) -> None:
        """Announce nothing, and come back when no read is in flight. A KeyboardInterrupt is possible meanwhile.
        Raises UnitError when the disk does not answer."""
        with self._lock:
            self._check_alive()
            _announce(self._announce, self._control, (0, 0, 0, 0), True)
            self._wait_taken()

    def wait(self, seq: int, slice_seconds: float = SLICE) -> bool:
        """Whether all reads before `seq` have arrived; waits for up to about that long, not after a failure."""
        return self._wait_flag(t.ARRIVED, seq, t.FAILED, slice_seconds)

    def close(self) -> None:
        """Stop the lane; a second call does nothing. A disk that does not answer is not waited for longer than 2 s."""
        self._closed = True  # which ends waits of other threads
        with self._lock:
            self._stop()

    # --- what it tells ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        way = "O_DIRECT" if self._direct else "buffered"
        threads = f"{self._readers} threads with " if self._readers else ""
        return {
            "unit": "flash",
            "runtime": f"{threads}{self.engine}, {way}",
            "engine": self.engine,
            "block": self.block,
            "depth": self.depth,
            "real": True,
        }

    @property
    def in_flight(self) -> int:
        """Requests that the disk has not answered yet."""
        return int(self._control[t.IN_FLIGHT])

    @property
    def bytes_read(self) -> int:
        """Bytes that arrived since the unit was made."""
        return int(self._control[t.BYTES])

    def arrived_count(self) -> int:
        """The sequence number up to which everything has arrived."""
        return int(self._control[t.ARRIVED // 8])

    def failure(self) -> ReadFailure | None:
        """Why reading ended, until the next announcement."""
        code = int(self._control[t.FAILED])
        if code == 0:
            return None
        return ReadFailure(CODES[code], int(self._control[t.FAILED_POSITION]), int(self._control[t.FAILED_ERRNO]))

    def counters(self) -> dict[str, float]:
        """Since the unit was made: bytes that arrived, requests, retries, naps (times it went to sleep), seconds with a
        request in flight (busy), without one because memory was not free (blocked), and checking sums (checking)."""
        seconds = {"busy": t.BUSY, "blocked": t.BLOCKED, "checking": t.CHECKING}
        counts = {"bytes": t.BYTES, "requests": t.REQUESTS, "retries": t.RETRIES, "naps": t.NAPS}
        return {name: float(self._control[word]) for name, word in counts.items()} | {
            name: float(self._control[word]) / cycles_per_second() for name, word in seconds.items()
        }

    # --- details ----------------------------------------------------------------------------------------

    def _check_tape(self, entries: npt.NDArray[Any]) -> None:
        offsets, addresses, sizes = entries["offset"], entries["address"], entries["nbytes"]
        if ((offsets | addresses | sizes) % t.PAGE).any() or (sizes <= 0).any() or (sizes > LARGEST).any():
            raise UnitError("a read of the tape is not of whole pages")
        places, base = addresses - self.arena.base, self.arena.base
        own, ring = self.arena.regions[REGION], self.ring
        inside = (places >= 0) & (places <= self.arena.size - sizes)
        inside &= (places + sizes <= own.offset) | (places >= own.offset + own.size)
        if ring is not None:
            start, end = ring.offset, ring.offset + ring.nbytes
            inside &= (places + sizes <= start) | (places >= end) | ((places >= start) & (places + sizes <= end))
        if not inside.all():
            position = int(np.argmin(inside))
            raise UnitError(f"read {position} of the tape lies at {addresses[position] - base}, outside of its memory")
        if ((offsets < 0) | (offsets > self._file_bytes - sizes)).any():
            raise ModelError(f"the file has {self._file_bytes} bytes, fewer than its reads need; it has been cut")

    def _check_alive(self) -> None:
        if self._closed:
            raise UnitError("this model has been closed")
        self.check()

    def check(self) -> None:
        """Raise UnitLost where the actor, or its lane, has gone."""
        reason = self.actor.lost()
        if reason is None and self._control[t.ENDED]:
            failure = self.failure()
            reason = failure.reason if failure else "its lane has ended"
        if reason is not None:
            raise UnitLost("flash", reason)

    def _wait_flag(self, flag: int, value: int, end: int, seconds: float) -> bool:
        deadline = self._cycles() + int(seconds * cycles_per_second())
        nap = self._address + 8 * t.SECONDS
        return bool(self._wait(self._address + flag, value, self._address + 8 * end, nap, deadline))

    def _wait_taken(self) -> None:
        end = time.monotonic() + self.patience
        while not self._wait_flag(t.TAKEN, int(self._control[t.NUMBER]), t.NEVER, SLICE):
            self._check_alive()
            if time.monotonic() > end:
                raise UnitError(f"the disk has not answered for {self.patience:.0f} seconds")


def _announce(
    call: Callable[..., int],
    control: npt.NDArray[np.int64],
    ranges: tuple[int, ...],
    redirect: bool,
    stop: bool = False,
) -> int:
    """Publish the next announcement; returns the sequence number of its first position."""
    source = control[: t.ANNOUNCEMENT].copy()
    first, end, ahead, ahead_end = (int(n) for n in source[t.FIRST : t.STOP])
    source[t.NUMBER] += 1
    source[t.SEQ] += end - first
    if redirect or not _continues((ahead, ahead_end), ranges):
        source[t.SEQ] += ahead_end - ahead
        source[t.REDIRECTS] += 1
    source[t.FIRST : t.STOP] = ranges
    source[t.STOP] = stop
    call(control.ctypes.data, source.ctypes.data)
    return int(source[t.SEQ])


def _continues(expected: tuple[int, int], ranges: tuple[int, ...]) -> bool:
    """Whether the new ranges begin with what was expected, so that reads issued already stay valid."""
    at, stop = expected
    for first, end in (ranges[:2], ranges[2:]):
        if at < stop and first < end:
            if first != at:
                return False
            at = min(end, stop)
    return at == stop


def _stop_lane(maker: int, control: npt.NDArray[np.int64], announce: Callable[..., int], actor: Actor) -> None:
    """Tell the lane to leave, and wait a little."""
    if os.getpid() != maker:
        return  # a fork's copy of the unit is no unit
    _announce(announce, control, (0, 0, 0, 0), True, stop=True)
    actor.close("flash")
