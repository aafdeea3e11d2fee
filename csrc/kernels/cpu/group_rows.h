// A group-quantised weight as P (product.h), as it lies: a row is a step and its columns are lanes, so that codes are
// decoded without a transposition. See packed_product.h for the view.
#pragma once
#include "kernels/cpu/group_decode.h"
#include "kernels/cpu/products.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

template <int V, int B> struct GroupRows {
  const GroupWeight& w;

#if defined(PEFTOPS_INT16)
  bool fits_int16() const { return w.rows % 32 == 0; }
  AsInt16<GroupRows> int16() const { return {*this, AsInt16<GroupRows>::segment_of(w.rows)}; }
#endif
#if defined(PEFTOPS_BF16)
  bool fits_bf16() const { return w.rows % 8 == 0; }
  AsBf16<V, GroupRows> bf16() const { return {*this}; }
#endif

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t cols = at_most(V * kLanes, w.cols - col);
    for (int64_t k = 0; k < steps; ++k) decode_row<B>(w, t + k, col, cols, out + k * V * kLanes);
  }
};

template <class F> void with_rows(const GroupWeight& w, const F& f) {
  with_bits(w.bits, [&](auto bits) { f(GroupRows<2, decltype(bits)::value>{w}); });
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
