/* Counter-based random words: Philox4x32-10 (Salmon et al., 2011), as in kernels/philox.py. */

#pragma once

#include "simd.h"

#define PHILOX_COUNTERS 128 /* at most, of one call */

/* Four words for each of `count` counters (first, c1, c2, c3), (first + 1, c1, c2, c3), ...; count
   is a constant where inlined, at most PHILOX_COUNTERS. */
INLINE void philox(uint32_t *restrict words, const int count, uint64_t seed, uint32_t first,
                   uint32_t c1_of_all, uint32_t c2_of_all, uint32_t c3_of_all) {
    uint32_t c0[PHILOX_COUNTERS], c1[PHILOX_COUNTERS], c2[PHILOX_COUNTERS], c3[PHILOX_COUNTERS];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < count; i++) {
        c0[i] = first + (uint32_t)i;
        c1[i] = c1_of_all;
        c2[i] = c2_of_all;
        c3[i] = c3_of_all;
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < count; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)p1;
            c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < count; i++) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}
