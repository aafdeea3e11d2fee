// The other way to nf4_linear on CUDA: W decoded into memory, and a product of the library that torch calls. It is taken
// where it is the faster (kernels/cuda/nf4_crossover.cuh); PEFTOPS_NF4_LIBRARY=always or never in the environment decides
// otherwise. The temporary has the size of W in the type of x, comes from torch's allocator and goes back at once.
#pragma once
#include <array>
#include <cstdlib>
#include <string>

#include "kernels/nf4_linear.h"
#include "ops/bind.h"

namespace peftops::ops {

#ifdef PEFTOPS_CUDA
inline Way wanted_way(const char* op) {
  const char* text = std::getenv("PEFTOPS_NF4_LIBRARY");
  const std::string way = text ? text : "auto";
  STD_TORCH_CHECK(way == "auto" || way == "always" || way == "never", op,
                  ": PEFTOPS_NF4_LIBRARY must be auto, always or never, not ", way);
  return way == "always" ? Way::library : way == "never" ? Way::kernels : Way::faster;
}

// A contiguous tensor as a matrix of such sizes and strides; autograd does not see it.
inline Tensor as_matrix(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// out = left right, by the dispatcher: on torch's current stream, with torch's workspaces and settings.
inline void multiply_by_library(const Tensor& left, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);   // `out` again, ours to release
}

// Whether it took this way.
inline bool nf4_linear_by_library(const char* op, const Nf4Linear& args, const Tensor& x, const Tensor& y) {
  bool wanted = false;
  const cudaError_t status = cuda::nf4_by_library(args, wanted_way(op), &wanted);
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
  if (!wanted) return false;
  const int64_t m = args.m, n = args.weight.rows, k = args.weight.cols, depth = cuda::nf4_operands_depth(args);
  Tensor right = empty(x, {n, depth}, x.scalar_type());
  Tensor left = depth == k ? as_matrix(x, m, k, k, 1) : empty(x, {m, depth}, x.scalar_type());
  run(PEFTOPS_PICK(nf4_operands),
      Nf4Operands{args, depth == k ? nullptr : left.mutable_data_ptr(), right.mutable_data_ptr(), depth}, 0);
  multiply_by_library(left, as_matrix(right, depth, n, 1, depth), as_matrix(y, m, n, n, 1));
  return true;
}
#else
inline bool nf4_linear_by_library(const char*, const Nf4Linear&, const Tensor&, const Tensor&) { return false; }
#endif

}  // namespace peftops::ops
