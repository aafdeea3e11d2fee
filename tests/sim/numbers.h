// What a register holds, seen as a number: how each PTX type is read from 64 bits and rounded back into them.
#pragma once
#include <cmath>
#include <type_traits>

#include "types.h"

namespace sim {

float half_to_float(u16 h);   // a table

inline u16 half_of(float f) {   // to nearest, ties to even; every NaN becomes 0x7fff, as on the hardware
  const u32 x = as<u32>(f), magnitude = x & 0x7fffffff;
  const u16 sign = u16(x >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= as<u32>(65520.f)) return sign | 0x7c00;
  if (magnitude < as<u32>(0x1p-14f))   // below the normal halves: the adder rounds to multiples of 2^-24
    return sign | u16(as<u32>(as<float>(magnitude) + 0.5f) - as<u32>(0.5f));
  const u32 rebiased = magnitude - (112u << 23);
  return sign | u16((rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

inline float bfloat_to_float(u16 b) { return as<float>(u32(b) << 16); }
inline u16 bfloat_of(float f) {
  const u32 x = as<u32>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

// Rounding to odd keeps what a later, coarser rounding must know: that something was cut off.
inline double add_to_odd(double a, double b) {
  const double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  if (!std::isfinite(sum) || error == 0) return sum;
  u64 x = as<u64>(sum);
  if ((error > 0) != (sum > 0)) --x;   // towards zero
  return as<double>(x | 1);
}
inline float float_to_odd(double d) {
  const float f = float(d);
  if (!std::isfinite(f) || double(f) == d) return f;
  u32 x = as<u32>(f);
  if (std::fabs(double(f)) > std::fabs(d)) --x;
  return as<float>(x | 1);
}

inline float flush(float f) { return std::fabs(f) < 0x1p-126f ? std::copysign(0.f, f) : f; }
inline float saturate(float f) { return f > 0.f ? (f < 1.f ? f : 1.f) : 0.f; }   // NaN becomes 0

template <class T> struct Int {
  using Value = T;
  static T get(u64 v) { return T(v); }
  static u64 put(T v) { return u64(std::make_unsigned_t<T>(v)); }
};
template <bool Ftz = false, bool Sat = false> struct Float {
  using Value = float;
  static float get(u64 v) { return Ftz ? flush(as<float>(u32(v))) : as<float>(u32(v)); }
  static u64 put(float f) {
    if (Sat) f = saturate(f);
    return as<u32>(Ftz ? flush(f) : f);
  }
};
struct Double {
  using Value = double;
  static double get(u64 v) { return as<double>(v); }
  static u64 put(double v) { return as<u64>(v); }
};
template <bool Sat = false> struct Half {
  using Value = float;
  static float get(u64 v) { return half_to_float(u16(v)); }
  static u64 put(float f) { return half_of(Sat ? saturate(f) : f); }
  static u64 put(double d) { return put(float_to_odd(d)); }
};
template <bool Sat = false> struct Bfloat {
  using Value = float;
  static float get(u64 v) { return bfloat_to_float(u16(v)); }
  static u64 put(float f) { return bfloat_of(Sat ? saturate(f) : f); }
  static u64 put(double d) { return put(float_to_odd(d)); }
};

// How an operation reaches the numbers of a register: one, or two halves.
template <class T> struct One {
  template <class F, class... A> static u64 apply(F f, A... a) { return T::put(f(T::get(a)...)); }
};
template <class T> struct Two {
  template <class F, class... A> static u64 apply(F f, A... a) {
    return T::put(f(T::get(a & 0xffff)...)) | T::put(f(T::get(a >> 16 & 0xffff)...)) << 16;
  }
};

}  // namespace sim
