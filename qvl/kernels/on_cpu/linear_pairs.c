/* y = x W^T + b on a CPU that multiplies pairs of bf16 fast: W in tiles of pairs, x rounded to bf16, sums in fp32.
 *
 * Knows threads, and how x and W are laid out. Does not know Python. An answer does not depend on its company in a batch:
 * see pairs.h. Without instructions for pairs there is nothing here but the name of none.
 */
#include "pairs.h"

#if defined(AMX) || FAST_PAIRS || defined(QVL_PAIRED)
#include "pairs_tiles.h"
#include "share.h"

#define MULTIPLIES 1
#define PIECE_BYTES (192 * 1024) /* of W in a piece of work, for few rows of x */
#define WORTH 65536              /* numbers, from which threads share the work of writing them elsewhere */

/* Numbers of a row of x that begin at x, `count` of them or a block, to pairs; zeros behind the last one. */
INLINE void round_block(const int gelu, const float *x, long count, uint32_t *to) {
    float part[2 * BLOCK] = {0};
    if (count < 2 * BLOCK) x = memcpy(part, x, count * sizeof(float));
    if (gelu) { /* of zero it is zero */
        for (int i = 0; i < 2 * BLOCK; i += LANES) *(vf_u *)(part + i) = quick_gelu(f32_low(x + i));
        x = part;
    }
    for (int i = 0; i < 2 * BLOCK; i += GROUP) {
        const vf own = rounded_pairs(x + i);
        memcpy(to + i / 2, &own, sizeof own);
    }
}

/* A row of x into its strip. */
static void round_row(const void *what, long row) {
    const product *p = what;
    const long strip = ((row + 1) * strips_of(p->m) - 1) / p->m, first = first_of(p->m, strip);
    const long rows = first_of(p->m, strip + 1) - first;
    const float *x = p->from + row * p->ldx;
    uint32_t *to = p->x + first * p->pairs + (row - first) * BLOCK;
    for (long i = 0; i < p->pairs; i += BLOCK, to += rows * BLOCK)
        if (p->gelu)
            round_block(1, x + 2 * i, p->k - 2 * i, to);
        else
            round_block(0, x + 2 * i, p->k - 2 * i, to);
}

static void tile_piece(const void *what, long piece) {
    const product *p = what;
    const long all = (p->n + TILE - 1) / TILE, first = piece * p->tiles;
    const long last = all - first < p->tiles ? all : first + p->tiles;
    set_up();
    if (p->m > STRIP)
        many_tiles(p, first, last);
    else
        few_tiles(p, first, last);
    tear_down();
}

/* How many tiles of W, of `all`, are a piece of work: an even number, as they meet x in twos. */
static long tiles_of_piece(const product *p, long all, int threads) {
    long tiles = p->m > STRIP ? GROUP_TILES : PIECE_BYTES / (4 * p->pairs * TILE), fair = all / (4 * threads);
    if (tiles > fair) tiles = fair;
    return tiles < 2 ? 2 : tiles + tiles % 2;
}

/* y [m, n] = x [m, k] W^T + bias, or quick_gelu(x) instead of x. `scratch` holds qvl_pairs_scratch bytes. */
void qvl_linear_pairs(const float *x, long ldx, const void *w, const float *bias, float *y, void *scratch, long m, long n,
                      long k, int gelu, int threads) {
    const long all = (n + TILE - 1) / TILE, pairs = (k + 2 * BLOCK - 1) / (2 * BLOCK) * BLOCK;
    product p = {x, bias, w, scratch, y, ldx, m, n, k, pairs, 0, gelu};
    if (!m) return;
    p.tiles = tiles_of_piece(&p, all, threads);
    qvl_share(m, m * k > WORTH ? threads : 1, round_row, &p);
    qvl_share((all + p.tiles - 1) / p.tiles, threads, tile_piece, &p);
}

/* Registers for matrices read sixteen rows, where there may be one. */
long qvl_pairs_scratch(long m, long k) { return 2 * m * (k + 2 * BLOCK) + TILE * BLOCK * (long)sizeof(uint32_t); }

/* Rows [first, first + count) of W [.., k] from bf16, side by side at `from`, to tiles at `to`. */
typedef struct {
    const uint16_t *from;
    uint32_t *to;
    long first, count, k, pairs;
} writing;

/* What there is of a tile, the `piece`th that has some of the rows. */
static void write_tile(const void *what, long piece) {
    const writing *p = what;
    const long t = p->first / TILE + piece, end = p->first + p->count, start = t * TILE > p->first ? t * TILE : p->first;
    const long stop = t * TILE + TILE < end ? t * TILE + TILE : end;
    for (long i = 0; i < p->pairs; i += BLOCK) {
        uint32_t part[TILE][BLOCK] = {{0}}, *to = p->to + (t * p->pairs + i) * TILE;
        const long left = p->k - 2 * i, numbers = left < 2 * BLOCK ? left : 2 * BLOCK;
        for (long r = start; r < stop; r++)
            memcpy(part[r - t * TILE], p->from + (r - p->first) * p->k + 2 * i, numbers * sizeof(uint16_t));
        for (long j = 0; j < BLOCK; j++)
            for (long r = start - t * TILE; r < stop - t * TILE; r++) to[j * TILE + r] = part[r][j];
    }
}

void qvl_write_pairs(const void *from, void *to, long first, long count, long k, int threads) {
    const writing p = {from, to, first, count, k, (k + 2 * BLOCK - 1) / (2 * BLOCK) * BLOCK};
    if (!count) return;
    qvl_share((first + count - 1) / TILE - first / TILE + 1, count * k > WORTH ? threads : 1, write_tile, &p);
}
#endif

/* What multiplies pairs here; null where nothing does so fast. */
const char *qvl_pairs_path(void) {
#if defined(MULTIPLIES)
    return can_meet() ? PATH : 0;
#else
    return 0;
#endif
}
