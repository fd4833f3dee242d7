// Depthwise causal convolution and SiLU, forward and backward (definition: causal_conv in reference/).
#pragma once
#include "scan.h"

namespace pm {

struct ConvArgs {
    Pool pool;
    int64_t B, L, E, K, is_bf16;
    View u, y, reset;
    const float *weight, *bias, *initial;  // (E, K), (E,), (B, K - 1, E)
    float* last;                           // (B, K - 1, E)
    // Backward only.
    View dy, du;
    const float* dlast;
    float *dweight, *dbias, *dinitial;

    int64_t blocks() const { return ceil_div(E, W); }
    int lanes(int64_t block) const { return int(std::min<int64_t>(W, E - block * W)); }
};
PM_FIELDS(ConvArgs, B, L, E, K, is_bf16, u, y, reset, weight, bias, initial, last, dy, du, dlast, dweight, dbias, dinitial)

// How many of the `most` inputs that end at position t belong to its document.
inline int64_t seen(const ConvArgs& a, int64_t b, int64_t t, int64_t most) {
    if (!a.reset) return most;
    for (int64_t back = 0; back < most && back <= t; back++)
        if (*a.reset.at<uint8_t>(b, t - back, 0)) return back + 1;
    return most;
}

template <class T>
PM_INLINE void prefetch_row(const ConvArgs& a, int64_t b, int64_t t, int64_t e) {
    PM_PREFETCH_READ(a.u.at<T>(b, t, e + W));
    if (a.dy) PM_PREFETCH_READ(a.dy.at<T>(b, t, e + W));
    PM_PREFETCH_WRITE((a.du ? a.du : a.y).at<T>(b, t, e));
}

// The inputs of positions t0 - (K - 1) .. t0 + steps - 1 of one block.
template <class T>
void load_window(const ConvArgs& a, int64_t b, int64_t t0, int64_t steps, int64_t block, float* window) {
    int64_t e = block * W, history = a.K - 1;
    int lanes = a.lanes(block);
    for (int64_t i = 0; i < history + steps; i++) {
        int64_t t = t0 - history + i;
        vf u{};
        if (i >= history) prefetch_row<T>(a, b, t, e);
        if (t >= 0)
            u = load(a.u.at<T>(b, t, e), lanes);
        else if (a.initial)
            u = load(a.initial + (b * history + history + t) * a.E + e, lanes);
        store(window + i * W, u);
    }
}

inline void load_weights(const ConvArgs& a, int64_t block, float* weight) {
    std::memset(weight, 0, a.K * W * sizeof(float));
    for (int i = 0; i < a.lanes(block); i++)
        for (int64_t k = 0; k < a.K; k++) weight[k * W + i] = a.weight[(block * W + i) * a.K + k];
}

// The sum before SiLU. TAPS is K, or 0 for any.
template <int TAPS>
PM_INLINE vf convolve(const float* window, const float* weight, vf bias, int64_t K, int64_t first) {
    vf sum = bias;
    if (TAPS && first == 0) {
        PM_UNROLL
        for (int k = 0; k < TAPS; k++) sum += load(window + k * W) * load(weight + k * W);
        return sum;
    }
    for (int64_t k = first; k < K; k++) sum += load(window + k * W) * load(weight + k * W);
    return sum;
}

template <class T, int TAPS>
void conv_forward_tile(const ConvArgs& a, int64_t b, int64_t t0, int64_t steps, int64_t block, float* memory) {
    float *weight = memory, *window = memory + a.K * W;
    int lanes = a.lanes(block);
    load_weights(a, block, weight);
    load_window<T>(a, b, t0, steps, block, window);
    vf bias = a.bias ? load(a.bias + block * W, lanes) : vf{};
    for (int64_t t = 0; t < steps; t++) {
        vf pre = convolve<TAPS>(window + t * W, weight, bias, a.K, a.K - seen(a, b, t0 + t, a.K));
        store(a.y.at<T>(b, t0 + t, block * W), pre * sigmoid(pre), lanes);
    }
}

template <class T>
void store_last(const ConvArgs& a, int64_t b, Range blocks, float* window) {
    int64_t history = a.K - 1, kept = seen(a, b, a.L - 1, history);
    for (int64_t k = blocks.begin; k < blocks.end; k++) {
        load_window<T>(a, b, a.L, 0, k, window);
        for (int64_t i = 0; i < history; i++)
            store(a.last + (b * history + i) * a.E + k * W, i < history - kept ? vf{} : load(window + i * W), a.lanes(k));
    }
}

template <class T, int TAPS>
void conv_forward_taps(const ConvArgs& a) {
    Grid grid(a.B, a.blocks());
    run(a.pool, grid.tasks(), [&](int64_t i) {
        Range batches = part(a.B, grid.batch_parts, i / grid.block_parts);
        Range blocks = part(a.blocks(), grid.block_parts, i % grid.block_parts);
        float* memory = scratch((2 * a.K + CHUNK) * W);
        if (!memory) return;
        for (int64_t b = batches.begin; b < batches.end; b++) {
            for (int64_t t0 = 0; t0 < a.L; t0 += CHUNK)
                for (int64_t k = blocks.begin; k < blocks.end; k++)
                    conv_forward_tile<T, TAPS>(a, b, t0, std::min<int64_t>(CHUNK, a.L - t0), k, memory);
            if (a.last) store_last<T>(a, b, blocks, memory);
        }
    });
}

// `carry` (K - 1 rows) brings the gradient that later positions gave to the last inputs of this chunk, and takes along what
// this chunk gives to those before it: row k at position t belongs to input t - (K - 1) + k. `sums`: K rows of dweight, one
// of dbias.
template <class T, int TAPS>
void conv_backward_tile(const ConvArgs& a, int64_t b, int64_t t0, int64_t steps, int64_t block, float* memory,
                        float* carry, float* sums) {
    int64_t e = block * W, K = TAPS ? TAPS : a.K;
    float *weight = memory, *window = memory + K * W;
    int lanes = a.lanes(block);
    load_weights(a, block, weight);
    load_window<T>(a, b, t0, steps, block, window);
    vf bias = a.bias ? load(a.bias + e, lanes) : vf{}, dbias = load(sums + K * W);
    for (int64_t t = steps - 1; t >= 0; t--) {
        int64_t first = K - seen(a, b, t0 + t, K);
        vf pre = convolve<TAPS>(window + t * W, weight, bias, K, first), s = sigmoid(pre);
        vf g = load(a.dy.at<T>(b, t0 + t, e), lanes) * (s * (1.0f + pre * (1.0f - s)));
        dbias += g;
        PM_UNROLL
        for (int64_t k = K - 1; k >= 0; k--) {
            vf seen_g = k < first ? vf{} : g;
            vf du = seen_g * load(weight + k * W);
            if (k > 0) du += load(carry + (k - 1) * W);
            if (k == K - 1)
                store(a.du.at<T>(b, t0 + t, e), du, lanes);
            else
                store(carry + k * W, du);
            store(sums + k * W, load(sums + k * W) + seen_g * load(window + (t + k) * W));
        }
    }
    store(sums + K * W, dbias);
}

// The gradient of the last state is where the carry starts from.
inline void load_carry(const ConvArgs& a, int64_t b, Range blocks, float* carry) {
    int64_t history = a.K - 1, kept = seen(a, b, a.L - 1, history);
    for (int64_t k = blocks.begin; k < blocks.end; k++)
        for (int64_t i = 0; i < history; i++, carry += W) {
            bool used = a.dlast && i >= history - kept;
            store(carry, used ? load(a.dlast + (b * history + i) * a.E + k * W, a.lanes(k)) : vf{});
        }
}

inline void store_carry(const ConvArgs& a, int64_t b, Range blocks, const float* carry) {
    int64_t history = a.K - 1;
    for (int64_t k = blocks.begin; k < blocks.end; k++)
        for (int64_t i = 0; i < history; i++, carry += W)
            store(a.dinitial + (b * history + i) * a.E + k * W, load(carry), a.lanes(k));
}

inline void reduce_weights(const ConvArgs& a, float* sums, int64_t batch_parts, int64_t block) {
    int64_t count = (a.K + 1) * W;
    float* total = sums + block * count;
    for (int64_t p = 1; p < batch_parts; p++)
        for (int64_t i = 0; i < count; i++) total[i] += total[p * a.blocks() * count + i];
    for (int i = 0; i < a.lanes(block); i++)
        for (int64_t k = 0; k < a.K; k++) a.dweight[(block * W + i) * a.K + k] = total[k * W + i];
    if (a.dbias) store(a.dbias + block * W, load(total + a.K * W), a.lanes(block));
}

template <class T, int TAPS>
void conv_backward_taps(const ConvArgs& a) {
    Grid grid(a.B, a.blocks());
    int64_t sums_size = a.blocks() * (a.K + 1) * W;
    Buffer partials(grid.batch_parts * sums_size);
    if (!partials) return;
    run(a.pool, grid.tasks(), [&](int64_t i) {
        Range batches = part(a.B, grid.batch_parts, i / grid.block_parts);
        Range blocks = part(a.blocks(), grid.block_parts, i % grid.block_parts);
        int64_t count = blocks.end - blocks.begin, tile = (2 * a.K + CHUNK) * W;
        float* memory = scratch(tile + count * (a.K - 1) * W);
        if (!memory) return;
        float* carry = memory + tile;
        float* sums = partials.data + i / grid.block_parts * sums_size;
        std::memset(sums + blocks.begin * (a.K + 1) * W, 0, count * (a.K + 1) * W * sizeof(float));
        for (int64_t b = batches.begin; b < batches.end; b++) {
            load_carry(a, b, blocks, carry);
            for (int64_t t0 = (a.L - 1) / CHUNK * CHUNK; t0 >= 0; t0 -= CHUNK)
                for (int64_t k = blocks.begin; k < blocks.end; k++)
                    conv_backward_tile<T, TAPS>(a, b, t0, std::min<int64_t>(CHUNK, a.L - t0), k, memory,
                                                carry + (k - blocks.begin) * (a.K - 1) * W, sums + k * (a.K + 1) * W);
            if (a.dinitial) store_carry(a, b, blocks, carry);
        }
    });
    run(a.pool, a.blocks(), [&](int64_t k) { reduce_weights(a, partials.data, grid.batch_parts, k); });
}

template <class T>
void conv_forward(const ConvArgs& a) {
    a.K == 4 ? conv_forward_taps<T, 4>(a) : conv_forward_taps<T, 0>(a);
}

template <class T>
void conv_backward(const ConvArgs& a) {
    a.K == 4 ? conv_backward_taps<T, 4>(a) : conv_backward_taps<T, 0>(a);
}

}  // namespace pm
