// A few rows times a matrix (definition: product in reference.py), which is bound by reading the matrix once: many of its
// rows at a time, so that the memory has several streams to follow, and every row of x while they are in the cache.
#pragma once
#include "layout.h"

namespace pm {

struct ProductArgs {
    Pool pool;
    int64_t T, rows, columns, x_stride;
    const float *x, *w;  // (T, columns) with rows `x_stride` apart, (rows, columns)
    float* y;            // (T, rows)
};
PM_FIELDS(ProductArgs, T, rows, columns, x_stride, x, w, y)

// Rows of the matrix read side by side. Measured on 57 MB: 8 rows 59 GB/s, 1 row 47, 16 rows 52; prefetching less.
constexpr int STREAMS = W < 8 ? W : 8;
// A product smaller than this is not worth waking another thread for.
constexpr int64_t SERIAL_PRODUCT = 1 << 17;

// sums[i] = the lanes of row i of w times x, for ROWS adjacent rows.
template <int ROWS>
PM_INLINE void dot_rows(const float* w, const float* x, int64_t columns, vf* sums) {
    vf total[ROWS] = {};
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
        vf xs = load(x + c);
        PM_UNROLL
        for (int i = 0; i < ROWS; i++) total[i] += load(w + i * columns + c) * xs;
    }
    if (c < columns) {
        int n = int(columns - c);
        vf xs = load(x + c, n);
        for (int i = 0; i < ROWS; i++) total[i] += load(w + i * columns + c, n) * xs;
    }
    for (int i = 0; i < ROWS; i++) sums[i] = total[i];
}

// Calls finish(t, row, lanes, dot products of W rows of w with row t of x) over all t and all rows in `blocks` of W.
template <class Finish>
PM_INLINE void rows_times_vectors(const float* w, int64_t rows, int64_t columns, const float* x, int64_t x_stride, int64_t T,
                                  Range blocks, const Finish& finish) {
    for (int64_t r = blocks.begin * W; r < std::min(rows, blocks.end * W); r += W) {
        int lanes = int(std::min<int64_t>(W, rows - r));
        for (int64_t t = 0; t < T; t++) {
            vf sums[W] = {};
            int i = 0;
            for (; i + STREAMS <= lanes; i += STREAMS)
                dot_rows<STREAMS>(w + (r + i) * columns, x + t * x_stride, columns, sums + i);
            for (; i < lanes; i++) dot_rows<1>(w + (r + i) * columns, x + t * x_stride, columns, sums + i);
            finish(t, r, lanes, sum_each([&](int lane) { return sums[lane]; }));
        }
    }
}

// Runs work(blocks of W rows) over all rows of a matrix of that size, on one thread if it is small.
template <class Work>
void for_row_blocks(const Pool& pool, int64_t rows, int64_t columns, const Work& work) {
    int64_t blocks = ceil_div(rows, W), parts = rows * columns < SERIAL_PRODUCT ? 1 : std::min(blocks, Grid::WANTED);
    run(pool, parts, [&](int64_t i) { work(part(blocks, parts, i)); });
}

inline void product(const ProductArgs& a) {
    for_row_blocks(a.pool, a.rows, a.columns, [&](Range blocks) {
        rows_times_vectors(a.w, a.rows, a.columns, a.x, a.x_stride, a.T, blocks,
                           [&](int64_t t, int64_t r, int lanes, vf sums) { store(a.y + t * a.rows + r, sums, lanes); });
    });
}

}  // namespace pm
