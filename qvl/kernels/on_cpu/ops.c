/* What stands between the products on a CPU, each in one pass: norms, rotation, activation, the paged cache, decoding.
 *
 * All activations are fp32; the cache holds bf16 (0), fp16 (1) or fp32 (2). Does not know Python.
 */
#include "attend.h"
#include "ops.h"
#include "share.h"

#define SMALL 16384 /* below so many numbers a second thread costs more than it saves */
#define STRIP 2560  /* numbers of an activation that a thread takes at a time: what is in it costs more than in a norm */
#define FEW 65536   /* the same for products of queries and keys */

typedef struct {
    const float *x, *weight;
    float *residual, *out;
    long size;
    float eps;
} norm;

static void norm_row(const void *what, long row) {
    const norm *p = what;
    long size = p->size, i = 0;
    const float *in = p->x + row * size, *weight = p->weight;
    float *to = p->out + row * size, *total = p->residual ? p->residual + row * size : 0, rest = 0;
    vf squares = {0};
    for (; i + LANES <= size; i += LANES) {
        vf v = f32_low(in + i);
        if (total) *(vf_u *)(total + i) = v += f32_low(total + i);
        squares += v * v;
    }
    for (; i < size; i++) {
        float v = in[i];
        if (total) total[i] = v += total[i];
        rest += v * v;
    }
    float scale = 1.0f / sqrtf((sum(squares) + rest) / size + p->eps);
    if (total) in = total;
    for (i = 0; i + LANES <= size; i += LANES) *(vf_u *)(to + i) = f32_low(in + i) * scale * f32_low(weight + i);
    for (; i < size; i++) to[i] = in[i] * scale * weight[i];
}

void qvl_add_rms_norm(const float *x, float *residual, const float *weight, float *out, long rows, long size, float eps,
                      int threads) {
    const norm p = {x, weight, residual, out, size, eps};
    qvl_share(rows, rows * size > SMALL ? threads : 1, norm_row, &p);
}

typedef struct {
    const float *delta, *weight, *bias;
    float *x, *out;
    long size;
    float eps;
} layer_norm;

/* x += delta, if there is one; its sum. */
static float add_row(float *x, const float *delta, long size) {
    vf total = {0};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= size; i += LANES) {
        vf v = f32_low(x + i);
        if (delta) *(vf_u *)(x + i) = v += f32_low(delta + i);
        total += v;
    }
    for (; i < size; i++) rest += delta ? x[i] += delta[i] : x[i];
    return sum(total) + rest;
}

static void layer_norm_row(const void *what, long row) {
    const layer_norm *p = what;
    long size = p->size, i = 0;
    float *x = p->x + row * size, *to = p->out + row * size, rest = 0;
    const float mean = add_row(x, p->delta ? p->delta + row * size : 0, size) / size;
    vf squares = {0};
    for (; i + LANES <= size; i += LANES) {
        vf off = f32_low(x + i) - mean;
        squares += off * off;
    }
    for (; i < size; i++) rest += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf((sum(squares) + rest) / size + p->eps);
    for (i = 0; i + LANES <= size; i += LANES)
        *(vf_u *)(to + i) = (f32_low(x + i) - mean) * scale * f32_low(p->weight + i) + f32_low(p->bias + i);
    for (; i < size; i++) to[i] = (x[i] - mean) * scale * p->weight[i] + p->bias[i];
}

void qvl_add_layer_norm(float *x, const float *delta, const float *weight, const float *bias, float *out, long rows,
                        long size, float eps, int threads) {
    const layer_norm p = {delta, weight, bias, x, out, size, eps};
    qvl_share(rows, rows * size > SMALL ? threads : 1, layer_norm_row, &p);
}

typedef struct {
    const float *x;
    float *out;
    long size, strips; /* of a row; strips of it */
} activation;

