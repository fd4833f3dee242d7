// out (M, N) = a b (+ add), float32, a (M, K) and b (K, N) each as it is in memory or as the transpose of what is there.
//
// Goto & van de Geijn 2008: K in pieces, so that a sliver of a (SLIVER rows) stays in the first-level cache and a block of b
// (a few panels) in the second; both are packed in the order in which the products want them. An element is summed in the
// order of K, whatever M, N and the number of threads: a row's result has the same bits beside any others.
#pragma once
#include "transpose.h"

namespace pm {

struct MatmulArgs {
    Pool pool;
    int64_t M, N, K, a_row, b_row, add_row, out_row;  // the last four: how far the rows in memory are apart, in elements
    int64_t a_transposed, b_transposed;               // in memory it is (K, M); (N, K)
    const float *a, *b, *add;                         // add (M, N) may be null, or out itself
    float* out;
};
PM_FIELDS(MatmulArgs, M, N, K, a_row, b_row, add_row, out_row, a_transposed, b_transposed, a, b, add, out)

// A tile of sums fills the registers: SLIVER rows of two vectors, beside two vectors of b and one number of a.
constexpr int SLIVER = W == 16 ? 12 : W == 8 ? 6 : 4, PANEL = 2 * W;
// Of K, of b (whole panels) and of a's rows (whole slivers) at a time: 24 KiB of a in the first-level cache, a block of b in
// the second, 1 MiB of a packed.
constexpr int64_t K_PIECE = 512, BLOCK_FLOATS = 1 << 16, M_CHUNK = 43 * 12;
// Slivers and panels are a line further apart than they need be, or their beginnings would share one set of a cache.
constexpr int64_t APART = 16;

// What is multiplied at a time: rows m .. m + M of a, columns n .. n + N of b, K of k from k on.
struct Piece {
    int64_t m, M, n, N, k, K;

    int64_t sliver() const { return K * SLIVER + APART; }
    int64_t panel() const { return K * PANEL + APART; }
    int64_t slivers() const { return ceil_div(M, SLIVER); }
    int64_t panels() const { return ceil_div(N, PANEL); }
};

// The first `rows` rows, at most MOST, and `columns` columns of a W x W square at `in`, transposed: `columns` whole vectors, 0
// where there is no row. They may overlap: the next is written over the end of the one before.
template <int MOST>
PM_INLINE void pack_square(const float* in, int64_t in_row, int64_t rows, int64_t columns, float* out, int64_t out_row) {
    vf v[W];
    if (rows >= MOST && columns >= W) {
        PM_UNROLL
        for (int i = 0; i < W; i++) {
            v[i] = i < MOST ? load(in + i * in_row) : vf{};
            if (i < MOST) PM_PREFETCH_READ(in + i * in_row + 4 * W);
        }
    } else {
        int lanes = int(std::min<int64_t>(W, columns));
        PM_UNROLL
        for (int i = 0; i < W; i++) v[i] = i < std::min<int64_t>(MOST, rows) ? load(in + i * in_row, lanes) : vf{};
    }
    transpose_lanes(v);
    if (columns >= W) {
        PM_UNROLL
        for (int i = 0; i < W; i++) store(out + i * out_row, v[i]);
    } else
        for (int i = 0; i < columns; i++) store(out + i * out_row, v[i]);
}

// A sliver of the piece: SLIVER numbers for each k, 0 where there is no row.
inline void pack_sliver(const MatmulArgs& p, const Piece& piece, int64_t sliver, float* to) {
    int64_t m = piece.m + sliver * SLIVER, rows = std::min<int64_t>(SLIVER, piece.m + piece.M - m);
    if (!p.a_transposed) {
        const float* from = p.a + m * p.a_row + piece.k;
        for (int64_t k = 0; k < piece.K; k += W) pack_square<SLIVER>(from + k, p.a_row, rows, piece.K - k, to + k * SLIVER, SLIVER);
        return;
    }
    const float* from = p.a + piece.k * p.a_row + m;
    for (int64_t k = 0; k < piece.K; k++, from += p.a_row, to += SLIVER) store(to, m + W <= p.M ? load(from) : load(from, int(rows)));
}

// A panel of the piece: PANEL numbers for each k, 0 where there is no column.
inline void pack_panel(const MatmulArgs& p, const Piece& piece, int64_t panel, float* to) {
    for (int64_t j = 0; j < PANEL; j += W) {
        int64_t n = piece.n + panel * PANEL + j;
        int columns = int(std::clamp<int64_t>(p.N - n, 0, W));
        const float* from = p.b_transposed ? p.b + n * p.b_row + piece.k : p.b + piece.k * p.b_row + n;
        if (p.b_transposed)
            for (int64_t k = 0; k < piece.K; k += W)
                pack_square<W>(from + k, p.b_row, columns, piece.K - k, to + k * PANEL + j, PANEL);
        else
            for (int64_t k = 0; k < piece.K; k++) {
                PM_PREFETCH_READ(from + (k + 12) * p.b_row);
                store(to + k * PANEL + j, load(from + k * p.b_row, columns));
            }
    }
}

// Walks over a part of a matrix in memory, line by line, so that what is packed next is in the cache by then.
class Fetcher {
  public:
    Fetcher(const float* x, int64_t row, bool transposed, int64_t first, int64_t count, int64_t k, int64_t K)
        : from_(transposed ? x + first * row + k : x + k * row + first),
          row_(row),
          rows_(count > 0 ? transposed ? count : K : 0),
          floats_(transposed ? K : count) {}
    int64_t lines() const { return rows_ * (ceil_div(floats_, LINE) + 1); }
    // So many lines with every STEP of the K multiplied meanwhile that all are asked for by their end.
    void spread(int64_t K) { a_step_ = K > 0 ? ceil_div(lines() * STEP, K) : 0; }
    void fetch() {
        for (int64_t i = 0; i < a_step_ && rows_ > 0; i++) {
            PM_PREFETCH_READ(from_ + at_);
            if ((at_ += LINE) >= floats_ + LINE) at_ = 0, from_ += row_, rows_--;
        }
    }
    static constexpr int64_t STEP = 8;

