// Hyperspherical prototype loss and its gradients (definition: prototype_loss in reference/). Independent of V, but for
// clearing the prototypes' gradient.
#pragma once
#include "norm.h"

namespace pm {

struct PrototypeLossArgs {
    Pool pool;
    int64_t T, D, V;
    const float *z, *prototypes;                  // (T, D), (V, D)
    const int64_t* targets;                       // (T,), each >= 0
    const float* weight;                          // (T,) or null: what each token's loss counts
    float *cosine, *inverse_z, *inverse_p, *loss;  // (T,) three times; one float: the sum over the tokens
    // Backward only.
    double factor;                // of the sum: incoming gradient / sum of the weights
    const float* dcosine;         // (T,) or null: what else depends on the cosine, its gradient
    float *dz, *dprototypes;      // (T, D) or null, (V, D) or null
};
PM_FIELDS(PrototypeLossArgs, T, D, V, z, prototypes, targets, weight, cosine, inverse_z, inverse_p, loss, factor, dcosine, dz,
          dprototypes)

constexpr float MIN_NORM = 1e-12f;

// 1 / |x| and 0 for a vector without a direction; `largest` keeps the squares of tiny vectors from vanishing.
inline float inverse_norm(const float* x, int64_t D) {
    vf top{};
    for_row(D, [&](int64_t d, int n) {
        vf v = vabs(load(x + d, n));
        top = v > top ? v : top;
    });
    float largest = 0.0f;
    for (int i = 0; i < W; i++) largest = top[i] > largest ? top[i] : largest;
    float shrink = largest > 1e-15f && largest < 1e15f ? 1.0f : 1.0f / std::max(largest, 1e-30f);
    float squares = sum_row(D, [&](int64_t d, int n) {
        vf v = load(x + d, n) * shrink;
        return v * v;
    });
    float norm = std::sqrt(squares) / shrink;
    return norm < MIN_NORM ? 0.0f : 1.0f / norm;
}

inline float weight_of(const PrototypeLossArgs& a, int64_t t) { return a.weight ? a.weight[t] : 1.0f; }

inline double prototype_loss_row(const PrototypeLossArgs& a, int64_t t) {
    const float *z = a.z + t * a.D, *p = a.prototypes + a.targets[t] * a.D;
    float iz = inverse_norm(z, a.D), ip = inverse_norm(p, a.D);
    float c = sum_row(a.D, [&](int64_t d, int n) { return load(z + d, n) * iz * (load(p + d, n) * ip); });
    a.cosine[t] = c;
    a.inverse_z[t] = iz;
    a.inverse_p[t] = ip;
    return double(1.0f - c) * double(1.0f - c) * weight_of(a, t);
}

inline void prototype_loss_forward(const PrototypeLossArgs& a) {
    int64_t parts = std::min(a.T, NORM_PARTS);
    double sums[NORM_PARTS] = {};
    run(a.pool, parts, [&](int64_t i) {
        Range rows = part(a.T, parts, i);
        for (int64_t t = rows.begin; t < rows.end; t++) sums[i] += prototype_loss_row(a, t);
    });
    double total = 0.0;
    for (double s : sums) total += s;
    *a.loss = float(total);
}

// The gradient of a row x whose unit vector meets that of `other` at cosine c; set, or added to what is there.
PM_INLINE void pull(const PrototypeLossArgs& a, int64_t t, const float* x, float inverse_x, const float* other,
                    float inverse_other, float* dx, bool add) {
    float c = a.cosine[t], dcosine = float(a.factor) * weight_of(a, t) * -2.0f * (1.0f - c) + (a.dcosine ? a.dcosine[t] : 0.0f);
    float scale = dcosine * inverse_x;
    float from_other = scale * inverse_other, from_self = scale * c * inverse_x;
    for_row(a.D, [&](int64_t d, int n) {
        vf g = load(other + d, n) * from_other - load(x + d, n) * from_self;
        store(dx + d, add ? load(dx + d, n) + g : g, n);
    });
}

// A part of the prototypes, each taking its tokens in order: the sum never depends on the threads.
inline void prototype_loss_backward_prototypes(const PrototypeLossArgs& a, Range classes) {
    std::memset(a.dprototypes + classes.begin * a.D, 0, (classes.end - classes.begin) * a.D * sizeof(float));
    for (int64_t t = 0; t < a.T; t++) {
        int64_t y = a.targets[t];
        if (y < classes.begin || y >= classes.end) continue;
        pull(a, t, a.prototypes + y * a.D, a.inverse_p[t], a.z + t * a.D, a.inverse_z[t], a.dprototypes + y * a.D, true);
    }
}

inline void prototype_loss_backward_row(const PrototypeLossArgs& a, int64_t t) {
    int64_t y = a.targets[t];
    pull(a, t, a.z + t * a.D, a.inverse_z[t], a.prototypes + y * a.D, a.inverse_p[t], a.dz + t * a.D, false);
}

inline void prototype_loss_backward(const PrototypeLossArgs& a) {
    int64_t row_parts = a.dz ? std::min(a.T, NORM_PARTS) : 0, class_parts = a.dprototypes ? std::min(a.V, NORM_PARTS) : 0;
    run(a.pool, row_parts + class_parts, [&](int64_t i) {
        if (i >= row_parts) return prototype_loss_backward_prototypes(a, part(a.V, class_parts, i - row_parts));
        Range rows = part(a.T, row_parts, i);
        for (int64_t t = rows.begin; t < rows.end; t++) prototype_loss_backward_row(a, t);
    });
}

}  // namespace pm
