// Attention over pages: by tensor cores where queries and pages have one 16-bit dtype (paged_mma.cuh), by lanes for all
// else (paged_lanes.cuh). Both cut a sequence at the same tokens, whoever asks, and put its parts together by the same
// operations (paged.cuh).
#include "kernels/cuda/paged_lanes.cuh"
#include "kernels/cuda/paged_mma.cuh"

namespace peftops::cuda {
namespace {

constexpr int64_t kMaxMmaWidth = 128;   // sums of wider heads do not fit into registers

// A warp for each query. What the parts of a query left, in their order.
__global__ void __launch_bounds__(kPagedThreads) gather_parts(PagedAttention a) {
  const uint32_t query = blockIdx.x * kPagedWarps + threadIdx.x / kWarp;
  if (query >= a.batch * a.heads * a.rows) return;
  const PagedQueries q(a, query, 1);
  const PagedParts parts(q);
  for (int column = threadIdx.x % kWarp; column < a.dv; column += kWarp) {
    PagedWeight all;
    float sum = 0.f;
    for (int part = parts.first(); q.exist() && !parts.none() && part <= parts.last(); ++part) {
      const float* slot = q.slot(0, part);
      PagedWeight own;
      own.total = slot[a.dv], own.top = slot[a.dv + 1];
      sum = put_together(sum, slot[column], all.add(own));
    }
    const float none = q.exist() ? 0.f : kNotANumber;
    set_element(a.y, a.dtype, q.at_y(0) + column, !q.exist() || parts.none() ? none : sum * (1.f / all.total));
  }
}

// Rows of a tensor can be read eight elements at a time.
bool is_wide(const void* p, int64_t width, const PageStrides& at) {
  return aligned(p, 16) && width % 8 == 0 && at.page % 8 == 0 && at.head % 8 == 0 && at.token % 8 == 0;
}

dim3 grid_of(const PagedAttention& a, int queries) {
  const int64_t tiles = ceil_div(a.rows * (a.heads / a.kv_heads), queries);
  return dim3(unsigned(a.batch * a.kv_heads * tiles), unsigned(a.slots > 1 ? a.slots : 1));
}

template <class T, int Width> cudaError_t by_mma(const PagedAttention& a, bool wide, cudaStream_t stream) {
  constexpr auto* kKernel = paged_by_mma<T, Width>;
  constexpr size_t kShared = sizeof(PagedTiles<T, Width>);
  const bool wide_query = is_wide(a.query, a.d, {a.query_batch, a.query_head, a.query_row});
  const cudaError_t status = allow_shared<kKernel>(kShared);
  if (status != cudaSuccess) return status;
  kKernel<<<grid_of(a, kMmaQueries), kPagedThreads, kShared, stream>>>(a, wide_query, wide);
  return cudaGetLastError();
}

template <int Wide> cudaError_t by_lanes(const PagedAttention& a, bool wide, cudaStream_t stream) {
  paged_by_lanes<Wide><<<grid_of(a, kLaneQueries), kPagedThreads, 0, stream>>>(a, wide);
  return cudaGetLastError();
}

}  // namespace

cudaError_t paged_attention(const PagedAttention& a, cudaStream_t stream) {
  const bool wide = is_wide(a.key, a.d, a.key_at) && is_wide(a.value, a.dv, a.value_at);
  const int64_t width = a.d > a.dv ? a.d : a.dv;
  if (a.dtype == a.page_dtype && a.dtype != DType::f32 && width <= kMaxMmaWidth) {
    const auto of_width = [&](auto t) {
      using T = decltype(t);
      return width <= 64 ? by_mma<T, 64>(a, wide, stream) : by_mma<T, kMaxMmaWidth>(a, wide, stream);
    };
    return a.dtype == DType::bf16 ? of_width(__nv_bfloat16()) : of_width(__half());
  }
  return a.dv <= 64 ? by_lanes<2>(a, wide, stream) : a.dv <= 128 ? by_lanes<4>(a, wide, stream)
       : a.dv <= 256 ? by_lanes<8>(a, wide, stream) : by_lanes<16>(a, wide, stream);
}

cudaError_t paged_gather(const PagedAttention& a, cudaStream_t stream) {
  const int64_t queries = a.batch * a.heads * a.rows;
  gather_parts<<<unsigned(ceil_div(queries, kPagedWarps)), kPagedThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
