// The operands of a library's product for a stack of weights (ops/experts_library.h), and the choice between it and the
// kernels. Limit: writing the decoded weights.
#pragma once
#include <cmath>

#include "kernels/cuda/crossover.cuh"
#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/group_decode.cuh"
#include "kernels/cuda/mxfp4_decode.cuh"
#include "kernels/cuda/nf4_backward.cuh"
#include "kernels/cuda/nf4_decode.cuh"

namespace peftops::cuda {

using Decoded = __nv_bfloat16;

// Codes of three bits are read a byte at a time: lanes share words only where their elements lie in a row.
template <int B> struct StackGroupSource : GroupSource<Decoded, B> {
  using Memory = typename GroupSource<Decoded, B>::Memory;
  __device__ GroupElements<B, Pack<Decoded>::kSize, B != 3> row(const Memory&, int64_t flat, int64_t end) const {
    return {this->w, this->log_group, flat, end};
  }
};

// Some columns of a weight, for dequantize.cuh.
template <class Elements> struct ColumnsOf {
  const Elements& of;
  uint32_t packs;   // of a row
  int64_t k;

  __device__ auto load(int64_t i, int count) const {
    constexpr int N = Pack<Decoded>::kSize;
    const uint32_t pack = uint32_t(i / N), row = pack / packs;
    return of.load(row * k + int64_t(pack - row * packs) * N, count);
  }
  template <class Held> __device__ float value(const Held& held, int at) const { return of.value(held, at); }
};

// Where the rows of experts up to this one end. Offsets are not checked, but for torch ends must not decrease. By a warp.
__device__ inline int32_t last_end(const int64_t* offsets, int64_t expert, int64_t m) {
  int32_t end = 0;
  for (int64_t e = threadIdx.x % kWarp; e <= expert; e += kWarp) {
    const ExpertRows rows = rows_of(offsets, e, m);
    end = max(end, int32_t(rows.begin + rows.count));
  }
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) end = max(end, __shfl_xor_sync(~0u, end, step));
  return end;
}

// Slot blockIdx.x, which is an expert that has rows. Elements of all formats have flat indices in the whole stack.
template <class Source, class Weight>
__global__ void __launch_bounds__(kDequantizeThreads) stack_decode(ExpertsDecode<Weight> a, Source source) {
  __shared__ typename Source::Memory memory;
  ExpertTile tile;
  const bool found = find_tile(a.offsets, a.experts, a.m, 0x7fffffff, &tile);
  if (blockIdx.y == 0 && threadIdx.x < kWarp) {
    const int32_t end = last_end(a.offsets, found ? tile.expert : a.experts - 1, a.m);
    if (threadIdx.x == 0) a.ends[blockIdx.x] = end;
  }
  if (!found) return;
  source.begin(memory);
  const int64_t n = a.weight.rows, k = a.weight.cols;
  const auto elements = source.row(memory, tile.expert * n * k + a.first, a.experts * n * k);
  const ColumnsOf<decltype(elements)> columns{elements, uint32_t(a.cols / Pack<Decoded>::kSize), k};
  const int64_t begin = int64_t(blockIdx.y) * (kDequantizeThreads * kPacks) + threadIdx.x;
  dequantize_four<Decoded, true>(columns, static_cast<Decoded*>(a.out) + blockIdx.x * (n * a.cols), n * a.cols, begin,
                                 kDequantizeThreads);
}

template <class Weight, class Source>
cudaError_t launch_decode(const ExpertsDecode<Weight>& a, const Source& source, cudaStream_t stream) {
  const dim3 grid(unsigned(a.slots), dequantize_blocks<Decoded>(a.weight.rows * a.cols));
  stack_decode<<<grid, kDequantizeThreads, 0, stream>>>(a, source);
  return cudaGetLastError();
}

constexpr unsigned kPlaceBlocks = 1024;   // of threads at most: where there is nothing to copy, they have little to do

