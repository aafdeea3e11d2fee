// The product of product.h for 16-bit activations, in int16: twice the multiply-adds per instruction.
//
// Codes become round(7854 code), or another factor of their format (codes4.h), activations round(16384 x / max |x|) with
// a maximum for every segment of columns, within which a weight has one absmax. Both roundings together are a few 1e-5 of the
// result (rms), below the rounding of a bf16 or fp16 output.
//
//   7854     of all factors up to 8191, the one that brings the sixteen codes of NF4 nearest to whole numbers
//   16384    so that 16 products, 16 * 8191 * 16384, fit an int32; then the sum moves on to fp32
//
// vpdpwssd multiplies pairs. Steps are paired i with i + 4 inside each eight, because that is how the
// 16-bit look-up (vpermw) leaves the codes of a dword.
#pragma once
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr float kCodeFactor = 7854.f, kLeftFactor = 16384.f;
constexpr float kWide = 6.f;                // normal numbers reach 5 times their mean magnitude
constexpr float kWidest = 32768.f, kRestFactor = 32768.f;   // of what is left of a step, half of it at most
constexpr int64_t kFlush = 8;               // pair steps, 16 products, between int32 and fp32
constexpr int kTileRows16 = 6;              // x 2 vectors, in int32 and again in fp32: 24 of 32 registers
constexpr int64_t kPairs = kDepth / 2, kPairStride = kPairs + kLanes;
constexpr int64_t kSegments = kDepth / 32;  // of a panel's depth, at most

// Views into the scratch of the fp32 product.
struct Scratch16 {
  float* c;            // [kRowBlock][kCols]
  int32_t* panels;     // [kPanels][kPairs][2 * kLanes]
  float* scales;       // [kPanels][kSegments][2 * kLanes]
  struct Left {
    int32_t* at;       // [kTileRows16][kPairStride]
    float* scales;     // [kTileRows16][kSegments]
    static constexpr int64_t kSize = kTileRows16 * (kPairStride + kSegments);

    explicit Left(float* p) : at(reinterpret_cast<int32_t*>(p)), scales(p + kTileRows16 * kPairStride) {}
  } left, rest;        // rest: the remainders of wide segments after rounding

  explicit Scratch16(const Scratch& s)
      : c(s.c), panels(reinterpret_cast<int32_t*>(s.panels)), scales(s.panels + kPairs * Scratch::kCols), left(s.left),
        rest(s.left + Left::kSize) {}
};
static_assert(2 * Scratch16::Left::kSize <= kTileRows * kLeftStride);
static_assert(kPairs + kSegments <= kDepth);

// How the segments of a piece of x map to int16: x is about round(x * inverse) * scale.
struct Ranges16 {
  static constexpr int64_t kMost = 64;   // segments; a tile has 6 rows of 8 at most
  float scale[kMost], inverse[kMost];
  uint64_t wide = 0, unfit = 0;          // a bit for each segment

  // Measures `count` segments, the i-th at at(i). A segment does not fit if it holds a NaN or an infinity, if its
  // magnitudes are so small that the factor would overflow, or if they differ by more than 30 bits can hold.
  template <class T, class At> Ranges16(T, int64_t count, int64_t segment, const At& at) {
    constexpr float kShare = 1.f / 256;   // of a magnitude, so that a segment's largest ones have a sum
    for (int64_t first = 0; first < count; first += kLanes) {
      Int most[kLanes] = {}, sum[kLanes] = {};
      for (int64_t i = 0; i < at_most(kLanes, count - first); ++i) {
        const T* x = at(first + i);
        Int m = as_int(zero());   // 16-bit magnitudes are ordered like the integers that their bits are
        Vec total = zero();
        for (int64_t k = 0; k < segment; k += 2 * kLanes) {
          m = _mm512_max_epu16(m, _mm512_and_si512(load_int(x + k), _mm512_set1_epi16(0x7fff)));
          total = fma(abs(load(x + k)), set(kShare), fma(abs(load(x + k + kLanes)), set(kShare), total));
        }
        most[i] = max_int(shift_right(m, 16), _mm512_and_si512(m, _mm512_set1_epi32(0xffff)));
        sum[i] = as_int(total);
      }
      transpose(most), transpose(sum);   // so that a lane is a segment
      Vec total = as_float(sum[0]);
      for (int i = 1; i < kLanes; ++i) most[0] = max_int(most[0], most[i]), total = total + as_float(sum[i]);
      T bits[kLanes];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), _mm512_cvtepi32_epi16(most[0]));
      const Vec max = load(bits), share = max * set(kShare), mean = (total - share) * set(1.f / float(segment - 1));
      const __mmask16 usable = _mm512_cmp_ps_mask(max, set(1e-30f), _CMP_GT_OQ) &
                               _mm512_cmp_ps_mask(max, set(__FLT_MAX__), _CMP_LE_OQ);
      const __mmask16 none = _mm512_cmp_ps_mask(max, zero(), _CMP_EQ_OQ);
      const auto beyond = [&](float most) { return _mm512_cmp_ps_mask(share, mean * set(most), _CMP_GT_OQ); };
      wide |= uint64_t(usable & beyond(kWide)) << first;
      unfit |= uint64_t(__mmask16(~(usable | none) | (usable & beyond(kWidest)))) << first;
      store(scale + first, _mm512_maskz_mul_ps(usable, max, set(1.f / kLeftFactor)));
      store(inverse + first, _mm512_maskz_div_ps(usable, set(kLeftFactor), max));
    }
    if (count < kMost) wide &= (uint64_t(1) << count) - 1, unfit &= (uint64_t(1) << count) - 1;
  }
  bool any(uint64_t of, int64_t row, int64_t segments) const {
    return of >> row * segments & ((uint64_t(1) << segments) - 1);
  }
};

