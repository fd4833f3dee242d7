// Selective scan, backward: chunk by chunk from the end. What the forward pass went through in a chunk is computed again from
// the state at its start, then the gradients flow back through it.
#pragma once
#include "scan.h"

namespace pm {

constexpr int BACKWARD_GROUP = W / 2;

// What scan_group_backward keeps in registers: the gradient of the state and of A.
template <int G>
struct GroupGradient {
    vf state[G], rate[G];
};

// One step back in time for state n and its S - 1 successors: the lanes of the result are their shares of dB and dC in turn.
template <int G, int N0, int S>
PM_INLINE vf step_back(GroupGradient<G>& grad, const float* A, const float* B, const float* C, const float* states,
                       const float* next, const float* decay, vf dt, vf x, vf dy, vf& dx, vf& ddt) {
    if constexpr (N0 >= G) {
        return vf{};
    } else if constexpr (S > 1) {
        vf low = step_back<G, N0, S / 2>(grad, A, B, C, states, next, decay, dt, x, dy, dx, ddt);
        vf high = step_back<G, N0 + S / 2, S / 2>(grad, A, B, C, states, next, decay, dt, x, dy, dx, ddt);
        return sum_pairs<S>(low, high);
    } else {
        constexpr int n = N0;
        vf g = grad.state[n] + dy * C[n];
        dx += g * B[n];
        grad.state[n] = g * load(decay + n * W);
        vf dlog = grad.state[n] * load(states + n * W);
        ddt += dlog * load(A + n * W);
        grad.rate[n] += dlog * dt;
        return sum_pairs<1>(g * x, dy * load(next + n * W));
    }
}

// The reverse of scan_group: takes dy and the gradient dh of the state after the chunk, leaves that of the state before it;
// adds to dx and ddt (over ln 2), which the `first` group begins, to dA, and to dBC, a vector of W / 2 pairs (dB, dC) for each
// step, `dBC_row` floats apart.
template <int G>
void scan_group_backward(const Place& at, const Tile& tile, const float* A, float* dh, float* dA, const float* B,
                         const float* C, int64_t N, const float* states, const float* decay, float* dBC, int64_t dBC_row,
                         bool first) {
    GroupGradient<G> grad;
    PM_UNROLL
    for (int n = 0; n < G; n++) {
        grad.state[n] = load(dh + n * W);
        grad.rate[n] = load(dA + n * W);
    }
    for (int64_t t = at.steps - 1; t >= 0; t--) {
        vf dt = load(tile.dt + t * W), x = load(tile.x + t * W), dy = load(tile.dy + t * W);
        vf dx = first ? vf{} : load(tile.dx + t * W), ddt = first ? vf{} : load(tile.ddt + t * W);
        const float* before = states + t * N * W;
        vf sums = step_back<G, 0, W / 2>(grad, A, B + t * N, C + t * N, before, before + N * W, decay + t * N * W, dt, x,
                                         dy, dx, ddt);
        store(dBC + t * dBC_row, load(dBC + t * dBC_row) + sums);
        store(tile.dx + t * W, dx);
        store(tile.ddt + t * W, ddt);
    }
    PM_UNROLL
    for (int n = 0; n < G; n++) {
        store(dh + n * W, grad.state[n]);
        store(dA + n * W, grad.rate[n]);
    }
}

inline int64_t backward_groups(int64_t N) {
    return for_groups<BACKWARD_GROUP>(0, N, [](auto, int64_t, int64_t) {});
}

// From the gradient of the gated output: dz, dy before the gate, dskip. tile.y holds y before the gate; what the
// forward pass gave is written to a.y, if that is there.
template <class T>
void gate_backward(const ScanArgs& a, const Place& at, Tile tile, float* dskip) {
    const TileRows<T> rows_dy(a.dy, at), rows_z(a.z, at), rows_dz(a.dz, at), rows_y(a.y, at);
    vf total = load(dskip);
    for_lanes(at, [&](auto lanes) {
        for (int t = 0; t < at.steps; t++) {
            vf dy = rows_dy.read(t, lanes), y = load(tile.y + t * W);
            if (rows_z) {
                vf z = rows_z.read(t, lanes), s = sigmoid(z);
                rows_dz.write(t, dy * y * (s * (1.0f + z * (1.0f - s))), lanes);
                dy = dy * (z * s);
                y = y * (z * s);
            }
            if (rows_y) rows_y.write(t, y, lanes);
            total += dy * load(tile.u + t * W);
            store(tile.dy + t * W, dy);
        }
    });
    store(dskip, total);
}

template <class T>
void store_gradients(const ScanArgs& a, const Place& at, Tile tile, float* dbias) {
    const TileRows<T> rows_du(a.du, at), rows_ddelta(a.ddelta, at);
    vf skip = a.skip ? load(a.skip + at.block * W, at.lanes) : vf{}, total = load(dbias);
    for_lanes(at, [&](auto lanes) {
        for (int t = 0; t < at.steps; t++) {
            vf dx = load(tile.dx + t * W);
            vf du = dx * load(tile.dt + t * W) + load(tile.dy + t * W) * skip;
            vf ddelta = (dx * load(tile.u + t * W) + load(tile.ddt + t * W) * LN_2) * load(tile.slope + t * W);
            total += ddelta;
            rows_du.write(t, du, lanes);
            rows_ddelta.write(t, ddelta, lanes);
        }
    });
    store(dbias, total);
}

// The pairs that scan_group_backward left, a vector for each step and group, as rows of N floats of dB and of dC.
inline void unpack_pairs(const float* dBC, int steps, int64_t N, float* dB, float* dC) {
    int64_t row = backward_groups(N) * W;
    for_groups<BACKWARD_GROUP>(0, N, [&](auto group, int64_t first, int64_t index) {
        for (int t = 0; t < steps; t++)
            for (int n = 0; n < decltype(group)::value; n++) {
                dB[t * N + first + n] = dBC[t * row + index * W + 2 * n];
                dC[t * N + first + n] = dBC[t * row + index * W + 2 * n + 1];
            }
    });
}

// What one task of the backward pass leaves for the reduction over tasks.
struct ScanPartials {
    Buffer states;  // [batch part][block][N + 2][W]: dA, dskip, dbias
    Buffer rows;    // [block part][b][t][2 N]: dB, dC; unused with one block part
    ScanPartials(const ScanArgs& a, const Grid& grid)
        : states(grid.batch_parts * a.blocks() * (a.N + 2) * W),
          rows(grid.block_parts > 1 ? grid.block_parts * a.B * a.L * 2 * a.N : 0) {}
    explicit operator bool() const { return states && rows; }
};

struct ScanBackwardMemory {
    int64_t dBC_row;
    Tile tile;
    float *states, *decay, *dBC, *h, *dh, *B, *C, *dB_dC;
    static int64_t floats(int64_t N, int64_t blocks) {
        int64_t rows = 4 * CHUNK * N + CHUNK * backward_groups(N) * W;
        return Tile::FLOATS + rows + (2 * CHUNK + 1) * N * W + (1 + blocks) * N * W;
    }
    ScanBackwardMemory(float* memory, int64_t N, int64_t blocks) : dBC_row(backward_groups(N) * W), tile(memory) {
        states = tile.u + Tile::FLOATS;
        decay = states + (CHUNK + 1) * N * W;
        dBC = decay + CHUNK * N * W;
        h = dBC + CHUNK * dBC_row;
        dh = h + N * W;
        B = dh + blocks * N * W;
        C = B + CHUNK * N;
        dB_dC = C + CHUNK * N;
    }
};

template <class T>
void scan_backward_block(const ScanArgs& a, const Place& at, const ScanBackwardMemory& m, const float* A, float* dh,
                         float* sums) {
    int64_t N = a.N;
    load_tile<T, true>(a, at, m.tile);
    std::memcpy(m.h, a.chunk(at.b, at.t0 / CHUNK, at.block), N * W * sizeof(float));
    scan_tile<true>(at, m.tile, A, m.h, m.B, m.C, N, m.states, m.decay);
    gate_backward<T>(a, at, m.tile, sums + N * W);
    for_groups<BACKWARD_GROUP>(0, N, [&](auto group, int64_t n, int64_t index) {
        scan_group_backward<decltype(group)::value>(at, m.tile, A + n * W, dh + n * W, sums + n * W, m.B + n, m.C + n, N,
                                                    m.states + n * W, m.decay + n * W, m.dBC + index * W, m.dBC_row,
                                                    index == 0);
    });
    store_gradients<T>(a, at, m.tile, sums + (N + 1) * W);
}

template <class T>
void scan_backward_task(const ScanArgs& a, const float* A, int64_t b, Range blocks, float* sums, float* rows) {
    int64_t N = a.N, count = blocks.end - blocks.begin;
    float* memory = scratch(ScanBackwardMemory::floats(N, count));
    if (!memory) return;
    ScanBackwardMemory m(memory, N, count);
    states_to_blocks(a.dlast ? a.dlast + b * a.E * N : nullptr, m.dh, a.E, N, blocks, 1.0f);
    for (int64_t c = a.chunk_count() - 1; c >= 0; c--) {
        int64_t t0 = c * CHUNK;
        int steps = place(a, b, c, 0).steps;
        rows_to_floats<T>(a.Bm, b, t0, steps, N, m.B);
        rows_to_floats<T>(a.Cm, b, t0, steps, N, m.C);
        std::memset(m.dBC, 0, steps * m.dBC_row * sizeof(float));
        for (int64_t k = blocks.begin; k < blocks.end; k++)
            scan_backward_block<T>(a, place(a, b, c, k), m, A + k * N * W, m.dh + (k - blocks.begin) * N * W,
                                   sums + k * (N + 2) * W);
        float* to = rows ? rows + (b * a.L + t0) * 2 * N : m.dB_dC;
        unpack_pairs(m.dBC, steps, N, to, to + steps * N);
        if (rows) continue;
        floats_to_rows<T>(to, a.dBm, b, t0, steps, N);
        floats_to_rows<T>(to + steps * N, a.dCm, b, t0, steps, N);
    }
    if (a.dinitial) blocks_to_states(m.dh, a.dinitial + b * a.E * N, a.E, N, blocks);
}

// Sums the tasks' shares of dB and dC of one chunk, first block part first.
template <class T>
void reduce_rows(const ScanArgs& a, float* rows, int64_t block_parts, int64_t b, int64_t chunk) {
    int64_t t0 = chunk * CHUNK, steps = std::min<int64_t>(CHUNK, a.L - t0), count = steps * 2 * a.N;
    float* total = rows + (b * a.L + t0) * 2 * a.N;
    for (int64_t p = 1; p < block_parts; p++) {
        const float* share = total + p * a.B * a.L * 2 * a.N;
        for (int64_t i = 0; i < count; i++) total[i] += share[i];
    }
    floats_to_rows<T>(total, a.dBm, b, t0, steps, a.N);
    floats_to_rows<T>(total + steps * a.N, a.dCm, b, t0, steps, a.N);
}

// Sums the tasks' shares of dA, dskip and dbias of one block, first batch part first.
inline void reduce_states(const ScanArgs& a, float* states, int64_t batch_parts, int64_t block) {
    int64_t count = (a.N + 2) * W, e = block * W;
    float* total = states + block * count;
    for (int64_t p = 1; p < batch_parts; p++) {
        const float* share = total + p * a.blocks() * count;
        for (int64_t i = 0; i < count; i++) total[i] += share[i];
    }
    blocks_to_states(total, a.dA, a.E, a.N, {block, block + 1});
    if (a.dskip) store(a.dskip + e, load(total + a.N * W), a.lanes(block));
    if (a.dbias) store(a.dbias + e, load(total + (a.N + 1) * W), a.lanes(block));
}

template <class T>
void scan_backward(const ScanArgs& a) {
    Buffer A(a.blocks() * a.N * W);
    if (!A) return;
    states_to_blocks(a.A, A.data, a.E, a.N, {0, a.blocks()}, LOG2_E);
    Grid grid(a.B, a.blocks());
    ScanPartials partials(a, grid);
    if (!partials) return;
    int64_t sums_size = a.blocks() * (a.N + 2) * W, rows_size = a.B * a.L * 2 * a.N;
    run(a.pool, grid.tasks(), [&](int64_t i) {
        int64_t bp = i / grid.block_parts, kp = i % grid.block_parts;
        Range batches = part(a.B, grid.batch_parts, bp), blocks = part(a.blocks(), grid.block_parts, kp);
        float* sums = partials.states.data + bp * sums_size;
        float* rows = grid.block_parts > 1 ? partials.rows.data + kp * rows_size : nullptr;
        std::memset(sums + blocks.begin * (a.N + 2) * W, 0, (blocks.end - blocks.begin) * (a.N + 2) * W * sizeof(float));
        for (int64_t b = batches.begin; b < batches.end; b++) scan_backward_task<T>(a, A.data, b, blocks, sums, rows);
    });
    if (grid.block_parts > 1)
        run(a.pool, a.B * a.chunk_count(), [&](int64_t i) {
            reduce_rows<T>(a, partials.rows.data, grid.block_parts, i / a.chunk_count(), i % a.chunk_count());
        });
    run(a.pool, a.blocks(), [&](int64_t k) { reduce_states(a, partials.states.data, grid.batch_parts, k); });
}

}  // namespace pm
