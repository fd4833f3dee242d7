// One block of scores, added to what was found in the blocks before it (definition: judge_block in reference/).
#pragma once
#include "norm.h"

namespace pm {

struct JudgeBlockArgs {
    Pool pool;
    int64_t T, C, K, R, start, row;
    double factor;
    const float* scores;                // (T, C), rows `row` apart, of the classes from `start` on
    float* values;                      // (T, K) or null: the best so far, min(K, start) of them
    int64_t* classes;                   // (T, K), theirs
    double* log_sum;                    // (T,) or null
    const float* own;                   // (T,): the score of the target
    const int64_t *targets, *reserved;  // (T,); (R,), different ones
    int64_t* rank;                      // (T,) or null
};
PM_FIELDS(JudgeBlockArgs, T, C, K, R, start, row, factor, scores, values, classes, log_sum, own, targets, reserved, rank)

// Scores of a row that are looked at in turn by all that want to see them: they stay in the first cache. And those among
// which one is looked for that is better than the worst that is kept, before each is compared.
constexpr int64_t JUDGE_CHUNK = 1024, JUDGE_GROUP = 8 * W;

// NaN comes before every number. Equal scores are in the order in which they were found.
inline bool comes_before(float a, float b) { return a > b || (a != a && b == b); }

struct Best {
    float* values;
    int64_t *classes, kept, most;

    bool full() const { return kept == most; }

    void add(float value, int64_t number) {
        if (full() && !comes_before(value, values[most - 1])) return;
        int64_t i = full() ? most - 1 : kept++;
        for (; i > 0 && comes_before(value, values[i - 1]); i--) values[i] = values[i - 1], classes[i] = classes[i - 1];
        values[i] = value, classes[i] = number;
    }

    // Whether one of the scores may be better than the worst that is kept, which is no NaN.
    bool any_better(const float* x, int64_t count) const {
        vi found{};
        for_row(count, [&](int64_t i, int n) { found |= ~(load(x + i, n) <= values[most - 1]); });
        int32_t any = 0;
        for (int i = 0; i < W; i++) any |= found[i];
        return any;
    }

    void add_all(const float* x, int64_t count, int64_t first) {
        int64_t i = 0;
        for (; i < count && !full(); i++) add(x[i], first + i);
        for (; i < count && values[most - 1] == values[most - 1]; i += JUDGE_GROUP) {
            int64_t end = std::min(count, i + JUDGE_GROUP);
            if (!any_better(x + i, end - i)) continue;
            for (int64_t j = i; j < end; j++) add(x[j], first + j);
        }
    }
};

// sum exp(x) as `sum` times e^top, with the largest x so far as `top`.
struct LogSum {
    float top = -INFINITY;
    double sum = 0.0;

    void add_all(const float* scores, int64_t count, float factor) {
        auto scaled = [&](int64_t i, int n) { return first_lanes(load(scores + i, n) * factor, n, -INFINITY); };
        vf high = splat(-INFINITY), sums{};
        for_row(count, [&](int64_t i, int n) {
            vf x = scaled(i, n);
            high = x > high ? x : high;
        });
        float before = top, largest = largest_lane(high);
        top = largest > top ? largest : top;
        if (top > before) sum *= std::exp(double(before) - double(top));
        float shift = std::isfinite(top) ? top : 0.0f;
        for_row(count, [&](int64_t i, int n) {
            vf x = scaled(i, n);
            sums += x == -INFINITY ? vf{} : exp(x - shift);  // of what it cannot hold our exp leaves 2^-126
        });
        sum += double(pm::sum(sums));
    }

    double value() const { return (std::isfinite(top) ? double(top) : 0.0) + std::log(sum); }
};

// log(e^a + e^b)
inline double log_of_both(double a, double b) {
    double high = a > b ? a : b, low = a > b ? b : a;
    return std::isinf(high) && low == low ? high : high + std::log1p(std::exp(low - high));
}

inline int64_t count_at_least(const float* x, int64_t count, float own) {
    vi counts{};
    int64_t i = 0, total = 0;
    for (; i + W <= count; i += W) counts -= ~(load(x + i) < own);  // a lane that is true is -1
    for (; i < count; i++) total += !(x[i] < own);
    for (int lane = 0; lane < W; lane++) total += counts[lane];
    return total;
}

// What the count of a row has too little because the target counts in any case, or too much because a reserved class never.
inline int64_t counted_otherwise(const JudgeBlockArgs& a, int64_t t, const float* x) {
    auto inside = [&](int64_t at) { return at >= 0 && at < a.C; };
    int64_t target = a.targets[t] - a.start, more = inside(target) && x[target] < a.own[t];
    for (int64_t r = 0; r < a.R; r++) {
        int64_t at = a.reserved[r] - a.start;
        if (inside(at)) more -= at == target || !(x[at] < a.own[t]);
    }
    return more;
}

inline void judge_row(const JudgeBlockArgs& a, int64_t t) {
    const float* x = a.scores + t * a.row;
    Best best{a.values + t * a.K, a.classes + t * a.K, std::min(a.K, a.start), a.K};
    LogSum log_sum;
    int64_t rank = a.rank ? counted_otherwise(a, t, x) : 0;
    for (int64_t i = 0; i < a.C; i += JUDGE_CHUNK) {
        int64_t count = std::min(JUDGE_CHUNK, a.C - i);
        if (a.values) best.add_all(x + i, count, a.start + i);
        if (a.log_sum) log_sum.add_all(x + i, count, float(a.factor));
        if (a.rank) rank += count_at_least(x + i, count, a.own[t]);
    }
    if (a.log_sum) a.log_sum[t] = a.start ? log_of_both(a.log_sum[t], log_sum.value()) : log_sum.value();
    if (a.rank) a.rank[t] = rank + (a.start ? a.rank[t] : 0);
}

inline void judge_block(const JudgeBlockArgs& a) {
    each_row(a.pool, a.T, [&](int64_t t) { judge_row(a, t); });
}

}  // namespace pm
