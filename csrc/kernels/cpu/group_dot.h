// A few rows of x against a group-quantised weight, straight from the packed codes:
//
//   y = sum over groups of scale * (sum of code * x - zero * sum of x)
//
// so that a code costs a shift, a conversion and a multiply-add, and everything else a few instructions for
// each vector of units. Limit: reading the weight.
#pragma once
#include "kernels/cpu/dot.h"
#include "kernels/cpu/group_decode.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

template <int B> struct GroupDot {
  static constexpr int kCodes = Unit<B>::kCodes;
  static constexpr int64_t kStrip = Unit<B>::kStrip, kPacked = kStrip + kLanes;

  const GroupWeight& w;
  int64_t k, cols;    // of the piece of x
  const float* x;     // packed: [strips][M][kCodes + 1][kLanes]
  int64_t groups = w.cols / w.group;
  int64_t per_strip = w.group < kStrip ? kStrip / w.group : 1;
  Int which;          // each lane's group, counted from the strip's first
  Unit<B> unit;

  GroupDot(const GroupWeight& w, int64_t k, int64_t cols, const float* x) : w(w), k(k), cols(cols), x(x) {
    int32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = int32_t(i * kCodes / w.group);
    which = load_int(lane);
  }

  // Lane l of vector j of a strip holds column kCodes l + j; the last vector holds each lane's sum.
  template <class T> static void pack(const T* x, int64_t rows, int64_t ld, int64_t cols, float* out) {
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

  // Rows of the weight that share the loads of M rows of x.
  static constexpr int together(int M) { return M == 1 ? 1 : 4; }

  // c[m][i] += x[m] . weight[row + i] for kLanes rows of the weight.
  template <int M> void lanes(int64_t row, float* c) const {
    constexpr int R = together(M);
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
    const float* at = x + s * M * kPacked;
    Int units[R];
    Vec sum[M][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = p[r] + s * kLanes * Unit<B>::kBytes;
      __builtin_prefetch(from + 1024);
      units[r] = Unit<B>::load(from, n);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = zero();
    }
#pragma GCC unroll 8
    for (int j = 0; j < kCodes; ++j) {
      Vec code[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) code[r] = unit.code(units[r], j);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec v = load(at + m * kPacked + j * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[m][r] = fma(code[r], v, sum[m][r]);
      }
    }
    const int64_t group = (k + s * kStrip) / w.group;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec scale = permute(as_float(load_int_n(scales[r] + group, present)), which);
      const Vec zero_point = permute(as_float(load_int_n(zeros[r] + group, present)), which);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec shifted = sum[m][r] - zero_point * load(at + m * kPacked + kStrip);
        total[m][r] = fma(shifted, scale, total[m][r]);
      }
    }
  }
};

// Whether code * x - zero * x may be taken apart: an infinity would become a NaN, and so may what is close to one.
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

// Adds x W^T to a block of C that has kDotRows rows at most, and is part of one of `all` rows, by which the columns are
// cut: so a row has the same bits in any part.
template <int B, class T>
void accumulate_dot(const Block& b, int64_t all, const GroupWeight& w, const T* x, const Scratch& s) {
  using Dot = GroupDot<B>;
  const int64_t chunk = kDotCols / all / Dot::kStrip * Dot::kStrip;
  for (int64_t k = 0; k < w.cols; k += chunk) {
    const int64_t cols = at_most(chunk, w.cols - k);
    Dot::pack(x + b.row * w.cols + k, b.rows, w.cols, cols, s.panels);
    const Dot dot(w, k, cols, s.panels);
    for (int64_t col = b.col, j = 0; j < b.panels * 2 && col < w.rows; ++j, col += kLanes)
      with_dot_rows(b.rows, [&](auto m) { dot.template lanes<decltype(m)::value>(col, s.c + j * kLanes); });
  }
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
