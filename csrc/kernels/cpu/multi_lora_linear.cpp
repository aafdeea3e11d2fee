// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// Shrink and expand take their factors straight from the pages, with one register tile each: a few rows by
// four ranks, a few rows by four vectors of columns. One row or many, the loop is the same. Limit: reading the
// factors, once, for a row or two an adapter; multiply-adds for many. The gradient has rows enough to be a
// product of product.h.
#include "kernels/multi_lora_linear.h"
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// A tile has kLanes sums: of dot products, they are one transposition away from being one vector.
constexpr int kTileRanks = 4, kTileVectors = 4, kRows = kLanes / 4;
constexpr int64_t kTileCols = kTileVectors * kLanes;
constexpr int64_t kGroupRows = 16;     // rows that share a unit: with k = 4096 they and four ranks fill half of L2
constexpr int64_t kGroupCols = 512;    // columns of an expanding unit: long enough runs for the prefetchers
static_assert(kLoraLine % kTileCols == 0 && kGroupCols % kLoraLine == 0);

// One adapter's factor [r, k] in pages.
template <class T> struct Factor {
  const T* storage;
  const int32_t* pages;
  int shift;
  int64_t start, ld;

  Factor(const LoraPool& pool, const LoraSegment& s, int64_t k)
      : storage(static_cast<const T*>(pool.storage)), pages(s.pages), shift(pool.page_shift), start(s.start),
        ld(ceil_div(k, kLoraLine) * kLoraLine) {}

  // Element (rank, col) and those after it, to the end of their line.
  const T* line(int64_t rank, int64_t col) const {
    const int64_t e = start + rank * ld + col;
    return storage + (int64_t(pages[e >> shift]) << shift) + (e & ((int64_t(1) << shift) - 1));
  }
};

// Walks the segments, each of which falls into count(segment) units, and runs f(segment, first, last) for the
// part of [begin, end) that is in it. Returns how many units there are.
template <class Count, class F>
int64_t each_segment(const LoraSegments& segments, int64_t begin, int64_t end, const Count& count, const F& f) {
  int64_t units = 0;
  for (int64_t i = 0; i < segments.count; ++i) {
    const LoraSegment& s = segments.at[i];
    const int64_t n = count(s), first = begin > units ? begin - units : 0, last = at_most(n, end - units);
    if (first < last) f(s, first, last);
    units += n;
  }
  return units;
}

int64_t groups_of(const LoraSegment& s) { return ceil_div(s.end - s.begin, kGroupRows); }

// Runs f(rows of order, how many) for each tile of a group of rows.
template <class F> void each_row_tile(const LoraSegments& segments, const LoraSegment& s, int64_t group, const F& f) {
  const int64_t begin = s.begin + group * kGroupRows, rows = at_most(kGroupRows, s.end - begin);
  each_tile(rows, kRows, [&](int64_t i, int64_t n) { f(segments.order + begin + i, n); });
}

// sums[i * kTileRanks + j] = x_i . F_(rank + j) for M rows; ranks past the last repeat it.
template <int M, class X, class T>
void dot_tile(const MultiLoraShrink& a, const int64_t* rows, const Factor<T>& f, int64_t rank, int64_t r, float* sums) {
  const X* x[M];
  Vec sum[M][kTileRanks];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    x[i] = static_cast<const X*>(a.x) + rows[i] * a.k;
#pragma GCC unroll 4
    for (int j = 0; j < kTileRanks; ++j) sum[i][j] = zero();
  }
  for (int64_t c = 0; c < a.k; c += kLoraLine) {
    const T* line[kTileRanks];
#pragma GCC unroll 4
    for (int j = 0; j < kTileRanks; ++j) line[j] = f.line(at_most(rank + j, r - 1), c);
    each_vector(at_most(kLoraLine, a.k - c), [&](int64_t t, int64_t n) {
      Vec w[kTileRanks];
#pragma GCC unroll 4
      for (int j = 0; j < kTileRanks; ++j) w[j] = load(line[j] + t);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const Vec v = load_upto(x[i] + c + t, n);
#pragma GCC unroll 4
        for (int j = 0; j < kTileRanks; ++j) sum[i][j] = fma(v, w[j], sum[i][j]);
      }
    });
  }
  Int square[kLanes] = {};
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kTileRanks; ++j) square[i * kTileRanks + j] = as_int(sum[i][j]);
  transpose(square);
  Vec total = as_float(square[0]);
  for (int i = 1; i < kLanes; ++i) total = total + as_float(square[i]);
  store(sums, total);
}

// y_i += scale * u_i F for M rows and up to kTileCols columns from col on.
template <int M, class Y, class T>
void expand_tile(const MultiLoraExpand& a, const int64_t* rows, const Factor<T>& f, int64_t col, const LoraSegment& s) {
  const float* u[M];
  Vec sum[M][kTileVectors];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    u[i] = a.u + rows[i] * a.ldu;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = zero();
  }
  for (int64_t j = 0; j < s.r; ++j) {
    const T* line = f.line(j, col);
    Vec w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) w[v] = load(line + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const Vec x = set(u[i][j]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] = fma(x, w[v], sum[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    Y* y = static_cast<Y*>(a.y) + rows[i] * a.k + col;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t n = at_most(kLanes, a.k - col - v * kLanes);
      if (n > 0) store_upto(y + v * kLanes, n, fma(sum[i][v], set(s.scale), load_upto(y + v * kLanes, n)));
    }
  }
}

