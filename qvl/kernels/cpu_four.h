/* Products with W of 4 bits.
 *
 * W lies in tiles of TILE4 rows: four numbers of every row, then the next four. So a vector holds rows side by side,
 * each of its sums belongs to one row, and nothing is added across a vector. x comes four numbers at a time, the same for
 * all rows. A block is BLOCK4 numbers of k in STEPS4 steps: byte i of a row in step s holds number 4 s + i below and
 * 64 + 4 s + i above, both plus 8.
 */
#pragma once
#include "cpu_codes.h"

#define STEPS4 (BLOCK4 / 8)
#define BESIDE (4 * TILE4 / BYTES) /* vectors beside each other for the rows of a tile */
#define COLUMNS4 4
#define START4 (-8) /* what a code of 0 stands for */

typedef float vn __attribute__((vector_size(BYTES))); /* a number for each of some rows */
typedef float vn_u __attribute__((vector_size(BYTES), aligned(4)));

INLINE vb four(const int8_t *x) {
    int32_t same;
    memcpy(&same, x, 4);
    return (vb)((vd){0} + same);
}

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

/* Some steps of a block of W times `columns` rows of x, k apart. Sixteen products of at most 15 * 127 fit into 16 bits,
 * which is four steps. */
#define TOGETHER 4
INLINE void steps4(const int columns, const int8_t *w, const int8_t *x, long k, vd (*sum)[BESIDE]) {
#if defined(WIDE)
    vw pairs[COLUMNS4][BESIDE] = {0};
#endif
    UNROLL for (int s = 0; s < TOGETHER; s++, w += 4 * TILE4, x += 4) {
        vu low[BESIDE], high[BESIDE];
        UNROLL for (int v = 0; v < BESIDE; v++) {
            vu both = (vu)LOAD(w + v * BYTES);
            low[v] = both & 15;
            high[v] = (vu)((vh)both >> 4) & 15;
        }
        UNROLL for (int c = 0; c < columns; c++) {
            vb first = four(x + c * k), second = four(x + c * k + BLOCK4 / 2);
            UNROLL for (int v = 0; v < BESIDE; v++) {
#if defined(WIDE)
                pairs[c][v] += (vw)_mm256_maddubs_epi16((__m256i)low[v], (__m256i)first);
                pairs[c][v] += (vw)_mm256_maddubs_epi16((__m256i)high[v], (__m256i)second);
                __asm__ volatile("" : "+x"(pairs[c][v])); /* or the compiler puts all products aside and adds them later */
#else
                sum[c][v] = dot_us(dot_us(sum[c][v], low[v], first), high[v], second);
#endif
            }
        }
    }
#if defined(WIDE)
    UNROLL for (int c = 0; c < columns; c++)
        UNROLL for (int v = 0; v < BESIDE; v++)
            sum[c][v] += (vd)_mm256_madd_epi16((__m256i)pairs[c][v], _mm256_set1_epi16(1));
#endif
}

/* Tile t times `columns` rows of x over [from, stop) of k. */
INLINE void tile4(const int columns, const product *p, long column, long t, long from, long stop) {
    const int8_t *w = p->w + (t * p->k + from) * TILE4 / 2;
    const uint16_t *steps = p->steps + (t * p->k + from) / BLOCK4 * TILE4;
    long rows = p->n - t * TILE4 < TILE4 ? p->n - t * TILE4 : TILE4;
    float y[COLUMNS4][TILE4] = {0};
    for (int c = 0; from && c < columns; c++)
        memcpy(y[c], p->y + (column + c) * p->n + t * TILE4, rows * sizeof(float));
    for (long span = from; span < stop; span += SPAN) {
        long end = stop - span < SPAN ? stop : span + SPAN;
        vn some[COLUMNS4][BESIDE] = {0};
        for (long at = span; at < end; at += BLOCK4, steps += TILE4) {
            const int8_t *x = p->codes + column * p->k + at;
            vd sum[COLUMNS4][BESIDE];
            UNROLL for (int c = 0; c < columns; c++)
                UNROLL for (int v = 0; v < BESIDE; v++) sum[c][v] = (vd){0} + START4 * *sums_of(p, column + c, at);
            for (int s = 0; s < STEPS4; s += TOGETHER, w += TOGETHER * 4 * TILE4) {
                UNROLL for (int f = 0; f < TOGETHER; f++) __builtin_prefetch(w + AHEAD + f * 64, 0, 2);
                steps4(columns, w, x + 4 * s, p->k, sum);
            }
            UNROLL for (int v = 0; v < BESIDE; v++) {
                vn step = numbers_of(steps + v * (BYTES / 4));
                UNROLL for (int c = 0; c < columns; c++)
                    some[c][v] = weighed_add(some[c][v], __builtin_convertvector(sum[c][v], vn), step);
            }
        }
        UNROLL for (int c = 0; c < columns; c++)
            UNROLL for (int v = 0; v < BESIDE; v++) {
                vn_u *to = (vn_u *)(y[c] + v * (BYTES / 4));
                *to = weighed_add(*to, some[c][v], *scales_of(p, column + c, span / SPAN) - (vn){0});
            }
    }
    for (int c = 0; c < columns; c++)
        for (long r = 0, row = t * TILE4; r < rows; r++, row++)
            p->y[(column + c) * p->n + row] = stop == p->k && p->bias ? y[c][r] + p->bias[row] : y[c][r];
}

/* Tiles [first, last) times all of x. */
static void tiles4(const product *p, long first, long last) {
    long chunk = p->m == 1 ? p->k : K_CHUNK;
    for (long from = 0; from < p->k; from += chunk) {
        long stop = p->k - from < chunk ? p->k : from + chunk;
        for (long t = first; t < last; t++)
            for (long c = 0; c < p->m; c += COLUMNS4) switch (p->m - c) {
                case 1: tile4(1, p, c, t, from, stop); break;
                case 2: tile4(2, p, c, t, from, stop); break;
                case 3: tile4(3, p, c, t, from, stop); break;
                default: tile4(4, p, c, t, from, stop);
                }
    }
}
