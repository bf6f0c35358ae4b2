/* y = x W^T + b on a CPU with weights of 8 or 4 bits and activations rounded to 8 bits as they come.
 *
 * Knows caches and threads. Does not know Python.
 *
 * x: every SPAN numbers of a row share a scale, so that one large number spoils no more than its own span. W, 8 bits: one
 * scale per row, codes -127..127. W, 4 bits: one fp16 step per row and BLOCK4 numbers, codes 0..15 stand for -8..7. What a
 * scale covers is summed in whole numbers, exactly; above that stand fp32 sums in one order, so an answer does not depend
 * on its company in a batch.
 *
 * W lies in tiles of ROWS rows, block after block along k: 64 bytes of each row, then the next block. A tile is read
 * from its first byte to its last. With 4 bits a block is BLOCK4 numbers: byte i holds number i below, 64 + i above.
 */
#include "cpu_threads.h"
#include "cpu_vectors.h"
#include <math.h>

#define ROWS 4
#define BLOCK8 64
#define BLOCK4 128
#define SPAN 512
#define K_CHUNK 2048
#define MOST_READY 256           /* tiles times parts of SPAN that a thread works on at a time */
#define AHEAD 2048               /* bytes of W that are fetched before they are needed */
#define BLOCK_BYTES (192 * 1024) /* a block of W stays in the second-level cache while all of x passes */

/* How bytes are multiplied. `BYTES` is the width of a vector; the portable way is also what tests run to check the
 * logic of instructions that their machine lacks (-DQVL_PORTABLE=64). */
#if defined(QVL_PORTABLE)
#define BYTES QVL_PORTABLE
#define PATH "portable"
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define BYTES 64
#define VNNI 1
#define PATH "AVX-512 VNNI"
#elif defined(__AVXVNNI__)
#define BYTES 32
#define VNNI 1
#define PATH "AVX-VNNI"
#elif defined(__AVX2__)
#define BYTES 32
#define PATH "AVX2"
#else
#define BYTES 16
#define PATH "portable"
#endif
#if BYTES == 64
#define COLUMNS8 6
#else
#define COLUMNS8 3 /* 4 x 3 sums and what they need fill sixteen registers */
#endif
#define COLUMNS4 6

typedef int8_t vb __attribute__((vector_size(BYTES)));
typedef uint8_t vu __attribute__((vector_size(BYTES)));
typedef uint16_t vh __attribute__((vector_size(BYTES)));
typedef int16_t vw __attribute__((vector_size(BYTES)));
typedef uint32_t vu32 __attribute__((vector_size(BYTES)));
typedef int32_t vd __attribute__((vector_size(BYTES)));
typedef float vs32 __attribute__((vector_size(BYTES)));
typedef int8_t vc_u __attribute__((vector_size(LANES), aligned(1))); /* LANES codes */
typedef vb vb_u __attribute__((aligned(1)));
typedef vs32 vs32_u __attribute__((aligned(4)));
#define LOAD(p) (*(const vb_u *)(p))
#define UNROLL _Pragma("GCC unroll 8")

INLINE vs32 scaled_add(vs32 sum, vd dot, float scale) { /* sum + dot * scale, rounded once where the processor can */
    vs32 a = __builtin_convertvector(dot, vs32), b = (vs32){0} + scale;
#if !defined(QVL_PORTABLE) && BYTES == 64
    return (vs32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif !defined(QVL_PORTABLE) && BYTES == 32 && defined(__FMA__)
    return (vs32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

INLINE float total(vs32 v) {
    float s = 0;
    for (int i = 0; i < BYTES / 4; i++) s += v[i];
    return s;
}

/* sum + four products of unsigned u and signed x in every lane. Saturation: none in VNNI's form, nor in C. */
#if defined(VNNI) && BYTES == 64
INLINE vd dot_us(vd sum, vu u, vb x) { return (vd)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)x); }
#elif defined(VNNI)
INLINE vd dot_us(vd sum, vu u, vb x) { return (vd)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)x); }
#elif !defined(QVL_PORTABLE) && defined(__AVX2__)
/* AVX2 adds pairs in 16 bits that saturate: 2 * 127 * 127 fits, so u must not pass 127. */
INLINE vd dot_us(vd sum, vu u, vb x) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)x);
    return sum + (vd)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
