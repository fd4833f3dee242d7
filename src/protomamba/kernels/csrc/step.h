// One token of a whole residual block for a small batch (definition: mamba_step in reference.py). Bound by reading the
// weights once, so the products are rows times vectors, many rows at a time.
#pragma once
#include "norm.h"

namespace pm {

struct StepArgs {
    Pool pool;
    int64_t B, D, E, N, R, K;
    double eps;
    const float *x, *norm, *in_proj, *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *skip, *out_proj;
    float *conv_state, *ssm_state, *out;  // (B, K - 1, E), (B, E, N), (B, D)
};

// A product smaller than this is not worth waking another thread for.
constexpr int64_t SERIAL_PRODUCT = 1 << 17;

// Calls finish(row, lanes, dot products of W rows of w with x) over all rows. w: (rows, columns), x: (columns,).
template <class Finish>
PM_INLINE void rows_times_vector(const float* w, const float* x, Range rows, int64_t columns, const Finish& finish) {
    for (int64_t r = rows.begin; r < rows.end; r += W) {
        int lanes = int(std::min<int64_t>(W, rows.end - r));
        auto dot = [&](int i) {
            vf even{}, odd{};
            if (i >= lanes) return even;
            const float* row = w + (r + i) * columns;
            int64_t c = 0;
            for (; c + 2 * W <= columns; c += 2 * W) {
                even += load(row + c) * load(x + c);
                odd += load(row + c + W) * load(x + c + W);
            }
            for (; c < columns; c += W) {
                int n = int(std::min<int64_t>(W, columns - c));
                even += load(row + c, n) * load(x + c, n);
            }
            return even + odd;
        };
        finish(r, lanes, sum_each(dot));
    }
}

// y (B, rows; `y_stride` apart) = x (B, columns; `x_stride` apart) w^T, plus `add` (B, rows) if there is one.
inline void product(const StepArgs& a, const float* w, int64_t rows, int64_t columns, const float* x, int64_t x_stride,
                    float* y, int64_t y_stride, const float* add) {
    int64_t blocks = ceil_div(rows, W), parts = rows * columns < SERIAL_PRODUCT ? 1 : std::min(blocks, Grid::WANTED);
    run(a.pool, parts, [&](int64_t i) {
        Range range = part(blocks, parts, i);
        range = {range.begin * W, std::min(rows, range.end * W)};
        for (int64_t b = 0; b < a.B; b++)
            rows_times_vector(w, x + b * x_stride, range, columns, [&](int64_t r, int lanes, vf sums) {
                if (add) sums += load(add + b * rows + r, lanes);
                store(y + b * y_stride + r, sums, lanes);
            });
    });
}

// u (E,) in: the new input; out: SiLU of the convolution. The state moves on by one.
inline void step_conv(const StepArgs& a, float* state, float* u) {
    int64_t history = a.K - 1;
    for (int64_t e = 0; e < a.E; e++) {
        float sum = a.conv_bias[e] + a.conv_weight[e * a.K + history] * u[e];
        for (int64_t k = 0; k < history; k++) sum += a.conv_weight[e * a.K + k] * state[k * a.E + e];
        for (int64_t k = 0; k + 1 < history; k++) state[k * a.E + e] = state[(k + 1) * a.E + e];
        if (history > 0) state[(history - 1) * a.E + e] = u[e];
        u[e] = sum;
    }
    for_row(a.E, [&](int64_t e, int n) {
        vf v = load(u + e, n);
        store(u + e, v * sigmoid(v), n);
    });
}

// y (E,) in: dt_proj's product; out: the scan's output, gated if z. h (E, N) moves on by one.
inline void step_scan(const StepArgs& a, float* h, const float* u, const float* B, const float* C, const float* z, float* y) {
    for_row(a.E, [&](int64_t e, int lanes) {
        vf slope, dt = softplus(load(y + e, lanes) + load(a.dt_bias + e, lanes), &slope), input = load(u + e, lanes);
        alignas(vf) float dts[W], xs[W];
        store(dts, dt);
        store(xs, dt * input);
        auto channel = [&](int i) {
            vf sum{};
            if (i >= lanes) return sum;
            for (int64_t n = 0; n < a.N; n += W) {
                int count = int(std::min<int64_t>(W, a.N - n));
                int64_t at = (e + i) * a.N + n;
                vf decay = exp(exp(load(a.A_log + at, count)) * -dts[i]);
                vf state = decay * load(h + at, count) + load(B + n, count) * xs[i];
                store(h + at, state, count);
                sum += state * load(C + n, count);
            }
            return sum;
        };
        vf out = sum_each(channel) + load(a.skip + e, lanes) * input;
        if (z) {
            vf gate = load(z + e, lanes);
            out = out * (gate * sigmoid(gate));
        }
        store(y + e, out, lanes);
    });
}

inline void step(const StepArgs& a) {
    int64_t width = a.in_proj ? 2 * a.E : a.E, projected = a.R + 2 * a.N, row = a.D + width + projected + a.E;
    Buffer memory(a.B * row + a.B);
    float *normed = memory.data, *uz = normed + a.B * a.D, *p = uz + a.B * width, *y = p + a.B * projected;
    NormArgs norm{};
    norm.T = a.B, norm.D = a.D, norm.eps = a.eps, norm.x = a.x, norm.weight = a.norm;
    norm.y = reinterpret_cast<char*>(a.in_proj ? normed : uz);
    norm.scale = y + a.B * a.E;
    norm_forward<float>(norm);
    if (a.in_proj) product(a, a.in_proj, width, a.D, normed, a.D, uz, width, nullptr);
    for (int64_t b = 0; b < a.B; b++) step_conv(a, a.conv_state + b * (a.K - 1) * a.E, uz + b * width);
    product(a, a.x_proj, projected, a.E, uz, width, p, projected, nullptr);
    product(a, a.dt_proj, a.E, a.R, p, projected, y, a.E, nullptr);
    for (int64_t b = 0; b < a.B; b++) {
        const float *u = uz + b * width, *Bn = p + b * projected + a.R;
        step_scan(a, a.ssm_state + b * a.E * a.N, u, Bn, Bn + a.N, a.in_proj ? u + a.E : nullptr, y + b * a.E);
    }
    product(a, a.out_proj, a.D, a.E, y, a.E, a.out, a.D, a.x);
}

}  // namespace pm
