// A lane holds 16 bytes of the weight. The lanes of a group find its extremes by shuffles and code what they hold in
// registers, so the weight is read once; only a group too large for a warp's registers is read again, from cache.
// Limit: reading the weight.
#include "kernels/group_quantize.h"
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/group_decode.cuh"

namespace peftops::cuda {
namespace {

struct Extremes {
  float least = __builtin_inff(), most = -__builtin_inff(), spoilt = 0.f;   // the last not 0 only for NaN and infinity

  __device__ void take(float v) {
    least = fminf(least, v), most = fmaxf(most, v), spoilt = __fadd_rn(spoilt, __fsub_rn(v, v));
  }
  __device__ void join_lanes(int log_lanes) {
    least = over_lanes(least, log_lanes, [](float a, float b) { return fminf(a, b); });
    most = over_lanes(most, log_lanes, [](float a, float b) { return fmaxf(a, b); });
    spoilt = over_lanes(spoilt, log_lanes, [](float a, float b) { return __fadd_rn(a, b); });
  }
};

// What describes a group. `inverse` is what w is multiplied with: 1 / scale, or 0 for codes 0.
struct Range {
  float scale, zero, inverse;

  __device__ static Range of(const Extremes& e, float levels, bool symmetric) {
    const float widest = fmaxf(e.most, -e.least), middle = (levels + 1) / 2;
    const float span = symmetric ? __fadd_rn(widest, widest) : __fsub_rn(e.most, e.least);
    const float scale = __fdiv_rn(__fadd_rn(span, e.spoilt), levels);
    if (scale >= kSmallestScale && scale <= __FLT_MAX__)
      return {scale, symmetric ? middle : __fdiv_rn(__fsub_rn(0.f, e.least), scale), __fdiv_rn(1.f, scale)};
    const float nan = __uint_as_float(0x7fc00000u), size = fabsf(e.least);
    if (!(scale < kSmallestScale)) return {nan, nan, 0.f};   // NaN or infinite
    if (symmetric || size < kSmallestScale) return {1.f, symmetric ? middle : 0.f, 1.f};
    return {size, e.least < 0 ? 1.f : -1.f, __fdiv_rn(1.f, size)};
  }

  // Rounds by adding 2^23, whose last bit is one: the sum's low byte is the code.
  __device__ float shifted_code(float v, float levels) const {
    const float code = __fadd_rn(__fmul_rn(v, inverse), zero);
    return __fadd_rn(fminf(fmaxf(code, 0.f), levels), 8388608.f);
  }
  __device__ float squared_error(float v, float levels) const {
    const float code = __fsub_rn(shifted_code(v, levels), 8388608.f);
    const float off = __fsub_rn(__fmul_rn(__fsub_rn(code, zero), scale), v);
    return __fmul_rn(off, off);
  }
};

// The best of a group's range and of narrower ones; error(range) is the same in all lanes of the group.
template <class F>
__device__ Range narrow(const Range& first, int64_t steps, float levels, bool symmetric, const F& error) {
  const float middle = levels / 2;
  Range best = first;
  float least = error(first);
  for (int64_t step = 1; step <= steps; ++step) {
    const float width = 1 - float(step) / 64, scale = __fmul_rn(first.scale, width);
    const float moved = symmetric ? first.zero : __fsub_rn(middle, __fdiv_rn(__fsub_rn(middle, first.zero), width));
    const Range tried = {scale, moved, __fdiv_rn(1.f, scale)};
    const float e = error(tried);
    if (e < least) least = e, best = tried;
  }
  return best;
}

template <class T, int B, bool Wide>
__global__ void __launch_bounds__(kBlockThreads)
quantize_groups(GroupQuantize a, int log_lanes, int tiles, int log_group) {
  constexpr int N = Pack<T>::kSize;
  constexpr float kLevels = (1 << B) - 1;
  const T* w = static_cast<const T*>(a.weight);
  const int64_t n = a.rows * a.cols, begin = first_of_lane<T>(tiles);
  float v[N];
  const auto fetch = [&](int t) { load<T, Wide>(w, begin + t * (kWarp * N), n, v); };

  Extremes extremes;
  for (int t = 0; t < tiles; ++t) {
    fetch(t);
#pragma unroll
    for (float x : v) extremes.take(x);
  }
  extremes.join_lanes(log_lanes);
  Range range = Range::of(extremes, kLevels, a.symmetric);
  if (a.narrower)
    range = narrow(range, a.narrower, kLevels, a.symmetric, [&](const Range& r) {
      float sum = 0.f;
      for (int t = 0; t < tiles; ++t) {
        if (tiles > 1) fetch(t);
#pragma unroll
        for (float x : v) sum = __fadd_rn(sum, r.squared_error(x, kLevels));
      }
      return over_lanes(sum, log_lanes, [](float a, float b) { return __fadd_rn(a, b); });
    });
  if (begin < n && threadIdx.x % (1 << log_lanes) == 0)
    a.scales[begin >> log_group] = range.scale, a.zeros[begin >> log_group] = range.zero;
  for (int t = 0; t < tiles; ++t) {
    if (tiles > 1) fetch(t);
    LaneCodes<B, N> codes = {};
#pragma unroll
    for (int k = 0; k < N; ++k) codes.set(k, __float_as_uint(range.shifted_code(v[k], kLevels)) & 255);
    codes.template store<Wide>(a.packed, begin + t * (kWarp * N), n);
  }
}

}  // namespace

cudaError_t group_quantize(const GroupQuantize& a, cudaStream_t stream) {
  if (a.rows * a.cols == 0) return cudaSuccess;
  const bool wide = aligned(a.weight, 16) && aligned(a.packed, 8);
  const int log_group = log_group_of(a.group);
  return with_bits(a.bits, [&](auto bits) {
    return with_type(a.dtype, [&](auto t) {
      using T = decltype(t);
      constexpr int B = decltype(bits)::value;
      const Blocks<T> blocks(a.rows * a.cols, a.group);
      const auto kernel = wide ? quantize_groups<T, B, true> : quantize_groups<T, B, false>;
      kernel<<<blocks.grid, kBlockThreads, 0, stream>>>(a, blocks.log_lanes, blocks.tiles, log_group);
      return cudaGetLastError();
    });
  });
}

}  // namespace peftops::cuda
