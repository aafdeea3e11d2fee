// Two ways to a product with an NF4 weight: up to 16 rows of 16-bit x stream the weight through tensor cores
// (nf4_rows.cuh); everything else is multiplied in fp32, tile by tile (nf4_tile.cuh). The low-rank term and the bias
// are added to the fp32 sums before the one rounding.
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/nf4_rows.cuh"
#include "kernels/cuda/nf4_tile.cuh"

namespace peftops::cuda {
namespace {

// An element of a tensor whose dtype is known at run time alone: bias and factors, which are small.
__device__ float element(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return to_float(static_cast<const __half*>(p)[i]);
  }
}

// What is written for a sum of x W^T.
template <class T> struct Finish {
  const Nf4Linear& a;

  __device__ void operator()(int64_t row, int64_t col, float sum) const {
    float low_rank = 0.f;
    for (int64_t j = 0; j < a.r; ++j)
      low_rank = __fmaf_rn(a.u[row * a.r + j], element(a.b, a.b_dtype, col * a.r + j), low_rank);
    float y = __fmaf_rn(a.scaling, low_rank, sum);
    if (a.bias) y += element(a.bias, a.bias_dtype, col);
    static_cast<T*>(a.y)[row * a.weight.rows + col] = from_float<T>(y);
  }
};

template <class T, int Tiles> __global__ void __launch_bounds__(kRowsThreads) few_rows(Nf4Linear a, int log_block) {
  __shared__ RowsMemory<T> memory;
  multiply_rows<T, Tiles>(a, log_block, memory, Finish<T>{a});
}

template <class T> __global__ void __launch_bounds__(kTileThreads) many_rows(Nf4Linear a, int log_block) {
  __shared__ TileMemory memory;
  float c[kPerThread][kPerThread] = {};
  multiply_tile<true>(a.weight, log_block, static_cast<const T*>(a.x), a.m, a.weight.cols, a.weight.rows, memory, c);
  each_result(a.m, a.weight.rows, c, Finish<T>{a});
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) backward(Nf4LinearBackward a, DropoutMask mask, int log_block) {
  __shared__ TileMemory memory;
  float c[kPerThread][kPerThread] = {};
  const int64_t k = a.weight.cols;
  multiply_tile<false>(a.weight, log_block, static_cast<const T*>(a.g), a.m, a.weight.rows, k, memory, c);
  each_result(a.m, k, c, [&](int64_t row, int64_t col, float sum) {
    float low_rank = 0.f;
    for (int64_t j = 0; j < a.r; ++j)
      low_rank = __fmaf_rn(a.v[row * a.r + j], element(a.a, a.a_dtype, j * k + col), low_rank);
    static_cast<T*>(a.dx)[row * k + col] = from_float<T>(sum + (a.r ? mask.apply(row, col, low_rank) : 0.f));
  });
}

int log_block_of(const Nf4Weight& w) { return __builtin_ctzll(uint64_t(w.block_size)); }
dim3 tiles_of(int64_t rows, int64_t cols) { return dim3(unsigned(ceil_div(cols, kTile)), unsigned(ceil_div(rows, kTile))); }

template <class T> void launch_few_rows(const Nf4Linear& a, cudaStream_t stream) {
  const unsigned grid = unsigned(ceil_div(a.weight.rows, kOuts));
  if (a.m <= 8) few_rows<T, 1><<<grid, kRowsThreads, 0, stream>>>(a, log_block_of(a.weight));
  else few_rows<T, 2><<<grid, kRowsThreads, 0, stream>>>(a, log_block_of(a.weight));
}

}  // namespace

cudaError_t nf4_linear(const Nf4Linear& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.rows == 0) return cudaSuccess;
  if (has_few_rows(a)) {
    if (a.dtype == DType::bf16) launch_few_rows<__nv_bfloat16>(a, stream);
    else launch_few_rows<__half>(a, stream);
    return cudaGetLastError();
  }
  return with_type(a.dtype, [&](auto t) {
    many_rows<decltype(t)><<<tiles_of(a.m, a.weight.rows), kTileThreads, 0, stream>>>(a, log_block_of(a.weight));
    return cudaGetLastError();
  });
}

cudaError_t nf4_linear_backward(const Nf4LinearBackward& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.cols == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    backward<decltype(t)><<<tiles_of(a.m, a.weight.cols), kTileThreads, 0, stream>>>(a, DropoutMask(a.dropout),
                                                                                    log_block_of(a.weight));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
