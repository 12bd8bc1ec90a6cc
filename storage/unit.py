"""Where a unit's step header, control lines and trace rings lie in the arena."""

from dataclasses import dataclass

import numpy as np

from coterie.kernels import record as r
from coterie.storage.arena import BufferRef, Ledger

TRACE_EVENTS = 1 << 16  # a lane's ring
CONTROL_LINES = 3  # go flag, abort word, a word that stays 0; then one flag a lane
ACTORS = 4  # of a model at most
ENDED = 2  # word of a lane's line: 1 when its thread has ended


@dataclass(frozen=True)
class UnitBuffers:
    """`header`, `steps`: the step header, each lane's copy, and one for who publishes, int64; `control`: int64[3 +
    lanes][8]; `counts`: int64[lanes][words] (record.LINE_...); `rows`: what steps are told of their rows, by header
    word; `rings`: uint8[lanes][bytes] or None; `pulses`: int64[ACTORS][2][8], of actors that are other processes."""

    header: BufferRef
    steps: BufferRef
    control: BufferRef
    nap: BufferRef
    counts: BufferRef
    rows: dict[int, BufferRef]
    rings: BufferRef | None
    pulses: BufferRef

    def pulse(self, number: int) -> BufferRef:
        """The lines of one actor."""
        size = 2 * r.LINE
        return BufferRef(self.pulses.region, self.pulses.offset + number * size, size, "<i8", (2, r.LINE // 8))


def lay_out_unit(ledger: Ledger, lanes: int, rows: int, *, tracing: bool) -> UnitBuffers:
    """Cut a unit's buffers, for steps of up to `rows` rows."""
    kinds = {
        r.IDS: np.int32,
        r.POSITIONS: np.int32,
        r.TABLES: np.int64,
        r.OUTPUT_ROWS: np.int32,
        r.EMBEDDINGS: np.int64,
    }
    ring = r.RING_HEADER + TRACE_EVENTS * r.EVENT.itemsize
    return UnitBuffers(
        header=ledger.allocate("state", r.HEADER_WORDS, np.int64),
        steps=ledger.allocate("state", (lanes + 1, r.HEADER_WORDS), np.int64),
        control=ledger.allocate("state", (CONTROL_LINES + lanes, r.LINE // 8), np.int64),
        nap=ledger.allocate("state", 2, np.int64),
        counts=ledger.allocate("state", (lanes, r.COUNTS_BYTES // 8), np.int64),
        rows={word: ledger.allocate("state", rows, kind) for word, kind in kinds.items()},
        rings=ledger.allocate("trace", (lanes, ring)) if tracing else None,
        pulses=ledger.allocate("state", (ACTORS, 2, r.LINE // 8), np.int64),
    )
