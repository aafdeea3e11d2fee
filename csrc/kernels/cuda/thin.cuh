// The thin products of low-rank adapters, a tile of 16 rows or of 64 columns a block of threads, on tensor cores with
// the precision of fp32 (tf32.cuh). Operands go from memory straight into fragments. Limit: reading x, or y and writing
// it; with a rank of up to 32 each is read once.
//
// All of them cut columns into chunks of 64, of which thread t of a quad has the columns 16 q + 4 t + i (q and i < 4):
// a quad then moves whole sectors, and one draw of Philox decides on four of a thread's columns. In which order columns
// are summed, or which column of a fragment they are, does not matter as long as both operands agree.
//
// The warps of a block of threads share what is summed, and their sums are added in order: the same bits every time.
// The grid counts rows, or what a gradient has for columns, along x, which is the long one. A sum of few results is
// divided among blocks of threads as well (Share), and add_parts adds up theirs.
//
// A chunk's loads are all asked for before the first is used: branches on types and edges are around them, not between.
// The caller tells where rows and factors lie: dense, or in the pages of many adapters.
#pragma once
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/few.cuh"
#include "kernels/cuda/tf32.cuh"

namespace peftops::cuda {

constexpr int kThinThreads = 256, kThinWarps = kThinThreads / kWarp;
constexpr int kThinRows = 16, kThinCols = 64;
constexpr int kExpandCols = kThinCols * kThinWarps;   // of a block of threads

// f(pointer) to the elements of a factor, whose type is known at run time.
template <class F> __device__ void with_elements(const void* p, DType dtype, const F& f) {
  if (dtype == DType::f32) f(static_cast<const float*>(p));
  else if (dtype == DType::bf16) f(static_cast<const __nv_bfloat16*>(p));
  else f(static_cast<const __half*>(p));
}

// Where a row of a factor has a chunk of columns: its first element, and how many columns there are from it on. A row
// beyond the rank has none, and the place of one that exists.
struct FactorLine { int64_t at, columns; };

// The share of a sum that a block of threads does: number `index` of `count`.
struct Share { int64_t index = 0, count = 1; };

template <class T> constexpr bool kExact = sizeof(T) == 2;

struct ThinLane {
  int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
};

// A thread's columns of a chunk, of one line of a factor for every tile. A factor has its elements at f.f, those of
// neighbouring columns f.stride apart, and f.wide if four neighbours can be read at once.
template <int Tiles, class Factor>
__device__ void load_factor(Few<4> (&to)[4][Tiles], const Factor& f, const FactorLine (&line)[Tiles], bool whole, int t) {
  with_elements(f.f, f.dtype, [&](const auto* p) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) to[q][tile] = {};
    if (whole && f.wide) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile)
          if (line[tile].columns) to[q][tile].load(p + line[tile].at + 16 * q + 4 * t);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = 16 * q + 4 * t + i;
            if (at < line[tile].columns) to[q][tile].at[i] = to_float(p[line[tile].at + at * f.stride]);
          }
    }
  });
}

// u = x F^T for 16 rows of x and 8 * Tiles ranks from `rank` on. row(i): the i-th row's place in x, or -1.
// Calls result(i, rank, sum).
template <int Tiles> struct ShrinkMemory { float2 sums[kThinWarps][kThinRows][4 * Tiles + 4]; };

