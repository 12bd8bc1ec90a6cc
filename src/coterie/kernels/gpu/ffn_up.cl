// ffn_up:G:U:activation:T. Blocks of 32 neurons, which are two groups, along dimension 2, T rows along dimension 0.

kernel void NAME(PARAMETERS) {
    SCRATCH;
    PARTS;
    const int first = get_global_id(0) / LANES * T, rows = step_rows(a, step, 0) - first;
    if (rows <= 0) return;
    const int block = get_global_id(2), cluster = block / (neurons / 32);
    if (cluster >= clusters) return;
    global const uchar *start = w + weights + (long)(cluster / per) * stride + (long)(cluster % per) * bundle;
    global const uchar *from = a + x + (long)first * x_row;
    const long gate = (long)blocks * JOIN(BLOCK, G), other = (long)blocks * JOIN(BLOCK, U);  // bytes of a group
    real out[2][T];
    for (int i = 0; i < 2; i += PAIR) {
        const int g = block % (neurons / 32) * 2 + i;
        real gates[PAIR * T], ups[PAIR * T];
        JOIN(JOIN(times, G), T)
        (start + g * gate, gate, blocks, MANY, JOIN(BLOCK, G), 0, from, x_row, rows, gates, parts);
        JOIN(JOIN(times, U), T)
        (start + up + g * other, other, blocks, MANY, JOIN(BLOCK, U), 0, from, x_row, rows, ups, parts);
#pragma unroll
        for (int n = 0; n < PAIR * T; n++) out[i + n / T][n % T] = JOIN(activated, ACTIVATION)(gates[n], ups[n]);
    }
    for (int turn = 0; turn < T; turn += SLICES) {  // every slice, since their lanes round together
        const int t = min(turn + SLICE, T - 1);
        const bool mine = turn + SLICE < T && t < rows;
        global float *to = (global float *)(a + hidden + (long)(first + t) * hidden_row);
        real low = out[0][t], high = out[1][t];
        put_block(&low, &high, mine && rounded, to + block * BLOCK_FLOATS, scratch);
        if (!mine || rounded) continue;
        put_floats(out[0][t], to + block * 32);
        put_floats(out[1][t], to + block * 32 + ROWS);
    }
}
