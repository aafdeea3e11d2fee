// One strip of a weight in codes of four bits (codes4.h) times a few rows of x, in each kind of numbers: how x is packed
// for it, and the sums. code_dot.h runs them along the rows of a weight.
#pragma once
#include "kernels/cpu/dot.h"
#include "kernels/cpu/codes4.h"
#if defined(__AVX512F__)
#include "kernels/cpu/product_int16.h"
#endif
#if defined(PEFTOPS_DOT8)
#include "kernels/cpu/dot_int8.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The column that the j-th shift of a dword by four bits moves to the lowest bits: j ^ 1 if the high half of a byte
// comes first.
template <class Weight> constexpr int column_of(int j) { return Codes<Weight>::kHighFirst ? j ^ 1 : j; }

// x as the dot product reads it. Lane l of vector j of a strip holds column 8 l + column_of(j).
template <class Weight, class T> void pack_dot(const T* x, int64_t rows, int64_t ld, int64_t cols, float* out) {
  for (int64_t k = 0; k < cols; k += kStrip)
    for (int64_t m = 0; m < rows; ++m, out += kStrip) {
      float strip[kStrip] = {};
      each_vector(at_most(kStrip, cols - k), [&](int64_t i, int64_t n) {
        store(strip + i, load_upto(x + m * ld + k + i, n));
      });
      for (int j = 0; j < 8; ++j)
        for (int lane = 0; lane < kLanes; ++lane) out[j * kLanes + lane] = strip[8 * lane + column_of<Weight>(j)];
    }
}

template <class Weight> struct Dot32 {
  // Rows of the weight that share the loads of M rows of x.
  static constexpr int together(int M) { return M == 1 ? 1 : 4; }

  const float* x;   // [strips][M][8][kLanes]
  Table16 table{Codes<Weight>::at};

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    const float* at = x + i * M * kStrip;
    Vec sum[M][R];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      Vec w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = table(shift_right(strip[r], 4 * j));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec v = load(at + (m * 8 + j) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[m][r] = j ? fma(w[r], v, sum[m][r]) : w[r] * v;
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[m][r] = fma(sum[m][r], scale[r], total[m][r]);
  }
};

#if defined(__AVX512F__)
// sum[m][r]: the products of a strip of R rows of the weight with M rows of x, codes in 16 bits out of a table, of which
// one look-up gives two; dot(sum, codes, x) multiplies and adds pairs. x: [M][4][2 * kLanes].
template <int M, int R, class X, class Sum, class Dot>
inline void dot_words(const Int (&strip)[R], Int table, const X* x, Sum none, Sum (&sum)[M][R], const Dot& dot) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Int w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = _mm512_permutexvar_epi16(shift_right(strip[r], 4 * j), table);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Int v = load_int(x + (m * 4 + j) * 2 * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[m][r] = dot(j ? sum[m][r] : none, w[r], v);
    }
  }
}

// The same with x and the codes in int16, see product_int16.h; 8 products a lane fit an int32.
template <class Weight> struct Dot16 {
  static constexpr int together(int M) { return M <= 2 ? 1 : 4; }

  const int16_t* x;      // [strips][M][4][2 * kLanes]
  const float* factor;   // [strips][M]
  Int table = load_int(kCode16<Weight>.at);

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    Int sum[M][R];
    dot_words(strip, table, x + i * M * kStrip, as_int(zero()), sum,
              [](Int sum, Int w, Int v) { return _mm512_dpwssd_epi32(sum, w, v); });
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[m][r] = fma(_mm512_cvtepi32_ps(sum[m][r]), scale[r] * set(factor[i * M + m]), total[m][r]);
  }
};

// Word l of vector j of a strip holds column 4 l + column_of(j). Returns the rows that fit, a bit for each: no strip of theirs
// is wide.
template <class Weight, class T>
uint32_t pack_dot16(const T* x, int64_t rows, int64_t ld, int64_t cols, int16_t* out, float* factor) {
  uint64_t unfit = 0;
  for (int64_t k = 0; k < cols; k += kStrip) {
    T strips[kDotRows][kStrip] = {};
    for (int64_t m = 0; m < rows; ++m) memcpy(strips[m], x + m * ld + k, at_most(kStrip, cols - k) * sizeof(T));
    const Ranges16 ranges(T{}, rows, kStrip, [&](int64_t m) { return &strips[m][0]; });
    unfit |= ranges.unfit | ranges.wide;
    for (int64_t m = 0; m < rows; ++m, out += kStrip) {
      *factor++ = ranges.scale[m] / Codes<Weight>::kFactor16;
      int32_t whole[kStrip];
      for (int i = 0; i < kStrip; i += kLanes)
        store_int(whole + i, _mm512_cvtps_epi32(load(strips[m] + i) * set(ranges.inverse[m])));
      for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 2 * kLanes; ++l) out[j * 2 * kLanes + l] = int16_t(whole[4 * l + column_of<Weight>(j)]);
    }
  }
  return uint32_t(~unfit) & ((1u << rows) - 1);
}
#endif

#if defined(PEFTOPS_BF16_CODES)
// The same with x in bf16 as it is, and the codes rounded to bf16: the weight has the error of product_bf16.h.
template <class Weight> struct DotBf16 {
  static constexpr int together(int M) { return M <= 2 ? 1 : 4; }

  const bf16* x;         // [strips][M][4][2 * kLanes]
  Int table = twice_bf16(load(Codes<Weight>::at) * set(Codes<Weight>::kFactorBf16));

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    Vec sum[M][R], unit[R];
    dot_words(strip, table, x + i * M * kStrip, zero(), sum, [](Vec sum, Int w, Int v) { return dot_bf16(sum, w, v); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) unit[r] = scale[r] * set(1 / Codes<Weight>::kFactorBf16);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[m][r] = fma(sum[m][r], unit[r], total[m][r]);
  }
};

// Word l of vector j of a strip holds column 4 l + column_of(j).
template <class Weight> void pack_dot_bf16(const bf16* x, int64_t rows, int64_t ld, int64_t cols, bf16* out) {
  for (int64_t k = 0; k < cols; k += kStrip)
    for (int64_t m = 0; m < rows; ++m, out += kStrip) {
      bf16 strip[kStrip] = {};
      memcpy(strip, x + m * ld + k, at_most(kStrip, cols - k) * sizeof(bf16));
      for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 2 * kLanes; ++l) out[j * 2 * kLanes + l] = strip[4 * l + column_of<Weight>(j)];
    }
}
#endif

#if defined(PEFTOPS_DOT8)
// The same with x and the codes in int8, see dot_int8.h.
template <class Weight> struct Dot8 {
  static constexpr int together(int M) { return kLanes == 16 ? (M == 1 ? 1 : 4) : M == 1 ? 2 : 1; }

  Bytes<kByteZero> x;

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    const Int nibble = set_int(0x0f0f0f0f);
    Int low[R], high[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      low[r] = look_up_bytes(kByteCode<Weight>.at, strip[r] & nibble);
      high[r] = look_up_bytes(kByteCode<Weight>.at, shift_right(strip[r], 4) & nibble);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Int start = x.template start<M>(i, m), first = x.template low<M>(i, m), second = x.template high<M>(i, m);
      const Vec factor = x.template factor<M>(i, m);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Int sum = dot_codes(dot_codes(start, low[r], first), high[r], second);
        total[m][r] = fma(to_float(sum), scale[r] * factor, total[m][r]);
      }
    }
  }
};
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