// A tile of A: rows of pairs, and a scale per segment. `fits` becomes false for a row that does not fit. Returns
// whether a segment is wide, so that `rest` has its remainder.
template <class T>
bool pack_tile16(const T* x, int64_t ldx, int64_t rows, int64_t steps, int64_t segment, const Scratch16& to,
                 bool* fits) {
  const int64_t segments = steps / segment;
  const Ranges16 ranges(T{}, rows * segments, segment, [&](int64_t i) {
    return x + i / segments * ldx + i % segments * segment;
  });
  const auto put = [](int32_t* out, Int a, Int b) {
    const Int first = _mm512_shuffle_i32x4(a, b, 0x88), second = _mm512_shuffle_i32x4(a, b, 0xdd);
    store_int(out, _mm512_mask_blend_epi16(0xaaaaaaaa, first, shift_left(second, 16)));
  };
  for (int64_t i = 0; i < rows; ++i) {
    if (ranges.any(ranges.unfit, i, segments)) fits[i] = false;
    const T* from = x + i * ldx;
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t at = i * segments + s;
      const Vec inverse = set(ranges.inverse[at]);
      const bool wide = ranges.wide >> at & 1;
      const auto rest_of = [&](Vec v, Int whole) {
        return _mm512_cvtps_epi32(fma(v, inverse, zero() - to_float(whole)) * set(kRestFactor));
      };
      for (int64_t k = s * segment; k < (s + 1) * segment; k += 2 * kLanes) {
        const Vec v = load(from + k), w = load(from + k + kLanes);
        const Int a = _mm512_cvtps_epi32(v * inverse), b = _mm512_cvtps_epi32(w * inverse);
        put(to.left.at + i * kPairStride + k / 2, a, b);
        if (ranges.wide)
          put(to.rest.at + i * kPairStride + k / 2, wide ? rest_of(v, a) : as_int(zero()),
              wide ? rest_of(w, b) : as_int(zero()));
      }
      to.left.scales[i * kSegments + s] = ranges.scale[at];
      to.rest.scales[i * kSegments + s] = wide ? ranges.scale[at] / kRestFactor : 0.f;
    }
  }
  return ranges.wide != 0;
}

template <int R>
void tile16(const int32_t* a, const float* a_scales, const int32_t* p, const float* p_scales, int64_t pairs,
            int64_t segment, float* c) {
  for (int64_t t = 0; t < pairs; t += segment / 2) {
    Vec sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = zero();
    for (int64_t g = t; g < t + segment / 2; g += kFlush) {
      Int dot[R][2];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) dot[i][0] = dot[i][1] = as_int(zero());
#pragma GCC unroll 8
      for (int64_t k = 0; k < kFlush; ++k) {
        const Int b0 = load_int(p + (g + k) * 2 * kLanes), b1 = load_int(p + ((g + k) * 2 + 1) * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Int x = _mm512_set1_epi32(a[i * kPairStride + g + k]);
          dot[i][0] = _mm512_dpwssd_epi32(dot[i][0], x, b0);
          dot[i][1] = _mm512_dpwssd_epi32(dot[i][1], x, b1);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        sum[i][0] = sum[i][0] + _mm512_cvtepi32_ps(dot[i][0]);
        sum[i][1] = sum[i][1] + _mm512_cvtepi32_ps(dot[i][1]);
      }
    }
    const Vec s0 = load(p_scales), s1 = load(p_scales + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec x = set(a_scales[i * kSegments]);
      float* at = c + i * Scratch::kCols;
      store(at, fma(sum[i][0] * s0, x, load(at)));
      store(at + kLanes, fma(sum[i][1] * s1, x, load(at + kLanes)));
    }
    p_scales += 2 * kLanes;
    ++a_scales;
  }
}

