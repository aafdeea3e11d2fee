// The only ladder of products with a packed weight, for all formats. It chooses the product by the instructions of this
// build, the type of x and the properties of the weight. The first line that applies is taken:
//
//   int8 allowed, x86, kInt8Rows rows at most   dot products of bytes straight from the codes (dot_int8.h)
//   a few rows, forward               dot products straight from the codes (dot.h), in fp32, bf16 or int16
//   int8 allowed, AVX-512, ARMv8.6    codes and x rounded to int8 (product_int8.h)
//   bf16 x, AVX512-BF16, kBf16CodeRows rows at most, forward   panels of codes in bf16 (product_bf16.h)
//   bf16 x, AVX512-BF16, ARMv8.6      panels decoded to bf16 (product_bf16.h)
//   16-bit x, AVX-512                 panels decoded to int16 (product_int16.h)
//   otherwise                         panels decoded to fp32 (product.h)
//
// A format brings two views of a weight as P (product.h): its columns, which are the rows of W, forwards
// (code_columns.h, group_columns.h), and its rows backwards. Every view packs fp32, and tells which other products it
// supports:
//
//   pack(col, t, steps, out)
//   fits_bf16()   bf16()    packs for accumulate_bf16
//   fits_int16()  int16()   packs for accumulate16, in its `segment`
//   fits_int8()   int8()    packs for accumulate_int8, in its `segment`; columns only
//   fits_bf16_codes()   bf16_codes()   the same without decoding, if it is kHasCodes; columns only
//   fits_dot()    dot(block, x, scratch); columns only
//   fits_dot8()   dot8(block, x, scratch, redo), in int8; columns only
#pragma once
#include "kernels/cpu/dot.h"
#if defined(PEFTOPS_DOT8)
#include "kernels/cpu/dot_int8.h"
#endif
#include "kernels/cpu/linear_output.h"
#include "kernels/cpu/products.h"
#include "kernels/linear.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// Leaves term + x P in a block of C, over `depth` steps: term(block, scratch) adds the low-rank product, and once more
// for rows that are done over because int16 could not hold them.
template <class T, class View, class Term>
void add_product(const Block& b, int64_t depth, const T* x, const View& view, const Scratch& s, const Term& term,
                 [[maybe_unused]] bool narrow = true) {
  term(b, s);
#if defined(PEFTOPS_BF16)
  if constexpr (is_bf16<T>)
    if (view.fits_bf16()) return accumulate_bf16(b, depth, x, depth, view.bf16(), s);
#endif
#if defined(PEFTOPS_INT16)
  if constexpr (sizeof(T) == 2)
    if (narrow && view.fits_int16()) {
      const auto& packs = view.int16();
      return accumulate16(b, depth, packs.segment, x, depth, packs, s, [&](const Block& rows, const Scratch& at) {
        add_product(rows, depth, x, view, at, term, false);
      });
    }
#endif
  accumulate<2>(b, depth, Rows<T>{x, depth}, view, s);
}

// The same for y = x W^T, with the products that only the columns of W support. `m` is the number of all rows, so that
// a row has the same bits in every block.
template <class T, class View, class Term>
void add_product_of_columns(const Block& b, int64_t m, int64_t depth, const T* x, const View& view,
                            [[maybe_unused]] bool int8, const Scratch& s, const Term& term) {
#if defined(PEFTOPS_INT8) || defined(PEFTOPS_DOT8)
  const auto redo = [&](const Block& rows, const Scratch& at) { add_product(rows, depth, x, view, at, term, false); };
#endif
#if defined(PEFTOPS_DOT8)
  if (int8 && m <= kInt8Rows && view.fits_dot8()) {
    term(b, s);
    return view.dot8(b, x, s, redo);
  }
#endif
  if (m <= kDotRows && view.fits_dot()) {
    term(b, s);
    return view.dot(b, x, s);
  }
#if defined(PEFTOPS_INT8)
  if (int8 && view.fits_int8()) {
    term(b, s);
    const auto& packs = view.int8();
    return accumulate_int8(b, depth, packs.segment, x, packs, s, redo);
  }
#endif
#if defined(PEFTOPS_BF16_CODES)
  if constexpr (is_bf16<T> && View::kHasCodes)
    if (m <= kBf16CodeRows && view.fits_bf16_codes()) {
      term(b, s);
      return accumulate_bf16(b, depth, x, depth, view.bf16_codes(), s);
    }
#endif
  add_product(b, depth, x, view, s, term);
}

// scaling * u B^T, the low-rank product of any linear layer.
template <class Weight> void add_low_rank(const Linear<Weight>& a, const Block& b, const Scratch& s) {
  if (!a.r) return;
  with_type(a.b_dtype, [&](auto t) {
    using B = typename decltype(t)::type;
    const Columns<2, B> right{static_cast<const B*>(a.b), a.weight.rows, a.r, a.scaling};
    accumulate<2>(b, a.r, Rows<float>{a.u, a.r}, right, s);
  });
}

// The kernel y = x W^T + bias + scaling * u B^T. with_columns(weight, f) calls f with the view.
template <class Weight>
int64_t packed_linear(const Linear<Weight>& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.y, a.m, a.weight.rows, a.dtype, a.bias, a.bias_dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    with_columns(a.weight, [&](const auto& columns) {
      add_product_of_columns(b, a.m, a.weight.cols, static_cast<const T*>(a.x), columns, a.int8, s,
                             [&](const Block& rows, const Scratch& at) { add_low_rank(a, rows, at); });
    });
  });
}

// The kernel dx = g W + term. with_rows(weight, f) calls f with the view, add_term(args, block, scratch) adds the term:
// a format's own, for its pooling or dropout.
template <class Args, class Term>
int64_t packed_linear_backward(const Args& a, int64_t begin, int64_t end, void* scratch, const Term& add_term) {
  const LinearOutput output{a.dx, a.m, a.weight.cols, a.dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    with_rows(a.weight, [&](const auto& rows) {
      add_product(b, a.weight.rows, static_cast<const T*>(a.g), rows, s, [&](const Block& part, const Scratch& at) {
        if (a.r) add_term(a, part, at);
      });
    });
  });
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
