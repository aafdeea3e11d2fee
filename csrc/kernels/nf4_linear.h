// Linear layers over an NF4 weight W [n, k], low-rank term included: the contract between the kernels
// and everyone above them.
//
//   nf4_linear           y  = x W^T + bias + scaling * u B^T      u from lora_shrink (kernels/lora_linear.h)
//   nf4_linear_backward  dx = g W + dropout'(v A)                 v likewise
//
// W is decoded in registers or a panel at a time; nothing of its size is ever written. Sums are fp32,
// in an order that depends on the shapes alone. With 16-bit x or g, AVX-512 multiplies in int16 (see
// cpu/product_int16.h for its error), other ISAs in fp32. CUDA multiplies on tensor cores in the type of x or g: codes
// are rounded to it forwards, elements of W backwards.
//
// Where a matrix library is the faster, CUDA has kernels for its operands (Nf4Operands): those hold W, rounded to the type
// of x, in memory.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dropout.h"
#include "kernels/dtype.h"
#include "kernels/nf4.h"

namespace peftops {

struct Nf4Linear {
  Nf4Weight weight;      // rows = n, cols = k
  const void* x;         // [m, k]
  const void* bias;      // [n] of bias_dtype, or null
  const float* u;        // [m, r], or null when r is 0
  const void* b;         // lora_B [n, r] of b_dtype
  void* y;               // [m, n]
  int64_t m, r;
  float scaling;
  DType dtype;           // of x and y
  DType bias_dtype, b_dtype;
};

struct Nf4LinearBackward {
  Nf4Weight weight;      // rows = n, cols = k
  const void* g;         // [m, n]
  const float* v;        // [m, r], or null when r is 0
  const void* a;         // lora_A [r, k] of a_dtype
  void* dx;              // [m, k]
  int64_t m, r;
  DType dtype;           // of g and dx
  DType a_dtype;
  Dropout dropout;       // of the low-rank term
};

namespace cpu {
namespace scalar     { Kernel<Nf4Linear> nf4_linear; Kernel<Nf4LinearBackward> nf4_linear_backward; }
namespace avx2       { Kernel<Nf4Linear> nf4_linear; Kernel<Nf4LinearBackward> nf4_linear_backward; }
namespace avx512     { Kernel<Nf4Linear> nf4_linear; Kernel<Nf4LinearBackward> nf4_linear_backward; }
namespace avx512bf16 { Kernel<Nf4Linear> nf4_linear; Kernel<Nf4LinearBackward> nf4_linear_backward; }
}  // namespace cpu

#ifdef PEFTOPS_CUDA
// y = left right^T: [x | scaling u | 1] [W | lora_B | bias]^T, numbers that the type cannot hold in parts, and zeros up to
// a depth of whole units of 16 bytes.
struct Nf4Operands {
  Nf4Linear of;     // its y is not touched
  void* left;       // [m, depth] of of.dtype; null where depth is k, and x will do
  void* right;      // [n, depth]
  int64_t depth;    // nf4_operands_depth(of)
};

enum class Way { faster, kernels, library };

namespace cuda {
Kernel<Nf4Linear> nf4_linear;
Kernel<Nf4LinearBackward> nf4_linear_backward;
Kernel<Nf4Operands> nf4_operands;
int64_t nf4_operands_depth(const Nf4Linear&);
// Whether to go by the library, on the current device. Whatever `wanted`, not for what its operands cannot hold.
cudaError_t nf4_by_library(const Nf4Linear&, Way wanted, bool* result);
}  // namespace cuda
#endif

}  // namespace peftops
