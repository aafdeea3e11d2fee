// Linear layers over an NF4 weight: the contract between the kernels and everyone above them.
//
//   nf4_linear           y  = x W^T + bias + scaling * u B^T      see kernels/linear.h
//   nf4_linear_backward  dx = g W + dropout'(v A)
//
// With 16-bit x or g, AVX-512 multiplies in int16 (see cpu/product_int16.h for its error) or bf16, other ISAs in fp32.
// CUDA multiplies on tensor cores in the type of x or g: codes are rounded to it forwards, elements of W backwards.
//
// Where a matrix library is the faster, CUDA has kernels for its operands (Nf4Operands): those hold W, rounded to the type
// of x, in memory.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dropout.h"
#include "kernels/linear.h"
#include "kernels/nf4.h"

namespace peftops {

using Nf4Linear = Linear<Nf4Weight>;

struct Nf4LinearBackward : LinearBackward<Nf4Weight> {
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
