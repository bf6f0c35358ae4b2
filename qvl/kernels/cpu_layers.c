/* What stands between the products on a CPU, each in one pass: norms, rotation, activation, the paged cache, decoding.
 *
 * All activations are fp32; the cache holds bf16 (0), fp16 (1) or fp32 (2). Does not know Python.
 */
#include "cpu_vectors.h"
#include <math.h>
#include <stdlib.h>

#define SMALL 16384 /* below so many numbers a second thread costs more than it saves */
#define FEW 4096    /* the same for numbers of queries, each against SPLIT tokens */
#define RUN 16      /* tokens whose keys or values are widened at once */
#define SPLIT 256   /* tokens of context that one thread attends to at a time */
#define MAX_DIM 512

/* out = norm(x + residual) * weight with residual += x; without residual, norm(x) * weight. Rows are contiguous. */
void qvl_add_rms_norm(const float *x, float *residual, const float *weight, float *out, long rows, long size, float eps,
                      int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > SMALL)
    for (long r = 0; r < rows; r++) {
        const float *in = x + r * size;
        float *to = out + r * size, *total = residual ? residual + r * size : 0;
        vf squares = {0};
        float rest = 0;
        long i = 0;
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
        float scale = 1.0f / sqrtf((sum(squares) + rest) / size + eps);
        if (total) in = total;
        for (i = 0; i + LANES <= size; i += LANES)
            *(vf_u *)(to + i) = f32_low(in + i) * scale * f32_low(weight + i);
        for (; i < size; i++) to[i] = in[i] * scale * weight[i];
    }
}

/* out [rows, size] = silu(first half) * second half of gate_up [rows, 2 * size]. */
void qvl_silu_and_mul(const float *gate_up, float *out, long rows, long size, int threads) {
    long strips = (size + SMALL / 4 - 1) / (SMALL / 4);
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * size > SMALL)
    for (long r = 0; r < rows; r++)
        for (long s = 0; s < strips; s++) {
            const float *gate = gate_up + r * 2 * size, *up = gate + size;
            float *to = out + r * size;
            long i = s * (SMALL / 4), stop = i + SMALL / 4 < size ? i + SMALL / 4 : size;
            for (; i + LANES <= stop; i += LANES) {
                vf g = f32_low(gate + i);
                *(vf_u *)(to + i) = g / (1.0f + exponential(-g)) * f32_low(up + i);
            }
            for (; i < stop; i++) to[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
        }
}

/* x * sigmoid(1.702 x) over n numbers. */
void qvl_quick_gelu(const float *x, float *out, long n, int threads) {
    long whole = n - n % LANES;
#pragma omp parallel for num_threads(threads) if (n > SMALL)
    for (long i = 0; i < whole; i += LANES) {
        vf v = f32_low(x + i);
        *(vf_u *)(out + i) = v / (1.0f + exponential(v * -1.702f));
    }
    for (long i = whole; i < n; i++) out[i] = x[i] / (1.0f + expf(-1.702f * x[i]));
}

/* Turn each pair (i, i + dim / 2) of x [rows, heads, dim] by its angle; cos, sin [rows, dim], out contiguous. */
void qvl_rotate(const float *x, long row_stride, const float *cosine, const float *sine, float *out, long rows,
                long heads, long dim, int threads) {
    long half = dim / 2;
#pragma omp parallel for num_threads(threads) if (rows * heads * dim > SMALL)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const float *in = x + r * row_stride + h * dim, *c = cosine + r * dim, *s = sine + r * dim;
            float *to = out + (r * heads + h) * dim;
            for (long i = 0; i < half; i++) {
                float a = in[i], b = in[i + half];
                to[i] = a * c[i] - b * s[i];
                to[i + half] = b * c[i + half] + a * s[i + half];
            }
        }
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

/* Rows of new [rows, width] into their slots of a cache whose rows are width wide. */
void qvl_store(const float *new, long row_stride, void *cache, const int64_t *slots, long rows, long width, int type,
               int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (long r = 0; r < rows; r++) narrow(new + r * row_stride, cache, slots[r] * width, width, type);
}

INLINE void widen(const void *from, long place, float *to, long n, int type) { /* n is a multiple of LANES */
    for (long i = 0; i < n; i += LANES)
        *(vf_u *)(to + i) = type == 2   ? f32_low((const float *)from + place + i)
                            : type == 0 ? bf16_plain((const uint16_t *)from + place + i)
                                        : f16_low((const uint16_t *)from + place + i);
}

/* A cache, and where token t of a sequence lies in it. */
typedef struct {
    const void *keys, *values;
    const int32_t *blocks;
    long block_size, kv_heads, dim;
    int type;
} pages;

