#include "kernels/lora_linear.h"
#include "ops/bind.h"

namespace peftops::ops {
namespace {

// How a factor of rank r between k columns lies: [r, k] is read by rank, [k, r] is not.
int64_t rank_of(const char* op, const Tensor& f, int64_t k, bool by_rank) {
  PEFTOPS_CHECK(f.dim() == 2 && f.size(by_rank ? 1 : 0) == k, op, ": the factor must have shape ",
                  by_rank ? "[r, " : "[", k, by_rank ? "]" : ", r]", ", not ", shape_of(f));
  return f.size(by_rank ? 0 : 1);
}

// Working memory for sums that blocks of threads share. It is returned to torch when the kernels are enqueued.
template <class Args>
std::optional<Tensor> share_sums([[maybe_unused]] const Tensor& like, [[maybe_unused]] Args& args,
                                 [[maybe_unused]] int64_t results) {
#ifdef PEFTOPS_CUDA
  const int64_t parts = cuda::lora_parts(args);
  if (parts == 1) return std::nullopt;
  Tensor memory = empty(like, {parts, results}, ScalarType::Float);
  args.parts = memory.mutable_data_ptr<float>();
  return memory;
#else
  return std::nullopt;
#endif
}

// u = scale * dropout(x) f^T
Tensor shrink(const Tensor& x_, const Tensor& f_, bool by_rank, double scale, double p,
              const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "lora_shrink";
  const OnDevice device(kOp, {{"x", x_}, {"the factor", f_}, {"seed", seed}});
  const Tensor x = as_contiguous(x_), f = as_contiguous(f_);
  const int64_t m = rows_of(x), k = x.size(-1), r = rank_of(kOp, f, k, by_rank);
  Tensor u = empty(x, {m, r}, ScalarType::Float);
  LoraShrink args{x.const_data_ptr(), f.const_data_ptr(), u.mutable_data_ptr<float>(), m, k, r, float(scale), by_rank,
                  dtype_of(kOp, "x", x), dtype_of(kOp, "the factor", f), dropout_of(kOp, p, seed), nullptr};
  const auto memory = share_sums(x, args, m * r);
  run(PEFTOPS_PICK(lora_shrink), args, m * k * r);
  return u;
}

// y += dropout(scale * u f)
void expand(Tensor y, const Tensor& u_, const Tensor& f_, bool by_rank, double scale, double p,
            const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "lora_expand";
  const OnDevice device(kOp, {{"y", y}, {"u", u_}, {"the factor", f_}, {"seed", seed}});
  PEFTOPS_CHECK(y.is_contiguous(), kOp, ": y must be contiguous");
  const Tensor u = as_contiguous(u_), f = as_contiguous(f_);
  const int64_t m = rows_of(y), k = y.size(-1), r = rank_of(kOp, f, k, by_rank);
  check_shape(kOp, "u", u, {m, r});
  run(PEFTOPS_PICK(lora_expand),
      LoraExpand{y.mutable_data_ptr(), floats_of(kOp, "u", u), f.const_data_ptr(), m, k, r, float(scale), by_rank,
                 dtype_of(kOp, "y", y), dtype_of(kOp, "the factor", f), dropout_of(kOp, p, seed)},
      m * k * r);
}

// d = scale * u^T dropout(x), lying like the factor that it is the gradient of
Tensor gradient(const Tensor& u_, const Tensor& x_, ScalarType dtype, bool by_rank, double scale, double p,
                const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "lora_gradient";
  const OnDevice device(kOp, {{"x", x_}, {"u", u_}, {"seed", seed}});
  const Tensor u = as_contiguous(u_), x = as_contiguous(x_);
  const int64_t m = rows_of(x), k = x.size(-1), r = u.size(-1);
  check_shape(kOp, "u", u, {m, r});
  Tensor d = by_rank ? empty(u, {r, k}, dtype) : empty(u, {k, r}, dtype);
  LoraGradient args{floats_of(kOp, "u", u), x.const_data_ptr(), d.mutable_data_ptr(), m, k, r, float(scale), by_rank,
                    dtype_of(kOp, "x", x), dtype_of(kOp, "dtype", dtype), dropout_of(kOp, p, seed), nullptr};
  const auto memory = share_sums(x, args, r * k);
  run(PEFTOPS_PICK(lora_gradient), args, m * k * r);
  return d;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("lora_shrink", TORCH_BOX(&shrink));
  m.impl("lora_expand_", TORCH_BOX(&expand));
  m.impl("lora_gradient", TORCH_BOX(&gradient));
}

}  // namespace peftops::ops
