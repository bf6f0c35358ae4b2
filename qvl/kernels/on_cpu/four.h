/* Products with W of 4 bits, over one span of x.
 *
 * A block is BLOCK4 numbers of k in STEPS4 steps of four bytes: byte i of a row in step s holds number 4 s + i below and
 * 64 + 4 s + i above, both plus 8.
 */
#pragma once
#include "tiles.h"

#define STEPS4 (BLOCK4 / 8)
#define START4 (-8) /* what a code of 0 stands for */

INLINE vn numbers_of(const uint16_t *halves) {
#if defined(__F16C__) && BYTES == 32
    return (vn)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
#elif defined(__AVX512F__) && BYTES == 64
    return (vn)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
#else
    vn out;
    for (int i = 0; i < BYTES / 4; i++) {
        _Float16 h;
        memcpy(&h, halves + i, 2);
        out[i] = (float)h;
    }
    return out;
#endif
}

/* Some steps of a block of W of some tiles, `apart` bytes from each other, times `columns` rows of x, k apart. Sixteen
 * products of at most 15 * 127 fit into 16 bits, which is four steps. */
#define TOGETHER 4
INLINE void steps4(const int tiles, const int columns, const int8_t *w, long apart, const int8_t *x, long k,
                   vd (*sum)[BESIDE]) {
    const long above = BESIDE_X(columns) ? SQUARE * BLOCK8 : BLOCK8; /* from the numbers of low halves to those of high ones */
#if defined(WIDE)
    vw pairs[SUMS][BESIDE] = {0};
#endif
    UNROLL for (int s = 0; s < TOGETHER; s++, w += 4 * TILE, x += 4) {
        vu codes[2][2][BESIDE]; /* the low halves of bytes, and the high ones; of every tile */
        UNROLL for (int t = 0; t < tiles; t++)
            UNROLL for (int v = 0; v < BESIDE; v++) {
                vu both = (vu)LOAD(w + t * apart + v * BYTES);
                codes[0][t][v] = both & 15;
                codes[1][t][v] = (vu)((vh)both >> 4) & 15;
#if defined(WIDE)
                if (columns > 1) __asm__ volatile("" : "+x"(codes[0][t][v]), "+x"(codes[1][t][v])); /* or they are opened again */
#endif
            }
        UNROLL for (int h = 0; h < 2; h++)
            UNROLL for (int c = 0; c < columns; c++) {
                vb same = four(x + c * k + h * above);
                UNROLL for (int t = 0; t < tiles; t++)
                    UNROLL for (int v = 0; v < BESIDE; v++) {
                        const int i = t * columns + c;
#if defined(WIDE)
                        pairs[i][v] += (vw)_mm256_maddubs_epi16((__m256i)codes[h][t][v], (__m256i)same);
                        __asm__ volatile("" : "+x"(pairs[i][v])); /* or it puts all products aside and adds them later */
#else
                        sum[i][v] = dot_us(sum[i][v], codes[h][t][v], same);
#endif
                    }
            }
    }
#if defined(WIDE)
    UNROLL for (int i = 0; i < tiles * columns; i++)
        UNROLL for (int v = 0; v < BESIDE; v++)
            sum[i][v] += (vd)_mm256_madd_epi16((__m256i)pairs[i][v], _mm256_set1_epi16(1));
#endif
}

/* Numbers [at, at + length) of k of some tiles, `apart` from each other, times `columns` rows of x: to `out`, one tile
 * after the other, still to be scaled as x is. */
INLINE void span4(const int tiles, const int columns, const product *p, const int8_t *w, const uint16_t *steps, long apart,
                  long column, long at, long length, vn (*out)[BESIDE]) {
    const long far = apart * p->k * TILE / 2; /* bytes */
    UNROLL for (int i = 0; i < tiles * columns; i++)
        UNROLL for (int v = 0; v < BESIDE; v++) out[i][v] = (vn){0};
    for (long b = at; b < at + length; b += BLOCK4, steps += TILE) {
        const int8_t *x = p->codes + (BESIDE_X(columns) ? b * SQUARE : column * p->k + b);
        vd sum[SUMS][BESIDE];
        UNROLL for (int i = 0; i < tiles * columns; i++)
            UNROLL for (int v = 0; v < BESIDE; v++) sum[i][v] = (vd){0} + START4 * *sums_of(p, column + i % columns, b);
        for (int s = 0; s < STEPS4; s += TOGETHER, w += TOGETHER * 4 * TILE) {
            UNROLL for (int t = 0; t < tiles; t++)
                UNROLL for (int f = 0; f < TOGETHER; f++) __builtin_prefetch(w + t * far + AHEAD(columns) + f * 64, 0, 2);
            steps4(tiles, columns, w, far, x + 4 * s, BESIDE_X(columns) ? BLOCK8 : p->k, sum);
        }
        UNROLL for (int i = 0; i < tiles * columns; i++)
            UNROLL for (int v = 0; v < BESIDE; v++) {
                vn step = numbers_of(steps + i / columns * apart * p->k / BLOCK4 * TILE + v * (BYTES / 4));
                out[i][v] = weighed_add(out[i][v], __builtin_convertvector(sum[i][v], vn), step);
            }
    }
}
