// Selective scan: layout and forward pass (definition: selective_scan in reference/); scan_backward.h is the way back.
//
// Lanes run over channels; a block is W adjacent channels. A task walks its sequences in chunks of CHUNK steps and, within
// a chunk, over its blocks: everything a block needs of a chunk stands in a Tile that stays in cache, the states of a group
// of n stay in registers. The backward pass keeps only the state at the start of every chunk and recomputes the rest.
#pragma once
#include "layout.h"

namespace pm {

constexpr int CHUNK = 64;
constexpr int TILE = CHUNK * W;
// States held in registers at once: of the 32 (AVX-512) or 16 registers, the rest is for temporaries.
constexpr int FORWARD_GROUP = W >= 16 ? 16 : 8;

struct ScanArgs {
    Pool pool;
    int64_t B, L, E, N, is_bf16, softplus;
    View u, delta, Bm, Cm, z, y, reset;
    const float *A, *skip, *bias, *initial;  // (E, N), (E,), (E,), (B, E, N)
    float *last, *chunks;                    // (B, E, N); scan_chunk_floats() or null
    // Backward only.
    View dy, du, ddelta, dBm, dCm, dz;
    const float* dlast;
    float *dA, *dskip, *dbias, *dinitial;

    int64_t blocks() const { return ceil_div(E, W); }
    int64_t chunk_count() const { return ceil_div(L, CHUNK); }
    int lanes(int64_t block) const { return int(std::min<int64_t>(W, E - block * W)); }
    float* chunk(int64_t b, int64_t c, int64_t block) const {
        return chunks + ((b * chunk_count() + c) * blocks() + block) * N * W;
    }
};
PM_FIELDS(ScanArgs, B, L, E, N, is_bf16, softplus, u, delta, Bm, Cm, z, y, reset, A, skip, bias, initial, last, chunks, dy, du, ddelta,
          dBm, dCm, dz, dlast, dA, dskip, dbias, dinitial)

inline int64_t scan_chunk_floats(int64_t B, int64_t L, int64_t E, int64_t N) {
    return B * ceil_div(L, CHUNK) * ceil_div(E, W) * W * N;
}

// One block of one chunk, CHUNK x W each. Backward fills all of it, forward the first four. Passed by value: behind a
// reference each store might change where its rows are.
struct Tile {
    float *u, *dt, *x, *y, *slope, *dy, *dx, *ddt;
    static constexpr int64_t FLOATS = 8 * TILE;
    explicit Tile(float* p)
        : u(p), dt(p + TILE), x(p + 2 * TILE), y(p + 3 * TILE), slope(p + 4 * TILE), dy(p + 5 * TILE),
          dx(p + 6 * TILE), ddt(p + 7 * TILE) {}
};

// Where in the sequence a tile lies.
struct Place {
    int64_t b, t0;
    int steps;
    int64_t block;
    int lanes;
    const uint8_t* reset;  // of step t0, or null
};

// Of a scan or a convolution: a block of a chunk.
template <class Args>
Place place(const Args& a, int64_t b, int64_t chunk, int64_t block) {
    int64_t t0 = chunk * CHUNK;
    const uint8_t* reset = a.reset ? a.reset.template at<uint8_t>(b, t0, 0) : nullptr;
    return {b, t0, int(std::min<int64_t>(CHUNK, a.L - t0)), block, a.lanes(block), reset};
}

// (E, N) to [block][n][W], times `factor`; lanes beyond E are 0.
inline void states_to_blocks(const float* in, float* out, int64_t E, int64_t N, Range blocks, float factor) {
    for (int64_t e = blocks.begin * W; e < blocks.end * W; e++)
        for (int64_t n = 0; n < N; n++)
            out[((e / W - blocks.begin) * N + n) * W + e % W] = e < E && in ? in[e * N + n] * factor : 0.0f;
}

inline void blocks_to_states(const float* in, float* out, int64_t E, int64_t N, Range blocks) {
    for (int64_t e = blocks.begin * W; e < std::min(E, blocks.end * W); e++)
        for (int64_t n = 0; n < N; n++) out[e * N + n] = in[((e / W - blocks.begin) * N + n) * W + e % W];
}

template <class T>
void rows_to_floats(const View& view, int64_t b, int64_t t0, int steps, int64_t N, float* out) {
    for (int t = 0; t < steps; t++) {
        const T* row = view.at<T>(b, t0 + t, 0);
        for (int64_t n = 0; n < N; n++) out[t * N + n] = to_float(row[n]);
    }
}

template <class T>
void floats_to_rows(const float* in, const View& view, int64_t b, int64_t t0, int64_t steps, int64_t N) {
    for (int64_t t = 0; t < steps; t++) {
        T* row = view.at<T>(b, t0 + t, 0);
        for (int64_t n = 0; n < N; n += W) store(row + n, load(in + t * N + n, int(std::min<int64_t>(W, N - n))),
                                                 int(std::min<int64_t>(W, N - n)));
    }
}

// A view's lanes of one tile, step after step; false without a view. A read or write fetches what the next block needs there.
template <class T>
struct TileRows {
    T* first;
    int64_t row;
    explicit operator bool() const { return first != nullptr; }
    TileRows(const View& view, const Place& at)
        : first(view ? view.at<T>(at.b, at.t0, at.block * W) : nullptr), row(view.row) {}
    template <class Lanes>
    vf read(int t, Lanes lanes) const {
        const T* p = first + t * row;
        PM_PREFETCH_READ(p + W);
        return load(p, lanes);
    }
    template <class Lanes>
    void write(int t, vf v, Lanes lanes) const {
        T* p = first + t * row;
        PM_PREFETCH_WRITE(p + W);
        store(p, v, lanes);
    }
};

// Calls body with the number of lanes, as a constant where the block is whole: then no step asks for it.
template <class Body>
PM_INLINE void for_lanes(const Place& at, const Body& body) {
    if (at.lanes == W)
        body(std::integral_constant<int, W>());
    else
        body(at.lanes);
}

// u, dt = softplus(delta + bias), its slope if that is wanted, x = dt u, y = skip u.
template <class T, bool SLOPE>
void load_tile(const ScanArgs& a, const Place& at, Tile tile) {
    const TileRows<T> rows_u(a.u, at), rows_delta(a.delta, at);
    int64_t e = at.block * W;
    vf bias = a.bias ? load(a.bias + e, at.lanes) : vf{};
    vf skip = a.skip ? load(a.skip + e, at.lanes) : vf{};
    bool with_softplus = a.softplus;
    for_lanes(at, [&](auto lanes) {
        for (int t = 0; t < at.steps; t++) {
            vf u = rows_u.read(t, lanes), dt = rows_delta.read(t, lanes) + bias, slope = splat(1.0f);
            if (with_softplus) dt = softplus(dt, &slope);
            store(tile.u + t * W, u);
            store(tile.dt + t * W, dt);
            if (SLOPE) store(tile.slope + t * W, slope);
            store(tile.x + t * W, u * dt);
            store(tile.y + t * W, u * skip);
        }
    });
}

// The recurrence over one chunk for G states. A, h: [G][W]; B, C: rows of N. With SAVE, states[t + 1] is the state after
// step t and decay[t] its factor on the state before (0 at a reset), both in rows of N vectors.
template <int G, bool SAVE>
void scan_group(const Place& at, const Tile& tile, const float* A, float* h_in_out, const float* B, const float* C,
                int64_t N, float* states, float* decay) {
    vf h[G], rate[G];
    PM_UNROLL
    for (int n = 0; n < G; n++) {
        h[n] = load(h_in_out + n * W);
        rate[n] = load(A + n * W);
        if (SAVE) store(states + n * W, h[n]);
    }
    for (int t = 0; t < at.steps; t++) {
        bool reset = at.reset && at.reset[t];
        if (reset) {
            PM_UNROLL
            for (int n = 0; n < G; n++) h[n] = vf{};
        }
        vf dt = load(tile.dt + t * W), x = load(tile.x + t * W);
        vf even = load(tile.y + t * W), odd = vf{};  // two sums: one alone would wait for itself
        PM_UNROLL
        for (int n = 0; n < G; n++) {
            vf e = exp2(dt * rate[n]);
            h[n] = e * h[n] + x * B[t * N + n];
            vf& y = n % 2 ? odd : even;
            y += h[n] * C[t * N + n];
            if (SAVE) {
                store(decay + (t * N + n) * W, reset ? vf{} : e);
                store(states + ((t + 1) * N + n) * W, h[n]);
            }
        }
        store(tile.y + t * W, even + odd);
    }
    PM_UNROLL
    for (int n = 0; n < G; n++) store(h_in_out + n * W, h[n]);
}

// Calls body(group size, first n, number of the group) over [n, N) in groups of G while they fit, then of G / 2, ...
template <int G, class Body>
int64_t for_groups(int64_t n, int64_t N, const Body& body, int64_t groups = 0) {
    for (; n + G <= N; n += G) body(std::integral_constant<int, G>(), n, groups++);
    if constexpr (G > 1) return for_groups<G / 2>(n, N, body, groups);
    return groups;
}

template <bool SAVE>
void scan_tile(const Place& at, const Tile& tile, const float* A, float* h, const float* B, const float* C, int64_t N,
               float* states, float* decay) {
    for_groups<FORWARD_GROUP>(0, N, [&](auto group, int64_t n, int64_t) {
        scan_group<decltype(group)::value, SAVE>(at, tile, A + n * W, h + n * W, B + n, C + n, N, SAVE ? states + n * W : nullptr,
                                                 SAVE ? decay + n * W : nullptr);
    });
}

template <class T>
void store_output(const ScanArgs& a, const Place& at, Tile tile) {
    const TileRows<T> rows_y(a.y, at), rows_z(a.z, at);
    for_lanes(at, [&](auto lanes) {
        for (int t = 0; t < at.steps; t++) {
            vf y = load(tile.y + t * W);
            if (rows_z) {
                vf z = rows_z.read(t, lanes);
                y = y * (z * sigmoid(z));
            }
            rows_y.write(t, y, lanes);
        }
    });
}

template <class T>
void scan_forward_task(const ScanArgs& a, const float* A, int64_t b, Range blocks) {
    int64_t N = a.N, count = blocks.end - blocks.begin, states = count * N * W;
    float* memory = scratch(Tile::FLOATS + 2 * CHUNK * N + states);
    if (!memory) return;
    Tile tile(memory);
    float *B = memory + Tile::FLOATS, *C = B + CHUNK * N, *h = C + CHUNK * N;
    states_to_blocks(a.initial ? a.initial + b * a.E * N : nullptr, h, a.E, N, blocks, 1.0f);
    for (int64_t c = 0; c < a.chunk_count(); c++) {
        int steps = place(a, b, c, 0).steps;
        rows_to_floats<T>(a.Bm, b, c * CHUNK, steps, N, B);
        rows_to_floats<T>(a.Cm, b, c * CHUNK, steps, N, C);
        for (int64_t k = blocks.begin; k < blocks.end; k++) {
            float* state = h + (k - blocks.begin) * N * W;
            if (a.chunks) std::memcpy(a.chunk(b, c, k), state, N * W * sizeof(float));
            Place at = place(a, b, c, k);
            load_tile<T, false>(a, at, tile);
            scan_tile<false>(at, tile, A + k * N * W, state, B, C, N, nullptr, nullptr);
            store_output<T>(a, at, tile);
        }
    }
    if (a.last) blocks_to_states(h, a.last + b * a.E * N, a.E, N, blocks);
}

template <class T>
void scan_forward(const ScanArgs& a) {
    Buffer A(a.blocks() * a.N * W);
    if (!A) return;
    states_to_blocks(a.A, A.data, a.E, a.N, {0, a.blocks()}, LOG2_E);
    Grid grid(a.B, a.blocks());
    run(a.pool, grid.tasks(), [&](int64_t i) {
        Range batches = part(a.B, grid.batch_parts, i / grid.block_parts);
        Range blocks = part(a.blocks(), grid.block_parts, i % grid.block_parts);
        for (int64_t b = batches.begin; b < batches.end; b++) scan_forward_task<T>(a, A.data, b, blocks);
    });
}

}  // namespace pm
