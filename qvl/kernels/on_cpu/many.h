/* Products with many rows of x by vectors of 64 bytes.
 *
 * Two tiles of W over one span of k, made ready in a first-level cache, meet eight rows of x at a time: a step is sixteen
 * products, eight broadcasts and two loads. A block of rows of x and its sums lie in a second-level cache while all tiles
 * of a group pass. What is summed in whole numbers, and what in fp32 above that, is as eight.h and four.h have it: few and
 * many rows give the same answers to the last bit. Does not know threads.
 */
#pragma once
#include "eight.h"

#if BYTES == 64
#define GROUP_TILES 16 /* of W, whose sums are held at a time */
#define GROUP_ROWS 256 /* of x, likewise */

typedef float strip_sums[2][STRIP][TILE]; /* of two tiles and a strip of rows */

/* Numbers [at, at + length) of k, one span, of rows [top, top + rows) of x and of tiles [first, first + tiles). `w`: two
 * tiles, ready. `start`: what whole numbers begin with for each row, per block with a step of W; `scale`: of rows. */
typedef struct {
    const product *p;
    long at, length, top, rows, first, tiles;
    int8_t w[2][SPAN * TILE] __attribute__((aligned(64)));
    strip_sums sums[GROUP_TILES / 2][GROUP_ROWS / STRIP] __attribute__((aligned(64)));
    int32_t start[PER_SPAN][GROUP_ROWS];
    float scale[GROUP_ROWS];
} group;

/* What is fetched while a strip is computed: with every step a line at `next`, from where it goes on by `on` bytes; the
 * strip of x that lies `strip` bytes behind this one; and what will be written, two lines per row, `apart` numbers from
 * each other. */
typedef struct {
    const int8_t *next;
    long on, strip;
    const float *out;
    long apart;
} fetched;

/* What begins at `w` of a tile, as many numbers as the span has, as bytes without a sign. */
INLINE void make_ready(const int bits, const int8_t *w, long length, int8_t *to) {
    if (bits == 8)
        for (long i = 0; i < length * TILE; i += BYTES) *(vb *)(to + i) = ready8(LOAD(w + i));
    else
        for (long b = 0; b < length; b += BLOCK4, w += BLOCK4 / 2 * TILE, to += BLOCK4 * TILE)
            for (long i = 0; i < BLOCK4 / 2 * TILE; i += BYTES) {
                const vu both = (vu)LOAD(w + i);
                *(vb *)(to + i) = (vb)(both & 15);
                *(vb *)(to + BLOCK4 / 2 * TILE + i) = (vb)((vu)((vh)both >> 4) & 15);
            }
}

/* Numbers [from, stop) of the span times `rows` rows, which begin at x: whole numbers on top of `start`. */
INLINE void whole_strip(const int tiles, const int rows, const group *g, const int8_t *x, const int32_t *start,
                        long from, long stop, const fetched *f, vd (*sum)[STRIP]) {
    const int8_t *w = g->w[0] + from * TILE, *next = f->next + from / 4 * f->on;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int t = 0; t < tiles; t++) sum[t][r] = (vd){0} + start[r];
    for (x += from * SQUARE; from < stop; from += BLOCK8, x += SQUARE * BLOCK8) {
        UNROLL for (int r = 0; r < rows; r++) __builtin_prefetch(x + f->strip + r * BLOCK8, 0, 3);
        UNROLL for (int r = 0; r < 2; r++) { /* a span of 256 numbers, or more, gets to all rows */
            const float *out = f->out + (from / BLOCK8 * 2 + r) % STRIP * f->apart;
            __builtin_prefetch(out, 1, 3), __builtin_prefetch(out + TILE, 1, 3);
        }
        for (long j = 0; j < BLOCK8; j += 4, w += 4 * TILE, next += f->on) {
            vu own[2];
            UNROLL for (int t = 0; t < tiles; t++) own[t] = (vu)LOAD(w + t * SPAN * TILE);
            __builtin_prefetch(next, 0, 2);
            UNROLL for (int r = 0; r < rows; r++) {
                const vb same = four(x + r * BLOCK8 + j);
                UNROLL for (int t = 0; t < tiles; t++) sum[t][r] = dot_us(sum[t][r], own[t], same);
            }
        }
    }
}

/* One span of `rows` rows of the block, from `row` on, times the tiles that are ready. */
INLINE void span_strip(const int bits, const int tiles, const int rows, const group *g, long t, long row,
                       const fetched *f, float (*to)[STRIP][TILE]) {
    const product *p = g->p;
    const int8_t *x = p->codes + place_of(p, g->top + row) + g->at * SQUARE;
    const uint16_t *steps = p->steps + (t * p->k + g->at) / BLOCK4 * TILE;
    vd sum[2][STRIP];
    vn out[2][STRIP] = {0};
    if (bits == 8) {
        whole_strip(tiles, rows, g, x, g->start[0] + row, 0, g->length, f, sum);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int i = 0; i < tiles; i++) out[i][r] = __builtin_convertvector(sum[i][r], vn);
    } else
        for (long b = 0; b < g->length; b += BLOCK4, steps += TILE) {
            whole_strip(tiles, rows, g, x, g->start[b / BLOCK4] + row, b, b + BLOCK4, f, sum);
            UNROLL for (int i = 0; i < tiles; i++) {
                const vn step = numbers_of(steps + i * p->k / BLOCK4 * TILE);
                UNROLL for (int r = 0; r < rows; r++)
                    out[i][r] = weighed_add(out[i][r], __builtin_convertvector(sum[i][r], vn), step);
            }
        }
    UNROLL for (int r = 0; r < rows; r++) {
        const vn scale = g->scale[row + r] - (vn){0};
        UNROLL for (int i = 0; i < tiles; i++) {
            vn *own = (vn *)to[i][r];
            *own = weighed_add(g->at ? *own : (vn){0}, out[i][r], scale);
        }
    }
}

