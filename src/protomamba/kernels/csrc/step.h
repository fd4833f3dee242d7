// One token of a whole residual block for a small batch (definition: mamba_step in reference/). Bound by reading the
// weights once (matrix.h); what is not a product runs in the task that made its input, channel block by channel block.
#pragma once
#include "norm.h"
#include "product.h"

namespace pm {

struct StepArgs {
    Pool pool;
    int64_t B, D, E, N, R, K;
    double eps;
    const float* x;  // (B, D)
    // As in reference.BlockWeights, but for taps (K, E) and A = -exp(A_log). in_proj is null in a compact block.
    const float *norm, *taps, *conv_bias, *dt_bias, *A, *skip;
    int64_t kind;  // of the matrices (matrix.h)
    const void *in_proj, *x_proj, *dt_proj, *out_proj;
    const float *in_scale, *x_scale, *dt_scale, *out_scale;
    float *conv_state, *ssm_state, *out;  // (B, K - 1, E), (B, E, N), (B, D)

    int64_t width() const { return in_proj ? 2 * E : E; }
    int64_t projected() const { return R + 2 * N; }
};
PM_FIELDS(StepArgs, B, D, E, N, R, K, eps, x, norm, taps, conv_bias, dt_bias, A, skip, kind, in_proj, x_proj, dt_proj, out_proj, in_scale,
          x_scale, dt_scale, out_scale, conv_state, ssm_state, out)

// u (E,) in: `lanes` new inputs from channel e; out: SiLU of the convolution. The state moves on by one.
PM_INLINE void step_conv(const StepArgs& a, float* state, float* u, int64_t e, int lanes) {
    vf now = load(u + e, lanes);
    vf sum = load(a.conv_bias + e, lanes) + load(a.taps + (a.K - 1) * a.E + e, lanes) * now;
    for (int64_t k = 0; k < a.K - 1; k++) {
        float* slot = state + k * a.E + e;
        sum += load(a.taps + k * a.E + e, lanes) * load(slot, lanes);
        store(slot, k + 2 < a.K ? load(slot + a.E, lanes) : now, lanes);
    }
    store(u + e, sum * sigmoid(sum), lanes);
}

// The memory's own prefetching loses the decays and the states among the streams around them: 6 layers of 1,024 channels
// waited half of their time for them.
constexpr int64_t STATES_AHEAD = 1024;

// The scan's output for `lanes` channels from e, whose dt before the bias is given, gated if z. h (E, N) moves on by one.
PM_INLINE vf step_scan(const StepArgs& a, float* h, const float* u, const float* B, const float* C, const float* z, int64_t e,
                       int lanes, vf dt) {
    vf slope, input = load(u + e, lanes);
    dt = softplus(dt + load(a.dt_bias + e, lanes), &slope);
    alignas(vf) float dts[W], xs[W];
    store(dts, dt * LOG2_E);
    store(xs, dt * input);
    auto states = [&](int64_t at, int64_t n, int count, int i) __attribute__((always_inline)) {
        PM_PREFETCH_READ(a.A + at + STATES_AHEAD);
        PM_PREFETCH_WRITE(h + at + STATES_AHEAD);
        vf state = exp2(load(a.A + at, count) * dts[i]) * load(h + at, count) + load(B + n, count) * xs[i];
        store(h + at, state, count);
        return state * load(C + n, count);
    };
    auto channel = [&](int i) __attribute__((always_inline)) {
        vf sum{};
        if (i >= lanes) return sum;
        int64_t at = (e + i) * a.N, n = 0;
        for (; n + W <= a.N; n += W) sum += states(at + n, n, W, i);
        if (n < a.N) sum += states(at + n, n, int(a.N - n), i);
        return sum;
    };
    vf out = sum_each(channel) + load(a.skip + e, lanes) * input;
    if (!z) return out;
    vf gate = load(z + e, lanes);
    return out * (gate * sigmoid(gate));
}

// normed (B, D) -> uz (B, width): in_proj, and the convolution of its first half.
inline void step_input(const StepArgs& a, const float* normed, float* uz) {
    auto conv = [&](int64_t b, int64_t e, int lanes) {
        step_conv(a, a.conv_state + b * (a.K - 1) * a.E, uz + b * a.width(), e, lanes);
    };
    if (!a.in_proj) {
        for (int64_t b = 0; b < a.B; b++) for_row(a.E, [&](int64_t e, int lanes) { conv(b, e, lanes); });
        return;
    }
    Matrix m{a.kind, a.width(), a.D, a.in_proj, a.in_scale};
    Vectors v(m, normed, a.D, a.B);
    if (!v) return;
    for_row_groups(a.pool, a.width(), a.D, [&](Range groups) {
        times_vectors(m, v, groups, [&](int64_t b, int64_t e, int lanes, vf sums) {
            store(uz + b * a.width() + e, sums, lanes);
            if (e < a.E) conv(b, e, int(std::min<int64_t>(lanes, a.E - e)));
        });
    });
}

// uz (B, width) and p (B, projected) = dt, B, C -> y (B, E): dt_proj and the scan of the same channels.
inline void step_core(const StepArgs& a, const float* uz, const float* p, float* y) {
    Matrix m{a.kind, a.E, a.R, a.dt_proj, a.dt_scale};
    Vectors v(m, p, a.projected(), a.B);
    if (!v) return;
    // A state of the scan costs about as much as 8 weights of a product.
    for_row_groups(a.pool, a.E, a.R + 8 * a.N, [&](Range groups) {
        times_vectors(m, v, groups, [&](int64_t b, int64_t e, int lanes, vf dt) {
            const float *u = uz + b * a.width(), *Bn = p + b * a.projected() + a.R, *z = a.in_proj ? u + a.E : nullptr;
            vf out = step_scan(a, a.ssm_state + b * a.E * a.N, u, Bn, Bn + a.N, z, e, lanes, dt);
            store(y + b * a.E + e, out, lanes);
        });
    });
}

// out = x + out_proj y.
inline void step_output(const StepArgs& a, const float* y) {
    Matrix m{a.kind, a.D, a.E, a.out_proj, a.out_scale};
    Vectors v(m, y, a.E, a.B);
    if (!v) return;
    for_row_groups(a.pool, a.D, a.E, [&](Range groups) {
        times_vectors(m, v, groups, [&](int64_t b, int64_t r, int lanes, vf sums) {
            store(a.out + b * a.D + r, sums + load(a.x + b * a.D + r, lanes), lanes);
        });
    });
}

inline void step(const StepArgs& a) {
    Buffer memory(a.B * (a.D + a.width() + a.projected() + a.E));
    if (!memory) return;
    float *normed = memory.data, *uz = normed + a.B * a.D, *p = uz + a.B * a.width(), *y = p + a.B * a.projected();
    NormArgs norm{};
    norm.T = a.B, norm.D = a.D, norm.eps = a.eps, norm.x = a.x, norm.weight = a.norm;
    norm.y = reinterpret_cast<char*>(a.in_proj ? normed : uz);
    norm_forward<float>(norm);
    step_input(a, normed, uz);
    product({a.pool, a.B, a.projected(), a.E, a.width(), a.kind, uz, a.x_proj, a.x_scale, p});
    step_core(a, uz, p, y);
    step_output(a, y);
}

}  // namespace pm
