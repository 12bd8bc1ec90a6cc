// For every number T of rows: 32 columns of 16 rows of quanta times T rows of whole numbers. All partial sums are whole
// numbers below 2 ^ 24, so that floats hold them exactly in any order; with few rows several chains do not wait.

#define CHAINS (T == 1 ? 4 : 1)

static void JOIN(dots, T)(const real *q, global const float *const *row, int at, real *dot) {
    real chain[T * CHAINS];
#pragma unroll
    for (int i = 0; i < T * CHAINS; i++) chain[i] = (real)0.0f;
#pragma unroll
    for (int c = 0; c < 32; c++) {
#pragma unroll
        for (int t = 0; t < T; t++)
            chain[t * CHAINS + c % CHAINS] = fma(q[c], (real)row[t][at + c], chain[t * CHAINS + c % CHAINS]);
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        dot[t] = chain[t * CHAINS];
        for (int i = 1; i < CHAINS; i++) dot[t] += chain[t * CHAINS + i];
    }
}

#undef CHAINS
