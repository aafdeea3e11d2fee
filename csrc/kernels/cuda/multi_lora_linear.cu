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

  __device__ bool exact() const { return pool.dtype != DType::f32; }
  // A chunk of columns is a line of a page, padded with zeros; beyond the last page there is nothing to look up.
  __device__ FactorLine line(int64_t j, int64_t chunk) const {
    if (j >= of.r) return {0, 0};
    const int64_t e = start + j * (ceil_div(k, kLoraLine) * kLoraLine) + chunk, page = int64_t(1) << pool.page_shift;
    return {int64_t(of.pages[e >> pool.page_shift]) << pool.page_shift | (e & (page - 1)), kLoraLine};
  }
  __device__ float one(const FactorLine& line, int i) const {
    return i < line.columns ? element(pool.storage, pool.dtype, line.at + i) : 0.f;
  }
  __device__ Few<4> four(const FactorLine& line, int first) const {
    Few<4> result;
    result.load(pool.storage, pool.dtype, line.at + first, line.columns - first, true);
    return result;
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
