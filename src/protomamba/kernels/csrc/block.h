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
    int64_t B, L, D, E, N, R, K, keep;  // keep: for a backward pass
    double eps;
    View reset;
    // As in reference.BlockWeights, but for A = -exp(A_log). in_proj is null in a compact block.
    const float *x, *norm, *in_proj, *taps, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A, *skip, *out_proj;
    const float *conv_initial, *ssm_initial;
    float *kept, *out, *conv_last, *ssm_last;  // kept: block_floats()
    // Backward only. A gradient that is null is not wanted, but for those of taps, conv_bias, dt_bias, A_log and skip.
    const float *dout, *dconv_last, *dssm_last;
    float *dx, *dnorm, *d_in_proj, *dtaps, *dconv_bias, *d_x_proj, *d_dt_proj, *d_dt_bias, *dA_log, *dskip, *d_out_proj;
    float *dconv_initial, *dssm_initial;

    int64_t T() const { return B * L; }
    int64_t width() const { return in_proj ? 2 * E : E; }
    int64_t projected() const { return R + 2 * N; }
};
PM_FIELDS(BlockArgs, B, L, D, E, N, R, K, keep, eps, reset, x, norm, in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, A, skip, out_proj,
          conv_initial, ssm_initial, kept, out, conv_last, ssm_last, dout, dconv_last, dssm_last, dx, dnorm, d_in_proj, dtaps,
          dconv_bias, d_x_proj, d_dt_proj, d_dt_bias, dA_log, dskip, d_out_proj, dconv_initial, dssm_initial)

// Hands out parts of one piece of memory, or counts what they need where there is none.
class Parts {
  public:
    explicit Parts(float* memory) : memory_(memory) {}
    float* take(int64_t floats) {
        float* part = memory_ ? memory_ + used_ : nullptr;
        used_ += ceil_div(floats, 16) * 16;
        return part;
    }
    int64_t used() const { return used_; }

  private:
    float* memory_;
    int64_t used_ = 0;
};

// What the way back needs of the way there. u comes first: the caller may want it.
struct BlockKept {
    float *u, *uz, *normed, *scale, *projected, *delta, *chunks;
    int64_t floats;

    BlockKept(const BlockArgs& a, Parts parts) {
        int64_t T = a.T();
        u = parts.take(T * a.E);
        normed = parts.take(T * a.D);
        uz = a.in_proj ? parts.take(T * a.width()) : normed;
        scale = parts.take(T);
        projected = parts.take(T * a.projected());
        delta = parts.take(T * a.E);
        chunks = a.keep ? parts.take(scan_chunk_floats(a.B, a.L, a.E, a.N)) : nullptr;
        floats = parts.used();
    }
};

// The gradients between the ops of the way back, and the scan's output.
struct BlockWork {
    float *y, *dy, *du, *ddelta, *duz, *dprojected, *dnormed;
    int64_t floats;

    BlockWork(const BlockArgs& a, Parts parts) {
        for (float** each : {&y, &dy, &du, &ddelta}) *each = parts.take(a.T() * a.E);
        duz = parts.take(a.T() * a.width());
        dprojected = parts.take(a.T() * a.projected());
        dnormed = parts.take(a.T() * a.D);
        floats = parts.used();
    }
};

inline int64_t block_floats(const BlockArgs& a) { return BlockKept(a, Parts(nullptr)).floats; }

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

inline ConvArgs conv_args(const BlockArgs& a, const BlockKept& kept) {
    ConvArgs c{};
    c.pool = a.pool, c.B = a.B, c.L = a.L, c.E = a.E, c.K = a.K;
    c.u = view(a, kept.uz, a.width()), c.y = view(a, kept.u, a.E), c.reset = a.reset;
    c.weight = a.taps, c.bias = a.conv_bias, c.initial = a.conv_initial;
    return c;
}

inline ScanArgs scan_args(const BlockArgs& a, const BlockKept& kept, float* y) {
    ScanArgs s{};
    s.pool = a.pool, s.B = a.B, s.L = a.L, s.E = a.E, s.N = a.N, s.softplus = 1;
    s.u = view(a, kept.u, a.E), s.delta = view(a, kept.delta, a.E), s.y = view(a, y, a.E), s.reset = a.reset;
    s.Bm = view(a, kept.projected + a.R, a.projected()), s.Cm = view(a, kept.projected + a.R + a.N, a.projected());
    if (a.in_proj) s.z = view(a, kept.uz + a.E, a.width());
    s.A = a.A, s.skip = a.skip, s.bias = a.dt_bias, s.initial = a.ssm_initial, s.chunks = kept.chunks;
    return s;
}

