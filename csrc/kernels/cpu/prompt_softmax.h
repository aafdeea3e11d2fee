// What both directions of gated_prompt_attention share: how the queries are cut into work, and the softmax over
// the prompt tokens.
//
// Sixteen queries go at a time, of whatever heads and samples, as long as they see one prompt. Their scores lie
// with one query a lane: the softmax runs down the lanes, without a single sum across them, and no number of
// tokens wastes any.
#pragma once
#include "kernels/cpu/exp2.h"
#include "kernels/cpu/tile_product.h"
#include "kernels/gated_prompt_attention.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kQueries = 16;   // a tile: a cache line of scores for each token, whatever the vector width
constexpr int64_t kTokens = 32;    // a chunk of prompt tokens; longer prompts go chunk by chunk, as in flash attention
constexpr float kLog2e = 1.44269504088896f;

constexpr int64_t padded(int64_t d) { return ceil_div(d, kPromptPad) * kPromptPad; }

// One unit of work: a block of the queries that see one prompt.
struct Unit {
  int64_t prompt, kv_head, first, count;   // queries [first, first + count) of it

  Unit(const GatedPrompt& in, int64_t index) {
    const int64_t queries = queries_of(in), blocks = blocks_of(in), block = index % blocks;
    prompt = index / blocks / in.kv_heads, kv_head = index / blocks % in.kv_heads;
    first = queries * block / blocks, count = queries * (block + 1) / blocks - first;
  }
  static int64_t queries_of(const GatedPrompt& in) {
    return in.batch / in.prompts * (in.heads / in.kv_heads) * in.rows;
  }
  // Blocks are long enough for a unit's share of the gradients, K (d + dv) floats, to be 1/32 of them at most.
  static int64_t blocks_of(const GatedPrompt& in) {
    constexpr int64_t kRowsPerToken = 64, kRows = 512;
    const int64_t rows = kRowsPerToken * in.tokens;
    return ceil_div(queries_of(in), rows > kRows ? rows : kRows);
  }
  static int64_t count_of(const GatedPrompt& in) { return in.prompts * in.kv_heads * blocks_of(in); }
};

// A tile of queries: where each is, and its gate.
struct Queries {
  int64_t n;
  struct { int64_t batch, head, row; } at[kQueries];
  float gate[kQueries];   // 0 beyond n

  Queries(const GatedPrompt& in, const Unit& u, int64_t tile) : n(at_most(kQueries, u.count - tile)) {
    const int64_t group = in.heads / in.kv_heads;
    int64_t row = (u.first + tile) % in.rows, rest = (u.first + tile) / in.rows;
    for (int64_t i = 0; i < kQueries; ++i) {
      at[i] = {u.prompt + rest / group, u.kv_head * group + rest % group, row};
      gate[i] = i < n ? in.gate[at[i].head * in.gate_stride] : 0.f;
      if (++row == in.rows) row = 0, ++rest;
    }
  }
  int64_t offset(int64_t i, const Strides& s) const {
    return at[i].batch * s.batch + at[i].head * s.head + at[i].row * s.row;
  }
  // Their rows of a tensor; those beyond n are zero, and with them whatever is computed from them.
  template <class T> void gather(const void* p, const Strides& s, int64_t d, const Tile& to) const {
    for (int64_t i = 0; i < n; ++i) widen_row(static_cast<const T*>(p) + offset(i, s), d, to, i);
    memset(to.row(n), 0, (kQueries - n) * to.ld * sizeof(float));
  }
};

// What one task works in: a chunk of a prompt, a tile of queries, and their softmax.
struct PromptSoftmax {
  const GatedPrompt& in;
  int64_t first, n;                // the tokens of the chunk
  Tile key, value;                 // [kTokens], fp32
  Tile query, query_t;             // [kQueries][d] and, times scale and log2(e), [d][kQueries]
  Tile p;                          // [kTokens][kQueries] scores, then probabilities but for the division by `sum`
  float *top, *sum, *rescale;      // [kQueries] largest score, sum of p, and what the last chunk scaled p by
  float* rest;                     // scratch that is free

  PromptSoftmax(const GatedPrompt& in, void* scratch) : in(in), rest(static_cast<float*>(scratch)) {
    key = take(kTokens, padded(in.d)), value = take(kTokens, padded(in.dv));
    query = take(kQueries, padded(in.d)), query_t = take(padded(in.d), kQueries);
    p = take(kTokens, kQueries);
    top = take(1, kQueries).p, sum = take(1, kQueries).p, rescale = take(1, kQueries).p;
  }
  Tile take(int64_t rows, int64_t cols) {
    rest += rows * cols;
    return {rest - rows * cols, cols};
  }

  template <class T> void start(const Queries& q) {
    q.gather<T>(in.query, in.query_at, in.d, query);
    transpose_tile(query, in.scale * kLog2e, query_t);
    for (int64_t i = 0; i < kQueries; i += kLanes) store(top + i, set(-__builtin_inff())), store(sum + i, zero());
  }

  // Calls f for each chunk of the prompt; one that is a single chunk need not be loaded twice.
  template <class F> void each_chunk(const Unit& u, bool loaded, const F& f) {
    for (int64_t token = 0; token < in.tokens; token += kTokens) {
      first = token, n = at_most(kTokens, in.tokens - token);
      if (!loaded || in.tokens > kTokens) {
        load_tokens(u, in.key, in.key_at, in.d, key);
        load_tokens(u, in.value, in.value_at, in.dv, value);
      }
      f();
    }
  }
  void load_tokens(const Unit& u, const void* from, const Strides& s, int64_t d, const Tile& to) const {
    with_type(in.prompt_dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      const T* at = static_cast<const T*>(from) + u.prompt * s.batch + u.kv_head * s.head + first * s.row;
      for (int64_t j = 0; j < n; ++j) widen_row(at + j * s.row, d, to, j);
    });
  }

  void scores() const { multiply<false>(n, as_rows(key), query_t, in.d, p); }

  // Makes the chunk's scores p = 2^(score - top). Under a larger top than before, `rescale` is what scales
  // down whatever was summed so far.
  void exponentiate() const {
    for (int64_t i = 0; i < kQueries; i += kLanes) {
      const Vec old = load(top + i);
      Vec high = old;
      for (int64_t j = 0; j < n; ++j) high = max(load(p.row(j) + i), high);
      const Vec down = exp2(old - high);
      Vec total = load(sum + i) * down;
      for (int64_t j = 0; j < n; ++j) {
        const Vec e = exp2(load(p.row(j) + i) - high);
        store(p.row(j) + i, e);
        total = total + e;
      }
      store(top + i, high), store(sum + i, total), store(rescale + i, down);
    }
  }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
