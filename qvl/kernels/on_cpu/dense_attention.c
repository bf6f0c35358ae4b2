/* Attention of many queries at once, in bf16 with fp32 sums: within pictures, and of prompts over a paged cache.
 *
 * Queries, keys, values and weights are rounded to bf16. Keys and values are packed once a call, by panels of PANEL
 * tokens; ROWS queries at a time go past the panels, with a running largest score and sum of weights (the arithmetic
 * stands in dense.h). So what is computed for a query depends neither on others nor on how a prompt was cut into chunks.
 * Does not know Python.
 */
#include "dense.h"
#include "share.h"

#define AHEAD 8      /* tokens whose keys and values are fetched before they are needed */
#define SMALL 262144 /* below so many products a second thread costs more than it saves */

/* `segments` of `length` tokens each, of which the last `rows` are the queries. Head h of queries sees head h / group
 * of keys and values. Rows of q stand q_stride numbers apart, those of keys and values kv_stride. Without `blocks` keys
 * and values are fp32, and queries and keys are turned by their angles [token, dim]. With them keys and values are bf16,
 * and token t of the only segment lies in row blocks[t / block_size] * block_size + t % block_size. */
typedef struct {
    const float *q, *cosine, *sine;
    const void *keys, *values;
    const int64_t *blocks;
    float *out;
    uint32_t *packed;
    long q_stride, kv_stride, heads, group, dim, segments, length, rows, block_size;
    int causal;
    float scale;
} dense;

INLINE long panels_of(const dense *p) { return (p->length + PANEL - 1) / PANEL; }
INLINE long wide(const dense *p) { return (p->dim + 15) / 16 * 16; } /* a row of values, filled with zeros */

INLINE long side_of(const dense *p, long from) { return wide(p) - from < SIDE ? wide(p) - from : SIDE; }
INLINE long panel_words(const dense *p) { return PANEL * (p->dim + wide(p)) / 2; }

INLINE const uint32_t *packed_head(const dense *p, long segment, long head) {
    return p->packed + (segment * (p->heads / p->group) + head) * panels_of(p) * panel_words(p);
}

/* Pairs (i, i + half) of a row turned by their angles. The last vector overlaps the one before. */
INLINE void turn(const float *from, const float *cosine, const float *sine, long half, float *to) {
    for (long i = 0; i < half; i += LANES) {
        if (half < LANES) {
            for (; i < half; i++) {
                to[i] = from[i] * cosine[i] - from[i + half] * sine[i];
                to[i + half] = from[i + half] * cosine[i + half] + from[i] * sine[i + half];
            }
            return;
        }
        if (i > half - LANES) i = half - LANES;
        vf low = f32_low(from + i), high = f32_low(from + i + half);
        *(vf_u *)(to + i) = low * f32_low(cosine + i) - high * f32_low(sine + i);
        *(vf_u *)(to + i + half) = high * f32_low(cosine + i + half) + low * f32_low(sine + i + half);
    }
}

/* A row of dim numbers, turned by its token's angles if asked for, times scale, in bf16 with zeros behind it. */
INLINE void narrow_row(const dense *p, const float *from, int turned, long token, float scale, uint16_t *to) {
    float row[MAX_DIM + LANES];
    if (turned) turn(from, p->cosine + token * p->dim, p->sine + token * p->dim, p->dim / 2, row);
    else memcpy(row, from, p->dim * sizeof(float));
    for (long i = p->dim; i < wide(p); i++) row[i] = 0;
    for (long i = 0; i < wide(p); i += LANES) *(vh_u *)(to + i) = bf16_of(f32_low(row + i) * scale);
}

/* Where a token's keys or values stand. */
INLINE const void *row_of(const dense *p, const void *from, long token, long head) {
    if (!p->blocks) return (const float *)from + token * p->kv_stride + head * p->dim;
    long row = p->blocks[token / p->block_size] * p->block_size + token % p->block_size;
    return (const uint16_t *)from + row * p->kv_stride + head * p->dim;
}