template <int R = kTileRows16>
void tile16_of(int64_t rows, const int32_t* a, const float* a_scales, const int32_t* p, const float* p_scales,
               int64_t pairs, int64_t segment, float* c) {
  if (rows == R) return tile16<R>(a, a_scales, p, p_scales, pairs, segment, c);
  if constexpr (R > 1) tile16_of<R - 1>(rows, a, a_scales, p, p_scales, pairs, segment, c);
}

// Adds the product over `depth` steps to a block of C. P packs its panels with pack16(col, t, steps,
// pairs, scales). Rows of x that do not fit are done over: redo(row, scratch) for each, with a zeroed C.
template <class T, class Right, class Redo>
void accumulate16(const Block& b, int64_t depth, int64_t segment, const T* x, int64_t ldx, const Right& right,
                  const Scratch& scratch, const Redo& redo) {
  constexpr int64_t kWidth = 2 * kLanes;
  const Scratch16 s(scratch);
  bool fits[kRowBlock];
  memset(fits, true, sizeof fits);
  for (int64_t t = 0; t < depth; t += kDepth) {
    const int64_t steps = at_most(kDepth, depth - t);
    for (int64_t j = 0; j < b.panels; ++j)
      right.pack16(b.col + j * kWidth, t, steps, s.panels + j * kPairs * kWidth, s.scales + j * kSegments * kWidth);
    each_tile(b.rows, kTileRows16, [&](int64_t row, int64_t rows) {
      const auto multiply = [&](const Scratch16::Left& left) {
        for (int64_t j = 0; j < b.panels; ++j)
          tile16_of(rows, left.at, left.scales, s.panels + j * kPairs * kWidth, s.scales + j * kSegments * kWidth,
                    steps / 2, segment, s.c + row * Scratch::kCols + j * kWidth);
      };
      const bool wide = pack_tile16(x + (b.row + row) * ldx + t, ldx, rows, steps, segment, s, fits + row);
      multiply(s.left);
      if (wide) multiply(s.rest);
    });
  }
  do_over(b, fits, scratch, redo);
}

// Any P of product.h, decoded in fp32 and rounded to the largest of each column's segment.
template <class Right> struct AsInt16 {
  static constexpr int64_t kMostSegment = 128;   // steps: 16 KB
  const Right& right;
  int64_t segment;

  void pack16(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale) const {
    float panel[kMostSegment * 2 * kLanes];
    for (int64_t first = 0; first < steps; first += segment, scale += 2 * kLanes) {
      right.pack(col, t + first, segment, panel);
      Vec factor[2];
      for (int v = 0; v < 2; ++v) {
        Int most = as_int(zero());   // as integers, so that a NaN is the largest
        for (int64_t k = 0; k < segment; ++k) most = max_int(most, as_int(abs(load(panel + (2 * k + v) * kLanes))));
        const __mmask16 usable = _mm512_cmp_ps_mask(as_float(most), zero(), _CMP_GT_OQ);
        factor[v] = _mm512_maskz_div_ps(usable, set(kCodeFactor), as_float(most));
        store(scale + v * kLanes, as_float(most) * set(1.f / kCodeFactor));
      }
      const auto whole = [&](int64_t k, int v) {
        return _mm512_cvtps_epi32(load(panel + (2 * k + v) * kLanes) * factor[v]);
      };
      for (int64_t k = 0; k < segment; k += 8)
        for (int64_t j = k; j < k + 4; ++j)
          for (int v = 0; v < 2; ++v, out += kLanes)
            store_int(out, _mm512_mask_blend_epi16(0xaaaaaaaa, whole(j, v), shift_left(whole(j + 4, v), 16)));
    }
  }
  // The longest segment that divides a depth, a multiple of 32.
  static int64_t segment_of(int64_t depth) { return depth % 128 == 0 ? 128 : depth % 64 == 0 ? 64 : 32; }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
