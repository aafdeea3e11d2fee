// 2^x for x <= 0: a softmax needs no other x after its maximum is subtracted.
//
// x = n + f with n whole and |f| <= 1/2. A polynomial gives 2^f: of degree 6, with the smallest possible maximum of the
// relative error, 2e-9. So the error is only fp32 rounding, below 2^-22 in all. n goes straight into the exponent.
// Below 2^-126 the result is 0; a NaN stays a NaN.
#pragma once
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

inline Vec exp2(Vec x) {
  constexpr float kBias = 127.f, kRound = 0x1.8p23f;   // adding kRound leaves a whole number in the low bits
  x = max(set(-kBias), x);                             // in this order, so that a NaN comes through
  const Vec whole = x + set(kRound + kBias);
  const Vec f = x - (whole - set(kRound + kBias));
  Vec p = set(0x1.41fbbcp-13f);
  p = fma(p, f, set(0x1.5f3e54p-10f));
  p = fma(p, f, set(0x1.3b2d4cp-7f));
  p = fma(p, f, set(0x1.c6aee8p-5f));
  p = fma(p, f, set(0x1.ebfbdcp-3f));
  p = fma(p, f, set(0x1.62e430p-1f));
  p = fma(p, f, set(1.f));
  return p * as_float(shift_left(as_int(whole), 23));
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
