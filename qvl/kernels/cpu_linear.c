/* y = x W^T + b on a CPU: fp32 activations, weights in bf16, fp16 or fp32, sums in fp32.
 *
 * Knows caches and threads. Does not know Python. Every number of y is summed in the same order whatever else is
 * computed beside it: an answer does not depend on its company in a batch.
 *
 * A tile is ROWS rows of W times COLUMNS rows of x, summed along k in vector registers. Both matrices are contiguous
 * along k, so nothing is packed; W is widened on the fly. Two bf16 numbers share a 32-bit word: a shift gives the even
 * one, a mask the odd one, which is why x is stored as evens, then odds, of every group. For few rows of x the rows of
 * a tile stand far apart, so that its tiles read ROWS long stretches of memory, which a processor's own prefetcher
 * follows; it does not follow short ones. MANY rows of x and more are worth packing both: see cpu_panels.h.
 */
#include "cpu_panels.h"

#if LANES == 16
#define COLUMNS 6
#elif LANES == 8
#define COLUMNS 3
#else
#define COLUMNS 4
#endif
#define ROWS 4
#define K_CHUNK PANEL_K          /* COLUMNS rows of x of this length stay in the first-level cache */
#define MANY 16                  /* rows of x from which panels of W are worth turning */
#define BLOCK_BYTES (192 * 1024) /* a block of W stays in the second-level cache while all of x passes */
#define AHEAD 512                /* bytes of W that are fetched before they are needed, in a long stretch */

/* A row of x: zero-filled to whole groups; `split` stores evens before odds in each group. */
static void arrange_row(const void *what, long row) {
    const product own = *(const product *)what, *p = &own; /* known not to change below */
    const float *from = p->from + row * p->ldx;
    float *to = p->x + row * p->padded;
    for (long i = 0; i < p->padded; i += GROUP, to += GROUP) {
        float part[GROUP] = {0};
        const float *in = from + i;
        if (i + GROUP > p->k) in = memcpy(part, in, (p->k - i) * sizeof(float));
        for (int j = 0; j < LANES; j++) {
            to[j] = p->split ? in[2 * j] : in[j];
            to[LANES + j] = p->split ? in[2 * j + 1] : in[LANES + j];
        }
    }
}

/* Shapes and pieces. */
static product begin(long m, long n, long k, long size, int threads) {
    long parts = (k + K_CHUNK - 1) / K_CHUNK, chunk = (k / parts + GROUP - 1) / GROUP * GROUP;
    long rows = BLOCK_BYTES / ((m > COLUMNS ? chunk : k) * size) / ROWS * ROWS;
    long fair = (n / (4 * threads) + ROWS - 1) / ROWS * ROWS;
    if (rows > fair) rows = fair;
    if (rows < ROWS) rows = ROWS;
    return (product){.m = m, .n = n, .k = k, .chunk = chunk, .rows = rows, .padded = (k + GROUP - 1) / GROUP * GROUP};
}

/* One product for one number type T of W. A tile is `rows` rows of W from `row` on, `apart` from each other, times
 * `columns` rows of x, over a chunk of k; the first chunk sets y (to the bias), others add to it. */
