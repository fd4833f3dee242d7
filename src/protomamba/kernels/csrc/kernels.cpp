// The C ABI: every op takes a pointer to its argument struct, whose fields are made of 8-byte words and are described by
// pm_OP_fields.
#include "adamw.h"
#include "block.h"
#include "cpu.h"
#include "draw_classes.h"
#include "judge_block.h"
#include "product.h"
#include "prototype_loss.h"
#include "sphere_softmax.h"
#include "square_sums.h"
#include "stack.h"
#include "transpose.h"

using namespace pm;

// glibc 2.29 gave these new names for leaving out the old error handling; by the old names, a library built on a newer
// system loads on an older one. What they compute is the same.
#if defined(__linux__) && defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5\n.symver log,log@GLIBC_2.2.5\n.symver pow,pow@GLIBC_2.2.5");
#elif defined(__linux__) && defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17\n.symver log,log@GLIBC_2.17\n.symver pow,pow@GLIBC_2.17");
#endif

#define PM_EXPORT extern "C" __attribute__((visibility("default")))

// Calls OP<float> or OP<bf16>.
#define PM_BY_DTYPE(is_bf16, OP, args) ((is_bf16) ? OP<bf16>(args) : OP<float>(args))

// Raised whenever one of the functions here that take no struct changes, or what a field means that keeps its name, kind and
// place. Of all else the descriptions tell. kernels/native.py holds the number that it expects.
PM_EXPORT int64_t pm_abi() { return 5; }

// The highest level this CPU (and its operating system) can run: 0 baseline, 1 avx2, 2 avx512, 3 avx512vnni.
PM_EXPORT int64_t pm_cpu_level() { return cpu_level(); }

// Whether the op matmul is faster than torch's libraries: where that was measured, with AVX-512 on Zen 4.
PM_EXPORT int64_t pm_fast_matmul() { return W == 16 && cpu_is_amd_family_25(); }

PM_EXPORT int64_t pm_scan_chunk_floats(int64_t B, int64_t L, int64_t E, int64_t N) { return scan_chunk_floats(B, L, E, N); }

// Runs an op. Returns 0, or the bytes of working memory that it was refused, where its results are worth nothing. Of two
// calls at the same time both may be told what one was refused.
template <class Op>
int64_t refused(const Op& op) {
    int64_t before = refusals;
    op();
    return refusals == before ? 0 : refused_bytes.load();
}

// Defines the exports of an op: what its argument struct `a` looks like (the fields, returning how many), and the op itself.
#define PM_OP(NAME, ARGS, CALL)                                                \
    PM_EXPORT int64_t pm_##NAME##_fields(const Field** fields) {               \
        *fields = ARGS##Layout::fields;                                        \
        return sizeof ARGS##Layout::fields / sizeof(Field);                    \
    }                                                                          \
    PM_EXPORT int64_t pm_##NAME(const ARGS* a) { return refused([&] { CALL; }); }

PM_OP(scan_forward, ScanArgs, PM_BY_DTYPE(a->is_bf16, scan_forward, *a))
PM_OP(scan_backward, ScanArgs, PM_BY_DTYPE(a->is_bf16, scan_backward, *a))
PM_OP(conv_forward, ConvArgs, PM_BY_DTYPE(a->is_bf16, conv_forward, *a))
PM_OP(conv_backward, ConvArgs, PM_BY_DTYPE(a->is_bf16, conv_backward, *a))
PM_OP(norm_forward, NormArgs, PM_BY_DTYPE(a->out_is_bf16, norm_forward, *a))
PM_OP(norm_backward, NormArgs, PM_BY_DTYPE(a->out_is_bf16, norm_backward, *a))
PM_OP(prototype_loss_forward, PrototypeLossArgs, prototype_loss_forward(*a))
PM_OP(prototype_loss_backward, PrototypeLossArgs, prototype_loss_backward(*a))
PM_OP(sphere_softmax, SphereSoftmaxArgs, sphere_softmax(*a))
PM_OP(sphere_turn, SphereTurnArgs, sphere_turn(*a))
PM_OP(keep_lengths, KeepLengthsArgs, keep_lengths(*a))
PM_OP(sphere_unit, SphereUnitArgs, sphere_unit(*a))
PM_OP(draw_classes, DrawClassesArgs, draw_classes(*a))
PM_OP(judge_block, JudgeBlockArgs, judge_block(*a))
PM_OP(adamw, AdamWArgs, adamw(*a))
PM_OP(square_sums, SquareSumsArgs, square_sums(*a))
PM_OP(block_forward, BlockArgs, block_forward(*a))
PM_OP(block_backward, BlockArgs, block_backward(*a))
PM_OP(matmul, MatmulArgs, matmul(*a))
PM_OP(product, ProductArgs, product(*a))
PM_OP(step, StepArgs, step(*a))
PM_OP(stack_step, StackArgs, stack_step(*a))
PM_OP(transpose, TransposeArgs, transpose(*a))

// For the tests of the functions themselves: 0 exp, 1 exp2, 2 sigmoid, 3 softplus.
PM_EXPORT int32_t pm_map(int64_t which, const float* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        int n = int(std::min<int64_t>(W, count - i));
        vf x = load(in + i, n), slope;
        vf y = which == 0 ? exp(x) : which == 1 ? exp2(x) : which == 2 ? sigmoid(x) : softplus(x, &slope);
        store(out + i, y, n);
    }
    return 0;
}
