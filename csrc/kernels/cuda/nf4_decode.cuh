// From packed NF4 codes back to floats: the pieces that the CUDA kernels share.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/nf4.h"

namespace peftops::cuda {

struct Nf4Codes { float at[16]; };
constexpr Nf4Codes make_nf4_codes() {
  Nf4Codes c = {};
  for (int i = 0; i < 16; ++i) c.at[i] = kNf4Code[i];
  return c;
}
static __device__ const Nf4Codes nf4_codes = make_nf4_codes();
static __device__ const DynamicMap dynamic_map = kDynamicMap;

// The field of `word` that begins at `bit`, times 128.
__device__ inline uint32_t field_at(uint32_t word, int bit, uint32_t mask) {
  return (bit < 7 ? word << (7 - bit) : word >> (bit - 7)) & mask << 7;
}
__device__ inline const void* lane_of(const void* table, uint32_t row) {
  return static_cast<const char*>(table) + (row | threadIdx.x % kWarp * 4);
}

// A look-up of 16 floats that never serialises: each lane has a copy of the table in a bank of its own. One 4-byte
// load per code; byte permutes, which need no memory, take six instructions per code for the four bytes of a float.
// Where a row of 128 bytes begins is a shift and a mask of the codes, and the lane is or'ed in.
struct LaneTable {
  float at[16][kWarp];

  template <int Threads> __device__ void fill(const float* values) {   // by all of them; a barrier must follow
#pragma unroll
    for (int row = 0; row < 16; row += Threads / kWarp) {
      const int mine = row + threadIdx.x / kWarp;
      at[mine][threadIdx.x % kWarp] = values[mine];
    }
  }
  __device__ float operator()(uint32_t code) const { return at[code][threadIdx.x % kWarp]; }
  // That of element i of eight codes in a word: bytes run upwards, and the high nibble comes first.
  __device__ float element(uint32_t codes, int i) const {
    return *static_cast<const float*>(lane_of(at, field_at(codes, i / 2 * 8 + (i % 2 ? 0 : 4), 15)));
  }
};

// The absmax of a block; of a double-quantised one with two roundings, like bitsandbytes. `map`: the dynamic map;
// `offset`: absmax_offset, which a loop reads once.
__device__ inline float offset_of(const Nf4Weight& w) { return w.absmax ? 0.f : *w.absmax_offset; }
__device__ inline float absmax_of(const Nf4Weight& w, int64_t block, const float* map, float offset) {
  if (w.absmax) return w.absmax[block];
  return __fadd_rn(__fmul_rn(map[w.absmax_code[block]], w.absmax_scale[uint64_t(block) / kAbsmaxBlock]), offset);
}
__device__ inline float absmax_of(const Nf4Weight& w, int64_t block, const float* map) {
  return absmax_of(w, block, map, offset_of(w));
}

// Any element of a weight.
__device__ inline float weight_at(const Nf4Weight& w, int log_block, int64_t flat, const float* map) {
  const uint32_t byte = w.packed[flat / 2];
  return __fmul_rn(nf4_codes.at[flat % 2 ? byte & 15 : byte >> 4], absmax_of(w, flat >> log_block, map));
}

// The codes of `count` elements from byte `p` on, as LaneTable reads them. Wide: p is a multiple of the whole.
template <int N, bool Wide> __device__ uint32_t load_codes(const uint8_t* p, int count) {
  if (Wide && count == N) return N == 8 ? *reinterpret_cast<const uint32_t*>(p) : *reinterpret_cast<const uint16_t*>(p);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    if (2 * i < count) codes |= uint32_t(p[i]) << 8 * i;
  return codes;
}

// A weight for dequantize.cuh, from element `begin` on, a whole pack's first.
template <int N, bool Wide> struct Nf4Elements {
  struct Held { uint32_t codes; float scale; };
  const Nf4Weight& w;
  const LaneTable& code;
  const float* map;
  int log_block;
  int64_t begin;

  __device__ Held load(int64_t i, int count) const {
    i += begin;
    return {load_codes<N, Wide>(w.packed + i / 2, count), absmax_of(w, i >> log_block, map)};
  }
  __device__ float value(const Held& held, int k) const { return code.element(held.codes, k) * held.scale; }
};

// The same for operands.cuh.
template <class T> struct Nf4Source {
  struct Memory { LaneTable code; float map[256]; };
  Nf4Weight w;
  int log_block;

  __device__ void begin(Memory& memory) const {
    memory.code.template fill<256>(nf4_codes.at);
    if (w.absmax_code) memory.map[threadIdx.x] = dynamic_map.at[threadIdx.x];
    __syncthreads();
  }
  __device__ Nf4Elements<Pack<T>::kSize, true> row(const Memory& memory, int64_t flat, int64_t) const {
    return {w, memory.code, memory.map, log_block, flat};
  }
  __device__ float at(const Memory& memory, int64_t flat) const { return weight_at(w, log_block, flat, memory.map); }
};

}  // namespace peftops::cuda
