// Two ways to y = x W^T: a kernel that decodes W where it is multiplied, or W decoded into memory, once, and a matrix
// library's product. The library divides its work as it likes and on some GPUs has faster instructions (wgmma, tcgen05);
// the kernels save the trip through memory and a launch. This file estimates the time of both, in clocks of a
// multiprocessor, from the limits of each: docs/cuda_roofline.md has the reasons.
//
// The number of rows is not enough to decide: each block of threads takes the same time, so the time of the kernels
// depends on the number of waves. 1024 outputs are eight blocks for 64 rows, too few for any large GPU; 4096 fill an
// A100 nine tenths.
//
// On every GPU the kernels take few rows, for which they read the codes once.
#pragma once
#include "kernels/cuda/group_rows.cuh"
#include "kernels/cuda/nf4_many.cuh"
#include "kernels/cuda/tile.cuh"

namespace peftops::cuda {

// The speed of a multiprocessor, fitted on an H100 (docs/gpu, `python bench/gpu.py`). For other GPUs the vendor's
// figures are scaled by the factors of the H100; they have not been measured.
struct GpuRates {
  int from;           // capability
  double rows;        // clocks in which few_rows does 64 columns, 32 rows of W and 32 of x
  double chunk[2];    // clocks in which many_rows does 64 columns, with one stripe and with two
  double multiply;    // 16-bit multiply-adds of the library's, a clock: three quarters of the tensor cores'
  double fp32;        // the same of fp32
  double bytes;       // of memory's bandwidth, a clock: 85% of it
};
constexpr GpuRates kGpuRates[] = {
    {80, 260, {1506, 2410}, 768, 48, 11.4},     // A100
    {86, 520, {4818, 9636}, 192, 96, 2.7},      // Ampere's and Ada's consumer chips: tensor cores limit both ways in the same way
    {90, 260, {1546, 2410}, 1536, 96, 11.8},    // H100: mma.sync reaches 62% of what wgmma does
    {100, 260, {1546, 2410}, 3072, 96, 24.8},   // B200: mma.sync taken to be Hopper's
    {120, 520, {4818, 9636}, 192, 96, 3.7},     // consumer Blackwell, which has no tcgen05
};
constexpr double kLaunch = 3500;      // clocks from one kernel's end to the next one's full speed: 2 us
constexpr double kLeastProduct = 14000;   // clocks of a library's product, however small: 8 us, its launch included
constexpr double kCached = 0.85;      // of a product's time for memory: W was written just before, and is in the cache
constexpr double kAnyStep = 250;      // clocks for a step of a tile of fp32: shared memory, decoding, and waiting
constexpr double kDecodeBytes = 0.52; // read for each element of W

constexpr int64_t kEnoughBlocks = 128;   // of threads, for every multiprocessor: large GPUs have 108 to 148

inline int64_t many_blocks(const Nf4Linear& a, int stripes) {
  return ceil_div(a.weight.rows, 16 * stripes * kManyWarps) * ceil_div(a.m, kManyRows);
}
inline int stripes_of(const Nf4Linear& a) { return many_blocks(a, 2) >= kEnoughBlocks ? 2 : 1; }   // of many_rows

inline const GpuRates& rates_of(const Gpu& gpu) {
  const GpuRates* best = kGpuRates;
  for (const GpuRates& rates : kGpuRates)
    if (rates.from <= gpu.capability) best = &rates;
  return *best;
}

inline double waves_of(int64_t blocks, const Gpu& gpu) { return double(ceil_div(blocks, gpu.multiprocessors)); }

// Of tiles of fp32, for any format.
template <class Weight> double any_clocks(const Linear<Weight>& a, const Gpu& gpu) {
  return waves_of(ceil_div(a.m, kTile) * ceil_div(a.weight.rows, kTile), gpu) * double(a.weight.cols) * kAnyStep;
}
// Of the kernels that read the weight again for every 32 rows of x.
template <class Weight> double rows_clocks(const Linear<Weight>& a, const Gpu& gpu) {
  const int64_t tiles = ceil_div(a.weight.rows, 32) * ceil_div(a.m, 32);
  return waves_of(tiles, gpu) * double(a.weight.cols) / kChunk * rates_of(gpu).rows;
}
inline double many_clocks(const Nf4Linear& a, const Gpu& gpu) {
  const int stripes = stripes_of(a);
  return waves_of(many_blocks(a, stripes), gpu) * double(a.weight.cols) / kChunk * rates_of(gpu).chunk[stripes - 1];
}

// Whether few_rows is to read the weight several times, rather than many_rows to share what it decodes.
inline bool rows_again(const Nf4Linear& a, const Gpu& gpu) { return rows_clocks(a, gpu) < many_clocks(a, gpu); }

// Clocks of the kernels; 0 where nothing can be shorter. Chunks: whether they take 16-bit x.
inline double nf4_clocks(const Nf4Linear& a, const Gpu& gpu, bool chunks) {
  if (!chunks) return any_clocks(a, gpu);
  if (a.m <= kFewRows) return 0;
  return rows_again(a, gpu) ? rows_clocks(a, gpu) : many_clocks(a, gpu);
}
inline double group_clocks(const GroupLinear& a, const Gpu& gpu, bool chunks) {
  if (!chunks) return any_clocks(a, gpu);
  return a.m <= kFewRows ? 0 : rows_clocks(a, gpu) * (a.weight.bits == 3 ? 4 : 2);   // 8 or 16 rows at a time
}

// Of a decoded weight and the library's product. `copied`: x has to be.
template <class Weight> double library_clocks(const Linear<Weight>& a, const Gpu& gpu, bool copied) {
  const GpuRates& is = rates_of(gpu);
  const double m = double(a.m), n = double(a.weight.rows), k = double(a.weight.cols), all = gpu.multiprocessors;
  const double size = a.dtype == DType::f32 ? 4 : 2, rate = a.dtype == DType::f32 ? is.fp32 : is.multiply;
  const double decode = n * k * (size + kDecodeBytes) / (is.bytes * all);
  const double copy = copied ? 2 * m * k * size / (is.bytes * all) : 0;
  const double moved = kCached * size * (n * k + m * (n + k)) / (is.bytes * all), multiplied = m * n * k / (rate * all);
  const double product = moved > multiplied ? moved : multiplied;
  return kLaunch + decode + copy + (product > kLeastProduct ? product : kLeastProduct);
}

// Whether the operands of the library's product can hold all values that the kernels can. fp16 cannot: a factor of the
// low-rank term may be beyond its range, and other values are cut below 2^-24.
template <class Weight> bool has_operands(const Linear<Weight>& a) {
  const bool exact = a.r == 0 && (!a.bias || a.bias_dtype == a.dtype);
  return a.m > 0 && a.weight.rows > 0 && a.weight.cols > 0 && (a.dtype != DType::f16 || exact);
}

template <class Weight, class Clocks>
cudaError_t choose_way(const Linear<Weight>& a, Way wanted, bool* result, const Clocks& of_kernels) {
  *result = wanted == Way::library && has_operands(a);
  if (wanted != Way::faster || !has_operands(a)) return cudaSuccess;
  Gpu gpu;
  const cudaError_t status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  const double kernels = of_kernels(gpu);
  *result = kernels > 0 && library_clocks(a, gpu, operands_depth(a) != a.weight.cols) < kernels;
  return status;
}

}  // namespace peftops::cuda
