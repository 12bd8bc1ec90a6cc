"""The flash unit: one thread of compiled code that reads weights from the flash file into the arena."""

import ctypes
import fcntl
import os
import platform
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coterie.actors.cpu import NAP, cycles_per_second
from coterie.actors.uring import Uring
from coterie.errors import ModelError, UnitError, UsageError
from coterie.kernels import library
from coterie.kernels import tape as t
from coterie.storage.arena import Arena, BufferRef
from coterie.storage.flash_buffers import REGION, TRACE_EVENTS, WINDOW, FlashBuffers

ENGINES = ("io_uring", "preadv")
READERS = 8  # threads of "preadv" at most
PATIENCE = 30.0  # seconds without a read that was asked for: then the disk counts as dead
SLICE = 0.1  # seconds after which a wait looks for signals
SLICE_NANOSECONDS = 100_000  # of processor time: the shortest slice there is
SCHED_SETATTR = 274 if platform.machine() == "aarch64" else 314
LAST_WAIT = 2.0  # seconds that close waits for a disk that does not answer
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
    """Reads the file `fd` (a duplicate of it) into `arena`; `buffers` are its own.

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
    ) -> None:
        if not 1 <= depth <= buffers.slots.shape[0] // WINDOW or block < t.PAGE:
            raise UsageError(f"a flash unit cannot have depth {depth} and blocks of {block} bytes")
        self.arena, self.buffers, self.depth, self.block, self.ring = arena, buffers, depth, block, ring
        self.patience = patience
        self._control: npt.NDArray[np.int64] = arena.numpy(buffers.control)
        self._address = arena.address(buffers.control)
        self._tape: npt.NDArray[Any] = arena.numpy(buffers.tape).reshape(-1).view(t.READ)
        self._owners: npt.NDArray[np.int64] = arena.numpy(buffers.owners)
        self._entries = 0
        self._wait, self._cycles = library.function("flash_wait", 5), library.function("lane_cycles", 0)
        self._announce = library.function("flash_announce", 2)
        self._lock = threading.Lock()
        self._closed = False
        uring = set_up_engine(engine, depth, reader)
        self.engine = "preadv" if uring is None else "io_uring"
        readers = min(depth, READERS) if uring is None else 0
        fd = os.dup(fd)
        self._direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._file_bytes = os.fstat(fd).st_size
        self._fill_control(fd, abort, reader, readers, uring)
        self._control[t.UNCHECKED] = unchecked
        lane = library.function(f"flash_lane:{self.engine}", 1)
        self._threads = lane_threads("coterie-flash", self._control, lane, (self._address,), fd, uring, readers)
        self._stop = weakref.finalize(self, _stop_lane, self._control, self._announce, self._threads)
        for thread in self._threads:
            thread.start()

    def _fill_control(self, fd: int, abort: int | None, reader: int | None, readers: int, uring: Uring | None) -> None:
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
            t.FD: fd,
            t.ABORT: abort or self._address + 8 * t.NOBODY,
            t.NAP: self._address + 8 * t.SECONDS,
            t.NANOSECONDS: NAP,
            t.READERS: readers,
        }
        if self.ring is not None:
            if self.ring.offset % t.PAGE or self.ring.nbytes % t.PAGE or self.ring.nbytes // t.PAGE > self._owners.size:
                raise UsageError(f"a ring of {self.ring.nbytes} bytes does not fit this flash unit")
            words |= {t.RING: arena.address(self.ring), t.RING_BYTES: self.ring.nbytes}
        if buffers.trace is not None:
            arena.numpy(buffers.trace)[:, 8:16].view(np.int64)[:] = TRACE_EVENTS
            words[t.TRACE] = arena.address(buffers.trace)
        if uring is None:
            words[t.READER] = reader or library.address("flash_pread")
        else:
            words |= uring.words
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
        threads = f"{len(self._threads) - 1} threads with " if self.engine == "preadv" else ""
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
        if not self._threads[0].is_alive():
            failure = self.failure()
            raise UnitError(f"the flash unit has stopped: {failure.reason if failure else 'its lane has ended'}")

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


def set_up_engine(engine: str | None, depth: int, reader: int | None) -> Uring | None:
    """A ring, or None for readers."""
    if engine not in (None, *ENGINES) or (engine == "io_uring" and reader):
        raise UsageError(f"there is no flash engine {engine} here; there are {', '.join(ENGINES)}")
    if engine == "preadv" or reader:
        return None
    try:
        return Uring(depth)
    except OSError as error:
        if engine == "io_uring":
            raise UnitError(f"io_uring cannot be used here: {error.strerror or error}") from None
        return None


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


def lane_threads(
    name: str,
    control: npt.NDArray[np.int64],
    lane: Callable[..., int],
    arguments: tuple[int, ...],
    fd: int,
    uring: Uring | None,
    readers: int,
) -> list[threading.Thread]:
    """The lane's thread, and those of its readers, which work on `control`, the first of the lane's `arguments`."""
    serve = control, lane, arguments, fd, uring
    threads = [threading.Thread(target=_serve, args=serve, name=name, daemon=True)]
    for i in range(readers):
        read = control, library.function("flash_reader", 1), arguments[0]
        threads.append(threading.Thread(target=_read, args=read, name=f"{name}-{i}", daemon=True))
    return threads


def _serve(
    memory: npt.NDArray[np.int64], lane: Callable[..., int], arguments: tuple[int, ...], fd: int, uring: Uring | None
) -> None:
    """The lane's thread. While it runs, it holds a view of the arena's memory; then it closes what only it uses."""
    _be_prompt()
    lane(*arguments)
    if uring is not None:
        uring.close()
    os.close(fd)


def _be_prompt() -> None:
    """Ask the scheduler for short slices for this thread: it then gets a core soon after a read has landed, though
    lanes keep all cores busy. Linux 6.12 and later do this for anybody; others take no notice."""
    attributes = struct.pack("<IIQiIQQQ", 48, 0, 0, 0, 0, SLICE_NANOSECONDS, 0, 0)
    ctypes.CDLL(None).syscall(SCHED_SETATTR, 0, attributes, 0)


def _read(memory: npt.NDArray[np.int64], reader: Callable[[int], int], control: int) -> None:
    """A reader's thread, which holds such a view as well."""
    reader(control)


def _stop_lane(control: npt.NDArray[np.int64], announce: Callable[..., int], threads: list[threading.Thread]) -> None:
    """Tell the lane to leave, and wait a little."""
    _announce(announce, control, (0, 0, 0, 0), True, stop=True)
    end = time.monotonic() + LAST_WAIT
    for thread in threads:
        if thread.is_alive():  # an interrupt may have come before all were started
            thread.join(max(0.0, end - time.monotonic()))
