// MXFP4 quantisation by the rule of OCP's specification: the contract between the kernels and everyone above them.
//
//   scale = 127 + floor(log2(largest magnitude of the block)) - 2, and 0 at least
//   code  = the number of E2M1 nearest to w / 2^(scale - 127), the one with an even code at a tie; 6 where that is less
//
// A zero keeps its sign. A block with a NaN or an infinity gets scale 255: it dequantises to NaN, not to a wrong
// number.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/mxfp4.h"

namespace peftops {

// The bounds between the codes i and i + 1: a magnitude above the bound gets the larger code. A tie goes to the even
// code. If that is the larger one, the bound is the number just below the middle.
constexpr float kE2m1Below[7] = {0.25f,           0x1.7ffffep-1f, 1.25f, 0x1.bffffep0f, 2.5f,
                                 0x1.bffffep1f,   5.f};

struct Mxfp4Quantize {
  const void* weight;      // [blocks, 32]
  uint8_t* packed;         // [blocks, 16]
  uint8_t* scales;         // [blocks]
  int64_t blocks;
  DType dtype;             // of weight
};

PEFTOPS_CPU_KERNELS(Kernel<Mxfp4Quantize> mxfp4_quantize;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<Mxfp4Quantize> mxfp4_quantize; }
#endif

}  // namespace peftops