static __global__ void __launch_bounds__(kDequantizeThreads) stack_place(ExpertsPlace a) {
  constexpr int N = Pack<Decoded>::kSize;
  const ExpertRows last = rows_of(a.offsets, a.experts - 1, a.m);
  const int64_t end = last.begin + last.count, first = a.from ? 0 : end, packs = a.cols / N;
  const Decoded* from = static_cast<const Decoded*>(a.from);
  Decoded* to = static_cast<Decoded*>(a.to) + a.first;
  const int64_t apart = int64_t(gridDim.x) * kDequantizeThreads;
  for (int64_t i = int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x; i < (a.m - first) * packs; i += apart) {
    const int64_t row = first + uint32_t(i) / uint32_t(packs), col = uint32_t(i) % uint32_t(packs) * int64_t(N);
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < end) value = *reinterpret_cast<const uint4*>(from + row * a.cols + col);
    *reinterpret_cast<uint4*>(to + row * a.k + col) = value;
  }
}

// Fitted on an H100 to Mixtral, Qwen3 and gpt-oss.
constexpr double kBackRow = 73;            // clocks of stack_many_back for a row of W, however many blocks a wave has
constexpr int kBackBlocks = 2;             // of a multiprocessor
constexpr double kLeastGrouped = 44000;    // clocks of a grouped product, however small: 25 us
constexpr int64_t kMostGroups = 1023;      // of torch's

// Whether torch's grouped product takes the operands.
template <class Backward> bool has_groups(const Experts<Backward>& a) {
  const int64_t n = a.all.weight.rows, k = a.all.weight.cols, most = 1 << 20;
  const bool sized = n > 0 && k > 0 && n % 8 == 0 && k % 8 == 0;
  const bool countable = n < most && k < most && a.all.m * (k / 8) < int64_t(1) << 32 && a.experts <= kMostGroups;
  return a.all.dtype == DType::bf16 && a.all.m > 0 && sized && countable && aligned(a.all.g, 16) &&
         aligned(a.all.dx, 16) && aligned(a.all.weight.packed, 8);
}

// Rows are taken to choose their experts evenly; an expert's last tile is half full. `rows`, `columns`: of a tile of the
// kernel.
template <class Backward> bool grouped_is_shorter(const Experts<Backward>& a, int rows, int columns, const Gpu& gpu) {
  const GpuRates& is = rates_of(gpu);
  const double m = double(a.all.m), n = double(a.all.weight.rows), k = double(a.all.weight.cols), e = double(a.experts);
  const double busy = e * (1 - std::pow(1 - 1 / e, m)), each = m / busy / rows + 0.5;
  const double tiles = busy * (each > 1 ? each : 1), bytes = is.bytes * gpu.multiprocessors;
  const double kernels = double(ceil_div(int64_t(tiles + 0.5) * ceil_div(a.all.weight.cols, columns),
                                         int64_t(kBackBlocks) * gpu.multiprocessors)) * n * kBackRow;
  const double decoded = busy * n * k, slots = m < e ? m : e, slabs = std::ceil(slots * n * k * 2 / (256 << 20));
  const double moved = (2 * decoded + 2 * m * (n + k)) / bytes;
  const double multiplied = m * n * k / (is.multiply * gpu.multiprocessors);
  const double product = moved > multiplied ? moved : multiplied, least = slabs * kLeastGrouped;
  return 2 * slabs * kLaunch + decoded * (2 + kDecodeBytes) / bytes + (product > least ? product : least) < kernels;
}

// `streams`: the kernel multiplies on tensor cores; else it is a tile of fp32, which takes longer than the library at any
// size. On other GPUs torch's grouped product reads the offsets on the host.
template <class Backward> cudaError_t choose_groups(const Experts<Backward>& a, bool streams, Way wanted, bool* result) {
  *result = wanted == Way::library && has_groups(a);
  if (wanted != Way::faster || !has_groups(a)) return cudaSuccess;
  Gpu gpu;
  const cudaError_t status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  const bool grouped = gpu.capability / 10 == 9 || gpu.capability / 10 == 10;
  *result = grouped && (!streams || grouped_is_shorter(a, 64, kBackCols, gpu));
  return status;
}

}  // namespace peftops::cuda
