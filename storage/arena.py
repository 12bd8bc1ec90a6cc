"""The arena: one mapping that holds every buffer, flag and program of a model (design section 4).

Between threads it is private anonymous memory with huge pages; between processes a memfd, which vanishes with
its last user. Regions are laid out when the arena is made, so the budget is one number, checked before
anything is allocated. Buffers are Arrow buffers over the mapping; nothing is copied to look at one.
"""

import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.storage.available import available_memory

if TYPE_CHECKING:
    import pyarrow as pa

LINE = 64  # bytes: alignment of every buffer
HUGE = 2 << 20  # bytes of a huge page, the step in which regions grow and shrink


def round_up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


@dataclass(frozen=True)
class BufferRef:
    """How a buffer is named in plans, programs and messages (docs/buffer-ref.md, version 1).

    `offset` is from the arena's start, in bytes; `dtype` is numpy's name.
    """

    region: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def tail(self, nbytes: int) -> "BufferRef":
        """The buffer without its first `nbytes` bytes, as bytes. Raises PlanError if there are not so many."""
        if not 0 <= nbytes <= self.nbytes:
            raise PlanError(f"byte {nbytes} is outside of a buffer of {self.nbytes} bytes in {self.region}")
        left = self.nbytes - nbytes
        return BufferRef(self.region, self.offset + nbytes, left, "|u1", (left,))


@dataclass
class Region:
    """A part of the arena: `used` of `size` bytes are cut into buffers."""

    offset: int
    size: int
    used: int = 0


class Ledger:
    """Buffers on paper: what `allocate` is asked for is counted, region by region, and nothing is reserved.

    Laying a model out in a ledger first tells how large the arena's regions must be.
    """

    def __init__(self) -> None:
        self.regions: dict[str, Region] = {}

    def allocate(
        self, region: str, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.uint8, align: int = LINE
    ) -> BufferRef:
        """Cut a buffer from a region; it holds zeros at first. Raises PlanError when the region is full."""
        shape = (shape,) if isinstance(shape, int) else shape
        kind = np.dtype(dtype)
        place = self._region(region)
        first = round_up(place.used, align)
        nbytes = prod(shape) * kind.itemsize
        if first + nbytes > place.size:
            raise PlanError(f"region {region} is full: {nbytes} bytes wanted, {place.size - first} left")
        place.used = first + nbytes
        return BufferRef(region, place.offset + first, nbytes, kind.str, shape)

    def usage(self) -> dict[str, int]:
        """Bytes cut into buffers, by region."""
        return {name: region.used for name, region in self.regions.items()}

    def _region(self, name: str) -> Region:
        return self.regions.setdefault(name, Region(0, 1 << 62))


