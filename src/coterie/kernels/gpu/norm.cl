// norm. A work-group a row; a slice takes every SLICES-th block of 32 columns.

// Half a block of x + y, or of x + y * factor * post
static real residual(global const float *x, global const float *y, global const float *post, float factor) {
    const real v = get_floats(x, LANE);
    if (!y) return v;
    const real u = get_floats(y, LANE);
    return v + (post ? u * factor * get_floats(post, LANE) : u);
}

kernel void NAME(PARAMETERS) {
    SCRATCH;
    const int i = get_global_id(0) / LANES;
    if (i >= step_rows(a, step, select)) return;
    const long from = (long)(select ? int_at(a, outputs, i) : i) * row;
    global const float *source = (global const float *)(a + x + from), *scales = (global const float *)(w + weight);
    global const float *added = y == NONE ? 0 : (global const float *)(a + y + from);
    global const float *posts = post == NONE ? 0 : (global const float *)(w + post);
    global float *sum = x_out == NONE ? 0 : (global float *)(a + x_out + from);
    const int halves = (dim + 31) / 32 * 2;  // halves of blocks that hold anything

    float factor = 0.0f;
    if (added && posts) {
        real squares = (real)0.0f;
        for (int h = SLICE; h < halves; h += SLICES) {
            const real v = below(get_floats(added + h * ROWS, LANE), h * ROWS, dim);
            squares = fma(v, v, squares);
        }
        factor = inverse_rms(all_sum(squares, scratch), dim, eps);
    }

    real squares = (real)0.0f;
    for (int block = SLICE; block * 2 < halves; block += SLICES)
        for (int h = 2 * block; h < 2 * block + 2; h++) {
            const int c = h * ROWS;
            const real v =
                below(residual(source + c, added ? added + c : 0, posts ? posts + c : 0, factor), c, dim);
            squares = fma(v, v, squares);
            if (sum) put_floats(v, sum + c);
        }
    if (out == NONE && rounded == NONE) return;
    const float rms = inverse_rms(all_sum(squares, scratch), dim, eps);

    for (int round = 0; round * 32 < width; round += SLICES) {  // every slice, since they round together
        const int c = (round + SLICE) * 32;
        real v[2];
        for (int h = 0; h < 2; h++) {
            const int k = c + h * ROWS;
            v[h] = (real)0.0f;
            if (k < halves * ROWS) {
                const real u = sum ? get_floats(sum + k, LANE)
                                   : residual(source + k, added ? added + k : 0, posts ? posts + k : 0, factor);
                v[h] = below(u * rms * get_floats(scales + k, LANE), k, dim);
            }
            if (out != NONE && k < width) put_floats(v[h], (global float *)(a + out + (long)i * out_row) + k);
        }
        if (rounded != NONE) {
            round_block(&v[0], &v[1], scratch);
            global float *to = (global float *)(a + rounded + (long)i * out_row) + c;
            if (c < width) put_floats(v[0], to);
            if (c < width) put_floats(v[1], to + ROWS);
        }
    }
}
