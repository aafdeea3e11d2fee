// The kernels of nf4_linear.cu, group_linear.cu and mxfp4_linear.cu for a stack of weights: their tiles, each of an
// expert's rows (experts.cuh). With 16-bit x, packed rows of whole chunks go through tensor cores: where experts have up
// to 16 rows on the average they stream their weight (rows.cuh), where they have more it is shared by 64
// (nf4_many.cuh). Everything else is multiplied in fp32, tile by tile. Offsets are read on the device, so a graph of it
// serves any loads. Backward in bf16, a library's product of decoded weights may be faster (experts_library.cuh).
#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/experts_library.cuh"
#include "kernels/cuda/group_rows.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/mxfp4_rows.cuh"
#include "kernels/cuda/nf4_backward.cuh"
#include "kernels/cuda/nf4_many.cuh"

namespace peftops::cuda {
namespace {

template <class T, int Tiles> using Nf4Few = Nf4Stream<T, Tiles == 1 ? 16 : 32>;

template <class T, int Tiles, int Warps>
__global__ void __launch_bounds__(Warps * kWarp, RowsChunk<Nf4Few<T, Tiles>, Tiles, Warps>::kBlocks)
stack_few_rows(ExpertsNf4 a, int log_block) {
  using Stream = Nf4Few<T, Tiles>;
  __shared__ typename Stream::Memory memory;
  extern __shared__ uint4 dynamic[];
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, 8 * Tiles, &tile)) return;
  Nf4Linear part = part_of(a.all, tile, 8 * Tiles);
  const Nf4Weight weight = part.weight;
  part.weight.packed += weight.first / 2;   // rows of whole chunks begin at a byte
  multiply_rows<T>(part, Stream{weight, log_block}, memory, *reinterpret_cast<RowsSums<Stream, Tiles, Warps>*>(dynamic),
                   Finish<T, Nf4Linear>{part, part.r});
}

template <class T> __global__ void __launch_bounds__(kManyThreads) stack_many_rows(ExpertsNf4 a, int log_block) {
  extern __shared__ uint4 dynamic[];
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, kManyRows, &tile)) return;
  __shared__ Nf4Linear part;   // registers are scarce
  if (threadIdx.x == 0) part = part_of(a.all, tile, kManyRows);
  __syncthreads();
  multiply_many<T, 1>(part, log_block, *reinterpret_cast<ManyMemory<T>*>(dynamic), Finish<T, Nf4Linear>{part, 0});
}

constexpr int kBackRows = 64;
template <class T>
__global__ void __launch_bounds__(kBackThreads) stack_many_back(ExpertsNf4Backward a, DropoutMask none, int log_block) {
  extern __shared__ uint4 dynamic[];
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, kBackRows, &tile)) return;
  const Nf4LinearBackward part = part_of(a.all, tile, kBackRows);
  multiply_backward<T, kBackRows>(part, none, log_block,
                                  *reinterpret_cast<BackwardMemory<kBackRows>*>(dynamic));
}

constexpr int kGroupWarps = 8;
// Of 32 rows at a time, registers would spill.
template <class T, int B> using GroupFew = GroupStream<T, B, 16>;
template <class T, int B, int Tiles>
__global__ void __launch_bounds__(kGroupWarps * kWarp, 1) stack_group_rows(ExpertsGroup a, int log_group) {
  using Stream = GroupFew<T, B>;
  __shared__ typename Stream::Memory memory;
  extern __shared__ uint4 dynamic[];
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, 8 * Tiles, &tile)) return;
  __shared__ GroupLinear part;   // registers are scarce
  if (threadIdx.x == 0) part = part_of(a.all, tile, 8 * Tiles);
  __syncthreads();
  multiply_rows<T>(part, Stream{part.weight, log_group}, memory,
                   *reinterpret_cast<RowsSums<Stream, Tiles, kGroupWarps>*>(dynamic), GroupFinish<T>{part, log_group});
}

