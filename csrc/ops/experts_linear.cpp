#include "kernels/experts_linear.h"
#include "ops/group.h"
#include "ops/linear.h"
#include "ops/nf4.h"

namespace peftops::ops {
namespace {

using Optional = std::optional<Tensor>;

// Where the rows of each of the experts end. The CPU reads it here; CUDA's kernels read it on the device.
class Offsets {
 public:
  const int64_t* at;
  int64_t experts;

  Offsets(const char* op, const Tensor& offsets, [[maybe_unused]] int64_t rows)
      : experts(offsets.numel()), kept_(as_contiguous(offsets)) {
    PEFTOPS_CHECK(offsets.dim() == 1 && experts > 0, op, ": offsets must have one dim, [experts], not shape ",
                    shape_of(offsets));
    at = integers_of<int64_t>(op, "offsets", kept_);
#ifndef PEFTOPS_CUDA
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t before = e ? at[e - 1] : 0;
      PEFTOPS_CHECK(at[e] >= before, op, ": offsets must not decrease, but offsets[", e, "] is ", at[e], " after ", before);
      PEFTOPS_CHECK(at[e] <= rows, op, ": offsets must not exceed the ", rows, " rows, but offsets[", e, "] is ", at[e]);
    }
#endif
  }
  // Of a stack of weights `n` rows that follow one another.
  int64_t share_of(const char* op, const char* name, int64_t n) const {
    PEFTOPS_CHECK(n % experts == 0, op, ": ", name, " has ", n, " rows, which is no multiple of the ", experts, " experts");
    return n / experts;
  }
  // What no expert has a row for.
  void clear_rest(Tensor& result) const {
#ifdef PEFTOPS_CUDA
    fill_with_zeros(result);
#else
    const int64_t rows = rows_of(result), bytes = result.size(-1) * int64_t(result.element_size()), end = at[experts - 1];
    if (rows > end && bytes)
      std::memset(static_cast<char*>(result.mutable_data_ptr()) + end * bytes, 0, size_t((rows - end) * bytes));
#endif
  }
  template <class Args> Experts<Args> of(const Args& all) const { return {all, at, experts}; }

 private:
  Tensor kept_;
};

// y = x W_e^T + bias_e + scaling * u lora_B_e^T
template <class Args, class Weight, class Kernel>
Tensor linear(const char* op, Kernel kernel, const Weight& weight, const Tensor& x, const Offsets& offsets,
              const Optional& bias, const Optional& u, const Optional& b, double scaling, bool int8) {
  LinearOperands<Args> o(op, weight, x, bias, u, b, scaling, offsets.experts);
  o.args.int8 = int8;
  offsets.clear_rest(o.y);
  run(kernel, offsets.of(o.args), o.work());
  return o.y;
}

// dx = g W_e + v lora_A_e
template <class Args, class Weight, class Kernel>
Tensor backward(const char* op, Kernel kernel, const Weight& weight, const Tensor& g, const Offsets& offsets,
                const Optional& v, const Optional& a) {
  LinearBackwardOperands<Args> o(op, weight, g, v, a);
  if (a) check_shape(op, "lora_A", o.a, {offsets.experts * o.args.r, weight.cols});
  if constexpr (std::is_same_v<Args, GroupLinearBackward>) o.args.pool = 1;
  offsets.clear_rest(o.dx);
  run(kernel, offsets.of(o.args), o.work());
  return o.dx;
}

Tensor nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Optional& scale, const Optional& offset,
           int64_t block_size, int64_t n, int64_t k, const Tensor& ends, const Optional& bias, const Optional& u,
           const Optional& b, double scaling, bool int8) {
  constexpr const char* kOp = "experts_linear";
  const OnDevice device(kOp, {{"x", x}, {"packed", packed}, {"absmax", absmax}, {"absmax_scale", scale},
                              {"absmax_offset", offset}, {"offsets", ends}, {"bias", bias}, {"u", u}, {"lora_B", b}});
  const Offsets offsets(kOp, ends, rows_of(x));
  Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, offsets.experts * n, k);
  w.weight.rows = n;
  return linear<Nf4Linear>(kOp, PEFTOPS_PICK(experts_nf4), w.weight, x, offsets, bias, u, b, scaling, int8);
}

Tensor nf4_backward(const Tensor& g, const Tensor& packed, const Tensor& absmax, const Optional& scale,
                    const Optional& offset, int64_t block_size, int64_t k, const Tensor& ends, const Optional& v,
                    const Optional& a) {
  constexpr const char* kOp = "experts_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"packed", packed}, {"absmax", absmax}, {"absmax_scale", scale},
                              {"absmax_offset", offset}, {"offsets", ends}, {"v", v}, {"lora_A", a}});
  const Offsets offsets(kOp, ends, rows_of(g));
  Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, offsets.experts * g.size(-1), k);
  w.weight.rows = g.size(-1);
  return backward<Nf4LinearBackward>(kOp, PEFTOPS_PICK(experts_nf4_backward), w.weight, g, offsets, v, a);
}

