"""Memory for an arena: private to this process, or a memfd that the processes of other units map too.

A shared mapping lies at one address in every process: so tables that hold addresses hold in all of them, and kernels
need no base (docs/decisions/0012-shared-arenas.md). The descriptor has no name: the memory vanishes with its last
process, whatever ended it.
"""

import ctypes
import errno
import mmap
import os
import weakref
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.storage.available import available_memory

HUGE = 2 << 20  # bytes of a huge page
NORESERVE = 0x4000  # pages count when they are touched; the plan has checked the budget
FIXED_NOREPLACE = 0x100000  # MAP_FIXED_NOREPLACE: fail where something lies there already
LOWEST = 1 << 37  # bytes: where shared mappings are looked for; free on 64-bit Linux, also with addresses of 39 bits
HIGHEST = 1 << 38
APART = 1 << 30
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate
POPULATE_WRITE, COLLAPSE = 23, 25  # of madvise
Bytes = npt.NDArray[np.uint8]


class Mapping(Protocol):
    """`bytes`: all of it; `base`: its address."""

    bytes: Bytes
    base: int

    def back(self, offset: int, size: int) -> None:
        """Have physical memory for these pages, or say now that there is none. Raises PlanError."""

    def drop(self, offset: int, size: int) -> None:
        """Give whole pages back; they hold zeros again."""

    def use_small_pages(self, offset: int, size: int) -> None:
        """Take no huge pages there."""

    def close(self) -> None:
        """Forget it; the memory goes with the last view."""


class PrivateMapping:
    """Anonymous memory with huge pages, aligned to them. Raises OSError."""

    def __init__(self, size: int) -> None:
        self._map: mmap.mmap | None = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        with suppress(OSError):  # a kernel without huge pages is slower, not wrong
            self._map.madvise(mmap.MADV_HUGEPAGE)  # before the first touch
        whole = np.frombuffer(self._map, np.uint8)
        self._start = -whole.ctypes.data % HUGE
        self.bytes: Bytes = whole[self._start : self._start + size]
        self.base = self.bytes.ctypes.data

    def back(self, offset: int, size: int) -> None:
        """Its pages come when they are touched."""

    def drop(self, offset: int, size: int) -> None:
        self._advise(mmap.MADV_DONTNEED, offset, size)

    def use_small_pages(self, offset: int, size: int) -> None:
        with suppress(OSError):  # a kernel without huge pages
            self._advise(mmap.MADV_NOHUGEPAGE, offset, size)

    def _advise(self, advice: int, offset: int, size: int) -> None:
        assert self._map is not None
        self._map.madvise(advice, self._start + offset, size)

    def close(self) -> None:
        self.bytes, self._map = np.empty(0, np.uint8), None


class SharedMapping:
    """A memfd of `size` bytes, new or (`fd`, which is taken over) another process's, mapped at `base` or at the first
    free place. Raises OSError; PlanError where the memfd is smaller, or something else lies at `base`."""

    def __init__(self, size: int, fd: int = -1, base: int = 0) -> None:
        made = fd < 0
        self.fd = os.memfd_create("coterie", os.MFD_CLOEXEC) if made else fd
        try:
            if made:
                os.ftruncate(self.fd, size)
            elif os.fstat(self.fd).st_size < size:
                raise PlanError("the shared arena is smaller than its regions")
            self.base = _map(self.fd, size, base)
        except BaseException:
            os.close(self.fd)
            raise
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        memory = (ctypes.c_uint8 * size).from_address(self.base)
        weakref.finalize(memory, _libc().munmap, ctypes.c_void_p(self.base), ctypes.c_size_t(size)).atexit = False
        self.bytes: Bytes = np.ctypeslib.as_array(memory)
        _libc().madvise(ctypes.c_void_p(self.base), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # where it is granted

    def back(self, offset: int, size: int) -> None:
        if size == 0:
            return
        if size > available_memory():
            raise PlanError(f"{size >> 20} MiB of shared memory are more than there is; lower --memory")
        self._collapse(-(-offset // HUGE) * HUGE, (offset + size) // HUGE * HUGE)
        # Touching takes huge pages where the kernel grants them on advice; a kernel before 5.14 cannot do it at once.
        if _libc().madvise(ctypes.c_void_p(self.base + offset), ctypes.c_size_t(size), POPULATE_WRITE) != 0:
            try:
                os.posix_fallocate(self.fd, offset, size)
            except OSError as error:
                raise PlanError(f"cannot have {size >> 20} MiB of shared memory: {error.strerror}") from None

    def _collapse(self, first: int, end: int) -> None:
        """Have huge pages there, for the asking (Linux 6.1): the setting for shared memory, mostly "never", is for what
        happens by itself. Where there are none to be had, small ones do."""
        if first < end:
            self.bytes[first:end:HUGE] |= 0  # what is wholly empty is not collapsed
            _libc().madvise(ctypes.c_void_p(self.base + first), ctypes.c_size_t(end - first), COLLAPSE)

    def drop(self, offset: int, size: int) -> None:
        arguments = ctypes.c_int(self.fd), ctypes.c_int(KEEP_SIZE | PUNCH_HOLE), ctypes.c_long(offset)
        if _libc().fallocate(*arguments, ctypes.c_long(size)) != 0:
            raise PlanError(f"cannot shrink shared memory: {os.strerror(ctypes.get_errno())}")

    def use_small_pages(self, offset: int, size: int) -> None:
        """Its memory is backed as buffers are cut."""

    def close(self) -> None:
        self._close_fd()
        self.fd, self.bytes = -1, np.empty(0, np.uint8)


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    return libc


def _map(fd: int, size: int, base: int) -> int:
    """Map a descriptor at `base`, or at the first free place; returns where."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    for at in [base] if base else range(LOWEST, HIGHEST, APART):
        arguments = ctypes.c_void_p(at), ctypes.c_size_t(size), protection, mmap.MAP_SHARED | FIXED_NOREPLACE, fd
        found = _libc().mmap(*arguments, ctypes.c_long(0))
        if found == at:
            return at
        if found != ctypes.c_void_p(-1).value:  # a kernel before 4.17 takes the address for a hint
            _libc().munmap(ctypes.c_void_p(found), ctypes.c_size_t(size))
        elif ctypes.get_errno() == errno.ENOMEM:
            break
    if base:
        raise PlanError(f"the shared arena cannot lie at {base:#x} in this process; start it anew")
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
