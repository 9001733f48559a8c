/* AdamW on fp32 weights, or on bf16 ones with the 16 bits that they lack; see kernels/adamw.py.

   Built with -ffp-contract=off: every operation is rounded once. */

#include "ops.h"
#include "philox.h"
#include "simd.h"

#define BLOCK (4 * PHILOX_COUNTERS) /* elements, with a word of noise each */
#define TAG 0x41644D57u

OP(adamw)

INLINE float wide(uint16_t half) { return bits_to_float((int32_t)((uint32_t)half << 16)); }

INLINE float number(const void *from, int64_t i, const int bf16) {
    return bf16 ? wide(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

/* Rounded up with the probability of what is cut off; what is not finite stays so. */
INLINE uint16_t stochastic(float x, uint32_t noise) {
    uint32_t bits = (uint32_t)float_to_bits(x);
    uint32_t finite = (bits & 0x7f800000u) != 0x7f800000u;
    uint32_t rounded = (bits + (finite ? noise : 0u)) >> 16;
    return x != x ? 0x7fc0u : (uint16_t)rounded;
}

/* One loop over a block, vector code for each kind of operands: split, grad16 and moments16 are
   constants where inlined. */
INLINE void block(const struct adamw_arguments *a, int64_t first, int64_t count, const int split,
                  const int grad16, const int moments16) {
    const float keep = (float)a->keep, mean_rate = (float)a->mean_rate;
    const float square_keep = (float)a->square_keep, square_rate = (float)a->square_rate;
    const float root = (float)a->root, size = (float)a->size, eps = (float)a->eps;
    const float scale = (float)a->grad_scale;
    const void *grads = (const char *)a->grad + first * (grad16 ? 2 : 4);
    char *weights = (char *)a->weight + first * (split ? 2 : 4);
    char *means = (char *)a->exp_avg + first * (moments16 ? 2 : 4);
    char *squares = (char *)a->exp_avg_sq + first * (moments16 ? 2 : 4);
    int16_t *lows = split ? a->low + first : NULL;
    uint32_t words[BLOCK];
    if (moments16)
        philox(words, BLOCK / 4, (uint64_t)a->seed, (uint32_t)(first / 4), (uint32_t)a->step,
               (uint32_t)a->stream, TAG);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float grad = number(grads, i, grad16) * scale;
        float m = number(means, i, moments16), v = number(squares, i, moments16);
        float w;
        if (split) {
            uint32_t upper = (uint32_t)((uint16_t *)weights)[i] << 16;
            w = bits_to_float((int32_t)(upper + (uint32_t)(int32_t)lows[i]));
        } else {
            w = ((float *)weights)[i];
        }
        m = m + (grad - m) * mean_rate;
        v = v * square_keep + (grad * grad) * square_rate;
        w = w * keep - m / (sqrtf(v) / root + eps) * size;
        if (moments16) {
            ((uint16_t *)means)[i] = stochastic(m, words[i] & 0xffffu);
            ((uint16_t *)squares)[i] = stochastic(v, words[i] >> 16);
        } else {
            ((float *)means)[i] = m;
            ((float *)squares)[i] = v;
        }
        if (split) {
            /* Ties away from zero; a NaN's payload must not carry over. */
            uint32_t bits = w != w ? 0x7fc00000u : (uint32_t)float_to_bits(w);
            uint32_t upper = (bits + 0x8000u) & 0xffff0000u;
            ((uint16_t *)weights)[i] = (uint16_t)(upper >> 16);
            lows[i] = (int16_t)(uint16_t)(bits - upper);
        } else {
            ((float *)weights)[i] = w;
        }
    }
}

INLINE void blocks_of(const struct adamw_arguments *a, const int split, const int grad16,
                      const int moments16) {
    int64_t blocks = (a->count + BLOCK - 1) / BLOCK;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < blocks; index++) {
        int64_t first = index * BLOCK, left = a->count - first;
        block(a, first, left < BLOCK ? left : BLOCK, split, grad16, moments16);
    }
}

void adamw_share(const struct adamw_arguments *a) {
    switch ((a->low ? 4 : 0) + (a->grad_bf16 ? 2 : 0) + (a->moments_bf16 ? 1 : 0)) {
        case 0: blocks_of(a, 0, 0, 0); break;
        case 1: blocks_of(a, 0, 0, 1); break;
        case 2: blocks_of(a, 0, 1, 0); break;
        case 3: blocks_of(a, 0, 1, 1); break;
        case 4: blocks_of(a, 1, 0, 0); break;
        case 5: blocks_of(a, 1, 0, 1); break;
        case 6: blocks_of(a, 1, 1, 0); break;
        case 7: blocks_of(a, 1, 1, 1); break;
    }
}
