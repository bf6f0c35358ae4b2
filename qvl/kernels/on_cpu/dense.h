/* A tile of queries past a panel of keys and values in bf16, with fp32 sums.
 *
 * A word holds two numbers of bf16, neighbours along what is summed. Scores and weighted values of TILE queries stand
 * in registers, VECTORS vectors of each; every query is summed in the same order, whatever stands beside it. Does not
 * know where queries, keys and values come from.
 */
#pragma once
#include "vectors.h"
#include <math.h>

#define TILE 6    /* queries whose sums stand in registers: with VECTORS vectors each, 24 of 32 */
#define VECTORS 4
#define SIDE 64   /* tokens of keys, or numbers of values at most, that lie side by side: VECTORS vectors */
#define PANEL 128 /* tokens between two looks at the largest score */
#define ROWS 48   /* queries of a piece of work: what they need of a panel comes out of the nearest cache */
#define MAX_DIM 256
#define UNROLL _Pragma("GCC unroll 8")
#ifdef __AVX512F__
#define KEEP(v) __asm__("" : "+v"(v)) /* in a register: the compiler would read it again for each product */
#else
#define KEEP(v) ((void)0)
#endif

INLINE vf greater(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float largest(vf v) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

/* 2^x for x of at most 0, to 3 units in a million: it becomes a number of 8 bits. 0 for -infinity; NaN stays NaN. */
INLINE vf power_of_two(vf x) {
#ifdef __AVX512DQ__
    vf f = (vf)_mm512_reduce_ps((__m512)x, 9); /* x minus the whole number below it, which scalef takes itself */
    vf p = fma_add((vf){0} + 0.0522424704f, (vf){0} + 0.0134266867f, f);
    p = fma_add((vf){0} + 0.241280207f, p, f);
    p = fma_add((vf){0} + 0.693044845f, p, f);
    p = fma_add((vf){0} + 1.0f, p, f);
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return exponential(x * 0.69314718f);
#endif
}

/* What a piece of work, up to ROWS queries of a head, keeps. */
typedef struct {
    uint32_t queries[ROWS / TILE][MAX_DIM / 2][TILE], weights[ROWS][PANEL / 2];
    float scores[ROWS][PANEL], sums[ROWS][MAX_DIM], top[ROWS], factor[ROWS];
    vf total[ROWS];
} __attribute__((aligned(64))) work_of_piece;

/* Scores of a tile of queries with SIDE tokens. */
INLINE void score_side(const uint32_t *q, const uint32_t *keys, long pairs, float *scores) {
    for (long t = 0; t < SIDE; t += VECTORS * LANES) {
        vf acc[TILE][VECTORS] = {0};
        for (long d = 0; d < pairs; d++) {
            vi key[VECTORS];
            UNROLL for (int i = 0; i < VECTORS; i++) {
                key[i] = *(const vi_u *)(keys + d * SIDE + t + i * LANES);
                KEEP(key[i]);
            }
            UNROLL for (int r = 0; r < TILE; r++) {
                vi own = q[d * TILE + r] - (vi){0};
                UNROLL for (int i = 0; i < VECTORS; i++) acc[r][i] = pair_add(acc[r][i], (vf)own, (vf)key[i]);
            }
        }
        UNROLL for (int r = 0; r < TILE; r++)
            UNROLL for (int i = 0; i < VECTORS; i++) *(vf_u *)(scores + r * PANEL + t + i * LANES) = acc[r][i];
    }
}

/* Scores of the tokens that a query sees, the first `seen` of `width`, become weights; what it has summed so far is to
 * be multiplied by a factor. The first token of all is seen by every query. */
INLINE void weigh_row(work_of_piece *w, long row, long seen, long width) {
    float *scores = w->scores[row];
    vf most = (vf){0} - INFINITY;
    for (long t = seen; t < width; t++) scores[t] = -INFINITY;
    for (long t = 0; t < width; t += LANES) most = greater(f32_low(scores + t), most);
    float here = largest(most), top = here > w->top[row] ? here : w->top[row];
    vf factor = power_of_two((vf){0} + (w->top[row] - top)), total = w->total[row] * factor;
    for (long t = 0; t < width; t += LANES) {
        vf weight = power_of_two(f32_low(scores + t) - top);
        total += weight;
        *(vh_u *)((uint16_t *)w->weights[row] + t) = bf16_of(weight);
    }
    w->factor[row] = factor[0], w->top[row] = top, w->total[row] = total;
}

/* A tile's sums, `vectors` of each, times their factors, plus weights times values `side` words apart. */
INLINE void add_values(const int vectors, work_of_piece *w, long row, const uint32_t *values, long side, long pairs,
                       long from) {
    vf acc[TILE][VECTORS];
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int i = 0; i < vectors; i++)
            acc[r][i] = f32_low(w->sums[row + r] + from + i * LANES) * w->factor[row + r];
    for (long t = 0; t < pairs; t++) {
        vi value[VECTORS];
        UNROLL for (int i = 0; i < vectors; i++) value[i] = *(const vi_u *)(values + t * side + i * LANES);
        UNROLL for (int r = 0; r < TILE; r++) {
            vi own = w->weights[row + r][t] - (vi){0};
            UNROLL for (int i = 0; i < vectors; i++) acc[r][i] = pair_add(acc[r][i], (vf)own, (vf)value[i]);
        }
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int i = 0; i < vectors; i++) *(vf_u *)(w->sums[row + r] + from + i * LANES) = acc[r][i];
}

/* A tile's sums past a panel of values, of which it sees 2 * pairs tokens. */
static void add_panel(work_of_piece *w, long row, const uint32_t *values, long side, long pairs, long from) {
    for (long i = 0; i < side; i += VECTORS * LANES) switch ((side - i) / LANES) {
        case 1: add_values(1, w, row, values + i, side, pairs, from + i); break;
        case 2: add_values(2, w, row, values + i, side, pairs, from + i); break;
        case 3: add_values(3, w, row, values + i, side, pairs, from + i); break;
        default: add_values(VECTORS, w, row, values + i, side, pairs, from + i);
        }
}
