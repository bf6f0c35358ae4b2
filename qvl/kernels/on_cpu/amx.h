/* Products with many rows of x on a processor with registers for matrices (AMX).
 *
 * Such a register holds 16 rows of 64 bytes. One instruction multiplies 64 numbers of 16 rows of x with as many of a tile
 * of W, which lies in memory as the instruction wants it: 16,384 products, where a vector makes 64. W of 4 bits is opened
 * into bytes first. What is summed in whole numbers, and what in fp32 above that, is as eight.h and four.h have it: few
 * and many rows give the same answers to the last bit. Does not know threads.
 */
#pragma once
#include "four.h"

#if defined(QVL_PORTABLE) && BYTES == 64 && !defined(QVL_WITHOUT_AMX)
#define AMX 1
#define REGISTERS_IN_C 1
#elif defined(__AMX_INT8__) && defined(VNNI) && BYTES == 64 && defined(__linux__) && !defined(QVL_WITHOUT_AMX)
#define AMX 1
#endif

#define AMX_TILES 32 /* of W in a piece of work */

#if !defined(AMX)
static int has_registers(void) { return 0; }
#elif !defined(REGISTERS_IN_C)
#include "matrix_registers.h"
#define MULTIPLY(sums, x, w) _tile_dpbssd(sums, x, w)
#else
#include "matrix_registers.h"
#define MULTIPLY(sums, x, w) multiply_portably(sums, x, w)

static void multiply_portably(int sums, int x, int w) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            const int8_t *row = (const int8_t *)matrix_registers[x][i];
            int32_t sum = (int32_t)matrix_registers[sums][i][j];
            for (int k = 0; k < 16; k++) {
                const int8_t *four = (const int8_t *)&matrix_registers[w][k][j];
                for (int b = 0; b < 4; b++) sum += row[4 * k + b] * four[b];
            }
            matrix_registers[sums][i][j] = (uint32_t)sum;
        }
}
#endif

/* Whether m rows of x are multiplied here. */
INLINE int amx_takes(long m) { return m > STRIP && has_registers(); }

/* Whether m rows of x stand side by side: sixteen of them, BLOCK8 numbers of each at a time. Then what is multiplied next
 * lies in as many lines of a cache, one behind the other, and no step of a loop computes where. */
INLINE int side_by_side(long m) { return BYTES == 64 && m >= STRIP; }

/* Where such a row begins. */
INLINE long place_of(const product *p, long row) { return row / SQUARE * SQUARE * p->k + row % SQUARE * BLOCK8; }

/* Rows of x that there is room for: what is not in x is filled with zeros, where a strip meets it. */
INLINE long rows_held(long m) { return side_by_side(m) ? (m + SQUARE - 1) / SQUARE * SQUARE : m; }

#if defined(AMX)
#define STEP 64                           /* numbers of k in a register */
#define STEPS (SPAN / STEP)
#define AMX_CHUNK 2048                    /* numbers of k that are multiplied before the next ones */
#define AMX_ROWS 256                      /* rows of x that meet all tiles of a piece, out of a second-level cache */
typedef int32_t squares[4][SQUARE][TILE]; /* (tile, strip): whole numbers, as registers 0 to 3 hold them */

/* `tiles` tiles of W from t on times `strips` times 16 rows of x from `column` on, over numbers [from, stop) of k, which
 * lie at w and, of the second tile, `apart` bytes behind. */
typedef struct {
    const product *p;
    const int8_t *w;
    long apart, column, t, from, stop;
} amx_part;

/* One step of it: registers 4 and 5 have x, 6 and 7 W. */
INLINE void amx_step(const int tiles, const int strips, const int8_t *w, long apart, const int8_t *x, long next) {
    FILL(4, x);
    if (strips > 1) FILL(5, x + next);
    FILL(6, w);
    MULTIPLY(0, 4, 6);
    if (strips > 1) MULTIPLY(1, 5, 6);
    if (tiles == 1) return;
    FILL(7, w + apart);
    MULTIPLY(2, 4, 7);
    if (strips > 1) MULTIPLY(3, 5, 7);
}

INLINE void amx_keep(const int tiles, const int strips, squares whole) {
    KEEP(0, whole[0]);
    if (strips > 1) KEEP(1, whole[1]);
    if (tiles == 1) return;
    KEEP(2, whole[2]);
    if (strips > 1) KEEP(3, whole[3]);
}

/* Some rows of x, the `part`th of STEPS: what the span at `at` has summed for them, `whole`, added to `sums`. */
INLINE void amx_scale(const int bits, const int tiles, const int strips, const amx_part *a, long at, long part,
                      const squares *whole, float (*sums)[2 * SQUARE][TILE]) {
    const product *p = a->p;
    const int rows = strips * SQUARE / STEPS;
    const long first = part * rows, strip = first / SQUARE, row = first % SQUARE;
    const float *scale = scales_of(p, a->column + first, at / SPAN);
    const long blocks = ((a->stop - at < SPAN ? a->stop - at : SPAN) + BLOCK4 - 1) / BLOCK4;
    UNROLL for (int i = 0; i < tiles; i++) {
        const uint16_t *steps = p->steps + ((a->t + i) * p->k + at) / BLOCK4 * TILE;
        UNROLL for (int r = 0; r < rows; r++) {
            vn *to = (vn *)sums[i][first + r], out = {0};
            if (bits == 8)
                out = __builtin_convertvector(*(const vd *)whole[0][2 * i + strip][row + r], vn);
            else
                for (long b = 0; b < blocks; b++)
                    out = weighed_add(out, __builtin_convertvector(*(const vd *)whole[b][2 * i + strip][row + r], vn),
                                      numbers_of(steps + b * TILE));
            *to = weighed_add(at ? *to : (vn){0}, out, scale[r * p->spans] - (vn){0});
        }
    }
}