INLINE vd dot_us(vd sum, vu u, vb x) { /* 255 * 127 fits into 16 bits; even and odd bytes apart */
    vd even = (vd)((vw)((vh)u & 255) * ((vw)((vh)x << 8) >> 8)), odd = (vd)((vw)((vh)u >> 8) * ((vw)x >> 8));
    return sum + ((vd)((vu32)even << 16) >> 16) + (even >> 16) + ((vd)((vu32)odd << 16) >> 16) + (odd >> 16);
}
#endif

/* Weights as the unsigned factor: by their size, the sign moved to x (AVX2); or 128 more, taken off by adding START8 times
 * the sum of x. */
#if !defined(VNNI) && !defined(QVL_PORTABLE) && defined(__AVX2__)
#define START8 0
#define MASKED 1
INLINE vu unsigned8(vb w) { return (vu)_mm256_abs_epi8((__m256i)w); }
INLINE vd dot8(vd sum, vb w, vu u, vb x) { return dot_us(sum, u, (vb)_mm256_sign_epi8((__m256i)x, (__m256i)w)); }
#else
#define MASKED 0
#define START8 (-128)
INLINE vu unsigned8(vb w) { return (vu)w ^ 128; }
INLINE vd dot8(vd sum, vb w, vu u, vb x) { return dot_us(sum, u, x); }
#endif
#define START4 (-8)

/* A block of 4-bit weights against BLOCK4 numbers of x. */
#if !defined(VNNI) && !defined(QVL_PORTABLE) && defined(__AVX2__)
INLINE vd dot4(const vu *u, const int8_t *x) { /* eight products of at most 15 * 127 fit into 16 bits */
    vw sum = (vw)_mm256_maddubs_epi16((__m256i)u[0], (__m256i)LOAD(x));
    UNROLL for (int j = 1; j < BLOCK4 / BYTES; j++)
        sum += (vw)_mm256_maddubs_epi16((__m256i)u[j], (__m256i)LOAD(x + j * BYTES));
    return (vd)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
}
#else
INLINE vd dot4(const vu *u, const int8_t *x) {
    vd sum = {0};
    UNROLL for (int j = 0; j < BLOCK4 / BYTES; j++) sum = dot_us(sum, u[j], LOAD(x + j * BYTES));
    return sum;
}
#endif

typedef float vf4 __attribute__((vector_size(4 * ROWS)));
typedef int32_t vd4 __attribute__((vector_size(4 * ROWS)));
typedef vf4 vf4_u __attribute__((aligned(4)));

INLINE vf4 steps_of(const uint16_t *from) { /* of ROWS rows */
#if defined(__F16C__)
    return (vf4)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)from));
#else
    vf4 out;
    for (int i = 0; i < ROWS; i++) {
        _Float16 h;
        memcpy(&h, from + i, 2);
        out[i] = (float)h;
    }
    return out;
#endif
}

/* Rows of x: codes [m, k], scales [m, spans], of every BLOCK4 codes the sum times START8 or START4, and the norms that
 * cpu_masked.h needs [m, spans]. */
typedef struct {
    const int8_t *codes;
    const float *scales, *starts, *norms;
    long k, spans;
} rows;
#define PER_SPAN (SPAN / BLOCK4)

INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffffu); }
INLINE vf rounded(vf v) { return v + 12582912.0f - 12582912.0f; } /* to whole numbers, below 2^22 */
INLINE void store_codes(int8_t *to, vf v) { *(vc_u *)to = __builtin_convertvector(__builtin_convertvector(v, vs), vc_u); }

/* The largest of n numbers (a multiple of LANES) without their signs; not a number when one of them is none or infinite. */
INLINE float largest(const float *v, long n) {
    vf most = {0}, odd = {0};
    for (long i = 0; i < n; i += LANES) {
        vf size = magnitude(f32_low(v + i));
        most = choose(size > most, size, most);
        odd += size * 0;
    }
    float out = 0;
    for (int i = 0; i < LANES; i++) out = most[i] > out ? most[i] : out;
    return out + sum(odd);
}

#if MASKED
#include "cpu_masked.h"
#else
INLINE float largest_norm(const int8_t *codes, long length) { return 0; }
#endif

