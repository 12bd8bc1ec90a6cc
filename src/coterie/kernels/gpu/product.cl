// For every format F and number T of rows that a program needs: 16 rows of weights times T rows of activations.
//
// Block b lies at `start` + b / per * stride + b % per * item; `x` is the first row, `x_row` bytes from one to the next,
// of which those from `rows` on repeat the last. Sub-blocks are added in ascending order. In the narrow shape slices share
// them: each multiplies every SLICES-th, and slice t % SLICES adds up row t, whose sum it alone has in the end.

static void JOIN(JOIN(times, F), T)(global const uchar *start, int blocks, int per, long item, long stride,
                                    global const uchar *x, int x_row, int rows, real *sums, local float4 *parts) {
    global const float *row[T];
#pragma unroll
    for (int t = 0; t < T; t++) row[t] = (global const float *)(x + (long)min(t, rows - 1) * x_row);
#pragma unroll
    for (int t = 0; t < T; t++) sums[t] = (real)0.0f;
#if JOIN(FLOAT, F)
    for (int b = 0, place = 0; b < blocks; b++, place++) {
        if (place == per) start += stride, place = 0;
        real w[32];
        JOIN(columns, F)(start + place * item, LANE, w);
#pragma unroll
        for (int c = 0; c < 32; c++) {
#pragma unroll
            for (int t = 0; t < T; t++)
                if (OWN(t)) sums[t] = fma(w[c], (real)row[t][32 * b + c], sums[t]);
        }
    }
#else
    const int units = blocks * JOIN(SUBS, F);
    for (int window = 0, base = 0; window < units; window += SLICES) {
        const int u = window + SLICE, b = u / JOIN(SUBS, F);
        for (; b - base >= per; base += per) start += stride;
        if (u < units) {
            real q[32], dot[T], scale, low;
            JOIN(quanta, F)(start + (b - base) * item, u % JOIN(SUBS, F), LANE, q, &scale, &low);
            JOIN(dots, T)(q, row, u * BLOCK_FLOATS, dot);
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float size = row[t][u * BLOCK_FLOATS + 32], sum = row[t][u * BLOCK_FLOATS + 33];
                const real exact = dot[t] - JOIN(OFFSET, F) * sum;
#ifdef WIDE
                sums[t] = fma(exact, scale * size, sums[t]);
                if (JOIN(MINIMUM, F)) sums[t] = fma(low, (real)(size * sum), sums[t]);
#else
                parts[t * ITEMS + ITEM] = (float4)(exact, scale * size, low, size * sum);
#endif
            }
        }
#ifndef WIDE
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int t = SLICE; t < T; t += SLICES)
            for (int s = 0; s < SLICES && window + s < units; s++) {
                const float4 part = parts[t * ITEMS + s * LANES + LANE];
                sums[t] = fma(part.x, part.y, sums[t]);
                if (JOIN(MINIMUM, F)) sums[t] = fma(part.z, part.w, sums[t]);
            }
        barrier(CLK_LOCAL_MEM_FENCE);
#endif
    }
#endif
}
