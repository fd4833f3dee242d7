// A matrix times a few vectors, from weights in float32, bf16 or int8. Bound by reading the matrix once, every vector taking
// its turn while some rows are in the cache. A vector's result has the same bits whatever the number of vectors beside it.
#pragma once
#include "cpu.h"
#include "norm.h"

namespace pm {

enum MatrixKind : int64_t { FP32, BF16, INT8 };

// A packed matrix (kernels/packed.py) is padded with zeros to whole groups of rows and blocks of columns; group by group,
// block by block, the group's rows of the block lie side by side, so that the memory is read from one end to the other.
// (14 MB of int8 in rows of 512, eight at a time: 1.5 ms; so: 0.25; only read: 0.21.) In bf16 a block's columns i and 16 + i
// share a 32-bit word, the former its low half. In int8 a row is `scale` times the numbers -127 .. 127.
constexpr int64_t MATRIX_BLOCK = 32, MATRIX_GROUP = 8;

struct Matrix {
    int64_t kind, rows, columns;
    const void* data;    // (rows, columns) float32 or packed
    const float* scale;  // (rows,), int8 only
};

inline int64_t padded(int64_t columns) { return ceil_div(columns, MATRIX_BLOCK) * MATRIX_BLOCK; }

// Where the first column of a row stands in a packed matrix; the next block is MATRIX_GROUP * MATRIX_BLOCK further.
inline int64_t packed_at(const Matrix& m, int64_t row) {
    return row / MATRIX_GROUP * MATRIX_GROUP * padded(m.columns) + row % MATRIX_GROUP * MATRIX_BLOCK;
}

// Rows of the matrix read at once: of one in float32, so that the memory has several streams to follow. Measured on 57 MB: 8 rows 59 GB/s, 1 row 47, 16 rows 52; prefetching less.
constexpr int STREAMS = W < 8 ? W : 8;
static const bool ONE_STREAM = cpu_follows_one_stream();
// Rows and vectors whose products are held in registers at once, where there are several vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 4, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
// A product smaller than this is not worth waking another thread for.
constexpr int64_t SERIAL_PRODUCT = 1 << 17;

// T vectors as a kind of matrix takes them: for bf16 padded with zeros; for int8 as 16-bit integers, each vector with the
// scale that uses their whole range, so that next to the rounding of the weights theirs is nothing. False where their memory
// is refused.
class Vectors {
  public:
    Vectors(const Matrix& m, const float* x, int64_t x_stride, int64_t T)
        : count(T), floats(x), stride(x_stride), memory_(m.kind == FP32 ? 0 : T * (padded(m.columns) + 1)) {
        if (m.kind == FP32 || !memory_) return;
        stride = padded(m.columns);
        scale = memory_.data + T * stride;
        for (int64_t t = 0; t < T; t++)
            m.kind == BF16 ? pad(x + t * x_stride, m.columns, t) : quantise(x + t * x_stride, m.columns, t);
        floats = memory_.data;
        integers = reinterpret_cast<int16_t*>(memory_.data);
    }
    explicit operator bool() const { return bool(memory_); }

    int64_t count;
    const float* floats;      // stride apart
    int64_t stride;
    const int16_t* integers = nullptr;  // stride apart
    float* scale = nullptr;   // (count,)

  private:
    void pad(const float* x, int64_t columns, int64_t t) {
        std::memcpy(memory_.data + t * stride, x, columns * sizeof(float));
        std::memset(memory_.data + t * stride + columns, 0, (stride - columns) * sizeof(float));
    }
    void quantise(const float* x, int64_t columns, int64_t t) {
        vf top{};
        vi broken{};
        for_row(columns, [&](int64_t c, int n) {
            vf v = load(x + c, n), size = vabs(v);
            top = size > top ? size : top;
            broken |= v != v;
        });
        float largest = 0.0f;
        for (int i = 0; i < W; i++) largest = broken[i] || largest != largest ? NAN : std::max(largest, top[i]);
        float factor = largest > 0.0f ? 32767.0f / largest : 0.0f;
        int16_t* to = reinterpret_cast<int16_t*>(memory_.data) + t * stride;
        std::memset(to + columns, 0, (stride - columns) * sizeof(int16_t));
        for_row(columns, [&](int64_t c, int n) { store_rounded(to + c, load(x + c, n) * factor, n); });
        scale[t] = largest / 32767.0f;  // infinite or NaN if an element is: so are the products
    }

