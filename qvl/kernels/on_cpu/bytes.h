/* Vectors of bytes, and products of them that sum into 32 bits.
 *
 * `BYTES` is the width of a vector. The portable way is also what tests run to check the logic of instructions that
 * their machine lacks (-DQVL_PORTABLE=64). WIDE: bytes have no product of their own that sums into 32 bits (AVX2).
 */
#pragma once
#include "vectors.h"

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
#define WIDE 1
#define PATH "AVX2"
#else
#define BYTES 16
#define PATH "portable"
#endif

#define TILE 16 /* rows of a tile of W */
#define BLOCK8 64
#define BLOCK4 128
#define SPAN 512
#define PER_SPAN (SPAN / BLOCK4)

typedef int8_t vb __attribute__((vector_size(BYTES)));
typedef uint8_t vu __attribute__((vector_size(BYTES)));
typedef uint16_t vh __attribute__((vector_size(BYTES)));
typedef int16_t vw __attribute__((vector_size(BYTES)));
typedef uint32_t vu32 __attribute__((vector_size(BYTES)));
typedef int32_t vd __attribute__((vector_size(BYTES)));
typedef vb vb_u __attribute__((aligned(1)));
#define LOAD(p) (*(const vb_u *)(p))
#define UNROLL _Pragma("GCC unroll 8")

/* sum + four products of unsigned u and signed x in every lane. Saturation: none in VNNI's form, nor in C. */
#if defined(VNNI) && BYTES == 64
INLINE vd dot_us(vd sum, vu u, vb x) { return (vd)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)x); }
#elif defined(VNNI)
INLINE vd dot_us(vd sum, vu u, vb x) { return (vd)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)x); }
#elif defined(WIDE)
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

/* Weights of 8 bits times four codes of x in every lane; one of the two must be unsigned. Instead of w it is w + 128,
 * taken off by adding START8 times the sum of x. With AVX2 that would saturate: x comes as sizes and signs (see eight.h),
 * w is turned over where x is below zero, ~w = -w - 1, and START8 times the sizes of those is added. */
#if defined(WIDE)
#define START8 1
#define BYTES8 2 /* of a code of x */
typedef struct { vu size; vb sign; } four8;
INLINE vb ready8(vb w) { return w; }
INLINE vd dot8(vd sum, vb w, four8 x) { return dot_us(sum, x.size, w ^ x.sign); }
#else
#define START8 (-128)
#define BYTES8 1
typedef vb four8;
INLINE vb ready8(vb w) { return (vb)((vu)w ^ 128); }
INLINE vd dot8(vd sum, vb w, four8 x) { return dot_us(sum, (vu)w, x); }
#endif
