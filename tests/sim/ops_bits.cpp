// and or xor not shl shr lop3 shf prmt bfe bfi bfind popc clz brev, comparisons and selections, mov.
#include <algorithm>

#include "ops.h"

namespace sim {
namespace {

struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
struct Not { template <class T> T operator()(T a) const { return T(~a); } };

template <class T> void shift_left(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *n = w.at(i, 2);
  each(lanes, [&](int l) { d[l] = u32(n[l]) >= 8 * sizeof(T) ? 0 : u64(T(a[l] << u32(n[l]))); });
}
template <class T> void shift_right(Warp& w, const Inst& i, u32 lanes) {   // arithmetic if T is signed
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *n = w.at(i, 2);
  constexpr u32 kBits = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const u32 shift = u32(n[l]);
    d[l] = Int<T>::put(shift < kBits ? T(T(a[l]) >> shift) : std::is_signed_v<T> ? T(T(a[l]) >> (kBits - 1)) : T(0));
  });
}

void lop3(Warp& w, const Inst& i, u32 lanes) {   // bit n of the table: the result for a, b, c = the bits of n
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = w.at(i, 3);
  const u32 table = u32(w.at(i, 4)[0]);
  each(lanes, [&](int l) {
    u32 result = 0;
    for (int n = 0; n < 8; ++n)
      if (table >> n & 1) result |= u32((n & 4 ? a[l] : ~a[l]) & (n & 2 ? b[l] : ~b[l]) & (n & 1 ? c[l] : ~c[l]));
    d[l] = result;
  });
}

void funnel_shift(Warp& w, const Inst& i, u32 lanes) {   // of the 64 bits b:a; variant: left, flag: clamp
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = w.at(i, 3);
  each(lanes, [&](int l) {
    const u64 both = (a[l] & 0xffffffff) | b[l] << 32;
    const u32 n = i.flag ? std::min(u32(c[l]), 32u) : u32(c[l]) & 31;
    d[l] = i.variant ? u32(both << n >> 32) : u32(both >> n);
  });
}

void permute(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = w.at(i, 3);
  each(lanes, [&](int l) {
    const u64 bytes = (a[l] & 0xffffffff) | b[l] << 32;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 pick = u32(c[l]) >> 4 * k & 15;
      u8 byte = u8(bytes >> 8 * (pick & 7));
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;   // the sign, spread
      result |= u32(byte) << 8 * k;
    }
    d[l] = result;
  });
}

template <class T> void extract(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *p = w.at(i, 2), *n = w.at(i, 3);
  constexpr u32 kBits = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const u32 from = u32(p[l]) & 255, length = u32(n[l]) & 255;
    u64 r = from >= kBits ? 0 : (a[l] >> from) & low_bits(length);
    const bool negative = std::is_signed_v<T> && length && (a[l] >> std::min(from + length - 1, kBits - 1) & 1);
    if (negative) r |= ~low_bits(from >= kBits ? 0 : std::min(length, kBits - from));
    d[l] = r & low_bits(kBits);
  });
}
void insert(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), *p = w.at(i, 3), *n = w.at(i, 4);
  const u32 bits = 8 * size_of(i.type);
  each(lanes, [&](int l) {
    const u32 from = u32(p[l]) & 255, length = u32(n[l]) & 255;
    const u64 mask = from >= bits ? 0 : low_bits(length) << from & low_bits(bits);
    d[l] = (b[l] & ~mask) | ((from >= bits ? 0 : a[l] << from) & mask);
  });
}

struct PopCount { u32 operator()(u64 a) const { return u32(__builtin_popcountll(a)); } };
struct Reverse {
  u32 operator()(u64 a) const {
    u32 r = 0;
    for (int k = 0; k < 32; ++k) r |= u32(a >> k & 1) << (31 - k);
    return r;
  }
};
template <int Bits>
struct LeadingZeros {
  u32 operator()(u64 a) const { return a ? u32(__builtin_clzll(a)) - (64 - Bits) : Bits; }
};
struct HighestBit { u32 operator()(u64 a) const { return a ? 63 - u32(__builtin_clzll(a)) : ~0u; } };

