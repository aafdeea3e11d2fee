// x in int8, for dot products with the four-bit codes of a weight in their order in memory (code_dot.h, group_dot.h):
// the common part of the formats. x becomes round(127 x / max |x|), with a maximum for every 32 columns of a row.
//
// A load of codes is split into its low nibbles and its high ones, and x lies in the same order. One instruction of
// AVX-512 VNNI multiplies 64 pairs of bytes and adds them up by fours. AVX2 multiplies 32, and needs two instructions
// more to add them up; in fp32 the same takes four multiply-adds, and sixteen instructions that decode. So few rows gain
// much, and many rows do not.
#pragma once
#include "kernels/cpu/codes4.h"
#include "kernels/cpu/dot.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kInt8Rows = kLanes == 16 ? 8 : 12;   // at more, decoding into a panel is as fast
constexpr int64_t kInt8Span = 32;     // columns that share a maximum: those of four lanes
static_assert(kStrip % kInt8Span == 0);

// Up to kDotRows rows of up to kDotCols columns. kZero is by how much the codes of the weight are larger than those with
// a sign: each sum of products starts from what that adds to it.
template <int kZero> struct Bytes {
  int8_t* codes;   // [strips][rows][2][kStrip / 2]: the columns of low nibbles, and of high ones
  float* factors;  // [strips][rows][kLanes]: x = code * factor, for the eight columns of a lane
  float* sums;     // [strips][rows][kLanes]: of the eight codes; with a kZero, integers, -kZero times that
  int64_t rows;

  Bytes(float* p, int64_t rows)
      : codes(reinterpret_cast<int8_t*>(p)), factors(p + kDotRows * kDotCols / 4),
        sums(factors + kDotRows * kDotCols / 8), rows(rows) {}

  // Of M rows, as many as there are.
  template <int M> Int low(int64_t strip, int64_t row) const { return load_int(codes + (strip * M + row) * kStrip); }
  template <int M> Int high(int64_t strip, int64_t row) const {
    return load_int(codes + (strip * M + row) * kStrip + kStrip / 2);
  }
  template <int M> Vec factor(int64_t strip, int64_t row) const { return load(factors + (strip * M + row) * kLanes); }
  template <int M> Vec sum(int64_t strip, int64_t row) const {
    static_assert(!kZero);
    return load(sums + (strip * M + row) * kLanes);
  }
  template <int M> Int start(int64_t strip, int64_t row) const {
    return kZero ? load_int(sums + (strip * M + row) * kLanes) : as_int(zero());
  }

  // Packs `cols` columns, a multiple of 32, with factors times `unit`; kHighFirst: the first of two codes is the high
  // nibble. `fits` becomes false for a row that int8 cannot hold: with a NaN, an infinity, or so small that 1 / max
  // overflows.
  template <bool kHighFirst, class T> void pack(const T* x, int64_t ld, int64_t cols, float unit, bool* fits) const {
    for (int64_t k = 0, at = 0; k < cols; k += kStrip)
      for (int64_t m = 0; m < rows; ++m, ++at) {
        int8_t *low = codes + at * kStrip, *high = low + kStrip / 2;
        for (int64_t span = 0; span < kStrip; span += kInt8Span) {
          const int64_t col = k + span;
          int8_t *even = (kHighFirst ? high : low) + span / 2, *odd = (kHighFirst ? low : high) + span / 2;
          const float factor = col < cols ? pack_span(x + m * ld + col, even, odd, fits[m]) : 0;
          if (col >= cols) memset(even, 0, kInt8Span / 2), memset(odd, 0, kInt8Span / 2);
          for (int64_t i = 0; i < kInt8Span / 8; ++i) factors[at * kLanes + span / 8 + i] = factor * unit;
        }
        const Int ones = set_int(0x01010101), none = as_int(zero());
        const Int sum = dot_unsigned(dot_unsigned(none, ones, load_int(low)), ones, load_int(high));
        const Vec whole = to_float(sum) * set(kZero ? -kZero : 1);
        store(sums + at * kLanes, kZero ? as_float(truncate(whole)) : whole);
      }
  }

 private:
  template <class T> static float pack_span(const T* x, int8_t* even, int8_t* odd, bool& fits) {
    constexpr int kVectors = kInt8Span / kLanes;
    Vec value[kVectors];
    Int most = as_int(zero()), whole[kVectors];   // as integers, so that a NaN is the largest
    for (int i = 0; i < kVectors; ++i) value[i] = load(x + i * kLanes), most = max_int(most, as_int(abs(value[i])));
    float lane[kLanes], largest = 0;
    store(lane, as_float(most));
    for (float a : lane) {
      if (!(a <= __FLT_MAX__)) largest = a;
      if (a > largest) largest = a;
    }
    const bool usable = largest > 1e-30f && largest <= __FLT_MAX__;
    fits &= usable || largest == 0;
    const Vec inverse = set(usable ? 127.f / largest : 0.f);
    for (int i = 0; i < kVectors; ++i) whole[i] = round_to_int(value[i] * inverse);
    store_by_nibble(even, odd, whole);
    return usable ? largest / 127.f : 0;
  }
};
static_assert(kDotRows * kDotCols / 4 + 2 * kDotRows * kDotCols / 8 <= kDepth * Scratch::kCols);

// Adds x W^T to a block of C, piece by piece of the columns: add(first row of the block, k, cols, bytes). Rows of x
// that do not fit are done over: redo(rows, scratch), with a zeroed C.
template <int kZero, bool kHighFirst, class T, class Add, class Redo>
void accumulate_bytes(const Block& b, int64_t cols, const T* x, float unit, const Scratch& s, const Add& add,
                      const Redo& redo) {
  bool fits[kInt8Rows];
  memset(fits, true, sizeof fits);
  for (int64_t k = 0; k < cols; k += kDotCols)
    for (int64_t first = 0; first < b.rows; first += kDotRows) {
      const Bytes<kZero> bytes(s.panels, at_most(kDotRows, b.rows - first));
      const int64_t piece = at_most(kDotCols, cols - k);
      bytes.template pack<kHighFirst>(x + (b.row + first) * cols + k, cols, piece, unit, fits + first);
      add(first, k, piece, bytes);
    }
  do_over(b, fits, s, redo);
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