template <class T, int Tiles> __global__ void __launch_bounds__(kGroupWarps * kWarp, 1) stack_mxfp4_rows(ExpertsMxfp4 a, int) {
  using Stream = Mxfp4Stream<T, 32>;
  __shared__ typename Stream::Memory memory;
  extern __shared__ uint4 dynamic[];
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, 8 * Tiles, &tile)) return;
  const Mxfp4Linear part = part_of(a.all, tile, 8 * Tiles);
  multiply_rows<T>(part, Stream{part.weight}, memory, *reinterpret_cast<RowsSums<Stream, Tiles, kGroupWarps>*>(dynamic),
                   Mxfp4Finish<T>{part});
}

// Any element of a weight, for products in fp32.
template <class T> struct AnyElement {
  float map[256];   // in shared memory
  int log;          // of the elements that share a scale

  __device__ void begin(int log_shared) {   // multiply_tile begins with a barrier
    map[threadIdx.x] = dynamic_map.at[threadIdx.x];
    if (threadIdx.x == 0) log = log_shared;
  }
  __device__ float operator()(const Nf4Weight& w, int64_t flat) const {
    return weight_at(w, log, w.first + flat, map);
  }
  __device__ float operator()(const GroupWeight& w, int64_t flat) const { return weight_at(w, log, flat); }
  __device__ float operator()(const Mxfp4Weight& w, int64_t flat) const { return weight_at(w, flat); }
  __device__ float operator()(const DenseWeight& w, int64_t flat) const {
    return to_float(static_cast<const T*>(w.p)[w.transposed ? flat % w.cols * w.rows + flat / w.cols : flat]);
  }
};

template <class T, class Args> __global__ void __launch_bounds__(kTileThreads) stack_any_rows(Experts<Args> a, int log) {
  __shared__ TileMemory memory;
  __shared__ AnyElement<T> weight;
  ExpertTile tile;
  if (!find_tile(a.offsets, a.experts, a.all.m, kTile, &tile)) return;
  const Args part = part_of(a.all, tile, kTile);
  weight.begin(log);
  multiply_any<T>(part, [&](int64_t flat) { return weight(part.weight, flat); }, memory);
}

template <class T, class Args> __global__ void __launch_bounds__(kTileThreads) stack_any_back(Experts<Args> of, int log) {
  __shared__ TileMemory memory;
  __shared__ AnyElement<T> weight;
  ExpertTile tile;
  if (!find_tile(of.offsets, of.experts, of.all.m, kTile, &tile)) return;
  const Args a = part_of(of.all, tile, kTile);
  weight.begin(log);
  const int64_t n = a.weight.rows, k = a.weight.cols;
  TileSums c;
  multiply_tile<Along::depth, Along::across>(
      a.m, k, n, [&](int64_t t, int64_t row) { return to_float(static_cast<const T*>(a.g)[row * n + t]); },
      [&](int64_t t, int64_t col) { return weight(a.weight, t * k + col); }, memory, c);
  multiply_tile<Along::depth, Along::across>(
      a.m, k, a.r, [&](int64_t t, int64_t row) { return a.v[row * a.r + t]; },
      [&](int64_t t, int64_t col) { return element(a.a, a.a_dtype, t * k + col); }, memory, c);
  each_result(a.m, k, [&](int64_t row, int64_t col, int i, int j) {
    static_cast<T*>(a.dx)[row * k + col] = from_float<T>(c.at[i][j]);
  });
}

int log_of(int64_t power) { return __builtin_ctzll(uint64_t(power)); }
int log_of(const Nf4Weight& w) { return log_of(w.block_size); }
int log_of(const GroupWeight& w) { return log_of(w.group); }
int log_of(const Mxfp4Weight&) { return kLogMxBlock; }
int log_of(const DenseWeight&) { return 0; }

