// From packed NF4 codes back to floats: the pieces that dequantisation and the products share.
#pragma once
#include "kernels/nf4.h"
#include "kernels/cpu/codes4.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The absmax of one block. Multiplied and added with two roundings, like bitsandbytes.
inline float absmax_of(const Nf4Weight& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return kDynamicMap.at[w.absmax_code[block]] * w.absmax_scale[block / kAbsmaxBlock] + *w.absmax_offset;
}

// The same for n blocks in a row.
inline void decode_absmax(const Nf4Weight& w, int64_t block, int64_t n, float* out) {
  if (w.absmax) return void(memcpy(out, w.absmax + block, n * sizeof(float)));
  const Table256 table(kDynamicMap.at);
  const Vec offset = set(*w.absmax_offset);
  for (int64_t i = 0; i < n;) {
    const int64_t group = (block + i) / kAbsmaxBlock, stop = at_most(n, (group + 1) * kAbsmaxBlock - block);
    const Vec scale = set(w.absmax_scale[group]);
    for (; i + kLanes <= stop; i += kLanes)
      store(out + i, table(load_bytes(w.absmax_code + block + i)) * scale + offset);
    for (; i < stop; ++i) out[i] = absmax_of(w, block + i);
  }
}

// out[s][lane]: the absmax of the s-th of four blocks from flat + lane * stride on. Where rows are multiples of four blocks,
// and so flat, one dword holds the codes of all four, and they have one scale. Returns false elsewhere.
inline bool decode_lanes(const Nf4Weight& w, int64_t flat, int64_t stride, int64_t segment, int64_t n, float* out) {
  const int64_t block = flat / segment, blocks = stride / segment;
  if (w.absmax || segment != w.block_size || n != 4 || stride % (4 * segment)) return false;
  static_assert(kAbsmaxBlock % 4 == 0);
  int32_t codes[kLanes];
  float scales[kLanes];
  for (int64_t i = 0, at = block; i < kLanes; ++i, at += blocks) {
    memcpy(codes + i, w.absmax_code + at, 4);
    scales[i] = w.absmax_scale[at / kAbsmaxBlock];
  }
  const Table256 table(kDynamicMap.at);
  const Vec scale = load(scales), offset = set(*w.absmax_offset);
  const Int four = load_int(codes);
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s)
    store(out + s * kLanes, table(shift_right(four, 8 * s) & set_int(255)) * scale + offset);
  return true;
}

// out[i] = weight[flat + i] for i < n, for any alignment of flat: one run per block.
template <class T> void decode_run(const Nf4Weight& w, int64_t flat, int64_t n, T* out) {
  const Table16 table(kNf4Code);
  while (n > 0) {
    const int64_t block = flat / w.block_size, run = at_most(n, (block + 1) * w.block_size - flat);
    const Vec scale = set(absmax_of(w, block));
    int64_t i = 0;
    if (flat & 1) {   // start in the middle of a byte
      const uint8_t second[kLanes / 2] = {uint8_t(w.packed[flat / 2] << 4)};
      store_n(out, 1, table(unpack_codes(second)) * scale);
      i = 1;
    }
    const uint8_t* packed = w.packed + (flat + i) / 2;
    int64_t at = 0;
    for (; i + kLanes <= run; i += kLanes, at += kLanes / 2)
      store(out + i, table(unpack_codes(packed + at)) * scale);
    if (i < run) {
      uint8_t tail[kLanes / 2] = {};
      memcpy(tail, packed + at, (run - i + 1) / 2);
      store_n(out + i, run - i, table(unpack_codes(tail)) * scale);
    }
    flat += run, out += run, n -= run;
  }
}

inline bool is_regular(const Nf4Weight& w) { return w.cols % 32 == 0; }

template <> struct Codes<Nf4Weight> {
  static constexpr const float (&at)[16] = kNf4Code;
  static constexpr bool kHighFirst = true;
  static constexpr float kFactor16 = 7854.f;   // brings the codes nearest to whole numbers
  static constexpr float kFactorBf16 = 1.37451171875f;
  // Of all factors that keep codes below 256, this one gives the least error in a normal weight: 0.47 % of it, root of
  // the mean square; 127 gives 0.59 %. 0 stays exact.
  static constexpr float kFactor8 = 124.115f, kZero8 = 128.f;

  static bool is_regular(const Nf4Weight& w) { return PEFTOPS_ISA::is_regular(w); }
  static float scale_of(const Nf4Weight& w, int64_t block) { return absmax_of(w, block); }
  static void scales(const Nf4Weight& w, int64_t block, int64_t n, float* out) { decode_absmax(w, block, n, out); }
  static bool scales_of_lanes(const Nf4Weight& w, int64_t flat, int64_t stride, int64_t segment, int64_t n, float* out) {
    return decode_lanes(w, flat, stride, segment, n, out);
  }
  static void run(const Nf4Weight& w, int64_t flat, int64_t n, float* out) { decode_run(w, flat, n, out); }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
