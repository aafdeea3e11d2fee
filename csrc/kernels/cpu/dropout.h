// The mask of kernels/dropout.h, 64 columns of a row at a time.
#pragma once
#include "kernels/cpu/product.h"
#include "kernels/dropout.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

struct DropoutMask {
  uint64_t seed;
  uint32_t threshold;
  float factor;   // 1 / (1 - p)

  explicit DropoutMask(const Dropout& d)
      : seed(d.p > 0 ? uint64_t(*d.seed) : 0), threshold(uint32_t(d.p * 4294967296.0)), factor(float(1 / (1 - d.p))) {}

  // Bit i: does column 64 * group + i stay? Sixteen counters side by side, in plain loops that the
  // compiler turns into vectors.
  uint64_t keep(int64_t row, int64_t group) const {
    uint32_t word[4][16];
    for (int i = 0; i < 16; ++i) {
      word[0][i] = uint32_t(group * 16 + i);
      word[1][i] = uint32_t(row);
      word[2][i] = uint32_t(uint64_t(row) >> 32);
      word[3][i] = 0;
    }
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < 16; ++i) {
        const uint64_t a = uint64_t(kPhiloxMultiplier[0]) * word[0][i];
        const uint64_t b = uint64_t(kPhiloxMultiplier[1]) * word[2][i];
        word[0][i] = uint32_t(b >> 32) ^ word[1][i] ^ key[0];
        word[2][i] = uint32_t(a >> 32) ^ word[3][i] ^ key[1];
        word[1][i] = uint32_t(b);
        word[3][i] = uint32_t(a);
      }
      key[0] += kPhiloxWeyl[0];
      key[1] += kPhiloxWeyl[1];
    }
    uint64_t bits = 0;
    for (int w = 0; w < 4; ++w)
      for (int i = 0; i < 16; ++i) bits |= uint64_t(word[w][i] >= threshold) << (16 * w + i);
    return bits;
  }

  // Drops and scales x[0, n) in place; x[0] is column `col` of `row`.
  void apply(int64_t row, int64_t col, int64_t n, float* x) const {
    for (int64_t i = 0; i < n;) {
      const uint64_t bits = keep(row, (col + i) / 64);
      for (int64_t bit = (col + i) % 64; bit < 64 && i < n; ++bit, ++i)
        x[i] = bits >> bit & 1 ? x[i] * factor : 0.f;
    }
  }
};

// A source of rows, dropped.
template <class Left> struct DroppedRows {
  Left left;
  DropoutMask mask;

  void pack(int64_t row, int64_t rows, int64_t t, int64_t steps, float* out) const {
    left.pack(row, rows, t, steps, out);
    for (int64_t i = 0; i < rows; ++i) mask.apply(row + i, t, steps, out + i * kLeftStride);
  }
};

// A matrix as P, dropped: its rows are the steps.
template <int V, class T> struct DroppedMatrix {
  Matrix<V, T> right;
  DropoutMask mask;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    right.pack(col, t, steps, out);
    for (int64_t k = 0; k < steps; ++k) mask.apply(t + k, col, V * kLanes, out + k * V * kLanes);
  }
};

// Drops a block of C.
inline void drop(const DropoutMask& mask, const Block& b, int64_t cols, const Scratch& s) {
  for (int64_t i = 0; i < b.rows; ++i) mask.apply(b.row + i, b.col, at_most(Scratch::kCols, cols - b.col), s.c + i * Scratch::kCols);
}

// dropout'(v A), of the gradient of a linear layer whose low-rank term drops elements of x.
template <class Args> void add_dropped_term(const Args& a, const Block& b, const Scratch& s) {
  with_type(a.a_dtype, [&](auto t) {
    using A = typename decltype(t)::type;
    const int64_t cols = a.weight.cols;
    accumulate<2>(b, a.r, Rows<float>{a.v, a.r}, Matrix<2, A>{static_cast<const A*>(a.a), cols, cols, 1.f}, s);
    if (a.dropout.p > 0) drop(DropoutMask(a.dropout), b, cols, s);
  });
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
