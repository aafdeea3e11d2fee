// Compiled once for each of the builds of cpu/kernel.h.
//
// Three thin products, all by product.h. Each reads its activations once; the factor is small enough to
// be packed again for every block of rows. Limit: reading x (shrink, gradient), reading and writing y.
#include "kernels/lora_linear.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// A factor as P, whichever way it lies: f(right) with right's columns along the rank, or along k.
template <int V, class F> void with_rank_columns(const LoraShrink& a, const F& f) {
  with_type(a.f_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const T* p = static_cast<const T*>(a.f);
    if (a.by_rank) f(Columns<V, T>{p, a.r, a.k, a.scale});
    else f(Matrix<V, T>{p, a.r, a.r, a.scale});
  });
}
template <class F> void with_k_columns(const LoraExpand& a, const F& f) {
  with_type(a.f_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const T* p = static_cast<const T*>(a.f);
    if (a.by_rank) f(Matrix<2, T>{p, a.k, a.k, a.scale});
    else f(Columns<2, T>{p, a.k, a.r, a.scale});
  });
}

// A row-major [depth, rows] matrix as A: its columns are the rows.
struct Transposed {
  const float* p;
  int64_t ld;

  void pack(int64_t row, int64_t rows, int64_t t, int64_t steps, float* out) const {
    for (int64_t k = 0; k < steps; ++k)
      for (int64_t i = 0; i < rows; ++i) out[i * kLeftStride + k] = p[(t + k) * ld + row + i];
  }
};

// Ranks up to one vector wide take panels of one, so that r = 8 or 16 wastes nothing.
template <int V> int64_t shrink(const LoraShrink& a, int64_t begin, int64_t end, void* scratch) {
  const Units<V> units(a.m, a.r, kRowBlock / 4);   // few columns: cut finer by rows
  const Scratch s(scratch);
  with_type(a.x_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Rows<T> x{static_cast<const T*>(a.x), a.k};
    with_rank_columns<V>(a, [&](const auto& f) {
      units.each(begin, end, s, [&](const Block& b) {
        if (a.dropout.p > 0) accumulate<V>(b, a.k, DroppedRows<Rows<T>>{x, DropoutMask(a.dropout)}, f, s);
        else accumulate<V>(b, a.k, x, f, s);
        write<V>(b, s, a.r, [&](int64_t i, int64_t j, int64_t n, Vec sum) { store_upto(a.u + i * a.r + j, n, sum); });
      });
    });
  });
  return units.count();
}

}  // namespace

int64_t lora_shrink(const LoraShrink& a, int64_t begin, int64_t end, void* scratch) {
  return a.r <= kLanes ? shrink<1>(a, begin, end, scratch) : shrink<2>(a, begin, end, scratch);
}

int64_t lora_expand(const LoraExpand& a, int64_t begin, int64_t end, void* scratch) {
  const Units<2> units(a.m, a.k);
  const Scratch s(scratch);
  with_type(a.y_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    with_k_columns(a, [&](const auto& f) {
      units.each(begin, end, s, [&](const Block& b) {
        accumulate<2>(b, a.r, Rows<float>{a.u, a.r}, f, s);
        if (a.dropout.p > 0) drop(DropoutMask(a.dropout), b, a.k, s);
        write<2>(b, s, a.k, [&](int64_t i, int64_t j, int64_t n, Vec sum) {
          T* y = static_cast<T*>(a.y) + i * a.k + j;
          store_upto(y, n, load_upto(y, n) + sum);
        });
      });
    });
  });
  return units.count();
}

int64_t lora_gradient(const LoraGradient& a, int64_t begin, int64_t end, void* scratch) {
  const Units<2> units(a.r, a.k);
  const Scratch s(scratch);
  with_type(a.x_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Transposed u{a.u, a.r};
    const Matrix<2, T> x{static_cast<const T*>(a.x), a.k, a.k, a.scale};
    with_type(a.d_dtype, [&](auto v) {
      using D = typename decltype(v)::type;
      D* d = static_cast<D*>(a.d);
      units.each(begin, end, s, [&](const Block& b) {
        if (a.dropout.p > 0) accumulate<2>(b, a.m, u, DroppedMatrix<2, T>{x, DropoutMask(a.dropout)}, s);
        else accumulate<2>(b, a.m, u, x, s);
        write<2>(b, s, a.k, [&](int64_t i, int64_t j, int64_t n, Vec sum) {
          if (a.by_rank) return store_upto(d + i * a.k + j, n, sum);
          D column[kLanes];
          store(column, sum);
          for (int64_t l = 0; l < n; ++l) d[(j + l) * a.r + i] = column[l];
        });
      });
    });
  });
  return units.count();
}

}  // namespace peftops::cpu::PEFTOPS_ISA
