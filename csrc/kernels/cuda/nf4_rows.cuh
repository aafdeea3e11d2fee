// y = x W^T for up to 16 rows of x: the weight streams once from memory straight into tensor-core fragments.
//
// The weight is the 16-row operand A of mma.m16n8k16 and x, transposed, the operand B, so no row of a product is wasted
// on rows that x does not have. Thread t of a quad loads 8 contiguous bytes of a row, the columns 16t to 16t + 15 of a
// chunk of 64, and the same columns of x; four products take four columns each from every thread. Which column of the
// chunk a product calls its k-th does not matter as long as both operands agree, so neither goes through shared memory.
//
// A sector of memory holds 64 codes of a row or 16 elements of x, so W is read in whole sectors, and x by halves of
// them, the second of which is in L1.
//
// A byte of codes is half a fragment register: a pair of elements, found in a table with a copy for each bank. Codes
// are multiplied unscaled, and a chunk's sum by the absmax of its block, in fp32. The eight warps of a block of threads
// share the depth, and their sums are added in order, so the result has the same bits every time.
#pragma once
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

constexpr int kFewRows = 16;                // of x, at most
constexpr int kRowsThreads = 256, kRowsWarps = kRowsThreads / kWarp;
constexpr int kStripes = 2;                 // of 16 rows of the weight
constexpr int kOuts = 16 * kStripes;        // rows of the weight a block of threads does: 4096 are one wave of 128
constexpr int kChunk = 64;                  // columns that share an absmax at most
constexpr int kScales = 64;                 // chunks whose absmax values are decoded at a time

// Codes are rounded to the type of x, all of them times a factor that puts them close to what the type can hold. Of
// 4096 factors in [1, 2), over quantised normal weights: the least error in bf16, 8.7e-4 rms of the weight instead
// of 1.5e-3 at factor 1, and a bias of 4e-5 instead of 4e-4; in fp16 1.0e-4 instead of 1.9e-4, and 3e-6. The sums are
// divided by it.
template <class T> constexpr float kCodeFactor = 1.f;
template <> constexpr float kCodeFactor<__nv_bfloat16> = 1.37451171875f;
template <> constexpr float kCodeFactor<__half> = 1.5751953125f;

template <class T> struct PairTable {
  uint32_t at[256][kWarp];   // [byte][lane]: the element of the high nibble, and above it that of the low one

  __device__ static T of(int code) { return from_float<T>(__fmul_rn(kCodeFactor<T>, nf4_codes.at[code])); }
  __device__ void fill() {
#pragma unroll 4
    for (int first = 0; first < 256; first += kRowsWarps) {
      const int byte = first + threadIdx.x / kWarp;
      const T pair[2] = {of(byte >> 4), of(byte & 15)};
      at[byte][threadIdx.x % kWarp] = *reinterpret_cast<const uint32_t*>(pair);
    }
  }
  __device__ uint32_t operator()(uint32_t bytes, int i) const {   // of the i-th of four bytes
    return *static_cast<const uint32_t*>(lane_of(at, field_at(bytes, 8 * i, 255)));
  }
};

template <class T> __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T> union RowsMemory {
  struct {
    PairTable<T> pairs;
    float scale[kOuts][kScales + 1];
    float map[256];
  } in;
  float sums[kRowsWarps][kFewRows][kOuts + 4];   // afterwards; 4 more, so that a fragment's 32 lie in 32 banks
};

