"""The compiled lane of the flash unit: works through a tape of reads, never in Python (docs/flash.md).

Reads are numbered by a sequence that only grows; an announcement says which positions of the tape the next numbers
stand for. The lane joins neighbours into requests, keeps `depth` of them in flight, checks what came, and posts ARRIVED
in order. Memory of the ring is written when FREED says that its last reads are done with.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from coterie.kernels import tape as t
from coterie.kernels.atomics import acquire, cycles, fence, pause, release
from coterie.kernels.checksum import checksum_at
from coterie.kernels.compiler import kernel
from coterie.kernels.lane import write_event
from coterie.kernels.pread import LEAVE, pread_start, pread_turn, queue
from coterie.kernels.record import Opcode
from coterie.kernels.sync import post, sleep_on, word
from coterie.kernels.uring import uring_start, uring_turn
from coterie.kernels.vector import i64_at, set_i64

EIO, EINTR, EAGAIN, EBUSY = 5, 4, 11, 16
PATIENCE = 100  # naps until a kernel that takes no requests counts as broken
READ_OPCODE = int(Opcode.READ)


@register_jitable
def put(base, index, value):
    set_i64(base + 8 * index, value)


@register_jitable
def count_up(control, counter, by):
    put(control, counter, word(control, counter) + by)


@register_jitable
def mine(control, index):
    """A word of the announcement the lane goes by."""
    return word(control, t.MINE + index)


@register_jitable
def slot_at(control, request):
    """The slot of request number `request`."""
    return word(control, t.SLOTS) + request % word(control, t.SLOT_COUNT) * t.SLOT_BYTES


@register_jitable
def entry_at(control, position):
    return word(control, t.TAPE) + position * t.READ_BYTES


# --- what to read next ------------------------------------------------------------------------------


@register_jitable
def take_announcement(control):
    """Copy the announcement whole if there is a new one; whether it goes somewhere else than the lane expected."""
    before = mine(control, t.REDIRECTS)
    while True:
        number = acquire(control)
        if number == mine(control, t.NUMBER):
            return False
        for i in range(1, t.ANNOUNCEMENT):
            put(control, t.MINE + i, word(control, i))
        fence()
        if number != 0 and acquire(control) == number:
            put(control, t.MINE + t.NUMBER, number)
            return mine(control, t.REDIRECTS) != before or word(control, t.NEXT) < mine(control, t.SEQ)
        pause()


@register_jitable
def next_positions(control):
    """The position of the next read, and how many follow it in its range, itself included; none: 0."""
    at = word(control, t.NEXT) - mine(control, t.SEQ)
    position = mine(control, t.FIRST) + at
    left = mine(control, t.END) - position
    if left <= 0:
        position = mine(control, t.AHEAD) - left
        left = mine(control, t.AHEAD_END) - position
    return position, max(left, 0)


@register_jitable
def owners_of(control, entry):
    """First and last + 1 address of the owner table's words for the entry's pages; outside of the ring none."""
    at = word(entry, t.ADDRESS) - word(control, t.RING)
    if at < 0 or at >= word(control, t.RING_BYTES):
        return 0, 0
    first = word(control, t.OWNERS) + at // t.PAGE * 8
    return first, first + word(entry, t.NBYTES) // t.PAGE * 8


@register_jitable
def wanted_for(control, entry):
    """What FREED must have come to before the entry's memory may be written."""
    first, last = owners_of(control, entry)
    wanted = np.int64(0)
    for owner in range(first, last, 8):
        wanted = max(wanted, i64_at(owner))
    return wanted


@register_jitable
def own(control, entry, seq):
    first, last = owners_of(control, entry)
    for owner in range(first, last, 8):
        set_i64(owner, seq + 1)


@register_jitable
def make_request(control, position, left):
    """Fill the next slot with the entry at `position` and its neighbours, of `left` entries at most. Returns 0, or what
    FREED must come to first."""
    seq = word(control, t.NEXT)
    # What was freed unread may still be on its way: two reads must not land in one place.
    freed = min(acquire(control + t.FREED), acquire(control + t.ARRIVED))
    entry = entry_at(control, position)
    wanted = wanted_for(control, entry)
    if wanted > freed:
        return wanted
    slot = slot_at(control, word(control, t.TAIL))
    offset, address, nbytes = word(entry, t.OFFSET), word(entry, t.ADDRESS), np.int64(0)
    count = np.int64(0)
    while True:
        own(control, entry, seq + count)
        nbytes += word(entry, t.NBYTES)
        count += 1
        if count == left:
            break
        entry += t.READ_BYTES
        beside = word(entry, t.OFFSET) == offset + nbytes and word(entry, t.ADDRESS) == address + nbytes
        small = nbytes + word(entry, t.NBYTES) <= word(control, t.BLOCK)
        if not (beside and small) or wanted_for(control, entry) > freed:
            break
    put(slot, t.COUNT, count)
    put(slot, t.POSITION, position)
    put(slot, t.FROM, offset)
    put(slot, t.TO, address)
    put(slot, t.LENGTH, nbytes)
    put(slot, t.DONE, 0)
    put(slot, t.TRIES, 0)
    put(slot, t.STARTED, cycles())
    put(control, t.NEXT, seq + count)
    return 0


