// The expert of a block of threads. The host does not know the number of rows of each expert, so the grid has the
// largest possible number of tiles. A block looks up its own tile, and blocks beyond the last tile return.
#pragma once
#include <type_traits>

#include "kernels/cuda/device.cuh"
#include "kernels/experts_linear.h"

namespace peftops::cuda {

struct ExpertTile {
  int64_t expert, row, rows;   // its first row, and how many the expert has from there on
};

// The rows of an expert. Offsets are not checked, so rows beyond m are left out.
struct ExpertRows { int64_t begin, count; };
__device__ inline ExpertRows rows_of(const int64_t* offsets, int64_t expert, int64_t m) {
  const auto within = [&](int64_t v) { return v < 0 ? 0 : v < m ? v : m; };
  const int64_t begin = expert ? within(offsets[expert - 1]) : 0, end = within(offsets[expert]);
  return {begin, end > begin ? end - begin : 0};
}

// Tile blockIdx.x of `size` rows, if there are so many: by a whole warp, 32 experts at a time.
__device__ inline bool find_tile(const int64_t* offsets, int64_t experts, int64_t m, int size, ExpertTile* found) {
  const int lane = threadIdx.x % kWarp;
  int wanted = int(blockIdx.x);
  for (int64_t first = 0; first < experts; first += kWarp) {
    const int64_t e = first + lane;
    const ExpertRows rows = e < experts ? rows_of(offsets, e, m) : ExpertRows{0, 0};
    const int tiles = int(ceil_div(rows.count, size));
    int end = tiles;   // of this expert's tiles, among the 32
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += before;
    }
    const uint32_t reached = __ballot_sync(~0u, wanted < end);
    if (reached) {
      const int of = __popc(~reached & (reached - 1));   // the first of them
      const int64_t into = int64_t(wanted - __shfl_sync(~0u, end - tiles, of)) * size;
      *found = {first + of, __shfl_sync(~0u, rows.begin, of) + into, __shfl_sync(~0u, rows.count, of) - into};
      return true;
    }
    wanted -= __shfl_sync(~0u, end, kWarp - 1);
  }
  return false;
}

// The most tiles of `size` rows that m rows of so many experts make.
inline unsigned most_tiles(int64_t m, int64_t experts, int64_t size) {
  return unsigned(m / size + (m < experts ? m : experts));
}

// Tiles of rows by tiles of columns.
template <class Args> dim3 grid_of(const Experts<Args>& a, int64_t size, int64_t columns, int64_t of_columns) {
  return dim3(most_tiles(a.all.m, a.experts, size), unsigned(ceil_div(columns, of_columns)));
}

template <class T> __device__ T* moved(T* p, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return p ? reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + elements * size_of(dtype)) : p;
}

__device__ inline Nf4Weight weight_of(Nf4Weight w, int64_t expert, DType) {
  w.first += expert * w.rows * w.cols;
  return w;
}
__device__ inline GroupWeight weight_of(GroupWeight w, int64_t expert, DType) {
  const int64_t row = expert * w.rows, group = row * (w.cols / w.group);
  w.packed += row * (w.cols / 8 * w.bits), w.scales += group, w.zeros += group;
  return w;
}
__device__ inline Mxfp4Weight weight_of(Mxfp4Weight w, int64_t expert, DType) {
  const int64_t first = expert * w.rows * w.cols;
  w.packed += first / 2, w.scales += first / kMxBlock;
  return w;
}
__device__ inline DenseWeight weight_of(DenseWeight w, int64_t expert, DType dtype) {
  w.p = moved(w.p, dtype, expert * w.rows * w.cols);
  return w;
}

// What a layer's kernel takes for the tile: its rows lie where that kernel looks for them, from row blockIdx.x * size on.
template <class Weight> __device__ Linear<Weight> part_of(Linear<Weight> a, const ExpertTile& tile, int size) {
  const int64_t n = a.weight.rows, place = int64_t(blockIdx.x) * size, by = tile.row - place;
  a.weight = weight_of(a.weight, tile.expert, a.dtype);
  a.x = moved(a.x, a.dtype, by * a.weight.cols), a.y = moved(a.y, a.dtype, by * n);
  a.bias = moved(a.bias, a.bias_dtype, tile.expert * n), a.b = moved(a.b, a.b_dtype, tile.expert * n * a.r);
  a.u += by * a.r, a.m = place + tile.rows;
  return a;
}
template <class Backward, class = decltype(Backward::dx)>
__device__ Backward part_of(Backward a, const ExpertTile& tile, int size) {
  const int64_t n = a.weight.rows, k = a.weight.cols, place = int64_t(blockIdx.x) * size, by = tile.row - place;
  a.weight = weight_of(a.weight, tile.expert, a.dtype);
  a.g = moved(a.g, a.dtype, by * n), a.dx = moved(a.dx, a.dtype, by * k);
  a.a = moved(a.a, a.a_dtype, tile.expert * a.r * k);
  a.v += by * a.r, a.m = place + tile.rows;
  return a;
}

}  // namespace peftops::cuda
