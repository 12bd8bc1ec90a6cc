"""Setting up an io_uring with two system calls and two mappings; compiled code drives it (kernels/uring.py)."""

import ctypes
import mmap
import os

from coterie.kernels import tape as t

SETUP = 425  # the system call's number, the same on all architectures
SINGLE_MMAP, NODROP, RW_CUR_POS = 1 << 0, 1 << 1, 1 << 3  # the last came together with the read operation
NEEDED = SINGLE_MMAP | NODROP | RW_CUR_POS
SUBMISSIONS = 0x10000000  # where in the descriptor submission entries are mapped from


class _Submissions(ctypes.Structure):
    names = ("head", "tail", "mask", "entries", "flags", "dropped", "array", "resv")
    _fields_ = [*((name, ctypes.c_uint32) for name in names), ("user", ctypes.c_uint64)]


class _Completions(ctypes.Structure):
    names = ("head", "tail", "mask", "entries", "overflow", "cqes", "flags", "resv")
    _fields_ = [*((name, ctypes.c_uint32) for name in names), ("user", ctypes.c_uint64)]


class _Parameters(ctypes.Structure):
    names = ("sq_entries", "cq_entries", "flags", "thread_cpu", "thread_idle", "features", "wq_fd")
    _fields_ = [
        *((name, ctypes.c_uint32) for name in names),
        ("resv", ctypes.c_uint32 * 3),
        ("sq", _Submissions),
        ("cq", _Completions),
    ]


class Uring:
    """One ring with room for `entries` submissions; `words` is what the lane's control block must say of it.

    Raises OSError where the kernel has none, or an older one than reads need (Linux 5.6).
    """

    def __init__(self, entries: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        p = _Parameters()
        self.fd = libc.syscall(ctypes.c_long(SETUP), ctypes.c_long(entries), ctypes.byref(p))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            if p.features & NEEDED != NEEDED:
                raise OSError("this kernel's io_uring is too old")
            size = max(p.sq.array + 4 * p.sq_entries, p.cq.cqes + 16 * p.cq_entries)
            self._rings = mmap.mmap(self.fd, size)
            self._entries = mmap.mmap(self.fd, 64 * p.sq_entries, offset=SUBMISSIONS)
        except OSError:
            os.close(self.fd)
            raise
        rings = _address(self._rings)
        self.words = {
            t.URING: self.fd,
            t.SQ_HEAD: rings + p.sq.head,
            t.SQ_TAIL: rings + p.sq.tail,
            t.SQ_MASK: p.sq_entries - 1,
            t.SQ_ARRAY: rings + p.sq.array,
            t.SQ_ENTRIES: _address(self._entries),
            t.CQ_HEAD: rings + p.cq.head,
            t.CQ_TAIL: rings + p.cq.tail,
            t.CQ_MASK: p.cq_entries - 1,
            t.CQ_ENTRIES: rings + p.cq.cqes,
        }

    def close(self) -> None:
        """Give the ring back; nobody may use it any more."""
        self._rings.close()
        self._entries.close()
        os.close(self.fd)


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
