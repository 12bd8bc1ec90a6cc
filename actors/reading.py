"""A reading unit's lane: a thread of compiled code, its readers or its io_uring, where the unit's host keeps it."""

import ctypes
import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.actors.uring import Uring
from coterie.errors import UnitError, UsageError
from coterie.kernels import library
from coterie.kernels import tape as t
from coterie.storage.arena import Arena, BufferRef

ENGINES = ("io_uring", "preadv")
LANES = ("flash_lane", "neuron_lane")
DEEPEST = 4096  # reads in flight
READERS = 8  # threads of "preadv" at most
LAST_WAIT = 2.0  # seconds that close waits for a disk that does not answer
SLICE_NANOSECONDS = 100_000  # of processor time: the shortest slice there is
SCHED_SETATTR = 274 if platform.machine() == "aarch64" else 314


class ReadingLane:
    """Serves `control` (a control block as in tape.py, filled by the unit but for what is this process's) with the
    kernel `lane`, which is called with the address of that and of `more`.

    file: a process and its descriptor, of which the lane takes a duplicate; engine: "io_uring", "preadv" or None, the
    first that works; depth: reads in flight; reader: address of a function in place of pread. Raises UnitError,
    UsageError.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        lane: str,
        control: BufferRef,
        more: Sequence[BufferRef] = (),
        file: Sequence[int],
        engine: str | None,
        depth: int,
        reader: int = 0,
    ) -> None:
        if lane not in LANES or control.nbytes != 8 * t.CONTROL_WORDS or not 1 <= depth <= DEEPEST:
            raise UnitError(f"there is no lane {lane!r:.40} with {depth} reads in flight")
        words: npt.NDArray[np.int64] = arena.numpy(control)
        fd = _duplicate(*file)
        try:
            uring = _set_up(engine, depth, reader)
        except BaseException:
            os.close(fd)
            raise
        self.engine = "preadv" if uring is None else "io_uring"
        self.readers = min(depth, READERS) if uring is None else 0
        words[[t.FD, t.READERS, t.ENDED]] = fd, self.readers, 0
        if uring is None:
            words[t.READER] = reader or library.address("flash_pread")
        else:
            for word, value in uring.words.items():
                words[word] = value
        call = library.function(f"{lane}:{self.engine}", 1 + len(more))
        addresses = tuple(arena.address(ref) for ref in (control, *more))
        name = "coterie-" + lane.removesuffix("_lane")
        serve = words, call, addresses, fd, uring
        self.threads = [threading.Thread(target=_serve, args=serve, name=name, daemon=True)]
        read = words, library.function("flash_reader", 1), addresses[0]
        for i in range(self.readers):
            self.threads.append(threading.Thread(target=_read, args=read, name=f"{name}-{i}", daemon=True))
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Wait a little for a lane that has been told to leave."""
        end = time.monotonic() + LAST_WAIT
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))


def _duplicate(pid: int, fd: int) -> int:
    """A descriptor of a file that a process has open; of another one's, opened anew, which is the same file whatever
    has happened to its name. Raises UnitError."""
    if pid == os.getpid():
        return os.dup(fd)
    folder = f"/proc/{pid}"
    try:
        with open(f"{folder}/fdinfo/{fd}", encoding="ascii") as lines:
            flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
        return os.open(f"{folder}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | flags & os.O_DIRECT)
    except OSError as error:
        raise UnitError(f"cannot open the model's file through {folder}: {error.strerror}") from None


def _set_up(engine: str | None, depth: int, reader: int) -> Uring | None:
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


def _serve(
    memory: npt.NDArray[np.int64], lane: Callable[..., int], addresses: tuple[int, ...], fd: int, uring: Uring | None
) -> None:
    """The lane's thread. While it runs, it holds a view of the arena's memory; then it closes what only it uses."""
    _be_prompt()
    lane(*addresses)
    if uring is not None:
        uring.close()
    os.close(fd)
    memory[t.ENDED] = 1


def _be_prompt() -> None:
    """Ask the scheduler for short slices for this thread: it then gets a core soon after a read has landed, though
    lanes keep all cores busy. Linux 6.12 and later do this for anybody; others take no notice."""
    attributes = struct.pack("<IIQiIQQQ", 48, 0, 0, 0, 0, SLICE_NANOSECONDS, 0, 0)
    ctypes.CDLL(None).syscall(SCHED_SETATTR, 0, attributes, 0)


def _read(memory: npt.NDArray[np.int64], reader: Callable[[int], Any], control: int) -> None:
    """A reader's thread, which holds such a view as well."""
    reader(control)
