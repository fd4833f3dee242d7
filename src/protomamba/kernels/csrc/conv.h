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

// K rows of one block: registers where K is a constant, TAPS, else memory.
template <int TAPS>
struct Rows {
    vf row[TAPS];
    explicit Rows(float*) {}
    vf& operator[](int64_t k) { return row[k]; }
};
template <>
struct Rows<0> {
    vf* row;
    explicit Rows(float* memory) : row(reinterpret_cast<vf*>(memory)) {}
    vf& operator[](int64_t k) { return row[k]; }
};

// The input of position t, which may lie before the first.
template <class T>
vf input_at(const ConvArgs& a, const Place& at, int64_t t) {
    int64_t e = at.block * W, history = a.K - 1;
    if (t >= 0) return load(a.u.at<T>(at.b, t, e), at.lanes);
    return a.initial ? load(a.initial + (at.b * history + history + t) * a.E + e, at.lanes) : vf{};
}

template <int TAPS>
PM_INLINE void load_weights(const ConvArgs& a, int64_t block, int64_t K, Rows<TAPS>& weight) {
    PM_UNROLL
    for (int64_t k = 0; k < K; k++) {
        alignas(vf) float lanes[W] = {};
        for (int i = 0; i < a.lanes(block); i++) lanes[i] = a.weight[(block * W + i) * K + k];
        weight[k] = load(lanes);
    }
}

// The sum before SiLU, over the taps from `first` on.
template <int TAPS>
PM_INLINE vf convolve(Rows<TAPS>& input, Rows<TAPS>& weight, vf bias, int64_t K, int64_t first) {
    vf sum = bias;
    PM_UNROLL
    for (int64_t k = 0; k < K; k++)
        if (k >= first) sum += input[k] * weight[k];
    return sum;
}

// `memory`: 2 K rows.
template <class T, int TAPS, class Lanes>
void conv_forward_tile(const ConvArgs& a, const Place& at, Lanes lanes, float* memory) {
    int64_t K = TAPS ? TAPS : a.K;
    const TileRows<T> rows_u(a.u, at), rows_y(a.y, at);
    Rows<TAPS> weight(memory), input(memory + K * W);
    load_weights(a, at.block, K, weight);
    vf bias = a.bias ? load(a.bias + at.block * W, lanes) : vf{};
    PM_UNROLL
    for (int64_t k = 1; k < K; k++) input[k] = input_at<T>(a, at, at.t0 - K + k);
    for (int t = 0; t < at.steps; t++) {
        PM_UNROLL
        for (int64_t k = 1; k < K; k++) input[k - 1] = input[k];
        input[K - 1] = rows_u.read(t, lanes);
        vf pre = convolve(input, weight, bias, K, K - seen(a, at.b, at.t0 + t, K));
        rows_y.write(t, pre * sigmoid(pre), lanes);
    }
}

template <class T>
void store_last(const ConvArgs& a, int64_t b, Range blocks) {
    int64_t history = a.K - 1, kept = seen(a, b, a.L - 1, history);
    for (int64_t k = blocks.begin; k < blocks.end; k++)
        for (int64_t i = 0; i < history; i++) {
            vf input = i < history - kept ? vf{} : input_at<T>(a, place(a, b, 0, k), a.L - history + i);
            store(a.last + (b * history + i) * a.E + k * W, input, a.lanes(k));
        }
}

template <class T, int TAPS>
void conv_forward_taps(const ConvArgs& a) {
    Grid grid(a.B, a.blocks());
    run(a.pool, grid.tasks(), [&](int64_t i) {
        Range batches = part(a.B, grid.batch_parts, i / grid.block_parts);
        Range blocks = part(a.blocks(), grid.block_parts, i % grid.block_parts);
        float* memory = scratch(2 * a.K * W);
        if (!memory) return;
        for (int64_t b = batches.begin; b < batches.end; b++) {
            for (int64_t c = 0; c < ceil_div(a.L, CHUNK); c++)
                for (int64_t k = blocks.begin; k < blocks.end; k++) {
                    Place at = place(a, b, c, k);
                    for_lanes(at, [&](auto lanes) { conv_forward_tile<T, TAPS>(a, at, lanes, memory); });
                }
            if (a.last) store_last<T>(a, b, blocks);
        }
    });
}

