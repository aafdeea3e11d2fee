// Compiled once for each of the builds of cpu/kernel.h.
// Limit: writing the result.
#include "kernels/group_dequantize.h"
#include "kernels/cpu/group_decode.h"

namespace peftops::cpu::PEFTOPS_ISA {

int64_t group_dequantize(const GroupDequantize& a, int64_t begin, int64_t end, void*) {
  const GroupWeight& w = a.weight;
  with_bits(w.bits, [&](auto bits) {
    with_type(a.dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      for (int64_t row = begin; row < end; ++row)
        decode_row<decltype(bits)::value>(w, row, 0, w.cols, static_cast<T*>(a.out) + row * w.cols);
    });
  });
  return w.rows;
}

}  // namespace peftops::cpu::PEFTOPS_ISA