// Calls f with the number of rows of a tile as a type: f(Rows<M>).
template <int M> struct TileOf { static constexpr int rows = M; };
template <int M = kRows, class F> void with_rows(int64_t rows, const F& f) {
  if (rows == M) return f(TileOf<M>{});
  if constexpr (M > 1) with_rows<M - 1>(rows, f);
}

template <class X, class T> int64_t shrink(const MultiLoraShrink& a, int64_t begin, int64_t end) {
  const auto tiles = [](const LoraSegment& s) { return ceil_div(s.r, kTileRanks); };
  const auto count = [&](const LoraSegment& s) { return groups_of(s) * tiles(s); };
  return each_segment(a.segments, begin, end, count, [&](const LoraSegment& s, int64_t first, int64_t last) {
    const Factor<T> f(a.pool, s, a.k);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t rank = unit % tiles(s) * kTileRanks, ranks = at_most(kTileRanks, s.r - rank);
      each_row_tile(a.segments, s, unit / tiles(s), [&](const int64_t* rows, int64_t n) {
        float sums[kLanes];
        with_rows(n, [&](auto tile) { dot_tile<decltype(tile)::rows, X>(a, rows, f, rank, s.r, sums); });
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < ranks; ++j) a.u[rows[i] * a.ldu + rank + j] = s.scale * sums[i * kTileRanks + j];
      });
    }
  });
}

template <class Y, class T> int64_t expand(const MultiLoraExpand& a, int64_t begin, int64_t end) {
  const int64_t blocks = ceil_div(a.k, kGroupCols);
  const auto count = [&](const LoraSegment& s) { return groups_of(s) * blocks; };
  return each_segment(a.segments, begin, end, count, [&](const LoraSegment& s, int64_t first, int64_t last) {
    const Factor<T> f(a.pool, s, a.k);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t col = unit % blocks * kGroupCols, stop = at_most(a.k, col + kGroupCols);
      for (int64_t c = col; c < stop; c += kTileCols)
        each_row_tile(a.segments, s, unit / blocks, [&](const int64_t* rows, int64_t n) {
          with_rows(n, [&](auto tile) { expand_tile<decltype(tile)::rows, Y>(a, rows, f, c, s); });
        });
    }
  });
}

// The two sides of the gradient as product.h reads them: the listed rows of u as columns of A, and of x as
// rows of P, times a factor.
struct ListedColumns {
  const float* u;
  const int64_t* rows;
  int64_t ld;

  void pack(int64_t rank, int64_t ranks, int64_t t, int64_t steps, float* out) const {
    for (int64_t k = 0; k < steps; ++k)
      for (int64_t i = 0; i < ranks; ++i) out[i * kLeftStride + k] = u[rows[t + k] * ld + rank + i];
  }
};
template <class X> struct ListedRows {
  const X* x;
  const int64_t* rows;
  int64_t cols;
  float factor;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    for (int64_t k = 0; k < steps; ++k)
      Matrix<2, X>{x + rows[t + k] * cols, cols, cols, factor}.pack(col, 0, 1, out + k * 2 * kLanes);
  }
};

}  // namespace

int64_t multi_lora_shrink(const MultiLoraShrink& a, int64_t begin, int64_t end, void*) {
  int64_t units = 0;
  with_type(a.x_dtype, [&](auto x) {
    with_type(a.pool.dtype, [&](auto t) {
      units = shrink<typename decltype(x)::type, typename decltype(t)::type>(a, begin, end);
    });
  });
  return units;
}

int64_t multi_lora_expand(const MultiLoraExpand& a, int64_t begin, int64_t end, void*) {
  int64_t units = 0;
  with_type(a.y_dtype, [&](auto y) {
    with_type(a.pool.dtype, [&](auto t) {
      units = expand<typename decltype(y)::type, typename decltype(t)::type>(a, begin, end);
    });
  });
  return units;
}

int64_t multi_lora_gradient(const MultiLoraGradient& a, int64_t begin, int64_t end, void* memory) {
  const Scratch scratch(memory);
  const auto count = [&](const LoraSegment& s) { return Units<2>(s.r, a.k).count(); };
  return each_segment(a.segments, begin, end, count, [&](const LoraSegment& s, int64_t first, int64_t last) {
    const int64_t* rows = a.segments.order + s.begin;
    float* d = a.d + s.start;
    Units<2>(s.r, a.k).each(first, last, scratch, [&](const Block& b) {
      with_type(a.x_dtype, [&](auto t) {
        using X = typename decltype(t)::type;
        accumulate<2>(b, s.end - s.begin, ListedColumns{a.u, rows, a.ldu},
                      ListedRows<X>{static_cast<const X*>(a.x), rows, a.k, s.scale}, scratch);
      });
      write<2>(b, scratch, a.k, [&](int64_t i, int64_t j, int64_t n, Vec sum) {
        if (a.by_rank) return store_upto(d + i * a.k + j, n, sum);
        float column[kLanes];
        store(column, sum);
        for (int64_t l = 0; l < n; ++l) d[(j + l) * s.r + i] = column[l];
      });
    });
  });
}

}  // namespace peftops::cpu::PEFTOPS_ISA