/* A row that is needed soon: rows of a head stand too far apart for the processor to foresee. */
INLINE void prefetch(const void *row, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + i);
}

/* Keys, which are turned, or values of a token in bf16, zeros behind them. */
static void fetch_row(const dense *p, int keys, long token, long head, uint16_t *to) {
    const void *from = keys ? p->keys : p->values, *own = row_of(p, from, token, head);
    if (token + AHEAD < p->segments * p->length)
        prefetch(row_of(p, from, token + AHEAD, head), p->dim * (p->blocks ? 2 : 4));
    if (p->blocks) {
        memcpy(to, own, p->dim * 2);
        memset(to + p->dim, 0, (wide(p) - p->dim) * 2);
    } else {
        narrow_row(p, own, keys && p->cosine, token, 1.0f, to);
    }
}

/* A panel of one head. Keys are words [PANEL / SIDE][dim / 2][SIDE] of a token's neighbouring numbers, values words
 * [PANEL / 2][SIDE] of neighbouring tokens, SIDE columns after SIDE columns, the last of which may be fewer. Zeros stand
 * where there are no tokens. */
static void pack_panel(const void *what, long piece) {
    const dense *p = what;
    long panels = panels_of(p), panel = piece % panels, kv_heads = p->heads / p->group, pairs = p->dim / 2;
    long head = piece / panels % kv_heads, segment = piece / panels / kv_heads, first = panel * PANEL;
    uint32_t *keys = (uint32_t *)packed_head(p, segment, head) + panel * panel_words(p), *values = keys + PANEL * pairs;
    for (long t = 0; t < PANEL; t += 2) {
        uint16_t key[2][MAX_DIM], value[2][MAX_DIM];
        for (long i = 0; i < 2; i++)
            if (first + t + i < p->length) {
                fetch_row(p, 1, segment * p->length + first + t + i, head, key[i]);
                fetch_row(p, 0, segment * p->length + first + t + i, head, value[i]);
            } else {
                memset(key[i], 0, wide(p) * 2), memset(value[i], 0, wide(p) * 2);
            }
        uint32_t *to = keys + t / SIDE * SIDE * pairs + t % SIDE;
        for (long i = 0; i < pairs; i++, to += SIDE)
            for (long j = 0; j < 2; j++) memcpy(to + j, key[j] + 2 * i, sizeof *to);
        for (long from = 0; from < wide(p); from += SIDE) {
            long side = side_of(p, from);
            to = values + from * (PANEL / 2) + t / 2 * side;
            for (long i = 0; i < side; i++) to[i] = value[0][from + i] | (uint32_t)value[1][from + i] << 16;
        }
    }
}

/* How many tokens a row of queries sees. */
INLINE long seen_by(const dense *p, long row) { return p->causal ? p->length - p->rows + row + 1 : p->length; }

/* `count` queries past a panel that begins at token `first`. */
static void attend_panel(const dense *p, work_of_piece *w, const uint32_t *keys, long row, long count, long first) {
    const uint32_t *values = keys + PANEL * p->dim / 2;
    long pairs = p->dim / 2, seen[ROWS];
    for (long r = 0; r < ROWS; r++) {
        long own = seen_by(p, row + (r < count ? r : count - 1)) - first;
        seen[r] = own < 0 ? 0 : own > PANEL ? PANEL : own;
    }
    for (long t = 0; t < PANEL; t += SIDE)
        for (long r = 0; r < count; r += TILE)
            if (t < seen[r + TILE - 1]) score_side(w->queries[r / TILE][0], keys + t * pairs, pairs, w->scores[r] + t);
    for (long r = 0; r < count; r++) {
        long most = seen[r / TILE * TILE + TILE - 1]; /* of its tile: so far there are scores, by SIDE */
        weigh_row(w, r, seen[r], (most + SIDE - 1) / SIDE * SIDE);
    }
    for (long from = 0; from < wide(p); from += SIDE, values += SIDE * (PANEL / 2))
        for (long r = 0; r < count; r += TILE)
            add_panel(w, r, values, side_of(p, from), (seen[r + TILE - 1] + 1) / 2, from);
}

