// by_library.h for a stack of weights, backward and in bf16: experts that have rows are decoded into memory, and torch's
// grouped product multiplies. No number of rows is read on the host, so a CUDA graph of it serves any loads.
#pragma once
#include "ops/by_library.h"
#include "ops/experts.h"

namespace peftops::ops {

#ifdef PEFTOPS_CUDA
// Rows of `left` up to each of `ends`, times a matrix of `right` each.
inline Tensor multiply_groups(const Tensor& left, const Tensor& right, const Tensor& ends) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(left), from(right), from(std::optional<Tensor>(ends)), from(std::nullopt),
                                    from(std::nullopt)};   // without bias, and the result's dtype is that of `left`
  check_torch(torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION), "multiply groups");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// dx = g W_e + v A_e, if this implementation is chosen. Where one slab has all columns, dx is the product's own tensor.
template <class Operands>
bool stack_backward_by_library(const char* op, Operands& o, const Offsets& offsets) {
  using Weight = decltype(o.args.weight);
  bool wanted = false;
  const cudaError_t status = cuda::by_library(offsets.of(o.args), wanted_way(op), &wanted);
  if (!takes_library(op, status, wanted)) return false;
  const int64_t m = o.args.m, n = o.args.weight.rows, k = o.args.weight.cols, r = o.args.r, e = offsets.experts;
  const int64_t slots = m < e ? m : e, slab = slab_of(k, slots * n * int64_t(o.g.element_size()));
  const CudaKernel<ExpertsDecode<Weight>> decode("experts_decode", &cuda::experts_decode);
  const Tensor left = as_strided(o.g, {m, n}, {n, 1});
  Tensor ends = empty(o.g, {slots}, ScalarType::Int);
  for (int64_t first = 0; first < k; first += slab) {
    const int64_t cols = k - first < slab ? k - first : slab;
    Tensor right = empty(o.g, {slots, n, cols}, o.g.scalar_type());
    run(decode, ExpertsDecode<Weight>{o.args.weight, offsets.at, e, m, right.mutable_data_ptr(),
                                      ends.mutable_data_ptr<int32_t>(), slots, first, cols}, 0);
    Tensor part = multiply_groups(left, right, ends);
    if (cols == k) o.dx = part;
    run(PEFTOPS_PICK(experts_place), ExpertsPlace{cols == k ? nullptr : part.const_data_ptr(), o.dx.mutable_data_ptr(),
                                                  offsets.at, e, m, k, first, cols}, 0);
  }
  if (r == 0) return true;
  const LoraExpand all{o.dx.mutable_data_ptr(), o.args.v, o.args.a, m, k, r, 1.f, true, o.args.dtype, o.args.a_dtype,
                       {nullptr, 0}};
  run(PEFTOPS_PICK(experts_expand), offsets.of(all), 0);
  return true;
}
#endif

}  // namespace peftops::ops
