// The packed formats (docs/packed-format.md). quads_F: sub-block `sub` of a block as 32 columns of 16 rows, of which a
// work-item gets its own, four columns a word, where weight = scale * (byte - ZERO_F) + low; quanta_F: as whole numbers
// q that are floats, where weight = scale * (q - OFFSET_F) + low. Float formats have columns_F. Where SPLIT_F, each half
// of a sub-block has a whole scale of its own, half_F, which a byte is to be multiplied by as well; in quanta_F it is:
// sums stay exact. BLOCK_F: bytes of a block, HEADER_F: before its sub-blocks, SUB_F: of one, SUBS_F: how many.

// The bytes of 8 quads, each with BIAS: in bits 12 to 19 of 2^11 a byte counts as itself, so that it costs a shift and
// a mask, and no conversion. Sums of products of 32 such numbers stay below 2^24.
static void spread(const word *quad, real *q) {
#pragma unroll
    for (int k = 0; k < 8; k++) {
        q[4 * k] = AS_REAL(((quad[k] << 12) & 0xff000u) | 0x45000000u);
        q[4 * k + 1] = AS_REAL(((quad[k] << 4) & 0xff000u) | 0x45000000u);
        q[4 * k + 2] = AS_REAL(((quad[k] >> 4) & 0xff000u) | 0x45000000u);
        q[4 * k + 3] = AS_REAL(((quad[k] >> 12) & 0xff000u) | 0x45000000u);
    }
}

#ifdef INTEGERS
// 32 whole numbers as bytes
static int8 bytes(global const float *from) {
    const whole low = __builtin_convertvector(get_floats(from, 0), whole);
    const whole high = __builtin_convertvector(get_floats(from + 16, 0), whole);
    return (int8)(as_int4(__builtin_convertvector(low, char16)),
                  as_int4(__builtin_convertvector(high, char16)));
}

// The sum of four quads' dot products with four bytes of x each
static whole dot_of(const word *quad, int4 x) {
    whole sum = __builtin_ia32_vpdpbusd512((whole)0, as_int16(quad[0]), (whole)x.s0);
    sum = __builtin_ia32_vpdpbusd512(sum, as_int16(quad[1]), (whole)x.s1);
    sum = __builtin_ia32_vpdpbusd512(sum, as_int16(quad[2]), (whole)x.s2);
    return __builtin_ia32_vpdpbusd512(sum, as_int16(quad[3]), (whole)x.s3);
}
#endif

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

#define SUB_BLOCK global const uchar *block, int sub, int lane
#define QUADS(F) static void quads_##F(SUB_BLOCK, word *quad, real *scale, real *low)

QUADS(Q4_0) {
    *scale = get_halves(block, lane);
    nibbles(block + 32, lane, quad);
}

QUADS(Q4_1) {
    *scale = get_halves(block, lane);
    *low = get_halves(block + 32, lane);
    nibbles(block + 64, lane, quad);
}

QUADS(Q5_0) {
    *scale = get_halves(block, lane);
    nibbles(block + 32, lane, quad);
    fifth_bits(block + 288, lane, quad);
}

QUADS(Q8_0) {
    *scale = get_halves(block, lane);
#pragma unroll
    for (int k = 0; k < 8; k++) quad[k] = get_words(block + 32 + 64 * k, lane);
}

QUADS(Q4_K) {
    global const uchar *at = block + HEADER_Q4_K + sub * SUB_Q4_K;
    *scale = get_halves(block, lane) * get_octets(at, lane);
    *low = -get_halves(block + 32, lane) * get_octets(at + 16, lane);
    nibbles(at + 32, lane, quad);
}

QUADS(Q5_K) {
    global const uchar *at = block + HEADER_Q5_K + sub * SUB_Q5_K;
    *scale = get_halves(block, lane) * get_octets(at, lane);
    *low = -get_halves(block + 32, lane) * get_octets(at + 16, lane);
    nibbles(at + 32, lane, quad);
    fifth_bits(at + 288, lane, quad);
}

QUADS(Q6_K) {
    global const uchar *at = block + HEADER_Q6_K + sub * SUB_Q6_K;
    *scale = get_halves(block, lane);
    nibbles(at + 32, lane, quad);
    upper_bits(at + 288, lane, quad);
}

static real half_Q6_K(SUB_BLOCK, int part) {
    return get_signed(block + HEADER_Q6_K + sub * SUB_Q6_K + 16 * part, lane);
}

#define QUANTA(F)                                                               \
    static void quanta_##F(SUB_BLOCK, real *q, real *scale, real *low) {        \
        word quad[8];                                                           \
        quads_##F(block, sub, lane, quad, scale, low);                          \
        spread(quad, q);                                                        \
    }
QUANTA(Q4_0)
QUANTA(Q4_1)
QUANTA(Q5_0)
QUANTA(Q8_0)
QUANTA(Q4_K)
QUANTA(Q5_K)

static void quanta_Q6_K(SUB_BLOCK, real *q, real *scale, real *low) {
    word quad[8];
    quads_Q6_K(block, sub, lane, quad, scale, low);
    spread(quad, q);
#pragma unroll
    for (int c = 0; c < 32; c++) q[c] = (q[c] - (BIAS + ZERO_Q6_K)) * half_Q6_K(block, sub, lane, c / 16);
}

static void columns_F16(global const uchar *block, int lane, real *w) {
#pragma unroll
    for (int c = 0; c < 32; c++) w[c] = get_halves(block + 32 * c, lane);
}

static void columns_BF16(global const uchar *block, int lane, real *w) {
#pragma unroll
    for (int c = 0; c < 32; c++) w[c] = get_upper(block + 32 * c, lane);
}

static void columns_F32(global const uchar *block, int lane, real *w) {
#pragma unroll
    for (int c = 0; c < 32; c++) w[c] = get_floats(block + 64 * c, lane);
}
