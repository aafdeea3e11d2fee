#include "kernels/mxfp4_quantize.h"
#include "ops/mxfp4.h"

namespace peftops::ops {
namespace {

std::tuple<Tensor, Tensor> quantize(const Tensor& weight_) {
  constexpr const char* kOp = "mxfp4_quantize";
  const OnDevice device(kOp, {{"weight", weight_}});
  PEFTOPS_CHECK(weight_.dim() == 2, kOp, ": weight must have two dims, [out, in], not shape ", shape_of(weight_));
  const DType dtype = dtype_of(kOp, "weight", weight_);
  const Tensor weight = as_contiguous(weight_);
  const int64_t rows = weight.size(0), cols = weight.size(1), blocks = rows * cols / kMxBlock;
  check_columns(kOp, cols);
  Tensor packed = empty(weight, {rows, cols / 2}, ScalarType::Byte);
  Tensor scales = empty(weight, {rows, cols / kMxBlock}, ScalarType::Byte);
  run(PEFTOPS_PICK(mxfp4_quantize),
      Mxfp4Quantize{weight.const_data_ptr(), packed.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<uint8_t>(),
                    blocks, dtype},
      rows * cols);
  return {packed, scales};
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("mxfp4_quantize", TORCH_BOX(&quantize)); }

}  // namespace peftops::ops
