// Compiled once for each of the builds of cpu/kernel.h.
#include "kernels/group_linear.h"
#include "kernels/cpu/group_rows.h"
#include "kernels/cpu/packed_product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// A matrix as P, as it lies, with each of its columns `times` over.
template <int V, class T> struct RepeatedColumns {
  const T* p;
  int64_t cols, times;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t first = col / times, n = at_most((col + V * kLanes - 1) / times + 1, cols) - first;
    for (int64_t k = 0; k < steps; ++k, out += V * kLanes) {
      float once[V * kLanes] = {};
      each_vector(n, [&](int64_t i, int64_t m) { store(once + i, load_upto(p + (t + k) * cols + first + i, m)); });
      for (int64_t j = 0; j < V * kLanes; ++j) out[j] = once[(col + j) / times - first];
    }
  }
};

// v A'
void add_term(const GroupLinearBackward& a, const Block& b, const Scratch& s) {
  with_type(a.a_dtype, [&](auto t) {
    using A = typename decltype(t)::type;
    const RepeatedColumns<2, A> right{static_cast<const A*>(a.a), a.weight.cols / a.pool, a.pool};
    accumulate<2>(b, a.r, Rows<float>{a.v, a.r}, right, s);
  });
}

}  // namespace

int64_t group_linear_backward(const GroupLinearBackward& a, int64_t begin, int64_t end, void* scratch) {
  return packed_linear_backward(a, begin, end, scratch, add_term);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
