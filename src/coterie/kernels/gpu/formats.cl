// The packed formats (docs/packed-format.md). unpack_F: sub-block `sub` of a block as 32 columns of 16 rows, of which a
// work-item gets its own. BLOCK_F: bytes of a block, HEADER_F: before its sub-blocks, SUB_F: of one, SUBS_F: how many.

// Columns in four neighbouring quads: weight = scale * q + low
static void columns(const word *quad, real scale, real low, real *w) {
#pragma unroll
    for (int c = 0; c < 16; c++) w[c] = fma(TO_REAL((quad[c / 4] >> (c % 4 * 8)) & 255u), scale, low);
}

// Eight quads of four bits: vector j has quad j in the low nibbles, quad 4 + j in the high ones.
static void nibbles(global const uchar *p, int lane, word *quad) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const word v = get_words(p + 64 * j, lane);
        quad[j] = v & 0x0f0f0f0fu;
        quad[4 + j] = (v >> 4) & 0x0f0f0f0fu;
    }
}

// The fifth bits: bit k of every byte belongs to quad k.
static void fifth_bits(global const uchar *p, int lane, word *quad) {
    const word v = get_words(p, lane);
#pragma unroll
    for (int k = 0; k < 8; k++) quad[k] |= ((v >> k) & 0x01010101u) << 4;
}

// Bits 4 and 5: bits 2m and 2m + 1 of vector v belong to quad 4v + m.
static void upper_bits(global const uchar *p, int lane, word *quad) {
#pragma unroll
    for (int k = 0; k < 8; k++) quad[k] |= ((get_words(p + k / 4 * 64, lane) >> (k % 4 * 2)) & 0x03030303u) << 4;
}

static void unpack_Q4_0(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    const real scale = get_halves(block, lane), low = -8.0f * scale;
    nibbles(block + 32, lane, quad);
    columns(quad, scale, low, w);
    columns(quad + 4, scale, low, w + 16);
}

static void unpack_Q4_1(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    const real scale = get_halves(block, lane), low = get_halves(block + 32, lane);
    nibbles(block + 64, lane, quad);
    columns(quad, scale, low, w);
    columns(quad + 4, scale, low, w + 16);
}

static void unpack_Q5_0(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    const real scale = get_halves(block, lane), low = -16.0f * scale;
    nibbles(block + 32, lane, quad);
    fifth_bits(block + 288, lane, quad);
    columns(quad, scale, low, w);
    columns(quad + 4, scale, low, w + 16);
}

static void unpack_Q8_0(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    const real scale = get_halves(block, lane), low = -128.0f * scale;
#pragma unroll
    for (int k = 0; k < 8; k++) quad[k] = get_words(block + 32 + 64 * k, lane);
    columns(quad, scale, low, w);
    columns(quad + 4, scale, low, w + 16);
}

static void unpack_Q4_K(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    global const uchar *at = block + HEADER_Q4_K + sub * SUB_Q4_K;
    const real scale = get_halves(block, lane) * get_octets(at, lane);
    const real low = -get_halves(block + 32, lane) * get_octets(at + 16, lane);
    nibbles(at + 32, lane, quad);
    columns(quad, scale, low, w);
    columns(quad + 4, scale, low, w + 16);
}

static void unpack_Q5_K(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    global const uchar *at = block + HEADER_Q5_K + sub * SUB_Q5_K;
    const real scale = get_halves(block, lane) * get_octets(at, lane);
    const real low = -get_halves(block + 32, lane) * get_octets(at + 16, lane);
    nibbles(at + 32, lane, quad);
    fifth_bits(at + 288, lane, quad);
    columns(quad, scale, low, w);
    columns(quad + 4, scale, low, w + 16);
}

static void unpack_Q6_K(global const uchar *block, int sub, int lane, real *w) {
    word quad[8];
    global const uchar *at = block + HEADER_Q6_K + sub * SUB_Q6_K;
    const real d = get_halves(block, lane);
    nibbles(at + 32, lane, quad);
    upper_bits(at + 288, lane, quad);
#pragma unroll
    for (int half_ = 0; half_ < 2; half_++) {
        const real scale = d * get_signed(at + 16 * half_, lane);
        columns(quad + 4 * half_, scale, -32.0f * scale, w + 16 * half_);
    }
}

static void unpack_F16(global const uchar *block, int sub, int lane, real *w) {
#pragma unroll
    for (int c = 0; c < 32; c++) w[c] = get_halves(block + 32 * c, lane);
}

static void unpack_BF16(global const uchar *block, int sub, int lane, real *w) {
#pragma unroll
    for (int c = 0; c < 32; c++) w[c] = get_upper(block + 32 * c, lane);
}

static void unpack_F32(global const uchar *block, int sub, int lane, real *w) {
#pragma unroll
    for (int c = 0; c < 32; c++) w[c] = get_floats(block + 64 * c, lane);
}
