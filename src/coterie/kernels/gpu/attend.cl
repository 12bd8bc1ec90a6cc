// attend. A work-group a row and as many heads as fill whole blocks of 32 columns, along dimension 2. Per KV block:
// scores with a lane a position, their softmax online, values with a lane a dimension. `out` takes the running sum.
// The last values of a block are read in 16s: up to 30 bytes behind it are read, and not used.

static real dot_keys(global const float *q, global const uchar *keys, int dim) {
    real s0 = (real)0.0f, s1 = s0, s2 = s0, s3 = s0;
    int d = 0;
    for (; d + 3 < dim; d += 4) {
        s0 = fma((real)q[d], get_halves(keys + 32 * d, LANE), s0);
        s1 = fma((real)q[d + 1], get_halves(keys + 32 * d + 32, LANE), s1);
        s2 = fma((real)q[d + 2], get_halves(keys + 32 * d + 64, LANE), s2);
        s3 = fma((real)q[d + 3], get_halves(keys + 32 * d + 96, LANE), s3);
    }
    for (; d < dim; d++) s0 = fma((real)q[d], get_halves(keys + 32 * d, LANE), s0);
    return (s0 + s1) + (s2 + s3);
}

static real mix_values(local const float *p, int low, int high, global const uchar *values, int row, real sum) {
    real s1 = (real)0.0f, s2 = s1, s3 = s1;
    int i = low;
    for (; i + 3 < high; i += 4) {
        global const uchar *at = values + (long)i * row;
        sum = fma((real)p[i], get_halves(at, LANE), sum);
        s1 = fma((real)p[i + 1], get_halves(at + row, LANE), s1);
        s2 = fma((real)p[i + 2], get_halves(at + 2 * row, LANE), s2);
        s3 = fma((real)p[i + 3], get_halves(at + 3 * row, LANE), s3);
    }
    for (; i < high; i++) sum = fma((real)p[i], get_halves(values + (long)i * row, LANE), sum);
    return (sum + s1) + (s2 + s3);
}

kernel void NAME(PARAMETERS) {
    SCRATCH;
    local float scores[SPAN];
    const int row = get_global_id(0) / LANES;
    if (row >= step_rows(a, step, 0)) return;
    const int unit = 32 / min(dim & -dim, 32);  // heads that fill whole blocks
    const int head = get_global_id(2) * unit, end = min(head + unit, heads);
    const int position = int_at(a, positions, row), first = window > 0 ? max(0, position + 1 - window) : 0;
    global float *to = (global float *)(a + out + (long)row * out_row);
    for (int h = head; h < end; h++) {
        global const float *q = (global const float *)(a + qkv + (long)row * qkv_row) + h * dim;
        float top = -INFINITY, total = 0.0f;
        for (int at = first / SPAN * SPAN; at <= position; at += SPAN) {
            const int low = max(first - at, 0), high = min(position + 1 - at, SPAN);
            global const uchar *keys =
                kv_block(a, tables, base, layer, row, at) + (long)(h / (heads / kv_heads)) * SPAN * dim * 2;
            real best = (real)-INFINITY;
            for (int tile = low / ROWS + SLICE; tile * ROWS < high; tile += SLICES) {
                const whole i = IOTA + tile * ROWS;
                real s = dot_keys(q, keys + tile * ROWS * dim * 2, dim);
                s = i >= low && i < high ? s : (real)-INFINITY;
                put_local(s, scores + tile * ROWS);
                best = fmax(best, s);
            }
            const float highest = fmax(top, all_max(best, scratch)), keep = exp(top - highest);
            real part = (real)0.0f;
            for (int tile = low / ROWS + SLICE; tile * ROWS < high; tile += SLICES) {
                const real p = exp(get_local(scores + tile * ROWS) - highest);
                put_local(p, scores + tile * ROWS);
                part += p;
            }
            total = total * keep + all_sum(part, scratch);
            top = highest;
            for (int d = SLICE * ROWS; d < dim; d += SLICES * ROWS) {
                global float *sums = to + h * dim + d;
                real v = at > first ? get_some(sums, dim - d) * keep : (real)0.0f;
                v = mix_values(scores, low, high, keys + values + 2 * d, 2 * dim, v);
                put_some(at + SPAN > position ? v / total : v, sums, dim - d);
            }
            barrier(CLK_LOCAL_MEM_FENCE);
        }
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    const int last = end == heads ? width : end * dim;
    for (int c = end * dim + ITEM; c < last; c += ITEMS) to[c] = 0.0f;
    barrier(CLK_GLOBAL_MEM_FENCE);
    for (int c = head * dim; rounded && c < (end * dim + 31) / 32 * 32; c += SLICES * 32) {
        const bool mine = c + SLICE * 32 < last;
        global float *block = to + c + SLICE * 32;
        real low = mine ? get_floats(block, LANE) : (real)0.0f, high = mine ? get_floats(block + ROWS, LANE) : (real)0.0f;
        round_block(&low, &high, scratch);
        if (mine) put_floats(low, block);
        if (mine) put_floats(high, block + ROWS);
    }
}
