// The group-wise affine format: integer codes with a scale and a float zero for every group of columns
// (QA-LoRA, arXiv:2309.14717; GPTQ, arXiv:2210.17323).
//
//   weight[o, j] ~ scales[o, j / group] * (code[o, j] - zeros[o, j / group]),   0 <= code < 2^bits
//
//   packed  each row is one string of bits, the first code in the lowest bits of the first byte: eight codes
//           take `bits` bytes. Cut into little-endian int32 words and transposed, it is GPTQ's qweight.
//   zeros   any real number, in units of a code. So QA-LoRA merges exactly: a change of the weight that is constant in
// each group changes only the zero.
#pragma once
#include <cstdint>

namespace peftops {

constexpr int64_t kMinGroup = 8, kMaxGroup = 4096;   // group sizes are the powers of two between

// A quantised weight of rows x cols elements, as every kernel below takes it. cols % group == 0.
struct GroupWeight {
  const uint8_t* packed;   // [rows, cols * bits / 8]
  const float* scales;     // [rows, cols / group], none of them 0
  const float* zeros;      // [rows, cols / group]
  int64_t rows, cols;
  int64_t group;
  int64_t bits;            // 2, 3, 4 or 8
};

}  // namespace peftops
