// The vocabulary of the interpreter: integers by width, PTX types, and the one error it throws.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sim {

using u8 = uint8_t;   using i8 = int8_t;
using u16 = uint16_t; using i16 = int16_t;
using u32 = uint32_t; using i32 = int32_t;
using u64 = uint64_t; using i64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAllLanes = ~0u;

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

enum class Type : u8 {
  None, Pred, B8, U8, S8, B16, U16, S16, F16, BF16, B32, U32, S32, F32, TF32, F16x2, BF16x2, B64, U64, S64, F64, B128
};

Type type_of(const std::string& suffix);   // "u32" -> U32; None if it names no type

constexpr u32 size_of(Type t) {
  switch (t) {
    case Type::None: case Type::Pred: case Type::B8: case Type::U8: case Type::S8: return 1;
    case Type::B16: case Type::U16: case Type::S16: case Type::F16: case Type::BF16: return 2;
    case Type::B64: case Type::U64: case Type::S64: case Type::F64: return 8;
    case Type::B128: return 16;
    default: return 4;
  }
}
constexpr bool is_signed(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }
constexpr bool is_float(Type t) {
  return t == Type::F16 || t == Type::BF16 || t == Type::F32 || t == Type::TF32 || t == Type::F64;
}
constexpr u64 low_bits(u32 n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// Calls f(lane) for every lane of the mask.
template <class F> inline void each(u32 mask, F f) {
  if (mask == kAllLanes)
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  else
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

template <class To, class From> inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From), "as() reinterprets bits");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

}  // namespace sim
