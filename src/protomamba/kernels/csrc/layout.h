// What an argument struct looks like from outside: the name, kind and place of every field, for the caller to compare with
// its own idea of it (kernels/arguments.py) before the first call.
#pragma once
#include <cstddef>

#include "common.h"

namespace pm {

struct Field {
    const char* name;
    const char* kind;  // int, float, pointer, view or pool
    int64_t offset;    // bytes
};

template <class T>
constexpr const char* kind_of() {
    if constexpr (std::is_pointer_v<T>)
        return "pointer";
    else if constexpr (std::is_same_v<T, View>)
        return "view";
    else if constexpr (std::is_same_v<T, Pool>)
        return "pool";
    else if constexpr (std::is_same_v<T, double>)
        return "float";
    else {
        static_assert(std::is_same_v<T, int64_t>, "a field is an int64_t, a double, a pointer, a View or the Pool");
        return "int";
    }
}

// PM_EACH(M, s, a, b, ...): M(s, a) M(s, b) ..., for up to 256 names.
#define PM_PARENS ()
#define PM_AGAIN(...) PM_AGAIN4(PM_AGAIN4(PM_AGAIN4(PM_AGAIN4(__VA_ARGS__))))
#define PM_AGAIN4(...) PM_AGAIN3(PM_AGAIN3(PM_AGAIN3(PM_AGAIN3(__VA_ARGS__))))
#define PM_AGAIN3(...) PM_AGAIN2(PM_AGAIN2(PM_AGAIN2(PM_AGAIN2(__VA_ARGS__))))
#define PM_AGAIN2(...) PM_AGAIN1(PM_AGAIN1(PM_AGAIN1(PM_AGAIN1(__VA_ARGS__))))
#define PM_AGAIN1(...) __VA_ARGS__
#define PM_EACH(M, S, ...) __VA_OPT__(PM_AGAIN(PM_EACH_NEXT(M, S, __VA_ARGS__)))
#define PM_EACH_NEXT(M, S, NAME, ...) M(S, NAME) __VA_OPT__(PM_EACH_LOOP PM_PARENS(M, S, __VA_ARGS__))
#define PM_EACH_LOOP() PM_EACH_NEXT

// Describes the struct S by its fields, all of which have to be named but for the pool, which every struct starts with.
#define PM_FIELDS(S, ...)                                                               \
    struct S##Layout {                                                                  \
        static constexpr Field fields[] = {                                             \
            PM_EACH(PM_FIELD, S, pool, __VA_ARGS__)                                     \
        };                                                                              \
        static constexpr size_t bytes = 0 PM_EACH(PM_FIELD_SIZE, S, pool, __VA_ARGS__); \
        static_assert(bytes == sizeof(S), #S ": a field is missing from its list");     \
    };
#define PM_FIELD(S, NAME) {#NAME, kind_of<decltype(S::NAME)>(), offsetof(S, NAME)},
#define PM_FIELD_SIZE(S, NAME) +sizeof(S::NAME)

}  // namespace pm
