#include "kernels/group_quantize.h"
#include "ops/group.h"

namespace peftops::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight_, int64_t bits, int64_t group,
                                            bool symmetric, int64_t narrower) {
  constexpr const char* kOp = "group_quantize";
  const OnDevice device(kOp, {{"weight", weight_}});
  PEFTOPS_CHECK(weight_.dim() == 2, kOp, ": weight must have two dims, [out, in], not shape ", shape_of(weight_));
  const DType dtype = dtype_of(kOp, "weight", weight_);
  const Tensor weight = as_contiguous(weight_);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  check_groups(kOp, cols, bits, group);
  PEFTOPS_CHECK(narrower >= 0 && narrower < 64, kOp, ": narrower must be from 0 to 63, not ", narrower);
  Tensor packed = empty(weight, {rows, cols / 8 * bits}, ScalarType::Byte);
  Tensor scales = empty(weight, {rows, cols / group}, ScalarType::Float);
  Tensor zeros = empty(weight, {rows, cols / group}, ScalarType::Float);
  run(PEFTOPS_PICK(group_quantize),
      GroupQuantize{weight.const_data_ptr(), packed.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(),
                    zeros.mutable_data_ptr<float>(), rows, cols, group, bits, narrower, symmetric, dtype},
      rows * cols * (narrower + 1));
  return {packed, scales, zeros};
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("group_quantize", TORCH_BOX(&quantize)); }

}  // namespace peftops::ops
