/* Many rows of x against 8-bit W on a processor with AVX2 alone.
 *
 * Bytes are multiplied as |w| times w's sign times x. Moving the sign to x takes one of the two places that multiply.
 * Here x is taken as it is where w >= 0, and with all bits turned, -x - 1, where w < 0. That comes to w x less |w|: the
 * sum of those |w|, which no x changes, is added once. Where no four products can leave 16 bits together, as
 * Cauchy's inequality tells of their norms, two pairs are added before they are widened.
 *
 * Whole numbers, so the sums of a span are those of other ways.
 */
#pragma once
#include "cpu_bytes.h"
#include <math.h>
#define MASKED_COLUMNS 8
#define MASKED_LEAST 24 /* rows of x that are worth preparing W for */
#define MOST_READY 256  /* tiles times spans that a thread works on at a time */
#define LARGEST 32760   /* 32767, and a little for the rounding of norms */

/* What the rows of a tile need in one span: the sums of |w| where w < 0, and the largest norm of four codes that are
 * added in 16 bits. */
typedef struct {
    vd less[ROWS];
    float norms[ROWS];
} ready;

INLINE __m256i squares(__m256i codes) { /* of pairs, added: at most 2 * 127 * 127 */
    __m256i size = _mm256_abs_epi8(codes);
    return _mm256_maddubs_epi16(size, size);
}

INLINE float largest_root(__m256i squares) { /* of 16 numbers without signs; there is an instruction for the least */
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(squares), _mm256_extracti128_si256(squares, 1));
    __m128i least = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1)));
    return sqrtf((uint16_t)~_mm_extract_epi16(least, 0));
}

/* The largest norm of four codes of x that meet in one sum of 16 bits, with one more in each for turned bits. */
static float largest_norm(const int8_t *codes, long length) {
    __m256i most = {0};
    for (long j = 0; j < length; j += BLOCK8) {
        __m256i both = _mm256_add_epi16(squares((__m256i)LOAD(codes + j)), squares((__m256i)LOAD(codes + j + 32)));
        most = _mm256_max_epu16(most, both);
    }
    return largest_root(most) + 2;
}

static void prepare(const int8_t *w, long length, ready *out) {
    const __m256i zero = {0}, ones = _mm256_set1_epi16(1);
    for (int r = 0; r < ROWS; r++) {
        __m256i most = {0}, less = {0};
        for (long j = 0; j < length; j += BLOCK8) {
            __m256i both = zero;
            for (int half = 0; half < BLOCK8; half += 32) {
                __m256i v = (__m256i)LOAD(w + j * ROWS + r * BLOCK8 + half);
                __m256i below = _mm256_and_si256(_mm256_cmpgt_epi8(zero, v), _mm256_abs_epi8(v));
                __m256i pairs = _mm256_maddubs_epi16(below, _mm256_set1_epi8(1));
                less = _mm256_add_epi32(less, _mm256_madd_epi16(pairs, ones));
                both = _mm256_add_epi16(both, squares(v));
            }
            most = _mm256_max_epu16(most, both);
        }
        out->less[r] = (vd)less;
        out->norms[r] = largest_root(most);
    }
}

/* A row of W over one span against MASKED_COLUMNS rows of x. `chained`: two pairs fit into 16 bits. */
INLINE void masked_span(const int8_t *w, vd less, const int8_t *x, long k, long length, const int chained, vd *acc) {
    const __m256i zero = {0}, ones = _mm256_set1_epi16(1);
    UNROLL for (int c = 0; c < MASKED_COLUMNS; c++) acc[c] = less;
    for (long j = 0; j < length; j += BLOCK8) {
        __m256i v0 = (__m256i)LOAD(w + j * ROWS), v1 = (__m256i)LOAD(w + j * ROWS + 32);
        __m256i mask0 = _mm256_cmpgt_epi8(zero, v0), mask1 = _mm256_cmpgt_epi8(zero, v1);
        __m256i size0 = _mm256_abs_epi8(v0), size1 = _mm256_abs_epi8(v1);
        UNROLL for (int c = 0; c < MASKED_COLUMNS; c++) {
            __m256i x0 = _mm256_xor_si256(mask0, (__m256i)LOAD(x + c * k + j));
            __m256i x1 = _mm256_xor_si256(mask1, (__m256i)LOAD(x + c * k + j + 32));
            __m256i pairs0 = _mm256_maddubs_epi16(size0, x0), pairs1 = _mm256_maddubs_epi16(size1, x1);
            if (chained) {
                acc[c] += (vd)_mm256_madd_epi16(_mm256_add_epi16(pairs0, pairs1), ones);
            } else {
                acc[c] += (vd)_mm256_madd_epi16(pairs0, ones);
                acc[c] += (vd)_mm256_madd_epi16(pairs1, ones);
            }
        }
    }
}
