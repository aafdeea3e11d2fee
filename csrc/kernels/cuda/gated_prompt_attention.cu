// Both products of an attention for 64 queries at a time, with everything between them in shared memory; see
// prompt_softmax.cuh. Limit: reading query and out and writing y; backward, reading query and g and writing dquery.
// A block of threads leaves its share of a prompt's gradients for a second pass, so they have the same bits every time.
#include "kernels/gated_prompt_attention.h"
#include "kernels/cuda/prompt_softmax.cuh"

namespace peftops::cuda {
namespace {

template <class T, int Per> __global__ void __launch_bounds__(kPromptThreads, 2) add_prompt(GatedPromptAdd a) {
  using Tile = PromptTile<T, Per>;
  __shared__ typename Tile::Memory memory;
  __shared__ typename Tile::Weights p;
  const int64_t blocks = ceil_div(a.in.batch / a.in.prompts * a.in.rows * (a.in.heads / a.in.kv_heads), kQueries);
  Tile tile(a.in, memory, blockIdx.x / blocks);
  const int64_t begin = blockIdx.x % blocks * kQueries;
  const int64_t end = begin + kQueries < tile.queries ? begin + kQueries : tile.queries;
  const bool open = tile.take(begin, end, a.out_at, a.y_at);

  const auto finish = [&](int q, int64_t column, float sum) {
    const T from = static_cast<const T*>(a.out)[memory.at[1][q] + column];
    T& to = static_cast<T*>(a.y)[memory.at[2][q] + column];
    to = memory.gate[q] == 0 ? from : from_float<T>(to_float(from) + sum);   // shut: not even a zero's sign may change
  };
  if (!open) {
    for (int64_t column = 0; column < a.in.dv && a.y != a.out; column += kSlice)
      tile.each_element([&](int q, int c) {
        if (q < tile.n && column + c < a.in.dv) finish(q, column + c, 0.f);
      });
    return;
  }
  float s[Per];
  tile.begin_softmax();
  tile.each_chunk([&] {
    tile.scores(s);
    tile.add_scores(s);
  });
  const float factor = memory.gate[tile.query] / tile.sum;
  const auto weigh = [&] {
    tile.each_token([&](int i, int j) { p[j][tile.query] = exp2f(s[i] - tile.top) * factor; });
  };
  if (tile.whole()) weigh();
  const auto prepare = [&] {
    tile.scores(s);
    weigh();
  };
  tile.sum_tokens(tile.values(), p, prepare, finish);
}

// to[token][c] = or += the sum over the tile's queries of weight * row: eight warps share the tokens of the chunk.
template <class Tile>
__device__ void sum_queries(const Tile& tile, const QueryRows& rows, const typename Tile::Weights& weights, float* to,
                            int64_t ld, bool add) {
  constexpr int kWarps = kPromptThreads / kWarp, kEach = Tile::kTokens / kWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t column = 0; column < rows.width; column += kSlice) {
    __syncthreads();
    tile.fetch_rows(rows, column);
    __syncthreads();
    float total[kEach] = {};
#pragma unroll 1
    for (int q = 0; q < kQueries; q += 4) {
      float row[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = tile.memory.rows[q + i][lane];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int j = warp + kWarps * e;
        if (j >= tile.count) break;
        const float4 v = *reinterpret_cast<const float4*>(&weights[j][q]);
        const float weight[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) total[e] = __fmaf_rn(weight[i], row[i], total[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int j = warp + kWarps * e;
      if (j >= tile.count || column + lane >= rows.width) break;
      float& sum = to[(tile.first + j) * ld + column + lane];
      sum = add ? sum + total[e] : total[e];
    }
  }
}

__host__ __device__ constexpr int64_t padded(int64_t n) { return ceil_div(n, kPromptPad) * kPromptPad; }

template <class T, int Per>
__global__ void __launch_bounds__(kPromptThreads, 2) prompt_gradients(GatedPromptBackward a) {
  using Tile = PromptTile<T, Per>;
  __shared__ typename Tile::Memory memory;
  __shared__ typename Tile::Weights p, e;   // of g in dvalue; of query in dkey and of key in dquery
  const GatedPrompt& in = a.in;
  Tile tile(in, memory, blockIdx.x / a.blocks);
  const int64_t block = blockIdx.x % a.blocks, group = in.heads / in.kv_heads;
  const int64_t begin = tile.queries * block / a.blocks, end = tile.queries * (block + 1) / a.blocks;
  float* dkey = a.partial + blockIdx.x * a.partial_stride;
  float* dvalue = dkey + in.tokens * padded(in.d);
  float* dgate = dvalue + in.tokens * padded(in.dv);
  const QueryRows g = {a.g, memory.at[1], in.dv};

  for (int64_t query = begin; query < end; query += kQueries) {
    const bool add = query > begin;
    tile.take(query, query + kQueries < end ? query + kQueries : end, a.g_at, a.dquery_at);
    float s[Per], t[Per], mean = 0.f;   // t: g . value
    tile.begin_softmax();
    const auto multiply = [&] {   // both products, in a loop that is not unrolled: code of half the size
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        float dot[Per];
        tile.multiply(which ? g : tile.query_rows(), which ? tile.values() : tile.keys(), dot);
#pragma unroll
        for (int i = 0; i < Per; ++i) (which ? t[i] : s[i]) = which ? dot[i] : dot[i] * (in.scale * kLog2e);
      }
    };
    tile.each_chunk([&] {
      multiply();
      const float down = tile.add_scores(s);
      float total = 0.f;
      tile.each_token([&](int i, int) { total = __fmaf_rn(exp2f(s[i] - tile.top), t[i], total); });
      mean = mean * down + tile.sum_over_parts(total);
    });
    mean /= tile.sum;

    if (tile.part == 0) memory.part[0][tile.query] = mean;
    __syncthreads();
    for (int64_t member = threadIdx.x; member < group; member += kPromptThreads) {
      float total = 0.f;
      for (int64_t q = (member - query % group + group) % group; q < tile.n; q += group) total += memory.part[0][q];
      dgate[member] = add ? dgate[member] + total : total;
    }

    const float factor = memory.gate[tile.query] / tile.sum;
    const auto weigh = [&] {
      tile.each_token([&](int i, int j) {
        const float weight = exp2f(s[i] - tile.top) * factor;
        p[j][tile.query] = weight, e[j][tile.query] = weight * (t[i] - mean) * in.scale;
      });
    };
    const auto prepare = [&] {
      multiply();
      weigh();
    };
    tile.each_chunk([&] {
      if (tile.whole()) weigh();
      else prepare();
      sum_queries(tile, g, p, dvalue, padded(in.dv), add);
      sum_queries(tile, tile.query_rows(), e, dkey, padded(in.d), add);
    });
    if (a.dquery)
      tile.sum_tokens(tile.keys(), e, prepare, [&](int q, int64_t column, float sum) {
        T& to = static_cast<T*>(a.dquery)[memory.at[2][q] + column];
        to = from_float<T>(a.add_to_dquery ? to_float(to) + sum : sum);
      });
  }
}

// A thread for each element of dkey, dvalue and dgate, in this order; the blocks' shares are added in theirs.
__global__ void __launch_bounds__(kPromptThreads) reduce_prompt(GatedPromptReduce a) {
  const int64_t prompt_heads = a.prompts * a.kv_heads, d = padded(a.d);
  const auto sum_of = [&](int64_t prompt_head, int64_t at) {
    float sum = 0.f;
    for (int64_t b = 0; b < a.blocks; ++b) sum += a.partial[(prompt_head * a.blocks + b) * a.partial_stride + at];
    return sum;
  };
  int64_t i = int64_t(blockIdx.x) * kPromptThreads + threadIdx.x;
  const int64_t keys = prompt_heads * a.tokens * a.d, values = prompt_heads * a.tokens * a.dv;
  if (i < keys) {
    const int64_t token = i / a.d % a.tokens;
    return set_element(a.dkey, a.dtype, i, sum_of(i / a.d / a.tokens, token * d + i % a.d));
  }
  i -= keys;
  if (i < values) {
    const int64_t token = i / a.dv % a.tokens, at = a.tokens * d + token * padded(a.dv) + i % a.dv;
    return set_element(a.dvalue, a.dtype, i, sum_of(i / a.dv / a.tokens, at));
  }
  i -= values;
  if (i >= a.heads) return;
  const int64_t group = a.heads / a.kv_heads, at = a.tokens * (d + padded(a.dv)) + i % group;
  float sum = 0.f;
  for (int64_t prompt = 0; prompt < a.prompts; ++prompt) sum += sum_of(prompt * a.kv_heads + i / group, at);
  a.dgate[i] = sum;
}

// f(T(), PerThread<...>()) with the tokens a thread takes at a time.
template <int Per> struct PerThread { static constexpr int value = Per; };
template <class F> cudaError_t with_tile(const GatedPrompt& in, const F& f) {
  return with_type(in.dtype, [&](auto t) {
    return in.tokens <= kShortPrompt ? f(t, PerThread<4>()) : f(t, PerThread<8>());
  });
}

}  // namespace

cudaError_t gated_prompt_add(const GatedPromptAdd& a, cudaStream_t stream) {
  const GatedPrompt& in = a.in;
  const int64_t queries = in.prompts ? in.batch / in.prompts * in.rows * (in.heads / in.kv_heads) : 0;
  if (queries == 0) return cudaSuccess;
  return with_tile(in, [&](auto t, auto per) {
    const unsigned grid = unsigned(in.prompts * in.kv_heads * ceil_div(queries, kQueries));
    add_prompt<decltype(t), decltype(per)::value><<<grid, kPromptThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

cudaError_t gated_prompt_backward(const GatedPromptBackward& a, cudaStream_t stream) {
  const int64_t grid = a.in.prompts * a.in.kv_heads * a.blocks;
  if (grid == 0) return cudaSuccess;
  return with_tile(a.in, [&](auto t, auto per) {
    prompt_gradients<decltype(t), decltype(per)::value><<<unsigned(grid), kPromptThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

cudaError_t gated_prompt_reduce(const GatedPromptReduce& a, cudaStream_t stream) {
  const int64_t elements = a.prompts * a.kv_heads * a.tokens * (a.d + a.dv) + a.heads;
  if (elements == 0) return cudaSuccess;
  reduce_prompt<<<unsigned(ceil_div(elements, kPromptThreads)), kPromptThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace peftops::cuda