/* n numbers to codes, zero-filled to k, with scales and starts. A scale that is not a number makes every result so. */
static void round_row(const float *x, long n, long k, int start, int8_t *codes, float *scales, float *starts,
                      float *norms) {
    for (long i = 0; i < k; i += SPAN, x += SPAN, n -= SPAN, codes += SPAN, starts += PER_SPAN) {
        long length = k - i < SPAN ? k - i : SPAN;
        float part[SPAN];
        const float *in = x;
        if (n < length) {
            memset(part, 0, sizeof part);
            if (n > 0) memcpy(part, x, n * sizeof(float));
            in = part;
        }
        float most = largest(in, length), back = most > 1e-30f ? 127 / most : 0;
        for (long j = 0; j < length; j += LANES) store_codes(codes + j, rounded(f32_low(in + j) * back));
        *scales++ = most / 127;
        memset(starts, 0, PER_SPAN * sizeof(float));
        for (long j = 0; j < length; j += BLOCK8) {
            int32_t sum = 0;
            for (int b = 0; b < BLOCK8; b++) sum += codes[j + b];
            starts[j / BLOCK4] += (float)(start * sum);
        }
        *norms++ = largest_norm(codes, length);
    }
}

/* ROWS rows of 8-bit W against `columns` rows of x over one span of `length` numbers, added to sum [columns]. */
INLINE void span8(const int columns, const int8_t *w, rows x, long at, long length, vs32 (*sum)[ROWS]) {
    vd acc[COLUMNS8][ROWS] = {0};
    if (START8)
        UNROLL for (int c = 0; c < columns; c++) {
            vd4 start = __builtin_convertvector(*(const vf4_u *)(x.starts + (c * x.spans + at / SPAN) * PER_SPAN), vd4);
            vd first = {0};
            memcpy(&first, &start, sizeof start);
            UNROLL for (int r = 0; r < ROWS; r++) acc[c][r] = first;
        }
    for (long j = 0; j < length; j += BYTES) {
        const int8_t *block = w + j / BLOCK8 * (ROWS * BLOCK8) + j % BLOCK8;
        UNROLL for (int f = 0; f < ROWS * BYTES; f += 64) __builtin_prefetch(w + j * ROWS + AHEAD + f, 0, 2);
        UNROLL for (int r = 0; r < ROWS; r++) {
            vb wv = LOAD(block + r * BLOCK8);
            vu u = unsigned8(wv);
            UNROLL for (int c = 0; c < columns; c++) acc[c][r] = dot8(acc[c][r], wv, u, LOAD(x.codes + c * x.k + at + j));
        }
    }
    UNROLL for (int c = 0; c < columns; c++)
        UNROLL for (int r = 0; r < ROWS; r++)
            sum[c][r] = scaled_add(sum[c][r], acc[c][r], x.scales[c * x.spans + at / SPAN]);
}

/* One row's block of 4-bit W against `columns` rows of x. */
INLINE void add4(const int columns, const int8_t *block, float step, const int8_t *codes, long k, vs32 *acc) { /* [columns] */
    vu u[BLOCK4 / BYTES];
    __builtin_prefetch(block + AHEAD, 0, 2);
    UNROLL for (int j = 0; j < BLOCK4 / BYTES / 2; j++) {
        vu both = (vu)LOAD(block + j * BYTES);
        u[j] = both & 15;
        u[BLOCK4 / BYTES / 2 + j] = (vu)((vh)both >> 4) & 15;
    }
    UNROLL for (int c = 0; c < columns; c++) acc[c] = scaled_add(acc[c], dot4(u, codes + c * k), step);
}

/* The same with 4-bit W: in the order of memory for few rows of x, else row by row, so that what is unpacked serves as
 * many rows of x as there are registers. */
INLINE void span4(const int columns, const int8_t *w, const uint16_t *steps, rows x, long at, long length,
                  vs32 (*sum)[ROWS], vf4 *shift) {
    const long bytes = BLOCK4 / 2;
    const int8_t *codes = x.codes + at;
    vf4 step[PER_SPAN];
    vs32 acc[ROWS][COLUMNS4] = {0};
    int blocks = (int)(length / BLOCK4);
    for (int b = 0; b < blocks; b++) step[b] = steps_of(steps + b * ROWS);
    if (columns <= 2)
        for (int b = 0; b < blocks; b++)
            UNROLL for (int r = 0; r < ROWS; r++)
                add4(columns, w + (b * ROWS + r) * bytes, step[b][r], codes + b * BLOCK4, x.k, acc[r]);
    else
        UNROLL for (int r = 0; r < ROWS; r++)
            for (int b = 0; b < blocks; b++)
                add4(columns, w + (b * ROWS + r) * bytes, step[b][r], codes + b * BLOCK4, x.k, acc[r]);
    UNROLL for (int c = 0; c < columns; c++)
        UNROLL for (int r = 0; r < ROWS; r++) sum[c][r] += acc[r][c] * x.scales[c * x.spans + at / SPAN];
    for (int c = 0; c < columns; c++) {
        const float *start = x.starts + (c * x.spans + at / SPAN) * PER_SPAN;
        vf4 own = {0};
        for (int b = 0; b < blocks; b++) own += step[b] * start[b];
        shift[c] += own * x.scales[c * x.spans + at / SPAN];
    }
}

