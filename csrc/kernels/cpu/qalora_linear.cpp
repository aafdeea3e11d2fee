// Compiled once for each of the builds of cpu/kernel.h.
// Limit: reading x. The pooled x is still in cache when it is multiplied with A.
#include "kernels/qalora_linear.h"
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kRowsPerUnit = 32;   // rows of x, all their columns: enough units for every thread

// The sums of n <= kLanes groups that lie one after the other.
template <class T> Vec pool(const T* x, int64_t group, int64_t n) {
  Int sums[kLanes] = {};
  for (int64_t i = 0; i < n; ++i, x += group) {
    Vec sum = load_upto(x, at_most(kLanes, group));
    for (int64_t j = kLanes; j < group; j += kLanes) sum = sum + load(x + j);
    sums[i] = as_int(sum);
  }
  transpose(sums);   // so that a lane is a group
  Vec total = as_float(sums[0]);
  for (int i = 1; i < kLanes; ++i) total = total + as_float(sums[i]);
  return total;
}

template <int V> void shrink(const QaloraShrink& a, int64_t row, int64_t rows, const Scratch& s) {
  const int64_t groups = a.k / a.group;
  with_type(a.x_dtype, [&](auto t) {
    const auto* x = static_cast<const typename decltype(t)::type*>(a.x);
    for (int64_t i = row; i < row + rows; ++i)
      each_vector(groups, [&](int64_t g, int64_t n) {
        store_upto(a.p + i * groups + g, n, pool(x + i * a.k + g * a.group, a.group, n));
      });
  });
  with_type(a.a_dtype, [&](auto t) {
    using A = typename decltype(t)::type;
    const Columns<V, A> right{static_cast<const A*>(a.a), a.r, groups, 1.f};
    const int64_t panels = ceil_div(a.r, V * kLanes);
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
      const Block b{row, rows, panel * V * kLanes, at_most(kPanels, panels - panel)};
      memset(s.c, 0, rows * Scratch::kCols * sizeof(float));
      accumulate<V>(b, groups, Rows<float>{a.p, groups}, right, s);
      write<V>(b, s, a.r, [&](int64_t i, int64_t j, int64_t n, Vec sum) { store_upto(a.u + i * a.r + j, n, sum); });
    }
  });
}

}  // namespace

int64_t qalora_shrink(const QaloraShrink& a, int64_t begin, int64_t end, void* scratch) {
  for (int64_t row = begin * kRowsPerUnit; row < at_most(end * kRowsPerUnit, a.m); row += kRowsPerUnit) {
    const int64_t rows = at_most(kRowsPerUnit, a.m - row);
    // Ranks up to one vector wide take panels of one, so that r = 8 or 16 wastes nothing.
    a.r <= kLanes ? shrink<1>(a, row, rows, Scratch(scratch)) : shrink<2>(a, row, rows, Scratch(scratch));
  }
  return ceil_div(a.m, kRowsPerUnit);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
