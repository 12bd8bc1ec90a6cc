// ffn_down:D:T. PAIR groups of output rows along dimension 2, T rows along dimension 0; a cluster is one block of
// columns.

kernel void NAME(PARAMETERS) {
    PARTS;
    const int first = get_global_id(0) / LANES * T, rows = step_rows(a, step, 0) - first;
    const int g = get_global_id(2) * PAIR, last = min(g + PAIR, groups) - 1;
    if (rows <= 0 || g >= groups) return;
    global const uchar *start = w + weights + down + (long)g * JOIN(BLOCK, D);
    real sums[PAIR * T];
    JOIN(JOIN(times, D), T)
    (start, (long)(last - g) * JOIN(BLOCK, D), clusters, per, bundle, stride, a + hidden + (long)first * hidden_row,
     hidden_row, rows, sums, parts);
#pragma unroll
    for (int i = 0; i < PAIR * T; i++) {
        const int t = i % T, p = i / T;
        if (!OWN(t) || t >= rows || g + p > last) continue;
        put_floats(sums[i], (global float *)(a + y + (long)(first + t) * y_row) + (g + p) * ROWS);
    }
}