/* What one call computes; `scales` of rows beside 8-bit codes, `steps` of blocks beside 4-bit ones. */
typedef struct {
    const int8_t *w;
    const uint16_t *steps;
    const float *scales, *bias;
    float *y;
    long n, k;
} product;

INLINE void finish(const product *p, float *y, long r, float sum, int first, int last) {
    if (!first) sum += y[r];
    if (last && p->scales) sum *= p->scales[r];
    if (last && p->bias) sum += p->bias[r];
    y[r] = sum;
}

INLINE rows later(rows x, long count) {
    return (rows){x.codes + count * x.k,
                  x.scales + count * x.spans,
                  x.starts + count * x.spans * PER_SPAN,
                  x.norms + count * x.spans,
                  x.k,
                  x.spans};
}

/* Tiles [first, last) over [from, stop) of k for `columns` rows of x, added to y; the last part of k finishes y. */
INLINE void strip(const int bits, const int columns, const product *p, rows x, float *y, long first, long last, long from,
                  long stop) {
    for (long t = first; t < last; t++) {
        vs32 sum[COLUMNS4][ROWS] = {0};
        vf4 shift[COLUMNS4] = {0};
        for (long i = from; i < stop; i += SPAN) {
            const int8_t *w = p->w + (t * p->k + i) * ROWS * bits / 8;
            long length = stop - i < SPAN ? stop - i : SPAN;
            if (bits == 8)
                span8(columns, w, x, i, length, sum);
            else
                span4(columns, w, p->steps + (t * p->k + i) / BLOCK4 * ROWS, x, i, length, sum, shift);
        }
        for (int r = 0; r < ROWS && t * ROWS + r < p->n; r++)
            for (int c = 0; c < columns; c++)
                finish(p, y + c * p->n, t * ROWS + r, total(sum[c][r]) + shift[c][r], from == 0, stop == p->k);
    }
}

#if MASKED
/* As `strip` with 8 bits, for MASKED_COLUMNS rows of x; `known` [tile][span]. */
static void masked_strip(const product *p, rows x, float *y, long first, long last, long from, long stop,
                         const ready *known) {
    for (long t = first; t < last; t++) {
        vs32 sum[MASKED_COLUMNS][ROWS] = {0};
        for (long i = from; i < stop; i += SPAN, known++) {
            const int8_t *w = p->w + (t * p->k + i) * ROWS;
            long length = stop - i < SPAN ? stop - i : SPAN;
            float norm = 0;
            for (int c = 0; c < MASKED_COLUMNS; c++) {
                float own = x.norms[c * x.spans + i / SPAN];
                norm = own > norm ? own : norm;
            }
            for (int r = 0; r < ROWS; r++) {
                vd acc[MASKED_COLUMNS];
                if (known->norms[r] * norm <= LARGEST)
                    masked_span(w + r * BLOCK8, known->less[r], x.codes + i, x.k, length, 1, acc);
                else
                    masked_span(w + r * BLOCK8, known->less[r], x.codes + i, x.k, length, 0, acc);
                UNROLL for (int c = 0; c < MASKED_COLUMNS; c++)
                    sum[c][r] = scaled_add(sum[c][r], acc[c], x.scales[c * x.spans + i / SPAN]);
            }
        }
        for (int c = 0; c < MASKED_COLUMNS; c++) {
            vf4 all = totals(sum[c]);
            for (int r = 0; r < ROWS && t * ROWS + r < p->n; r++)
                finish(p, y + c * p->n, t * ROWS + r, all[r], from == 0, stop == p->k);
        }
    }
}

