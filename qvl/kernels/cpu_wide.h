/* Codes of 16 bits, for some rows of x on a processor with AVX2 alone.
 *
 * Bytes cost it three places that multiply for 32 products, with their sign; 16-bit codes cost two, and fill no more
 * than their pairs: nothing can overflow. Whole numbers, so the sums are those of bytes.
 */
#pragma once
#include "cpu_bytes.h"

/* ROWS rows of W of 8 bits over one span against `columns` rows of x, k apart, of 16 bits. */
INLINE void wide_dots(const int columns, const int8_t *w, const int16_t *x, long k, long length, vd (*acc)[ROWS]) {
    for (long j = 0; j < length; j += 16) {
        const int8_t *block = w + j / BLOCK8 * (ROWS * BLOCK8) + j % BLOCK8;
        __m256i xv[3];
        UNROLL for (int c = 0; c < columns; c++) xv[c] = _mm256_loadu_si256((const __m256i *)(x + c * k + j));
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m256i wv = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(block + r * BLOCK8)));
            UNROLL for (int c = 0; c < columns; c++) acc[c][r] += (vd)_mm256_madd_epi16(wv, xv[c]);
        }
    }
}
