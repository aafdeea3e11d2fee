// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// Five ways to the same product, by the number of rows, the dtype and what the caller allows:
//   up to 4 rows             dot products straight from the codes (group_dot.h), in fp32
//   int8 allowed, AVX-512    codes as they are, x rounded to int8 (group_int8.h), unless groups are short
//   bf16 x, AVX512-BF16      panels decoded to bf16 (product_bf16.h)
//   16-bit x, AVX-512        panels decoded to int16 (product_int16.h)
//   otherwise                panels decoded to fp32 (product.h)
#include "kernels/group_linear.h"
#include "kernels/cpu/group_columns.h"
#include "kernels/cpu/group_dot.h"
#include "kernels/cpu/linear_output.h"
#if defined(__AVX512F__)
#include "kernels/cpu/group_int8.h"
#include "kernels/cpu/product_int16.h"
#endif
#if defined(__AVX512BF16__)
#include "kernels/cpu/product_bf16.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

template <class T, int B>
void multiply(const GroupLinear& a, const Block& b, const Scratch& s, [[maybe_unused]] bool narrow = true) {
  const GroupWeight& w = a.weight;
  const T* x = static_cast<const T*>(a.x);
  if (a.r)
    with_type(a.b_dtype, [&](auto t) {
      using F = typename decltype(t)::type;
      const Columns<2, F> right{static_cast<const F*>(a.b), w.rows, a.r, a.scaling};
      accumulate<2>(b, a.r, Rows<float>{a.u, a.r}, right, s);
    });
  const GroupColumns<2, B> columns{w, {}};
  if (a.m <= kDotRows) {   // a row goes its own way, whatever its neighbours hold
    const auto moderate = [&](int64_t i) { return is_moderate(x + (b.row + i) * w.cols, w.cols); };
    for (int64_t first = 0, end; first < b.rows; first = end) {
      const bool by_dots = moderate(first);
      for (end = first + 1; end < b.rows && moderate(end) == by_dots;) ++end;
      Scratch at = s;
      at.c += first * Scratch::kCols;
      const Block rows{b.row + first, end - first, b.col, b.panels};
      if (by_dots) accumulate_dot<B>(rows, b.rows, w, x, at);
      else accumulate<2>(rows, w.cols, Rows<T>{x, w.cols}, columns, at);
    }
    return;
  }
#if defined(__AVX512F__)
  const auto exactly = [&](const Block& row, const Scratch& at) { multiply<T, B>(a, row, at, false); };
  if (a.int8 && narrow && w.group >= kLeastInt8Segment) {
    const GroupInt8<B> codes{w};
    return accumulate_int8(b, w.cols, codes.segment, x, codes, s, exactly);
  }
#endif
#if defined(__AVX512BF16__)
  if constexpr (is_bf16<T>)
    return accumulate_bf16(b, w.cols, x, w.cols, AsBf16<2, GroupColumns<2, B>>{columns}, s);
#endif
#if defined(__AVX512F__)
  using Narrow = AsInt16<GroupColumns<2, B>>;
  if constexpr (sizeof(T) == 2)
    if (narrow && w.cols % 32 == 0) {
      const Narrow right{columns, Narrow::segment_of(w.cols)};
      return accumulate16(b, w.cols, right.segment, x, w.cols, right, s, exactly);
    }
#endif
  accumulate<2>(b, w.cols, Rows<T>{x, w.cols}, columns, s);
}

}  // namespace

int64_t group_linear(const GroupLinear& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.y, a.m, a.weight.rows, a.dtype, a.bias, a.bias_dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    with_bits(a.weight.bits, [&](auto bits) { multiply<T, decltype(bits)::value>(a, b, s); });
  });
}

}  // namespace peftops::cpu::PEFTOPS_ISA
