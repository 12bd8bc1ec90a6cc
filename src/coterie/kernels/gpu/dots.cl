// For every number T of rows: 32 columns of 16 or 32 rows of quanta times T rows of whole numbers. All partial sums are
// whole numbers below 2 ^ 24, so that floats hold them exactly in any order; with few rows several chains do not wait.

#define CHAINS (T <= 2 ? 4 : 1)

static void JOIN(dots, T)(const real *q, global const float *const *row, int at, real *dot) {
    real chain[PAIR * T * CHAINS];
#pragma unroll
    for (int i = 0; i < PAIR * T * CHAINS; i++) chain[i] = (real)0.0f;
#pragma unroll
    for (int c = 0; c < 32; c++) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            const real v = (real)row[t][at + c];
#pragma unroll
            for (int p = 0; p < PAIR; p++) {
                const int i = (p * T + t) * CHAINS + c % CHAINS;
                chain[i] = fma(q[32 * p + c], v, chain[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PAIR * T; i++) {
        dot[i] = chain[i * CHAINS];
        for (int j = 1; j < CHAINS; j++) dot[i] += chain[i * CHAINS + j];
    }
}

#undef CHAINS
