// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// Four ways to the same product, by the number of rows and the dtype:
//   up to 4 rows             dot products straight from the codes (group_dot.h), in fp32
//   bf16 x, AVX512-BF16      panels decoded to bf16 (product_bf16.h)
//   16-bit x, AVX-512        panels decoded to int16 (product_int16.h)
//   otherwise                panels decoded to fp32 (product.h)
#include "kernels/group_linear.h"
#include "kernels/cpu/group_dot.h"
#if defined(__AVX512F__)
#include "kernels/cpu/product_int16.h"
#endif
#if defined(__AVX512BF16__)
#include "kernels/cpu/product_bf16.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// Rows of the weight as columns of P, decoded: units of kLanes rows are transposed, so that a shift and a
// conversion leave one column of the weight, one row a lane.
template <int V, int B> struct GroupColumns {
  const GroupWeight& w;
  Unit<B> unit;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t groups = w.cols / w.group;
    for (int v = 0; v < V; ++v, col += kLanes) {
      // Lanes past the last row take the last row again.
      const int64_t first = at_most(col, w.rows - 1), more = w.rows - 1 - first;
      int32_t offset[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) offset[i] = int32_t(at_most(i, more) * groups);
      const Int lane_groups = load_int(offset);
      Vec scale = zero(), zero_point = zero();
      for (int64_t k = 0; k < steps; k += Unit<B>::kStrip) {
        const int64_t units = at_most(kLanes, (steps - k) / Unit<B>::kCodes);
        Int q[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const uint8_t* p = w.packed + ((first + at_most(i, more)) * w.cols + t + k) / 8 * B;
          __builtin_prefetch(p + kDepth / 8 * B);   // where the next panel begins
          q[i] = Unit<B>::load(p, units);
        }
        transpose(q);
        for (int64_t d = 0; d < units; ++d) {
          const int64_t step = k + d * Unit<B>::kCodes;
          if (step == 0 || (t + step) % w.group == 0) {
            const int64_t group = first * groups + (t + step) / w.group;
            scale = gather(w.scales + group, lane_groups), zero_point = gather(w.zeros + group, lane_groups);
          }
#pragma GCC unroll 8
          for (int i = 0; i < Unit<B>::kCodes; ++i)
            store(out + ((step + i) * V + v) * kLanes, (unit.code(q[d], i) - zero_point) * scale);
        }
      }
    }
  }
};

template <class T, int B>
void multiply(const GroupLinear& a, const Block& b, const Scratch& s, [[maybe_unused]] bool int16 = true) {
  const GroupWeight& w = a.weight;
  const T* x = static_cast<const T*>(a.x);
  if (a.r)
    with_type(a.b_dtype, [&](auto t) {
      using F = typename decltype(t)::type;
      const Columns<2, F> right{static_cast<const F*>(a.b), w.rows, a.r, a.scaling};
      accumulate<2>(b, a.r, Rows<float>{a.u, a.r}, right, s);
    });
  const GroupColumns<2, B> columns{w, {}};
  const bool few = a.m <= kDotRows;
  if (few && is_moderate(x, a.m * w.cols)) return accumulate_dot<B>(b, w, x, s);
#if defined(__AVX512BF16__)
  if constexpr (is_bf16<T>)
    if (!few) return accumulate_bf16(b, w.cols, x, w.cols, AsBf16<2, GroupColumns<2, B>>{columns}, s);
#endif
#if defined(__AVX512F__)
  using Narrow = AsInt16<GroupColumns<2, B>>;
  if constexpr (sizeof(T) == 2)
    if (int16 && !few && w.cols % 32 == 0) {
      const Narrow narrow{columns, Narrow::segment_of(w.cols)};
      return accumulate16(b, w.cols, narrow.segment, x, w.cols, narrow, s,
                          [&](const Block& row, const Scratch& at) { multiply<T, B>(a, row, at, false); });
    }
#endif
  accumulate<2>(b, w.cols, Rows<T>{x, w.cols}, columns, s);
}

}  // namespace

int64_t group_linear(const GroupLinear& a, int64_t begin, int64_t end, void* scratch) {
  const Units<2> units(a.m, a.weight.rows);
  const Scratch s(scratch);
  with_type(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    T* y = static_cast<T*>(a.y);
    const int64_t n = a.weight.rows;
    units.each(begin, end, s, [&](const Block& b) {
      with_bits(a.weight.bits, [&](auto bits) { multiply<T, decltype(bits)::value>(a, b, s); });
      if (!a.bias)
        return write<2>(b, s, n, [&](int64_t i, int64_t j, int64_t m, Vec sum) { store_upto(y + i * n + j, m, sum); });
      with_type(a.bias_dtype, [&](auto u) {
        const auto* bias = static_cast<const typename decltype(u)::type*>(a.bias);
        write<2>(b, s, n, [&](int64_t i, int64_t j, int64_t m, Vec sum) {
          store_upto(y + i * n + j, m, sum + load_upto(bias + j, m));
        });
      });
    });
  });
  return units.count();
}

}  // namespace peftops::cpu::PEFTOPS_ISA
