// Sums of squares of many tensors in one pass (definition: square_sums in reference/).
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
constexpr int SQUARE_STREAMS = 8, SQUARE_ROWS = 16;
constexpr int64_t SQUARE_BLOCK = SQUARE_STREAMS * SQUARE_ROWS * W;

inline double exact_squares(const float* x, int64_t count) {
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) total += double(x[i]) * double(x[i]);
    return total;
}

// One block: SQUARE_STREAMS streams that start `across` floats apart, of SQUARE_ROWS vectors each that are `along` apart.
inline double block_squares(const float* x, int64_t across, int64_t along) {
    vf sums[SQUARE_STREAMS] = {};
    for (int j = 0; j < SQUARE_ROWS; j++) {
        PM_UNROLL
        for (int k = 0; k < SQUARE_STREAMS; k++) {
            vf v = load(x + k * across + j * along);
            sums[k] += v * v;
        }
    }
    float total = sum(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
    if (std::isfinite(total)) return total;
    // A square can overflow where the number does not; a NaN or infinity stays one.
    double exact = 0.0;
    for (int j = 0; j < SQUARE_ROWS; j++)
        for (int k = 0; k < SQUARE_STREAMS; k++) exact += exact_squares(x + k * across + j * along, W);
    return exact;
}

// Most of it in streams side by side: the memory gives one core several streams at twice the speed of one (24 GB/s to 11 as
// measured), the rest in one.
inline double sum_squares(const float* x, int64_t count) {
    double total = 0.0;
    int64_t stream = count / SQUARE_BLOCK * SQUARE_ROWS * W, i = 0;
    for (; i < stream; i += SQUARE_ROWS * W) total += block_squares(x + i, stream, W);
    return total + exact_squares(x + SQUARE_STREAMS * stream, count - SQUARE_STREAMS * stream);
}

inline void square_sums(const SquareSumsArgs& a) {
    Buffer memory(2 * a.count * SQUARE_PARTS);
    if (!memory) return;
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
