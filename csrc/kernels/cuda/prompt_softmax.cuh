// The common part of both directions of gated_prompt_attention: the queries as units of work, and the softmax over the
// prompt tokens.
//
// A block of threads takes 64 queries of one prompt head at a time, of any heads and samples. Four
// threads share a query, one in each pair of warps: a thread makes the scores of every fourth token. What a warp reads
// of a prompt is thus the same for all its lanes, one pass over the banks. Queries and prompts come through shared
// memory in slices of 32 columns. A longer prompt goes chunk by chunk, as in flash attention, and its scores are made
// again for every 64 columns of a result, so that the sums of any width stay in registers.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/gated_prompt_attention.h"

namespace peftops::cuda {

constexpr int kPromptThreads = 256, kQueries = 64, kParts = kPromptThreads / kQueries;
constexpr int kSlice = 32;           // columns: a whole warp reads a row

// A tensor's rows and where they lie: those of a tile's queries, and those of a prompt.
struct QueryRows {
  const void* data;
  const int64_t* at;   // of each query
  int64_t width;
};
struct TokenRows {
  const void* data;
  Strides at;
  int64_t width;
};

// Per: tokens a thread has of a chunk. Four are for prompts of one chunk, which most are.
constexpr int kShortPrompt = kParts * 4;

template <class T, int Per> struct PromptTile {
  static constexpr int kTokens = kParts * Per;
  static constexpr bool kShort = kTokens == kShortPrompt;
  static constexpr int kWide = (kShort ? 4 : 2) * kSlice;   // columns of a result that are summed at a time
  using Weights = float[kTokens][kQueries];   // of a chunk's tokens in the queries' sums

  struct Memory {
    float rows[kQueries][kSlice + 4];   // 4 more: 16-byte reads of neighbouring queries meet in no bank
    float tokens[kTokens][kSlice];
    float part[kParts][kQueries];
    float gate[kQueries];               // 0 beyond n
    int64_t at[3][kQueries];            // where their rows begin, in query and in two other tensors
  };

  const GatedPrompt& in;
  Memory& memory;
  const int query = threadIdx.x % kQueries, part = threadIdx.x / kQueries;
  int64_t prompt, kv_head, queries;   // of the block of threads; how many queries see that head
  int n = 0;                          // queries of the tile
  int64_t first = 0;                  // tokens of the chunk
  int count = 0;
  float top, sum;                     // largest score of the query, sum of 2^(score - top)

  __device__ PromptTile(const GatedPrompt& in, Memory& memory, int64_t prompt_head)
      : in(in), memory(memory), prompt(prompt_head / in.kv_heads), kv_head(prompt_head % in.kv_heads),
        queries(in.batch / in.prompts * in.rows * (in.heads / in.kv_heads)) {}

  __device__ QueryRows query_rows() const { return {in.query, memory.at[0], in.d}; }
  __device__ TokenRows keys() const { return {in.key, in.key_at, in.d}; }
  __device__ TokenRows values() const { return {in.value, in.value_at, in.dv}; }
  __device__ bool whole() const { return kShort || in.tokens <= kTokens; }   // one chunk

  // Takes queries begin to end, kQueries at most, which two other tensors have at `second` and `third`. Whether any of
  // their gates is open.
  __device__ bool take(int64_t begin, int64_t end, const Strides& second, const Strides& third) {
    __syncthreads();   // all threads have read the tile before
    n = int(end - begin);
    bool open = false;
    if (threadIdx.x < kQueries) {
      const int64_t group = in.heads / in.kv_heads, index = begin + threadIdx.x;
      const int64_t head = kv_head * group + index % group;
      const float gate = int(threadIdx.x) < n ? in.gate[head * in.gate_stride] : 0.f;
      memory.gate[threadIdx.x] = gate, open = gate != 0;
      const int64_t batch = prompt + index / group / in.rows, row = index / group % in.rows;
      const Strides* const all[3] = {&in.query_at, &second, &third};
#pragma unroll
      for (int i = 0; i < 3; ++i)
        memory.at[i][threadIdx.x] = batch * all[i]->batch + head * all[i]->head + row * all[i]->row;
    }
    return __syncthreads_or(open);
  }

  // f(q, c) for the elements of a slice of the queries, a row a warp at a time.
  template <class F> __device__ void each_element(const F& f) const {
#pragma unroll 4
    for (int q = threadIdx.x / kSlice; q < kQueries; q += kPromptThreads / kSlice) f(q, int(threadIdx.x) % kSlice);
  }

  // Columns from `column` on; zeros for what does not exist.
  __device__ void fetch_rows(const QueryRows& from, int64_t column) const {
    each_element([&](int q, int c) {
      const bool exists = q < n && column + c < from.width;
      memory.rows[q][c] = exists ? to_float(static_cast<const T*>(from.data)[from.at[q] + column + c]) : 0.f;
    });
  }
  __device__ void fetch_tokens(const TokenRows& from, int64_t column) const {
    const int64_t begin = prompt * from.at.batch + kv_head * from.at.head + first * from.at.row + column;
    for (int e = threadIdx.x; e < count * kSlice; e += kPromptThreads) {
      const int j = e / kSlice, c = e % kSlice;
      const bool exists = column + c < from.width;
      memory.tokens[j][c] = exists ? element(from.data, in.prompt_dtype, begin + j * from.at.row + c) : 0.f;
    }
  }

  template <class F> __device__ void each_chunk(const F& f) {
    if constexpr (kShort) {
      count = int(in.tokens);
      f();
    } else {
      for (first = 0; first < in.tokens; first += kTokens) {
        count = int(in.tokens - first < kTokens ? in.tokens - first : kTokens);
        f();
      }
    }
  }

  // dot[i] = the query's row times that of token 4 i + part
  __device__ void multiply(const QueryRows& rows, const TokenRows& tokens, float (&dot)[Per]) const {
#pragma unroll
    for (float& d : dot) d = 0.f;
    for (int64_t column = 0; column < rows.width; column += kSlice) {
      __syncthreads();
      fetch_rows(rows, column);
      fetch_tokens(tokens, column);
      __syncthreads();
#pragma unroll 2
      for (int c = 0; c < kSlice; c += 4) {
        const float4 r = *reinterpret_cast<const float4*>(&memory.rows[query][c]);
#pragma unroll
        for (int i = 0; i < Per; ++i) {
          if (kParts * i + part >= count) break;
          const float4 t = *reinterpret_cast<const float4*>(&memory.tokens[kParts * i + part][c]);
          dot[i] = __fmaf_rn(r.w, t.w, __fmaf_rn(r.z, t.z, __fmaf_rn(r.y, t.y, __fmaf_rn(r.x, t.x, dot[i]))));
        }
      }
    }
  }
  __device__ void scores(float (&s)[Per]) const {   // in powers of two
    multiply(query_rows(), keys(), s);
#pragma unroll
    for (float& x : s) x *= in.scale * kLog2e;
  }

  // v of the query's four threads, put together by `both` in one order.
  template <class F> __device__ float over_parts(float v, const F& both) const {
    memory.part[part][query] = v;
    __syncthreads();
    v = memory.part[0][query];
#pragma unroll
    for (int p = 1; p < kParts; ++p) v = both(v, memory.part[p][query]);
    __syncthreads();
    return v;
  }
  __device__ float sum_over_parts(float v) const {
    return over_parts(v, [](float a, float b) { return a + b; });
  }
  template <class F> __device__ void each_token(const F& f) const {   // f(i, j): of this thread, and of the chunk
#pragma unroll
    for (int i = 0; i < Per; ++i) {
      if (kParts * i + part >= count) break;
      f(i, kParts * i + part);
    }
  }

  __device__ void begin_softmax() { top = -__builtin_inff(), sum = 0.f; }

  // Adds the chunk's scores to top and sum; returns the factor for sums that were made with the top before.
  __device__ float add_scores(const float (&s)[Per]) {
    float high = top;
    each_token([&](int i, int) { high = fmaxf(high, s[i]); });
    high = over_parts(high, [](float a, float b) { return fmaxf(a, b); });
    float total = 0.f;
    each_token([&](int i, int) { total += exp2f(s[i] - high); });
    const float down = exp2f(top - high);
    top = high, sum = sum * down + sum_over_parts(total);
    return down;
  }

  // result(q, c, column, value): a slice of the queries' sums of tokens, each with its weight, for every element that
  // exists. prepare() fills the chunk's weights; with one chunk they are filled already.
  template <class Prepare, class F>
  __device__ void sum_tokens(const TokenRows& tokens, const Weights& weights, const Prepare& prepare,
                             const F& result) {
    constexpr int kEach = kSlice / kParts;   // columns a thread, neighbours
#pragma unroll 1
    for (int64_t wide = 0; wide < tokens.width; wide += kWide) {
      float total[kWide / kSlice][kEach] = {};
      each_chunk([&] {
        if (!whole()) prepare();
#pragma unroll
        for (int s = 0; s < kWide / kSlice; ++s) {
          if (wide + s * kSlice >= tokens.width) break;
          __syncthreads();
          fetch_tokens(tokens, wide + s * kSlice);
          __syncthreads();
#pragma unroll 1
          for (int j = 0; j < count; ++j) {
            const float weight = weights[j][query];
            const float4* from = reinterpret_cast<const float4*>(&memory.tokens[j][kEach * part]);
#pragma unroll
            for (int c = 0; c < kEach; c += 4) {
              const float4 t = from[c / 4];
              const float value[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
              for (int i = 0; i < 4; ++i) total[s][c + i] = __fmaf_rn(weight, value[i], total[s][c + i]);
            }
          }
        }
      });
#pragma unroll
      for (int s = 0; s < kWide / kSlice; ++s) {
        const int64_t column = wide + s * kSlice;
        if (column >= tokens.width) break;
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kEach; c += 4)
          *reinterpret_cast<float4*>(&memory.rows[query][kEach * part + c]) =
              make_float4(total[s][c], total[s][c + 1], total[s][c + 2], total[s][c + 3]);
        __syncthreads();
        each_element([&](int q, int c) {
          if (q < n && column + c < tokens.width) result(q, column + c, memory.rows[q][c]);
        });
      }
    }
  }
};

}  // namespace peftops::cuda
