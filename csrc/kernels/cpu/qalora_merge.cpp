// Compiled once for each of the builds of cpu/kernel.h.
// Limit: reading scales and zeros, and writing zeros; at a rank of 16 the arithmetic takes about the same time.
#include "kernels/qalora_merge.h"
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {

int64_t qalora_merge(const QaloraMerge& a, int64_t begin, int64_t end, void* scratch) {
  const Units<2> units(a.n, a.groups);
  const Scratch s(scratch);
  with_type(a.a_dtype, [&](auto t) {
    with_type(a.b_dtype, [&](auto u) {
      using A = typename decltype(t)::type;
      using B = typename decltype(u)::type;
      const Matrix<2, A> right{static_cast<const A*>(a.a), a.groups, a.groups, a.factor};
      units.each(begin, end, s, [&](const Block& b) {
        accumulate<2>(b, a.r, Rows<B>{static_cast<const B*>(a.b), a.r}, right, s);
        write<2>(b, s, a.groups, [&](int64_t i, int64_t j, int64_t n, Vec delta) {
          const int64_t at = i * a.groups + j;
          const Vec scale = load_upto(a.scales + at, n), zero_point = load_upto(a.zeros + at, n);
          store_upto(a.out + at, n, zero_point - delta / scale);
        });
      });
    });
  });
  return units.count();
}

}  // namespace peftops::cpu::PEFTOPS_ISA
