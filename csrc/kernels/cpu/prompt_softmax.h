// The common part of both directions of gated_prompt_attention: the queries as units of work, and the softmax over the
// prompt tokens.
//
// Sixteen queries are done at a time. They may be of several heads and samples, if they see the same prompt. A lane has
// the scores of one query, and computes its softmax. So no sum runs across lanes, and all lanes are used for any number
// of tokens.
#pragma once
#include "kernels/cpu/exp2.h"
#include "kernels/cpu/tile_product.h"
#include "kernels/gated_prompt_attention.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kQueries = 16;   // a tile: a cache line of scores for each token, for any vector width
constexpr int64_t kHeads = 8;      // prompt heads of a unit: transformers' queries lie next to each other
constexpr int64_t kPromptFloats = 48 << 10;   // of prompts in scratch, 192 KB of L2
constexpr float kLog2e = 1.44269504088896f;

constexpr int64_t padded(int64_t n) { return ceil_div(n, kPromptPad) * kPromptPad; }

// Prompt tokens taken at once. A longer prompt goes chunk by chunk, as in flash attention.
constexpr int64_t chunk_of(int64_t d, int64_t dv) { return padded(d) + padded(dv) > kMaxPromptHeadDim ? 16 : 32; }

// How the work is cut: a unit is up to kHeads heads of one prompt, and a block of the queries that each of them
// serves. Those are numbered by sample, row and, fastest, query head.
struct Plan {
  bool whole;   // the prompts of a unit all fit in scratch
  int64_t queries, blocks, heads, head_blocks, count;

  Plan(const GatedPrompt& in, int64_t blocks) : blocks(blocks) {
    const int64_t d = padded(in.d), dv = padded(in.dv), tokens = padded(in.tokens);
    whole = in.tokens <= chunk_of(in.d, in.dv);
    heads = whole ? at_most(kPromptFloats / (tokens * (2 * d + dv)), at_most(kHeads, in.kv_heads)) : 1;
    head_blocks = ceil_div(in.kv_heads, heads);
    queries = queries_of(in);
    count = in.prompts * head_blocks * blocks;
  }
  static int64_t queries_of(const GatedPrompt& in) {
    return in.batch / in.prompts * in.rows * (in.heads / in.kv_heads);
  }
};

struct Unit {
  int64_t prompt, head, heads, block, first, queries;   // [head, head + heads) and [first, first + queries)

  Unit(const GatedPrompt& in, const Plan& all, int64_t index) {
    block = index % all.blocks, index /= all.blocks;
    prompt = index / all.head_blocks, head = index % all.head_blocks * all.heads;
    heads = at_most(all.heads, in.kv_heads - head);
    first = all.queries * block / all.blocks, queries = all.queries * (block + 1) / all.blocks - first;
  }
};

// A tile of queries of one prompt head: where each is, and its gate.
struct Queries {
  const GatedPrompt& in;
  int64_t n;
  struct { int64_t batch, row, head, member; } at[kQueries];   // head = prompt head * heads / kv_heads + member
  float gate[kQueries];                                        // 0 beyond n

  Queries(const GatedPrompt& in, const Unit& u, int64_t tile) : in(in), n(at_most(kQueries, u.queries - tile)) {
    const int64_t group = in.heads / in.kv_heads, query = u.first + tile;
    int64_t member = query % group, row = query / group % in.rows, batch = u.prompt + query / group / in.rows;
    for (auto& place : at) {
      place = {batch, row, 0, member};
      if (++member == group) member = 0, ++row;
      if (row == in.rows) row = 0, ++batch;
    }
  }
  void choose(int64_t prompt_head) {
    for (int64_t i = 0; i < kQueries; ++i) {
      at[i].head = prompt_head * (in.heads / in.kv_heads) + at[i].member;
      gate[i] = i < n ? in.gate[at[i].head * in.gate_stride] : 0.f;
    }
  }
  int64_t offset(int64_t i, const Strides& s) const {
    return at[i].batch * s.batch + at[i].head * s.head + at[i].row * s.row;
  }
  // Their rows of a tensor. Rows beyond n are zero, and so are all results from them.
  template <class T> void gather(const void* p, const Strides& s, int64_t d, const Tile& to) const {
    for (int64_t i = 0; i < n; ++i) widen_row(static_cast<const T*>(p) + offset(i, s), d, to.row(i), to.ld);
    memset(to.row(n), 0, (kQueries - n) * to.ld * sizeof(float));
  }
};

