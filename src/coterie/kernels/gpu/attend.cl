// attend. A work-group a row and as many heads as fill whole blocks of 32 columns, along dimension 2. Spans of 256
// positions, in each tiles of 64, cut by absolute position: a span's softmax state begins with nothing, and is merged
// into that of the spans before. A slice takes some of a head's dimensions; of scores, some of a tile's positions.

kernel void NAME(PARAMETERS) {
    SCRATCH;
#ifdef WIDE
    float scores[TILE];
#else
    local float *scores = scratch + ITEMS;
#endif
    const int row = get_global_id(0) / LANES;
    if (row >= step_rows(a, step, 0)) return;
    const int unit = 32 / min(dim & -dim, 32);  // heads that fill whole blocks
    const int head = get_global_id(2) * unit, end = min(head + unit, heads);
    const int position = int_at(a, positions, row), first = window > 0 ? max(0, position + 1 - window) : 0;
    global float *to = (global float *)(a + out + (long)row * out_row);
    for (int h = head; h < end; h++) {
        global const float *query = (global const float *)(a + qkv + (long)row * qkv_row) + h * dim;
        global float *sums = to + h * dim;  // the spans' so far; the span's own in `mine`
        float all_top = -1e30f, all_mass = 0.0f;
        for (int d = SLICE * ROWS; d < dim; d += SLICES * ROWS) put_floats((real)0.0f, sums + d);
        for (int span = first / SPAN * SPAN; span <= position; span += SPAN) {
            global const uchar *keys =
                kv_block(a, tables, base, layer, row, span) + (long)(h / (heads / kv_heads)) * SPAN * dim * 2;
            float top = -1e30f, mass = 0.0f;
            real mine[VALUES];
            for (int i = 0; i < VALUES; i++) mine[i] = (real)0.0f;
            for (int tile = max(span, first / TILE * TILE); tile <= position && tile < span + SPAN; tile += TILE) {
                const int slot = tile - span;
                barrier(CLK_LOCAL_MEM_FENCE);
                if (SLICE * GROUPS * ROWS < TILE) {
                    real s[GROUPS];
                    for (int i = 0; i < GROUPS; i++) s[i] = (real)0.0f;
                    global const uchar *from = keys + (slot + SLICE * GROUPS * ROWS) * dim * 2;
                    for (int d = 0; d < dim; d++)
#pragma unroll
                        for (int i = 0; i < GROUPS; i++)
                            s[i] = fma((real)query[d], get_halves(from + i * ROWS * dim * 2 + 32 * d, LANE), s[i]);
                    for (int i = 0; i < GROUPS; i++) {
                        const int c = (SLICE * GROUPS + i) * ROWS;
                        const whole at = IOTA + tile + c;
                        put_local(at >= first && at <= position ? s[i] : (real)-INFINITY, scores + c);
                    }
                }
                barrier(CLK_LOCAL_MEM_FENCE);
                real p[4];
                for (int i = 0; i < 4; i++) p[i] = get_local(scores + i * ROWS);
                const float best = tree_max(fmax(fmax(p[0], p[1]), fmax(p[2], p[3])), scratch);
                const float now = fmax(top, best), keep = exp_one(top - now);
                for (int i = 0; i < 4; i++) p[i] = exp_real(p[i] + -now);
                barrier(CLK_LOCAL_MEM_FENCE);
                if (SLICE == 0)
                    for (int i = 0; i < 4; i++) put_local(p[i], scores + i * ROWS);
                barrier(CLK_LOCAL_MEM_FENCE);
                mass = mass * keep + tree_sum((p[0] + p[1]) + (p[2] + p[3]), scratch);
                top = now;
                const int count = min(TILE, position + 1 - tile);
                global const uchar *from = keys + values + (slot * dim + SLICE * ROWS) * 2;
                for (int i = 0; i < VALUES; i++) mine[i] = mine[i] * keep;
                for (int j = 0; j < count; j++)
                    for (int i = 0, d = SLICE * ROWS; d < dim; i++, d += SLICES * ROWS)
                        mine[i] =
                            fma((real)scores[j], get_halves(from + (j * dim + i * SLICES * ROWS) * 2, LANE), mine[i]);
            }
            const float now = fmax(all_top, top), old = exp_one(all_top - now), new = exp_one(top - now);
            all_mass = all_mass * old + mass * new;
            all_top = now;
            for (int i = 0, d = SLICE * ROWS; d < dim; i++, d += SLICES * ROWS)
                put_floats(get_floats(sums + d, LANE) * old + mine[i] * new, sums + d);
        }
        for (int d = SLICE * ROWS; d < dim; d += SLICES * ROWS)
            put_floats(get_floats(sums + d, LANE) / all_mass, sums + d);
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    const int last = end == heads ? width : end * dim;
    for (int c = end * dim + ITEM; c < last; c += ITEMS) to[c] = 0.0f;
    barrier(CLK_GLOBAL_MEM_FENCE);
    if (rounded == NONE) return;
    global float *blocks = (global float *)(a + rounded + (long)row * rounded_row);
    for (int c = head * dim; c < last; c += SLICES * 32) {
        const int at = c + SLICE * 32;
        const bool here = at < last;
        real low = here ? get_floats(to + at, LANE) : (real)0.0f, high = here ? get_floats(to + at + ROWS, LANE) : low;
        put_block(&low, &high, here, blocks + at / 32 * BLOCK_FLOATS, scratch);
    }
}
