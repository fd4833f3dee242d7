// out (columns, rows) = x (rows, columns) transposed, in square blocks that fit the first-level cache.
#pragma once
#include "layout.h"

namespace pm {

struct TransposeArgs {
    Pool pool;
    int64_t rows, columns, in_row;  // the last: stride of the rows of `x`, in elements
    const float* x;
    float* out;
};
PM_FIELDS(TransposeArgs, rows, columns, in_row, x, out)

// One W x W square through registers. Its rows lie pages apart: what the square beside it reads of them is fetched.
PM_INLINE void transpose_square(const float* in, int64_t in_row, float* out, int64_t out_row) {
    vf v[W];
    PM_UNROLL
    for (int i = 0; i < W; i++) {
        v[i] = load(in + i * in_row);
        PM_PREFETCH_READ(in + i * in_row + W);
    }
    transpose_lanes(v);
    PM_UNROLL
    for (int i = 0; i < W; i++) store(out + i * out_row, v[i]);
}

inline void transpose_strip(const TransposeArgs& a, int64_t c) {
    int64_t r = 0;
    if (c + W <= a.columns)
        for (; r + W <= a.rows; r += W) transpose_square(a.x + r * a.in_row + c, a.in_row, a.out + c * a.rows + r, a.rows);
    for (; r < a.rows; r++)
        for (int64_t j = c; j < std::min(a.columns, c + W); j++) a.out[j * a.rows + r] = a.x[r * a.in_row + j];
}

inline void transpose(const TransposeArgs& a) {
    run(a.pool, ceil_div(a.columns, W), [&](int64_t i) { transpose_strip(a, i * W); });
}

}  // namespace pm
