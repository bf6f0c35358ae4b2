/* All layers of a decoder for a step of decodes on a CPU, in one call.
 *
 * A layer is: norm; product for q, k and v; q and k turned by their angles; k and v into the paged cache; attention of
 * each row over its own sequence; output product; norm; product for gate and up; silu(gate) * up; product down. What
 * attention and the MLP give is added to the residual by the norm behind them. Each part is the one that steps of other
 * kinds call by itself, so the numbers are the same to the last bit; what is saved is the way through Python between.
 * Knows the order and the memory between the parts. Does not know Python, or how a part is computed.
 */
#include "ops.h"

#define SMALL (1 << 20) /* as in native.py: the work that is worth a second thread, */
#define READING 6       /* and rows for which a product computes as long as it takes to read its weights */
#define ALIGNED 16      /* floats in 64 bytes */

typedef struct {
    const void *numbers, *scales; /* scales of codes alone */
    const float *bias;
} matrix;

typedef struct {
    const float *attention_norm, *mlp_norm;
    matrix qkv, output, gate_up, down;
    void *keys, *values;
} layer;

typedef void plain_product(const float *x, long ldx, const void *w, const float *bias, float *y, void *scratch, long m,
                           long n, long k, int split, int threads);
typedef void coded_product(int bits, int gelu, const float *x, long ldx, const void *w, const void *steps, const void *row_scales,
                           const float *bias, float *y, void *scratch, long m, long n, long width, long k, int threads);

/* What is the same in every step. Matrices are numbers, `plain`, or codes of 8 or 4 bits, `coded`. */
typedef struct {
    plain_product *plain;
    coded_product *coded;
    long split, bits, layers, hidden, heads, kv_heads, dim, inner, cache_type;
    float eps, scale; /* of norms; of the products of queries and keys */
} decoder;

/* A step: rows of x [rows, hidden], which become the residual; angles [rows, dim]; where each row's keys and values go,
 * and the blocks and lengths of its sequence. `memory` has qvl_decode_memory floats, of which products need `scratch`. */
typedef struct {
    const layer *layers;
    const float *last_norm, *cosine, *sine;
    float *x, *out;
    const int64_t *slots;
    const int32_t *table, *lengths;
    float *memory;
    long rows, table_stride, block_size, splits, scratch, threads;
} step;

/* Where in the memory of a step each part finds what it needs. */
typedef struct {
    long normed, qkv, q, k, heads, parts, delta, gate_up, gated, scratch, end;
} places;

static long take(long *end, long numbers) {
    long first = *end;
    *end += (numbers + ALIGNED - 1) / ALIGNED * ALIGNED;
    return first;
}

static places lay_out(const decoder *d, long rows, long splits, long scratch) {
    long queries = d->heads * d->dim, keys = d->kv_heads * d->dim;
    places at = {0};
    at.normed = take(&at.end, rows * d->hidden);
    at.qkv = take(&at.end, rows * (queries + 2 * keys));
    at.q = take(&at.end, rows * queries);
    at.k = take(&at.end, rows * keys);
    at.heads = take(&at.end, rows * queries);
    at.parts = take(&at.end, rows * d->heads * splits * (d->dim + 2));
    at.delta = take(&at.end, rows * d->hidden);
    at.gate_up = take(&at.end, rows * 2 * d->inner);
    at.gated = take(&at.end, rows * d->inner);
    at.scratch = take(&at.end, scratch);
    return at;
}

long qvl_decode_memory(const decoder *d, long rows, long splits, long scratch) {
    return lay_out(d, rows, splits, scratch).end;
}

/* y [rows, n] = x [rows, k] W^T + bias. */
static void multiply(const decoder *d, const step *s, const places *at, const matrix *w, long x, long k, long y, long n) {
    int threads = n * k * (s->rows + READING) >= SMALL ? (int)s->threads : 1, bits = (int)d->bits;
    const float *from = s->memory + x;
    float *to = s->memory + y, *scratch = s->memory + at->scratch;
    if (d->plain) {
        d->plain(from, k, w->numbers, w->bias, to, scratch, s->rows, n, k, (int)d->split, threads);
        return;
    }
    long block = 512 / bits, padded = (k + block - 1) / block * block;
    d->coded(bits, 0, from, k, w->numbers, bits == 4 ? w->scales : 0, bits == 8 ? w->scales : 0, w->bias, to, scratch,
             s->rows, n, k, padded, threads);
}

static void attend(const decoder *d, const step *s, const places *at, const layer *l) {
    long queries = d->heads * d->dim, keys = d->kv_heads * d->dim, stride = queries + 2 * keys;
    int threads = (int)s->threads, type = (int)d->cache_type;
    float *m = s->memory, *qkv = m + at->qkv;
    qvl_rotate(qkv, stride, s->cosine, s->sine, m + at->q, s->rows, d->heads, d->dim, threads);
    qvl_rotate(qkv + queries, stride, s->cosine, s->sine, m + at->k, s->rows, d->kv_heads, d->dim, threads);
    qvl_store(m + at->k, keys, l->keys, s->slots, s->rows, keys, type, threads);
    qvl_store(qkv + queries + keys, stride, l->values, s->slots, s->rows, keys, type, threads);
    qvl_decode_attention(m + at->q, l->keys, l->values, s->table, s->table_stride, s->lengths, m + at->heads,
                         m + at->parts, s->rows, d->heads, d->kv_heads, d->dim, s->block_size, s->splits, d->scale,
                         type, threads);
}

/* out [rows, hidden] of a step: x after all layers and the last norm; the caches gain a token per row. */
void qvl_decode(const decoder *d, const step *s) {
    const places at = lay_out(d, s->rows, s->splits, s->scratch);
    long qkv = (d->heads + 2 * d->kv_heads) * d->dim;
    int threads = (int)s->threads;
    float *m = s->memory, *delta = s->x, *residual = 0;
    for (const layer *l = s->layers; l < s->layers + d->layers; l++) {
        qvl_add_rms_norm(delta, residual, l->attention_norm, m + at.normed, s->rows, d->hidden, d->eps, threads);
        delta = m + at.delta, residual = s->x;
        multiply(d, s, &at, &l->qkv, at.normed, d->hidden, at.qkv, qkv);
        attend(d, s, &at, l);
        multiply(d, s, &at, &l->output, at.heads, d->heads * d->dim, at.delta, d->hidden);
        qvl_add_rms_norm(delta, residual, l->mlp_norm, m + at.normed, s->rows, d->hidden, d->eps, threads);
        multiply(d, s, &at, &l->gate_up, at.normed, d->hidden, at.gate_up, 2 * d->inner);
        qvl_silu_and_mul(m + at.gate_up, m + at.gated, s->rows, d->inner, threads);
        multiply(d, s, &at, &l->down, at.gated, d->inner, at.delta, d->hidden);
    }
    qvl_add_rms_norm(delta, residual, s->last_norm, s->out, s->rows, d->hidden, d->eps, threads);
}
