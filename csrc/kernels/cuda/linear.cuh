// The common part of linear layers, for all formats of a weight: the way from a sum to a result, and the product for
// any shape.
#pragma once
#include "kernels/cuda/tile.cuh"

namespace peftops::cuda {

constexpr int kRanks = 8;

// Turns a sum of x W^T into a result; `r` ranks of the low-rank term are still missing in the sum. Args: Nf4Linear or
// GroupLinear.
template <class T, class Args> struct Finish {
  const Args& a;
  int64_t r;

  __device__ void operator()(int64_t row, int64_t col, float sum) const {
    float low_rank = 0.f;
    const int64_t u_at = row * a.r, b_at = col * a.r;
#pragma unroll 1
    for (int64_t j = 0; j < r; j += kRanks) {   // so many loads are under way at a time
      float u[kRanks], b[kRanks];
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
        const bool exists = j + i < r;
        u[i] = exists ? a.u[u_at + j + i] : 0.f, b[i] = exists ? element(a.b, a.b_dtype, b_at + j + i) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kRanks; ++i) low_rank = __fmaf_rn(u[i], b[i], low_rank);
    }
    float y = __fmaf_rn(a.scaling, low_rank, sum);
    if (a.bias) y += element(a.bias, a.bias_dtype, col);
    static_cast<T*>(a.y)[row * a.weight.rows + col] = from_float<T>(y);
  }
};

// In fp32, tile by tile; weight(flat) is an element of W.
template <class T, class Args, class Weight>
__device__ void multiply_any(const Args& a, const Weight& weight, TileMemory& memory) {
  const int64_t n = a.weight.rows, k = a.weight.cols;
  TileSums c;
  multiply_tile<Along::depth, Along::depth>(
      a.m, n, k, [&](int64_t t, int64_t row) { return to_float(static_cast<const T*>(a.x)[row * k + t]); },
      [&](int64_t t, int64_t col) { return weight(col * k + t); }, memory, c);
  multiply_tile<Along::depth, Along::depth>(
      a.m, n, a.r, [&](int64_t t, int64_t row) { return __fmul_rn(a.scaling, a.u[row * a.r + t]); },
      [&](int64_t t, int64_t col) { return element(a.b, a.b_dtype, col * a.r + t); }, memory, c);
  each_result(a.m, n, [&](int64_t row, int64_t col, int i, int j) {
    const float bias = a.bias ? element(a.bias, a.bias_dtype, col) : 0.f;
    static_cast<T*>(a.y)[row * n + col] = from_float<T>(c.at[i][j] + bias);
  });
}

}  // namespace peftops::cuda
