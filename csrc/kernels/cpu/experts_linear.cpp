// Compiled once for each of the builds of cpu/kernel.h.
//
// Each expert is a layer: that layer's kernel runs on the expert's part of all arrays. This file divides the work of
// all experts among threads. Experts have different numbers of rows, and so the units of their layers take different
// times. So work is measured in rows that pass over a panel, and a range of work contains the units that begin in it.
#include "kernels/experts_linear.h"
#include "kernels/cpu/packed_product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kPanelCost = 4;   // rows that take as long as decoding a panel

// Element i of an array whose type is known at run time; of no array, none.
inline const void* element(const void* p, DType dtype, int64_t i) {
  return p ? static_cast<const char*>(p) + i * (dtype == DType::f32 ? 4 : 2) : nullptr;
}
inline void* element(void* p, DType dtype, int64_t i) {
  return const_cast<void*>(element(static_cast<const void*>(p), dtype, i));
}

inline Nf4Weight weight_of(Nf4Weight w, int64_t expert, DType) {
  w.first += expert * w.rows * w.cols;
  return w;
}
inline GroupWeight weight_of(GroupWeight w, int64_t expert, DType) {
  const int64_t row = expert * w.rows, group = row * (w.cols / w.group);
  w.packed += row * (w.cols / 8 * w.bits), w.scales += group, w.zeros += group;
  return w;
}
inline Mxfp4Weight weight_of(Mxfp4Weight w, int64_t expert, DType) {
  const int64_t first = expert * w.rows * w.cols;
  w.packed += first / 2, w.scales += first / kMxBlock;
  return w;
}
inline DenseWeight weight_of(DenseWeight w, int64_t expert, DType dtype) {
  w.p = element(w.p, dtype, expert * w.rows * w.cols);
  return w;
}

// The layer of one expert for `rows` rows from `row` on, and the largest number of rows of its units.
template <class Weight> Linear<Weight> part_of(Linear<Weight> a, int64_t expert, int64_t row, int64_t rows) {
  const int64_t n = a.weight.rows;
  a.weight = weight_of(a.weight, expert, a.dtype);
  a.x = element(a.x, a.dtype, row * a.weight.cols), a.y = element(a.y, a.dtype, row * n);
  a.bias = element(a.bias, a.bias_dtype, expert * n), a.b = element(a.b, a.b_dtype, expert * n * a.r);
  a.u += row * a.r, a.m = rows;
  return a;
}
template <class Backward, class = decltype(Backward::dx)>
Backward part_of(Backward a, int64_t expert, int64_t row, int64_t rows) {
  const int64_t n = a.weight.rows, k = a.weight.cols;
  a.weight = weight_of(a.weight, expert, a.dtype);
  a.g = element(a.g, a.dtype, row * n), a.dx = element(a.dx, a.dtype, row * k);
  a.a = element(a.a, a.a_dtype, expert * a.r * k);
  a.v += row * a.r, a.m = rows;
  return a;
}
inline LoraShrink part_of(LoraShrink a, int64_t expert, int64_t row, int64_t rows) {
  a.x = element(a.x, a.x_dtype, row * a.k), a.f = element(a.f, a.f_dtype, expert * a.r * a.k);
  a.u += row * a.r, a.m = rows;
  return a;
}
inline LoraGradient part_of(LoraGradient a, int64_t expert, int64_t row, int64_t rows) {
  a.x = element(a.x, a.x_dtype, row * a.k), a.d = element(a.d, a.d_dtype, expert * a.r * a.k);
  a.u += row * a.r, a.m = rows;
  return a;
}

// `most`: the rows that a unit of the layer's kernel has at most, nearly. More rows are cut into equal parts.
template <class Args>
int64_t each_expert(const Experts<Args>& a, Kernel<Args>& layer, int64_t begin, int64_t end, void* scratch,
                    int64_t most = kRowBlock) {
  int64_t cost = 0, row = 0;
  for (int64_t e = 0; e < a.experts; row = a.offsets[e++]) {
    const int64_t rows = a.offsets[e] - row;
    const Args part = part_of(a.all, e, row, rows);
    const int64_t units = layer(part, 0, 0, nullptr);
    const int64_t each = (rows ? ceil_div(rows, ceil_div(rows, most)) : 0) + kPanelCost;
    const auto unit_at = [&](int64_t place) {   // the first that begins there or later
      return place <= cost ? 0 : at_most(units, ceil_div(place - cost, each));
    };
    const int64_t first = unit_at(begin), last = unit_at(end);
    if (first < last) layer(part, first, last, scratch);
    cost += units * each;
  }
  return cost;
}

int64_t dense_linear(const DenseLinear& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.y, a.m, a.weight.rows, a.dtype, a.bias, a.bias_dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    const int64_t n = a.weight.rows, k = a.weight.cols;
    add_low_rank(a, b, s);
    const Rows<T> x{static_cast<const T*>(a.x), k};
    const T* w = static_cast<const T*>(a.weight.p);
    if (a.weight.transposed) accumulate<2>(b, k, x, Matrix<2, T>{w, n, n, 1.f}, s);
    else accumulate<2>(b, k, x, Columns<2, T>{w, n, k, 1.f}, s);
  });
}

int64_t dense_linear_backward(const DenseLinearBackward& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.dx, a.m, a.weight.cols, a.dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    const int64_t n = a.weight.rows, k = a.weight.cols;
    if (a.r)
      with_type(a.a_dtype, [&](auto of_a) {
        using A = typename decltype(of_a)::type;
        accumulate<2>(b, a.r, Rows<float>{a.v, a.r}, Matrix<2, A>{static_cast<const A*>(a.a), k, k, 1.f}, s);
      });
    const Rows<T> g{static_cast<const T*>(a.g), n};
    const T* w = static_cast<const T*>(a.weight.p);
    if (a.weight.transposed) accumulate<2>(b, n, g, Columns<2, T>{w, k, n, 1.f}, s);
    else accumulate<2>(b, n, g, Matrix<2, T>{w, k, k, 1.f}, s);
  });
}

}  // namespace

int64_t experts_nf4(const ExpertsNf4& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, nf4_linear, begin, end, scratch);
}
int64_t experts_nf4_backward(const ExpertsNf4Backward& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, nf4_linear_backward, begin, end, scratch);
}
int64_t experts_group(const ExpertsGroup& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, group_linear, begin, end, scratch);
}
int64_t experts_group_backward(const ExpertsGroupBackward& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, group_linear_backward, begin, end, scratch);
}
int64_t experts_mxfp4(const ExpertsMxfp4& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, mxfp4_linear, begin, end, scratch);
}
int64_t experts_mxfp4_backward(const ExpertsMxfp4Backward& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, mxfp4_linear_backward, begin, end, scratch);
}
int64_t experts_dense(const ExpertsDense& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, dense_linear, begin, end, scratch);
}
int64_t experts_dense_backward(const ExpertsDenseBackward& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, dense_linear_backward, begin, end, scratch);
}
int64_t experts_shrink(const ExpertsShrink& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, lora_shrink, begin, end, scratch, kRowBlock / 4);
}
int64_t experts_gradient(const ExpertsGradient& a, int64_t begin, int64_t end, void* scratch) {
  return each_expert(a, lora_gradient, begin, end, scratch, a.all.m);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
