// embed:F. Sub-blocks of a row's columns along dimension 2, ITEMS to a work-group; rows along dimension 0.

kernel void NAME(PARAMETERS) {
    const int row = get_global_id(0) / LANES, at = get_global_id(2) * ITEMS + ITEM;
    if (row >= step_rows(a, step, 0) || at * 32 >= width) return;
    const int id = int_at(a, ids, row);
    global float *to = (global float *)(a + out + (long)row * out_row) + at * 32;
    if (id < 0 || id >= vocab || at >= blocks * JOIN(SUBS, F)) {
        for (int c = 0; c < 32; c++) to[c] = 0.0f;
        return;
    }
    const int g = id / ROWS, block = at / JOIN(SUBS, F);
    global const uchar *start = w + weights + (long)(g / per) * stride + (long)(g % per) * group;
    start += (long)block * JOIN(BLOCK, F);
    real columns[32];
#if JOIN(FLOAT, F)
    JOIN(columns, F)(start, id % ROWS, columns);
#else
    real size, low;
    JOIN(quanta, F)(start, at % JOIN(SUBS, F), id % ROWS, columns, &size, &low);
    for (int c = 0; c < 32; c++) {
        columns[c] = (columns[c] + 0.0f - JOIN(OFFSET, F)) * size;  // no whole number is -0
        if (JOIN(MINIMUM, F)) columns[c] = columns[c] + low;
    }
#endif
    for (int c = 0; c < 32; c++) to[c] = pick(columns[c], id % ROWS) * scale;
}