    Buffer memory_;
};

// A block of a packed matrix some way ahead is fetched where one vector meets it once: 14 MB of int8 0.40 ms, so 0.28.
constexpr int64_t AHEAD = 8192;
template <class Weight>
PM_INLINE void prefetch_block(const Weight* w) {
    const char* ahead = reinterpret_cast<const char*>(w) + AHEAD;
    PM_UNROLL
    for (size_t line = 0; line < MATRIX_GROUP * MATRIX_BLOCK * sizeof(Weight); line += 64) __builtin_prefetch(ahead + line, 0, 3);
}

// How the products of one kind are summed up: W lanes for each of ROWS rows of the matrix from `row` on and each of COUNT
// vectors from t on, into sums[vector * W + row].
template <int64_t KIND>
struct Dots;

template <>
struct Dots<FP32> {
    template <int ROWS, int COUNT>
    PM_INLINE void sums(const Matrix& m, int64_t row, const Vectors& v, int64_t t, vf* sums) {
        const float *w = static_cast<const float*>(m.data) + row * m.columns, *x = v.floats + t * v.stride;
        vf total[ROWS][COUNT] = {};
        auto step = [&](int64_t c, int n) {
            vf xs[COUNT];
            PM_UNROLL
            for (int j = 0; j < COUNT; j++) xs[j] = load(x + j * v.stride + c, n);
            PM_UNROLL
            for (int i = 0; i < ROWS; i++) {
                vf ws = load(w + i * m.columns + c, n);
                PM_UNROLL
                for (int j = 0; j < COUNT; j++) total[i][j] += ws * xs[j];
            }
        };
        int64_t c = 0;
        for (; c + W <= m.columns; c += W) step(c, W);
        if (c < m.columns) step(c, int(m.columns - c));
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COUNT; j++) sums[j * W + i] = total[i][j];
    }
};

template <>
struct Dots<BF16> {
    template <int ROWS, int COUNT>
    PM_INLINE void sums(const Matrix& m, int64_t row, const Vectors& v, int64_t t, vf* sums) {
        const uint16_t* w = static_cast<const uint16_t*>(m.data) + packed_at(m, row);
        const float* x = v.floats + t * v.stride;
        vf total[ROWS][COUNT] = {};
        for (int64_t c = 0; c < v.stride; c += MATRIX_BLOCK, w += MATRIX_GROUP * MATRIX_BLOCK) {
            if (COUNT == 1 && !ONE_STREAM) prefetch_block(w);
            PM_UNROLL
            for (int half = 0; half < 16; half += W) {
                vf low[COUNT], high[COUNT];
                PM_UNROLL
                for (int j = 0; j < COUNT; j++) {
                    low[j] = load(x + j * v.stride + c + half);
                    high[j] = load(x + j * v.stride + c + 16 + half);
                }
                PM_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    vu pairs = (vu)load(reinterpret_cast<const float*>(w + i * MATRIX_BLOCK + 2 * half));
                    vf w_low = (vf)(pairs << 16), w_high = (vf)(pairs & 0xffff0000u);
                    PM_UNROLL
                    for (int j = 0; j < COUNT; j++) {
                        total[i][j] += w_low * low[j];
                        total[i][j] += w_high * high[j];
                    }
                }
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COUNT; j++) sums[j * W + i] = total[i][j];
    }
};

// So many columns are summed in 32-bit integers: at most 512 products of 127 x 32767 in a lane, at the smallest W.
constexpr int64_t INTEGER_COLUMNS = 2048;

template <>
struct Dots<INT8> {
    template <int ROWS, int COUNT>
    PM_INLINE void sums(const Matrix& m, int64_t row, const Vectors& v, int64_t t, vf* sums) {
        const int8_t* w = static_cast<const int8_t*>(m.data) + packed_at(m, row);
        const int16_t* x = v.integers + t * v.stride;
        for (int k = 0; k < COUNT * W; k += W)
            for (int i = 0; i < ROWS; i++) sums[k + i] = vf{};
        for (int64_t start = 0; start < v.stride; start += INTEGER_COLUMNS) {
            vi total[ROWS][COUNT] = {};
            int64_t end = std::min(v.stride, start + INTEGER_COLUMNS);
            for (int64_t c = start; c < end; c += MATRIX_BLOCK, w += MATRIX_GROUP * MATRIX_BLOCK) {
                if (COUNT == 1 && !ONE_STREAM) prefetch_block(w);
                PM_UNROLL
                for (int some = 0; some < MATRIX_BLOCK; some += 2 * W) {
                    vs xs[COUNT];
                    PM_UNROLL
                    for (int j = 0; j < COUNT; j++) xs[j] = load(x + j * v.stride + c + some);
                    PM_UNROLL
                    for (int i = 0; i < ROWS; i++) {
                        vs ws = load(w + i * MATRIX_BLOCK + some);
                        PM_UNROLL
                        for (int j = 0; j < COUNT; j++) total[i][j] = add_products(total[i][j], ws, xs[j]);
                    }
                }
            }
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < COUNT; j++) sums[j * W + i] += __builtin_convertvector(total[i][j], vf);
        }
    }
};

