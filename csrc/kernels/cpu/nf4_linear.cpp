// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// Five ways to the same product, by the number of rows, the dtype and what the caller allows:
//   up to 4 rows                      dot products straight from the codes (nf4_dot.h)
//   int8 allowed, AVX-512             codes and x rounded to int8 (product_int8.h)
//                                     in the short segments that blocks of 64 leave
//   bf16 x, AVX512-BF16               panels decoded to bf16 (product_bf16.h)
//   16-bit x, AVX-512                 panels decoded to int16 (product_int16.h)
//   otherwise, or rows with odd ends  panels decoded to fp32 (product.h)
#include "kernels/nf4_linear.h"
#include "kernels/cpu/linear_output.h"
#include "kernels/cpu/nf4_columns.h"
#include "kernels/cpu/nf4_dot.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

template <class T>
void multiply(const Nf4Linear& a, const Block& b, const Scratch& s, [[maybe_unused]] bool narrow = true) {
  const Nf4Weight& w = a.weight;
  const T* x = static_cast<const T*>(a.x);
  if (a.r)
    with_type(a.b_dtype, [&](auto t) {
      using B = typename decltype(t)::type;
      const Columns<2, B> right{static_cast<const B*>(a.b), w.rows, a.r, a.scaling};
      accumulate<2>(b, a.r, Rows<float>{a.u, a.r}, right, s);
    });
  if (!is_regular(w)) return accumulate<2>(b, w.cols, Rows<T>{x, w.cols}, RaggedColumns<2>{w}, s);
  if (a.m <= kDotRows) return accumulate_dot(b, w, x, s);
  const Nf4Columns<2> columns{w};
#if defined(__AVX512F__)
  const auto exactly = [&](const Block& row, const Scratch& at) { multiply<T>(a, row, at, false); };
  if (a.int8 && narrow) return accumulate_int8(b, w.cols, columns.segment, x, columns, s, exactly);
#endif
#if defined(__AVX512BF16__)
  if constexpr (is_bf16<T>) return accumulate_bf16(b, w.cols, x, w.cols, columns, s);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    if (narrow) return accumulate16(b, w.cols, columns.segment, x, w.cols, columns, s, exactly);
#endif
  accumulate<2>(b, w.cols, Rows<T>{x, w.cols}, columns, s);
}

}  // namespace

int64_t nf4_linear(const Nf4Linear& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.y, a.m, a.weight.rows, a.dtype, a.bias, a.bias_dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    multiply<T>(a, b, s);
  });
}

}  // namespace peftops::cpu::PEFTOPS_ISA
