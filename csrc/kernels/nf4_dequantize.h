// NF4 dequantisation: the contract between the kernels and everyone above them.
//
//   nf4_dequantize  out[i] = kNf4Code[code[i]] * absmax[block of i], computed in fp32, rounded once
//   nf4_absmax      the double-quantised absmax values themselves
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/nf4.h"

namespace peftops {

struct Nf4Dequantize {
  Nf4Weight weight;
  void* out;               // [rows, cols], row-major
  DType dtype;             // of out
};

struct Nf4Absmax {
  const uint8_t* code;     // [blocks]
  const float* scale;      // [ceil(blocks / 256)]
  const float* offset;     // [1]
  float* absmax;           // [blocks]
  int64_t blocks;
};

PEFTOPS_CPU_KERNELS(Kernel<Nf4Dequantize> nf4_dequantize; Kernel<Nf4Absmax> nf4_absmax;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<Nf4Dequantize> nf4_dequantize; Kernel<Nf4Absmax> nf4_absmax; }
#endif

}  // namespace peftops