static void widen_run(const pages *p, const void *from, long head, long first, long count, float *to) {
    for (long t = 0; t < count; t++) {
        long token = first + t, slot = p->blocks[token / p->block_size] * p->block_size + token % p->block_size;
        widen(from, (slot * p->kv_heads + head) * p->dim, to + t * p->dim, p->dim, p->type);
    }
}

/* Queries q [group, dim] of one KV head against tokens [first, stop): weighted values [group, dim], then per query the
 * largest score and the sum of weights. */
static void attend(const pages *p, long head, const float *q, long group, long first, long stop, float scale,
                   float *out, float *top, float *total) {
    float run[RUN * MAX_DIM] __attribute__((aligned(64))), scores[group][SPLIT + RUN];
    long dim = p->dim, length = stop - first;
    for (long t = 0; t < length; t += RUN) {
        long count = length - t < RUN ? length - t : RUN;
        widen_run(p, p->keys, head, first + t, count, run);
        for (long g = 0; g < group; g++)
            for (long i = 0; i < count; i++) {
                vf dot = {0};
                for (long d = 0; d < dim; d += LANES) dot += f32_low(q + g * dim + d) * f32_low(run + i * dim + d);
                scores[g][t + i] = sum(dot) * scale;
            }
    }
    for (long g = 0; g < group; g++) {
        top[g] = -INFINITY;
        total[g] = 0;
        for (long t = 0; t < length; t++) {
            float own = scores[g][t];
            top[g] = own > top[g] || own != own ? own : top[g];
        }
        for (long t = length; t % LANES; t++) scores[g][t] = -INFINITY;
        for (long t = 0; t < length; t += LANES) {
            vf weights = exponential(f32_low(scores[g] + t) - top[g]);
            *(vf_u *)(scores[g] + t) = weights;
            total[g] += sum(weights);
        }
    }
    memset(out, 0, group * dim * sizeof(float));
    for (long t = 0; t < length; t += RUN) {
        long count = length - t < RUN ? length - t : RUN;
        widen_run(p, p->values, head, first + t, count, run);
        for (long g = 0; g < group; g++)
            for (long d = 0; d < dim; d += LANES) {
                vf acc = f32_low(out + g * dim + d);
                for (long i = 0; i < count; i++) acc += scores[g][t + i] * f32_low(run + i * dim + d);
                *(vf_u *)(out + g * dim + d) = acc;
            }
    }
}

/* One query token per sequence: q, out [sequences, heads, dim]; table [sequences, table_stride]; lengths count this
 * token. Long contexts are split between threads and joined; scratch: sequences * heads * splits * (dim + 2) floats. */
void qvl_decode_attention(const float *q, const void *keys, const void *values, const int32_t *table, long table_stride,
                          const int32_t *lengths, float *out, float *scratch, long sequences, long heads, long kv_heads,
                          long dim, long block_size, long splits, float scale, int type, int threads) {
    long group = heads / kv_heads, part = group * (dim + 2);
#pragma omp parallel for collapse(3) schedule(dynamic, 1) num_threads(threads) if (sequences * splits * heads * dim > FEW)
    for (long s = 0; s < sequences; s++)
        for (long h = 0; h < kv_heads; h++)
            for (long c = 0; c < splits; c++) {
                pages p = {keys, values, table + s * table_stride, block_size, kv_heads, dim, type};
                float *mine = scratch + ((s * kv_heads + h) * splits + c) * part;
                long stop = (c + 1) * SPLIT < lengths[s] ? (c + 1) * SPLIT : lengths[s];
                if (c * SPLIT < lengths[s])
                    attend(&p, h, q + (s * heads + h * group) * dim, group, c * SPLIT, stop, scale, mine,
                           mine + group * dim, mine + group * dim + group);
            }
    for (long s = 0; s < sequences; s++)
        for (long h = 0; h < heads; h++) {
            const float *first = scratch + (s * kv_heads + h / group) * splits * part;
            long g = h % group, used = (lengths[s] + SPLIT - 1) / SPLIT;
            float top = -INFINITY, total = 0, *to = out + (s * heads + h) * dim;
            for (long c = 0; c < used; c++) {
                float own = first[c * part + group * dim + g];
                top = own > top || own != own ? own : top;
            }
            memset(to, 0, dim * sizeof(float));
            for (long c = 0; c < used; c++) {
                const float *mine = first + c * part;
                float weight = expf(mine[group * dim + g] - top);
                total += weight * mine[group * dim + group + g];
                for (long d = 0; d < dim; d++) to[d] += weight * mine[g * dim + d];
            }
            for (long d = 0; d < dim; d++) to[d] /= total;
        }
}

long qvl_lanes(void) { return LANES; }