enum Comparison : u8 { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };
template <class V> bool compare(u8 how, V a, V b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<V>) unordered = std::isnan(a) || std::isnan(b);
  if (how == Num) return !unordered;
  if (how == Nan) return unordered;
  if (unordered) return how >= Equ;
  switch (how < Equ ? how : how - Equ) {
    case Eq: return a == b;
    case Ne: return a != b;
    case Lt: return a < b;
    case Le: return a <= b;
    case Gt: return a > b;
    default: return a >= b;
  }
}

template <class T> void set_predicate(Warp& w, const Inst& i, u32 lanes) {
  const u64 *a = w.at(i, 1), *b = w.at(i, 2);
  u32 p = 0;
  each(lanes, [&](int l) { p |= u32(compare(i.variant, T::get(a[l]), T::get(b[l]))) << l; });
  u32 q = ~p;
  if (i.combine) {
    const u32 other = w.predicate(i.operands[3]);
    if (i.combine == 1) p &= other, q &= other;
    else if (i.combine == 2) p |= other, q |= other;
    else p ^= other, q ^= other;
  }
  w.set_predicate(i.operands[0].slot, lanes, p);
  if (i.operands[0].second >= 0) w.set_predicate(i.operands[0].second, lanes, q);
}
template <class T> void set_predicates_of_halves(Warp& w, const Inst& i, u32 lanes) {
  const u64 *a = w.at(i, 1), *b = w.at(i, 2);
  u32 low = 0, high = 0;
  each(lanes, [&](int l) {
    low |= u32(compare(i.variant, T::get(a[l] & 0xffff), T::get(b[l] & 0xffff))) << l;
    high |= u32(compare(i.variant, T::get(a[l] >> 16 & 0xffff), T::get(b[l] >> 16 & 0xffff))) << l;
  });
  w.set_predicate(i.operands[0].slot, lanes, low);
  w.set_predicate(i.operands[0].second, lanes, high);
}
Handler comparison(Type t, bool ftz) {
  switch (t) {
    case Type::F32: return ftz ? set_predicate<Float<true>> : set_predicate<Float<>>;
    case Type::F64: return set_predicate<Double>;
    case Type::F16: return set_predicate<Half<>>;
    case Type::BF16: return set_predicate<Bfloat<>>;
    case Type::F16x2: return set_predicates_of_halves<Half<>>;
    case Type::BF16x2: return set_predicates_of_halves<Bfloat<>>;
    case Type::S16: return set_predicate<Int<i16>>;
    case Type::S32: return set_predicate<Int<i32>>;
    case Type::S64: return set_predicate<Int<i64>>;
    case Type::U16: case Type::B16: return set_predicate<Int<u16>>;
    case Type::U32: case Type::B32: return set_predicate<Int<u32>>;
    case Type::U64: case Type::B64: return set_predicate<Int<u64>>;
    default: return nullptr;
  }
}

template <int Op> void predicate_logic(Warp& w, const Inst& i, u32 lanes) {
  const u32 a = w.predicate(i.operands[1]), b = Op == 3 ? 0 : w.predicate(i.operands[2]);
  w.set_predicate(i.operands[0].slot, lanes, Op == 0 ? a & b : Op == 1 ? a | b : Op == 2 ? a ^ b : ~a);
}

void select(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), bits = low_bits(8 * size_of(i.type));
  const u32 p = w.predicate(i.operands[3]);
  each(lanes, [&](int l) { d[l] = (p >> l & 1 ? a[l] : b[l]) & bits; });
}

