/* y = x W^T + b on a CPU: fp32 activations, weights in bf16, fp16 or fp32, sums in fp32.
 *
 * Knows caches and threads. Does not know Python. Every number of y is summed in the same order whatever else is computed
 * beside it: an answer does not depend on its company in a batch.
 *
 * A tile is ROWS rows of W times FEW rows of x or less, summed along k in vector registers. Both matrices are contiguous
 * along k, so nothing is packed; W is widened on the fly. Two bf16 numbers share a 32-bit word: a shift gives the even
 * one, a mask the odd one, which is why x is stored as evens, then odds, of every group. The rows of a tile stand far
 * apart, so that its tiles read ROWS long stretches of memory, which a processor's own prefetcher follows; it does not
 * follow short ones. More rows of x compute longer than W is read: see several.h, and panels.h for MANY.
 */
#include "several.h"

#define ROWS 4
#define FEW 3                    /* 4 x 3 sums, three vectors of x and one of W fill sixteen registers */
#define PIECE_BYTES (192 * 1024) /* of W in a piece of work, for few rows of x */
#define AHEAD 512                /* bytes of W that are fetched before they are needed, in a long stretch */

/* A row of x, zero-filled to whole groups. */
static void arrange_row(const void *what, long row) {
    const product own = *(const product *)what, *p = &own; /* known not to change below */
    float *to = p->x + row * p->padded;
    for (long i = 0; i < p->padded; i += GROUP, to += GROUP) {
        vf low, high;
        load_group(p, row, i, &low, &high);
        *(vf_u *)to = low, *(vf_u *)(to + LANES) = high;
    }
}

/* GROUP numbers of `rows` rows of W, ldw bytes apart, times those of `columns` rows of x. */
INLINE void few_step(const enum type type, const int rows, const int columns, const char *w, long ldw, const float *x,
                     long ldx, vf (*acc)[FEW]) {
    for (int half = 0; half < 2; half++) {
        vf xv[FEW];
        UNROLL4 for (int c = 0; c < columns; c++) xv[c] = f32_low(x + c * ldx + half * LANES);
        UNROLL4 for (int r = 0; r < rows; r++) {
            vf wv = widened(type, half, w + r * ldw);
            UNROLL4 for (int c = 0; c < columns; c++) acc[r][c] = fma_add(acc[r][c], wv, xv[c]);
        }
    }
}

/* `rows` rows of W from `row` on, `apart` from each other, times all `columns` rows of x over a chunk of k. The first chunk
 * sets y (to the bias), others add to it. */
INLINE void few_tile(const enum type type, const int rows, const int columns, const product *p, long row, long apart,
                     long from) {
    const long size = size_of(type), ldw = apart * p->k * size, k = p->k - from < p->chunk ? p->k - from : p->chunk;
    const char *w = (const char *)p->w + (row * p->k + from) * size;
    const float *x = p->x + from;
    float *y = p->y + row;
    long i = 0;
    vf acc[ROWS][FEW] = {0};
    for (; i + GROUP <= k; i += GROUP) {
        UNROLL4 for (int r = 0; r < rows; r++)
            UNROLL4 for (int b = 0; b < GROUP * size; b += LINE) __builtin_prefetch(w + r * ldw + i * size + AHEAD + b, 0, 2);
        few_step(type, rows, columns, w + i * size, ldw, x + i, p->padded, acc);
    }
    if (i < k) { /* x is zero-filled */
        char tail[ROWS][GROUP * 4] = {0};
        for (int r = 0; r < rows; r++) memcpy(tail[r], w + r * ldw + i * size, (k - i) * size);
        few_step(type, rows, columns, tail[0], sizeof tail[0], x + i, p->padded, acc);
    }
    UNROLL4 for (int c = 0; c < columns; c++)
        UNROLL4 for (int r = 0; r < rows; r++) {
            float base = from ? y[c * p->n + r * apart] : p->bias ? p->bias[row + r * apart] : 0;
            y[c * p->n + r * apart] = base + sum(acc[r][c]);
        }
}

