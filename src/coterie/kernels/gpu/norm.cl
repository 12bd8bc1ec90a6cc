// norm. A work-group a row; a slice takes every SLICES-th block of 32 columns, but every slice takes the whole sums.
// What is not wanted is computed and not written: nothing that waits stands in a branch.

kernel void NAME(PARAMETERS) {
    SCRATCH;
    const int i = get_global_id(0) / LANES;
    if (i >= step_rows(a, step, select)) return;
    const long from = (long)(select ? int_at(a, outputs, i) : i) * row;
    const bool adds = y != NONE, scaled = adds && post != NONE;
    global const float *source = (global const float *)(a + x + from), *scales = (global const float *)(w + weight);
    global const float *added = adds ? (global const float *)(a + y + from) : source;
    global const float *posts = scaled ? (global const float *)(w + post) : scales;
    global float *sum = (global float *)(a + x_out + (select ? (long)i * row : from));
    const int count = (dim + 31) / 32 * 32;  // columns that hold anything, and zeros behind them

    const float factor = inverse_rms(added, scaled ? count : 0, dim, eps, scratch);
    for (int c = SLICE * ROWS; adds && c < count; c += SLICES * ROWS) {
        const real u = get_floats(added + c, LANE);
        put_floats(get_floats(source + c, LANE) + (scaled ? u * factor * get_floats(posts + c, LANE) : u), sum + c);
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    if (adds) source = sum;
    const float rms = inverse_rms(source, count, dim, eps, scratch);

    const int last = out == NONE && rounded == NONE ? 0 : width;
    for (int round = 0; round < last; round += SLICES * 32) {  // every slice, since their lanes round together
        const int c = round + SLICE * 32;
        const bool mine = c < width;
        real v[2];
        for (int h = 0; h < 2; h++) {
            const int k = c + h * ROWS;
            v[h] = k < count ? get_floats(source + k, LANE) * rms * get_floats(scales + k, LANE) : (real)0.0f;
            if (out != NONE && mine) put_floats(v[h], (global float *)(a + out + (long)i * out_row) + k);
        }
        global float *to = (global float *)(a + rounded + (long)i * planes * rounded_row) + c / 32 * BLOCK_FLOATS;
        real low = v[0], high = v[1];
        const float scale = put_block(&low, &high, mine && rounded != NONE, to, scratch);
        low = fma((real)-scale, low, v[0]);
        high = fma((real)-scale, high, v[1]);
        put_block(&low, &high, mine && rounded != NONE && planes == 2, to + rounded_row / 4, scratch);
    }
}
