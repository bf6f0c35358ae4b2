/* How x and W lie for products in pairs of bf16, and what a strip of x is.
 *
 * A tile is TILE rows of W, a pair of numbers of each and then the next pair: a vector holds a pair of every row, and a
 * register for matrices BLOCK pairs. x lies in strips of a few rows, BLOCK pairs of each in turn. A number of y is one sum
 * along k, whatever else is computed beside it, and that it may rest in memory in between changes nothing: few and many
 * rows give the same answers to the last bit. Does not know what multiplies, nor threads.
 */
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__linux__) && !defined(QVL_WITHOUT_AMX) && !defined(QVL_PAIRED)
#define AMX 1
#elif defined(QVL_PAIRED_AMX) /* the same in C, for tests */
#define AMX 1
#endif

#define TILE 16        /* rows of W in a tile: a pair of each fills a vector of 64 bytes */
#define BLOCK 16       /* pairs of a row of x that lie side by side; then those of the next row of its strip */
#define SPAN 256       /* pairs of two tiles that all strips of a group meet: 32 KiB */
#define GROUP_TILES 8  /* of W, whose sums are held at a time: a piece of work, of which each thread shall find many */
#if defined(AMX)
#define STRIP 32       /* rows of x at most that meet two tiles at a time: 2 x 2 registers of sums */
#define GROUP_STRIPS 8 /* of x, whose sums are held at a time: they and a span of x lie in a second-level cache */
#define AHEAD 1024     /* words of a tile that are fetched before they are needed, where it is read once */
#else
#define STRIP 12 /* 24 sums of 32 registers */
#define GROUP_STRIPS 22
#define AHEAD 256
#endif

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
