// y = x W^T for a few rows of 16-bit x: the weight streams once from memory straight into tensor-core fragments.
//
// The weight is the 16-row operand A of mma.m16n8k16 and x, transposed, the operand B, so no row of a product is wasted
// on rows that x does not have. The four threads of a quad share a row of the weight: each loads contiguous bytes of a
// chunk of it, 32 in all, which is a sector of memory, and the same columns of x; a product takes four columns from
// every thread. Which column of the chunk a product calls its k-th does not matter as long as both operands agree, so
// neither goes through shared memory. W is read in whole sectors, x by halves of them, the second of which is in L1.
//
// The stream decodes codes: Nf4Stream (nf4_rows.cuh) or GroupStream (group_rows.cuh). Its kEarlyScales and
// kHoldsScales say whether a thread has registers for the first scales, and for those of the next stage, ahead of time. Codes are
// multiplied unscaled, and a chunk's sum by its scale in fp32. The warps of a block of threads share the depth, and their
// sums are added in order, so the result has the same bits every time.
//
// Most of the time is waiting: a layer of 4096 x 4096 takes 3 us of memory traffic, and the latency of one load is most
// of a microsecond. So every load starts before its value is needed. The first chunks are on their way to the L2 cache
// before the tables are made, and both while the kernel before ends; a warp has its next chunks in registers, as many
// as there is room for; a block of threads that has several tiles of the weight to do, one after another with the same
// tables, asks for the next before it adds up the last.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

constexpr int kFewRows = 16;   // of x: two tiles of 8

template <class T> __device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T> constexpr uint32_t kOnes = 0x3f803f80;   // a pair of them
template <> constexpr uint32_t kOnes<__half> = 0x3c003c00;

// A thread's codes and x of a chunk, in registers. Their number decides how many loads are ahead. The
// stream's kOuts are the rows of the weight that a block of threads does at a time, 16 or 32.
template <class Stream, int Tiles, int Warps> struct RowsChunk {
  static constexpr int kStripes = Stream::kOuts / 16;
  static constexpr int kOwn = Stream::kColumns / 4;   // columns of it a thread has
  static constexpr int kWords = 4 * kStripes * Stream::kPieces + Tiles * kOwn / 2;
  // Of them a warp has asked for; with several blocks of threads on a multiprocessor two are enough.
  static constexpr int kBlocks = kStripes == 1 && Warps == 8 ? 2 : 1;
  static constexpr int kAhead = kWords <= 12 && kBlocks == 1                                     ? 4
                                : kWords <= 16 || (Warps == 8 && kWords <= (Stream::kZeros ? 24 : 40)) ? 2
                                                                                                 : 1;

  uint2 codes[kStripes][2][Stream::kPieces];   // of rows g and g + 8
  uint4 x[Tiles][kOwn / 8];                    // eight columns, two products
};

// The warps' sums. They are in dynamic shared memory, and the stream's tables in static one, whose address is in the
// instructions that look something up.
template <class Stream, int Tiles, int Warps> struct RowsSums {
  float at[Warps][8 * Tiles][Stream::kOuts + 4];   // 4 more: a fragment's 32 lie in 32 banks
};

// What turns an unscaled sum of codes into one of weights: scale * (sum of code x - zero * sum of x).
struct Affine { float scale, zero; };

