/* Products with many rows of x on a processor with registers for matrices (AMX).
 *
 * Such a register holds 16 rows of 64 bytes. One instruction multiplies 64 numbers of 16 rows of x with as many of a tile
 * of W, which lies in memory as the instruction wants it: 16,384 products, where a vector makes 64. W of 4 bits is opened
 * into bytes first. What is summed in whole numbers, and what in fp32 above that, is as eight.h and four.h have it: few
 * and many rows give the same answers to the last bit. Does not know threads.
 */
#pragma once
#include "four.h"

#if defined(__AMX_INT8__) && defined(VNNI) && BYTES == 64 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#define SET_UP(how) _tile_loadconfig(how)
#define TEAR_DOWN() _tile_release()
#define CLEAR(r) _tile_zero(r)
#define FILL(r, from, stride) _tile_loadd(r, from, stride)
#define KEEP(r, to) _tile_stored(r, to, 64)
#define MULTIPLY(sums, x, w) _tile_dpbssd(sums, x, w)
#define SETTLE() __asm__ volatile("" ::: "memory") /* stores come before what reads them without the compiler's knowing */

/* Linux gives a process these registers when it asks (ARCH_REQ_XCOMP_PERM, XTILEDATA), if it has them. */
static int amx_runs(void) {
    static _Atomic int state; /* 0: not asked yet; threads that ask at once get the same answer */
    if (!state) state = syscall(SYS_arch_prctl, 0x1023, 18) ? -1 : 1;
    return state > 0;
}
#elif defined(QVL_PORTABLE) && BYTES == 64 /* the same in C, for tests */
#define AMX 1
static _Thread_local int8_t matrix_registers[8][16][64];
#define SET_UP(how) ((void)(how))
#define TEAR_DOWN() ((void)0)
#define CLEAR(r) memset(matrix_registers[r], 0, 1024)
#define FILL(r, from, stride) \
    for (long i_ = 0; i_ < 16; i_++) memcpy(matrix_registers[r][i_], (from) + i_ * (stride), 64)
#define KEEP(r, to) memcpy(to, matrix_registers[r], 1024)
#define MULTIPLY(sums, x, w) multiply_portably(sums, x, w)
#define SETTLE() ((void)0)
static int amx_runs(void) { return 1; }

static void multiply_portably(int sums, int x, int w) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            int32_t sum;
            memcpy(&sum, matrix_registers[sums][i] + 4 * j, 4);
            for (int k = 0; k < 64; k++) sum += matrix_registers[x][i][k] * matrix_registers[w][k / 4][4 * j + k % 4];
            memcpy(matrix_registers[sums][i] + 4 * j, &sum, 4);
        }
}
#else
static int amx_runs(void) { return 0; }
#endif

#define SQUARE 16 /* rows of x in a register, and rows of W */

/* Whether m rows of x are multiplied here. */
INLINE int amx_takes(long m) { return m > STRIP && amx_runs(); }

/* Rows of x that are held for it, filled up with zeros. */
INLINE long rows_held(long m) { return amx_takes(m) ? (m + SQUARE - 1) / SQUARE * SQUARE : m; }

#if defined(AMX)
#define AMX_CHUNK 1024 /* numbers of two tiles of W that meet all of x: they stay in the first-level cache */
#define STEP 64        /* numbers of k in a register */

/* STEP numbers of `tiles` tiles of W, `apart` bytes from each other, times `strips` times 16 rows of x. Registers 0 to 3
 * have the sums, 4 and 5 x, 6 and 7 W. */
INLINE void amx_step(const int tiles, const int strips, const int8_t *w, long apart, const int8_t *x, long k) {
    FILL(4, x, k);
    if (strips > 1) FILL(5, x + SQUARE * k, k);
    FILL(6, w, 64);
    MULTIPLY(0, 4, 6);
    if (strips > 1) MULTIPLY(1, 5, 6);
    if (tiles == 1) return;
    FILL(7, w + apart, 64);
    MULTIPLY(2, 4, 7);
    if (strips > 1) MULTIPLY(3, 5, 7);
}

/* The same over `length` numbers, to `whole`. */
INLINE void amx_sums(const int tiles, const int strips, const int8_t *w, long apart, const int8_t *x, long k, long length,
                     int32_t (*whole)[SQUARE][TILE]) {
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    for (long i = 0; i < length; i += STEP) amx_step(tiles, strips, w + i * TILE, apart, x + i, k);
    KEEP(0, whole[0]);
    if (strips > 1) KEEP(1, whole[1]);
    if (tiles == 1) return;
    KEEP(2, whole[2]);
    if (strips > 1) KEEP(3, whole[3]);
}

