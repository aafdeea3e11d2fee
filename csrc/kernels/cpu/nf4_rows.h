// An NF4 weight as P (product.h), as it lies: a row is a step and its columns are lanes, so that codes are decoded without
// a transposition. See packed_product.h for the view.
#pragma once
#include "kernels/cpu/nf4_decode.h"
#include "kernels/cpu/products.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

template <int V> struct Nf4Rows {
  const Nf4Weight& w;
  int64_t segment = w.rows % 64 ? 32 : 64;   // of rows
  static constexpr bool kScaled = false;     // for product_bf16.h

  bool fits_int16() const { return is_regular(w) && w.rows % 32 == 0; }
  bool fits_bf16() const { return is_regular(w) && w.rows % 8 == 0; }
  const Nf4Rows& int16() const { return *this; }
  const Nf4Rows& bf16() const { return *this; }

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t cols = at_most(V * kLanes, w.cols - col);
    for (int64_t k = 0; k < steps; ++k) decode_run(w, flat_of(w, t + k, col), cols, out + k * V * kLanes);
  }

#if defined(PEFTOPS_INT16)
  // A panel's columns share a block in every row, but the rows, over which int16 sums run, do not share
  // its absmax: codes are scaled to the largest of the segment's rows before they are rounded.
  void pack16(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale) const {
    const Table16 table(kNf4Code);
    for (int64_t s = 0; s < steps; s += segment, scale += 2 * kLanes) {
      float absmax[kDepth];
      Int most = as_int(zero());
      for (int64_t i = 0; i < segment; ++i) {
        absmax[i] = absmax_of(w, flat_of(w, t + s + i, col) / w.block_size);
        most = max_int(most, as_int(abs(set(absmax[i]))));   // as integers, so that a NaN is the largest
      }
      const float largest = _mm512_cvtss_f32(as_float(most)), factor = largest > 0 ? kCodeFactor / largest : 0.f;
      store(scale, set(largest / kCodeFactor));
      store(scale + kLanes, set(largest / kCodeFactor));
      const auto whole = [&](int64_t i, int64_t v) {
        const uint8_t* p = w.packed + flat_of(w, t + s + i, col + v * kLanes) / 2;
        return _mm512_cvtps_epi32(table(unpack_codes(p)) * set(absmax[i] * factor));
      };
      for (int64_t i = 0; i < segment; i += 8)
        for (int64_t j = 0; j < 4; ++j, out += 2 * kLanes)
          for (int64_t v = 0; v < 2; ++v)
            store_int(out + v * kLanes, _mm512_mask_blend_epi16(0xaaaaaaaa, whole(i + j, v),
                                                                shift_left(whole(i + j + 4, v), 16)));
    }
  }
#endif

#if defined(PEFTOPS_BF16)
  void pack_bf16(int64_t col, int64_t t, int64_t steps, int32_t* out) const {
    const Table16 table(kNf4Code);
    const auto row = [&](int64_t i, int64_t v) {
      const int64_t flat = flat_of(w, i, col);
      return table(unpack_codes(w.packed + (flat + v * kLanes) / 2)) * set(absmax_of(w, flat / w.block_size));
    };
    for (int64_t i = t; i < t + steps; i += 8)
      for (int64_t j = i; j < i + 4; ++j, out += 2 * kLanes)
        for (int64_t v = 0; v < 2; ++v) store_int(out + v * kLanes, pair_bf16(row(j, v), row(j + 4, v)));
  }
#endif
};

template <class F> void with_rows(const Nf4Weight& w, const F& f) { f(Nf4Rows<2>{w}); }

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
