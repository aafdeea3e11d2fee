// A lane holds 16 bytes of the weight: 8 elements of 16 bits or 4 of 32 bits. The lanes of a quantisation block find
// its maximum by shuffles and code what they hold in registers, so the weight is read once; only a block too large
// for a warp's registers is read twice, the second time from cache. Of shorter ones a warp has four tiles under way, and
// makes its table once for them. Limit: the instructions, a dozen an element.
#include <type_traits>

#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/nf4_quantize.h"

namespace peftops::cuda {
namespace {

__device__ const DynamicMidpoints dynamic_midpoints = kDynamicMidpoints;

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

// Nearest codes by look-up: [-1, 1] is cut into bins so narrow that none holds two midpoints of the sixteen codes. For
// a bin, the table has the code below its midpoint, and the midpoint. One comparison then decides.
constexpr int kBins = 32;
constexpr float kBinsPerUnit = 15.875f;   // so that 1 and what rounding adds to it are in the last
struct alignas(8) Bin { float midpoint; uint32_t code; };
struct Bins { Bin at[kBins]; };
constexpr Bins make_bins() {
  Bins bins = {};
  for (int i = 0; i < kBins; ++i) {
    const double low = (i - kBins / 2) / double(kBinsPerUnit), high = (i + 1 - kBins / 2) / double(kBinsPerUnit);
    bins.at[i] = {__FLT_MAX__, 0};
    for (int c = 0; c < 15; ++c) {
      if (kNf4Midpoints.below[c] < low) bins.at[i].code = c + 1;
      else if (kNf4Midpoints.below[c] < high) bins.at[i].midpoint = kNf4Midpoints.below[c];
    }
  }
  return bins;
}
__device__ const Bins nf4_bins = make_bins();
constexpr bool no_bin_has_two() {
  const Bins bins = make_bins();
  int found = 0;
  for (int i = 0; i < kBins; ++i) found += bins.at[i].midpoint < 1.f;
  return found == 15;
}
static_assert(no_bin_has_two(), "each of the fifteen midpoints has a bin of its own");

// A copy of it for every lane, so that no two want the same bank.
struct LaneBins {
  Bin at[kBins][kWarp];

  __device__ void fill() {   // by a block of threads; a barrier must follow
#pragma unroll
    for (int i = threadIdx.x; i < kBins * kWarp; i += kBlockThreads) at[i / kWarp][i % kWarp] = nf4_bins.at[i / kWarp];
  }
  // Added to 2^15 and cut, a number has its whole part from bit 8 on: where the bin's row begins.
  __device__ const Bin& operator()(float v) const {
    const uint32_t bits = __float_as_uint(__fmaf_rz(v, kBinsPerUnit, 0x1p15f + kBins / 2));
    const uint32_t row = bits & (kBins - 1) * sizeof at[0];
    return *reinterpret_cast<const Bin*>(reinterpret_cast<const char*>(at) + (row | threadIdx.x % kWarp * sizeof(Bin)));
  }
};
static_assert(sizeof(LaneBins) / kBins == 256, "2^15 has steps of 1 / 256");

template <class T> __device__ uint32_t most_of(const float (&v)[Pack<T>::kSize]) {
  uint32_t most = 0;
#pragma unroll
  for (float x : v) most = max(most, magnitude(x));
  return most;
}

template <int N, bool Wide>
__device__ void code(float (&v)[N], float inverse, const LaneBins& bins, uint8_t* packed, int64_t i, int64_t n) {
  if (inverse == 0.f)   // the block has no finite absmax: elements that are not finite get code 0
#pragma unroll
    for (float& x : v) x = magnitude(x) < 0x7f800000u ? 0.f : -1.f;
  const float factor = inverse == 0.f ? 1.f : inverse;
  uint32_t codes = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float scaled = __fmul_rn(v[k], factor);
    const Bin bin = bins(scaled);
    const int shift = k / 2 * 8 + (k % 2 ? 0 : 4);
    codes += bin.code << shift;
    if (scaled > bin.midpoint) codes += 1u << shift;
  }
  if (Wide && n - i >= N) {
    if (N == 8) *reinterpret_cast<uint32_t*>(packed + i / 2) = codes;
    else *reinterpret_cast<uint16_t*>(packed + i / 2) = uint16_t(codes);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; k += 2)
    if (i + k < n) packed[(i + k) / 2] = uint8_t(codes >> 4 * k);   // the last half byte is 7: a zero
}

constexpr int kRuns = 4;   // tiles of short blocks that a warp does

template <class T, bool Wide>
__global__ void __launch_bounds__(kBlockThreads) quantize(Nf4Quantize a, int log_lanes) {
  constexpr int N = Pack<T>::kSize;
  __shared__ LaneBins bins;
  const T* w = static_cast<const T*>(a.weight);
  const int64_t begin = (int64_t(blockIdx.x) * kRuns * kBlockThreads + threadIdx.x) * N;
  float v[kRuns][N];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) load<T, Wide>(w, begin + r * (kBlockThreads * N), a.n, v[r]);
  bins.fill();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    float inverse;
    const int64_t i = begin + r * (kBlockThreads * N);
    const float absmax = finish(most_of_lanes(most_of<T>(v[r]), log_lanes), inverse);
    if (i >= a.n) continue;
    if (threadIdx.x % (1 << log_lanes) == 0) a.absmax[i / N >> log_lanes] = absmax;
    code<N, Wide>(v[r], inverse, bins, a.packed, i, a.n);
  }
}

// Of blocks that a warp takes several tiles for.
template <class T, bool Wide>
__global__ void __launch_bounds__(kBlockThreads) quantize_long(Nf4Quantize a, int tiles) {
  constexpr int N = Pack<T>::kSize;
  __shared__ LaneBins bins;
  bins.fill();
  __syncthreads();

  const T* w = static_cast<const T*>(a.weight);
  const int64_t begin = first_of_lane<T>(tiles);
  float v[N], inverse;
  uint32_t most = 0;
  for (int t = 0; t < tiles; ++t) {
    load<T, Wide>(w, begin + t * (kWarp * N), a.n, v);
    most = max(most, most_of<T>(v));
  }
  const float absmax = finish(most_of_lanes(most, 5), inverse);
  if (begin < a.n && threadIdx.x % kWarp == 0) a.absmax[begin / a.block_size] = absmax;
  for (int t = 0; t < tiles; ++t) {
    const int64_t i = begin + t * (kWarp * N);
    load<T, Wide>(w, i, a.n, v);
    if (i < a.n) code<N, Wide>(v, inverse, bins, a.packed, i, a.n);
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
    const auto launch = [&](auto wide) {
      constexpr bool kWide = decltype(wide)::value;
      if (blocks.tiles > 1) quantize_long<T, kWide><<<blocks.grid, kBlockThreads, 0, stream>>>(a, blocks.tiles);
      else quantize<T, kWide><<<unsigned(ceil_div(blocks.grid, kRuns)), kBlockThreads, 0, stream>>>(a, blocks.log_lanes);
      return cudaGetLastError();
    };
    const bool wide = aligned(a.weight, 16) && aligned(a.packed, 4);
    return wide ? launch(std::true_type()) : launch(std::false_type());
  });
}

cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmax& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  quantize_absmax<<<unsigned(ceil_div(a.blocks, kAbsmaxBlock)), kAbsmaxBlock, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