Tensor group(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& zeros, int64_t bits, int64_t size,
             const Tensor& ends, const Optional& bias, const Optional& u, const Optional& b, double scaling, bool int8) {
  constexpr const char* kOp = "experts_linear";
  const OnDevice device(kOp, {{"x", x}, {"packed", packed}, {"scales", scales}, {"zeros", zeros}, {"offsets", ends},
                              {"bias", bias}, {"u", u}, {"lora_B", b}});
  const Offsets offsets(kOp, ends, rows_of(x));
  GroupParts w(kOp, packed, scales, zeros, bits, size);
  w.weight.rows = offsets.share_of(kOp, "weight", w.weight.rows);
  return linear<GroupLinear>(kOp, PEFTOPS_PICK(experts_group), w.weight, x, offsets, bias, u, b, scaling, int8);
}

Tensor group_backward(const Tensor& g, const Tensor& packed, const Tensor& scales, const Tensor& zeros, int64_t bits,
                      int64_t size, const Tensor& ends, const Optional& v, const Optional& a) {
  constexpr const char* kOp = "experts_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"packed", packed}, {"scales", scales}, {"zeros", zeros}, {"offsets", ends},
                              {"v", v}, {"lora_A", a}});
  const Offsets offsets(kOp, ends, rows_of(g));
  GroupParts w(kOp, packed, scales, zeros, bits, size);
  w.weight.rows = offsets.share_of(kOp, "weight", w.weight.rows);
  return backward<GroupLinearBackward>(kOp, PEFTOPS_PICK(experts_group_backward), w.weight, g, offsets, v, a);
}

// A stack [experts, n, k], each contiguous or the transpose of what is.
struct DenseParts {
  Tensor kept;
  DenseWeight weight;

  DenseParts(const char* op, const Tensor& w, const Tensor& like, int64_t experts) : kept(w) {
    PEFTOPS_CHECK(w.dim() == 3 && w.size(0) == experts, op, ": weight must have shape [", experts,
                    ", out, in], not ", shape_of(w));
    PEFTOPS_CHECK(w.scalar_type() == like.scalar_type(), op, ": weight must be ",
                    torch::headeronly::toString(like.scalar_type()), " like x, not ",
                    torch::headeronly::toString(w.scalar_type()));
    const bool transposed = !w.is_contiguous() && w.stride(1) == 1 && w.stride(2) == w.size(1) &&
                            (experts == 1 || w.stride(0) == w.size(1) * w.size(2));
    if (!transposed) kept = as_contiguous(w);
    weight = {kept.const_data_ptr(), w.size(1), w.size(2), transposed};
  }
};

Tensor dense(const Tensor& x, const Tensor& weight, const Tensor& ends, const Optional& bias, const Optional& u,
             const Optional& b, double scaling) {
  constexpr const char* kOp = "experts_linear";
  const OnDevice device(kOp, {{"x", x}, {"weight", weight}, {"offsets", ends}, {"bias", bias}, {"u", u}, {"lora_B", b}});
  const Offsets offsets(kOp, ends, rows_of(x));
  const DenseParts w(kOp, weight, x, offsets.experts);
  return linear<DenseLinear>(kOp, PEFTOPS_PICK(experts_dense), w.weight, x, offsets, bias, u, b, scaling, false);
}

Tensor dense_backward(const Tensor& g, const Tensor& weight, const Tensor& ends, const Optional& v, const Optional& a) {
  constexpr const char* kOp = "experts_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"weight", weight}, {"offsets", ends}, {"v", v}, {"lora_A", a}});
  const Offsets offsets(kOp, ends, rows_of(g));
  const DenseParts w(kOp, weight, g, offsets.experts);
  return backward<DenseLinearBackward>(kOp, PEFTOPS_PICK(experts_dense_backward), w.weight, g, offsets, v, a);
}

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
  m.impl("experts_nf4", TORCH_BOX(&nf4));
  m.impl("experts_nf4_backward", TORCH_BOX(&nf4_backward));
  m.impl("experts_group", TORCH_BOX(&group));
  m.impl("experts_group_backward", TORCH_BOX(&group_backward));
  m.impl("experts_dense", TORCH_BOX(&dense));
  m.impl("experts_dense_backward", TORCH_BOX(&dense_backward));
  m.impl("experts_shrink", TORCH_BOX(&shrink));
  m.impl("experts_gradient", TORCH_BOX(&gradient));
}

}  // namespace peftops::ops
