// matmul:F:T. Groups along dimension 2, T rows along dimension 0. Of two planes each row is multiplied by itself.

kernel void NAME(PARAMETERS) {
    PARTS;
    const int first = get_global_id(0) / LANES * T, rows = step_rows(a, step, select) - first;
    const int g = get_global_id(2);
    if (rows <= 0 || g >= groups) return;
    global const uchar *start = w + weights + (long)(g / per) * stride + (long)(g % per) * group;
    global const uchar *from = a + x + (long)first * planes * x_row;
    real total[T];
    for (int plane = 0; plane < planes; plane++) {
        real sums[T];
        JOIN(JOIN(times, F), T)
        (start, blocks, blocks, JOIN(BLOCK, F), 0, from + plane * x_row, planes * x_row, rows, sums, parts);
#pragma unroll
        for (int t = 0; t < T; t++) total[t] = plane ? total[t] + sums[t] : sums[t];
    }
#pragma unroll
    for (int t = 0; t < T; t++)
        if (OWN(t) && t < rows) put_floats(total[t], (global float *)(a + y + (long)(first + t) * y_row) + g * ROWS);
}