/* As many of the m rows of x as MASKED_COLUMNS divides; how many that is. */
static long masked_block(const product *p, rows x, long m, long first, long last, long from, long stop) {
    if (m < MASKED_LEAST) return 0;
    ready known[MOST_READY], *next = known;
    for (long t = first; t < last; t++)
        for (long i = from; i < stop; i += SPAN)
            prepare(p->w + (t * p->k + i) * ROWS, stop - i < SPAN ? stop - i : SPAN, next++);
    long done = 0;
    for (; m - done >= MASKED_COLUMNS; done += MASKED_COLUMNS)
        masked_strip(p, later(x, done), p->y + done * p->n, first, last, from, stop, known);
    return done;
}
#else
INLINE long masked_block(const product *p, rows x, long m, long first, long last, long from, long stop) { return 0; }
#endif

#define DEFINE(BITS)                                                                                                   \
    static void block##BITS(const product *p, rows x, long m, long first, long last, long from, long stop) {           \
        const int most = COLUMNS##BITS;                                                                                \
        long done = BITS == 8 ? masked_block(p, x, m, first, last, from, stop) : 0;                                    \
        float *y = p->y + done * p->n;                                                                                 \
        x = later(x, done), m -= done;                                                                                 \
        for (; m >= most; m -= most, x = later(x, most), y += most * p->n)                                             \
            strip(BITS, most, p, x, y, first, last, from, stop);                                                       \
        switch (m) {                                                                                                   \
        case 1: strip(BITS, 1, p, x, y, first, last, from, stop); break;                                               \
        case 2: strip(BITS, 2, p, x, y, first, last, from, stop); break;                                               \
        case 3: strip(BITS, most > 3 ? 3 : 1, p, x, y, first, last, from, stop); break;                                \
        case 4: strip(BITS, most > 4 ? 4 : 1, p, x, y, first, last, from, stop); break;                                \
        case 5: strip(BITS, most > 5 ? 5 : 1, p, x, y, first, last, from, stop); break;                                \
        }                                                                                                              \
    }

DEFINE(8)
DEFINE(4)

/* One call: rows x [m, width] to be rounded to `q`; tiles of W, `step` of them a piece of work. */
typedef struct {
    int bits;
    const float *x;
    long ldx, m, width, tiles, step, chunk;
    product p;
    rows q;
} call;

static void round_piece(const void *what, long i) {
    const call *c = what;
    long k = c->q.k, spans = c->q.spans; /* what `rows` reads is written here first */
    round_row(c->x + i * c->ldx, c->width, k, c->bits == 8 ? START8 : START4, (int8_t *)c->q.codes + i * k,
              (float *)c->q.scales + i * spans, (float *)c->q.starts + i * spans * PER_SPAN,
              (float *)c->q.norms + i * spans);
}

static void tile_piece(const void *what, long piece) {
    const call *c = what;
    long k = c->q.k, t = piece * c->step, stop = t + c->step < c->tiles ? t + c->step : c->tiles;
    long inner = c->m > COLUMNS8 ? c->step : 1; /* few rows of x: W is read once, in the order of memory */
    for (; t < stop; t += inner)
        for (long from = 0; from < k; from += c->chunk)
            (c->bits == 8 ? block8 : block4)(&c->p, c->q, c->m, t, t + inner < stop ? t + inner : stop, from,
                                             k - from < c->chunk ? k : from + c->chunk);
}

/* y [m, n] = x [m, width] W^T + bias. k is width rounded up to whole blocks; `scratch` holds qvl_quantised_scratch bytes. */
void qvl_quantised_linear(int bits, const float *x, long ldx, const int8_t *w, const uint16_t *steps,
                          const float *scales, const float *bias, float *y, char *scratch, long m, long n, long width,
                          long k, int threads) {
    long spans = (k + SPAN - 1) / SPAN;
    float *x_scales = (float *)scratch, *starts = x_scales + m * spans, *norms = starts + m * spans * PER_SPAN;
    long tiles = (n + ROWS - 1) / ROWS, chunk = k < K_CHUNK ? k : K_CHUNK;
    long step = BLOCK_BYTES * 8 / bits / (chunk * ROWS), fair = tiles / (4 * threads);
    if (step > fair) step = fair;
    if (step > MOST_READY / ((chunk + SPAN - 1) / SPAN)) step = MOST_READY / ((chunk + SPAN - 1) / SPAN);
    if (step < 1) step = 1;
    const call c = {bits, x, ldx, m, width, tiles, step, chunk, {w, steps, scales, bias, y, n, k},
                    {(int8_t *)(norms + m * spans), x_scales, starts, norms, k, spans}};
    qvl_share(m, m * k > 65536 ? threads : 1, round_piece, &c);
    qvl_share((tiles + step - 1) / step, threads, tile_piece, &c);
}

