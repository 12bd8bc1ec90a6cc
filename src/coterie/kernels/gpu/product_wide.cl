// times_F_T in the wide shape: 16 rows of weights times T rows of activations, for every F and T that a program needs.
//
// Block b lies at `start` + b / per * stride + b % per * item; `x` is the first row, `x_row` bytes from one to the next,
// of which those from `rows` on repeat the last. Sub-blocks are added in ascending order.

static void JOIN(JOIN(times, F), T)(global const uchar *start, int blocks, int per, long item, long stride,
                                    global const uchar *x, int x_row, int rows, real *sums, TEAM float4 *parts) {
    global const float *row[T];
#pragma unroll
    for (int t = 0; t < T; t++) row[t] = (global const float *)(x + (long)min(t, rows - 1) * x_row);
#pragma unroll
    for (int t = 0; t < T; t++) sums[t] = (real)0.0f;
    for (int b = 0, place = 0; b < blocks; b++, place++) {
        if (place == per) start += stride, place = 0;
        global const uchar *block = start + place * item;
#if JOIN(FLOAT, F)
        real w[32];
        JOIN(columns, F)(block, LANE, w);
#pragma unroll
        for (int c = 0; c < 32; c++) {
#pragma unroll
            for (int t = 0; t < T; t++) sums[t] = fma(w[c], (real)row[t][32 * b + c], sums[t]);
        }
#else
        for (int sub = 0; sub < JOIN(SUBS, F); sub++) {
            const int at = (b * JOIN(SUBS, F) + sub) * BLOCK_FLOATS;
            real q[32], dot[T], scale, low;
            JOIN(quanta, F)(block, sub, LANE, q, &scale, &low);
            JOIN(dots, T)(q, row, at, dot);
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float size = row[t][at + 32], sum = row[t][at + 33];
                sums[t] = fma(dot[t] - JOIN(OFFSET, F) * sum, scale * size, sums[t]);
                if (JOIN(MINIMUM, F)) sums[t] = fma(low, (real)(size * sum), sums[t]);
            }
        }
#endif
    }
}
