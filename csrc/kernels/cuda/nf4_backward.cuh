// dx = g W + dropout'(v A) for 16-bit g, on tensor cores.
//
// The sum runs along the rows of W now, and each has absmax values of its own: a code has to be scaled before it is
// multiplied. So W is decoded, rounded once to the type of g, into a tile of shared memory that all warps read with
// ldmatrix.trans, 32 rows at a time; nothing larger of it ever exists. cp.async brings g and the codes of W three stages
// ahead, and the next tile is decoded while this one is multiplied.
//
// Units are 16 bytes. Rows are permuted by an exclusive or of a unit's number with bits of the row's, so that eight rows
// of a matrix, and a quarter of a warp that stores, meet eight different groups of banks.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/nf4_rows.cuh"
#include "kernels/cuda/tf32.cuh"

namespace peftops::cuda {

constexpr int kBackThreads = 256;
constexpr int kBackCols = 128, kBackDepth = 32;          // of dx a block of threads; rows of W a step
constexpr int kBackUnits = kBackCols / 8, kDepthUnits = kBackDepth / 8, kCodeUnits = kBackCols / 32;
constexpr int kWarpsDown = 2, kWarpsAcross = 4;          // how the warps divide dx
constexpr int kWarpTiles = kBackCols / kWarpsAcross / 8; // of 8 columns

template <int Rows> union BackwardMemory {
  struct {
    uint4 g[kStages][Rows][kDepthUnits];
    uint4 codes[kStages][kBackDepth][kCodeUnits];
    uint4 w[2][kBackDepth][kBackUnits];
    LaneTable code;
    float map[256];
  } in;
  uint32_t out[Rows][kBackCols / 2 + 4];   // afterwards: pairs, and 4 more so that a fragment's 32 lie in 32 banks
};

struct SwapRowPairs {   // rows of four units: two lie side by side in the banks
  __device__ static int of(int unit, int row) { return unit ^ (row >> 1 & 3); }
};

template <class T> __device__ uint32_t pair_of(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

template <class T, int Rows>
__device__ void multiply_backward(const Nf4LinearBackward& a, const DropoutMask& mask, int log_block,
                                  BackwardMemory<Rows>& memory) {
  constexpr int kTiles = Rows / kWarpsDown / 16;         // of 16 rows a warp
  const Nf4Weight& w = a.weight;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = w.rows, k = w.cols, first_row = int64_t(blockIdx.x) * Rows, first_col = int64_t(blockIdx.y) * kBackCols;
  const int warp_row = warp % kWarpsDown * (Rows / kWarpsDown), across = warp / kWarpsDown;
  const int first_unit = across / 2 * 8 + across % 2;    // a warp's tiles are two units apart: one draw of dropout for all
  const int steps = int(ceil_div(n, kBackDepth));

  const PanelCopy<T, kBackThreads, Rows, kDepthUnits, SwapRowPairs> copy(static_cast<const T*>(a.g), first_row, a.m, n);
  // Half of the threads bring a unit of codes each, of a row that advances with the steps.
  const int code_row = thread / kCodeUnits, code_unit = thread % kCodeUnits;
  const bool brings = thread < kBackDepth * kCodeUnits && first_col + 32 * code_unit < k;
  const uint8_t* codes_from = w.packed + (w.first + code_row * k + first_col + 32 * code_unit) / 2;
  const auto fetch = [&](int step) {   // g and codes into their stage; an empty group keeps the count
    if (step < steps) copy(memory.in.g[step % kStages], step);
    if (step < steps && thread < kBackDepth * kCodeUnits) {
      const bool exists = brings && step * kBackDepth + code_row < n;
      copy_async(&memory.in.codes[step % kStages][code_row][code_unit], exists ? codes_from : w.packed, exists);
      codes_from += kBackDepth * k / 2;
    }
    commit_copies();
  };
  // This thread decodes eight columns of two rows. Rows and columns that do not exist are zeros, by their absmax.
  const int unit = thread % kBackUnits, row = thread / kBackUnits;
  const int last = first_col + 8 * unit < k ? int(n) - row : 0;   // this thread's rows of W end before
  const float offset = offset_of(w);
  int64_t flat = w.first + row * k + first_col + 8 * unit;
  float scale[2];
  const auto load_scales = [&](int step) {   // step after step
#pragma unroll
    for (int h = 0; h < 2; ++h)
      scale[h] = step * kBackDepth + 16 * h < last
                     ? absmax_of(w, (flat + 16 * h * k) >> log_block, memory.in.map, offset) : 0.f;
    flat += kBackDepth * k;
  };
  const auto decode = [&](int step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t codes = reinterpret_cast<const uint32_t*>(memory.in.codes[step % kStages][row + 16 * h])[unit];
      const auto weight = [&](int i) { return __fmul_rn(memory.in.code.element(codes, i), scale[h]); };
      memory.in.w[step % 2][row + 16 * h][unit ^ (row & 7)] =
          make_uint4(pair_of<T>(weight(0), weight(1)), pair_of<T>(weight(2), weight(3)),
                     pair_of<T>(weight(4), weight(5)), pair_of<T>(weight(6), weight(7)));
    }
  };

  for (int s = 0; s < kStages - 1; ++s) fetch(s);
  memory.in.code.template fill<kBackThreads>(nf4_codes.at);
  if (w.absmax_code) memory.in.map[thread] = dynamic_map.at[thread];
  wait_for_copies<kStages - 2>();
  __syncthreads();
  load_scales(0);
  if (steps) decode(0);
  load_scales(1);

  float sum[kTiles][kWarpTiles][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 3>();
    __syncthreads();   // this step's g and tile of W and the next one's codes are here; those of the last are done with
    fetch(step + kStages - 1);
    if (step + 1 < steps) decode(step + 1);
    load_scales(step + 2);
    const int q = lane / 8, r = lane % 8;   // of the matrices, whose rows this lane points at
#pragma unroll
    for (int half = 0; half < kBackDepth / 16; ++half) {
      uint32_t of_w[kWarpTiles / 2][4];
#pragma unroll
      for (int j = 0; j < kWarpTiles / 2; ++j)
        load_transposed(of_w[j], &memory.in.w[step % 2][16 * half + 8 * (q & 1) + r][(first_unit + 2 * (2 * j + q / 2)) ^ r]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int of_tile = warp_row + 16 * i + 8 * (q & 1) + r;
        uint32_t of_g[4];
        load_matrices(of_g, &memory.in.g[step % kStages][of_tile][SwapRowPairs::of(2 * half + q / 2, of_tile)]);
#pragma unroll
        for (int j = 0; j < kWarpTiles; ++j) multiply<T>(sum[i][j], of_g, of_w[j / 2][j % 2 * 2], of_w[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t rows[2] = {first_row + warp_row + 16 * i + g, first_row + warp_row + 16 * i + g + 8};
    const int64_t col = first_col + 8 * first_unit;
    float low_rank[kWarpTiles][4] = {};
#pragma unroll 1
    for (int64_t s = t; s < a.r + t; s += 8) {   // steps s and s + 4 are this thread's
      Left of_v;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t step = s + e / 2 * 4;
        of_v.set(e, rows[e % 2] < a.m && step < a.r ? a.v[rows[e % 2] * a.r + step] : 0.f, false);
      }
#pragma unroll
      for (int j = 0; j < kWarpTiles; ++j) {
        const int64_t at = col + 16 * j + g;
        Right of_a;
#pragma unroll
        for (int e = 0; e < 2; ++e)
          of_a.set(e, at < k && s + 4 * e < a.r ? element(a.a, a.a_dtype, (s + 4 * e) * k + at) : 0.f,
                   a.a_dtype != DType::f32);
        multiply(low_rank[j], of_v, false, of_a, a.a_dtype != DType::f32);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t keep = mask.keeps<2>(rows[h], col + 2 * t);
#pragma unroll
      for (int j = 0; j < kWarpTiles; ++j) {
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float add = mask.threshold ? __fmul_rn(low_rank[j][2 * h + e], mask.factor) : low_rank[j][2 * h + e];
          value[e] = sum[i][j][2 * h + e] + (keep >> (2 * j + e) & 1 ? add : 0.f);
        }
        memory.out[warp_row + 16 * i + 8 * h + g][4 * (first_unit + 2 * j) + t] = pair_of<T>(value[0], value[1]);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int e = thread; e < Rows * kBackUnits; e += kBackThreads) {
    const int64_t m = first_row + e / kBackUnits, col = first_col + 8 * (e % kBackUnits);
    if (m < a.m && col < k)
      *reinterpret_cast<uint4*>(static_cast<T*>(a.dx) + m * k + col) =
          *reinterpret_cast<const uint4*>(&memory.out[e / kBackUnits][4 * (e % kBackUnits)]);
  }
}

// Whether there are g, W and dx, and they can be moved in units.
inline bool has_units(const Nf4LinearBackward& a) {
  return a.weight.rows > 0 && a.dtype != DType::f32 && a.weight.cols % 32 == 0 && a.weight.rows % 8 == 0 &&
         aligned(a.weight.packed, 16) && aligned(a.g, 16) && aligned(a.dx, 16);
}

}  // namespace peftops::cuda