// sums[vector * W + row] for W rows, `lanes` of which exist, and COUNT vectors.
template <int64_t KIND, int ROWS, int COUNT>
PM_INLINE void sum_rows(const Matrix& m, int64_t row, int lanes, const Vectors& v, int64_t t, vf* sums) {
    if (KIND != FP32 && lanes == W) {  // where the compiler knows the number, int8 takes 0.9 of the time; float32 more
        PM_UNROLL
        for (int i = 0; i < W; i += ROWS) Dots<KIND>::template sums<ROWS, COUNT>(m, row + i, v, t, sums + i);
        return;
    }
    int i = 0, whole = KIND == FP32 ? lanes - ROWS : lanes - 1;  // of a packed matrix the whole group is there
    for (; i <= whole; i += ROWS) Dots<KIND>::template sums<ROWS, COUNT>(m, row + i, v, t, sums + i);
    for (; i < lanes; i++) Dots<KIND>::template sums<1, COUNT>(m, row + i, v, t, sums + i);
}

template <int64_t KIND, int ROWS, int COUNT, class Finish>
PM_INLINE void finish_rows(const Matrix& m, int64_t row, const Vectors& v, int64_t t, const Finish& finish) {
    int lanes = int(std::min<int64_t>(W, m.rows - row));
    vf sums[COUNT * W] = {};
    sum_rows<KIND, ROWS, COUNT>(m, row, lanes, v, t, sums);
    for (int j = 0; j < COUNT; j++) {
        vf dots = sum_each([&](int lane) { return sums[j * W + lane]; });
        finish(t + j, row, lanes, KIND == INT8 ? dots * (load(m.scale + row, lanes) * v.scale[t + j]) : dots);
    }
}

template <int64_t KIND, class Finish>
void times_vectors_of(const Matrix& m, const Vectors& v, Range blocks, const Finish& finish) {
    for (int64_t row = blocks.begin * W; row < std::min(m.rows, blocks.end * W); row += W) {
        int64_t t = 0;
        for (; t + TILE_VECTORS <= v.count; t += TILE_VECTORS) finish_rows<KIND, TILE_ROWS, TILE_VECTORS>(m, row, v, t, finish);
        if (TILE_VECTORS > 2 && t + 2 <= v.count) finish_rows<KIND, TILE_ROWS, 2>(m, row, v, t, finish), t += 2;
        if (t == v.count) continue;
        if (KIND == FP32 && ONE_STREAM)
            finish_rows<KIND, 1, 1>(m, row, v, t, finish);
        else
            finish_rows<KIND, STREAMS, 1>(m, row, v, t, finish);
    }
}

// Calls finish(t, row, lanes, dot products of W rows of m with vector t) over all t and all rows in `blocks` of W.
template <class Finish>
PM_INLINE void times_vectors(const Matrix& m, const Vectors& v, Range blocks, const Finish& finish) {
    if (m.kind == FP32) return times_vectors_of<FP32>(m, v, blocks, finish);
    m.kind == BF16 ? times_vectors_of<BF16>(m, v, blocks, finish) : times_vectors_of<INT8>(m, v, blocks, finish);
}

// Runs work(blocks of W rows) over all rows of a matrix of that size, on one thread if it is small.
template <class Work>
void for_row_blocks(const Pool& pool, int64_t rows, int64_t columns, const Work& work) {
    int64_t blocks = ceil_div(rows, W), parts = rows * columns < SERIAL_PRODUCT ? 1 : std::min(blocks, Grid::WANTED);
    run(pool, parts, [&](int64_t i) { work(part(blocks, parts, i)); });
}

}  // namespace pm
