// Between packed group-wise codes and numbers: the pieces that quantisation, dequantisation and the products
// share.
#pragma once
#include "kernels/group.h"
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// Calls f with the width of a code as a constant: f(Bits<4>{}) and so on.
template <int B> struct Bits { static constexpr int value = B; };
template <class F> inline void with_bits(int64_t bits, const F& f) {
  switch (bits) {
    case 2: return f(Bits<2>{});
    case 3: return f(Bits<3>{});
    case 4: return f(Bits<4>{});
    case 8: return f(Bits<8>{});
  }
}

// Eight codes of B bits each, as eight bytes and back, in three steps of doubling: fields of 4 B bits in
// every 32, then 2 B in every 16, then B in every 8. Plain loops over many, which the compiler vectorises.
template <int B> struct Octets {
  static constexpr uint64_t kFours = ((1ull << 4 * B) - 1) * 0x0000000100000001;
  static constexpr uint64_t kPairs = ((1ull << 2 * B) - 1) * 0x0001000100010001;
  static constexpr uint64_t kOnes = ((1ull << B) - 1) * 0x0101010101010101;

  static void spread(const uint8_t* packed, int64_t octets, uint8_t* codes) {
    for (int64_t i = 0; i < octets; ++i) {
      uint64_t x = 0;
      for (int b = 0; b < B; ++b) x |= uint64_t(packed[i * B + b]) << 8 * b;
      x = (x | x << (32 - 4 * B)) & kFours;
      x = (x | x << (16 - 2 * B)) & kPairs;
      x = (x | x << (8 - B)) & kOnes;
      memcpy(codes + 8 * i, &x, 8);
    }
  }
  static void squeeze(const uint8_t* codes, int64_t octets, uint8_t* packed) {
    for (int64_t i = 0; i < octets; ++i) {
      uint64_t x;
      memcpy(&x, codes + 8 * i, 8);
      x = (x | x >> (8 - B)) & kPairs;
      x = (x | x >> (16 - 2 * B)) & kFours;
      x |= x >> (32 - 4 * B);
      for (int b = 0; b < B; ++b) packed[i * B + b] = uint8_t(x >> 8 * b);
    }
  }
};

// The products read a row in units, one in each lane: 32 bits that hold the next kCodes codes (24 bits hold
// eight of three bits, 16 bits eight of two).
template <int B> struct Unit {
  static constexpr int kCodes = B == 8 ? 4 : 8, kBytes = kCodes * B / 8;
  static constexpr int64_t kStrip = kCodes * kLanes;   // codes of a whole vector

  static Int load(const uint8_t* p, int64_t n) {
    if constexpr (kBytes == 4) return n == kLanes ? load_int(p) : load_int_n(p, n);
    int32_t lane[kLanes] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int b = 0; b < kBytes; ++b) lane[i] |= p[i * kBytes + b] << 8 * b;
    return load_int(lane);
  }

#if defined(__AVX512F__)
  // One look-up masks and converts: a table of sixteen repeats itself for codes of less than four bits.
  struct Table { float at[16]; };
  static constexpr Table make_table() {
    Table t = {};
    for (int i = 0; i < 16; ++i) t.at[i] = float(i & ((1 << B) - 1));
    return t;
  }
  static constexpr Table kTable = make_table();
  Table16 table{kTable.at};

  Vec code(Int units, int i) const {
    if constexpr (B <= 4) return table(shift_right(units, B * i));
    return to_float(shift_right(units, B * i) & set_int((1 << B) - 1));
  }
#else
  Vec code(Int units, int i) const { return to_float(shift_right(units, B * i) & set_int((1 << B) - 1)); }
#endif
};

// out[i] = weight[row, col + i] for i < n. Both col and n are multiples of eight, as group sizes are.
template <int B, class T> void decode_row(const GroupWeight& w, int64_t row, int64_t col, int64_t n, T* out) {
  const int64_t groups = w.cols / w.group, end = col + n;
  const float *scales = w.scales + row * groups, *zeros = w.zeros + row * groups;
  const Unit<B> unit;
  // From `col` to `stop`, group by group: codes_at(i) holds the codes of columns i on, one a lane.
  const auto decode = [&](int64_t stop, const auto& codes_at) {
    while (col < stop) {
      const int64_t group = col / w.group, last = at_most(stop, (group + 1) * w.group);
      const Vec scale = set(scales[group]), zero = set(zeros[group]);
      const auto value = [&](int64_t i) { return (unit.code(codes_at(i), 0) - zero) * scale; };
      for (; col + kLanes <= last; col += kLanes, out += kLanes) store(out, value(col));
      if (col < last) store_n(out, last - col, value(col)), out += last - col, col = last;
    }
  };
  const uint8_t* packed = w.packed + row * w.cols / 8 * B;
  if constexpr (B == 4) {
    if (w.group >= kLanes) return decode(end, [&](int64_t i) { return unpack_codes<false>(packed + i / 2); });
  }
  constexpr int64_t kChunk = 1024;   // codes that are spread before any is read: they stay in L1
  uint8_t spread[kChunk + kLanes];
  while (col < end) {
    const int64_t begin = col, stop = at_most(end, col + kChunk);
    Octets<B>::spread(packed + col / 8 * B, (stop - col) / 8, spread);
    decode(stop, [&](int64_t i) { return load_bytes(spread + i - begin); });
  }
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
