/* y = x W^T + b on a CPU: fp32 activations, weights in bf16, fp16 or fp32, sums in fp32.
 *
 * Knows caches and threads. Does not know Python. Every number of y is summed in the same order whatever else is
 * computed beside it: an answer does not depend on its company in a batch.
 *
 * A tile is ROWS rows of W times COLUMNS rows of x, summed along k in vector registers. Both matrices are contiguous
 * along k, so nothing is packed; W is widened on the fly. Two bf16 numbers share a 32-bit word: a shift gives the even
 * one, a mask the odd one, which is why x is stored as evens, then odds, of every group. Each tile fetches the next
 * one's part of W ahead: a processor's own prefetcher does not follow four short rows, and gives a third less. MANY
 * rows of x and more are worth packing both: see cpu_panels.h.
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

/* x [m, k] to out [m, padded k]: zero-filled to whole groups; `split` stores evens before odds in each group. */
static void arrange(const float *x, long ldx, float *out, long m, long k, int split, int threads) {
    long groups = (k + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(threads) if (m * k > 65536)
    for (long i = 0; i < m; i++) {
        const float *from = x + i * ldx;
        float *to = out + i * groups * GROUP;
        for (long g = 0; g < groups; g++, to += GROUP) {
            float part[GROUP] = {0};
            const float *in = from + g * GROUP;
            if ((g + 1) * GROUP > k) {
                memcpy(part, in, (k - g * GROUP) * sizeof(float));
                in = part;
            }
            for (int j = 0; j < LANES; j++) {
                to[j] = split ? in[2 * j] : in[j];
                to[LANES + j] = split ? in[2 * j + 1] : in[LANES + j];
            }
        }
    }
}

/* One product for one number type T of W. `first`: y is set (to the bias), otherwise added to. */
#define DEFINE(NAME, T, LOW, HIGH)                                                                                     \
    DEFINE_PACK(NAME, T, LOW, HIGH)                                                                                    \
    INLINE void NAME##_tile(const int rows, const int columns, const T *w, long ldw, const float *x, long ldx,         \
                            float *y, long ldy, long k, const float *bias, int first) {                                \
        vf acc[ROWS][COLUMNS];                                                                                         \
        for (int r = 0; r < rows; r++)                                                                                 \
            for (int c = 0; c < columns; c++) acc[r][c] = (vf){0};                                                     \
        long whole = k - k % GROUP;                                                                                    \
        for (long i = 0; i < whole; i += GROUP) {                                                                      \
            vf xv[COLUMNS];                                                                                            \
            _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) xv[c] = f32_low(x + c * ldx + i);                \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                   \
                __builtin_prefetch(w + (r + ROWS) * ldw + i, 0, 2);                                                    \
                vf wv = LOW(w + r * ldw + i);                                                                          \
                _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) acc[r][c] = fma_add(acc[r][c], wv, xv[c]);   \
            }                                                                                                          \
            _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++) xv[c] = f32_high(x + c * ldx + i);               \
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
                    acc[r][c] = fma_add(acc[r][c], LOW(tail), f32_low(x + c * ldx + whole));                           \
                    acc[r][c] = fma_add(acc[r][c], HIGH(tail), f32_high(x + c * ldx + whole));                         \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int c = 0; c < columns; c++)                                                      \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {                                                   \
                float base = first ? (bias ? bias[r] : 0) : y[c * ldy + r];                                            \
                y[c * ldy + r] = base + sum(acc[r][c]);                                                                \
            }                                                                                                          \
    }                                                                                                                  \
    INLINE void NAME##_strip(const int columns, const T *w, long ldw, const float *x, long ldx, float *y, long ldy,    \
                             long n, long k, const float *bias, int first) {                                           \
        long r = 0;                                                                                                    \
        for (; r + ROWS <= n; r += ROWS)                                                                               \
            NAME##_tile(ROWS, columns, w + r * ldw, ldw, x, ldx, y + r, ldy, k, bias ? bias + r : 0, first);           \
        for (; r < n; r++)                                                                                             \
            NAME##_tile(1, columns, w + r * ldw, ldw, x, ldx, y + r, ldy, k, bias ? bias + r : 0, first);              \
    }                                                                                                                  \
    static void NAME##_block(const T *w, long ldw, const float *x, long ldx, float *y, long ldy, long m, long n,       \
                             long k, const float *bias, int first) {                                                   \
        long c = 0;                                                                                                    \
        for (; c + COLUMNS <= m; c += COLUMNS)                                                                         \
            NAME##_strip(COLUMNS, w, ldw, x + c * ldx, ldx, y + c * ldy, ldy, n, k, bias, first);                      \
        x += c * ldx, y += c * ldy;                                                                                    \
        switch (m - c) {                                                                                               \
        case 1: NAME##_strip(1, w, ldw, x, ldx, y, ldy, n, k, bias, first); break;                                     \
        case 2: NAME##_strip(2, w, ldw, x, ldx, y, ldy, n, k, bias, first); break;                                     \
        case 3: NAME##_strip(COLUMNS > 3 ? 3 : 1, w, ldw, x, ldx, y, ldy, n, k, bias, first); break;                   \
        case 4: NAME##_strip(COLUMNS > 4 ? 4 : 1, w, ldw, x, ldx, y, ldy, n, k, bias, first); break;                   \
        case 5: NAME##_strip(COLUMNS > 5 ? 5 : 1, w, ldw, x, ldx, y, ldy, n, k, bias, first); break;                   \
        }                                                                                                              \
    }                                                                                                                  \
    void qvl_linear_##NAME(const float *x, long ldx, const T *w, const float *bias, float *y, float *scratch, long m,  \
                           long n, long k, int split, int threads) {                                                   \
        long padded = (k + GROUP - 1) / GROUP * GROUP;                                                                 \
        long parts = (k + K_CHUNK - 1) / K_CHUNK;                                                                      \
        long chunk = (k / parts + GROUP - 1) / GROUP * GROUP;                                                          \
        if (m >= MANY) {                                                                                               \
            multiply_panels(x, ldx, (const char *)w, sizeof(T), NAME##_pack, bias, y, scratch, m, n, k, chunk, split,  \
                            threads);                                                                                  \
            return;                                                                                                    \
        }                                                                                                              \
        arrange(x, ldx, scratch, m, k, split, threads);                                                                \
        long rows = BLOCK_BYTES / (chunk * (long)sizeof(T)) / ROWS * ROWS;                                             \
        long fair = (n / (4 * threads) + ROWS - 1) / ROWS * ROWS;                                                      \
        if (rows > fair) rows = fair;                                                                                  \
        if (rows < ROWS) rows = ROWS;                                                                                  \
        long step = m > COLUMNS ? rows : ROWS; /* few rows of x: W is read once, in the order of memory */             \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 1)") for (long r = 0; r < n; r += rows) {     \
            long stop = n - r < rows ? n : r + rows;                                                                   \
            for (long i = r; i < stop; i += step)                                                                      \
                for (long from = 0; from < k; from += chunk)                                                           \
                    NAME##_block(w + i * k + from, k, scratch + from, padded, y + i, n, m,                             \
                                 stop - i < step ? stop - i : step, k - from < chunk ? k - from : chunk,               \
                                 bias ? bias + i : 0, from == 0);                                                      \
        }                                                                                                              \
    }

DEFINE(bf16, uint16_t, bf16_low, bf16_high)
DEFINE(f16, uint16_t, f16_low, f16_high)
DEFINE(f32, float, f32_low, f32_high)
