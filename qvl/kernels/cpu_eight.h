/* Products with W of 8 bits, over one span of x.
 *
 * A processor with AVX2 alone has no product of bytes that sums into 32 bits. With their sign they cost it three places
 * that multiply for 32 products, codes of 16 bits two, which fill no more than their pairs: nothing can overflow. Whole
 * numbers, so both ways find the same sums.
 */
#pragma once
#include "cpu_tiles.h"

enum way { FOUR, BYTEWISE, WIDER };

/* Four numbers of a tile times `columns` rows of x, k apart: codes of 8 bits. */
INLINE void bytes_step(const int columns, const int8_t *w, const int8_t *x, long k, vd (*sum)[BESIDE]) {
    vb wv[BESIDE];
    vu u[BESIDE];
    UNROLL for (int v = 0; v < BESIDE; v++) wv[v] = LOAD(w + v * BYTES), u[v] = unsigned8(wv[v]);
    UNROLL for (int c = 0; c < columns; c++) {
        vb same = four(x + c * k);
        UNROLL for (int v = 0; v < BESIDE; v++) sum[c][v] = dot8(sum[c][v], wv[v], u[v], same);
    }
}

#ifdef WIDE
/* The same: codes of 16 bits, of every four the even ones first. */
INLINE void wide_step(const int columns, const int8_t *w, const int16_t *x, long k, vd (*sum)[BESIDE]) {
    __m256i even[BESIDE], odd[BESIDE];
    UNROLL for (int v = 0; v < BESIDE; v++) {
        vw both = (vw)LOAD(w + v * BYTES);
        even[v] = (__m256i)((vw)((vh)both << 8) >> 8), odd[v] = (__m256i)(both >> 8);
    }
    UNROLL for (int c = 0; c < columns; c++) {
        __m256i first = (__m256i)four(x + c * k), second = (__m256i)four(x + c * k + 2);
        UNROLL for (int v = 0; v < BESIDE; v++) {
            sum[c][v] += (vd)_mm256_madd_epi16(even[v], first);
            sum[c][v] += (vd)_mm256_madd_epi16(odd[v], second);
            __asm__ volatile("" : "+x"(sum[c][v])); /* or the compiler puts products aside and adds them later */
        }
    }
}
#endif

/* Numbers [at, at + length) of k of a tile times `columns` rows of x: to `out`, still to be scaled. */
INLINE void span8(const enum way way, const int columns, const product *p, const int8_t *w, long column, long at,
                  long length, vn (*out)[BESIDE]) {
    const int8_t *x = p->codes + column * p->k + at;
    vd sum[STRIP][BESIDE];
    UNROLL for (int c = 0; c < columns; c++) {
        int32_t start = 0;
        for (long b = 0; START8 && b < length; b += BLOCK4) start += START8 * *sums_of(p, column + c, at + b);
        UNROLL for (int v = 0; v < BESIDE; v++) sum[c][v] = (vd){0} + start;
    }
    if (way == BYTEWISE)
        for (long j = 0; j < length; j += 4, w += 4 * TILE) {
            __builtin_prefetch(w + AHEAD, 0, 2);
            bytes_step(columns, w, x + j, p->k, sum);
        }
#ifdef WIDE
    if (way == WIDER)
        for (long j = 0; j < length; j += 4, w += 4 * TILE) {
            __builtin_prefetch(w + AHEAD, 0, 2);
            wide_step(columns, w, (const int16_t *)p->codes + column * p->k + at + j, p->k, sum);
        }
#endif
    UNROLL for (int c = 0; c < columns; c++)
        UNROLL for (int v = 0; v < BESIDE; v++) out[c][v] = __builtin_convertvector(sum[c][v], vn);
}
