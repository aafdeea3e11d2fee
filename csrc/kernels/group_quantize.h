// Group-wise quantisation, group by group: the contract between the kernels and everyone above them.
//
//   asymmetric   scale = (max - min) / (2^bits - 1)              zero = -min / scale
//   symmetric    scale = 2 max(|max|, |min|) / (2^bits - 1)      zero = 2^(bits - 1)
//   code = round(w * (1 / scale) + zero), to even at a tie, clamped to [0, 2^bits - 1]
//
// With `narrower` > 0, that number of further ranges is tried: 1 - i / 64 times the width for i = 1, 2, ..., about the
// same middle (symmetric: the same zero). Numbers outside of a range are clipped, and those inside have finer steps.
// The range with the least squared error is taken, or the widest of equal ones.
//
// Every operation is rounded to fp32, so that the codes are the same on every device. A group whose scale would
// be under 1e-30 is constant: asymmetric, it is scale |min|, zero -sign(min) and code 0, which is exact; a zero group
// has scale 1, so that its zero can change, too. A group with a NaN or an infinity, or with a width beyond the range of
// fp32, gets scale NaN: it dequantises to NaN, not to a wrong number.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/group.h"

namespace peftops {

constexpr float kSmallestScale = 1e-30f;   // its reciprocal, and zeros of any weight, stay finite

struct GroupQuantize {
  const void* weight;      // [rows, cols]
  uint8_t* packed;         // [rows, cols * bits / 8]
  float* scales;           // [rows, cols / group]
  float* zeros;            // [rows, cols / group]
  int64_t rows, cols, group, bits;
  int64_t narrower;        // from 0, the extremes alone, to 63
  bool symmetric;
  DType dtype;             // of weight
};

PEFTOPS_CPU_KERNELS(Kernel<GroupQuantize> group_quantize;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<GroupQuantize> group_quantize; }
#endif

}  // namespace peftops
