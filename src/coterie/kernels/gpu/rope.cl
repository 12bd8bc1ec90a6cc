// rope. A work-group a row and a head: queries, then keys, then values, along dimension 2.

// A finite float16 at `at`: what is larger becomes the largest.
static void put_half(float v, int i, global half *at) { vstore_half_rte(clamp(v, -65504.0f, 65504.0f), i, at); }

kernel void NAME(PARAMETERS) {
    SCRATCH;
    const int row = get_global_id(0) / LANES, h = get_global_id(2);
    if (row >= step_rows(a, step, 0) || h >= heads + 2 * kv_heads) return;
    const int position = int_at(a, positions, row), slot = position % SPAN;
    const bool query = h < heads;
    global float *x = (global float *)(a + qkv + (long)row * qkv_row) + h * dim;
    global half *kv = 0;
    if (!query) {
        const int head = (h - heads) % kv_heads;
        global uchar *block = kv_block(a, tables, base, layer, row, position);
        kv = (global half *)(block + (h < heads + kv_heads ? 0 : values)) + (long)head * SPAN * dim;
    }
    if (h >= heads + kv_heads) {
        for (int d = ITEM; d < dim; d += ITEMS) put_half(x[d], slot * dim + d, kv);
        return;
    }
    const long norm = query ? query_norm : key_norm;
    global const float *weight = (global const float *)(w + (norm == NONE ? 0 : norm));
    const float factor = inverse_rms(x, norm == NONE ? 0 : dim, dim, eps, scratch);
    barrier(CLK_GLOBAL_MEM_FENCE);
    global const float *turn = (global const float *)(a + angles) + (long)position * 2 * half_;
    const float size = query ? scale : 1.0f;
    kv += slot / ROWS * dim * ROWS + slot % ROWS;  // of keys: [position / 16][dim][position % 16]
    for (int d = ITEM; d < dim - half_; d += ITEMS) {
        const int i = d < half_ ? d : d + half_;  // one of a pair, or one that does not turn
        float u = x[i], v = d < half_ ? x[i + half_] : 0.0f;
        if (norm != NONE) u = u * factor * weight[i];
        if (norm != NONE && d < half_) v = v * factor * weight[i + half_];
        const float c = d < half_ ? turn[d] : 1.0f, s = d < half_ ? turn[half_ + d] : 0.0f;
        const float p = (u * c - v * s) * size, q = (u * s + v * c) * size;
        if (query) {
            x[i] = p;
            if (d < half_) x[i + half_] = q;
        } else {
            put_half(p, i * ROWS, kv);
            if (d < half_) put_half(q, (i + half_) * ROWS, kv);
        }
    }
}
