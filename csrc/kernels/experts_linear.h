// Linear layers of many experts over rows that are sorted by expert (mixtures of experts), and the thin products of their
// adapters: the contract between the kernels and everyone above them. Rows offsets[e - 1] to offsets[e] are expert e's:
//
//   experts_nf4, experts_group, experts_mxfp4, experts_dense    see kernels/linear.h
//                              y  = x W_e^T + bias_e + scaling * u B_e^T
//   ..., each with _backward   dx = g W_e + v A_e
//   experts_shrink             u  = x A_e^T,  v = scaling * g B_e             see kernels/lora_linear.h
//   experts_gradient           dA_e = v^T x,  dB_e^T = scaling * u^T g, zeros for an expert without rows
//
// An expert's rows have the same bits as in a layer with only that expert's weight. Rows from the last offset on are
// not written. In `all`, pointers are to the rows of all experts and to stacks, expert after expert. Sizes are those of
// one expert, except m, the number of all rows.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/group_linear.h"
#include "kernels/linear.h"
#include "kernels/lora_linear.h"
#include "kernels/mxfp4_linear.h"
#include "kernels/nf4_linear.h"

namespace peftops {

struct DenseWeight {
  const void* p;         // [rows, cols] of the dtype of x; [cols, rows] if transposed
  int64_t rows, cols;
  bool transposed;
};
using DenseLinear = Linear<DenseWeight>;
using DenseLinearBackward = LinearBackward<DenseWeight>;

template <class Args> struct Experts {
  Args all;
  const int64_t* offsets;   // [experts], from 0 to m, none less than the one before
  int64_t experts;
};

using ExpertsNf4 = Experts<Nf4Linear>;
using ExpertsGroup = Experts<GroupLinear>;
using ExpertsMxfp4 = Experts<Mxfp4Linear>;
using ExpertsDense = Experts<DenseLinear>;
using ExpertsNf4Backward = Experts<Nf4LinearBackward>;
using ExpertsGroupBackward = Experts<GroupLinearBackward>;
using ExpertsMxfp4Backward = Experts<Mxfp4LinearBackward>;
using ExpertsDenseBackward = Experts<DenseLinearBackward>;
using ExpertsShrink = Experts<LoraShrink>;
using ExpertsGradient = Experts<LoraGradient>;

#ifdef PEFTOPS_CUDA
// The second way to dx, for bf16 (ops/experts_library.h). Each expert that has rows takes a slot, in order. There are at
// most as many as rows.
//
//   experts_decode   columns first to first + cols of their weights, rounded to bf16, and where their rows end
//   experts_place    those columns of a result whose rows beyond the last offset are zeros
//   experts_expand   y += u A_e                                              see kernels/lora_linear.h
template <class Weight> struct ExpertsDecode {
  Weight weight;            // rows = n, cols = k of one expert
  const int64_t* offsets;
  int64_t experts, m;
  void* out;                // [slots, n, cols]; slots without an expert are not written
  int32_t* ends;            // [slots]
  int64_t slots, first, cols;
};
struct ExpertsPlace {
  const void* from;         // [m, cols], or null: only zeros are written
  void* to;                 // [m, k]
  const int64_t* offsets;
  int64_t experts, m, k, first, cols;
};
using ExpertsExpand = Experts<LoraExpand>;
#endif

PEFTOPS_CPU_KERNELS(
    Kernel<ExpertsNf4> experts_nf4; Kernel<ExpertsNf4Backward> experts_nf4_backward;
    Kernel<ExpertsGroup> experts_group; Kernel<ExpertsGroupBackward> experts_group_backward;
    Kernel<ExpertsMxfp4> experts_mxfp4; Kernel<ExpertsMxfp4Backward> experts_mxfp4_backward;
    Kernel<ExpertsDense> experts_dense; Kernel<ExpertsDenseBackward> experts_dense_backward;
    Kernel<ExpertsShrink> experts_shrink; Kernel<ExpertsGradient> experts_gradient;)

#ifdef PEFTOPS_CUDA
namespace cuda {   // offsets lie on the device and are not checked
Kernel<ExpertsNf4> experts_nf4; Kernel<ExpertsNf4Backward> experts_nf4_backward;
Kernel<ExpertsGroup> experts_group; Kernel<ExpertsGroupBackward> experts_group_backward;
Kernel<ExpertsMxfp4> experts_mxfp4; Kernel<ExpertsMxfp4Backward> experts_mxfp4_backward;
Kernel<ExpertsDense> experts_dense; Kernel<ExpertsDenseBackward> experts_dense_backward;
Kernel<ExpertsShrink> experts_shrink; Kernel<ExpertsGradient> experts_gradient;
Kernel<ExpertsDecode<Nf4Weight>> experts_decode;
Kernel<ExpertsDecode<GroupWeight>> experts_decode;
Kernel<ExpertsDecode<Mxfp4Weight>> experts_decode;
Kernel<ExpertsPlace> experts_place;
Kernel<ExpertsExpand> experts_expand;
cudaError_t by_library(const ExpertsNf4Backward&, Way wanted, bool* result);
cudaError_t by_library(const ExpertsGroupBackward&, Way wanted, bool* result);
cudaError_t by_library(const ExpertsMxfp4Backward&, Way wanted, bool* result);
}  // namespace cuda
#endif

}  // namespace peftops
