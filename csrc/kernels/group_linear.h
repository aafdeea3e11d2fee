// Linear layers over a group-quantised weight W [n, k], low-rank term included: the contract between the
// kernels and everyone above them.
//
//   group_linear           y  = x W^T + bias + scaling * u B^T
//   group_linear_backward  dx = g W + v A', with A' = A, each of its columns `pool` times over
//
// With pool = 1, A is that of LoRA; with pool = group that of QA-LoRA (kernels/qalora_linear.h).
//
// W is decoded in registers or a panel at a time; nothing of its size is ever written. Sums are fp32, in an
// order that depends on the shapes alone. With 16-bit x or g, AVX-512 multiplies in int16 (see
// cpu/product_int16.h for its error) or bf16, other ISAs in fp32. CUDA multiplies codes, which are exact in the type
// of a 16-bit x, on tensor cores.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/group.h"

namespace peftops {

struct GroupLinear {
  GroupWeight weight;    // rows = n, cols = k
  const void* x;         // [m, k]
  const void* bias;      // [n] of bias_dtype, or null
  const float* u;        // [m, r], or null when r is 0
  const void* b;         // lora_B [n, r] of b_dtype
  void* y;               // [m, n]
  int64_t m, r;
  float scaling;
  bool int8;             // x may be rounded to int8, see cpu/group_int8.h
  DType dtype;           // of x and y
  DType bias_dtype, b_dtype;
};

struct GroupLinearBackward {
  GroupWeight weight;    // rows = n, cols = k
  const void* g;         // [m, n]
  const float* v;        // [m, r], or null when r is 0
  const void* a;         // lora_A [r, k / pool] of a_dtype
  void* dx;              // [m, k]
  int64_t m, r, pool;
  DType dtype;           // of g and dx
  DType a_dtype;
};

namespace cpu {
namespace scalar     { Kernel<GroupLinear> group_linear; Kernel<GroupLinearBackward> group_linear_backward; }
namespace avx2       { Kernel<GroupLinear> group_linear; Kernel<GroupLinearBackward> group_linear_backward; }
namespace avx512     { Kernel<GroupLinear> group_linear; Kernel<GroupLinearBackward> group_linear_backward; }
namespace avx512bf16 { Kernel<GroupLinear> group_linear; Kernel<GroupLinearBackward> group_linear_backward; }
}  // namespace cpu

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<GroupLinear> group_linear; Kernel<GroupLinearBackward> group_linear_backward; }
#endif

}  // namespace peftops
