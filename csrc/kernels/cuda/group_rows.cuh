// A group-quantised weight for rows.cuh. Codes are whole numbers that 16-bit floats hold exactly, so only the sums
// round: scale * (sum of code x - zero * sum of x), both sums from tensor cores.
//
// A chunk is a sector of a row, or with three bits a code three of them. A thread's columns are of one group; where a
// chunk has several groups, each is multiplied with x of its own threads, and zeros for the others.
#pragma once
#include "kernels/cuda/group_decode.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/group_linear.h"

namespace peftops::cuda {

constexpr int kStagedGroups = 128;   // of a row, whose scales and zeros are in shared memory

template <class T, int B, int Outs> struct GroupStream {
  static constexpr int kBits = B, kPieces = B == 3 ? 3 : 1, kOuts = Outs;
  static constexpr int kColumns = 4 * 64 * kPieces / B;   // four threads with pieces of 64 bits
  static constexpr bool kZeros = true, kEarlyScales = B != 3, kHoldsScales = false;
  static constexpr float kFactor = 1.f;
  struct Memory { float scale[kOuts][kStagedGroups + 1], zero[kOuts][kStagedGroups + 1]; };
  const GroupWeight& w;
  int log_group;

  struct NoTable { __device__ void is_filled() const {} };
  template <int Threads> __device__ NoTable begin(Memory&) const { return {}; }
  __device__ int staged() const { return int((int64_t(kStagedGroups) << log_group) / kColumns); }
  __device__ int parts() const { return kColumns >> log_group > 1 ? kColumns >> log_group : 1; }
  __device__ int64_t group_of(int chunk) const { return int64_t(chunk) * kColumns >> log_group; }

  // The scales and zeros of a stage, on their way from memory to shared memory: what a thread has of them.
  template <int Threads> struct Scales {
    static constexpr int kEach = kOuts * kStagedGroups / Threads;
    float scale[kEach], zero[kEach];

    __device__ void load(const GroupStream& of, int64_t first, int begin) {
      const int64_t groups = of.w.cols >> of.log_group;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = threadIdx.x + i * Threads;
        const int64_t row = first + e / kStagedGroups, group = of.group_of(begin) + e % kStagedGroups;
        scale[i] = zero[i] = 0.f;
        if (row < of.w.rows && group < groups)
          scale[i] = of.w.scales[row * groups + group], zero[i] = of.w.zeros[row * groups + group];
      }
    }
    __device__ void store(const GroupStream&, Memory& memory, int) const {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = threadIdx.x + i * Threads, row = e / kStagedGroups, at = e % kStagedGroups;
        memory.scale[row][at] = scale[i], memory.zero[row][at] = zero[i];
      }
    }
  };
  __device__ Affine affine(const Memory& memory, int row, int begin, int chunk, int part) const {
    const int at = int(group_of(chunk) - group_of(begin)) + part;
    return {memory.scale[row][at], memory.zero[row][at]};
  }

  // Codes 2 i and 2 i + 1 of a thread as a pair of T.
  __device__ static uint32_t pair(const uint2 (&codes)[kPieces], int i) {
    const auto word = [&](int j) { return j % 2 ? codes[j / 2].y : codes[j / 2].x; };
    const int bit = 2 * B * i;
    uint32_t two = word(bit / 32) >> bit % 32;
    if (bit % 32 + 2 * B > 32) two |= word(bit / 32 + 1) << (32 - bit % 32);   // with three bits alone
    uint32_t spread;   // a code in each half
    if constexpr (B == 8) {
      spread = __byte_perm(two, 0, 0x4140);
    } else {
      constexpr uint32_t kMask = (1 << B) - 1;
      spread = (two & ((1 << 2 * B) - 1)) * (1 + (1 << (16 - B))) & (kMask | kMask << 16);
    }
    return numbers(spread, T());
  }
  // Under the bits of 1024 or of 128, where a step is 1, the codes are added to it; or, too large for that, in fp32.
  __device__ static uint32_t numbers(uint32_t spread, __half) {
    const uint32_t base = 0x64006400, shifted = spread | base;
    const __half2 result = __hsub2(reinterpret_cast<const __half2&>(shifted), reinterpret_cast<const __half2&>(base));
    return reinterpret_cast<const uint32_t&>(result);
  }
  __device__ static uint32_t numbers(uint32_t spread, __nv_bfloat16) {
    if constexpr (B == 8) {
      return __byte_perm(__float_as_uint(whole(spread & 255)), __float_as_uint(whole(spread >> 16)), 0x7632);
    } else {
      const uint32_t base = 0x43004300, shifted = spread | base;
      const __nv_bfloat162 result =
          __hsub2(reinterpret_cast<const __nv_bfloat162&>(shifted), reinterpret_cast<const __nv_bfloat162&>(base));
      return reinterpret_cast<const uint32_t&>(result);
    }
  }
  __device__ void decode(NoTable, const uint2 (&codes)[kPieces], int i, uint32_t& low, uint32_t& high) const {
    low = pair(codes, 2 * i), high = pair(codes, 2 * i + 1);
  }
};

// For an infinite x, code * x - zero * x is NaN, but weight * x is not. So if x is not finite, or a sum leaves the
// range of fp32, the sum is computed again, weight by weight.
template <class T> struct GroupFinish {
  const GroupLinear& a;
  int log_group;

  __device__ void operator()(int64_t row, int64_t col, float sum) const {
    const int64_t k = a.weight.cols;
    if (!isfinite(sum)) {
      const T* x = static_cast<const T*>(a.x) + row * k;
      sum = 0.f;
#pragma unroll 1
      for (int64_t j = 0; j < k; ++j) sum = __fmaf_rn(to_float(x[j]), weight_at(a.weight, log_group, col * k + j), sum);
    }
    Finish<T, GroupLinear>{a, a.r}(row, col, sum);
  }
};

// Whether W and x can be read in chunks.
template <int B> bool has_chunks(const GroupLinear& a) {
  constexpr int kColumns = GroupStream<__half, B, 16>::kColumns;
  return a.dtype != DType::f32 && a.weight.cols % kColumns == 0 && a.weight.group >= kColumns / 4 &&
         aligned(a.weight.packed, 8) && aligned(a.x, 16);
}

}  // namespace peftops::cuda
