// RMS norm, with or without a residual added before it, forward and backward (definition: rms_norm in reference/).
#pragma once
#include "layout.h"

namespace pm {

struct NormArgs {
    Pool pool;
    int64_t T, D, out_is_bf16;
    double eps;
    const float *x, *residual, *weight;  // (T, D), (T, D) or null, (D,)
    char* y;                             // (T, D), float or bf16
    float *total, *scale;                // (T, D) = x + residual, unless that is null; (T,) = 1 / rms, or null in the forward pass
    // Backward only; x is the sum.
    const char* dy;
    const float* dtotal;  // (T, D) or null: the gradient that reaches the sum by another way
    float *dx, *dweight;  // (T, D); (D,) or null
};
PM_FIELDS(NormArgs, T, D, out_is_bf16, eps, x, residual, weight, y, total, scale, dy, dtotal, dx, dweight)

constexpr int64_t NORM_PARTS = 16;

// Sums in four independent chains; `term` gives the vector at lane d, 0 beyond the end.
template <class Term>
PM_INLINE float sum_row(int64_t D, const Term& term) {
    vf s[4] = {};
    int64_t d = 0;
    for (; d + 4 * W <= D; d += 4 * W)
        for (int i = 0; i < 4; i++) s[i] += term(d + i * W, W);
    for (; d < D; d += W) s[0] += term(d, int(std::min<int64_t>(W, D - d)));
    return sum((s[0] + s[1]) + (s[2] + s[3]));
}

template <class Body>
PM_INLINE void for_row(int64_t D, const Body& body) {
    for (int64_t d = 0; d < D; d += W) body(d, int(std::min<int64_t>(W, D - d)));
}

// Runs row(t) for T rows, on several threads.
template <class Row>
void each_row(const Pool& pool, int64_t T, const Row& row) {
    int64_t parts = std::min(T, NORM_PARTS);
    run(pool, parts, [&](int64_t i) {
        Range rows = part(T, parts, i);
        for (int64_t t = rows.begin; t < rows.end; t++) row(t);
    });
}

template <class T>
void norm_forward_row(const NormArgs& a, int64_t t) {
    const float* x = a.x + t * a.D;
    T* y = reinterpret_cast<T*>(a.y) + t * a.D;
    if (a.residual) {
        float* total = a.total + t * a.D;
        for_row(a.D, [&](int64_t d, int n) { store(total + d, load(x + d, n) + load(a.residual + t * a.D + d, n), n); });
        x = total;
    }
    float squares = sum_row(a.D, [&](int64_t d, int n) {
        vf v = load(x + d, n);
        return v * v;
    });
    float scale = 1.0f / std::sqrt(squares / float(a.D) + float(a.eps));
    if (a.scale) a.scale[t] = scale;
    for_row(a.D, [&](int64_t d, int n) { store(y + d, load(x + d, n) * scale * load(a.weight + d, n), n); });
}

template <class T>
void norm_forward(const NormArgs& a) {
    each_row(a.pool, a.T, [&](int64_t t) { norm_forward_row<T>(a, t); });
}

// dx = scale (w dy - x^ mean(w dy x^)) + dtotal with x^ = scale x; adds dy x^ to dweight.
template <class T>
void norm_backward_row(const NormArgs& a, int64_t t, float* dweight) {
    const float* x = a.x + t * a.D;
    const T* dy = reinterpret_cast<const T*>(a.dy) + t * a.D;
    float scale = a.scale[t];
    float dot = sum_row(a.D, [&](int64_t d, int n) { return load(dy + d, n) * load(a.weight + d, n) * load(x + d, n); });
    float pull = dot * scale * scale / float(a.D);
    for_row(a.D, [&](int64_t d, int n) {
        vf g = load(dy + d, n), v = load(x + d, n);
        vf dx = scale * (g * load(a.weight + d, n) - v * pull);
        if (a.dtotal) dx += load(a.dtotal + t * a.D + d, n);
        store(a.dx + t * a.D + d, dx, n);
        if (dweight) store(dweight + d, load(dweight + d, n) + g * v * scale, n);
    });
}

template <class T>
void norm_backward(const NormArgs& a) {
    int64_t parts = std::min(a.T, NORM_PARTS);
    Buffer partials(a.dweight ? parts * a.D : 0);
    if (!partials) return;
    run(a.pool, parts, [&](int64_t i) {
        Range rows = part(a.T, parts, i);
        float* dweight = a.dweight ? partials.data + i * a.D : nullptr;
        if (dweight) std::memset(dweight, 0, a.D * sizeof(float));
        for (int64_t t = rows.begin; t < rows.end; t++) norm_backward_row<T>(a, t, dweight);
    });
    if (!a.dweight) return;
    for_row(a.D, [&](int64_t d, int n) {
        vf total{};
        for (int64_t p = 0; p < parts; p++) total += load(partials.data + p * a.D + d, n);
        store(a.dweight + d, total, n);
    });
}

}  // namespace pm