/* All spans. What one has summed is scaled while the next one multiplies: other parts of a processor do that. */
INLINE void amx_spans(const int bits, const int tiles, const int strips, const amx_part *a,
                      float (*sums)[2 * SQUARE][TILE]) {
    const long next = SQUARE * a->p->k;
    const int8_t *w = a->w, *x = a->p->codes + a->column * a->p->k + a->from * SQUARE;
    squares whole[2][PER_SPAN] __attribute__((aligned(64)));
    for (long at = a->from; at < a->stop + SPAN; at += SPAN) {
        squares *own = whole[at / SPAN % 2], *last = whole[(at / SPAN + 1) % 2];
        const long steps = at < a->stop ? (a->stop - at < SPAN ? a->stop - at : SPAN) / STEP : 0;
        clear_sums();
        for (long i = 0; i < STEPS; i++) {
            if (i < steps) {
                amx_step(tiles, strips, w, a->apart, x, next);
                w += STEP * TILE, x += STEP * SQUARE;
            }
            if (at > a->from) amx_scale(bits, tiles, strips, a, at - SPAN, i, last, sums);
            if (bits == 4 && i % 2 && i < steps) {
                amx_keep(tiles, strips, own[i / 2]);
                clear_sums();
            }
        }
        if (bits == 8 && steps) amx_keep(tiles, strips, own[0]);
    }
}

/* As `take_sums` and `keep_sums`, a row of a tile at a time. */
INLINE void amx_take(const amx_part *a, long t, long rows, float (*sums)[TILE]) {
    const long wide = a->p->n - t * TILE < TILE ? a->p->n - t * TILE : TILE;
    const float *y = a->p->y + a->column * a->p->n + t * TILE;
    memset(sums[rows], 0, (2 * SQUARE - rows) * sizeof *sums);
    for (long r = 0; r < rows; r++, y += a->p->n) copy_row(sums[r], y, wide);
}

INLINE void amx_finish(const amx_part *a, long t, long rows, float (*sums)[TILE]) {
    const product *p = a->p;
    const long wide = p->n - t * TILE < TILE ? p->n - t * TILE : TILE;
    const int scaled = a->stop == p->k && p->row_scales, biased = a->stop == p->k && p->bias;
    vn scale = {0}, bias = {0};
    if (scaled) scale = *(const vn_u *)(p->row_scales + t * TILE);
    if (biased) memcpy(&bias, p->bias + t * TILE, wide * sizeof(float));
    float *y = p->y + a->column * p->n + t * TILE;
    for (long r = 0; r < rows; r++, y += p->n) {
        vn own = *(vn *)sums[r];
        if (scaled) own *= scale;
        if (biased) own += bias;
        copy_row(y, (float *)&own, wide);
    }
}

INLINE void amx_squares(const int bits, const int tiles, const int strips, const amx_part *a) {
    float sums[2][2 * SQUARE][TILE] __attribute__((aligned(64)));
    const long left = a->p->m - a->column, rows = left < strips * SQUARE ? left : strips * SQUARE;
    for (int i = 0; a->from && i < tiles; i++) amx_take(a, a->t + i, rows, sums[i]);
    amx_spans(bits, tiles, strips, a, sums);
    for (int i = 0; i < tiles; i++) amx_finish(a, a->t + i, rows, sums[i]);
}

/* `count` numbers of a tile of 4 bits as bytes, in the order of 8 bits. */
INLINE void open_tile(const int8_t *w, long count, int8_t *to) {
    for (long b = 0; b < count; b += BLOCK4, w += BLOCK4 / 2 * TILE, to += BLOCK4 * TILE)
        for (long i = 0; i < BLOCK4 / 2 * TILE; i += BYTES) {
            vu both = (vu)LOAD(w + i);
            *(vb_u *)(to + i) = (vb)(both & 15) - 8;
            *(vb_u *)(to + BLOCK4 / 2 * TILE + i) = (vb)((vu)((vh)both >> 4) & 15) - 8;
        }
}

/* Tiles t and, before `last`, t + 1 times rows [column, end) of x over numbers [from, stop) of k. */
INLINE void amx_pair(const int bits, const product *p, long t, long last, long column, long end, long from, long stop) {
    amx_part a = {p, p->w + (t * p->k + from) * TILE, p->k * TILE, column, t, from, stop};
    int8_t opened[2][AMX_CHUNK * TILE] __attribute__((aligned(64)));
    if (bits == 4) {
        for (int i = 0; i < 2 && t + i < last; i++)
            open_tile(p->w + ((t + i) * p->k + from) * TILE / 2, stop - from, opened[i]);
        SETTLE();
        a.w = opened[0], a.apart = sizeof opened[0];
    }
    for (; a.column < end; a.column += 2 * SQUARE) switch ((t + 1 < last) * 2 + (p->m - a.column > SQUARE)) {
        case 0: amx_squares(bits, 1, 1, &a); break;
        case 1: amx_squares(bits, 1, 2, &a); break;
        case 2: amx_squares(bits, 2, 1, &a); break;
        case 3: amx_squares(bits, 2, 2, &a); break;
        }
}

/* Tiles [first, last) times all of x. */
INLINE void amx_tiles(const int bits, const product *p, long first, long last) {
    configure_registers();
    for (long from = 0; from < p->k; from += AMX_CHUNK)
        for (long c = 0; c < p->m; c += AMX_ROWS)
            for (long t = first; t < last; t += 2)
                amx_pair(bits, p, t, last, c, p->m - c < AMX_ROWS ? p->m : c + AMX_ROWS, from,
                         p->k - from < AMX_CHUNK ? p->k : from + AMX_CHUNK);
    RELEASE();
}
#endif
