// The elements of dequantize.cuh. Limit: writing the result.
#include "kernels/mxfp4_dequantize.h"
#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/mxfp4_decode.cuh"

namespace peftops::cuda {
namespace {

template <class T, bool Wide> __global__ void __launch_bounds__(kDequantizeThreads) dequantize_mx(Mxfp4Dequantize a) {
  const int64_t n = a.weight.rows * a.weight.cols;
  const Mxfp4Elements<Pack<T>::kSize, Wide> elements{a.weight, 0, n};
  dequantize_packs<T, Wide>(elements, static_cast<T*>(a.out), n);
}

}  // namespace

cudaError_t mxfp4_dequantize(const Mxfp4Dequantize& a, cudaStream_t stream) {
  const int64_t n = a.weight.rows * a.weight.cols;
  if (n == 0) return cudaSuccess;
  const bool wide = aligned(a.weight.packed, 8) && aligned(a.out, 16);
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = wide ? dequantize_mx<T, true> : dequantize_mx<T, false>;
    kernel<<<dequantize_blocks<T>(n), kDequantizeThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
