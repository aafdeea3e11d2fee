// C = L W', a tile of 64 x 64 a block of threads, in fp32: for every shape and dtype, forward (W' = W^T) and backward
// (W' = W). The weight is decoded an element at a time on its way to shared memory. Sums run along the depth in order.
#pragma once
#include "kernels/cuda/nf4_decode.cuh"

namespace peftops::cuda {

constexpr int kTile = 64, kDepth = 16, kTileThreads = 256;
constexpr int kPerThread = 4;   // a thread owns 4 x 4 results, 16 apart: neighbours read neighbouring words

struct TileMemory {
  float left[kDepth][kTile + 1], right[kDepth][kTile + 1];   // one more, so that columns lie in different banks
  float map[256];
};

// Element (step, col) of W'.
template <bool Transposed> __device__ float weight_at(const Nf4Weight& w, int log_block, int64_t step, int64_t col, const float* map) {
  const int64_t flat = Transposed ? col * w.cols + step : step * w.cols + col;
  const uint32_t byte = w.packed[flat / 2];
  return __fmul_rn(nf4_codes.at[flat % 2 ? byte & 15 : byte >> 4], absmax_of(w, flat >> log_block, map));
}

// c[i][j] = row `row(i)`, column `col(j)`, of L [rows, depth] times W'.
template <bool Transposed, class T>
__device__ void multiply_tile(const Nf4Weight& w, int log_block, const T* left, int64_t rows, int64_t depth, int64_t cols,
                              TileMemory& memory, float (&c)[kPerThread][kPerThread]) {
  const int64_t first_row = int64_t(blockIdx.y) * kTile, first_col = int64_t(blockIdx.x) * kTile;
  if (w.absmax_code) memory.map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  for (int64_t t = 0; t < depth; t += kDepth) {
    for (int e = threadIdx.x; e < kTile * kDepth; e += kTileThreads) {
      const int along = e % kDepth, across = e / kDepth;   // rows of L, and of W, are contiguous along the depth
      const int64_t row = first_row + across;
      memory.left[along][across] = row < rows && t + along < depth ? to_float(left[row * depth + t + along]) : 0.f;
      const int step = Transposed ? along : e / kTile, j = Transposed ? across : e % kTile;
      const bool inside = t + step < depth && first_col + j < cols;
      memory.right[step][j] = inside ? weight_at<Transposed>(w, log_block, t + step, first_col + j, memory.map) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float l[kPerThread], r[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        l[i] = memory.left[k][threadIdx.x / 16 + 16 * i];
        r[i] = memory.right[k][threadIdx.x % 16 + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) c[i][j] = __fmaf_rn(l[i], r[j], c[i][j]);
    }
    __syncthreads();
  }
}

// f(row, col, c) for the results of this thread that exist.
template <class F> __device__ void each_result(int64_t rows, int64_t cols, const float (&c)[kPerThread][kPerThread], F f) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t row = int64_t(blockIdx.y) * kTile + threadIdx.x / 16 + 16 * i;
      const int64_t col = int64_t(blockIdx.x) * kTile + threadIdx.x % 16 + 16 * j;
      if (row < rows && col < cols) f(row, col, c[i][j]);
    }
}

}  // namespace peftops::cuda
