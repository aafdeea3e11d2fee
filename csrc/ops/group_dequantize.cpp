#include "kernels/group_dequantize.h"
#include "ops/group.h"

namespace peftops::ops {
namespace {

Tensor dequantize(const Tensor& packed, const Tensor& scales, const Tensor& zeros, int64_t bits,
                  int64_t group, ScalarType dtype) {
  constexpr const char* kOp = "group_dequantize";
  const OnDevice device(kOp, {{"packed", packed}, {"scales", scales}, {"zeros", zeros}});
  const GroupParts w(kOp, packed, scales, zeros, bits, group);
  const DType out_dtype = dtype_of(kOp, "dtype", dtype);
  Tensor out = empty(packed, {w.weight.rows, w.weight.cols}, dtype);
  run(PEFTOPS_PICK(group_dequantize), GroupDequantize{w.weight, out.mutable_data_ptr(), out_dtype}, out.numel());
  return out;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("group_dequantize", TORCH_BOX(&dequantize)); }

}  // namespace peftops::ops
