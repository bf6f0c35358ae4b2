/* y = x W^T + b on a CPU with weights of 8 or 4 bits and activations rounded to 8 bits as they come.
 *
 * Knows caches and threads. Does not know Python. What a scale covers is summed in whole numbers, exactly; above that
 * stand fp32 sums in one order, so an answer does not depend on its company in a batch.
 *
 * W lies in tiles of 16 rows side by side: see tiles.h. A tile is read from its first byte to its last; more rows of x
 * than it meets at a time pass by while a chunk of it is in a cache, and a block of them meets the next tiles first. With
 * vectors of 64 bytes many.h does that.
 */
#include "amx.h"
#include "many.h"
#include "share.h"

#define STREAMS 2                /* tiles that one row of x meets at a time: a processor follows more than one */
#define PIECE_BYTES (192 * 1024) /* of W in a piece of work */
#if BYTES == 64
#define X_ROWS STRIP /* more rows of x are taken by many.h, */
#define MANY_TILES GROUP_TILES
#else
#define K_CHUNK 2048 /* numbers of the rows of a tile that meet rows of x, out of a first-level cache, */
#define X_ROWS 64    /* so many at a time, which all tiles of a piece meet in turn */
#define MANY_TILES 8 /* of a piece when there are more rows of x */
#endif

static void round_piece(const void *what, long row) {
    const product *p = what;
    const int sixteen = side_by_side(p->m);
    int8_t *codes = p->codes + (sixteen ? place_of(p, row) : row * p->k);
#if defined(WIDE)
    if (p->bits == 8) codes = p->codes + row * p->k * BYTES8 + p->k; /* where part_signs looks for them */
#endif
    const long apart = sixteen ? SQUARE * BLOCK8 : BLOCK8;
    const float *x = p->from + row * p->ldx;
    if (row < p->m && p->gelu)
        round_row(1, x, p->width, p->k, codes, apart, scales_of(p, row, 0), sums_of(p, row, 0));
    else if (row < p->m)
        round_row(0, x, p->width, p->k, codes, apart, scales_of(p, row, 0), sums_of(p, row, 0));
    else { /* filling */
        for (long j = 0; j < p->k / BLOCK8; j++) memset(codes + j * apart, 0, BLOCK8);
        memset(scales_of(p, row, 0), 0, p->spans * sizeof(float));
        memset(sums_of(p, row, 0), 0, p->spans * PER_SPAN * sizeof(int32_t));
    }
#if defined(WIDE)
    if (p->bits == 8) part_signs(codes - p->k, p->k, sums_of(p, row, 0));
#endif
}

/* Tiles t, t + apart, ... (`tiles` of them) times `columns` rows of x over [from, stop) of k. */
INLINE void tile(const int bits, const int tiles, const int columns, const product *p, long column, long t, long apart,
                 long from, long stop) {
    float sums[SUMS][TILE];
    for (int i = 0; i < tiles; i++) take_sums(columns, p, column, t + i * apart, from, sums + i * columns);
    for (long at = from; at < stop; at += SPAN) {
        const int8_t *w = p->w + (t * p->k + at) * TILE * bits / 8;
        long length = stop - at < SPAN ? stop - at : SPAN;
        vn out[SUMS][BESIDE];
        if (bits == 4)
            span4(tiles, columns, p, w, p->steps + (t * p->k + at) / BLOCK4 * TILE, apart, column, at, length, out);
        else
            span8(tiles, columns, p, w, apart * p->k * TILE, column, at, length, out);
        UNROLL for (int i = 0; i < tiles * columns; i++)
            UNROLL for (int v = 0; v < BESIDE; v++) {
                vn_u *to = (vn_u *)(sums[i] + v * (BYTES / 4));
                *to = weighed_add(*to, out[i][v], *scales_of(p, column + i % columns, at / SPAN) - (vn){0});
            }
    }
    for (int i = 0; i < tiles; i++) keep_sums(columns, p, column, t + i * apart, stop, sums + i * columns);
}

/* Tiles [first, last) times the only row of x. */
INLINE void lone(const int bits, const product *p, long first, long last) {
    long apart = (last - first) / STREAMS;
    for (long t = first; t < first + apart; t++) tile(bits, STREAMS, 1, p, 0, t, apart, 0, p->k);
    for (long t = first + apart * STREAMS; t < last; t++) tile(bits, 1, 1, p, 0, t, 0, 0, p->k);
}

/* Tile t times rows [c, end) of x over [from, stop) of k. */
INLINE void strips(const int bits, const product *p, long t, long c, long end, long from, long stop) {
    for (long left; (left = end - c) > 0; c += left >= STRIP ? STRIP : left < 4 ? left : 4)
        switch (left >= STRIP ? STRIP : left) {
        case 1: tile(bits, 1, 1, p, c, t, 0, from, stop); break;
        case 2: tile(bits, 1, 2, p, c, t, 0, from, stop); break;
        case 3: tile(bits, 1, 3, p, c, t, 0, from, stop); break;
        case STRIP: tile(bits, 1, STRIP, p, c, t, 0, from, stop); break;
#if STRIP > 4
        default: tile(bits, 1, 4, p, c, t, 0, from, stop);
#endif
        }
}

