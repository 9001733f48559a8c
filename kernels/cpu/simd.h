/* Vectors as wide as the machine's registers, and the elementary functions of fp32 numbers.

   exp, log and erfc are written without branches, so that loops over them become vector code
   whatever the C library offers. Their polynomials are our own fits (Chebyshev nodes, Lawson's
   weights); with correctly rounded coefficients the fits are off by 4e-9, 8e-10 and 9e-9, so that
   what remains is fp32's rounding: tests/kernels/cpu/test_ops.py holds them to it. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VEC 16
#elif defined(__AVX__)
#define VEC 8
#else
#define VEC 4
#endif

/* aligned(4): may be loaded from any float's address. */
typedef float vec __attribute__((vector_size(4 * VEC), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

typedef int32_t ints __attribute__((vector_size(4 * VEC)));

/* The larger of each pair; b where a is NaN. */
INLINE vec larger(vec a, vec b) {
    ints chosen = a > b;
    return (vec)((chosen & (ints)a) | (~chosen & (ints)b));
}

#define UNROLL _Pragma("GCC unroll 16")
#if VEC == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif VEC == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc before 12 has no other */
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Sums of neighbours: those in a, then those in b. */
INLINE vec neighbours(vec a, vec b) { return SHUFFLE(a, b, EVEN) + SHUFFLE(a, b, ODD); }

/* The total of each of VEC vectors, as one vector; overwrites them. */
INLINE vec totals(vec *v) {
    UNROLL
    for (int count = VEC / 2; count; count /= 2) {
        UNROLL
        for (int i = 0; i < count; i++)
            v[i] = neighbours(v[2 * i], v[2 * i + 1]);
    }
    return v[0];
}

INLINE float total(vec v) {
    UNROLL
    for (int width = VEC; width > 1; width /= 2)
        v = neighbours(v, v);
    return v[0];
}

INLINE float largest(vec v) {
    UNROLL
    for (int width = VEC; width > 1; width /= 2)
        v = larger(SHUFFLE(v, v, EVEN), SHUFFLE(v, v, ODD));
    return v[0];
}

INLINE float bits_to_float(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t float_to_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* e^x; 0 below -87 (fp32's smallest normal number is e^-87.3), NaN for NaN. x <= 88. */
INLINE float exp32(float x) {
    float n = __builtin_rintf(x * 1.44269504f);
    n = n > -127.0f ? n : -127.0f; /* 2^-127 is written as 0; NaN too, which r keeps */
    float r = x - n * 0.693359375f; /* ln 2 in two parts, the first exact in every product */
    r += n * 2.12194440e-4f;
    float p = 1.3813143e-3f;
    p = p * r + 8.3694188e-3f;
    p = p * r + 4.1668456e-2f;
    p = p * r + 1.6666515e-1f;
    p = p * r + 4.9999994e-1f;
    p = p * (r * r) + r + 1.0f;
    float power = bits_to_float(((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

/* Natural logarithm of a positive normal number. */
INLINE float log32(float x) {
    /* x = m 2^e, m from sqrt(1/2) to sqrt(2), so that the result is accurate near 1. */
    int32_t shifted = float_to_bits(x) - 0x3f3504f3;
    int32_t e = shifted >> 23;
    float f = bits_to_float(float_to_bits(x) - (int32_t)((uint32_t)e << 23)) - 1.0f;
    float p = 6.9153681e-2f;
    p = p * f - 1.1789808e-1f;
    p = p * f + 1.1872976e-1f;
    p = p * f - 1.2384348e-1f;
    p = p * f + 1.4218658e-1f;
    p = p * f - 1.6669251e-1f;
    p = p * f + 2.0002227e-1f;
    p = p * f - 2.4999987e-1f;
    p = p * f + 3.3333310e-1f;
    float square = f * f, n = (float)e;
    float low = p * (square * f) - n * 2.12194440e-4f - 0.5f * square;
    return low + f + n * 0.693359375f;
}

/* 1 - erf(x) for x >= 0, to 1e-7 absolute. */
INLINE float erfc32(float x) {
    float t = 1.0f / (1.0f + 0.5f * x);
    float p = 1.02413513e-01f;
    p = p * t - 6.21594897e-01f;
    p = p * t + 1.25868627e+00f;
    p = p * t - 5.92842701e-01f;
    p = p * t + 6.49346427e-01f;
    p = p * t + 1.95340219e-01f;
    p = p * t + 8.65115621e-03f;
    float square = x * x;
    return p * exp32(square < 88.0f ? -square : -88.0f);
}

INLINE float gelu32(float x) {
    float tail = erfc32(fabsf(x) * 0.70710678f);
    return x * (x < 0.0f ? 0.5f * tail : 1.0f - 0.5f * tail);
}
