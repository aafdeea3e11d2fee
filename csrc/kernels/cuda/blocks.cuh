// Walking a tensor that is cut into blocks of a power of two elements in a row, quantisation blocks or groups. A lane
// holds 16 bytes, and a warp's tile is what its lanes hold; a block is some of the lanes, or `tiles` tiles of all.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

constexpr int kBlockThreads = 256, kBlockWarps = kBlockThreads / kWarp;

// For kernels over n elements of T in blocks of no less than a pack.
template <class T> struct Blocks {
  static constexpr int kTile = kWarp * Pack<T>::kSize;
  int tiles, log_lanes;   // of a block; the latter 5 if there are several tiles
  unsigned grid;          // of kBlockThreads threads

  Blocks(int64_t n, int64_t block)
      : tiles(block > kTile ? int(block / kTile) : 1),
        log_lanes(tiles > 1 ? 5 : __builtin_ctzll(uint64_t(block / Pack<T>::kSize))),
        grid(unsigned(ceil_div(n, int64_t(tiles) * kTile * kBlockWarps))) {}
};

// The first element of this lane.
template <class T> __device__ int64_t first_of_lane(int tiles) {
  const int64_t warp = int64_t(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
  return (warp * tiles * kWarp + threadIdx.x % kWarp) * Pack<T>::kSize;
}

// Elements i .. of w as floats; zeros beyond n. Wide: whole packs are aligned.
template <class T, bool Wide> __device__ void load(const T* w, int64_t i, int64_t n, float (&v)[Pack<T>::kSize]) {
  constexpr int N = Pack<T>::kSize;
  if (Wide && n - i >= N) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(w + i);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = to_float(pack.at[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = i + k < n ? to_float(w[i + k]) : 0.f;
  }
}

// v of all lanes of a block, put together by a commutative `both`; the same bits in each of them.
template <class V, class F> __device__ V over_lanes(V v, int log_lanes, const F& both) {
  for (int step = 1; step < 1 << log_lanes; step *= 2) v = both(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

}  // namespace peftops::cuda
