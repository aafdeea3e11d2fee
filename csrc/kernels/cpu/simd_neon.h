// simd.h for NEON, which every CPU of AArch64 has: four lanes, and 32 registers of them.
#pragma once
#include <arm_neon.h>

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

using Vec = float32x4_t;
using Int = int32x4_t;
constexpr int kLanes = 4;

inline Vec as_float(Int a) { return vreinterpretq_f32_s32(a); }
inline Int as_int(Vec a) { return vreinterpretq_s32_f32(a); }
inline Vec zero() { return vdupq_n_f32(0.f); }
inline Vec set(float a) { return vdupq_n_f32(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
// b where either is a NaN, which is not what fmax does.
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec sqrt(Vec a) { return vsqrtq_f32(a); }
inline Vec abs(Vec a) { return vabsq_f32(a); }

inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec a) { vst1q_f32(p, a); }

inline Vec load(const bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
inline uint16x4_t to_bf16(Vec a) {   // a NaN stays a NaN
  const uint32x4_t u = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), up, vdupq_n_u32(0x7fc00000)), 16);
}
inline void store(bf16* p, Vec a) { vst1_u16(reinterpret_cast<uint16_t*>(p), to_bf16(a)); }

inline Vec load(const f16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline void store(f16* p, Vec a) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a))); }

template <class T> inline void stream(T* p, Vec a) { store(p, a); }
// After the last of them, before another thread may read.
inline void stream_end() {}

// A loaded value that stays in its register. Otherwise GCC may load it again for each use, as costly as a load of x.
inline Int read_once(Int v) { asm("" : "+w"(v)); return v; }
inline Int load_int(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline void store_int(void* p, Int a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a)); }
// The first n lanes; the others read as zero, and their memory not at all.
inline Int load_int_n(const void* p, int64_t n) {
  int32_t lane[kLanes] = {};
  memcpy(lane, p, n * sizeof(int32_t));
  return load_int(lane);
}
inline Int load_bytes(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, sizeof four);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}
// Two vectors, one after the other.
inline void store_bytes(uint8_t* p, Int first, Int second) {
  vst1_u8(p, vmovn_u16(vreinterpretq_u16_s16(vcombine_s16(vmovn_s32(first), vmovn_s32(second)))));
}
inline void store_bytes(uint8_t* p, Int a) {
  uint8_t bytes[2 * kLanes];
  store_bytes(bytes, a, a);
  memcpy(p, bytes, kLanes);
}
inline Vec gather(const float* p, Int at) { return Vec{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}; }
inline Int shift_left(Int a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
inline Int shift_right(Int a, int n) {
  return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n)));
}
inline Int max_int(Int a, Int b) { return vmaxq_s32(a, b); }
inline Int truncate(Vec a) { return vcvtq_s32_f32(a); }
inline Int set_int(int32_t a) { return vdupq_n_s32(a); }
inline Vec to_float(Int a) { return vcvtq_f32_s32(a); }

// 4 x 4: pairs, then halves.
inline void transpose(Int (&v)[4]) {
  const auto wide = [](Int a) { return vreinterpretq_s64_s32(a); };
  const auto lanes = [](int64x2_t a) { return vreinterpretq_s32_s64(a); };
  const Int t0 = vtrn1q_s32(v[0], v[1]), t1 = vtrn2q_s32(v[0], v[1]);
  const Int t2 = vtrn1q_s32(v[2], v[3]), t3 = vtrn2q_s32(v[2], v[3]);
  v[0] = lanes(vtrn1q_s64(wide(t0), wide(t2))), v[1] = lanes(vtrn1q_s64(wide(t1), wide(t3)));
  v[2] = lanes(vtrn2q_s64(wide(t0), wide(t2))), v[3] = lanes(vtrn2q_s64(wide(t1), wide(t3)));
}

