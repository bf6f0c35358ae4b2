/* A strip of x times two tiles of W by registers for matrices (AMX): see pairs.h.
 *
 * Such a register holds 16 rows of 64 bytes: BLOCK pairs of 16 rows of x, or of a tile of W, which lies in memory as the
 * instruction wants it. One instruction multiplies 32 numbers of 16 rows with those of a tile. All numbers of rows go this
 * way: the instruction sums even and odd numbers apart and then adds them, which vectors do not. With less than 16 rows it
 * reads what lies behind them, and what comes of that is no one's.
 */
#pragma once
#include "pairs.h"

#define SQUARE 16 /* rows of a register */

#if defined(QVL_PAIRED_AMX)
#define REGISTERS_IN_C 1
#endif
#include "matrix_registers.h"

#if !defined(REGISTERS_IN_C)
#define PATH "AMX"
#define MULTIPLY(sums, x, w) _tile_dpbf16ps(sums, x, w)
#else
#define PATH "portable, by matrices"
#define MULTIPLY(sums, x, w) multiply_portably(sums, x, w)

static float number(uint32_t bits) {
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static void multiply_portably(int sums, int x, int w) {
    for (int i = 0; i < SQUARE; i++)
        for (int j = 0; j < TILE; j++) {
            float even = 0, odd = 0;
            for (int k = 0; k < BLOCK; k++) {
                const uint32_t a = matrix_registers[x][i][k], b = matrix_registers[w][k][j];
                even += number(a << 16) * number(b << 16), odd += number(a & 0xffff0000u) * number(b & 0xffff0000u);
            }
            const float sum = number(matrix_registers[sums][i][j]) + (even + odd);
            memcpy(&matrix_registers[sums][i][j], &sum, 4);
        }
}
#endif

INLINE int can_meet(void) { return has_registers(); }
INLINE void set_up(void) { configure_registers(); }
INLINE void tear_down(void) { RELEASE(); }

/* Registers 0 and 1 have the sums of 16 rows of x and two tiles, 2 and 3 those of 16 more rows. */
INLINE void take_registers(const int squares, int begun, vt (*sums)[STRIP]) {
    if (!begun) {
        clear_sums();
        return;
    }
    FILL(0, sums[0]);
    FILL(1, sums[1]);
    if (squares == 1) return;
    FILL(2, sums[0] + SQUARE);
    FILL(3, sums[1] + SQUARE);
}

INLINE void keep_registers(const int squares, vt (*sums)[STRIP]) {
    KEEP(0, sums[0]);
    KEEP(1, sums[1]);
    if (squares == 1) return;
    KEEP(2, sums[0] + SQUARE);
    KEEP(3, sums[1] + SQUARE);
}

/* Lines of W behind each `next` that are fetched with a block from pair i on. x comes without being asked for. */
INLINE void fetch_block(const fetched *f, long i) {
    for (int n = 0; n < 2; n++)
        for (long j = 0; f->on[n] && j < BLOCK; j++) __builtin_prefetch(f->next[n] + (i + j) * f->on[n], 0, 2);
}

INLINE void meet_squares(const int squares, long rows, const uint32_t *x, const uint32_t *w, long apart, long pairs,
                         const fetched *f, int begun, vt (*sums)[STRIP]) {
    take_registers(squares, begun, sums);
    for (long i = 0; i < pairs; i += BLOCK, x += rows * BLOCK, w += BLOCK * TILE) {
        fetch_block(f, i);
        FILL(4, x);
        FILL(6, w);
        MULTIPLY(0, 4, 6);
        FILL(7, w + apart);
        MULTIPLY(1, 4, 7);
        if (squares == 1) continue;
        FILL(5, x + SQUARE * BLOCK);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
    }
    keep_registers(squares, sums);
}

/* `pairs` of a strip of `rows` rows times two tiles, `apart` words from each other; on top of `sums` if they have `begun`. */
static void meet(long rows, const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f, int begun,
                 vt (*sums)[STRIP]) {
    if (rows > SQUARE)
        meet_squares(2, rows, x, w, apart, pairs, f, begun, sums);
    else
        meet_squares(1, rows, x, w, apart, pairs, f, begun, sums);
}
