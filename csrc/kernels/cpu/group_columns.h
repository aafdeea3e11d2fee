// Rows of a group-quantised weight as columns of P (product.h): units of kLanes rows are transposed, so that a
// lane is a row and a shift moves on to the next column. See packed_product.h for the view.
#pragma once
#include "kernels/cpu/group_decode.h"
#include "kernels/cpu/group_dot.h"
#include "kernels/cpu/products.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// kLanes rows from `row` on, one a lane. Lanes past the last row hold the last row again.
template <int B> struct LaneRows {
  static constexpr int kUnits = 8 / Unit<B>::kCodes;   // that make eight codes

  const GroupWeight& w;
  int64_t first, more;
  Int offset;   // of each lane's groups from those of the first

  LaneRows(const GroupWeight& w, int64_t row) : w(w), first(at_most(row, w.rows - 1)), more(w.rows - 1 - first) {
    int32_t lane[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lane[i] = int32_t(at_most(i, more) * (w.cols / w.group));
    offset = load_int(lane);
  }
  // Each row's scale or zero at a column.
  Vec scales(int64_t col) const { return gather(w.scales + (first * w.cols + col) / w.group, offset); }
  Vec zeros(int64_t col) const { return gather(w.zeros + (first * w.cols + col) / w.group, offset); }

  // f(k, units): the units of the eight columns from t + k on.
  template <class F> void each_octet(int64_t t, int64_t steps, const F& f) const {
    for (int64_t k = 0; k < steps; k += Unit<B>::kStrip) {
      const int64_t n = at_most(kLanes, (steps - k) / Unit<B>::kCodes);
      Int q[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint8_t* p = w.packed + ((first + at_most(i, more)) * w.cols + t + k) / 8 * B;
        __builtin_prefetch(p + kDepth / 8 * B, 0, 2);   // where the next panel begins; L1 has no room for it
        q[i] = Unit<B>::load(p, n);
      }
      transpose(q);
      for (int64_t d = 0; d < n; d += kUnits) f(k + d * Unit<B>::kCodes, q + d);
    }
  }
};

#if defined(PEFTOPS_INT8)
// For product_int8.h: unchanged codes. Eight codes of four bits become two quadruples, the even and the odd ones, by a
// shift and a mask. Dword d of the codes of kLanes rows.
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

#endif

// The weight as P, decoded in fp32.
template <int V, int B> struct GroupColumns {
  static constexpr bool kHasCodes = false;   // numbers less a zero point
  const GroupWeight& w;
  Unit<B> unit = {};

  bool fits_dot() const { return true; }
  // Decided for each row by itself, so that its bits do not depend on its neighbours.
  template <class T> void dot(const Block& b, const T* x, const Scratch& s) const {
    const auto moderate = [&](int64_t i) { return is_moderate(x + (b.row + i) * w.cols, w.cols); };
    for (int64_t first = 0, end; first < b.rows; first = end) {
      const bool by_dots = moderate(first);
      for (end = first + 1; end < b.rows && moderate(end) == by_dots;) ++end;
      Scratch at = s;
      at.c += first * Scratch::kCols;
      const Block rows{b.row + first, end - first, b.col, b.panels};
      if (by_dots) accumulate_dot<B>(rows, b.rows, w, x, at);
      else accumulate<V>(rows, w.cols, Rows<T>{x, w.cols}, *this, at);
    }
  }
#if defined(PEFTOPS_DOT8)
  bool fits_dot8() const { return B == 4 && w.group >= kInt8Span; }
  template <class T, class Redo> void dot8(const Block& b, const T* x, const Scratch& s, const Redo& redo) const {
    accumulate_dot8(b, w, x, s, redo);
  }
#endif
#if defined(PEFTOPS_INT8)
  bool fits_int8() const { return w.group >= kLeastInt8Segment; }
  GroupInt8<B> int8() const { return {w}; }
#endif
#if defined(PEFTOPS_INT16)
  bool fits_int16() const { return w.cols % 32 == 0; }
  AsInt16<GroupColumns> int16() const { return {*this, AsInt16<GroupColumns>::segment_of(w.cols)}; }
#endif
#if defined(PEFTOPS_BF16)
  bool fits_bf16() const { return true; }
  AsBf16<V, GroupColumns> bf16() const { return {*this}; }
#endif

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    for (int v = 0; v < V; ++v) {
      const LaneRows<B> rows(w, col + v * kLanes);
      Vec scale = zero(), zero_point = zero();
      rows.each_octet(t, steps, [&](int64_t k, const Int* units) {
        if (k == 0 || (t + k) % w.group == 0) scale = rows.scales(t + k), zero_point = rows.zeros(t + k);
        float* at = out + (k * V + v) * kLanes;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i, at += V * kLanes)
          store(at, (unit.code(units[i / Unit<B>::kCodes], i % Unit<B>::kCodes) - zero_point) * scale);
      });
    }
  }
};

template <class F> void with_columns(const GroupWeight& w, const F& f) {
  with_bits(w.bits, [&](auto bits) { f(GroupColumns<2, decltype(bits)::value>{w}); });
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
