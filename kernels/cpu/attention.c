/* Decode attention: a query's softmax over its prefix and its suffix, in one pass over both.

   A unit of work is a row's key/value head with all of its query heads. Keys go by in blocks; a
   block's scores are dot products along the head, VEC keys at a time, and the running maximum and
   sum of the softmax are carried from block to block (Milakov and Gimelshein, arXiv:1805.02867). */

#include "ops.h"
#include "simd.h"

#define BLOCK 128             /* keys; a multiple of VEC */
#define QUERIES 8             /* query heads that go over a block together */
#define MOST_VECS (256 / VEC) /* of a head: MOST_HEAD_DIM_C of kernels/decode_attention.py */

OP(decode_attention)

struct state {
    float top, sum;
    vec mixed[MOST_VECS];
};

/* Scores of VEC keys, of which those beyond `last` are the last again. */
INLINE vec score(const vec *q, const float *keys, int64_t stride, const int last, const int vecs) {
    vec products[VEC];
    UNROLL
    for (int i = 0; i < VEC; i++) {
        const float *key = keys + (i < last ? i : last) * stride;
        products[i] = q[0] * load(key);
        UNROLL
        for (int j = 1; j < vecs; j++) products[i] += q[j] * load(key + j * VEC);
    }
    return totals(products);
}

/* mixed += probs @ values. */
INLINE void weigh(vec *mixed, const float *probs, const float *values, int64_t stride, int count,
                  const int vecs) {
    vec even[MOST_VECS], odd[MOST_VECS]; /* two chains of sums: one would wait for itself */
    UNROLL
    for (int j = 0; j < vecs; j++) even[j] = odd[j] = (vec){0};
    int i = 0;
    for (; i + 2 <= count; i += 2) {
        const float *value = values + i * stride, *next = value + stride;
        UNROLL
        for (int j = 0; j < vecs; j++) {
            even[j] += probs[i] * load(value + j * VEC);
            odd[j] += probs[i + 1] * load(next + j * VEC);
        }
    }
    if (i < count) {
        UNROLL
        for (int j = 0; j < vecs; j++) even[j] += probs[i] * load(values + i * stride + j * VEC);
    }
    UNROLL
    for (int j = 0; j < vecs; j++) mixed[j] += even[j] + odd[j];
}

/* Take count keys and values into a query's state. */
INLINE void attend(struct state *state, const vec *q, const float *keys, const float *values,
                   int64_t stride, int count, const int vecs) {
    float scores[BLOCK];
    int whole = count / VEC * VEC, padded = (count + VEC - 1) / VEC * VEC;
    vec tops = {0};
    tops += state->top;
    for (int i = 0; i < whole; i += VEC) {
        vec found = score(q, keys + i * stride, stride, VEC - 1, vecs);
        tops = larger(found, tops);
        store(scores + i, found);
    }
    if (whole < count) {
        store(scores + whole, score(q, keys + whole * stride, stride, count - 1 - whole, vecs));
        for (int i = count; i < padded; i++) scores[i] = -INFINITY;
        tops = larger(load(scores + whole), tops);
    }
    float top = largest(tops);
    float base = top == -INFINITY ? 0.0f : top; /* nothing but -inf so far: weights of 0, not NaN */
    float kept = exp32(state->top - base);
    for (int i = 0; i < padded; i++) scores[i] = exp32(scores[i] - base);
    vec sums = {0};
    for (int i = 0; i < padded; i += VEC) sums += load(scores + i);
    state->top = top;
    state->sum = state->sum * kept + total(sums);
    for (int j = 0; j < vecs; j++) state->mixed[j] *= kept;
    weigh(state->mixed, scores, values, stride, count, vecs);
}

INLINE void unit(const struct decode_attention_arguments *a, int64_t row, int64_t head,
                 const int vecs) {
    int64_t repeat = a->heads / a->kv_heads, length = *a->step + 1;
    int64_t own = row * a->row_stride + head * a->head_stride;
    int64_t shared = a->prefix_lengths[row] ? a->row_prefix[row] * a->prefix_stride : 0;
    shared += head * a->prefix_head_stride;
    struct {
        const float *keys, *values;
        int64_t stride, length;
    } parts[2] = {
        {a->prefix_keys + shared, a->prefix_values + shared, a->prefix_token_stride,
         a->prefix_lengths[row]},
        {a->keys + own, a->values + own, a->token_stride, length},
    };
    for (int64_t first = 0; first < repeat; first += QUERIES) {
        int queries = repeat - first < QUERIES ? repeat - first : QUERIES;
        struct state states[QUERIES];
        vec q[QUERIES][MOST_VECS];
        for (int n = 0; n < queries; n++) {
            const float *from =
                a->q + row * a->q_row_stride + (head * repeat + first + n) * a->q_head_stride;
            states[n].top = -INFINITY;
            states[n].sum = 0;
            for (int j = 0; j < vecs; j++) {
                q[n][j] = load(from + j * VEC) * (float)a->scale;
                states[n].mixed[j] = (vec){0};
            }
        }
        for (int part = 0; part < 2; part++)
            for (int64_t at = 0; at < parts[part].length; at += BLOCK) {
                int64_t left = parts[part].length - at, skip = at * parts[part].stride;
                for (int n = 0; n < queries; n++)
                    attend(&states[n], q[n], parts[part].keys + skip, parts[part].values + skip,
                           parts[part].stride, left < BLOCK ? left : BLOCK, vecs);
            }
        float *out = a->out + row * a->out_stride + (head * repeat + first) * a->head_dim;
        for (int n = 0; n < queries; n++, out += a->head_dim)
            for (int j = 0; j < vecs; j++)
                store(out + j * VEC, states[n].mixed[j] / states[n].sum);
    }
}

/* By rows where there are enough for all threads, else by units, to whoever is free. */
#define UNITS(vecs)                                                \
    if (a->rows >= 2 * omp_get_num_threads()) {                    \
        OWN_ROWS(row, a->rows)                                     \
            for (int64_t head = 0; head < a->kv_heads; head++)     \
                unit(a, row, head, vecs);                          \
    } else {                                                       \
        _Pragma("omp barrier")                                     \
        _Pragma("omp for schedule(dynamic, 1)")                    \
        for (int64_t i = 0; i < a->rows * a->kv_heads; i++)        \
            unit(a, i / a->kv_heads, i % a->kv_heads, vecs);       \
    }

void decode_attention_share(const struct decode_attention_arguments *a) {
    if (*a->step < 0 || *a->step >= a->slots) return;
    switch (a->head_dim) {
        case 16: UNITS(16 / VEC) break;
        case 32: UNITS(32 / VEC) break;
        case 64: UNITS(64 / VEC) break;
        case 96: UNITS(96 / VEC) break;
        case 128: UNITS(128 / VEC) break;
        default: UNITS((int)(a->head_dim / VEC)) break;
    }
}
