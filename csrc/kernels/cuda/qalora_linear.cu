// x is read once, 16 bytes a lane, and the lanes of a group add up what they hold by shuffles. The pooled x has a
// group-th of the size of x, and is still in cache when it is multiplied with A. Limit: reading x.
#include "kernels/qalora_linear.h"
#include "kernels/cuda/blocks.cuh"
#include "kernels/lora_linear.h"

namespace peftops::cuda {
namespace {

template <class T, bool Wide>
__global__ void __launch_bounds__(kBlockThreads) pool(QaloraShrink a, int log_lanes, int tiles, int log_group) {
  constexpr int N = Pack<T>::kSize;
  const int64_t n = a.m * a.k, begin = first_of_lane<T>(tiles);
  float sum = 0.f;
  for (int t = 0; t < tiles; ++t) {
    float v[N];
    load<T, Wide>(static_cast<const T*>(a.x), begin + t * (kWarp * N), n, v);
#pragma unroll
    for (float x : v) sum = __fadd_rn(sum, x);
  }
  sum = over_lanes(sum, log_lanes, [](float a, float b) { return __fadd_rn(a, b); });
  if (begin < n && threadIdx.x % (1 << log_lanes) == 0) a.p[begin >> log_group] = sum;
}

}  // namespace

cudaError_t qalora_shrink(const QaloraShrink& a, cudaStream_t stream) {
  const cudaError_t status = a.m * a.k == 0 ? cudaSuccess : with_type(a.x_dtype, [&](auto t) {
    using T = decltype(t);
    const Blocks<T> blocks(a.m * a.k, a.group);
    const auto kernel = aligned(a.x, 16) ? pool<T, true> : pool<T, false>;
    const int log_group = __builtin_ctzll(uint64_t(a.group));
    kernel<<<blocks.grid, kBlockThreads, 0, stream>>>(a, blocks.log_lanes, blocks.tiles, log_group);
    return cudaGetLastError();
  });
  if (status != cudaSuccess) return status;
  return lora_shrink({a.p, a.a, a.u, a.m, a.k / a.group, a.r, 1.f, true, DType::f32, a.a_dtype, {nullptr, 0}, nullptr},
                     stream);
}

}  // namespace peftops::cuda
