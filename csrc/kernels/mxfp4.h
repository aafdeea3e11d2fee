// The MXFP4 format of OCP's microscaling specification 1.0, as in checkpoints of gpt-oss.
//
//   weight[o, j] ~ kE2m1[code] * 2^(scale[o, j / 32] - 127)
//
//   packed  FP4 codes (E2M1: a sign, two bits of exponent, one of mantissa), two a byte, the first in the low nibble
//   scales  a byte for each 32 columns (E8M0: an exponent); 255 is NaN
//
// Products of a code and a scale are exact in fp32, except those beyond its range, which become infinite.
#pragma once
#include <cstdint>

namespace peftops {

constexpr float kE2m1[16] = {0.f,  0.5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                             -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
constexpr int kE2m1Exponent = 2;   // of its largest numbers
constexpr int64_t kMxBlock = 32;   // columns that share a scale

// The numbers that scales stand for.
struct E8m0 { float at[256]; };
constexpr E8m0 make_e8m0() {
  E8m0 table = {};
  table.at[0] = 0x1p-127f;
  for (int i = 1; i < 255; ++i) table.at[i] = table.at[i - 1] * 2;
  table.at[255] = __builtin_nanf("");
  return table;
}
constexpr E8m0 kE8m0 = make_e8m0();

// A quantised weight of rows x cols elements, as every kernel below takes it. cols % 32 == 0.
struct Mxfp4Weight {
  const uint8_t* packed;   // [rows, cols / 2]
  const uint8_t* scales;   // [rows, cols / 32]
  int64_t rows, cols;

  static constexpr int64_t block_size = kMxBlock, first = 0;   // as Nf4Weight has them
};

}  // namespace peftops
