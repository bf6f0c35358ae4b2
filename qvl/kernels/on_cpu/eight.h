/* Products with W of 8 bits, over one span of x.
 *
 * A processor with AVX2 alone has no product of bytes that sums into 32 bits, and the one it has wants an unsigned factor:
 * the size of x. Its sign turns w over by an operation that any of its four places does, where one that changes a sign
 * takes one of the two that multiply.
 */
#pragma once
#include "amx.h"

#if defined(WIDE)
/* The codes in the second half of a row of k * BYTES8 bytes become four sizes, four signs (-1 below zero) and so on in all
 * of it; of BLOCK4 each, the sizes of those below zero are summed up. */
INLINE void part_signs(int8_t *row, long k, int32_t *sums) {
    const __m256i none = _mm256_setzero_si256();
    for (long i = 0; i < k; i += BYTES) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(row + k + i)), size = _mm256_abs_epi8(x);
        __m256i sign = _mm256_cmpgt_epi8(none, x), below = _mm256_sad_epu8(_mm256_and_si256(size, sign), none);
        __m256i low = _mm256_unpacklo_epi32(size, sign), high = _mm256_unpackhi_epi32(size, sign);
        _mm256_storeu_si256((__m256i *)(row + 2 * i), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *)(row + 2 * i + BYTES), _mm256_permute2x128_si256(low, high, 0x31));
        if (i % BLOCK4 == 0) sums[i / BLOCK4] = 0;
        for (int l = 0; l < BYTES / 8; l++) sums[i / BLOCK4] += (int32_t)((__v4di)below)[l];
    }
}
INLINE four8 next8(const int8_t *x) { return (four8){(vu)four(x), four(x + 4)}; }
#else
INLINE four8 next8(const int8_t *x) { return four(x); }
#endif

/* Four numbers of a tile times `columns` rows of x, `apart` from each other. */
INLINE void bytes_step(const int columns, const int8_t *w, const int8_t *x, long apart, vd (*sum)[BESIDE]) {
    vb wv[BESIDE];
    UNROLL for (int v = 0; v < BESIDE; v++) {
        wv[v] = ready8(LOAD(w + v * BYTES));
#if defined(WIDE)
        if (columns > 1) __asm__ volatile("" : "+x"(wv[v])); /* or every column loads it again */
#endif
    }
    UNROLL for (int c = 0; c < columns; c++) {
        four8 same = next8(x + c * apart);
        UNROLL for (int v = 0; v < BESIDE; v++) sum[c][v] = dot8(sum[c][v], wv[v], same);
    }
}

/* Numbers [at, at + length) of k of some tiles, which begin at w and `next` bytes apart, times `columns` rows of x: to
 * `out`, one tile after the other, still to be scaled. */
INLINE void span8(const int tiles, const int columns, const product *p, const int8_t *w, long next, long column, long at,
                  long length, vn (*out)[BESIDE]) {
    vd sum[SUMS][BESIDE];
    UNROLL for (int i = 0; i < tiles * columns; i++) {
        int32_t start = 0;
        for (long b = 0; START8 && b < length; b += BLOCK4) start += START8 * *sums_of(p, column + i % columns, at + b);
        UNROLL for (int v = 0; v < BESIDE; v++) sum[i][v] = (vd){0} + start;
    }
    const int beside = BESIDE_X(columns);
    const long run = beside ? BLOCK8 : length, apart = beside ? BLOCK8 : p->k * BYTES8;
    const int8_t *x = p->codes + (beside ? at * SQUARE : (column * p->k + at) * BYTES8);
    for (long b = 0; b < length; b += run, x += SQUARE * BLOCK8)
        for (long j = 0; j < run; j += 4, w += 4 * TILE)
            UNROLL for (int t = 0; t < tiles; t++) {
                const int8_t *own = w + t * next;
                __builtin_prefetch(own + AHEAD(columns), 0, 2);
                bytes_step(columns, own, x + j * BYTES8, apart, sum + t * columns);
            }
    UNROLL for (int i = 0; i < tiles * columns; i++)
        UNROLL for (int v = 0; v < BESIDE; v++) out[i][v] = __builtin_convertvector(sum[i][v], vn);
}
