// The NF4 format, as bitsandbytes writes it (QLoRA, arXiv:2305.14314).
//
//   weight ~ kNf4Code[code] * absmax[block]     block = flat index / block_size, over the row-major weight
//   packed  two codes a byte, the first element in the high nibble; ceil(n / 2) bytes
//   absmax  float32 per block; or, double-quantised, one byte per block:
//           absmax[b] = dynamic_map[absmax_code[b]] * absmax_scale[b / 256] + absmax_offset
#pragma once
#include <cstdint>

namespace peftops {

// Quantiles of a normal distribution, scaled to [-1, 1]; 0 is exact, and so are both ends. Seven are
// negative and eight positive.
constexpr float kNf4Code[16] = {
    -1.0f,                 -0.6961928009986877f, -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f,  0.16093020141124725f, 0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f,  0.5626170039176941f,  0.7229568362236023f,   1.0f};

constexpr int64_t kMinBlock = 32, kMaxBlock = 4096;   // block sizes are the powers of two between
constexpr int64_t kAbsmaxBlock = 256;                 // absmax values that share one absmax_scale

// The signed 8-bit "dynamic" code of bitsandbytes (arXiv:1511.04561), sorted: 256 values from -0.993
// to 1. Decade e of 7 holds the 2^e midpoints of a uniform split of [0.1, 1], times 10^(e - 6), with
// both signs; 0 and 1 fill the rest.
struct DynamicMap { float at[256]; };

constexpr DynamicMap make_dynamic_map() {
  constexpr float kDecade[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
  DynamicMap map = {};
  int negative = 0, positive = 255;
  map.at[positive--] = 1.f;
  for (int e = 6; e >= 0; --e) {   // from the largest magnitude inwards, which is sorted order
    const int n = 1 << e;
    const float step = (1.f - 0.1f) / float(n);
    // The split's i-th boundary: like torch.linspace, up from 0.1 in the first half and down from 1
    // in the second, each with one rounding (double stands in for a fused multiply-add).
    const auto boundary = [&](int i) {
      return i < (n + 1) / 2 ? float(0.1f + double(step) * i) : float(1.0 - double(step) * (n - i));
    };
    for (int i = n - 1; i >= 0; --i) {
      const float value = kDecade[e] * ((boundary(i) + boundary(i + 1)) / 2.f);
      map.at[negative++] = -value;
      map.at[positive--] = value;
    }
  }
  return map;   // at[127] stays 0
}

constexpr DynamicMap kDynamicMap = make_dynamic_map();

// The bounds between neighbouring codes: below[i] lies halfway between the codes i and i + 1.
struct Nf4Midpoints { float below[16]; };
struct DynamicMidpoints { float below[256]; };

constexpr Nf4Midpoints make_nf4_midpoints() {
  Nf4Midpoints m = {};
  for (int i = 0; i < 15; ++i) m.below[i] = (kNf4Code[i] + kNf4Code[i + 1]) / 2.f;
  m.below[15] = __builtin_inff();
  return m;
}
constexpr DynamicMidpoints make_dynamic_midpoints() {
  DynamicMidpoints m = {};
  for (int i = 0; i < 255; ++i) m.below[i] = (kDynamicMap.at[i] + kDynamicMap.at[i + 1]) / 2.f;
  m.below[255] = __builtin_inff();
  return m;
}
constexpr Nf4Midpoints kNf4Midpoints = make_nf4_midpoints();
constexpr DynamicMidpoints kDynamicMidpoints = make_dynamic_midpoints();

// The cubic kBucket[0] + v * (kBucket[1] + kBucket[2] * v^2) is close to the normal quantiles: its whole part at
// midpoint i is i, and it rises in between. So v is in bucket i only if it lies near midpoint i, and one exact
// comparison with that midpoint decides.
constexpr float kBucket[3] = {7.25f, 11.4f, -4.4f};

constexpr bool each_midpoint_has_its_bucket() {
  const auto bucket = [](float v) { return kBucket[0] + v * (kBucket[1] + kBucket[2] * v * v); };
  for (int i = 0; i < 15; ++i) {
    const float b = bucket(kNf4Midpoints.below[i]);
    if (b < i + 0.2f || b > i + 0.8f) return false;   // a fifth of a bucket is more than rounding can change
  }
  return bucket(-1.f) > 0.1f && bucket(1.f) < 15.f;
}
static_assert(each_midpoint_has_its_bucket());

constexpr float kSmallestAbsmax = 1e-38f;   // bitsandbytes' guard: the reciprocal stays finite

// A quantised weight of rows x cols elements, as every kernel below takes it.
struct Nf4Weight {
  const uint8_t* packed;        // [ceil(rows * cols / 2)]
  const float* absmax;          // [blocks], or null when double-quantised
  const uint8_t* absmax_code;   // [blocks], or null
  const float* absmax_scale;    // [ceil(blocks / 256)], or null
  const float* absmax_offset;   // [1], or null
  int64_t rows, cols;
  int64_t block_size;
  int64_t first;                // flat index of its first element; 0 except for a part of a stack of weights
};

}  // namespace peftops
