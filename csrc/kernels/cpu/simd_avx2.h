// simd.h for AVX2, FMA and F16C (nearly every x86 since 2013).
#pragma once
#include <immintrin.h>

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

using Vec = __m256;
using Int = __m256i;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set(float a) { return _mm256_set1_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }   // b where either is a NaN
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a); }

inline Vec load(const bf16* p) {
  const Int w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
inline __m128i to_bf16(Vec a) {   // a NaN stays a NaN
  const Int u = _mm256_castps_si256(a);
  const Int odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const Int up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Int nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const Int r = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
}
inline __m128i to_f16(Vec a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
inline void stream(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }

inline Vec load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }
inline void stream(f16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }
// After the last of them, before another thread may read.
inline void stream_end() { _mm_sfence(); }

// A loaded value that stays in its register. Otherwise GCC may load it again for each use, as costly as a load of x.
inline Int read_once(Int v) { asm("" : "+x"(v)); return v; }
inline Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
inline void store_int(void* p, Int a) { _mm256_storeu_si256(static_cast<Int*>(p), a); }
// The first n lanes; the others read as zero, and their memory not at all.
inline Int load_int_n(const void* p, int64_t n) {
  const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_epi32(static_cast<const int*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane));
}
inline Int load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline void store_bytes(uint8_t* p, Int a) {
  const Int bytes = _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                                                     _mm256_extracti128_si256(bytes, 1)));
}
// Two vectors, one after the other.
inline void store_bytes(uint8_t* p, Int first, Int second) {
  const Int words = _mm256_packs_epi32(first, second);   // interleaved by 128-bit halves
  const Int order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
  const Int bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
}
inline Vec gather(const float* p, Int at) { return _mm256_i32gather_ps(p, at, 4); }
inline Int shift_left(Int a, int n) { return Int(__v8su(a) << n); }
inline Int shift_right(Int a, int n) { return Int(__v8su(a) >> n); }
inline Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }
inline Int truncate(Vec a) { return _mm256_cvttps_epi32(a); }
inline Int round_to_int(Vec a) { return _mm256_cvtps_epi32(a); }   // to nearest even
inline Int set_int(int32_t a) { return _mm256_set1_epi32(a); }
inline Vec to_float(Int a) { return _mm256_cvtepi32_ps(a); }
inline Vec permute(Vec a, Int from) { return _mm256_permutevar8x32_ps(a, from); }   // lane i gets a[from[i]]
inline Vec as_float(Int a) { return _mm256_castsi256_ps(a); }
inline Int as_int(Vec a) { return _mm256_castps_si256(a); }

// 8 x 8: pairs, then quadruples inside each 128-bit half, then the halves themselves.
inline void transpose(Int (&v)[8]) {
  Int t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Int low = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
    v[i] = low;
  }
}

struct Table8 {
  Vec values;
  explicit Table8(const float* at) : values(load(at)) {}
  Vec operator()(Int codes) const { return _mm256_permutevar8x32_ps(values, codes); }
};

// vpermps picks one of eight by the low three bits; bit 3, moved to the sign, picks the half.
struct Table16 {
  Vec low, high;
  explicit Table16(const float* at) : low(load(at)), high(load(at + 8)) {}
  Vec operator()(Int codes) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
};

struct Table256 {
  const float* at;
  explicit Table256(const float* values) : at(values) {}
  Vec operator()(Int bytes) const { return gather(at, bytes); }
};

// c + (a > b ? step : 0) in each lane; false where either is a NaN.
inline Int add_if_greater(Vec a, Vec b, Int c, int step) {
  const Int mask = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
  return _mm256_add_epi32(c, _mm256_and_si256(mask, _mm256_set1_epi32(step)));
}

// Two vectors of codes, one a lane, as 8 packed bytes: the even lane of a pair is the high nibble.
inline void pack_codes(uint8_t* p, Int first, Int second) {
  const Int words = _mm256_packs_epi32(first, second);   // interleaved by 128-bit halves
  const Int pairs = _mm256_madd_epi16(words, _mm256_set1_epi32(16 | 1 << 16));
  const Int order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
  const Int bytes = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(pairs, order), _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                                                     _mm256_extracti128_si256(bytes, 1)));
}

// One vector of codes, in order. Bits above the low four of a lane are left as they come: Table16 ignores them.
template <bool kHighFirst = true> inline Int unpack_codes(const uint8_t* p) {
  int32_t word;
  memcpy(&word, p, sizeof word);
  const __m128i bytes = _mm_cvtsi32_si128(word);
  const __m128i high = _mm_srli_epi16(bytes, 4);
  return _mm256_cvtepu8_epi32(kHighFirst ? _mm_unpacklo_epi8(high, bytes) : _mm_unpacklo_epi8(bytes, high));
}

// Each byte, less than 16, becomes what the table has there.
inline Int look_up_bytes(const uint8_t* table, Int at) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), at);
}
// sum + the four products of bytes in each lane. Two must fit an int16: vpmaddubsw saturates. It takes unsigned bytes of
// one factor; of codes with a sign, the sign moves to the other factor.
inline Int dot_unsigned(Int sum, Int a, Int b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
constexpr int kByteZero = 0;
inline Int dot_codes(Int sum, Int a, Int b) {
  return dot_unsigned(sum, _mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
}
// 32 whole numbers as bytes: the even ones in order, and the odd ones.
inline void store_by_nibble(int8_t* even, int8_t* odd, const Int (&whole)[4]) {
  const Int bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
  const Int apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                                     0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const Int pairs = _mm256_shuffle_epi8(bytes, apart);   // of columns 0 to 3 of each eight, and of 4 to 7
  const __m128i first = _mm256_castsi256_si128(pairs), second = _mm256_extracti128_si256(pairs, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm_unpacklo_epi16(first, second));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm_unpackhi_epi16(first, second));
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
