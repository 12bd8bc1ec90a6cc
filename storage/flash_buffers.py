"""Where the flash unit's control block, tape, slots and trace ring lie in the arena."""

from dataclasses import dataclass

import numpy as np

from coterie.kernels import record as r
from coterie.kernels import tape as t
from coterie.storage.arena import BufferRef, Ledger

REGION = "flash"
WINDOW = 4  # requests under way or waiting for an older one, for each that is in flight
TRACE_EVENTS = 1 << 16


@dataclass(frozen=True)
class FlashBuffers:
    """`control`: int64[128]; `tape`: uint8[entries][64], record tape.READ; `slots`: int64[n][16]; `queue`: int64[n];
    `owners`: int64[pages of the ring]; `trace`: uint8[1][bytes] or None."""

    control: BufferRef
    tape: BufferRef
    slots: BufferRef
    queue: BufferRef
    owners: BufferRef
    trace: BufferRef | None


def lay_out_flash(ledger: Ledger, *, entries: int, ring_bytes: int, depth: int, tracing: bool) -> FlashBuffers:
    """Cut the unit's buffers: for tapes of up to `entries` reads, a ring of `ring_bytes` bytes, and `depth` requests in
    flight at most."""
    ring = r.RING_HEADER + TRACE_EVENTS * r.EVENT.itemsize
    return FlashBuffers(
        control=ledger.allocate(REGION, t.CONTROL_WORDS, np.int64),
        tape=ledger.allocate(REGION, (entries, t.READ_BYTES)),
        slots=ledger.allocate(REGION, (WINDOW * depth, t.SLOT_WORDS), np.int64),
        queue=ledger.allocate(REGION, WINDOW * depth, np.int64),
        owners=ledger.allocate(REGION, ring_bytes // t.PAGE, np.int64),
        trace=ledger.allocate(REGION, (1, ring)) if tracing else None,
    )
