// The product of product.h in int8, where 8 bits hold the codes of a weight: codes are taken unchanged, unsigned, and
// the activations are rounded to round(127 x / max |x|), with a maximum for every row and segment of columns. Of each
// segment,
//
//   y += x_scale * scale * (sum of code * x - zero * sum of x)
//
// with both sums exact, the first one in int32: only x is rounded. One instruction multiplies and
// adds four pairs: vpdpbusd of AVX-512 VNNI, usdot of ARMv8.6. AVX2 has none for more than two that could not saturate (vpmaddwd on
// int16): in groups of 128 it came to 0.9 to 1.1 times the speed of fp32, and plain C++ to a third, so they have no
// such product. A weight is packed in dwords: dword d of eight columns holds column d + kDwords i at its i-th place.
#pragma once
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr float kInt8Factor = 127.f;
constexpr float kRound = 0x1.8p23f;         // added to a small float, leaves its whole part in the low bits
constexpr int64_t kMostInt8Segment = 128;   // columns that share a maximum, at most
constexpr int64_t kLeastInt8Segment = 32;   // in shorter ones the scales cost what the instruction saves

constexpr int kTileRows8 = 6, kPerDword = 4;
constexpr int kDwords = 8 / kPerDword;      // for eight columns
constexpr int64_t kStride8 = kDepth / kPerDword + kLanes, kSegments8 = kDepth / kLeastInt8Segment;

// Views into the scratch of the fp32 product.
struct Scratch8 {
  float* c;               // [kRowBlock][kCols]
  int32_t* panels;        // [kPanels][kDepth / kPerDword][2 * kLanes]
  float *scales, *zeros;  // [kPanels][kSegments8][2 * kLanes]; zeros with the sign turned
  int32_t* left;          // [kTileRows8][kStride8]
  float *left_scales, *left_sums;   // [kTileRows8][kSegments8]

  explicit Scratch8(const Scratch& s)
      : c(s.c), panels(reinterpret_cast<int32_t*>(s.panels)), scales(s.panels + kDepth / kPerDword * Scratch::kCols),
        zeros(scales + kSegments8 * Scratch::kCols), left(reinterpret_cast<int32_t*>(s.left)),
        left_scales(s.left + kTileRows8 * kStride8), left_sums(left_scales + kTileRows8 * kSegments8) {}
};
static_assert(kDepth / kPerDword + 2 * kSegments8 <= kDepth);
static_assert(kTileRows8 * (kStride8 + 2 * kSegments8) <= kTileRows * kLeftStride);

// A tile of A, kLanes segments at a time, so that their maxima and sums are found side by side. `fits` becomes
// false for a row that int8 cannot hold: with a NaN, an infinity, or so small that 1 / max overflows.
template <class T>
void pack_tile8(const T* x, int64_t ldx, int64_t rows, int64_t steps, int64_t segment, const Scratch8& to, bool* fits) {
  int32_t whole[kTileRows8][kDepth + kLanes];
  const int64_t segments = steps / segment, count = rows * segments;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t n = at_most(kLanes, count - first);
    Int most[kLanes] = {}, sum[kLanes] = {};
    const auto each = [&](const auto& f) {
      for (int64_t i = 0; i < n; ++i) f(i, (first + i) / segments, (first + i) % segments);
    };
    each([&](int64_t i, int64_t row, int64_t s) {
      Int all = as_int(zero());   // as integers, so that a NaN is the largest
      each_vector(segment, [&](int64_t k, int64_t m) {
        all = max_int(all, as_int(abs(load_upto(x + row * ldx + s * segment + k, m))));
      });
      most[i] = all;
    });
    transpose(most);   // so that a lane is a segment
    for (int i = 1; i < kLanes; ++i) most[0] = max_int(most[0], most[i]);
    float largest[kLanes];
    store(largest, as_float(most[0]));
    each([&](int64_t i, int64_t row, int64_t s) {
      const bool usable = largest[i] > 1e-30f && largest[i] <= __FLT_MAX__;
      fits[row] &= usable || largest[i] == 0;
      to.left_scales[row * kSegments8 + s] = largest[i] / kInt8Factor;
      const Vec inverse = set(usable ? kInt8Factor / largest[i] : 0.f);
      Vec total = zero();
      each_vector(segment, [&](int64_t k, int64_t m) {
        const Vec rounded = load_upto(x + row * ldx + s * segment + k, m) * inverse + set(kRound);
        store_int(&whole[row][s * segment + k], as_int(rounded));
        total = total + (rounded - set(kRound));   // lanes past m hold zeros
      });
      sum[i] = as_int(total);
    });
    transpose(sum);
    Vec total = as_float(sum[0]);
    for (int i = 1; i < kLanes; ++i) total = total + as_float(sum[i]);
    store(largest, total);
    each([&](int64_t i, int64_t row, int64_t s) { to.left_sums[row * kSegments8 + s] = largest[i]; });
  }
  for (int64_t i = 0; i < rows; ++i) put_quads(whole[i], steps, to.left + i * kStride8);
}

