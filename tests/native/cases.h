// Reads the file that write_cases.py writes: cases, each a list of events in the order in which they happened.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// At byte `at` stands the address of byte `offset` of a buffer or, where `buffer` is POOL, the parallel-for function and
// after it the number of threads.
struct Address {
    int64_t at, buffer, offset;
};
constexpr int64_t POOL = -1;

// One thing that happened:
//   'B' `bytes` were put into buffer `id`            'K' the op `name` was called with `bytes` as its argument struct
//   'E' a strided tensor in buffer `id` was held against `expected`: RMS of the error over RMS of these <= tolerance
//   'M' function `id` of pm_map was called on the floats `bytes` and held against `expected`: error <= tolerance ulp
struct Event {
    char kind;
    std::string name;
    int64_t id = 0, offset = 0, element = 0;  // the last two in bytes
    double tolerance = 0, smallest = 0;
    std::vector<char> bytes;
    std::vector<Address> addresses;
    std::vector<int64_t> shape, strides;  // strides in elements
    std::vector<double> expected;
};

struct Case {
    std::string name;
    std::vector<Event> events;
};

class Reader {
  public:
    explicit Reader(const char* path) : path_(path), file_(std::fopen(path, "rb")) {
        if (!file_) fail("cannot be opened");
        if (std::string(take<char>(8).data(), 8) != "PMCASES1") fail("is no file of cases; write it anew: write_cases.py");
    }
    ~Reader() { std::fclose(file_); }
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    int64_t integer() { return take<int64_t>(1)[0]; }

    // False at the end of the file.
    bool next(Case* found) {
        if (!integer()) return false;
        *found = {text(), {}};
        for (int64_t left = integer(); left > 0; left--) found->events.push_back(event());
        return true;
    }

  private:
    [[noreturn]] void fail(const char* why) {
        std::fprintf(stderr, "%s: %s\n", path_, why);
        std::exit(2);
    }
    template <class T>
    std::vector<T> take(int64_t count) {
        std::vector<T> values(count);
        if (std::fread(values.data(), sizeof(T), count, file_) != size_t(count)) fail("ends too early; write it anew");
        return values;
    }
    template <class T>
    std::vector<T> counted() { return take<T>(integer()); }
    std::string text() {
        std::vector<char> letters = counted<char>();
        return std::string(letters.begin(), letters.end());
    }
    double real() { return take<double>(1)[0]; }

    Event event() {
        Event e;
        e.kind = char(integer());
        e.name = text();
        e.id = integer();
        e.bytes = counted<char>();
        if (e.kind == 'B' || e.kind == 'K') e.addresses = counted<Address>();
        if (e.kind == 'E') e.offset = integer(), e.element = integer(), e.shape = counted<int64_t>(), e.strides = counted<int64_t>();
        if (e.kind == 'E' || e.kind == 'M') e.tolerance = real(), e.smallest = real(), e.expected = counted<double>();
        return e;
    }

    const char* path_;
    FILE* file_;
};
