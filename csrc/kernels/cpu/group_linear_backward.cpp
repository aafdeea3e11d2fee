// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// dx = g W + v A'. The contraction runs along the rows of W, so a row is a step and its columns are lanes:
// codes are decoded in the order in which they lie, without a transposition.
#include "kernels/group_linear.h"
#include "kernels/cpu/group_decode.h"
#include "kernels/cpu/linear_output.h"
#if defined(__AVX512F__)
#include "kernels/cpu/product_int16.h"
#endif
#if defined(__AVX512BF16__)
#include "kernels/cpu/product_bf16.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The weight as P, as it lies.
template <int V, int B> struct GroupRows {
  const GroupWeight& w;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t cols = at_most(V * kLanes, w.cols - col);
    for (int64_t k = 0; k < steps; ++k) decode_row<B>(w, t + k, col, cols, out + k * V * kLanes);
  }
};

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

template <class T, int B>
void multiply(const GroupLinearBackward& a, const Block& b, const Scratch& s, [[maybe_unused]] bool int16 = true) {
  const GroupWeight& w = a.weight;
  const T* g = static_cast<const T*>(a.g);
  if (a.r)
    with_type(a.a_dtype, [&](auto t) {
      using A = typename decltype(t)::type;
      const RepeatedColumns<2, A> right{static_cast<const A*>(a.a), w.cols / a.pool, a.pool};
      accumulate<2>(b, a.r, Rows<float>{a.v, a.r}, right, s);
    });
  const GroupRows<2, B> rows{w};
#if defined(__AVX512BF16__)
  if constexpr (is_bf16<T>)
    if (w.rows % 8 == 0) return accumulate_bf16(b, w.rows, g, w.rows, AsBf16<2, GroupRows<2, B>>{rows}, s);
#endif
#if defined(__AVX512F__)
  using Narrow = AsInt16<GroupRows<2, B>>;
  if constexpr (sizeof(T) == 2)
    if (int16 && w.rows % 32 == 0) {
      const Narrow narrow{rows, Narrow::segment_of(w.rows)};
      return accumulate16(b, w.rows, narrow.segment, g, w.rows, narrow, s,
                          [&](const Block& row, const Scratch& at) { multiply<T, B>(a, row, at, false); });
    }
#endif
  accumulate<2>(b, w.rows, Rows<T>{g, w.rows}, rows, s);
}

}  // namespace

int64_t group_linear_backward(const GroupLinearBackward& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.dx, a.m, a.weight.cols, a.dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    with_bits(a.weight.bits, [&](auto bits) { multiply<T, decltype(bits)::value>(a, b, s); });
  });
}

}  // namespace peftops::cpu::PEFTOPS_ISA
