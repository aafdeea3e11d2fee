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
// every 32, then 2 B in every 16, then B in every 8.
template <int B> struct Octet {
  static constexpr uint64_t kFours = ((1ull << 4 * B) - 1) * 0x0000000100000001;
  static constexpr uint64_t kPairs = ((1ull << 2 * B) - 1) * 0x0001000100010001;
  static constexpr uint64_t kOnes = ((1ull << B) - 1) * 0x0101010101010101;

  static uint64_t spread(const uint8_t* packed) {
    uint64_t x = 0;
    memcpy(&x, packed, B);
    x = (x | x << (32 - 4 * B)) & kFours;
    x = (x | x << (16 - 2 * B)) & kPairs;
    return (x | x << (8 - B)) & kOnes;
  }
  static void squeeze(const uint8_t* codes, uint8_t* packed) {
    uint64_t x;
    memcpy(&x, codes, 8);
    x = (x | x >> (8 - B)) & kPairs;
    x = (x | x >> (16 - 2 * B)) & kFours;
    x |= x >> (32 - 4 * B);
    memcpy(packed, &x, B);
  }
};

// out[i] = weight[row, col + i] for i < n. Both col and n are multiples of eight, as group sizes are.
template <int B, class T> void decode_row(const GroupWeight& w, int64_t row, int64_t col, int64_t n, T* out) {
  constexpr int64_t kChunk = kLanes > 8 ? kLanes : 8;
  const int64_t groups = w.cols / w.group;
  while (n > 0) {
    const int64_t group = col / w.group, run = at_most(n, (group + 1) * w.group - col);
    const Vec scale = set(w.scales[row * groups + group]), zero = set(w.zeros[row * groups + group]);
    const uint8_t* packed = w.packed + (row * w.cols + col) / 8 * B;
    for (int64_t i = 0; i < run; i += kChunk) {
      uint64_t codes[kChunk / 8] = {};
      const int64_t m = at_most(kChunk, run - i);
      for (int64_t o = 0; o < m / 8; ++o) codes[o] = Octet<B>::spread(packed + (i / 8 + o) * B);
      for (int64_t l = 0; l < m; l += kLanes) {
        const Vec code = to_float(load_bytes(reinterpret_cast<const uint8_t*>(codes) + l));
        const Vec value = (code - zero) * scale;
        m - l < kLanes ? store_n(out + i + l, m - l, value) : store(out + i + l, value);
      }
    }
    col += run, out += run, n -= run;
  }
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