// Tiles: of 8 rows of x, which blockIdx.x counts. Calls f(row of x, row of W, sum) for every result.
template <class T, int Tiles, int Warps, class Args, class Stream, class F>
__device__ void multiply_rows(const Args& a, const Stream& stream, typename Stream::Memory& memory,
                              RowsSums<Stream, Tiles, Warps>& sums, const F& f) {
  using Chunk = RowsChunk<Stream, Tiles, Warps>;
  constexpr int kOwn = Chunk::kOwn, kSteps = kOwn / 4, kOuts = Stream::kOuts, kStripes = Chunk::kStripes;
  constexpr int kWarps = Warps, kThreads = Warps * kWarp, kAhead = Chunk::kAhead;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = a.weight.rows, k = a.weight.cols, first_row = int64_t(blockIdx.x) * (8 * Tiles);
  const int chunks = int(k / Stream::kColumns), stage = stream.staged();   // chunks whose scales are staged at a time

  // This lane's rows of a matrix, 8 apart: the first one's place, and how far it is to the others. In place of rows
  // that do not exist it has the last row: their sums are not used.
  const auto first_of = [](int64_t row, int64_t rows) { return row < rows ? row : rows - 1; };
  const auto far = [](int64_t row, int64_t rows, int64_t apart) {
    return int(row + apart < rows ? apart : row < rows ? rows - 1 - row : 0);
  };
  constexpr int kChunkBytes = Stream::kColumns / 8 * Stream::kBits;
  const int row_bytes = int(k / 8 * Stream::kBits);
  const T* const x_at = static_cast<const T*>(a.x) + first_of(first_row + g, a.m) * k + kOwn * t;
  int x_far[Tiles];
#pragma unroll
  for (int m = 0; m < Tiles; ++m) x_far[m] = far(first_row + g, a.m, 8 * m) * int(k);
  struct Tile { const uint8_t* at; int far[kStripes][2]; };
  const auto tile_at = [&](int64_t first) {
    Tile tile = {a.weight.packed + first_of(first + g, n) * row_bytes + kOwn * t / 8 * Stream::kBits, {}};
#pragma unroll
    for (int s = 0; s < kStripes; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) tile.far[s][half] = far(first + g, n, 16 * s + 8 * half) * row_bytes;
    return tile;
  };
  const auto load = [&](Chunk& to, const Tile& tile, int chunk) {
    if (chunk >= chunks) return;
    const uint8_t* const codes = tile.at + int64_t(chunk) * kChunkBytes;
#pragma unroll
    for (int s = 0; s < kStripes; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = codes + tile.far[s][half];
#pragma unroll
        for (int i = 0; i < Stream::kPieces; ++i)
          to.codes[s][half][i] = *reinterpret_cast<const uint2*>(from + 8 * i);
      }
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      const T* from = x_at + int64_t(chunk) * Stream::kColumns + x_far[m];
#pragma unroll
      for (int i = 0; i < kOwn / 8; ++i) to.x[m][i] = *reinterpret_cast<const uint4*>(from + 8 * i);
    }
  };

  float sum[kStripes][Tiles][4];   // of rows g and g + 8 of W, rows 2t and 2t + 1 of x
  const auto multiply_chunk = [&](const auto& table, const Chunk& now, int begin, int chunk) {
    for (int p = 0; p < stream.parts(); ++p) {   // a scale that is not the whole chunk's is that of some of a quad
      const bool mine = stream.parts() == 1 || t * stream.parts() / 4 == p;
      float part[kStripes][Tiles][4] = {};
      [[maybe_unused]] float plain[Tiles][4] = {};   // sums of x alone, where there are zeros
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        uint32_t frag[kStripes][4];
#pragma unroll
        for (int s = 0; s < kStripes; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            stream.decode(table, now.codes[s][half], i, frag[s][half], frag[s][half + 2]);
#pragma unroll
        for (int m = 0; m < Tiles; ++m) {
          const uint4& v = now.x[m][i / 2];
          const uint32_t b0 = mine ? i % 2 ? v.z : v.x : 0, b1 = mine ? i % 2 ? v.w : v.y : 0;
          if constexpr (Stream::kZeros) {   // rows of ones add up x
            const uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
            multiply<T>(plain[m], ones, b0, b1);
          }
#pragma unroll
          for (int s = 0; s < kStripes; ++s) multiply<T>(part[s][m], frag[s], b0, b1);
        }
      }
#pragma unroll
      for (int s = 0; s < kStripes; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Affine of = stream.affine(memory, 16 * s + 8 * half + g, begin, chunk, p);
#pragma unroll
          for (int m = 0; m < Tiles; ++m)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& total = sum[s][m][2 * half + e];
              float value = part[s][m][2 * half + e];
              if constexpr (Stream::kZeros) value = __fmaf_rn(-of.zero, plain[m][e], value);
              total = __fmaf_rn(of.scale, value, total);
            }
        }
    }
  };

  int64_t first = int64_t(blockIdx.y) * kOuts;   // of the tile's rows of the weight
  let_next_begin();
