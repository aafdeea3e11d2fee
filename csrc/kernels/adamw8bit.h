// One step of AdamW whose moments are kept in 8 bits: the contract between the kernels and everyone above them.
//
//   m = beta1 m + (1 - beta1) g         v = beta2 v + ((1 - beta2) g) g
//   p = decay p - (size m) / (sqrt(v) + floor)
//   decay = 1 - lr weight_decay     size = lr c / (1 - beta1^step)     floor = eps c     c = sqrt(1 - beta2^step)
//
// Every operation is rounded to float32 by itself, in the order written, so the bits are the same on every device.
// Moments are float32, or codes of the dynamic map in blocks of `block_size`:
//
//   m = sign * value(|first - 127|) * first_absmax[block]       v = value(second) * |second_absmax[block]|
//
// The map splits [0.1, 1] times 10^(e - 6), for e of 0 to 6, into 2^e equal intervals (2^(e + 1) for v). A code is the
// index of the interval in which a number divided by its block's absmax lies; the value of the code is the middle of
// the interval. 0 and 1 have codes of their own, and v > 0 never becomes 0.
//
// An element that is not finite, or has v > 2^63, is left out of its block's absmax, so the block's other elements keep
// their moments. Its second code is 0. Its first code is the exponent of v rounded up to a power of two, at least 191,
// and its m is 0. The second_absmax of such a block has a negative sign. If an element of such a block has v = 0 and a
// first code of 191 or more, its second code is 1.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"

namespace peftops {

struct AdamWTensor {
  void* parameter;        // [n] of dtype
  const void* grad;       // [n] of grad_dtype
  void* first;            // codes [blocks * block_size], or float32 [n]
  void* second;           // as first
  float* first_absmax;    // [blocks], or null: the moments are float32
  float* second_absmax;   // as first_absmax
  int64_t n;
  int64_t units_before;   // of kAdamWUnit elements, in the tensors before this one
  DType dtype, grad_dtype;
};

struct AdamW8bit {
  const AdamWTensor* tensors;   // [count], in the host's memory
  int64_t count, units, block_size;
  float decay, beta1, rest1, beta2, rest2, size, floor;   // rest = 1 - beta
};

constexpr int64_t kAdamWUnit = 4096;   // elements: the largest block

// For x in [0, 1] let e be the number of bounds below x. Then the index of the interval of x is the whole part of
// slope[e] * x + offset[e]. The middle of interval k is a linear function of k + 0.5, or of k + 1.5 for v, and the
// exponent of that number gives the decade. The low three bits of the exponent are the index here. Zero and one have
// the same index, and one line fits both.
struct DynamicCode { float bound[8], slope[8], offset[8], value_slope[8], value_offset[8]; };

constexpr DynamicCode make_dynamic_code(bool is_signed) {
  DynamicCode c = {};
  double ten = 1e-6;   // 10^(e - 6)
  for (int e = 0; e < 7; ++e, ten *= 10) {
    const double n = is_signed ? 1 << e : 2 << e;
    c.bound[e] = e < 6 ? float(ten) : __builtin_inff();
    c.slope[e] = float(n / (0.9 * ten));
    // A reciprocal may put the largest number itself just below 1, so all numbers are moved up a little.
    c.offset[e] = float(n * (8. / 9.) - (is_signed ? 0.5 : 1.) + 0x1p-16);
    const int at = (is_signed ? e + 7 : e) & 7;
    c.value_slope[at] = float(0.9 * ten / n);
    c.value_offset[at] = float(-0.8 * ten);
  }
  c.bound[7] = c.bound[6], c.slope[7] = c.slope[6], c.offset[7] = c.offset[6];   // where an estimate of e may end
  const int ends = is_signed ? 6 : 7;
  c.value_slope[ends] = float(is_signed ? 1. / 128. : (1. + 0x1p-24) / 255.);
  c.value_offset[ends] = -(is_signed ? 0.5f : 1.5f) * c.value_slope[ends];
  return c;
}
constexpr DynamicCode kFirstCode = make_dynamic_code(true), kSecondCode = make_dynamic_code(false);

constexpr float place_of(const DynamicCode& c, float x) {
  int e = 0;
  while (x > c.bound[e]) ++e;
  const float product = c.slope[e] * x;
  return product + c.offset[e];
}
constexpr float kBelowOne = 1 - 0x1p-24f, kAboveOne = 1 + 0x1p-23f;   // what a reciprocal makes of one
static_assert(127.5f + place_of(kFirstCode, kBelowOne) >= 255 && 127.5f - place_of(kFirstCode, kAboveOne) > -1);
static_assert(place_of(kSecondCode, kBelowOne) >= 255 && place_of(kSecondCode, kAboveOne) < 256);
static_assert(place_of(kFirstCode, 0) < 0.5f && place_of(kSecondCode, 0) < 1);

constexpr float of_code(const DynamicCode& c, float place, int at) {
  const float product = place * c.value_slope[at];
  return product + c.value_offset[at];
}
static_assert(of_code(kFirstCode, 0.5f, 6) == 0 && of_code(kFirstCode, 128.5f, 6) == 1);
static_assert(of_code(kSecondCode, 1.5f, 7) == 0 && of_code(kSecondCode, 256.5f, 7) == 1);

constexpr float kMostSecond = 0x1p63f, kLeastAbsmax = 1e-38f;   // the latter's reciprocal is finite
constexpr int kLeastMark = 191;                                 // the exponent of 2^64

PEFTOPS_CPU_KERNELS(Kernel<AdamW8bit> adamw8bit;)

#ifdef PEFTOPS_CUDA
namespace cuda { Kernel<AdamW8bit> adamw8bit; }
#endif

}  // namespace peftops
