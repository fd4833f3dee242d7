// What the CPU and its operating system can run, asked of them directly: __builtin_cpu_supports is always false where zig's
// runtime stands in for GCC's.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pm {

#if defined(__x86_64__)
// The registers that the operating system saves: bits 1 and 2 for AVX, 5 to 7 for AVX-512.
inline uint32_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// 0 baseline, 1 avx2, 2 avx512, 3 avx512vnni.
inline int64_t cpu_level() {
    uint32_t a, b, c, d, b7, c7;
    auto all = [](uint32_t word, uint32_t bits) { return (word & bits) == bits; };
    constexpr uint32_t FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28, AVX2 = 1u << 5, VNNI = 1u << 11;
    constexpr uint32_t AVX512_F_DQ_BW_VL = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, FMA | OSXSAVE | AVX)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d) || !all(b7, AVX2) || !all(saved_registers(), 0x06)) return 0;
    if (!all(b7, AVX512_F_DQ_BW_VL) || !all(saved_registers(), 0xe6)) return 1;
    return all(c7, VNNI) ? 3 : 2;
}

// Zen 3 and 4.
inline bool cpu_is_amd_family_25() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 0xf) + (a >> 20 & 0xff) == 25;
}
#else
inline int64_t cpu_level() { return 0; }
inline bool cpu_is_amd_family_25() { return false; }
#endif

// Zen 3 and 4 follow a single stream through the memory better than several, and better without being asked: 57 MB in rows of
// 2 KiB, one row after the other 1.0 of only reading them, eight rows at a time 0.55. On Zen 5 eight rows had been 1.25 times
// as fast as one.
inline bool cpu_follows_one_stream() { return cpu_is_amd_family_25(); }

}  // namespace pm
