"""Disks that fail in chosen ways: engines whose reads go through Python."""

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packed_models import streaming

from coterie import stream
from coterie.actors.flash import FlashUnit
from coterie.engine import Engine
from coterie.kernels import library
from coterie.scheduler import planner
from coterie.scheduler.profile import FlashChoice

Reader = Callable[[int, int, int, int], int]
PREAD = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


KEPT: list[object] = []  # a thread that hangs in a reader may outlive the test
LIBC = ctypes.CDLL(None)
LIBC.pread.argtypes, LIBC.pread.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long], ctypes.c_long


def honest(fd: int, address: int, nbytes: int, offset: int) -> int:
    return int(LIBC.pread(fd, address, nbytes, offset))


@contextmanager
def faulty(path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, share: float | None = 0.3) -> Iterator[Engine]:
    """An engine that reads what is streamed through `reader(fd, address, bytes, offset)`."""
    function = PREAD(reader)
    KEPT.append(function)
    address = ctypes.cast(function, ctypes.c_void_p).value
    monkeypatch.setattr(stream, "FlashUnit", functools.partial(FlashUnit, reader=address))
    with streaming(path, share) as engine:
        yield engine


def use_reader(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all reads of engines made from now on go through `reader(fd, address, bytes, offset)`."""
    function = PREAD(reader)
    KEPT.append(function)
    address, own = library.address, ctypes.cast(function, ctypes.c_void_p).value
    monkeypatch.setattr(library, "address", lambda name: own if name == "flash_pread" else address(name))
    choice = FlashChoice(1 << 20, 8, None, "profile", "preadv")
    monkeypatch.setattr(planner, "flash_choice", lambda profile, path: choice)