  private:
    static constexpr int64_t LINE = 16;
    const float* from_;
    int64_t row_, rows_, floats_, at_ = 0, a_step_ = 0;
};

inline Fetcher next_sliver(const MatmulArgs& p, const Piece& piece, int64_t sliver) {
    int64_t m = sliver * SLIVER;
    return {p.a, p.a_row, !p.a_transposed, piece.m + m, std::min<int64_t>(SLIVER, piece.M - m), piece.k, piece.K};
}

inline Fetcher next_block(const MatmulArgs& p, const Piece& piece, int64_t end) {
    int64_t n = piece.n + piece.N;
    return {p.b, p.b_row, bool(p.b_transposed), n, std::min(piece.N, end - n), piece.k, piece.K};
}

// SLIVER x (COUNT W) sums over K, from a packed sliver and a packed panel.
template <int COUNT>
PM_INLINE void multiply(int64_t K, const float* a, const float* b, vf (&sums)[SLIVER][COUNT], Fetcher& sliver, Fetcher& block) {
    PM_UNROLL
    for (int i = 0; i < SLIVER; i++)
        for (int j = 0; j < COUNT; j++) sums[i][j] = vf{};
    for (int64_t k = 0; k < K; k++) {
        if (k % Fetcher::STEP == 0) sliver.fetch(), block.fetch();
        vf bs[COUNT];
        PM_UNROLL
        for (int j = 0; j < COUNT; j++) bs[j] = load(b + k * PANEL + j * W);
        PM_UNROLL
        for (int i = 0; i < SLIVER; i++) {
            vf as = splat(a[k * SLIVER + i]);
            PM_UNROLL
            for (int j = 0; j < COUNT; j++) sums[i][j] += as * bs[j];
        }
    }
}

// A tile of the result: its sums over this piece, and what there is before.
template <int COUNT>
inline void matmul_tile(const MatmulArgs& p, const Piece& piece, int64_t sliver, int64_t panel, const float* a, const float* b,
                        Fetcher& next_a, Fetcher& next_b) {
    int64_t m = piece.m + sliver * SLIVER, n = piece.n + panel * PANEL;
    int rows = int(std::min<int64_t>(SLIVER, piece.m + piece.M - m)), last = int(std::min<int64_t>(W, p.N - n - (COUNT - 1) * W));
    float* out = p.out + m * p.out_row + n;
    const float* before = piece.k ? out : p.add ? p.add + m * p.add_row + n : nullptr;
    int64_t before_row = piece.k ? p.out_row : p.add_row;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < COUNT; j++) PM_PREFETCH_WRITE(out + i * p.out_row + j * W);
    vf sums[SLIVER][COUNT];
    multiply<COUNT>(piece.K, a, b, sums, next_a, next_b);
    PM_UNROLL
    for (int i = 0; i < SLIVER; i++) {
        if (i == rows) break;
        PM_UNROLL
        for (int j = 0; j < COUNT; j++) {
            int lanes = j + 1 < COUNT ? W : last;
            if (before) sums[i][j] += load(before + i * before_row + j * W, lanes);
            store(out + i * p.out_row + j * W, sums[i][j], lanes);
        }
    }
}

