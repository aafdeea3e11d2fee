// Three ways to a product with an NF4 weight. With 16-bit x, rows of whole chunks go through tensor cores: up to 16
// rows of x stream the weight (nf4_rows.cuh), more share it (nf4_many.cuh); and so does a backward product with 16-bit g
// (nf4_backward.cuh). Everything else is multiplied in fp32, tile by tile (tile.cuh). The low-rank term joins the fp32
// sums before the one rounding: for few rows result by result, else as more depth, [x | scaling * u] [W^T ; B^T].
#include "kernels/cuda/crossover.cuh"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/nf4_backward.cuh"
#include "kernels/cuda/nf4_many.cuh"
#include "kernels/cuda/operands.cuh"

namespace peftops::cuda {
namespace {

// One tile of 8 rows of x leaves room for two small blocks of threads on a multiprocessor, one of which waits while the
// other works.
template <class T, int Tiles> using FewStream = Nf4Stream<T, Tiles == 1 ? 16 : 32>;

template <class T, int Tiles, int Warps>
__global__ void __launch_bounds__(Warps * kWarp, RowsChunk<FewStream<T, Tiles>, Tiles, Warps>::kBlocks)
few_rows(Nf4Linear a, int log_block) {
  using Stream = FewStream<T, Tiles>;
  __shared__ typename Stream::Memory memory;
  extern __shared__ uint4 dynamic[];
  multiply_rows<T>(a, Stream{a.weight, log_block}, memory, *reinterpret_cast<RowsSums<Stream, Tiles, Warps>*>(dynamic),
                   Finish<T, Nf4Linear>{a, a.r});
}

template <class T, int Stripes> __global__ void __launch_bounds__(kManyThreads) many_rows(Nf4Linear a, int log_block) {
  extern __shared__ uint4 dynamic[];   // more than 48 KB
  multiply_many<T, Stripes>(a, log_block, *reinterpret_cast<ManyMemory<T>*>(dynamic), Finish<T, Nf4Linear>{a, 0});
}

template <class T> __global__ void __launch_bounds__(kTileThreads) any_rows(Nf4Linear a, int log_block) {
  __shared__ TileMemory memory;
  __shared__ float map[256];
  map[threadIdx.x] = dynamic_map.at[threadIdx.x];   // multiply_tile begins with a barrier
  multiply_any<T>(a, [&](int64_t flat) { return weight_at(a.weight, log_block, flat, map); }, memory);
}

template <class T, int Rows>
__global__ void __launch_bounds__(kBackThreads) many_back(Nf4LinearBackward a, DropoutMask mask, int log_block) {
  extern __shared__ uint4 dynamic[];
  mask.begin();
  multiply_backward<T, Rows>(a, mask, log_block, *reinterpret_cast<BackwardMemory<Rows>*>(dynamic));
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) any_back(Nf4LinearBackward a, DropoutMask mask, int log_block) {
  __shared__ TileMemory memory;
  mask.begin();
  __shared__ float map[256];
  map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  const int64_t n = a.weight.rows, k = a.weight.cols;
  TileSums c, low_rank;
  multiply_tile<Along::depth, Along::across>(
      a.m, k, n, [&](int64_t t, int64_t row) { return to_float(static_cast<const T*>(a.g)[row * n + t]); },
      [&](int64_t t, int64_t col) { return weight_at(a.weight, log_block, t * k + col, map); }, memory, c);
  multiply_tile<Along::depth, Along::across>(
      a.m, k, a.r, [&](int64_t t, int64_t row) { return a.v[row * a.r + t]; },
      [&](int64_t t, int64_t col) { return element(a.a, a.a_dtype, t * k + col); }, memory, low_rank);
  each_result(a.m, k, [&](int64_t row, int64_t col, int i, int j) {
    const float dropped = a.r ? mask.apply(row, col, low_rank.at[i][j]) : 0.f;
    static_cast<T*>(a.dx)[row * k + col] = from_float<T>(c.at[i][j] + dropped);
  });
}

int log_block_of(const Nf4Weight& w) { return __builtin_ctzll(uint64_t(w.block_size)); }

template <class T, int Tiles, int Warps>
cudaError_t launch_few_rows(const Nf4Linear& a, const Gpu& gpu, cudaStream_t stream) {
  using Stream = FewStream<T, Tiles>;
  constexpr size_t kShared = sizeof(RowsSums<Stream, Tiles, Warps>);
  const cudaError_t status = allow_shared<few_rows<T, Tiles, Warps>>(kShared);
  if (status != cudaSuccess) return status;
  return launch_early(few_rows<T, Tiles, Warps>, gpu, rows_grid<Stream, Tiles, Warps>(a.m, a.weight.rows, gpu),
                      Warps * kWarp, kShared, stream, a, log_block_of(a.weight));
}

template <class T, int Stripes> cudaError_t launch_many_rows(const Nf4Linear& a, cudaStream_t stream) {
  const cudaError_t status = allow_shared<many_rows<T, Stripes>>(sizeof(ManyMemory<T>));
  if (status != cudaSuccess) return status;
  const dim3 grid(unsigned(ceil_div(a.m, kManyRows)), unsigned(ceil_div(a.weight.rows, 16 * Stripes * kManyWarps)));
  many_rows<T, Stripes><<<grid, kManyThreads, sizeof(ManyMemory<T>), stream>>>(a, log_block_of(a.weight));
  return cudaGetLastError();
}

template <class T, int Rows> cudaError_t launch_many_back(const Nf4LinearBackward& a, cudaStream_t stream) {
  const cudaError_t status = allow_shared<many_back<T, Rows>>(sizeof(BackwardMemory<Rows>));
  if (status != cudaSuccess) return status;
  const dim3 grid(unsigned(ceil_div(a.m, Rows)), unsigned(ceil_div(a.weight.cols, kBackCols)));
  many_back<T, Rows><<<grid, kBackThreads, sizeof(BackwardMemory<Rows>), stream>>>(a, DropoutMask(a.dropout),
                                                                                   log_block_of(a.weight));
  return cudaGetLastError();
}

// Large tiles read what they share less often, small ones make twice as many blocks: enough of them come first.
template <class T> cudaError_t launch_units(const Nf4LinearBackward& a, cudaStream_t stream) {
  const int64_t blocks = ceil_div(a.weight.cols, kBackCols) * ceil_div(a.m, 128);
  return blocks >= kEnoughBlocks ? launch_many_back<T, 128>(a, stream) : launch_many_back<T, 64>(a, stream);
}

template <class T> cudaError_t launch_chunks(const Nf4Linear& a, cudaStream_t stream) {
  Gpu gpu;
  const cudaError_t status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  if (a.m <= 8)   // a small weight has no work for a second block of threads: more warps share it
    return ceil_div(a.weight.rows, FewStream<T, 1>::kOuts) > gpu.multiprocessors
               ? launch_few_rows<T, 1, 8>(a, gpu, stream) : launch_few_rows<T, 1, 16>(a, gpu, stream);
  if (a.m <= kFewRows) return launch_few_rows<T, 2, 16>(a, gpu, stream);
  if (rows_again(a, gpu)) return launch_few_rows<T, 4, 8>(a, gpu, stream);
  return stripes_of(a) == 2 ? launch_many_rows<T, 2>(a, stream) : launch_many_rows<T, 1>(a, stream);
}

}  // namespace

cudaError_t nf4_linear(const Nf4Linear& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.rows == 0) return cudaSuccess;
  if (has_chunks(a))
    return a.dtype == DType::bf16 ? launch_chunks<__nv_bfloat16>(a, stream) : launch_chunks<__half>(a, stream);
  return with_type(a.dtype, [&](auto t) {
    any_rows<decltype(t)><<<tiles_of(a.m, a.weight.rows), kTileThreads, 0, stream>>>(a, log_block_of(a.weight));
    return cudaGetLastError();
  });
}

