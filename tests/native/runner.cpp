// Plays the kernel tests' calls on a library without Python or torch, and judges the results by their float64 answers:
//
//     runner LIBRARY CASES [THREADS ...]      (1, 2 and 4 unless given)
//
// For CPUs that only an emulator has (make test-arm64) and for ThreadSanitizer, which Python's own threads would drown
// (make test-tsan). Every case runs at every number of threads; beyond the tolerances, the bits must be the same.
// Exit status 1 if anything is wrong, 2 if the files are.
#include <dlfcn.h>

#include <cmath>
#include <map>
#include <memory>
#include <thread>

#include "cases.h"

namespace {

constexpr int64_t GUARD = 64;  // bytes behind each buffer that no op may touch
constexpr char UNTOUCHED = 0x5a;

int64_t threads_wanted = 1;
int failures = 0;

// What torch_parallel_for does, with threads of our own: body(first, last, context) over pieces of [begin, end).
int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    int64_t count = end - begin, pieces = std::max<int64_t>(1, std::min(threads_wanted, count / std::max<int64_t>(1, grain)));
    std::vector<std::thread> others;
    auto piece = [&](int64_t i) { body(begin + count * i / pieces, begin + count * (i + 1) / pieces, context); };
    for (int64_t i = 1; i < pieces; i++) others.emplace_back(piece, i);
    piece(0);
    for (std::thread& other : others) other.join();
    return 0;
}

struct Free {
    void operator()(char* data) const { std::free(data); }
};

// Memory at 64 bytes, as torch's, with a guard behind it.
class Memory {
  public:
    explicit Memory(int64_t size) : size_(size), data_(static_cast<char*>(std::aligned_alloc(64, (size + GUARD + 63) / 64 * 64))) {
        if (!data_) std::abort();
        std::memset(data_.get() + size, UNTOUCHED, GUARD);
    }
    char* data() const { return data_.get(); }
    int64_t size() const { return size_; }
    bool overrun() const {
        for (int64_t i = 0; i < GUARD; i++)
            if (data_.get()[size_ + i] != UNTOUCHED) return true;
        return false;
    }

  private:
    int64_t size_;
    std::unique_ptr<char, Free> data_;
};

using Buffers = std::map<int64_t, Memory>;

void wrong(const Case& c, const std::string& what) {
    failures++;
    std::printf("WRONG %s: %s (%d threads)\n", c.name.c_str(), what.c_str(), int(threads_wanted));
}

void write_addresses(const Event& e, const Buffers& buffers, char* to) {
    for (const Address& a : e.addresses) {
        int64_t value[2] = {a.buffer == POOL ? int64_t(&parallel_for) : int64_t(buffers.at(a.buffer).data() + a.offset),
                            threads_wanted};
        std::memcpy(to + a.at, value, a.buffer == POOL ? 16 : 8);
    }
}

template <class F>
F symbol(void* library, const std::string& name) {
    void* found = dlsym(library, name.c_str());
    if (!found) {
        std::fprintf(stderr, "the library has no %s; build it and the cases from the same sources\n", name.c_str());
        std::exit(2);
    }
    return reinterpret_cast<F>(found);
}

void upload(const Event& e, Buffers& buffers) {
    int64_t size = int64_t(e.bytes.size());
    Memory& memory = buffers.try_emplace(e.id, size).first->second;
    std::memcpy(memory.data(), e.bytes.data(), size);
    write_addresses(e, buffers, memory.data());
}

void call(const Case& c, const Event& e, const Buffers& buffers, void* library) {
    auto op = symbol<int64_t (*)(const void*)>(library, "pm_" + e.name);
    std::unique_ptr<char, Free> packed(static_cast<char*>(std::malloc(e.bytes.size())));
    std::memcpy(packed.get(), e.bytes.data(), e.bytes.size());
    write_addresses(e, buffers, packed.get());
    if (op(packed.get())) wrong(c, "pm_" + e.name + " was refused memory");
}

