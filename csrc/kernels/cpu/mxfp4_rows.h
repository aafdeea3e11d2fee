// An MXFP4 weight as P (product.h), as it lies: a row is a step and its columns are lanes, so that codes are decoded
// without a transposition. See packed_product.h for the view.
#pragma once
#include "kernels/cpu/mxfp4_decode.h"
#include "kernels/cpu/products.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

template <int V> struct Mxfp4Rows {
  const Mxfp4Weight& w;

#if defined(PEFTOPS_INT16)
  bool fits_int16() const { return w.rows % 32 == 0; }
  AsInt16<Mxfp4Rows> int16() const { return {*this, AsInt16<Mxfp4Rows>::segment_of(w.rows)}; }
#endif
#if defined(PEFTOPS_BF16)
  bool fits_bf16() const { return w.rows % 8 == 0; }
  AsBf16<V, Mxfp4Rows> bf16() const { return {*this}; }
#endif

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t cols = at_most(V * kLanes, w.cols - col);
    for (int64_t k = 0; k < steps; ++k) decode_run(w, (t + k) * w.cols + col, cols, out + k * V * kLanes);
  }
};

template <class F> void with_rows(const Mxfp4Weight& w, const F& f) { f(Mxfp4Rows<2>{w}); }

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
