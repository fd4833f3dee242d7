// Vectors of PM_WIDTH floats in GCC/Clang vector extensions, and the few functions of them that the kernels share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define PM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PM_UNROLL _Pragma("GCC unroll 16")
#endif
#define PM_INLINE static inline __attribute__((always_inline))

namespace pm {

constexpr int W = PM_WIDTH;
constexpr float LOG2_E = 1.44269504088896f, LN_2 = 0.693147180559945f;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 4)));  // 2 W lanes
typedef int8_t vb __attribute__((vector_size(W * 2)));   // 2 W lanes
// The same in memory, at any address. (Locals keep their natural alignment: GCC spills them with aligned moves.)
typedef float vf_memory __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(W * 2), aligned(2), may_alias));

typedef int16_t vs_memory __attribute__((vector_size(W * 4), aligned(2), may_alias));
typedef int8_t vb_memory __attribute__((vector_size(W * 2), aligned(1), may_alias));

struct bf16 {
    uint16_t bits;
};

PM_INLINE vf splat(float x) { return x - vf{}; }
PM_INLINE vi bits_of(vf x) { return (vi)x; }

PM_INLINE vf load(const float* p) { return *(const vf_memory*)p; }
PM_INLINE void store(float* p, vf v) { *(vf_memory*)p = v; }

PM_INLINE vf load(const bf16* p) {
    vu wide = __builtin_convertvector(*(const vh_memory*)p, vu) << 16;
    return (vf)wide;
}

// Round to nearest even, as torch does; a NaN stays one.
PM_INLINE void store(bf16* p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (vu)(v != v);
    *(vh_memory*)p = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), vh);
}

// The first `count` lanes only; the others read as 0 and are not written.
template <class T>
PM_INLINE vf load(const T* p, int count) {
    if (count >= W) return load(p);
    alignas(vf) T lanes[W];
    std::memset(lanes, 0, sizeof lanes);
    std::memcpy(lanes, p, sizeof(T) * count);
    return load(lanes);
}

template <class T>
PM_INLINE void store(T* p, vf v, int count) {
    if (count >= W) return store(p, v);
    alignas(vf) T lanes[W];
    store(lanes, v);
    std::memcpy(p, lanes, sizeof(T) * count);
}

