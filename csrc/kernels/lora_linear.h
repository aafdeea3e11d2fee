// The thin products of low-rank adapters, between a matrix of activations or gradients and a factor of
// rank r: the contract between the kernels and everyone above them. With A = lora_A [r, k] and
// B = lora_B [n, r], u = dropout(x) A^T and v = scaling * g B, a LoRA layer is
//
//   lora_shrink    u = dropout(x) A^T            v = scaling * g B
//   lora_expand    y += scaling * u B^T          dx += dropout'(v A)
//   lora_gradient  dA = v^T dropout(x)           dB^T = scaling * u^T g
//
// All sums are fp32, in an order that depends on the shapes alone. A factor `f` is given as f[r][k]
// (`by_rank`, like A) or as f[k][r] (like B): both are read without a transposition.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dropout.h"
#include "kernels/dtype.h"

namespace peftops {

// u = scale * dropout(x) f^T
struct LoraShrink {
  const void* x;        // [m, k] of x_dtype
  const void* f;        // [r, k] if by_rank, else [k, r], of f_dtype
  float* u;             // [m, r]
  int64_t m, k, r;
  float scale;
  bool by_rank;
  DType x_dtype, f_dtype;
  Dropout dropout;      // of x
  float* parts;         // [lora_parts, m, r] on CUDA, where blocks of threads share a sum; null: they do not
};

// y += dropout(scale * u f), rounded once
struct LoraExpand {
  void* y;              // [m, k] of y_dtype, read and written
  const float* u;       // [m, r]
  const void* f;        // [r, k] if by_rank, else [k, r], of f_dtype
  int64_t m, k, r;
  float scale;
  bool by_rank;
  DType y_dtype, f_dtype;
  Dropout dropout;      // of what is added
};

// d = scale * u^T dropout(x)
struct LoraGradient {
  const float* u;       // [m, r]
  const void* x;        // [m, k] of x_dtype
  void* d;              // [r, k] if by_rank, else [k, r], of d_dtype
  int64_t m, k, r;
  float scale;
  bool by_rank;
  DType x_dtype, d_dtype;
  Dropout dropout;      // of x
  float* parts;         // [lora_parts, r, k] likewise
};

PEFTOPS_CPU_KERNELS(Kernel<LoraShrink> lora_shrink; Kernel<LoraExpand> lora_expand; Kernel<LoraGradient> lora_gradient;)

#ifdef PEFTOPS_CUDA
namespace cuda {
Kernel<LoraShrink> lora_shrink; Kernel<LoraExpand> lora_expand; Kernel<LoraGradient> lora_gradient;
int64_t lora_parts(const LoraShrink&);     // how many blocks of threads share a sum, by the shapes alone
int64_t lora_parts(const LoraGradient&);
}
#endif

}  // namespace peftops