// Which of a prompt's matrices a task needs by rows, and which by columns.
enum class Needs { forward, backward };

// The scratch of one task: the prompts of a unit, a tile of queries, and their softmax.
template <Needs kNeeds> struct PromptSoftmax {
  const GatedPrompt& in;
  const Plan plan;
  Tile key, value;            // [tokens]; of the chosen head, or a chunk of it
  Tile key_t, value_t;        // the same transposed, key_t times scale and log2(e)
  int64_t first, n;           // the tokens that they hold
  Tile query, query_t;        // [kQueries][d], [d][kQueries]
  Tile p;                     // [tokens][kQueries] scores, then probabilities but for the division by `sum`
  float *top, *sum, *rescale; // [kQueries] largest score, sum of p, and what the last chunk scaled p by

  PromptSoftmax(const GatedPrompt& in, int64_t blocks, void* scratch)
      : in(in), plan(in, blocks), chunk(chunk_of(in.d, in.dv)), d(padded(in.d)), dv(padded(in.dv)),
        rest(static_cast<float*>(scratch)) {
    prompts = take(1, kPromptFloats).p, staged = take(chunk, d > dv ? d : dv).p;
    query = take(kQueries, d), query_t = take(d, kQueries), p = take(chunk, kQueries);
    top = take(1, kQueries).p, sum = take(1, kQueries).p, rescale = take(1, kQueries).p;
  }

  // Chooses the prompt of the unit's head-th head for the other functions.
  void choose(const Unit& u, int64_t head) {
    const int64_t tokens = plan.whole ? padded(in.tokens) : chunk;
    float* at = prompts + head * tokens * (2 * d + dv);
    key = {at, d}, key_t = {key.row(tokens), tokens};
    value = {key_t.row(d), dv}, value_t = {value.p, tokens};   // one or the other
    prompt = u.prompt, prompt_head = u.head + head;
    if (plan.whole) first = 0, n = in.tokens;
  }
  void start(const Unit& u) {
    for (int64_t head = 0; plan.whole && head < u.heads; ++head) choose(u, head), convert();
  }

  // Calls f for each chunk of the chosen prompt.
  template <class F> void each_chunk(const F& f) {
    if (plan.whole) return f();
    for (first = 0; first < in.tokens; first += chunk) {
      n = at_most(chunk, in.tokens - first);
      convert();
      f();
    }
  }

  template <class T> void take_queries(const Queries& q) {
    q.gather<T>(in.query, in.query_at, in.d, query);
    transpose_tile(query, 1.f, query_t);
    for (int64_t i = 0; i < kQueries; i += kLanes) store(top + i, set(-__builtin_inff())), store(sum + i, zero());
  }

  void scores() const { multiply<false>(n, columns_of(key_t), query_t, in.d, p); }

  // Makes the chunk's scores p = 2^(score - top). If top is larger than before, `rescale` is the factor for the earlier
  // sums.
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

  Tile take(int64_t rows, int64_t cols) {
    rest += rows * cols;
    return {rest - rows * cols, cols};
  }
  static constexpr int64_t floats(int64_t d) {   // with dv = d
    return kPromptFloats + (chunk_of(d, d) + 2 * kQueries) * d + (chunk_of(d, d) + 3) * kQueries;
  }

 private:
  const int64_t chunk, d, dv;
  int64_t prompt, prompt_head;
  float *prompts, *staged, *rest;

  void convert() {
    const Tile keys = kNeeds == Needs::backward ? key : Tile{staged, d};
    const Tile values = kNeeds == Needs::forward ? value : Tile{staged, dv};
    load_rows(in.key, in.key_at, in.d, keys);
    transpose_tile(keys, in.scale * kLog2e, key_t);
    load_rows(in.value, in.value_at, in.dv, values);
    if (kNeeds == Needs::backward) transpose_tile(values, 1.f, value_t);
  }
  void load_rows(const void* from, const Strides& s, int64_t width, const Tile& to) const {
    with_type(in.prompt_dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      const T* at = static_cast<const T*>(from) + prompt * s.batch + prompt_head * s.head + first * s.row;
      for (int64_t j = 0; j < n; ++j) widen_row(at + j * s.row, width, to.row(j), to.ld);
      memset(to.row(n), 0, (key_t.ld - n) * to.ld * sizeof(float));
    });
  }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
