"""How lanes meet: flags, claims and the count of finished pieces (docs/flags.md).

A flag is a 64-byte line: a 64-bit counter that only grows and carries a step's epoch, and 8 bytes further the
number of sleepers. The futex sits on the counter's low 32 bits, so epochs are compared by wrapped difference.

A claim line holds `epoch << 32 | next piece`. Each lane owns an equal run of an instruction's pieces and takes
them in order; a lane that has none left takes from the others' runs, so a disturbed lane costs a piece. A lane
that comes late, in a later epoch, finds a newer line and nothing to do.
"""

import numpy as np
from numba.extending import register_jitable

from coterie.kernels.atomics import (
    FUTEX_CALL,
    FUTEX_WAIT,
    FUTEX_WAKE,
    YIELD_CALL,
    acquire,
    call_kernel,
    compare_swap,
    cycles,
    fetch_add,
    libc_syscall,
    pause,
    release,
)
from coterie.kernels.record import (
    ABORT,
    ARRIVED,
    CLAIM,
    COUNTS,
    COUNTS_BYTES,
    DONE,
    EPOCH,
    FREED,
    FREES,
    KERNEL,
    LANES_COUNT,
    LATE,
    LINE,
    LINE_POLLED,
    LINE_PROGRESS,
    LINE_SLEPT,
    LINE_STALLED,
    NAP,
    NAP_FOR,
    ORDERED,
    PREPARE,
    SET,
    SLEEPERS,
    SPIN,
    TAPE,
    USUAL,
    WHOLE,
    YIELD,
)
from coterie.kernels.vector import i64_at, set_i64

ARRIVAL_SPIN = 5  # binary digits by which a wait for weights spins less than one for another lane
MARGIN = 8  # microseconds before the predicted moment at which a wait for another unit is to be awake
SHORTEST = 20  # microseconds: the shortest nap worth a system call
LONGEST = 20_000
LOOK = 2  # microseconds of looking between naps that nothing predicts
PROBE = 8  # every so many steps a sleep is a quarter shorter: who oversleeps does not see by how much
BRIEF = 150  # microseconds: for waits that usually take less nobody sleeps, since waking up may take as long


@register_jitable
def word(base, index):
    """A 64-bit word of a record or a step header."""
    return i64_at(base + 8 * index)


@register_jitable
def reached(value, wanted):
    """Whether a counter has come to `wanted`, right across the wrap of its low 32 bits."""
    return np.int32(np.int64(value) - np.int64(wanted)) >= 0


@register_jitable
def post(flag, value):
    """Set a flag and wake who sleeps on it."""
    release(flag, value)
    if fetch_add(flag + SLEEPERS, 0) != 0:  # a read-modify-write orders the store before this look
        libc_syscall(FUTEX_CALL, flag, FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)


@register_jitable
def sleep_on(flag, wanted, timespec):
    """Sleep until the flag is posted, or for the time at address `timespec` (seconds, nanoseconds)."""
    fetch_add(flag + SLEEPERS, 1)
    seen = acquire(flag)
    if not reached(seen, wanted):  # the kernel looks again whether the value is still `seen`
        libc_syscall(FUTEX_CALL, flag, FUTEX_WAIT, seen & 0xFFFFFFFF, timespec, 0, 0)
    fetch_add(flag + SLEEPERS, -1)


@register_jitable
def give_way(step):
    """Let a thread of a reading unit run that waits for this core: the scheduler by itself would let it wait for its
    next tick, milliseconds in which nothing is read."""
    if word(step, YIELD) != 0:
        libc_syscall(YIELD_CALL, 0, 0, 0, 0, 0, 0)


@register_jitable
def wait_flag(flag, wanted, spin, abort, timespec):
    """Wait until a flag reaches `wanted`: spin for `spin` cycles, then sleep. False if the step is abandoned."""
    if reached(acquire(flag), wanted):
        return True
    start = cycles()
    while True:
        for _ in range(64):
            pause()
            if reached(acquire(flag), wanted):
                return True
        if i64_at(abort) != 0:
            return False
        if cycles() - start > spin:
            sleep_on(flag, wanted, timespec)


@register_jitable
def nap_on(flag, wanted, microseconds):
    """Sleep until the flag is posted, or for so long."""
    set_i64(flag + NAP_FOR, 0)
    set_i64(flag + NAP_FOR + 8, microseconds * 1000)  # lanes that wait for one flag want about the same
    sleep_on(flag, wanted, flag + NAP_FOR)


