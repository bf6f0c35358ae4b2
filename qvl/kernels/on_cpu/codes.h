/* How numbers become codes: rows of x as they come, and weights once.
 *
 * x: every SPAN numbers of a row share a scale. W, 8 bits: one scale per row, codes -127..127; 4 bits: one fp16 step per
 * row and BLOCK4 numbers, codes 0..15 stand for -8..7.
 */
#pragma once
#include "bytes.h"
#include <math.h>

/* What one call computes. Of x: codes [m, k]; of every span a scale [m, spans]; of every BLOCK4 codes their sum
 * [m, spans, PER_SPAN]. `tiles` of W are a piece of work. With `gelu` x passes that activation first. */
typedef struct {
    int bits, gelu;
    const int8_t *w;
    const uint16_t *steps; /* of blocks of 4 bits; rows of 8 bits have scales */
    const float *from, *row_scales, *bias;
    float *y;
    int8_t *codes;
    float *scales;
    int32_t *sums;
    long ldx, m, n, width, k, spans, tiles;
} product;

INLINE float *scales_of(const product *p, long row, long span) { return p->scales + row * p->spans + span; }
INLINE int32_t *sums_of(const product *p, long row, long at) {
    return p->sums + row * p->spans * PER_SPAN + at / BLOCK4;
}

typedef int8_t vc_u __attribute__((vector_size(LANES), aligned(1))); /* LANES codes */

INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffffu); }
INLINE vf rounded(vf v) { return v + 12582912.0f - 12582912.0f; } /* to whole numbers, below 2^22 */
INLINE void store_codes(int8_t *to, vf v) { *(vc_u *)to = __builtin_convertvector(__builtin_convertvector(v, vs), vc_u); }

/* The larger ones. */
INLINE vi larger(vi a, vi b) {
#if LANES == 16
    return (vi)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif LANES == 8
    return (vi)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    vs first = (vs)(a > b);
    return (a & (vi)first) | (b & ~(vi)first);
#endif
}

/* The largest of n numbers (a multiple of BLOCK8) without their signs; not a number when one of them is none or infinite.
 * Such numbers are in the order of their bits, and what is not finite stands above all others. */
INLINE float largest(const float *v, long n) {
    vi most[4] = {0};
    for (long i = 0; i < n; i += BLOCK8)
        for (int j = 0; j < BLOCK8 / LANES; j++) most[j % 4] = larger(most[j % 4], (vi)magnitude(f32_low(v + i + j * LANES)));
    most[0] = larger(larger(most[0], most[1]), larger(most[2], most[3]));
#if LANES == 16
    uint32_t all = _mm512_reduce_max_epu32((__m512i)most[0]);
#else
    uint32_t all = 0;
    for (int i = 0; i < LANES; i++) all = most[0][i] > all ? most[0][i] : all;
#endif
    if (all >= 0x7f800000u) return NAN;
    float out;
    memcpy(&out, &all, sizeof out);
    return out;
}

/* To the nearest whole numbers; into `codes` as well. */
INLINE vs whole_codes(vf v, int8_t *codes) {
#if LANES == 16
    vs whole = (vs)_mm512_cvtps_epi32((__m512)v);
    _mm_storeu_si128((__m128i *)codes, _mm512_cvtepi32_epi8((__m512i)whole));
    return whole;
#else
    vs whole = __builtin_convertvector(rounded(v), vs);
#if LANES == 8
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)whole), _mm256_extracti128_si256((__m256i)whole, 1));
    _mm_storel_epi64((__m128i *)codes, _mm_packs_epi16(words, words));
#else
    *(vc_u *)codes = __builtin_convertvector(whole, vc_u);
#endif
    return whole;
#endif
}

INLINE int32_t sum_of_whole(vs v) {
#if LANES == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t all = 0;
    for (int l = 0; l < LANES; l++) all += v[l];
    return all;
#endif
}

/* `length` numbers, a multiple of BLOCK8, times `back` to codes, as many of them `apart` from the next; their sum per BLOCK4
 * into `sums`. */
INLINE void round_span(const float *x, long length, float back, int8_t *codes, long apart, int32_t *sums) {
    for (long b = 0; b < length; b += BLOCK4) {
        vs sum = {0};
        for (long i = b; i < length && i < b + BLOCK4; i += BLOCK8, codes += apart)
            for (long j = 0; j < BLOCK8; j += LANES) sum += whole_codes(f32_low(x + i + j) * back, codes + j);
        sums[b / BLOCK4] = sum_of_whole(sum);
    }
}

/* n numbers to codes, zero-filled to k, with scales and sums. A scale that is not a number makes every result so. */
INLINE void round_row(const int gelu, const float *x, long n, long k, int8_t *codes, long apart, float *scales,
                      int32_t *sums) {
    for (long i = 0; i < k; i += SPAN, scales++, sums += PER_SPAN, codes += SPAN / BLOCK8 * apart) {
        long length = k - i < SPAN ? k - i : SPAN, own = n - i < length ? n - i : length;
        float part[SPAN];
        const float *in = x + i;
        if (own < length) {
            memset(part, 0, sizeof part);
            if (own > 0) memcpy(part, in, own * sizeof(float));
            in = part;
        }
        if (gelu) {
            for (long j = 0; j < length; j += LANES) *(vf_u *)(part + j) = quick_gelu(f32_low(in + j));
            in = part;
        }
        float most = largest(in, length);
        *scales = most / 127;
        if (most == most)
            round_span(in, length, most > 1e-30f ? 127 / most : 0, codes, apart, sums);
        else { /* no number can be converted: nothing, times a scale that is none */
            for (long j = 0; j < length / BLOCK8; j++) memset(codes + j * apart, 0, BLOCK8);
            memset(sums, 0, PER_SPAN * sizeof *sums);
        }
    }
}

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
    int8_t *to = (int8_t *)p->w + row / TILE * TILE * p->k + row % TILE * 4, codes[BLOCK8];
    float rest[BLOCK8] = {0};
    memcpy(rest, in + whole, (p->width - whole) * sizeof(float));
    float most = largest(in, whole), other = largest(rest, BLOCK8);
    most = other > most ? other : most;
    float back = most > 1e-30f ? 127 / most : 0;
    ((float *)p->scales)[row] = most / 127;
    for (long j = 0; j < p->k; j += BLOCK8) {
        for (long b = 0; b < BLOCK8; b += LANES)
            store_codes(codes + b, rounded(f32_low(j < whole ? in + j + b : rest + b) * back));
        for (long b = 0; b < BLOCK8; b += 4, to += 4 * TILE) memcpy(to, codes + b, 4);
    }
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
        long block = row / TILE * (p->k / BLOCK4) + g, place = block * TILE + row % TILE, own = p->width - g * BLOCK4;
        memcpy(part, p->x + i * p->width + g * BLOCK4, (own < BLOCK4 ? own : BLOCK4) * sizeof(float));
        float step = best_step(part), back = step != 0 ? 1 / step : 0;
        _Float16 half = (_Float16)step;
        memcpy((uint16_t *)p->scales + place, &half, 2);
        for (int j = 0; j < BLOCK4; j += LANES) *(vf_u *)(part + j) = code4(f32_low(part + j) * back) + 8;
        uint8_t *to = (uint8_t *)p->w + block * TILE * (BLOCK4 / 2) + row % TILE * 4;
        for (int j = 0; j < BLOCK4 / 2; j++)
            to[j / 4 * (4 * TILE) + j % 4] = (uint8_t)((int)part[j] | (int)part[BLOCK4 / 2 + j] << 4);
    }
}
