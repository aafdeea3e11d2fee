// y = x W^T for many rows of 16-bit x: the fragments of nf4_rows.cuh, with x in shared memory.
//
// A block of threads does 64 rows of x; each of its warps has rows of the weight to itself, so the codes go from memory
// to registers once, the next chunk's while this one's are multiplied. All warps need all of x: cp.async brings 64
// columns of it at a time, three stages ahead. A lane reads 32 contiguous bytes of a row; its neighbours of the next
// row would meet it in the same banks, so odd rows have their 16-byte units swapped in pairs.
//
// The low-rank term is more depth, [x | scaling u] [W ; lora_B]^T, in tf32 (tf32.cuh): u and often lora_B are fp32.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/nf4_rows.cuh"
#include "kernels/cuda/tf32.cuh"

namespace peftops::cuda {

constexpr int kManyThreads = 256, kManyWarps = kManyThreads / kWarp;
constexpr int kManyRows = 64, kManyTiles = kManyRows / 8;   // of x a block of threads
constexpr int kUnits = kChunk / 8;                          // of 16 bytes in a chunk of a row

template <class T> union ManyMemory {
  struct {
    PairTable<T> pairs;
    uint4 x[kStages][kManyRows][kUnits];
    float map[256];
  } in;
  float sums[kManyRows][16 * kManyWarps + 4];   // afterwards, a stripe at a time
};

// Codes and absmax of a chunk, for rows g and g + 8 of each stripe.
template <int Stripes> struct WeightChunk {
  uint2 codes[Stripes][2];
  float scale[Stripes][2];
};

// Reads them, chunk after chunk. In place of rows that do not exist it reads the last row: their products are not used.
template <int Stripes> struct WeightReader {
  const Nf4Weight& w;
  const float* map;
  int log_block;
  float offset = offset_of(w);
  int64_t flat[Stripes][2];   // where the next chunk begins

  __device__ WeightReader(const Nf4Weight& weight, int log, int64_t first, const float* dynamic)
      : w(weight), map(dynamic), log_block(log) {
#pragma unroll
    for (int s = 0; s < Stripes; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + 16 * s + 8 * half + threadIdx.x % kWarp / 4;
        flat[s][half] = w.first + (row < w.rows ? row : w.rows - 1) * w.cols;
      }
  }
  __device__ void read(WeightChunk<Stripes>& chunk) {
#pragma unroll
    for (int s = 0; s < Stripes; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t& at = flat[s][half];
        chunk.codes[s][half] = *reinterpret_cast<const uint2*>(w.packed + at / 2 + 8 * (threadIdx.x % 4));
        chunk.scale[s][half] = absmax_of(w, at >> log_block, map, offset);
        at += kChunk;
      }
  }
};

struct SwapOddRows {
  __device__ static int of(int unit, int row) { return unit ^ (row & 1); }
};

// Calls f(row of x, row of W, sum) for every result.
template <class T, int Stripes, class F>
__device__ void multiply_many(const Nf4Linear& a, int log_block, ManyMemory<T>& memory, F f) {
  const Nf4Weight& w = a.weight;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = w.rows, k = w.cols, first_row = int64_t(blockIdx.x) * kManyRows;
  const int64_t first_out = (int64_t(blockIdx.y) * kManyWarps + warp) * (16 * Stripes);
  const int chunks = int(k / kChunk);

  const PanelCopy<T, kManyThreads, kManyRows, kUnits, SwapOddRows> copy(static_cast<const T*>(a.x), first_row, a.m, k);
  const auto fetch = [&](int chunk) {   // a chunk of x into its stage; an empty group keeps the count
    if (chunk < chunks) copy(memory.in.x[chunk % kStages], chunk);
    commit_copies();
  };
  for (int c = 0; c < kStages - 1; ++c) fetch(c);
  memory.in.pairs.template fill<kManyThreads>();
  if (w.absmax_code) memory.in.map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();

  PairColumn pairs(memory.in.pairs);
  pairs.is_filled();
  WeightReader<Stripes> reader(w, log_block, first_out, memory.in.map);
  WeightChunk<Stripes> next;
  reader.read(next);
  float sum[Stripes][kManyTiles][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const WeightChunk<Stripes> now = next;
    if (chunk + 1 < chunks) reader.read(next);
    wait_for_copies<kStages - 2>();
    __syncthreads();   // this chunk of x is here, and all are done with the stage that is fetched into next
    fetch(chunk + kStages - 1);

    uint32_t frag[Stripes][4][4];
#pragma unroll
    for (int s = 0; s < Stripes; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t bytes = i < 2 ? now.codes[s][half].x : now.codes[s][half].y;
          frag[s][i][half] = pairs(bytes, i % 2 * 2);
          frag[s][i][half + 2] = pairs(bytes, i % 2 * 2 + 1);
        }
#pragma unroll
    for (int m = 0; m < kManyTiles; ++m) {
      const uint4* row = memory.in.x[chunk % kStages][8 * m + g];
      const uint4 x[2] = {row[(2 * t) ^ (g & 1)], row[(2 * t + 1) ^ (g & 1)]};
#pragma unroll
      for (int s = 0; s < Stripes; ++s) {
        float part[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4& v = x[i / 2];
          multiply<T>(part, frag[s][i], i % 2 ? v.z : v.x, i % 2 ? v.w : v.y);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[s][m][e] = __fmaf_rn(now.scale[s][e / 2], part[e], sum[s][m][e]);
      }
    }
  }
  const bool b_exact = a.b_dtype != DType::f32;
  const float u_factor = __fmul_rn(a.scaling, kCodeFactor<T>);   // as all sums have it
#pragma unroll 1
  for (int64_t j = t; j < a.r + t; j += 8) {   // steps j and j + 4 are this thread's
    Left of_b[Stripes];
#pragma unroll
    for (int s = 0; s < Stripes; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_out + 16 * s + 8 * (i % 2) + g, step = j + i / 2 * 4;
        of_b[s].set(i, row < n && step < a.r ? element(a.b, a.b_dtype, row * a.r + step) : 0.f, b_exact);
      }
#pragma unroll
    for (int m = 0; m < kManyTiles; ++m) {
      Right of_u;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = first_row + 8 * m + g, step = j + 4 * i;
        of_u.set(i, row < a.m && step < a.r ? __fmul_rn(u_factor, a.u[row * a.r + step]) : 0.f, false);
      }
#pragma unroll
      for (int s = 0; s < Stripes; ++s) multiply(sum[s][m], of_b[s], b_exact, of_u, false);
    }
  }
#pragma unroll
  for (int s = 0; s < Stripes; ++s) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kManyTiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) memory.sums[8 * m + 2 * t + e % 2][16 * warp + g + e / 2 * 8] = sum[s][m][e];
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < kManyRows * 16 * kManyWarps; e += kManyThreads) {
      const int column = e % (16 * kManyWarps), row = e / (16 * kManyWarps);
      const int64_t out = (int64_t(blockIdx.y) * kManyWarps + column / 16) * (16 * Stripes) + 16 * s + column % 16;
      if (first_row + row >= a.m || out >= n) continue;
      f(first_row + row, out, __fmul_rn(memory.sums[row][column], 1.f / kCodeFactor<T>));
    }
  }
}

}  // namespace peftops::cuda