@register_jitable
def await_unit(flag, wanted, abort, rate, counts, most):
    """Wait for a flag that another unit posts, perhaps without waking anybody, for `most` cycles; False if it has not
    come, or the step is abandoned.

    HeteroInfer's way (section 4.3): waits repeat step after step, so sleep for what they usually take, less what naps
    are usually late, and look only from there on. The usual is kept in the flag's own line. `rate`: cycles a
    microsecond; what was slept and looked at is added to the line of counts.
    """
    usual, late = i64_at(flag + USUAL), i64_at(flag + LATE)
    if reached(acquire(flag), wanted):
        if usual != 0:  # else the next short wait would be slept through as long
            set_i64(flag + USUAL, usual // 2)
        return True
    start, looked, overslept, probing = cycles(), 0, False, wanted % PROBE == 0
    nap = (usual - late) // rate - MARGIN
    look = late + 2 * MARGIN * rate if usual else LOOK * rate
    if 0 < usual < BRIEF * rate:
        nap, look = 0, BRIEF * rate
    elif probing:
        nap, look = nap - nap // 4, look + usual // 4
    while True:
        if nap >= SHORTEST:
            before, nap = cycles(), min(nap, LONGEST)
            nap_on(flag, wanted, nap)
            slept = cycles() - before
            if slept >= nap * rate:  # nobody woke this lane
                overslept = reached(acquire(flag), wanted)
                late += (slept - nap * rate - late) // 8
                set_i64(flag + LATE, max(0, late))
        begun = cycles()
        while not reached(acquire(flag), wanted) and i64_at(abort) == 0 and cycles() - begun < look:
            pause()
        now = cycles()
        looked += now - begun
        here = reached(acquire(flag), wanted)
        if here or i64_at(abort) != 0 or now - start > most:
            break
        nap, look = max(SHORTEST, (now - start) // rate // 8), LOOK * rate
    taken = cycles() - start
    set_i64(counts + 8 * LINE_POLLED, i64_at(counts + 8 * LINE_POLLED) + looked)
    set_i64(counts + 8 * LINE_SLEPT, i64_at(counts + 8 * LINE_SLEPT) + taken - looked)
    if here and probing and overslept:
        set_i64(flag + USUAL, min(taken, usual))
    elif here:
        set_i64(flag + USUAL, taken if usual == 0 else usual + (taken - usual) // 4)
    return here


@register_jitable
def given(record, operand, step, count):
    """How many of a product's `count` parts, the first ones, another unit computes, as the header word that the operand
    names says: a lane's own copy, so that all of its pieces are of one step."""
    named = word(record, operand)
    return count * word(step, named) // WHOLE if named != 0 else np.int64(0)


@register_jitable
def claim(record, step, lane, total):
    """The next piece of `total` for this lane, or -1."""
    line = word(record, CLAIM)
    epoch, lanes, mine = word(step, EPOCH), word(step, LANES_COUNT), lane
    if word(record, ORDERED) != 0:
        lanes, mine = 1, 0  # one run for all
    for turn in range(lanes):
        owner = mine + turn
        if owner >= lanes:
            owner -= lanes
        first = total * owner // lanes
        count = total * (owner + 1) // lanes - first
        at = line + owner * LINE
        while True:
            seen = acquire(at)
            taken = seen & 0xFFFFFFFF
            age = np.int32(epoch - (seen >> 32))
            if age < 0:
                return -1
            if age > 0:
                taken = 0
            if taken >= count:
                break
            if compare_swap(at, seen, ((epoch & 0xFFFFFFFF) << 32) | (taken + 1)):
                tally(step, lane, LINE_PROGRESS, 2)
                return first + taken
    return -1


@register_jitable
def finish(record, step, pieces, total):
    """Count finished pieces; whoever finishes the last of `total` posts the instruction's flag."""
    if pieces > 0:
        done = word(record, DONE)
        if fetch_add(done, pieces) + pieces == total:
            release(done, 0)
            if word(record, FREES) != 0:  # before the flag: what follows may free more, and this counter only grows
                post(word(step, FREED), word(step, TAPE) + word(record, FREES))
            post(word(record, SET), word(step, EPOCH))
    return pieces


@register_jitable
def tally(step, lane, what, amount):
    """Add to a word of the lane's own counts."""
    at = word(step, COUNTS) + lane * COUNTS_BYTES + 8 * what
    set_i64(at, i64_at(at) + amount)


@register_jitable
def await_weights(flag, wanted, step, lane):
    """Wait until streamed weights have arrived; False if the step is abandoned meanwhile. Reads take long, so a lane
    soon sleeps; what it waited is counted."""
    if reached(acquire(flag), wanted):
        return True
    begun = cycles()
    tally(step, lane, LINE_PROGRESS, 1)
    here = wait_flag(flag, wanted, word(step, SPIN) >> ARRIVAL_SPIN, word(step, ABORT), word(step, NAP))
    tally(step, lane, LINE_PROGRESS, 1)
    tally(step, lane, LINE_STALLED, cycles() - begun)
    return here


@register_jitable
def await_position(position, step, lane):
    """Wait until the read at a tape position of this step has arrived."""
    return await_weights(word(step, ARRIVED), word(step, TAPE) + position + 1, step, lane)


@register_jitable
def prepare(record, step, lane):
    """Run the instruction's preparation into this lane's own buffers.

    Called after the first claim: while a lane holds a piece the step cannot pass this instruction, so nothing
    that the preparation reads can be overwritten. Small row-wise work costs less done twice than waited for.
    """
    first = word(record, PREPARE)
    if first != 0:
        stamp, epoch = word(first, DONE) + lane * LINE, word(step, EPOCH)
        if i64_at(stamp) != epoch:  # instructions with the same input share a preparation
            call_kernel(word(first, KERNEL), first, step, lane)
            set_i64(stamp, epoch)
