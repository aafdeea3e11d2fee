#include "kernels/nf4_linear.h"
#include "ops/nf4.h"
#include "ops/nf4_library.h"

namespace peftops::ops {
namespace {

// y = x W^T + bias + scaling * u lora_B^T
Tensor linear(const Tensor& x_, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& offset, int64_t block_size, int64_t n, int64_t k,
              const std::optional<Tensor>& bias_, const std::optional<Tensor>& u_,
              const std::optional<Tensor>& b_, double scaling){
  constexpr const char* kOp = "nf4_linear";
  const OnDevice device(x_);
  check_last_dim(kOp, "x", x_, k);
  const Tensor x = as_contiguous(x_);
  const int64_t m = rows_of(x);
  const Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, n, k);
  Tensor y = empty_with_last_dim(x, n), bias, u, b;
  Nf4Linear args = {};
  args.weight = w.weight;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.m = m;
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
  if (!nf4_linear_by_library(kOp, args, x, y)) run(PEFTOPS_PICK(nf4_linear), args, m * n * k);
  return y;
}

// dx = g W + dropout'(v lora_A)
Tensor linear_backward(const Tensor& g_, const Tensor& packed, const Tensor& absmax,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& offset,
                       int64_t block_size, int64_t k, const std::optional<Tensor>& v_,
                       const std::optional<Tensor>& a_, double p, const std::optional<Tensor>& seed){
  constexpr const char* kOp = "nf4_linear_backward";
  const OnDevice device(g_);
  const Tensor g = as_contiguous(g_);
  const int64_t m = rows_of(g), n = g.size(-1);
  const Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, n, k);
  Tensor dx = empty_with_last_dim(g, k), v, a;
  Nf4LinearBackward args = {};
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
    check_shape(kOp, "lora_A", a, {args.r, k});
    args.v = floats_of(kOp, "v", v);
    args.a = a.const_data_ptr();
    args.a_dtype = dtype_of(kOp, "lora_A", a);
    args.dropout = dropout_of(kOp, p, seed);
  }
  run(PEFTOPS_PICK(nf4_linear_backward), args, m * n * k);
  return dx;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("nf4_linear", TORCH_BOX(&linear));
  m.impl("nf4_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace peftops::ops
