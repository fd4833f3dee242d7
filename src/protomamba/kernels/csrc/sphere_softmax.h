// What lies between the matrix products of the sampled cross entropy's gradient (definition: sampled_cross_entropy in
// reference/): each token's row of cosines becomes, in place, the gradient with respect to them; and of the gradient of a
// unit vector only the part that turns it reaches the vector it came from.
#pragma once
#include "prototype_loss.h"

namespace pm {

struct SphereSoftmaxArgs {
    Pool pool;
    int64_t T, S;
    double scale;             // s
    float* rows;              // (T, S): cosines to the sampled classes; becomes the gradient with respect to them
    const float* log_chance;  // (S,) or null
    const int64_t *classes, *targets;  // (S,) the sampled classes in rising order, null: all S; (T,) each token's own
    const float *own, *rate;  // (T,): the cosine to the own class; what the token's loss counts in the gradient
    float* down;              // (T,): the gradient of `own` where the own class is not among the sampled ones, else 0
    double* dlog_scale;       // one number, added to
};
PM_FIELDS(SphereSoftmaxArgs, T, S, scale, rows, log_chance, classes, targets, own, rate, down, dlog_scale)

// Where a class stands among the sampled ones; -1: nowhere.
inline int64_t place_of(const SphereSoftmaxArgs& a, int64_t wanted) {
    if (!a.classes) return wanted;
    const int64_t* found = std::lower_bound(a.classes, a.classes + a.S, wanted);
    return found < a.classes + a.S && *found == wanted ? found - a.classes : -1;
}

// One token; returns its part of the gradient of log s. Scores stand relative to that of the own class, which counts once
// and without correction: its exponent is exactly 0.
inline double sphere_softmax_row(const SphereSoftmaxArgs& a, int64_t t) {
    float *row = a.rows + t * a.S, s = float(a.scale), own = s * a.own[t];
    int64_t place = place_of(a, a.targets[t]);
    auto correction = [&](int64_t k, int n) { return a.log_chance ? load(a.log_chance + k, n) : vf{}; };
    vf top{}, sums{}, moments{};
    for_row(a.S, [&](int64_t k, int n) {
        vf x = load(row + k, n) * s - own - correction(k, n);
        store(row + k, x, n);
        x = first_lanes(x, n, 0.0f);
        top = x > top ? x : top;
    });
    float shift = largest_lane(top);
    if (place >= 0) row[place] = 0.0f;
    for_row(a.S, [&](int64_t k, int n) {
        vf x = load(row + k, n), e = first_lanes(exp(x - shift), n, 0.0f);
        sums += e;
        moments += e * (x + correction(k, n));
        store(row + k, e, n);
    });
    float own_term = exp(splat(-shift))[0], total = sum(sums) + (place >= 0 ? 0.0f : own_term);
    double moment = sum(moments) - (place >= 0 && a.log_chance ? own_term * a.log_chance[place] : 0.0f);
    float weight = a.rate[t] * s;
    for_row(a.S, [&](int64_t k, int n) { store(row + k, load(row + k, n) * (weight / total), n); });
    if (place >= 0) row[place] -= weight;
    a.down[t] = place >= 0 ? 0.0f : weight * (own_term / total - 1.0f);
    return a.rate[t] * moment / total;
}

inline void sphere_softmax(const SphereSoftmaxArgs& a) {
    int64_t parts = std::min(a.T, NORM_PARTS);
    double sums[NORM_PARTS] = {};
    run(a.pool, parts, [&](int64_t i) {
        Range tokens = part(a.T, parts, i);
        for (int64_t t = tokens.begin; t < tokens.end; t++) sums[i] += sphere_softmax_row(a, t);
    });
    for (double sum : sums) *a.dlog_scale += sum;
}

struct SphereTurnArgs {
    Pool pool;
    int64_t T, D;
    const float *unit, *inverse;  // (T, D) unit vectors u = x / |x|; (T,) 1 / |x|
    float* gradient;              // (T, D): of u, becomes that of x
    const int64_t* index;         // (T,) different rows, or null
    float* total;                 // (rows, D): to row index[t] of it that of x is added, and `gradient` is scratch; or null
};
PM_FIELDS(SphereTurnArgs, T, D, unit, inverse, gradient, index, total)

inline void sphere_turn(const SphereTurnArgs& a) {
    each_row(a.pool, a.T, [&](int64_t t) {
        const float* u = a.unit + t * a.D;
        float *g = a.gradient + t * a.D, inverse = a.inverse[t];
        float along = sum_row(a.D, [&](int64_t d, int n) { return load(u + d, n) * load(g + d, n); });
        float* total = a.total ? a.total + (a.index ? a.index[t] : t) * a.D : nullptr;
        for_row(a.D, [&](int64_t d, int n) {
            vf turned = (load(g + d, n) - load(u + d, n) * along) * inverse;
            if (total) store(total + d, load(total + d, n) + turned, n);
            else store(g + d, turned, n);
        });
    });
}

struct SphereUnitArgs {
    Pool pool;
    int64_t T, D;
    const float* x;         // (rows, D)
    const int64_t* index;   // (T,): which of the rows; null: the first T
    float *unit, *inverse;  // (T, D) x / |x|, zeros for a vector without a direction; (T,) 1 / |x|, 0 for it
};
PM_FIELDS(SphereUnitArgs, T, D, x, index, unit, inverse)

inline void sphere_unit(const SphereUnitArgs& a) {
    each_row(a.pool, a.T, [&](int64_t t) {
        const float* x = a.x + (a.index ? a.index[t] : t) * a.D;
        float inverse = a.inverse[t] = inverse_norm(x, a.D);
        for_row(a.D, [&](int64_t d, int n) { store(a.unit + t * a.D + d, load(x + d, n) * inverse, n); });
    });
}

struct KeepLengthsArgs {
    Pool pool;
    int64_t T, D;
    double length;
    const float* lengths;  // (T,), each times `length`; or null
    const int64_t* index;  // (T,) different rows; or null: the first T
    float* x;              // (rows, D)
};
PM_FIELDS(KeepLengthsArgs, T, D, length, lengths, index, x)

// Each of these rows gets its length; one without a direction keeps none.
inline void keep_lengths(const KeepLengthsArgs& a) {
    each_row(a.pool, a.T, [&](int64_t t) {
        float* x = a.x + (a.index ? a.index[t] : t) * a.D;
        float factor = inverse_norm(x, a.D) * float(a.lengths ? a.length * a.lengths[t] : a.length);
        for_row(a.D, [&](int64_t d, int n) { store(x + d, load(x + d, n) * factor, n); });
    });
}

}  // namespace pm
