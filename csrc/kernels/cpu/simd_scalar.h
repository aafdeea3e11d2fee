// simd.h without intrinsics: four lanes in the compiler's own vector type, which becomes SSE2 on any
// x86-64 and NEON on aarch64. It is the rung that every machine has and the others are tested beside.
#pragma once

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
typedef uint32_t Uint __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Vec zero() { return Vec{}; }
inline Vec set(float a) { return Vec{a, a, a, a}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec as_float(Int a) { return (Vec)a; }
inline Int as_int(Vec a) { return (Int)a; }
inline Vec max(Vec a, Vec b) {   // b where either is a NaN
  return as_float((as_int(a) & (a > b)) | (as_int(b) & ~(a > b)));
}
inline Vec min(Vec a, Vec b) {
  return as_float((as_int(a) & (a < b)) | (as_int(b) & ~(a < b)));
}
inline Int max_int(Int a, Int b) { return (a & (a > b)) | (b & ~(a > b)); }
inline Int truncate(Vec a) { return __builtin_convertvector(a, Int); }
inline Int set_int(int32_t a) { return Int{a, a, a, a}; }
inline Vec to_float(Int a) { return __builtin_convertvector(a, Vec); }
inline Vec permute(Vec a, Int from) { return Vec{a[from[0]], a[from[1]], a[from[2]], a[from[3]]}; }
inline Vec sqrt(Vec a) {
  return Vec{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
inline Vec abs(Vec a) { return as_float(as_int(a) & 0x7fffffff); }

inline uint32_t bits_of(float a) {
  uint32_t u;
  memcpy(&u, &a, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float a;
  memcpy(&a, &u, sizeof a);
  return a;
}

inline float widen(bf16 a) { return float_of(uint32_t(a.bits) << 16); }
inline float widen(f16 a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000) << 16, rest = uint32_t(a.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return float_of(sign | rest | 0x7f800000);   // infinity or NaN
  return float_of(sign | bits_of(float_of(rest) * 0x1p112f));          // rebias, subnormals included
}
inline bf16 narrow(float a, bf16) {
  const uint32_t u = bits_of(a);
  return {a != a ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline f16 narrow(float a, f16) {
  const uint32_t sign = (bits_of(a) >> 16) & 0x8000, u = bits_of(a) & 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more: infinity
  if (u < 0x38800000)                                     // subnormal: let an fp32 sum round the bits
    return {uint16_t(sign | (bits_of(float_of(u) + 0.5f) - bits_of(0.5f)))};
  return {uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13))};
}

inline Vec load(const float* p) {
  Vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Vec a) { memcpy(p, &a, sizeof a); }
template <class T> inline Vec load(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T> inline void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow(a[i], T{});
}
template <class T> inline void stream(T* p, Vec a) { store(p, a); }
// After the last of them, before another thread may read.
inline void stream_end() {}

inline Int read_once(Int v) { return v; }
inline Int load_int(const void* p) {
  Int a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline void store_int(void* p, Int a) { memcpy(p, &a, sizeof a); }
// The first n lanes; the others read as zero, and their memory not at all.
inline Int load_int_n(const void* p, int64_t n) {
  Int a = {};
  memcpy(&a, p, n * sizeof(int32_t));
  return a;
}
inline Int load_bytes(const uint8_t* p) { return Int{p[0], p[1], p[2], p[3]}; }
inline void store_bytes(uint8_t* p, Int a) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(a[i]);
}
inline void store_bytes(uint8_t* p, Int first, Int second) {
  store_bytes(p, first);
  store_bytes(p + kLanes, second);
}
inline Vec gather(const float* p, Int at) { return Vec{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}; }
inline Int shift_left(Int a, int n) { return Int(Uint(a) << n); }
inline Int shift_right(Int a, int n) { return Int(Uint(a) >> n); }

inline void transpose(Int (&v)[4]) {
  const Int t[4] = {v[0], v[1], v[2], v[3]};
  for (int i = 0; i < 4; ++i) v[i] = Int{t[0][i], t[1][i], t[2][i], t[3][i]};
}

struct Table8 {
  const float* at;
  explicit Table8(const float* values) : at(values) {}
  Vec operator()(Int codes) const { return Vec{at[codes[0] & 7], at[codes[1] & 7], at[codes[2] & 7], at[codes[3] & 7]}; }
};

struct Table16 {
  const float* at;
  explicit Table16(const float* values) : at(values) {}
  Vec operator()(Int codes) const {
    return Vec{at[codes[0] & 15], at[codes[1] & 15], at[codes[2] & 15], at[codes[3] & 15]};
  }
};

struct Table256 {
  const float* at;
  explicit Table256(const float* values) : at(values) {}
  Vec operator()(Int bytes) const { return gather(at, bytes); }
};

// c + (a > b ? step : 0) in each lane; false where either is a NaN.
inline Int add_if_greater(Vec a, Vec b, Int c, int step) { return c + ((a > b) & step); }

// Two vectors of codes, one a lane, as 4 packed bytes: the even lane of a pair is the high nibble.
inline void pack_codes(uint8_t* p, Int first, Int second) {
  p[0] = uint8_t(first[0] << 4 | first[1]);
  p[1] = uint8_t(first[2] << 4 | first[3]);
  p[2] = uint8_t(second[0] << 4 | second[1]);
  p[3] = uint8_t(second[2] << 4 | second[3]);
}

// One vector of codes, in order. Bits above the low four of a lane are left as they come: Table16 ignores them.
template <bool kHighFirst = true> inline Int unpack_codes(const uint8_t* p) {
  return kHighFirst ? Int{p[0] >> 4, p[0], p[1] >> 4, p[1]} : Int{p[0], p[0] >> 4, p[1], p[1] >> 4};
}

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
