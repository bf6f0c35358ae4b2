/* Products with W of 8 bits, over one span of x.
 *
 * A processor with AVX2 alone has no product of bytes that sums into 32 bits: with their sign they cost it three places
 * that multiply for 32 products. Codes of 16 bits need two, and as many that add; they were slower all the same.
 */
#pragma once
#include "tiles.h"

/* Four numbers of a tile times `columns` rows of x, k apart. */
INLINE void bytes_step(const int columns, const int8_t *w, const int8_t *x, long k, vd (*sum)[BESIDE]) {
    vb wv[BESIDE];
    vu u[BESIDE];
    UNROLL for (int v = 0; v < BESIDE; v++) wv[v] = LOAD(w + v * BYTES), u[v] = unsigned8(wv[v]);
    UNROLL for (int c = 0; c < columns; c++) {
        vb same = four(x + c * k);
        UNROLL for (int v = 0; v < BESIDE; v++) sum[c][v] = dot8(sum[c][v], wv[v], u[v], same);
    }
}

/* Numbers [at, at + length) of k of some tiles, `apart` from each other, times `columns` rows of x: to `out`, one tile
 * after the other, still to be scaled. */
INLINE void span8(const int tiles, const int columns, const product *p, const int8_t *w, long apart, long column, long at,
                  long length, vn (*out)[BESIDE]) {
    vd sum[SUMS][BESIDE];
    UNROLL for (int i = 0; i < tiles * columns; i++) {
        int32_t start = 0;
        for (long b = 0; START8 && b < length; b += BLOCK4) start += START8 * *sums_of(p, column + i % columns, at + b);
        UNROLL for (int v = 0; v < BESIDE; v++) sum[i][v] = (vd){0} + start;
    }
    for (long j = 0; j < length; j += 4, w += 4 * TILE)
        UNROLL for (int t = 0; t < tiles; t++) {
            const int8_t *own = w + t * apart * p->k * TILE;
            __builtin_prefetch(own + AHEAD(columns), 0, 2);
            bytes_step(columns, own, p->codes + column * p->k + at + j, p->k, sum + t * columns);
        }
    UNROLL for (int i = 0; i < tiles * columns; i++)
        UNROLL for (int v = 0; v < BESIDE; v++) out[i][v] = __builtin_convertvector(sum[i][v], vn);
}
