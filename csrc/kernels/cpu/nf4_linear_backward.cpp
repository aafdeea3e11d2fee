// Compiled once for each of the builds of cpu/kernel.h.
#include "kernels/nf4_linear.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/nf4_rows.h"
#include "kernels/cpu/packed_product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// dropout'(v A)
void add_term(const Nf4LinearBackward& a, const Block& b, const Scratch& s) {
  with_type(a.a_dtype, [&](auto t) {
    using A = typename decltype(t)::type;
    const int64_t cols = a.weight.cols;
    accumulate<2>(b, a.r, Rows<float>{a.v, a.r}, Matrix<2, A>{static_cast<const A*>(a.a), cols, cols, 1.f}, s);
    if (a.dropout.p > 0) drop(DropoutMask(a.dropout), b, cols, s);
  });
}

}  // namespace

int64_t nf4_linear_backward(const Nf4LinearBackward& a, int64_t begin, int64_t end, void* scratch) {
  return packed_linear_backward(a, begin, end, scratch, add_term);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
