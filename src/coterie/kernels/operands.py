"""Operands of every kernel: which words of an instruction record mean what (docs/instruction-record.md)."""

from coterie.kernels.record import OPERANDS

# Operands of `embed`
(
    EMBED_BLOCKS,  # blocks in a row
    EMBED_VOCAB,  # rows there are
    EMBED_X,
    EMBED_ROW,
    EMBED_SCALE,
    EMBED_SCRATCH,
) = range(OPERANDS, OPERANDS + 6)

# Operands of `norm`
(
    NORM_X,
    NORM_X_OUT,  # where the new residual goes; a preparation must not overwrite what it reads
    NORM_ROW,
    NORM_Y,
    NORM_POST,
    NORM_WEIGHT,
    NORM_DIM,
    NORM_AGAIN,  # what another unit adds to NORM_Y's rows (0: nothing)
    NORM_EPS,
    NORM_OUT,
    NORM_OUT_LANE,
    NORM_FLOAT_OUT,
    NORM_FLOAT_LANE,
    NORM_TILE,
    NORM_SELECT,
    NORM_PLAIN,  # the rows as they are, for units with graphs (0: none)
    NORM_TILE_SUBS,  # sub-blocks of a row of tiles: some readers want more columns than there are
    NORM_PLANES,  # int8 rows of tiles a row becomes: 2 adds what rounding left
    NORM_WOVEN,  # woven tiles, for rows of single neurons (0: none)
    NORM_WOVEN_LANE,
    NORM_WOVEN_FLOAT,  # 1: as floats
) = range(OPERANDS, OPERANDS + 21)

# `matmul`
(
    MATMUL_WEIGHTS,
    MATMUL_GROUP,  # bytes of a 16-row group
    MATMUL_GROUPS,
    MATMUL_BLOCKS,  # blocks in a row
    MATMUL_X,
    MATMUL_X_LANE,
    MATMUL_Y,
    MATMUL_Y_ROW,
    MATMUL_CHUNK,  # groups in a piece
    MATMUL_PANEL,  # blocks whose activations stay in the second-level cache
    MATMUL_OUTPUTS,  # 1: the rows are those that want logits
    MATMUL_X_SUBS,  # sub-blocks of a row of tiles
    MATMUL_PLANES,  # rows of tiles whose results make one row of y
    MATMUL_PER,  # groups in an extent
    MATMUL_STRIDE,  # bytes from one extent to the next
    MATMUL_ARRIVAL,  # 1 + tape position of the first extent (0: pinned)
    MATMUL_GIVEN,  # the header word that says which share of the product is another unit's (0: none is)
    MATMUL_BEFORE,  # groups of the product that lie before this matrix
    MATMUL_ALL,  # groups of the whole product
) = range(OPERANDS, OPERANDS + 19)

# Operands of `rope`, `attend` and `attend_one`
(
    A_QKV,  # float32[row][heads + 2 kv heads][dim]
    A_QKV_ROW,
    A_HEADS,
    A_KV_HEADS,
    A_DIM,
    A_WINDOW,  # 0: all positions
    A_LAYER,  # bytes from a KV block's start to this layer's keys
    A_VALUES,  # bytes from a layer's keys to its values
    A_ROPE,  # float32[position][cos half, sin half]
    A_HALF,
    A_QUERY_NORM,  # float32[dim] or 0
    A_KEY_NORM,
    A_EPS,
    A_SCALE,  # multiplies queries
    A_OUT,  # attend: float32[row][heads * dim]; attend_one: softmax states [row][head][span]
    A_OUT_ROW,
    A_SPANS,  # attend_one: spans there is room for
    A_SCRATCH,
    A_SCRATCH_LANE,
) = range(OPERANDS, OPERANDS + 19)

# `merge`
(
    MERGE_STATES,  # softmax states [row][head][span], or 0: MERGE_ROWS is complete
    MERGE_STATES_ROW,
    MERGE_SPANS,
    MERGE_HEADS,
    MERGE_DIM,
    MERGE_WINDOW,
    MERGE_ROWS,  # float32[row][heads * dim, padded]
    MERGE_ROWS_LANE,
    MERGE_ROWS_ROW,
    MERGE_SUBS,
    MERGE_TILE,
    MERGE_OUT,
    MERGE_OUT_LANE,
    MERGE_FLOAT_OUT,
    MERGE_FLOAT_LANE,
    MERGE_SCRATCH,  # one softmax state a lane
    MERGE_SCRATCH_LANE,
    MERGE_TILE_SUBS,  # sub-blocks of a row of tiles
) = range(OPERANDS, OPERANDS + 18)

# `ffn_up`
(
    UP_TABLE,  # cluster table
    UP_LIST,  # int32: how many clusters run; their ids follow, ascending
    UP_NEURONS,  # neurons of a cluster, a multiple of 32
    UP_BLOCKS,  # blocks in a Gate or Up row
    UP_X,
    UP_X_LANE,
    UP_OUT,  # tiles of the hidden activations
    UP_OUT_SUBS,  # sub-blocks of a whole hidden row
    UP_OUT_FLOAT,  # 1: Down's weights are floats
    UP_CHUNK,  # clusters in a piece
    UP_PANEL,
    UP_SCRATCH,
    UP_SCRATCH_LANE,
    UP_UP_OFFSET,  # from a cluster's Gate groups to its Up groups, bytes
    UP_X_SUBS,  # sub-blocks of a row of input tiles
    UP_GIVEN,  # the header word that says which share of the list is another unit's (0: none is)
) = range(OPERANDS, OPERANDS + 16)

