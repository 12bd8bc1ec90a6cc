"""The compiled loop of a lane: wait for a step, run its program, wait for the next (design sections 5 and 6).

A lane never returns to Python between steps. It knows no kernel: it calls the address in each record.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from coterie.kernels.atomics import acquire, call_kernel, cycles, fence, fetch_add, pause, release
from coterie.kernels.compiler import kernel
from coterie.kernels.record import (
    ABORT,
    COUNTS,
    COUNTS_BYTES,
    EPOCH,
    EVENT,
    FOREIGN,
    HEADER_WORDS,
    KERNEL,
    LINE,
    LINE_PART,
    LINE_PROGRESS,
    LINE_REST,
    NAP,
    NEVER,
    OPCODE,
    PROGRAM,
    RATE,
    RECORD_BYTES,
    RECORDS,
    RING_HEADER,
    SPIN,
    STOP,
    TRACE,
    TRACE_STRIDE,
    WAIT,
)
from coterie.kernels.sync import await_unit, give_way, post, reached, sleep_on, tally, wait_flag, word
from coterie.kernels.vector import i64_at, set_i32, set_i64

EVENT_BYTES = EVENT.itemsize
ABANDONED = -1
FOREVER = np.int64(0x7FFFFFFFFFFFFFFF)
# Fields of an event are written by their offsets.
assert EVENT.fields is not None
_START, _END, _WAITED, _EPOCH, _OPCODE, _PIECES = (
    EVENT.fields[name][1] for name in ("start", "end", "waited", "epoch", "opcode", "pieces")
)


@register_jitable
def write_event(ring, start, end, waited, epoch, opcode, pieces):
    """Write one event into a trace ring; the oldest is overwritten when it is full. `opcode`: the layer too."""
    count = i64_at(ring)
    at = ring + RING_HEADER + count % i64_at(ring + 8) * EVENT_BYTES
    set_i64(at + _START, start)
    set_i64(at + _END, end)
    set_i32(at + _WAITED, np.int32(min(waited, 0x7FFFFFFF)))
    set_i32(at + _EPOCH, np.int32(epoch))
    set_i32(at + _OPCODE, np.int32(opcode))
    set_i32(at + _PIECES, np.int32(pieces))
    set_i64(ring, count + 1)


@register_jitable
def record_event(step, lane, instruction, waiting, start, pieces):
    """Write one event into the lane's ring."""
    ring = word(step, TRACE) + lane * word(step, TRACE_STRIDE)
    write_event(ring, start, cycles(), start - waiting, word(step, EPOCH), word(instruction, OPCODE), pieces)


@register_jitable
def run_program(step, lane, first, deadline):
    """Run records from number `first` on until the end, or until the cycle counter passes `deadline`.

    Returns the number of the record to go on with (the program's length at its end), or ABANDONED.
    """
    count, abort = word(step, RECORDS), word(step, ABORT)
    spin, nap = word(step, SPIN), word(step, NAP)
    tracing, counts = word(step, TRACE) != 0, word(step, COUNTS) + lane * COUNTS_BYTES
    for number in range(first, count):
        instruction = word(step, PROGRAM) + number * RECORD_BYTES
        part, rest = (word(instruction, OPCODE) >> 32) & 0xFF, (word(instruction, OPCODE) >> 40) & 0xFF
        waiting = cycles()
        if waiting > deadline:
            return number
        for flag in range(WAIT, WAIT + 2):
            awaited = word(instruction, flag)
            if awaited & FOREIGN:
                met = cycles()
                if not await_unit(awaited - FOREIGN, word(step, EPOCH), abort, word(step, RATE), counts, FOREVER):
                    return ABANDONED
                if rest != 0:
                    tally(step, lane, LINE_REST + rest - 1, cycles() - met)
            elif awaited != 0 and not wait_flag(awaited, word(step, EPOCH), spin, abort, nap):
                return ABANDONED
        if i64_at(abort) != 0:
            return ABANDONED
        give_way(step)
        start = cycles()
        tally(step, lane, LINE_PROGRESS, 1)
        pieces = call_kernel(word(instruction, KERNEL), instruction, step, lane)
        tally(step, lane, LINE_PROGRESS, 1)
        if part != 0:
            tally(step, lane, LINE_PART + part - 1, cycles() - start)
        if tracing and pieces > 0:
            record_event(step, lane, instruction, waiting, start, pieces)
    return count


