#include "ops/experts.h"

namespace peftops::ops {
namespace {

// u = scale * x F_e^T, of factors [experts * r, k] if by_rank, else [experts * k, r]
Tensor shrink(const Tensor& x_, const Tensor& f_, const Tensor& ends, bool by_rank, double scale) {
  constexpr const char* kOp = "experts_shrink";
  const OnDevice device(kOp, {{"x", x_}, {"the factor", f_}, {"offsets", ends}});
  const Tensor x = as_contiguous(x_), f = as_contiguous(f_);
  const int64_t m = rows_of(x), k = x.size(-1);
  const Offsets offsets(kOp, ends, m);
  PEFTOPS_CHECK(f.dim() == 2, kOp, ": the factor must have two dims, not shape ", shape_of(f));
  const int64_t r = by_rank ? offsets.share_of(kOp, "the factor", f.size(0)) : f.size(1);
  check_shape(kOp, "the factor", f, {offsets.experts * (by_rank ? r : k), by_rank ? k : r});
  Tensor u = empty(x, {m, r}, ScalarType::Float);
  offsets.clear_rest(u);
  const LoraShrink all{x.const_data_ptr(), f.const_data_ptr(), u.mutable_data_ptr<float>(), m, k, r, float(scale), by_rank,
                       dtype_of(kOp, "x", x), dtype_of(kOp, "the factor", f), {nullptr, 0}, nullptr};
  run(PEFTOPS_PICK(experts_shrink), offsets.of(all), m * k * r);
  return u;
}

// d_e = scale * u^T x over the rows of e, lying like the factor that it is the gradient of
Tensor gradient(const Tensor& u_, const Tensor& x_, const Tensor& ends, ScalarType dtype, bool by_rank, double scale) {
  constexpr const char* kOp = "experts_gradient";
  const OnDevice device(kOp, {{"x", x_}, {"u", u_}, {"offsets", ends}});
  const Tensor u = as_contiguous(u_), x = as_contiguous(x_);
  const int64_t m = rows_of(x), k = x.size(-1), r = u.size(-1);
  check_shape(kOp, "u", u, {m, r});
  const Offsets offsets(kOp, ends, m);
  Tensor d = empty(u, {offsets.experts * (by_rank ? r : k), by_rank ? k : r}, dtype);
  const LoraGradient all{floats_of(kOp, "u", u), x.const_data_ptr(), d.mutable_data_ptr(), m, k, r, float(scale), by_rank,
                         dtype_of(kOp, "x", x), dtype_of(kOp, "dtype", dtype), {nullptr, 0}, nullptr};
  run(PEFTOPS_PICK(experts_gradient), offsets.of(all), (m + offsets.experts) * k * r);
  return d;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("experts_shrink", TORCH_BOX(&shrink));
  m.impl("experts_gradient", TORCH_BOX(&gradient));
}

}  // namespace peftops::ops
