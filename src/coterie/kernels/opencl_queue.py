"""The compiled loop of an OpenCL unit: puts a loaded program into its queue, record by record, without Python.

It calls the driver through addresses. A step's rows say over what a kernel runs; nothing else changes from step to
step, since every record has a kernel object of its own, whose arguments stay.

With a share below a thousand, others of the device keep their time: kernels are cut along dimension 2 into slices, and
before about LIMIT nanoseconds' worth of them are under way, the loop waits for these, takes from their events how long
they took, and pauses. What a slice will take is reckoned from a running average.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from coterie.kernels.compiler import kernel
from coterie.kernels.sync import sleep_on, word
from coterie.kernels.vector import ADDRESS, I32, I64, op, set_i64

# Words of an entry of the table, one a record.
HANDLE = 0  # cl_kernel
COUNT = 1  # which rows: EACH_...
TOGETHER = 2  # rows that a work-group computes together
OFFSET, GLOBAL, LOCAL = 3, 6, 9  # three words each, as clEnqueueNDRangeKernel takes them
UNITS = 12  # work-groups along dimension 2 that run in this step
PICOSECONDS = 13  # running average of a work-group's share of a kernel's time (0: not known)
SLICES, LONGEST = 14, 15  # since the program was loaded: slices, and the longest in nanoseconds
FIRST = 16  # the first of them that runs in this step
ENTRY_WORDS = 17
ONCE, TOKENS, OUTPUTS = range(3)  # of COUNT

# Words of the control block.
QUEUE = 0  # cl_command_queue
ENQUEUE, FLUSH, WAIT, PROFILE, RELEASE = 1, 2, 3, 4, 5  # addresses of the driver's functions
SHARE = 6  # thousandths of the time that the device may be busy
LIMIT = 7  # nanoseconds of one slice, and of slices between two pauses
PENDING = 8  # slices under way
ESTIMATE = 9  # picoseconds that they are reckoned to take
NAP = 10  # a timespec: two words
BEGAN, ENDED = 12, 13  # of an event
PAUSED = 14  # nanoseconds, in all
NEVER = 16  # a flag that nobody posts, a line
EVENTS = 24  # cl_event[MOST]
MOST = 64  # slices under way at most
OWNERS = EVENTS + MOST  # address of each one's entry
AMOUNTS = OWNERS + MOST  # its work-groups
CONTROL_WORDS = AMOUNTS + MOST

PROFILING_START, PROFILING_END = 0x1282, 0x1283
EARLY = 8  # entries behind which the device may begin, while others are still put into the queue
FIRST_SLICE = 64  # of a kernel whose time is not known, this part


@op(types.int64, ADDRESS, *[types.int64] * 9)
def call_driver(b, function, a0, a1, a2, a3, a4, a5, a6, a7, a8):
    """Call an OpenCL function by its address; arguments that it does not have do no harm. Returns its code."""
    kind = ir.FunctionType(I32, [I64] * 9)
    code = b.call(b.inttoptr(function, kind.as_pointer()), [a0, a1, a2, a3, a4, a5, a6, a7, a8])
    return b.sext(code, I64)


@register_jitable
def put(base, index, value):
    set_i64(base + 8 * index, value)


@register_jitable
def enqueue(control, entry, tiles, first, amount, event):
    """Enqueue `amount` of a kernel's units from number `first` on; returns the driver's code."""
    put(entry, OFFSET + 2, first)
    put(entry, GLOBAL, tiles * word(entry, LOCAL))
    put(entry, GLOBAL + 2, amount)
    return call_driver(
        word(control, ENQUEUE), word(control, QUEUE), word(entry, HANDLE), 3, entry + 8 * OFFSET, entry + 8 * GLOBAL,
        entry + 8 * LOCAL, 0, 0, event,
    )  # fmt: skip


@register_jitable
def event_time(control, event, which, to):
    """A time of an event in nanoseconds; 0 where the driver gives none."""
    put(control, to, 0)
    call_driver(word(control, PROFILE), event, which, 8, control + 8 * to, 0, 0, 0, 0, 0)
    return word(control, to)


@register_jitable
def settle(control):
    """Wait for the slices under way, learn from their times, and pause. Returns the driver's code."""
    pending = word(control, PENDING)
    if pending == 0:
        return np.int64(0)
    code = call_driver(word(control, WAIT), 1, control + 8 * (EVENTS + pending - 1), 0, 0, 0, 0, 0, 0, 0)
    busy = np.int64(0)
    for i in range(pending):
        event, entry = word(control, EVENTS + i), word(control, OWNERS + i)
        began = event_time(control, event, PROFILING_START, BEGAN)
        took = max(event_time(control, event, PROFILING_END, ENDED) - began, 1)
        each = max(took * 1000 // word(control, AMOUNTS + i), 1)
        known = word(entry, PICOSECONDS)
        put(entry, PICOSECONDS, each if known == 0 else (3 * known + each) // 4)
        put(entry, LONGEST, max(word(entry, LONGEST), took))
        put(entry, SLICES, word(entry, SLICES) + 1)
        busy += took
        call_driver(word(control, RELEASE), event, 0, 0, 0, 0, 0, 0, 0, 0)
    put(control, PENDING, 0)
    put(control, ESTIMATE, 0)
    pause = busy * (1000 - word(control, SHARE)) // word(control, SHARE)
    put(control, NAP, pause // 1000000000)
    put(control, NAP + 1, pause % 1000000000)
    put(control, PAUSED, word(control, PAUSED) + pause)
    if pause > 0:
        sleep_on(control + 8 * NEVER, 1, control + 8 * NAP)
    return code


@register_jitable
def enqueue_slices(control, entry, tiles):
    """Enqueue a kernel in slices, with pauses as its share demands. Returns the driver's code."""
    first, units, limit = word(entry, FIRST), word(entry, UNITS), word(control, LIMIT) * 1000
    end = first + units
    while first < end:
        cost, pending = word(entry, PICOSECONDS) * tiles, word(control, PENDING)
        left = limit - word(control, ESTIMATE)
        if pending == MOST or (pending > 0 and (cost == 0 or cost > left)):
            code = settle(control)
            if code != 0:
                return code
            continue
        amount = left // cost if cost > 0 else units // FIRST_SLICE
        amount = min(max(amount, 1), end - first)
        code = enqueue(control, entry, tiles, first, amount, control + 8 * (EVENTS + pending))
        if code != 0:
            return code
        put(control, OWNERS + pending, entry)
        put(control, AMOUNTS + pending, amount * tiles)
        put(control, PENDING, pending + 1)
        put(control, ESTIMATE, word(control, ESTIMATE) + amount * cost)
        code = call_driver(word(control, FLUSH), word(control, QUEUE), 0, 0, 0, 0, 0, 0, 0, 0)
        if cost == 0 and code == 0:
            code = settle(control)
        if code != 0:
            return code
        first += amount
    return np.int64(0)


@kernel
def opencl_run() -> Callable[..., Any]:
    """Enqueue the `count` entries at `table` for a step of so many rows, and flush. Returns 0, or what failed: the
    driver's code, negated, in the low 32 bits, and above them the number of the entry (`count`: the flush)."""

    def run(control, table, count, tokens, outputs):
        shared = word(control, SHARE) < 1000
        for i in range(count):
            if i == EARLY:
                call_driver(word(control, FLUSH), word(control, QUEUE), 0, 0, 0, 0, 0, 0, 0, 0)
            entry = table + i * 8 * ENTRY_WORDS
            which, together = word(entry, COUNT), word(entry, TOGETHER)
            rows = tokens if which == TOKENS else outputs if which == OUTPUTS else together
            tiles = (rows + together - 1) // together
            if tiles == 0 or word(entry, UNITS) == 0:
                continue
            if shared:
                code = enqueue_slices(control, entry, tiles)
            else:
                code = enqueue(control, entry, tiles, word(entry, FIRST), word(entry, UNITS), 0)
            if code != 0:
                return (i << 32) - code
        code = call_driver(word(control, FLUSH), word(control, QUEUE), 0, 0, 0, 0, 0, 0, 0, 0)
        return (count << 32) - code if code != 0 else 0

    return run


@kernel
def opencl_settle() -> Callable[..., Any]:
    """Wait for slices that are under way, before their program goes. Returns the driver's code."""

    def run(control):
        return settle(control)

    return run
