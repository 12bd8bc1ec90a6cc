// What all kernels share. One source has two shapes:
//
//   WIDE, for CPUs     a work-group is one work-item, which holds 16 rows (or columns) side by side in a vector
//   narrow, for GPUs   a work-group is 16 lanes x SLICES; a lane holds one of 16 rows, so that the 16 lanes of a slice
//                      read neighbouring words; slices share the blocks of a row and add up in the end
//
// `real` is what one work-item holds of 16 floats. get_... and put_... move the 16 values at `p`, or a lane's one.
// Work-items of a group wait for each other in all_..., slices_sum and round_block, which stand in no branch: PoCL 3.0
// gets those wrong.

#define SPAN 256  // positions of a KV block
#define ROWS 16   // of a group

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
#define GET(type, p, lane) vload16(0, (global const type *)(p))
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
#define SCRATCH local float scratch[ROWS * SLICES]
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
static void put_local(real v, local float *p) { vstore16(v, 0, p); }
static real get_local(local const float *p) { return vload16(0, p); }
static void put_floats(real v, global float *p) { vstore16(v, 0, p); }
#else
static real get_halves(global const void *p, int lane) { return vload_half(lane, (global const half *)p); }
static void put_local(real v, local float *p) { p[LANE] = v; }
static real get_local(local const float *p) { return p[LANE]; }
static void put_floats(real v, global float *p) { p[LANE] = v; }
#endif

// Of 16 values only the first `count`; of the others zeros are read, and none is written.
static real get_some(global const float *p, int count) {
#ifdef WIDE
    if (count >= ROWS) return vload16(0, p);
    float some[ROWS];
    for (int i = 0; i < ROWS; i++) some[i] = i < count ? p[i] : 0.0f;
    return vload16(0, some);
#else
    return LANE < count ? p[LANE] : 0.0f;
#endif
}

static void put_some(real v, global float *p, int count) {
#ifdef WIDE
    if (count >= ROWS) {
        vstore16(v, 0, p);
        return;
    }
    float some[ROWS];
    vstore16(v, 0, some);
    for (int i = 0; i < count; i++) p[i] = some[i];
#else
    if (LANE < count) p[LANE] = v;
#endif
}

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

#define all_sum(v, scratch) lanes_sum(v)
#define all_max(v, scratch) lanes_max(v)
#define block_max(v, scratch) lanes_max(v)
#define slices_sum(v, scratch) (v)
#else
// Every work-item gets the sum or the maximum over those `step` apart from its own, `count` of them.
#define TOGETHER(name, zero, join)                                                      \
    static float name(float v, int first, int step, int count, local float *scratch) { \
        barrier(CLK_LOCAL_MEM_FENCE);                                                   \
        scratch[ITEM] = v;                                                              \
        barrier(CLK_LOCAL_MEM_FENCE);                                                   \
        float all = zero;                                                               \
        for (int i = 0; i < count; i++) all = join(all, scratch[first + i * step]);     \
        return all;                                                                     \
    }
#define PLUS(p, q) ((p) + (q))
TOGETHER(together_sum, 0.0f, PLUS)
TOGETHER(together_max, -INFINITY, fmax)

#define all_sum(v, scratch) together_sum(v, 0, 1, ITEMS, scratch)
#define all_max(v, scratch) together_max(v, 0, 1, ITEMS, scratch)
#define block_max(v, scratch) together_max(v, SLICE *LANES, 1, LANES, scratch)
#define slices_sum(v, scratch) together_sum(v, LANE, LANES, SLICES, scratch)
#endif

// --- arithmetic -----------------------------------------------------------------------------------------------------

// Values of columns `first` to `first` + 15 that are not below `end` become zeros.
static real below(real v, int first, int end) { return IOTA + first < end ? v : (real)0.0f; }

// 32 columns as the CPU unit rounds them: int8 values times their scale (docs/numerics.md)
static void round_block(real *low, real *high, local float *scratch) {
    const float top = block_max(fmax(fabs(*low), fabs(*high)), scratch);
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f, scale = top / 127.0f;
    *low = fmax(fmin(rint(*low * inverse), 127.0f), -127.0f) * scale;
    *high = fmax(fmin(rint(*high * inverse), 127.0f), -127.0f) * scale;
}

static float inverse_rms(float squares, int dim, float eps) { return 1.0f / sqrt(squares / dim + eps); }

static real silu(real x) { return x / (1.0f + exp(-x)); }
static real gelu(real x) { return x / (1.0f + exp(-1.5957691f * fma(x * x * x, (real)0.044715f, x))); }
static real relu(real x) { return fmax(x, 0.0f); }

static real activated_silu(real gate, real up) { return silu(gate) * up; }
static real activated_gelu(real gate, real up) { return gelu(gate) * up; }
static real activated_relu(real gate, real up) { return relu(gate) * up; }
static real activated_relu2(real gate, real up) { return relu(gate) * relu(gate) * up; }
static real activated_drelu(real gate, real up) { return relu(gate) * relu(up); }
