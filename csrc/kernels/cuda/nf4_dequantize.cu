// The elements of dequantize.cuh, from packed NF4 codes. Limit: writing the result.
#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/nf4_dequantize.h"

namespace peftops::cuda {
namespace {

template <class T, bool Wide>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize(Nf4Dequantize a, int log_block) {
  __shared__ LaneTable code;
  __shared__ float map[256];
  code.fill<kDequantizeThreads>(nf4_codes.at);
  if (a.weight.absmax_code) map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  const Nf4Elements<Pack<T>::kSize, Wide> elements{a.weight, code, map, log_block, 0};
  dequantize_packs<T, Wide>(elements, static_cast<T*>(a.out), a.weight.rows * a.weight.cols);
}

__global__ void __launch_bounds__(kDequantizeThreads) expand_absmax(Nf4Absmax a) {
  __shared__ float map[256];
  map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  const int64_t block = int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x;
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
    const unsigned grid = dequantize_blocks<T>(n);
    const bool wide = aligned(a.weight.packed, N / 2) && aligned(a.out, 16);
    if (wide) dequantize<T, true><<<grid, kDequantizeThreads, 0, stream>>>(a, log_block);
    else dequantize<T, false><<<grid, kDequantizeThreads, 0, stream>>>(a, log_block);
    return cudaGetLastError();
  });
}

cudaError_t nf4_absmax(const Nf4Absmax& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  expand_absmax<<<unsigned(ceil_div(a.blocks, kDequantizeThreads)), kDequantizeThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