// Look-ups go by bytes: lane i takes the bytes 4 i to 4 i + 3 of the table.
inline uint8x16_t bytes_of(Int lanes) {
  const uint32x4_t first = vdupq_n_u32(0x03020100);
  return vreinterpretq_u8_u32(vmlaq_u32(first, vreinterpretq_u32_s32(lanes), vdupq_n_u32(0x04040404)));
}
inline Vec permute(Vec a, Int from) {   // lane i gets a[from[i]]
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), bytes_of(from)));
}

struct Table8 {
  uint8x16x2_t values;
  explicit Table8(const float* at) : values(vld1q_u8_x2(reinterpret_cast<const uint8_t*>(at))) {}
  Vec operator()(Int codes) const {
    return vreinterpretq_f32_u8(vqtbl2q_u8(values, bytes_of(vandq_s32(codes, vdupq_n_s32(7)))));
  }
};

struct Table16 {
  uint8x16x4_t values;
  explicit Table16(const float* at) : values(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(at))) {}
  Vec operator()(Int codes) const {
    return vreinterpretq_f32_u8(vqtbl4q_u8(values, bytes_of(vandq_s32(codes, vdupq_n_s32(15)))));
  }
};

struct Table256 {
  const float* at;
  explicit Table256(const float* values) : at(values) {}
  Vec operator()(Int bytes) const { return gather(at, bytes); }
};

// c + (a > b ? step : 0) in each lane; false where either is a NaN.
inline Int add_if_greater(Vec a, Vec b, Int c, int step) {
  return vaddq_s32(c, vandq_s32(vreinterpretq_s32_u32(vcgtq_f32(a, b)), vdupq_n_s32(step)));
}

// Two vectors of codes, one a lane, as 4 packed bytes: the even lane of a pair is the high nibble.
inline void pack_codes(uint8_t* p, Int first, Int second) {
  const Int even = vuzp1q_s32(first, second), odd = vuzp2q_s32(first, second);
  store_bytes(p, vorrq_s32(vshlq_n_s32(even, 4), odd));
}

// One vector of codes, in order. Bits above the low four of a lane are left as they come: Table16 ignores them.
template <bool kHighFirst = true> inline Int unpack_codes(const uint8_t* p) {
  uint16_t two;
  memcpy(&two, p, sizeof two);
  const uint8x8_t bytes = vcreate_u8(two), high = vshr_n_u8(bytes, 4);
  const uint8x8_t codes = kHighFirst ? vzip1_u8(high, bytes) : vzip1_u8(bytes, high);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(codes))));
}

#if defined(PEFTOPS_INT8)
// sum + the four products of unsigned bytes of a with signed ones of b, in each lane.
inline Int dot_bytes(Int sum, Int a, Int b) {
  return vusdotq_s32(sum, vreinterpretq_u8_s32(a), vreinterpretq_s8_s32(b));
}
// Each byte, less than 16, becomes what the table has there.
inline Int look_up_bytes(const uint8_t* table, Int at) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s32(at)));
}
// n whole numbers, a multiple of eight, as bytes; of each eight the even ones before the odd ones.
inline void put_quads(const int32_t* whole, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; i += 8) {
    const Int first = load_int(whole + i), second = load_int(whole + i + 4);
    store_bytes(reinterpret_cast<uint8_t*>(out + i / 4), vuzp1q_s32(first, second), vuzp2q_s32(first, second));
  }
}
#endif

#if defined(PEFTOPS_BF16)
// Pairs of bf16: `first` in the low halves, `second` in the high ones.
inline Int pair_bf16(Vec first, Vec second) {
  const uint16x8_t words = vcombine_u16(to_bf16(first), to_bf16(second));
  return vreinterpretq_s32_u16(vzip1q_u16(words, vextq_u16(words, words, 4)));
}
// Words 0-3 and 4-7, interleaved.
inline Int interleave_halves(Int words) {
  const uint16x8_t w = vreinterpretq_u16_s32(words);
  return vreinterpretq_s32_u16(vzip1q_u16(w, vextq_u16(w, w, 4)));
}
// sum + the two products of pairs, in each lane.
inline Vec dot_bf16(Vec sum, Int a, Int b) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_s32(a), vreinterpretq_bf16_s32(b));
}
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
