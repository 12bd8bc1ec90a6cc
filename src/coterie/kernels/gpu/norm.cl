// norm. A work-group a row; a slice takes every SLICES-th block of 32 columns.

// Half a block of x + y, or of x + y * factor * post
static real residual(global const float *x, global const float *y, global const float *post, float factor) {
    const real v = get_floats(x, LANE);
    if (!y) return v;
    const real u = get_floats(y, LANE);
    return v + (post ? u * factor * get_floats(post, LANE) : u);
}

// 32 columns from `c` on into the row `at` bytes behind `list`, where there is such a row and it has them
static void put_block(real low, real high, global uchar *a, long list, long at, int c, int width) {
    if (list == NONE || c >= width) return;
    put_floats(low, (global float *)(a + list + at) + c);
    put_floats(high, (global float *)(a + list + at) + c + ROWS);
}

kernel void NAME(PARAMETERS) {
    SCRATCH;
    const int i = get_global_id(0) / LANES;
    if (i >= step_rows(a, step, select)) return;
    const long at = (long)(select ? int_at(a, outputs, i) : i) * row;
    global const float *source = (global const float *)(a + x + at), *scales = (global const float *)(w + weight);
    global const float *added = y == NONE ? 0 : (global const float *)(a + y + at);
    global const float *posts = post == NONE || !added ? 0 : (global const float *)(w + post);
    global float *sum = x_out == NONE ? 0 : (global float *)(a + x_out + at);
    const int halves = (dim + 31) / 32 * 2;  // halves of blocks that hold anything

    real squares = (real)0.0f;
    for (int h = SLICE; posts && h < halves; h += SLICES) {
        const real v = below(get_floats(added + h * ROWS, LANE), h * ROWS, dim);
        squares = fma(v, v, squares);
    }
    const float factor = inverse_rms(all_sum(squares, scratch), dim, eps);

    squares = (real)0.0f;
    for (int block = SLICE; block * 2 < halves; block += SLICES)
        for (int h = 2 * block; h < 2 * block + 2; h++) {
            const int c = h * ROWS;
            const real v =
                below(residual(source + c, added ? added + c : 0, posts ? posts + c : 0, factor), c, dim);
            squares = fma(v, v, squares);
            if (sum) put_floats(v, sum + c);
        }
    const float rms = inverse_rms(all_sum(squares, scratch), dim, eps);

    for (int from = 0; from < width; from += SLICES * 32) {  // every slice, since they round together
        const int c = from + SLICE * 32;
        real v[2];
        for (int h = 0; h < 2; h++) {
            const int k = c + h * ROWS;
            v[h] = (real)0.0f;
            if (k < halves * ROWS) {
                const real u = sum ? get_floats(sum + k, LANE)
                                   : residual(source + k, added ? added + k : 0, posts ? posts + k : 0, factor);
                v[h] = below(u * rms * get_floats(scales + k, LANE), k, dim);
            }
        }
        put_block(v[0], v[1], a, out, (long)i * out_row, c, width);
        round_block(&v[0], &v[1], scratch);
        put_block(v[0], v[1], a, rounded, (long)i * out_row, c, width);
    }
}
