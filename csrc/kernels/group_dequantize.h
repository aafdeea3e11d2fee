// Group-wise dequantisation: the contract between the kernels and everyone above them.
//
//   group_dequantize  out[o, j] = (code[o, j] - zeros[o, j / group]) * scales[o, j / group]
//
// computed in fp32, the difference rounded and the product rounded, then rounded once to the dtype of out.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"
#include "kernels/group.h"

namespace peftops {

struct GroupDequantize {
  GroupWeight weight;
  void* out;               // [rows, cols], row-major
  DType dtype;             // of out
};

PEFTOPS_CPU_KERNELS(Kernel<GroupDequantize> group_dequantize;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<GroupDequantize> group_dequantize; }
#endif

}  // namespace peftops
