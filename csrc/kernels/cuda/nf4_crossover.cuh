// Two ways to y = x W^T: a kernel that decodes W where it is multiplied, or W decoded into memory, once, and a matrix
// library's product. The library divides its work as it likes and on some GPUs has faster instructions (wgmma, tcgen05);
// the kernels save the trip through memory and a launch. Which way is the shorter is reckoned here, in clocks of a
// multiprocessor, from what limits each: docs/cuda_roofline.md has the reasons, its generator the numbers of the table.
//
// Rows alone do not decide: a block of threads takes the same time wherever it runs, so what the kernels need is a
// number of waves. 1024 outputs are eight blocks for 64 rows, too few for any large GPU; 4096 fill an A100 nine tenths.
#pragma once
#include "kernels/cuda/nf4_many.cuh"
#include "kernels/cuda/tile.cuh"

namespace peftops::cuda {

struct Gpu { int capability, multiprocessors; };   // capability: 10 * major + minor

// What a multiprocessor does. No GPU has confirmed it yet; the first run on one should.
struct GpuRates {
  int from;           // capability
  double chunk[2];    // clocks in which many_rows does 64 columns, with one stripe and with two
  double multiply;    // 16-bit multiply-adds of the library's, a clock: three quarters of the tensor cores'
  double fp32;        // the same of fp32
  double bytes;       // of memory's bandwidth, a clock: 85% of it
};
constexpr GpuRates kGpuRates[] = {
    {80, {753, 1205}, 768, 48, 11.4},     // A100
    {86, {2409, 4818}, 192, 96, 2.7},     // Ampere's and Ada's consumer chips: the tensor cores limit both ways alike
    {90, {753, 1093}, 1536, 96, 11.8},    // H100: mma.sync reaches 62% of what wgmma does
    {100, {753, 1093}, 3072, 96, 24.8},   // B200: mma.sync taken to be Hopper's
    {120, {2409, 4818}, 192, 96, 3.7},    // consumer Blackwell, which has no tcgen05
};
constexpr double kLaunch = 5000;      // clocks from one kernel's end to the next one's full speed: 3 us
constexpr double kAnyStep = 100;      // clocks for a step of a tile of any_rows: 64 to read shared memory, and decoding
constexpr double kDecodeBytes = 0.52; // read for each element of W

constexpr int64_t kEnoughBlocks = 128;   // of threads, for every multiprocessor: large GPUs have 108 to 148

inline int64_t many_blocks(const Nf4Linear& a, int stripes) {
  return ceil_div(a.weight.rows, 16 * stripes * kRowsWarps) * ceil_div(a.m, kManyRows);
}
inline int stripes_of(const Nf4Linear& a) { return many_blocks(a, 2) >= kEnoughBlocks ? 2 : 1; }   // of many_rows

inline const GpuRates& rates_of(const Gpu& gpu) {
  const GpuRates* best = kGpuRates;
  for (const GpuRates& rates : kGpuRates)
    if (rates.from <= gpu.capability) best = &rates;
  return *best;
}

// Whether the operands of the library's product hold all that the kernels would. fp16 does not: a factor of the low-rank
// term may be beyond it, and what is not is cut below 2^-24.
inline bool has_operands(const Nf4Linear& a) {
  const bool exact = a.r == 0 && (!a.bias || a.bias_dtype == a.dtype);
  return a.m > 0 && a.weight.rows > 0 && a.weight.cols > 0 && (a.dtype != DType::f16 || exact);
}

// Chunks: whether few_rows and many_rows take the product; `left`: whether x has to be copied for the library.
inline bool library_is_faster(const Nf4Linear& a, const Gpu& gpu, bool chunks, bool left) {
  if (chunks && a.m <= kFewRows) return false;   // a launch that reads the codes once: nothing is shorter
  const GpuRates& is = rates_of(gpu);
  const double m = double(a.m), n = double(a.weight.rows), k = double(a.weight.cols), all = gpu.multiprocessors;
  const auto waves = [&](int64_t blocks) { return double(ceil_div(blocks, gpu.multiprocessors)); };
  const int stripes = stripes_of(a);
  const double fused = chunks ? waves(many_blocks(a, stripes)) * (k / kChunk) * is.chunk[stripes - 1]
                              : waves(ceil_div(a.m, kTile) * ceil_div(a.weight.rows, kTile)) * k * kAnyStep;
  const double size = a.dtype == DType::f32 ? 4 : 2, rate = a.dtype == DType::f32 ? is.fp32 : is.multiply;
  const double decode = n * k * (size + kDecodeBytes) / (is.bytes * all);
  const double copy = left ? 2 * m * k * size / (is.bytes * all) : 0;
  const double moved = size * (n * k + m * (n + k)) / (is.bytes * all), multiplied = m * n * k / (rate * all);
  return decode + copy + (moved > multiplied ? moved : multiplied) + kLaunch < fused;
}

}  // namespace peftops::cuda
