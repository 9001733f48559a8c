/* AdamW on fp32 weights, or on bf16 ones with the 16 bits that they lack; see kernels/adamw.py.

   Built with -ffp-contract=off: every operation is rounded once. Elements go by in blocks that stay
   in the first level of cache, so that each loop is plain vector code. */

#include "ops.h"
#include "simd.h"

#define BLOCK 512 /* elements: a multiple of 4 */
#define TAG 0x41644D57u

OP(adamw)

INLINE float wide(uint16_t half) { return bits_to_float((int32_t)((uint32_t)half << 16)); }

static void read(float *restrict to, const void *from, int64_t first, int count, int64_t bf16) {
    if (!bf16) {
        memcpy(to, (const float *)from + first, sizeof(float) * count);
        return;
    }
    const uint16_t *half = (const uint16_t *)from + first;
    for (int i = 0; i < count; i++) to[i] = wide(half[i]);
}

/* The noise of elements first to first + count - 1, a word each. */
static void draw(uint32_t *restrict words, const struct adamw_arguments *a, int64_t first) {
    enum { LANES = BLOCK / 4 };
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    uint32_t k0 = (uint32_t)a->seed, k1 = (uint32_t)((uint64_t)a->seed >> 32);
    for (int i = 0; i < LANES; i++) {
        c0[i] = (uint32_t)(first / 4 + i);
        c1[i] = (uint32_t)a->step;
        c2[i] = (uint32_t)a->stream;
        c3[i] = TAG;
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < LANES; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)p1;
            c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < LANES; i++) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

/* Rounded up with the probability of what is cut off; what is not finite stays so. */
INLINE uint16_t stochastic(float x, uint32_t noise) {
    uint32_t bits = (uint32_t)float_to_bits(x);
    uint32_t finite = (bits & 0x7f800000u) != 0x7f800000u;
    uint32_t rounded = (bits + (finite ? noise : 0u)) >> 16;
    return x != x ? 0x7fc0u : (uint16_t)rounded;
}

static void block(const struct adamw_arguments *a, int64_t first, int count) {
    float w[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    const float keep = (float)a->keep, mean_rate = (float)a->mean_rate;
    const float square_keep = (float)a->square_keep, square_rate = (float)a->square_rate;
    const float root = (float)a->root, size = (float)a->size, eps = (float)a->eps;
    const float scale = (float)a->grad_scale;
    read(g, a->grad, first, count, a->grad_bf16);
    read(m, a->exp_avg, first, count, a->moments_bf16);
    read(v, a->exp_avg_sq, first, count, a->moments_bf16);
    if (a->low) {
        const uint16_t *half = (const uint16_t *)a->weight + first;
        const int16_t *low = a->low + first;
        for (int i = 0; i < count; i++)
            w[i] = bits_to_float((int32_t)(((uint32_t)half[i] << 16) + (uint32_t)(int32_t)low[i]));
    } else {
        read(w, a->weight, first, count, 0);
    }
    for (int i = 0; i < count; i++) {
        float grad = g[i] * scale;
        float mean = m[i] + (grad - m[i]) * mean_rate;
        float square = v[i] * square_keep + (grad * grad) * square_rate;
        m[i] = mean;
        v[i] = square;
        w[i] = w[i] * keep - mean / (sqrtf(square) / root + eps) * size;
    }
    if (a->moments_bf16) {
        uint32_t words[BLOCK];
        uint16_t *means = (uint16_t *)a->exp_avg + first;
        uint16_t *squares = (uint16_t *)a->exp_avg_sq + first;
        draw(words, a, first);
        for (int i = 0; i < count; i++) {
            means[i] = stochastic(m[i], words[i] & 0xffffu);
            squares[i] = stochastic(v[i], words[i] >> 16);
        }
    } else {
        memcpy((float *)a->exp_avg + first, m, sizeof(float) * count);
        memcpy((float *)a->exp_avg_sq + first, v, sizeof(float) * count);
    }
    if (a->low) {
        uint16_t *half = (uint16_t *)a->weight + first;
        int16_t *low = a->low + first;
        for (int i = 0; i < count; i++) {
            /* Ties away from zero; a NaN's payload must not carry over. */
            uint32_t bits = w[i] != w[i] ? 0x7fc00000u : (uint32_t)float_to_bits(w[i]);
            uint32_t upper = (bits + 0x8000u) & 0xffff0000u;
            half[i] = (uint16_t)(upper >> 16);
            low[i] = (int16_t)(uint16_t)(bits - upper);
        }
    } else {
        memcpy((float *)a->weight + first, w, sizeof(float) * count);
    }
}

void adamw_share(const struct adamw_arguments *a) {
    int64_t blocks = (a->count + BLOCK - 1) / BLOCK;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < blocks; index++) {
        int64_t first = index * BLOCK, left = a->count - first;
        block(a, first, left < BLOCK ? (int)left : BLOCK);
    }
}
