// C[i][j] += sum over t of A[i][t] * P[t][j], in fp32: every linear kernel uses this product. Kernels differ in the
// source of A's rows and P's columns, and in the code that packs them:
//
//   A (left)   rows of activations or gradients   pack(row, rows, t, steps, out)   out[i * kLeftStride + k]
//   P (right)  a panel of V vectors of columns    pack(col, t, steps, out)         out[k * V * kLanes + j]
//
// A panel is packed once (decoded, for a quantised weight) and stays in L2 while all rows of a block
// pass over it; a tile of A stays in L1 while it meets the panels; a tile of C stays in registers for
// kDepth steps. The sum for one element of C runs over t in order, kDepth at a time. It does not depend on the number
// of threads or of neighbours: same input, same bits.
#pragma once
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

#if defined(__AVX512F__) || defined(PEFTOPS_NEON)
constexpr int kTileRows = 14;   // x 2 vectors = 28 of 32 registers hold C; 2 hold P, 1 an element of A
#elif defined(__AVX2__)
constexpr int kTileRows = 6;    // x 2 = 12 of 16 registers
#else
constexpr int kTileRows = 4;
#endif
constexpr int64_t kDepth = 256;                    // steps between two visits to C: 14 KB of A in L1
constexpr int64_t kLeftStride = kDepth + kLanes;   // rows of A must not fall on one cache set
constexpr int64_t kPanels = 8;                     // side by side, so that A is packed once for all
constexpr int64_t kRowBlock = 256;                 // rows a panel serves: decoding costs about 4 in 256

// The scratch of one task. C and the panels share L2: half a megabyte with AVX-512, half of that with AVX2.
struct Scratch {
  static constexpr int64_t kCols = kPanels * 2 * kLanes;

  float* c;        // [kRowBlock][kCols]
  float* panels;   // [kPanels][kDepth][2 * kLanes]
  float* left;     // [kTileRows][kLeftStride]

  explicit Scratch(void* p)
      : c(static_cast<float*>(p)), panels(c + kRowBlock * kCols), left(panels + kDepth * kCols) {}
};
static_assert(4 * (kRowBlock * Scratch::kCols + kDepth * Scratch::kCols + kTileRows * kLeftStride) <= kScratchBytes);

// One piece of the result: `rows` rows from `row`, and `panels` panels of columns from `col`.
struct Block { int64_t row, rows, col, panels; };

