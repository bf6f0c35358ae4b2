/* Some tiles of W times all of x.
 *
 * One strip of x passes by all of a tile at once, and W is read in long stretches. More strips pass by a span of two tiles
 * while that is in a cache, and a group of them meets the next tiles first. Does not know threads.
 */
#pragma once
#include "pairs.h"
#if defined(AMX)
#include "pairs_amx.h"
#else
#include "pairs_vectors.h"
#endif

/* Sums of tile t and `rows` rows from `row` on, complete, into y. */
INLINE void finish(const product *p, long t, long row, long rows, const vt *sums) {
    const long wide = p->n - t * TILE < TILE ? p->n - t * TILE : TILE;
    float *y = p->y + row * p->n + t * TILE;
    vt bias = {0};
    if (p->bias) memcpy(&bias, p->bias + t * TILE, wide * sizeof(float));
    for (long r = 0; r < rows; r++, y += p->n) {
        const vt own = sums[r] + bias;
        if (wide == TILE)
            *(vt_u *)y = own;
        else
            memcpy(y, &own, wide * sizeof(float));
    }
}

/* Where the sums of tiles t and t + 1 will be written. */
INLINE void fetch_rows(const product *p, long t, long row, long rows) {
    const float *y = p->y + row * p->n + t * TILE;
    for (long r = 0; r < rows; r++, y += p->n) __builtin_prefetch(y, 1, 2), __builtin_prefetch(y + TILE, 1, 2);
}

/* Tiles [first, last) times all of x, one strip. Two that lie far apart are read at a time, in long stretches; of a last
 * one that is alone both halves of the work are the same. */
static void few_tiles(const product *p, long first, long last) {
    const long apart = (last - first) / 2, far = p->pairs * TILE;
    for (long t = first; t < last; t += t + 1 == first + apart ? apart + 1 : 1) {
        const long other = t < first + apart ? apart : 0;
        const uint32_t *w = p->w + t * far;
        const fetched f = {{w + AHEAD, w + other * far + AHEAD}, {TILE, TILE}, 0};
        strip_sums sums;
        meet(p->m, p->x, w, other * far, p->pairs, &f, 0, sums);
        finish(p, t, 0, p->m, sums[0]);
        if (other) finish(p, t + other, 0, p->m, sums[1]);
    }
}

/* Pairs [at, at + length) of strips [top, end) of x and of tiles [first, stop) of W. */
typedef struct {
    const product *p;
    long at, length, top, end, first, stop;
    strip_sums sums[GROUP_TILES / 2][GROUP_STRIPS];
} group;

/* Where the pairs of a strip begin. */
INLINE const uint32_t *strip_at(const group *g, long strip) {
    const long m = g->p->m, first = first_of(m, strip);
    return g->p->x + first * g->p->pairs + g->at * (first_of(m, strip + 1) - first);
}

/* One span of tiles t and, if there is one, t + 1 with all strips of the group. The first strips fetch the two tiles from
 * `next` on, which are met next. */
static void span_strips(group *g, long t, const uint32_t *next) {
    const product *p = g->p;
    const long far = p->pairs * TILE, other = t + 1 < g->stop, last = g->at + g->length == p->pairs;
    const uint32_t *w = p->w + (t * p->pairs + g->at) * TILE;
    for (long s = g->top; s < g->end; s++) {
        const long row = first_of(p->m, s), rows = first_of(p->m, s + 1) - row, nth = s - g->top;
        const uint32_t *x = strip_at(g, s), *then = strip_at(g, s + 1 < g->end ? s + 1 : g->top);
        const fetched f = {{next, next + far}, {nth == 0 ? TILE : 0, nth == 1 ? TILE : 0}, then - x};
        vt (*sums)[STRIP] = g->sums[(t - g->first) / 2][nth];
        if (last) fetch_rows(p, t, row, rows);
        meet(rows, x, w, other * far, g->length, &f, g->at > 0, sums);
        if (last) finish(p, t, row, rows, sums[0]);
        if (last && other) finish(p, t + 1, row, rows, sums[1]);
    }
}

/* One span of the group: tiles in pairs, behind the last of them those of the next span. */
static void span_tiles(group *g) {
    for (long t = g->first; t < g->stop; t += 2) {
        const long then = t + 2 < g->stop ? t + 2 : g->first, at = t + 2 < g->stop ? g->at : g->at + g->length;
        span_strips(g, t, g->p->w + (then * g->p->pairs + at) * TILE);
    }
}

/* Tiles [first, last) times all of x, in more than one strip. */
static void many_tiles(const product *p, long first, long last) {
    const long strips = strips_of(p->m), groups = (strips + GROUP_STRIPS - 1) / GROUP_STRIPS;
    group g;
    g.p = p;
    for (long i = 0; i < groups; i++)
        for (g.first = first; g.first < last; g.first = g.stop) {
            g.top = i * strips / groups, g.end = (i + 1) * strips / groups;
            g.stop = last - g.first < GROUP_TILES ? last : g.first + GROUP_TILES;
            for (g.at = 0; g.at < p->pairs; g.at += g.length) {
                g.length = p->pairs - g.at < SPAN ? p->pairs - g.at : SPAN;
                span_tiles(&g);
            }
        }
}
