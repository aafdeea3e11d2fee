// What both ways of paged_attention share: which queries and tokens a block of threads has, and how the sums of parts
// are put together.
#pragma once
#include "kernels/cuda/few.cuh"
#include "kernels/paged_attention.h"

namespace peftops::cuda {

constexpr int kPagedThreads = 128, kPagedWarps = kPagedThreads / kWarp;
constexpr float kNone = -1e30f;   // less than any score, and finite
constexpr float kNotANumber = __builtin_nanf("");

// Up to `most` neighbours among the queries of one sequence that share a head of keys. Queries and tokens are counted
// in 32 bits, since a division in 64 takes a hundred instructions.
struct PagedQueries {
  const PagedAttention& a;
  const int group, all, page_size;
  int first, kv_head, n;
  int64_t sequence;
  int length;

  __device__ PagedQueries(const PagedAttention& a, uint32_t block, int most)
      : a(a), group(int(a.heads / a.kv_heads)), all(int(a.rows) * group), page_size(int(a.page_size)) {
    const uint32_t tiles = uint32_t(all + most - 1) / uint32_t(most), row = block / tiles;
    first = int(block % tiles) * most, n = all - first < most ? all - first : most;
    kv_head = int(row % uint32_t(a.kv_heads)), sequence = row / uint32_t(a.kv_heads);
    length = a.lengths[sequence];
  }

  __device__ bool exist() const { return length >= 0 && length <= a.most_pages * a.page_size; }   // or it is no length
  __device__ int row(int i) const { return (first + i) / group; }
  __device__ int head(int i) const { return kv_head * group + (first + i) % group; }
  __device__ int position(int i) const { return length - int(a.rows) + row(i); }
  // The first token that a query sees; the last one is its own.
  __device__ int from(int i) const {
    const int at = position(i);
    return at >= a.window ? int(at - a.window) + 1 : 0;
  }

  // Where query i has its elements of query and y, and its slot of sums.
  __device__ int64_t at_query(int i) const {
    return sequence * a.query_batch + head(i) * a.query_head + row(i) * a.query_row;
  }
  __device__ int64_t at_y(int i) const { return ((sequence * a.rows + row(i)) * a.heads + head(i)) * a.dv; }
  __device__ float* slot(int i, int which) const {
    return a.sums + (((sequence * a.kv_heads + kv_head) * all + first + i) * a.slots + which) * a.slot;
  }
  // The page of a token before `length`; negative if the table has none.
  __device__ int page_of(int token) const {
    const int page = a.table[sequence * a.most_pages + token / page_size];
    return page < a.pages ? page : -1;
  }
  __device__ int64_t offset(int page, const PageStrides& at, int token) const {
    return page * at.page + kv_head * at.head + token % page_size * at.token;
  }
};

// The parts that queries see, from the first query's first token to the last one's own.
struct PagedParts {
  static constexpr int kPart = int(kPagedPart);
  int begin, end;

  __device__ explicit PagedParts(const PagedQueries& q)
      : begin(q.from(0)), end(q.position(q.n - 1) + 1) {}   // neither falls from a query to the next
  __device__ bool none() const { return begin >= end; }
  __device__ int first() const { return begin / kPart; }
  __device__ int last() const { return (end - 1) / kPart; }
  __device__ int from(int part) const { return begin > part * kPart ? begin : part * kPart; }
  __device__ int to(int part) const { return end < (part + 1) * kPart ? end : (part + 1) * kPart; }
};

// The sums over some tokens: of 2^(score - top), and of as many values. Those of others are put to them by add().
struct PagedWeight {
  float top = kNone, total = 0;

  // Takes another weight in. Sums under this one are to be multiplied by .x, and those under the other by .y.
  __device__ float2 add(const PagedWeight& other) {
    const float high = fmaxf(top, other.top);   // passes a NaN over, which `total` has
    const float2 factor = {exp2f(top - high), exp2f(other.top - high)};
    total = __fmaf_rn(total, factor.x, __fmul_rn(other.total, factor.y)), top = high;
    return factor;
  }
};
__device__ inline float put_together(float sum, float other, float2 factor) {
  return __fmaf_rn(sum, factor.x, __fmul_rn(other, factor.y));
}

// The parts that fall to this block of threads: blockIdx.y counts them if each has its own.
struct PartsOfBlock {
  bool alone;   // one part of several
  int first, last;

  __device__ PartsOfBlock(const PagedQueries& q, const PagedParts& parts)
      : alone(q.a.slots > 1), first(alone ? int(blockIdx.y) : parts.first()),
        last(alone ? int(blockIdx.y) : parts.last()) {}
};

// Whether this block of threads has a part. If no block has one, the result is written here: 0 for padding, NaN where a
// length is out of range.
__device__ inline bool has_part(const PagedQueries& q, const PagedParts& parts) {
  if (q.exist() && !parts.none())
    return q.a.slots <= 1 || (int(blockIdx.y) >= parts.first() && int(blockIdx.y) <= parts.last());
  if (blockIdx.y == 0 && q.a.slots <= 1)
    for (int e = threadIdx.x, dv = int(q.a.dv); e < q.n * dv; e += kPagedThreads)
      set_element(q.a.y, q.a.dtype, q.at_y(e / dv) + e % dv, q.exist() ? 0.f : kNotANumber);
  return false;
}

// Hands a part's sums on: to its slot, to the parts before it, or to y. `all` has the weights of the parts before, and
// each_sum(f) calls f(o, i, sum, column) for the sums of this thread, C neighbours at a time: of query i, whose weights
// are own[o].
template <int C, int N, class F>
__device__ void finish_part(const PagedQueries& q, const PartsOfBlock& mine, int part, PagedWeight (&all)[N],
                            const PagedWeight (&own)[N], const F& each_sum) {
  const PagedAttention& a = q.a;
  const bool wide = a.dv % C == 0;
  if (mine.alone)
    return each_sum([&](int o, int i, const Few<C>& sum, int column) {
      float* slot = q.slot(i, part);
      sum.store(slot + column, a.dv - column, wide);
      if (column == 0) slot[a.dv] = own[o].total, slot[a.dv + 1] = own[o].top;
    });
  float2 factor[N];
#pragma unroll
  for (int o = 0; o < N; ++o) factor[o] = all[o].add(own[o]);
  each_sum([&](int o, int i, Few<C> sum, int column) {
    const int64_t count = a.dv - column;
    if (mine.first < mine.last) {
      float* slot = q.slot(i, 0) + column;
      Few<C> kept;
      if (part > mine.first) wide ? kept.load(slot) : kept.load(slot, count);
#pragma unroll
      for (int c = 0; c < C; ++c) sum.at[c] = put_together(kept.at[c], sum.at[c], factor[o]);
      if (part < mine.last) sum.store(slot, count, wide);
    }
    if (part < mine.last) return;
    const float share = 1.f / all[o].total;
#pragma unroll
    for (int c = 0; c < C; ++c) sum.at[c] = q.position(i) < 0 ? 0.f : sum.at[c] * share;
    sum.store(a.y, a.dtype, q.at_y(i) + column, count, wide);
  });
}

}  // namespace peftops::cuda
