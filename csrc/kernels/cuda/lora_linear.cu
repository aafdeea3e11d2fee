// The thin products of low-rank adapters as tiles of tile.cuh: with a rank of up to 64, x or g is read once, and its
// dropout mask is drawn on the way to shared memory. Sums run in order: the same bits every time.
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/tile.cuh"
#include "kernels/lora_linear.h"

namespace peftops::cuda {
namespace {

// Element (j, c) of a factor f between rank j and column c.
__device__ float factor(const void* f, DType dtype, bool by_rank, int64_t r, int64_t k, int64_t j, int64_t c) {
  return element(f, dtype, by_rank ? j * k + c : c * r + j);
}

template <class T> __global__ void __launch_bounds__(kTileThreads) shrink(LoraShrink a, DropoutMask mask) {
  __shared__ TileMemory memory;
  mask.begin();
  TileSums c;
  multiply_tile<Along::depth, Along::depth>(
      a.m, a.r, a.k,
      [&](int64_t t, int64_t row) { return mask.apply(row, t, to_float(static_cast<const T*>(a.x)[row * a.k + t])); },
      [&](int64_t t, int64_t j) { return factor(a.f, a.f_dtype, a.by_rank, a.r, a.k, j, t); }, memory, c);
  each_result(a.m, a.r, [&](int64_t row, int64_t col, int i, int j) {
    a.u[row * a.r + col] = __fmul_rn(a.scale, c.at[i][j]);
  });
}

template <class T> __global__ void __launch_bounds__(kTileThreads) expand(LoraExpand a, DropoutMask mask) {
  __shared__ TileMemory memory;
  mask.begin();
  TileSums c;
  multiply_tile<Along::depth, Along::across>(
      a.m, a.k, a.r, [&](int64_t t, int64_t row) { return __fmul_rn(a.scale, a.u[row * a.r + t]); },
      [&](int64_t t, int64_t col) { return factor(a.f, a.f_dtype, a.by_rank, a.r, a.k, t, col); }, memory, c);
  each_result(a.m, a.k, [&](int64_t row, int64_t col, int i, int j) {
    T& y = static_cast<T*>(a.y)[row * a.k + col];
    y = from_float<T>(to_float(y) + mask.apply(row, col, c.at[i][j]));
  });
}

template <class T> __global__ void __launch_bounds__(kTileThreads) gradient(LoraGradient a, DropoutMask mask) {
  __shared__ TileMemory memory;
  mask.begin();
  TileSums c;
  multiply_tile<Along::across, Along::across>(
      a.r, a.k, a.m, [&](int64_t t, int64_t j) { return a.u[t * a.r + j]; },
      [&](int64_t t, int64_t col) { return mask.apply(t, col, to_float(static_cast<const T*>(a.x)[t * a.k + col])); },
      memory, c);
  each_result(a.r, a.k, [&](int64_t row, int64_t col, int i, int j) {
    const int64_t at = a.by_rank ? row * a.k + col : col * a.r + row;
    const float d = __fmul_rn(a.scale, c.at[i][j]);
    if (a.d_dtype == DType::f32) static_cast<float*>(a.d)[at] = d;
    else if (a.d_dtype == DType::bf16) static_cast<__nv_bfloat16*>(a.d)[at] = from_float<__nv_bfloat16>(d);
    else static_cast<__half*>(a.d)[at] = from_float<__half>(d);
  });
}

}  // namespace

cudaError_t lora_shrink(const LoraShrink& a, cudaStream_t stream) {
  if (a.m == 0 || a.r == 0) return cudaSuccess;
  return with_type(a.x_dtype, [&](auto t) {
    shrink<decltype(t)><<<tiles_of(a.m, a.r), kTileThreads, 0, stream>>>(a, DropoutMask(a.dropout));
    return cudaGetLastError();
  });
}

cudaError_t lora_expand(const LoraExpand& a, cudaStream_t stream) {
  if (a.m == 0 || a.k == 0) return cudaSuccess;
  return with_type(a.y_dtype, [&](auto t) {
    expand<decltype(t)><<<tiles_of(a.m, a.k), kTileThreads, 0, stream>>>(a, DropoutMask(a.dropout));
    return cudaGetLastError();
  });
}

cudaError_t lora_gradient(const LoraGradient& a, cudaStream_t stream) {
  if (a.r == 0 || a.k == 0) return cudaSuccess;
  return with_type(a.x_dtype, [&](auto t) {
    gradient<decltype(t)><<<tiles_of(a.r, a.k), kTileThreads, 0, stream>>>(a, DropoutMask(a.dropout));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