/* Queries of a head as words [dim / 2][TILE], the powers of two of whose products are the weights. */
static void pack_queries(const dense *p, work_of_piece *w, long token, long head, long count) {
    const float *from = p->q + token * p->q_stride + head * p->dim;
    for (long r = 0; r < count; r++) prefetch(from + r * p->q_stride, p->dim * 4);
    for (long r = 0; r < count; r++) {
        uint16_t row[MAX_DIM];
        narrow_row(p, from + r * p->q_stride, p->cosine != 0, token + r, p->scale, row);
        for (long i = 0; i < p->dim / 2; i++) memcpy(&w->queries[r / TILE][i][r % TILE], row + 2 * i, sizeof(uint32_t));
    }
}

static void attend_rows(const void *what, long piece) {
    const dense *p = what;
    long blocks = (p->rows + ROWS - 1) / ROWS, row = piece % blocks * ROWS, head = piece / blocks % p->heads;
    long segment = piece / blocks / p->heads, count = p->rows - row < ROWS ? p->rows - row : ROWS;
    const uint32_t *panels = packed_head(p, segment, head / p->group);
    work_of_piece w;
    if (count % TILE) memset(w.queries[count / TILE], 0, sizeof w.queries[0]);
    for (long r = 0; r < ROWS; r++) {
        w.top[r] = -INFINITY, w.total[r] = (vf){0};
        memset(w.sums[r], 0, wide(p) * sizeof(float));
    }
    memset(w.weights, 0, sizeof w.weights), memset(w.factor, 0, sizeof w.factor);
    pack_queries(p, &w, segment * p->rows + row, head, count);
    for (long first = 0; first < seen_by(p, row + count - 1); first += PANEL, panels += panel_words(p))
        attend_panel(p, &w, panels, row, count, first);
    for (long r = 0; r < count; r++) {
        float *to = p->out + ((segment * p->rows + row + r) * p->heads + head) * p->dim, back = 1.0f / sum(w.total[r]);
        for (long i = 0; i < p->dim; i++) to[i] = w.sums[r][i] * back;
    }
}

/* Bytes that `packed` of a call must have. */
long qvl_dense_scratch(long segments, long length, long kv_heads, long dim) {
    const dense p = {.length = length, .dim = dim};
    return segments * kv_heads * panels_of(&p) * panel_words(&p) * (long)sizeof(uint32_t);
}

void qvl_attend_dense(const float *q, const void *keys, const void *values, const float *cosine, const float *sine,
                      const int64_t *blocks, float *out, void *packed, long q_stride, long kv_stride, long heads,
                      long kv_heads, long dim, long segments, long length, long rows, long block_size, int causal,
                      int threads) {
    const dense p = {
        .q = q, .keys = keys, .values = values, .cosine = cosine, .sine = sine, .blocks = blocks, .out = out,
        .packed = packed, .q_stride = q_stride, .kv_stride = kv_stride, .heads = heads, .group = heads / kv_heads,
        .dim = dim, .segments = segments, .length = length, .rows = rows, .block_size = block_size, .causal = causal,
        .scale = (float)(1.4426950408889634 / sqrt((double)dim)),
    };
    if (segments * heads * rows * length * dim < SMALL) threads = 1;
    qvl_share(segments * kv_heads * panels_of(&p), threads, pack_panel, &p);
    qvl_share(segments * heads * ((rows + ROWS - 1) / ROWS), threads, attend_rows, &p);
}

/* Whether the processor multiplies numbers of bf16. */
int qvl_dense_is_native(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* Whether it does so fast enough for this kernel. */
int qvl_dense_is_fast(void) { return FAST_PAIRS; }
