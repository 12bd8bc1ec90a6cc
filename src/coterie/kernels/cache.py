"""The neuron cache as lanes see it: who is in memory, who was used, what must be read (docs/sparse.md).

Metadata are arrays in the arena. A slot holds one neuron's bundle. `STAMPS` carries the tick (step and layer) of a
slot's last use; what carries the present tick, or a later one, is never given away. A lane stamps before it looks again
whether the neuron is still there, the reader clears the neuron's address before it looks at the stamp: one of them sees
the other.
"""

import numpy as np
from numba.extending import register_jitable

from coterie.kernels.atomics import (
    FUTEX_CALL,
    FUTEX_WAKE,
    acquire,
    compare_swap,
    fence,
    fetch_add,
    libc_syscall,
    release,
)
from coterie.kernels.record import SLEEPERS
from coterie.kernels.sync import word
from coterie.kernels.vector import i64_at, set_i64

# Words of the control block; each of the first lines is written by others than its neighbours are.
TICK = 0  # of the lanes' present layer
DEMANDED = 64  # flag, by its offset: requests made so far
SERVED = 128  # flag: requests answered
TAIL = 24  # word: places taken in the queue
STOP = 32
HEAD = 33  # the reader's place in the queue
QUEUE, QUEUE_MASK = 34, 35  # int64[a power of two]: 1 + neuron + (layer << 32); 0: nothing yet
LAYERS = 36  # int64[layers][LAYER_WORDS]
SLOT_BASE, SLOT_BYTES, SLOT_COUNT = 37, 38, 39
OWNERS, STAMPS, COUNTS = 40, 41, 42  # int64[slots]: address of the neuron's entry (0: none), tick, uses up to MOST
LOADING = -1  # an owner: a read is on its way
HAND, USED = 43, 44  # of the clock; slots that ever held something
BUNDLE, ALIGN = 45, 46  # bytes of a bundle; what reads are multiples of
FREE = 47  # int64[requests]: a stack of request slots
FREE_COUNT = 48
EVICTIONS = 49  # counter
WOKEN = 50  # SERVED when lanes were woken last
LAYER_COUNT = 51
CACHE_WORDS = 64

ENTRIES, PLACE, PER, STRIDE, SUMS = range(5)  # words of a layer: its addresses, where in the file its bundles begin,
LAYER_WORDS = 8  # how many an extent has, the extents' distance, their checksums
PENDING = 1  # in place of an address: the neuron was asked for
MOST = 2  # uses that count (benchmarks/policies.py compares)


@register_jitable
def touch(cache, entry, tick):
    """Say that the neuron whose address stands at `entry` is used; its address, or 0 where it is not in memory, or
    PENDING."""
    at = acquire(entry)
    slot = (at - word(cache, SLOT_BASE)) // word(cache, SLOT_BYTES)
    if at <= PENDING or at < word(cache, SLOT_BASE) or slot >= word(cache, SLOT_COUNT):
        return at  # not there, or there for good
    release(word(cache, STAMPS) + 8 * slot, tick)
    uses = word(cache, COUNTS) + 8 * slot
    set_i64(uses, min(i64_at(uses) + 1, MOST))
    fence()
    return acquire(entry)


@register_jitable
def demand(cache, entry, layer, neuron):
    """Put a neuron, whose address would stand at `entry`, on the reader's queue. False where it need not be: somebody
    asked for it, or the reader was about to drop it and let it stay."""
    if not compare_swap(entry, 0, PENDING):
        return False
    place = word(cache, QUEUE) + 8 * (fetch_add(cache + 8 * TAIL, 1) & word(cache, QUEUE_MASK))
    release(place, 1 + neuron + (layer << 32))
    return True


@register_jitable
def call_reader(cache, count):
    """Say that `count` neurons were demanded."""
    fetch_add(cache + DEMANDED, count)
    if fetch_add(cache + DEMANDED + SLEEPERS, 0) != 0:
        libc_syscall(FUTEX_CALL, cache + DEMANDED, FUTEX_WAKE, 1, 0, 0, 0)


@register_jitable
def next_demand(cache):
    """What the queue has next; 0: nothing."""
    return acquire(word(cache, QUEUE) + 8 * (word(cache, HEAD) & word(cache, QUEUE_MASK)))


@register_jitable
def drop_demand(cache):
    """Take that from the queue."""
    set_i64(word(cache, QUEUE) + 8 * (word(cache, HEAD) & word(cache, QUEUE_MASK)), 0)
    set_i64(cache + 8 * HEAD, word(cache, HEAD) + 1)


@register_jitable
def slot_address(cache, slot):
    return word(cache, SLOT_BASE) + slot * word(cache, SLOT_BYTES)


@register_jitable
def victim(cache, tick):
    """A slot to read into: one that was never used, else by the clock one that was used seldom and not now (second
    chance with a count of uses). -1: every slot is in use now."""
    fresh = word(cache, USED)
    if fresh < word(cache, SLOT_COUNT):
        set_i64(cache + 8 * USED, fresh + 1)
        return fresh
    for _ in range((MOST + 2) * word(cache, SLOT_COUNT)):
        hand = word(cache, HAND) + 1
        if hand >= word(cache, SLOT_COUNT):
            hand = np.int64(0)
        set_i64(cache + 8 * HAND, hand)
        uses, owner = word(cache, COUNTS) + 8 * hand, i64_at(word(cache, OWNERS) + 8 * hand)
        if owner == LOADING or acquire(word(cache, STAMPS) + 8 * hand) >= tick:
            continue
        if i64_at(uses) > 0:
            set_i64(uses, i64_at(uses) - 1)
            continue
        if owner != 0 and not give_up_slot(cache, hand, owner, tick):
            continue
        return hand
    return np.int64(-1)


@register_jitable
def give_up_slot(cache, slot, owner, tick):
    """Drop what a slot holds; not if a lane is just beginning to use it."""
    at = i64_at(owner)
    release(owner, 0)
    fence()
    if acquire(word(cache, STAMPS) + 8 * slot) >= tick:
        release(owner, at)
        return False
    set_i64(word(cache, OWNERS) + 8 * slot, 0)
    set_i64(cache + 8 * EVICTIONS, word(cache, EVICTIONS) + 1)
    return True
