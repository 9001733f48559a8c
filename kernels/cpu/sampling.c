/* Guided sampling and the end of a decode step.

   The counters of the noise are laid out as in kernels/philox.py. Guidance rounds as PyTorch's
   does (one fused multiply-add), so that the draws are those of the PyTorch path. */

#include "ops.h"
#include "philox.h"
#include "simd.h"

#define BLOCK 64 /* vocabulary entries at a time: 16 Philox counters */

OP(sample_step)

/* Gumbel noise of entries first to first + BLOCK - 1 of a row. */
INLINE void gumbel(float *noise, uint64_t seed, uint64_t sample, uint32_t step, int64_t first) {
    uint32_t words[BLOCK];
    philox(words, BLOCK / 4, seed, (uint32_t)(first / 4), step, (uint32_t)sample,
           (uint32_t)(sample >> 32));
    for (int i = 0; i < BLOCK; i++) {
        float uniform = ((float)(int32_t)(words[i] >> 9) + 0.5f) * 0x1p-23f;
        noise[i] = -log32(-log32(uniform));
    }
}

/* A running log-sum-exp. */
struct lse {
    float top, sum;
};

INLINE void lse_add(struct lse *lse, const float *logits, int count) {
    float top = lse->top, sum = 0;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < count; i++) top = logits[i] > top ? logits[i] : top;
    float base = top == -INFINITY ? 0.0f : top; /* so that NaN shows beside nothing but -inf */
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += exp32(logits[i] - base);
    lse->sum = (lse->top == top ? lse->sum : lse->sum * exp32(lse->top - top)) + sum;
    lse->top = top;
}

/* Not logit - (top + log(sum)): at logits of 1e4 that is off by 3e-4 nats in fp32. */
INLINE float log_prob(const struct lse *lse, float logit) {
    return (logit - lse->top) - logf(lse->sum);
}

struct draw {
    int64_t token;
    float logprob, guided_logprob;
};

static struct draw draw_row(const struct sample_step_arguments *a, int64_t row) {
    const float *cond = a->cond + row * a->cond_stride;
    const float *uncond = a->uncond ? a->uncond + row * a->uncond_stride : NULL;
    const float *kept = a->kept ? a->kept + row * a->vocab : NULL;
    const float weight = (float)a->cfg_weight, temperature = (float)a->temperature;
    const uint32_t step = (uint32_t)(a->step_offset + *a->step);
    struct lse lse = {-INFINITY, 0}, guided_lse = {-INFINITY, 0};
    float best = -INFINITY, best_cond = NAN, best_guided = NAN;
    int64_t token = 0;
    for (int64_t first = 0; first < a->vocab; first += BLOCK) {
        int count = a->vocab - first < BLOCK ? a->vocab - first : BLOCK;
        float tempered[BLOCK], guided[BLOCK], scores[BLOCK], noise[BLOCK];
        for (int i = 0; i < count; i++) tempered[i] = cond[first + i];
        if (uncond)
            for (int i = 0; i < count; i++)
                guided[i] = fmaf(tempered[i] - uncond[first + i], weight, uncond[first + i]);
        else
            memcpy(guided, tempered, sizeof guided);
        if (temperature != 1.0f)
            for (int i = 0; i < count; i++) {
                tempered[i] /= temperature;
                guided[i] /= temperature;
            }
        memcpy(scores, kept ? kept + first : guided, sizeof(float) * count);
        if (!a->greedy) {
            gumbel(noise, (uint64_t)a->seed, (uint64_t)a->sample_ids[row], step, first);
            for (int i = 0; i < count; i++) scores[i] += noise[i];
        }
        if (uncond) lse_add(&lse, tempered, count);
        lse_add(&guided_lse, guided, count);
        float top = best;
#pragma omp simd reduction(max : top)
        for (int i = 0; i < count; i++) top = scores[i] > top ? scores[i] : top;
        if (!(top > best)) continue;
        int i = 0;
        while (i + 1 < count && scores[i] != top) i++; /* the first of equal scores wins */
        best = top;
        token = first + i;
        best_cond = tempered[i];
        best_guided = guided[i];
    }
    struct draw draw = {token, 0, log_prob(&guided_lse, best_guided)};
    draw.logprob = uncond ? log_prob(&lse, best_cond) : draw.guided_logprob;
    return draw;
}

/* A token's embedding. */
static void gather(float *restrict x, const struct sample_step_arguments *a, int64_t token) {
    int64_t from = token * a->table_stride;
    if (!a->table_bf16) {
        memcpy(x, (const float *)a->table + from, sizeof(float) * a->width);
        return;
    }
    const uint16_t *half = (const uint16_t *)a->table + from;
    for (int64_t i = 0; i < a->width; i++) x[i] = bits_to_float((int32_t)((uint32_t)half[i] << 16));
}

void sample_step_share(const struct sample_step_arguments *a) {
    const int64_t column = *a->step;
    int64_t bad = INT64_MAX; /* row */
#pragma omp barrier /* a row's unconditional logits may be another thread's */
    OWN_ROWS(row, a->rows) {
        uint8_t *alive = a->alive ? a->alive + row * a->alive_stride : NULL;
        struct draw draw = {a->pad, 0, 0};
        if (!alive || *alive) {
            draw = draw_row(a, row);
            int finite = isfinite(draw.logprob) && isfinite(draw.guided_logprob);
            if (!finite && row < bad) bad = row;
            if (alive && draw.token == a->eos) *alive = 0;
        }
        if (column < a->columns) {
            a->tokens[row * a->tokens_stride + column] = draw.token;
            if (a->logprobs) a->logprobs[row * a->logprobs_stride + column] = draw.logprob;
            if (a->guided_logprobs)
                a->guided_logprobs[row * a->guided_stride + column] = draw.guided_logprob;
        }
        float *x = a->x + row * a->x_stride;
        gather(x, a, draw.token);
        if (a->uncond) memcpy(x + a->rows * a->x_stride, x, sizeof(float) * a->width);
    }
    if (bad != INT64_MAX) {
        int64_t code = 1 + column * a->rows + bad; /* the first step's first row is the least */
#pragma omp critical
        if (!*a->error || code < *a->error) *a->error = code;
    }
#pragma omp barrier /* all have read the step */
#pragma omp single
    ++*a->step;
}
