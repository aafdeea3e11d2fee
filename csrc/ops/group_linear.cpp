#include "kernels/group_dequantize.h"
#include "kernels/group_linear.h"
#include "ops/by_library.h"
#include "ops/group.h"
#include "ops/linear.h"

namespace peftops::ops {
namespace {

// y = x W^T + bias + scaling * u lora_B^T
Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& zeros, int64_t bits,
              int64_t group, const std::optional<Tensor>& bias, const std::optional<Tensor>& u,
              const std::optional<Tensor>& b, double scaling, bool int8) {
  constexpr const char* kOp = "group_linear";
  const OnDevice device(kOp, {{"x", x}, {"packed", packed}, {"scales", scales}, {"zeros", zeros}, {"bias", bias},
                              {"u", u}, {"lora_B", b}});
  const GroupParts w(kOp, packed, scales, zeros, bits, group);
  LinearOperands<GroupLinear> o(kOp, w.weight, x, bias, u, b, scaling);
  o.args.int8 = int8;
#ifdef PEFTOPS_CUDA
  if (linear_by_library(kOp, o.args, o.x, o.y, PEFTOPS_PICK(group_operands), PEFTOPS_PICK(group_dequantize))) return o.y;
#endif
  run(PEFTOPS_PICK(group_linear), o.args, o.work());
  return o.y;
}

// dx = g W + v lora_A, with each column of lora_A repeated to the columns of W
Tensor linear_backward(const Tensor& g, const Tensor& packed, const Tensor& scales, const Tensor& zeros, int64_t bits,
                       int64_t group, const std::optional<Tensor>& v, const std::optional<Tensor>& a) {
  constexpr const char* kOp = "group_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"packed", packed}, {"scales", scales}, {"zeros", zeros}, {"v", v},
                              {"lora_A", a}});
  const GroupParts w(kOp, packed, scales, zeros, bits, group);
  LinearBackwardOperands<GroupLinearBackward> o(kOp, w.weight, g, v, a);
  if (a) {
    const int64_t k = w.weight.cols;
    PEFTOPS_CHECK(o.a.dim() == 2 && o.a.size(0) == o.args.r && o.a.size(1) > 0 && k % o.a.size(1) == 0, kOp,
                    ": lora_A must have shape [", o.args.r, ", groups] with groups a divisor of ", k, ", not ",
                    shape_of(o.a));
    o.args.pool = k / o.a.size(1);
  }
#ifdef PEFTOPS_CUDA
  if (backward_by_library(kOp, o.args, o.g, o.dx, o.a, o.args.pool, {nullptr, 0}, PEFTOPS_PICK(group_dequantize)))
    return o.dx;
#endif
  run(PEFTOPS_PICK(group_linear_backward), o.args, o.work());
  return o.dx;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("group_linear", TORCH_BOX(&linear));
  m.impl("group_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace peftops::ops
