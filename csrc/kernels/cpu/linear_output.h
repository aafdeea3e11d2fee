// The work of every linear layer around its product: the result is cut into units, a product leaves a block of
// it in C, and the block is stored, with the bias where there is one.
#pragma once
#include "kernels/cpu/product.h"
#include "kernels/dtype.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

struct LinearOutput {
  void* y;                   // [rows, cols] of dtype
  int64_t rows, cols;
  DType dtype;
  const void* bias = nullptr;   // [cols] of bias_dtype, or null
  DType bias_dtype = DType::f32;

  // multiply(type, block, scratch) adds the product to C; `type` names the dtype of y. Returns the number of units.
  template <class F> int64_t each(int64_t begin, int64_t end, void* scratch, const F& multiply) const {
    const Units<2> units(rows, cols);
    const Scratch s(scratch);
    with_type(dtype, [&](auto t) {
      units.each(begin, end, s, [&](const Block& b) {
        multiply(t, b, s);
        put(static_cast<typename decltype(t)::type*>(y), b, s);
      });
    });
    return units.count();
  }

 private:
  template <class T> void put(T* out, const Block& b, const Scratch& s) const {
    if (!bias)
      return write<2>(b, s, cols, [&](int64_t i, int64_t j, int64_t n, Vec sum) { store_upto(out + i * cols + j, n, sum); });
    with_type(bias_dtype, [&](auto t) {
      const auto* add = static_cast<const typename decltype(t)::type*>(bias);
      write<2>(b, s, cols, [&](int64_t i, int64_t j, int64_t n, Vec sum) {
        store_upto(out + i * cols + j, n, sum + load_upto(add + j, n));
      });
    });
  }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
