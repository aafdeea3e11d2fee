// Merging QA-LoRA into the zeros of a group-quantised weight: the contract between the kernels and everyone
// above them.
//
//   out[o, l] = zeros[o, l] - factor * (B A)[o, l] / scales[o, l]
//
// since scale * (code - out) = scale * (code - zeros) + factor * (B A), for any code. Sums are fp32.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"

namespace peftops {

struct QaloraMerge {
  const float* scales;   // [n, groups]
  const float* zeros;    // [n, groups]
  const void* a;         // lora_A [r, groups] of a_dtype
  const void* b;         // lora_B [n, r] of b_dtype
  float* out;            // [n, groups]
  int64_t n, groups, r;
  float factor;
  DType a_dtype, b_dtype;
};

PEFTOPS_CPU_KERNELS(Kernel<QaloraMerge> qalora_merge;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<QaloraMerge> qalora_merge; }
#endif

}  // namespace peftops