#pragma unroll
  for (int d = 0; d < kAhead; ++d) {   // a lane has a row of this warp's chunks
    const int64_t row = first + lane % kOuts, chunk = warp + d * kWarps;
    if (row < n && chunk < chunks) bring_to_l2(a.weight.packed + row * row_bytes + chunk * kChunkBytes);
  }
  if (a.r && threadIdx.x < kOuts && first + threadIdx.x < n)
    bring_to_l2(static_cast<const char*>(a.b) + (first + threadIdx.x) * a.r * size_of(a.b_dtype));
  auto table = stream.template begin<kThreads>(memory);   // what codes are looked up in, if anything
  wait_for_inputs();
  typename Stream::template Scales<kThreads> scales;
  Chunk chunk[kAhead];
  if (Stream::kEarlyScales) scales.load(stream, first, 0);
#pragma unroll
  for (int d = 0; d < kAhead; ++d) load(chunk[d], tile_at(first), warp + d * kWarps);

  for (int64_t next; first < n; first = next) {
    next = first + int64_t(gridDim.y) * kOuts;
    const Tile tile = tile_at(first);
#pragma unroll
    for (int s = 0; s < kStripes; ++s)
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[s][m][e] = 0.f;
    for (int begin = 0, end; begin < chunks; begin = end) {
      end = begin + stage < chunks ? begin + stage : chunks;
      __syncthreads();   // the last scales are done with, as are the last tile's sums
      if (!Stream::kHoldsScales && !(Stream::kEarlyScales && begin == 0 && first == int64_t(blockIdx.y) * kOuts))
        scales.load(stream, first, begin);
      scales.store(stream, memory, begin);
      __syncthreads();
      table.is_filled();
      if (Stream::kHoldsScales && end < chunks) scales.load(stream, first, end);
      else if (Stream::kHoldsScales && next < n) scales.load(stream, next, 0);
      // A stage is a multiple of kAhead * kWarps chunks, but for the last, so that a chunk is where it is looked for.
#pragma unroll 1
      for (int at = begin + warp; at < end; at += kAhead * kWarps)
#pragma unroll
        for (int d = 0; d < kAhead; ++d)
          if (at + d * kWarps < end) {
            multiply_chunk(table, chunk[d], begin, at + d * kWarps);
            load(chunk[d], tile, at + (d + kAhead) * kWarps);
          }
    }
    if (next < n)
#pragma unroll
      for (int d = 0; d < kAhead; ++d) load(chunk[d], tile_at(next), warp + d * kWarps);
#pragma unroll
    for (int s = 0; s < kStripes; ++s)
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.at[warp][8 * m + 2 * t + e % 2][16 * s + g + e / 2 * 8] = sum[s][m][e];
    __syncthreads();
    const int rows = int(a.m - first_row < 8 * Tiles ? a.m - first_row : 8 * Tiles);
    for (int e = threadIdx.x; e < kOuts * rows; e += kThreads) {
      const int out = e % kOuts, row = e / kOuts;
      if (first + out >= n) continue;
      float total = 0.f;
#pragma unroll
      for (const auto& of_warp : sums.at) total += of_warp[row][out];
      f(first_row + row, first + out, __fmul_rn(total, 1.f / Stream::kFactor));
    }
  }
}

// The grid for m rows of x and n of the weight: no more blocks of threads than fit the GPU at once, where that is for the
// weight to say.
template <class Stream, int Tiles, int Warps> dim3 rows_grid(int64_t m, int64_t n, const Gpu& gpu) {
  const int64_t of_x = ceil_div(m, 8 * Tiles), of_w = ceil_div(n, Stream::kOuts);
  const int64_t each = ceil_div(RowsChunk<Stream, Tiles, Warps>::kBlocks * gpu.multiprocessors, of_x);
  return dim3(unsigned(of_x), unsigned(of_w < each ? of_w : each));
}

}  // namespace peftops::cuda
