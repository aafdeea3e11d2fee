// One vector of float32 lanes in the width of the ISA being built, so that a kernel is written once.
//
//   Vec, Int                     kLanes floats; kLanes 32-bit integers
//   load, store, load_n, store_n float, bf16 and f16 memory; the conversions round to nearest even
//   set, zero, fma, max, min, abs, sqrt and + - * / of Vec; max(a, b) and min(a, b) are b where either is a NaN
//   add_if_greater(a, b, c, step)                  c + (a > b ? step : 0): with step -1 and c 0, a mask for & of Int
//   set_int, load_int, store_int, load_int_n, max_int, shift_left, shift_right, & and | of Int
//   to_float, as_float, as_int, truncate, permute  to_float converts; as_float and as_int keep the bits
//   transpose                    kLanes vectors of kLanes 32-bit lanes
//   Table8, Table16              eight or sixteen values, looked up by the low three or four bits of each lane
//   Table256                     256 values, looked up by lanes that are bytes
//   dot_bytes, look_up_bytes, put_quads            for product_int8.h, where there is PEFTOPS_INT8
//   dot_codes, dot_unsigned, look_up_bytes, store_by_nibble    for dot_int8.h, where there is PEFTOPS_DOT8
//   dot_bf16, pair_bf16, interleave_halves         for product_bf16.h, where there is PEFTOPS_BF16
//   twice_bf16                                     for the same, where there is PEFTOPS_BF16_CODES
//
// Everything is in an unnamed namespace, so that each ISA build keeps its own copy (numpy#25274, FBGEMM#46). No STL
// here or in any kernel file, for the same reason.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/dtype.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
template <class T> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<bf16> = true;

// TwoBytes<T>::type exists only for the two 16-bit types, to specialise on them.
template <class T> struct TwoBytes {};
template <> struct TwoBytes<bf16> { using type = void; };
template <> struct TwoBytes<f16> { using type = void; };

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA

// Which products in narrower numbers this build has instructions for.
#if defined(__AVX512F__)
#define PEFTOPS_INT16
#endif
#if defined(__AVX512F__) || (defined(PEFTOPS_NEON) && defined(__ARM_FEATURE_MATMUL_INT8))
#define PEFTOPS_INT8
#endif
#if defined(__AVX2__)
#define PEFTOPS_DOT8
#endif
#if defined(__AVX512BF16__) || (defined(PEFTOPS_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define PEFTOPS_BF16
#endif
#if defined(__AVX512BF16__)
#define PEFTOPS_BF16_CODES
#endif

#if defined(__AVX512F__)
#include "kernels/cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "kernels/cpu/simd_avx2.h"
#elif defined(PEFTOPS_NEON)
#include "kernels/cpu/simd_neon.h"
#else
#include "kernels/cpu/simd_scalar.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The last n < kLanes elements of a row; lanes past n read as zero and are not written.
template <class T> inline Vec load_n(const T* p, int64_t n) {
  T tmp[kLanes] = {};
  memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}
template <class T> inline void store_n(T* p, int64_t n, Vec a) {
  T tmp[kLanes];
  store(tmp, a);
  memcpy(p, tmp, n * sizeof(T));
}

// Calls f with the storage type that a dtype stands for: f(Type<float>{}) and so on.
template <class T> struct Type { using type = T; };
template <class F> inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:  return f(Type<float>{});
    case DType::bf16: return f(Type<bf16>{});
    case DType::f16:  return f(Type<f16>{});
  }
}

constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
