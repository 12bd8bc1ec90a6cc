// matmul:F:T. Groups along dimension 2, T rows along dimension 0.

kernel void NAME(PARAMETERS) {
    SCRATCH;
    const int first = get_global_id(0) / LANES * T, rows = step_rows(a, step, select) - first;
    const int g = get_global_id(2);
    if (rows <= 0 || g >= groups) return;
    global const uchar *start = w + weights + (long)(g / per) * stride + (long)(g % per) * group;
    real sums[T];
    JOIN(JOIN(times, F), T)(start, blocks, blocks, JOIN(BLOCK, F), 0, a + x + (long)first * x_row, x_row, rows, sums);
#pragma unroll
    for (int t = 0; t < T; t++) {
        const real sum = slices_sum(sums[t], scratch);
        if (t < rows && SLICE == 0) put_floats(sum, (global float *)(a + y + (long)(first + t) * y_row) + g * ROWS);
    }
}
