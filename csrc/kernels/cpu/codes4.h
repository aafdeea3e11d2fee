// Formats of four-bit codes that a table of sixteen turns into numbers, times a scale for every block of a row (NF4,
// MXFP4): the properties of a format that its view (code_columns.h) and its dot products (code_dot.h) use.
#pragma once
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// A format specialises this one:
//
//   at                  the table
//   kHighFirst          whether the first of two codes is in the high half of its byte
//   kFactor16           of codes in int16 (product_int16.h): makes them 8191 at most
//   kFactorBf16         of codes in bf16 (product_bf16.h): brings them nearest to such numbers
//   kFactor8, kZero8    round(kFactor8 * code) + kZero8 is a code in 8 bits (product_int8.h; dot_int8.h, less kZero8)
//   is_regular(w)       whether rows start on a byte, and segments of columns lie within one block: cols % 32 == 0
//   scale_of(w, block), scales(w, block, n, out)   by the index of a block in the whole weight
//   scales_of_lanes(w, flat, stride, segment, n, out)   of n segments in each of kLanes rows; false if it knows no way
//                                                       faster than one after the other
//   run(w, flat, n, out)                           numbers, by the index of an element
template <class Weight> struct Codes;

// The index of an element.
template <class Weight> int64_t flat_of(const Weight& w, int64_t row, int64_t col) { return w.first + row * w.cols + col; }

// The fast paths read a weight in strips: one load of packed codes, kLanes dwords of eight codes each.
constexpr int64_t kStrip = 8 * kLanes;

// Columns that share one scale in every row: the largest power of two, a strip at most.
template <class Weight> int64_t segment_of(const Weight& w) {
  int64_t segment = at_most(w.block_size, kStrip);
  while (w.cols % segment) segment /= 2;
  return segment;
}

// Column i of a dword's eight sits at this bit: bytes run upwards.
template <class Weight> Int code_at(Int octet, int i) {
  return shift_right(octet, Codes<Weight>::kHighFirst ? i / 2 * 8 + (i % 2 ? 0 : 4) : 4 * i);
}

#if defined(PEFTOPS_INT16) || defined(PEFTOPS_INT8) || defined(PEFTOPS_DOT8)
struct Code16 { int16_t at[32]; };   // twice the table: vpermw reads five bits, a code has four
struct Code8 { uint8_t at[16]; };

template <class Weight> constexpr Code16 make_code16() {
  Code16 c = {};
  for (int i = 0; i < 32; ++i) {
    const float f = Codes<Weight>::at[i % 16] * Codes<Weight>::kFactor16;
    c.at[i] = int16_t(f < 0 ? f - 0.5f : f + 0.5f);
  }
  return c;
}
template <class Weight> constexpr Code8 make_code8() {
  Code8 c = {};
  for (int i = 0; i < 16; ++i)
    c.at[i] = uint8_t(Codes<Weight>::at[i] * Codes<Weight>::kFactor8 + Codes<Weight>::kZero8 + 0.5f);
  return c;
}
template <class Weight> constexpr Code16 kCode16 = make_code16<Weight>();
template <class Weight> constexpr Code8 kCode8 = make_code8<Weight>();
#endif
#if defined(PEFTOPS_DOT8)
template <class Weight> constexpr Code8 make_byte_code() {   // as dot_codes takes them
  Code8 c = {};
  for (int i = 0; i < 16; ++i) c.at[i] = uint8_t(kCode8<Weight>.at[i] - int(Codes<Weight>::kZero8) + kByteZero);
  return c;
}
template <class Weight> constexpr Code8 kByteCode = make_byte_code<Weight>();
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
