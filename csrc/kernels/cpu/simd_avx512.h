// simd.h for AVX-512 F, BW, DQ, VL and VNNI (servers since 2019, Zen 4).
#pragma once
#include <immintrin.h>

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

using Vec = __m512;
using Int = __m512i;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set(float a) { return _mm512_set1_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }   // b where either is a NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a); }

inline Vec load(const bf16* p) {
  const Int w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
inline __m256i to_bf16(Vec a) {   // a NaN stays a NaN
  const Int u = _mm512_castps_si512(a);
  const Int odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const Int up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(_mm512_srli_epi32(up, 16), nan, 0x7fc0));
}
inline __m256i to_f16(Vec a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }

inline Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(f16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }
inline void stream(f16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }
// After the last of them, before another thread may read.
inline void stream_end() { _mm_sfence(); }

// A loaded value that stays in its register. Otherwise GCC may load it again for each use, as costly as a load of x.
inline Int read_once(Int v) { asm("" : "+v"(v)); return v; }
inline Int load_int(const void* p) { return _mm512_loadu_si512(p); }
inline void store_int(void* p, Int a) { _mm512_storeu_si512(p, a); }
// The first n lanes; the others read as zero, and their memory not at all.
inline Int load_int_n(const void* p, int64_t n) { return _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p); }
inline Int load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_bytes(uint8_t* p, Int a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
inline void store_bytes(uint8_t* p, Int first, Int second) {
  store_bytes(p, first);
  store_bytes(p + kLanes, second);
}
inline Vec gather(const float* p, Int at) { return _mm512_i32gather_ps(at, p, 4); }
inline Int shift_left(Int a, int n) { return Int(__v16su(a) << n); }
inline Int shift_right(Int a, int n) { return Int(__v16su(a) >> n); }
inline Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }
inline Int truncate(Vec a) { return _mm512_cvttps_epi32(a); }
inline Int round_to_int(Vec a) { return _mm512_cvtps_epi32(a); }   // to nearest even
inline Int set_int(int32_t a) { return _mm512_set1_epi32(a); }
inline Vec to_float(Int a) { return _mm512_cvtepi32_ps(a); }
inline Vec permute(Vec a, Int from) { return _mm512_permutexvar_ps(from, a); }   // lane i gets a[from[i]]
inline Vec as_float(Int a) { return _mm512_castsi512_ps(a); }
inline Int as_int(Vec a) { return _mm512_castps_si512(a); }

// 16 x 16: pairs, then quadruples inside each 128-bit part, then the parts themselves.
inline void transpose(Int (&v)[16]) {
  Int t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

struct Table8 {
  Vec values;
  explicit Table8(const float* at) : values(_mm512_broadcast_f32x8(_mm256_loadu_ps(at))) {}
  Vec operator()(Int codes) const { return _mm512_permutexvar_ps(codes, values); }
};

// vpermps reads only the low four bits of an index: codes need no mask.
struct Table16 {
  Vec values;
  explicit Table16(const float* at) : values(load(at)) {}
  Vec operator()(Int codes) const { return _mm512_permutexvar_ps(codes, values); }
};

// 256 values, looked up by a byte in each lane: out of registers, in half the time of a gather.
struct Table256 {
  Vec values[16];
  explicit Table256(const float* at) {
    for (int i = 0; i < 16; ++i) values[i] = load(at + i * kLanes);
  }
  Vec operator()(Int codes) const {
    Vec v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = _mm512_permutex2var_ps(values[2 * i], codes, values[2 * i + 1]);
#pragma GCC unroll 3
    for (int bit = 5; bit < 8; ++bit) {   // each halves what is left to choose from; the rest of v no longer counts
      const __mmask16 set = _mm512_test_epi32_mask(codes, set_int(1 << bit));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = _mm512_mask_blend_ps(set, v[2 * i], v[2 * i + 1]);
    }
    return v[0];
  }
};

// c + (a > b ? step : 0) in each lane; false where either is a NaN.
inline Int add_if_greater(Vec a, Vec b, Int c, int step) {
  return _mm512_mask_add_epi32(c, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), c, _mm512_set1_epi32(step));
}

// Two vectors of codes, one a lane, as 16 packed bytes: the even lane of a pair is the high nibble.
inline void pack_codes(uint8_t* p, Int first, Int second) {
  const Int words = _mm512_packs_epi32(first, second);   // interleaved by 128-bit parts
  const Int pairs = _mm512_madd_epi16(words, _mm512_set1_epi32(16 | 1 << 16));
  const Int order = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(order, pairs));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// One vector of codes, in order. Bits above the low four of a lane are left as they come: Table16 ignores them.
template <bool kHighFirst = true> inline Int unpack_codes(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_srli_epi16(bytes, 4);
  return _mm512_cvtepu8_epi32(kHighFirst ? _mm_unpacklo_epi8(high, bytes) : _mm_unpacklo_epi8(bytes, high));
}

// sum + the four products of unsigned bytes of a with signed ones of b, in each lane.
inline Int dot_bytes(Int sum, Int a, Int b) { return _mm512_dpbusd_epi32(sum, a, b); }
inline Int dot_unsigned(Int sum, Int a, Int b) { return dot_bytes(sum, a, b); }
// Codes with a sign are taken as unsigned ones, which are kByteZero larger.
constexpr int kByteZero = 128;
inline Int dot_codes(Int sum, Int a, Int b) { return dot_bytes(sum, a, b); }
// Each byte, less than 16, becomes what the table has there.
inline Int look_up_bytes(const uint8_t* table, Int at) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), at);
}
// 32 whole numbers as bytes: the even ones in order, and the odd ones.
inline void store_by_nibble(int8_t* even, int8_t* odd, const Int (&whole)[2]) {
  const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m128i first = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole[0]), apart);
  const __m128i second = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole[1]), apart);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm_unpacklo_epi64(first, second));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm_unpackhi_epi64(first, second));
}
// n whole numbers, a multiple of kLanes, as bytes; of each eight the even ones before the odd ones.
inline void put_quads(const int32_t* whole, int64_t n, int32_t* out) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  for (int64_t i = 0; i < n; i += kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 4),
                     _mm_shuffle_epi8(_mm512_cvtepi32_epi8(load_int(whole + i)), order));
}

#if defined(PEFTOPS_BF16)
// Pairs of bf16: `first` in the low halves, `second` in the high ones.
inline Int pair_bf16(Vec first, Vec second) {
  const Int order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                     23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, Int(_mm512_cvtne2ps_pbh(second, first)));
}
// Words 0-3 and 4-7 of each 128-bit part, interleaved.
inline Int interleave_halves(Int words) {
  return _mm512_shuffle_epi8(
      words, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)));
}
// bf16 of the sixteen lanes, twice.
inline Int twice_bf16(Vec a) { return _mm512_broadcast_i64x4(to_bf16(a)); }
// sum + the two products of pairs, in each lane.
inline Vec dot_bf16(Vec sum, Int a, Int b) { return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b)); }
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
