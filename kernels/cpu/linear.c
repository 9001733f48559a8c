/* y = x W^T (+ bias), few rows, W in panels of PANEL outputs: (N / PANEL, K, PANEL) fp32, or
   (N / PANEL, K, VEC, 2) bf16: outputs j and VEC + j side by side, so that one load, a shift and a
   mask make both halves of the panel.

   A tile of TILE_ROWS x PANEL sums stays in registers while K goes by. Sums run over K in order,
   one by one, so that a row's result is the same bits whatever else is in the batch. */

#include "ops.h"
#include "simd.h"

#define PANEL (2 * VEC)
#if defined(__AVX__) && !defined(__AVX512F__)
#define TILE_ROWS 6 /* 16 registers */
#else
#define TILE_ROWS 8 /* 32 registers */
#endif
/* Rows of one thread's turn: they stay in cache while it goes over a panel. A multiple of both. */
#define BLOCK_ROWS 48
#define SMALL_WEIGHT (1 << 17) /* elements: half of a usual L2 */

const int64_t linear_panel = PANEL;
OP(linear)
OP(pack)

/* `rows` rows from `first` on times one panel; rows <= TILE_ROWS and bf16 are constants where
   inlined. */
INLINE void tile(const struct linear_arguments *a, int64_t panel, int64_t first, const int rows,
                 const int bf16) {
    const float *x = a->x + first * a->x_stride;
    const char *w = (const char *)a->panels + panel * a->in_features * PANEL * (bf16 ? 2 : 4);
    vec sums[TILE_ROWS][2];
    vec bias[2] = {{0}, {0}};
    int64_t column = panel * PANEL, width = a->out_features - column;
    if (width > PANEL) width = PANEL;
    if (a->bias) memcpy(bias, a->bias + column, sizeof(float) * width);
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vec){0};
    for (int64_t k = 0; k < a->in_features; k++, w += PANEL * (bf16 ? 2 : 4)) {
        vec low = load((const float *)w), high;
        if (bf16) { /* the upper half of an fp32 number is that number in bf16 */
            high = (vec)((ints)low & (int32_t)0xffff0000);
            low = (vec)((ints)low << 16);
        } else {
            high = load((const float *)w + VEC);
        }
        for (int i = 0; i < rows; i++) {
            float value = x[i * a->x_stride + k];
            sums[i][0] += value * low;
            sums[i][1] += value * high;
        }
    }
    for (int i = 0; i < rows; i++) {
        float result[PANEL];
        store(result, sums[i][0] + bias[0]);
        store(result + VEC, sums[i][1] + bias[1]);
        if (a->gelu)
            for (int j = 0; j < PANEL; j++) result[j] = gelu32(result[j]);
        float *y = a->y + (first + i) * a->y_stride + column;
        if (width == PANEL)
            memcpy(y, result, sizeof result);
        else
            memcpy(y, result, sizeof(float) * width);
    }
}

INLINE void tiles_of(const struct linear_arguments *a, int64_t panel, int64_t first, int64_t end,
                     const int bf16) {
    for (; first + TILE_ROWS <= end; first += TILE_ROWS) tile(a, panel, first, TILE_ROWS, bf16);
    switch (end - first) {
#if TILE_ROWS > 6
        case 7: tile(a, panel, first, 7, bf16); break;
        case 6: tile(a, panel, first, 6, bf16); break;
#endif
        case 5: tile(a, panel, first, 5, bf16); break;
        case 4: tile(a, panel, first, 4, bf16); break;
        case 3: tile(a, panel, first, 3, bf16); break;
        case 2: tile(a, panel, first, 2, bf16); break;
        case 1: tile(a, panel, first, 1, bf16); break;
    }
}

static void tiles(const struct linear_arguments *a, int64_t panel, int64_t first, int64_t end) {
    if (a->bf16)
        tiles_of(a, panel, first, end, 1);
    else
        tiles_of(a, panel, first, end, 0);
}

void linear_share(const struct linear_arguments *a) {
    int64_t panels = (a->out_features + PANEL - 1) / PANEL, rows = a->rows;
    int64_t small = a->in_features * a->out_features <= SMALL_WEIGHT;
    if (small && rows >= TILE_ROWS * omp_get_num_threads()) {
        int64_t length = run_length(rows);
        for (int64_t panel = 0; panel < panels; panel++)
            OWN_RUNS(first, rows, length) tiles(a, panel, first, RUN_END(first, rows, length));
        return;
    }
    /* A weight that every thread had better not read: panels go to threads, with all the rows. */
    int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < panels * blocks; unit++) {
        int64_t first = unit % blocks * BLOCK_ROWS;
        tiles(a, unit / blocks, first, RUN_END(first, rows, BLOCK_ROWS));
    }
}

#define PACK_COLUMNS 32 /* of PANEL rows at a time: what is written stays in the first cache */

/* One panel; bf16 is a constant where inlined. Outputs past the last are zeros. */
INLINE void pack_panel(const struct pack_arguments *a, int64_t panel, const int bf16) {
    int64_t width = a->in_features, row = panel * PANEL;
    for (int64_t start = 0; start < width; start += PACK_COLUMNS) {
        int64_t end = RUN_END(start, width, PACK_COLUMNS);
        for (int64_t j = 0; j < PANEL; j++) {
            int64_t from = (row + j) * width, to = (panel * width) * PANEL + j;
            int zero = row + j >= a->out_features;
            if (bf16) {
                to += j < VEC ? j : j - 2 * VEC + 1; /* 2 j, or 2 (j - VEC) + 1 */
                const uint16_t *weight = (const uint16_t *)a->weight + from;
                uint16_t *panels = (uint16_t *)a->panels + to;
                for (int64_t k = start; k < end; k++) panels[k * PANEL] = zero ? 0 : weight[k];
            } else {
                const float *weight = (const float *)a->weight + from;
                float *panels = (float *)a->panels + to;
                for (int64_t k = start; k < end; k++) panels[k * PANEL] = zero ? 0 : weight[k];
            }
        }
    }
}

void pack_share(const struct pack_arguments *a) {
    int64_t panels = (a->out_features + PANEL - 1) / PANEL;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        if (a->bf16)
            pack_panel(a, panel, 1);
        else
            pack_panel(a, panel, 0);
    }
}
