// Two ways to a product with an MXFP4 weight. With 16-bit x, rows of whole chunks stream through tensor cores, again for
// every 8 or 16 rows of x (mxfp4_rows.cuh). Everything else, and the backward product, is multiplied in fp32, tile by tile
// (tile.cuh), with the low-rank term as more depth.
#include "kernels/mxfp4_linear.h"
#include "kernels/cuda/crossover.cuh"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/mxfp4_rows.cuh"
#include "kernels/cuda/operands.cuh"

namespace peftops::cuda {
namespace {

constexpr int kRowsWarps = 8;
template <class T> using FewStream = Mxfp4Stream<T, 32>;

template <class T, int Tiles> __global__ void __launch_bounds__(kRowsWarps * kWarp, 1) mxfp4_rows(Mxfp4Linear a) {
  using Stream = FewStream<T>;
  __shared__ typename Stream::Memory memory;
  extern __shared__ uint4 dynamic[];
  multiply_rows<T>(a, Stream{a.weight}, memory, *reinterpret_cast<RowsSums<Stream, Tiles, kRowsWarps>*>(dynamic),
                   Mxfp4Finish<T>{a});
}

template <class T> __global__ void __launch_bounds__(kTileThreads) any_mxfp4_rows(Mxfp4Linear a) {
  __shared__ TileMemory memory;
  multiply_any<T>(a, [&](int64_t flat) { return weight_at(a.weight, flat); }, memory);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) mxfp4_backward(Mxfp4LinearBackward a, DropoutMask mask) {
  __shared__ TileMemory memory;
  const int64_t n = a.weight.rows, k = a.weight.cols;
  mask.begin();
  TileSums c;
  multiply_tile<Along::depth, Along::across>(
      a.m, k, a.r, [&](int64_t t, int64_t row) { return a.v[row * a.r + t]; },
      [&](int64_t t, int64_t col) { return element(a.a, a.a_dtype, t * k + col); }, memory, c);
  each_result(a.m, k, [&](int64_t row, int64_t col, int i, int j) { c.at[i][j] = mask.apply(row, col, c.at[i][j]); });
  multiply_tile<Along::depth, Along::across>(
      a.m, k, n, [&](int64_t t, int64_t row) { return to_float(static_cast<const T*>(a.g)[row * n + t]); },
      [&](int64_t t, int64_t col) { return weight_at(a.weight, t * k + col); }, memory, c);
  each_result(a.m, k, [&](int64_t row, int64_t col, int i, int j) {
    static_cast<T*>(a.dx)[row * k + col] = from_float<T>(c.at[i][j]);
  });
}

template <class T, int Tiles> cudaError_t launch_tiles(const Mxfp4Linear& a, cudaStream_t stream) {
  using Stream = FewStream<T>;
  constexpr size_t kShared = sizeof(RowsSums<Stream, Tiles, kRowsWarps>);
  cudaError_t status = allow_shared<mxfp4_rows<T, Tiles>>(kShared);
  Gpu gpu;
  if (status == cudaSuccess) status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  return launch_early(mxfp4_rows<T, Tiles>, gpu, rows_grid<Stream, Tiles, kRowsWarps>(a.m, a.weight.rows, gpu),
                      kRowsWarps * kWarp, kShared, stream, a);
}
template <class T> cudaError_t launch_rows(const Mxfp4Linear& a, cudaStream_t stream) {
  return a.m > 8 ? launch_tiles<T, 2>(a, stream) : launch_tiles<T, 1>(a, stream);
}

}  // namespace

cudaError_t mxfp4_linear(const Mxfp4Linear& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.rows == 0) return cudaSuccess;
  if (has_chunks(a))
    return a.dtype == DType::bf16 ? launch_rows<__nv_bfloat16>(a, stream) : launch_rows<__half>(a, stream);
  return with_type(a.dtype, [&](auto t) {
    any_mxfp4_rows<decltype(t)><<<tiles_of(a.m, a.weight.rows), kTileThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

int64_t operands_depth(const Mxfp4Linear& a) { return depth_of(a); }

cudaError_t mxfp4_operands(const LibraryOperands<Mxfp4Weight>& o, cudaStream_t stream) {
  return with_type(o.of.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_operands<T>(o, Mxfp4Source<T>{o.of.weight}, aligned(o.of.weight.packed, 8), stream);
  });
}

cudaError_t by_library(const Mxfp4Linear& a, Way wanted, bool* result) {
  return choose_way(a, wanted, result, [&](const Gpu& gpu) {
    if (!has_chunks(a)) return any_clocks(a, gpu);
    return a.m <= kFewRows ? 0 : 2 * rows_clocks(a, gpu);   // 16 rows at a time, as a group's of four bits
  });
}

cudaError_t by_library(const Mxfp4LinearBackward& a, Way wanted, bool* result) {
  *result = wanted != Way::kernels && a.m > 0 && a.weight.rows > 0 && a.weight.cols > 0;
  return cudaSuccess;   // the kernel is a tile of fp32
}

cudaError_t mxfp4_linear_backward(const Mxfp4LinearBackward& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.cols == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    mxfp4_backward<decltype(t)><<<tiles_of(a.m, a.weight.cols), kTileThreads, 0, stream>>>(a, DropoutMask(a.dropout));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
