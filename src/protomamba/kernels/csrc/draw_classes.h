// Which classes each of some groups of tokens is held against, drawn in proportion to what a few means of their features say of
// them (definition: draw_classes in reference/). All after the logits in float64 and in the order of the classes.
#pragma once
#include "norm.h"

namespace pm {

struct DrawClassesArgs {
    Pool pool;
    int64_t G, K, C, most;  // most: the places of one group that there is room for
    double even, slack;
    float* logits;           // (G, K, C); what is left of them is scratch
    const float* tokens;     // (G, K): for how many tokens each row of logits stands
    const int64_t *own, *own_end;  // places that are certain, group after group, and where each group's end
    const int64_t* limit;    // (G,)
    const double* start;     // (G,): from [0, 1)
    int64_t *places, *count;  // (G, most), rising; (G,)
    double* log_chance;      // (G, most)
};
PM_FIELDS(DrawClassesArgs, G, K, C, most, even, slack, logits, tokens, own, own_end, limit, start, places, count, log_chance)

constexpr int DRAW_ROUNDS = 100;

// Logits become e^(l - largest); returns their sum. A row with a NaN has a NaN sum.
inline double exponentials(float* row, int64_t count) {
    vf top = splat(-INFINITY);
    for_row(count, [&](int64_t c, int n) {
        vf x = first_lanes(load(row + c, n), n, -INFINITY);
        top = x > top ? x : top;
    });
    float largest = largest_lane(top);
    double total = 0.0;
    for_row(count, [&](int64_t c, int n) {
        vf e = exp(load(row + c, n) - largest);
        store(row + c, e, n);
        total += sum(first_lanes(e, n, 0.0f));
    });
    return total;
}

// (C,) the root of the sum of squared probabilities; returns their sum.
inline double draw_weights(const DrawClassesArgs& a, int64_t g, double* weight) {
    std::fill(weight, weight + a.C, 0.0);
    for (int64_t k = 0; k < a.K; k++) {
        float *row = a.logits + (g * a.K + k) * a.C, tokens = a.tokens[g * a.K + k];
        if (tokens == 0.0f) continue;
        double share = 1.0 / exponentials(row, a.C);
        for (int64_t c = 0; c < a.C; c++) {
            double probability = row[c] * share;
            weight[c] += tokens * probability * probability;
        }
    }
    double total = 0.0;
    for (int64_t c = 0; c < a.C; c++) total += weight[c] = std::sqrt(weight[c]);
    return total;
}

// Weights become chances: 1 where `certain` says so, else min(1, c w) with such a c that all sum to `goal`.
inline void draw_chances(double* weight, uint8_t* certain, int64_t count, double goal) {
    double factor = 0.0;
    for (int round = 0; round < DRAW_ROUNDS; round++) {  // classes that c makes certain leave the others more: it only grows
        double left = 1.0, sure = 0.0;
        for (int64_t c = 0; c < count; c++)
            if (certain[c] || weight[c] * factor >= 1.0) left -= weight[c], sure += 1.0;
        double grown = (goal - sure) / std::max(left, 1e-300);
        if (grown == factor) break;
        factor = grown;
    }
    for (int64_t c = 0; c < count; c++) weight[c] = certain[c] || weight[c] * factor >= 1.0 ? 1.0 : weight[c] * factor;
}

// Places each with its chance, as many as these sum to, rounded up or down (systematic sampling, Madow 1949).
inline void draw_places(const DrawClassesArgs& a, int64_t g, const double* chance) {
    int64_t found = 0;
    double reached = a.start[g], before = 0.0;
    for (int64_t c = 0; c < a.C && found < a.most; c++) {
        reached += chance[c];
        double now = std::floor(reached);
        if (now > before) {
            a.places[g * a.most + found] = c;
            a.log_chance[g * a.most + found++] = std::log(chance[c]);
        }
        before = now;
    }
    a.count[g] = found;
}

inline void draw_classes(const DrawClassesArgs& a) {
    run(a.pool, a.G, [&](int64_t g) {
        float* memory = scratch(2 * a.C + ceil_div(a.C, 4));
        if (!memory) return;
        double* weight = reinterpret_cast<double*>(memory);
        uint8_t* certain = reinterpret_cast<uint8_t*>(memory + 2 * a.C);
        double total = draw_weights(a, g, weight);
        bool known = total > 0.0 && std::isfinite(total);
        for (int64_t c = 0; c < a.C; c++) weight[c] = (known ? weight[c] / total : 1.0 / a.C) * (1.0 - a.even) + a.even / a.C;
        // Its own classes, if they leave half the room; all where there is room for all.
        int64_t first = g ? a.own_end[g - 1] : 0, own = 0;
        std::memset(certain, 0, a.C);
        for (int64_t i = first; i < a.own_end[g]; i++) own += !certain[a.own[i]], certain[a.own[i]] = 1;
        if (own > a.limit[g] / 2) std::memset(certain, 0, a.C);
        if (a.limit[g] >= a.C) std::memset(certain, 1, a.C);
        draw_chances(weight, certain, a.C, double(a.limit[g]) - a.slack);
        draw_places(a, g, weight);
    });
}

}  // namespace pm
