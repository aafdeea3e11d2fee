// Linear layers over an MXFP4 weight: the contract between the kernels and everyone above them.
//
//   mxfp4_linear           y  = x W^T + bias + scaling * u B^T      see kernels/linear.h
//   mxfp4_linear_backward  dx = g W + dropout'(v A)
//
// Codes are exact in every type that multiplies them. With 16-bit x or g, AVX-512 multiplies in int16 (see
// cpu/product_int16.h for its error) or bf16, other ISAs in fp32.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dropout.h"
#include "kernels/linear.h"
#include "kernels/mxfp4.h"

namespace peftops {

using Mxfp4Linear = Linear<Mxfp4Weight>;

struct Mxfp4LinearBackward : LinearBackward<Mxfp4Weight> {
  Dropout dropout;       // of the low-rank term
};

PEFTOPS_CPU_KERNELS(Kernel<Mxfp4Linear> mxfp4_linear; Kernel<Mxfp4LinearBackward> mxfp4_linear_backward;)

#ifdef PEFTOPS_CUDA
namespace cuda {
Kernel<Mxfp4Linear> mxfp4_linear;
Kernel<Mxfp4LinearBackward> mxfp4_linear_backward;
Kernel<LibraryOperands<Mxfp4Weight>> mxfp4_operands;
int64_t operands_depth(const Mxfp4Linear&);   // as in kernels/nf4_linear.h
cudaError_t by_library(const Mxfp4Linear&, Way wanted, bool* result);
cudaError_t by_library(const Mxfp4LinearBackward&, Way wanted, bool* result);
}  // namespace cuda
#endif

}  // namespace peftops
