// Sums of squares of many tensors in one pass (definition: square_sums in reference.py).
#pragma once
#include "layout.h"

namespace pm {

struct SquareSumsArgs {
    Pool pool;
    int64_t count;
    const int64_t* sizes;      // (count,)
    const float* const* data;  // (count,)
    double* sums;              // (count,)
};
PM_FIELDS(SquareSumsArgs, count, sizes, data, sums)

// Parts that each tensor is summed in, and the floats from which on a tensor is worth cutting.
constexpr int64_t SQUARE_PARTS = 8, SQUARE_WHOLE = 4096;

// A few rows of lanes at a time, so that float sums stay short; between them in double.
constexpr int64_t SQUARE_BLOCK = 16 * 8 * W;

inline double exact_squares(const float* x, int64_t count) {
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) total += double(x[i]) * double(x[i]);
    return total;
}

inline double sum_squares(const float* x, int64_t count) {
    double total = 0.0;
    int64_t i = 0;
    for (; i + SQUARE_BLOCK <= count; i += SQUARE_BLOCK) {
        vf sums[8] = {};
        for (int64_t j = 0; j < SQUARE_BLOCK; j += 8 * W) {
            PM_UNROLL
            for (int k = 0; k < 8; k++) {
                vf v = load(x + i + j + k * W);
                sums[k] += v * v;
            }
        }
        float block = sum(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
        // A square can overflow where the number does not; a NaN or infinity stays one.
        total += std::isfinite(block) ? double(block) : exact_squares(x + i, SQUARE_BLOCK);
    }
    return total + exact_squares(x + i, count - i);
}

inline void square_sums(const SquareSumsArgs& a) {
    Buffer memory(2 * a.count * SQUARE_PARTS);
    double* partial = reinterpret_cast<double*>(memory.data);
    run(a.pool, SQUARE_PARTS, [&](int64_t i) {
        for (int64_t k = 0; k < a.count; k++) {
            Range range = a.sizes[k] > SQUARE_WHOLE ? part(a.sizes[k], SQUARE_PARTS, i) : Range{0, i ? 0 : a.sizes[k]};
            partial[k * SQUARE_PARTS + i] = sum_squares(a.data[k] + range.begin, range.end - range.begin);
        }
    });
    for (int64_t k = 0; k < a.count; k++) {
        a.sums[k] = 0.0;
        for (int64_t i = 0; i < SQUARE_PARTS; i++) a.sums[k] += partial[k * SQUARE_PARTS + i];
    }
}

}  // namespace pm
