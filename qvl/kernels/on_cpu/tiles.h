/* Tiles of W, rows side by side, and what is summed for them.
 *
 * W lies in tiles of TILE rows: four bytes of every row, then the next four. So a vector holds rows side by side, each of
 * its sums belongs to one row, and nothing is added across a vector. x comes four codes at a time, the same for all rows.
 */
#pragma once
#include "codes.h"

#define SQUARE 16                   /* rows of x that stand side by side, and of W in a register of AMX */
#define BESIDE (4 * TILE / BYTES)   /* vectors beside each other for the rows of a tile */
#define STRIP (BYTES == 64 ? 8 : 4) /* rows of x that a tile meets at a time */
#define PAIR (BYTES == 64 ? 2 : 1)  /* tiles that so many rows meet at once: 16 sums, for products that take five cycles */
#define SUMS (STRIP * PAIR)
/* Bytes of W that are fetched before they are needed. Several rows of x read a tile at a time, which is one stream
 * where a single row has two, and the last of them leave the memory idle: they reach into the next tile. */
#define AHEAD(columns) ((columns) > 1 ? 2048 : 1024)

/* Whether so many rows of x, in one strip, stand side by side (see amx.h); then no step of a loop computes where they are. */
#define BESIDE_X(columns) (BYTES == 64 && (columns) == STRIP)

typedef float vn __attribute__((vector_size(BYTES))); /* a number for each of some rows */
typedef float vn_u __attribute__((vector_size(BYTES), aligned(4)));

INLINE vb four(const void *x) {
    int32_t same;
    memcpy(&same, x, 4);
    return (vb)((vd){0} + same);
}

/* sum + dots * scale, rounded once where the processor can. */
INLINE vn weighed_add(vn sum, vn dots, vn scale) {
#if defined(__FMA__) && BYTES == 32
    return (vn)_mm256_fmadd_ps((__m256)dots, (__m256)scale, (__m256)sum);
#elif defined(__AVX512F__) && BYTES == 64
    return (vn)_mm512_fmadd_ps((__m512)dots, (__m512)scale, (__m512)sum);
#else
    return sum + dots * scale;
#endif
}

/* A row of a tile, or what there is of it: a whole one without a call. */
INLINE void copy_row(float *to, const float *from, long rows) {
    if (rows == TILE)
        memcpy(to, from, TILE * sizeof(float));
    else
        memcpy(to, from, rows * sizeof(float));
}

/* What tile t has summed for `columns` rows of x when it has got to number `from` of k, out of y and back into it. With
 * all of k it becomes the result. */
INLINE void take_sums(const int columns, const product *p, long column, long t, long from, float (*sums)[TILE]) {
    long rows = p->n - t * TILE < TILE ? p->n - t * TILE : TILE;
    for (int c = 0; c < columns; c++) {
        memset(sums[c], 0, sizeof sums[c]);
        if (from) copy_row(sums[c], p->y + (column + c) * p->n + t * TILE, rows);
    }
}

INLINE void keep_sums(const int columns, const product *p, long column, long t, long stop, float (*sums)[TILE]) {
    long first = t * TILE, rows = p->n - first < TILE ? p->n - first : TILE;
    for (int c = 0; c < columns; c++) {
        if (stop == p->k && p->row_scales)
            for (int r = 0; r < TILE; r++) sums[c][r] *= p->row_scales[first + r];
        if (stop == p->k && p->bias)
            for (int r = 0; r < rows; r++) sums[c][r] += p->bias[first + r];
        copy_row(p->y + (column + c) * p->n + first, sums[c], rows);
    }
}
