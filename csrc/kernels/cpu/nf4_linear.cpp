// Compiled once for each of the builds of cpu/kernel.h.
#include "kernels/nf4_linear.h"
#include "kernels/cpu/code_columns.h"
#include "kernels/cpu/nf4_decode.h"
#include "kernels/cpu/packed_product.h"

namespace peftops::cpu::PEFTOPS_ISA {

int64_t nf4_linear(const Nf4Linear& a, int64_t begin, int64_t end, void* scratch) {
  return packed_linear(a, begin, end, scratch);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