template <int R>
void tile8(const int32_t* a, const float* a_scales, const float* a_sums, const int32_t* p, const float* p_scales,
           const float* p_zeros, int64_t segments, int64_t dwords, float* c) {
  Vec sum[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = zero();
  for (int64_t s = 0; s < segments; ++s, a += dwords, p_scales += 2 * kLanes, p_zeros += 2 * kLanes) {
    Int dot[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) dot[i][0] = dot[i][1] = as_int(zero());
    for (int64_t t = 0; t < dwords; t += kDwords, p += kDwords * 2 * kLanes)
#pragma GCC unroll 4
      for (int d = 0; d < kDwords; ++d) {
        const Int b0 = load_int(p + d * 2 * kLanes), b1 = load_int(p + (d * 2 + 1) * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const Int x = set_int(a[i * kStride8 + t + d]);
          dot[i][0] = dot_bytes(dot[i][0], b0, x), dot[i][1] = dot_bytes(dot[i][1], b1, x);
        }
      }
    const Vec s0 = load(p_scales), s1 = load(p_scales + kLanes), z0 = load(p_zeros), z1 = load(p_zeros + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec x_scale = set(a_scales[i * kSegments8 + s]), x_sum = set(a_sums[i * kSegments8 + s]);
      sum[i][0] = fma(fma(z0, x_sum, to_float(dot[i][0])) * s0, x_scale, sum[i][0]);
      sum[i][1] = fma(fma(z1, x_sum, to_float(dot[i][1])) * s1, x_scale, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < 2; ++v) {
      float* at = c + i * Scratch::kCols + v * kLanes;
      store(at, sum[i][v] + load(at));
    }
}

template <int R = kTileRows8, class... Args> void tile8_of(int64_t rows, const Args&... args) {
  if (rows == R) return tile8<R>(args...);
  if constexpr (R > 1) tile8_of<R - 1>(rows, args...);
}

// Adds x W^T to a block of C, for `cols` columns in segments. The weight is pack8(col, t, steps, out, scales, zeros),
// zeros with the sign turned. Rows of x that do not fit are done over: redo(row, scratch), with a zeroed C.
template <class T, class Right, class Redo>
void accumulate_int8(const Block& b, int64_t cols, int64_t segment, const T* x, const Right& right,
                     const Scratch& scratch, const Redo& redo) {
  constexpr int64_t kWidth = 2 * kLanes;
  const Scratch8 s(scratch);
  bool fits[kRowBlock];
  memset(fits, true, sizeof fits);
  for (int64_t t = 0; t < cols; t += kDepth) {
    const int64_t steps = at_most(kDepth, cols - t);
    for (int64_t j = 0; j < b.panels; ++j)
      right.pack8(b.col + j * kWidth, t, steps, s.panels + j * kDepth / kPerDword * kWidth,
                  s.scales + j * kSegments8 * kWidth, s.zeros + j * kSegments8 * kWidth);
    each_tile(b.rows, kTileRows8, [&](int64_t row, int64_t rows) {
      pack_tile8(x + (b.row + row) * cols + t, cols, rows, steps, segment, s, fits + row);
      for (int64_t j = 0; j < b.panels; ++j)
        tile8_of(rows, s.left, s.left_scales, s.left_sums, s.panels + j * kDepth / kPerDword * kWidth,
                 s.scales + j * kSegments8 * kWidth, s.zeros + j * kSegments8 * kWidth, steps / segment,
                 segment / kPerDword, s.c + row * Scratch::kCols + j * kWidth);
    });
  }
  do_over(b, fits, scratch, redo);
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
