// Products of tensor cores with the precision of fp32, for operands of any dtype.
//
// tf32 has the range of fp32 and eleven bits: a 16-bit number is exact in tf32, and an fp32 number is the sum of three
// tf32 numbers. A product of two fp32 numbers takes six multiplications, of a 16-bit and an fp32 number three; the
// others are below 2^-33 of it. An infinity or a NaN has only the first part. It must not be multiplied with the other
// operand's small parts, because infinity times a part of the other sign would turn an infinite result into NaN.
// `finite` replaces it in these products.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

// N registers of an operand of mma.m16n8k8, in parts.
template <int N> struct Parts {
  uint32_t whole[N], finite[N], rest[N], last[N];   // v = whole + rest + last

  // Exact: v is a 16-bit number, and its other parts are 0.
  __device__ void set(int i, float v, bool exact) {
    const auto round = [](float f) { return (__float_as_uint(f) + 0x1000u) & ~0x1fffu; };
    const bool is_finite = fabsf(v) < 0x1.ffep127f;   // the others, or those that would be rounded to infinity
    const uint32_t rounded = exact ? __float_as_uint(v) : round(v);
    const float left = is_finite && !exact ? v - __uint_as_float(rounded) : 0.f;
    whole[i] = is_finite ? rounded : __float_as_uint(v + v);
    finite[i] = is_finite ? rounded : 0;
    rest[i] = round(left);
    last[i] = __float_as_uint(left - __uint_as_float(rest[i]));
  }
};
using Left = Parts<4>;    // rows g, g + 8, g, g + 8 of A at step t, t, t + 4, t + 4; with g = lane / 4, t = lane % 4
using Right = Parts<2>;   // column g of B at steps t, t + 4

__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b over eight steps. An exact operand has no other parts, so the products with them are left out.
__device__ inline void multiply(float (&c)[4], const Left& a, bool a_exact, const Right& b, bool b_exact) {
  multiply_tf32(c, a.whole, b.whole);
  if (!a_exact) multiply_tf32(c, a.rest, b.finite), multiply_tf32(c, a.last, b.finite);
  if (!b_exact) multiply_tf32(c, a.finite, b.rest), multiply_tf32(c, a.finite, b.last);
  if (!a_exact && !b_exact) multiply_tf32(c, a.rest, b.rest);
}

}  // namespace peftops::cuda
