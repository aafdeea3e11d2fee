#include "kernels/nf4_dequantize.h"
#include "ops/nf4.h"

namespace peftops::ops {
namespace {

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& offset, int64_t block_size, int64_t rows, int64_t cols,
                  ScalarType dtype) {
  constexpr const char* kOp = "nf4_dequantize";
  const OnDevice device(kOp, {{"packed", packed}, {"absmax", absmax}, {"absmax_scale", scale},
                              {"absmax_offset", offset}});
  const Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, rows, cols);
  const DType out_dtype = dtype_of(kOp, "dtype", dtype);
  Tensor out = empty(packed, {rows, cols}, dtype);
  run(PEFTOPS_PICK(nf4_dequantize), Nf4Dequantize{w.weight, out.mutable_data_ptr(), out_dtype}, rows * cols);
  return out;
}

Tensor expand_absmax(const Tensor& absmax, const Tensor& scale, const Tensor& offset) {
  constexpr const char* kOp = "nf4_absmax";
  const OnDevice device(kOp, {{"absmax", absmax}, {"absmax_scale", scale}, {"absmax_offset", offset}});
  const Tensor code = as_contiguous(absmax), s = as_contiguous(scale);
  const int64_t blocks = code.numel();
  check_part(kOp, "absmax", code, ScalarType::Byte, blocks);
  check_part(kOp, "absmax_scale", s, ScalarType::Float, blocks_of(blocks, kAbsmaxBlock));
  check_part(kOp, "absmax_offset", offset, ScalarType::Float, 1);
  Tensor out = empty(s, {blocks}, ScalarType::Float);
  run(PEFTOPS_PICK(nf4_absmax),
      Nf4Absmax{code.const_data_ptr<uint8_t>(), s.const_data_ptr<float>(), offset.const_data_ptr<float>(),
                out.mutable_data_ptr<float>(), blocks},
      blocks * 16);
  return out;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("nf4_dequantize", TORCH_BOX(&dequantize));
  m.impl("nf4_absmax", TORCH_BOX(&expand_absmax));
}

}  // namespace peftops::ops