// Kernel: one that streams the weight, for Tiles of 8 rows.
template <auto* Kernel, class Stream, int Tiles, int Warps, class Args>
cudaError_t launch_few(const Experts<Args>& a, int log, cudaStream_t stream) {
  constexpr size_t kShared = sizeof(RowsSums<Stream, Tiles, Warps>);
  cudaError_t status = allow_shared<Kernel>(kShared);
  Gpu gpu;
  if (status == cudaSuccess) status = ask_gpu(&gpu);
  if (status != cudaSuccess) return status;
  const int64_t tiles = most_tiles(a.all.m, a.experts, 8 * Tiles);
  const dim3 grid = rows_grid<Stream, Tiles, Warps>(tiles * 8 * Tiles, a.all.weight.rows, gpu);
  Kernel<<<grid, Warps * kWarp, kShared, stream>>>(a, log);
  return cudaGetLastError();
}

template <class T> cudaError_t launch_chunks(const ExpertsNf4& a, cudaStream_t stream) {
  const int log = log_of(a.all.weight);
  if (a.all.m <= 8 * a.experts) return launch_few<stack_few_rows<T, 1, 8>, Nf4Few<T, 1>, 1, 8>(a, log, stream);
  if (a.all.m <= kFewRows * a.experts) return launch_few<stack_few_rows<T, 2, 16>, Nf4Few<T, 2>, 2, 16>(a, log, stream);
  const cudaError_t status = allow_shared<stack_many_rows<T>>(sizeof(ManyMemory<T>));
  if (status != cudaSuccess) return status;
  const dim3 grid = grid_of(a, kManyRows, a.all.weight.rows, 16 * kManyWarps);
  stack_many_rows<T><<<grid, kManyThreads, sizeof(ManyMemory<T>), stream>>>(a, log);
  return cudaGetLastError();
}

template <class T, int B> cudaError_t launch_rows(const ExpertsGroup& a, cudaStream_t stream) {
  const int log = log_of(a.all.weight);
  if constexpr (B > 3)
    if (a.all.m > 8 * a.experts)
      return launch_few<stack_group_rows<T, B, 2>, GroupFew<T, B>, 2, kGroupWarps>(a, log, stream);
  return launch_few<stack_group_rows<T, B, 1>, GroupFew<T, B>, 1, kGroupWarps>(a, log, stream);
}

template <class T> cudaError_t launch_rows(const ExpertsMxfp4& a, cudaStream_t stream) {
  if (a.all.m > 8 * a.experts) return launch_few<stack_mxfp4_rows<T, 2>, Mxfp4Stream<T, 32>, 2, kGroupWarps>(a, 0, stream);
  return launch_few<stack_mxfp4_rows<T, 1>, Mxfp4Stream<T, 32>, 1, kGroupWarps>(a, 0, stream);
}

template <class Args> cudaError_t launch_any(const Experts<Args>& a, cudaStream_t stream) {
  return with_type(a.all.dtype, [&](auto t) {
    const dim3 grid = grid_of(a, kTile, a.all.weight.rows, kTile);
    stack_any_rows<decltype(t)><<<grid, kTileThreads, 0, stream>>>(a, log_of(a.all.weight));
    return cudaGetLastError();
  });
}
template <class Args> cudaError_t launch_any_back(const Experts<Args>& a, cudaStream_t stream) {
  if (a.all.m == 0 || a.all.weight.cols == 0) return cudaSuccess;
  return with_type(a.all.dtype, [&](auto t) {
    const dim3 grid = grid_of(a, kTile, a.all.weight.cols, kTile);
    stack_any_back<decltype(t)><<<grid, kTileThreads, 0, stream>>>(a, log_of(a.all.weight));
    return cudaGetLastError();
  });
}

template <class T> cudaError_t launch_units(const ExpertsNf4Backward& a, cudaStream_t stream) {
  constexpr size_t kShared = sizeof(BackwardMemory<kBackRows>);
  const cudaError_t status = allow_shared<stack_many_back<T>>(kShared);
  if (status != cudaSuccess) return status;
  stack_many_back<T><<<grid_of(a, kBackRows, a.all.weight.cols, kBackCols), kBackThreads, kShared, stream>>>(
      a, DropoutMask(a.all.dropout), log_of(a.all.weight));
  return cudaGetLastError();
}

