"""Sizes that kernels and those who lay out their buffers agree on."""

from coterie.kernels.formats import COLUMNS, QUADS, Format
from coterie.kernels.formats import ROWS as GROUP_ROWS

TILE_TOKENS = 4  # tokens of a matrix tile, where there are several
SPAN = 256  # positions of a KV block
TILE = 64  # positions of a softmax tile
QUERY_ROWS = 4  # query rows taken together
QUERY_TOKENS = 8  # tokens of a prefill piece
HEAD = 64  # bytes before the values in a softmax state: maximum, sum, and room for alignment

INT8_TOKEN = COLUMNS + 16  # bytes of one token's sub-block: values and four words
FLOAT_TOKEN = 4 * COLUMNS
UNPACKED = 4 * COLUMNS * GROUP_ROWS  # bytes of scratch a lane needs to unpack a sub-block
VECTOR = 64  # bytes of one row group's sums

# A row of the cluster table (design section 6): where a neuron cluster's weights are, and its arrival flag.
CLUSTER_ROW = 32
CLUSTER_GATE_UP, CLUSTER_DOWN, CLUSTER_FLAG, CLUSTER_WANTED = 0, 8, 16, 24

# Rows of single neurons (docs/packed-format.md, "Neurons").
DOWN_FORMATS = ("Q4_0", "Q8_0", "F16", "BF16", "F32")
SUPERBLOCK = 16  # blocks of 32 columns, one a lane
WOVEN_WORDS = 64 * QUADS  # where the scales begin in a token's superblock of activations
WOVEN_INT = WOVEN_WORDS + 3 * 64  # its bytes: quads, and three words a block
WOVEN_FLOAT = 4 * COLUMNS * SUPERBLOCK
CLUSTER = 64  # neurons that are computed together
NEURON_ROW = 64  # bytes of a row of a layer's table: a cluster's Gate rows, its bundles, and when each has arrived
NEURON_GATE, NEURON_BUNDLES, NEURON_FLAG, NEURON_GATE_WANTED, NEURON_WANTED, NEURON_SCORES = 0, 8, 16, 24, 32, 40
LIVE_ROW = 64 + 4 * CLUSTER  # bytes of a cluster's list: how many neurons are live, of these missing, and their numbers
LIVE_COUNT, LIVE_MISSING, LIVE_IDS = 0, 4, 64
LIVE_LATE = 256  # added to the number of one that was missing


def token_bytes(f: Format) -> int:
    """Bytes of one token's sub-block of activations for weights of format `f`."""
    return FLOAT_TOKEN if f.is_float else INT8_TOKEN


def attend_scratch(heads_per_kv: int, dim: int, tokens: int) -> int:
    """Bytes of scratch a lane needs: queries, a new key, bounds, weights and two softmax states a row."""
    rows = -(-tokens * heads_per_kv // QUERY_ROWS) * QUERY_ROWS
    return rows * (4 * dim + 8 + 4 * TILE + 2 * (HEAD + 4 * dim)) + 4 * dim + 256
