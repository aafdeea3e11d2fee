// y = x W^T for a few rows of 16-bit x: the weight streams once from memory straight into tensor-core fragments.
//
// The weight is the 16-row operand A of mma.m16n8k16 and x, transposed, the operand B, so no row of a product is wasted
// on rows that x does not have. The four threads of a quad share a row of the weight: each loads contiguous bytes of a
// chunk of it, 32 in all, which is a sector of memory, and the same columns of x; a product takes four columns from
// every thread. Which column of the chunk a product calls its k-th does not matter as long as both operands agree, so
// neither goes through shared memory. W is read in whole sectors, x by halves of them, the second of which is in L1.
//
// How codes become numbers is the stream's: Nf4Stream (nf4_rows.cuh) or GroupStream (group_rows.cuh). Codes are
// multiplied unscaled, and a chunk's sum by its scale in fp32. The eight warps of a block of threads share the depth,
// and their sums are added in order, so the result has the same bits every time.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

constexpr int kFewRows = 16;                // of x: two tiles of 8
constexpr int kRowsThreads = 256, kRowsWarps = kRowsThreads / kWarp;
constexpr int kStripes = 2;                 // of 16 rows of the weight
constexpr int kOuts = 16 * kStripes;        // rows of the weight a block of threads does: 4096 are one wave of 128

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

template <class T> constexpr uint32_t kOnes = 0x3f803f80;   // a pair of them
template <> constexpr uint32_t kOnes<__half> = 0x3c003c00;

template <class Stream, int Tiles> union RowsMemory {
  typename Stream::Memory in;
  float sums[kRowsWarps][8 * Tiles][kOuts + 4];   // afterwards; 4 more, so that a fragment's 32 lie in 32 banks
};

// What turns an unscaled sum of codes into one of weights: scale * (sum of code x - zero * sum of x).
struct Affine { float scale, zero; };

// Tiles: of 8 rows of x, which blockIdx.y counts. Calls f(row of x, row of W, sum) for every result.
template <class T, int Tiles, class Args, class Stream, class F>
__device__ void multiply_rows(const Args& a, const Stream& stream, RowsMemory<Stream, Tiles>& memory, const F& f) {
  constexpr int kOwn = Stream::kColumns / 4, kSteps = kOwn / 4;   // columns of a chunk a thread has; products a chunk
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = a.weight.rows, k = a.weight.cols;
  const int64_t first = int64_t(blockIdx.x) * kOuts, first_row = int64_t(blockIdx.y) * (8 * Tiles);
  const int chunks = int(k / Stream::kColumns);
  stream.begin(memory.in);

  float sum[kStripes][Tiles][4] = {};   // of rows g and g + 8 of W, rows 2t and 2t + 1 of x
  for (int begin = 0, end; begin < chunks; begin = end) {
    end = begin + stream.staged() < chunks ? begin + stream.staged() : chunks;
    __syncthreads();
    stream.stage(memory.in, first, begin);
    __syncthreads();
#pragma unroll (Stream::kUnroll)
    for (int chunk = begin + warp; chunk < end; chunk += kRowsWarps) {
      const int64_t column = int64_t(chunk) * Stream::kColumns + kOwn * t;
      uint2 codes[kStripes][2][Stream::kPieces] = {};   // of rows g and g + 8
#pragma unroll
      for (int s = 0; s < kStripes; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first + 16 * s + 8 * half + g;
          const uint8_t* from = a.weight.packed + (row * k + column) / 8 * Stream::kBits;
#pragma unroll
          for (int i = 0; i < Stream::kPieces; ++i)
            if (row < n) codes[s][half][i] = *reinterpret_cast<const uint2*>(from + 8 * i);
        }

      for (int p = 0; p < stream.parts(); ++p) {   // a scale that is not the whole chunk's is that of some of a quad
        const bool mine = stream.parts() == 1 || t * stream.parts() / 4 == p;
        float part[kStripes][Tiles][4] = {}, plain[Tiles][4] = {};
        uint4 x[Tiles] = {};   // eight columns, two steps
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int m = 0; m < Tiles; ++m) {
            const int64_t row = first_row + 8 * m + g;
            const T* from = static_cast<const T*>(a.x) + row * k + column + 4 * i;
            if (i % 2 == 0 && row < a.m) x[m] = *reinterpret_cast<const uint4*>(from);
          }
          uint32_t frag[kStripes][4];
#pragma unroll
          for (int s = 0; s < kStripes; ++s)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              stream.decode(memory.in, codes[s][half], i, frag[s][half], frag[s][half + 2]);
#pragma unroll
          for (int m = 0; m < Tiles; ++m) {
            const uint4& v = x[m];
            const uint32_t b0 = mine ? i % 2 ? v.z : v.x : 0, b1 = mine ? i % 2 ? v.w : v.y : 0;
            if constexpr (Stream::kZeros) {   // rows of ones add up x
              const uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
              multiply<T>(plain[m], ones, b0, b1);
            }
#pragma unroll
            for (int s = 0; s < kStripes; ++s) multiply<T>(part[s][m], frag[s], b0, b1);
          }
        }
#pragma unroll
        for (int s = 0; s < kStripes; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Affine of = stream.affine(memory.in, 16 * s + 8 * half + g, begin, chunk, p);
#pragma unroll
            for (int m = 0; m < Tiles; ++m)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& total = sum[s][m][2 * half + e];
                float value = part[s][m][2 * half + e];
                if constexpr (Stream::kZeros) value = __fmaf_rn(-of.zero, plain[m][e], value);
                total = __fmaf_rn(of.scale, value, total);
              }
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
  const int rows = int(a.m - first_row < 8 * Tiles ? a.m - first_row : 8 * Tiles);
  for (int e = threadIdx.x; e < kOuts * rows; e += kRowsThreads) {
    const int out = e % kOuts, row = e / kOuts;
    if (first + out >= n) continue;
    float total = 0.f;
#pragma unroll
    for (const auto& of_warp : memory.sums) total += of_warp[row][out];
    f(first_row + row, first + out, __fmul_rn(total, 1.f / Stream::kFactor));
  }
}

}  // namespace peftops::cuda
