// Rows of a group-quantised weight as columns of P (product.h): units of kLanes rows are transposed, so that a
// lane is a row and a shift moves on to the next column.
#pragma once
#include "kernels/cpu/group_decode.h"
#include "kernels/cpu/product.h"

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
        __builtin_prefetch(p + kDepth / 8 * B);   // where the next panel begins
        q[i] = Unit<B>::load(p, n);
      }
      transpose(q);
      for (int64_t d = 0; d < n; d += kUnits) f(k + d * Unit<B>::kCodes, q + d);
    }
  }
};

// The weight as P, decoded in fp32.
template <int V, int B> struct GroupColumns {
  const GroupWeight& w;
  Unit<B> unit;

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

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
