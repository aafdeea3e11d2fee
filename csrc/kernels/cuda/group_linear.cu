// Two ways to a product with a group-quantised weight. With 16-bit x, rows of whole chunks stream through tensor cores,
// again for every 8 to 32 rows of x (group_rows.cuh). Everything else, and the backward product, is multiplied in
// fp32, tile by tile (tile.cuh), with the low-rank term as more depth.
#include "kernels/cuda/crossover.cuh"
#include "kernels/cuda/group_rows.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/operands.cuh"

namespace peftops::cuda {
namespace {

constexpr int kRowsWarps = 8;
template <class T, int B> using FewStream = GroupStream<T, B, 32>;

template <class T, int B, int Tiles>
__global__ void __launch_bounds__(kRowsWarps * kWarp, 1) group_rows(GroupLinear a, int log_group) {
  using Stream = FewStream<T, B>;
  __shared__ typename Stream::Memory memory;
  extern __shared__ uint4 dynamic[];
  multiply_rows<T>(a, Stream{a.weight, log_group}, memory,
                   *reinterpret_cast<RowsSums<Stream, Tiles, kRowsWarps>*>(dynamic), GroupFinish<T>{a, log_group});
}

template <class T> __global__ void __launch_bounds__(kTileThreads) any_group_rows(GroupLinear a, int log_group) {
  __shared__ TileMemory memory;
  multiply_any<T>(a, [&](int64_t flat) { return weight_at(a.weight, log_group, flat); }, memory);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) group_backward(GroupLinearBackward a, int log_group) {
  __shared__ TileMemory memory;
  const int64_t n = a.weight.rows, k = a.weight.cols, pools = a.r ? k / a.pool : 0;
  TileSums c;
  multiply_tile<Along::depth, Along::across>(
      a.m, k, n, [&](int64_t t, int64_t row) { return to_float(static_cast<const T*>(a.g)[row * n + t]); },
      [&](int64_t t, int64_t col) { return weight_at(a.weight, log_group, t * k + col); }, memory, c);
  multiply_tile<Along::depth, Along::across>(
      a.m, k, a.r, [&](int64_t t, int64_t row) { return a.v[row * a.r + t]; },
      [&](int64_t t, int64_t col) { return element(a.a, a.a_dtype, t * pools + col / a.pool); }, memory, c);
  each_result(a.m, k, [&](int64_t row, int64_t col, int i, int j) {
    static_cast<T*>(a.dx)[row * k + col] = from_float<T>(c.at[i][j]);
  });
}

cudaError_t launch_any(const GroupLinear& a, cudaStream_t stream) {
  return with_type(a.dtype, [&](auto t) {
    const dim3 grid = tiles_of(a.m, a.weight.rows);
    any_group_rows<decltype(t)><<<grid, kTileThreads, 0, stream>>>(a, log_group_of(a.weight.group));
    return cudaGetLastError();
  });
}

template <class T, int B, int Tiles> cudaError_t launch_tiles(const GroupLinear& a, cudaStream_t stream) {
  using Stream = FewStream<T, B>;
  constexpr size_t kShared = sizeof(RowsSums<Stream, Tiles, kRowsWarps>);
  cudaError_t status = allow_shared<group_rows<T, B, Tiles>>(kShared);
  Gpu gpu;
  if (status == cudaSuccess) status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  return launch_early(group_rows<T, B, Tiles>, gpu, rows_grid<Stream, Tiles, kRowsWarps>(a.m, a.weight.rows, gpu),
                      kRowsWarps * kWarp, kShared, stream, a, log_group_of(a.weight.group));
}

// More rows of x at a time decode the weight less often. The shorter the codes, the more columns of a row a thread has,
// and the fewer tiles keep their sums and what is under way in registers. Where rows are many, the library is the faster.
template <class T, int B> cudaError_t launch_rows(const GroupLinear& a, cudaStream_t stream) {
  if constexpr (B != 3)
    if (a.m > 8) return launch_tiles<T, B, 2>(a, stream);
  return launch_tiles<T, B, 1>(a, stream);
}

}  // namespace

cudaError_t group_linear(const GroupLinear& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.rows == 0) return cudaSuccess;
  return with_bits(a.weight.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    if (has_chunks<B>(a))
      return a.dtype == DType::bf16 ? launch_rows<__nv_bfloat16, B>(a, stream) : launch_rows<__half, B>(a, stream);
    return launch_any(a, stream);
  });
}

int64_t operands_depth(const GroupLinear& a) { return depth_of(a); }

cudaError_t group_operands(const LibraryOperands<GroupWeight>& o, cudaStream_t stream) {
  const GroupWeight& w = o.of.weight;
  return with_bits(w.bits, [&](auto bits) {
    return with_type(o.of.dtype, [&](auto t) {
      using T = decltype(t);
      // Rows begin at whole words, for three bits too.
      const bool wide = w.cols % 32 == 0 && aligned(w.packed, 8);
      return launch_operands<T>(o, GroupSource<T, decltype(bits)::value>{w, log_group_of(w.group)}, wide, stream);
    });
  });
}

cudaError_t by_library(const GroupLinear& a, Way wanted, bool* result) {
  return choose_way(a, wanted, result, [&](const Gpu& gpu) {
    bool chunks = false;
    with_bits(a.weight.bits, [&](auto bits) { return chunks = has_chunks<decltype(bits)::value>(a), cudaSuccess; });
    return group_clocks(a, gpu, chunks);
  });
}

cudaError_t by_library(const GroupLinearBackward& a, Way wanted, bool* result) {
  *result = wanted != Way::kernels && a.m > 0 && a.weight.rows > 0 && a.weight.cols > 0;
  return cudaSuccess;   // the kernel is a tile of fp32
}

cudaError_t group_linear_backward(const GroupLinearBackward& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.cols == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    const dim3 grid = tiles_of(a.m, a.weight.cols);
    group_backward<decltype(t)><<<grid, kTileThreads, 0, stream>>>(a, log_group_of(a.weight.group));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