static void silu_strip(const void *what, long piece) {
    const activation *p = what;
    const float *gate = p->x + piece / p->strips * 2 * p->size, *up = gate + p->size;
    float *to = p->out + piece / p->strips * p->size;
    long i = piece % p->strips * STRIP, stop = i + STRIP < p->size ? i + STRIP : p->size;
    for (; i + LANES <= stop; i += LANES) {
        vf g = f32_low(gate + i);
        *(vf_u *)(to + i) = g / (1.0f + exponential(-g)) * f32_low(up + i);
    }
    for (; i < stop; i++) to[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void qvl_silu_and_mul(const float *gate_up, float *out, long rows, long size, int threads) {
    const activation p = {gate_up, out, size, (size + STRIP - 1) / STRIP};
    qvl_share(rows * p.strips, rows * size > STRIP ? threads : 1, silu_strip, &p);
}

static void gelu_strip(const void *what, long piece) {
    const activation *p = what;
    long i = piece * STRIP, stop = i + STRIP < p->size ? i + STRIP : p->size;
    for (; i + LANES <= stop; i += LANES) *(vf_u *)(p->out + i) = quick_gelu(f32_low(p->x + i));
    for (; i < stop; i++) p->out[i] = p->x[i] / (1.0f + expf(-1.702f * p->x[i]));
}

void qvl_quick_gelu(const float *x, float *out, long n, int threads) {
    const activation p = {x, out, n, (n + STRIP - 1) / STRIP};
    qvl_share(p.strips, n > SMALL ? threads : 1, gelu_strip, &p);
}

typedef struct {
    const float *x, *cosine, *sine;
    float *out;
    long stride, heads, dim;
} rotation;

static void rotate_row(const void *what, long row) {
    const rotation *p = what;
    long dim = p->dim, half = dim / 2;
    const float *c = p->cosine + row * dim, *s = p->sine + row * dim;
    for (long h = 0; h < p->heads; h++) {
        const float *in = p->x + row * p->stride + h * dim;
        float *to = p->out + (row * p->heads + h) * dim;
        for (long i = 0; i < half; i++) {
            float a = in[i], b = in[i + half];
            to[i] = a * c[i] - b * s[i];
            to[i + half] = b * c[i + half] + a * s[i + half];
        }
    }
}

void qvl_rotate(const float *x, long row_stride, const float *cosine, const float *sine, float *out, long rows,
                long heads, long dim, int threads) {
    const rotation p = {x, cosine, sine, out, row_stride, heads, dim};
    qvl_share(rows, rows * heads * dim > SMALL ? threads : 1, rotate_row, &p);
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (bits >> 16) | 64;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static void narrow(const float *from, void *to, long place, long n, int type) {
    if (type == 2) {
        memcpy((float *)to + place, from, n * sizeof(float));
    } else if (type == 0) {
        uint16_t *out = (uint16_t *)to + place;
        for (long i = 0; i < n; i++) out[i] = to_bf16(from[i]);
    } else {
        _Float16 *out = (_Float16 *)to + place;
        for (long i = 0; i < n; i++) out[i] = (_Float16)from[i];
    }
}

typedef struct {
    const float *new;
    void *cache;
    const int64_t *slots;
    long stride, width;
    int type;
} storing;

static void store_row(const void *what, long row) {
    const storing *p = what;
    narrow(p->new + row * p->stride, p->cache, p->slots[row] * p->width, p->width, p->type);
}

void qvl_store(const float *new, long row_stride, void *cache, const int64_t *slots, long rows, long width, int type,
               int threads) {
    const storing p = {new, cache, slots, row_stride, width, type};
    qvl_share(rows, rows * width > SMALL ? threads : 1, store_row, &p);
}

/* A step of decodes: q [sequences, heads, dim], block tables [sequences, stride], and scratch [sequence, KV head, part of
 * the context], of each the group's values, largest scores and sums of weights. */
typedef struct {
    const float *q;
    pages pages; /* of the first sequence */
    const int32_t *lengths;
    float *scratch;
    long stride, group, parts, room;
    float scale;
} decoding;

static void decode_part(const void *what, long piece) {
    const decoding *p = what;
    long part = piece % p->parts, head = piece / p->parts % p->pages.kv_heads, s = piece / p->parts / p->pages.kv_heads;
    long dim = p->pages.dim, first = part * SPLIT, length = p->lengths[s];
    pages own = p->pages;
    own.blocks += s * p->stride;
    float *mine = p->scratch + piece * p->room;
    if (first < length)
        attend(&own, head, p->q + (s * own.kv_heads + head) * p->group * dim, p->group, first,
               first + SPLIT < length ? first + SPLIT : length, p->scale, mine, mine + p->group * dim,
               mine + p->group * (dim + 1));
}

/* The parts of one query, joined to [dim]. */
static void join_parts(const decoding *p, long s, long query, float *to) {
    long dim = p->pages.dim, g = query % p->group, used = (p->lengths[s] + SPLIT - 1) / SPLIT;
    const float *first = p->scratch + (s * p->pages.kv_heads + query / p->group) * p->parts * p->room;
    const float *tops = first + p->group * dim + g, *totals = tops + p->group;
    float top = -INFINITY, total = 0;
    for (long c = 0; c < used; c++) {
        float own = tops[c * p->room];
        top = own > top || own != own ? own : top;
    }
    memset(to, 0, dim * sizeof(float));
    for (long c = 0; c < used; c++) {
        float weight = expf(tops[c * p->room] - top);
        total += weight * totals[c * p->room];
        for (long d = 0; d < dim; d++) to[d] += weight * first[c * p->room + g * dim + d];
    }
    for (long d = 0; d < dim; d++) to[d] /= total;
}

void qvl_decode_attention(const float *q, const void *keys, const void *values, const int32_t *table, long table_stride,
                          const int32_t *lengths, float *out, float *scratch, long sequences, long heads, long kv_heads,
                          long dim, long block_size, long splits, float scale, int type, int threads) {
    long group = heads / kv_heads;
    const decoding p = {q,     {keys, values, table, block_size, kv_heads, dim, type}, lengths, scratch, table_stride,
                        group, splits, group * (dim + 2), scale};
    long tokens = 0;
    for (long s = 0; s < sequences; s++) tokens += lengths[s];
    qvl_share(sequences * kv_heads * splits, tokens * heads * dim > FEW ? threads : 1, decode_part, &p);
    for (long s = 0; s < sequences; s++)
        for (long h = 0; h < heads; h++) join_parts(&p, s, h, out + (s * heads + h) * dim);
}

long qvl_lanes(void) { return LANES; }
