// A whole residual block in one call, forward and backward, in float32 with products of our own: the ops that
// kernels/block_node.py calls one by one, in its order and with its bits. Between two ops the products push everything else
// out of the caches, so that every visit to the caller costs a cold start.
#pragma once
#include "conv.h"
#include "matmul.h"
#include "norm.h"
#include "scan_backward.h"

namespace pm {

struct BlockArgs {
    Pool pool;
    int64_t B, L, D, E, N, R, K;
    double eps;
    View reset;
    // As in reference.BlockWeights, but for A = -exp(A_log). in_proj is null in a compact block.
    const float *x, *norm, *in_proj, *taps, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A, *skip, *out_proj;
    const float *conv_initial, *ssm_initial;
    // What the way back needs of the way there: (T, E), (T, 2 E) and null in a compact block, (T, D), (T,), (T, R + 2 N), (T, E),
    // scan_chunk_floats() or null.
    float *u, *uz, *normed, *scale, *projected, *delta, *chunks;
    float *out, *conv_last, *ssm_last;
    // Backward only. A gradient that is null is not wanted, but for those of taps, conv_bias, dt_bias, A_log and skip.
    const float *dout, *dconv_last, *dssm_last;
    float *dx, *dnorm, *d_in_proj, *dtaps, *dconv_bias, *d_x_proj, *d_dt_proj, *d_dt_bias, *dA_log, *dskip, *d_out_proj;
    float *dconv_initial, *dssm_initial;

