// From sums of an NF4 product's codes to results: of all of the depth, or of parts of it that are added up in order.
#pragma once
#include "kernels/cuda/nf4_rows.cuh"

namespace peftops::cuda {

// y[row, out ..] of eight sums, as far as the results exist.
template <class T> __device__ void store_results(const Nf4Linear& a, int64_t row, int64_t out, const float (&sums)[8]) {
  const int64_t n = a.weight.rows;
  Pack<T> results;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float bias = a.bias && out + i < n ? element(a.bias, a.bias_dtype, out + i) : 0.f;
    results.at[i] = from_float<T>(__fmul_rn(sums[i], 1.f / kCodeFactor<T>) + bias);
  }
  T* const to = static_cast<T*>(a.y) + row * n + out;
  if (n % 8 == 0) {
    *reinterpret_cast<Pack<T>*>(to) = results;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (out + i < n) to[i] = results.at[i];
}

// Eight results a thread.
template <class T> __device__ void add_parts(const Nf4Linear& a, const float* parts, int count) {
  const int64_t n = a.weight.rows, each = ceil_div(n, 8), at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = at / each, out = at % each * 8;
  wait_for_inputs();
  if (row >= a.m) return;
  float sums[8] = {};
#pragma unroll 1
  for (int part = 0; part < count; ++part) {
    const float* const from = parts + (part * a.m + row) * n + out;
    float more[8];
    if (n % 8 == 0) {
      *reinterpret_cast<float4*>(more) = reinterpret_cast<const float4*>(from)[0];
      *reinterpret_cast<float4*>(more + 4) = reinterpret_cast<const float4*>(from)[1];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) more[i] = out + i < n ? from[i] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = __fadd_rn(sums[i], more[i]);
  }
  store_results<T>(a, row, out, sums);
}

}  // namespace peftops::cuda
