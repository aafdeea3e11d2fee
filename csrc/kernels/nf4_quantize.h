// NF4 quantisation: the contract between the kernels and everyone above them.
//
//   nf4_quantize         absmax[b] = max |w| over block b
//                        code[i]   = how many of the 15 midpoints between neighbouring codes lie below
//                                    w[i] * (1 / max(absmax[b], 1e-38))
//   nf4_quantize_absmax  the same for the absmax values themselves: v = absmax - offset in blocks of 256,
//                        codes of the dynamic map by its 255 midpoints; if the code's value overflows float32, the
// largest code whose value does not
//
// The product with the reciprocal and the strict comparison are bitsandbytes' own, so the codes are too.
// An all-zero block has absmax 0 and code 7, which is zero. A block with a NaN or an infinity gets absmax NaN: it
// dequantises to NaN, not to a wrong number.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/nf4.h"

namespace peftops {

struct Nf4Quantize {
  const void* weight;      // [n]
  uint8_t* packed;         // [ceil(n / 2)]; with n odd the last low nibble is 7, a zero
  float* absmax;           // [ceil(n / block_size)]
  int64_t n, block_size;
  DType dtype;             // of weight
};

struct Nf4QuantizeAbsmax {
  const float* absmax;     // [blocks]
  const float* offset;     // [1], their mean
  uint8_t* code;           // [blocks]
  float* scale;            // [ceil(blocks / 256)]
  int64_t blocks;
};

PEFTOPS_CPU_KERNELS(Kernel<Nf4Quantize> nf4_quantize; Kernel<Nf4QuantizeAbsmax> nf4_quantize_absmax;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<Nf4Quantize> nf4_quantize; Kernel<Nf4QuantizeAbsmax> nf4_quantize_absmax; }
#endif

}  // namespace peftops
