// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// dx = g W + dropout'(v A). The contraction runs along the rows of W, so a row is a step and its columns
// are lanes: codes are decoded in the order in which they lie, without a transposition.
#include "kernels/nf4_linear.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/linear_output.h"
#include "kernels/cpu/nf4_decode.h"
#if defined(__AVX512F__)
#include "kernels/cpu/product_int16.h"
#endif
#if defined(__AVX512BF16__)
#include "kernels/cpu/product_bf16.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The weight as P, as it lies.
template <int V> struct Nf4Rows {
  const Nf4Weight& w;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const int64_t cols = at_most(V * kLanes, w.cols - col);
    for (int64_t k = 0; k < steps; ++k) decode_run(w, (t + k) * w.cols + col, cols, out + k * V * kLanes);
  }

#if defined(__AVX512F__)
  // A panel's columns share a block in every row, but the rows, over which int16 sums run, do not share
  // its absmax: codes are scaled to the largest of the segment's rows before they are rounded.
  void pack16(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale) const {
    const int64_t segment = segment_of_rows();
    const Table16 table(kNf4Code);
    for (int64_t s = 0; s < steps; s += segment, scale += 2 * kLanes) {
      float absmax[kDepth];
      Int most = as_int(zero());
      for (int64_t i = 0; i < segment; ++i) {
        absmax[i] = absmax_of(w, ((t + s + i) * w.cols + col) / w.block_size);
        most = max_int(most, as_int(abs(set(absmax[i]))));   // as integers, so that a NaN is the largest
      }
      const float largest = _mm512_cvtss_f32(as_float(most)), factor = largest > 0 ? kCodeFactor / largest : 0.f;
      store(scale, set(largest / kCodeFactor));
      store(scale + kLanes, set(largest / kCodeFactor));
      const auto whole = [&](int64_t i, int64_t v) {
        const uint8_t* p = w.packed + ((t + s + i) * w.cols + col + v * kLanes) / 2;
        return _mm512_cvtps_epi32(table(unpack_codes(p)) * set(absmax[i] * factor));
      };
      for (int64_t i = 0; i < segment; i += 8)
        for (int64_t j = 0; j < 4; ++j, out += 2 * kLanes)
          for (int64_t v = 0; v < 2; ++v)
            store_int(out + v * kLanes, _mm512_mask_blend_epi16(0xaaaaaaaa, whole(i + j, v),
                                                                shift_left(whole(i + j + 4, v), 16)));
    }
  }
  int64_t segment_of_rows() const { return w.rows % 64 ? 32 : 64; }
  bool fits_int16() const { return is_regular(w) && w.rows % 32 == 0; }
#endif

#if defined(__AVX512BF16__)
  void pack_bf16(int64_t col, int64_t t, int64_t steps, int32_t* out) const {
    const Table16 table(kNf4Code);
    const auto row = [&](int64_t i, int64_t v) {
      const int64_t flat = i * w.cols + col;
      return table(unpack_codes(w.packed + (flat + v * kLanes) / 2)) * set(absmax_of(w, flat / w.block_size));
    };
    for (int64_t i = t; i < t + steps; i += 8)
      for (int64_t j = i; j < i + 4; ++j, out += 2 * kLanes)
        for (int64_t v = 0; v < 2; ++v) store_int(out + v * kLanes, pair_bf16(row(j, v), row(j + 4, v)));
  }
  bool fits_bf16() const { return is_regular(w) && w.rows % 8 == 0; }
#endif
};

template <class T> void multiply(const Nf4LinearBackward& a, const Block& b, const Scratch& s,
                                    [[maybe_unused]] bool int16 = true) {
  const Nf4Weight& w = a.weight;
  const T* g = static_cast<const T*>(a.g);
  if (a.r)
    with_type(a.a_dtype, [&](auto t) {
      using A = typename decltype(t)::type;
      accumulate<2>(b, a.r, Rows<float>{a.v, a.r}, Matrix<2, A>{static_cast<const A*>(a.a), w.cols, w.cols, 1.f}, s);
      if (a.dropout.p > 0) drop(DropoutMask(a.dropout), b, w.cols, s);
    });
  const Nf4Rows<2> rows{w};
#if defined(__AVX512BF16__)
  if constexpr (is_bf16<T>)
    if (rows.fits_bf16()) return accumulate_bf16(b, w.rows, g, w.rows, rows, s);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    if (int16 && rows.fits_int16())
      return accumulate16(b, w.rows, rows.segment_of_rows(), g, w.rows, rows, s,
                          [&](const Block& row, const Scratch& at) { multiply<T>(a, row, at, false); });
#endif
  accumulate<2>(b, w.rows, Rows<T>{g, w.rows}, rows, s);
}

}  // namespace

int64_t nf4_linear_backward(const Nf4LinearBackward& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.dx, a.m, a.weight.cols, a.dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    multiply<T>(a, b, s);
  });
}

}  // namespace peftops::cpu::PEFTOPS_ISA
