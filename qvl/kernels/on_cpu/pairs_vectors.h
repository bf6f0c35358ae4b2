/* A strip of x times two tiles of W by vectors: each of their sums belongs to a row of W, and x comes a pair at a time, the
 * same for all rows. See pairs.h.
 */
#pragma once
#include "pairs.h"

#if defined(PAIR_INSTRUCTION)
#define PATH "AVX-512 BF16"
#else
#define PATH "portable"
#endif

/* The products of a pair of each row of W with a pair of x, added by an instruction that stays where it stands: the
 * compiler would rather spill sums for what it moves forward. */
INLINE void add_products(vt *sum, vp w, vp x) {
#if defined(PAIR_INSTRUCTION)
    __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(w), "v"(x));
#else
    *sum += (vt)(w & 0xffff0000u) * (vt)(x & 0xffff0000u);
    *sum += (vt)(w << 16) * (vt)(x << 16);
#endif
}

/* As `meet`. */
INLINE void multiply(const int rows, const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f,
                     int begun, vt (*sums)[STRIP]) {
    const uint32_t *next0 = f->next[0], *next1 = f->next[1];
    const long on0 = f->on[0], on1 = f->on[1], strip = f->strip;
    vt sum[2][STRIP];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 2; t++) sum[t][r] = begun ? sums[t][r] : (vt){0};
    for (long i = 0; i < pairs; i += BLOCK, x += BLOCK * rows) {
        UNROLL for (int r = 0; r < rows; r++) __builtin_prefetch(x + strip + r * BLOCK, 0, 3);
        _Pragma("GCC unroll 4") for (int j = 0; j < BLOCK; j++, w += TILE, next0 += on0, next1 += on1) {
            const vp own0 = *(const vp *)w, own1 = *(const vp *)(w + apart);
            __builtin_prefetch(next0, 0, 2), __builtin_prefetch(next1, 0, 2);
            UNROLL for (int r = 0; r < rows; r++) {
                const vp same = x[r * BLOCK + j] - (vp){0};
                add_products(&sum[0][r], own0, same), add_products(&sum[1][r], own1, same);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < 2; t++) sums[t][r] = sum[t][r];
}

typedef void multiplier(const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f, int begun,
                        vt (*sums)[STRIP]);

#define DEFINE(ROWS)                                                                                                   \
    static void multiply##ROWS(const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f,         \
                               int begun, vt (*sums)[STRIP]) {                                                         \
        multiply(ROWS, x, w, apart, pairs, f, begun, sums);                                                            \
    }
DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4) DEFINE(5) DEFINE(6) DEFINE(7) DEFINE(8) DEFINE(9) DEFINE(10) DEFINE(11) DEFINE(12)

static multiplier *const by_rows[STRIP + 1] = {0,         multiply1, multiply2, multiply3,  multiply4,  multiply5, multiply6,
                                               multiply7, multiply8, multiply9, multiply10, multiply11, multiply12};

/* `pairs` of a strip of `rows` rows times two tiles, `apart` words from each other; on top of `sums` if they have `begun`. */
INLINE void meet(long rows, const uint32_t *x, const uint32_t *w, long apart, long pairs, const fetched *f, int begun,
                 vt (*sums)[STRIP]) {
    by_rows[rows](x, w, apart, pairs, f, begun, sums);
}

INLINE void set_up(void) {}
INLINE void tear_down(void) {}
static int can_meet(void) { return 1; }
