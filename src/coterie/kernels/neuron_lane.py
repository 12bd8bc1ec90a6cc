"""The compiled lane that reads single neurons into the cache, as compute lanes ask for them (docs/sparse.md).

It takes demands from the queue, keeps up to `depth` reads in flight, checks each bundle's checksum, and only then
writes its address where lanes look for it. Reads complete in any order. Control block, request slots and engines are
the flash lane's (tape.py); the cache's own words are in cache.py.
"""

from collections.abc import Callable
from typing import Any

from numba.extending import register_jitable

from coterie.kernels import cache as c
from coterie.kernels import tape as t
from coterie.kernels.atomics import FUTEX_CALL, FUTEX_WAKE, acquire, cycles, fence, fetch_add, libc_syscall, release
from coterie.kernels.checksum import checksum_at
from coterie.kernels.compiler import kernel
from coterie.kernels.flash import EBUSY, count_busy, count_up, engine_of, give_up, put, settle, try_again
from coterie.kernels.lane import write_event
from coterie.kernels.pread import LEAVE, queue
from coterie.kernels.record import SLEEPERS, Opcode
from coterie.kernels.sync import sleep_on, word
from coterie.kernels.vector import i64_at, set_i64

READ_OPCODE = int(Opcode.READ)
NEURON, SLOT = t.POSITION, t.COUNT  # what a request's words mean here: layer << 32 | neuron, and the cache's slot
NOTHING = -1
TOGETHER = 16  # demands that are met between two wake-ups


@register_jitable
def request_at(control, number):
    return word(control, t.SLOTS) + number * t.SLOT_BYTES


@register_jitable
def layer_at(cache, wanted):
    return word(cache, c.LAYERS) + (wanted >> 32) * c.LAYER_WORDS * 8


@register_jitable
def entry_of(cache, wanted):
    """Where lanes look for a neuron's address."""
    return word(layer_at(cache, wanted), c.ENTRIES) + 8 * (wanted & 0xFFFFFFFF)


@register_jitable
def place_of(cache, wanted):
    """Where in the file a neuron's bundle lies."""
    layer, neuron = layer_at(cache, wanted), wanted & 0xFFFFFFFF
    extent = neuron // word(layer, c.PER)
    within = neuron - extent * word(layer, c.PER)
    return word(layer, c.PLACE) + extent * word(layer, c.STRIDE) + within * word(cache, c.BUNDLE)


@register_jitable
def answer(control, cache, count):
    """Say that demands were met. Lanes that sleep are woken for some at a time, which spares them looking in vain, and
    for each of the last."""
    if count > 0:
        served = fetch_add(cache + c.SERVED, count) + count
        due = served - word(cache, c.WOKEN) >= TOGETHER or word(control, t.IN_FLIGHT) < TOGETHER // 2
        if due and fetch_add(cache + c.SERVED + SLEEPERS, 0) != 0:
            put(cache, c.WOKEN, served)
            libc_syscall(FUTEX_CALL, cache + c.SERVED, FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)


