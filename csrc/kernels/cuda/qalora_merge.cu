// B A as tiles of tile.cuh; a tile's zeros change as its sums are finished. Limit: reading scales and zeros and writing
// zeros, at the ranks that are in use.
#include "kernels/qalora_merge.h"
#include "kernels/cuda/tile.cuh"

namespace peftops::cuda {
namespace {

__global__ void __launch_bounds__(kTileThreads) merge(QaloraMerge a) {
  __shared__ TileMemory memory;
  TileSums c;
  multiply_tile<Along::depth, Along::across>(
      a.n, a.groups, a.r, [&](int64_t t, int64_t row) { return element(a.b, a.b_dtype, row * a.r + t); },
      [&](int64_t t, int64_t col) { return __fmul_rn(a.factor, element(a.a, a.a_dtype, t * a.groups + col)); }, memory,
      c);
  each_result(a.n, a.groups, [&](int64_t row, int64_t col, int i, int j) {
    const int64_t at = row * a.groups + col;
    a.out[at] = __fsub_rn(a.zeros[at], __fdiv_rn(c.at[i][j], a.scales[at]));
  });
}

}  // namespace

cudaError_t qalora_merge(const QaloraMerge& a, cudaStream_t stream) {
  if (a.n == 0 || a.groups == 0) return cudaSuccess;
  merge<<<tiles_of(a.n, a.groups), kTileThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