# `ffn_down`
(
    DOWN_TABLE,
    DOWN_LIST,
    DOWN_GROUPS,  # row groups of the output
    DOWN_X,
    DOWN_X_SUBS,
    DOWN_Y,
    DOWN_Y_ROW,
    DOWN_CHUNK,  # row groups in a piece
    DOWN_PANEL,  # clusters in a panel
    DOWN_KEEP,  # 1: y holds the sums of the clusters before these
    DOWN_GIVEN,  # the header word that says which share of the row groups is another unit's (0: none is)
    DOWN_WITHOUT,  # the header word that says which share of the list another unit sums up (0: none)
) = range(OPERANDS, OPERANDS + 12)

# `neuron_gate`, `neuron_all`
(
    N_TABLE,  # a row a cluster (shapes.NEURON_ROW)
    N_FIRST,  # the clusters that run
    N_COUNT,
    N_SUPERS,  # superblocks of a Gate or Up row
    N_ROW,  # bytes of a row that decides whether its neuron is live; in `neuron_all` of a Gate row's distance
    N_UP,  # bytes from a bundle's begin to its Up row
    N_X,  # woven tiles
    N_X_LANE,
    N_HIDDEN,  # float32[tile][neuron][token]
    N_HIDDEN_TILE,  # bytes of a tile of them
    N_SCRATCH,
    N_SCRATCH_LANE,
    N_LIVE,  # a list a cluster (shapes.LIVE_ROW)
    N_ADDRESSES,  # int64[neuron]: address of a neuron's bundle, 0: not in memory
    N_CACHE,  # the neuron cache's control block (0: everything is in memory)
    N_LAYERS,  # how many layers there are: a tick is epoch * layers + layer
    N_USES,  # int32[neuron]: in how many steps it was live (0: not counted)
    N_SCORE_X,  # bytes from N_X to the predictor's woven tiles
    N_SCORE_SUPERS,
    N_ASCENDING,  # 1: clusters in the order in which their weights arrive; 0: the coldest, which miss most, first
) = range(OPERANDS, OPERANDS + 20)
N_BUSY = N_UP  # `neuron_ask`: demands that must be waiting for a cluster to be worth its time
N_BUNDLE = N_LIVE  # `neuron_all`: bytes from one bundle to the next

# `weave`
(
    WEAVE_X,  # float32[row][columns]
    WEAVE_X_ROW,
    WEAVE_SUBS,  # blocks of 32 columns
    WEAVE_OUT,
    WEAVE_OUT_LANE,
    WEAVE_TILE,
    WEAVE_FLOAT,
) = range(OPERANDS, OPERANDS + 7)

# `neuron_down`
(
    ND_TABLE,
    ND_FIRST,
    ND_COUNT,
    ND_LIVE,  # 0: all neurons of the clusters
    ND_ADDRESSES,
    ND_BUNDLE,
    ND_DOWN,  # bytes from a bundle's begin to its Down row
    ND_SUPERS,  # superblocks of an output row
    ND_CHUNK,  # superblocks in a piece
    ND_HIDDEN,
    ND_HIDDEN_TILE,
    ND_SUMS,  # woven sums, float32[row][superblock][32][16]
    ND_Y,
    ND_Y_ROW,
    ND_BLOCKS,  # blocks of 32 in a row of y
    ND_KEEP,  # 1: the sums hold the clusters before these
    ND_LAST,  # 1: these are the last, write y
    ND_SCRATCH,
    ND_SCRATCH_LANE,
) = range(OPERANDS, OPERANDS + 19)

# `take_hidden`
(
    HIDDEN_FROM,  # a row of blocks as a GPU unit has them
    HIDDEN_OUT,  # a tile of one token
    HIDDEN_GIVEN,  # the header word that says which share of the clusters these are
    HIDDEN_CLUSTERS,
    HIDDEN_BLOCKS,  # of 32 neurons, in a cluster
    HIDDEN_FLOAT,  # 1: as floats
) = range(OPERANDS, OPERANDS + 6)

# `graph`, which the NPU unit's runtime runs: float32 rows, a fixed number of them
(
    GRAPH_X,
    GRAPH_X_ROW,
    GRAPH_Y,
    GRAPH_Y_ROW,
    GRAPH_PIECE,  # room for what one graph makes
    GRAPH_COUNT,  # row groups, or clusters, of which the graphs compute the first ones
    GRAPH_EACH,  # rows of a group, neurons of a cluster
    GRAPH_ROWS,  # rows, or neurons, that there are
) = range(OPERANDS, OPERANDS + 8)

# `probe`
PROBE_BASE, PROBE_BYTES, PROBE_PIECE, PROBE_OUT = range(OPERANDS, OPERANDS + 4)