inline NormArgs norm_args(const BlockArgs& a, const BlockKept& kept) {
    NormArgs n{};
    n.pool = a.pool, n.T = a.T(), n.D = a.D, n.eps = a.eps, n.x = a.x, n.weight = a.norm, n.scale = kept.scale;
    n.y = reinterpret_cast<char*>(kept.normed);
    return n;
}

inline void block_forward(const BlockArgs& a) {
    BlockKept kept(a, Parts(a.kept));
    Buffer y(a.T() * a.E);
    if (!y) return;
    norm_forward<float>(norm_args(a, kept));
    if (a.in_proj) linear(a, kept.normed, a.D, a.in_proj, a.width(), a.D, kept.uz);
    ConvArgs conv = conv_args(a, kept);
    conv.last = a.conv_last;
    conv_forward<float>(conv);
    linear(a, kept.u, a.E, a.x_proj, a.projected(), a.E, kept.projected);
    linear(a, kept.projected, a.projected(), a.dt_proj, a.E, a.R, kept.delta);
    ScanArgs scan = scan_args(a, kept, y.data);
    scan.last = a.ssm_last;
    scan_forward<float>(scan);
    linear(a, y.data, a.E, a.out_proj, a.D, a.E, a.out, a.x);
}

inline void block_backward(const BlockArgs& a) {
    BlockKept kept(a, Parts(a.kept));
    Buffer memory(BlockWork(a, Parts(nullptr)).floats);
    if (!memory) return;
    BlockWork w(a, Parts(memory.data));
    int64_t E = a.E, S = a.projected();
    grad_input(a, a.dout, a.out_proj, a.D, E, w.dy, E);
    ScanArgs scan = scan_args(a, kept, a.d_out_proj ? w.y : nullptr);  // its output is never kept: it passes through it anyway
    scan.dy = view(a, w.dy, E), scan.du = view(a, w.du, E), scan.ddelta = view(a, w.ddelta, E);
    scan.dBm = view(a, w.dprojected + a.R, S), scan.dCm = view(a, w.dprojected + a.R + a.N, S);
    if (a.in_proj) scan.dz = view(a, w.duz + E, a.width());
    scan.dlast = a.dssm_last, scan.dA = a.dA_log, scan.dskip = a.dskip, scan.dbias = a.d_dt_bias, scan.dinitial = a.dssm_initial;
    scan_backward<float>(scan);
    for (int64_t i = 0; i < E * a.N; i++) a.dA_log[i] *= a.A[i];  // the slope of -exp is itself
    grad_weight(a, a.dout, a.D, w.y, E, E, a.d_out_proj);
    grad_weight(a, w.ddelta, E, kept.projected, a.R, S, a.d_dt_proj);
    grad_input(a, w.ddelta, a.dt_proj, E, a.R, w.dprojected, S);
    grad_weight(a, w.dprojected, S, kept.u, E, E, a.d_x_proj);
    grad_input(a, w.dprojected, a.x_proj, S, E, w.du, E, w.du);

    ConvArgs conv = conv_args(a, kept);
    conv.dy = view(a, w.du, E), conv.du = view(a, w.duz, a.width()), conv.dlast = a.dconv_last;
    conv.dweight = a.dtaps, conv.dbias = a.dconv_bias, conv.dinitial = a.dconv_initial;
    conv_backward<float>(conv);
    grad_weight(a, w.duz, a.width(), kept.normed, a.D, a.D, a.d_in_proj);
    if (!a.dx) return;
    if (a.in_proj) grad_input(a, w.duz, a.in_proj, a.width(), a.D, w.dnormed, a.D);
    NormArgs norm = norm_args(a, kept);
    norm.dy = reinterpret_cast<const char*>(a.in_proj ? w.dnormed : w.duz), norm.dtotal = a.dout;
    norm.dx = a.dx, norm.dweight = a.dnorm;
    norm_backward<float>(norm);
}

}  // namespace pm
