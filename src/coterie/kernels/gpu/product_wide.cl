// times_F_T in the wide shape: PAIR groups of 16 rows of weights times T rows of activations, for every F and T that a
// program needs. sums[p * T + t] is that of group p and row t.
//
// Block b lies at `start` + b / per * stride + b % per * item, and the second group's `apart` bytes behind it; `x` is
// the first row, `x_row` bytes from one to the next, of which those from `rows` on repeat the last. Sub-blocks are
// added in ascending order.

#if !JOIN(FLOAT, F)
// A sub-block's dot products with all rows, which are whole numbers, what stands for zero taken off.
static void JOIN(JOIN(exact, F), T)(global const uchar *block, long apart, int sub, global const float *const *row,
                                    int at, real *dot, real *scale, real *low) {
#ifdef INTEGERS
    word quad[PAIR * 8];
#pragma unroll
    for (int p = 0; p < PAIR; p++) JOIN(quads, F)(block + p * apart, sub, LANE, quad + 8 * p, scale + p, low + p);
#pragma unroll
    for (int t = 0; t < T; t++) {
        const int8 x = bytes(row[t] + at);
#if JOIN(SPLIT, F)
        const word zero = (word)((uint)JOIN(ZERO, F) * 0x01010101u), zeros[4] = {zero, zero, zero, zero};
        const whole lower = dot_of(zeros, x.lo), upper = dot_of(zeros, x.hi);
#endif
#pragma unroll
        for (int p = 0; p < PAIR; p++) {
            const whole first = dot_of(quad + 8 * p, x.lo), second = dot_of(quad + 8 * p + 4, x.hi);
#if JOIN(SPLIT, F)
            global const uchar *from = block + p * apart;
            dot[p * T + t] = TO_REAL(first - lower) * JOIN(half, F)(from, sub, LANE, 0)
                + TO_REAL(second - upper) * JOIN(half, F)(from, sub, LANE, 1);
#else
            dot[p * T + t] = TO_REAL(first + second) - JOIN(ZERO, F) * row[t][at + 33];
#endif
        }
    }
#else
    real q[PAIR * 32];
#pragma unroll
    for (int p = 0; p < PAIR; p++) JOIN(quanta, F)(block + p * apart, sub, LANE, q + 32 * p, scale + p, low + p);
    JOIN(dots, T)(q, row, at, dot);
#pragma unroll
    for (int i = 0; i < PAIR * T; i++) dot[i] -= JOIN(OFFSET, F) * row[i % T][at + 33];
#endif
}
#endif

static void JOIN(JOIN(times, F), T)(global const uchar *start, long apart, int blocks, int per, long item, long stride,
                                    global const uchar *x, int x_row, int rows, real *sums, TEAM float4 *parts) {
    global const float *row[T];
#pragma unroll
    for (int t = 0; t < T; t++) row[t] = (global const float *)(x + (long)min(t, rows - 1) * x_row);
#pragma unroll
    for (int i = 0; i < PAIR * T; i++) sums[i] = (real)0.0f;
    const int distance = max(1, AHEAD / JOIN(BLOCK, F));
    global const uchar *later = start + (long)(distance / per) * stride;
    for (int b = 0, place = 0, next = distance % per; b < blocks; b++, place++, next++) {
        if (place == per) start += stride, place = 0;
        if (next == per) later += stride, next = 0;
        global const uchar *block = start + place * item, *ahead = later + next * item;
#if JOIN(FLOAT, F)
        for (int i = 0; T <= 2 && i < JOIN(BLOCK, F); i += 64) ASK_FOR(ahead + i);
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
        for (int i = 0; T <= 2 && i < JOIN(HEADER, F); i += 64) ASK_FOR(ahead + i);
        ahead += JOIN(HEADER, F);
        for (int sub = 0; sub < JOIN(SUBS, F); sub++, ahead += JOIN(SUB, F)) {
            const int at = (b * JOIN(SUBS, F) + sub) * BLOCK_FLOATS;
            for (int i = 0; T <= 2 && i < JOIN(SUB, F); i += 64) ASK_FOR(ahead + i);
            real dot[PAIR * T], scale[PAIR], low[PAIR];
            JOIN(JOIN(exact, F), T)(block, apart, sub, row, at, dot, scale, low);
#pragma unroll
            for (int i = 0; i < PAIR * T; i++) {
                const int t = i % T, p = i / T;
                const float size = row[t][at + 32], sum = row[t][at + 33];
                sums[i] = fma(dot[i], scale[p] * size, sums[i]);
                if (JOIN(MINIMUM, F)) sums[i] = fma(low[p], (real)(size * sum), sums[i]);
            }
        }
#endif
    }
}
