// Linear layers over a group-quantised weight: the contract between the kernels and everyone above them.
//
//   group_linear           y  = x W^T + bias + scaling * u B^T      see kernels/linear.h
//   group_linear_backward  dx = g W + v A', with A' = A, each of its columns `pool` times over
//
// With pool = 1, A is that of LoRA; with pool = group that of QA-LoRA (kernels/qalora_linear.h).
//
// With 16-bit x or g, AVX-512 multiplies in int16 (see cpu/product_int16.h for its error) or bf16, other ISAs in fp32.
// CUDA multiplies codes, which are exact in the type of a 16-bit x, on tensor cores, or has a library multiply W.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/group.h"
#include "kernels/linear.h"

namespace peftops {

using GroupLinear = Linear<GroupWeight>;

struct GroupLinearBackward : LinearBackward<GroupWeight> {
  int64_t pool;          // lora_A is [r, k / pool]
};

PEFTOPS_CPU_KERNELS(Kernel<GroupLinear> group_linear; Kernel<GroupLinearBackward> group_linear_backward;)

#ifdef PEFTOPS_CUDA
namespace cuda {
Kernel<GroupLinear> group_linear;
Kernel<GroupLinearBackward> group_linear_backward;
Kernel<LibraryOperands<GroupWeight>> group_operands;
int64_t operands_depth(const GroupLinear&);   // as in kernels/nf4_linear.h
cudaError_t by_library(const GroupLinear&, Way wanted, bool* result);
cudaError_t by_library(const GroupLinearBackward&, Way wanted, bool* result);
}  // namespace cuda
#endif

}  // namespace peftops