template <class X, int Tiles, class Row, class Factor, class Result>
__device__ void shrink_tile(const X* x, int64_t k, bool wide, const Row& row, const Factor& f, int64_t rank,
                            const DropoutMask& mask, ShrinkMemory<Tiles>& memory, const Result& result, Share share = {}) {
  const ThinLane lane;
  // In place of rows that do not exist it reads the first, which is in L1: their sums are not used.
  const int64_t rows[2] = {row(lane.g), row(lane.g + 8)}, present = row(0);
  const int64_t apart = share.count * (kThinWarps * kThinCols);
  float sum[Tiles][4] = {};
#pragma unroll 1
  for (int64_t chunk = (share.index * kThinWarps + lane.warp) * kThinCols; chunk < k; chunk += apart) {
    const int64_t first = chunk + 4 * lane.t;
    const bool whole = chunk + kThinCols <= k;
    Few<4> of_row[4][2], of_factor[4][Tiles];
    if (whole && wide) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int h = 0; h < 2; ++h) of_row[q][h].load(x + (rows[h] < 0 ? present : rows[h]) * k + first + 16 * q);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (rows[h] >= 0) of_row[q][h].load(x + rows[h] * k + first + 16 * q, k - first - 16 * q);
    }
    FactorLine line[Tiles];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) line[tile] = f.line(rank + 8 * tile + lane.g, chunk);
    load_factor(of_factor, f, line, whole, lane.t);
    const uint32_t keep[2] = {mask.keeps<4>(rows[0], first), mask.keeps<4>(rows[1], first)};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int h = 0; h < 2; ++h) of_row[q][h].keep(keep[h] >> 4 * q);
      Left left[2];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[s].set(i, of_row[q][i % 2].at[2 * s + i / 2], kExact<X>);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          Right right;
#pragma unroll
          for (int i = 0; i < 2; ++i) right.set(i, of_factor[q][tile].at[2 * s + i], f.exact());
          multiply(sum[tile], left[s], kExact<X>, right, f.exact());
        }
    }
  }
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      memory.sums[lane.warp][lane.g + 8 * h][4 * tile + lane.t] = make_float2(sum[tile][2 * h], sum[tile][2 * h + 1]);
  __syncthreads();
  for (int e = threadIdx.x; e < kThinRows * 8 * Tiles; e += kThinThreads) {
    const int i = e / (8 * Tiles), j = e % (8 * Tiles);
    if (row(i) < 0) continue;
    float total = 0.f;
#pragma unroll
    for (const auto& of_warp : memory.sums) total += reinterpret_cast<const float*>(of_warp[i])[j];
    result(i, rank + j, total);
  }
}

// y += dropout(u F) for 16 rows and a warp's 64 columns. u(row, j): zero beyond the rank.
template <class Y, class Row, class Intermediate, class Factor>
__device__ void expand_tile(Y* y, int64_t k, bool wide, const Row& row, const Intermediate& u, int64_t r,
                            const Factor& f, const DropoutMask& mask) {
  const ThinLane lane;
  const int64_t chunk = (int64_t(blockIdx.y) * kThinWarps + lane.warp) * kThinCols, first = chunk + 4 * lane.t;
  if (chunk >= k) return;
  const int64_t rows[2] = {row(lane.g), row(lane.g + 8)};
  const bool whole = chunk + kThinCols <= k;
  float sum[8][4] = {};
#pragma unroll 1
  for (int64_t j = lane.t; j < r + lane.t; j += 8) {
    float of_u[4], of_factor[8][2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) of_u[i] = rows[i % 2] < 0 ? 0.f : u(rows[i % 2], j + i / 2 * 4);
    const FactorLine line[2] = {f.line(j, chunk), f.line(j + 4, chunk)};
    with_elements(f.f, f.dtype, [&](const auto* p) {
#pragma unroll
      for (int tile = 0; tile < 8; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = 16 * (tile / 2) + 2 * (tile % 2) + lane.g / 2 * 4 + lane.g % 2;
          if (whole || at < line[h].columns) of_factor[tile][h] = to_float(p[line[h].at + at * f.stride]);
        }
    });
    Left left;
#pragma unroll
    for (int i = 0; i < 4; ++i) left.set(i, of_u[i], false);
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      Right right;
#pragma unroll
      for (int h = 0; h < 2; ++h) right.set(h, line[h].columns ? of_factor[tile][h] : 0.f, f.exact());
      multiply(sum[tile], left, false, right, f.exact());
    }
  }
  Few<4> value[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (rows[h] >= 0) {
      if (whole && wide) {
#pragma unroll
        for (int q = 0; q < 4; ++q) value[h][q].load(y + rows[h] * k + first + 16 * q);
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) value[h][q].load(y + rows[h] * k + first + 16 * q, k - first - 16 * q);
      }
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (rows[h] < 0) continue;
    const uint32_t keep = mask.keeps<4>(rows[h], first);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t col = first + 16 * q;
      if (col >= k) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float add = sum[2 * q + i / 2][2 * h + i % 2];
        if (keep >> (4 * q + i) & 1) value[h][q].at[i] += mask.threshold ? __fmul_rn(add, mask.factor) : add;
      }
      value[h][q].store(y + rows[h] * k + col, k - col, wide);
    }
  }
}