// Tiles: of 8 rows of x. Calls f(row of x, row of W, sum) for every result.
template <class T, int Tiles, class F>
__device__ void multiply_rows(const Nf4Linear& a, int log_block, RowsMemory<T>& memory, F f) {
  const Nf4Weight& w = a.weight;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = w.rows, k = w.cols, first = int64_t(blockIdx.x) * kOuts;
  const int chunks = int(k / kChunk);
  memory.in.pairs.fill();
  if (w.absmax_code) memory.in.map[threadIdx.x] = dynamic_map.at[threadIdx.x];

  const float offset = offset_of(w);
  float sum[kStripes][Tiles][4] = {};   // of rows g and g + 8 of W, rows 2t and 2t + 1 of x
  for (int begin = 0; begin < chunks; begin += kScales) {
    __syncthreads();
    for (int e = threadIdx.x; e < kOuts * kScales; e += kRowsThreads) {
      const int64_t row = first + e / kScales, chunk = begin + e % kScales;
      if (row < n && chunk < chunks)
        memory.in.scale[e / kScales][e % kScales] =
            absmax_of(w, (row * k + chunk * kChunk) >> log_block, memory.in.map, offset);
    }
    __syncthreads();
    const int end = begin + kScales < chunks ? begin + kScales : chunks;
#pragma unroll 2
    for (int chunk = begin + warp; chunk < end; chunk += kRowsWarps) {
      const int64_t column = int64_t(chunk) * kChunk + 16 * t;
      uint4 x[Tiles][2] = {};
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
        if (8 * m + g < a.m) {
          const uint4* p = reinterpret_cast<const uint4*>(static_cast<const T*>(a.x) + (8 * m + g) * k + column);
          x[m][0] = p[0], x[m][1] = p[1];
        }
#pragma unroll
      for (int s = 0; s < kStripes; ++s) {
        const int row = 16 * s + g;
        const bool low_exists = first + row < n, high_exists = first + row + 8 < n;
        uint2 low = {}, high = {};   // of rows g and g + 8
        if (low_exists) low = *reinterpret_cast<const uint2*>(w.packed + ((first + row) * k + column) / 2);
        if (high_exists) high = *reinterpret_cast<const uint2*>(w.packed + ((first + row + 8) * k + column) / 2);
        float part[Tiles][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {   // two bytes of each row, four columns
          const uint32_t l = i < 2 ? low.x : low.y, h = i < 2 ? high.x : high.y;
          const uint32_t frag[4] = {memory.in.pairs(l, i % 2 * 2), memory.in.pairs(h, i % 2 * 2),
                                    memory.in.pairs(l, i % 2 * 2 + 1), memory.in.pairs(h, i % 2 * 2 + 1)};
#pragma unroll
          for (int m = 0; m < Tiles; ++m) {
            const uint4& v = x[m][i / 2];
            multiply<T>(part[m], frag, i % 2 ? v.z : v.x, i % 2 ? v.w : v.y);
          }
        }
        const float scale_low = low_exists ? memory.in.scale[row][chunk - begin] : 0.f;
        const float scale_high = high_exists ? memory.in.scale[row + 8][chunk - begin] : 0.f;
#pragma unroll
        for (int m = 0; m < Tiles; ++m) {
          sum[s][m][0] = __fmaf_rn(scale_low, part[m][0], sum[s][m][0]);
          sum[s][m][1] = __fmaf_rn(scale_low, part[m][1], sum[s][m][1]);
          sum[s][m][2] = __fmaf_rn(scale_high, part[m][2], sum[s][m][2]);
          sum[s][m][3] = __fmaf_rn(scale_high, part[m][3], sum[s][m][3]);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kStripes; ++s)
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) memory.sums[warp][8 * m + 2 * t + e % 2][16 * s + g + e / 2 * 8] = sum[s][m][e];
  __syncthreads();
  for (int e = threadIdx.x; e < kOuts * int(a.m); e += kRowsThreads) {
    const int out = e % kOuts, row = e / kOuts;
    if (first + out >= n) continue;
    float total = 0.f;
#pragma unroll
    for (const auto& of_warp : memory.sums) total += of_warp[row][out];
    f(row, first + out, __fmul_rn(total, 1.f / kCodeFactor<T>));
  }
}

// Whether W and x can be read in such chunks.
inline bool has_chunks(const Nf4Linear& a) {
  return a.dtype != DType::f32 && a.weight.cols % kChunk == 0 && a.weight.block_size % kChunk == 0 &&
         aligned(a.weight.packed, 8) && aligned(a.x, 16);
}

}  // namespace peftops::cuda
