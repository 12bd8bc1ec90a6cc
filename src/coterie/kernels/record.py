"""The instruction record and the step header: what compiled programs are made of (docs/instruction-record.md).

A program is a table of INSTRUCTION records in the arena. A record's words are 64-bit: addresses, once the
program is loaded (offsets into the arena before that), counts, and the bits of float32 parameters.
"""

from enum import IntEnum

import numpy as np

VERSION = 6
WORDS = 32
RECORD_BYTES = 8 * WORDS
LINE = 64  # bytes of a flag, a claim counter, a done counter
SLEEPERS = 8  # offset of the count of sleepers in a flag's line
USUAL = 16  # offset of what waits for it have taken of late, cycles
LATE = 24  # offset of how much longer than asked for its sleepers have slept of late, cycles
NAP_FOR = 32  # offset of a timespec: the next nap

KERNEL = 0  # address of the compiled kernel
OPCODE = 1  # Opcode in the low 16 bits, layer in the next 16 (0xffff: none); of products that units share, as number in
# PRODUCTS + 1, 8 bits for the one of which this computes a part, 8 for the one whose other part it waits for
WAITS = 2
WAIT = 2  # WAITS flags that must carry this step's epoch before the kernel starts (0: none); odd: see FOREIGN
FOREIGN = 1  # added to the address of a flag that another unit posts: the wait is slept through, as predicted
SET = 4  # the flag that the last finished piece sets to the epoch (0: none)
CLAIM = 5  # first of `lanes` claim lines (0: a preparation, which a lane runs whole for itself)
DONE = 6  # the line that counts finished pieces; of a preparation, one line a lane: the epoch it last ran in
ERROR = 7  # the word that takes a kernel's complaint (0: no error)
PREPARE = 8  # a record that a lane runs for itself once it holds its first piece (0: none)
FREES = 9  # tape positions whose weights nobody needs once this is finished: all below this number (0: none)
ORDERED = 10  # 1: lanes take pieces strictly in order, as their weights arrive
OPERANDS = 11  # WORDS - OPERANDS words that belong to the kernel


NO_SUCH_TOKEN = 1  # what ERROR words say


class Opcode(IntEnum):
    """What an instruction does; names appear in traces."""

    EMBED = 1
    NORM = 2
    MATMUL = 3
    ROPE = 4
    ATTEND = 5
    MERGE = 6
    FFN_UP = 7
    FFN_DOWN = 8
    PROBE = 9
    READ = 10
    FFN_ASK = 11
    FFN_LATE = 12
    FFN = 13  # Gate, Up, activation and Down in one graph
    POST = 14
    BUILD = 15  # of a graph, or of a GPU's program: never in a step
    STEP = 16  # a whole program, of a unit that is not seen into


# Words of the step header. Each lane works on its own copy, taken when the go flag rose, so that a lane which
# was stopped and wakes up in a later step can only find that there is nothing left to claim. For this the number
# of an instruction's pieces must follow from the copy and the record alone: the rows' arrays are the next step's.
EPOCH = 0  # number of this step, the value flags take
PROGRAM = 1  # address of the first record
RECORDS = 2
LANES_COUNT = 3
ABORT = 4  # address of a word that is not 0 once the step is to be abandoned
SPIN = 5  # cycles to spin before sleeping
TOKENS = 6  # number of rows
IDS = 7  # int32[rows]: token ids
POSITIONS = 8  # int32[rows]
TABLES = 9  # int64[rows]: address of each row's KV block table (int64 block addresses)
OUTPUTS = 10  # number of rows that want logits
OUTPUT_ROWS = 11  # int32[outputs]: which
TRACE = 12  # address of the first lane's trace ring (0: not recording)
TRACE_STRIDE = 13
STOP = 14  # 1: lanes leave for good
NAP = 15  # address of a timespec: a sleeper looks this often whether the step was abandoned
NEVER = 16  # address of a word that stays 0: the abort word of waits that nothing ends
LAST = 17  # the largest position among the rows
TAPE = 18  # number of the read that stands for tape position 0 in this step (docs/flash.md)
ARRIVED = 19  # address of the flag that counts reads which have arrived
FREED = 20  # address of the flag that counts reads whose memory may be used again
COUNTS = 21  # address of COUNTS_BYTES a lane, whose words are LINE_...
LINE_STALLED, LINE_LIVE, LINE_ASKED = range(3)  # cycles spent waiting for weights; neurons live; asked for
LINE_PROGRESS = 3  # odd inside of an instruction, waits for weights left out; grows with every piece too
LINE_SLEPT, LINE_POLLED = 4, 5  # cycles of waits for other units, asleep and at looking
LINE_PART = 6  # cycles in parts of products that units share, a word for each of PRODUCTS
LINE_REST = 11  # cycles of waits for other units' parts of them
COUNTS_BYTES = 2 * LINE  # of a lane's counts
EMBEDDINGS = 22  # int64[rows]: address of the 16-row group that holds each token's embedding
YIELD = 23  # 1: a unit that reads shares the lanes' cores, and they let it go first between instructions
RATE = 24  # cycles a microsecond
GIVEN = 25  # shares of products, their first rows or clusters, that another unit computes in this step, of WHOLE:
PRODUCTS = GIVEN_QKV, GIVEN_OUT, GIVEN_UP, GIVEN_DOWN, GIVEN_HEAD = tuple(range(GIVEN, GIVEN + 5))
HEADER_WORDS = 30
WHOLE = 1 << 16
HEADER_BYTES = 8 * HEADER_WORDS

EVENT = np.dtype(
    [
        ("start", "<u8"),  # cycles
        ("end", "<u8"),  # cycles
        ("waited", "<u4"),  # cycles before start spent waiting for flags
        ("epoch", "<u4"),
        ("opcode", "<u2"),
        ("layer", "<u2"),
        ("pieces", "<u4"),
    ]
)
RING_HEADER = 64  # bytes: events written so far (int64), capacity (int64)


def float_bits(value: float) -> int:
    """A float32 as an operand word."""
    return int(np.float32(value).view(np.int32))
