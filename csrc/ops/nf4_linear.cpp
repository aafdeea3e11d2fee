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
// Whether to use the kernel for an H100, which no GPU has run yet: PEFTOPS_NF4_WGMMA=on asks for it, and x and W have a
// supported shape and dtype.
bool linear_by_wgmma(const char* op, const Nf4Linear& args) {
  const char* text = std::getenv("PEFTOPS_NF4_WGMMA");
  const std::string way = text ? text : "off";
  PEFTOPS_CHECK(way == "off" || way == "on", op, ": PEFTOPS_NF4_WGMMA must be on or off, not ", way);
  if (way == "off") return false;
#ifdef PEFTOPS_SM90
  bool takes = false;
  const cudaError_t status = cuda::takes_wgmma(args, &takes);
  PEFTOPS_CHECK(status == cudaSuccess, op, ": PEFTOPS_NF4_WGMMA=on needs an H100 or H200: ",
                cudaGetErrorString(status));
  if (takes) run(PEFTOPS_PICK(nf4_linear_sm90), args, 0);
  return takes;
#else
  PEFTOPS_CHECK(false, op, ": PEFTOPS_NF4_WGMMA=on needs a build for compute capability 9.0");
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
  if (linear_by_wgmma(kOp, o.args)) return o.y;
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