@register_jitable
def take_step(header, step, go, seen, idle):
    """Wait for the go flag to pass `seen`, and copy the header whole; returns the epoch.

    The header's epoch is its sequence lock: `lane_begin` clears it first and writes it last.
    """
    while True:
        wait_flag(go, seen + 1, idle, word(header, NEVER), word(header, NAP))
        epoch = acquire(header + 8 * EPOCH)
        for i in range(HEADER_WORDS):
            set_i64(step + 8 * i, i64_at(header + 8 * i))
        fence()
        if epoch != 0 and acquire(header + 8 * EPOCH) == epoch and reached(epoch, seen + 1):
            set_i64(step + 8 * EPOCH, epoch)
            return epoch
        pause()


@kernel
def lane_begin() -> Callable[..., Any]:
    """Publish a step: put the words at `source` into the header that lanes watch, and raise the go flag."""

    def run(header, source, go):
        release(header + 8 * EPOCH, 0)
        fence()
        for i in range(HEADER_WORDS):
            if i != EPOCH:
                set_i64(header + 8 * i, i64_at(source + 8 * i))
        epoch = word(source, EPOCH)
        release(header + 8 * EPOCH, epoch)
        post(go, epoch)
        return epoch

    return run


@kernel
def lane_worker() -> Callable[..., Any]:
    """Serve steps after number `seen` until one says STOP. `header`: the unit's; `step`: this lane's copy;
    `parked`: the flag that tells which step the lane has left; `idle`: cycles to spin before sleeping."""

    def run(header, step, lane, go, parked, seen, idle):
        epoch = seen
        while True:
            epoch = take_step(header, step, go, epoch, idle)
            if word(step, STOP) != 0:
                return epoch
            run_program(step, lane, 0, FOREVER)
            post(parked, epoch)

    return run


@kernel
def lane_part() -> Callable[..., Any]:
    """A slice of a program: see run_program."""

    def run(step, lane, first, deadline):
        return run_program(step, lane, first, deadline)

    return run


@kernel
def lane_watch() -> Callable[..., Any]:
    """1 when the flag has come to `value`; 0 after `spin` cycles and a nap, or less, in which it did not."""

    def run(flag, value, spin, nap):
        start = cycles()
        while not reached(acquire(flag), value) and cycles() - start < spin:
            pause()
        if not reached(acquire(flag), value):
            sleep_on(flag, value, nap)
        return 1 if reached(acquire(flag), value) else 0

    return run


@kernel
def lane_await() -> Callable[..., Any]:
    """1 when another unit has posted the flag, 0 when it has not for `most` cycles, or the step is abandoned."""

    def run(flag, value, abort, rate, counts, most):
        return 1 if await_unit(flag, value, abort, rate, counts, most) else 0

    return run


@kernel
def lane_post() -> Callable[..., Any]:
    """Set a flag, and wake who sleeps on it."""

    def run(flag, value):
        post(flag, value)
        return value

    return run


@kernel
def lane_event() -> Callable[..., Any]:
    """Write one event into the trace ring at `ring`; times in cycles."""

    def run(ring, start, end, waited, epoch, opcode, pieces):
        write_event(ring, start, end, waited, epoch, opcode, pieces)
        return 1

    return run


@kernel
def lane_pulse() -> Callable[..., Any]:
    """Count the flag at `line` up, and again after every nap, while the flag behind it is not posted; the nap's length
    is that flag's third and fourth word. So another process sees that this one lives (docs/supervision.md)."""

    def run(line):
        stop = line + LINE
        while acquire(stop) == 0:
            fetch_add(line, 1)
            sleep_on(stop, 1, stop + 16)
        return acquire(line)

    return run


@kernel
def lane_cycles() -> Callable[..., Any]:
    """The counter that trace events carry."""

    def run():
        return cycles()

    return run