/* Tiles [first, last) times rows [top, end) of x over [from, stop) of k. */
INLINE void block(const int bits, const product *p, long first, long last, long top, long end, long from, long stop) {
    for (long t = first; t < last; t++)
        if (PAIR > 1 && end - top == STRIP && t + 1 < last)
            tile(bits, PAIR, STRIP, p, top, t++, 1, from, stop);
        else
            strips(bits, p, t, top, end, from, stop);
}

#if BYTES == 64
/* In functions of their own: the compiler aligns the loops of one that it takes for the busiest there. */
static __attribute__((noinline)) void many_of_8(const product *p, long first, long last) { many_tiles(8, p, first, last); }
static __attribute__((noinline)) void many_of_4(const product *p, long first, long last) { many_tiles(4, p, first, last); }

/* Tiles [first, last) times all of x. */
INLINE void tiles(const int bits, const product *p, long first, long last) {
    if (p->m > STRIP)
        bits == 4 ? many_of_4(p, first, last) : many_of_8(p, first, last);
    else
        block(bits, p, first, last, 0, p->m, 0, p->k);
}
#else
INLINE void tiles(const int bits, const product *p, long first, long last) {
    const long chunk = p->m <= STRIP ? p->k : K_CHUNK;
    for (long from = 0; from < p->k; from += chunk)
        for (long top = 0; top < p->m; top += X_ROWS)
            block(bits, p, first, last, top, p->m - top < X_ROWS ? p->m : top + X_ROWS, from,
                  p->k - from < chunk ? p->k : from + chunk);
}
#endif

static void tile_piece(const void *what, long piece) {
    const product *p = what;
    long all = (p->n + TILE - 1) / TILE, first = piece * p->tiles, last = all - first < p->tiles ? all : first + p->tiles;
#if defined(AMX)
    if (amx_takes(p->m)) {
        p->bits == 4 ? amx_tiles(4, p, first, last) : amx_tiles(8, p, first, last);
        return;
    }
#endif
    if (p->m == 1)
        p->bits == 4 ? lone(4, p, first, last) : lone(8, p, first, last);
    else
        p->bits == 4 ? tiles(4, p, first, last) : tiles(8, p, first, last);
}

/* How many tiles of W, of `all`, are a piece of work. */
static long tiles_of_piece(int bits, long m, long k, long all, int threads) {
    long tiles = amx_takes(m) ? AMX_TILES : PIECE_BYTES * 8 / bits / (k * TILE), fair = all / (4 * threads);
    if (m > X_ROWS && tiles < MANY_TILES) tiles = MANY_TILES;
    if (tiles > fair) tiles = fair;
    if (tiles < 1) tiles = 1;
    return m > X_ROWS && BYTES == 64 ? tiles + tiles % 2 : tiles; /* they meet x in pairs */
}

/* y [m, n] = x [m, width] W^T + bias, or quick_gelu(x) instead of x. k is width rounded up to whole blocks; `scratch` holds
 * qvl_quantised_scratch bytes. */
void qvl_quantised_linear(int bits, int gelu, const float *x, long ldx, const int8_t *w, const uint16_t *steps,
                          const float *row_scales, const float *bias, float *y, char *scratch, long m, long n, long width,
                          long k, int threads) {
    long spans = (k + SPAN - 1) / SPAN, all = (n + TILE - 1) / TILE, held = rows_held(m);
    long tiles = tiles_of_piece(bits, m, k, all, threads);
    product p = {bits, gelu, w, steps, x, row_scales, bias, y, 0, (float *)scratch, 0, ldx, m, n, width, k, spans, tiles};
    p.sums = (int32_t *)(p.scales + held * spans);
    p.codes = (int8_t *)(p.sums + held * spans * PER_SPAN);
    qvl_share(m > STRIP ? held : m, m * k > 16384 ? threads : 1, round_piece, &p);
    qvl_share((all + p.tiles - 1) / p.tiles, threads, tile_piece, &p);
}

long qvl_quantised_scratch(long m, long k) {
    return rows_held(m) * (k * BYTES8 + 4 * (1 + PER_SPAN) * ((k + SPAN - 1) / SPAN));
}

void qvl_quantise8(const float *x, int8_t *w, float *scales, long first, long count, long width, long k, int threads) {
    const writing p = {x, w, scales, first, width, k};
    qvl_share(count, count * width > 65536 ? threads : 1, write8, &p);
}

void qvl_quantise4(const float *x, uint8_t *w, uint16_t *steps, long first, long count, long width, long k,
                   int threads) {
    const writing p = {x, w, steps, first, width, k};
    qvl_share(count, count * width > 65536 ? threads : 1, write4, &p);
}

const char *qvl_quantised_path(void) { return has_registers() ? PATH " and AMX" : PATH; }
