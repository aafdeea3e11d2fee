// Linear layers over an NF4 weight: the contract between the kernels and everyone above them.
//
//   nf4_linear           y  = x W^T + bias + scaling * u B^T      see kernels/linear.h
//   nf4_linear_backward  dx = g W + dropout'(v A)
//
// With 16-bit x or g, AVX-512 multiplies in int16 (see cpu/product_int16.h for its error) or bf16, other ISAs in fp32.
// CUDA multiplies on tensor cores in the type of x or g: codes are rounded to it forwards, elements of W backwards.
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

PEFTOPS_CPU_KERNELS(Kernel<Nf4Linear> nf4_linear; Kernel<Nf4LinearBackward> nf4_linear_backward;)

#ifdef PEFTOPS_CUDA
namespace cuda {
Kernel<Nf4Linear> nf4_linear;
Kernel<Nf4LinearBackward> nf4_linear_backward;
Kernel<LibraryOperands<Nf4Weight>> nf4_operands;
int64_t operands_depth(const Nf4Linear&);
// Whether to multiply with the library, on the current device. Never, even if `wanted`, for values that its operands
// cannot hold.
cudaError_t by_library(const Nf4Linear&, Way wanted, bool* result);
cudaError_t by_library(const Nf4LinearBackward&, Way wanted, bool* result);
}  // namespace cuda
#endif

}  // namespace peftops
