// times_F_T in the wide shape: PAIR groups of 16 rows of weights times T rows of activations, for every F and T that a
// program needs. sums[p * T + t] is that of group p and row t.
//
// Block b lies at `start` + b / per * stride + b % per * item, and the second group's `apart` bytes behind it; `x` is
// the first row, `x_row` bytes from one to the next, of which those from `rows` on repeat the last. Sub-blocks are
// added in ascending order.

static void JOIN(JOIN(times, F), T)(global const uchar *start, long apart, int blocks, int per, long item, long stride,
                                    global const uchar *x, int x_row, int rows, real *sums, TEAM float4 *parts) {
    global const float *row[T];
#pragma unroll
    for (int t = 0; t < T; t++) row[t] = (global const float *)(x + (long)min(t, rows - 1) * x_row);
#pragma unroll
    for (int i = 0; i < PAIR * T; i++) sums[i] = (real)0.0f;
    for (int b = 0, place = 0; b < blocks; b++, place++) {
        if (place == per) start += stride, place = 0;
        global const uchar *block = start + place * item;
        for (int i = 0; T == 1 && i < JOIN(BLOCK, F); i += 64) ASK_FOR(block + AHEAD + i);
#if JOIN(FLOAT, F)
        real w[PAIR * 32];
#pragma unroll
        for (int p = 0; p < PAIR; p++) JOIN(columns, F)(block + p * apart, LANE, w + 32 * p);
#pragma unroll
        for (int c = 0; c < 32; c++) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                const real v = (real)row[t][32 * b + c];
#pragma unroll
                for (int p = 0; p < PAIR; p++) sums[p * T + t] = fma(w[32 * p + c], v, sums[p * T + t]);
            }
        }
#else
        for (int sub = 0; sub < JOIN(SUBS, F); sub++) {
            const int at = (b * JOIN(SUBS, F) + sub) * BLOCK_FLOATS;
            real q[PAIR * 32], dot[PAIR * T], scale[PAIR], low[PAIR];
#pragma unroll
            for (int p = 0; p < PAIR; p++)
                JOIN(quanta, F)(block + p * apart, sub, LANE, q + 32 * p, scale + p, low + p);
            JOIN(dots, T)(q, row, at, dot);
#pragma unroll
            for (int i = 0; i < PAIR * T; i++) {
                const int t = i % T, p = i / T;
                const float size = row[t][at + 32], sum = row[t][at + 33];
                sums[i] = fma(dot[i] - JOIN(OFFSET, F) * sum, scale[p] * size, sums[i]);
                if (JOIN(MINIMUM, F)) sums[i] = fma(low[p], (real)(size * sum), sums[i]);
            }
        }
#endif
    }
}
