// y = x W^T for many rows of 16-bit x on Hopper: y^T = W x^T by wgmma, W decoded into registers.
//
// A block of threads has 128 rows of W and Rows rows of x. One warpgroup brings x, 64 columns at a time, into a ring of
// stages of shared memory; two multiply, 64 rows of W each. They wait for each other by an mbarrier a stage and direction.
//
// Sums are kept in units of the current absmax: before a chunk is added they are multiplied by the absmax before over the
// absmax now, and at the end by the last. So W is never rounded with its absmax, and there is one set of accumulators.
//
// The error. Let there be c = k / 64 chunks and S the sum of magnitudes |x w| of a result. Each product with a code is
// exact and each of the k additions errs by 2^-24 (on hardware, which cuts, 2^-23) of what is there, as in nf4_many.cuh.
// A chunk's rescaling rounds a quotient and a product: 2 * 2^-24. What a chunk contributed is rescaled at most c times, by
// quotients whose true product telescopes to its absmax over the last, and then once by the last absmax and the factor of
// the codes, two products more. So the error is at most (k + 2 c + 2) 2^-24 S to first order, and k / 32 + 2 more terms
// than nf4_many.cuh's bound of 2 k. That holds while absmax values of neighbouring chunks of a row lie within 2^60 of each
// other; beyond, sums may overflow or vanish. Chunks of zeros have absmax 0: their codes are taken for that of zero,
// and the unit stays.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/nf4_rows.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace peftops::cuda {

constexpr int kGroup = 128, kWgmmaThreads = 3 * kGroup, kConsumers = 2 * kGroup;
constexpr int kWgmmaOuts = 128;   // rows of W a block of threads
constexpr int kWgmmaUnits = 8;    // of 16 bytes in a chunk of a row of x

template <class T, int Rows> struct WgmmaMemory {   // from a multiple of 1024 bytes on
  union {
    uint4 x[kStages][Rows][kWgmmaUnits];
    float sums[Rows][kWgmmaOuts + 4];   // afterwards
  };
  PairTable<T> pairs;
  float map[256];
  uint64_t full[kStages], empty[kStages];

  __device__ Mbarrier is_full(int stage) { return {shared_address(&full[stage])}; }
  __device__ Mbarrier is_empty(int stage) { return {shared_address(&empty[stage])}; }
};

struct SwapUnits {
  __device__ static int of(int unit, int row) { return unit ^ (row % 8); }
};

// The 64 codes of a chunk of rows g and g + 8 of a warp. All four lanes of a row read the same: lane t takes byte t of
// each word, which are the columns of A that it has to have.
struct WholeChunk {
  uint4 codes[2][2];
  float scale[2];
};

// Reads them, chunk after chunk. In place of rows that do not exist it reads the last row: their products are not used.
struct WholeReader {
  const Nf4Weight& w;
  const float* map;
  int log_block;
  float offset = offset_of(w);
  int64_t flat[2];

  __device__ WholeReader(const Nf4Weight& weight, int log, int64_t first, const float* dynamic)
      : w(weight), map(dynamic), log_block(log) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 8 * half + threadIdx.x % kWarp / 4;
      flat[half] = (row < w.rows ? row : w.rows - 1) * w.cols;
    }
  }
  __device__ void read(WholeChunk& chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4* from = reinterpret_cast<const uint4*>(w.packed + flat[half] / 2);
      chunk.codes[half][0] = from[0], chunk.codes[half][1] = from[1];
      chunk.scale[half] = absmax_of(w, flat[half] >> log_block, map, offset);
      flat[half] += kChunk;
    }
  }
};

template <class T, int Rows>
__device__ void bring_x(const Nf4Linear& a, int64_t first_row, int chunks, WgmmaMemory<T, Rows>& memory) {
  const PanelCopy<T, kGroup, Rows, kWgmmaUnits, SwapUnits> copy(static_cast<const T*>(a.x), first_row, a.m, a.weight.cols);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % kStages;
    memory.is_empty(stage).wait(~(chunk / kStages) & 1);   // the first time around they are
    copy(memory.x[stage], chunk);
    memory.is_full(stage).arrive_after_copies();
  }
}

