/* Attention of one query token over a paged cache: the queries that share a KV head against part of its context.
 *
 * A run of keys or values is widened to fp32 once for all of these queries. What is summed then lies in a tile of
 * registers: TOKENS tokens times some queries of scores, VECTORS vectors times some queries of weighted values. Every
 * query is summed in the same order, whatever other sequences a step has. Does not know threads.
 */
#pragma once
#include "vectors.h"
#include <math.h>
#if LANES >= 8
#include <immintrin.h>
#endif

#define RUN 16     /* tokens whose keys or values are widened at once */
#define SPLIT 256  /* tokens of context that are attended to at a time */
#define QUERIES 3  /* 3 x 4 sums, with what they need, fill sixteen registers */
#define TOKENS 4
#define VECTORS 4
#define MAX_DIM 512

/* A cache, and where token t of a sequence lies in it. */
typedef struct {
    const void *keys, *values;
    const int32_t *blocks;
    long block_size, kv_heads, dim;
    int type; /* bf16 (0), fp16 (1) or fp32 (2) */
} pages;

INLINE void widen(const void *from, long place, float *to, long n, int type) { /* n is a multiple of LANES */
    for (long i = 0; i < n; i += LANES)
        *(vf_u *)(to + i) = type == 2   ? f32_low((const float *)from + place + i)
                            : type == 0 ? bf16_plain((const uint16_t *)from + place + i)
                                        : f16_low((const uint16_t *)from + place + i);
}

/* Keys or values of tokens [first, first + count), with zeros up to RUN. */
static void widen_run(const pages *p, const void *from, long head, long first, long count, float *to) {
    long size = p->block_size, block = first / size, offset = first % size;
    for (long t = 0; t < count; t++, offset++) {
        if (offset == size) block++, offset = 0;
        widen(from, ((p->blocks[block] * size + offset) * p->kv_heads + head) * p->dim, to + t * p->dim, p->dim, p->type);
    }
    memset(to + count * p->dim, 0, (RUN - count) * p->dim * sizeof(float));
}

/* The sums of four vectors. */
INLINE void sum_four(const vf *v, float *to) {
#if LANES >= 8
    __m256 half[4];
    for (int i = 0; i < 4; i++) {
#if LANES == 16
        __m256d high = _mm512_extractf64x4_pd((__m512d)v[i], 1);
        half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), (__m256)high);
#else
        half[i] = (__m256)v[i];
#endif
    }
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
    for (int i = 0; i < 4; i++) to[i] = sum(v[i]);
#endif
}

/* Products of `queries` queries with a run of keys, to rows of scores. */
INLINE void score_run(const int queries, const float *q, const float *keys, long dim, float *scores) {
    for (long t = 0; t < RUN; t += TOKENS) {
        vf dots[QUERIES][TOKENS] = {0};
        for (long d = 0; d < dim; d += LANES) {
            vf key[TOKENS];
            _Pragma("GCC unroll 4") for (int i = 0; i < TOKENS; i++) key[i] = f32_low(keys + (t + i) * dim + d);
            _Pragma("GCC unroll 4") for (int g = 0; g < queries; g++) {
                vf own = f32_low(q + g * dim + d);
                _Pragma("GCC unroll 4") for (int i = 0; i < TOKENS; i++) dots[g][i] = fma_add(dots[g][i], own, key[i]);
            }
        }
        _Pragma("GCC unroll 4") for (int g = 0; g < queries; g++) sum_four(dots[g], scores + g * (SPLIT + RUN) + t);
    }
}

/* `queries` rows of weights times a run of values, `vectors` of them from their first number on, added to out. */
INLINE void weigh_run(const int queries, const int vectors, const float *weights, const float *values, long count,
                      long dim, float *out) {
    vf acc[QUERIES][VECTORS];
    _Pragma("GCC unroll 4") for (int g = 0; g < queries; g++)
        _Pragma("GCC unroll 4") for (int i = 0; i < vectors; i++) acc[g][i] = f32_low(out + g * dim + i * LANES);
    for (long t = 0; t < count; t++) {
        vf value[VECTORS];
        _Pragma("GCC unroll 4") for (int i = 0; i < vectors; i++) value[i] = f32_low(values + t * dim + i * LANES);
        _Pragma("GCC unroll 4") for (int g = 0; g < queries; g++) {
            vf weight = weights[g * (SPLIT + RUN) + t] - (vf){0};
            _Pragma("GCC unroll 4") for (int i = 0; i < vectors; i++) acc[g][i] = fma_add(acc[g][i], weight, value[i]);
        }
    }
    _Pragma("GCC unroll 4") for (int g = 0; g < queries; g++)
        _Pragma("GCC unroll 4") for (int i = 0; i < vectors; i++) *(vf_u *)(out + g * dim + i * LANES) = acc[g][i];
}

INLINE void weigh_rows(const int queries, const float *weights, const float *values, long count, long dim, float *out) {
    long d = 0;
    for (; d + VECTORS * LANES <= dim; d += VECTORS * LANES)
        weigh_run(queries, VECTORS, weights, values + d, count, dim, out + d);
    for (; d < dim; d += LANES) weigh_run(queries, 1, weights, values + d, count, dim, out + d);
}

/* Scores to weights, e to the power of what they lack of the largest, which is returned; their sum. */
static float become_weights(float *scores, long length, float scale, float *total) {
    vf most = (vf){0} - INFINITY, all = {0};
    float top = -INFINITY;
    for (long t = length; t % LANES; t++) scores[t] = -INFINITY;
    for (long t = 0; t < length; t += LANES) {
        vf own = f32_low(scores + t) * scale;
        *(vf_u *)(scores + t) = own;
        most = choose((own > most) | (own != own), own, most);
    }
    for (int i = 0; i < LANES; i++) top = most[i] > top || most[i] != most[i] ? most[i] : top;
    for (long t = 0; t < length; t += LANES) {
        vf weights = exponential(f32_low(scores + t) - top);
        *(vf_u *)(scores + t) = weights;
        all += weights;
    }
    *total = sum(all);
    return top;
}

#define EACH_QUERIES(group, call)                                                                                      \
    for (long g = 0; g < group; g += QUERIES) switch (group - g) {                                                     \
        case 1: call(1); break;                                                                                        \
        case 2: call(2); break;                                                                                        \
        default: call(QUERIES);                                                                                        \
        }

/* Queries q [group, dim] of one KV head against tokens [first, stop): weighted values [group, dim], then per query the
 * largest score and the sum of weights. */
static void attend(const pages *p, long head, const float *q, long group, long first, long stop, float scale,
                   float *out, float *top, float *total) {
    float run[RUN * MAX_DIM] __attribute__((aligned(64))), scores[group][SPLIT + RUN];
    long dim = p->dim, length = stop - first;
    for (long t = 0; t < length; t += RUN) {
        widen_run(p, p->keys, head, first + t, length - t < RUN ? length - t : RUN, run);
#define SCORE(n) score_run(n, q + g * dim, run, dim, scores[g] + t)
        EACH_QUERIES(group, SCORE)
    }
    for (long g = 0; g < group; g++) top[g] = become_weights(scores[g], length, scale, total + g);
    memset(out, 0, group * dim * sizeof(float));
    for (long t = 0; t < length; t += RUN) {
        long count = length - t < RUN ? length - t : RUN;
        widen_run(p, p->values, head, first + t, count, run);
#define WEIGH(n) weigh_rows(n, scores[g] + t, run, count, dim, out + g * dim)
        EACH_QUERIES(group, WEIGH)
    }
}
