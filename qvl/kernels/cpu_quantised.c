/* y = x W^T + b on a CPU with weights of 8 or 4 bits and activations rounded to 8 bits as they come.
 *
 * Knows caches and threads. Does not know Python. What a scale covers is summed in whole numbers, exactly; above that
 * stand fp32 sums in one order, so an answer does not depend on its company in a batch.
 *
 * W of 8 bits lies in tiles of ROWS rows, block after block along k: 64 bytes of each row, then the next block. A tile is
 * read from its first byte to its last. How 4 bits lie is told in cpu_four.h.
 */
#include "cpu_codes.h"
#include "cpu_four.h"
#include "cpu_threads.h"
#ifdef WIDE
#include "cpu_masked.h"
#include "cpu_wide.h"
#endif

#define BLOCK_BYTES (192 * 1024) /* a block of W stays in the second-level cache while all of x passes */
#define STREAMS 2                /* tiles that one row of x meets at a time: a processor follows more than one */
#if BYTES == 64
#define COLUMNS8 6
#else
#define COLUMNS8 3 /* 4 x 3 sums and what they need fill sixteen registers */
#endif

static void round_piece(const void *what, long row) {
    const product *p = what;
    const float *from = p->from + row * p->ldx;
    if (!p->wide) {
        round_row(from, p->width, p->k, p->codes + row * p->k, scales_of(p, row, 0), sums_of(p, row, 0));
#ifdef WIDE
        for (long s = 0; p->bits == 8 && p->m >= MASKED_LEAST && s < p->spans; s++)
            p->norms[row * p->spans + s] = largest_norm(
                p->codes + row * p->k + s * SPAN, p->k - s * SPAN < SPAN ? p->k - s * SPAN : SPAN);
#endif
        return;
    }
    int8_t codes[p->k];
    int16_t *to = (int16_t *)p->codes + row * p->k;
    round_row(from, p->width, p->k, codes, scales_of(p, row, 0), sums_of(p, row, 0));
    for (long i = 0; i < p->k; i++) to[i] = codes[i];
}

/* Sums of the rows of tile t so far, and what becomes of them when all of k has passed. */
INLINE vf4 begun(const product *p, long column, long t, long from) {
    vf4 out = {0};
    const float *y = p->y + column * p->n + t * ROWS;
    if (from && t * ROWS + ROWS <= p->n) return *(const vf4_u *)y;
    for (long r = 0; from && t * ROWS + r < p->n; r++) out[r] = y[r];
    return out;
}

INLINE float finished(const product *p, float sum, long r) {
    if (p->row_scales) sum *= p->row_scales[r];
    return p->bias ? sum + p->bias[r] : sum;
}

INLINE void keep(const product *p, long column, long t, vf4 sum, long stop) {
    for (long r = t * ROWS; r < p->n && r < t * ROWS + ROWS; r++)
        p->y[column * p->n + r] = stop == p->k ? finished(p, sum[r - t * ROWS], r) : sum[r - t * ROWS];
}

/* `tiles` of 8 bits, `apart` from each other, against `columns` rows of x over one span. */
INLINE void span8(const int tiles, const int columns, const product *p, const int8_t *w, long apart, long column, long at,
                  long length, vf4 *sum) {
    vd acc[COLUMNS8 > 4 ? COLUMNS8 : 4][ROWS] = {0};
#ifdef WIDE
    if (p->wide)
        wide_dots(columns, w, (const int16_t *)p->codes + column * p->k + at, p->k, length, acc);
    else
#endif
        for (long j = 0; j < length; j += BYTES) {
            UNROLL for (int t = 0; t < tiles; t++) {
                const int8_t *block = w + t * apart + j / BLOCK8 * (ROWS * BLOCK8) + j % BLOCK8;
                UNROLL for (int f = 0; f < ROWS * BYTES; f += 64)
                    __builtin_prefetch(w + t * apart + j * ROWS + AHEAD + f, 0, 2);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    vb wv = LOAD(block + r * BLOCK8);
                    vu u = unsigned8(wv);
                    UNROLL for (int c = 0; c < columns; c++)
                        acc[t + c][r] = dot8(acc[t + c][r], wv, u, LOAD(p->codes + (column + c) * p->k + at + j));
                }
            }
        }
    UNROLL for (int i = 0; i < tiles + columns - 1; i++) {
        vd4 dot = totals(acc[i]);
        long c = column + (columns > 1 ? i : 0);
        for (long b = 0; START8 && b * BLOCK4 < length; b++) dot += START8 * *sums_of(p, c, at + b * BLOCK4);
        sum[i] = scaled_add(sum[i], __builtin_convertvector(dot, vf4), *scales_of(p, c, at / SPAN) - (vf4){0});
    }
}