PM_INLINE float to_float(float x) { return x; }
PM_INLINE float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// The sum of the lanes, always in the same order.
PM_INLINE float sum(vf v) {
    alignas(vf) float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The first n lanes of x, in the others `rest`.
PM_INLINE vf first_lanes(vf x, int n, float rest) {
    for (int i = n; i < W; i++) x[i] = rest;
    return x;
}

PM_INLINE float largest_lane(vf x) {
    float largest = x[0];
    for (int i = 1; i < W; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// p * 2^i for integral |i| <= 128 and p in [0.7, 1.5): adds i to the exponent of p. Of a NaN it makes anything.
PM_INLINE vf scale_by_bits(vf p, vi i) { return (vf)((vu)p + ((vu)i << 23)); }

// Adding this rounds a float of at most 2^22 to an integer that then stands in its low bits. Only without
// associative-math, which would cancel it.
constexpr float ROUND = 12582912.0f;

#if defined(__AVX512DQ__)
constexpr __mmask16 ALL_LANES = 0xffff;  // GCC 12 warns about the undefined source of the unmasked intrinsics
#endif

// 2^x, relative error below 2.5 ulp. Above 128 infinity; below -126 it stays 2^-126 where the hardware has no scalef.
PM_INLINE vf exp2(vf x) {
    [[maybe_unused]] vf given = x;
#if defined(__AVX512DQ__)
    vf n = (vf)_mm512_maskz_roundscale_ps(ALL_LANES, (__m512)x, 8);
    vf f = x - n;
#else
    x = x < -126.0f ? splat(-126.0f) : x;
    x = x > 128.0f ? splat(128.0f) : x;
    vf shifted = x + ROUND;
    vf f = x - (shifted - ROUND);
#endif
    // Minimax in relative error on [-1/2, 1/2], 9.2e-8, with exp2(0) = 1 exactly.
    vf p = f * 0.001326472731307149f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    p = p * f + 1.0f;
#if defined(__AVX512DQ__)
    return (vf)_mm512_maskz_scalef_ps(ALL_LANES, (__m512)p, (__m512)n);
#else
    return given == given ? scale_by_bits(p, bits_of(shifted) - 0x4B400000) : given;
#endif
}

// e^x, relative error below 2 ulp on [-87, 88]; infinity above, at least 2^-126 or 0 below.
PM_INLINE vf exp(vf x) {
    [[maybe_unused]] vf given = x;
    x = x < -88.0f ? splat(-88.0f) : x;
    x = x > 89.0f ? splat(89.0f) : x;
    vf shifted = x * 1.44269504f + ROUND;
    vf n = shifted - ROUND;
    vf r = x - n * 0.693145751953125f;  // ln 2 in two parts: n times the first is exact
    r = r - n * 1.42860677e-06f;
    // Minimax in relative error on [-ln2/2, ln2/2], 3e-9.
    vf p = r * 0.0013814560370519757f + 0.008368735201656818f;
    p = p * r + 0.04166838899254799f;
    p = p * r + 0.1666652113199234f;
    p = p * r + 0.4999999403953552f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512DQ__)
    return (vf)_mm512_maskz_scalef_ps(ALL_LANES, (__m512)p, (__m512)n);
#else
    // Two steps: 2^n alone would overflow for x above 88.37, and underflow below -87.3.
    vi i = bits_of(shifted) - 0x4B400000, half = i >> 1;
    return given == given ? scale_by_bits(p, half) * scale_by_bits(splat(1.0f), i - half) : given;
#endif
}

PM_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

PM_INLINE vf vsqrt(vf x) {
#if defined(__AVX512DQ__)
    return (vf)_mm512_maskz_sqrt_ps(ALL_LANES, (__m512)x);
#else
    for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

PM_INLINE vf vabs(vf x) { return (vf)(bits_of(x) & 0x7fffffff); }

// log(1 + e^x), relative error below 4 ulp, and its derivative 1 / (1 + e^-x). With y = e^-|x| in (0, 1] the logarithm is
// 2 atanh(s), s = y / (2 + y); one division serves both.
PM_INLINE vf softplus(vf x, vf* slope) {
    vf y = exp(-vabs(x)), one = y + 1.0f, two = y + 2.0f;
    vf inverse = 1.0f / (one * two), s = y * one * inverse, q = s * s;
    *slope = (x >= 0.0f ? two : two * y) * inverse;
    // Minimax in relative error of (atanh(s) / s - 1) / s^2 for s^2 in [0, 1/9], 1.1e-10.
    vf p = q * 0.12144841253757477f + 0.10715354979038239f;
    p = p * q + 0.14308299124240875f;
    p = p * q + 0.19999444484710693f;
    p = p * q + 0.3333333730697632f;
    return (x > 0.0f ? x : x - x) + 2.0f * (s + s * q * p);
}

// 2 W small integers.
PM_INLINE vs load(const int16_t* p) { return *(const vs_memory*)p; }
PM_INLINE vs load(const int8_t* p) {
    vb narrow = *(const vb_memory*)p;
#if defined(__AVX512BW__)
    return (vs)_mm512_cvtepi8_epi16((__m256i)narrow);  // where GCC 12 makes two halves and joins them
#elif defined(__AVX2__)
    return (vs)_mm256_cvtepi8_epi16((__m128i)narrow);
#else
    return __builtin_convertvector(narrow, vs);
#endif
}

// The first `count` lanes of v, |v| < 2^15, to the nearest integers.
PM_INLINE void store_rounded(int16_t* p, vf v, int count) {
    typedef int16_t half __attribute__((vector_size(W * 2)));
    half rounded = __builtin_convertvector(bits_of(v + ROUND) - 0x4B400000, half);
    std::memcpy(p, &rounded, sizeof(int16_t) * std::min(count, W));
}

// sum + a * b, lane i of the sum taking the products 2 i and 2 i + 1.
PM_INLINE vi add_products(vi sum, vs a, vs b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    return sum + (vi)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
#else
    for (int i = 0; i < W; i++) sum[i] += int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
    return sum;
#endif
}

// Half of the lanes of a and b: of each group of 4 (AT < 4) the even or odd ones of a, then of b; from AT = 4 on the even
// or odd groups of a, then of b. Shuffles that every level has as one instruction.
template <int AT, int ODD, std::size_t... I>
PM_INLINE vf half_of(vf a, vf b, std::index_sequence<I...>) {
    if constexpr (AT < 4)
        return __builtin_shufflevector(a, b, int(I / 4 * 4 + I % 2 * 2 + ODD + I % 4 / 2 * W)...);
    else
        return __builtin_shufflevector(a, b, int((I / 4 * 2 + ODD) * 4 + I % 4)...);
}

// One level of a tree of horizontal sums. With v1 .. vW at the leaves and AT = 1, 2, 4, ... going up, lane i of the root is
// the sum of the lanes of v(i + 1), in a fixed order.
template <int AT>
PM_INLINE vf sum_pairs(vf a, vf b) {
    constexpr auto lanes = std::make_index_sequence<W>();
    return half_of<AT, 0>(a, b, lanes) + half_of<AT, 1>(a, b, lanes);
}

// Lane i is the sum of the lanes of leaf(i): the whole tree over leaves FIRST .. FIRST + COUNT - 1, W of them from outside.
template <int FIRST = 0, int COUNT = W, class Leaf>
PM_INLINE vf sum_each(const Leaf& leaf) {
    if constexpr (COUNT == 1)
        return leaf(FIRST);
    else
        return sum_pairs<COUNT / 2>(sum_each<FIRST, COUNT / 2>(leaf), sum_each<FIRST + COUNT / 2, COUNT / 2>(leaf));
}

// Of a and b, cut into runs of S lanes: the even runs (ODD = 0) or the odd ones, taken from a and b in turn.
template <int S, int ODD, std::size_t... I>
PM_INLINE vf runs(vf a, vf b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I / (2 * S) * (2 * S) + I % S + ODD * S + (I / S % 2) * W)...);
}

// The W x W transpose of v, in place: exchanges the odd runs of one half of the rows with the even runs of the other.
template <int S = W / 2>
PM_INLINE void transpose_lanes(vf* v) {
    constexpr auto lanes = std::make_index_sequence<W>();
    PM_UNROLL
    for (int i = 0; i < W; i++) {
        if (i & S) continue;
        vf a = v[i], b = v[i + S];
        v[i] = runs<S, 0>(a, b, lanes);
        v[i + S] = runs<S, 1>(a, b, lanes);
    }
    if constexpr (S > 1) transpose_lanes<S / 2>(v);
}

}  // namespace pm
