/* Rows of x times tiles of W, pairs of bf16 all the way.
 *
 * A tile is TILE rows of W, a pair of numbers of each and then the next pair: a vector holds a pair of every row, and each
 * of its sums belongs to one row. x comes a pair at a time, the same for all rows. A number of y is one sum, k ascending;
 * that it may rest in memory in between changes nothing, so few and many rows give the same answers to the last bit.
 * Does not know threads.
 */
#pragma once
#include "vectors.h"

#define TILE 16         /* rows of W in a tile: a pair of each fills a vector of 64 bytes */
#define BLOCK 16        /* pairs of a row of x that lie side by side; then those of the next row of its strip */
#define STRIP 12        /* rows of x at most that meet two tiles at a time: 24 sums of 32 registers */
#define SPAN 256        /* pairs of two tiles that all strips of a group meet: 32 KiB out of a second-level cache */
#define GROUP_TILES 16  /* of W, whose sums are held at a time */
#define GROUP_STRIPS 22 /* of x, likewise: they and what a span has of x lie in a second-level cache */
#define AHEAD 256       /* words of a tile that are fetched before they are needed, where it is read once */

#define UNROLL _Pragma("GCC unroll 16")

typedef float vt __attribute__((vector_size(64))); /* a number for each row of a tile */
typedef float vt_u __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vp __attribute__((vector_size(64))); /* a pair for each */

typedef vt strip_sums[2][STRIP]; /* of two tiles */

/* y [m, n] = x W^T + bias; `gelu`: quick_gelu(x) instead of x. `x`: what rows of x, `from`, become, in strips. `pairs` of a
 * row with its filling; `tiles` of W are a piece of work. */
typedef struct {
    const float *from, *bias;
    const uint32_t *w;
    uint32_t *x;
    float *y;
    long ldx, m, n, k, pairs, tiles;
    int gelu;
} product;

/* What is fetched while a strip is computed: with every pair a line at each `next`, from where it goes on by `on` words;
 * and the strip of x that lies `strip` words behind this one. */
typedef struct {
    const uint32_t *next[2];
    long on[2], strip;
} fetched;

/* All rows of x pass in strips, as even as can be. */
INLINE long strips_of(long m) { return (m + STRIP - 1) / STRIP; }
INLINE long first_of(long m, long strip) { return strip * m / strips_of(m); }

/* The products of a pair of each row of W with a pair of x, added by an instruction that stays where it stands: the
 * compiler would rather spill sums for what it moves forward. */
INLINE void add_products(vt *sum, vp w, vp x) {
#if defined(PAIR_INSTRUCTION)
    __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(w), "v"(x));
#else
    *sum += (vt)(w & 0xffff0000u) * (vt)(x & 0xffff0000u);
    *sum += (vt)(w << 16) * (vt)(x << 16);
#endif
}

/* `pairs` of a strip of `rows` rows times two tiles, `apart` words from each other; on top of `sums` if they have `begun`. */
INLINE void multiply(const int rows, const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f,
                     int begun, vt (*sums)[STRIP]) {
    const uint32_t *next0 = f->next[0], *next1 = f->next[1];
    const long on0 = f->on[0], on1 = f->on[1], strip = f->strip;
    vt sum[2][STRIP];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 2; t++) sum[t][r] = begun ? sums[t][r] : (vt){0};
    for (long i = 0; i < pairs; i += BLOCK, x += BLOCK * rows) {
        UNROLL for (int r = 0; r < rows; r++) __builtin_prefetch(x + strip + r * BLOCK, 0, 3);
        _Pragma("GCC unroll 4") for (int j = 0; j < BLOCK; j++, w += TILE, next0 += on0, next1 += on1) {
            const vp own0 = *(const vp *)w, own1 = *(const vp *)(w + apart);
            __builtin_prefetch(next0, 0, 2), __builtin_prefetch(next1, 0, 2);
            UNROLL for (int r = 0; r < rows; r++) {
                const vp same = x[r * BLOCK + j] - (vp){0};
                add_products(&sum[0][r], own0, same), add_products(&sum[1][r], own1, same);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 2; t++) sums[t][r] = sum[t][r];
}

typedef void multiplier(const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f, int begun,
                        vt (*sums)[STRIP]);

#define DEFINE(ROWS)                                                                                                   \
    static void multiply##ROWS(const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f,         \
                               int begun, vt (*sums)[STRIP]) {                                                         \
        multiply(ROWS, x, w, apart, pairs, f, begun, sums);                                                            \
    }
DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4) DEFINE(5) DEFINE(6) DEFINE(7) DEFINE(8) DEFINE(9) DEFINE(10) DEFINE(11) DEFINE(12)

static multiplier *const by_rows[STRIP + 1] = {0,         multiply1, multiply2, multiply3,  multiply4,  multiply5, multiply6,
                                               multiply7, multiply8, multiply9, multiply10, multiply11, multiply12};

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
        by_rows[p->m](p->x, w, other * far, p->pairs, &f, 0, sums);
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
        by_rows[rows](x, w, other * far, g->length, &f, g->at > 0, sums);
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