/* Tiles t, t + apart, ... (`tiles` of them) over [from, stop) of k for `columns` rows of x; one of both numbers is 1. */
INLINE void strip(const int tiles, const int columns, const product *p, long column, long t, long apart,
                  long from, long stop) {
    vf4 sum[COLUMNS8 > 4 ? COLUMNS8 : 4];
    UNROLL for (int i = 0; i < tiles + columns - 1; i++)
        sum[i] = begun(p, column + (columns > 1 ? i : 0), t + (tiles > 1 ? i * apart : 0), from);
    for (long i = from; i < stop; i += SPAN) {
        const int8_t *w = p->w + (t * p->k + i) * ROWS;
        span8(tiles, columns, p, w, apart * p->k * ROWS, column, i, stop - i < SPAN ? stop - i : SPAN, sum);
    }
    UNROLL for (int i = 0; i < tiles + columns - 1; i++)
        keep(p, column + (columns > 1 ? i : 0), t + (tiles > 1 ? i * apart : 0), sum[i], stop);
}

#ifdef WIDE
/* As `strip` with 8 bits, for MASKED_COLUMNS rows of x; `known` [span] of tile t. */
static void masked_strip(const product *p, long column, long t, long from, long stop, const ready *known) {
    vf4 sum[ROWS][MASKED_COLUMNS / 4] = {0};
    for (int c = 0; from && c < MASKED_COLUMNS; c++) {
        vf4 before = begun(p, column + c, t, from);
        for (int r = 0; r < ROWS; r++) sum[r][c / 4][c % 4] = before[r];
    }
    for (long i = from; i < stop; i += SPAN, known++) {
        const int8_t *w = p->w + (t * p->k + i) * ROWS, *x = p->codes + column * p->k + i;
        long length = stop - i < SPAN ? stop - i : SPAN;
        float norm = 0;
        for (int c = 0; c < MASKED_COLUMNS; c++) {
            float own = p->norms[(column + c) * p->spans + i / SPAN];
            norm = own > norm ? own : norm;
        }
        for (int r = 0; r < ROWS; r++) {
            vd acc[MASKED_COLUMNS];
            if (known->norms[r] * norm <= LARGEST)
                masked_span(w + r * BLOCK8, known->less[r], x, p->k, length, 1, acc);
            else
                masked_span(w + r * BLOCK8, known->less[r], x, p->k, length, 0, acc);
            UNROLL for (int c = 0; c < MASKED_COLUMNS / 4; c++)
                sum[r][c] = scaled_add(sum[r][c], __builtin_convertvector(totals(acc + 4 * c), vf4),
                                       *(const vf4_u *)scales_of(p, column + 4 * c, i / SPAN));
        }
    }
    for (int c = 0; c < MASKED_COLUMNS; c++)
        keep(p, column + c, t, (vf4){sum[0][c / 4][c % 4], sum[1][c / 4][c % 4], sum[2][c / 4][c % 4], sum[3][c / 4][c % 4]},
             stop);
}

/* As many rows of x as MASKED_COLUMNS divides; how many that is. */
static long masked_block(const product *p, long first, long last, long from, long stop) {
    if (p->m < MASKED_LEAST) return 0;
    ready known[MOST_READY], *next = known;
    long done = 0, spans = (stop - from + SPAN - 1) / SPAN;
    for (long t = first; t < last; t++)
        for (long i = from; i < stop; i += SPAN)
            prepare(p->w + (t * p->k + i) * ROWS, stop - i < SPAN ? stop - i : SPAN, next++);
    for (; p->m - done >= MASKED_COLUMNS; done += MASKED_COLUMNS)
        for (long t = first; t < last; t++) masked_strip(p, done, t, from, stop, known + (t - first) * spans);
    return done;
}
#else
INLINE long masked_block(const product *p, long first, long last, long from, long stop) { return 0; }
#endif

