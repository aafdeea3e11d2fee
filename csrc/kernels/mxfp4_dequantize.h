// MXFP4 dequantisation: the contract between the kernels and everyone above them.
//
//   mxfp4_dequantize  out[i] = kE2m1[code[i]] * 2^(scale of i's block - 127), in fp32, rounded once
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/mxfp4.h"

namespace peftops {

struct Mxfp4Dequantize {
  Mxfp4Weight weight;
  void* out;               // [rows, cols], row-major
  DType dtype;             // of out
};

PEFTOPS_CPU_KERNELS(Kernel<Mxfp4Dequantize> mxfp4_dequantize;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<Mxfp4Dequantize> mxfp4_dequantize; }
#endif

}  // namespace peftops
