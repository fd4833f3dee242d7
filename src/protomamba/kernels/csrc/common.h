// What the C ABI and the ops share: strided views, torch's thread pool, per-thread scratch memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace pm {

// A (batch, row, lane) tensor: strides in elements, lanes adjacent. As all fields of argument structs it is made of
// 8-byte words, so that no struct has a gap.
struct View {
    char* data;
    int64_t batch, row;

    explicit operator bool() const { return data != nullptr; }
    template <class T>
    T* at(int64_t b, int64_t t, int64_t lane) const {
        return reinterpret_cast<T*>(data) + b * batch + t * row + lane;
    }
};

// Rows of a block are strided by whole pages, which no hardware prefetcher follows: while one block is read and written,
// the lines of the next are fetched.
#define PM_PREFETCH_READ(address) __builtin_prefetch(address, 0, 2)
#define PM_PREFETCH_WRITE(address) __builtin_prefetch(address, 1, 2)

// torch_parallel_for of libtorch: the kernels never own a thread.
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

struct Pool {
    ParallelFor parallel_for;
    int64_t threads;
};

// Runs work(i) for every i in [0, tasks). Which thread takes which task is left to chance, what a task does is not: the
// partition depends on shapes only and no two tasks write the same place, so the result does not depend on the threads.
template <class Work>
void run(const Pool& pool, int64_t tasks, const Work& work) {
    if (pool.threads <= 1 || tasks <= 1) {
        for (int64_t i = 0; i < tasks; i++) work(i);
        return;
    }
    struct Shared {
        const Work& work;
        int64_t tasks;
        std::atomic<int64_t> next;
    } shared{work, tasks, {0}};
    auto worker = [](int64_t, int64_t, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1)) < s.tasks;) s.work(i);
    };
    pool.parallel_for(0, std::min(pool.threads, tasks), 1, worker, &shared);
}

// Working memory that was refused: how often in this process, and the bytes asked for last. There are no exceptions here
// (CMakeLists.txt): who is refused memory returns at once, and the op tells its caller (kernels.cpp).
inline std::atomic<int64_t> refusals{0}, refused_bytes{0};

// Aligned, uninitialised floats; null where the system has none.
inline float* allocate(int64_t count) {
    size_t bytes = size_t(count + 15) / 16 * 16 * sizeof(float);
    float* data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!data) refused_bytes = int64_t(bytes), refusals++;
    return data;
}

// The sanitizer build fills working memory with NaN, so that a value read before it is written shows in the result.
inline float* poisoned(float* data, [[maybe_unused]] int64_t count) {
#if defined(PM_POISON)
    for (int64_t i = 0; data && i < count; i++) data[i] = NAN;
#endif
    return data;
}

// Aligned floats that live as long as the thread and only grow; null where they cannot.
class Scratch {
  public:
    float* floats(int64_t count) {
        if (count > size_) {
            std::free(data_);
            size_ = (count + 1023) / 1024 * 1024;
            data_ = allocate(size_);
            if (!data_) size_ = 0;
        }
        return poisoned(data_, count);
    }
    ~Scratch() { std::free(data_); }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

inline float* scratch(int64_t count) {
    static thread_local Scratch memory;
    return memory.floats(count);
}

// Aligned, uninitialised floats for the time of one call; false where they are refused.
struct Buffer {
    float* data;
    explicit Buffer(int64_t count) : data(poisoned(allocate(count + 1), count)) {}
    explicit operator bool() const { return data != nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The i-th of `parts` nearly equal ranges of [0, count).
struct Range {
    int64_t begin, end;
};
inline Range part(int64_t count, int64_t parts, int64_t i) { return {count * i / parts, count * (i + 1) / parts}; }

// How work on (batch, channel blocks) is cut: about `WANTED` tasks, each a range of batches and a range of blocks.
// A function of the shape alone.
struct Grid {
    int64_t batch_parts, block_parts;

    static constexpr int64_t WANTED = 16;
    Grid(int64_t batches, int64_t blocks)
        : batch_parts(std::min(batches, WANTED)),
          block_parts(std::clamp<int64_t>(WANTED / batch_parts, 1, ceil_div(blocks * W, 64))) {}
    int64_t tasks() const { return batch_parts * block_parts; }
};

}  // namespace pm
