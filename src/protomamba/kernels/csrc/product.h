// A few vectors times a matrix as an op of its own (definition: product in reference/).
#pragma once
#include "layout.h"
#include "matrix.h"

namespace pm {

struct ProductArgs {
    Pool pool;
    int64_t T, rows, columns, x_stride, kind;
    const float* x;      // (T, columns) with rows `x_stride` apart
    const void* w;       // (rows, columns) of `kind`
    const float* scale;  // (rows,), int8 only
    float* y;            // (T, rows)
};
PM_FIELDS(ProductArgs, T, rows, columns, x_stride, kind, x, w, scale, y)

inline void product(const ProductArgs& a) {
    Matrix m{a.kind, a.rows, a.columns, a.w, a.scale};
    Vectors v(m, a.x, a.x_stride, a.T);
    if (!v) return;
    for_row_groups(a.pool, a.rows, a.columns, [&](Range groups) {
        times_vectors(m, v, groups,
                      [&](int64_t t, int64_t r, int lanes, vf sums) { store(a.y + t * a.rows + r, sums, lanes); });
    });
}

}  // namespace pm