class Arena(Ledger):
    """Regions of the given sizes (bytes) in one mapping.

    `shared` makes it a memfd that other processes attach to by `Arena.attach`. Raises PlanError where the
    memory cannot be had.
    """

    def __init__(self, regions: Mapping[str, int], *, shared: bool = False, _fd: int = -1) -> None:
        super().__init__()
        at = 0
        for name, size in regions.items():
            step = HUGE if size >= HUGE else mmap.PAGESIZE
            at = round_up(at, step)
            self.regions[name] = Region(at, round_up(size, step))
            at += self.regions[name].size
        self.size = round_up(at, HUGE)
        self.fd = _fd
        if shared and _fd < 0 and self.size > available_memory():
            raise PlanError(f"a shared arena of {self.size >> 20} MiB is more memory than there is")
        try:
            if shared and _fd < 0:
                self.fd = os.memfd_create("coterie", os.MFD_CLOEXEC)
                os.posix_fallocate(self.fd, 0, self.size)
            self._map = self._mapped()
        except OSError as error:
            self._close_fd()
            raise PlanError(f"cannot have {self.size >> 20} MiB of memory: {error.strerror}") from None
        whole = np.frombuffer(self._map, np.uint8)
        start = -whole.ctypes.data % HUGE if self.fd < 0 else 0
        self._bytes = whole[start : start + self.size]
        self.base = self._bytes.ctypes.data

    def _mapped(self) -> mmap.mmap:
        if self.fd >= 0:
            if os.fstat(self.fd).st_size < self.size:
                self._close_fd()
                raise PlanError("the shared arena is smaller than its regions")
            mapping = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED)
        else:
            noreserve = 0x4000  # pages count when they are touched; the plan has checked the budget
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
            mapping = mmap.mmap(-1, self.size + HUGE, flags)
        with suppress(OSError):  # a kernel without huge pages is slower, not wrong
            mapping.madvise(mmap.MADV_HUGEPAGE)  # before the first touch
        return mapping

    @classmethod
    def attach(cls, fd: int, regions: Mapping[str, int]) -> "Arena":
        """Map a shared arena that another process made with the same `regions`; `fd` is taken over. Raises PlanError
        where it is smaller."""
        return cls(regions, shared=True, _fd=fd)

    def numpy(self, ref: BufferRef) -> npt.NDArray[Any]:
        """The buffer as a writable array, without a copy. Raises PlanError for a ref outside of its region."""
        return self._checked(ref).view(ref.dtype).reshape(ref.shape)

    def arrow(self, ref: BufferRef) -> "pa.Tensor":
        """The buffer as an Arrow tensor, without a copy."""
        import pyarrow as pa

        return pa.Tensor.from_numpy(self.numpy(ref))

    def whole(self, region: str) -> BufferRef:
        """What has been cut from a region so far, as bytes."""
        place = self._region(region)
        return BufferRef(region, place.offset, place.used, "|u1", (place.used,))

    def buffer(self, ref: BufferRef) -> "pa.Buffer":
        """The buffer's bytes as a mutable Arrow buffer, without a copy."""
        import pyarrow as pa

        return pa.py_buffer(self._checked(ref))

    def address(self, ref: BufferRef) -> int:
        """Where the buffer lies in this process."""
        return self.base + ref.offset

    def release(self, region: str, keep: int = 0) -> None:
        """Give a region's memory behind its first `keep` bytes back to the system, in whole huge pages (all of it
        if `keep` is 0); it holds zeros again and can be cut again."""
        place = self._region(region)
        first = min(place.size, round_up(place.offset + keep, HUGE) - place.offset) if keep else 0
        if first < place.size:
            if self.fd >= 0:
                _punch_hole(self.fd, place.offset + first, place.size - first)
            else:
                start = self.base - np.frombuffer(self._map, np.uint8).ctypes.data
                self._map.madvise(mmap.MADV_DONTNEED, start + place.offset + first, place.size - first)
        self._bytes[place.offset + keep : place.offset + first] = 0
        place.used = min(place.used, keep)

    def use_small_pages(self, region: str) -> None:
        """A region of which little is used takes what it uses, and not whole huge pages."""
        place = self._region(region)
        if self.fd < 0:
            start = self.base - np.frombuffer(self._map, np.uint8).ctypes.data
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE, start + place.offset, place.size)

    def rewind(self, region: str) -> None:
        """Cut a region anew from its start; it keeps its bytes."""
        self._region(region).used = 0

    def close(self) -> None:
        """Forget the mapping; it goes when the last view of it does. A second call does nothing."""
        self._close_fd()
        self._bytes = np.empty(0, np.uint8)
        vars(self).pop("_map", None)

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _region(self, name: str) -> Region:
        if name not in self.regions:
            raise PlanError(f"the arena has no region {name}")
        return self.regions[name]

    def _checked(self, ref: BufferRef) -> npt.NDArray[np.uint8]:
        place, size = self.regions.get(ref.region), _item_bytes(ref.dtype)
        if place is None or size == 0 or min(ref.shape, default=0) < 0 or ref.nbytes != prod(ref.shape) * size:
            raise PlanError(f"buffer ref {ref} does not describe a buffer of this arena")
        if not place.offset <= ref.offset <= ref.offset + ref.nbytes <= place.offset + place.size:
            raise PlanError(f"buffer ref {ref} lies outside of its region")
        return self._bytes[ref.offset : ref.offset + ref.nbytes]


def _item_bytes(dtype: str) -> int:
    """Bytes of a number of that type; 0 if it is none."""
    try:
        kind = np.dtype(dtype)
    except TypeError:
        return 0
    return kind.itemsize if kind.kind in "biuf" else 0


def _punch_hole(fd: int, offset: int, size: int) -> None:
    import ctypes

    keep_size, punch = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (
        ctypes.c_int(fd),
        ctypes.c_int(keep_size | punch),
        ctypes.c_long(offset),
        ctypes.c_long(size),
    )
    if libc.fallocate(*arguments) != 0:
        raise PlanError(f"cannot shrink shared memory: {os.strerror(ctypes.get_errno())}")
