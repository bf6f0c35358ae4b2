/* What stands between the products; see ops.c. All activations are fp32, their rows contiguous. */
#pragma once
#include <stdint.h>

/* out = norm(x + residual) * weight with residual += x; without residual, norm(x) * weight. */
void qvl_add_rms_norm(const float *x, float *residual, const float *weight, float *out, long rows, long size, float eps,
                      int threads);

/* x += delta in place, if there is one; out = layer norm of x. out may be delta. */
void qvl_add_layer_norm(float *x, const float *delta, const float *weight, const float *bias, float *out, long rows,
                        long size, float eps, int threads);

/* out [rows, size] = silu(first half) * second half of gate_up [rows, 2 * size]. */
void qvl_silu_and_mul(const float *gate_up, float *out, long rows, long size, int threads);

/* out = x * sigmoid(1.702 x) over n numbers; out may be x. */
void qvl_quick_gelu(const float *x, float *out, long n, int threads);

/* Turn each pair (i, i + dim / 2) of x [rows, heads, dim] by its angle; cos, sin [rows, dim], out contiguous. */
void qvl_rotate(const float *x, long row_stride, const float *cosine, const float *sine, float *out, long rows,
                long heads, long dim, int threads);

/* Rows of new [rows, width] into their slots of a cache whose rows are width wide. */
void qvl_store(const float *new, long row_stride, void *cache, const int64_t *slots, long rows, long width, int type,
               int threads);

/* One query token per sequence: q, out [sequences, heads, dim]; table [sequences, table_stride]; lengths count this
 * token. Long contexts are split between threads and joined; scratch: sequences * heads * splits * (dim + 2) floats. */
void qvl_decode_attention(const float *q, const void *keys, const void *values, const int32_t *table, long table_stride,
                          const int32_t *lengths, float *out, float *scratch, long sequences, long heads, long kv_heads,
                          long dim, long block_size, long splits, float scale, int type, int threads);
