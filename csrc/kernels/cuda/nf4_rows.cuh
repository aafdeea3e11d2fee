// An NF4 weight for rows.cuh. A byte of codes is half a fragment register: a pair of elements, found in a table with a
// copy for each bank.
#pragma once
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

constexpr int kChunk = 64;    // columns that share an absmax at most
constexpr int kScales = 64;   // chunks whose absmax values are decoded at a time

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

template <class T> struct Nf4Stream {
  static constexpr int kBits = 4, kColumns = kChunk, kPieces = 1, kUnroll = 2;
  static constexpr bool kZeros = false;
  static constexpr float kFactor = kCodeFactor<T>;
  struct Memory {
    PairTable<T> pairs;
    float scale[kOuts][kScales + 1];
    float map[256];
  };
  const Nf4Weight& w;
  int log_block;

  __device__ void begin(Memory& memory) const {
    memory.pairs.fill();
    if (w.absmax_code) memory.map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  }
  __device__ static constexpr int staged() { return kScales; }
  __device__ static constexpr int parts() { return 1; }
  __device__ void stage(Memory& memory, int64_t first, int begin) const {
    const float offset = offset_of(w);
    for (int e = threadIdx.x; e < kOuts * kScales; e += kRowsThreads) {
      const int64_t row = first + e / kScales, column = (begin + int64_t(e % kScales)) * kChunk;
      const bool exists = row < w.rows && column < w.cols;
      memory.scale[e / kScales][e % kScales] =
          exists ? absmax_of(w, (row * w.cols + column) >> log_block, memory.map, offset) : 0.f;
    }
  }
  // Two bytes, four columns.
  __device__ void decode(const Memory& memory, const uint2 (&codes)[1], int i, uint32_t& low, uint32_t& high) const {
    const uint32_t bytes = i < 2 ? codes[0].x : codes[0].y;
    low = memory.pairs(bytes, i % 2 * 2), high = memory.pairs(bytes, i % 2 * 2 + 1);
  }
  __device__ Affine affine(const Memory& memory, int row, int begin, int chunk, int) const {
    return {memory.scale[row][chunk - begin], 0.f};
  }
};

// Whether there are W and x, and they can be read in such chunks.
inline bool has_chunks(const Nf4Linear& a) {
  return a.weight.cols > 0 && a.dtype != DType::f32 && a.weight.cols % kChunk == 0 &&
         a.weight.block_size % kChunk == 0 && aligned(a.weight.packed, 8) && aligned(a.x, 16);
}

}  // namespace peftops::cuda
