// Compiled once for each of the builds of cpu/kernel.h.
#include "kernels/mxfp4_linear.h"
#include "kernels/cpu/code_columns.h"
#include "kernels/cpu/mxfp4_decode.h"
#include "kernels/cpu/packed_product.h"

namespace peftops::cpu::PEFTOPS_ISA {

int64_t mxfp4_linear(const Mxfp4Linear& a, int64_t begin, int64_t end, void* scratch) {
  return packed_linear(a, begin, end, scratch);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
