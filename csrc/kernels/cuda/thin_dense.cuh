// The operands of thin.cuh where they lie as matrices, and not in pages.
#pragma once
#include "kernels/cuda/thin.cuh"

namespace peftops::cuda {

// A factor of rank r between k columns, lying by rank as [r, k] or by column as [k, r].
struct DenseFactor {
  const void* f;
  DType dtype;
  bool wide;
  int64_t r, k, stride;   // stride: from column to column

  DenseFactor(const void* factor, DType type, bool by_rank, int64_t ranks, int64_t columns)
      : f(factor), dtype(type),
        wide(by_rank && columns % 4 == 0 && aligned(factor, dtype == DType::f32 ? 16 : 8)), r(ranks), k(columns),
        stride(by_rank ? 1 : ranks) {}
  __device__ bool exact() const { return dtype != DType::f32; }
  __device__ FactorLine line(int64_t j, int64_t chunk) const {
    const int64_t of = j < r ? j : r - 1;
    return {of * (stride == 1 ? k : 1) + chunk * stride, j < r ? k - chunk : 0};
  }
};

// Rows of k elements at p are read n at a time.
inline bool is_wide(const void* p, DType dtype, int64_t k, int64_t n) {
  return k % n == 0 && aligned(p, size_t(n) * (dtype == DType::f32 ? 4 : 2));
}

// Four results of gradient_tile. Args: LoraGradient.
template <class D, class Args> __device__ void store_gradient_as(const Args& a, int64_t j, int64_t col, const Few<4>& sum) {
  D* d = static_cast<D*>(a.d);
  if (a.by_rank) return sum.store(d + j * a.k + col, a.k - col, a.k % 4 == 0);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (col + i < a.k) d[(col + i) * a.r + j] = from_float<D>(sum.at[i]);
}
template <class Args> __device__ void store_gradient(const Args& a, int64_t j, int64_t col, const Few<4>& sum) {
  if (a.d_dtype == DType::f32) store_gradient_as<float>(a, j, col, sum);
  else if (a.d_dtype == DType::bf16) store_gradient_as<__nv_bfloat16>(a, j, col, sum);
  else store_gradient_as<__half>(a, j, col, sum);
}

}  // namespace peftops::cuda
