// An MXFP4 weight for rows.cuh. Codes are numbers that 16-bit floats hold exactly, so only the sums round. A chunk, a
// sector of a row, has two blocks: each is multiplied with x of its own threads, and zeros for the others.
#pragma once
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/mxfp4_decode.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/mxfp4_linear.h"

namespace peftops::cuda {

constexpr int kStagedMxBlocks = 128;   // of a row, whose scales are in shared memory

template <class T, int Outs> struct Mxfp4Stream {
  static constexpr int kBits = 4, kPieces = 1, kOuts = Outs, kColumns = 64, kParts = int(kColumns / kMxBlock);
  static constexpr bool kZeros = false, kEarlyScales = true, kHoldsScales = false;
  static constexpr float kFactor = 1.f;
  struct Memory { float scale[kOuts][kStagedMxBlocks + 1]; };
  const Mxfp4Weight& w;

  struct NoTable { __device__ void is_filled() const {} };
  template <int Threads> __device__ NoTable begin(Memory&) const { return {}; }
  __device__ int staged() const { return kStagedMxBlocks / kParts; }
  __device__ int parts() const { return kParts; }

  // The scales of a stage, on their way from memory to shared memory: what a thread has of them.
  template <int Threads> struct Scales {
    static constexpr int kEach = kOuts * kStagedMxBlocks / Threads;
    uint8_t scale[kEach];

    __device__ void load(const Mxfp4Stream& of, int64_t first, int begin) {
      const int64_t blocks = of.w.cols / kMxBlock;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = threadIdx.x + i * Threads;
        const int64_t row = first + e / kStagedMxBlocks, block = begin * kParts + e % kStagedMxBlocks;
        scale[i] = row < of.w.rows && block < blocks ? of.w.scales[row * blocks + block] : 0;
      }
    }
    __device__ void store(const Mxfp4Stream&, Memory& memory, int) const {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = threadIdx.x + i * Threads;
        memory.scale[e / kStagedMxBlocks][e % kStagedMxBlocks] = scale_of(scale[i]);
      }
    }
  };
  __device__ Affine affine(const Memory& memory, int row, int begin, int chunk, int part) const {
    return {memory.scale[row][(chunk - begin) * kParts + part], 0.f};
  }

  // Codes 2 i and 2 i + 1 of a thread as a pair of T: their bits, moved to where T has its own, and the exponent set right.
  __device__ static uint32_t pair(const uint2 (&codes)[kPieces], int i) {
    const uint32_t two = (i < 4 ? codes[0].x : codes[0].y) >> i % 4 * 8 & 255;
    const uint32_t spread = two * 0x1001 & 0x000f000f;   // a code in each half
    return number((spread & 0x00080008) << 12, spread & 0x00070007, T());
  }
  __device__ static uint32_t number(uint32_t sign, uint32_t size, __half) {
    const uint32_t small = sign | size << 9;
    const __half2 result = __hmul2(reinterpret_cast<const __half2&>(small), __float2half2_rn(0x1p14f));
    return reinterpret_cast<const uint32_t&>(result);
  }
  __device__ static uint32_t number(uint32_t sign, uint32_t size, __nv_bfloat16) {
    const uint32_t small = sign | size << 6;
    const __nv_bfloat162 result =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(small), __float2bfloat162_rn(0x1p126f));
    return reinterpret_cast<const uint32_t&>(result);
  }
  __device__ void decode(NoTable, const uint2 (&codes)[kPieces], int i, uint32_t& low, uint32_t& high) const {
    low = pair(codes, 2 * i), high = pair(codes, 2 * i + 1);
  }
};

// Sums of unscaled codes leave the range of fp32 before those of weights do: such a sum is made again as plain arithmetic
// has it.
template <class T> struct Mxfp4Finish {
  const Mxfp4Linear& a;

  __device__ void operator()(int64_t row, int64_t col, float sum) const {
    const int64_t k = a.weight.cols;
    if (!isfinite(sum)) {
      const T* x = static_cast<const T*>(a.x) + row * k;
      sum = 0.f;
#pragma unroll 1
      for (int64_t j = 0; j < k; ++j) sum = __fmaf_rn(to_float(x[j]), weight_at(a.weight, col * k + j), sum);
    }
    Finish<T, Mxfp4Linear>{a, a.r}(row, col, sum);
  }
};

// Whether W and x can be read in chunks.
inline bool has_chunks(const Mxfp4Linear& a) {
  return a.dtype != DType::f32 && a.weight.cols % 64 == 0 && aligned(a.weight.packed, 8) && aligned(a.x, 16);
}

}  // namespace peftops::cuda
