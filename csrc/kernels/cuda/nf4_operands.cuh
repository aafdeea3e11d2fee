// The operands of a library's product, y = left right^T: W decoded and rounded to the type of x, and as more depth what
// else a sum has, [x | scaling u | 1] [W | lora_B | bias]^T, so that the library rounds once, like the kernels.
//
// A number that bf16 cannot hold is the sum of two, high and low, to 2^-16 of it. A product of two such is three columns:
// high high, low high and high low. One that is not finite has no rest and must meet none, or infinity times zero would
// make NaN of what is infinite: zero stands in for it there.
//
// A warp has a row of either operand. Limit: writing them.
#pragma once
#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

constexpr int kOperandThreads = 256, kOperandRows = kOperandThreads / kWarp;

// Columns beyond those of x: as many parts of r for the low-rank term, and one or two for the bias.
struct ExtraColumns {
  int parts, bias;
  explicit ExtraColumns(const Nf4Linear& a)
      : parts(a.r == 0 ? 0 : a.dtype == DType::f32 ? 1 : a.b_dtype == a.dtype ? 2 : 3),
        bias(!a.bias ? 0 : a.dtype == DType::f32 || a.bias_dtype == a.dtype ? 1 : 2) {}
  int64_t count(int64_t r) const { return parts * r + bias; }
};

template <class T> struct InTwo {
  float high, low;   // of type T
  __device__ explicit InTwo(float v) : high(to_float(from_float<T>(v))) {
    low = isfinite(high) ? to_float(from_float<T>(v - high)) : 0.f;
  }
  __device__ float finite() const { return isfinite(high) ? high : 0.f; }
};

// Column e beyond those of x, of a row of either operand.
template <class T> __device__ float extra_left(const Nf4Linear& a, const ExtraColumns& extra, int64_t row, int e) {
  const int r = int(a.r), part = r ? e / r : 0;
  if (part >= extra.parts) return e - extra.parts * r < extra.bias ? 1.f : 0.f;
  const InTwo<T> u(__fmul_rn(a.scaling, a.u[row * r + e - part * r]));
  return part == 0 ? u.high : part == 1 ? u.low : u.finite();
}
template <class T> __device__ float extra_right(const Nf4Linear& a, const ExtraColumns& extra, int64_t row, int e) {
  const int r = int(a.r), part = r ? e / r : 0, which = e - extra.parts * r;
  if (part >= extra.parts) {
    if (which >= extra.bias) return 0.f;
    const InTwo<T> bias(element(a.bias, a.bias_dtype, row));
    return which == 0 ? bias.high : bias.low;
  }
  const InTwo<T> b(element(a.b, a.b_dtype, row * r + e - part * r));
  return part == 0 ? b.high : part == 1 ? b.finite() : b.low;
}

template <class T, bool Wide>
__global__ void __launch_bounds__(kOperandThreads, 1)
operands(Nf4Operands o, ExtraColumns extra, int log_block, bool wide_x) {
  constexpr int N = Pack<T>::kSize;
  __shared__ LaneTable code;
  __shared__ float map[256];
  code.fill<kOperandThreads>(nf4_codes.at);
  if (o.of.weight.absmax_code) map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  const Nf4Linear& a = o.of;
  const int64_t n = a.weight.rows, k = a.weight.cols, line = int64_t(blockIdx.x) * kOperandRows + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, beyond = int(o.depth - k);
  if (line < n) {
    T* const to = static_cast<T*>(o.right) + line * o.depth;
    if constexpr (Wide) {
      const Nf4Elements<N, true> row{a.weight, code, map, log_block, line * k};
      for (int64_t pack = lane; pack * N < k; pack += kWarp * kPacks) dequantize_four<T, true>(row, to, k, pack, kWarp);
    } else {
      for (int64_t i = lane; i < k; i += kWarp) to[i] = from_float<T>(weight_at(a.weight, log_block, line * k + i, map));
    }
    for (int e = lane; e < beyond; e += kWarp) to[k + e] = from_float<T>(extra_right<T>(a, extra, line, e));
  } else if (line - n < a.m && o.left) {
    const int64_t row = line - n;
    const T* const from = static_cast<const T*>(a.x) + row * k;
    T* const to = static_cast<T*>(o.left) + row * o.depth;
    if (wide_x) {
#pragma unroll 4
      for (int64_t i = lane; i < k / N; i += kWarp)   // __ldg: the stores before do not hold a load up
        reinterpret_cast<uint4*>(to)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    } else {
      for (int64_t i = lane; i < k; i += kWarp) to[i] = from[i];
    }
    for (int e = lane; e < beyond; e += kWarp) to[k + e] = from_float<T>(extra_left<T>(a, extra, row, e));
  }
}

}  // namespace peftops::cuda
