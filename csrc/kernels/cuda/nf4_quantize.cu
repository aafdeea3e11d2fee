// A lane holds 16 bytes of the weight: 8 elements of 16 bits or 4 of 32 bits. The lanes of a quantisation block find
// its maximum by shuffles and code what they hold in registers, so the weight is read once; only a block too large
// for a warp's registers is read twice, the second time from cache. Limit: reading the weight.
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/nf4_quantize.h"

namespace peftops::cuda {
namespace {

__constant__ Nf4Midpoints nf4_midpoints = kNf4Midpoints;
__constant__ DynamicMidpoints dynamic_midpoints = kDynamicMidpoints;

// Magnitudes are compared as the integers that their bits are, which puts NaN above infinity above every number.
__device__ uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// absmax and its reciprocal from the largest magnitude: NaN and 0 if no number describes the block.
__device__ float finish(uint32_t most, float& inverse) {
  const float a = __uint_as_float(most);
  const bool finite = most < 0x7f800000u;
  inverse = finite ? __fdiv_rn(1.f, fmaxf(a, kSmallestAbsmax)) : 0.f;
  return finite ? a : __uint_as_float(0x7fc00000u);
}

// The largest over groups of 2^log_lanes lanes.
__device__ uint32_t most_of_lanes(uint32_t most, int log_lanes) {
  return over_lanes(most, log_lanes, [](uint32_t a, uint32_t b) { return max(a, b); });
}

// The number of midpoints below v; see kBucket.
__device__ uint32_t nearest_code(float v, const LaneTable& midpoints) {
  const float bucket = __fmaf_rn(v, __fmaf_rn(__fmul_rn(v, v), kBucket[2], kBucket[1]), kBucket[0]);
  const uint32_t c = uint32_t(__float2int_rz(fmaxf(bucket, 0.f)));
  return c + (v > midpoints(c));
}

template <class T> __device__ uint32_t most_of(const float (&v)[Pack<T>::kSize]) {
  uint32_t most = 0;
#pragma unroll
  for (float x : v) most = max(most, magnitude(x));
  return most;
}

template <int N, bool Wide>
__device__ void code(const float (&v)[N], float inverse, const LaneTable& midpoints, uint8_t* packed, int64_t i,
                     int64_t n) {
  uint32_t codes = 0;
#pragma unroll
  for (int k = 0; k < N; ++k)
    codes |= nearest_code(__fmul_rn(v[k], inverse), midpoints) << (k / 2 * 8 + (k % 2 ? 0 : 4));
  if (Wide && n - i >= N) {
    if (N == 8) *reinterpret_cast<uint32_t*>(packed + i / 2) = codes;
    else *reinterpret_cast<uint16_t*>(packed + i / 2) = uint16_t(codes);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; k += 2)
    if (i + k < n) packed[(i + k) / 2] = uint8_t(codes >> 4 * k);   // the last half byte is 7: a zero
}

template <class T, bool Wide>
__global__ void __launch_bounds__(kBlockThreads) quantize(Nf4Quantize a, int log_lanes, int tiles) {
  constexpr int N = Pack<T>::kSize;
  __shared__ LaneTable midpoints;
  midpoints.fill<kBlockThreads>(nf4_midpoints.below);
  __syncthreads();

  const T* w = static_cast<const T*>(a.weight);
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = first_of_lane<T>(tiles);
  float v[N], inverse;
  uint32_t most = 0;
  for (int t = 0; t < tiles; ++t) {
    load<T, Wide>(w, begin + t * (kWarp * N), a.n, v);
    most = max(most, most_of<T>(v));
  }
  const float absmax = finish(most_of_lanes(most, log_lanes), inverse);
  if (begin < a.n && lane % (1 << log_lanes) == 0) a.absmax[begin / a.block_size] = absmax;
  for (int t = 0; t < tiles; ++t) {
    const int64_t i = begin + t * (kWarp * N);
    if (tiles > 1) load<T, Wide>(w, i, a.n, v);
    if (i < a.n) code<N, Wide>(v, inverse, midpoints, a.packed, i, a.n);
  }
}

// One block of threads for each absmax_scale; the codes by bisection.
__global__ void __launch_bounds__(kAbsmaxBlock) quantize_absmax(Nf4QuantizeAbsmax a) {
  __shared__ float midpoints[256];
  __shared__ uint32_t most_of_warp[kAbsmaxBlock / kWarp];
  const int64_t i = int64_t(blockIdx.x) * kAbsmaxBlock + threadIdx.x;
  const float v = i < a.blocks ? __fsub_rn(a.absmax[i], *a.offset) : 0.f;
  uint32_t most = most_of_lanes(magnitude(v), 5);
  if (threadIdx.x % kWarp == 0) most_of_warp[threadIdx.x / kWarp] = most;
  midpoints[threadIdx.x] = dynamic_midpoints.below[threadIdx.x];
  __syncthreads();
  for (uint32_t m : most_of_warp) most = max(most, m);
  float inverse;
  const float scale = finish(most, inverse);
  if (threadIdx.x == 0) a.scale[blockIdx.x] = scale;
  const float scaled = __fmul_rn(v, inverse);
  int c = 0;
#pragma unroll
  for (int step = 128; step; step /= 2)
    if (scaled > midpoints[c + step - 1]) c += step;
  if (!(__fadd_rn(scale, *a.offset) <= __FLT_MAX__) && scale <= __FLT_MAX__)
    while (!(__fadd_rn(__fmul_rn(dynamic_map.at[c], scale), *a.offset) <= __FLT_MAX__)) --c;
  if (i < a.blocks) a.code[i] = uint8_t(c);
}

}  // namespace

cudaError_t nf4_quantize(const Nf4Quantize& a, cudaStream_t stream) {
  if (a.n == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const Blocks<T> blocks(a.n, a.block_size);
    const bool wide = aligned(a.weight, 16) && aligned(a.packed, 4);
    if (wide) quantize<T, true><<<blocks.grid, kBlockThreads, 0, stream>>>(a, blocks.log_lanes, blocks.tiles);
    else quantize<T, false><<<blocks.grid, kBlockThreads, 0, stream>>>(a, blocks.log_lanes, blocks.tiles);
    return cudaGetLastError();
  });
}

cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmax& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  quantize_absmax<<<unsigned(ceil_div(a.blocks, kAbsmaxBlock)), kAbsmaxBlock, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