long qvl_quantised_scratch(long m, long k) { return m * (k + 4 * (2 + PER_SPAN) * ((k + SPAN - 1) / SPAN)); }

/* Rows x [count, width] of a matrix, to be written at its rows first, first + 1, ... */
typedef struct {
    const float *x;
    void *w, *scales;
    long first, width, k;
} writing;

static void write8(const void *what, long i) {
    const writing *p = what;
    const float *in = p->x + i * p->width;
    long row = p->first + i, whole = p->width - p->width % BLOCK8;
    int8_t *to = (int8_t *)p->w + row / ROWS * ROWS * p->k + row % ROWS * BLOCK8;
    float rest[BLOCK8] = {0};
    memcpy(rest, in + whole, (p->width - whole) * sizeof(float));
    float most = largest(in, whole), other = largest(rest, BLOCK8);
    most = other > most ? other : most;
    float back = most > 1e-30f ? 127 / most : 0;
    ((float *)p->scales)[row] = most / 127;
    for (long j = 0; j < p->k; j += BLOCK8, to += ROWS * BLOCK8)
        for (long b = 0; b < BLOCK8; b += LANES)
            store_codes(to + b, rounded(f32_low(j < whole ? in + j + b : rest + b) * back));
}

void qvl_quantise8(const float *x, int8_t *w, float *scales, long first, long count, long width, long k, int threads) {
    const writing p = {x, w, scales, first, width, k};
    qvl_share(count, count * width > 65536 ? threads : 1, write8, &p);
}

INLINE vf code4(vf v) { /* the nearest of -8..7 */
    const vf low = (vf){0} - 8, high = (vf){0} + 7;
    v = choose(v < low, low, choose(v > high, high, v));
    return rounded(v);
}

/* The step for BLOCK4 numbers: of some around the one that reaches the largest number, the one of least square error. A
 * step may be negative: the code -8 belongs to the larger side. */
static float best_step(const float *v) {
    float low = 0, high = 0, best = 0, least = INFINITY;
    for (int i = 0; i < BLOCK4; i++) {
        low = v[i] < low ? v[i] : low;
        high = v[i] > high ? v[i] : high;
    }
    float reach = (-low > high ? -low : -high) / 8;
    for (int part = 11; part >= 6; part--) {
        float step = (float)(_Float16)(reach * part / 10);
        if (step == 0) continue;
        vf error = {0};
        for (int i = 0; i < BLOCK4; i += LANES) {
            vf own = f32_low(v + i), off = own - code4(own / step) * step;
            error += off * off;
        }
        if (sum(error) < least) least = sum(error), best = step;
    }
    return best;
}

static void write4(const void *what, long i) {
    const writing *p = what;
    long row = p->first + i;
    for (long g = 0; g * BLOCK4 < p->k; g++) {
        float part[BLOCK4] = {0};
        long place = (row / ROWS * (p->k / BLOCK4) + g) * ROWS + row % ROWS, own = p->width - g * BLOCK4;
        memcpy(part, p->x + i * p->width + g * BLOCK4, (own < BLOCK4 ? own : BLOCK4) * sizeof(float));
        float step = best_step(part), back = step != 0 ? 1 / step : 0;
        _Float16 half = (_Float16)step;
        memcpy((uint16_t *)p->scales + place, &half, 2);
        for (int j = 0; j < BLOCK4; j += LANES) *(vf_u *)(part + j) = code4(f32_low(part + j) * back) + 8;
        uint8_t *to = (uint8_t *)p->w + place * (BLOCK4 / 2);
        for (int j = 0; j < BLOCK4 / 2; j++) to[j] = (uint8_t)((int)part[j] | (int)part[BLOCK4 / 2 + j] << 4);
    }
}

void qvl_quantise4(const float *x, uint8_t *w, uint16_t *steps, long first, long count, long width, long k,
                   int threads) {
    const writing p = {x, w, steps, first, width, k};
    qvl_share(count, count * width > 65536 ? threads : 1, write4, &p);
}

const char *qvl_quantised_path(void) { return PATH; }
