// The product for any shape: in fp32, tile by tile (tile.cuh), with the low-rank term as more depth.
#include "kernels/group_linear.h"
#include "kernels/cuda/group_decode.cuh"
#include "kernels/cuda/linear.cuh"

namespace peftops::cuda {
namespace {

template <class T> __global__ void __launch_bounds__(kTileThreads) any_group_rows(GroupLinear a, int log_group) {
  __shared__ TileMemory memory;
  multiply_any<T>(a, [&](int64_t flat) { return weight_at(a.weight, log_group, flat); }, memory);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) group_backward(GroupLinearBackward a, int log_group) {
  __shared__ TileMemory memory;
  const int64_t n = a.weight.rows, k = a.weight.cols, pools = a.r ? k / a.pool : 0;
  TileSums c;
  multiply_tile<Along::depth, Along::across>(
      a.m, k, n, [&](int64_t t, int64_t row) { return to_float(static_cast<const T*>(a.g)[row * n + t]); },
      [&](int64_t t, int64_t col) { return weight_at(a.weight, log_group, t * k + col); }, memory, c);
  multiply_tile<Along::depth, Along::across>(
      a.m, k, a.r, [&](int64_t t, int64_t row) { return a.v[row * a.r + t]; },
      [&](int64_t t, int64_t col) { return element(a.a, a.a_dtype, t * pools + col / a.pool); }, memory, c);
  each_result(a.m, k, [&](int64_t row, int64_t col, int i, int j) {
    static_cast<T*>(a.dx)[row * k + col] = from_float<T>(c.at[i][j]);
  });
}

}  // namespace

cudaError_t group_linear(const GroupLinear& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.rows == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    const dim3 grid = tiles_of(a.m, a.weight.rows);
    any_group_rows<decltype(t)><<<grid, kTileThreads, 0, stream>>>(a, log_group_of(a.weight.group));
    return cudaGetLastError();
  });
}

cudaError_t group_linear_backward(const GroupLinearBackward& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.cols == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    const dim3 grid = tiles_of(a.m, a.weight.cols);
    group_backward<decltype(t)><<<grid, kTileThreads, 0, stream>>>(a, log_group_of(a.weight.group));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