// Calls f(row of x, row of W, sum) for every result.
template <class T, int Rows, class F>
__device__ void multiply_by_wgmma(const Nf4Linear& a, int log_block, WgmmaMemory<T, Rows>& memory, F f) {
  const int64_t first_row = int64_t(blockIdx.x) * Rows, first_out = int64_t(blockIdx.y) * kWgmmaOuts;
  const int chunks = int(a.weight.cols / kChunk);
  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; ++stage)
      memory.is_full(stage).init(kGroup), memory.is_empty(stage).init(kConsumers / kWarp);
  memory.pairs.template fill<kWgmmaThreads>();
  if (a.weight.absmax_code && threadIdx.x < 256) memory.map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<40>();
    return bring_x(a, first_row, chunks, memory);
  }
  take_registers<232>();
  const int thread = threadIdx.x - kGroup, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;
  PairColumn pairs(memory.pairs);
  pairs.is_filled();
  WholeReader reader(a.weight, log_block, first_out + 16 * warp, memory.map);
  WholeChunk next;
  reader.read(next);
  float sum[Rows / 2] = {}, unit[2] = {1.f, 1.f};   // rows g and g + 8 take turns in twos
#pragma unroll 2
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const WholeChunk now = next;
    if (chunk + 1 < chunks) reader.read(next);
    float factor[2];
    uint32_t frag[4][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr uint32_t kZeros = 0x77777777;
      const float scale = now.scale[half];
      const bool zeros = scale == 0.f;
      factor[half] = zeros ? 1.f : __fdiv_rn(unit[half], scale);
      unit[half] = zeros ? unit[half] : scale;
      const uint32_t words[8] = {now.codes[half][0].x, now.codes[half][0].y, now.codes[half][0].z, now.codes[half][0].w,
                                 now.codes[half][1].x, now.codes[half][1].y, now.codes[half][1].z, now.codes[half][1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) frag[i / 2][half + i % 2 * 2] = pairs(zeros ? kZeros : words[i], t);
    }
    wait_for_wgmma();   // of the chunk before, whose stage others may have
    hold(sum);
    if (chunk && lane == 0) memory.is_empty((chunk - 1) % kStages).arrive();
#pragma unroll
    for (int i = 0; i < Rows / 2; ++i) sum[i] = __fmul_rn(sum[i], factor[i / 2 % 2]);
    const int stage = chunk % kStages;
    memory.is_full(stage).wait(chunk / kStages & 1);
    fence_proxy();
    hold(sum), hold(frag);
    fence_wgmma();
    const uint64_t x = swizzled_panel(shared_address(memory.x[stage]));
#pragma unroll
    for (int i = 0; i < 4; ++i) Wgmma<T, Rows>::multiply(sum, frag[i], x + 2 * i);
    commit_wgmma();
  }
  wait_for_wgmma();
  hold(sum);
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); };   // those who multiply
  meet();
#pragma unroll
  for (int i = 0; i < Rows / 2; ++i)
    memory.sums[i / 4 * 8 + 2 * t + i % 2][16 * warp + g + i / 2 % 2 * 8] =
        __fmul_rn(__fmul_rn(sum[i], unit[i / 2 % 2]), 1.f / kCodeFactor<T>);
  meet();
#pragma unroll 1
  for (int e = thread; e < Rows * kWgmmaOuts; e += kConsumers) {
    const int64_t row = first_row + e / kWgmmaOuts, out = first_out + e % kWgmmaOuts;
    if (row < a.m && out < a.weight.rows) f(row, out, memory.sums[e / kWgmmaOuts][e % kWgmmaOuts]);
  }
}

}  // namespace peftops::cuda