#define DEFINE(NAME, T, LOW, HIGH)                                                                                     \
    DEFINE_PACK(NAME, T, LOW, HIGH)                                                                                    \
    INLINE void NAME##_tile(const int rows, const int columns, const product *p, long column, long row, long apart,    \
                            long from) {                                                                               \
        const T *w = (const T *)p->w + row * p->k + from;                                                              \
        const float *x = p->x + column * p->padded + from, *bias = p->bias ? p->bias + row : 0;                        \
        float *y = p->y + column * p->n + row;                                                                         \
        long k = p->k - from < p->chunk ? p->k - from : p->chunk, whole = k - k % GROUP, ldw = apart * p->k;           \
        long ahead = apart > 1 ? AHEAD / (long)sizeof(T) : ROWS * ldw;                                                 \
        vf acc[ROWS][COLUMNS];                                                                                         \
        for (int r = 0; r < rows; r++)                                                                                 \
            for (int c = 0; c < columns; c++) acc[r][c] = (vf){0};                                                     \
        for (long i = 0; i < whole; i += GROUP) {                                                                      \
            vf xv[COLUMNS];                                                                                            \
            _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) xv[c] = f32_low(x + c * p->padded + i);          \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                   \
                __builtin_prefetch(w + r * ldw + i + ahead, 0, 2);                                                     \
                vf wv = LOW(w + r * ldw + i);                                                                          \
                _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) acc[r][c] = fma_add(acc[r][c], wv, xv[c]);   \
            }                                                                                                          \
            _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) xv[c] = f32_high(x + c * p->padded + i);         \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                   \
                vf wv = HIGH(w + r * ldw + i);                                                                         \
                _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) acc[r][c] = fma_add(acc[r][c], wv, xv[c]);   \
            }                                                                                                          \
        }                                                                                                              \
        if (whole < k) {                                                                                               \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                   \
                T tail[GROUP] = {0};                                                                                   \
                memcpy(tail, w + r * ldw + whole, (k - whole) * sizeof(T));                                            \
                _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) {                                            \
                    const float *end = x + c * p->padded + whole;                                                      \
                    acc[r][c] = fma_add(acc[r][c], LOW(tail), f32_low(end));                                           \
                    acc[r][c] = fma_add(acc[r][c], HIGH(tail), f32_high(end));                                         \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++)                                                      \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                   \
                float base = from ? y[c * p->n + r * apart] : bias ? bias[r * apart] : 0;                              \
                y[c * p->n + r * apart] = base + sum(acc[r][c]);                                                       \
            }                                                                                                          \
    }                                                                                                                  \
    INLINE void NAME##_strip(const int columns, const product *p, long column, long row, long rows, long apart,        \
                             long from) {                                                                              \
        for (; rows >= ROWS; rows -= ROWS, row += ROWS) NAME##_tile(ROWS, columns, p, column, row, apart, from);       \
        for (; rows > 0; rows--, row++) NAME##_tile(1, columns, p, column, row, 1, from);                              \
    }                                                                                                                  \
    static void NAME##_block(const product *p, long row, long rows, long apart) {                                      \
        for (long from = 0; from < p->k; from += p->chunk) {                                                           \
            long c = 0;                                                                                                \
            for (; c + COLUMNS <= p->m; c += COLUMNS) NAME##_strip(COLUMNS, p, c, row, rows, apart, from);             \
            switch (p->m - c) {                                                                                        \
            case 1: NAME##_strip(1, p, c, row, rows, apart, from); break;                                              \
            case 2: NAME##_strip(2, p, c, row, rows, apart, from); break;                                              \
            case 3: NAME##_strip(COLUMNS > 3 ? 3 : 1, p, c, row, rows, apart, from); break;                            \
            case 4: NAME##_strip(COLUMNS > 4 ? 4 : 1, p, c, row, rows, apart, from); break;                            \
            case 5: NAME##_strip(COLUMNS > 5 ? 5 : 1, p, c, row, rows, apart, from); break;                            \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void NAME##_piece(const void *what, long piece) {                                                           \
        const product *p = what;                                                                                       \
        long row = piece * p->rows, rows = p->n - row < p->rows ? p->n - row : p->rows;                                \
        long apart = p->m <= COLUMNS ? rows / ROWS : 0; /* few rows of x: W is read once, in long stretches */         \
        for (long i = 0; i < apart; i++) NAME##_block(p, row + i, ROWS, apart);                                        \
        NAME##_block(p, row + apart * ROWS, rows - apart * ROWS, 1);                                                   \
    }                                                                                                                  \
    void qvl_linear_##NAME(const float *x, long ldx, const T *w, const float *bias, float *y, float *scratch, long m,  \
                           long n, long k, int split, int threads) {                                                   \
        product p = begin(m, n, k, sizeof(T), threads);                                                                \
        p.from = x, p.bias = bias, p.w = w, p.x = scratch, p.y = y, p.ldx = ldx, p.split = split;                      \
        if (m >= MANY) {                                                                                               \
            multiply_panels(&p, sizeof(T), NAME##_pack, threads);                                                      \
            return;                                                                                                    \
        }                                                                                                              \
        qvl_share(m, m * k > 65536 ? threads : 1, arrange_row, &p);                                                    \
        qvl_share((n + p.rows - 1) / p.rows, threads, NAME##_piece, &p);                                               \
    }

DEFINE(bf16, uint16_t, bf16_low, bf16_high)
DEFINE(f16, uint16_t, f16_low, f16_high)
DEFINE(f32, float, f32_low, f32_high)
