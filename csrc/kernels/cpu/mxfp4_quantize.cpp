// Compiled once for each of the builds of cpu/kernel.h. A block is read twice, the second time from L1. Limit: reading
// the weight.
#include "kernels/mxfp4_quantize.h"
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kPerUnit = 512;   // blocks
constexpr int kVectors = kMxBlock / kLanes;

// The nearest code of each lane; that of a NaN is a zero.
inline Int nearest(Vec v) {
  const Vec size = abs(v);
  Int code = shift_left(shift_right(as_int(v), 31), 3);
#pragma GCC unroll 7
  for (int i = 0; i < 7; ++i) code = add_if_greater(size, set(kE2m1Below[i]), code, 1);
  return code;
}

// Returns the scale.
template <class T> uint8_t quantize_block(const T* w, uint8_t* packed) {
  Int most = as_int(zero());   // magnitudes are ordered as the integers that their bits are, NaN above infinity
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) most = max_int(most, as_int(abs(load(w + i * kLanes))));
  int32_t lane[kLanes], largest = 0;
  store_int(lane, most);
  for (int32_t bits : lane) largest = bits > largest ? bits : largest;
  const int32_t exponent = largest >> 23, scale = exponent > kE2m1Exponent ? exponent - kE2m1Exponent : 0;
  if (exponent == 255) {   // the block has no finite scale
    memset(packed, 0, kMxBlock / 2);
    return 255;
  }
  const Vec inverse = as_float(set_int((254 - scale) << 23));
  for (int i = 0; i < kVectors; i += 2)
    pack_codes(packed + i * kLanes / 2, nearest(load(w + i * kLanes) * inverse),
               nearest(load(w + (i + 1) * kLanes) * inverse));
  for (int i = 0; i < kMxBlock / 2; ++i) packed[i] = uint8_t(packed[i] << 4 | packed[i] >> 4);   // the first one lowest
  return uint8_t(scale);
}

}  // namespace

int64_t mxfp4_quantize(const Mxfp4Quantize& a, int64_t begin, int64_t end, void*) {
  const int64_t last = at_most(end * kPerUnit, a.blocks);
  with_type(a.dtype, [&](auto t) {
    const auto* w = static_cast<const typename decltype(t)::type*>(a.weight);
    for (int64_t b = begin * kPerUnit; b < last; ++b)
      a.scales[b] = quantize_block(w + b * kMxBlock, a.packed + b * (kMxBlock / 2));
  });
  return ceil_div(a.blocks, kPerUnit);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
