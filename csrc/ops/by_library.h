// The second implementation of a linear layer over a packed weight on CUDA: W is decoded into memory, and the library
// that torch calls multiplies. It is used if it is faster (kernels/cuda/crossover.cuh); PEFTOPS_NF4_LIBRARY=always or
// never in the environment overrides that. The temporary comes from torch's allocator and is returned at once.
#pragma once
#include <array>
#include <cstdlib>
#include <string>

#include "kernels/linear.h"
#include "kernels/lora_linear.h"
#include "ops/bind.h"

namespace peftops::ops {

#ifdef PEFTOPS_CUDA
inline Way wanted_way(const char* op) {
  const char* text = std::getenv("PEFTOPS_NF4_LIBRARY");
  const std::string way = text ? text : "auto";
  PEFTOPS_CHECK(way == "auto" || way == "always" || way == "never", op,
                  ": PEFTOPS_NF4_LIBRARY must be auto, always or never, not ", way);
  return way == "always" ? Way::library : way == "never" ? Way::kernels : Way::faster;
}

// A contiguous tensor as one of other sizes and strides; autograd does not see it.
template <size_t Dims>
Tensor as_strided(const Tensor& t, const int64_t (&sizes)[Dims], const int64_t (&strides)[Dims], int64_t offset = 0) {
  AtenTensorHandle handle;
  check_torch(aoti_torch__reinterpret_tensor(t.get(), Dims, sizes, strides, offset, &handle), "make a view");
  return Tensor(handle);
}

// out = left right, by the dispatcher: on torch's current stream, with torch's workspaces and settings.
inline void multiply_by_library(const Tensor& left, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(out)};
  check_torch(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION), "multiply matrices");
  torch::stable::detail::to<Tensor>(stack[0]);   // `out` again, ours to release
}

inline bool takes_library(const char* op, cudaError_t status, bool wanted) {
  PEFTOPS_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
  return wanted;
}

// Rows of W that are decoded at a time: at most 256 MiB. A layer seldom has more, a head often. Slabs that fit an L2
// cache would gain less than the products of fewer rows lose (measured on an H100).
inline int64_t slab_of(int64_t rows, int64_t row_bytes) {
  constexpr int64_t kSlab = 256 << 20, kUnit = 256;
  const int64_t most = kSlab / (row_bytes > 0 ? row_bytes : 1) / kUnit * kUnit, slab = most > kUnit ? most : kUnit;
  return rows < slab ? rows : slab;
}

// y = x W^T with its other terms, if this implementation is chosen. `operands`: the format's kernel for the operands;
// `dequantize`: its kernel if only W is needed.
template <class Weight, class Dequantize>
bool linear_by_library(const char* op, const Linear<Weight>& args, const Tensor& x, const Tensor& y,
                       CudaKernel<LibraryOperands<Weight>> operands, CudaKernel<Dequantize> dequantize) {
  bool wanted = false;
  const cudaError_t status = cuda::by_library(args, wanted_way(op), &wanted);
  if (!takes_library(op, status, wanted)) return false;
  const int64_t m = args.m, n = args.weight.rows, k = args.weight.cols, depth = cuda::operands_depth(args);
  const int64_t slab = slab_of(n, depth * int64_t(x.element_size()));
  Tensor right = empty(x, {slab, depth}, x.scalar_type());
  const bool copied = depth != k;
  Tensor left = copied ? empty(x, {m, depth}, x.scalar_type()) : as_strided(x, {m, k}, {k, 1});
  for (int64_t first = 0; first < n; first += slab) {
    const int64_t rows = n - first < slab ? n - first : slab;
    void* const to = copied && first == 0 ? left.mutable_data_ptr() : nullptr;
    if (!copied && rows == n) run(dequantize, Dequantize{args.weight, right.mutable_data_ptr(), args.dtype}, 0);
    else run(operands, LibraryOperands<Weight>{args, to, right.mutable_data_ptr(), depth, first, rows}, 0);
    multiply_by_library(left, as_strided(right, {depth, rows}, {1, depth}), as_strided(y, {m, rows}, {n, 1}, first));
  }
  return true;
}

// dx = g W plus the low-rank term's part, if this implementation is chosen. `dequantize`: the format's kernel; `a`:
// lora_A, of which one column counts for `pool` columns of W.
template <class Backward, class Dequantize>
bool backward_by_library(const char* op, const Backward& args, const Tensor& g, const Tensor& dx, const Tensor& a,
                         int64_t pool, Dropout dropout, CudaKernel<Dequantize> dequantize) {
  bool wanted = false;
  const cudaError_t status = cuda::by_library(args, wanted_way(op), &wanted);
  if (!takes_library(op, status, wanted)) return false;
  const int64_t m = args.m, n = args.weight.rows, k = args.weight.cols, r = args.r;
  Tensor dense = empty(g, {n, k}, g.scalar_type());
  run(dequantize, Dequantize{args.weight, dense.mutable_data_ptr(), args.dtype}, 0);
  multiply_by_library(as_strided(g, {m, n}, {n, 1}), dense, as_strided(dx, {m, k}, {k, 1}));
  if (r == 0) return true;
  Tensor whole = a;   // with a column for each of W's
  if (pool > 1) whole = torch::stable::contiguous(as_strided(a, {r, k / pool, pool}, {k / pool, 1, 0}));
  run(PEFTOPS_PICK(lora_expand),
      LoraExpand{args.dx, args.v, whole.const_data_ptr(), m, k, r, 1.f, true, args.dtype, args.a_dtype, dropout}, 0);
  return true;
}
#endif

}  // namespace peftops::ops
