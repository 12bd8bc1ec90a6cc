// take. Blocks of 32 columns along dimension 2, from the CPU unit's tile of one row (kernels/tile.py) to our row. Those
// before the first one that is enqueued are ours.

kernel void NAME(PARAMETERS) {
    const int block = get_global_id(2);
    if (block >= blocks || SLICE != 0) return;
    global float *row = (global float *)(a + out) + block * (rounded ? BLOCK_FLOATS : 32);
    global const uchar *in = a + source + block * (rounded ? TILE_BLOCK : 128);
    for (int h = 0; h < 2; h++) {
        put_floats(rounded ? get_signed(in + h * ROWS, LANE) : get_floats(in + h * ROWS * 4, LANE), row + h * ROWS);
    }
    if (!rounded || LANE != 0) return;
    row[32] = *(global const float *)(in + 32);
    row[33] = (float)-*(global const int *)(in + 40);
}
