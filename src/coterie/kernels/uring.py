"""Requests through io_uring, from compiled code: `start` writes a submission, `turn` makes the system call.

The rings are shared with the kernel; actors/uring.py maps them. One thread uses them.
"""

import platform

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from coterie.kernels import tape as t
from coterie.kernels.atomics import cycles, libc_syscall
from coterie.kernels.sync import word
from coterie.kernels.vector import ADDRESS, I32, I64, i32_at, op, set_i32, set_i64

ENTER = 426  # the same on all architectures
OP_READ, GETEVENTS = 22, 1
SUBMISSION_BYTES, COMPLETION_BYTES = 64, 16
PREAD = 67 if platform.machine() == "aarch64" else 17
errno_location = types.ExternalFunction("__errno_location", types.intp())


@op(types.int64, ADDRESS)
def acquire_u32(b, address):
    pointer = b.inttoptr(address, ir.PointerType(I32))
    return b.zext(b.load_atomic(pointer, "acquire", 4), I64)


@op(types.void, ADDRESS, types.int64)
def release_u32(b, address, value):
    pointer = b.inttoptr(address, ir.PointerType(I32))
    b.store_atomic(b.trunc(value, I32), pointer, "release", 4)


@register_jitable
def errno():
    """Of this thread's last failed system call."""
    return i32_at(errno_location())


@register_jitable
def uring_start(control, slot):
    """Queue what is left of the request in slot number `slot`; `turn` hands it over."""
    request = word(control, t.SLOTS) + slot * t.SLOT_BYTES
    tail = acquire_u32(word(control, t.SQ_TAIL))
    index = tail & word(control, t.SQ_MASK)
    entry = word(control, t.SQ_ENTRIES) + index * SUBMISSION_BYTES
    done = word(request, t.DONE)
    set_i64(entry, OP_READ | word(control, t.FD) << 32)
    set_i64(entry + 8, word(request, t.FROM) + done)
    set_i64(entry + 16, word(request, t.TO) + done)
    set_i64(entry + 24, word(request, t.LENGTH) - done)
    set_i64(entry + 32, slot)  # comes back with the result
    for i in range(40, SUBMISSION_BYTES, 8):
        set_i64(entry + i, 0)
    set_i32(word(control, t.SQ_ARRAY) + 4 * index, np.int32(index))
    release_u32(word(control, t.SQ_TAIL), tail + 1)


@register_jitable
def uring_turn(control, wait):
    """Hand queued requests over, take in what has come; with `wait` not before there is something. Returns 0, or
    the errno with which the kernel refused."""
    queued = acquire_u32(word(control, t.SQ_TAIL)) - acquire_u32(word(control, t.SQ_HEAD))
    queued &= 0xFFFFFFFF
    refused = 0
    if queued > 0 or wait:
        least, flags = (1, GETEVENTS) if wait else (0, 0)
        if libc_syscall(ENTER, word(control, t.URING), queued, least, flags, 0, 0) < 0:
            refused = errno()
    head, tail = acquire_u32(word(control, t.CQ_HEAD)), acquire_u32(word(control, t.CQ_TAIL))
    while head != tail:
        entry = word(control, t.CQ_ENTRIES) + (head & word(control, t.CQ_MASK)) * COMPLETION_BYTES
        request = word(control, t.SLOTS) + word(entry, 0) * t.SLOT_BYTES
        set_i64(request + 8 * t.RESULT, i32_at(entry + 8))
        set_i64(request + 8 * t.FINISHED, cycles())
        set_i64(request + 8 * t.STATE, t.CAME)
        head = (head + 1) & 0xFFFFFFFF
        refused = 0  # something has come of it
    release_u32(word(control, t.CQ_HEAD), head)
    return refused