// `carry` (K - 1 rows) brings the gradient that later positions gave to the last inputs of this chunk, and takes along what
// this chunk gives to those before it: row k at position t belongs to input t - (K - 1) + k. `sums`: K rows of dweight, one
// of dbias. `memory`: 4 K rows.
template <class T, int TAPS, class Lanes>
void conv_backward_tile(const ConvArgs& a, const Place& at, Lanes lanes, float* memory, float* carry_in_out,
                        float* sums_in_out) {
    int64_t K = TAPS ? TAPS : a.K;
    const TileRows<T> rows_u(a.u, at), rows_dy(a.dy, at), rows_du(a.du, at);
    Rows<TAPS> weight(memory), input(memory + K * W), carry(memory + 2 * K * W), sums(memory + 3 * K * W);
    load_weights(a, at.block, K, weight);
    vf bias = a.bias ? load(a.bias + at.block * W, at.lanes) : vf{}, dbias = load(sums_in_out + K * W);
    PM_UNROLL
    for (int64_t k = 0; k < K; k++) {
        sums[k] = load(sums_in_out + k * W);
        carry[k] = k > 0 ? load(carry_in_out + (k - 1) * W) : vf{};  // what tap k - 1 of the next step left
        if (k < K - 1) input[k] = input_at<T>(a, at, at.t0 + at.steps - K + 1 + k);
    }
    for (int64_t t = at.steps - 1; t >= 0; t--) {
        PM_UNROLL
        for (int64_t k = K - 1; k > 0; k--) input[k] = input[k - 1];
        input[0] = t >= K - 1 ? rows_u.read(int(t - K + 1), lanes) : input_at<T>(a, at, at.t0 + t - K + 1);
        int64_t first = K - seen(a, at.b, at.t0 + t, K);
        vf pre = convolve(input, weight, bias, K, first), s = sigmoid(pre);
        vf g = rows_dy.read(int(t), lanes) * (s * (1.0f + pre * (1.0f - s)));
        dbias += g;
        PM_UNROLL
        for (int64_t k = K - 1; k >= 0; k--) {
            vf seen_g = k < first ? vf{} : g;
            vf du = seen_g * weight[k];
            if (k > 0) du += carry[k];
            if (k == K - 1)
                rows_du.write(int(t), du, lanes);
            else
                carry[k + 1] = du;
            sums[k] += seen_g * input[k];
        }
    }
    store(sums_in_out + K * W, dbias);
    PM_UNROLL
    for (int64_t k = 0; k < K; k++) {
        store(sums_in_out + k * W, sums[k]);
        if (k > 0) store(carry_in_out + (k - 1) * W, carry[k]);
    }
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
        int64_t count = blocks.end - blocks.begin, tile = 4 * a.K * W;
        float* memory = scratch(tile + count * (a.K - 1) * W);
        if (!memory) return;
        float* carry = memory + tile;
        float* sums = partials.data + i / grid.block_parts * sums_size;
        std::memset(sums + blocks.begin * (a.K + 1) * W, 0, count * (a.K + 1) * W * sizeof(float));
        for (int64_t b = batches.begin; b < batches.end; b++) {
            load_carry(a, b, blocks, carry);
            for (int64_t c = ceil_div(a.L, CHUNK) - 1; c >= 0; c--)
                for (int64_t k = blocks.begin; k < blocks.end; k++) {
                    Place at = place(a, b, c, k);
                    float *carried = carry + (k - blocks.begin) * (a.K - 1) * W, *summed = sums + k * (a.K + 1) * W;
                    for_lanes(at, [&](auto lanes) { conv_backward_tile<T, TAPS>(a, at, lanes, memory, carried, summed); });
                }
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
