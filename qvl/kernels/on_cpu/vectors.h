/* Vectors of LANES floats, how 16-bit numbers become them, and the exponential function.
 *
 * Written with vector extensions, so that one source becomes AVX2, AVX-512 or NEON code with -march=native.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define GROUP (2 * LANES)

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef float vf_u __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vi_u __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint16_t vh_u __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int32_t vs __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vf bf16_low(const uint16_t *w) { return (vf)(*(const vi_u *)w << 16); }
INLINE vf bf16_high(const uint16_t *w) { return (vf)(*(const vi_u *)w & 0xffff0000u); }
INLINE vf bf16_plain(const uint16_t *w) { return (vf)(__builtin_convertvector(*(const vh_u *)w, vi) << 16); }
INLINE vf f32_low(const float *w) { return *(const vf_u *)w; }
INLINE vf f32_high(const float *w) { return *(const vf_u *)(w + LANES); }
#if LANES == 16
INLINE vf f16_low(const uint16_t *w) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w)); }
#elif defined(__F16C__) && LANES == 8
INLINE vf f16_low(const uint16_t *w) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w)); }
#else
INLINE vf f16_low(const uint16_t *w) {
    vf out;
    for (int i = 0; i < LANES; i++) {
        _Float16 h;
        memcpy(&h, w + i, 2);
        out[i] = (float)h;
    }
    return out;
}
#endif
INLINE vf f16_high(const uint16_t *w) { return f16_low(w + LANES); }

/* The first `count` numbers of v. */
INLINE void store_first(float *to, vf v, long count) {
#if LANES == 16
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
#else
    for (long i = 0; i < count; i++) to[i] = v[i];
#endif
}

/* c + a * b, rounded once where the processor can. Left to the compiler, it would depend on the loop around it. */
#if LANES == 16
INLINE vf fma_add(vf c, vf a, vf b) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif LANES == 8 && defined(__FMA__)
INLINE vf fma_add(vf c, vf a, vf b) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE vf fma_add(vf c, vf a, vf b) { return c + a * b; }
#endif

/* Whether the processor multiplies pairs of bf16 by one instruction that takes no longer than one for fp32: AMD's since
 * Zen 4, which SSE4A tells. Intel's takes longer than two of fp32 (a core of Emerald Rapids multiplies 36 to 39 billion
 * numbers a second in pairs, torch as many, and more than 60 in fp32). */
#if defined(__AVX512BF16__) && defined(__SSE4A__)
#define FAST_PAIRS 1
#else
#define FAST_PAIRS 0
#endif

/* Two numbers in bf16 to a word of 32 bits: c + the products of each word's odd numbers + those of its even ones, by
 * two rounded additions. The instruction takes denormals for zeros; what is written out here does not. */
#if FAST_PAIRS && !defined(QVL_PAIRED)
#define PAIR_INSTRUCTION 1
INLINE vf pair_add(vf c, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
#else
INLINE vf pair_add(vf c, vf a, vf b) {
    c = fma_add(c, (vf)((vi)a & 0xffff0000u), (vf)((vi)b & 0xffff0000u));
    return fma_add(c, (vf)((vi)a << 16), (vf)((vi)b << 16));
}
#endif

INLINE vf choose(vs mask, vf a, vf b) { return (vf)(((vs)a & mask) | ((vs)b & ~mask)); }

/* Rounded to the nearest in bf16, ties to even; NaN stays NaN. */
INLINE vh_u bf16_of(vf v) {
#if defined(__AVX512BF16__) && !defined(QVL_PAIRED)
    return (vh_u)_mm512_cvtneps_pbh((__m512)v);
#else
    vi bits = (vi)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((vi)choose(v != v, (vf)(bits >> 16 | 64), (vf)rounded), vh_u);
#endif
}

/* GROUP numbers, likewise. */
INLINE vf rounded_pairs(const float *x) {
#if defined(__AVX512BF16__) && !defined(QVL_PAIRED)
    return (vf)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + LANES), _mm512_loadu_ps(x));
#else
    const vh_u halves[2] = {bf16_of(f32_low(x)), bf16_of(f32_high(x))};
    vf out;
    memcpy(&out, halves, sizeof out);
    return out;
#endif
}

INLINE float sum(vf v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

/* e^x to a few units in the last place; 0 far below -87, infinity above 88.8 at most, NaN stays NaN. */
INLINE vf exponential(vf x) {
#if LANES == 16
    const __m512 low = _mm512_set1_ps(-104.0f), high = _mm512_set1_ps(89.0f); /* NaN comes through as the second of two */
    vf t = (vf)_mm512_max_ps(low, _mm512_min_ps(high, (__m512)x));
    vf n = (vf)_mm512_roundscale_ps((__m512)(t * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
    const vf low = (vf){0} - 87.0f, high = (vf){0} + 88.0f;
    vf t = choose(x > high, high, choose(x < low, low, x));
    vf n = t * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number, found in the low bits */
    vs power = (vs)n << 23;
    n -= 12582912.0f;
#endif
    const vf one = (vf){0} + 1.0f;
    vf f = fma_add(fma_add(t, n, one * -0.693359375f), n, one * 2.12194440e-4f);
    vf p = fma_add(one * 1.3981999507e-3f, f, one * 1.9875691500e-4f);
    p = fma_add(one * 8.3334519073e-3f, p, f);
    p = fma_add(one * 4.1665795894e-2f, p, f);
    p = fma_add(one * 1.6666665459e-1f, p, f);
    p = fma_add(one * 5.0000001201e-1f, p, f);
    p = fma_add(f, p, f * f) + 1.0f;
#if LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    p = (vf)((vs)p + power);
    p = choose(x > high, (vf){0} + __builtin_inff(), p);
    return choose(x != x, x, choose(x < low, (vf){0}, p));
#endif
}

INLINE vf quick_gelu(vf x) { return x / (1.0f + exponential(x * -1.702f)); }
