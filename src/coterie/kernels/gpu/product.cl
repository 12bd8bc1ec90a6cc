// For every format F and number T of rows that a program needs: 16 rows of weights times T rows of activations.
//
// Block b lies at `start` + b / per * stride + b % per * item; `x` is the first row, `x_row` bytes from one to the next,
// of which those from `rows` on repeat the last. A sum in several chains does not wait for the one before it.

#define CHAINS (T == 1 ? 4 : 1)

static void JOIN(JOIN(times, F), T)(global const uchar *start, int blocks, int per, long item, long stride,
                                    global const uchar *x, int x_row, int rows, real *sums) {
    global const float *row[T];
    real chain[T * CHAINS];
#pragma unroll
    for (int t = 0; t < T; t++) row[t] = (global const float *)(x + (long)min(t, rows - 1) * x_row);
#pragma unroll
    for (int i = 0; i < T * CHAINS; i++) chain[i] = (real)0.0f;
    int place = SLICE;
    for (int b = SLICE; b < blocks; b += SLICES, place += SLICES) {
        for (; place >= per; place -= per) start += stride;
        for (int sub = 0; sub < JOIN(SUBS, F); sub++) {
            const int column = (b * JOIN(SUBS, F) + sub) * 32;
            real w[32];
            JOIN(unpack, F)(start + place * item, sub, LANE, w);
#pragma unroll
            for (int c = 0; c < 32; c++) {
#pragma unroll
                for (int t = 0; t < T; t++)
                    chain[t * CHAINS + c % CHAINS] = fma(w[c], (real)row[t][column + c], chain[t * CHAINS + c % CHAINS]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        sums[t] = chain[t * CHAINS];
        for (int i = 1; i < CHAINS; i++) sums[t] += chain[t * CHAINS + i];
    }
}

#undef CHAINS