// A block of b times all slivers of a, which the first block finds unpacked, and which are kept where another follows.
inline void multiply_block(const MatmulArgs& p, const Piece& piece, bool first, bool keep, int64_t end, float* a, float* b) {
    for (int64_t i = 0; i < piece.panels(); i++) pack_panel(p, piece, i, b + i * piece.panel());
    Fetcher block = next_block(p, piece, end);
    block.spread(piece.panels() * piece.slivers() * piece.K);
    for (int64_t s = 0; s < piece.slivers(); s++) {
        float* as = keep ? a + s * piece.sliver() : a;
        if (first) pack_sliver(p, piece, s, as);
        Fetcher sliver = next_sliver(p, piece, s + 1);
        sliver.spread(first ? piece.panels() * piece.K : 0);
        for (int64_t i = 0; i < piece.panels(); i++) {
            const float* bs = b + i * piece.panel();
            bool narrow = p.N - piece.n - i * PANEL <= W;
            narrow ? matmul_tile<1>(p, piece, s, i, as, bs, sliver, block) : matmul_tile<2>(p, piece, s, i, as, bs, sliver, block);
        }
    }
}

// A range of rows and one of columns, with memory of its own for what is packed.
inline void multiply_range(const MatmulArgs& p, Range rows, Range columns) {
    int64_t depth = std::min(K_PIECE, p.K), block = std::max<int64_t>(1, BLOCK_FLOATS / (std::max<int64_t>(1, depth) * PANEL)) * PANEL;
    bool keep = columns.end - columns.begin > block;
    int64_t slivers = keep ? ceil_div(std::min(M_CHUNK, rows.end - rows.begin), SLIVER) : 1;
    int64_t a_floats = slivers * (depth * SLIVER + APART);
    float* a = scratch(a_floats + std::min(block / PANEL, ceil_div(p.N, PANEL)) * (depth * PANEL + APART));
    if (!a) return;
    for (int64_t m = rows.begin; m < rows.end; m += M_CHUNK)
        for (int64_t k = 0; k == 0 || k < p.K; k += K_PIECE)
            for (int64_t n = columns.begin; n < columns.end; n += block) {
                Piece piece{m, std::min(M_CHUNK, rows.end - m), n, std::min(block, columns.end - n), k, std::min(K_PIECE, p.K - k)};
                multiply_block(p, piece, n == columns.begin, keep, columns.end, a, a + a_floats);
            }
}

// Each thread multiplies a part of the rows with a part of the columns, cut so that the least is packed more than once.
inline void multiply_parts(const MatmulArgs& p) {
    int64_t slivers = ceil_div(p.M, SLIVER), panels = ceil_div(p.N, PANEL), by_rows = 1, by_columns = 1;
    while (by_rows * by_columns < p.pool.threads && (by_rows < slivers || by_columns < panels)) {
        bool rows = by_columns == panels || (by_rows < slivers && by_columns * p.N <= by_rows * p.M);
        (rows ? by_rows : by_columns)++;
    }
    auto range = [](int64_t count, int64_t size, int64_t parts, int64_t i) {
        Range whole = part(ceil_div(count, size), parts, i);
        return Range{whole.begin * size, std::min(count, whole.end * size)};
    };
    run(p.pool, by_rows * by_columns, [&](int64_t i) {
        multiply_range(p, range(p.M, SLIVER, by_rows, i / by_columns), range(p.N, PANEL, by_columns, i % by_columns));
    });
}

inline void matmul(const MatmulArgs& p) {
    // Of a gradient a^T b rows cost more to pack than columns: many rows of few columns are made as columns, and turned. An
    // element has the same bits.
    if (!p.a_transposed || p.b_transposed || p.add || p.out_row != p.N || p.K * (p.M - p.N) <= 2 * p.M * p.N) return multiply_parts(p);
    Buffer turned(p.M * p.N);
    if (!turned) return;
    multiply_parts({p.pool, p.N, p.M, p.K, p.b_row, p.a_row, 0, p.M, 1, 0, p.b, p.a, nullptr, turned.data});
    transpose({p.pool, p.N, p.M, p.M, turned.data, p.out});
}

}  // namespace pm
