// cvt: every number type into every other.
#include <algorithm>

#include "ops.h"

namespace sim {

float half_to_float(u16 h) {
  static const auto table = [] {
    std::vector<float> t(1 << 16);
    for (u32 v = 0; v < t.size(); ++v) {
      const u32 exponent = v >> 10 & 31, fraction = v & 1023;
      const float magnitude = exponent == 0    ? float(fraction) * 0x1p-24f
                              : exponent == 31 ? as<float>(0x7f800000u | fraction << 13)
                                               : as<float>((exponent + 112) << 23 | fraction << 13);
      t[v] = as<float>(as<u32>(magnitude) | (v & 0x8000) << 16);
    }
    return t;
  }();
  return table[h];
}

namespace {

enum Rounding : u8 { Nearest, Even, Zero, Down, Up };   // Nearest: of the format; the others to whole numbers

double to_whole(double v, u8 how) {
  switch (how) {
    case Even: return std::nearbyint(v);
    case Zero: return std::trunc(v);
    case Down: return std::floor(v);
    case Up: return std::ceil(v);
    default: return v;
  }
}

double read_float(u64 v, Type t, bool ftz) {
  switch (t) {
    case Type::F64: return as<double>(v);
    case Type::F16: return half_to_float(u16(v));
    case Type::BF16: return bfloat_to_float(u16(v));
    default: return ftz ? flush(as<float>(u32(v))) : as<float>(u32(v));
  }
}
u64 write_float(double v, Type t, bool ftz) {
  switch (t) {
    case Type::F64: return as<u64>(v);
    case Type::F16: return Half<>::put(v);
    case Type::BF16: return Bfloat<>::put(v);
    case Type::TF32: return (as<u32>(float(v)) + 0x1000) & ~0x1fffu;   // rna: halfway cases away from zero
    default: return as<u32>(ftz ? flush(float(v)) : float(v));
  }
}

i64 sign_extended(u64 v, Type t) {
  const u32 unused = 64 - 8 * size_of(t);
  return is_signed(t) ? i64(v << unused) >> unused : i64(v << unused >> unused);
}

struct Limits { double low, high; };   // both exact, or one past what fits in the case of 64 bits
Limits limits_of(Type t) {
  const int bits = 8 * int(size_of(t));
  return is_signed(t) ? Limits{-std::ldexp(1, bits - 1), std::ldexp(1, bits - 1)} : Limits{0, std::ldexp(1, bits)};
}
u64 float_to_int(double v, Type t) {   // out of range saturates
  if (std::isnan(v)) return size_of(t) == 8 ? 1ull << 63 : 0;
  const Limits limits = limits_of(t);
  if (v >= limits.high) return is_signed(t) ? low_bits(8 * size_of(t) - 1) : low_bits(8 * size_of(t));
  if (v <= limits.low) return is_signed(t) ? 1ull << (8 * size_of(t) - 1) : 0;
  return is_signed(t) ? u64(i64(v)) : u64(v);
}
u64 int_to_int(u64 v, Type from, Type to, bool sat) {
  const i64 x = sign_extended(v, from);
  if (!sat) return u64(x);
  const __int128 wide = is_signed(from) ? __int128(x) : __int128(u64(x));
  const u32 bits = 8 * size_of(to);
  const __int128 low = is_signed(to) ? -(__int128(1) << (bits - 1)) : 0;
  const __int128 high = (__int128(1) << (is_signed(to) ? bits - 1 : bits)) - 1;
  return u64(std::clamp(wide, low, high));
}

// variant: Rounding; flag: .sat; combine: .ftz; k: bits of the destination register, to whose width a signed
// result is extended.
void convert(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64* a = w.at(i, 1);
  const Type to = i.type, from = i.type2;
  const u64 bits = low_bits(u32(i.k));
  each(lanes, [&](int l) {
    u64 r;
    if (is_float(from)) {
      const double v = to_whole(read_float(a[l], from, i.combine), i.variant);
      if (is_float(to)) r = write_float(i.flag ? (v > 0 ? std::min(v, 1.0) : 0.0) : v, to, i.combine);
      else r = u64(sign_extended(float_to_int(v, to), to));
    } else if (is_float(to)) {
      const i64 x = sign_extended(a[l], from);
      if (to == Type::F32) r = as<u32>(is_signed(from) ? float(x) : float(u64(x)));
      else r = write_float(is_signed(from) ? double(x) : double(u64(x)), to, false);
    } else {
      r = u64(sign_extended(int_to_int(a[l], from, to, i.flag), to));
    }
    d[l] = r & bits;
  });
}

template <class T> void convert_two(Warp& w, const Inst& i, u32 lanes) {   // the first source goes to the high half
  u64* d = w.at(i, 0);
  const u64 *high = w.at(i, 1), *low = w.at(i, 2);
  each(lanes, [&](int l) { d[l] = T::put(as<float>(u32(high[l]))) << 16 | T::put(as<float>(u32(low[l]))); });
}

}  // namespace

Handler decode_convert(Inst& i, Modifiers& m, const Function& f) {
  if (m.op != "cvt") return nullptr;
  if (i.type == Type::F16x2 || i.type == Type::BF16x2) {
    if (i.type2 != Type::F32) return nullptr;
    m.take("rn");
    return i.type == Type::F16x2 ? convert_two<Half<>> : convert_two<Bfloat<>>;
  }
  const int whole = m.take_any({"rni", "rzi", "rmi", "rpi"});
  i.variant = u8(whole + 1);
  if (is_float(i.type) && is_float(i.type2) && whole < 0) m.take(i.type == Type::TF32 ? "rna" : "rn");
  else m.take("rn");
  i.flag = m.take("sat");
  i.combine = m.take("ftz");
  if (is_float(i.type2) && !is_float(i.type) && whole < 0) return nullptr;
  i.k = int(f.width[i.operands[0].slot]);
  return convert;
}

}  // namespace sim