template <class Args> bool is_empty(const Experts<Args>& a) { return a.all.m == 0 || a.all.weight.rows == 0; }

}  // namespace

cudaError_t by_library(const ExpertsNf4Backward& a, Way wanted, bool* result) {
  return choose_groups(a, has_units(a.all), wanted, result);
}
cudaError_t by_library(const ExpertsGroupBackward& a, Way wanted, bool* result) {
  return choose_groups(a, false, wanted, result);
}
cudaError_t by_library(const ExpertsMxfp4Backward& a, Way wanted, bool* result) {
  return choose_groups(a, false, wanted, result);
}

cudaError_t experts_decode(const ExpertsDecode<Nf4Weight>& a, cudaStream_t stream) {
  return launch_decode(a, Nf4Source<Decoded>{a.weight, log_of(a.weight)}, stream);
}
cudaError_t experts_decode(const ExpertsDecode<GroupWeight>& a, cudaStream_t stream) {
  return with_bits(a.weight.bits, [&](auto bits) {
    return launch_decode(a, StackGroupSource<decltype(bits)::value>{{a.weight, log_of(a.weight)}}, stream);
  });
}
cudaError_t experts_decode(const ExpertsDecode<Mxfp4Weight>& a, cudaStream_t stream) {
  return launch_decode(a, Mxfp4Source<Decoded>{a.weight}, stream);
}

cudaError_t experts_place(const ExpertsPlace& a, cudaStream_t stream) {
  const int64_t blocks = ceil_div(a.m * (a.cols / 8), kDequantizeThreads);
  if (blocks == 0) return cudaSuccess;
  stack_place<<<blocks < kPlaceBlocks ? unsigned(blocks) : kPlaceBlocks, kDequantizeThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t experts_nf4(const ExpertsNf4& a, cudaStream_t stream) {
  if (is_empty(a)) return cudaSuccess;
  if (!has_chunks(a.all)) return launch_any(a, stream);
  return a.all.dtype == DType::bf16 ? launch_chunks<__nv_bfloat16>(a, stream) : launch_chunks<__half>(a, stream);
}

cudaError_t experts_nf4_backward(const ExpertsNf4Backward& a, cudaStream_t stream) {
  if (a.all.m == 0 || !has_units(a.all)) return launch_any_back(a, stream);
  return a.all.dtype == DType::bf16 ? launch_units<__nv_bfloat16>(a, stream) : launch_units<__half>(a, stream);
}

cudaError_t experts_group(const ExpertsGroup& a, cudaStream_t stream) {
  if (is_empty(a)) return cudaSuccess;
  return with_bits(a.all.weight.bits, [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    if (!has_chunks<B>(a.all)) return launch_any(a, stream);
    return a.all.dtype == DType::bf16 ? launch_rows<__nv_bfloat16, B>(a, stream) : launch_rows<__half, B>(a, stream);
  });
}

cudaError_t experts_group_backward(const ExpertsGroupBackward& a, cudaStream_t stream) {
  return launch_any_back(a, stream);
}

cudaError_t experts_mxfp4(const ExpertsMxfp4& a, cudaStream_t stream) {
  if (is_empty(a)) return cudaSuccess;
  if (!has_chunks(a.all)) return launch_any(a, stream);
  return a.all.dtype == DType::bf16 ? launch_rows<__nv_bfloat16>(a, stream) : launch_rows<__half>(a, stream);
}

cudaError_t experts_mxfp4_backward(const ExpertsMxfp4Backward& a, cudaStream_t stream) {
  return launch_any_back(a, stream);
}

cudaError_t experts_dense(const ExpertsDense& a, cudaStream_t stream) {
  return is_empty(a) ? cudaSuccess : launch_any(a, stream);
}

cudaError_t experts_dense_backward(const ExpertsDenseBackward& a, cudaStream_t stream) {
  return launch_any_back(a, stream);
}

}  // namespace peftops::cuda
