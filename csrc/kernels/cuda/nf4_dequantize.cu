// A lane writes 16 bytes: 8 elements of 16 bits from 4 bytes of codes, or 4 of 32 bits from 2. A warp's store is then
// one run of 512 bytes, whole sectors, and four of them a thread are under way at a time. Limit: writing the result.
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/nf4_dequantize.h"

namespace peftops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 4;   // a thread's share: enough loads in flight, and the tables are filled once for 8192 codes

// The codes of `count` elements from byte `p` on, as LaneTable reads them. Wide: p is a multiple of the whole.
template <int N, bool Wide> __device__ uint32_t load_codes(const uint8_t* p, int count) {
  if (Wide && count == N) return N == 8 ? *reinterpret_cast<const uint32_t*>(p) : *reinterpret_cast<const uint16_t*>(p);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    if (2 * i < count) codes |= uint32_t(p[i]) << 8 * i;
  return codes;
}

template <class T, bool Wide> __global__ void __launch_bounds__(kThreads) dequantize(Nf4Dequantize a, int log_block) {
  constexpr int N = Pack<T>::kSize;
  __shared__ LaneTable code;
  __shared__ float map[256];
  const Nf4Weight& w = a.weight;
  code.fill<kThreads>(nf4_codes.at);
  if (w.absmax_code) map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();

  const int64_t n = w.rows * w.cols, first = int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
  uint32_t codes[kPacks];
  float scale[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {   // all loads before the first is used
    const int64_t i = (first + p * kThreads) * N;
    if (i >= n) break;
    codes[p] = load_codes<N, Wide>(w.packed + i / 2, n - i < N ? int(n - i) : N);
    scale[p] = absmax_of(w, i >> log_block, map);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = (first + p * kThreads) * N;
    if (i >= n) break;
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.at[k] = from_float<T>(code.element(codes[p], k) * scale[p]);
    T* to = static_cast<T*>(a.out) + i;
    if (Wide && n - i >= N) *reinterpret_cast<Pack<T>*>(to) = out;
    else
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k < n) to[k] = out.at[k];
  }
}

__global__ void __launch_bounds__(kThreads) expand_absmax(Nf4Absmax a) {
  __shared__ float map[256];
  map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  const int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (block < a.blocks) a.absmax[block] = absmax_of({nullptr, nullptr, a.code, a.scale, a.offset, 0, 0, 0}, block, map);
}

}  // namespace

cudaError_t nf4_dequantize(const Nf4Dequantize& a, cudaStream_t stream) {
  const int64_t n = a.weight.rows * a.weight.cols;
  if (n == 0) return cudaSuccess;
  const int log_block = __builtin_ctzll(uint64_t(a.weight.block_size));
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = Pack<T>::kSize;
    const unsigned grid = unsigned(ceil_div(n, int64_t(kThreads) * kPacks * N));
    const bool wide = aligned(a.weight.packed, N / 2) && aligned(a.out, 16);
    if (wide) dequantize<T, true><<<grid, kThreads, 0, stream>>>(a, log_block);
    else dequantize<T, false><<<grid, kThreads, 0, stream>>>(a, log_block);
    return cudaGetLastError();
  });
}

cudaError_t nf4_absmax(const Nf4Absmax& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  expand_absmax<<<unsigned(ceil_div(a.blocks, kThreads)), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