// d = u^T dropout(x) over `count` rows, without dropout's factor, for 64 columns and 16 * Tiles ranks from `rank` on.
// Calls result(rank, col, sum) for four neighbouring columns at a time.
struct GradientMemory { float4 sums[kThinWarps][16][kThinCols / 4 + 4]; };

template <class X, int Tiles, class Row, class Intermediate, class Result>
__device__ void gradient_tile(const X* x, int64_t k, bool wide, const Row& row, int64_t count, const Intermediate& u,
                              int64_t rank, const DropoutMask& mask, GradientMemory& memory, const Result& result,
                              Share share = {}) {
  const ThinLane lane;
  const int64_t chunk = int64_t(blockIdx.x) * kThinCols, first = chunk + 2 * lane.g;
  const bool whole = chunk + kThinCols <= k;
  float sum[Tiles][8][4] = {};
#pragma unroll 1
  for (int64_t i = 8 * (share.index * kThinWarps + lane.warp); i < count; i += 8 * kThinWarps * share.count) {
    int64_t rows[2];
    Few<2> value[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = i + lane.t + 4 * h;
      rows[h] = at < count ? row(at) : -1;
    }
    if (whole && wide) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int q = 0; q < 4; ++q) value[h][q].load(x + (rows[h] < 0 ? 0 : rows[h]) * k + first + 16 * q);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          if (rows[h] >= 0) value[h][q].load(x + rows[h] * k + first + 16 * q, k - first - 16 * q);
    }
    Left left[Tiles];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        left[tile].set(e, rows[e / 2] < 0 ? 0.f : u(rows[e / 2], rank + 16 * tile + lane.g + 8 * (e % 2)), false);
#pragma unroll
    for (int h = 0; h < 2; ++h) {   // nothing of a row that does not exist
      const uint32_t keep = rows[h] < 0 ? 0 : mask.keeps<2>(rows[h], first);
#pragma unroll
      for (int q = 0; q < 4; ++q) value[h][q].keep(keep >> 2 * q);
    }
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      Right right;
      right.set(0, value[0][part / 2].at[part % 2], kExact<X>), right.set(1, value[1][part / 2].at[part % 2], kExact<X>);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) multiply(sum[tile][part], left[tile], false, right, kExact<X>);
    }
  }
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float(&even)[4] = sum[tile][2 * q], (&odd)[4] = sum[tile][2 * q + 1];
        memory.sums[lane.warp][lane.g + 8 * h][4 * q + lane.t] =
            make_float4(even[2 * h], odd[2 * h], even[2 * h + 1], odd[2 * h + 1]);
      }
    __syncthreads();
    const int j = threadIdx.x / 16, unit = threadIdx.x % 16;
    Few<4> total;
#pragma unroll
    for (const auto& of_warp : memory.sums) {
      const float4& s = of_warp[j][unit];
      total.at[0] += s.x, total.at[1] += s.y, total.at[2] += s.z, total.at[3] += s.w;
    }
    result(rank + 16 * tile + j, chunk + 4 * unit, total);
  }
}

// How many blocks of threads share a sum, so that a large GPU has enough of them: by the shapes alone, for the same bits
// everywhere. `results`: blocks without sharing; `most`: turns of a block through what is summed.
constexpr int64_t kThinBlocks = 528;
inline int64_t shares_of(int64_t results, int64_t most) {
  const int64_t wanted = ceil_div(kThinBlocks, results);
  return wanted < most ? wanted : most > 0 ? most : 1;
}

}  // namespace peftops::cuda
