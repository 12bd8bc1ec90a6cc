// What all kernels share. One source has two shapes:
//
//   WIDE, for CPUs     a work-group is one work-item, which holds 16 rows (or columns) side by side in a vector
//   narrow, for GPUs   a work-group is 16 lanes x SLICES; a lane holds one of 16 rows, so that the 16 lanes of a slice
//                      read neighbouring words; slices share the blocks of a row and add up in the end
//
// `real` is what one work-item holds of 16 floats. get_... and put_... move the 16 values at `p`, or a lane's one.
// Work-items of a group wait for each other in tree_..., put_block, inverse_rms, times_... and barriers, which stand in
// loops that all of them go through alike, and in no branch.

// Arithmetic is the class `exact` (docs/numerics.md) on devices that divide and take roots as IEEE says: nothing is
// contracted, every order of sums is fixed.

#pragma OPENCL FP_CONTRACT OFF

#define SPAN 256  // positions of a KV block
#define TILE 64   // positions whose softmax is taken together
#define ROWS 16   // of a group
#define MANY (1 << 30)  // blocks in an extent: all of them

#ifdef WIDE
typedef float16 real;
typedef int16 whole;
typedef uint16 word;
#define LANES 1
#define SLICES 1
#define LANE 0
#define SLICE 0
#define AS_REAL as_float16
#define TO_REAL convert_float16
#define TO_WORD convert_uint16
#ifdef __clang__  // vload16 may be several loads
#define LOOSE(type) typedef type##16 type##_loose __attribute__((aligned(sizeof(type))));
LOOSE(float)
LOOSE(uint)
LOOSE(ushort)
LOOSE(uchar)
LOOSE(char)
#define GET(type, p, lane) (*(global const type##_loose *)(p))
#else
#define GET(type, p, lane) vload16(0, (global const type *)(p))
#endif
#define IOTA ((int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
#else
typedef float real;
typedef int whole;
typedef uint word;
#define LANES 16
#define SLICES 8
#define LANE ((int)get_local_id(0))
#define SLICE ((int)get_local_id(1))
#define AS_REAL as_float
#define TO_REAL convert_float
#define TO_WORD convert_uint
#define GET(type, p, lane) (((global const type *)(p))[lane])
#define IOTA LANE
#endif

#define ITEMS (LANES * SLICES)
#define ITEM (SLICE * LANES + LANE)
#define OWN(t) ((t) % SLICES == SLICE)  // whether this slice has row t's sums
#ifdef WIDE
#define PAIR (T > 2 ? 2 : 1)  // groups that share the loads of several rows of activations
#define AHEAD 4096  // bytes that weights are asked for ahead: more than the hardware does by itself
#ifdef __clang__
#define ASK_FOR(p) __builtin_prefetch(p)
#else
#define ASK_FOR(p) prefetch(p, 64)
#endif
#ifdef __AVX512VNNI__
#define INTEGERS  // there are dot products of bytes
#endif
#define TEAM private
#define PARTS float4 *parts = 0
#define SCRATCH float *scratch = 0
#define GROUPS (TILE / ROWS)  // of 16 positions of a tile that a slice scores
#define VALUES (MOST_DIM / ROWS)
#else
#define PAIR 1
#define TEAM local  // given by the host: PoCL 3.0 lets its threads share what a kernel declares
#define PARTS local float4 *parts = shared
#define SCRATCH local float *scratch = (local float *)shared
#define GROUPS 1
#define VALUES (MOST_DIM / ROWS / SLICES)
#endif
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

// --- memory ---------------------------------------------------------------------------------------------------------

static word get_words(global const uchar *p, int lane) { return GET(uint, p, lane); }
static real get_floats(global const void *p, int lane) { return GET(float, p, lane); }
static real get_octets(global const uchar *p, int lane) { return TO_REAL(GET(uchar, p, lane)); }
static real get_signed(global const uchar *p, int lane) { return TO_REAL(GET(char, p, lane)); }
static real get_upper(global const uchar *p, int lane) { return AS_REAL(TO_WORD(GET(ushort, p, lane)) << 16); }

#ifdef WIDE
static real get_halves(global const void *p, int lane) { return vload_half16(0, (global const half *)p); }
static void put_local(real v, TEAM float *p) { vstore16(v, 0, p); }
static real get_local(TEAM const float *p) { return vload16(0, p); }
static void put_floats(real v, global float *p) { vstore16(v, 0, p); }
#else
static real get_halves(global const void *p, int lane) { return vload_half(lane, (global const half *)p); }
static void put_local(real v, local float *p) { p[LANE] = v; }
static real get_local(local const float *p) { return p[LANE]; }
static void put_floats(real v, global float *p) { p[LANE] = v; }
#endif

// The value of row `lane` of 16 that were read for it.
static float pick(real v, int lane) {
#ifdef WIDE
    float all[ROWS];
    vstore16(v, 0, all);
    return all[lane];
#else
    return v;
#endif
}

// --- the step -------------------------------------------------------------------------------------------------------

static int step_rows(global const uchar *a, long step, int select) {
    return (int)((global const long *)(a + step))[select ? STEP_OUTPUTS : STEP_TOKENS];
}

static int int_at(global const uchar *a, long list, int i) { return ((global const int *)(a + list))[i]; }

