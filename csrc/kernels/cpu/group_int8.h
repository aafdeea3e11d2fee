// The codes of a group-quantised weight for the product of product_int8.h. Eight of four bits are two quadruples, the
// even and the odd ones: what a shift and a mask make of them.
#pragma once
#include "kernels/cpu/group_columns.h"
#include "kernels/cpu/product_int8.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// Dword d of the codes of kLanes rows.
template <int B> Int pack_codes8(const Int* units, int d) {
  constexpr int kWidth = 32 / kPerDword;
  if constexpr (B == 4) return shift_right(units[0], 4 * d) & set_int(0x0f0f0f0f);
  Int all = as_int(zero());
  for (int i = 0; i < kPerDword; ++i) {
    const int c = d + kDwords * i;
    const Int code = shift_right(units[c / Unit<B>::kCodes], B * (c % Unit<B>::kCodes)) & set_int((1 << B) - 1);
    all = all | shift_left(code, kWidth * i);
  }
  return all;
}

template <int B> struct GroupInt8 {
  const GroupWeight& w;
  int64_t segment = at_most(w.group, kMostInt8Segment);   // longer groups are cut

  void pack8(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scales, float* zeros) const {
    for (int v = 0; v < 2; ++v) {
      const LaneRows<B> rows(w, col + v * kLanes);
      for (int64_t s = 0; s < steps / segment; ++s) {
        store(scales + (2 * s + v) * kLanes, rows.scales(t + s * segment));
        store(zeros + (2 * s + v) * kLanes, zero() - rows.zeros(t + s * segment));
      }
      rows.each_octet(t, steps, [&](int64_t k, const Int* units) {
        for (int d = 0; d < kDwords; ++d)
          store_int(out + ((k / kPerDword + d) * 2 + v) * kLanes, pack_codes8<B>(units, d));
      });
    }
  }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