    int64_t T() const { return B * L; }
    int64_t width() const { return in_proj ? 2 * E : E; }
    int64_t slices() const { return R + 2 * N; }
    const float* inner() const { return in_proj ? uz : normed; }  // what the convolution and the gate are given
};
PM_FIELDS(BlockArgs, B, L, D, E, N, R, K, eps, reset, x, norm, in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, A, skip, out_proj,
          conv_initial, ssm_initial, u, uz, normed, scale, projected, delta, chunks, out, conv_last, ssm_last, dout, dconv_last, dssm_last, dx, dnorm, d_in_proj, dtaps,
          dconv_bias, d_x_proj, d_dt_proj, d_dt_bias, dA_log, dskip, d_out_proj, dconv_initial, dssm_initial)

inline View view(const BlockArgs& a, const float* x, int64_t row) {
    return {const_cast<char*>(reinterpret_cast<const char*>(x)), a.L * row, row};
}

// out (T, columns) = x w^T (+ add), w (columns, inner); x (T, inner) with rows x_row apart.
inline void linear(const BlockArgs& a, const float* x, int64_t x_row, const float* w, int64_t columns, int64_t inner, float* out,
                   const float* add = nullptr) {
    matmul({a.pool, a.T(), columns, inner, x_row, inner, columns, columns, 0, 1, x, w, add, out});
}

// out (T, inner) = dy w (+ add), w (columns, inner), with rows out_row apart.
inline void grad_input(const BlockArgs& a, const float* dy, const float* w, int64_t columns, int64_t inner, float* out,
                       int64_t out_row, const float* add = nullptr) {
    matmul({a.pool, a.T(), inner, columns, columns, inner, inner, out_row, 0, 0, dy, w, add, out});
}

// out (columns, inner) = dy^T x, unless it is not wanted; x (T, inner) with rows x_row apart.
inline void grad_weight(const BlockArgs& a, const float* dy, int64_t columns, const float* x, int64_t inner, int64_t x_row, float* out) {
    if (out) matmul({a.pool, columns, inner, a.T(), columns, x_row, 0, inner, 1, 0, dy, x, nullptr, out});
}

inline ConvArgs conv_args(const BlockArgs& a) {
    ConvArgs c{};
    c.pool = a.pool, c.B = a.B, c.L = a.L, c.E = a.E, c.K = a.K;
    c.u = view(a, a.inner(), a.width()), c.y = view(a, a.u, a.E), c.reset = a.reset;
    c.weight = a.taps, c.bias = a.conv_bias, c.initial = a.conv_initial;
    return c;
}

inline ScanArgs scan_args(const BlockArgs& a, float* y) {
    ScanArgs s{};
    s.pool = a.pool, s.B = a.B, s.L = a.L, s.E = a.E, s.N = a.N, s.softplus = 1;
    s.u = view(a, a.u, a.E), s.delta = view(a, a.delta, a.E), s.y = view(a, y, a.E), s.reset = a.reset;
    s.Bm = view(a, a.projected + a.R, a.slices()), s.Cm = view(a, a.projected + a.R + a.N, a.slices());
    if (a.in_proj) s.z = view(a, a.uz + a.E, a.width());
    s.A = a.A, s.skip = a.skip, s.bias = a.dt_bias, s.initial = a.ssm_initial, s.chunks = a.chunks;
    return s;
}

inline NormArgs norm_args(const BlockArgs& a) {
    NormArgs n{};
    n.pool = a.pool, n.T = a.T(), n.D = a.D, n.eps = a.eps, n.x = a.x, n.weight = a.norm, n.scale = a.scale;
    n.y = reinterpret_cast<char*>(a.normed);
    return n;
}

inline void block_forward(const BlockArgs& a) {
    Buffer y(a.T() * a.E);
    if (!y) return;
    norm_forward<float>(norm_args(a));
    if (a.in_proj) linear(a, a.normed, a.D, a.in_proj, a.width(), a.D, a.uz);
    ConvArgs conv = conv_args(a);
    conv.last = a.conv_last;
    conv_forward<float>(conv);
    linear(a, a.u, a.E, a.x_proj, a.slices(), a.E, a.projected);
    linear(a, a.projected, a.slices(), a.dt_proj, a.E, a.R, a.delta);
    ScanArgs scan = scan_args(a, y.data);
    scan.last = a.ssm_last;
    scan_forward<float>(scan);
    linear(a, y.data, a.E, a.out_proj, a.D, a.E, a.out, a.x);
}

inline void block_backward(const BlockArgs& a) {
    int64_t T = a.T(), E = a.E, S = a.slices();
    // Pieces of their own: malloc keeps none above 32 MiB.
    Buffer y(T * E), dy(T * E), du(T * E), ddelta(T * E), duz(T * a.width()), dprojected(T * S), dnormed(T * a.D);
    for (const Buffer* each : {&y, &dy, &du, &ddelta, &duz, &dprojected, &dnormed})
        if (!*each) return;
    grad_input(a, a.dout, a.out_proj, a.D, E, dy.data, E);
    ScanArgs scan = scan_args(a, a.d_out_proj ? y.data : nullptr);  // its output is never kept: it passes through it anyway
    scan.dy = view(a, dy.data, E), scan.du = view(a, du.data, E), scan.ddelta = view(a, ddelta.data, E);
    scan.dBm = view(a, dprojected.data + a.R, S), scan.dCm = view(a, dprojected.data + a.R + a.N, S);
    if (a.in_proj) scan.dz = view(a, duz.data + E, a.width());
    scan.dlast = a.dssm_last, scan.dA = a.dA_log, scan.dskip = a.dskip, scan.dbias = a.d_dt_bias, scan.dinitial = a.dssm_initial;
    scan_backward<float>(scan);
    for (int64_t i = 0; i < E * a.N; i++) a.dA_log[i] *= a.A[i];  // the slope of -exp is itself
    grad_weight(a, a.dout, a.D, y.data, E, E, a.d_out_proj);
    grad_weight(a, ddelta.data, E, a.projected, a.R, S, a.d_dt_proj);
    grad_input(a, ddelta.data, a.dt_proj, E, a.R, dprojected.data, S);
    grad_weight(a, dprojected.data, S, a.u, E, E, a.d_x_proj);
    grad_input(a, dprojected.data, a.x_proj, S, E, du.data, E, du.data);

    ConvArgs conv = conv_args(a);
    conv.dy = view(a, du.data, E), conv.du = view(a, duz.data, a.width()), conv.dlast = a.dconv_last;
    conv.dweight = a.dtaps, conv.dbias = a.dconv_bias, conv.dinitial = a.dconv_initial;
    conv_backward<float>(conv);
    grad_weight(a, duz.data, a.width(), a.normed, a.D, a.D, a.d_in_proj);
    if (!a.dx) return;
    if (a.in_proj) grad_input(a, duz.data, a.in_proj, a.width(), a.D, dnormed.data, a.D);
    NormArgs norm = norm_args(a);
    norm.dy = reinterpret_cast<const char*>(a.in_proj ? dnormed.data : duz.data), norm.dtotal = a.dout;
    norm.dx = a.dx, norm.dweight = a.dnorm;
    norm_backward<float>(norm);
}

}  // namespace pm
