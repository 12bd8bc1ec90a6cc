"""Requests through threads that read: `start` queues one, `turn` waits, `flash_reader` is a thread's loop."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from coterie.kernels import tape as t
from coterie.kernels.atomics import (
    FUTEX_CALL,
    FUTEX_WAKE,
    acquire,
    compare_swap,
    cycles,
    fetch_add,
    libc_syscall,
    release,
)
from coterie.kernels.compiler import kernel
from coterie.kernels.record import SLEEPERS
from coterie.kernels.sync import post, sleep_on, word
from coterie.kernels.uring import PREAD, errno
from coterie.kernels.vector import ADDRESS, I64, i64_at, op, set_i64

LEAVE = -1  # in the queue: whoever takes it goes


@op(types.int64, ADDRESS, types.int64, ADDRESS, types.int64, types.int64)
def call_reader(b, reader, fd, address, nbytes, offset):
    """Call a reader by its address; returns bytes read, or -errno."""
    kind = ir.FunctionType(I64, [I64] * 4)
    return b.call(b.inttoptr(reader, kind.as_pointer()), [fd, address, nbytes, offset])


@kernel
def flash_pread() -> Callable[..., Any]:
    """The reader: pread64."""

    def run(fd, address, nbytes, offset):
        count = libc_syscall(PREAD, fd, address, nbytes, offset, 0, 0)
        return count if count >= 0 else -errno()

    return run


@register_jitable
def queue(control, slot):
    """Put a slot's number where a reader takes it."""
    number = acquire(control + t.QUEUED)  # the lane alone writes it
    set_i64(word(control, t.QUEUE) + number % word(control, t.SLOT_COUNT) * 8, slot)
    post(control + t.QUEUED, number + 1)


@register_jitable
def pread_start(control, slot):
    """Give what is left of the request in slot number `slot` to the readers."""
    queue(control, slot)


@register_jitable
def pread_turn(control, wait):
    """With `wait`, sleep until a request has come that the lane did not see yet. Returns 0."""
    if wait:
        under_way = word(control, t.IN_FLIGHT)
        seen = acquire(control + t.QUEUED) - under_way
        if acquire(control + t.LANDED) <= seen:
            sleep_on(control + t.LANDED, seen + 1, word(control, t.NAP))
    return 0


@kernel
def flash_reader() -> Callable[..., Any]:
    """Take requests and read them, until told to leave."""

    def run(control):
        while True:
            ticket = acquire(control + t.TICKET)
            if ticket >= acquire(control + t.QUEUED):
                sleep_on(control + t.QUEUED, ticket + 1, 0)
                continue
            slot = i64_at(word(control, t.QUEUE) + ticket % word(control, t.SLOT_COUNT) * 8)
            if not compare_swap(control + t.TICKET, ticket, ticket + 1):
                continue
            if slot == LEAVE:
                return ticket
            request = word(control, t.SLOTS) + slot * t.SLOT_BYTES
            done = word(request, t.DONE)
            result = call_reader(
                word(control, t.READER),
                word(control, t.FD),
                word(request, t.TO) + done,
                word(request, t.LENGTH) - done,
                word(request, t.FROM) + done,
            )
            set_i64(request + 8 * t.RESULT, result)
            set_i64(request + 8 * t.FINISHED, cycles())
            release(request + 8 * t.STATE, t.CAME)
            fetch_add(control + t.LANDED, 1)
            if fetch_add(control + t.LANDED + SLEEPERS, 0) != 0:
                libc_syscall(FUTEX_CALL, control + t.LANDED, FUTEX_WAKE, 1, 0, 0, 0)

    return run
