// AdamW over many tensors in one pass over their memory (definition: adamw in reference/). The pass is bound by that memory:
// 16 bytes read and 12 written for each element.
#pragma once
#include "layout.h"

namespace pm {

struct AdamWArgs {
    Pool pool;
    int64_t count;
    double lr, scale, beta1, beta2, eps;          // gradients are multiplied by `scale`
    const int64_t* sizes;                         // (count,)
    float* const* parameters;                     // (count,) each
    const float* const* gradients;
    float *const *exp_avg, *const *exp_avg_sq;
    float* const* steps;                          // one float each: updates so far, this one not counted
    const double* decay;                          // (count,)
    int64_t* spoilt;                              // (count,): whether a moment would not have been finite; that part stays
};
PM_FIELDS(AdamWArgs, count, lr, scale, beta1, beta2, eps, sizes, parameters, gradients, exp_avg, exp_avg_sq, steps, decay, spoilt)

constexpr float LARGEST = 3.402823466e38f;

// Elements that a task takes at a time, and those that are written together or not at all.
constexpr int64_t ADAMW_TASK = 1 << 16, ADAMW_BLOCK = 1 << 8;

// The factors of one tensor's update: p = keep p - rate m / (sqrt(v) root + eps).
struct AdamWFactors {
    float scale, beta1, rest1, beta2, rest2, keep, rate, root, eps;
};

inline AdamWFactors adamw_factors(const AdamWArgs& a, int64_t i) {
    double step = double(*a.steps[i]) + 1.0;
    double debias1 = 1.0 - std::pow(a.beta1, step), debias2 = 1.0 - std::pow(a.beta2, step);
    return {float(a.scale), float(a.beta1), float(1.0 - a.beta1), float(a.beta2), float(1.0 - a.beta2),
            float(1.0 - a.lr * a.decay[i]), float(a.lr / debias1), float(1.0 / std::sqrt(debias2)), float(a.eps)};
}

// One block of at most ADAMW_BLOCK elements; false, and nothing is written, if one of its new moments is not finite.
PM_INLINE bool adamw_block(const AdamWFactors& f, float* p, const float* g, float* m, float* v, int64_t count) {
    alignas(64) float moved[ADAMW_BLOCK], first[ADAMW_BLOCK], second[ADAMW_BLOCK];
    vi infinite{};
    for (int64_t i = 0; i < count; i += W) {
        int lanes = int(std::min<int64_t>(W, count - i));
        vf grad = load(g + i, lanes) * f.scale;
        vf mean = load(m + i, lanes) * f.beta1 + grad * f.rest1, square = load(v + i, lanes) * f.beta2 + grad * grad * f.rest2;
        vf step = f.rate * mean / (vsqrt(square) * f.root + f.eps);
        infinite |= ~((vabs(mean) <= LARGEST) & (vabs(square) <= LARGEST));
        store(first + i, mean);
        store(second + i, square);
        store(moved + i, load(p + i, lanes) * f.keep - step);
    }
    for (int i = 0; i < W; i++)
        if (infinite[i]) return false;
    std::memcpy(p, moved, count * sizeof(float));
    std::memcpy(m, first, count * sizeof(float));
    std::memcpy(v, second, count * sizeof(float));
    return true;
}

inline void adamw(const AdamWArgs& a) {
    int64_t tasks = 0;
    for (int64_t i = 0; i < a.count; i++) a.spoilt[i] = 0, tasks += ceil_div(a.sizes[i], ADAMW_TASK);
    run(a.pool, tasks, [&](int64_t task) {
        int64_t i = 0;
        for (; task >= ceil_div(a.sizes[i], ADAMW_TASK); i++) task -= ceil_div(a.sizes[i], ADAMW_TASK);
        AdamWFactors f = adamw_factors(a, i);
        int64_t end = std::min(a.sizes[i], (task + 1) * ADAMW_TASK);
        for (int64_t at = task * ADAMW_TASK; at < end; at += ADAMW_BLOCK)
            if (!adamw_block(f, a.parameters[i] + at, a.gradients[i] + at, a.exp_avg[i] + at, a.exp_avg_sq[i] + at,
                             std::min(ADAMW_BLOCK, end - at)))
                __atomic_store_n(&a.spoilt[i], 1, __ATOMIC_RELAXED);
    });
    for (int64_t i = 0; i < a.count; i++) *a.steps[i] += 1.0f;
}

}  // namespace pm