@register_jitable
def fill_request(control, cache, number, wanted, slot):
    """A read of whole sectors around a neuron's bundle."""
    place, align = place_of(cache, wanted), word(cache, c.ALIGN)
    first = place // align * align
    request = request_at(control, number)
    put(request, SLOT, slot)
    put(request, NEURON, wanted)
    put(request, t.FROM, first)
    put(request, t.TO, c.slot_address(cache, slot))
    put(request, t.LENGTH, (place + word(cache, c.BUNDLE) - first + align - 1) // align * align)
    put(request, t.DONE, 0)
    put(request, t.TRIES, 0)
    put(request, t.STARTED, cycles())


@register_jitable
def free(cache, number):
    """Put a request's number back."""
    put(cache, c.FREE_COUNT, word(cache, c.FREE_COUNT) + 1)
    set_i64(word(cache, c.FREE) + 8 * (word(cache, c.FREE_COUNT) - 1), number)


@register_jitable
def is_right(control, cache, request):
    """Whether what was read has the checksum it should have."""
    began = cycles()
    wanted = word(request, NEURON)
    address = word(request, t.TO) + place_of(cache, wanted) - word(request, t.FROM)
    sums = word(layer_at(cache, wanted), c.SUMS)
    right = checksum_at(address, word(cache, c.BUNDLE)) == i64_at(sums + 8 * (wanted & 0xFFFFFFFF))
    count_up(control, t.CHECKING, cycles() - began)
    return right


@register_jitable
def show(control, cache, request):
    """Let lanes find the neuron."""
    slot, wanted = word(request, SLOT), word(request, NEURON)
    entry = entry_of(cache, wanted)
    set_i64(word(cache, c.OWNERS) + 8 * slot, entry)
    put(request, t.STATE, 0)
    count_up(control, t.BYTES, word(request, t.LENGTH))
    if word(control, t.TRACE) != 0:
        write_event(
            word(control, t.TRACE), word(request, t.STARTED), word(request, t.FINISHED), 0,
            wanted & 0xFFFFFFFF, READ_OPCODE | (wanted >> 32) << 16, word(request, t.LENGTH),
        )  # fmt: skip
    release(entry, word(request, t.TO) + place_of(cache, wanted) - word(request, t.FROM))
    fence()  # a lane that came too early to find it has written the tick before it looked
    tick = acquire(cache + 8 * c.TICK)
    if wanted >> 32 == tick % word(cache, c.LAYER_COUNT):
        release(word(cache, c.STAMPS) + 8 * slot, tick)


@kernel
def neuron_lane(engine: str) -> Callable[..., Any]:
    """Serve demands until told to stop. Returns 0, or the errno of an engine that broke down."""
    start, go_on = engine_of(engine)

    @register_jitable
    def send(control, number):
        count_busy(control)
        count_up(control, t.IN_FLIGHT, 1)
        put(request_at(control, number), t.STATE, t.READING)
        start(control, number)

    @register_jitable
    def take(control, cache):
        """Begin reads as long as some are wanted and there is room; how many demands were met without one."""
        met = 0
        while word(cache, c.FREE_COUNT) > 0:
            wanted = c.next_demand(cache) - 1
            if wanted == NOTHING:
                break
            entry, tick = entry_of(cache, wanted), acquire(cache + 8 * c.TICK)
            if acquire(entry) != c.PENDING:  # it was about to be dropped when it was asked for, and stayed
                c.drop_demand(cache)
                met += 1
                continue
            slot, ahead = c.victim(cache, tick), wanted >> 32 != tick % word(cache, c.LAYER_COUNT)
            if slot == NOTHING and not ahead:  # there is room as soon as reads for another layer have come
                if word(control, t.IN_FLIGHT) == 0:
                    give_up(control, t.ENGINE, wanted, EBUSY)
                break
            c.drop_demand(cache)
            if slot == NOTHING:  # if it is live, it will be asked for again
                release(entry, 0)
                met += 1
                continue
            release(word(cache, c.STAMPS) + 8 * slot, tick - ahead)  # what is asked for ahead makes room for others
            set_i64(word(cache, c.COUNTS) + 8 * slot, 0)  # credit comes with the second use
            set_i64(word(cache, c.OWNERS) + 8 * slot, c.LOADING)
            put(cache, c.FREE_COUNT, word(cache, c.FREE_COUNT) - 1)
            number = i64_at(word(cache, c.FREE) + 8 * word(cache, c.FREE_COUNT))
            fill_request(control, cache, number, wanted, slot)
            count_up(control, t.REQUESTS, 1)
            send(control, number)
        return met

    @register_jitable
    def judge(control, cache, number):
        """Settle one read that came; 1 if its demand was met, or given up."""
        request = request_at(control, number)
        count_busy(control)
        count_up(control, t.IN_FLIGHT, -1)
        again = settle(control, request)
        if word(request, t.STATE) == t.COMPLETE and not again and word(control, t.FAILED) == 0:
            if is_right(control, cache, request):
                show(control, cache, request)
                free(cache, number)
                return 1
            again = try_again(control, request, t.CHECKSUMS, word(request, NEURON), 0)
            put(request, t.DONE, 0)
        if again and word(control, t.FAILED) == 0:
            send(control, number)
            return 0
        put(request, t.STATE, 0)
        set_i64(word(cache, c.OWNERS) + 8 * word(request, SLOT), 0)
        release(entry_of(cache, word(request, NEURON)), 0)
        free(cache, number)
        return 1

    @register_jitable
    def collect(control, cache):
        met = 0
        for number in range(word(control, t.DEPTH)):
            if acquire(request_at(control, number) + 8 * t.STATE) == t.CAME:
                met += judge(control, cache, number)
        return met

    def run(control, cache):
        while acquire(cache + 8 * c.STOP) == 0:
            demanded = acquire(cache + c.DEMANDED)
            met = take(control, cache)
            if not go_on(control, word(control, t.IN_FLIGHT) > 0):
                break
            met += collect(control, cache)
            answer(control, cache, met)
            if word(control, t.IN_FLIGHT) == 0 and met == 0:
                count_busy(control)
                count_up(control, t.NAPS, 1)
                sleep_on(cache + c.DEMANDED, demanded + 1, word(control, t.NAP))
        while word(control, t.IN_FLIGHT) > 0 and go_on(control, True):  # nothing may land after this
            for number in range(word(control, t.DEPTH)):
                if acquire(request_at(control, number) + 8 * t.STATE) == t.CAME:
                    put(request_at(control, number), t.STATE, 0)
                    count_up(control, t.IN_FLIGHT, -1)
        for _ in range(word(control, t.READERS)):
            queue(control, LEAVE)
        return word(control, t.FAILED_ERRNO)

    return run


@kernel
def neuron_wake() -> Callable[..., Any]:
    """Wake the lane, as a demand does."""

    def run(cache):
        c.call_reader(cache, 1)
        return 0

    return run
