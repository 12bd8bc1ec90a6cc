"""What the flash unit works on: the tape of reads, its control block, its slots (docs/flash.md).

All are 64-bit words in the arena. Lines of 64 bytes are apart where different threads write.
"""

import numpy as np

PAGE = 4096  # bytes: what direct reads are multiples of

# One read: `nbytes` at `offset` of the file go to `address` and have this checksum.
READ = np.dtype(
    [
        ("offset", "<i8"),
        ("address", "<i8"),
        ("nbytes", "<i8"),
        ("checksum", "<u8"),
        ("layer", "<i8"),
        ("padding", "V24"),
    ]
)
READ_BYTES = READ.itemsize
OFFSET, ADDRESS, NBYTES, CHECKSUM, LAYER = range(5)  # words of an entry

# Words of the control block. Line 0, the announcement; NUMBER is 0 while it is written.
NUMBER = 0
REDIRECTS = 1  # how many announcements went somewhere else than expected
SEQ = 2  # the sequence number of position FIRST
FIRST, END = 3, 4  # the positions of this step
AHEAD, AHEAD_END = 5, 6  # the positions expected next
STOP = 7
ANNOUNCEMENT = 8  # words

# Flags, one line each (docs/flags.md), by their offset in bytes.
GO = 64  # the number of the newest announcement
ARRIVED = 128  # reads below have arrived and are right
FREED = 192  # memory of reads below may be overwritten
TAKEN = 256  # the number of the announcement that the lane goes by
QUEUED = 320  # requests handed to the readers ("preadv")
LANDED = 384  # requests the readers are done with
TICKET = 448  # requests the readers have taken

MINE = 64  # the lane's copy of the announcement

# The lane's own state.
NEXT = 72  # the sequence number to be issued next
HEAD, TAIL = 73, 74  # requests delivered, requests issued: slot = number % SLOT_COUNT
IN_FLIGHT = 75
SINCE = 76  # the cycle count up to which BUSY is counted
FAILED, FAILED_POSITION, FAILED_ERRNO = 77, 78, 79

# Counters.
BYTES, REQUESTS, BUSY, BLOCKED, RETRIES, NAPS, CHECKING = range(80, 87)

# Set once.
TAPE, SLOTS, SLOT_COUNT, DEPTH, BLOCK, FD = range(88, 94)
RING, RING_BYTES, OWNERS = 94, 95, 96  # OWNERS: int64 a page of the ring, sequence number + 1 of its last read
ABORT, NAP, TRACE = 97, 98, 99
UNCHECKED = 103  # 1: checksums are made, but wrong ones do not matter
READER, READERS, QUEUE = 100, 101, 102  # "preadv": a function's address, threads, int64[SLOT_COUNT] slots
URING, SQ_HEAD, SQ_TAIL, SQ_MASK, SQ_ARRAY, SQ_ENTRIES = range(104, 110)  # "io_uring": descriptor, then addresses
CQ_HEAD, CQ_TAIL, CQ_MASK, CQ_ENTRIES = range(110, 114)
SECONDS, NANOSECONDS = 120, 121  # of a nap
NEVER = 122  # stays 0
NOBODY = 123  # the abort word of a unit that was given none
ENDED = 124  # 1 when the lane's thread has ended
CONTROL_WORDS = 128

# Words of a slot, which holds one request: one or more reads that lie side by side in the file and in memory.
STATE = 0
COUNT, POSITION = 1, 2  # how many entries, the first's position
FROM, TO, LENGTH = 3, 4, 5  # offset, address, bytes
DONE = 6  # bytes there already, after short reads
TRIES = 7
RESULT = 8  # bytes read, or -errno
STARTED, FINISHED = 9, 10  # cycles
SLOT_WORDS = 16
SLOT_BYTES = 8 * SLOT_WORDS

READING, CAME, COMPLETE, RIGHT = 1, 2, 3, 4  # STATE: in flight, result there, all bytes there, checksums right

RETRIES_ALLOWED = 3  # for each request
IO, SHORT, CHECKSUMS, ENGINE = 1, 2, 3, 4  # what FAILED says
