#include "kernels/nf4_quantize.h"
#include "ops/nf4.h"

namespace peftops::ops {
namespace {

constexpr const char* kOp = "nf4_quantize";

std::tuple<Tensor, Tensor> quantize(const Tensor& weight_, int64_t block_size) {
  const OnDevice device(kOp, {{"weight", weight_}});
  check_block_size(kOp, block_size);
  const DType dtype = dtype_of(kOp, "weight", weight_);
  const Tensor weight = as_contiguous(weight_);
  const int64_t n = weight.numel();
  Tensor packed = empty(weight, {(n + 1) / 2}, ScalarType::Byte);
  Tensor absmax = empty(weight, {blocks_of(n, block_size)}, ScalarType::Float);
  run(PEFTOPS_PICK(nf4_quantize),
      Nf4Quantize{weight.const_data_ptr(), packed.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(), n,
                  block_size, dtype},
      n);
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax_, const Tensor& offset) {
  const OnDevice device(kOp, {{"absmax", absmax_}, {"offset", offset}});
  const Tensor absmax = as_contiguous(absmax_);
  const int64_t blocks = absmax.numel();
  check_part(kOp, "absmax", absmax, ScalarType::Float, blocks);
  check_part(kOp, "offset", offset, ScalarType::Float, 1);
  Tensor code = empty(absmax, {blocks}, ScalarType::Byte);
  Tensor scale = empty(absmax, {blocks_of(blocks, kAbsmaxBlock)}, ScalarType::Float);
  run(PEFTOPS_PICK(nf4_quantize_absmax),
      Nf4QuantizeAbsmax{absmax.const_data_ptr<float>(), offset.const_data_ptr<float>(),
                        code.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>(), blocks},
      blocks * 16);
  return {code, scale};
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("nf4_quantize", TORCH_BOX(&quantize));
  m.impl("nf4_quantize_absmax", TORCH_BOX(&quantize_absmax));
}

}  // namespace peftops::ops
