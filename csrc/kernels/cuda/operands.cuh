// The operands of a library's product, y = left right^T: W decoded and rounded to the type of x, with the other terms
// of a sum as more depth, [x | scaling u | 1] [W | lora_B | bias]^T. So the library rounds once, like the kernels.
//
// A number that bf16 cannot hold is the sum of two, high and low, to 2^-16 of it. A product of two such is three columns:
// high high, low high and high low. An infinity or a NaN is its high part alone, and zero replaces it beside the other
// operand's low part: infinity times zero would turn an infinite result into NaN.
//
// A warp has a row of either operand. Limit: writing them.
#pragma once
#include "kernels/cuda/dequantize.cuh"
#include "kernels/linear.h"

namespace peftops::cuda {

constexpr int kOperandThreads = 256, kOperandRows = kOperandThreads / kWarp;

// Columns beyond those of x: as many parts of r for the low-rank term, and one or two for the bias.
struct ExtraColumns {
  int parts, bias;
  template <class Weight> explicit ExtraColumns(const Linear<Weight>& a)
      : parts(a.r == 0 ? 0 : a.dtype == DType::f32 ? 1 : a.b_dtype == a.dtype ? 2 : 3),
        bias(!a.bias ? 0 : a.dtype == DType::f32 || a.bias_dtype == a.dtype ? 1 : 2) {}
  int64_t count(int64_t r) const { return parts * r + bias; }
};

template <class Weight> int64_t depth_of(const Linear<Weight>& a) {
  constexpr int64_t kUnit = 8;   // elements of 16 bits in 16 bytes
  return ceil_div(a.weight.cols + ExtraColumns(a).count(a.r), kUnit) * kUnit;
}

template <class T> struct InTwo {
  float high, low;   // of type T
  __device__ explicit InTwo(float v) : high(to_float(from_float<T>(v))) {
    low = isfinite(high) ? to_float(from_float<T>(v - high)) : 0.f;
  }
  __device__ float finite() const { return isfinite(high) ? high : 0.f; }
};

// Column e beyond those of x, of a row of either operand.
template <class T, class Args> __device__ float extra_left(const Args& a, const ExtraColumns& extra, int64_t row, int e) {
  const int r = int(a.r), part = r ? e / r : 0;
  if (part >= extra.parts) return e - extra.parts * r < extra.bias ? 1.f : 0.f;
  const InTwo<T> u(__fmul_rn(a.scaling, a.u[row * r + e - part * r]));
  return part == 0 ? u.high : part == 1 ? u.low : u.finite();
}
template <class T, class Args> __device__ float extra_right(const Args& a, const ExtraColumns& extra, int64_t row, int e) {
  const int r = int(a.r), part = r ? e / r : 0, which = e - extra.parts * r;
  if (part >= extra.parts) {
    if (which >= extra.bias) return 0.f;
    const InTwo<T> bias(element(a.bias, a.bias_dtype, row));
    return which == 0 ? bias.high : bias.low;
  }
  const InTwo<T> b(element(a.b, a.b_dtype, row * r + e - part * r));
  return part == 0 ? b.high : part == 1 ? b.finite() : b.low;
}

// Source: how a format is decoded. Source::Memory is what it keeps in shared memory; row(memory, flat, end) has elements
// flat to end of W for dequantize_four, and at(memory, flat) is one of them.
template <class T, bool Wide, class Source, class Weight>
__global__ void __launch_bounds__(kOperandThreads, 1)
operands(LibraryOperands<Weight> o, ExtraColumns extra, Source source, bool wide_x) {
  constexpr int N = Pack<T>::kSize;
  __shared__ typename Source::Memory memory;
  source.begin(memory);
  const Linear<Weight>& a = o.of;
  const int64_t k = a.weight.cols, line = int64_t(blockIdx.x) * kOperandRows + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, beyond = int(o.depth - k);
  if (line < o.rows) {
    const int64_t of = o.first + line, flat = of * k;
    T* const to = static_cast<T*>(o.right) + line * o.depth;
    if constexpr (Wide) {
      const auto row = source.row(memory, flat, flat + k);
      for (int64_t pack = lane; pack * N < k; pack += kWarp * kPacks) dequantize_four<T, true>(row, to, k, pack, kWarp);
    } else {
      for (int64_t i = lane; i < k; i += kWarp) to[i] = from_float<T>(source.at(memory, flat + i));
    }
    for (int e = lane; e < beyond; e += kWarp) to[k + e] = from_float<T>(extra_right<T>(a, extra, of, e));
  } else if (line - o.rows < a.m && o.left) {
    const int64_t row = line - o.rows;
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

// wide: whether rows of W can be read in packs.
template <class T, class Source, class Weight>
cudaError_t launch_operands(const LibraryOperands<Weight>& o, const Source& source, bool wide, cudaStream_t stream) {
  constexpr int N = Pack<T>::kSize;
  const int64_t k = o.of.weight.cols, rows = o.rows + (o.left ? o.of.m : 0);
  wide = wide && k % N == 0 && aligned(o.right, 16);
  const bool wide_x = k % N == 0 && aligned(o.of.x, 16) && aligned(o.left, 16);
  auto* kernel = wide ? operands<T, true, Source, Weight> : operands<T, false, Source, Weight>;
  kernel<<<unsigned(ceil_div(rows, kOperandRows)), kOperandThreads, 0, stream>>>(o, ExtraColumns(o.of), source, wide_x);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
