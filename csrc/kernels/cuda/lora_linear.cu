// The thin products of low-rank adapters, as the tiles of thin.cuh.
#include "kernels/cuda/thin.cuh"
#include "kernels/lora_linear.h"

namespace peftops::cuda {
namespace {

struct TileRows {   // of a block of threads
  int64_t m;
  __device__ int64_t operator()(int i) const {
    const int64_t row = int64_t(blockIdx.x) * kThinRows + i;
    return row < m ? row : -1;
  }
};

template <class X, int Tiles>
__global__ void __launch_bounds__(kThinThreads, 1) shrink(LoraShrink a, DropoutMask mask, DenseFactor f, bool wide) {
  __shared__ ShrinkMemory<Tiles> memory;
  let_next_begin();   // a product that waits for u has tables to make
  mask.begin();
  const float scale = mask.threshold ? __fmul_rn(a.scale, mask.factor) : a.scale;
  const TileRows row{a.m};
  shrink_tile<X, Tiles>(static_cast<const X*>(a.x), a.k, wide, row, f, int64_t(blockIdx.y) * 8 * Tiles, mask, memory,
                        [&](int i, int64_t j, float sum) {
                          if (j >= a.r) return;
                          if (a.parts) a.parts[(blockIdx.z * a.m + row(i)) * a.r + j] = sum;
                          else a.u[row(i) * a.r + j] = __fmul_rn(scale, sum);
                        }, {blockIdx.z, gridDim.z});
}

template <class Y>
__global__ void __launch_bounds__(kThinThreads, 2) expand(LoraExpand a, DropoutMask mask, DenseFactor f, bool wide) {
  mask.begin();
  const auto u = [&](int64_t row, int64_t j) { return j < a.r ? __fmul_rn(a.scale, a.u[row * a.r + j]) : 0.f; };
  expand_tile(static_cast<Y*>(a.y), a.k, wide, TileRows{a.m}, u, a.r, f, mask);
}

template <class X, int Tiles>
__global__ void __launch_bounds__(kThinThreads) gradient(LoraGradient a, DropoutMask mask, bool wide) {
  __shared__ GradientMemory memory;
  mask.begin();
  const float scale = mask.threshold ? __fmul_rn(a.scale, mask.factor) : a.scale;
  const auto u = [&](int64_t row, int64_t j) { return j < a.r ? a.u[row * a.r + j] : 0.f; };
  gradient_tile<X, Tiles>(
      static_cast<const X*>(a.x), a.k, wide, [](int64_t i) { return i; }, a.m, u, int64_t(blockIdx.y) * 16 * Tiles, mask,
      memory, [&](int64_t j, int64_t col, Few<4> sum) {
        if (j >= a.r || col >= a.k) return;
        if (a.parts) return sum.store(a.parts + (blockIdx.z * a.r + j) * a.k + col, a.k - col, a.k % 4 == 0);
#pragma unroll
        for (float& v : sum.at) v = __fmul_rn(scale, v);
        store_gradient(a, j, col, sum);
      }, {blockIdx.z, gridDim.z});
}

// result(i, sum) for each of `size` sums whose shares lie `size` apart, added in order.
template <class F> __device__ void add_parts(const float* parts, int64_t size, int64_t count, const F& result) {
  const int64_t i = int64_t(blockIdx.x) * kThinThreads + threadIdx.x;
  if (i >= size) return;
  float total = 0.f;
#pragma unroll 4
  for (int64_t part = 0; part < count; ++part) total += parts[part * size + i];
  result(i, total);
}

__global__ void __launch_bounds__(kThinThreads) add_shrunk(LoraShrink a, DropoutMask mask, int64_t count) {
  let_next_begin();
  const float scale = mask.threshold ? __fmul_rn(a.scale, mask.factor) : a.scale;
  add_parts(a.parts, a.m * a.r, count, [&](int64_t i, float sum) { a.u[i] = __fmul_rn(scale, sum); });
}

__global__ void __launch_bounds__(kThinThreads) add_gradients(LoraGradient a, DropoutMask mask, int64_t count) {
  const float scale = mask.threshold ? __fmul_rn(a.scale, mask.factor) : a.scale;
  add_parts(a.parts, a.r * a.k, count, [&](int64_t i, float sum) {
    set_element(a.d, a.d_dtype, a.by_rank ? i : i % a.k * a.r + i / a.k, __fmul_rn(scale, sum));
  });
}

int64_t tiles_of_ranks(const LoraShrink& a) { return a.x_dtype != DType::f32 && a.r > 16 ? 4 : 2; }

}  // namespace

int64_t lora_parts(const LoraShrink& a) {
  if (a.m == 0 || a.r == 0) return 1;
  const int64_t blocks = ceil_div(a.m, kThinRows) * ceil_div(a.r, 8 * tiles_of_ranks(a));
  return shares_of(blocks, ceil_div(a.k, kThinWarps * kThinCols));
}

int64_t lora_parts(const LoraGradient& a) {
  if (a.k == 0 || a.r == 0) return 1;
  const int64_t blocks = ceil_div(a.k, kThinCols) * ceil_div(a.r, a.r <= 16 ? 16 : 32);
  return shares_of(blocks, ceil_div(a.m, 8 * kThinWarps));
}

cudaError_t lora_shrink(const LoraShrink& a, cudaStream_t stream) {
  if (a.m == 0 || a.r == 0) return cudaSuccess;
  const DenseFactor f(a.f, a.f_dtype, a.by_rank, a.r, a.k);
  const DropoutMask mask(a.dropout);
  const int64_t parts = a.parts ? lora_parts(a) : 1;
  const cudaError_t status = with_type(a.x_dtype, [&](auto t) {
    using X = decltype(t);
    const bool wide = is_wide(a.x, a.x_dtype, a.k, 4);
    const auto launch = [&](auto* kernel, int tiles) {
      const dim3 grid(unsigned(ceil_div(a.m, kThinRows)), unsigned(ceil_div(a.r, 8 * tiles)), unsigned(parts));
      kernel<<<grid, kThinThreads, 0, stream>>>(a, mask, f, wide);
      return cudaGetLastError();
    };
    if constexpr (kExact<X>)   // fp32 numbers are three in tf32: their fragments leave no registers for more ranks
      if (tiles_of_ranks(a) == 4) return launch(shrink<X, 4>, 4);
    return launch(shrink<X, 2>, 2);
  });
  if (status != cudaSuccess || !a.parts) return status;
  add_shrunk<<<unsigned(ceil_div(a.m * a.r, kThinThreads)), kThinThreads, 0, stream>>>(a, mask, parts);
  return cudaGetLastError();
}

cudaError_t lora_expand(const LoraExpand& a, cudaStream_t stream) {
  if (a.m == 0 || a.k == 0) return cudaSuccess;
  const DenseFactor f(a.f, a.f_dtype, a.by_rank, a.r, a.k);
  return with_type(a.y_dtype, [&](auto t) {
    const dim3 grid(unsigned(ceil_div(a.m, kThinRows)), unsigned(ceil_div(a.k, kExpandCols)));
    expand<decltype(t)><<<grid, kThinThreads, 0, stream>>>(a, DropoutMask(a.dropout), f, is_wide(a.y, a.y_dtype, a.k, 4));
    return cudaGetLastError();
  });
}

cudaError_t lora_gradient(const LoraGradient& a, cudaStream_t stream) {
  if (a.r == 0 || a.k == 0) return cudaSuccess;
  const DropoutMask mask(a.dropout);
  const int64_t parts = a.parts ? lora_parts(a) : 1;
  const cudaError_t status = with_type(a.x_dtype, [&](auto t) {
    using X = decltype(t);
    const auto launch = [&](auto* kernel, int tiles) {
      const dim3 grid(unsigned(ceil_div(a.k, kThinCols)), unsigned(ceil_div(a.r, 16 * tiles)), unsigned(parts));
      kernel<<<grid, kThinThreads, 0, stream>>>(a, mask, is_wide(a.x, a.x_dtype, a.k, 2));
    };
    if (a.r <= 16) launch(gradient<X, 1>, 1);
    else launch(gradient<X, 2>, 2);
    return cudaGetLastError();
  });
  if (status != cudaSuccess || !a.parts) return status;
  add_gradients<<<unsigned(ceil_div(a.r * a.k, kThinThreads)), kThinThreads, 0, stream>>>(a, mask, parts);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