// The layer's keys, and `values` behind them its values, in the KV block of a row that holds `position`
static global uchar *kv_block(global uchar *a, long tables, ulong base, long layer, int row, int position) {
    const ulong table = ((global const ulong *)(a + tables))[row];
    return a + (((global const ulong *)(a + (table - base)))[position / SPAN] - base) + layer;
}

// --- work-items together --------------------------------------------------------------------------------------------

#ifdef WIDE
static float lanes_sum(real v) {
    const float8 a = v.lo + v.hi;
    const float4 b = a.lo + a.hi;
    const float2 c = b.lo + b.hi;
    return c.x + c.y;
}

static float lanes_max(real v) {
    const float8 a = fmax(v.lo, v.hi);
    const float4 b = fmax(a.lo, a.hi);
    const float2 c = fmax(b.lo, b.hi);
    return fmax(c.x, c.y);
}

#define tree_sum(v, scratch) lanes_sum(v)
#define tree_max(v, scratch) lanes_max(v)
#else
// Every work-item of a slice gets the sum over its lanes, by halves, or the maximum. Each adds up alone: it waits once.
#define TOGETHER(name, join)                                                              \
    static float name(float v, local float *scratch) {                                    \
        float all[LANES];                                                                 \
        barrier(CLK_LOCAL_MEM_FENCE);                                                     \
        scratch[ITEM] = v;                                                                \
        barrier(CLK_LOCAL_MEM_FENCE);                                                     \
        for (int i = 0; i < LANES; i++) all[i] = scratch[SLICE * LANES + i];              \
        for (int n = LANES / 2; n > 0; n /= 2)                                            \
            for (int i = 0; i < n; i++) all[i] = join(all[i], all[i + n]);                \
        return all[0];                                                                    \
    }
#define PLUS(p, q) ((p) + (q))
TOGETHER(tree_sum, PLUS)
TOGETHER(tree_max, fmax)
#endif

// --- arithmetic -----------------------------------------------------------------------------------------------------

// 32 columns rounded as the CPU unit rounds them, to BLOCK_FLOATS floats at `to` where they are `mine`. Returns the
// scale, and leaves the whole numbers in `low` and `high`.
static float put_block(real *low, real *high, bool mine, global float *to, TEAM float *scratch) {
    const float top = tree_max(fmax(fabs(*low), fabs(*high)), scratch);
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f, scale = top / 127.0f;
    *low = fmax(fmin(rint(*low * inverse), 127.0f), -127.0f);
    *high = fmax(fmin(rint(*high * inverse), 127.0f), -127.0f);
    const float sum = tree_sum(*low + *high, scratch);
    if (!mine) return scale;
    put_floats(*low, to);
    put_floats(*high, to + ROWS);
    if (LANE == 0) to[32] = scale;
    if (LANE == 0) to[33] = sum;
    return scale;
}

// Of 16 partial sums, `step` of `count` values apart.
static float inverse_rms(global const float *x, int count, int dim, float eps, TEAM float *scratch) {
    real squares = (real)0.0f;
    for (int c = 0; c < count; c += ROWS) {
        const real v = get_floats(x + c, LANE);
        squares = fma(v, v, squares);
    }
    return 1.0f / sqrt(tree_sum(squares, scratch) / dim + eps);
}

// exp, the same bits as the CPU unit's
#define EXP(name, kind, to_whole, as_kind)                                                     \
    static kind name(kind x) {                                                                 \
        const kind bounded = fmax(fmin(x, 88.0f), -87.0f), n = rint(bounded * 1.4426950408889634f); \
        kind r = fma(n, (kind)-0.693359375f, bounded);                                         \
        r = fma(n, (kind)2.12194440054690583e-4f, r);                                          \
        kind p = fma((kind)1.9875691500e-4f, r, (kind)1.3981999507e-3f);                       \
        p = fma(p, r, (kind)8.3334519073e-3f);                                                 \
        p = fma(p, r, (kind)4.1665795894e-2f);                                                 \
        p = fma(p, r, (kind)1.6666665459e-1f);                                                 \
        p = fma(p, r, (kind)5.0000001201e-1f);                                                 \
        p = fma(p, r * r, r) + 1.0f;                                                           \
        return x < -87.0f ? (kind)0.0f : p * as_kind((to_whole(n) + 127) << 23);               \
    }
EXP(exp_one, float, convert_int, as_float)
#ifdef WIDE
EXP(exp_real, float16, convert_int16, as_float16)
#else
#define exp_real exp_one
#endif

static real silu(real x) { return x / (exp_real(-x) + 1.0f); }
static real gelu(real x) { return x / (exp_real(-(fma(x * x * x, (real)0.044715f, x) * 1.5957691216057308f)) + 1.0f); }
static real relu(real x) { return fmax(x, 0.0f); }

static real activated_silu(real gate, real up) { return silu(gate) * up; }
static real activated_gelu(real gate, real up) { return gelu(gate) * up; }
static real activated_relu(real gate, real up) { return relu(gate) * up; }
static real activated_relu2(real gate, real up) { return relu(gate) * relu(gate) * up; }
static real activated_drelu(real gate, real up) { return relu(gate) * relu(up); }
