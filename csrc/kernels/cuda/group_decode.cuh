// From packed group-wise codes back to floats: the pieces that the CUDA kernels share. Eight codes take whole bytes and
// a group is eight at least, so the rows of a weight lie end to end: codes and groups have flat indices.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/group.h"

namespace peftops::cuda {

// f(Bits<4>()) with the width of a code.
template <int B> struct Bits { static constexpr int value = B; };
template <class F> cudaError_t with_bits(int64_t bits, F f) {
  switch (bits) {
    case 2: return f(Bits<2>());
    case 3: return f(Bits<3>());
    case 4: return f(Bits<4>());
    case 8: return f(Bits<8>());
  }
  return cudaErrorInvalidValue;
}

inline int log_group_of(int64_t group) { return __builtin_ctzll(uint64_t(group)); }

// A whole number below 2^23 as a float, without the conversion that few units of a multiprocessor do.
__device__ inline float whole(uint32_t number) { return __fsub_rn(__uint_as_float(0x4b000000u | number), 8388608.f); }

__device__ inline float group_value(uint32_t code, float zero, float scale) {
  return __fmul_rn(__fsub_rn(whole(code), zero), scale);
}

// Any element of a weight.
__device__ inline float weight_at(const GroupWeight& w, int log_group, int64_t flat) {
  const int64_t bit = flat * w.bits;
  const int shift = int(bit & 7);
  uint32_t bytes = w.packed[bit >> 3];
  if (shift + w.bits > 8) bytes |= uint32_t(w.packed[(bit >> 3) + 1]) << 8;   // of three bits alone
  return group_value(bytes >> shift & ((1u << w.bits) - 1), w.zeros[flat >> log_group], w.scales[flat >> log_group]);
}

// The codes of N elements that a lane holds, the first in the lowest bits; a warp's lanes hold 32 N in a row.
template <int B, int N> struct LaneCodes {
  static constexpr int kBits = B * N, kWords = kBits > 32 ? 2 : 1;
  static constexpr bool kFillsWords = (kBits & (kBits - 1)) == 0;   // 8, 16, 32 or 64 bits; else 12 or 24

  uint32_t word[kWords];

  __device__ uint32_t operator[](int k) const { return word[k * B / 32] >> k * B % 32 & ((1u << B) - 1); }

  // From element i of n on. Wide: packed is aligned to 8 bytes.
  template <bool Wide> __device__ void load(const uint8_t* packed, int64_t i, int64_t n) {
    const int64_t bit = i * B;
    const uint8_t* p = packed + bit / 8;
    if constexpr (Wide && kFillsWords) {
      if constexpr (kBits == 8) word[0] = *p;
      if constexpr (kBits == 16) word[0] = *reinterpret_cast<const uint16_t*>(p);
      if constexpr (kBits == 32) word[0] = *reinterpret_cast<const uint32_t*>(p);
      if constexpr (kBits == 64) {
        const uint2 both = *reinterpret_cast<const uint2*>(p);
        word[0] = both.x, word[1] = both.y;
      }
      return;
    }
    if constexpr (Wide) {   // a warp's codes are kBits words: as many lanes load one each, and all pick theirs
      const int lane = threadIdx.x % kWarp;
      const int64_t begin = i - lane * N;
      if (begin + kWarp * N <= n) {
        const uint32_t mine = lane < kBits ? reinterpret_cast<const uint32_t*>(packed + begin / 8 * B)[lane] : 0;
        const int at = lane * kBits;
        const uint32_t low = __shfl_sync(~0u, mine, at / 32), high = __shfl_sync(~0u, mine, at / 32 + 1);
        word[0] = __funnelshift_r(low, high, at % 32);
        return;
      }
    }
    uint64_t bytes = 0;
#pragma unroll
    for (int b = 0; b < (kBits + 7) / 8; ++b) bytes |= uint64_t(p[b]) << 8 * b;
    bytes >>= bit % 8;   // four bits where each lane has twelve
    word[0] = uint32_t(bytes);
    if constexpr (kWords == 2) word[1] = uint32_t(bytes >> 32);
  }

  __device__ void set(int k, uint32_t code) { word[k * B / 32] |= code << k * B % 32; }   // of words that were 0

  // The reverse, by all lanes of a warp: those that have elements hold N each.
  template <bool Wide> __device__ void store(uint8_t* packed, int64_t i, int64_t n) const {
    if constexpr (kFillsWords) {
      uint8_t* p = packed + i / 8 * B + i % 8 * B / 8;
      if (i >= n) return;
      if constexpr (Wide && kBits == 16) *reinterpret_cast<uint16_t*>(p) = uint16_t(word[0]);
      else if constexpr (Wide && kBits == 32) *reinterpret_cast<uint32_t*>(p) = word[0];
      else if constexpr (Wide && kBits == 64) *reinterpret_cast<uint2*>(p) = make_uint2(word[0], word[1]);
      else
#pragma unroll
        for (int b = 0; b < kBits / 8; ++b) p[b] = uint8_t(word[b / 4] >> b % 4 * 8);
    } else {   // octets of 24 bits, one in each lane or every other
      constexpr int kLanes = 24 / kBits;
      const int lane = threadIdx.x % kWarp, at = lane * 32;
      uint32_t octet = word[0];
      if (kLanes == 2) octet |= __shfl_down_sync(~0u, octet, 1) << 12;
      const uint32_t first = __shfl_sync(~0u, octet, at / 24 * kLanes);
      const uint32_t next = __shfl_sync(~0u, octet, (at / 24 + 1) * kLanes);
      const int64_t begin = i - lane * N;
      if (Wide && begin + kWarp * N <= n) {
        const uint32_t whole_word = first >> at % 24 | next << (24 - at % 24);
        if (lane < kBits) reinterpret_cast<uint32_t*>(packed + begin / 8 * B)[lane] = whole_word;
      } else if (lane % kLanes == 0 && i < n) {
#pragma unroll
        for (int b = 0; b < B; ++b) packed[i / 8 * B + b] = uint8_t(octet >> 8 * b);
      }
    }
  }
};

// A weight for dequantize.cuh, from element `begin` up to `end`, both whole packs'.
template <int B, int N, bool Wide> struct GroupElements {
  struct Held { LaneCodes<B, N> codes; float scale, zero; };
  const GroupWeight& w;
  int log_group;
  int64_t begin, end;

  __device__ Held load(int64_t i, int) const {
    i += begin;
    Held held;
    held.codes.template load<Wide>(w.packed, i, end);
    held.scale = w.scales[i >> log_group], held.zero = w.zeros[i >> log_group];
    return held;
  }
  __device__ float value(const Held& held, int k) const { return group_value(held.codes[k], held.zero, held.scale); }
};

// The same for operands.cuh.
template <class T, int B> struct GroupSource {
  struct Memory {};
  GroupWeight w;
  int log_group;

  __device__ void begin(Memory&) const {}
  __device__ GroupElements<B, Pack<T>::kSize, true> row(const Memory&, int64_t flat, int64_t end) const {
    return {w, log_group, flat, end};
  }
  __device__ float at(const Memory&, int64_t flat) const { return weight_at(w, log_group, flat); }
};

}  // namespace peftops::cuda
