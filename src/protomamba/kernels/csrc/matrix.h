// A matrix times a few vectors, from weights in float32, bf16 or int8. Bound by reading the matrix once, every vector taking
// its turn while some rows are in the cache. A vector's result has the same bits whatever the number of vectors beside it.
#pragma once
#include "cpu.h"
#include "norm.h"

namespace pm {

enum MatrixKind : int64_t { FP32, BF16, INT8 };

// A packed matrix (kernels/packed.py) is padded with zeros to whole groups of rows and pairs of columns; group by group, pair
// by pair, the group's rows lie side by side, a row's two columns together. So memory is read from one end to the other, and
// lanes are rows: no sum goes across them. In bf16 a pair is a 32-bit word, its first column the low half. In int8 a row is
// `scale` times the numbers -127 .. 127.
constexpr int64_t MATRIX_GROUP = 64;

struct Matrix {
    int64_t kind, rows, columns;
    const void* data;    // (rows, columns) float32 or packed
    const float* scale;  // (rows,), int8 only
};

inline int64_t padded(int64_t columns) { return columns + (columns & 1); }

// Rows of a float32 matrix read at once for one vector: of one where the memory follows a single stream better (cpu.h).
// Measured on 57 MB: 8 rows 59 GB/s, 1 row 47, 16 rows 52; prefetching less.
constexpr int STREAMS = W < 8 ? W : 8;
static const bool ONE_STREAM = cpu_follows_one_stream();
// Rows of a float32 matrix, vectors of W rows of a packed one, and vectors whose products are held in registers at once.
constexpr int TILE_ROWS = 4, SLICE = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif
static_assert(MATRIX_GROUP % (SLICE * W) == 0, "a group is whole slices");
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

// Calls work(how many vectors, as a constant, the first of them) for tiles of TILE_VECTORS, 2 and 1 that are `count` together.
template <class Work>
PM_INLINE void for_tiles(int64_t count, const Work& work) {
    int64_t t = 0;
    for (; t + TILE_VECTORS <= count; t += TILE_VECTORS) work(std::integral_constant<int, TILE_VECTORS>(), t);
    if (TILE_VECTORS > 2 && t + 2 <= count) work(std::integral_constant<int, 2>(), t), t += 2;
    if (t < count) work(std::integral_constant<int, 1>(), t);
}

// How the products of one kind are summed up. Of a float32 matrix: W lanes for each of ROWS rows from `row` on and each of
// COUNT vectors from t on, into sums[vector * W + row].
template <int ROWS, int COUNT>
PM_INLINE void dots(const Matrix& m, int64_t row, const Vectors& v, int64_t t, vf* sums) {
    const float *w = static_cast<const float*>(m.data) + row * m.columns, *x = v.floats + t * v.stride;
    vf total[ROWS][COUNT] = {};
    auto step = [&](int64_t c, int n) {
        vf xs[COUNT];
        PM_UNROLL
        for (int j = 0; j < COUNT; j++) xs[j] = load(x + j * v.stride + c, n);
        PM_UNROLL
        for (int i = 0; i < ROWS; i++) {
            // The first of several vectors has the next W rows fetched while products with these are made.
            if (COUNT > 1 && t == 0) PM_PREFETCH_READ(w + (i + W) * m.columns + c);
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

// sums[vector * W + row] for W rows, `lanes` of which exist, and COUNT vectors.
template <int ROWS, int COUNT>
PM_INLINE void dots_of_rows(const Matrix& m, int64_t row, int lanes, const Vectors& v, int64_t t, vf* sums) {
    int i = 0;
    for (; i <= lanes - ROWS; i += ROWS) dots<ROWS, COUNT>(m, row + i, v, t, sums + i);
    for (; i < lanes; i++) dots<1, COUNT>(m, row + i, v, t, sums + i);
}

template <int ROWS, int COUNT, class Finish>
PM_INLINE void finish_rows(const Matrix& m, int64_t row, const Vectors& v, int64_t t, const Finish& finish) {
    int lanes = int(std::min<int64_t>(W, m.rows - row));
    vf sums[COUNT * W] = {};
    dots_of_rows<ROWS, COUNT>(m, row, lanes, v, t, sums);
    for (int j = 0; j < COUNT; j++) finish(t + j, row, lanes, sum_each([&](int lane) { return sums[j * W + lane]; }));
}

template <class Finish>
void times_vectors_fp32(const Matrix& m, const Vectors& v, Range groups, const Finish& finish) {
    for (int64_t row = groups.begin * MATRIX_GROUP; row < std::min(m.rows, groups.end * MATRIX_GROUP); row += W) {
        for_tiles(v.count, [&](auto tile, int64_t t) __attribute__((always_inline)) {
            if constexpr (tile > 1)
                finish_rows<TILE_ROWS, tile>(m, row, v, t, finish);
            else
                ONE_STREAM ? finish_rows<1, 1>(m, row, v, t, finish) : finish_rows<STREAMS, 1>(m, row, v, t, finish);
        });
    }
}

// Weights of a packed matrix this far ahead are fetched.
constexpr int64_t AHEAD = 4096;
template <class Weight>
PM_INLINE void fetch_ahead(const Weight* w) {
    PM_UNROLL
    for (size_t at = 0; at < 2 * SLICE * W * sizeof(Weight); at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD * sizeof(Weight) + at, 0, 3);
}

// Of a packed matrix: the products of SLICE x W rows, the first column pair of which is at w, with COUNT vectors from t on.
// (A pair of the same rows is 2 MATRIX_GROUP weights further.)
template <int64_t KIND>
struct Slices;

template <>
struct Slices<BF16> {
    using Weight = uint16_t;

    template <int COUNT>
    PM_INLINE void sums(const Weight* w, const Vectors& v, int64_t t, vf (*total)[SLICE]) {
        const float* x = v.floats + t * v.stride;
        vf sum[COUNT][SLICE] = {};
        for (int64_t c = 0; c < v.stride; c += 2, w += 2 * MATRIX_GROUP) {
            fetch_ahead(w);
            PM_UNROLL
            for (int k = 0; k < SLICE; k++) {
                vu pairs = (vu)load(reinterpret_cast<const float*>(w + 2 * W * k));
                vf first = (vf)(pairs << 16), second = (vf)(pairs & 0xffff0000u);
                PM_UNROLL
                for (int j = 0; j < COUNT; j++) {
                    sum[j][k] += first * x[j * v.stride + c];
                    sum[j][k] += second * x[j * v.stride + c + 1];
                }
            }
        }
        for (int j = 0; j < COUNT; j++)
            for (int k = 0; k < SLICE; k++) total[j][k] = sum[j][k];
    }
};

// So many columns are summed in 32-bit integers: 512 products of 127 x 32767.
constexpr int64_t INTEGER_COLUMNS = 512;

template <>
struct Slices<INT8> {
    using Weight = int8_t;

    template <int COUNT>
    PM_INLINE void sums(const Weight* w, const Vectors& v, int64_t t, vf (*total)[SLICE]) {
        const int16_t* x = v.integers + t * v.stride;
        for (int j = 0; j < COUNT; j++)
            for (int k = 0; k < SLICE; k++) total[j][k] = vf{};
        for (int64_t start = 0; start < v.stride; start += INTEGER_COLUMNS) {
            vi sum[COUNT][SLICE] = {};
            int64_t end = std::min(v.stride, start + INTEGER_COLUMNS);
            for (int64_t c = start; c < end; c += 2, w += 2 * MATRIX_GROUP) {
                fetch_ahead(w);
                vs pairs[SLICE];
                PM_UNROLL
                for (int k = 0; k < SLICE; k++) pairs[k] = load(w + 2 * W * k);
                PM_UNROLL
                for (int j = 0; j < COUNT; j++) {
                    int32_t pair;
                    std::memcpy(&pair, x + j * v.stride + c, sizeof pair);
                    vs same = (vs)(pair - vi{});
                    PM_UNROLL
                    for (int k = 0; k < SLICE; k++) sum[j][k] = add_products(sum[j][k], pairs[k], same);
                }
            }
            for (int j = 0; j < COUNT; j++)
                for (int k = 0; k < SLICE; k++) total[j][k] += __builtin_convertvector(sum[j][k], vf);
        }
    }
};

template <int64_t KIND, int COUNT, class Finish>
PM_INLINE void finish_slice(const Matrix& m, int64_t row, const Vectors& v, int64_t t, const Finish& finish) {
    using Weight = typename Slices<KIND>::Weight;
    int64_t group = row / MATRIX_GROUP * MATRIX_GROUP, inside = row % MATRIX_GROUP;
    vf sums[COUNT][SLICE];
    Slices<KIND>::template sums<COUNT>(static_cast<const Weight*>(m.data) + group * padded(m.columns) + 2 * inside, v, t, sums);
    for (int j = 0; j < COUNT; j++)
        for (int64_t k = 0, r = row; k < SLICE && r < m.rows; k++, r += W) {
            int lanes = int(std::min<int64_t>(W, m.rows - r));
            vf dots = sums[j][k];
            finish(t + j, r, lanes, KIND == INT8 ? dots * (load(m.scale + r, lanes) * v.scale[t + j]) : dots);
        }
}

template <int64_t KIND, class Finish>
void times_vectors_packed(const Matrix& m, const Vectors& v, Range groups, const Finish& finish) {
    for (int64_t row = groups.begin * MATRIX_GROUP; row < std::min(m.rows, groups.end * MATRIX_GROUP); row += SLICE * W) {
        for_tiles(v.count, [&](auto tile, int64_t t) __attribute__((always_inline)) {
            finish_slice<KIND, tile>(m, row, v, t, finish);
        });
    }
}

// Calls finish(t, row, lanes, dot products of W rows of m with vector t) over all t and all rows in those groups of rows.
template <class Finish>
PM_INLINE void times_vectors(const Matrix& m, const Vectors& v, Range groups, const Finish& finish) {
    if (m.kind == FP32) return times_vectors_fp32(m, v, groups, finish);
    m.kind == BF16 ? times_vectors_packed<BF16>(m, v, groups, finish) : times_vectors_packed<INT8>(m, v, groups, finish);
}

// Runs work(groups of MATRIX_GROUP rows) over all rows of a matrix of that size, on one thread if it is small.
template <class Work>
void for_row_groups(const Pool& pool, int64_t rows, int64_t columns, const Work& work) {
    int64_t groups = ceil_div(rows, MATRIX_GROUP);
    int64_t parts = rows * columns < SERIAL_PRODUCT ? 1 : std::min(groups, Grid::WANTED);
    run(pool, parts, [&](int64_t i) { work(part(groups, parts, i)); });
}

}  // namespace pm
