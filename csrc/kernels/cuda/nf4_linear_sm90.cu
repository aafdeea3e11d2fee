// The product with an NF4 weight by wgmma: machine code of sm_90a alone, which no other GPU runs.
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/nf4_linear_sm90.h"
#include "kernels/cuda/nf4_wgmma.cuh"

namespace peftops::cuda {
namespace {

template <class T, int Rows>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_rows(const Nf4Linear a, int log_block) {
  extern __shared__ __align__(1024) uint4 dynamic[];
  multiply_by_wgmma<T, Rows>(a, log_block, *reinterpret_cast<WgmmaMemory<T, Rows>*>(dynamic),
                             Finish<T, Nf4Linear>{a, a.r});
}

template <class T, int Rows> cudaError_t launch(const Nf4Linear& a, cudaStream_t stream) {
  constexpr size_t kShared = sizeof(WgmmaMemory<T, Rows>);
  const cudaError_t status = allow_shared<wgmma_rows<T, Rows>>(kShared);
  if (status != cudaSuccess) return status;
  const dim3 grid(unsigned(ceil_div(a.m, Rows)), unsigned(ceil_div(a.weight.rows, kWgmmaOuts)));
  wgmma_rows<T, Rows><<<grid, kWgmmaThreads, kShared, stream>>>(a, __builtin_ctzll(uint64_t(a.weight.block_size)));
  return cudaGetLastError();
}

template <class T> cudaError_t launch_rows(const Nf4Linear& a, cudaStream_t stream) {
  return a.m <= 64 ? launch<T, 64>(a, stream) : a.m <= 128 ? launch<T, 128>(a, stream) : launch<T, 256>(a, stream);
}

}  // namespace

cudaError_t takes_wgmma(const Nf4Linear& a, bool* result) {
  *result = a.m > 0 && a.weight.rows > 0 && has_chunks(a) && aligned(a.weight.packed, 16);
  Gpu gpu;
  const cudaError_t status = ask_gpu(&gpu);
  return status == cudaSuccess && gpu.capability != 90 ? cudaErrorNoKernelImageForDevice : status;
}

cudaError_t nf4_linear_sm90(const Nf4Linear& a, cudaStream_t stream) {
  return a.dtype == DType::bf16 ? launch_rows<__nv_bfloat16>(a, stream) : launch_rows<__half>(a, stream);
}

}  // namespace peftops::cuda
