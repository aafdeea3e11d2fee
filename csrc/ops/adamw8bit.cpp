#include "kernels/adamw8bit.h"

#include <cmath>

#include "ops/nf4.h"

namespace peftops::ops {
namespace {

constexpr const char* kOp = "adamw8bit";
using Tensors = std::vector<Tensor>;

void check_list(const char* name, const Tensors& list, size_t count) {
  PEFTOPS_CHECK(list.size() == count, kOp, ": ", name, " must be ", count, " tensors, as the parameters are, not ",
                list.size());
}

void check_written(const char* name, const Tensor& t, ScalarType dtype, int64_t elements) {
  check_part(kOp, name, t, dtype, elements);
  PEFTOPS_CHECK(t.is_contiguous(), kOp, ": ", name, " must be contiguous, its shape is ", shape_of(t));
}

void step(const Tensors& parameters, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq,
          const Tensors& exp_avg_absmax, const Tensors& exp_avg_sq_absmax, int64_t block_size, int64_t number,
          double lr, double beta1, double beta2, double eps, double weight_decay) {
  const size_t count = parameters.size();
  const bool coded = !exp_avg_absmax.empty() || !exp_avg_sq_absmax.empty();
  check_list("grads", grads, count);
  check_list("exp_avg", exp_avg, count);
  check_list("exp_avg_sq", exp_avg_sq, count);
  if (coded) {
    check_list("exp_avg_absmax", exp_avg_absmax, count);
    check_list("exp_avg_sq_absmax", exp_avg_sq_absmax, count);
  }
  if (count == 0) return;
  const OnDevice device(kOp, {{"parameters", parameters[0]}});
  check_block_size(kOp, block_size);
  PEFTOPS_CHECK(number >= 1, kOp, ": step must be 1 or more, not ", number);

  std::vector<AdamWTensor> tensors(count);
  int64_t units = 0, elements = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &p = parameters[i], &g = grads[i], &first = exp_avg[i], &second = exp_avg_sq[i];
    check_one_device(kOp, {{"parameters", parameters[0]}, {"parameters", p}, {"grads", g}, {"exp_avg", first},
                           {"exp_avg_sq", second}});
    AdamWTensor& t = tensors[i];
    t = {};
    t.n = p.numel();
    t.dtype = dtype_of(kOp, "parameters", p), t.grad_dtype = dtype_of(kOp, "grads", g);
    check_written("parameters", p, p.scalar_type(), t.n);
    check_written("grads", g, g.scalar_type(), t.n);
    const int64_t blocks = blocks_of(t.n, block_size), kept = coded ? blocks * block_size : t.n;
    const ScalarType kind = coded ? ScalarType::Byte : ScalarType::Float;
    check_written("exp_avg", first, kind, kept);
    check_written("exp_avg_sq", second, kind, kept);
    if (coded) {
      const Tensor &a = exp_avg_absmax[i], &b = exp_avg_sq_absmax[i];
      check_one_device(kOp, {{"parameters", p}, {"exp_avg_absmax", a}, {"exp_avg_sq_absmax", b}});
      check_written("exp_avg_absmax", a, ScalarType::Float, blocks);
      check_written("exp_avg_sq_absmax", b, ScalarType::Float, blocks);
      t.first_absmax = a.mutable_data_ptr<float>(), t.second_absmax = b.mutable_data_ptr<float>();
    }
    t.parameter = p.mutable_data_ptr(), t.grad = g.const_data_ptr();
    t.first = first.mutable_data_ptr(), t.second = second.mutable_data_ptr();
    t.units_before = units;
    units += blocks_of(t.n, kAdamWUnit), elements += t.n;
  }
  const auto sum_of_rests = [&](double beta) { return 1 - std::pow(beta, double(number)); };
  const double correction = std::sqrt(sum_of_rests(beta2));
  run(PEFTOPS_PICK(adamw8bit),
      AdamW8bit{tensors.data(), int64_t(count), units, block_size, float(1 - lr * weight_decay), float(beta1),
                float(1 - beta1), float(beta2), float(1 - beta2), float(lr * correction / sum_of_rests(beta1)),
                float(eps * correction)},
      elements * 16);
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("adamw8bit_", TORCH_BOX(&step)); }

}  // namespace peftops::ops
