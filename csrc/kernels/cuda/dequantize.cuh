// Writing a quantised weight out. A lane writes 16 bytes: 8 elements of 16 bits, or 4 of 32 bits. A warp's store is
// then one run of 512 bytes, whole sectors, and four of them a thread are under way at a time. Limit: writing out.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

constexpr int kDequantizeThreads = 256;
constexpr int kPacks = 4;   // a thread's share: enough loads in flight, and a table is filled once for 8192 elements

// The weight's load(i, count) fetches what describes elements i to i + count, one pack at most, and its value(held, k)
// is the k-th of them. Wide: whole packs of `out` are aligned. This thread's packs are `first` and three more, so far apart.
template <class T, bool Wide, class Weight>
__device__ void dequantize_four(const Weight& weight, T* out, int64_t n, int64_t first, int apart) {
  constexpr int N = Pack<T>::kSize;
  decltype(weight.load(first, N)) held[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {   // all loads before the first is used
    const int64_t i = (first + p * apart) * N;
    if (i >= n) break;
    held[p] = weight.load(i, n - i < N ? int(n - i) : N);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = (first + p * apart) * N;
    if (i >= n) break;
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = from_float<T>(weight.value(held[p], k));
    if (Wide && n - i >= N) *reinterpret_cast<Pack<T>*>(out + i) = pack;
    else
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k < n) out[i + k] = pack.at[k];
  }
}

// All n elements, by dequantize_blocks blocks of threads.
template <class T, bool Wide, class Weight> __device__ void dequantize_packs(const Weight& weight, T* out, int64_t n) {
  const int64_t first = int64_t(blockIdx.x) * (kDequantizeThreads * kPacks) + threadIdx.x;
  dequantize_four<T, Wide>(weight, out, n, first, kDequantizeThreads);
}

template <class T> unsigned dequantize_blocks(int64_t n) {
  return unsigned(ceil_div(n, int64_t(kDequantizeThreads) * kPacks * Pack<T>::kSize));
}

}  // namespace peftops::cuda
