// Low-rank terms of many adapters, as the tiles of thin.cuh: one launch for each of the two products of
// all segments of a batch, decoding (a row or
// two of each adapter) and prefill alike. A block of threads has a segment's rows, and follows its adapter's pages as it
// goes: a look-up for every line. Limit: reading factors while decoding, x or y in prefill.
#include "kernels/cuda/thin.cuh"
#include "kernels/multi_lora_linear.h"

namespace peftops::cuda {
namespace {

static_assert(kThinCols == kLoraLine, "a chunk is a line");

struct PagedFactor {
  const LoraPool& pool;
  const LoraSegment& of;
  int64_t start, k;   // its first element, and its columns
  const void* f;
  DType dtype;
  static constexpr bool wide = true;
  static constexpr int64_t stride = 1;

  __device__ PagedFactor(const LoraPool& p, const LoraSegment& s, int64_t first, int64_t columns)
      : pool(p), of(s), start(first), k(columns), f(p.storage), dtype(p.dtype) {}
  __device__ bool exact() const { return dtype != DType::f32; }
  // A chunk of columns is a line of a page, padded with zeros.
  __device__ FactorLine line(int64_t j, int64_t chunk) const {
    const int64_t exists = j < of.r ? j : of.r - 1, page = int64_t(1) << pool.page_shift;
    const int64_t e = start + exists * (ceil_div(k, kLoraLine) * kLoraLine) + chunk;
    return {int64_t(of.pages[e >> pool.page_shift]) << pool.page_shift | (e & (page - 1)), j < of.r ? kLoraLine : 0};
  }
};

struct SegmentRows {
  const int64_t* order;
  int64_t count;
  __device__ int64_t operator()(int64_t i) const { return i < count ? order[i] : -1; }
};
__device__ SegmentRows rows_of(const LoraSegments& all, const LoraSegment& s) {
  return {all.order + s.begin, s.end - s.begin};
}

// A row of k elements can be read n at a time.
template <class T> bool is_wide(const void* p, int64_t k, int64_t n) { return k % n == 0 && aligned(p, n * sizeof(T)); }

template <class X, int Tiles>
__global__ void __launch_bounds__(kThinThreads, 1) multi_shrink(MultiLoraAdd a, bool wide) {
  __shared__ ShrinkMemory<Tiles> memory;
  const LoraSegment s = a.segments.at[blockIdx.x];
  const int64_t rank = int64_t(blockIdx.y) * 8 * Tiles;
  if (rank >= s.r) return;
  const SegmentRows row = rows_of(a.segments, s);
  shrink_tile<X, Tiles>(static_cast<const X*>(a.x), a.k, wide, row, PagedFactor{a.pool, s, s.first, a.k}, rank, DropoutMask(),
                        memory, [&](int i, int64_t j, float sum) {
                          if (j < s.r) a.u[row(i) * a.ldu + j] = sum;
                        });
}

template <class Y> __global__ void __launch_bounds__(kThinThreads, 2) multi_expand(MultiLoraAdd a, bool wide) {
  const LoraSegment s = a.segments.at[blockIdx.x];
  const auto u = [&](int64_t row, int64_t j) { return j < s.r ? __fmul_rn(s.scale, a.u[row * a.ldu + j]) : 0.f; };
  expand_tile(static_cast<Y*>(a.y), a.n, wide, rows_of(a.segments, s), u, s.r, PagedFactor{a.pool, s, s.second, a.n},
              DropoutMask());
}

template <class X> __global__ void __launch_bounds__(kThinThreads) multi_gradient(MultiLoraGradient a, bool wide) {
  __shared__ GradientMemory memory;
  const LoraSegment s = a.segments.at[blockIdx.z];
  const int64_t rank = int64_t(blockIdx.y) * 16;
  if (rank >= s.r) return;
  const auto u = [&](int64_t row, int64_t j) { return j < s.r ? a.u[row * a.ldu + j] : 0.f; };
  gradient_tile<X, 1>(static_cast<const X*>(a.x), a.k, wide, rows_of(a.segments, s), s.end - s.begin, u, rank,
                      DropoutMask(), memory, [&](int64_t j, int64_t col, const Few<4>& sum) {
                        if (j >= s.r) return;
                        for (int i = 0; i < 4 && col + i < a.k; ++i)
                          a.d[s.first + (a.by_rank ? j * a.k + col + i : (col + i) * s.r + j)] =
                              __fmul_rn(s.scale, sum.at[i]);
                      });
}

}  // namespace

cudaError_t multi_lora_add(const MultiLoraAdd& a, cudaStream_t stream) {
  if (a.segments.count == 0 || a.ldu == 0) return cudaSuccess;
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kTiles = 2;   // 16 ranks: while decoding, blocks of threads are few
    const unsigned count = unsigned(a.segments.count);
    const dim3 ranks(count, unsigned(ceil_div(a.ldu, 8 * kTiles))), columns(count, unsigned(ceil_div(a.n, kExpandCols)));
    multi_shrink<T, kTiles><<<ranks, kThinThreads, 0, stream>>>(a, is_wide<T>(a.x, a.k, 4));
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess || a.n == 0) return status;
    multi_expand<T><<<columns, kThinThreads, 0, stream>>>(a, is_wide<T>(a.y, a.n, 4));
    return cudaGetLastError();
  });
}

cudaError_t multi_lora_gradient(const MultiLoraGradient& a, cudaStream_t stream) {
  if (a.segments.count == 0 || a.ldu == 0 || a.k == 0) return cudaSuccess;
  return with_type(a.x_dtype, [&](auto t) {
    using X = decltype(t);
    const dim3 grid(unsigned(ceil_div(a.k, kThinCols)), unsigned(ceil_div(a.ldu, 16)), unsigned(a.segments.count));
    multi_gradient<X><<<grid, kThinThreads, 0, stream>>>(a, is_wide<X>(a.x, a.k, 2));
    return cudaGetLastError();
  });
}

}  // namespace peftops::cuda
