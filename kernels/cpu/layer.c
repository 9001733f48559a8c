/* The elementwise ops of a decoder layer, a row at a time. */

#include "ops.h"
#include "simd.h"

OP(rms_norm)
OP(swiglu)
OP(kv_append)

void run_launches(const struct launch *launches, int64_t count) {
#pragma omp parallel
    for (int64_t i = 0; i < count; i++) launches[i].share(launches[i].arguments);
}

void rms_norm_share(const struct rms_norm_arguments *a) {
    int64_t width = a->width, whole = width - width % VEC;
    OWN_ROWS(row, a->rows) {
        const float *x = a->x + row * a->x_stride;
        float *out = a->out + row * a->out_stride;
        if (a->residual) { /* the sum may be written over x or over the residual */
            const float *residual = a->residual + row * a->residual_stride;
            float *sum = a->residual_out + row * a->residual_out_stride;
            for (int64_t i = 0; i < width; i++) sum[i] = x[i] + residual[i];
            x = sum;
        }
        vec squares[2] = {{0}, {0}};
        int64_t i = 0;
        for (; i + 2 * VEC <= whole; i += 2 * VEC) {
            squares[0] += load(x + i) * load(x + i);
            squares[1] += load(x + i + VEC) * load(x + i + VEC);
        }
        for (; i < whole; i += VEC) squares[0] += load(x + i) * load(x + i);
        float sum = total(squares[0] + squares[1]);
        for (; i < width; i++) sum += x[i] * x[i];
        float scale = 1.0f / sqrtf(sum / (float)width + (float)a->eps);
        for (i = 0; i < width; i++) out[i] = a->weight[i] * (x[i] * scale);
    }
}

void swiglu_share(const struct swiglu_arguments *a) {
    OWN_ROWS(row, a->rows) {
        const float *restrict gate = a->gate_up + row * a->gate_up_stride;
        const float *restrict up = gate + a->width;
        float *restrict out = a->out + row * a->out_stride;
        for (int64_t i = 0; i < a->width; i++) {
            float x = gate[i];
            float whole = x / (1.0f + exp32(-x < 88.0f ? -x : 88.0f));
            out[i] = (x < -88.0f ? x * 0.0f : whole) * up[i];
        }
    }
}

void kv_append_share(const struct kv_append_arguments *a) {
    int64_t half = a->head_dim / 2, slot = *a->step;
    if (slot < 0 || slot >= a->slots) return;
    OWN_ROWS(row, a->rows) {
        const float *from = a->qkv + row * a->qkv_stride;
        int64_t position = a->first_positions[row] + slot;
        if (position < 0 || position >= a->positions) { /* not an angle: NaN, which does not hide */
            for (int64_t head = 0; head < a->heads; head++)
                a->q[row * a->q_row_stride + head * a->q_head_stride] = NAN;
            continue;
        }
        const float *cos = a->cos + position * half;
        const float *sin = a->sin + position * half;
        int64_t cached = row * a->cache_row_stride + slot * a->cache_token_stride;
        for (int64_t head = 0; head < a->heads + a->kv_heads; head++, from += a->head_dim) {
            int64_t kv_head = head - a->heads;
            float *restrict to = a->keys + cached + kv_head * a->cache_head_stride;
            if (kv_head < 0) to = a->q + row * a->q_row_stride + head * a->q_head_stride;
            for (int64_t i = 0; i < half; i++) {
                to[i] = from[i] * cos[i] - from[half + i] * sin[i];
                to[half + i] = from[half + i] * cos[i] + from[i] * sin[i];
            }
        }
        for (int64_t head = 0; head < a->kv_heads; head++, from += a->head_dim)
            memcpy(a->values + cached + head * a->cache_head_stride, from,
                   sizeof(float) * a->head_dim);
    }
}
