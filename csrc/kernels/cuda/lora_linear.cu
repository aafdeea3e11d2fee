// The thin products of low-rank adapters, as the tiles of thin.cuh.
#include "kernels/cuda/thin.cuh"
#include "kernels/lora_linear.h"

namespace peftops::cuda {
namespace {

// A factor of rank r between k columns, lying by rank as [r, k] or by column as [k, r].
struct DenseFactor {
  const void* f;
  DType dtype;
  bool by_rank, wide;
  int64_t r, k;

  __device__ bool exact() const { return dtype != DType::f32; }
  __device__ FactorLine line(int64_t j, int64_t chunk) const {
    return {by_rank ? j * k + chunk : chunk * r + j, j < r ? k - chunk : 0};
  }
  __device__ float one(const FactorLine& line, int i) const {
    return i < line.columns ? element(f, dtype, line.at + (by_rank ? i : i * r)) : 0.f;
  }
  __device__ Few<4> four(const FactorLine& line, int first) const {
    Few<4> result;
    if (by_rank) result.load(f, dtype, line.at + first, line.columns - first, wide);
    else
#pragma unroll
      for (int i = 0; i < 4; ++i) result.at[i] = one(line, first + i);
    return result;
  }
};

struct TileRows {   // of a block of threads
  int64_t m;
  __device__ int64_t operator()(int i) const {
    const int64_t row = int64_t(blockIdx.x) * kThinRows + i;
    return row < m ? row : -1;
  }
};

// Rows of k elements at p are read n at a time.
bool is_wide(const void* p, DType dtype, int64_t k, int64_t n) {
  return k % n == 0 && aligned(p, size_t(n) * (dtype == DType::f32 ? 4 : 2));
}

template <class X, int Tiles>
__global__ void __launch_bounds__(kThinThreads) shrink(LoraShrink a, DropoutMask mask, DenseFactor f, bool wide) {
  __shared__ ShrinkMemory<Tiles> memory;
  mask.begin();
  const float scale = mask.threshold ? __fmul_rn(a.scale, mask.factor) : a.scale;
  const TileRows row{a.m};
  shrink_tile<X, Tiles>(static_cast<const X*>(a.x), a.k, wide, row, f, int64_t(blockIdx.y) * 8 * Tiles, mask, memory,
                        [&](int i, int64_t j, float sum) {
                          if (j < a.r) a.u[row(i) * a.r + j] = __fmul_rn(scale, sum);
                        });
}

template <class Y>
__global__ void __launch_bounds__(kThinThreads) expand(LoraExpand a, DropoutMask mask, DenseFactor f, bool wide) {
  mask.begin();
  const auto u = [&](int64_t row, int64_t j) { return j < a.r ? __fmul_rn(a.scale, a.u[row * a.r + j]) : 0.f; };
  expand_tile(static_cast<Y*>(a.y), a.k, wide, TileRows{a.m}, u, a.r, f, mask);
}

template <class D> __device__ void store_gradient(const LoraGradient& a, int64_t j, int64_t col, const Few<4>& sum) {
  D* d = static_cast<D*>(a.d);
  if (a.by_rank) return sum.store(d + j * a.k + col, a.k - col, a.k % 4 == 0);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (col + i < a.k) d[(col + i) * a.r + j] = from_float<D>(sum.at[i]);
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
#pragma unroll
        for (float& v : sum.at) v = __fmul_rn(scale, v);
        if (a.d_dtype == DType::f32) store_gradient<float>(a, j, col, sum);
        else if (a.d_dtype == DType::bf16) store_gradient<__nv_bfloat16>(a, j, col, sum);
        else store_gradient<__half>(a, j, col, sum);
      });
}

}  // namespace

cudaError_t lora_shrink(const LoraShrink& a, cudaStream_t stream) {
  if (a.m == 0 || a.r == 0) return cudaSuccess;
  const DenseFactor f{a.f, a.f_dtype, a.by_rank, is_wide(a.f, a.f_dtype, a.k, 4), a.r, a.k};
  return with_type(a.x_dtype, [&](auto t) {
    using X = decltype(t);
    const bool wide = is_wide(a.x, a.x_dtype, a.k, 4);
    const auto launch = [&](auto* kernel, int tiles) {
      const dim3 grid(unsigned(ceil_div(a.m, kThinRows)), unsigned(ceil_div(a.r, 8 * tiles)));
      kernel<<<grid, kThinThreads, 0, stream>>>(a, DropoutMask(a.dropout), f, wide);
      return cudaGetLastError();
    };
    if constexpr (kExact<X>)   // fp32 numbers are three in tf32: their fragments leave no registers for more ranks
      if (a.r > 16) return launch(shrink<X, 4>, 4);
    return launch(shrink<X, 2>, 2);
  });
}

cudaError_t lora_expand(const LoraExpand& a, cudaStream_t stream) {
  if (a.m == 0 || a.k == 0) return cudaSuccess;
  const DenseFactor f{a.f, a.f_dtype, a.by_rank, false, a.r, a.k};
  return with_type(a.y_dtype, [&](auto t) {
    const dim3 grid(unsigned(ceil_div(a.m, kThinRows)), unsigned(ceil_div(a.k, kExpandCols)));
    expand<decltype(t)><<<grid, kThinThreads, 0, stream>>>(a, DropoutMask(a.dropout), f, is_wide(a.y, a.y_dtype, a.k, 4));
    return cudaGetLastError();
  });
}

cudaError_t lora_gradient(const LoraGradient& a, cudaStream_t stream) {
  if (a.r == 0 || a.k == 0) return cudaSuccess;
  return with_type(a.x_dtype, [&](auto t) {
    using X = decltype(t);
    const auto launch = [&](auto* kernel, int tiles) {
      const dim3 grid(unsigned(ceil_div(a.k, kThinCols)), unsigned(ceil_div(a.r, 16 * tiles)));
      kernel<<<grid, kThinThreads, 0, stream>>>(a, DropoutMask(a.dropout), is_wide(a.x, a.x_dtype, a.k, 2));
    };
    if (a.r <= 16) launch(gradient<X, 1>, 1);
    else launch(gradient<X, 2>, 2);
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
