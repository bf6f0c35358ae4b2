/* Products with many rows of x: panels of W are widened and turned once, and all of x passes by each.
 *
 * Every number is summed as the tiles of linear_floats.c sum it: few and many rows give the same answers to the last bit.
 * There, lane l of a vector sums its own numbers of k, and the lanes are added up at the end. Here vectors hold WROWS
 * rows of W instead, and k passes lane by lane: first all that lane 0 would have summed, then lane 1, and so on.
 * Nothing has to be added across a vector, and W is read from the first-level cache.
 */
#pragma once
#include "share.h"
#include "vectors.h"

#define WROWS (2 * LANES)
#if LANES == 16
#define XROWS 12
#elif LANES == 8
#define XROWS 6 /* 6 x 2 sums, two vectors of W and one number of x fill sixteen registers */
#else
#define XROWS 8
#endif
#define XPART 384    /* rows of x whose sums are kept at a time */
#define PANEL_K 2048 /* numbers of a row in a panel */

#define UNROLL4 _Pragma("GCC unroll 4")
enum type { BF16, F16, F32 };

INLINE long size_of(const enum type type) { return type == F32 ? 4 : 2; }

/* One half of GROUP numbers of W. */
INLINE vf widened(const enum type type, const int half, const char *w) {
    switch (type) {
    case BF16: return half ? bf16_high((const uint16_t *)w) : bf16_low((const uint16_t *)w);
    case F16: return half ? f16_high((const uint16_t *)w) : f16_low((const uint16_t *)w);
    default: return half ? f32_high((const float *)w) : f32_low((const float *)w);
    }
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vs){__VA_ARGS__})
#endif
#if LANES == 16
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* Rows become lanes and lanes rows: each zip turns the bits of a number's place (row, lane) round by one. */
INLINE void transpose(vf *v) {
    _Pragma("GCC unroll 4") for (int half = 1; half < LANES; half *= 2) {
        vf turned[LANES];
        _Pragma("GCC unroll 8") for (int i = 0; i < LANES / 2; i++) {
            turned[2 * i] = ZIP_LOW(v[i], v[i + LANES / 2]);
            turned[2 * i + 1] = ZIP_HIGH(v[i], v[i + LANES / 2]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) v[i] = turned[i];
    }
}

/* Numbers between one lane's part of a panel and the next; not a power of two, which a cache would not hold. */
INLINE long lane_stride(long steps) { return (steps + 1) * WROWS; }

/* `rows` of W over k numbers to panel [lane][step][WROWS], zero-filled; a step is a vector of a row. */
INLINE void pack(const enum type type, const char *from, long ldw, long rows, long k, float *panel) {
    const long size = size_of(type), steps = (k + GROUP - 1) / GROUP * 2, stride = lane_stride(steps);
    for (long i = 0; i < steps; i += 2)
        for (long part = 0; part < WROWS; part += LANES) {
            vf low[LANES], high[LANES];
            _Pragma("GCC unroll 16") for (long r = 0; r < LANES; r++) {
                const char *in = from + ((part + r) * ldw + i * LANES) * size;
                char tail[GROUP * 4] = {0};
                long left = part + r < rows ? k - i * LANES : 0;
                if (left < GROUP) in = left > 0 ? memcpy(tail, in, left * size) : tail;
                low[r] = widened(type, 0, in), high[r] = widened(type, 1, in);
            }
            transpose(low), transpose(high);
            float *to = panel + i * WROWS + part;
            _Pragma("GCC unroll 16") for (long l = 0; l < LANES; l++) {
                *(vf_u *)(to + l * stride) = low[l];
                *(vf_u *)(to + l * stride + WROWS) = high[l];
            }
        }
}
static void pack_bf16(const void *w, long ldw, long rows, long k, float *panel) { pack(BF16, w, ldw, rows, k, panel); }
static void pack_f16(const void *w, long ldw, long rows, long k, float *panel) { pack(F16, w, ldw, rows, k, panel); }
static void pack_f32(const void *w, long ldw, long rows, long k, float *panel) { pack(F32, w, ldw, rows, k, panel); }
typedef void packer(const void *from, long ldw, long rows, long k, float *panel);

/* What one call computes: y [m, n] = x W^T + bias, W [n, k]; `x` is what the rows of x `from` become, padded and in
 * another order. `chunk` numbers of k are summed at a time; `rows` of W are a piece of work. */
typedef struct {
    const float *from, *bias;
    const void *w;
    float *x, *y;
    long ldx, m, n, k, padded, chunk, rows;
    int split;
} product;

/* XROWS rows of x to [chunk][lane][block of XROWS rows][step][XROWS], zero-filled; `split` as in `arrange_row`. */
static void arrange_block(const void *what, long b) {
    const product own = *(const product *)what, *p = &own; /* known not to change below */
    long blocks = (p->m + XROWS - 1) / XROWS;
    for (long g = 0; g < p->padded; g += GROUP) {
        long start = g / p->chunk * p->chunk, rest = p->padded - start;
        long steps = (rest < p->chunk ? rest : p->chunk) / LANES;
        float *to = p->x + start * blocks * XROWS + (b * steps + (g - start) / LANES) * XROWS;
        for (int j = 0; j < GROUP; j++) {
            long half = p->split ? j % 2 : j / LANES, lane = p->split ? j / 2 : j % LANES;
            float *place = to + (lane * blocks * steps + half) * XROWS;
            for (long c = 0; c < XROWS; c++) {
                long row = b * XROWS + c;
                place[c] = row < p->m && g + j < p->k ? p->from[row * p->ldx + g + j] : 0;
            }
        }
    }
}

/* XROWS rows of x times a panel, over the steps of one lane, added to total [XROWS][WROWS]. */
static void panel_tile(const float *x, const float *w, long steps, float *total) {
    vf acc[XROWS][2] = {0};
    for (long i = 0; i < steps; i++, x += XROWS, w += WROWS) {
        vf low = f32_low(w), high = f32_high(w);
        _Pragma("GCC unroll 16") for (int c = 0; c < XROWS; c++) {
            vf one = x[c] - (vf){0};
            acc[c][0] = fma_add(acc[c][0], low, one);
            acc[c][1] = fma_add(acc[c][1], high, one);
        }
    }
    _Pragma("GCC unroll 16") for (int c = 0; c < XROWS; c++) {
        *(vf_u *)(total + c * WROWS) = f32_low(total + c * WROWS) + acc[c][0];
        *(vf_u *)(total + c * WROWS + LANES) = f32_high(total + c * WROWS) + acc[c][1];
    }
}

/* `rows` rows of W from r on, as a panel of numbers [from, from + chunk) of k, times all of x. */
static void panel_product(const product *p, const float *panel, long r, long rows, long from) {
    long blocks = (p->m + XROWS - 1) / XROWS;
    long steps = (p->padded - from < p->chunk ? p->padded - from : p->chunk) / LANES;
    const float *x = p->x + from * blocks * XROWS;
    float total[XPART * WROWS] __attribute__((aligned(64)));
    for (long first = 0; first < p->m; first += XPART) {
        long stop = p->m - first < XPART ? p->m - first : XPART, some = (stop + XROWS - 1) / XROWS;
        memset(total, 0, some * XROWS * WROWS * sizeof(float));
        for (long l = 0; l < LANES; l++)
            for (long b = 0; b < some; b++)
                panel_tile(x + (l * blocks + first / XROWS + b) * steps * XROWS, panel + l * lane_stride(steps), steps,
                           total + b * XROWS * WROWS);
        for (long c = 0; c < stop; c++) {
            float *y = p->y + (first + c) * p->n + r;
            for (long i = 0; i < rows; i++)
                y[i] = (from ? y[i] : p->bias ? p->bias[r + i] : 0) + total[c * WROWS + i];
        }
    }
}

/* A product, and how its numbers of `size` bytes become panels. */
typedef struct {
    const product *product;
    long size;
    packer *pack;
} panelling;

static void panel_piece(const void *what, long piece) {
    const panelling *about = what;
    const product *p = about->product;
    float panel[(PANEL_K + GROUP) * WROWS] __attribute__((aligned(64)));
    long r = piece * WROWS, rows = p->n - r < WROWS ? p->n - r : WROWS;
    for (long from = 0; from < p->k; from += p->chunk) {
        long k = p->k - from < p->chunk ? p->k - from : p->chunk;
        about->pack((const char *)p->w + (r * p->k + from) * about->size, p->k, rows, k, panel);
        panel_product(p, panel, r, rows, from);
    }
}

static void multiply_panels(const product *p, long size, packer *pack, int threads) {
    const panelling about = {p, size, pack};
    qvl_share((p->m + XROWS - 1) / XROWS, threads, arrange_block, p);
    qvl_share((p->n + WROWS - 1) / WROWS, threads, panel_piece, &about);
}
