// The low-rank term of QA-LoRA (arXiv:2309.14717): the contract between the kernels and everyone above them.
//
//   p[i, l] = sum of x[i, j] over the columns j of group l        the pooled activations
//   u       = p A^T                                               A = lora_A [r, k / group]
//
// and y += scaling * u B^T, which group_linear adds to the base product (kernels/group_linear.h). p is written to
// memory, because the gradient of A needs p and not x; p has a `group`-th of the size of x. The gradients are those of
// LoRA with p in the place of x (kernels/lora_linear.h). Sums are fp32, in an order that depends on the shapes alone.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"

namespace peftops {

struct QaloraShrink {
  const void* x;        // [m, k] of x_dtype
  const void* a;        // lora_A [r, k / group] of a_dtype
  float* p;             // [m, k / group]
  float* u;             // [m, r]
  int64_t m, k, r;
  int64_t group;        // a power of two from 8
  DType x_dtype, a_dtype;
};

PEFTOPS_CPU_KERNELS(Kernel<QaloraShrink> qalora_shrink;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<QaloraShrink> qalora_shrink; }
#endif

}  // namespace peftops
