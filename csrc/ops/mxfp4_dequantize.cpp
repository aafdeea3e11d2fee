#include "kernels/mxfp4_dequantize.h"
#include "ops/mxfp4.h"

namespace peftops::ops {
namespace {

Tensor dequantize(const Tensor& blocks, const Tensor& scales, ScalarType dtype) {
  constexpr const char* kOp = "mxfp4_dequantize";
  const OnDevice device(kOp, {{"blocks", blocks}, {"scales", scales}});
  const Mxfp4Parts w(kOp, blocks, scales);
  const DType out_dtype = dtype_of(kOp, "dtype", dtype);
  Tensor out = empty(blocks, {w.weight.rows, w.weight.cols}, dtype);
  run(PEFTOPS_PICK(mxfp4_dequantize), Mxfp4Dequantize{w.weight, out.mutable_data_ptr(), out_dtype}, out.numel());
  return out;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("mxfp4_dequantize", TORCH_BOX(&dequantize)); }

}  // namespace peftops::ops
