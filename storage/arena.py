"""The arena: one mapping that holds every buffer, flag and program of a model (design section 4).

Between threads it is private anonymous memory with huge pages; between processes a memfd, which vanishes with
its last user. Regions are laid out when the arena is made, so the budget is one number, checked before
anything is allocated. Buffers are Arrow buffers over the mapping; nothing is copied to look at one.
"""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coterie.errors import PlanError
from coterie.storage.mapping import HUGE, PrivateMapping, SharedMapping

if TYPE_CHECKING:
    import pyarrow as pa

LINE = 64  # bytes: alignment of every buffer
BACKED = 64 << 10  # bytes: the step in which a shared region is given memory


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
    """A part of the arena: `used` of `size` bytes are cut into buffers, `backed` of a shared one have memory."""

    offset: int
    size: int
    used: int = 0
    backed: int = 0


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

    `shared` makes it a memfd that other processes attach to by what `describe` says. Raises PlanError where the
    memory cannot be had.
    """

    def __init__(self, regions: Mapping[str, int], *, shared: bool = False) -> None:
        super().__init__()
        at = 0
        for name, size in regions.items():
            step = HUGE if size >= HUGE else mmap.PAGESIZE
            at = round_up(at, step)
            self.regions[name] = Region(at, round_up(size, step))
            at += self.regions[name].size
        self._adopt(round_up(at, HUGE), shared)

    def _adopt(self, size: int, shared: bool, fd: int = -1, base: int = 0) -> None:
        self.size, self.shared = size, shared
        try:
            self._mapping: SharedMapping | PrivateMapping = (
                SharedMapping(size, fd, base) if shared else PrivateMapping(size)
            )
        except OSError as error:
            raise PlanError(f"cannot have {size >> 20} MiB of memory: {error.strerror}") from None
        self.base = self._mapping.base

    def describe(self) -> dict[str, Any]:
        """What another process of this machine needs to attach to a shared arena; plain values, for a message."""
        assert isinstance(self._mapping, SharedMapping)
        regions = {name: (region.offset, region.size) for name, region in self.regions.items()}
        status = os.fstat(self._mapping.fd)
        where = {"pid": os.getpid(), "fd": self._mapping.fd, "device": status.st_dev, "inode": status.st_ino}
        return where | {"base": self.base, "size": self.size, "regions": regions}

    @classmethod
    def attach(cls, description: Mapping[str, Any]) -> "Arena":
        """Map the shared arena that another process described, through that process, at the same address. Raises
        PlanError where it is gone, another one, or smaller."""
        path = f"/proc/{int(description['pid'])}/fd/{int(description['fd'])}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PlanError(f"cannot open the shared arena {path}: {error.strerror}") from None
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (description["device"], description["inode"]):
            os.close(fd)
            raise PlanError(f"{path} is not the arena that was announced; its owner has gone")
        arena = cls.__new__(cls)
        Ledger.__init__(arena)
        size = int(description["size"])
        for name, (offset, length) in description["regions"].items():
            if not 0 <= offset <= offset + length <= size:
                os.close(fd)
                raise PlanError(f"region {name} lies outside of the shared arena")
            arena.regions[str(name)] = Region(int(offset), int(length))
        arena._adopt(size, True, fd, int(description["base"]))
        return arena

    def allocate(
        self, region: str, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.uint8, align: int = LINE
    ) -> BufferRef:
        place = self._region(region)
        used = place.used
        ref = super().allocate(region, shape, dtype, align)
        try:
            if self.shared:
                self._back(place)
        except BaseException:
            place.used = used  # there may be memory later
            raise
        return ref

    def _back(self, place: Region) -> None:
        """Have memory for what is cut: a full machine says so here, and not by a signal later."""
        if place.used > place.backed:
            end = min(place.size, round_up(place.used, BACKED))
            self._mapping.back(place.offset + place.backed, end - place.backed)
            place.backed = end

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
            self._mapping.drop(place.offset + first, place.size - first)
            place.backed = min(place.backed, first)
        self._bytes[place.offset + keep : place.offset + first] = 0
        place.used = min(place.used, keep)

    def discard(self, region: str) -> None:
        """Take other memory, of zeros, for a region and what is cut from it: a read that still lands in the old one is
        not seen."""
        place = self._region(region)
        self._mapping.drop(place.offset, place.size)
        self._mapping.back(place.offset, place.backed)

    def use_small_pages(self, region: str) -> None:
        """A region of which little is used takes what it uses, and not whole huge pages."""
        place = self._region(region)
        self._mapping.use_small_pages(place.offset, place.size)

    def rewind(self, region: str) -> None:
        """Cut a region anew from its start; it keeps its bytes."""
        self._region(region).used = 0

    def close(self) -> None:
        """Forget the mapping; it goes when the last view of it does. A second call does nothing."""
        self._mapping.close()

    @property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return self._mapping.bytes

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