/* Sums of tile t and `rows` rows, complete, into y. */
INLINE void finish_strip(const product *p, long t, long row, long rows, float (*sums)[TILE]) {
    const long wide = p->n - t * TILE < TILE ? p->n - t * TILE : TILE;
    vn scale = {0}, bias = {0};
    if (p->row_scales) scale = *(const vn_u *)(p->row_scales + t * TILE);
    if (p->bias) memcpy(&bias, p->bias + t * TILE, wide * sizeof(float));
    float *y = p->y + row * p->n + t * TILE;
    for (long r = 0; r < rows; r++, y += p->n) {
        vn own = *(vn *)sums[r];
        if (p->row_scales) own *= scale;
        if (p->bias) own += bias;
        copy_row(y, (float *)&own, wide);
    }
}

/* One span of tiles t and, if there are two, t + 1 with all rows of the block. The first strips fetch the tiles `next`. */
INLINE void span_rows(const int bits, const int tiles, group *g, long t, const int8_t *next) {
    const product *p = g->p;
    const long far = p->k * TILE * bits / 8; /* bytes from a tile to the next one */
    const int last = g->at + g->length == p->k;
    for (int i = 0; i < tiles; i++)
        make_ready(bits, p->w + (t + i) * far + g->at * TILE * bits / 8, g->length, g->w[i]);
    for (long row = 0; row < g->rows; row += STRIP) {
        const long rows = g->rows - row < STRIP ? g->rows - row : STRIP, strip = row / STRIP;
        const long from = place_of(p, g->top + row), then = place_of(p, g->top + row + STRIP);
        float (*own)[STRIP][TILE] = g->sums[(t - g->first) / 2][strip];
        const float *out = last ? p->y + (g->top + row) * p->n + t * TILE : own[2][0];
        const fetched f = {next + strip % 2 * far, strip < 2 ? BYTES * bits / 8 : 0, then - from, out,
                           last ? p->n : 2 * TILE};
        if (rows > STRIP / 2)
            span_strip(bits, tiles, STRIP, g, t, row, &f, own);
        else
            span_strip(bits, tiles, STRIP / 2, g, t, row, &f, own);
        for (int i = 0; last && i < tiles; i++) finish_strip(p, t + i, g->top + row, rows, own[i]);
    }
}

/* What sums begin with and are scaled by, for the rows of a block, in whole strips. */
static void note_rows(group *g) {
    for (long r = 0; r < (g->rows + STRIP - 1) / STRIP * STRIP; r++) {
        const int32_t *sums = sums_of(g->p, g->top + r, g->at);
        int32_t all = 0;
        for (long b = 0; b * BLOCK4 < g->length; b++) g->start[b][r] = START4 * sums[b], all += sums[b];
        if (g->p->bits == 8) g->start[0][r] = START8 * all;
        g->scale[r] = *scales_of(g->p, g->top + r, g->at / SPAN);
    }
}

/* One span of the group: tiles in pairs, behind the last of them those of the next span. */
INLINE void span_tiles(const int bits, group *g) {
    const long stop = g->first + g->tiles;
    for (long t = g->first; t < stop; t += 2) {
        const long then = t + 2 < stop ? t + 2 : g->first, at = t + 2 < stop ? g->at : g->at + g->length;
        const int8_t *next = g->p->w + (then * g->p->k + at) * TILE * bits / 8;
        if (t + 1 < stop)
            span_rows(bits, 2, g, t, next);
        else
            span_rows(bits, 1, g, t, next);
    }
}

/* Tiles [first, last) times all of x. */
INLINE void many_tiles(const int bits, const product *p, long first, long last) {
    group g;
    g.p = p;
    for (g.top = 0; g.top < p->m; g.top += GROUP_ROWS)
        for (g.first = first; g.first < last; g.first += GROUP_TILES) {
            g.rows = p->m - g.top < GROUP_ROWS ? p->m - g.top : GROUP_ROWS;
            g.tiles = last - g.first < GROUP_TILES ? last - g.first : GROUP_TILES;
            for (g.at = 0; g.at < p->k; g.at += SPAN) {
                g.length = p->k - g.at < SPAN ? p->k - g.at : SPAN;
                note_rows(&g);
                span_tiles(bits, &g);
            }
        }
}
#endif
