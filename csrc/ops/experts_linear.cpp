#include "ops/experts.h"
#include "ops/experts_library.h"
#include "ops/group.h"
#include "ops/linear.h"
#include "ops/mxfp4.h"
#include "ops/nf4.h"

namespace peftops::ops {
namespace {

using Optional = std::optional<Tensor>;

// y = x W_e^T + bias_e + scaling * u lora_B_e^T
template <class Args, class Weight, class Kernel>
Tensor linear(const char* op, Kernel kernel, const Weight& weight, const Tensor& x, const Offsets& offsets,
              const Optional& bias, const Optional& u, const Optional& b, double scaling, bool int8) {
  LinearOperands<Args> o(op, weight, x, bias, u, b, scaling, offsets.experts);
  o.args.int8 = int8;
  offsets.clear_rest(o.y);
  run(kernel, offsets.of(o.args), o.work(), offsets.experts);
  return o.y;
}

// dx = g W_e + v lora_A_e
template <class Args, class Weight, class Kernel>
Tensor backward(const char* op, Kernel kernel, const Weight& weight, const Tensor& g, const Offsets& offsets,
                const Optional& v, const Optional& a) {
  LinearBackwardOperands<Args> o(op, weight, g, v, a);
  if (a) check_shape(op, "lora_A", o.a, {offsets.experts * o.args.r, weight.cols});
  if constexpr (std::is_same_v<Args, GroupLinearBackward>) o.args.pool = 1;
#ifdef PEFTOPS_CUDA
  if constexpr (!std::is_same_v<Args, DenseLinearBackward>)
    if (stack_backward_by_library(op, o, offsets)) return o.dx;
#endif
  offsets.clear_rest(o.dx);
  run(kernel, offsets.of(o.args), o.work(), offsets.experts);
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

Tensor mxfp4(const Tensor& x, const Tensor& blocks, const Tensor& scales, const Tensor& ends, const Optional& bias,
             const Optional& u, const Optional& b, double scaling, bool int8) {
  constexpr const char* kOp = "experts_linear";
  const OnDevice device(kOp, {{"x", x}, {"blocks", blocks}, {"scales", scales}, {"offsets", ends}, {"bias", bias},
                              {"u", u}, {"lora_B", b}});
  const Offsets offsets(kOp, ends, rows_of(x));
  Mxfp4Parts w(kOp, blocks, scales);
  w.weight.rows = offsets.share_of(kOp, "weight", w.weight.rows);
  return linear<Mxfp4Linear>(kOp, PEFTOPS_PICK(experts_mxfp4), w.weight, x, offsets, bias, u, b, scaling, int8);
}

Tensor mxfp4_backward(const Tensor& g, const Tensor& blocks, const Tensor& scales, const Tensor& ends, const Optional& v,
                      const Optional& a) {
  constexpr const char* kOp = "experts_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"blocks", blocks}, {"scales", scales}, {"offsets", ends}, {"v", v},
                              {"lora_A", a}});
  const Offsets offsets(kOp, ends, rows_of(g));
  Mxfp4Parts w(kOp, blocks, scales);
  w.weight.rows = offsets.share_of(kOp, "weight", w.weight.rows);
  return backward<Mxfp4LinearBackward>(kOp, PEFTOPS_PICK(experts_mxfp4_backward), w.weight, g, offsets, v, a);
}

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

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("experts_nf4", TORCH_BOX(&nf4));
  m.impl("experts_nf4_backward", TORCH_BOX(&nf4_backward));
  m.impl("experts_group", TORCH_BOX(&group));
  m.impl("experts_group_backward", TORCH_BOX(&group_backward));
  m.impl("experts_mxfp4", TORCH_BOX(&mxfp4));
  m.impl("experts_mxfp4_backward", TORCH_BOX(&mxfp4_backward));
  m.impl("experts_dense", TORCH_BOX(&dense));
  m.impl("experts_dense_backward", TORCH_BOX(&dense_backward));
}

}  // namespace peftops::ops
