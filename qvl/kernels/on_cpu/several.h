/* Products with several rows of x: W is read from memory once, and every number of it meets all of x at once.
 *
 * A tile is some rows of W times some rows of x over a part of k, so short that this part of x stays in the first-level
 * cache while all rows of a piece of W pass by. W is fetched a tile ahead: its stretches are too short for a processor's
 * own prefetcher. Where a part ends, the sums are kept lane by lane and go on with the next one: every number is summed
 * as the tiles of linear_floats.c sum it, to the last bit.
 */
#pragma once
#include "panels.h"

#if LANES == 16
#define MANY 33                                  /* rows of x from which panels are faster */
#define XSTRIP 8                                 /* rows of x in a tile */
#define PIECE_ROWS 96                            /* rows of W in a piece of work at most */
#define PART(m) (6144 / (m < XSTRIP ? m : XSTRIP)) /* numbers of k in a part: 24 KiB of x in a first-level cache */
#define FETCHED 2                                /* the cache that W is fetched into, as __builtin_prefetch counts */
#else
#define MANY (LANES == 8 ? 24 : 33)
#define XSTRIP 4
#define PIECE_ROWS 48
#define PART(m) (3072 / m)
#define FETCHED 3
#endif
#define WSTRIP 3 /* rows of W in a tile: their vectors, one of x and the sums are sixteen registers, or 28 of 32 */

/* As `fma_add`, in an order and in registers that the compiler keeps: it would rather load a number of x for every
 * product than hold it, and spill sums for what it moves forward. */
INLINE void product_into(vf *sum, vf a, vf b) {
#if LANES == 16 || (LANES == 8 && defined(__FMA__))
    __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
#else
    *sum = fma_add(*sum, a, b);
#endif
}

/* LANES numbers of `rows` rows of W, ldw bytes apart, times those of `columns` rows of x, ldx numbers apart. */
INLINE void several_half(const enum type type, const int half, const int rows, const int columns, const char *w, long ldw,
                         const float *x, long ldx, vf (*acc)[XSTRIP]) {
    vf wv[WSTRIP];
    UNROLL4 for (int r = 0; r < rows; r++) wv[r] = widened(type, half, w + r * ldw);
    _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) {
        vf xv = f32_low(x + c * ldx);
        UNROLL4 for (int r = 0; r < rows; r++) product_into(&acc[r][c], wv[r], xv);
    }
}

/* GROUP numbers. */
INLINE void several_step(const enum type type, const int rows, const int columns, const char *w, long ldw, const float *x,
                         long ldx, vf (*acc)[XSTRIP]) {
    several_half(type, 0, rows, columns, w, ldw, x, ldx, acc);
    several_half(type, 1, rows, columns, w, ldw, x + LANES, ldx, acc);
}

/* The same over `length` numbers, added to `kept` [rows][m]. As many rows of W are fetched from `next` meanwhile. */
INLINE void several_tile(const enum type type, const int rows, const int columns, const char *w, long ldw, const float *x,
                         long ldx, long length, vf *kept, long m, const char *next) {
    const long size = size_of(type);
    long i = 0;
    vf acc[WSTRIP][XSTRIP];
    UNROLL4 for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) acc[r][c] = kept[r * m + c];
    for (; i + GROUP <= length; i += GROUP) {
        if (next)
            UNROLL4 for (int r = 0; r < rows; r++)
                UNROLL4 for (int b = 0; b < GROUP * size; b += LINE)
                    __builtin_prefetch(next + r * ldw + i * size + b, 0, FETCHED);
        several_step(type, rows, columns, w + i * size, ldw, x + i, ldx, acc);
    }
    if (i < length) { /* x is zero-filled */
        char tail[WSTRIP][GROUP * 4] = {0};
        for (int r = 0; r < rows; r++) memcpy(tail[r], w + r * ldw + i * size, (length - i) * size);
        several_step(type, rows, columns, tail[0], sizeof tail[0], x + i, ldx, acc);
    }
    UNROLL4 for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) kept[r * m + c] = acc[r][c];
}