# --- what has come ----------------------------------------------------------------------------------


@register_jitable
def give_up(control, code, position, errno):
    """Remember the first failure and end the step that waits for it."""
    if word(control, t.FAILED) == 0:
        put(control, t.FAILED_POSITION, position)
        put(control, t.FAILED_ERRNO, errno)
        release(control + 8 * t.FAILED, code)
        release(word(control, t.ABORT), 1)


@register_jitable
def try_again(control, slot, code, position, errno):
    """Whether the request in `slot` may be read once more; else it has failed."""
    put(slot, t.TRIES, word(slot, t.TRIES) + 1)
    if word(slot, t.TRIES) > t.RETRIES_ALLOWED:
        give_up(control, code, position, errno)
        return False
    count_up(control, t.RETRIES, 1)
    return True


@register_jitable
def settle(control, slot):
    """Judge a result; whether the request, or what is left of it, must be read again."""
    put(slot, t.STATE, t.COMPLETE)
    result, left = word(slot, t.RESULT), word(slot, t.LENGTH) - word(slot, t.DONE)
    if result == left:
        return False
    if result < 0 or result > left:
        return try_again(control, slot, t.IO, word(slot, t.POSITION), -result if result < 0 else EIO)
    if result < t.PAGE:  # the end of the file, most likely
        return try_again(control, slot, t.SHORT, word(slot, t.POSITION), 0)
    put(slot, t.DONE, word(slot, t.DONE) + result // t.PAGE * t.PAGE)  # direct reads go on at a whole page
    count_up(control, t.RETRIES, 1)
    return True


@register_jitable
def first_wrong(control, slot):
    """The position of the first entry whose checksum differs; -1: all are right."""
    position, address = word(slot, t.POSITION), word(slot, t.TO)
    for i in range(word(slot, t.COUNT)):
        entry = entry_at(control, position + i)
        nbytes = word(entry, t.NBYTES)
        if checksum_at(address, nbytes) != word(entry, t.CHECKSUM):
            return position + i
        address += nbytes
    return np.int64(-1)


@register_jitable
def deliver(control):
    """Post ARRIVED for the oldest requests, as far as they are right."""
    seq = acquire(control + t.ARRIVED)
    arrived = seq
    while word(control, t.HEAD) < word(control, t.TAIL):
        slot = slot_at(control, word(control, t.HEAD))
        if word(slot, t.STATE) != t.RIGHT:
            break
        arrived += word(slot, t.COUNT)
        count_up(control, t.HEAD, 1)
    if arrived > seq:
        post(control + t.ARRIVED, arrived)


@register_jitable
def record_read(control, request, slot):
    """Write one event into the trace ring; the oldest is overwritten when it is full."""
    layer = word(entry_at(control, word(slot, t.POSITION)), t.LAYER) & 0xFFFF
    write_event(
        word(control, t.TRACE), word(slot, t.STARTED), word(slot, t.FINISHED), 0,
        request % word(control, t.SLOT_COUNT), READ_OPCODE | layer << 16, word(slot, t.LENGTH),
    )  # fmt: skip


@register_jitable
def find(control, state):
    """The number of the oldest request in that state; -1: there is none."""
    for request in range(word(control, t.HEAD), word(control, t.TAIL)):
        if acquire(slot_at(control, request) + 8 * t.STATE) == state:
            return request
    return np.int64(-1)


@register_jitable
def count_busy(control):
    """Bring the time with reads in flight up to date."""
    now = cycles()
    if word(control, t.IN_FLIGHT) > 0:
        count_up(control, t.BUSY, now - word(control, t.SINCE))
    put(control, t.SINCE, now)


@register_jitable
def nap(control, flag, wanted):
    count_up(control, t.NAPS, 1)
    sleep_on(flag, wanted, word(control, t.NAP))


ENGINES = {"io_uring": (uring_start, uring_turn), "preadv": (pread_start, pread_turn)}


def engine_of(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of an engine, "io_uring" or "preadv": `start(control, slot)` queues a read; `go_on(control, wait)` is a turn,
    again while the kernel is short of something, and False when the engine fails."""
    start, turn = ENGINES[name]

    @register_jitable
    def go_on(control, wait):
        for _ in range(PATIENCE):
            refused = turn(control, wait)
            if refused == 0 or refused == EINTR:
                return True
            if refused != EAGAIN and refused != EBUSY:
                break
            nap(control, control + t.LANDED, acquire(control + t.LANDED) + 1)
        give_up(control, t.ENGINE, 0, refused)
        return False

    return start, go_on


@kernel
def flash_lane(engine: str) -> Callable[..., Any]:
    """Serve announcements until one says STOP. Returns 0, or the errno of an engine that broke down."""
    start, go_on = engine_of(engine)

    @register_jitable
    def send(control, request):
        count_busy(control)
        count_up(control, t.IN_FLIGHT, 1)
        put(slot_at(control, request), t.STATE, t.READING)
        start(control, request % word(control, t.SLOT_COUNT))

    @register_jitable
    def collect(control, again):
        """Settle what has come; with `again`, read what must be read again."""
        request = find(control, t.CAME)
        while request >= 0:
            count_busy(control)
            count_up(control, t.IN_FLIGHT, -1)
            if not again:  # what is dropped is not judged
                put(slot_at(control, request), t.STATE, t.COMPLETE)
            elif settle(control, slot_at(control, request)) and word(control, t.FAILED) == 0:
                send(control, request)
            request = find(control, t.CAME)

    @register_jitable
    def issue(control):
        """Send requests while there is something to read and room for it. Returns what FREED must come to before the
        next; 0 when that is not what keeps it."""
        while word(control, t.IN_FLIGHT) < word(control, t.DEPTH):
            position, left = next_positions(control)
            request = word(control, t.TAIL)
            if left == 0 or request - word(control, t.HEAD) == word(control, t.SLOT_COUNT):
                return 0
            wanted = make_request(control, position, left)
            if wanted > 0:
                return wanted
            put(control, t.TAIL, request + 1)
            count_up(control, t.REQUESTS, 1)
            send(control, request)
        return 0

    @register_jitable
    def check(control, request):
        """Compare checksums; what is wrong is read again."""
        slot, began = slot_at(control, request), cycles()
        wrong = first_wrong(control, slot)
        if word(control, t.UNCHECKED) != 0:
            wrong = np.int64(-1)
        count_up(control, t.CHECKING, cycles() - began)
        if wrong < 0:
            put(slot, t.STATE, t.RIGHT)
            count_up(control, t.BYTES, word(slot, t.LENGTH))
            if word(control, t.TRACE) != 0:
                record_read(control, request, slot)
            deliver(control)
        elif try_again(control, slot, t.CHECKSUMS, wrong, 0):
            put(slot, t.DONE, 0)
            send(control, request)

    @register_jitable
    def move(control):
        """Take a new announcement; if it goes elsewhere, drop everything. False when the engine fails."""
        elsewhere = take_announcement(control)
        if elsewhere:
            collect(control, False)
            while word(control, t.IN_FLIGHT) > 0:  # memory is not the lane's own until all reads have landed
                if not go_on(control, True):
                    return False
                collect(control, False)
            put(control, t.HEAD, word(control, t.TAIL))
            put(control, t.NEXT, mine(control, t.SEQ))
            release(control + 8 * t.FAILED, 0)
            post(control + t.ARRIVED, mine(control, t.SEQ))
        if acquire(control + t.TAKEN) != mine(control, t.NUMBER):
            post(control + t.TAKEN, mine(control, t.NUMBER))
        return True

    def run(control):
        while move(control) and mine(control, t.STOP) == 0:
            count_busy(control)
            collect(control, True)
            failed = word(control, t.FAILED) != 0
            wanted = 0 if failed else issue(control)
            complete = np.int64(-1) if failed else find(control, t.COMPLETE)
            under_way = word(control, t.IN_FLIGHT) > 0
            if not go_on(control, under_way and complete < 0):
                break
            if complete >= 0:
                check(control, complete)
            elif under_way:
                continue
            elif wanted > 0:
                began = cycles()
                nap(control, control + t.FREED, wanted)
                count_up(control, t.BLOCKED, cycles() - began)
            else:
                if failed:  # a step that began in the meantime would wait for ever
                    release(word(control, t.ABORT), 1)
                nap(control, control + t.GO, mine(control, t.NUMBER) + 1)
        for _ in range(word(control, t.READERS)):
            queue(control, LEAVE)
        return word(control, t.FAILED_ERRNO)

    return run


@kernel
def flash_announce() -> Callable[..., Any]:
    """Publish an announcement, the words at `source`. No step is running, so what came before is done with."""

    def run(control, source):
        if acquire(control + t.FREED) < word(source, t.SEQ):
            post(control + t.FREED, word(source, t.SEQ))
        number = word(source, t.NUMBER)
        release(control, 0)
        fence()
        for i in range(1, t.ANNOUNCEMENT):
            put(control, i, word(source, i))
        release(control, number)
        post(control + t.GO, number)
        return number

    return run


@kernel
def flash_wait() -> Callable[..., Any]:
    """1 when the flag has come to `value`; 0 when the word at `end` is not 0 or the cycle counter past `deadline`."""

    def run(flag, value, end, nap, deadline):
        while acquire(flag) < value:
            if acquire(end) != 0 or cycles() > deadline:
                return 0
            sleep_on(flag, value, nap)
        return 1

    return run
