// From packed MXFP4 codes back to floats: the pieces that the CUDA kernels share. Rows are whole blocks, so they lie end to
// end: codes and scales have flat indices. Codes of four bits lie as a group's do (LaneCodes, group_decode.cuh).
#pragma once
#include "kernels/cuda/group_decode.cuh"
#include "kernels/mxfp4.h"

namespace peftops::cuda {

constexpr int kLogMxBlock = 5;
static_assert(1 << kLogMxBlock == kMxBlock);

__device__ inline float scale_of(uint32_t scale) {
  return __uint_as_float(scale == 255 ? 0x7fc00000u : scale ? scale << 23 : 0x00400000u);
}

// The bits of a code are those of a float with its exponent and mantissa, but for what an exponent is counted from: what is
// subnormal in the one is so in the other.
__device__ inline float mxfp4_value(uint32_t code, float scale) {
  const float small = __uint_as_float((code & 8) << 28 | (code & 7) << 22);
  return __fmul_rn(__fmul_rn(small, 0x1p126f), scale);
}

// Any element of a weight.
__device__ inline float weight_at(const Mxfp4Weight& w, int64_t flat) {
  return mxfp4_value(w.packed[flat >> 1] >> (flat & 1) * 4, scale_of(w.scales[flat >> kLogMxBlock]));
}

// A weight for dequantize.cuh, from element `begin` up to `end`, both whole packs'.
template <int N, bool Wide> struct Mxfp4Elements {
  struct Held { LaneCodes<4, N> codes; float scale; };
  const Mxfp4Weight& w;
  int64_t begin, end;

  __device__ Held load(int64_t i, int) const {
    i += begin;
    Held held;
    held.codes.template load<Wide>(w.packed, i, end);
    held.scale = scale_of(w.scales[i >> kLogMxBlock]);
    return held;
  }
  __device__ float value(const Held& held, int k) const { return mxfp4_value(held.codes[k], held.scale); }
};

// The same for operands.cuh.
template <class T> struct Mxfp4Source {
  struct Memory {};
  Mxfp4Weight w;

  __device__ void begin(Memory&) const {}
  __device__ Mxfp4Elements<Pack<T>::kSize, true> row(const Memory&, int64_t flat, int64_t end) const {
    return {w, flat, end};
  }
  __device__ float at(const Memory&, int64_t flat) const { return weight_at(w, flat); }
};

}  // namespace peftops::cuda