INLINE void few_rows(const enum type type, const int columns, const product *p, long row, long rows) {
    long apart = rows / ROWS;
    for (long r = row; r < row + apart; r++)
        for (long from = 0; from < p->k; from += p->chunk) few_tile(type, ROWS, columns, p, r, apart, from);
    for (long r = row + apart * ROWS; r < row + rows; r++)
        for (long from = 0; from < p->k; from += p->chunk) few_tile(type, 1, columns, p, r, 1, from);
}

INLINE void few_piece(const enum type type, const product *p, long piece) {
    long row = piece * p->rows, rows = p->n - row < p->rows ? p->n - row : p->rows;
    switch (p->m) {
    case 1: few_rows(type, 1, p, row, rows); break;
    case 2: few_rows(type, 2, p, row, rows); break;
    case 3: few_rows(type, 3, p, row, rows); break;
    }
}

/* Rows of W in a piece: at most `most`, and so that every thread finds some pieces. */
static long rows_of_piece(long n, int threads, long most, long multiple) {
    long fair = (n / (4 * threads) + multiple - 1) / multiple * multiple;
    long rows = fair < most / multiple * multiple ? fair : most / multiple * multiple;
    return rows < multiple ? multiple : rows;
}

/* `few`, `several` or `many` rows of x. */
static void multiply(product p, long size, share_work *few, share_work *several, packer *many, int threads) {
    long parts = (p.k + PANEL_K - 1) / PANEL_K;
    p.chunk = (p.k / parts + GROUP - 1) / GROUP * GROUP;
    p.padded = (p.k + GROUP - 1) / GROUP * GROUP;
    if (p.m >= MANY) {
        p.rows = rows_of_piece(p.n, threads, RUN, WROWS);
        multiply_panels(&p, size, many, threads);
        return;
    }
    qvl_share(p.m, p.m * p.k > 65536 ? threads : 1, arrange_row, &p);
    p.rows = p.m <= FEW ? rows_of_piece(p.n, threads, PIECE_BYTES / (p.k * size), ROWS)
                        : rows_of_piece(p.n, threads, PIECE_ROWS, WSTRIP);
    qvl_share((p.n + p.rows - 1) / p.rows, threads, p.m <= FEW ? few : several, &p);
}

#define DEFINE(NAME, T, TYPE)                                                                                          \
    static void few_##NAME(const void *what, long piece) { few_piece(TYPE, what, piece); }                             \
    static void several_##NAME(const void *what, long piece) { several_piece(TYPE, what, piece); }                     \
    static void multiply_##NAME(product p, int threads) {                                                              \
        multiply(p, sizeof(T), few_##NAME, several_##NAME, pack_##NAME, threads);                                      \
    }

DEFINE(bf16, uint16_t, BF16)
DEFINE(f16, uint16_t, F16)
DEFINE(f32, float, F32)

void qvl_linear_bf16(const float *x, long ldx, const uint16_t *w, const float *bias, float *y, float *scratch, long m,
                     long n, long k, int split, int threads) {
    product p = {.from = x, .bias = bias, .w = w, .x = scratch, .y = y, .ldx = ldx, .m = m, .n = n, .k = k};
    p.split = split;
    multiply_bf16(p, threads);
}

void qvl_linear_f16(const float *x, long ldx, const uint16_t *w, const float *bias, float *y, float *scratch, long m,
                    long n, long k, int split, int threads) {
    product p = {.from = x, .bias = bias, .w = w, .x = scratch, .y = y, .ldx = ldx, .m = m, .n = n, .k = k};
    p.split = split;
    multiply_f16(p, threads);
}

void qvl_linear_f32(const float *x, long ldx, const float *w, const float *bias, float *y, float *scratch, long m,
                    long n, long k, int split, int threads) {
    product p = {.from = x, .bias = bias, .w = w, .x = scratch, .y = y, .ldx = ldx, .m = m, .n = n, .k = k};
    p.split = split;
    multiply_f32(p, threads);
}