/* Numbers [at, at + length) of k, one span, of `tiles` tiles from t on, times rows of x from `column` on: added to `sums`. */
INLINE void amx_span(const int bits, const int tiles, const int strips, const product *p, const int8_t *w, long apart,
                     long column, long t, long at, long length, float (*sums)[2 * SQUARE][TILE]) {
    const int8_t *x = p->codes + column * p->k + at;
    int32_t whole[PER_SPAN][4][SQUARE][TILE] __attribute__((aligned(64)));
    const long part = bits == 4 ? BLOCK4 : SPAN, parts = (length + part - 1) / part;
    for (long b = 0; b < parts; b++)
        amx_sums(tiles, strips, w + b * part * TILE, apart, x + b * part, p->k, length < part ? length : part, whole[b]);
    for (int i = 0; i < tiles; i++) {
        vn step[PER_SPAN];
        if (bits == 4)
            for (long b = 0; b < parts; b++)
                step[b] = numbers_of(p->steps + (((t + i) * p->k + at) / BLOCK4 + b) * TILE);
        for (int s = 0; s < strips; s++)
            for (int r = 0; r < SQUARE; r++) {
                vn *to = (vn *)sums[i][s * SQUARE + r], out = {0};
                if (bits == 8)
                    out = __builtin_convertvector(*(vd *)whole[0][2 * i + s][r], vn);
                else
                    for (long b = 0; b < parts; b++)
                        out = weighed_add(out, __builtin_convertvector(*(vd *)whole[b][2 * i + s][r], vn), step[b]);
                *to = weighed_add(*to, out, *scales_of(p, column + s * SQUARE + r, at / SPAN) - (vn){0});
            }
    }
}

/* Tiles t and perhaps t + 1, of which numbers [from, stop) of k lie at w, times rows of x from `column` on. */
INLINE void amx_squares(const int bits, const int tiles, const int strips, const product *p, const int8_t *w, long apart,
                        long column, long t, long from, long stop) {
    float sums[2][2 * SQUARE][TILE] __attribute__((aligned(64)));
    long left = p->m - column, rows = left < strips * SQUARE ? left : strips * SQUARE;
    for (int i = 0; i < tiles; i++) {
        take_sums((int)rows, p, column, t + i, from, sums[i]);
        memset(sums[i][rows], 0, (2 * SQUARE - rows) * sizeof sums[i][0]);
    }
    for (long at = from; at < stop; at += SPAN)
        amx_span(bits, tiles, strips, p, w + (at - from) * TILE, apart, column, t, at, stop - at < SPAN ? stop - at : SPAN,
                 sums);
    for (int i = 0; i < tiles; i++) keep_sums((int)rows, p, column, t + i, stop, sums[i]);
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

/* Tiles [first, last) times all of x. */
INLINE void amx_tiles(const int bits, const product *p, long first, long last) {
    static const struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } how = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    int8_t opened[2 * AMX_CHUNK * TILE] __attribute__((aligned(64)));
    SET_UP(&how);
    for (long from = 0; from < p->k; from += AMX_CHUNK) {
        long stop = p->k - from < AMX_CHUNK ? p->k : from + AMX_CHUNK;
        for (long t = first; t < last; t += 2) {
            const int8_t *w = p->w + (t * p->k + from) * TILE * bits / 8;
            long apart = p->k * TILE;
            if (bits == 4) {
                open_tile(w, stop - from, opened);
                if (t + 1 < last) open_tile(w + p->k * TILE / 2, stop - from, opened + AMX_CHUNK * TILE);
                SETTLE();
                w = opened, apart = AMX_CHUNK * TILE;
            }
            for (long c = 0; c < p->m; c += 2 * SQUARE)
                switch ((t + 1 < last) * 2 + (p->m - c > SQUARE)) {
                case 0: amx_squares(bits, 1, 1, p, w, apart, c, t, from, stop); break;
                case 1: amx_squares(bits, 1, 2, p, w, apart, c, t, from, stop); break;
                case 2: amx_squares(bits, 2, 1, p, w, apart, c, t, from, stop); break;
                case 3: amx_squares(bits, 2, 2, p, w, apart, c, t, from, stop); break;
                }
        }
    }
    TEAR_DOWN();
}
#endif