// R rows and V vectors of C, in registers.
template <int R, int V> void tile(const float* a, const float* p, int64_t steps, float* c) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = zero();
  for (int64_t t = 0; t < steps; ++t) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(p + (t * V + v) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec x = set(a[i * kLeftStride + t]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = fma(x, b[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = c + i * Scratch::kCols + v * kLanes;
      store(at, sum[i][v] + load(at));
    }
}

template <int V, int R = kTileRows>
void tile_of(int64_t rows, const float* a, const float* p, int64_t steps, float* c) {
  if (rows == R) return tile<R, V>(a, p, steps, c);
  if constexpr (R > 1) tile_of<V, R - 1>(rows, a, p, steps, c);
}

// Cuts rows into tiles of nearly one size: 16 are 8 + 8 and not 14 + 2.
template <class F> void each_tile(int64_t rows, int64_t most, const F& f) {
  const int64_t tiles = ceil_div(rows, most);
  for (int64_t i = 0; i < tiles; ++i) f(rows * i / tiles, rows * (i + 1) / tiles - rows * i / tiles);
}

// Adds the product over `depth` steps to a block of C.
template <int V, class Left, class Right>
void accumulate(const Block& b, int64_t depth, const Left& left, const Right& right, const Scratch& s) {
  constexpr int64_t kWidth = V * kLanes;
  for (int64_t t = 0; t < depth; t += kDepth) {
    const int64_t steps = at_most(kDepth, depth - t);
    for (int64_t j = 0; j < b.panels; ++j)
      right.pack(b.col + j * kWidth, t, steps, s.panels + j * kDepth * kWidth);
    each_tile(b.rows, kTileRows, [&](int64_t row, int64_t rows) {
      left.pack(b.row + row, rows, t, steps, s.left);
      for (int64_t j = 0; j < b.panels; ++j)
        tile_of<V>(rows, s.left, s.panels + j * kDepth * kWidth, steps,
                   s.c + row * Scratch::kCols + j * kWidth);
    });
  }
}

// The result cut into units of work: blocks of rows, and in each the panels of V vectors of columns.
template <int V> struct Units {
  int64_t rows, row_blocks, panels;

  Units(int64_t rows, int64_t cols, int64_t row_block = kRowBlock)
      : rows(rows), row_blocks(ceil_div(rows, row_block)), panels(ceil_div(cols, V * kLanes)) {}
  int64_t count() const { return row_blocks * panels; }

  // Runs f(block), with a zeroed C, over the units [begin, end): up to kPanels neighbours at a time.
  template <class F> void each(int64_t begin, int64_t end, const Scratch& s, const F& f) const {
    while (begin < end) {
      const int64_t row_block = begin / panels, panel = begin % panels;
      const int64_t n = at_most(kPanels, at_most(end - begin, panels - panel));
      const int64_t row = rows * row_block / row_blocks, stop = rows * (row_block + 1) / row_blocks;
      memset(s.c, 0, (stop - row) * Scratch::kCols * sizeof(float));
      f(Block{row, stop - row, panel * V * kLanes, n});
      begin += n;
    }
  }
};

// Repeats the rows of a block that a product in narrower numbers could not hold, with another product: redo(rows,
// scratch) for each run of neighbouring rows, with a zeroed C.
template <class Redo> void do_over(const Block& b, const bool* fits, const Scratch& s, const Redo& redo) {
  for (int64_t i = 0, end; i < b.rows; i = end) {
    for (end = i + 1; end < b.rows && fits[end] == fits[i];) ++end;
    if (fits[i]) continue;
    Scratch at = s;
    at.c += i * Scratch::kCols;
    memset(at.c, 0, (end - i) * Scratch::kCols * sizeof(float));
    redo(Block{b.row + i, end - i, b.col, b.panels}, at);
  }
}

template <class F> void each_vector(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes) f(i, at_most(kLanes, n - i));
}
template <class T> Vec load_upto(const T* p, int64_t n) { return n == kLanes ? load(p) : load_n(p, n); }
template <class T> void store_upto(T* p, int64_t n, Vec a) { n == kLanes ? store(p, a) : store_n(p, n, a); }

// Rows of a row-major matrix as A.
template <class T> struct Rows {
  const T* p;
  int64_t ld;

  void pack(int64_t row, int64_t rows, int64_t t, int64_t steps, float* out) const {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = p + (row + i) * ld + t;
      float* to = out + i * kLeftStride;
      each_vector(steps, [&](int64_t k, int64_t n) { store(to + k, load_upto(from + k, n)); });
    }
  }
};

// The rows of a row-major [cols, depth] matrix as columns of P, times a factor: P[t][j] = f * p[j][t].
template <int V, class T> struct Columns {
  const T* p;
  int64_t cols, ld;
  float factor;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    for (int v = 0; v < V; ++v, col += kLanes)
      each_vector(steps, [&](int64_t k, int64_t n) {
        Int square[kLanes] = {};
        for (int i = 0; i < kLanes && col + i < cols; ++i)
          square[i] = as_int(load_upto(p + (col + i) * ld + t + k, n) * set(factor));
        transpose(square);
        for (int64_t i = 0; i < n; ++i) store_int(out + ((k + i) * V + v) * kLanes, square[i]);
      });
  }
};

// A row-major [depth, cols] matrix as P, as it lies, times a factor.
template <int V, class T> struct Matrix {
  const T* p;
  int64_t cols, ld;
  float factor;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    for (int64_t k = 0; k < steps; ++k)
      for (int v = 0; v < V; ++v) {
        const int64_t j = col + v * kLanes, n = at_most(kLanes, cols - j);
        const Vec row = n > 0 ? load_upto(p + (t + k) * ld + j, n) : zero();
        store(out + (k * V + v) * kLanes, row * set(factor));
      }
  }
};

// Hands out a finished block of C, of a result with `cols` columns: f(row, col, n, sum) for the n <= kLanes
// elements from (row, col) on.
template <int V, class F> void write(const Block& b, const Scratch& s, int64_t cols, const F& f) {
  const int64_t width = at_most(b.panels * V * kLanes, cols - b.col);
  for (int64_t i = 0; i < b.rows; ++i)
    each_vector(width, [&](int64_t j, int64_t n) { f(b.row + i, b.col + j, n, load(s.c + i * Scratch::kCols + j)); });
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
