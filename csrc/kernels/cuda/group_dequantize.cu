// The elements of dequantize.cuh, from codes that take an octet or half an octet a lane. Limit: writing the result.
#include "kernels/group_dequantize.h"
#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/group_decode.cuh"

namespace peftops::cuda {
namespace {

template <class T, int B, bool Wide>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_groups(GroupDequantize a, int log_group) {
  const GroupElements<B, Pack<T>::kSize, Wide> elements{a.weight, log_group, 0, a.weight.rows * a.weight.cols};
  dequantize_packs<T, Wide>(elements, static_cast<T*>(a.out), a.weight.rows * a.weight.cols);
}

}  // namespace

cudaError_t group_dequantize(const GroupDequantize& a, cudaStream_t stream) {
  const int64_t n = a.weight.rows * a.weight.cols;
  if (n == 0) return cudaSuccess;
  const int log_group = log_group_of(a.weight.group);
  const bool wide = aligned(a.weight.packed, 8) && aligned(a.out, 16);
  return with_bits(a.weight.bits, [&](auto bits) {
    return with_type(a.dtype, [&](auto t) {
      using T = decltype(t);
      constexpr int B = decltype(bits)::value;
      const unsigned blocks = dequantize_blocks<T>(n);
      if (wide) dequantize_groups<T, B, true><<<blocks, kDequantizeThreads, 0, stream>>>(a, log_group);
      else dequantize_groups<T, B, false><<<blocks, kDequantizeThreads, 0, stream>>>(a, log_group);
      return cudaGetLastError();
    });
  });
}

}  // namespace peftops::cuda
