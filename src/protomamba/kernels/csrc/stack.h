// One token of a whole model in one call: embedding, blocks, norm, the head's scores (definition: decode_step in
// reference/). Between two tokens all weights pass through the caches, so that every visit to the caller costs a cold start.
#pragma once
#include "prototype_loss.h"
#include "step.h"

namespace pm {

struct StackArgs {
    Pool pool;
    int64_t B, D, V, layers, unit;  // unit: scores are of z / |z|
    double eps, scale;
    const StepArgs* blocks;  // their x and out are this x; their pool is this one
    const int64_t* tokens;   // (B,)
    const float *embedding, *norm;         // (tokens, D), (D,)
    int64_t kind;                          // of the head's matrix (matrix.h)
    const void* head;                      // (V, D)
    const float* head_scale;
    float *x, *z, *scores;                 // (B, D), (B, D), (B, V)
};
PM_FIELDS(StackArgs, B, D, V, layers, unit, eps, scale, blocks, tokens, embedding, norm, kind, head, head_scale, x, z, scores)

inline void stack_step(const StackArgs& a) {
    for (int64_t b = 0; b < a.B; b++) std::memcpy(a.x + b * a.D, a.embedding + a.tokens[b] * a.D, a.D * sizeof(float));
    for (int64_t i = 0; i < a.layers; i++) {
        StepArgs block = a.blocks[i];
        block.pool = a.pool;
        step(block);
    }
    NormArgs norm{};
    norm.T = a.B, norm.D = a.D, norm.eps = a.eps, norm.x = a.x, norm.weight = a.norm;
    norm.y = reinterpret_cast<char*>(a.z);
    norm_forward<float>(norm);
    for (int64_t b = 0; b < a.B; b++) {
        float *z = a.z + b * a.D, factor = float(a.scale) * (a.unit ? inverse_norm(z, a.D) : 1.0f);
        for_row(a.D, [&](int64_t d, int n) { store(z + d, load(z + d, n) * factor, n); });
    }
    product({a.pool, a.B, a.V, a.D, a.D, a.kind, a.z, a.head, a.head_scale, a.scores});
}

}  // namespace pm
