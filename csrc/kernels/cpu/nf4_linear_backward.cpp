// Compiled once for each of the builds of cpu/kernel.h.
#include "kernels/nf4_linear.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/nf4_rows.h"
#include "kernels/cpu/packed_product.h"

namespace peftops::cpu::PEFTOPS_ISA {
int64_t nf4_linear_backward(const Nf4LinearBackward& a, int64_t begin, int64_t end, void* scratch) {
  return packed_linear_backward(a, begin, end, scratch, add_dropped_term<Nf4LinearBackward>);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
