#include "kernels/mxfp4_dequantize.h"
#include "kernels/mxfp4_linear.h"
#include "ops/by_library.h"
#include "ops/linear.h"
#include "ops/mxfp4.h"

namespace peftops::ops {
namespace {

// y = x W^T + bias + scaling * u lora_B^T
Tensor linear(const Tensor& x, const Tensor& blocks, const Tensor& scales, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& u, const std::optional<Tensor>& b, double scaling, bool int8) {
  constexpr const char* kOp = "mxfp4_linear";
  const OnDevice device(kOp, {{"x", x}, {"blocks", blocks}, {"scales", scales}, {"bias", bias}, {"u", u}, {"lora_B", b}});
  const Mxfp4Parts w(kOp, blocks, scales);
  LinearOperands<Mxfp4Linear> o(kOp, w.weight, x, bias, u, b, scaling);
  o.args.int8 = int8;
#ifdef PEFTOPS_CUDA
  if (linear_by_library(kOp, o.args, o.x, o.y, PEFTOPS_PICK(mxfp4_operands), PEFTOPS_PICK(mxfp4_dequantize))) return o.y;
#endif
  run(PEFTOPS_PICK(mxfp4_linear), o.args, o.work());
  return o.y;
}

// dx = g W + dropout'(v lora_A)
Tensor linear_backward(const Tensor& g, const Tensor& blocks, const Tensor& scales, const std::optional<Tensor>& v,
                       const std::optional<Tensor>& a, double p, const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "mxfp4_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"blocks", blocks}, {"scales", scales}, {"v", v}, {"lora_A", a}, {"seed", seed}});
  const Mxfp4Parts w(kOp, blocks, scales);
  LinearBackwardOperands<Mxfp4LinearBackward> o(kOp, w.weight, g, v, a);
  if (a) {
    check_shape(kOp, "lora_A", o.a, {o.args.r, w.weight.cols});
    o.args.dropout = dropout_of(kOp, p, seed);
  }
#ifdef PEFTOPS_CUDA
  if (backward_by_library(kOp, o.args, o.g, o.dx, o.a, 1, o.args.dropout, PEFTOPS_PICK(mxfp4_dequantize))) return o.dx;
#endif
  run(PEFTOPS_PICK(mxfp4_linear_backward), o.args, o.work());
  return o.dx;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("mxfp4_linear", TORCH_BOX(&linear));
  m.impl("mxfp4_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace peftops::ops