/* Tiles [first, last) of 8 bits times all of x. */
static void tiles8(const product *p, long first, long last) {
    for (long from = 0; from < p->k; from += K_CHUNK) {
        long stop = p->k - from < K_CHUNK ? p->k : from + K_CHUNK;
        for (long c = masked_block(p, first, last, from, stop); c < p->m; c += COLUMNS8)
            for (long t = first; t < last; t++) switch (p->m - c) {
                case 1: strip(1, 1, p, c, t, 0, from, stop); break;
                case 2: strip(1, 2, p, c, t, 0, from, stop); break;
                case 3: strip(1, 3, p, c, t, 0, from, stop); break;
                case 4: strip(1, COLUMNS8 < 4 ? COLUMNS8 : 4, p, c, t, 0, from, stop); break;
                case 5: strip(1, COLUMNS8 < 5 ? COLUMNS8 : 5, p, c, t, 0, from, stop); break;
                default: strip(1, COLUMNS8, p, c, t, 0, from, stop);
                }
    }
}

/* The same for one row of x. */
static void lone8(const product *p, long first, long last) {
    long apart = (last - first) / STREAMS;
    for (long i = first; i < first + apart; i++) strip(STREAMS, 1, p, 0, i, apart, 0, p->k);
    for (long i = first + apart * STREAMS; i < last; i++) strip(1, 1, p, 0, i, 0, 0, p->k);
}

static void tile_piece(const void *what, long piece) {
    const product *p = what;
    long all = (p->n + p->tile - 1) / p->tile, first = piece * p->tiles, last = all - first < p->tiles ? all : first + p->tiles;
    (p->bits == 4 ? tiles4 : p->m == 1 ? lone8 : tiles8)(p, first, last);
}

/* y [m, n] = x [m, width] W^T + bias. k is width rounded up to whole blocks; `scratch` holds qvl_quantised_scratch bytes. */
void qvl_quantised_linear(int bits, const float *x, long ldx, const int8_t *w, const uint16_t *steps,
                          const float *row_scales, const float *bias, float *y, char *scratch, long m, long n, long width,
                          long k, int threads) {
    long spans = (k + SPAN - 1) / SPAN, padded = m + 8, tile = bits == 8 ? ROWS : TILE4, all = (n + tile - 1) / tile;
    long chunk = k < K_CHUNK || m == 1 ? k : K_CHUNK;
    long tiles = BLOCK_BYTES * 8 / bits / (chunk * tile), fair = all / (4 * threads);
    if (tiles > fair) tiles = fair;
    if (tiles < 1) tiles = 1;
    product p = {bits, 0, w, steps, x, row_scales, bias, y, 0, (float *)scratch, 0, 0, ldx, m, n, width, k, spans, tile, tiles};
    p.norms = p.scales + padded * spans;
    p.sums = (int32_t *)(p.norms + padded * spans);
    p.codes = (int8_t *)(p.sums + padded * spans * PER_SPAN);
#ifdef WIDE
    p.wide = bits == 8 && m > 1 && m < MASKED_LEAST;
    if (p.tiles > MOST_READY * SPAN / K_CHUNK) p.tiles = MOST_READY * SPAN / K_CHUNK;
#endif
    qvl_share(m, m * k > 16384 ? threads : 1, round_piece, &p);
    qvl_share((all + p.tiles - 1) / p.tiles, threads, tile_piece, &p);
}

long qvl_quantised_scratch(long m, long k) { return (m + 8) * (2 * k + 4 * (2 + PER_SPAN) * ((k + SPAN - 1) / SPAN)); }

void qvl_quantise8(const float *x, int8_t *w, float *scales, long first, long count, long width, long k, int threads) {
    const writing p = {x, w, scales, first, width, k};
    qvl_share(count, count * width > 65536 ? threads : 1, write8, &p);
}

void qvl_quantise4(const float *x, uint8_t *w, uint16_t *steps, long first, long count, long width, long k,
                   int threads) {
    const writing p = {x, w, steps, first, width, k};
    qvl_share(count, count * width > 65536 ? threads : 1, write4, &p);
}

const char *qvl_quantised_path(void) { return PATH; }
