#include "kernels/group_linear.h"
#include "ops/group.h"

namespace peftops::ops {
namespace {

// y = x W^T + bias + scaling * u lora_B^T
Tensor linear(const Tensor& x_, const Tensor& packed, const Tensor& scales, const Tensor& zeros,
              int64_t bits, int64_t group, const std::optional<Tensor>& bias_,
              const std::optional<Tensor>& u_, const std::optional<Tensor>& b_, double scaling, bool int8) {
  constexpr const char* kOp = "group_linear";
  const OnDevice device(x_);
  const GroupParts w(kOp, packed, scales, zeros, bits, group);
  const int64_t n = w.weight.rows;
  check_last_dim(kOp, "x", x_, w.weight.cols);
  const Tensor x = as_contiguous(x_);
  const int64_t m = rows_of(x);
  Tensor y = empty_with_last_dim(x, n), bias, u, b;
  GroupLinear args = {};
  args.weight = w.weight;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.m = m;
  args.int8 = int8;
  args.dtype = dtype_of(kOp, "x", x);
  if (bias_) {
    bias = as_contiguous(*bias_);
    check_shape(kOp, "bias", bias, {n});
    args.bias = bias.const_data_ptr();
    args.bias_dtype = dtype_of(kOp, "bias", bias);
  }
  STD_TORCH_CHECK(u_.has_value() == b_.has_value(), kOp, ": u and lora_B belong together");
  if (u_) {
    u = as_contiguous(*u_), b = as_contiguous(*b_);
    args.r = u.size(-1);
    check_shape(kOp, "u", u, {m, args.r});
    check_shape(kOp, "lora_B", b, {n, args.r});
    args.u = floats_of(kOp, "u", u);
    args.b = b.const_data_ptr();
    args.b_dtype = dtype_of(kOp, "lora_B", b);
    args.scaling = float(scaling);
  }
  run(PEFTOPS_PICK(group_linear), args, m * n * w.weight.cols);
  return y;
}

// dx = g W + v lora_A, each column of lora_A as often as the columns of W need
Tensor linear_backward(const Tensor& g_, const Tensor& packed, const Tensor& scales, const Tensor& zeros,
                       int64_t bits, int64_t group, const std::optional<Tensor>& v_,
                       const std::optional<Tensor>& a_) {
  constexpr const char* kOp = "group_linear_backward";
  const OnDevice device(g_);
  const GroupParts w(kOp, packed, scales, zeros, bits, group);
  const int64_t n = w.weight.rows, k = w.weight.cols;
  check_last_dim(kOp, "g", g_, n);
  const Tensor g = as_contiguous(g_);
  const int64_t m = rows_of(g);
  Tensor dx = empty_with_last_dim(g, k), v, a;
  GroupLinearBackward args = {};
  args.weight = w.weight;
  args.g = g.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.m = m;
  args.dtype = dtype_of(kOp, "g", g);
  STD_TORCH_CHECK(v_.has_value() == a_.has_value(), kOp, ": v and lora_A belong together");
  if (v_) {
    v = as_contiguous(*v_), a = as_contiguous(*a_);
    args.r = v.size(-1);
    check_shape(kOp, "v", v, {m, args.r});
    STD_TORCH_CHECK(a.dim() == 2 && a.size(0) == args.r && a.size(1) > 0 && k % a.size(1) == 0, kOp,
                    ": lora_A must have shape [", args.r, ", groups] with groups a divisor of ", k, ", not ", shape_of(a));
    args.v = floats_of(kOp, "v", v);
    args.a = a.const_data_ptr();
    args.a_dtype = dtype_of(kOp, "lora_A", a);
    args.pool = k / a.size(1);
  }
  run(PEFTOPS_PICK(group_linear_backward), args, m * n * k);
  return dx;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("group_linear", TORCH_BOX(&linear));
  m.impl("group_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace peftops::ops
