// Compiled once for each of the builds of cpu/kernel.h.
//
// The same thread makes a row's u and uses it, so a decoding step reads x, both factors and y once, without waiting in
// between. Both products read their factors directly from the pages, with one register tile each: a few rows by four
// ranks, and a few rows by four vectors of columns. The loop is the same for one row and for many. Limit: reading the
// factors once, for a row or two per adapter; multiply-adds for many rows. The gradient has enough rows for the product
// of product.h.
#include "kernels/multi_lora_linear.h"
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// A tile has kLanes sums: of dot products, they are one transposition away from being one vector.
constexpr int kTileRanks = 4, kTileVectors = 4, kRows = kLanes / 4;
constexpr int64_t kTileCols = kTileVectors * kLanes;
constexpr int64_t kGroupRows = 16;     // rows that share a unit: with k = 4096 they and four ranks fill half of L2
constexpr int64_t kPartCols = 512;     // columns of a unit: few enough to share one row out to many threads
static_assert(kLoraLine % kTileCols == 0 && kPartCols % kTileCols == 0);
static_assert(kGroupRows * kLoraMaxRank * 4 <= kScratchBytes);

// One adapter's factor [r, k] in pages.
template <class T> struct Factor {
  const T* storage;
  const int32_t* pages;
  int shift;
  int64_t start, ld;

  Factor(const LoraPool& pool, const LoraSegment& s, int64_t start, int64_t cols)
      : storage(static_cast<const T*>(pool.storage)), pages(s.pages), shift(pool.page_shift), start(start),
        ld(ceil_div(cols, kLoraLine) * kLoraLine) {}

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

// Up to kGroupRows rows of one segment.
struct Group {
  const int64_t* rows;
  int64_t count;

  // f(where it begins in the group, how many rows) for each tile.
  template <class F> void each(const F& f) const { each_tile(count, kRows, f); }
};

// sums[i * kTileRanks + j] = x_i . F_(rank + j) for M rows; ranks past the last repeat it.
template <int M, class X, class T>
void dot_tile(const MultiLoraAdd& a, const int64_t* rows, const Factor<T>& f, int64_t rank, int64_t r, float* sums) {
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

// y_i += scale * u_i G for M rows and up to kTileCols columns from col on; u is [M, r].
template <int M, class Y, class T>
void expand_tile(const MultiLoraAdd& a, const LoraSegment& s, const int64_t* rows, const float* u, const Factor<T>& f,
                 int64_t col) {
  Vec sum[M][kTileVectors];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = zero();
  for (int64_t j = 0; j < s.r; ++j) {
    const T* line = f.line(j, col);
    Vec w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) w[v] = load(line + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const Vec x = set(u[i * s.r + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] = fma(x, w[v], sum[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    Y* y = static_cast<Y*>(a.y) + rows[i] * a.n + col;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t n = at_most(kLanes, a.n - col - v * kLanes);
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

// u = x F^T for a group, [rows, r].
template <class X, class T>
void shrink(const MultiLoraAdd& a, const Group& g, const Factor<T>& f, int64_t r, float* u) {
  for (int64_t rank = 0; rank < r; rank += kTileRanks)
    g.each([&](int64_t begin, int64_t rows) {
      float sums[kLanes];
      with_rows(rows, [&](auto tile) { dot_tile<decltype(tile)::rows, X>(a, g.rows + begin, f, rank, r, sums); });
      for (int64_t i = 0; i < rows; ++i)
        memcpy(u + (begin + i) * r + rank, sums + i * kTileRanks, at_most(kTileRanks, r - rank) * sizeof(float));
    });
}

// y += s u G for a group and the columns [col, stop).
template <class Y, class T>
void expand(const MultiLoraAdd& a, const LoraSegment& s, const Group& g, const float* u, const Factor<T>& f,
            int64_t col, int64_t stop) {
  for (; col < stop; col += kTileCols)
    g.each([&](int64_t begin, int64_t rows) {
      with_rows(rows, [&](auto tile) {
        expand_tile<decltype(tile)::rows, Y>(a, s, g.rows + begin, u + begin * s.r, f, col);
      });
    });
}

// A unit is a group of rows and a part of the columns of y. A thread makes u of a group for all parts of the group that
// it does. If two threads share a group, both make u, which takes less time than waiting for each other.
template <class X, class T> int64_t add(const MultiLoraAdd& a, int64_t begin, int64_t end, float* u) {
  const int64_t parts = ceil_div(a.n, kPartCols);
  const auto count = [&](const LoraSegment& s) { return ceil_div(s.end - s.begin, kGroupRows) * parts; };
  return each_segment(a.segments, begin, end, count, [&](const LoraSegment& s, int64_t first, int64_t last) {
    const Factor<T> f(a.pool, s, s.first, a.k), g(a.pool, s, s.second, a.n);
    for (int64_t unit = first, next; unit < last; unit = next) {
      const int64_t row = s.begin + unit / parts * kGroupRows, part = unit % parts;
      next = at_most(last, unit - part + parts);
      const Group group{a.segments.order + row, at_most(kGroupRows, s.end - row)};
      shrink<X>(a, group, f, s.r, u);
      if (part == 0)
        for (int64_t i = 0; i < group.count; ++i) memcpy(a.u + group.rows[i] * a.ldu, u + i * s.r, s.r * sizeof(float));
      expand<X>(a, s, group, u, g, part * kPartCols, at_most(a.n, (part + next - unit) * kPartCols));
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

int64_t multi_lora_add(const MultiLoraAdd& a, int64_t begin, int64_t end, void* scratch) {
  int64_t units = 0;
  with_type(a.dtype, [&](auto x) {
    with_type(a.pool.dtype, [&](auto t) {
      units = add<typename decltype(x)::type, typename decltype(t)::type>(a, begin, end, static_cast<float*>(scratch));
    });
  });
  return units;
}

int64_t multi_lora_gradient(const MultiLoraGradient& a, int64_t begin, int64_t end, void* memory) {
  const Scratch scratch(memory);
  const auto count = [&](const LoraSegment& s) { return Units<2>(s.r, a.k).count(); };
  return each_segment(a.segments, begin, end, count, [&](const LoraSegment& s, int64_t first, int64_t last) {
    const int64_t* rows = a.segments.order + s.begin;
    float* d = a.d + s.first;
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
