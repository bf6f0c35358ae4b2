/* Products with many rows of x: panels of W are widened and turned once, and all of x passes by each.
 *
 * Every number is summed as the tiles of linear_floats.c sum it: few and many rows give the same answers to the last bit.
 * There, lane l of a vector sums its own numbers of k, and the lanes are added up at the end. Here vectors hold WROWS
 * rows of W instead, and k passes lane by lane: first all that lane 0 would have summed, then lane 1, and so on.
 * Nothing has to be added across a vector, and W is read from the first-level cache. While a panel is multiplied, the
 * numbers of the next one are fetched.
 */
#pragma once
#include "share.h"
#include "vectors.h"

#define WROWS (2 * LANES)
#if LANES == 16
#define XROWS 12 /* 12 x 2 sums of 32 registers */
#define XPART 96 /* rows of x whose sums are kept at a time: 12 KiB of a first-level cache */
#define RUN 512  /* rows of W in a piece of work at most */
#elif LANES == 8
#define XROWS 6 /* 6 x 2 sums, two vectors of W and one number of x fill sixteen registers */
#else
#define XROWS 8
#endif
#ifndef RUN
#define XPART 384
#define RUN 48
#endif
#define PANEL_K 2048 /* numbers of a row in a panel */
#define LINE 64      /* bytes of a cache line */

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
#if LANES == 8
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#elif LANES == 4
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* Rows become lanes and lanes rows: each shuffle is one instruction. */
INLINE void transpose(vf *v) {
#if LANES == 16 /* within quarters of vectors first, then quarters */
#define QUARTERS(a, b, which) (vf)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), which)
    _Pragma("GCC unroll 4") for (int i = 0; i < LANES; i += 4) {
        __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
        __m512d b = (__m512d)_mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
        __m512d c = (__m512d)_mm512_unpacklo_ps((__m512)v[i + 2], (__m512)v[i + 3]);
        __m512d d = (__m512d)_mm512_unpackhi_ps((__m512)v[i + 2], (__m512)v[i + 3]);
        v[i] = (vf)_mm512_unpacklo_pd(a, c), v[i + 1] = (vf)_mm512_unpackhi_pd(a, c);
        v[i + 2] = (vf)_mm512_unpacklo_pd(b, d), v[i + 3] = (vf)_mm512_unpackhi_pd(b, d);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        vf a = QUARTERS(v[i], v[i + 4], 0x88), b = QUARTERS(v[i + 8], v[i + 12], 0x88);
        vf c = QUARTERS(v[i], v[i + 4], 0xdd), d = QUARTERS(v[i + 8], v[i + 12], 0xdd);
        v[i] = QUARTERS(a, b, 0x88), v[i + 4] = QUARTERS(c, d, 0x88);
        v[i + 8] = QUARTERS(a, b, 0xdd), v[i + 12] = QUARTERS(c, d, 0xdd);
    }
#elif LANES == 8 /* halves of vectors first, then within halves */
    vf t[LANES];
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        t[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    _Pragma("GCC unroll 2") for (int i = 0; i < LANES; i += 4) {
        vf a = ZIP_LOW(t[i], t[i + 1]), b = ZIP_HIGH(t[i], t[i + 1]);
        vf c = ZIP_LOW(t[i + 2], t[i + 3]), d = ZIP_HIGH(t[i + 2], t[i + 3]);
        v[i] = SHUFFLE(a, c, 0, 1, 8, 9, 4, 5, 12, 13), v[i + 1] = SHUFFLE(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
        v[i + 2] = SHUFFLE(b, d, 0, 1, 8, 9, 4, 5, 12, 13), v[i + 3] = SHUFFLE(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
    }
#else
    vf a = ZIP_LOW(v[0], v[2]), b = ZIP_HIGH(v[0], v[2]), c = ZIP_LOW(v[1], v[3]), d = ZIP_HIGH(v[1], v[3]);
    v[0] = ZIP_LOW(a, c), v[1] = ZIP_HIGH(a, c), v[2] = ZIP_LOW(b, d), v[3] = ZIP_HIGH(b, d);
#endif
}

/* Numbers between one lane's part of a panel and the next; not a power of two, which a cache would not hold. */
INLINE long lane_stride(long steps) { return (steps + 1) * WROWS; }

/* GROUP numbers of LANES rows of W, ldw bytes apart, to a panel. */
INLINE void pack_group(const enum type type, const char *w, long ldw, float *to, long stride) {
    vf low[LANES], high[LANES];
    if (type == BF16) { /* pairs of numbers are turned as words of 32 bits */
        _Pragma("GCC unroll 16") for (long r = 0; r < LANES; r++) high[r] = f32_low((const float *)(w + r * ldw));
        transpose(high);
        _Pragma("GCC unroll 16") for (long l = 0; l < LANES; l++) {
            low[l] = (vf)((vi)high[l] << 16);
            high[l] = (vf)((vi)high[l] & 0xffff0000u);
        }
    } else {
        _Pragma("GCC unroll 16") for (long r = 0; r < LANES; r++) {
            low[r] = widened(type, 0, w + r * ldw);
            high[r] = widened(type, 1, w + r * ldw);
        }
        transpose(low), transpose(high);
    }
    _Pragma("GCC unroll 16") for (long l = 0; l < LANES; l++) {
        *(vf_u *)(to + l * stride) = low[l];
        *(vf_u *)(to + l * stride + WROWS) = high[l];
    }
}

/* `rows` of W over k numbers to panel [lane][step][WROWS], zero-filled; a step is a vector of a row. */
INLINE void pack(const enum type type, const char *from, long ldw, long rows, long k, float *panel) {
    const long size = size_of(type), steps = (k + GROUP - 1) / GROUP * 2, stride = lane_stride(steps);
    ldw *= size;
    for (long i = 0; i < steps; i += 2, from += GROUP * size, panel += GROUP / LANES * WROWS)
        for (long part = 0; part < WROWS; part += LANES) {
            const char *w = from + part * ldw;
            long left = k - i * LANES < GROUP ? k - i * LANES : GROUP;
            if (part + LANES > rows || left < GROUP) {
                char tail[LANES][GROUP * 4] = {0};
                for (long r = 0; r < LANES && part + r < rows; r++) memcpy(tail[r], w + r * ldw, left * size);
                pack_group(type, tail[0], sizeof tail[0], panel + part, stride);
            } else
                pack_group(type, w, ldw, panel + part, stride);
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

/* Rows of x pass in blocks of XROWS or up to three less, so that none is filled up with zeros. */
INLINE long blocks_of(long m) { return (m + XROWS - 1) / XROWS; }
INLINE long first_of(long m, long b) { return b * m / blocks_of(m); }

/* GROUP numbers of a row of x from the i-th on, zero-filled; `split` gives evens, then odds. */
INLINE void load_group(const product *p, long row, long i, vf *low, vf *high) {
    const float *in = p->from + row * p->ldx + i;
    float part[GROUP] = {0};
    if (i + GROUP > p->k) in = memcpy(part, in, (p->k - i) * sizeof(float));
    if (p->split)
        for (int j = 0; j < LANES; j++) (*low)[j] = in[2 * j], (*high)[j] = in[2 * j + 1];
    else
        *low = f32_low(in), *high = f32_high(in);
}

/* The rows of a block of x to [chunk][lane][block][step][row of the block]. */
static void arrange_block(const void *what, long b) {
    const product own = *(const product *)what, *p = &own; /* known not to change below */
    const long first = first_of(p->m, b), rows = first_of(p->m, b + 1) - first;
    for (long g = 0; g < p->padded; g += GROUP) {
        long start = g / p->chunk * p->chunk, rest = p->padded - start;
        long steps = (rest < p->chunk ? rest : p->chunk) / LANES;
        float *to = p->x + start * p->m + first * steps + (g - start) / LANES * rows;
        for (long c = 0; c < rows; c += LANES) {
            long count = rows - c < LANES ? rows - c : LANES;
            vf low[LANES] = {0}, high[LANES] = {0};
            for (long r = 0; r < count; r++) load_group(p, first + c + r, g, low + r, high + r);
            transpose(low), transpose(high);
            for (long l = 0; l < LANES; l++) {
                store_first(to + c + l * p->m * steps, low[l], count);
                store_first(to + c + l * p->m * steps + rows, high[l], count);
            }
        }
    }
}

/* `rows` rows of x times a panel, over the steps of one lane, added to total [rows][WROWS]. */
INLINE void panel_rows(const int rows, const float *x, const float *w, long steps, float *total) {
    vf acc[XROWS][2] = {0};
    for (long i = 0; i < steps; i++, x += rows, w += WROWS) {
        vf low = f32_low(w), high = f32_high(w);
        _Pragma("GCC unroll 16") for (int c = 0; c < rows; c++) {
            vf one = x[c] - (vf){0};
            acc[c][0] = fma_add(acc[c][0], low, one);
            acc[c][1] = fma_add(acc[c][1], high, one);
        }
    }
    _Pragma("GCC unroll 16") for (int c = 0; c < rows; c++) {
        *(vf_u *)(total + c * WROWS) = f32_low(total + c * WROWS) + acc[c][0];
        *(vf_u *)(total + c * WROWS + LANES) = f32_high(total + c * WROWS) + acc[c][1];
    }
}

/* Not inlined: among the rest of a panel, the compiler finds it fewer registers. */
static __attribute__((noinline)) void panel_tile(long rows, const float *x, const float *w, long steps, float *total) {
    switch (XROWS - rows) {
    case 0: panel_rows(XROWS, x, w, steps, total); break;
    case 1: panel_rows(XROWS - 1, x, w, steps, total); break;
    case 2: panel_rows(XROWS - 2, x, w, steps, total); break;
    case 3: panel_rows(XROWS - 3, x, w, steps, total); break; /* and no less, with MANY rows */
    }
}

/* What of W is fetched while another panel is multiplied: `rows` stretches of `bytes`, `ldw` bytes apart. */
typedef struct {
    const char *from;
    long ldw, rows, bytes, at;
} fetching;

INLINE void fetch(fetching *f, long lines) {
    for (; lines > 0 && f->rows > 0; lines--) {
        __builtin_prefetch(f->from + f->at, 0, 2);
        f->at += LINE;
        if (f->at >= f->bytes) f->at = 0, f->from += f->ldw, f->rows--;
    }
}

/* The sums of `rows` rows of W from r on become numbers of a row of y, or are added to what it has. */
INLINE void write_sums(const product *p, long r, long rows, long from, const float *sums, float *y) {
    long i = 0;
    for (; i + LANES <= rows; i += LANES) {
        vf base = from ? f32_low(y + i) : p->bias ? f32_low(p->bias + r + i) : (vf){0};
        *(vf_u *)(y + i) = base + f32_low(sums + i);
    }
    for (; i < rows; i++) y[i] = (from ? y[i] : p->bias ? p->bias[r + i] : 0) + sums[i];
}

/* Where WROWS numbers from r on of rows [c, stop) of y will be written. */
INLINE void fetch_sums(const product *p, long c, long stop, long r) {
    for (; c < stop; c++)
        for (int i = 0; i < WROWS; i += LANES) __builtin_prefetch(p->y + c * p->n + r + i, 1, 2);
}

/* `rows` rows of W from r on, as a panel of numbers [from, from + chunk) of k, times all of x. */
static void panel_product(const product *p, const float *panel, long r, long rows, long from, fetching *ahead) {
    const long blocks = blocks_of(p->m), steps = (p->padded - from < p->chunk ? p->padded - from : p->chunk) / LANES;
    const long lines = ahead->rows * (ahead->bytes / LINE + 1) / (LANES * blocks) + 1; /* with each tile */
    const float *x = p->x + from * p->m;
    float total[XPART * WROWS] __attribute__((aligned(64)));
    for (long begin = 0; begin < blocks; begin += XPART / XROWS) {
        long end = blocks - begin < XPART / XROWS ? blocks : begin + XPART / XROWS;
        long first = first_of(p->m, begin), stop = first_of(p->m, end);
        memset(total, 0, (stop - first) * WROWS * sizeof(float));
        for (long l = 0; l < LANES; l++)
            for (long b = begin; b < end; b++) {
                long row = first_of(p->m, b);
                fetch(ahead, lines);
                if (!l) fetch_sums(p, row, first_of(p->m, b + 1), r);
                panel_tile(first_of(p->m, b + 1) - row, x + (l * p->m + row) * steps, panel + l * lane_stride(steps), steps,
                           total + (row - first) * WROWS);
            }
        for (long c = first; c < stop; c++)
            write_sums(p, r, rows, from, total + (c - first) * WROWS, p->y + c * p->n + r);
    }
}

/* A product, and how its numbers of `size` bytes become panels. */
typedef struct {
    const product *product;
    long size;
    packer *pack;
} panelling;

/* The panel that follows the one at row r and number `from` of k, if it is of the same piece, which ends at `stop`. */
static fetching next_panel(const product *p, long size, long r, long from, long stop) {
    from += p->chunk;
    if (from >= p->k) r += WROWS, from = 0;
    long rows = stop - r < WROWS ? stop - r : WROWS, k = p->k - from < p->chunk ? p->k - from : p->chunk;
    const char *w = (const char *)p->w + (r * p->k + from) * size;
    return (fetching){w, p->k * size, rows, k * size, 0};
}

static void panel_piece(const void *what, long piece) {
    const panelling *about = what;
    const product *p = about->product;
    const long first = piece * p->rows, stop = p->n - first < p->rows ? p->n : first + p->rows;
    float panel[(PANEL_K + GROUP) * WROWS] __attribute__((aligned(64)));
    for (long r = first; r < stop; r += WROWS)
        for (long from = 0; from < p->k; from += p->chunk) {
            long rows = stop - r < WROWS ? stop - r : WROWS, k = p->k - from < p->chunk ? p->k - from : p->chunk;
            const char *w = (const char *)p->w + (r * p->k + from) * about->size;
            fetching ahead = next_panel(p, about->size, r, from, stop);
            about->pack(w, p->k, rows, k, panel);
            panel_product(p, panel, r, rows, from, &ahead);
        }
}

static void multiply_panels(const product *p, long size, packer *pack, int threads) {
    const panelling about = {p, size, pack};
    qvl_share(blocks_of(p->m), threads, arrange_block, p);
    qvl_share((p->n + p->rows - 1) / p->rows, threads, panel_piece, &about);
}
