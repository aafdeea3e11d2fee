// The mask of kernels/dropout.h, an element at a time.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/dropout.h"

namespace peftops::cuda {

struct DropoutMask {
  const int64_t* seed;
  uint32_t threshold;
  float factor;   // 1 / (1 - p)
  uint64_t key64 = 0;   // the seed, once begin() has read it

  explicit DropoutMask(const Dropout& d)
      : seed(d.seed), threshold(uint32_t(d.p * 4294967296.0)), factor(float(1 / (1 - d.p))) {}

  __device__ void begin() {   // first thing in a kernel: reads the seed once
    if (threshold) key64 = uint64_t(*seed);
  }
  __device__ bool keeps(int64_t row, int64_t col) const {
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
    const int pick = int(col >> 4 & 3);
    return (pick & 2 ? pick & 1 ? word[3] : word[2] : pick & 1 ? word[1] : word[0]) >= threshold;
  }
  __device__ float apply(int64_t row, int64_t col, float v) const {
    return threshold == 0 ? v : keeps(row, col) ? __fmul_rn(v, factor) : 0.f;
  }
};

}  // namespace peftops::cuda
