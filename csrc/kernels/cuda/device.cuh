// What every CUDA kernel needs: element types, 16-byte vectors of them, and a few words for sizes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>

#include "kernels/dtype.h"

namespace peftops::cuda {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.44269504088896f;   // scores of a softmax are in powers of two

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> __device__ T from_float(float);
template <> __device__ inline float from_float<float>(float v) { return v; }
template <> __device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// An element of a tensor whose dtype is known at run time alone: a bias, a factor or a prompt, which are small.
__device__ inline float element(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return dtype == DType::bf16 ? to_float(__ushort_as_bfloat16(bits)) : to_float(__ushort_as_half(bits));
}
__device__ inline void set_element(void* p, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32) static_cast<float*>(p)[i] = v;
  else if (dtype == DType::bf16) static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
  else static_cast<__half*>(p)[i] = from_float<__half>(v);
}

__host__ __device__ constexpr int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// As many elements as one load or store moves at best.
template <class T> struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

inline bool aligned(const void* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

// A kernel may use more than 48 KB of shared memory only after it was allowed to, once on every GPU.
template <auto* Kernel> cudaError_t allow_shared(size_t bytes) {
  static std::atomic<uint64_t> allowed{0};   // a bit for a GPU; those beyond the 64th are asked again
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (status != cudaSuccess || allowed.load(std::memory_order_relaxed) & bit) return status;
  status = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (status == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

// What launchers ask of the current GPU.
struct Gpu { int capability, multiprocessors; };   // capability: 10 * major + minor

// Programmatic dependent launch, from Hopper on: a kernel that is launched by launch_early begins while the one before it
// ends, makes its tables and asks for its weight, and then waits. Before wait_for_inputs it may read only constants:
// the kernel before, or the one before that, may still be writing any other memory. A hint to the L2 cache is not a
// read.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void bring_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <class... Args, class... Given>
cudaError_t launch_early(void (*kernel)(Args...), const Gpu& gpu, dim3 grid, int threads, size_t shared,
                         cudaStream_t stream, const Given&... args) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads)), config.dynamicSmemBytes = shared;
  config.stream = stream, config.attrs = &early, config.numAttrs = gpu.capability >= 90;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, Args(args)...);
  return status == cudaSuccess ? status : cudaGetLastError();   // or the next launch would find it
}

inline cudaError_t ask_gpu(Gpu* gpu) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount);
  gpu->capability = 10 * major + minor;
  return status;
}

// f(T()) with the storage type of a DType.
template <class F> cudaError_t with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::bf16: return f(__nv_bfloat16());
    case DType::f16: return f(__half());
  }
  return cudaErrorInvalidValue;
}

}  // namespace peftops::cuda
