// A lane holds 16 bytes of the weight; the lanes of a block find its largest magnitude by shuffles and code what they hold
// in registers, so the weight is read once. Limit: reading the weight.
#include "kernels/mxfp4_quantize.h"
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/mxfp4_decode.cuh"

namespace peftops::cuda {
namespace {

// The nearest code; where the larger of two is even, a tie is its own.
__device__ uint32_t nearest(float v) {
  const float size = fabsf(v);
  const uint32_t code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) +
                        (size >= 3.5f) + (size > 5.f);
  return code | (__float_as_uint(v) >> 31) << 3;
}

template <class T, bool Wide>
__global__ void __launch_bounds__(kBlockThreads) quantize_mx(Mxfp4Quantize a, int log_lanes) {
  constexpr int N = Pack<T>::kSize;
  const int64_t n = a.blocks * kMxBlock, i = first_of_lane<T>(1);
  float v[N];
  load<T, Wide>(static_cast<const T*>(a.weight), i, n, v);
  uint32_t most = 0;   // magnitudes are ordered as the integers that their bits are, NaN above infinity
#pragma unroll
  for (float x : v) most = max(most, __float_as_uint(fabsf(x)));
  const uint32_t exponent = over_lanes(most, log_lanes, [](uint32_t a, uint32_t b) { return max(a, b); }) >> 23;
  const uint32_t scale = exponent > kE2m1Exponent ? exponent - kE2m1Exponent : 0;
  const bool none = exponent == 255;   // no number describes this block
  const float inverse = __uint_as_float((254 - scale) << 23);
  LaneCodes<4, N> codes = {};
#pragma unroll
  for (int k = 0; k < N; ++k) codes.set(k, none ? 0 : nearest(__fmul_rn(v[k], inverse)));
  codes.template store<Wide>(a.packed, i, n);
  if (i < n && threadIdx.x % (1 << log_lanes) == 0) a.scales[i >> kLogMxBlock] = uint8_t(none ? 255 : scale);
}

}  // namespace

cudaError_t mxfp4_quantize(const Mxfp4Quantize& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  const bool wide = aligned(a.weight, 16) && aligned(a.packed, 8);
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Blocks<T> blocks(a.blocks * kMxBlock, kMxBlock);
    const auto kernel = wide ? quantize_mx<T, true> : quantize_mx<T, false>;
    kernel<<<blocks.grid, kBlockThreads, 0, stream>>>(a, blocks.log_lanes);
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