int64_t operands_depth(const Nf4Linear& a) { return depth_of(a); }

cudaError_t nf4_operands(const LibraryOperands<Nf4Weight>& o, cudaStream_t stream) {
  const Nf4Weight& w = o.of.weight;
  return with_type(o.of.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_operands<T>(o, Nf4Source<T>{w, log_block_of(w)}, aligned(w.packed, Pack<T>::kSize / 2), stream);
  });
}

cudaError_t by_library(const Nf4Linear& a, Way wanted, bool* result) {
  return choose_way(a, wanted, result, [&](const Gpu& gpu) { return nf4_clocks(a, gpu, has_chunks(a)); });
}

cudaError_t by_library(const Nf4LinearBackward& a, Way wanted, bool* result) {
  *result = wanted != Way::kernels && a.m > 0 && a.weight.rows > 0 && a.weight.cols > 0;
  return cudaSuccess;   // nowhere are the kernels known to be the shorter way
}

cudaError_t nf4_linear_backward(const Nf4LinearBackward& a, cudaStream_t stream) {
  if (a.m == 0 || a.weight.cols == 0) return cudaSuccess;
  if (has_units(a))
    return a.dtype == DType::bf16 ? launch_units<__nv_bfloat16>(a, stream) : launch_units<__half>(a, stream);
  return with_type(a.dtype, [&](auto t) {
    any_back<decltype(t)><<<tiles_of(a.m, a.weight.cols), kTileThreads, 0, stream>>>(a, DropoutMask(a.dropout),
                                                                                    log_block_of(a.weight));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
