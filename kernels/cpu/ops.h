/* The ops' arguments. Every field has 8 bytes; strides are in elements; pointers may be NULL where
   said. kernels/cpu/launch.py mirrors these structures and compares their sizes. */

#pragma once

#include <omp.h>
#include <stdint.h>

#include "simd.h"

/* y[r] = act(x[r] W^T + bias); see linear.c for the panels. */
struct linear_arguments {
    const float *x;
    const void *panels; /* of fp32, or with bf16 of that */
    const float *bias;  /* NULL or out_features */
    float *y;
    int64_t rows, in_features, out_features, x_stride, y_stride;
    int64_t gelu; /* 1: the exact GELU of the result */
    int64_t bf16;
};
void linear_share(const struct linear_arguments *);

/* A weight's panels for linear; see linear.c. */
struct pack_arguments {
    const void *weight; /* (out_features, in_features), contiguous, fp32 or bf16 */
    void *panels;
    int64_t in_features, out_features, bf16;
};
void pack_share(const struct pack_arguments *);

/* out = weight * s / sqrt(mean(s^2) + eps), s = x + residual, which residual_out gets. */
struct rms_norm_arguments {
    const float *x, *weight, *residual; /* residual: NULL where there is none */
    float *out, *residual_out;          /* residual_out: NULL where there is no residual */
    int64_t rows, width, x_stride, residual_stride, out_stride, residual_out_stride;
    double eps;
};
void rms_norm_share(const struct rms_norm_arguments *);

/* out = silu(first half) * second half. */
struct swiglu_arguments {
    const float *gate_up;
    float *out;
    int64_t rows, width, gate_up_stride, out_stride; /* width: of a half */
};
void swiglu_share(const struct swiglu_arguments *);

/* Rotate queries and keys, write keys and values to suffix slot *step. */
struct kv_append_arguments {
    const float *qkv, *cos, *sin; /* cos, sin: (positions, head_dim / 2) */
    const int32_t *first_positions, *step;
    float *keys, *values, *q;
    int64_t rows, heads, kv_heads, head_dim, slots, positions; /* positions: rows of cos */
    int64_t qkv_stride;
    int64_t cache_row_stride, cache_head_stride, cache_token_stride;
    int64_t q_row_stride, q_head_stride;
};
void kv_append_share(const struct kv_append_arguments *);

/* Attention of one query a row over its prefix, then suffix tokens 0 to *step. */
struct decode_attention_arguments {
    const float *q, *keys, *values, *prefix_keys, *prefix_values;
    const int32_t *step, *prefix_lengths, *row_prefix; /* (rows,) */
    float *out;
    int64_t rows, heads, kv_heads, head_dim, slots;
    int64_t q_row_stride, q_head_stride;
    int64_t row_stride, head_stride, token_stride; /* of keys and values */
    int64_t prefix_stride, prefix_head_stride, prefix_token_stride;
    int64_t out_stride;
    double scale;
};
void decode_attention_share(const struct decode_attention_arguments *);

/* Guided draw of column *step, its log-probs, the next inputs; *step grows by one. */
struct sample_step_arguments {
    const float *cond, *uncond, *kept; /* uncond: NULL; kept: NULL, or what may be drawn */
    const int64_t *sample_ids;
    int32_t *step;
    const void *table; /* of fp32, or with table_bf16 of that */
    float *x;
    int64_t *tokens;
    float *logprobs, *guided_logprobs; /* each may be NULL */
    int64_t *error;
    uint8_t *alive; /* NULL without eos */
    int64_t rows, vocab, columns, width;
    int64_t cond_stride, uncond_stride, table_stride, x_stride;
    int64_t tokens_stride, logprobs_stride, guided_stride, alive_stride;
    int64_t seed, step_offset, greedy, eos, pad, table_bf16;
    double cfg_weight, temperature;
};
void sample_step_share(const struct sample_step_arguments *);

/* One step of AdamW on `count` weights in place; see adamw.c. */
struct adamw_arguments {
    void *weight; /* of fp32, or with low of bf16 */
    const void *grad;
    int16_t *low; /* NULL with fp32 weights */
    void *exp_avg, *exp_avg_sq;
    int64_t count, grad_bf16, moments_bf16, seed, step, stream;
    double keep, mean_rate, square_keep, square_rate, root, size, eps, grad_scale;
};
void adamw_share(const struct adamw_arguments *);

/* One after the other: what a recorded decode step is made of. */
struct launch {
    void (*share)(const void *);
    const void *arguments;
};
void run_launches(const struct launch *, int64_t count);

/* An op is its share: what each thread of a team does of it.

   Each thread has two runs of rows, the same in every op, so that what it reads of them is what it
   wrote, and no op waits for another: a team passes through a whole recorded step. Waiting is dear
   where the threads lie on parts of a processor that share no cache. An op whose threads read what
   others wrote has barriers of its own, before it and after it.

   Two runs, because the first half of the rows of a guided rollout is conditional and has longer
   prefixes of its own. Not rows in turn: a core would fetch the next row, another thread's, ahead. */
INLINE int64_t run_length(int64_t rows) {
    int64_t runs = 2 * omp_get_num_threads();
    return (rows + runs - 1) / runs;
}
#define OWN_RUNS(first, rows, length)                                               \
    for (int64_t first = omp_get_thread_num() * (length); first < (rows);           \
         first += omp_get_num_threads() * (length))
#define RUN_END(first, rows, length) ((first) + (length) < (rows) ? (first) + (length) : (rows))
#define OWN_ROWS(row, rows)                                                         \
    for (int64_t length_ = run_length(rows), once_ = 1; once_; once_ = 0)           \
        OWN_RUNS(first_, rows, length_)                                             \
            for (int64_t row = first_; row < RUN_END(first_, rows, length_); row++)

#define OP(name)                                                           \
    const int64_t name##_arguments_size = sizeof(struct name##_arguments); \
    void name(const struct name##_arguments *arguments) {                  \
        _Pragma("omp parallel") name##_share(arguments);                   \
    }
