// matmul:F:T. PAIR groups along dimension 2, T rows along dimension 0. Of two planes each row is multiplied by itself.

static global const uchar *JOIN(NAME, group)(global const uchar *from, int g, int per, int stride, int group) {
    return from + (long)(g / per) * stride + (long)(g % per) * group;
}

kernel void NAME(PARAMETERS) {
    PARTS;
    const int first = get_global_id(0) / LANES * T, rows = step_rows(a, step, select) - first;
    const int g = get_global_id(2) * PAIR, last = min(g + PAIR, groups) - 1;
    if (rows <= 0 || g >= groups) return;
    global const uchar *start = JOIN(NAME, group)(w + weights, g, per, stride, group);
    const long apart = JOIN(NAME, group)(w + weights, last, per, stride, group) - start;
    global const uchar *from = a + x + (long)first * planes * x_row;
#if defined(WIDE) && T == 1 && !JOIN(FLOAT, F)
    if (planes == 2) {  // both at once: a matrix is read once
        real both[2];
        JOIN(JOIN(times, F), 2)(start, 0, blocks, MANY, JOIN(BLOCK, F), 0, from, x_row, 2, both, parts);
        put_floats(both[0] + both[1], (global float *)(a + y + (long)first * y_row) + g * ROWS);
        return;
    }
#endif
    real total[PAIR * T];
    for (int plane = 0; plane < planes; plane++) {
        real sums[PAIR * T];
        JOIN(JOIN(times, F), T)
        (start, apart, blocks, MANY, JOIN(BLOCK, F), 0, from + plane * x_row, planes * x_row, rows, sums, parts);
#pragma unroll
        for (int i = 0; i < PAIR * T; i++) total[i] = plane ? total[i] + sums[i] : sums[i];
    }
#pragma unroll
    for (int i = 0; i < PAIR * T; i++) {
        const int t = i % T, p = i / T;
        if (!OWN(t) || t >= rows || g + p > last) continue;
        put_floats(total[i], (global float *)(a + y + (long)(first + t) * y_row) + (g + p) * ROWS);
    }
}
