// C += L R, a tile of 64 x 64 a block of threads, in fp32: for every shape and dtype. The caller supplies the elements:
// of a weight that is decoded on the way, a factor, or activations after dropout. Sums run along the depth in order.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

constexpr int kTile = 64, kDepth = 16, kTileThreads = 256;
constexpr int kPerThread = 4;   // a thread owns 4 x 4 results, 16 apart: neighbours read neighbouring words

struct TileMemory {
  float left[kDepth][kTile + 1], right[kDepth][kTile + 1];   // one more, so that columns lie in different banks
};
struct TileSums { float at[kPerThread][kPerThread] = {}; };

// Which way an operand is contiguous, so that neighbouring threads fetch neighbouring elements.
enum class Along { depth, across };

// fetch(step, i): an element of the operand, for step < depth and i < size.
template <Along A, class F>
__device__ void fetch_panel(float (&panel)[kDepth][kTile + 1], int64_t step, int64_t depth, int64_t first, int64_t size,
                            const F& fetch) {
#pragma unroll 1
  for (int e = threadIdx.x; e < kTile * kDepth; e += kTileThreads) {
    const int s = A == Along::depth ? e % kDepth : e / kTile, i = A == Along::depth ? e / kDepth : e % kTile;
    panel[s][i] = step + s < depth && first + i < size ? fetch(step + s, first + i) : 0.f;
  }
}

template <Along LeftAlong, Along RightAlong, class Left, class Right>
__device__ void multiply_tile(int64_t rows, int64_t cols, int64_t depth, const Left& left, const Right& right,
                              TileMemory& memory, TileSums& c) {
  for (int64_t t = 0; t < depth; t += kDepth) {
    __syncthreads();   // the panels before are done with
    fetch_panel<LeftAlong>(memory.left, t, depth, int64_t(blockIdx.x) * kTile, rows, left);
    fetch_panel<RightAlong>(memory.right, t, depth, int64_t(blockIdx.y) * kTile, cols, right);
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
        for (int j = 0; j < kPerThread; ++j) c.at[i][j] = __fmaf_rn(l[i], r[j], c.at[i][j]);
    }
  }
}

// f(row, col, i, j) for the results c.at[i][j] of this thread that exist.
template <class F> __device__ void each_result(int64_t rows, int64_t cols, const F& f) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t row = int64_t(blockIdx.x) * kTile + threadIdx.x / 16 + 16 * i;
      const int64_t col = int64_t(blockIdx.y) * kTile + threadIdx.x % 16 + 16 * j;
      if (row < rows && col < cols) f(row, col, i, j);
    }
}

// Rows along x, which may be longer than 65,535 blocks, in every grid of ours.
inline dim3 tiles_of(int64_t rows, int64_t cols) {
  return dim3(unsigned(ceil_div(rows, kTile)), unsigned(ceil_div(cols, kTile)));
}

}  // namespace peftops::cuda
