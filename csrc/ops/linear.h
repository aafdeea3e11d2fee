// The operands of a linear layer over a packed weight (kernels/linear.h) as they cross the operators: checked, and
// kept alive while a kernel reads them.
#pragma once
#include "kernels/linear.h"
#include "ops/bind.h"

namespace peftops::ops {

// y = x W^T + bias + scaling * u lora_B^T. Args: Linear of some weight. For a stack of `experts` layers, `weight` has
// the size of one layer; bias and lora_B have all layers, one after the other.
template <class Args> struct LinearOperands {
  Tensor x, y, bias, u, b;
  Args args = {};

  template <class Weight>
  LinearOperands(const char* op, const Weight& weight, const Tensor& x_, const std::optional<Tensor>& bias_,
                 const std::optional<Tensor>& u_, const std::optional<Tensor>& b_, double scaling, int64_t experts = 1) {
    check_last_dim(op, "x", x_, weight.cols);
    x = as_contiguous(x_), y = empty_with_last_dim(x, weight.rows);
    args.weight = weight;
    args.x = x.const_data_ptr();
    args.y = y.mutable_data_ptr();
    args.m = rows_of(x);
    args.dtype = dtype_of(op, "x", x);
    if (bias_) {
      bias = as_contiguous(*bias_);
      check_shape(op, "bias", bias, {experts * weight.rows});
      args.bias = bias.const_data_ptr();
      args.bias_dtype = dtype_of(op, "bias", bias);
    }
    PEFTOPS_CHECK(u_.has_value() == b_.has_value(), op, ": u and lora_B belong together");
    if (!u_) return;
    u = as_contiguous(*u_), b = as_contiguous(*b_);
    args.r = u.size(-1);
    check_shape(op, "u", u, {args.m, args.r});
    check_shape(op, "lora_B", b, {experts * weight.rows, args.r});
    args.u = floats_of(op, "u", u);
    args.b = b.const_data_ptr();
    args.b_dtype = dtype_of(op, "lora_B", b);
    args.scaling = float(scaling);
  }
  int64_t work() const { return args.m * args.weight.rows * args.weight.cols; }
};

// dx = g W + v lora_A, where the caller checks the shape of lora_A. Args: LinearBackward of some weight, or more.
template <class Args> struct LinearBackwardOperands {
  Tensor g, dx, v, a;
  Args args = {};

  template <class Weight>
  LinearBackwardOperands(const char* op, const Weight& weight, const Tensor& g_, const std::optional<Tensor>& v_,
                         const std::optional<Tensor>& a_) {
    check_last_dim(op, "g", g_, weight.rows);
    g = as_contiguous(g_), dx = empty_with_last_dim(g, weight.cols);
    args.weight = weight;
    args.g = g.const_data_ptr();
    args.dx = dx.mutable_data_ptr();
    args.m = rows_of(g);
    args.dtype = dtype_of(op, "g", g);
    PEFTOPS_CHECK(v_.has_value() == a_.has_value(), op, ": v and lora_A belong together");
    if (!v_) return;
    v = as_contiguous(*v_), a = as_contiguous(*a_);
    args.r = v.size(-1);
    check_shape(op, "v", v, {args.m, args.r});
    args.v = floats_of(op, "v", v);
    args.a = a.const_data_ptr();
    args.a_dtype = dtype_of(op, "lora_A", a);
  }
  int64_t work() const { return args.m * args.weight.rows * args.weight.cols; }
};

}  // namespace peftops::ops
