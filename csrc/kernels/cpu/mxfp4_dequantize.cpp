// Compiled once for each of the builds of cpu/kernel.h. Limit: writing the result.
#include "kernels/mxfp4_dequantize.h"
#include "kernels/cpu/mxfp4_decode.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kPerUnit = 512 * kMxBlock;   // elements

}  // namespace

int64_t mxfp4_dequantize(const Mxfp4Dequantize& a, int64_t begin, int64_t end, void*) {
  const int64_t n = a.weight.rows * a.weight.cols, first = begin * kPerUnit, last = at_most(end * kPerUnit, n);
  with_type(a.dtype, [&](auto t) {
    if (first < last) decode_run(a.weight, first, last - first, static_cast<typename decltype(t)::type*>(a.out) + first);
  });
  return ceil_div(n, kPerUnit);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
