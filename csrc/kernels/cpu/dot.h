// Dot products of a few rows of x with the rows of a quantised weight: the common part of all formats. Lanes run
// along the columns of the weight, so that a row's sum is spread over a vector until the end.
#pragma once
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kDotRows = 4;      // at more, decoding into a panel (product.h) is faster
constexpr int64_t kDotCols = 8192;   // elements of x that are packed at once: 32 KB, about what L1 holds

// How far ahead codes are prefetched. Rows of the weight that are read side by side lie one after the other, `bytes` in all,
// and the next ones follow. Short of 4 KB, less is under way than memory could deliver.
constexpr int64_t prefetch_ahead(int64_t bytes) { return bytes > 4096 ? bytes : 4096; }

// Calls f with a number of rows, at most kDotRows, as a constant.
template <int M> struct DotRows { static constexpr int value = M; };
template <int M = kDotRows, class F> void with_dot_rows(int64_t rows, const F& f) {
  if (rows == M) return f(DotRows<M>{});
  if constexpr (M > 1) with_dot_rows<M - 1>(rows, f);
}

// Calls f(row of the weight, columns of C for it and the next) for a block, kLanes rows at a time.
template <class F> void each_lanes(const Block& b, int64_t rows, const Scratch& s, const F& f) {
  for (int64_t row = b.col, j = 0; j < b.panels * 2 && row < rows; ++j, row += kLanes) f(row, s.c + j * kLanes);
}

// c[m][i] += the sum of the lanes of partial[m][i].
template <int M> void add_lanes(Int (&partial)[M][kLanes], float* c) {
  for (int m = 0; m < M; ++m) {
    transpose(partial[m]);
    Vec sum = load(c + m * Scratch::kCols);
    for (int i = 0; i < kLanes; ++i) sum = sum + as_float(partial[m][i]);
    store(c + m * Scratch::kCols, sum);
  }
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