/* `rows` rows of W at w times `columns` rows of x from `column` on over numbers [at, at + length) of k. The first strip of
 * x fetches W for all; `ahead` is where it is read next. */
INLINE void several_strip(const enum type type, const int columns, const product *p, const char *w, long rows,
                          long column, long at, long length, vf *kept, const char *ahead) {
    const long ldw = p->k * size_of(type);
    const float *x = p->x + column * p->padded + at;
    long r = 0;
    for (kept += column; r + WSTRIP <= rows; r += WSTRIP) {
        const char *next = column ? 0 : r + 2 * WSTRIP <= rows ? w + (r + WSTRIP) * ldw : ahead;
        several_tile(type, WSTRIP, columns, w + r * ldw, ldw, x, p->padded, length, kept + r * p->m, p->m, next);
    }
    for (; r < rows; r++)
        several_tile(type, 1, columns, w + r * ldw, ldw, x, p->padded, length, kept + r * p->m, p->m, 0);
}

/* The kept sums of `rows` rows of W from `row` on become numbers of y, or are added to what it has. */
static void several_finish(const product *p, long row, long rows, long from, const vf *kept) {
    for (long c = 0; c < p->m; c++) {
        float *y = p->y + c * p->n + row;
        long r = 0;
        for (; r + LANES <= rows; r += LANES) {
            vf lanes[LANES], all = {0};
            UNROLL4 for (int i = 0; i < LANES; i++) lanes[i] = kept[(r + i) * p->m + c];
            transpose(lanes);
            _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) all += lanes[i];
            vf base = from ? f32_low(y + r) : p->bias ? f32_low(p->bias + row + r) : (vf){0};
            *(vf_u *)(y + r) = base + all;
        }
        for (; r < rows; r++) y[r] = (from ? y[r] : p->bias ? p->bias[row + r] : 0) + sum(kept[r * p->m + c]);
    }
}

INLINE void several_piece(const enum type type, const product *p, long piece) {
    const long size = size_of(type), row = piece * p->rows, rows = p->n - row < p->rows ? p->n - row : p->rows;
    const long part = (PART(p->m) + GROUP) / GROUP * GROUP, strips = (p->m + XSTRIP - 1) / XSTRIP;
    const char *w = (const char *)p->w + row * p->k * size, *end = w + rows * p->k * size;
    vf kept[PIECE_ROWS * MANY];
    for (long from = 0; from < p->k; from += p->chunk) {
        long stop = p->k - from < p->chunk ? p->k : from + p->chunk;
        memset(kept, 0, rows * p->m * sizeof(vf));
        for (long i = from; i < stop; i += part) {
            long length = stop - i < part ? stop - i : part;
            const char *at = w + i * size, *ahead = i + length < p->k ? at + length * size : end;
            for (long strip = 0, c = 0, wide; strip < strips; strip++, c += wide) {
                wide = (p->m - c + strips - strip - 1) / (strips - strip);
                switch (wide) { /* at least half of XSTRIP */
#if XSTRIP == 4
                case 2: several_strip(type, 2, p, at, rows, c, i, length, kept, ahead); break;
                case 3: several_strip(type, 3, p, at, rows, c, i, length, kept, ahead); break;
                case 4: several_strip(type, 4, p, at, rows, c, i, length, kept, ahead); break;
#else
                case 4: several_strip(type, 4, p, at, rows, c, i, length, kept, ahead); break;
                case 5: several_strip(type, 5, p, at, rows, c, i, length, kept, ahead); break;
                case 6: several_strip(type, 6, p, at, rows, c, i, length, kept, ahead); break;
                case 7: several_strip(type, 7, p, at, rows, c, i, length, kept, ahead); break;
                case 8: several_strip(type, 8, p, at, rows, c, i, length, kept, ahead); break;
#endif
                }
            }
        }
        several_finish(p, row, rows, from, kept);
    }
}
