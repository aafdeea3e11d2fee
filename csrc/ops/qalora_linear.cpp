#include "kernels/qalora_linear.h"
#include "ops/group.h"

namespace peftops::ops {
namespace {

// p, x summed over the groups that lora_A's columns stand for; and u = p lora_A^T
std::tuple<Tensor, Tensor> shrink(const Tensor& x_, const Tensor& a_, int64_t group) {
  constexpr const char* kOp = "qalora_shrink";
  const OnDevice device(kOp, {{"x", x_}, {"lora_A", a_}});
  const Tensor a = as_contiguous(a_);
  PEFTOPS_CHECK(a.dim() == 2, kOp, ": lora_A must have shape [r, groups], not ", shape_of(a));
  const int64_t r = a.size(0), groups = a.size(1), k = groups * group;
  check_groups(kOp, k, 4, group);
  check_last_dim(kOp, "x", x_, k);
  const Tensor x = as_contiguous(x_);
  const int64_t m = rows_of(x);
  Tensor p = empty(x, {m, groups}, ScalarType::Float), u = empty(x, {m, r}, ScalarType::Float);
  run(PEFTOPS_PICK(qalora_shrink),
      QaloraShrink{x.const_data_ptr(), a.const_data_ptr(), p.mutable_data_ptr<float>(), u.mutable_data_ptr<float>(), m,
                   k, r, group, dtype_of(kOp, "x", x), dtype_of(kOp, "lora_A", a)},
      m * k + m * groups * r);
  return {p, u};
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("qalora_shrink", TORCH_BOX(&shrink)); }

}  // namespace peftops::ops
