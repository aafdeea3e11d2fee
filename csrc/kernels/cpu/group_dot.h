// A few rows of x against a group-quantised weight, straight from the packed codes:
//
//   y = sum over groups of scale * (sum of code * x - zero * sum of x)
//
// so that a code costs a shift, a conversion and a multiply-add, and all other terms cost a few instructions for each
// vector of units. Limit: reading the weight.
#pragma once
#include "kernels/cpu/dot.h"
#include "kernels/cpu/group_decode.h"
#if defined(PEFTOPS_DOT8)
#include "kernels/cpu/dot_int8.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// Rows of x in fp32. Lane l of vector j of a strip holds column kCodes l + j; one more vector holds each lane's sum.
template <int B> struct GroupFloats {
  static constexpr int kCodes = Unit<B>::kCodes;
  static constexpr int64_t kStrip = Unit<B>::kStrip, kPacked = kStrip + kLanes;

  // Rows of the weight that share the loads of M rows of x. kOne: the columns of a strip have one group.
  template <bool kOne> static constexpr int together(int M) { return M == 1 ? 1 : 4; }

  float* at;      // [strips][rows][kCodes + 1][kLanes]
  int64_t rows;
  Unit<B> unit = {};

  template <class T> void pack(const T* x, int64_t ld, int64_t cols) const {
    float* out = at;
    for (int64_t t = 0; t < cols; t += kStrip)
      for (int64_t m = 0; m < rows; ++m, out += kPacked) {
        float strip[kStrip] = {};
        each_vector(at_most(kStrip, cols - t), [&](int64_t i, int64_t n) {
          store(strip + i, load_upto(x + m * ld + t + i, n));
        });
        Vec sum = zero();
        for (int j = 0; j < kCodes; ++j) {
          for (int lane = 0; lane < kLanes; ++lane) out[j * kLanes + lane] = strip[kCodes * lane + j];
          sum = sum + load(out + j * kLanes);
        }
        store(out + kStrip, sum);
      }
  }

  // sum[m][r]: code * x in each lane of strip s, for M rows of x and R of the weight.
  template <int M, int R> void dots(const Int (&units)[R], int64_t s, Vec (&sum)[M][R]) const {
    const float* strip = at + s * M * kPacked;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = zero();
#pragma GCC unroll 8
    for (int j = 0; j < kCodes; ++j) {
      Vec code[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) code[r] = unit.code(units[r], j);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec v = load(strip + m * kPacked + j * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[m][r] = fma(code[r], v, sum[m][r]);
      }
    }
  }
  template <int M> Vec sum(int64_t s, int64_t m) const { return load(at + (s * M + m) * kPacked + kStrip); }
  template <int M> Vec times_factor(Vec scale, int64_t, int64_t) const { return scale; }
};

#if defined(PEFTOPS_DOT8)
// Rows of x in int8, for codes of four bits.
struct GroupBytes {
  template <bool kOne> static constexpr int together(int M) { return M == 1 || (M == 2 && !kOne) ? 1 : 4; }

  Bytes<0> x;   // (codes have no sign)

  template <int M, int R> void dots(const Int (&units)[R], int64_t s, Vec (&sum)[M][R]) const {
    const Int nibble = set_int(0x0f0f0f0f);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Int low = units[r] & nibble, high = shift_right(units[r], 4) & nibble;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        sum[m][r] = to_float(dot_unsigned(dot_unsigned(as_int(zero()), low, x.low<M>(s, m)), high, x.high<M>(s, m)));
    }
  }
  template <int M> Vec sum(int64_t s, int64_t m) const { return x.sum<M>(s, m); }
  template <int M> Vec times_factor(Vec scale, int64_t s, int64_t m) const { return scale * x.factor<M>(s, m); }
};
#endif

