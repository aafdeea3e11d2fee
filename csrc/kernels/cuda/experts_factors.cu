// The thin products of lora_linear.cu for a stack of adapters: tiles of an expert's rows (experts.cuh) for u and v, and
// an expert's own sum over its rows for a gradient. Offsets are read on the device, so a graph of it serves any loads.
#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/thin_dense.cuh"

namespace peftops::cuda {
namespace {

template <class X, int Tiles>
__global__ void __launch_bounds__(kThinThreads, 1) stack_shrink(ExpertsShrink a, DropoutMask none, DenseFactor f, bool wide) {
  __shared__ ShrinkMemory<Tiles> memory;
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, kThinRows, &tile)) return;
  f.f = moved(f.f, f.dtype, tile.expert * f.r * f.k);
  const auto row = [&](int i) { return i < tile.rows ? tile.row + i : -1; };
  shrink_tile<X, Tiles>(static_cast<const X*>(a.all.x), a.all.k, wide, row, f, int64_t(blockIdx.y) * 8 * Tiles,
                        none, memory, [&](int i, int64_t j, float sum) {
                          if (j < a.all.r) a.all.u[row(i) * a.all.r + j] = __fmul_rn(a.all.scale, sum);
                        });
}

__global__ void __launch_bounds__(kThinThreads, 2) stack_expand(ExpertsExpand a, DenseFactor f, bool wide) {
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, kThinRows, &tile)) return;
  f.f = moved(f.f, f.dtype, tile.expert * f.r * f.k);
  const LoraExpand& all = a.all;
  const auto row = [&](int i) { return i < tile.rows ? tile.row + i : -1; };
  const auto u = [&](int64_t of, int64_t j) { return j < all.r ? __fmul_rn(all.scale, all.u[of * all.r + j]) : 0.f; };
  expand_tile(static_cast<__nv_bfloat16*>(all.y), all.k, wide, row, u, all.r, f, DropoutMask());
}

// An expert without rows has zeros.
template <class X, int Tiles>
__global__ void __launch_bounds__(kThinThreads) stack_gradient(ExpertsGradient of, DropoutMask none, bool wide) {
  __shared__ GradientMemory memory;
  LoraGradient a = of.all;
  const int64_t expert = int64_t(blockIdx.z);
  const ExpertRows rows = rows_of(of.offsets, expert, a.m);
  a.d = moved(a.d, a.d_dtype, expert * a.r * a.k);
  const auto u = [&](int64_t row, int64_t j) { return j < a.r ? a.u[row * a.r + j] : 0.f; };
  gradient_tile<X, Tiles>(static_cast<const X*>(a.x), a.k, wide, [&](int64_t i) { return rows.begin + i; }, rows.count, u,
                          int64_t(blockIdx.y) * 16 * Tiles, none, memory,
                          [&](int64_t j, int64_t col, Few<4> sum) {
                            if (j >= a.r || col >= a.k) return;
#pragma unroll
                            for (float& v : sum.at) v = __fmul_rn(a.scale, v);
                            store_gradient(a, j, col, sum);
                          });
}

}  // namespace

cudaError_t experts_shrink(const ExpertsShrink& a, cudaStream_t stream) {
  if (a.all.m == 0 || a.all.r == 0) return cudaSuccess;
  const LoraShrink& all = a.all;
  const DenseFactor f(all.f, all.f_dtype, all.by_rank, all.r, all.k);
  return with_type(all.x_dtype, [&](auto t) {
    stack_shrink<decltype(t), 2><<<grid_of(a, kThinRows, all.r, 16), kThinThreads, 0, stream>>>(
        a, DropoutMask(all.dropout), f, is_wide(all.x, all.x_dtype, all.k, 4));
    return cudaGetLastError();
  });
}

cudaError_t experts_expand(const ExpertsExpand& a, cudaStream_t stream) {
  const LoraExpand& all = a.all;
  if (all.m == 0 || all.k == 0) return cudaSuccess;
  if (all.y_dtype != DType::bf16) return cudaErrorInvalidValue;
  const DenseFactor f(all.f, all.f_dtype, all.by_rank, all.r, all.k);
  stack_expand<<<grid_of(a, kThinRows, all.k, kExpandCols), kThinThreads, 0, stream>>>(
      a, f, is_wide(all.y, all.y_dtype, all.k, 4));
  return cudaGetLastError();
}

cudaError_t experts_gradient(const ExpertsGradient& a, cudaStream_t stream) {
  const LoraGradient& all = a.all;
  if (all.r == 0 || all.k == 0) return cudaSuccess;
  return with_type(all.x_dtype, [&](auto t) {
    const dim3 grid(unsigned(ceil_div(all.k, kThinCols)), unsigned(ceil_div(all.r, 16)), unsigned(a.experts));
    stack_gradient<decltype(t), 1><<<grid, kThinThreads, 0, stream>>>(a, DropoutMask(all.dropout),
                                                                      is_wide(all.x, all.x_dtype, all.k, 2));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
