// times_F_T in the narrow shape; what it takes and gives is as in product_wide.cl.
//
// Slices share the sub-blocks of integers, each every SLICES-th: what they found goes through local memory to slice
// t % SLICES, which adds up row t in ascending order and alone has its sum in the end. Of floats, whose every product
// is added in order, each slice computes its own rows alone. The last sub-block stands in for those behind it, so that
// no branch is around a barrier. `apart` is for PAIR groups, and here is one.

static void JOIN(JOIN(times, F), T)(global const uchar *start, long apart, int blocks, int per, long item, long stride,
                                    global const uchar *x, int x_row, int rows, real *sums, TEAM float4 *parts) {
    global const float *row[T];
#pragma unroll
    for (int t = 0; t < T; t++) row[t] = (global const float *)(x + (long)min(t, rows - 1) * x_row);
#pragma unroll
    for (int t = 0; t < T; t++) sums[t] = (real)0.0f;
#if JOIN(FLOAT, F)
    for (int b = 0; b < blocks; b++) {
        real w[32];
        JOIN(columns, F)(start + (long)(b / per) * stride + b % per * item, LANE, w);
#pragma unroll
        for (int c = 0; c < 32; c++) {
#pragma unroll
            for (int t = 0; t < T; t++)
                if (OWN(t)) sums[t] = fma(w[c], (real)row[t][32 * b + c], sums[t]);
        }
    }
#else
    const int units = blocks * JOIN(SUBS, F);
    for (int window = 0; window < units; window += SLICES) {
        const int u = min(window + SLICE, units - 1), b = u / JOIN(SUBS, F), at = u * BLOCK_FLOATS;
        real q[32], dot[T], scale, low;
        JOIN(quanta, F)(start + (long)(b / per) * stride + b % per * item, u % JOIN(SUBS, F), LANE, q, &scale, &low);
        JOIN(dots, T)(q, row, at, dot);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float size = row[t][at + 32], sum = row[t][at + 33];
            parts[t * ITEMS + ITEM] = (float4)(dot[t] - JOIN(OFFSET, F) * sum, scale * size, low, size * sum);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        const int count = min(SLICES, units - window);
        for (int t = SLICE; t < T; t += SLICES)
            for (int s = 0; s < count; s++) {
                const float4 part = parts[t * ITEMS + s * LANES + LANE];
                sums[t] = fma(part.x, part.y, sums[t]);
                if (JOIN(MINIMUM, F)) sums[t] = fma(part.z, part.w, sums[t]);
            }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
#endif
}
