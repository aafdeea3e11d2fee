#include "kernels/qalora_merge.h"
#include "ops/group.h"

namespace peftops::ops {
namespace {

Tensor merge(const Tensor& scales_, const Tensor& zeros_, const Tensor& a_, const Tensor& b_, double factor) {
  constexpr const char* kOp = "qalora_merge";
  const OnDevice device(kOp, {{"scales", scales_}, {"zeros", zeros_}, {"lora_A", a_}, {"lora_B", b_}});
  const Tensor scales = as_contiguous(scales_), zeros = as_contiguous(zeros_), a = as_contiguous(a_), b = as_contiguous(b_);
  PEFTOPS_CHECK(scales.dim() == 2, kOp, ": scales must have shape [out, groups], not ", shape_of(scales));
  PEFTOPS_CHECK(a.dim() == 2, kOp, ": lora_A must have shape [r, groups], not ", shape_of(a));
  const int64_t n = scales.size(0), groups = scales.size(1), r = a.size(0);
  check_shape(kOp, "zeros", zeros, {n, groups});
  check_shape(kOp, "lora_A", a, {r, groups});
  check_shape(kOp, "lora_B", b, {n, r});
  Tensor out = empty(zeros, {n, groups}, ScalarType::Float);
  run(PEFTOPS_PICK(qalora_merge),
      QaloraMerge{floats_of(kOp, "scales", scales), floats_of(kOp, "zeros", zeros), a.const_data_ptr(),
                  b.const_data_ptr(), out.mutable_data_ptr<float>(), n, groups, r, float(factor),
                  dtype_of(kOp, "lora_A", a), dtype_of(kOp, "lora_B", b)},
      n * groups * r);
  return out;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("qalora_merge", TORCH_BOX(&merge)); }

}  // namespace peftops::ops