// `element`: bytes of a float, or -8 for an int64.
double number(const char* data, int64_t element) {
    if (element == -8) return double(*reinterpret_cast<const int64_t*>(data));
    if (element == 8) return *reinterpret_cast<const double*>(data);
    uint32_t bits = 0;
    std::memcpy(element == 2 ? reinterpret_cast<char*>(&bits) + 2 : reinterpret_cast<char*>(&bits), data, element);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// As rms_ratio in tests/kernels/closeness.py.
double rms_ratio(const Event& e, const Memory& memory) {
    double error = 0, size = 0, count = double(e.expected.size());
    std::vector<int64_t> at(e.shape.size(), 0);
    for (double expected : e.expected) {
        int64_t offset = 0;
        for (size_t k = 0; k < at.size(); k++) offset += at[k] * e.strides[k];
        double actual = number(memory.data() + e.offset + offset * std::abs(e.element), e.element);
        error += (actual - expected) * (actual - expected);
        size += expected * expected;
        for (size_t k = at.size(); k-- > 0 && ++at[k] == e.shape[k];) at[k] = 0;
    }
    return std::sqrt(error / count) / std::max(std::sqrt(size / count), e.smallest);
}

void judge(const Case& c, const Event& e, const Buffers& buffers) {
    double ratio = rms_ratio(e, buffers.at(e.id));
    if (!(ratio <= e.tolerance)) wrong(c, e.name + " is off by " + std::to_string(ratio / e.tolerance) + " tolerances");
}

// The largest error in units of the last place of the exact result, as in tests/kernels/test_math.py.
void judge_map(const Case& c, const Event& e, void* library) {
    auto map = symbol<int32_t (*)(int64_t, const float*, float*, int64_t)>(library, "pm_map");
    std::vector<float> in(e.bytes.size() / 4), out(in.size());
    std::memcpy(in.data(), e.bytes.data(), e.bytes.size());
    map(e.id, in.data(), out.data(), int64_t(in.size()));
    double worst = 0;
    for (size_t i = 0; i < in.size(); i++) {
        int exponent;
        std::frexp(e.expected[i], &exponent);
        double error = std::fabs(out[i] - e.expected[i]) / std::ldexp(1.0, std::max(exponent, -125) - 24);
        worst = error > worst || error != error ? error : worst;
    }
    if (!(worst <= e.tolerance)) wrong(c, e.name + " is off by " + std::to_string(worst) + " ulp");
}

// Addresses differ from run to run, so what holds them is left out.
std::string results(const Case& c, const Buffers& buffers) {
    std::string bits;
    for (const Event& e : c.events)
        if (e.kind == 'E') bits.append(buffers.at(e.id).data(), buffers.at(e.id).size());
    return bits;
}

std::string play(const Case& c, void* library) {
    Buffers buffers;
    for (const Event& e : c.events) {
        if (e.kind == 'B') upload(e, buffers);
        if (e.kind == 'K') call(c, e, buffers, library);
        if (e.kind == 'E') judge(c, e, buffers);
        if (e.kind == 'M') judge_map(c, e, library);
    }
    for (const auto& [id, memory] : buffers)
        if (memory.overrun()) wrong(c, "buffer " + std::to_string(id) + " was written beyond its end");
    return results(c, buffers);
}

}  // namespace

int main(int count, char** words) {
    if (count < 3) return std::fprintf(stderr, "usage: runner LIBRARY CASES [THREADS ...]\n"), 2;
    void* library = dlopen(words[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s: %s\n", words[1], dlerror()), 2;
    std::vector<int64_t> threads;
    for (int i = 3; i < count; i++) threads.push_back(std::atoll(words[i]));
    if (threads.empty()) threads = {1, 2, 4};
    Reader reader(words[2]);
    int64_t expected_abi = reader.integer(), abi = symbol<int64_t (*)()>(library, "pm_abi")();
    if (abi != expected_abi) return std::fprintf(stderr, "%s: ABI %d, the cases have %d\n", words[1], int(abi), int(expected_abi)), 2;
    int64_t cases = 0, held = 0;
    for (Case c; reader.next(&c); cases++) {
        std::string first;
        for (int64_t t : threads) {
            threads_wanted = t;
            std::string bits = play(c, library);
            if (t == threads[0]) first = bits;
            if (bits != first) wrong(c, "other bits than with " + std::to_string(threads[0]) + " threads");
        }
        for (const Event& e : c.events) held += e.kind == 'E' || e.kind == 'M';
    }
    std::printf("%s: %lld cases, %lld results held, %d wrong\n", words[1], (long long)cases, (long long)held, failures);
    return failures || !cases ? 1 : 0;
}
