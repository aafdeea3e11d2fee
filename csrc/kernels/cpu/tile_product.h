// Products in fp32 of small matrices that lie in L1 or L2. product.h packs panels of a large matrix; here the matrices
// are used without packing.
//
//   c[i][j] = sum over t of a[i][t] * b[t][j]
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

// The factor that is read an element at a time. How far its rows are apart is known to the compiler, so that a
// step of the product moves one address for all of them.
template <int64_t kRow> struct Elements {
  const float* p;
  int64_t step;

  Elements down(int64_t rows) const { return {p + rows * kRow, step}; }
};
inline Elements<1> columns_of(const Tile& t) { return {t.p, t.ld}; }                      // a[i][t] = tile[t][i]
template <int64_t kLd> Elements<kLd> rows_of(const Tile& t) { return {t.p, 1}; }         // a[i][t] = tile[i][t]

// R rows and V vectors of c, in registers.
template <int R, int V, bool kAdd, int64_t kRow>
void tile_product(const Elements<kRow>& a, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc) {
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
      const Vec x = set(a.p[i * kRow + t * a.step]);
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
template <bool kAdd, int64_t kRow>
void multiply(int64_t rows, const Elements<kRow>& a, const Tile& b, int64_t steps, const Tile& c) {
  each_tile(rows, kTileRows, [&](int64_t i, int64_t n) {
    const Elements<kRow> from = a.down(i);
    int64_t j = 0;
    for (; j + 2 * kLanes <= c.ld; j += 2 * kLanes)
      tile_product_of<2, kAdd>(n, from, b.p + j, b.ld, steps, c.row(i) + j, c.ld);
    if (j < c.ld) tile_product_of<1, kAdd>(n, from, b.p + j, b.ld, steps, c.row(i) + j, c.ld);
  });
}

// A row of a tile: d elements in fp32, and zeros.
template <class T> void widen_row(const T* from, int64_t d, float* to, int64_t ld) {
  each_vector(d, [&](int64_t c, int64_t n) { store(to + c, load_upto(from + c, n)); });
  for (int64_t c = ceil_div(d, kLanes) * kLanes; c < ld; c += kLanes) store(to + c, zero());
}

// to[c][i] = factor * from[i][c], for the to.ld rows of `from`.
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
