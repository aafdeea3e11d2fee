#include "kernels/nf4_dequantize.h"
#include "kernels/nf4_linear.h"
#ifdef PEFTOPS_SM90
#include "kernels/cuda/nf4_linear_sm90.h"
#endif
#include "ops/by_library.h"
#include "ops/linear.h"
#include "ops/nf4.h"

namespace peftops::ops {
namespace {

#ifdef PEFTOPS_CUDA
// Whether it was multiplied by the kernel for an H100 or H200: where that is faster, unless PEFTOPS_NF4_WGMMA is on or off.
bool linear_by_wgmma(const char* op, const Nf4Linear& args, const Tensor& x) {
  const char* text = std::getenv("PEFTOPS_NF4_WGMMA");
  const std::string way = text ? text : "auto";
  PEFTOPS_CHECK(way == "auto" || way == "on" || way == "off", op, ": PEFTOPS_NF4_WGMMA must be auto, on or off, not ", way);
  if (way == "off") return false;
#ifdef PEFTOPS_SM90
  cuda::Nf4LinearSm90 plan;
  const cudaError_t status =
      cuda::plan_wgmma(args, way == "on" ? cuda::Sm90::always : cuda::Sm90::faster, wanted_way(op), &plan);
  PEFTOPS_CHECK(status == cudaSuccess, op, ": PEFTOPS_NF4_WGMMA=", way, " needs an H100 or H200: ",
                cudaGetErrorString(status));
  if (plan.parts == 0) return false;
  const Tensor sums = empty(x, {plan.parts > 1 ? plan.parts * args.m : 0, args.weight.rows}, ScalarType::Float);
  if (plan.parts > 1) plan.sums = sums.mutable_data_ptr<float>();
  run(PEFTOPS_PICK(nf4_linear_sm90), plan, 0);
  return true;
#else
  PEFTOPS_CHECK(way == "auto", op, ": PEFTOPS_NF4_WGMMA=on needs a build for compute capability 9.0");
  return false;
#endif
}
#endif

// y = x W^T + bias + scaling * u lora_B^T
Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& offset, int64_t block_size, int64_t n, int64_t k,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& u, const std::optional<Tensor>& b,
              double scaling, bool int8) {
  constexpr const char* kOp = "nf4_linear";
  const OnDevice device(kOp, {{"x", x}, {"packed", packed}, {"absmax", absmax}, {"absmax_scale", scale},
                              {"absmax_offset", offset}, {"bias", bias}, {"u", u}, {"lora_B", b}});
  const Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, n, k);
  LinearOperands<Nf4Linear> o(kOp, w.weight, x, bias, u, b, scaling);
  o.args.int8 = int8;
#ifdef PEFTOPS_CUDA
  if (linear_by_wgmma(kOp, o.args, o.x)) return o.y;
  if (linear_by_library(kOp, o.args, o.x, o.y, PEFTOPS_PICK(nf4_operands), PEFTOPS_PICK(nf4_dequantize))) return o.y;
#endif
  run(PEFTOPS_PICK(nf4_linear), o.args, o.work());
  return o.y;
}

// dx = g W + dropout'(v lora_A)
Tensor linear_backward(const Tensor& g, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& offset, int64_t block_size, int64_t k,
                       const std::optional<Tensor>& v, const std::optional<Tensor>& a, double p,
                       const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "nf4_linear_backward";
  const OnDevice device(kOp, {{"g", g}, {"packed", packed}, {"absmax", absmax}, {"absmax_scale", scale},
                              {"absmax_offset", offset}, {"v", v}, {"lora_A", a}, {"seed", seed}});
  const Nf4Parts w(kOp, packed, absmax, scale, offset, block_size, g.size(-1), k);
  LinearBackwardOperands<Nf4LinearBackward> o(kOp, w.weight, g, v, a);
  if (a) {
    check_shape(kOp, "lora_A", o.a, {o.args.r, k});
    o.args.dropout = dropout_of(kOp, p, seed);
  }
#ifdef PEFTOPS_CUDA
  if (backward_by_library(kOp, o.args, o.g, o.dx, o.a, 1, o.args.dropout, PEFTOPS_PICK(nf4_dequantize))) return o.dx;
#endif
  run(PEFTOPS_PICK(nf4_linear_backward), o.args, o.work());
  return o.dx;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("nf4_linear", TORCH_BOX(&linear));
  m.impl("nf4_linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace peftops::ops
