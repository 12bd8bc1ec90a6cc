// ffn_down:D:T. Groups of output rows along dimension 2, T rows along dimension 0; a cluster is one block of columns.

kernel void NAME(PARAMETERS) {
    PARTS;
    const int first = get_global_id(0) / LANES * T, rows = step_rows(a, step, 0) - first;
    const int g = get_global_id(2);
    if (rows <= 0 || g >= groups) return;
    global const uchar *start = w + weights + down + (long)g * JOIN(BLOCK, D);
    real sums[T];
    JOIN(JOIN(times, D), T)
    (start, clusters, per, bundle, stride, a + hidden + (long)first * hidden_row, hidden_row, rows, sums, parts);
#pragma unroll
    for (int t = 0; t < T; t++)
        if (OWN(t) && t < rows)
            put_floats(sums[t], (global float *)(a + y + (long)(first + t) * y_row) + g * ROWS);
}