template <int B, bool kOne, class X> struct GroupDot {
  static constexpr int kCodes = Unit<B>::kCodes;
  static constexpr int64_t kStrip = Unit<B>::kStrip;

  const GroupWeight& w;
  int64_t k, cols;    // of the piece of x
  X x;
  int64_t groups = w.cols / w.group;
  int64_t per_strip = w.group < kStrip ? kStrip / w.group : 1;
  Int which;          // each lane's group, counted from the strip's first

  GroupDot(const GroupWeight& w, int64_t k, int64_t cols, const X& x) : w(w), k(k), cols(cols), x(x) {
    int32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = int32_t(i * kCodes / w.group);
    which = load_int(lane);
  }

  // A number for each lane, out of those of the groups of a strip.
  Vec each_lanes_own(const float* at, int64_t present) const {
    if (kOne) return set(*at);
    return permute(as_float(load_int_n(at, present)), which);
  }

  // c[m][i] += x[m] . weight[row + i] for kLanes rows of the weight.
  template <int M> void lanes(int64_t row, float* c) const {
    constexpr int R = X::template together<kOne>(M);
    Int partial[M][kLanes];
    for (int i = 0; i < kLanes; i += R) {
      const uint8_t* p[R];
      const float *scales[R], *zeros[R];
      Vec total[M][R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t at = at_most(row + i + r, w.rows - 1);
        p[r] = w.packed + (at * w.cols + k) / 8 * B;
        scales[r] = w.scales + at * groups, zeros[r] = w.zeros + at * groups;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[m][r] = zero();
      }
      const int64_t whole = cols / kStrip, rest = cols % kStrip / kCodes;
      for (int64_t s = 0; s < whole; ++s) add<M, R>(p, scales, zeros, s, kLanes, per_strip, total);
      if (rest) add<M, R>(p, scales, zeros, whole, rest, at_most(per_strip, ceil_div(rest * kCodes, w.group)), total);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) partial[m][i + r] = as_int(total[m][r]);
    }
    add_lanes(partial, c);
  }

  // Strip s, of n units in `present` groups, for M rows of x and R rows of the weight.
  template <int M, int R>
  void add(const uint8_t* const (&p)[R], const float* const (&scales)[R], const float* const (&zeros)[R], int64_t s,
           int64_t n, int64_t present, Vec (&total)[M][R]) const {
    Int units[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = p[r] + s * kLanes * Unit<B>::kBytes;
      __builtin_prefetch(from + prefetch_ahead(R * w.cols / 8 * B));
      units[r] = read_once(Unit<B>::load(from, n));
    }
    Vec sum[M][R];
    x.template dots<M, R>(units, s, sum);
    const int64_t group = (k + s * kStrip) / w.group;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec scale = each_lanes_own(scales[r] + group, present);
      const Vec zero_point = each_lanes_own(zeros[r] + group, present);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec shifted = sum[m][r] - zero_point * x.template sum<M>(s, m);
        total[m][r] = fma(shifted, x.template times_factor<M>(scale, s, m), total[m][r]);
      }
    }
  }
};

// Whether code * x - zero * x may be split into two sums: for an infinity, or a number close to overflow, the
// difference could be NaN.
template <class T> bool is_moderate(const T* x, int64_t n) {
  Vec spoilt = zero();
  each_vector(n, [&](int64_t i, int64_t m) {
    const Vec v = load_upto(x + i, m) * set(1e6f);
    spoilt = spoilt + (v - v);   // not 0 for NaN and infinity
  });
  float lane[kLanes], all = 0;
  store(lane, spoilt);
  for (float s : lane) all += s;
  return all == 0;
}

// Adds the product of the columns [k, k + cols) to a block of C, from its row `first` on.
template <int B, class X>
void add_dots(const Block& b, int64_t first, const GroupWeight& w, int64_t k, int64_t cols, const X& x, int64_t rows,
              const Scratch& s) {
  const auto add = [&](const auto& dot) {
    each_lanes(b, w.rows, s, [&](int64_t row, float* c) {
      with_dot_rows(rows, [&](auto m) { dot.template lanes<decltype(m)::value>(row, c + first * Scratch::kCols); });
    });
  };
  if (w.group >= Unit<B>::kStrip) add(GroupDot<B, true, X>(w, k, cols, x));
  else add(GroupDot<B, false, X>(w, k, cols, x));
}

// Adds x W^T to a block of C with at most kDotRows rows, a part of a block of `all` rows. The columns are cut by `all`,
// so that a row has the same bits in any part.
template <int B, class T>
void accumulate_dot(const Block& b, int64_t all, const GroupWeight& w, const T* x, const Scratch& s) {
  const int64_t chunk = kDotCols / all / Unit<B>::kStrip * Unit<B>::kStrip;
  for (int64_t k = 0; k < w.cols; k += chunk) {
    const int64_t cols = at_most(chunk, w.cols - k);
    const GroupFloats<B> floats{s.panels, b.rows};
    floats.pack(x + b.row * w.cols + k, w.cols, cols);
    add_dots<B>(b, 0, w, k, cols, floats, b.rows, s);
  }
}

#if defined(PEFTOPS_DOT8)
// The same in int8, for codes of four bits and kInt8Rows rows at most. Rows of x that do not fit are done over.
template <class T, class Redo>
void accumulate_dot8(const Block& b, const GroupWeight& w, const T* x, const Scratch& s, const Redo& redo) {
  const auto add = [&](int64_t first, int64_t k, int64_t cols, const Bytes<0>& bytes) {
    add_dots<4>(b, first, w, k, cols, GroupBytes{bytes}, bytes.rows, s);
  };
  accumulate_bytes<0, false>(b, w.cols, x, 1, s, add, redo);
}
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
