// From packed MXFP4 codes back to floats: the pieces that dequantisation and the products share.
#pragma once
#include "kernels/mxfp4.h"
#include "kernels/cpu/codes4.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// out[i] = weight[flat + i] for i < n, both multiples of kLanes. A block is one, too.
template <class T> void decode_run(const Mxfp4Weight& w, int64_t flat, int64_t n, T* out) {
  const Table16 table(kE2m1);
  const uint8_t* packed = w.packed + flat / 2;
  for (int64_t i = 0; i < n; i += kLanes)
    store(out + i, table(unpack_codes<false>(packed + i / 2)) * set(kE8m0.at[w.scales[(flat + i) / kMxBlock]]));
}
static_assert(kMxBlock % kLanes == 0);

template <> struct Codes<Mxfp4Weight> {
  static constexpr const float (&at)[16] = kE2m1;
  static constexpr bool kHighFirst = false;
  static constexpr float kFactor16 = 1364.f, kFactorBf16 = 1.f, kFactor8 = 2.f, kZero8 = 12.f;   // codes are multiples of 1/2, and exact

  static bool is_regular(const Mxfp4Weight&) { return true; }
  static float scale_of(const Mxfp4Weight& w, int64_t block) { return kE8m0.at[w.scales[block]]; }
  static void scales(const Mxfp4Weight& w, int64_t block, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const Int bits = shift_left(load_bytes(w.scales + block + i), 23);   // the exponent; 0 stands for 2^-127
      const Vec power = as_float(max_int(bits, set_int(0x00400000)));
      store(out + i, power + (power - power));                             // of 255, an infinity here, a NaN
    }
    for (; i < n; ++i) out[i] = scale_of(w, block + i);
  }
  static bool scales_of_lanes(const Mxfp4Weight&, int64_t, int64_t, int64_t, int64_t, float*) { return false; }
  static void run(const Mxfp4Weight& w, int64_t flat, int64_t n, float* out) { decode_run(w, flat, n, out); }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
