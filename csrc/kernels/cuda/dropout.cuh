// The mask of kernels/dropout.h.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/dropout.h"

namespace peftops::cuda {

struct DropoutMask {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;   // 0: nothing is dropped
  float factor = 1.f;       // 1 / (1 - p)
  uint64_t key64 = 0;       // the seed, once begin() has read it

  DropoutMask() = default;
  explicit DropoutMask(const Dropout& d)
      : seed(d.seed), threshold(uint32_t(d.p * 4294967296.0)), factor(float(1 / (1 - d.p))) {}

  __device__ void begin() {   // first thing in a kernel: reads the seed once
    if (threshold) key64 = uint64_t(*seed);
  }
  // The words of four columns 16 apart, the first of which is `col`: one draw.
  __device__ uint4 draw(int64_t row, int64_t col) const {
    uint32_t word[4] = {uint32_t(16 * (col >> 6) + (col & 15)), uint32_t(row), uint32_t(uint64_t(row) >> 32), 0};
    uint32_t key[2] = {uint32_t(key64), uint32_t(key64 >> 32)};
    constexpr uint32_t kWeyl[2] = {kPhiloxWeyl[0], kPhiloxWeyl[1]};
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const uint64_t a = uint64_t(kPhiloxMultiplier[0]) * word[0], b = uint64_t(kPhiloxMultiplier[1]) * word[2];
      word[0] = uint32_t(b >> 32) ^ word[1] ^ key[0], word[1] = uint32_t(b);
      word[2] = uint32_t(a >> 32) ^ word[3] ^ key[1], word[3] = uint32_t(a);
      key[0] += kWeyl[0], key[1] += kWeyl[1];
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
  // Which of the columns first + 16 q + i stay, for q < 4 and i < N: bit N q + i. `first` is in the first 16 of 64
  // columns, so that no draw is wasted.
  template <int N> __device__ uint32_t keeps(int64_t row, int64_t first) const {
    if (threshold == 0) return ~0u;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint4 w = draw(row, first + i);
      bits |= uint32_t(w.x >= threshold) << i | uint32_t(w.y >= threshold) << (N + i) |
              uint32_t(w.z >= threshold) << (2 * N + i) | uint32_t(w.w >= threshold) << (3 * N + i);
    }
    return bits;
  }
  __device__ float apply(int64_t row, int64_t col, float v) const {
    if (threshold == 0) return v;
    const uint4 w = draw(row, col);
    const int pick = int(col >> 4 & 3);
    return (pick & 2 ? pick & 1 ? w.w : w.z : pick & 1 ? w.y : w.x) >= threshold ? __fmul_rn(v, factor) : 0.f;
  }
};

}  // namespace peftops::cuda