void move(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), bits = low_bits(8 * size_of(i.type));
  each(lanes, [&](int l) { d[l] = a[l] & bits; });
}
void move_predicate(Warp& w, const Inst& i, u32 lanes) {
  w.set_predicate(i.operands[0].slot, lanes, w.predicate(i.operands[1]));
}
void unpack(Warp& w, const Inst& i, u32 lanes) {
  const auto& parts = i.operands[0].parts;
  const u32 bits = 8 * size_of(i.type) / u32(parts.size());
  u64 source[kLanes];   // a part may be the source itself
  std::memcpy(source, w.at(i, 1), sizeof source);
  for (size_t k = 0; k < parts.size(); ++k) {
    if (parts[k] < 0) continue;
    u64* d = w.slot(parts[k]);
    each(lanes, [&](int l) { d[l] = source[l] >> k * bits & low_bits(bits); });
  }
}
void pack(Warp& w, const Inst& i, u32 lanes) {
  const auto& parts = i.operands[1].parts;
  const u32 bits = 8 * size_of(i.type) / u32(parts.size());
  u64 result[kLanes] = {};
  for (size_t k = 0; k < parts.size(); ++k) {
    const u64* a = w.slot(parts[k]);
    each(lanes, [&](int l) { result[l] |= (a[l] & low_bits(bits)) << k * bits; });
  }
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = result[l]; });
}
void read_clock(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = w.block.launch.issued; });
}

Handler decode_move(Inst& i) {
  if (i.operands[0].kind == Operand::Predicate) return move_predicate;
  if (i.operands[0].kind == Operand::Vector) return unpack;
  if (i.operands[1].kind == Operand::Vector) return pack;
  return i.text.find("%clock") != std::string::npos || i.text.find("%globaltimer") != std::string::npos ? read_clock
                                                                                                        : move;
}

}  // namespace

Handler decode_bits(Inst& i, Modifiers& m) {
  const std::string& op = m.op;
  const Type t = i.type;
  const u32 bytes = size_of(t);
  if (op == "mov") return decode_move(i);
  if (op == "selp") return select;
  if (op == "and") return t == Type::Pred ? predicate_logic<0> : of_unsigned<2, And>(bytes);
  if (op == "or") return t == Type::Pred ? predicate_logic<1> : of_unsigned<2, Or>(bytes);
  if (op == "xor") return t == Type::Pred ? predicate_logic<2> : of_unsigned<2, Xor>(bytes);
  if (op == "not") return t == Type::Pred ? predicate_logic<3> : of_unsigned<1, Not>(bytes);
  if (op == "shl") return bytes == 2 ? shift_left<u16> : bytes == 4 ? shift_left<u32> : shift_left<u64>;
  if (op == "shr") {
    if (is_signed(t)) return bytes == 2 ? shift_right<i16> : bytes == 4 ? shift_right<i32> : shift_right<i64>;
    return bytes == 2 ? shift_right<u16> : bytes == 4 ? shift_right<u32> : shift_right<u64>;
  }
  if (op == "lop3") return lop3;
  if (op == "prmt") return permute;
  if (op == "shf") {
    i.variant = m.take("l"), m.take("r");
    i.flag = m.take("clamp"), m.take("wrap");
    return funnel_shift;
  }
  if (op == "bfe") {
    if (is_signed(t)) return bytes == 4 ? extract<i32> : extract<i64>;
    return bytes == 4 ? extract<u32> : extract<u64>;
  }
  if (op == "bfi") return insert;
  if (op == "popc") return map<1, One<Int<u64>>, PopCount>;
  if (op == "brev") return bytes == 4 ? map<1, One<Int<u64>>, Reverse> : nullptr;
  if (op == "clz")
    return bytes == 4 ? map<1, One<Int<u64>>, LeadingZeros<32>> : map<1, One<Int<u64>>, LeadingZeros<64>>;
  if (op == "bfind" && !is_signed(t)) return m.take("shiftamt") ? nullptr : map<1, One<Int<u64>>, HighestBit>;
  if (op == "setp") {
    const int how =
        m.take_any({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
    const int unsigned_how = how < 0 ? m.take_any({"lo", "ls", "hi", "hs"}) : 0;
    if (how < 0 && unsigned_how < 0) return nullptr;
    i.variant = u8(how >= 0 ? how : Lt + unsigned_how);
    i.combine = u8(m.take_any({"and", "or", "xor"}) + 1);
    return comparison(t, m.take("ftz"));
  }
  return nullptr;
}

}  // namespace sim
