// Products of matrices that lie in L1 or L2 as they are, in fp32: where product.h packs panels of something
// large, this takes the few rows of something small, by any stride.
//
//   c[i][j] = sum over t of a[i * a_row + t * a_step] * b[t][j]
//
// Rows of b and c are padded to whole vectors, so that there are no tails. The sum runs over t in order.
#pragma once
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// A matrix in scratch; `ld` is a multiple of kLanes.
struct Tile {
  float* p;
  int64_t ld;

  float* row(int64_t i) const { return p + i * ld; }
};

// One factor, which is read an element at a time.
struct Elements {
  const float* p;
  int64_t row, step;
};
inline Elements as_rows(const Tile& t) { return {t.p, t.ld, 1}; }
inline Elements as_columns(const Tile& t) { return {t.p, 1, t.ld}; }

// R rows and V vectors of c, in registers.
template <int R, int V, bool kAdd> void tile_product(const Elements& a, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = zero();
  for (int64_t t = 0; t < steps; ++t) {
    Vec row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(b + t * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec x = set(a.p[i * a.row + t * a.step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = c + i * ldc + v * kLanes;
      store(at, kAdd ? load(at) + sum[i][v] : sum[i][v]);
    }
}

template <int V, bool kAdd, int R = kTileRows, class... Rest> void tile_product_of(int64_t rows, const Rest&... rest) {
  if (rows == R) return tile_product<R, V, kAdd>(rest...);
  if constexpr (R > 1) tile_product_of<V, kAdd, R - 1>(rows, rest...);
}

// The first `rows` rows of c; the product is added to what they hold if kAdd.
template <bool kAdd> void multiply(int64_t rows, const Elements& a, const Tile& b, int64_t steps, const Tile& c) {
  each_tile(rows, kTileRows, [&](int64_t i, int64_t n) {
    const Elements from{a.p + i * a.row, a.row, a.step};
    int64_t j = 0;
    for (; j + 2 * kLanes <= c.ld; j += 2 * kLanes)
      tile_product_of<2, kAdd>(n, from, b.p + j, b.ld, steps, c.row(i) + j, c.ld);
    if (j < c.ld) tile_product_of<1, kAdd>(n, from, b.p + j, b.ld, steps, c.row(i) + j, c.ld);
  });
}

// Row i of a tile: d elements in fp32, and zeros.
template <class T> void widen_row(const T* from, int64_t d, const Tile& to, int64_t i) {
  each_vector(d, [&](int64_t c, int64_t n) { store(to.row(i) + c, load_upto(from + c, n)); });
  for (int64_t c = ceil_div(d, kLanes) * kLanes; c < to.ld; c += kLanes) store(to.row(i) + c, zero());
}

// to[c][i] = factor * from[i][c], for to.ld rows of `from`.
inline void transpose_tile(const Tile& from, float factor, const Tile& to) {
  for (int64_t i = 0; i < to.ld; i += kLanes)
    for (int64_t c = 0; c < from.ld; c += kLanes) {
      Int square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = as_int(load(from.row(i + l) + c) * set(factor));
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store_int(to.row(c + l) + i, square[l]);
    }
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
