// The product with an NF4 weight by wgmma: machine code of sm_90a alone, which no other GPU runs.
#include "kernels/cuda/crossover.cuh"
#include "kernels/cuda/nf4_linear_sm90.h"
#include "kernels/cuda/nf4_wgmma.cuh"

namespace peftops::cuda {
namespace {

template <class T, int Rows>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
wgmma_rows(const Nf4Linear a, int log_block, float* parts, const __grid_constant__ CUtensorMap x,
           const __grid_constant__ CUtensorMap codes) {
  extern __shared__ __align__(1024) uint4 dynamic[];
  multiply_by_wgmma<T, Rows>(a, log_block, parts, &x, &codes, *reinterpret_cast<WgmmaMemory<T, Rows>*>(dynamic));
}

constexpr int kAddThreads = 256;
template <class T>
__global__ void __launch_bounds__(kAddThreads) wgmma_parts(const Nf4Linear a, const float* parts, int count) {
  let_next_begin();
  add_parts<T>(a, parts, count);
}

template <class T, int Rows> cudaError_t launch(const Nf4LinearSm90& plan, const Gpu& gpu, cudaStream_t stream) {
  const Nf4Linear& a = plan.of;
  constexpr size_t kShared = sizeof(WgmmaMemory<T, Rows>);
  CUtensorMap x, codes;
  cudaError_t status = allow_shared<wgmma_rows<T, Rows>>(kShared);
  if (status == cudaSuccess)
    status = describe(&x, static_cast<const T*>(a.x), a.m, a.weight.cols, Rows, kRowBytes, CU_TENSOR_MAP_SWIZZLE_128B);
  if (status == cudaSuccess)
    status = describe(&codes, a.weight.packed, a.weight.rows, a.weight.cols / 2, kWgmmaOuts, kCodeBytes,
                      CU_TENSOR_MAP_SWIZZLE_NONE);
  if (status != cudaSuccess) return status;
  const dim3 grid(unsigned(ceil_div(a.m, Rows)), unsigned(ceil_div(a.weight.rows, kWgmmaOuts)), unsigned(plan.parts));
  status = launch_early(wgmma_rows<T, Rows>, gpu, grid, kWgmmaThreads, kShared, stream, a,
                        __builtin_ctzll(uint64_t(a.weight.block_size)), plan.sums, x, codes);
  if (status != cudaSuccess || plan.parts == 1) return status;
  const int64_t results = a.m * ceil_div(a.weight.rows, 8);
  return launch_early(wgmma_parts<T>, gpu, dim3(unsigned(ceil_div(results, kAddThreads))), kAddThreads, 0, stream, a,
                      plan.sums, plan.parts);
}

template <class T> cudaError_t launch_rows(const Nf4LinearSm90& plan, cudaStream_t stream) {
  Gpu gpu;
  const cudaError_t status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  return plan.rows == 64 ? launch<T, 64>(plan, gpu, stream) : plan.rows == 128 ? launch<T, 128>(plan, gpu, stream)
                                                                               : launch<T, 256>(plan, gpu, stream);
}

// Clocks, fitted on an H100 like those of crossover.cuh: to the column wgmma of docs/gpu, whose times of 32 to 2048 rows
// they meet within 17%.
constexpr double kWaveClocks = 7000;      // before the first product and after the last
constexpr double kPartsClocks = 4375;     // of the kernel that adds parts, but for what it moves
constexpr double kPartsBytes = 34.6;      // of sums, in and out of the L2 cache, a clock and multiprocessor
constexpr struct { int rows; double chunk; } kTiles[] = {{64, 735}, {128, 1050}, {256, 1720}};
constexpr int kMostParts = 8;

double wgmma_clocks(const Nf4Linear& a, const Gpu& gpu, int rows, double chunk, int parts) {
  const int64_t chunks = a.weight.cols / kChunk, blocks = ceil_div(a.m, rows) * ceil_div(a.weight.rows, kWgmmaOuts);
  const double waves = waves_of(blocks * parts, gpu) * (kWaveClocks + double(ceil_div(chunks, parts)) * chunk);
  const double sums = 2 * sizeof(float) * double(parts) * double(a.m) * double(a.weight.rows);
  return parts == 1 ? waves : waves + kPartsClocks + sums / (kPartsBytes * gpu.multiprocessors);
}

}  // namespace

cudaError_t plan_wgmma(const Nf4Linear& a, Sm90 wanted, Way library, Nf4LinearSm90* plan) {
  *plan = {a, 0, 0, nullptr};
  if (wanted == Sm90::faster && (a.m <= kFewRows || library == Way::library)) return cudaSuccess;
  Gpu gpu;
  const cudaError_t status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  if (gpu.capability != 90) return wanted == Sm90::always ? cudaErrorNoKernelImageForDevice : cudaSuccess;
  if (a.m == 0 || a.weight.rows == 0 || a.weight.first || !has_chunks(a) || !aligned(a.weight.packed, 16)) return status;
  double least = 0;
  const int64_t chunks = a.weight.cols / kChunk;
  for (const auto& tile : kTiles)
    for (int parts = 1; parts <= kMostParts && parts <= chunks; ++parts) {
      if (ceil_div(chunks, ceil_div(chunks, parts)) != parts) continue;   // the last would have nothing to do
      const double clocks = wgmma_clocks(a, gpu, tile.rows, tile.chunk, parts);
      if (plan->parts && clocks >= least) continue;
      least = clocks, plan->rows = tile.rows, plan->parts = parts;
    }
  if (wanted == Sm90::always) return status;
  const double kernels = nf4_clocks(a, gpu, true);
  const bool by_library = library == Way::faster && has_operands(a) &&
                          library_clocks(a, gpu, operands_depth(a) != a.weight.cols) < least;
  if (by_library || kernels < least) plan->parts = 0;
  return status;
}

cudaError_t nf4_linear_sm90(const Nf4LinearSm90& plan, cudaStream_t stream) {
  return plan.of.dtype == DType::bf16 ? launch_rows<__nv_bfloat16>(plan, stream) : launch_rows<__half>(plan, stream);
}

}  // namespace peftops::cuda
